"""Weighted mixtures of sources: position p of the endless stream -> (source, record), a pure function of (seed, p)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

from florence_vl.data.records import Record
from florence_vl.data.sampler import BlockPermutation, GroupShuffles, Permutation, mix
from florence_vl.registry import did_you_mean

WEIGHTINGS = ("repeats", "proportions")


@runtime_checkable
class MapReader(Protocol):
    """The reader interface that a mixture needs; every class in `READERS` has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Args:
        name: Name in reports; records get it as their `source`.
        reader: Any sized, indexable object that returns a `Record`.
        weight: See `Mixture`.
        together: Shuffles that keep records together, e.g. those of a picture; by default single records, or the
            reader's blocks, are shuffled.
    """

    name: str
    reader: MapReader
    weight: float = 1.0
    together: GroupShuffles | None = None


@dataclass(frozen=True)
class _Node:
    """A node of the interleaving tree: a leaf (a source) or two subtrees with their draws per epoch."""

    draws: int
    source: int = -1
    children: tuple[_Node, _Node] | None = None


class Mixture:
    """An endless, evenly interleaved, shuffled, stateless stream over weighted sources.

    Draws are stratified: after every epoch each source has been drawn exactly as often as its weight specifies, and
    within an epoch the sources are interleaved evenly (a binary tree of Bresenham lines), so no part of training misses
    a source. The k-th draw of a source is record `shuffle_pass(k mod n)` of its pass number k div n; a source with
    weight 0.5 is therefore seen completely in two epochs, and one with weight 3 three times per epoch.

    Args:
        sources: The sources; names must differ.
        weighting: "repeats": a weight is the number of passes over the source per epoch (1 = every record once).
            "proportions": a weight is the source's fraction of the stream, independent of its size; an epoch is as long
            as the sources together.
        seed: Seed of the shuffles.
        shuffle: False keeps every source's own order (for evaluation and debugging).

    Raises:
        ValueError: There are no sources, names are equal, a source is empty, or a weight is not positive and finite.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        weighting: str = "repeats",
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {weighting!r}. {did_you_mean(weighting, WEIGHTINGS)}")
        if not sources:
            raise ValueError("a mixture needs at least one source")
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"source names must differ, found twice: {', '.join(twice)}")
        for source in sources:
            if not (source.weight > 0 and math.isfinite(source.weight)):
                raise ValueError(f"weight of {source.name!r} must be positive and finite, got {source.weight}")
            if len(source.reader) == 0:
                raise ValueError(f"source {source.name!r} has no records")
        self.sources = list(sources)
        self.weighting, self.seed, self.shuffle = weighting, seed, shuffle
        self.sizes = [len(source.reader) for source in sources]
        if weighting == "repeats":
            self.draws = [max(1, round(n * s.weight)) for n, s in zip(self.sizes, sources, strict=True)]
        else:
            self.draws = _apportion([s.weight for s in sources], sum(self.sizes))
        self._root = _tree([_Node(draws, index) for index, draws in enumerate(self.draws)])

    def __len__(self) -> int:
        """Number of records per epoch."""
        return self._root.draws

    def locate(self, position: int) -> tuple[int, int]:
        """(index of the source, index of the record in it) at any position >= 0; epochs follow each other endlessly."""
        if position < 0:
            raise IndexError(f"positions start at 0, got {position}")
        node = self._root
        while node.children:
            left, right = node.children
            before = position * left.draws // node.draws
            if (position + 1) * left.draws // node.draws > before:
                node, position = left, before
            else:
                node, position = right, position - before
        size = self.sizes[node.source]
        pass_, index = divmod(position, size)
        if self.shuffle:
            source, seed = self.sources[node.source], mix(self.seed, node.source, pass_)
            if source.together is not None:
                index = source.together(seed, index)
            else:
                index = _shuffle(size, seed, int(getattr(source.reader, "block", 1) or 1))(index)
        return node.source, index

    def __getitem__(self, position: int) -> Record:
        """The record at a position, with the name of its source.

        Raises:
            BadRecord: The record is malformed; `locate` names it.
        """
        source, index = self.locate(position)
        record = self.sources[source].reader[index]
        record.source = self.sources[source].name
        return record

    def describe(self) -> list[dict[str, object]]:
        """For every source: name, records, weight, draws and passes per epoch, fraction of the stream."""
        return [
            {
                "source": source.name,
                "records": size,
                "weight": source.weight,
                "draws": draws,
                "passes": draws / size,
                "share": draws / len(self),
            }
            for source, size, draws in zip(self.sources, self.sizes, self.draws, strict=True)
        ]


@lru_cache(maxsize=256)
def _shuffle(size: int, seed: int, block: int) -> Permutation | BlockPermutation:
    return BlockPermutation(size, seed, block) if block > 1 else Permutation(size, seed)


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to the weights with the sum `total` (largest remainders), each at least 1."""
    exact = [weight / math.fsum(weights) * total for weight in weights]
    counts = [max(1, math.floor(x)) for x in exact]
    order = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    while sum(counts) < total:
        for i in order[: total - sum(counts)]:
            counts[i] += 1
    while sum(counts) > total:
        counts[max(range(len(counts)), key=lambda i: counts[i] - exact[i] if counts[i] > 1 else -math.inf)] -= 1
    return counts


def _tree(nodes: list[_Node]) -> _Node:
    """A balanced binary tree over the sources."""
    if len(nodes) == 1:
        return nodes[0]
    half = len(nodes) // 2
    left, right = _tree(nodes[:half]), _tree(nodes[half:])
    return _Node(left.draws + right.draws, children=(left, right))
