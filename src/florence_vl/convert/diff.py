"""Compare two checkpoints by part, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from florence_vl.convert.florence_vl import EMBEDDING
from florence_vl.convert.layouts import Source
from florence_vl.convert.plan import Copy, Op
from florence_vl.convert.shards import bits_equal

PARTS = (  # first match wins
    ("davit", "model.vision_tower.davit."),
    ("tower projection", "model.vision_tower.image_projector."),
    ("prompt embedding", "model.vision_tower.encoder.embed_tokens."),
    ("encoder", "model.vision_tower.encoder."),
    ("backbone", "model.vision_tower."),
    ("fusion", "model.fusion."),
    ("projector", "model.multi_modal_projector."),
    ("language model", "model.language_model."),
    ("head", "lm_head."),
    ("florence-2 decoder", "florence2."),
)
CHUNK = 1 << 24  # elements compared at a time


@dataclass
class PartDifference:
    """Comparison of one part of two checkpoints.

    Attributes:
        part: Name of the part.
        tensors: Number of tensors in both.
        equal: Number of tensors that are equal bit for bit.
        largest: Largest absolute difference.
        relative: Norm of the difference divided by the norm of A, over the part's tensors of the same shape.
        differing: Names (this package's) and largest absolute difference, largest first.
        reshaped: Names whose shapes differ.
        only_a: Names only in A.
        only_b: Names only in B.
        retyped: Number of tensors stored in different data types, compared by value.
        cut: Rows of the prompt embedding in only one of the layouts (for its placeholder); not compared.
    """

    part: str
    tensors: int = 0
    equal: int = 0
    largest: float = 0.0
    relative: float = 0.0
    differing: list[tuple[str, float]] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    retyped: int = 0
    cut: int = 0

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.differing or self.reshaped or self.only_a or self.only_b)


@dataclass
class Comparison:
    """Comparison of two checkpoints.

    Attributes:
        parts: Parts in the order of the model.
        layouts: Names of the two layouts.
        shared_only: Whether the layouts differ, so that only parts in both were compared.
    """

    parts: list[PartDifference]
    layouts: tuple[str, str]
    shared_only: bool

    @property
    def same(self) -> bool:
        """Whether all parts are equal."""
        return all(part.same for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types."""
        parts = [{**vars(part), "same": part.same} for part in self.parts]
        return {"same": self.same, "layouts": self.layouts, "shared_parts_only": self.shared_only, "parts": parts}


def part_of(name: str) -> str:
    """The part of a tensor (this package's name)."""
    return next((part for part, prefix in PARTS if name.startswith(prefix)), "other")


def diff(a: Source, b: Source, part: str | None = None) -> Comparison:
    """Compare two checkpoints, one pair of tensors in memory at a time.

    The layouts may differ (for example a converted or released Florence-VL and a Florence-2): names are translated, and
    only the parts in both are compared.

    Args:
        a: First checkpoint.
        b: Second checkpoint.
        part: Compare only this part.

    Raises:
        ValueError: The part is unknown, or the checkpoints have no tensors in common.
    """
    from florence_vl.registry import did_you_mean

    names = [name for name, _ in PARTS]
    if part is not None and part not in names:
        raise ValueError(f"unknown part {part!r}. {did_you_mean(part, names)}")
    ours, theirs = _canonical(a), _canonical(b)
    shared_only = a.layout.name != b.layout.name
    if shared_only:
        common = {part_of(n) for n in ours} & {part_of(n) for n in theirs}
        ours = {n: v for n, v in ours.items() if part_of(n) in common}
        theirs = {n: v for n, v in theirs.items() if part_of(n) in common}
    found: dict[str, PartDifference] = {}
    norms: dict[str, list[float]] = {}
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        kind = part_of(name)
        if part is not None and kind != part:
            continue
        entry = found.setdefault(kind, PartDifference(kind))
        if name not in theirs:
            entry.only_a.append(name)
        elif name not in ours:
            entry.only_b.append(name)
        else:
            one, other = _read(a, ours[name]), _read(b, theirs[name])
            if shared_only and name == EMBEDDING and one.shape[1:] == other.shape[1:]:
                rows = min(len(one), len(other))
                entry.cut = max(len(one), len(other)) - rows
                one, other = one[:rows], other[:rows]
            _compare(entry, norms.setdefault(kind, [0.0, 0.0]), name, one, other)
    if not found:
        raise ValueError(f"{a.folder} ({a.layout.name}) and {b.folder} ({b.layout.name}) have no tensors in common")
    for kind, (change, size) in norms.items():
        found[kind].relative = (change / size) ** 0.5 if size else 0.0
    for entry in found.values():
        entry.differing.sort(key=lambda item: -item[1])
    order = [*names, "other"]
    parts = sorted(found.values(), key=lambda entry: order.index(entry.part))
    return Comparison(parts, (a.layout.name, b.layout.name), shared_only)


def _canonical(source: Source) -> dict[str, tuple[str, Op]]:
    found: dict[str, tuple[str, Op]] = {}
    for name in source.checkpoint.tensors:
        canonical = source.layout.canonical(name)
        if canonical is None:
            found["other." + name] = (name, Copy())
        elif canonical[0] not in found:
            found[canonical[0]] = (name, canonical[1])
    return found


def _read(source: Source, found: tuple[str, Op]) -> torch.Tensor:
    return found[1](source.checkpoint.read(found[0]))


def _compare(entry: PartDifference, norms: list[float], name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    entry.tensors += 1
    if a.shape != b.shape:
        entry.reshaped.append(f"{name} {tuple(a.shape)} / {tuple(b.shape)}")
        return
    entry.retyped += a.dtype != b.dtype
    equal = a.dtype == b.dtype and bits_equal(a, b)
    largest = 0.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.numel(), CHUNK):
        part_a, part_b = flat_a[start : start + CHUNK].double(), flat_b[start : start + CHUNK].double()
        norms[1] += float(part_a.square().sum())
        if not equal:
            gap = (part_a - part_b).abs()
            norms[0] += float(gap.square().sum())
            peak = float(gap.max())
            largest = peak if peak != peak else max(largest, peak)  # NaN stays
    if equal or (a.dtype != b.dtype and largest == 0.0):
        entry.equal += 1
        return
    entry.differing.append((name, largest))
    entry.largest = largest if largest != largest else max(entry.largest, largest)
