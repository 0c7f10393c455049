"""Metrics of a run: always metrics.jsonl; optional trackers, a progress bar, and plain lines for logs."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from florence_vl.files import write_text
from florence_vl.registry import Registry
from florence_vl.train.config import LoggingConfig, Recipe
from florence_vl.train.flops import Multipliers, count_flops, peak_tflops
from florence_vl.train.step import StepCounts

if TYPE_CHECKING:
    from florence_vl.train.setup import Run

log = logging.getLogger("florence_vl.train")


class MetricsFile:
    """`metrics.jsonl`: one JSON object per step, written immediately.

    A full disk does not end a run: rows are kept and written when there is space again.

    Args:
        path: The file.
        resume_step: Lines of later steps, written after the last checkpoint of a killed run, are dropped.

    Attributes:
        last_row: The last row when the file was opened; only `step` 0 if there was none.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.last_row: dict[str, Any] = {"step": 0}
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self.last_row = [self.last_row, *kept][-1]
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._failing = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. Non-finite numbers become null: the file is strict JSON."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._waiting += json.dumps(clean).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # no partial row
            if not self._failing:
                log.error("%s can't be written (%s); the run continues, and its rows are kept", self._path, error)
            self._failing = True
            return
        if self._failing:
            log.warning("%s is written again, with the rows that were kept", self._path)
        self._waiting, self._failing = b"", False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a truncated last line is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Tracker(Protocol):
    """Destination of metrics in addition to the file."""

    def log(self, row: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


TRACKERS: Registry[Any] = Registry("tracker")


@TRACKERS.register("tensorboard")
class TensorBoardTracker:
    """Event files in the run's folder."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"logging.trackers: tensorboard is missing ({error}): pip install tensorboard") from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, row: Mapping[str, float], step: int) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _RunTracker:
    """wandb, and trackio, which has the same interface."""

    module = ""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        import importlib

        try:
            self._library = importlib.import_module(self.module)
        except ImportError as error:
            raise ValueError(
                f"logging.trackers: {self.module} is not installed ({error}): pip install {self.module}"
            ) from None
        self._library.init(project=recipe.logging.project, name=recipe.name, config=recipe.to_dict())

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._library.log(dict(row), step=step)

    def close(self) -> None:
        self._library.finish()


@TRACKERS.register("trackio")
class TrackioTracker(_RunTracker):
    """Local-first dashboards."""

    module = "trackio"


@TRACKERS.register("wandb")
class WandbTracker(_RunTracker):
    """Weights & Biases."""

    module = "wandb"


class FlopsMeter:
    """Model FLOPs utilization, if the peak of the device is known.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._peak = run.recipe.logging.peak_tflops or peak_tflops(run.world.device)
        self._devices = run.world.size
        if self._peak is not None:
            self._flops = count_flops(run.parallel.model.config, *run.image_size)
            self._pixels = run.image_size[0] * run.image_size[1]
            self._multipliers = Multipliers.of(run.recipe.parts, self._flops.num_layers)

    def mfu(self, counts: StepCounts, seconds: float) -> float | None:
        """Fraction of the devices' peak used by the model's own arithmetic, without padding and recomputation."""
        if self._peak is None:
            return None
        # Images of other sizes count by their area, in which the whole tower except the encoder's attention is linear.
        images = counts.pixels / self._pixels
        flops = self._flops.step(self._multipliers, images, counts.tokens, counts.pairs, counts.supervised)
        return sum(flops.values()) / (seconds * self._devices * self._peak * 1e12)


class Reporter:
    """Metrics file, trackers and progress of the main process; silent on the others.

    Nothing here ends a run: failures to write are logged once.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        recipe, is_main = run.recipe, run.world.is_main
        self.every_steps, self.total_steps = recipe.logging.every_steps, run.total_steps
        self.metrics = MetricsFile(recipe.run_dir / "metrics.jsonl", run.state.step) if is_main else None
        names = recipe.logging.trackers if is_main else []
        self.trackers: list[Tracker] = [TRACKERS[name](recipe, recipe.run_dir) for name in names]
        shown = recipe.logging if is_main else replace(recipe.logging, progress="none")
        self.progress = Progress(run.total_steps, run.state.step, shown)
        self._failed: set[int] = set()

    def last_row(self) -> dict[str, Any]:
        """The last row that the previous session reported; on the main process."""
        assert self.metrics is not None
        return self.metrics.last_row

    def report(self, row: Mapping[str, Any], fraction: float, extra: bool) -> None:
        """Report a step's row.

        Args:
            row: `step` and the step's numbers.
            fraction: Fraction of the run that is done, by steps or by the clock.
            extra: The row has additional numbers, so trackers get it at any step.
        """
        if self.metrics is None:
            return
        self.metrics.write(row)
        step = row["step"]
        if step % self.every_steps == 0 or step == self.total_steps or extra:
            numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
            for tracker in self.trackers:
                self._try(tracker, numbers, step)
        self.progress.update(row, fraction)

    def _try(self, tracker: Tracker, numbers: Mapping[str, float], step: int) -> None:
        try:
            tracker.log(numbers, step)
        except Exception as error:  # a tracker's server may be unavailable, or its disk full
            if id(tracker) not in self._failed:
                log.error("%s failed at step %d (%s); the run continues", type(tracker).__name__, step, error)
            self._failed.add(id(tracker))

    def message(self, text: str) -> None:
        """Print a line, on the main process."""
        if self.metrics is not None:
            self.progress.message(text)

    def close(self) -> None:
        """Close the files and keep the bar as it is."""
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        for tracker in self.trackers:
            with contextlib.suppress(Exception):
                tracker.close()


class Progress:
    """Shows progress: a bar with loss, speed and remaining time on a terminal, otherwise occasional plain lines.

    Args:
        total_steps: Steps of the run.
        start_step: Steps done before.
        config: Its `progress` and `every_steps` are used.
    """

    def __init__(self, total_steps: int, start_step: int, config: LoggingConfig) -> None:
        self.total, self.every = total_steps, config.every_steps
        kind = config.progress
        if kind == "auto":
            kind = "rich" if sys.stderr.isatty() else "plain"
        self.kind = kind
        self._start_step = start_step
        self._origin: tuple[float, float] | None = None
        self._bar: Any = None
        if kind == "rich":
            from rich import progress as rich_progress
            from rich.console import Console

            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("[bold]step {task.completed}/{task.total}"),
                rich_progress.BarColumn(),
                rich_progress.TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[speed]} tok/s"),
                rich_progress.TextColumn("left {task.fields[left]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "train", total=total_steps, completed=start_step, loss="-", lr="-", speed="-", left="-"
            )
            self._bar.start()

    def update(self, row: Mapping[str, Any], fraction: float) -> None:
        """Show a step's row; `fraction` of the run is done, by steps or by the clock."""
        if self.kind == "none":
            return
        step = row["step"]
        left = self._time_left(fraction)
        lr = max((v for k, v in row.items() if k.startswith("lr/")), default=0.0)
        if self.kind == "rich":
            self._bar.update(
                self._task,
                completed=step,
                loss=f"{row['loss']:.4f}",
                lr=f"{lr:.2e}",
                speed=f"{row['tokens_per_s']:,.0f}",
                left=left,
            )
        elif step % self.every == 0 or step == self.total or step == self._start_step + 1:
            mfu = f"  mfu {row['mfu']:.1%}" if row.get("mfu") else ""
            print(
                f"step {step}/{self.total}  loss {row['loss']:.4f}  grad {row['grad_norm']:.3g}  lr {lr:.2e}  "
                f"{row['tokens_per_s']:,.0f} tok/s ({row['supervised_tokens_per_s']:,.0f} supervised)  "
                f"{row['images_per_s']:.1f} img/s  data wait {row['data_wait_share']:.0%}{mfu}  left {left}",
                file=sys.stderr,
                flush=True,
            )

    def _time_left(self, fraction: float) -> str:
        now = time.monotonic()
        if self._origin is None:  # a resumed run starts anywhere, by steps or by the clock
            self._origin = now, fraction
        began, began_at = self._origin
        if fraction <= began_at:
            return "-"
        seconds = int((now - began) / (fraction - began_at) * max(0.0, 1 - fraction))
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self.kind == "none":
            log.info(text)
        elif self.kind == "rich":
            self._bar.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Keep the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def memory_gib(device_type: str) -> float:
    """Peak memory of this process in GiB: of the accelerator, or resident memory on a CPU."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
