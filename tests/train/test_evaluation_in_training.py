"""Evaluation during training: logged, without effect on the run, rejected early if impossible."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from florence_vl.evaluate.sample import evaluate_sample, suite_scorer
from florence_vl.model.tiny import tiny_model, tiny_recipe
from florence_vl.train import load_recipe, train
from florence_vl.train.checkpoint import list_checkpoints
from florence_vl.train.evaluation import read_suite
from florence_vl.train.metrics import read_metrics
from florence_vl.train.world import World


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six questions of POPE about three pictures."""
    folder = tmp_path_factory.mktemp("pope")
    rows = []
    for number in range(6):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (number // 2 * 90, 99, 10)).save(file, "PNG")
        row = {"id": str(number), "question_id": str(number), "question": "Is there a dog in the image?"}
        row |= {"answer": ("yes", "no")[number % 2], "image_source": f"COCO_{number // 2}", "category": "random"}
        rows.append(row | {"image": {"bytes": file.getvalue(), "path": None}})
    pq.write_table(pa.Table.from_pylist(rows), folder / "pope.parquet")
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight LLaVA records with pictures."""
    folder = tmp_path_factory.mktemp("records")
    rows = []
    for number in range(8):
        Image.new("RGB", (40, 30), (30 * number, 99, 10)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"red number {number}"}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def recipe(records: Path, output: Path, evaluate: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    base = {
        "steps": 5,
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every_steps": None, "export": False},
        "logging": {"progress": "none", "every_steps": 10},
        "data": {"sources": [{"path": str(records)}], "max_length": 160},
        "evaluate": evaluate,
    }
    return tiny_recipe(output, **base | changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_are_logged_and_the_run_is_the_same_without_them(
    records: Path, pope: Path, tmp_path: Path, precision: str
) -> None:
    def run(name: str, evaluate: dict[str, Any] | None) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        model, processor = tiny_model()  # with DropPath in the tower: every step draws
        modes: set[tuple[bool, ...]] = set()

        def look(_trainer: Any, _row: dict[str, Any]) -> None:
            modes.add(tuple(module.training for module in model.modules()))

        values = recipe(records, tmp_path / name, evaluate, precision=precision)
        train(values, model=model, processor=processor, callbacks=[look], suite_reader=suite_scorer)
        assert len(modes) == 1
        return read_metrics(tmp_path / name / "metrics.jsonl"), model.state_dict()

    asked = {"suite": "pope", "data": str(pope), "every_steps": 2, "limit": 4, "sources": [{"path": str(records)}]}
    rows, weights = run("with", asked)
    plain_rows, plain_weights = run("without", None)
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain_rows]
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)
    assert ["eval/pope" in row for row in rows] == [False, True, False, True, True]
    assert all(0 <= row["eval/pope"] <= 100 for row in rows if "eval/pope" in row)
    assert {key for key in rows[1] if key.startswith("eval/")} == {
        "eval/pope",
        "eval/unfinished",
        "eval/loss",
        "eval/seconds",
    }
    assert not any(key.startswith("eval/") for row in plain_rows for key in row)


def test_scores_are_those_of_the_model_at_that_step(records: Path, pope: Path, tmp_path: Path) -> None:
    model, processor = tiny_model()
    found: dict[int, dict[str, float]] = {}

    def again(trainer: Any, row: dict[str, Any]) -> None:
        state = torch.get_rng_state()
        found[row["step"]] = evaluate_sample(trainer.model, processor, "pope", limit=4, data=pope)
        assert torch.equal(torch.get_rng_state(), state)

    values = recipe(records, tmp_path, {"suite": "pope", "data": str(pope), "every_steps": 1, "limit": 4}, steps=3)
    train(values, model=model, processor=processor, callbacks=[again], suite_reader=suite_scorer)
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert {key: row[key] for key in found[row["step"]]} == found[row["step"]]


def test_trackers_hear_of_every_evaluation_and_people_too(
    records: Path, pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, processor = tiny_model()
    asked = {"suite": "pope", "data": str(pope), "every_steps": 2, "limit": 2}
    logging = {"progress": "plain", "every_steps": 100, "trackers": ["tensorboard"]}
    values = recipe(records, tmp_path, asked, steps=3, logging=logging)
    train(values, model=model, processor=processor, suite_reader=suite_scorer)
    assert "step 2: evaluation: pope " in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/pope")] == [2, 3]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"suite": "pop"}, r"unknown suite or benchmark 'pop'. Did you mean 'pope'"),
        ({"suite": "mmvet"}, "mmvet can't be scored during training: they need a judge"),
        ({"suite": "pope"}, r"'pope' needs a folder .*evaluate\.data"),
        ({}, "evaluates nothing"),
        ({"suite": "mini", "limit": 0}, r"`evaluate.limit` must be above 0, found 0"),
        ({"data": "x", "sources": [{"path": "x"}]}, r"`evaluate.data` is for `evaluate.suite`"),
        ({"suit": "mini"}, r"unknown key `evaluate.suit`. Did you mean 'suite'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    records: Path, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    values = recipe(records, tmp_path / "run", {"every_steps": 2} | asked, model={"path": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=message):
        train(values, suite_reader=suite_scorer)
    assert not (tmp_path / "run").exists()


def test_a_sharded_model_is_refused_and_a_missing_file_named(records: Path, pope: Path, tmp_path: Path) -> None:
    values = recipe(records, tmp_path, {"suite": "pope", "data": str(pope), "every_steps": 2})
    several = World(torch.device("cpu"), rank=0, size=4)
    with pytest.raises(ValueError, match=r"parallel.strategy is fsdp. Use parallel.strategy=ddp"):
        read_suite(load_recipe(values, ["parallel.strategy=fsdp"]), several, suite_scorer)
    with pytest.raises(ValueError, match=r"evaluate.suite is 'pope', but no function that scores suites was passed"):
        train(values)
    with pytest.raises(FileNotFoundError, match="pope"):
        read_suite(load_recipe(values, [f"evaluate.data={tmp_path}"]), World(torch.device("cpu")), suite_scorer)


def test_two_unsharded_processes_train_as_without_it(
    records: Path, pope: Path, tiny_run: ModuleType, tmp_path: Path
) -> None:
    asked = {"suite": "pope", "data": str(pope), "every_steps": 2, "limit": 4}
    cases = []
    for name, evaluate in (("with", asked), ("without", None)):
        values = recipe(records, tmp_path / name, evaluate, parallel={"strategy": "ddp"}, tiny_data=True)
        cases.append({key: value for key, value in values.items() if key != "name"})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tiny_run.__file__), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert ["eval/pope" in row for row in rows] == [False, True, False, True, True]
    assert tiny_run.losses(tmp_path / "with") == tiny_run.losses(tmp_path / "without")


def _run_scored(
    tiny_run: ModuleType, output: Path, score: Any, resume: str = "never", callbacks: Any = (), steps: int = 5
) -> list[dict[str, Any]]:
    """Evaluate and save every two steps; the rows without what the clock determines."""
    values = tiny_run.recipe(
        output,
        steps=steps,
        checkpoint={"every_steps": 2, "export": False},
        evaluate={"every_steps": 2, "suite": "any"},
    )
    train(
        values,
        *tiny_model(),
        batches=lambda step, rank, size, _state: tiny_run.SyntheticBatches(step, rank, size),
        suite_reader=lambda *_: lambda model, _processor: score(model),
        resume=resume,
        callbacks=callbacks,
    )
    rows = read_metrics(output / "metrics.jsonl")
    return [{key: row[key] for key in row if key in ("step", "loss", "eval/any", "lr/llm")} for row in rows]


def _score(model: Any) -> dict[str, float]:
    return {"eval/any": float(model.lm_head.weight.sum())}


@pytest.mark.parametrize("step", [2, 5])
def test_an_evaluation_that_fails_loses_no_step(tiny_run: ModuleType, tmp_path: Path, step: int) -> None:
    whole = _run_scored(tiny_run, tmp_path / "whole", _score)
    assert [row["step"] for row in whole if "eval/any" in row] == [2, 4, 5]
    scores = []

    def fail(model: Any) -> dict[str, float]:
        scores.append(_score(model))
        if len(scores) == {2: 1, 5: 3}[step]:
            raise RuntimeError("the benchmark's server is away")
        return scores[-1]

    with pytest.raises(RuntimeError, match="away"):
        _run_scored(tiny_run, tmp_path / "cut", fail)
    assert [number for number, _ in list_checkpoints(tmp_path / "cut")][-1] == step
    assert _run_scored(tiny_run, tmp_path / "cut", _score, resume="auto") == whole
    scores.clear()
    assert _run_scored(tiny_run, tmp_path / "cut", fail, resume="auto") == whole
    assert not scores  # reported before
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["metrics"]["eval/any"] == whole[-1]["eval/any"]


def test_a_signal_does_not_wait_for_an_evaluation(tiny_run: ModuleType, tmp_path: Path) -> None:
    whole = _run_scored(tiny_run, tmp_path / "whole", _score)
    scored = []

    def count(model: Any) -> dict[str, float]:
        scored.append(model)
        return _score(model)

    def stop(_trainer: Any, row: dict[str, Any]) -> None:
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert _run_scored(tiny_run, tmp_path / "cut", count, callbacks=[stop]) == whole[:1]
    assert not scored
    assert (tmp_path / "cut" / "STOPPED").is_file()
    assert _run_scored(tiny_run, tmp_path / "cut", _score, resume="auto") == whole
