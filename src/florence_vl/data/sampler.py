"""Stateless shuffles: the i-th record of a shuffle of any size is computed from (seed, i), nothing is stored.

A shuffle of n records is a keyed bijection of [0, n): a generalised Feistel network over Z_a x Z_b with a * b >= n and
cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Memory is O(1), so ten million
records need no permutation array, and a run resumes at any position without replaying a random generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(*words: int) -> int:
    """A 64-bit hash of integers (splitmix64 finaliser after every word); equal on every machine and version.

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


def _mix_array(x: np.ndarray, key: int) -> np.ndarray:
    """`mix` of one word with a ready key, for uint64 arrays."""
    with np.errstate(over="ignore"):
        x = (x ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


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
        """Where element `index` goes.

        Raises:
            IndexError: `index` lies outside [0, size).
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

    def map(self, indices: np.ndarray) -> np.ndarray:
        """The same for an integer array, vectorised: int64 array of the same shape."""
        out = np.asarray(indices, dtype=np.int64).astype(np.uint64).ravel()
        if out.size and int(out.max()) >= self.size:
            raise IndexError(f"index {int(out.max())} outside a permutation of {self.size}")
        todo = np.arange(out.size)
        a, b = np.uint64(self._a), np.uint64(self._b)
        while todo.size:
            x, y = out[todo] // b, out[todo] % b
            for round_, key in enumerate(self._keys):
                if round_ % 2 == 0:
                    x = (x + _mix_array(y, key) % a) % a
                else:
                    y = (y + _mix_array(x, key) % b) % b
            out[todo] = x * b + y
            todo = todo[out[todo] >= self.size]
        return out.astype(np.int64).reshape(np.shape(indices))


def _mix_word(x: int, key: int) -> int:
    x = ((x ^ key) + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class BlockPermutation:
    """A shuffle that keeps neighbours together: for files where reading one record costs as much as reading its block.

    Blocks of `block` consecutive records (a parquet row group) are shuffled; then every run of `span` shuffled blocks
    is shuffled record by record. A reader that keeps `span` blocks in memory reads each block once a pass.

    Args:
        size: Number of records.
        seed: Chooses the shuffle.
        block: Records a block.
        span: Blocks that are mixed with each other.
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
        """Where element `index` goes; see `Permutation`."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} outside a permutation of {self.size}")
        value = self._once(index)
        while value >= self.size:  # the last block may be short: walk the cycle back into range
            value = self._once(value)
        return value


class StatelessSampler(Sampler[int]):
    """Positions of one rank, for a plain `DataLoader` or the HF `Trainer`: position = f(step, rank, world size).

    Step s of the run covers positions [s * G, (s + 1) * G) with G = `batch_size` * `world_size`; rank r takes every
    `world_size`-th of them. Shuffling is the `Mixture`'s work (it maps a position to a record), so with another world
    size and the same G the batches hold the same records.

    Args:
        batch_size: Records a step of one rank.
        num_steps: Steps until the sampler ends; None never ends.
        rank: This process.
        world_size: Number of processes.
        start_step: First step to give.
    """

    def __init__(
        self, batch_size: int, num_steps: int | None, rank: int = 0, world_size: int = 1, start_step: int = 0
    ) -> None:
        check_rank(rank, world_size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.num_steps = batch_size, num_steps
        self.rank, self.world_size, self.start_step = rank, world_size, start_step

    def positions(self, step: int) -> list[int]:
        """The positions of this rank at `step`."""
        first = step * self.batch_size * self.world_size + self.rank
        return list(range(first, first + self.batch_size * self.world_size, self.world_size))

    def __iter__(self) -> Iterator[int]:
        step = self.start_step
        while self.num_steps is None or step < self.num_steps:
            yield from self.positions(step)
            step += 1

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("this sampler never ends: give num_steps")
        return max(0, self.num_steps - self.start_step) * self.batch_size


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank outside [0, world_size).

    Raises:
        ValueError: It is outside.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
