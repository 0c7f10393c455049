"""What an optimizer step knows of itself: counts of a batch, seeds, signals that ask the loop to leave."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Batch = dict[str, Any]


@dataclass
class StepCounts:
    """Sums over all processes of one optimizer step."""

    supervised: int
    tokens: int
    slots: int
    images: int
    samples: int
    pairs: int
    data_wait: float


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def count_supervised(batch: Batch) -> int:
    """Positions whose next token is learned."""
    return int((batch["labels"][:, 1:] != -100).sum())


def count_tokens(batch: Batch) -> int:
    """Tokens that are not padding."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    return batch["input_ids"].numel() - int(count_row_padding(batch).sum())


def count_row_padding(batch: Batch) -> torch.Tensor:
    """Tokens that fill up packed rows, (rows,): a run of one unsupervised token at the row's end.

    The collator pads a row with a "sample" of pad tokens, so positions alone don't tell padding.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    same = (ids == ids[:, -1:]) & (labels == -100)
    run = same.flip(-1).long().cumprod(-1).sum(-1)
    return torch.where(run > 1, run, 0)


def count_images(batch: Batch) -> int:
    """Images of a batch."""
    pixels = batch.get("pixel_values")
    return 0 if pixels is None else len(pixels)


def count_samples(batch: Batch) -> int:
    """Samples of a batch; in packed rows every position 0 begins one."""
    positions = batch.get("position_ids")
    if positions is None:
        return len(batch["input_ids"])
    return int((positions == 0).sum()) - int((count_row_padding(batch) > 0).sum())


def count_pairs(batch: Batch) -> int:
    """Sum of the samples' squared lengths: what attention costs, padding left out."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        return int(mask.sum(-1).square().sum())
    if positions is None:
        return len(batch["input_ids"]) * batch["input_ids"].shape[1] ** 2
    total = 0
    for row, padding in zip(positions, count_row_padding(batch).tolist(), strict=True):
        used = row[: len(row) - padding]
        starts = torch.cat([(used == 0).nonzero().flatten(), torch.tensor([len(used)], device=used.device)])
        total += int(starts.diff().square().sum())
    return total


def seed_everything(seed: int) -> None:
    """Seed torch, Python and NumPy."""
    torch.manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002  (users' code may draw from it)


class StepProfiler:
    """Records steps `first` to `last` with torch.profiler and writes a trace for chrome://tracing or Perfetto.

    Args:
        steps: First and last step, counted from 1; None records nothing.
        path: The trace, .json.
    """

    def __init__(self, steps: tuple[int, int] | None, path: Path) -> None:
        self.first, self.last = steps or (0, 0)
        self.path = path
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Tell that a step begins."""
        if step == self.first:
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Tell that a step is done."""
        if self._profiler is not None and step == self.last:
            self._profiler.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None


class StopSignals:
    """SIGTERM, SIGUSR1 (what Slurm sends before the end) and Ctrl-C ask the loop to save and leave; twice is abrupt."""

    def __init__(self) -> None:
        self.received = 0
        self.names = [n for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n)]
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            for name in self.names:
                number = getattr(signal, name)
                self.previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            self.previous.clear()
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
