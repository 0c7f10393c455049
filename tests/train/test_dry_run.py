"""`train --dry-run` against a real run of two processes; hangs and data shortages are found before they occur."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from florence_vl.cli.main import main
from florence_vl.model.tiny import tiny_model
from florence_vl.train import dry_run as dry_run_module
from florence_vl.train import load_recipe
from florence_vl.train.dry_run import dry_run


@pytest.fixture(scope="module")
def recipe(tiny_run: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Values of a recipe with packed rows, some of them text alone, and one record whose picture is missing."""
    folder = tmp_path_factory.mktemp("data")
    model, processor = tiny_model()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for number in range(60):
        has_image = number % 3 == 0
        if number % 6 == 0:
            Image.new("RGB", (40, 30), (4 * number, 99, 10)).save(folder / f"{number}.png")
        question = "<image>\nWhat?" if has_image else "What?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red number " * (1 + number % 7)}]
        rows.append({"id": str(number), "conversations": turns} | ({"image": f"{number}.png"} if has_image else {}))
    (folder / "data.json").write_text(json.dumps(rows))
    data = {
        "sources": [{"path": str(folder / "data.json"), "image_root": str(folder)}],
        "packing": {"mode": "packed", "tokens_per_row": 160, "window": 16},
        "max_length": 160,
        "workers": 1,
        "max_bad_share": 1.0,
    }
    changes = {
        "batch_size": 8,
        "micro_batch_size": 2,
        "steps": 2,
        "data": data,
        "model": {"path": str(folder / "model")},
    }
    return tiny_run.recipe(folder / "run", **changes)


@pytest.fixture(scope="module")
def real(tiny_run: ModuleType, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes really did, sharded and with DDP."""
    folder = tmp_path_factory.mktemp("real")
    same = {key: recipe[key] for key in ("batch_size", "micro_batch_size", "steps", "data")}
    same |= {"tiny_data": True, "watched": True, "checkpoint": {"every_steps": None, "export": False}}
    cases = [same | {"output": str(folder / name), "parallel": {"strategy": name}} for name in ("fsdp", "ddp")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tiny_run.__file__), json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return folder


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_dry_run_counts_what_two_processes_really_do(recipe: dict[str, Any], real: Path, strategy: str) -> None:
    found = dry_run(load_recipe(recipe, [f"parallel.strategy={strategy}"]), 2, device="cpu")
    assert found.problems == []
    assert found.bad_records
    assert found.bad_records == json.loads((real / strategy / "summary.json").read_text())["bad_records"]
    assert not Path(recipe["output"]).exists()
    texts = 0
    for rank in (0, 1):
        lines = [json.loads(line) for line in (real / strategy / f"rank-{rank}.jsonl").read_text().splitlines()]
        played = [one for one in found.steps if one.rank == rank]
        assert [vars(one.counts) for one in played] == [line["counts"] for line in lines]
        for one, line in zip(played, lines, strict=True):
            assert [batch.passes for batch in one.micro_batches] == [b["passes"] for b in line["micro_batches"]]
            kinds = [sorted({name.split()[0] for name in batch.collectives}) for batch in one.micro_batches]
            assert kinds == [b["collectives"] for b in line["micro_batches"]]
            texts += sum(batch.images == 0 for batch in one.micro_batches)
    assert texts  # dummy images are part of what is compared


def test_the_replicas_of_sharded_groups_exchange_in_the_last_micro_batch(recipe: dict[str, Any]) -> None:
    values = recipe | {"micro_batch_size": 1, "parallel": {"strategy": "hsdp", "shard_size": 2}}
    found = dry_run(load_recipe(values), 4, steps=1, device="cpu")
    for played in found.steps:
        first, last = played.micro_batches
        assert not any("all-reduce" in name for name in first.collectives)
        assert [name for name in last.collectives if "all-reduce" in name] == [
            f"all-reduce {part}" for part in ("head", "LLM", "embeddings", "projector", "tower")
        ]
    with pytest.raises(ValueError, match="6 processes do not form two whole groups"):
        dry_run(load_recipe(values | {"batch_size": 6, "parallel": {"strategy": "hsdp", "shard_size": 4}}), 6)


def test_processes_that_would_wait_for_each_other_are_named(
    tiny_run: ModuleType, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sizes(tiny_run.SyntheticBatches):  # type: ignore[name-defined, misc]
        """Process 1 has images of two sizes, and so two passes through its tower."""

        def __next__(self) -> dict[str, torch.Tensor]:
            batch = super().__next__()
            sizes = [(64, 64)] * len(batch["pixel_values"])
            sizes[-1] = (64, 32) if self.rank == 1 else sizes[-1]
            return batch | {"image_sizes": torch.tensor(sizes)}

    class Uneven(tiny_run.SyntheticBatches):  # type: ignore[name-defined, misc]
        def __init__(self, step: int, rank: int, size: int) -> None:
            super().__init__(step, rank, size, per_step=8)
            self.batches_per_rank -= rank

    def play(batches: Any, strategy: str = "fsdp") -> Any:
        loaded = load_recipe(recipe, [f"parallel.strategy={strategy}"])
        return dry_run(loaded, 2, batches=lambda step, rank, size, _state: batches(step, rank, size), device="cpu")

    found = play(Sizes)  # the run has process 0 pass a dummy image
    assert found.problems == []
    first, second = (found.steps[rank].micro_batches[0].passes for rank in (0, 1))
    assert first[:2] == ["tower 2 x 64x64", "tower 1 x 64x64"]
    assert second[:2] == ["tower 1 x 64x64", "tower 1 x 64x32"]
    monkeypatch.setattr(dry_run_module, "most_calls", lambda calls: (0, 0))  # if it did not
    problem = play(Sizes).problems[0]
    assert "process 0 comes to `gather embeddings` where process 1 comes to `gather tower`" in problem
    assert "in micro-batch 1: tower 2 x 64x64, LLM" in problem
    assert play(Sizes, "ddp").problems == []  # which gathers no weights
    assert "process 0 has 2 micro-batches, process 1 has 1" in play(Uneven).problems[0]


def test_what_runs_out_ends_with_code_1(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert dry_run(load_recipe(recipe), 2, steps=1).strategy == "fsdp"
    command = ["train", str(path), "--dry-run", "--world", "2", "--first-steps", "1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["strategy"], found["world_size"]) == ("ddp", 2)
    assert len(found["steps"]) == 2
    # float32 pixels, three int64 tensors of all tokens
    batches = [batch for step in found["steps"] for batch in step["micro_batches"]]
    largest = max(one["images"] * 3 * 64 * 64 * 4 + one["slots"] * 3 * 8 for one in batches)
    # two processes; in each a worker is two micro-batches ahead, and on a CPU the step's own two stay
    assert found["shm"] * 2**30 == pytest.approx(2 * (2 + 2) * largest)
    monkeypatch.setattr(dry_run_module, "_host_memory", lambda: 1e-3)
    monkeypatch.setattr(dry_run_module, "_shm_size", lambda: 1e-6)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "GiB of cpu memory and has 0.0" in error
    assert "of /dev/shm, which has 0.00 here" in error
    assert "step 1:" not in error
    assert main(["train", str(path), "--world", "2"]) == 2
    assert "are for --dry-run" in capsys.readouterr().err
    assert main([*command, "--resume", "auto"]) == 2
    assert main([*command, "batch_size=6"]) == 2  # three micro-batches for two processes
    assert "cannot share them evenly" in capsys.readouterr().err


def test_a_step_without_targets_is_found(tiny_run: ModuleType, recipe: dict[str, Any]) -> None:
    class Unsupervised(tiny_run.SyntheticBatches):  # type: ignore[name-defined, misc]
        def __next__(self) -> dict[str, torch.Tensor]:
            batch = super().__next__()
            return batch | {"labels": torch.full_like(batch["labels"], -100)}

    found = dry_run(
        load_recipe(recipe), 2, 1, device="cpu", batches=lambda step, rank, size, state: Unsupervised(step, rank, size)
    )
    assert found.problems[0].startswith("step 1 has nothing to learn")
