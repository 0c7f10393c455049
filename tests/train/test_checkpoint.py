"""Runs killed at any moment resume with identical losses; failed writes keep the last good checkpoint."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from florence_vl.train.checkpoint import CheckpointError, CheckpointManager, latest_checkpoint, list_checkpoints

STEPS = 12


def _context() -> Any:
    """Children are forked from a server that has everything imported, so that a run costs its steps only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["florence_vl.train.loop", "florence_vl.train.export", "florence_vl.model.tiny"])
    return context


def kill_at_random(tiny_run: ModuleType, folder: Path, kills: int, seed: int) -> None:
    """Kill runs at random moments, `kills` times; every finished run has the losses of an uninterrupted one."""
    arguments = {"steps": STEPS, "checkpoint": {"every_steps": 3, "keep_last": 2, "export": False}}
    whole = tiny_run.run(folder / "whole", **arguments)
    assert len(whole) == STEPS
    context, chance = _context(), random.Random(seed)
    died = runs = sessions = 0
    longest = 1.5
    while died < kills:
        runs += 1
        output = folder / f"run{runs}"
        while True:
            sessions += 1
            assert sessions < 20 * kills, "the runs do not get on"
            case = {"output": str(output), "resume": "auto", **arguments}
            script = (str(tiny_run.__file__), {"CASES": json.dumps([case])}, "__main__")
            process = context.Process(target=runpy.run_path, args=script)
            began = time.monotonic()
            process.start()
            process.join(timeout=chance.uniform(0.1, longest) if died < kills else None)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                died += 1
                longest += 0.1  # a slow machine must get on, too
                for _, checkpoint in list_checkpoints(output):
                    assert dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
                continue
            assert process.exitcode == 0
            longest = min(longest, max(0.5, 1.2 * (time.monotonic() - began)))
            break
        assert tiny_run.losses(output) == whole


def test_sigkill_at_random_moments_resumes_bit_identically(tiny_run: ModuleType, tmp_path: Path) -> None:
    kill_at_random(tiny_run, tmp_path, kills=2, seed=1)


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(tiny_run: ModuleType, tmp_path: Path) -> None:
    kill_at_random(tiny_run, tmp_path, kills=20, seed=2)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on(
    tiny_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"every_steps": 2, "asynchronous": True, "export": False}
    whole = tiny_run.run(tmp_path / "whole", steps=6, checkpoint=settings)
    write = dcp.FileSystemWriter.write_data
    calls = []

    def full(self: Any, plan: Any, planner: Any) -> Any:
        calls.append(str(self.path))
        if "step-00000004" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    losses = tiny_run.run(tmp_path / "full", steps=6, checkpoint=settings)
    assert len(calls) == 3
    assert losses == whole
    assert [step for step, _ in list_checkpoints(tmp_path / "full")] == [2, 6]
    assert "the checkpoint of step 4 could not be written" in caplog.text
    assert "the last good one is step-00000002" in caplog.text
    assert not list((tmp_path / "full" / "checkpoints").glob(".saving*"))


def test_a_checkpoint_that_is_not_whole_is_passed_over(tiny_run: ModuleType, tmp_path: Path) -> None:
    tiny_run.run(tmp_path, steps=4, checkpoint={"every_steps": 2, "export": False})
    (tmp_path / "checkpoints" / "step-00000004" / ".metadata").unlink()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "step-00000002"


def test_another_model_or_another_seed_is_refused(tiny_run: ModuleType, tmp_path: Path) -> None:
    tiny_run.run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="seed 42"):
        tiny_run.run(tmp_path, steps=4, resume="auto", seed=1)
    with pytest.raises(ValueError, match="does not fit this model"):
        tiny_run.run(tmp_path, steps=4, resume="auto", model=tiny_run.tiny(projector_depth=2, features=["davit"]))


def test_a_synchronous_checkpoint_resumes_exactly_from_an_earlier_step(tiny_run: ModuleType, tmp_path: Path) -> None:
    settings = {"every_steps": 2, "asynchronous": False, "export": False}
    whole = tiny_run.run(tmp_path, steps=4, checkpoint=settings)
    earlier = str(tmp_path / "checkpoints" / "step-00000002")
    assert tiny_run.run(tmp_path, steps=4, resume=earlier, checkpoint=settings) == whole


def test_a_signal_in_a_step_that_is_saved_anyway_saves_it_once(
    tiny_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(self: Any, step: int, *others: Any, original: Any = CheckpointManager._write) -> None:
        written.append(step)
        original(self, step, *others)

    monkeypatch.setattr(CheckpointManager, "_write", write)
    settings = {"every_steps": 2, "keep_last": 1, "export": False}
    tiny_run.run(tmp_path, steps=6, kill_at=1, kill_with=signal.SIGTERM, checkpoint=settings)
    assert written == [2]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


def test_a_full_disk_keeps_the_newest_complete_checkpoint(
    tiny_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"every_steps": 2, "keep_last": 3, "asynchronous": False, "export": False}
    tiny_run.run(tmp_path, steps=4, checkpoint=settings)
    damaged = tmp_path / "checkpoints" / "step-00000004"
    os.truncate(damaged / "__0_0.distcp", 10)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(CheckpointError, match="the last good one is step-00000002"):
        tiny_run.run(tmp_path, steps=3, resume="auto", checkpoint=settings)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    for step in (4, 6):
        shutil.copytree(tmp_path / "checkpoints" / "step-00000002", tmp_path / "checkpoints" / f"step-0000000{step}")
    os.truncate(damaged.with_name("step-00000006") / "__0_0.distcp", 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError):
        tiny_run.run(tmp_path, steps=5, resume=str(damaged), checkpoint=settings)
    assert latest_checkpoint(tmp_path) == damaged
