"""Stateless shuffles: the i-th record of a shuffle of any size is computed from (seed, i).

A shuffle of n records is a keyed bijection of [0, n): a generalized Feistel network over Z_a x Z_b with a * b >= n and
cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Memory is O(1), so ten million
records need no permutation array, and a run resumes at any position without replaying a random generator.
"""

from __future__ import annotations

import math

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(*words: int) -> int:
    """A 64-bit hash of integers (splitmix64 finalizer after every word); equal on every machine and version.

    Args:
        words: Any integers; their order matters.
    """
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ (word & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Permutation:
    """A pseudo-random bijection of [0, size), computed element by element.

    Args:
        size: Number of elements, at least 1.
        seed: Integers that choose the permutation.

    Example:
        >>> sorted(Permutation(5, seed=0)(i) for i in range(5))
        [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got size {size}")
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        self._keys = [mix(seed, size, round_) for round_ in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """New position of element `index`.

        Raises:
            IndexError: `index` is outside [0, size).
        """
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} outside a permutation of {self.size}")
        value = int(index)
        while True:
            x, y = divmod(value, self._b)
            for round_, key in enumerate(self._keys):
                if round_ % 2 == 0:
                    x = (x + _mix_word(y, key)) % self._a
                else:
                    y = (y + _mix_word(x, key)) % self._b
            value = x * self._b + y
            if value < self.size:
                return value


def _mix_word(x: int, key: int) -> int:
    x = ((x ^ key) + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class BlockPermutation:
    """A shuffle that keeps neighbors together, for files in which reading a record costs as much as reading its block.

    Blocks of `block` consecutive records (a parquet row group) are shuffled; then every run of `span` shuffled blocks
    is shuffled by record. A reader that keeps `span` blocks in memory reads each block once per pass.

    Args:
        size: Number of records.
        seed: Seed of the shuffle.
        block: Records per block.
        span: Number of blocks that are mixed with each other.
    """

    def __init__(self, size: int, seed: int = 0, block: int = 1024, span: int = 8) -> None:
        if block < 1 or span < 1:
            raise ValueError(f"block and span must be at least 1, got block={block}, span={span}")
        self.size, self.block, self.span = size, block, span
        self._num_blocks = -(-size // block)
        self._blocks = Permutation(self._num_blocks, mix(seed, 1))
        self._seed = seed

    def _once(self, index: int) -> int:
        group, offset = divmod(index, self.block * self.span)
        blocks_here = min(self.span, self._num_blocks - group * self.span)
        slot, inner = divmod(
            Permutation(blocks_here * self.block, mix(self._seed, 2, group))(offset),
            self.block,
        )
        return self._blocks(group * self.span + slot) * self.block + inner

    def __call__(self, index: int) -> int:
        """New position of element `index`; see `Permutation`."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} outside a permutation of {self.size}")
        value = self._once(index)
        while value >= self.size:  # the last block may be short: walk the cycle back into range
            value = self._once(value)
        return value


class GroupShuffles:
    """Shuffles that keep the members of a group together: the groups in random order, each in its own.

    Unlike the shuffles above they need memory: 8 bytes an element, and as many for each of the last two seeds.

    Args:
        groups: (size,) integers, equal for the members of a group.
    """

    def __init__(self, groups: np.ndarray) -> None:
        self._members = np.argsort(groups, kind="stable")
        ordered = groups[self._members]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._sizes = np.diff(np.r_[self._starts, len(groups)])
        self._kept: dict[int, np.ndarray] = {}

    def __call__(self, seed: int, index: int) -> int:
        """Where element `index` goes in the shuffle of a seed."""
        if seed not in self._kept:
            chosen = np.random.default_rng(seed).permutation(len(self._starts))
            sizes = self._sizes[chosen]
            begins = np.repeat(self._starts[chosen] - (sizes.cumsum() - sizes), sizes)
            latest = list(self._kept.items())[-1:]
            self._kept = {**dict(latest), seed: self._members[begins + np.arange(len(begins))]}
        return int(self._kept[seed][index])


def check_rank(rank: int, world_size: int) -> None:
    """Check that a rank is in [0, world_size).

    Raises:
        ValueError: It is not.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
