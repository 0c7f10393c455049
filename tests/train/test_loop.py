"""The training loop: output files, equal losses for any division of a batch, guards, stopping, export."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from florence_vl.model.tiny import tiny_model
from florence_vl.train import TrainingError, load_recipe, train
from florence_vl.train.checkpoint import latest_checkpoint, list_checkpoints
from florence_vl.train.checkpoint_files import read_trainer_state
from florence_vl.train.export import export_run
from florence_vl.train.loop import TrainResult
from florence_vl.train.metrics import MetricsFile, read_metrics
from florence_vl.train.parallel import parallelize
from florence_vl.train.setup import _restore, describe_environment
from florence_vl.train.world import World

CUTS = {
    "one batch of 4": {"micro": 4},
    "2 x 2 accumulated": {"micro": 2},
    "4 x 1 accumulated": {"micro": 1},
    "one packed row": {"micro": 4, "packed": True},
    "2 packed rows": {"micro": 2, "packed": True},
}


@pytest.fixture(scope="module")
def cut_losses(tiny_run: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("cuts")
    quiet = {"checkpoint": {"every_steps": None, "export": False}, "steps": 4}
    # DropPath draws per forward pass, so the tower is frozen here: the cut must be the only difference
    parts = {"tower": {"train": False}}
    return {
        name: tiny_run.run(folder / str(i), parts=parts, **quiet, **cut) for i, (name, cut) in enumerate(CUTS.items())
    }


@pytest.mark.parametrize("name", list(CUTS)[1:])
def test_loss_does_not_depend_on_how_a_step_is_cut(cut_losses: dict[str, list[float]], name: str) -> None:
    reference = cut_losses["one batch of 4"]
    assert len(reference) == 4
    assert cut_losses[name] == pytest.approx(reference, abs=2e-5)


def test_a_run_learns_and_describes_itself(tiny_run: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "run"

    class Fixed(tiny_run.SyntheticBatches):  # type: ignore[name-defined, misc]
        def __next__(self) -> dict[str, Any]:
            self.step = 0
            return super().__next__()

    result = train(
        tiny_run.recipe(
            out,
            steps=20,
            optimizer={"lr": 1e-2},
            checkpoint={"every_steps": None},
            logging={"progress": "none", "trackers": ["tensorboard"]},
        ),
        model=tiny_run.tiny(),
        batches=lambda step, rank, size, state: Fixed(step, rank, size, micro=4),
    )
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(math.log(512), rel=0.1)
    for key in (
        "grad_norm/tower",
        "lr/llm",
        "tokens_per_s",
        "supervised_tokens_per_s",
        "images_per_s",
        "data_wait_share",
    ):
        assert rows[-1][key] >= 0
    assert rows[-1]["samples"] == 20 * 4
    assert result.finished
    assert yaml.safe_load((out / "recipe.yaml").read_text())["steps"] == 20
    assert "torch" in json.loads((out / "environment.json").read_text())["versions"]
    assert list((out / "tensorboard").iterdir())


def test_an_existing_run_is_not_overwritten(tiny_run: ModuleType, tmp_path: Path) -> None:
    tiny_run.run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="--resume auto"):
        tiny_run.run(tmp_path, steps=2)


def test_a_non_finite_loss_stops_before_the_step_and_leaves_the_batch(tiny_run: ModuleType, tmp_path: Path) -> None:
    model = tiny_run.tiny()

    weights: dict[int, torch.Tensor] = {}

    def poison(trainer: Any, row: dict[str, Any]) -> None:
        if row["step"] == 2:
            model.model.multi_modal_projector.layers[0].bias.data[0] = float("inf")
        weights[row["step"]] = model.lm_head.weight.detach().clone()

    with pytest.raises(TrainingError, match=r"step 3: loss is (nan|inf).*Nothing was updated"):
        train(
            tiny_run.recipe(tmp_path),
            model=model,
            batches=lambda step, rank, size, state: tiny_run.SyntheticBatches(step, rank, size),
            callbacks=[poison],
        )
    assert max(weights) == 2
    assert torch.equal(model.lm_head.weight, weights[2])
    dumped = torch.load(tmp_path / "failures" / "step-3-rank-0.pt", weights_only=True)
    expected = tiny_run.collate([tiny_run.make_sample(8), tiny_run.make_sample(9)], packed=False)
    assert torch.equal(dumped["micro_batches"][0]["input_ids"], expected["input_ids"])
    assert len(dumped["micro_batches"]) == 2
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "step-00000002"


def test_an_error_in_the_model_names_the_step_and_leaves_the_batch(tiny_run: ModuleType, tmp_path: Path) -> None:
    class Broken(tiny_run.SyntheticBatches):  # type: ignore[name-defined, misc]
        def __next__(self) -> dict[str, Any]:
            batch = super().__next__()
            batch["pixel_values"] = batch["pixel_values"][:1]
            return batch

    with pytest.raises(TrainingError, match=r"step 1: .*image placeholder tokens.*The batch is in"):
        train(
            tiny_run.recipe(tmp_path),
            model=tiny_run.tiny(),
            batches=lambda step, rank, size, state: Broken(step, rank, size),
        )
    assert (tmp_path / "failures" / "step-1-rank-0.pt").is_file()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signals_save_and_leave_and_the_run_goes_on_exactly(tiny_run: ModuleType, tmp_path: Path, name: str) -> None:
    settings = {"steps": 4, "checkpoint": {"every_steps": None, "export": False}}
    whole = tiny_run.run(tmp_path / "whole", **settings)
    begun = tiny_run.run(tmp_path / "cut", kill_at=1, kill_with=getattr(signal, name), **settings)
    assert len(begun) == 2  # the signal comes at the end of step 1; the step that is running is finished
    checkpoint = latest_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000002"
    assert tiny_run.run(tmp_path / "cut", resume="auto", **settings) == whole


def test_a_time_budget_ends_run_and_schedule(tiny_run: ModuleType, tmp_path: Path) -> None:
    def run(resume: str) -> TrainResult:
        return train(
            tiny_run.recipe(tmp_path, steps=100_000, max_minutes=0.02, checkpoint={"export": False}),
            model=tiny_run.tiny(),
            batches=lambda step, rank, size, state: tiny_run.SyntheticBatches(step, rank, size),
            resume=resume,
        )

    result = run("never")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert result.finished
    assert 3 < len(rows) < 10_000
    assert rows[-1]["lr/llm"] < 0.2 * max(row["lr/llm"] for row in rows)
    again = run("auto")  # a finished run trains no further step
    assert again.finished
    assert again.steps == result.steps == len(read_metrics(tmp_path / "metrics.jsonl"))


def test_metrics_of_lost_steps_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    metrics = MetricsFile(path, resume_step=1)
    metrics.write({"step": 2, "loss": float("nan")})
    metrics.close()
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}]


def test_export_gives_the_trained_model_lora_merged(tiny_run: ModuleType, tmp_path: Path) -> None:
    from florence_vl import FlorenceVLForConditionalGeneration

    model = tiny_run.tiny()
    parts = {"tower": {"train": False}, "llm": {"lora": {"rank": 2}}}
    tiny_run.run(tmp_path, model=model, parts=parts, optimizer={"lr": 0.05})
    folder, step = export_run(tmp_path)
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(folder)
    assert step == 6
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    batch = tiny_run.collate([tiny_run.make_sample(50), tiny_run.make_sample(51)], packed=False)
    model.eval()
    with torch.no_grad():
        trained, merged = model(**batch).logits, loaded(**batch).logits
        fresh = tiny_run.tiny().eval()(**batch).logits
    mask = batch["attention_mask"].bool()
    assert torch.allclose(trained[mask], merged[mask], atol=1e-5)
    assert not torch.allclose(fresh[mask], merged[mask], atol=1e-2)


def test_checkpoints_rotate(tiny_run: ModuleType, tmp_path: Path) -> None:
    tiny_run.run(tmp_path, steps=5, checkpoint={"every_steps": 1, "keep_last": 1, "keep_every": 2, "export": False})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert (tmp_path / "checkpoints" / "LATEST").read_text().strip() == "step-00000005"


def test_without_images_everything_still_gets_gradients(tiny_run: ModuleType, tmp_path: Path) -> None:
    losses = tiny_run.run(tmp_path, text_only=1, steps=2, checkpoint={"every_steps": None, "export": False})
    assert all(math.isfinite(loss) for loss in losses)


def test_time_left_of_a_resumed_run_counts_from_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    from florence_vl.train import metrics
    from florence_vl.train.config import LoggingConfig

    clock = iter((100.0, 160.0))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    progress = metrics.Progress(600, 22, LoggingConfig(progress="plain"))
    assert progress._time_left(0.40) == "-"  # the budget is further on than the steps
    assert progress._time_left(0.50) == "0:05:00"


@pytest.mark.parametrize(("faster", "precision"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_is_measured_once_a_run(
    tiny_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool, precision: str
) -> None:
    whole = tiny_run.run(tmp_path / "whole", steps=2, precision=precision)
    monkeypatch.setattr("florence_vl.train.setup.bf16_is_faster", lambda _: faster)
    tiny_run.run(tmp_path / "cut", steps=1, precision="auto")
    monkeypatch.setattr("florence_vl.train.setup.bf16_is_faster", lambda _: not faster)
    cut = tiny_run.run(tmp_path / "cut", steps=2, precision="auto", resume="auto")
    assert cut == whole
    assert yaml.safe_load((tmp_path / "cut/recipe.yaml").read_text())["precision"] == precision


def test_without_git_a_run_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment()["git"] == {"commit": None, "dirty": False}


def test_batches_with_a_state_of_their_own_get_it_back(tiny_run: ModuleType, tmp_path: Path) -> None:
    given = []

    class Own(tiny_run.SyntheticBatches):  # type: ignore[name-defined, misc]
        def state(self) -> dict[str, Any]:
            return {"position": self.step}

    def batches(step: int, rank: int, size: int, state: Any) -> Any:
        given.append(state)
        return Own(step, rank, size)

    for steps, resume in ((2, "never"), (3, "auto")):
        values = tiny_run.recipe(tmp_path, steps=steps, checkpoint={"every_steps": None, "export": False})
        train(values, model=tiny_run.tiny(), batches=batches, resume=resume)
    assert given == [None, {"position": 2}]
    saved = read_trainer_state(tmp_path / "checkpoints" / "step-00000003")
    with pytest.raises(ValueError, match="data states of 1 processes, and this run has 2"):
        _restore(load_recipe(values), World(torch.device("cpu"), size=2), saved, {})


def test_gates_report_their_own_rate(tiny_run: ModuleType, tmp_path: Path) -> None:
    model, _ = tiny_model(fusion="gated")
    train(
        tiny_run.recipe(
            tmp_path,
            steps=1,
            parts={"projector": {"lr": 1e-5, "gate_lr": 3e-3}},
            schedule={"name": "constant", "warmup_ratio": 0},
            checkpoint={"every_steps": None, "export": False},
        ),
        model=model,
        batches=lambda step, rank, size, _state: tiny_run.SyntheticBatches(step, rank, size, text_only=1),
    )
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["lr/projector"], row["lr/gates"]) == (1e-5, 3e-3)


def test_pure_bf16_keeps_the_rotary_frequencies_of_the_export(tiny_run: ModuleType, tmp_path: Path) -> None:
    model = tiny_run.tiny()
    model.save_pretrained(tmp_path)
    recipe = load_recipe({"steps": 1, "precision": "bf16_pure", "device": "cpu"})
    parallelize(model, World(torch.device("cpu")), recipe, (64, 64))
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.model.language_model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in loaded.model.language_model.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)
