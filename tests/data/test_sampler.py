"""Stateless shuffles are bijections, look random, and need neither memory nor state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_vl.data.sampler import BlockPermutation, Permutation, StatelessSampler, mix


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size, seed):
    assert sorted(Permutation(size, seed).map(np.arange(size))) == list(range(size))


@given(size=st.integers(1, 10**12), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=60, deadline=None)
def test_vectorised_and_scalar_agree_at_any_size(size, seed, data):
    permutation = Permutation(size, seed)
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    assert permutation.map(np.array(indices)).tolist() == [permutation(i) for i in indices]
    assert all(0 <= permutation(i) < size for i in indices)


@given(size=st.integers(1, 600), block=st.integers(1, 50), span=st.integers(1, 6), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_block_permutation_is_a_bijection(size, block, span, seed):
    permutation = BlockPermutation(size, seed, block, span)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_block_permutation_stays_in_few_blocks_at_a_time():
    permutation = BlockPermutation(10_000, seed=3, block=100, span=4)
    for start in range(0, 10_000, 400):
        assert len({permutation(i) // 100 for i in range(start, start + 400)}) == 4


def test_neighbours_are_spread_and_positions_uniform():
    size, seeds = 40, 4000
    landed = np.stack([Permutation(size, seed).map(np.arange(size)) for seed in range(seeds)])
    for column in (0, 1, size - 1):
        counts = np.bincount(landed[:, column], minlength=size)
        chi_square = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
        assert chi_square < 80  # 39 degrees of freedom: p < 1e-4 beyond this
    long = Permutation(1_000_000, 1).map(np.arange(20_000))
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
    with pytest.raises(IndexError):
        Permutation(10).map(np.array([3, 12]))


@given(
    world=st.sampled_from([1, 2, 3, 4, 6]),
    start=st.integers(0, 20),
    steps=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_ranks_are_disjoint_complete_and_resume_anywhere(world, start, steps):
    global_batch = 12
    seen = []
    for rank in range(world):
        sampler = StatelessSampler(global_batch // world, start + steps, rank, world, start_step=start)
        seen += list(sampler)
        whole = list(StatelessSampler(global_batch // world, start + steps, rank, world))
        assert whole[start * global_batch // world :] == list(sampler)
        assert len(list(sampler)) == len(sampler)
    assert sorted(seen) == list(range(start * global_batch, (start + steps) * global_batch))


def test_a_plain_loader_draws_by_it():
    loader = torch.utils.data.DataLoader(range(1000), batch_size=3, sampler=StatelessSampler(3, 4, 1, 2, start_step=2))
    assert [batch.tolist() for batch in loader] == [[13, 15, 17], [19, 21, 23]]
    with pytest.raises(TypeError, match="never ends"):
        len(StatelessSampler(3, None))


def test_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        StatelessSampler(1, None, rank=2, world_size=2)
