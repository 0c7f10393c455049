"""Checkpoints that survive anything: torch.distributed.checkpoint in the background, published by an atomic rename.

    RUN/checkpoints/step-00000500/   .metadata, *.distcp (model and optimizer, sharded), trainer.json
    RUN/checkpoints/LATEST           name of the newest one

A folder is written under a name that begins with a dot and renamed when it is complete, so a folder of the right name
is a good checkpoint whenever the process was killed. Weights are stored once by their full names: any number of
processes and any strategy can load them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from florence_vl.train.config import CheckpointConfig

log = logging.getLogger("florence_vl.train")
# Said at every save of a single process, which is a case that we mean.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

TRAINER_FILE = "trainer.json"
LATEST_FILE = "LATEST"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are untouched."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def is_complete(folder: Path) -> bool:
    """Whether a folder is a whole checkpoint."""
    return (folder / ".metadata").is_file() and (folder / TRAINER_FILE).is_file()


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints of a run by step, oldest first."""
    folder = run_dir / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and is_complete(path):
            found.append((int(match.group(1)), path))
    return sorted(found)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint: the one that LATEST names, or, if that is damaged, the newest other one."""
    found = list_checkpoints(run_dir)
    if not found:
        return None
    newest = found[-1][1]
    pointer = run_dir / "checkpoints" / LATEST_FILE
    if pointer.is_file():
        named = run_dir / "checkpoints" / pointer.read_text().strip()
        if named.name > newest.name:
            log.warning("%s names %s, which is not whole; going on from %s", pointer, named.name, newest.name)
    return newest


def find_checkpoint(run_dir: Path, resume: str | Path) -> Path | None:
    """The checkpoint that a run starts from; None starts from the beginning.

    Args:
        run_dir: The run's folder.
        resume: `never`, `auto` (the newest one, if any), or the path of a checkpoint or of a run.

    Raises:
        ValueError: `never`, and the folder holds a run.
        FileNotFoundError: A path that holds no checkpoint.
    """
    if str(resume) == "never":
        if latest_checkpoint(run_dir) is not None:
            raise ValueError(
                f"{run_dir} holds a run already. Go on with it (--resume auto), or choose another folder (output=...)"
            )
        return None
    if str(resume) == "auto":
        return latest_checkpoint(run_dir)
    path = Path(resume).expanduser()
    found = path if (path / TRAINER_FILE).is_file() else latest_checkpoint(path)
    if found is None:
        raise FileNotFoundError(f"{path} is neither a checkpoint nor a run with one")
    return found


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Step, data position and counters of a checkpoint."""
    return json.loads((checkpoint / TRAINER_FILE).read_text(encoding="utf-8"))


class CheckpointManager:
    """Writes, publishes, rotates and reads the checkpoints of a run.

    Args:
        run_dir: The run's folder.
        config: What to keep.
        model: The model itself (not its DDP wrapper).
        optimizer: Its optimizer.
    """

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.folder, self.config = run_dir / "checkpoints", config
        self.run_dir, self.model, self.optimizer = run_dir, model, optimizer
        self.distributed = dist.is_available() and dist.is_initialized()
        self.is_main = not self.distributed or dist.get_rank() == 0
        # The background writer has collectives of its own, which must not mix with the training thread's.
        self._group = dist.new_group(backend="gloo") if self.distributed else None
        self._pending: tuple[int, Path, Future] | None = None
        self.last_saved_step: int | None = None
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(".*"):
                if left_over.is_dir():
                    shutil.rmtree(left_over, ignore_errors=True)
        self._barrier()

    def save(self, step: int, trainer_state: dict[str, Any], blocking: bool = False) -> None:
        """Save a step. Every process calls it.

        Args:
            step: Optimizer steps done.
            trainer_state: JSON types; the main process's is kept.
            blocking: Wait until it is published, as at the end of a run.

        Raises:
            CheckpointError: `blocking` and the write failed. In the background a failure is reported and the run
                goes on: the earlier checkpoints are untouched.
        """
        self.finish(strict=False)
        temporary = self.folder / f".saving-{checkpoint_name(step)}"
        try:
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                (temporary / TRAINER_FILE).write_text(json.dumps(trainer_state), encoding="utf-8")
            self._barrier()
            state = self._state()
            if self.config.asynchronous and not blocking:
                future = dcp.async_save(
                    state, checkpoint_id=temporary, process_group=self._group, no_dist=not self.distributed
                )
                self._pending = (step, temporary, future)  # type: ignore[assignment]
            else:
                dcp.save(state, checkpoint_id=temporary, process_group=self._group, no_dist=not self.distributed)
                self._publish(step, temporary)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            self._failed(step, temporary, error, strict=blocking)

    def poll(self) -> None:
        """Publish a background save that is done; call it once a step.

        The rename needs no agreement between processes: the main one's future is done only when all have written.
        """
        if self._pending is not None and self._pending[2].done():
            self.finish(strict=False)

    def finish(self, strict: bool = True) -> None:
        """Wait for the background save and publish it.

        Raises:
            CheckpointError: `strict` and it failed.
        """
        if self._pending is None:
            return
        step, temporary, future = self._pending
        self._pending = None
        try:
            future.result()
            self._publish(step, temporary)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            self._failed(step, temporary, error, strict)

    def _publish(self, step: int, temporary: Path) -> None:
        self.last_saved_step = step
        if not self.is_main:
            return
        target = self.folder / checkpoint_name(step)
        if target.exists():
            self._delete(target)
        os.replace(temporary, target)
        pointer = self.folder / f".{LATEST_FILE}"
        pointer.write_text(target.name + "\n")
        os.replace(pointer, self.folder / LATEST_FILE)
        self._rotate()

    def _rotate(self) -> None:
        found = list_checkpoints(self.run_dir)
        for step, path in found[: -self.config.keep_last]:
            if not (self.config.keep_every and step % self.config.keep_every == 0):
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Rename first: a folder that is half deleted must not look like a checkpoint."""
        doomed = self.folder / f".deleting-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _failed(self, step: int, temporary: Path, error: BaseException, strict: bool) -> None:
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        last = latest_checkpoint(self.run_dir)
        cause = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        text = (
            f"the checkpoint of step {step} could not be written to {self.folder} ({cause}); "
            f"the last good one is {last.name if last else 'none'}"
        )
        if strict:
            raise CheckpointError(text) from error
        log.error("%s", text)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": get_model_state_dict(self.model)}
        if self.optimizer is not None:
            # The groups' settings are not stored: the recipe and the step decide them.
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer)["state"]
        return state

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Load model and optimizer in place, whatever the number of processes that saved them.

        Returns:
            The trainer state.

        Raises:
            ValueError: The checkpoint is not whole or belongs to another model.
        """
        if not is_complete(checkpoint):
            raise ValueError(f"{checkpoint} is not a whole checkpoint: it needs .metadata and {TRAINER_FILE}")
        state = self._state()
        try:
            dcp.load(state, checkpoint_id=checkpoint, process_group=self._group, no_dist=not self.distributed)
        except (dcp.CheckpointException, RuntimeError, KeyError, ValueError) as error:
            cause = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{checkpoint} does not fit this model or what of it trains ({cause}). Resume with the recipe that "
                "the run was started with (recipe.yaml in its folder), or start a new run from its export"
            ) from error
        set_model_state_dict(self.model, state["model"])
        if self.optimizer is not None:
            groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
            set_optimizer_state_dict(self.model, self.optimizer, {"state": state["optimizer"], "param_groups": groups})
        self._barrier()
        return read_trainer_state(checkpoint)

    def _barrier(self) -> None:
        if self.distributed:
            dist.barrier(self._group)


def load_weights(model: nn.Module, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into a model in one process, without its optimizer: for export.

    Returns:
        The trainer state.

    Raises:
        ValueError: As `CheckpointManager.load`.
    """
    if not is_complete(checkpoint):
        raise ValueError(f"{checkpoint} is not a whole checkpoint: it needs .metadata and {TRAINER_FILE}")
    state = {"model": get_model_state_dict(model)}
    try:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    except (dcp.CheckpointException, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{checkpoint} does not fit this model ({str(error).strip().splitlines()[-1]})") from error
    set_model_state_dict(model, state["model"])
    return read_trainer_state(checkpoint)
