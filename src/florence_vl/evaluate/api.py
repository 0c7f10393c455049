"""`florence_vl.evaluate`: a benchmark run as one call; `florence-vl evaluate` does the same from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.evaluate.local import LocalAnswerer, load_answerer
from florence_vl.evaluate.runner import open_results, plan, run
from florence_vl.evaluate.scoring import Scores, score_folder
from florence_vl.evaluate.store import ResultsFolder
from florence_vl.evaluate.suites import choose, data_folder
from florence_vl.model.features import state_hash

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
    """Score a model on benchmarks. Every prompt and answer is kept in `out`; a run that was killed goes on there.

    Args:
        model: Folder, hub id or packaged name of an image-text-to-text model; or what `florence_vl.load` returned.
        suite: Suites, benchmarks and YAML files of your own: names, or one text with commas.
        out: Results folder.
        data: Folder with the benchmarks' parquet files; the mini suite needs none.
        limit: About this many questions of each benchmark.
        seed: Of the sample that `limit` draws.
        protocol: `current`, or `authors`: settings of the paper's runs.
        batch_size: Questions at a time.
        device: See `florence_vl.model.loading.choose_device`; of a model that has to be loaded.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; of a model that has to be loaded.
        draws: Bootstrap samples of the intervals; 0 leaves them out.

    Returns:
        Scores by benchmark; `BenchmarkScore.note` says what is incomplete.

    Raises:
        FileNotFoundError: The model or a benchmark's file is not there.
        ValueError: An unknown suite, or a results folder of another model.
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
            "fingerprint": state_hash(loaded),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        answerer = LocalAnswerer(loaded.eval(), processor, batch_size, identity, seed=seed)
    else:
        answerer = load_answerer(str(model), device, dtype, batch_size, seed=seed)
    folder = ResultsFolder(Path(out))
    try:
        open_results(folder, answerer, made, Path(data) if data is not None else None)
        run(answerer, made, folder)
    finally:
        answerer.close()
    return score_folder(folder.path, draws)
