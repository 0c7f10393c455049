"""Stateless shuffles are bijections, look random, and need neither memory nor saved state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_vl.data.sampler import BlockPermutation, Permutation, check_rank, mix


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size, seed):
    permutation = Permutation(size, seed)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


@given(size=st.integers(1, 10**12), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_permutation_of_any_size_stays_inside(size, seed, data):
    permutation = Permutation(size, seed)
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    values = {permutation(i) for i in indices}
    assert len(values) == len(indices)
    assert all(0 <= value < size for value in values)


@given(size=st.integers(1, 600), block=st.integers(1, 50), span=st.integers(1, 6), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_block_permutation_is_a_bijection(size, block, span, seed):
    permutation = BlockPermutation(size, seed, block, span)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_block_permutation_stays_in_few_blocks_at_a_time():
    permutation = BlockPermutation(10_000, seed=3, block=100, span=4)
    for start in range(0, 10_000, 400):
        assert len({permutation(i) // 100 for i in range(start, start + 400)}) == 4


def test_neighbors_are_spread_and_positions_uniform():
    size, seeds = 40, 4000
    shuffles = [Permutation(size, seed) for seed in range(seeds)]
    for index in (0, 1, size - 1):
        counts = np.bincount([shuffle(index) for shuffle in shuffles], minlength=size)
        chi_square = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
        assert chi_square < 80  # 39 degrees of freedom: p < 1e-4 beyond this
    large = Permutation(1_000_000, 1)
    long = np.array([large(i) for i in range(20_000)])
    assert abs(np.corrcoef(np.arange(20_000), long)[0, 1]) < 0.03
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.03


def test_seeds_differ_and_values_are_fixed_for_ever():
    assert [Permutation(10, 1)(i) for i in range(10)] != [Permutation(10, 2)(i) for i in range(10)]
    # written down once: a change of these breaks the resuming of every run
    assert mix(1, 2, 3) == 5246500226706903259
    assert [Permutation(10, 7)(i) for i in range(10)] == [5, 2, 4, 1, 0, 9, 3, 7, 8, 6]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="at least one element"):
        Permutation(0)
    with pytest.raises(IndexError, match="10 outside a permutation of 10"):
        Permutation(10)(10)


def test_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        check_rank(2, 2)
