"""Parts of an optimizer step: counts, seeds, and the forward and backward passes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from florence_vl.data.layout import FULL_PREFIX
from florence_vl.model.varlen_attention import row_spans

if TYPE_CHECKING:
    from florence_vl.train.parallel import Parallelized

Batch = dict[str, Any]
TowerCalls = tuple[int, int]


@dataclass
class StepCounts:
    """Counts of a step, of one process or summed over all.

    Attributes:
        supervised: Supervised positions.
        tokens: Tokens without padding.
        slots: Tokens with padding.
        images: Images.
        pixels: Pixels of the images.
        samples: Samples.
        pairs: Sum of the samples' squared lengths, to which the cost of attention is proportional.
    """

    supervised: int
    tokens: int
    slots: int
    images: int
    pixels: int
    samples: int
    pairs: int

    @classmethod
    def of(cls, micro_batches: Sequence[Batch], overview: int = 0) -> StepCounts:
        """Counts of one process's micro-batches; for `overview` see `count_pixels`."""
        return cls(
            supervised=sum(map(count_supervised, micro_batches)),
            tokens=sum(map(count_tokens, micro_batches)),
            slots=sum(batch["input_ids"].numel() for batch in micro_batches),
            images=sum(map(count_images, micro_batches)),
            pixels=sum(count_pixels(batch, overview) for batch in micro_batches),
            samples=sum(map(count_samples, micro_batches)),
            pairs=sum(map(count_pairs, micro_batches)),
        )


def forward_backward(
    parallel: Parallelized,
    micro_batches: Sequence[Batch],
    num_items: int,
    device: torch.device,
    calls: Sequence[TowerCalls] = (),
) -> Tensor:
    """Forward and backward passes of one process's micro-batches, with gradient accumulation.

    Args:
        parallel: The model.
        micro_batches: Collated micro-batches of this process.
        num_items: Supervised tokens of the step over all processes, the divisor of the summed loss. A plain number,
            because FSDP2 casts the floating-point tensors among a module's inputs to the compute type.
        device: Device for the batches.
        calls: For each micro-batch, the maximum over all processes; those of this process by default.

    Returns:
        This process's part of the step's loss: a float32 scalar on the device.
    """
    loss_sum = torch.zeros((), device=device)
    for index, batch in enumerate(micro_batches):
        with parallel.accumulate(last=index == len(micro_batches) - 1):
            own = calls[index] if calls else tower_calls(batch)
            loss = parallel.module(to_device(batch, device), num_items, own)
            if loss.requires_grad:  # a text-only batch reaches no trained parameter if the LLM is frozen
                (loss * parallel.grad_scale).backward()
        loss_sum += loss.detach().float()
    return loss_sum


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def count_supervised(batch: Batch) -> int:
    """Number of supervised positions."""
    return int((batch["labels"][:, 1:] != -100).sum())


def count_tokens(batch: Batch) -> int:
    """Number of tokens without padding."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    return batch["input_ids"].numel() - int(count_row_padding(batch).sum())


def count_row_padding(batch: Batch) -> torch.Tensor:
    """Tokens that fill up packed rows, (rows,): a run of one unsupervised sample at the end of the row.

    The collator pads a row with a "sample" of pad tokens, so positions alone do not identify padding.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    same = (ids == ids[:, -1:]) & (labels == -100)
    run = same.flip(-1).long().cumprod(-1).sum(-1)
    return torch.where(run > 1, run, 0)


def count_images(batch: Batch) -> int:
    """Images of a batch."""
    pixels = batch.get("pixel_values")
    return 0 if pixels is None else len(pixels)


def count_pixels(batch: Batch, overview: int = 0) -> int:
    """Pixels of the images of a batch that go through the tower.

    Args:
        batch: The batch.
        overview: Pixels of the global view that the tower sees of each larger image, with tiles.
    """
    pixels, sizes = batch.get("pixel_values"), batch.get("image_sizes")
    if pixels is None:
        return 0
    areas = [pixels.shape[-2] * pixels.shape[-1]] * len(pixels) if sizes is None else sizes.prod(-1).tolist()
    return sum(area + overview * (area > overview) for area in areas)


def tower_calls(batch: Mapping[str, Any]) -> TowerCalls:
    """Passes through the tower for a batch, one per image size: of the batch, and of its half `full.`."""

    def count(prefix: str) -> int:
        if prefix + "pixel_values" not in batch:
            return 0
        sizes = batch.get(prefix + "image_sizes")
        return 1 if sizes is None else len(set(map(tuple, sizes.tolist())))

    return count(""), count(FULL_PREFIX)


def most_calls(calls: Iterable[TowerCalls]) -> TowerCalls:
    """What a micro-batch makes on every process: the most that one of them needs."""
    first, second = zip(*calls, strict=True)
    return max(first), max(second)


def count_samples(batch: Batch) -> int:
    """Samples of a batch; in packed rows every position 0 begins one, and so does each further branch of a tree."""
    positions = batch.get("position_ids")
    if positions is None:
        return len(batch["input_ids"])
    branches = batch.get("branch_ids", torch.zeros_like(positions))
    further = (branches[:, 1:] > 1) & (branches.diff(dim=-1) != 0)
    return int((positions == 0).sum() + further.sum() - (count_row_padding(batch) > 0).sum())


def count_pairs(batch: Batch) -> int:
    """Sum of the samples' squared lengths: what attention costs, padding left out, and a tree's trunk counted once."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        return int(mask.sum(-1).square().sum())
    if positions is None:
        return len(batch["input_ids"]) * batch["input_ids"].shape[1] ** 2
    total = 0
    used = (positions.shape[1] - count_row_padding(batch)).tolist()
    for spans, row_end in zip(row_spans(positions, batch.get("branch_ids")), used, strict=True):
        for start, end, trunk_start, trunk_end in spans:
            own = max(0, min(end, row_end) - start)
            total += own * (own + 2 * (trunk_end - trunk_start))
    return total


def seed_everything(seed: int) -> None:
    """Seed torch, Python and NumPy."""
    torch.manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002  (users' code may draw from it)


class StepProfiler:
    """Records steps `first` to `last` with torch.profiler and writes a trace for chrome://tracing or Perfetto.

    A session records those of these steps that it runs.

    Args:
        steps: First and last step, counted from 1; None records nothing.
        path: The trace, .json.
    """

    def __init__(self, steps: tuple[int, int] | None, path: Path) -> None:
        self.first, self.last = steps or (0, 0)
        self.path = path
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Called when a step begins."""
        if self._profiler is None and self.first <= step <= self.last:
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Called when a step is done."""
        if step == self.last:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also if the run ends before the last step."""
        if self._profiler is not None:
            self._profiler.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None
