"""Collators: samples to batches for the model, padded, packed, or from raw records for other trainers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from florence_vl.data.encode import IGNORE, RecordEncoder, Sample
from florence_vl.data.records import BadRecord, Record

Batch = dict[str, Tensor]


def _images(samples: Sequence[Sample]) -> Batch:
    """`pixel_values` and the samples' `image_inputs`; `image_sizes` only if an image is smaller than the tensor."""
    shown = [sample for sample in samples if sample.pixel_values is not None]
    if not shown:
        return {}
    images = [sample.pixel_values for sample in shown if sample.pixel_values is not None]
    own = [torch.tensor([pixels.shape[-2:]]).expand(len(pixels), -1) for pixels in images]
    sizes_I2 = torch.cat([s.image_inputs.get("image_sizes", size) for s, size in zip(shown, own, strict=True)])
    height, width = (max(pixels.shape[axis] for pixels in images) for axis in (-2, -1))
    batch = {"pixel_values": _cat_padded(images, (height, width))}
    if (sizes_I2 != torch.tensor([height, width])).any():
        batch["image_sizes"] = sizes_I2
    for name in shown[0].image_inputs:
        if name != "image_sizes":
            rows = [sample.image_inputs[name] for sample in shown]
            batch[name] = _cat_padded(rows, (max(row.shape[-1] for row in rows),))
    return batch


def _cat_padded(tensors: Sequence[Tensor], last: tuple[int, ...]) -> Tensor:
    """The rows of all tensors, with zeros at the end of last dimensions that are shorter than `last`."""
    if all(tensor.shape[-len(last) :] == last for tensor in tensors):
        return torch.cat(list(tensors))
    whole = tensors[0].new_zeros(sum(map(len, tensors)), *tensors[0].shape[1 : -len(last)], *last)
    first = 0
    for tensor in tensors:
        place = whole[first : first + len(tensor)]
        for axis, size in enumerate(tensor.shape[-len(last) :], start=place.ndim - len(last)):
            place = place.narrow(axis, 0, size)
        place.copy_(tensor)
        first += len(tensor)
    return whole


def _round_up(length: int, multiple: int | None) -> int:
    return length if not multiple else -(-length // multiple) * multiple


class PaddedCollator:
    """Pads samples to one row each.

    Args:
        pad_token_id: Id of the padding.
        padding_side: "right" for training, "left" for generation.
        pad_to_multiple_of: Round the length up to a multiple, for efficient kernels.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right", pad_to_multiple_of: int | None = None) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
        _check_pad_token(pad_token_id)
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Pad the samples.

        Returns:
            `input_ids`, `attention_mask` and `labels` (samples, L), int64, and, if there are images, `pixel_values`
            (images of the batch in reading order, 3, H, W), with `image_sizes` (images, 2) if they differ in size, and
            the samples' other `image_inputs`.
        """
        _check_samples(samples)
        length = _round_up(max(len(sample) for sample in samples), self.pad_to_multiple_of)
        shape = (len(samples), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE, dtype=torch.long),
        }
        for row, sample in enumerate(samples):
            start = 0 if self.padding_side == "right" else length - len(sample)
            columns = slice(start, start + len(sample))
            batch["input_ids"][row, columns] = sample.input_ids
            batch["attention_mask"][row, columns] = 1
            batch["labels"][row, columns] = sample.labels
            batch["labels"][row, start] = IGNORE
        return {**batch, **_images(samples)}


class PackedCollator:
    """Packs several samples per row, isolated from each other: `position_ids` restart at 0 for each.

    A sample that is a message tree comes with `branch_ids`; see `florence_vl.model.varlen_attention`.

    The model must be called without an attention mask and with `use_cache=False`; transformers then builds the
    block-diagonal causal mask from the positions (for every attention backend). The padding of a row is a separate
    sample.

    Args:
        pad_token_id: Id of the padding.
        max_length: Token budget of a row. Required for flat lists; given rows are checked against it.
        pad_to_multiple_of: Round the length up to a multiple.
        pad_to_max_length: Pad every batch to the length `max_length` (one shape for `torch.compile`).
    """

    def __init__(
        self,
        pad_token_id: int,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        pad_to_max_length: bool = False,
    ) -> None:
        _check_pad_token(pad_token_id)
        if pad_to_max_length and max_length is None:
            raise ValueError("pad_to_max_length needs max_length")
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_to_max_length = pad_to_max_length

    def __call__(self, samples: Sequence[Sequence[Sample]] | Sequence[Sample]) -> Batch:
        """Pack the samples.

        Args:
            samples: The samples of each row, as planned by `florence_vl.data.packing`; or a flat list, which fills rows
                in order up to `max_length`.

        Returns:
            `input_ids`, `position_ids` and `labels` (rows, L), int64, and, if there are images, `pixel_values` (images
            in reading order: row by row, sample by sample) and what stands beside them, see `PaddedCollator`. The first
            label of each sample and branch is -100, so that the shift by one never crosses from one into the next. If
            there are message trees, also `branch_ids` (rows, L).

        Raises:
            ValueError: A row or a sample is longer than `max_length`, or a flat list is given without it.
        """
        rows = self._rows(samples)
        flat = [sample for row in rows for sample in row]
        _check_samples(flat)
        lengths = [sum(len(sample) for sample in row) for row in rows]
        for index, length in enumerate(lengths):
            if self.max_length is not None and length > self.max_length:
                names = ", ".join(repr(sample.id) for sample in rows[index])
                raise ValueError(f"row {index} has {length} tokens, more than max_length={self.max_length} ({names})")
        width = _round_up(max(lengths), self.pad_to_multiple_of)
        if self.pad_to_max_length and self.max_length is not None:
            width = _round_up(self.max_length, self.pad_to_multiple_of)
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE, dtype=torch.long)
        position_ids = torch.zeros(shape, dtype=torch.long)
        branch_ids = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            start = 0
            for sample in row:
                end = start + len(sample)
                input_ids[index, start:end] = sample.input_ids
                labels[index, start:end] = sample.labels
                labels[index, start] = IGNORE
                position_ids[index, start:end] = torch.arange(len(sample))
                bounds = [*sample.branches, len(sample)]
                for number, (first, last) in enumerate(itertools.pairwise(bounds), start=1):
                    branch = slice(start + first, start + last)
                    position_ids[index, branch] = torch.arange(bounds[0], bounds[0] + last - first)
                    branch_ids[index, branch] = number
                    labels[index, start + first] = IGNORE
                start = end
            position_ids[index, start:] = torch.arange(width - start)
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, **_images(flat)}
        return batch | {"branch_ids": branch_ids} if branch_ids.any() else batch

    def _rows(self, samples: Sequence[Sequence[Sample]] | Sequence[Sample]) -> list[list[Sample]]:
        if not samples:
            raise ValueError("a batch needs at least one sample")
        if not isinstance(samples[0], Sample):
            return [list(row) for row in samples]  # type: ignore[arg-type]
        if self.max_length is None:
            raise ValueError("packing a flat list of samples needs max_length, the token budget of a row")
        rows: list[list[Sample]] = []
        room = 0
        for sample in samples:
            assert isinstance(sample, Sample)
            if len(sample) > room or not rows:
                rows.append([])
                room = self.max_length
            rows[-1].append(sample)
            room -= len(sample)
        return rows


class FlorenceVLCollator:
    """`data_collator` for HF `Trainer` and TRL `SFTTrainer`: raw records in, a padded batch out.

    A row is a `Record`, or a dict with `messages` and optionally `images` (the columns that TRL uses): one source per
    image part, or a source inside the part (`{"type": "image", "image": ...}`). Set `remove_unused_columns=False`, and
    for TRL `dataset_kwargs={"skip_prepare_dataset": True}`.

    Args:
        encoder: Converts a record to a sample.
        padding_side: "right" for training.
        pad_to_multiple_of: Round the length up to a multiple.
        on_bad: Called with each `BadRecord`, whose row is then dropped from the batch; None raises it.

    Raises:
        ValueError: The tokenizer has no pad token.
    """

    def __init__(
        self,
        encoder: RecordEncoder,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
        on_bad: Callable[[BadRecord], None] | None = None,
    ) -> None:
        self.encoder = encoder
        self.on_bad = on_bad
        self.pad = PaddedCollator(encoder.processor.tokenizer.pad_token_id, padding_side, pad_to_multiple_of)

    def __call__(self, rows: Sequence[Record | Mapping[str, Any]]) -> Batch:
        """Encode and pad the rows.

        Raises:
            BadRecord: A row is bad and `on_bad` is None, or all rows are.
        """
        samples = []
        error: BadRecord | None = None
        for index, row in enumerate(rows):
            try:
                samples.append(self.encoder(as_record(row, index)))
            except BadRecord as bad:
                if self.on_bad is None:
                    raise
                self.on_bad(bad)
                error = bad
        if not samples and error is not None:
            raise BadRecord(error.kind, f"all {len(rows)} rows of a batch are bad; the last: {error}")
        return self.pad(samples)


def as_record(row: Record | Mapping[str, Any], index: int = 0) -> Record:
    """Convert a row of a `datasets` table to a `Record`.

    Raises:
        BadRecord: Kind "messages": the row has no messages.
    """
    if isinstance(row, Record):
        return row
    if not isinstance(row, Mapping) or not row.get("messages"):
        keys = list(row) if isinstance(row, Mapping) else type(row).__name__
        raise BadRecord("messages", f"row {index} of the batch has no 'messages': found {keys}")
    images = row.get("images") if row.get("images") is not None else row.get("image")
    images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    messages = []
    for message in row["messages"]:
        content = message.get("content")
        if isinstance(content, (list, tuple)):  # tables fill missing keys of a part with None
            content = [{k: v for k, v in part.items() if v is not None} for part in content]
            if "images" not in row and "image" not in row:
                images += [_part_source(part) for part in content if part.get("type") == "image"]
        messages.append({"role": message.get("role"), "content": content})
    images = [image["bytes"] or image["path"] if _is_encoded(image) else image for image in images]
    return Record(str(row.get("id", index)), str(row.get("source", "dataset")), messages, images)


def _part_source(part: Mapping[str, Any]) -> Any:
    for key in ("image", "path", "url"):
        if key in part:
            return part[key]
    raise BadRecord("messages", f"an image part has no source ('image', 'path' or 'url'): {part!r:.80}")


def _is_encoded(image: Any) -> bool:
    return isinstance(image, Mapping) and {"bytes", "path"} <= set(image)


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("a batch needs at least one sample")


def _check_pad_token(pad_token_id: int | None) -> None:
    if pad_token_id is None:
        raise ValueError("pad_token_id is None: the tokenizer has no pad token; set tokenizer.pad_token")
