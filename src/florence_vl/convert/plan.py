"""A conversion as data: the target and operation of each tensor, and which tensors are omitted and why.

A plan is checked completely (every source tensor used, every target name and shape correct) before anything is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from florence_vl.convert.shards import (
    Checkpoint,
    Output,
    Progress,
    check_disk_space,
    few,
    write_json,
    write_safetensors,
    write_shards,
)
from florence_vl.files import atomic_folder

ORIGINAL_FOLDER = "original"  # inside a converted folder: what only the source's layout contains
DROPPED_FILE = "dropped_tensors.safetensors"
LAYOUT_FILE = "layout.json"
REPORT_FILE = "conversion.json"
OTHER_FILES_BYTES = 64 * 1024**2  # tokenizer, configs, card


@dataclass(frozen=True)
class Copy:
    """The unchanged tensor."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@dataclass(frozen=True)
class Transpose:
    """A matrix that the layouts store transposed."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t()


@dataclass(frozen=True)
class Rows:
    """The first `count` rows; additional rows are the mean row (for tokens that were never trained)."""

    count: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.count, *shape[1:])

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        missing = self.count - tensor.shape[0]
        if missing <= 0:
            return tensor[: self.count]
        mean = tensor.mean(0, keepdim=True, dtype=torch.float32 if tensor.itemsize < 4 else tensor.dtype)
        return torch.cat([tensor, mean.to(tensor.dtype).expand(missing, *tensor.shape[1:])])


@dataclass(frozen=True)
class Columns:
    """Equal blocks of columns in another order: block `order[i]` of the source is block `i`."""

    order: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        blocks = tensor.chunk(len(self.order), 1)
        return torch.cat([blocks[i] for i in self.order], 1)


@dataclass(frozen=True)
class Zeros:
    """Zeros of this shape, with the source's dtype."""

    size: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.size

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros(self.size)


Op = Copy | Transpose | Rows | Columns | Zeros


@dataclass(frozen=True)
class Move:
    """A tensor of the target and its source."""

    target: str
    source: str
    checkpoint: Checkpoint
    op: Op = field(default_factory=Copy)

    def output(self) -> Output:
        info = self.checkpoint.tensors[self.source]
        return Output(
            self.target,
            self.op.shape(info.shape),
            info.dtype,
            lambda: self.op(self.checkpoint.read(self.source)),
        )


@dataclass
class Plan:
    """A conversion plan.

    Attributes:
        kind: Kind of the target, for the report ("Florence-VL", "transformers Florence-2" ...).
        source: Description of the source.
        layout: Name of the source's layout.
        moves: Tensors to write.
        dropped: Source tensor -> reason.
        copies: Dropped tensor -> the kept tensor that it equals bit for bit, from which it can be restored.
        side: Dropped tensors that are stored with the model so that `--to original` can restore them.
        settings: The parity switches, for the report and the card.
        notes: Notes for the user.
        files: Functions that write the target's other files into a folder.
    """

    kind: str
    source: str
    layout: str
    moves: list[Move] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    side: list[Move] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    layout_facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: list[Callable[[Path], None]] = field(default_factory=list)
    keep_folder: Callable[[Path], None] | None = None

    def drop(self, name: str, reason: str, checkpoint: Checkpoint | None = None, copy_of: str | None = None) -> None:
        """Omit a tensor; with `checkpoint` it is stored in the side file."""
        self.dropped[name] = reason
        if copy_of is not None:
            self.copies[name] = copy_of
        elif checkpoint is not None:
            self.side.append(Move(name, name, checkpoint))

    def account(self, checkpoint: Checkpoint) -> None:
        """Check that every tensor of the source is moved or dropped.

        Raises:
            ValueError: Some tensors are neither; the message names them.
        """
        used = {move.source for move in self.moves if move.checkpoint is checkpoint} | set(self.dropped)
        unknown = [name for name in checkpoint.tensors if name not in used]
        if unknown:
            raise ValueError(
                f"{checkpoint.folder}: {len(unknown)} tensors are unknown in {self.kind}: {few(unknown)}. "
                "Nothing was written; this is another architecture or version than the supported one"
            )

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: tuple[str, ...] = ()) -> None:
        """Check names and shapes against those of the model for the result.

        Args:
            expected: Target name -> shape.
            optional: Prefixes of parts that may be missing as a whole.

        Raises:
            ValueError: A tensor is missing, unexpected, named twice or has another shape.
        """
        found: dict[str, tuple[int, ...]] = {}
        for move in self.moves:
            if move.target in found:
                raise ValueError(f"{move.target} would be written twice, the second time from {move.source}")
            found[move.target] = move.op.shape(move.checkpoint.tensors[move.source].shape)
        absent = tuple(part for part in optional if not any(name.startswith(part) for name in found))
        missing = [n for n in expected if n not in found and not n.startswith(absent)]
        unexpected = [n for n in found if n not in expected]
        wrong = [f"{n} {found[n]} instead of {expected[n]}" for n in found if n in expected and found[n] != expected[n]]
        problems = [
            f"{len(names)} {what}: {few(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
            if names
        ]
        if problems:
            raise ValueError(
                f"{self.source} is not a valid {self.kind}; tensors {'; '.join(problems)}. Nothing was written"
            )

    @property
    def nbytes(self) -> int:
        """Size of the written tensors in bytes."""
        return sum(move.output().nbytes for move in [*self.moves, *self.side])

    def report(self) -> dict[str, Any]:
        """Description of the conversion, for `conversion.json`."""
        return {
            "source": self.source,
            "source_layout": self.layout,
            "written": self.kind,
            "tensors": len(self.moves),
            "settings": self.settings,
            "dropped": self.dropped,
            "notes": self.notes,
        }

    def write(
        self,
        destination: Path,
        max_shard_bytes: int,
        keep_dropped: bool,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write the folder atomically.

        Args:
            destination: The folder.
            max_shard_bytes: Maximum file size.
            keep_dropped: Also write the dropped tensors into the side file.
            overwrite: Replace an existing folder.
            progress: Called with the bytes of each written tensor.

        Raises:
            ValueError: The destination exists or the disk is too small.
        """
        self = copy.copy(self)
        if not keep_dropped:
            self.side = []
        check_disk_space(destination, self.nbytes + OTHER_FILES_BYTES)
        with atomic_folder(destination, overwrite=overwrite) as folder:
            for write in self.files:
                write(folder)
            write_shards(folder, [move.output() for move in self.moves], max_shard_bytes, progress)
            if self.keep_folder is not None:
                original = folder / ORIGINAL_FOLDER
                original.mkdir()
                self.keep_folder(original)
                if self.side:
                    side = [move.output() for move in self.side]
                    write_safetensors(original / DROPPED_FILE, side, progress=progress)
                complete = keep_dropped or not any(n not in self.copies for n in self.dropped)
                facts = {"layout": self.layout, "copies": self.copies, "complete": complete, **self.layout_facts}
                write_json(original / LAYOUT_FILE, facts)
            write_json(folder / REPORT_FILE, self.report())
        for checkpoint in {id(m.checkpoint): m.checkpoint for m in [*self.moves, *self.side]}.values():
            checkpoint.close()
