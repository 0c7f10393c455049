"""Mixtures: sampling frequencies match the weights, evenly spread, from any position."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_vl.data.mixture import Mixture, MixtureSource
from florence_vl.data.records import Record


class Numbers:
    """A reader of n records that name themselves."""

    def __init__(self, size: int, block: int = 1) -> None:
        self.size, self.block = size, block

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        message = {"role": "user", "content": [{"type": "text", "text": str(index)}]}
        return Record(str(index), "reader's own name", [message])


def mixture_of(sizes, weights=None, **options):
    weights = weights or [1.0] * len(sizes)
    return Mixture(
        [MixtureSource(f"s{i}", Numbers(n), w) for i, (n, w) in enumerate(zip(sizes, weights, strict=True))], **options
    )


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_an_epoch_holds_every_record_once(sizes, seed, epoch):
    mixture = mixture_of(sizes, seed=seed)
    start = epoch * len(mixture)
    drawn = Counter(mixture.locate(p) for p in range(start, start + len(mixture)))
    assert drawn == Counter((s, i) for s, n in enumerate(sizes) for i in range(n))


@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_sources_are_drawn_by_weight_and_evenly(sizes, weights):
    mixture = mixture_of(sizes, weights[: len(sizes)])
    total = len(mixture)
    sources = [mixture.locate(p)[0] for p in range(2 * total)]
    for index, draws in enumerate(mixture.draws):
        assert sources[:total].count(index) == draws
        for end in range(1, total, 7):  # never far from its share: nested lines, one rounding a level
            assert abs(sources[:end].count(index) - end * draws / total) <= 3
    for index, (n, draws) in enumerate(zip(sizes, mixture.draws, strict=True)):
        drawn = Counter(i for s, i in map(mixture.locate, range(2 * total)) if s == index)
        counts = [drawn[i] for i in range(n)]
        assert max(counts) - min(counts) <= 1  # whole passes, however the epochs cut them
        assert sum(counts) == 2 * draws


def test_proportions_ignore_sizes():
    mixture = mixture_of([10, 390], [3.0, 1.0], weighting="proportions")
    sources = Counter(mixture.locate(p)[0] for p in range(400))
    assert sources == {0: 300, 1: 100}
    assert [row["share"] for row in mixture.describe()] == [0.75, 0.25]


def test_a_repeated_source_is_shuffled_differently_every_pass():
    mixture = mixture_of([50])
    orders = [tuple(mixture.locate(p)[1] for p in range(e * 50, e * 50 + 50)) for e in range(3)]
    assert len(set(orders)) == 3
    assert mixture_of([50], shuffle=False).locate(53) == (0, 3)
    assert [mixture_of([50], seed=1).locate(p) for p in range(50)] != [mixture.locate(p) for p in range(50)]


def test_block_readers_are_shuffled_block_wise():
    mixture = Mixture([MixtureSource("parquet", Numbers(4000, block=50))])
    first = [mixture.locate(p)[1] for p in range(400)]
    assert len({i // 50 for i in first}) == 8
    assert first != sorted(first)


def test_records_carry_the_source_and_mixtures_pickle():
    mixture = pickle.loads(pickle.dumps(mixture_of([5, 7])))
    record = mixture[3]
    source, index = mixture.locate(3)
    assert (record.source, record.id) == (f"s{source}", str(index))


def test_ten_million_records_need_no_array():
    mixture = mixture_of([10_000_000, 3])
    assert len({mixture.locate(p) for p in range(9_999_000, 10_001_000)}) > 1990


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one source"),
        (([0],), "has no records"),
        (([5], [0.0]), "must be positive"),
        (([5], [float("inf")]), "must be positive"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture_of(*arguments)


def test_wrong_options_are_refused_with_near_names():
    with pytest.raises(ValueError, match="'proportions'"):
        mixture_of([5], weighting="proportion")
    with pytest.raises(ValueError, match="found twice: a"):
        Mixture([MixtureSource("a", Numbers(2)), MixtureSource("a", Numbers(2))])
    with pytest.raises(IndexError, match="start at 0"):
        mixture_of([5]).locate(-1)
