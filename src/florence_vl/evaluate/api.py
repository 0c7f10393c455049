"""`florence_vl.evaluate`: run benchmarks with one call, like `florence-vl evaluate` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.evaluate.local import LocalAnswerer, load_answerer, state_fingerprint
from florence_vl.evaluate.runner import open_results, plan, run
from florence_vl.evaluate.scoring import Scores, score_folder
from florence_vl.evaluate.store import ResultsFolder
from florence_vl.evaluate.suites import choose, data_folder

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor


def evaluate(
    model: str | Path | tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor],
    suite: str | Sequence[str],
    out: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    protocol: str = "current",
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    draws: int = 1000,
) -> Scores:
    """Score a model on benchmarks. `out` keeps every prompt and answer, and an interrupted run resumes from it.

    Args:
        model: Folder, hub id or packaged name of an image-text-to-text model; or the result of `florence_vl.load`.
        suite: Suites, benchmarks and YAML files: a list, or one comma-separated text.
        out: Results folder.
        data: Folder with the benchmarks' parquet files; the mini suite needs none.
        limit: Approximate number of questions per benchmark.
        seed: Seed of the sample that `limit` draws.
        protocol: `current`, or `authors` for the settings of the paper's runs.
        batch_size: Questions per batch.
        device: Device for loading a model; see `florence_vl.model.loading.choose_device`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`, for loading a model.
        draws: Bootstrap samples of the intervals; 0 omits them.

    Returns:
        Scores by benchmark; `BenchmarkScore.note` describes what is incomplete.

    Raises:
        FileNotFoundError: The model or a benchmark's file does not exist.
        ValueError: The suite is unknown, or the results folder belongs to another model.
    """
    made = plan(
        choose(suite, protocol),
        lambda benchmark: benchmark.questions(data_folder(benchmark, Path(data) if data is not None else None)),
        limit,
        seed,
    )
    if isinstance(model, tuple):
        loaded, processor = model
        identity: dict[str, Any] = {
            "model": str(loaded.config.name_or_path or type(loaded).__name__),
            "fingerprint": state_fingerprint(loaded, processor),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        answerer = LocalAnswerer(loaded, processor, batch_size, identity, seed=seed)
    else:
        answerer = load_answerer(str(model), device, dtype, batch_size, seed=seed)
    folder = ResultsFolder(Path(out))
    try:
        open_results(folder, answerer, made, Path(data) if data is not None else None)
        run(answerer, made, folder)
    finally:
        answerer.close()
    return score_folder(folder.path, draws)
