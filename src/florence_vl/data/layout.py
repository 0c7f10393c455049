"""Layout of samples in batches: rows with a token budget, or padded groups of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from florence_vl.data.collate import PackedCollator, PaddedCollator
from florence_vl.data.encode import IGNORE, RecordEncoder, Sample
from florence_vl.data.records import BadRecord, Record
from florence_vl.registry import did_you_mean

MODES = ("packed", "padded")

FULL_PREFIX = "full."
"""Prefix of the names in the second half of a batch: the same samples with all features, see `RowCollator`."""


@dataclass(frozen=True)
class BatchLayout:
    """Layout of batches.

    Args:
        mode: "packed": rows of at most `tokens_per_row` tokens contain several samples each, isolated from each other.
            "padded": a batch contains `batch_size` samples, padded to the longest.
        tokens_per_row: Token budget of a packed row (including image tokens).
        max_images_per_row: Maximum number of images in a packed row; limits the tower's memory.
        batch_size: Rows (packed) or samples (padded) of one forward pass of one process.
        global_batch_size: Rows (packed) or samples (padded) of one optimizer step over all processes and accumulation.
        window: Approximate number of records that are laid out together: windows end with their epoch, and for grouping
            by length they consist of whole steps, at least one.
        pad_to_max_length: Packed mode: pad every row to `tokens_per_row` (one shape, for `torch.compile`); False pads
            to the longest row of the batch.
        group_by_length: Padded mode: batches of samples of similar length; False keeps the mixture's order.
        trees: Packed mode: a window's records of one picture share its tokens (`florence_vl.data.trees`).
        split_turns: With `trees`: the turns of a record about a picture are trained as independent pairs.
        max_bad_share: The run stops when more than this share of records is bad ...
        min_records: ... counted once so many records have been read.
        bad_records_file: JSON lines, one for every bad record; ranks above 0 append `.rank<r>` to its stem.
    """

    mode: str = "packed"
    tokens_per_row: int = 4096
    max_images_per_row: int = 16
    batch_size: int = 1
    global_batch_size: int = 8
    window: int = 256
    pad_to_max_length: bool = False
    group_by_length: bool = True
    trees: bool = False
    split_turns: bool = False
    max_bad_share: float = 0.05
    min_records: int = 1000
    bad_records_file: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown packing mode {self.mode!r}. {did_you_mean(self.mode, MODES)}")
        for name in ("tokens_per_row", "max_images_per_row", "batch_size", "global_batch_size", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"packing.{name} must be at least 1, got {getattr(self, name)}")
        if self.global_batch_size % self.batch_size:
            raise ValueError(
                f"packing.global_batch_size ({self.global_batch_size}) must be a multiple of packing.batch_size "
                f"({self.batch_size})"
            )
        if self.trees and self.mode != "packed":
            raise ValueError("packing.trees needs packed rows: set packing.mode to packed")
        if self.split_turns and not self.trees:
            raise ValueError("packing.split_turns needs packing.trees: without it each pair would repeat its picture")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"packing.max_bad_share is a fraction between 0 and 1, got {self.max_bad_share}")
        if self.mode == "padded" and self.window < self.batch_size:
            raise ValueError(f"packing.window ({self.window}) must contain at least one batch of {self.batch_size}")

    @property
    def batches_per_step(self) -> int:
        """Micro-batches per optimizer step, over all processes."""
        return self.global_batch_size // self.batch_size

    @property
    def groups_per_step(self) -> int:
        """Groups (rows, or padded batches) per optimizer step, over all processes."""
        return self.global_batch_size if self.mode == "packed" else self.batches_per_step

    @property
    def groups_per_batch(self) -> int:
        """Groups per micro-batch."""
        return self.batch_size if self.mode == "packed" else 1

    def window_at(self, number: int, epoch: int) -> Window:
        """A window of the stream; no window crosses the end of an epoch (padded: of an epoch's last step).

        Args:
            number: Packed: its number from 0. Padded: any of its steps, because a padded window consists of whole
                steps, so its groups are known without reading records.
            epoch: Number of records per epoch of the mixture.
        """
        if self.mode == "packed":
            windows = -(-epoch // self.window)
            turn, index = divmod(number, windows)
            first, end = (turn * epoch + i * epoch // windows for i in (index, index + 1))
            return Window(number, first, end, number + 1)
        size = self.global_batch_size
        turn = number * size // epoch
        begin, stop = (-(-t * epoch // size) for t in (turn, turn + 1))  # first steps of this epoch and of the next
        steps = stop - begin
        windows = -(-steps // max(1, self.window // size))
        index = ((number - begin + 1) * windows - 1) // steps
        first, end = (begin + i * steps // windows for i in (index, index + 1))
        return Window(first, first * size, end * size, end)


@dataclass(frozen=True)
class Window:
    """Records that are laid out together.

    Attributes:
        number: See `BatchLayout.window_at`.
        first: First position in the mixture's stream.
        end: Position after the last one.
        following: Number of the next window.
    """

    number: int
    first: int
    end: int
    following: int


def pack_first_fit(
    lengths: Sequence[int], images: Sequence[int], budget: int, max_images: int, decreasing: bool = True
) -> list[list[int]]:
    """First-fit bin packing with two limits.

    Args:
        lengths: Tokens of each sample.
        images: Images of each sample.
        budget: Tokens per row.
        max_images: Images per row.
        decreasing: Longest first (Johnson 1973: at most 11/9 of the optimal number of rows); False keeps the order.

    Returns:
        Rows as lists of indices into `lengths`, ascending within a row.

    Raises:
        ValueError: A single sample exceeds a limit.
    """
    for index, (length, count) in enumerate(zip(lengths, images, strict=True)):
        if length > budget or count > max_images:
            raise ValueError(
                f"sample {index} has {length} tokens and {count} images; a row holds {budget} and {max_images}"
            )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)) if decreasing else range(len(lengths))
    free_tokens = np.full(len(lengths), budget, dtype=np.int64)
    free_images = np.full(len(lengths), max_images, dtype=np.int64)
    rows: list[list[int]] = []
    for index in order:
        used = len(rows)
        fits = (free_tokens[:used] >= lengths[index]) & (free_images[:used] >= images[index])
        row = int(fits.argmax()) if used and fits.any() else used
        if row == used:
            rows.append([])
        rows[row].append(index)
        free_tokens[row] -= lengths[index]
        free_images[row] -= images[index]
    return [sorted(row) for row in rows]


def arrange(lengths: Sequence[int], images: Sequence[int], layout: BatchLayout, seed: int) -> list[list[int]]:
    """Rows (packed) or batches (padded) of samples, in order of use.

    Args:
        lengths: Tokens of each sample.
        images: Images of each sample.
        layout: The layout.
        seed: Shuffles the order of the rows, which packing and grouping sort by length.
    """
    if layout.mode == "packed":
        groups = pack_first_fit(lengths, images, layout.tokens_per_row, layout.max_images_per_row)
    else:
        order = list(range(len(lengths)))
        if layout.group_by_length:
            order.sort(key=lambda i: (lengths[i], i))
        groups = [order[i : i + layout.batch_size] for i in range(0, len(order), layout.batch_size)]
        if not layout.group_by_length:
            return groups
    return [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]


def deal_steps(
    places: Sequence[int], lengths: Sequence[int], size: int, layout: BatchLayout, seed: int
) -> list[list[int]]:
    """Padded batches of a window of whole steps. Their number is constant, so a step determines its window.

    If grouped by length, the samples of a step have similar lengths and its batches are in ascending order: processes
    that compute neighboring batches at the same time wait little for each other.

    Args:
        places: Place in the window of each good sample, ascending; places of bad samples stay empty.
        lengths: Tokens of each good sample.
        size: Number of places in the window.
        layout: The layout.
        seed: Shuffles the order of the steps.

    Returns:
        Batches as lists of indices into `places`, step by step; a batch may be empty.
    """
    count = size // layout.batch_size
    if not layout.group_by_length:
        groups: list[list[int]] = [[] for _ in range(count)]
        for index, place in enumerate(places):
            groups[place // layout.batch_size].append(index)
        return groups
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups = [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]
    per_step = layout.batches_per_step
    steps = np.random.default_rng(seed).permutation(count // per_step)
    return [group for step in steps for group in groups[step * per_step : (step + 1) * per_step]]


def measure(encoder: RecordEncoder, record: Record, position: int | None = None) -> tuple[int, int]:
    """(tokens, images) of a record's sample, after truncation of turns; no image is decoded.

    Raises:
        BadRecord: As in `RecordEncoder.__call__`, except for images whose damage only decoding detects.
    """
    sample = encoder.outline(record, position)
    return sample.row_tokens, len(sample.image_tokens)


def check_fits(encoder: RecordEncoder, layout: BatchLayout, record: Record, tokens: int, images: int) -> None:
    """Check that a packed row can hold a sample.

    Raises:
        BadRecord: Kind "too_long".
        ValueError: The sample is too long and the encoder's `on_long` is "error".
    """
    text = ""
    if layout.mode == "packed" and tokens > layout.tokens_per_row:
        text = f"{tokens} tokens, more than packing.tokens_per_row={layout.tokens_per_row}"
    elif layout.mode == "packed" and images > layout.max_images_per_row:
        text = f"{images} images, more than packing.max_images_per_row={layout.max_images_per_row}"
    if text:
        text = f"record {record.id!r} of {record.source!r} has {text}"
        if encoder.on_long == "error":
            raise ValueError(f"{text}. Raise it, or set on_long to drop")
        raise BadRecord("too_long", text)


class RowCollator:
    """Collates encoded rows to a batch, in the layout's mode.

    Args:
        encoder: Provides the pad token.
        layout: The layout.
    """

    def __init__(self, encoder: RecordEncoder, layout: BatchLayout) -> None:
        self.packed, self.distill = layout.mode == "packed", encoder.distill
        pad = encoder.processor.tokenizer.pad_token_id
        self._pad = PaddedCollator(pad)
        self._pack = PackedCollator(pad, layout.tokens_per_row, pad_to_max_length=layout.pad_to_max_length)

    def __call__(self, rows: list[list[Sample]]) -> dict[str, torch.Tensor]:
        """Collate rows; some or all may be empty (a batch without samples keeps the ranks in step but trains nothing).

        With distillation the batch also contains the samples' `full`, with names prefixed by `full.`.
        """
        if not any(rows):
            rows = [[Sample(torch.tensor([self._pad.pad_token_id]), torch.tensor([IGNORE]))], *rows[1:]]
        batch = self._collate(rows)
        if self.distill:
            full = self._collate([[sample.full or sample for sample in row] for row in rows])
            batch |= {FULL_PREFIX + name: value for name, value in full.items()}
        return batch

    def _collate(self, rows: list[list[Sample]]) -> dict[str, torch.Tensor]:
        return self._pack(rows) if self.packed else self._pad(rows[0])
