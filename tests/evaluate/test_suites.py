"""The 25 benchmarks: each reads tiny files of the public schema, uses lmms-eval's prompts, and computes its scores."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from florence_vl.evaluate.benchmark import Benchmark, select
from florence_vl.evaluate.metrics import METRICS, score_all
from florence_vl.evaluate.metrics.judged import JudgedMetric
from florence_vl.evaluate.question import IMAGE, Question
from florence_vl.evaluate.runner import plan
from florence_vl.evaluate.suites import benchmark_names, choose, suites

PAPER = suites()["paper"]
RIGHT = {
    "vqav2_val": "Red",
    "gqa": "left",
    "vizwiz_vqa_val": "can",
    "textvqa_val": "Nokia",
    "ocrbench": "stop STOP",
    "chartqa": "98",
    "docvqa_val": "may 1",
    "infovqa_val": "12%",
}


def right_answer(question: Question) -> str:
    """A right answer in the form that models give."""
    if question.benchmark in RIGHT:
        return RIGHT[question.benchmark]
    answer = question.reference["answer"]
    if question.benchmark == "hallusion_bench_image":
        return "Yes, it is."
    if question.reference.get("question_type") == "multi_choice":
        return "B"
    return str(answer)


def test_the_paper_has_25_columns() -> None:
    columns = [column for benchmark in choose("paper") for column in benchmark.columns]
    assert len(columns) == len(set(columns)) == 25
    assert {benchmark.group for benchmark in choose("paper")} == {
        "General",
        "OCR & Chart",
        "Knowledge",
        "Vision-centric",
    }
    sizes = [
        sum(len(b.columns) for b in choose("paper") if b.group == group)
        for group in ("General", "OCR & Chart", "Knowledge")
    ]
    assert sizes == [13, 5, 4]


@pytest.mark.parametrize("name", PAPER)
def test_questions_of_the_public_schema(name: str, benchmark_folder: Path) -> None:
    (benchmark,) = choose(name)
    questions = benchmark.questions(benchmark_folder)
    assert len({question.id for question in questions}) == len(questions) >= 2
    for question in questions:
        assert sum(part is IMAGE for part in question.parts) == len(question.images) >= 1
        for image in question.images:
            assert image.read().startswith(b"\x89PNG")
    scorer = benchmark.scorer
    if isinstance(scorer, JudgedMetric):
        assert benchmark.judge == "required"
        return
    good = [(scorer.judge(right_answer(q), q.reference), q.reference) for q in questions]
    empty = [(scorer.judge("", q.reference), q.reference) for q in questions]
    for column, key in benchmark.columns.items():
        full = {"MME-P": 200, "MME-C": 200}.get(column, 100)
        assert score_all(scorer, good)[key] == pytest.approx(full), column
        assert score_all(scorer, empty)[key] == 0, column


def test_pictures_are_shared_where_the_data_set_says_so(benchmark_folder: Path) -> None:
    for name, pictures in (
        ("pope", 2),
        ("mme", 2),
        ("docvqa_val", 1),
        ("vqav2_val", 1),
        ("gqa", 1),
        ("mmbench_en_dev", 2),
    ):
        (benchmark,) = choose(name)
        assert len({q.picture_key for q in benchmark.questions(benchmark_folder)}) == pictures, name


def test_images_stand_where_mmmu_names_them(benchmark_folder: Path) -> None:
    (benchmark,) = choose("mmmu_val")
    first = benchmark.questions(benchmark_folder)[0]
    ask = "?\nA. a cat\nB. a dog\n\nAnswer with the option's letter from the given choices directly."
    assert first.parts == (IMAGE, "Which is it, given", IMAGE, ask)


def _lmms_task(benchmark: Benchmark) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Module with doc_to_text, its keyword arguments and the YAML of the task in lmms-eval."""
    tasks = Path(importlib.import_module("lmms_eval").__file__ or "").parent / "tasks"
    (file,) = list(tasks.glob(f"*/{benchmark.source.task}.yaml")) or [
        p for p in tasks.glob("*/*.yaml") if re.search(rf'^task: *"?{benchmark.source.task}"?\s*$', p.read_text(), re.M)
    ]

    def read(path: Path) -> dict[str, Any]:
        text = re.sub(r"!function (\S+)", r'"\1"', path.read_text())
        values = yaml.safe_load(text)
        return read(path.parent / values["include"]) | values if "include" in values else values

    config = read(file)
    module_name, function = config["doc_to_text"].split(".")
    sys.path.insert(0, str(file.parent))
    try:
        for stale in ("utils", "en_utils", "cn_utils", "evaluate_hb"):
            sys.modules.pop(stale, None)
        module = importlib.import_module(module_name)
    finally:
        sys.path.pop(0)
    kwargs = (config.get("lmms_eval_specific_kwargs") or {}).get("default")
    return getattr(module, function), kwargs, config


@pytest.mark.parametrize("name", PAPER)
def test_prompts_splits_and_limits_are_those_of_lmms_eval(
    name: str,
    benchmark_folder: Path,
    benchmark_tables: dict[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lmms_eval")
    monkeypatch.setenv("OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY", "none"))
    (benchmark,) = choose(name)
    doc_to_text, kwargs, config = _lmms_task(benchmark)
    rows = benchmark_tables.get(name) or benchmark_tables[f"{name}.{benchmark.source.config}"]
    rows = [row for row in rows if row.get("data_type", "image") == "image"]
    for row, question in zip(rows, benchmark.questions(benchmark_folder), strict=True):
        theirs = doc_to_text(row, kwargs) if kwargs is not None else doc_to_text(row)
        if name == "mmmu_val":
            theirs = "\n".join(part.strip() for part in re.split(r"<image \d>", theirs) if part.strip())
        assert question.text.strip() == theirs.strip()
    assert benchmark.source.dataset == config["dataset_path"]
    assert benchmark.source.config == config.get("dataset_name")
    assert benchmark.source.split == config["test_split"].strip()
    limit = (config.get("generation_kwargs") or {}).get("max_new_tokens", 1024)
    assert benchmark.generation.max_new_tokens == (1024 if name == "mathvista_testmini" else limit)


def test_the_authors_protocol_differs_where_it_says(benchmark_folder: Path) -> None:
    now, then = choose("mmvet,mmmu_val"), choose("mmvet,mmmu_val", "authors")
    assert [b.generation.temperature for b in now] == [0, 0]
    assert [b.generation.temperature for b in then] == [0.2, 0]
    assert [b.generation.max_new_tokens for b in then] == [1024, 1024]
    assert all(a.fingerprint != b.fingerprint for a, b in zip(now, then, strict=True))
    assert all(benchmark.differences for benchmark in choose("paper"))


def test_select_keeps_units_whole_and_nests(benchmark_folder: Path) -> None:
    questions = [
        Question(f"{i}", "pairs", ("?",), (), {"unit": i + 1, "answer": "A", "choices": ["x", "y"]}) for i in range(200)
    ]
    chosen = METRICS["mmvp"]
    small, large = (select(questions, chosen, limit) for limit in (31, 80))
    assert len(small) == 32
    assert len(large) == 80
    assert {q.id for q in small} < {q.id for q in large}
    assert all(
        q.id in {s.id for s in small}
        for s in small
        for q in questions
        if chosen.unit(q.reference) == chosen.unit(s.reference)
    )
    assert select(questions, chosen, 31, seed=1) != small
    with pytest.raises(ValueError, match="at least 1"):
        select(questions, chosen, 0)


OWN = """
name: zoo
title: Zoo
group: Mine
columns: {Zoo: accuracy}
rows:
  id: key
  images: [photo]
  reference: {answer: "animal"}
prompt: "Which animal is this?"
generation: {max_new_tokens: 8}
metric: exact_match
"""


def test_a_benchmark_of_ones_own_is_one_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"key": "a", "animal": "zebra", "photo": {"bytes": None, "path": "a.png"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "zoo.parquet")
    (tmp_path / "own_zoo.yaml").write_text(OWN)
    (benchmark,) = choose(str(tmp_path / "own_zoo.yaml"))
    (question,) = benchmark.questions(tmp_path)
    assert question.prompt == "<image>\nWhich animal is this?"
    assert question.images[0].read() == (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"missing image: .*zoo.parquet"):
        question.images[0].read()


@pytest.mark.parametrize(
    ("metric", "reference", "message"),
    [
        ("multiple_choice", "{answer: key}", "'choices' is missing"),
        ("multiple_choice", "{answer: key, choices: \"['a', 'b']\"}", "the letter of one of them, found 'a'"),
        ("yes_no", "{answer: animal}", "needs the answer yes or no, found 'zebra'"),
    ],
)
def test_a_reference_that_the_metric_cannot_use(tmp_path: Path, metric: str, reference: str, message: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"key": "a", "animal": "zebra", "photo": {"bytes": None, "path": "a.png"}}]
    name = f"zoo_{metric}_{len(reference)}"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    own = (
        OWN.replace("name: zoo", f"name: {name}")
        .replace("exact_match", metric)
        .replace('{answer: "animal"}', reference)
    )
    (tmp_path / "own_zoo.yaml").write_text(own)
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(choose(str(tmp_path / "own_zoo.yaml")), lambda benchmark: benchmark.questions(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("metric: exact_match", "metric: exact_mach"), "unknown metric 'exact_mach'. Did you mean 'exact_match'"),
        (("title: Zoo", "titel: Zoo"), "unknown field 'titel'. Did you mean 'title'"),
        (("max_new_tokens: 8", "max_new_tokens: 0"), "max_new_tokens must be at least 1"),
        (("images: [photo]", "image: [photo]"), "unknown field 'image'. Did you mean"),
        (("prompt:", "prompt: [a"), "not valid YAML"),
        (("metric:", "authors: {generation: {max_tokens: 5}}\nmetric:"), "max_tokens"),
    ],
)
def test_a_bad_benchmark_file(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    (tmp_path / "bad.yaml").write_text(OWN.replace(*change))
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(str(tmp_path / "bad.yaml"))


def test_unknown_names_and_missing_files(tmp_path: Path, benchmark_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown suite or benchmark 'popee'\. Did you mean 'pope'"):
        choose("popee")
    (benchmark,) = choose("pope")
    with pytest.raises(FileNotFoundError, match=r"pope\.parquet.*lmms-lab-encoder/POPE"):
        benchmark.questions(tmp_path)
    (tmp_path / "pope.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="is not a parquet file"):
        benchmark.questions(tmp_path)
    assert "mme" in benchmark_names()


def test_a_wrong_schema_is_named(tmp_path: Path, benchmark_tables: dict[str, list[dict[str, Any]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (benchmark,) = choose("pope")
    rows = [{k: v for k, v in row.items() if k != "question"} for row in benchmark_tables["pope"]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pope.parquet")
    with pytest.raises(ValueError, match="'question' is undefined; the columns are id, "):
        benchmark.questions(tmp_path)
    rows = [{**row, "image": None} if i == 2 else row for i, row in enumerate(benchmark_tables["pope"])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pope.parquet")
    with pytest.raises(ValueError, match=r"missing image: .*row 2 \(pope question 2\)"):
        benchmark.questions(tmp_path)
    pq.write_table(
        pa.Table.from_pylist([{k: v for k, v in r.items() if k != "image"} for r in rows]), tmp_path / "pope.parquet"
    )
    with pytest.raises(ValueError, match="has no column 'image'"):
        benchmark.questions(tmp_path)


def test_files_of_a_download(tmp_path: Path, benchmark_tables: dict[str, list[dict[str, Any]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    layout = {
        "pope/data/test-00000-of-00002.parquet": benchmark_tables["pope"][:2],
        "pope/data/test-00001-of-00002.parquet": benchmark_tables["pope"][2:],
        "mmbench_en_dev/en/dev-00000-of-00001.parquet": benchmark_tables["mmbench_en_dev"],
        "mmbench_en_dev/en/test-00000-of-00001.parquet": benchmark_tables["mmbench_en_dev"][:1],
        "mmbench_en_dev/cn/dev-00000-of-00001.parquet": benchmark_tables["mmbench_en_dev"][:1],
        "gqa/testdev_balanced_instructions/testdev-0.parquet": benchmark_tables["gqa.testdev_balanced_instructions"],
        "gqa/testdev_balanced_images/testdev-0.parquet": benchmark_tables["gqa.testdev_balanced_images"],
        "cv_bench/test_2d.parquet": benchmark_tables["cv_bench"][:2],
        "cv_bench/test_3d.parquet": benchmark_tables["cv_bench"][2:],
    }
    for name, rows in layout.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    counts = {b.name: len(b.questions(tmp_path)) for b in choose("pope,mmbench_en_dev,gqa,cv_bench")}
    assert counts == {"pope": 4, "mmbench_en_dev": 3, "gqa": 2, "cv_bench": 3}
