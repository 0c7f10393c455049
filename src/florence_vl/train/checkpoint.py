"""Crash-safe checkpoints: torch.distributed.checkpoint in the background, published by an atomic rename.

    RUN/checkpoints/step-00000500/   .metadata, *.distcp (model and optimizer, sharded), trainer.json
    RUN/checkpoints/LATEST           name of the newest checkpoint

A folder is written under a temporary name that begins with a dot and renamed when it is complete, so a folder with its
final name is a good checkpoint whenever the process was killed. Weights are stored once under their full names, so any
number of processes and any strategy can load them.

Steps that may fail on a single process (creating and publishing the folder, a full disk) are done by the main process,
which informs the others before any collective operation.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Sequence
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

from florence_vl.files import write_text
from florence_vl.train.checkpoint_files import TRAINER_FILE, SafeReader, find_damage, read_trainer_state
from florence_vl.train.config import CheckpointConfig
from florence_vl.train.world import World

log = logging.getLogger("florence_vl.train")
# Logged at every save of a single process, which is an intended case.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

LATEST_FILE = "LATEST"
_NAME = re.compile(r"step-(\d{8})")
_FULL = re.compile("No space left|quota|PytorchStreamWriter failed writing")
_FAILURES = (OSError, RuntimeError, dcp.CheckpointException)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are unchanged."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoints of a run by step, oldest first, including damaged ones."""
    folder = run_dir / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint; damaged newer ones are reported and skipped.

    Returns:
        Its folder; None if the run has no checkpoints.

    Raises:
        ValueError: All checkpoints are damaged.
    """
    path, problems = newest_complete(list_checkpoints(run_dir))
    if problems and path is None:
        raise ValueError(
            f"no checkpoint of {run_dir} is complete: {'; '.join(problems)}. Restore the files, or start a new run in "
            "another folder (output=...)"
        )
    for problem in problems:
        log.warning("a checkpoint is damaged: %s. Using the newest complete one, %s", problem, path)
    return path


def newest_complete(checkpoints: Sequence[tuple[int, Path]]) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a list by step, and the damage of each newer one."""
    problems: list[str] = []
    for _, path in reversed(checkpoints):
        if (problem := find_damage(path)) is None:
            return path, problems
        problems.append(problem)
    return None, problems


def find_checkpoint(run_dir: Path, resume: str | Path) -> Path | None:
    """The checkpoint from which a run resumes; None starts a new run.

    Args:
        run_dir: The run's folder.
        resume: `never`; `auto`: the newest complete one, if any; or the path of a checkpoint or of a run.

    Raises:
        ValueError: `never`, but the folder contains a run; or the named checkpoint is damaged, or all are.
        FileNotFoundError: The path contains no checkpoint.
    """
    if str(resume) == "never":
        if list_checkpoints(run_dir):
            raise ValueError(
                f"{run_dir} already contains a run. Resume it (--resume auto), or choose another folder (output=...)"
            )
        return None
    if str(resume) == "auto":
        return latest_checkpoint(run_dir)
    path = Path(resume).expanduser()
    if not _NAME.fullmatch(path.name) and not (path / TRAINER_FILE).is_file():
        if (found := latest_checkpoint(path)) is None:
            raise FileNotFoundError(f"{path} is neither a checkpoint nor a run with one")
        return found
    if not path.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if problem := find_damage(path):
        raise ValueError(f"a checkpoint is damaged: {problem}. {_way_back(path)}")
    return path


def _way_back(damaged: Path) -> str:
    """Advice that names the newest complete checkpoint before a damaged one."""
    before = [one for one in list_checkpoints(damaged.parent.parent) if one[1].name < damaged.name]
    if path := newest_complete(before)[0]:
        return f"The newest complete one before it is {path}: --resume {path}"
    return "There is no complete one before it"


class CheckpointManager:
    """Writes, publishes, rotates and loads the checkpoints of a run.

    Args:
        run_dir: The run's folder.
        config: Which checkpoints to keep.
        model: The model itself (not its DDP wrapper).
        optimizer: Its optimizer.
        world: The processes.
    """

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
    ) -> None:
        self.folder, self.config, self.world = run_dir / "checkpoints", config, world
        self.run_dir, self.model, self.optimizer = run_dir, model, optimizer
        self._no_dist = not (dist.is_available() and dist.is_initialized())
        # The background writer has its own collectives, which must not mix with those of the training thread.
        self._group = None if self._no_dist else dist.new_group(backend="gloo")
        self._pending: tuple[int, Path, Future] | None = None
        self.last_saved_step: int | None = None
        world.decide(self._sweep)

    def _sweep(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (".saving-*", ".deleting-*"):
            for left_over in self.folder.glob(pattern):
                shutil.rmtree(left_over, ignore_errors=True)

    def save(self, step: int, trainer_state: dict[str, Any], blocking: bool = False) -> None:
        """Save a checkpoint. Every process calls it.

        Args:
            step: Number of optimizer steps done.
            trainer_state: JSON types; that of the main process is saved.
            blocking: Wait until it is published, as at the end of a run. On a full disk, old checkpoints are deleted
                and the write is repeated once.

        Raises:
            CheckpointError: `blocking` and the write failed. In the background a failure is reported and the run
                continues; earlier checkpoints are unchanged.
        """
        self.finish()
        temporary = self.folder / f".saving-{checkpoint_name(step)}"
        failure = self._try(step, temporary, trainer_state, blocking)
        if failure is not None and blocking and self.world.decide(lambda: self._clean_up(step, temporary, failure)):
            failure = self._try(step, temporary, trainer_state, blocking)
        if failure is None:
            return
        if blocking:
            raise CheckpointError(self._explain(step, failure)) from failure
        self._report(step, temporary, failure)

    def _try(self, step: int, temporary: Path, trainer_state: dict[str, Any], blocking: bool) -> BaseException | None:
        try:
            self._write(step, temporary, trainer_state, blocking)
        except _FAILURES as error:
            return error
        return None

    def _write(self, step: int, temporary: Path, trainer_state: dict[str, Any], blocking: bool) -> None:
        def begin() -> None:
            self._make_room()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            (temporary / TRAINER_FILE).write_text(json.dumps(trainer_state), encoding="utf-8")

        self.world.decide(begin)
        state = self._state()
        if self.config.asynchronous and not blocking:
            future = dcp.async_save(state, checkpoint_id=temporary, process_group=self._group, no_dist=self._no_dist)
            self._pending = (step, temporary, future)  # type: ignore[assignment]
        else:
            dcp.save(state, checkpoint_id=temporary, process_group=self._group, no_dist=self._no_dist)
            self.world.decide(lambda: self._publish(step, temporary))

    def poll(self) -> None:
        """Publish a finished background save; call it once per step.

        The rename needs no agreement between processes: the main process's future completes only when all have written.
        """
        if self._pending is not None and self._pending[2].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the background save and publish it; a failure is reported."""
        if self._pending is None:
            return
        step, temporary, future = self._pending
        self._pending = None
        try:
            future.result()
            if self.world.is_main:
                self._publish(step, temporary)
        except _FAILURES as error:
            self._report(step, temporary, error)

    def _publish(self, step: int, temporary: Path) -> None:
        target = self.folder / checkpoint_name(step)
        if target.exists():
            self._delete(target)
        os.replace(temporary, target)
        write_text(self.folder / LATEST_FILE, target.name + "\n")
        self.last_saved_step = step
        self._rotate(step)

    def _rotate(self, step: int) -> None:
        """Delete checkpoints as the recipe specifies; those of later steps belong to steps that are repeated."""
        found = list_checkpoints(self.run_dir)
        before = [(number, path) for number, path in found if number <= step]
        for number, path in before[: -self.config.keep_last]:
            if not self._is_kept(number):
                self._delete(path)
        for number, path in found:
            if number > step:
                self._delete(path)

    def _is_kept(self, step: int) -> bool:
        return bool(self.config.keep_every) and step % (self.config.keep_every or 1) == 0

    def _make_room(self) -> None:
        """Delete all checkpoints but the newest complete one if the disk cannot hold another."""
        newest, _ = newest_complete(list_checkpoints(self.run_dir))
        if newest is None:
            return
        need = sum(file.stat().st_size for file in newest.iterdir())
        if shutil.disk_usage(self.folder).free <= 1.05 * need and self._keep_newest():
            log.warning("the disk of %s is nearly full: only the newest checkpoint was kept", self.folder)

    def _keep_newest(self) -> bool:
        """Delete all checkpoints but the newest complete one and those of `keep_every`; True if any was deleted."""
        found = list_checkpoints(self.run_dir)
        newest, _ = newest_complete(found)
        doomed = [path for number, path in found if newest not in (None, path) and not self._is_kept(number)]
        for path in doomed:
            self._delete(path)
        return bool(doomed)

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint; renamed first, so that a partially deleted folder does not look like a checkpoint."""
        doomed = self.folder / f".deleting-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _clean_up(self, step: int, temporary: Path, error: BaseException | None) -> bool:
        """Remove the incomplete folder (on the main process); True if there is space for another attempt."""
        shutil.rmtree(temporary, ignore_errors=True)
        if not _FULL.search(str(error)) or not self._keep_newest():
            return False
        log.warning("%s; only the newest checkpoint was kept, to free space", self._explain(step, error))
        return True

    def _explain(self, step: int, error: BaseException | None) -> str:
        newest, _ = newest_complete(list_checkpoints(self.run_dir))
        cause = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return (
            f"the checkpoint of step {step} could not be written to {self.folder} ({cause}); "
            f"the last good one is {newest.name if newest else 'none'}"
        )

    def _report(self, step: int, temporary: Path, error: BaseException) -> None:
        if self.world.is_main:
            log.error("%s", self._explain(step, error))
            self._clean_up(step, temporary, error)

    def _state(self) -> dict[str, Any]:
        # The settings of the groups are not stored: the recipe and the step determine them.
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)["state"]
        return {"model": get_model_state_dict(self.model), "optimizer": optimizer}

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Load model and optimizer in place, saved by any number of processes.

        Returns:
            The trainer state.

        Raises:
            ValueError: The checkpoint is damaged or belongs to another model.
        """
        state = self._state()
        _load(state, checkpoint, self._group, self._no_dist)
        set_model_state_dict(self.model, state["model"])
        groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        set_optimizer_state_dict(self.model, self.optimizer, {"state": state["optimizer"], "param_groups": groups})
        self.world.barrier()
        return read_trainer_state(checkpoint)


def _load(state: dict[str, Any], checkpoint: Path, group: Any = None, no_dist: bool = True) -> None:
    """Fill a state dict; errors distinguish a damaged checkpoint from one of another model."""
    try:
        dcp.load(state, storage_reader=SafeReader(checkpoint), process_group=group, no_dist=no_dist)
    except (dcp.CheckpointException, RuntimeError, KeyError, ValueError, OSError, EOFError) as error:
        if problem := find_damage(checkpoint):
            raise ValueError(f"a checkpoint is damaged: {problem}. {_way_back(checkpoint)}") from error
        cause = str(error).strip().splitlines()[-1]
        if "PytorchStreamReader" in cause or "UnpicklingError" in cause:
            raise ValueError(
                f"a checkpoint is damaged: the tensors in {checkpoint} can't be read ({cause}). {_way_back(checkpoint)}"
            ) from error
        raise ValueError(
            f"{checkpoint} does not fit this model or its trained parts ({cause}). Resume with the recipe that "
            "the run was started with (recipe.yaml in its folder), or start a new run from its export"
        ) from error


def load_weights(model: nn.Module, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into a model in one process, without its optimizer, for export.

    Returns:
        The trainer state.

    Raises:
        ValueError: As in `CheckpointManager.load`.
    """
    state = {"model": get_model_state_dict(model)}
    _load(state, checkpoint)
    set_model_state_dict(model, state["model"])
    return read_trainer_state(checkpoint)
