"""The mini suite as lmms-eval tasks: one YAML file per group over local parquet, scored by our own metric."""

from __future__ import annotations

from pathlib import Path

import yaml

from florence_vl.evaluate.suites import choose
from florence_vl.files import write_text
from florence_vl_mini.suite import write_suite

_UTILS = '''"""Functions of the tasks beside this file."""

from florence_vl.evaluate.lmms_eval_plugin import mini_text, mini_visual, short_answer_results  # noqa: F401
'''


def write_tasks(folder: Path) -> list[str]:
    """Write parquet files, task YAML files and their functions, for `lmms-eval --include_path FOLDER`.

    Returns:
        Names of the tasks.

    Raises:
        ValueError: The package florence-vl-mini is not installed.
    """
    folder = folder.resolve()
    write_suite(folder)
    write_text(folder / "utils.py", _UTILS)
    names = []
    for benchmark in choose("mini"):
        name = benchmark.source.task or benchmark.name
        task = {
            "task": name,
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{benchmark.name}.parquet")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {
                "max_new_tokens": benchmark.generation.max_new_tokens,
                "temperature": 0,
                "do_sample": False,
                "until": [],
            },
            "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
            "metadata": [{"version": 1.0}],
        }
        functions = "".join(
            f"{key}: !function utils.{function}\n"
            for key, function in (
                ("doc_to_visual", "mini_visual"),
                ("doc_to_text", "mini_text"),
                ("process_results", "short_answer_results"),
            )
        )
        write_text(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False) + functions)
        names.append(name)
    return names
