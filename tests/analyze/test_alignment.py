"""The alignment loss: limits, held-out split, duplicates, control for width."""

from __future__ import annotations

import math

import pytest
import torch

from florence_vl.analyze.alignment import (
    AlignmentConfig,
    best_loss,
    recall_at,
    reduce_width,
    split_pairs,
    train_alignment,
)
from florence_vl.statistics import interval, paired
from florence_vl.train.contrastive import Groups, contrastive_loss

N, D = 600, 24


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=1)


def rotation(seed: int = 5) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed))).Q


QUICK = AlignmentConfig(steps=150, learning_rate=1e-2, evaluations=10)


def test_a_rotation_of_the_text_features_is_found():
    text = unit(N, D)
    sharp = train_alignment(text @ rotation(), text, AlignmentConfig(steps=150, learning_rate=1e-2, temperature=0.02))
    assert sharp.loss < 0.05
    assert sharp.recall[1] == sharp.recall_text[1] == 1.0
    # without a temperature unit vectors can't reach zero; they come near the least that any vectors have
    plain = train_alignment(text @ rotation(), text, QUICK)
    assert plain.floor <= plain.loss < plain.floor + 0.1 * (plain.chance - plain.floor)
    assert plain.floor > math.log(1 + (plain.heldout_pairs - 1) * math.exp(-2))
    assert 0.9 < plain.aligned <= 1


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_random_features_stay_at_guessing_on_heldout_pairs(projection):
    run = train_alignment(unit(N, 64, seed=1), unit(N, D), AlignmentConfig(projection, steps=150, learning_rate=1e-2))
    assert abs(run.loss - run.chance) < 0.1
    assert run.last_loss > run.chance
    assert run.train_loss[-1] < run.chance - 0.1, "it does overfit, which is why held-out pairs are reported"
    assert run.recall[10] < 0.35


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_no_vectors_beat_the_best_loss(temperature):
    near = unit(40, D) + 0.7 * unit(1, D, seed=9)  # close together, as an LLM's are
    text = torch.nn.functional.normalize(near, dim=1)
    targets = Groups(torch.arange(40) // 2, torch.arange(40)).targets()
    for aims in (None, targets):
        found = best_loss(text, aims, temperature)
        free = torch.nn.Parameter(text.clone())
        optimizer = torch.optim.Adam([free], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss = contrastive_loss(torch.nn.functional.normalize(free, dim=1), text, aims, temperature)
            loss.backward()
            optimizer.step()
        assert found == pytest.approx(loss.item(), abs=2e-3)
        assert found < contrastive_loss(text, text, aims, temperature)


def test_duplicates_break_identity_targets_and_sharing_mends_it():
    text = unit(120, D).repeat_interleave(4, 0)
    groups = Groups(torch.arange(480) // 4, torch.arange(480))
    config = AlignmentConfig(steps=100, learning_rate=1e-2, temperature=0.02)
    naive = train_alignment(text @ rotation(), text, config)
    shared = train_alignment(text @ rotation(), text, config, groups=groups)
    assert shared.recall[1] == 1.0
    assert naive.recall[1] < 0.95  # a tie with a pair that says the same counts against it
    first = train_alignment(text @ rotation(), text, AlignmentConfig(steps=5, duplicates="first"), groups=groups)
    assert first.train_pairs + 2 * first.heldout_pairs == 120


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_cuts_no_caption_and_no_image(seed):
    generator = torch.Generator().manual_seed(9)
    groups = Groups(torch.randint(0, 400, (400,), generator=generator).clamp_min(40), torch.arange(400) // 2)
    split = split_pairs(groups, AlignmentConfig(heldout=0.1), seed)
    sides = [split.train, split.validation, split.heldout]
    assert len(split.heldout) == len(split.validation) == 20
    assert (groups.caption_N[split.train] == 40).sum() == (groups.caption_N == 40).sum() > 20  # too many to hold out
    for ids in (groups.caption_N, groups.image_N):
        sets = [set(ids[rows].tolist()) for rows in sides]
        assert not sets[0] & sets[1]
        assert not sets[0] & sets[2]
        assert not sets[1] & sets[2]


def test_bfloat16_steps_find_the_same_loss():
    text = torch.randn(200, 16)
    vision = text @ torch.randn(16, 24) + torch.randn(200, 24)
    exact, rounded = (
        train_alignment(vision, text, AlignmentConfig(steps=60, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    assert rounded.heldout_loss != exact.heldout_loss
    assert rounded.loss == pytest.approx(exact.loss, rel=5e-3)
    assert exact.loss < 0.97 * exact.chance


def test_recall_counts_ties_as_misses():
    same = torch.ones(20, 4) / 2
    assert recall_at(same, same, None) == {1: 0.0, 5: 0.0, 10: 0.0}
    vision = unit(20, D)
    assert recall_at(vision, vision, None, chunk=6) == {1: 1.0, 5: 1.0, 10: 1.0}
    assert recall_at(vision, vision.roll(1, 0), None)[1] == 0.0
    groups = Groups(torch.arange(20) // 2, torch.arange(20))
    assert recall_at(same, same, groups)[1] == 0.0


def test_seeds_repeat_and_batches_cover_large_sets():
    text = unit(N, D)
    config = AlignmentConfig(steps=30, batch_size=64, learning_rate=1e-2)
    runs = [train_alignment(text @ rotation(), text, config, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].heldout_loss == runs[1].heldout_loss != runs[2].heldout_loss
    assert runs[0].loss < runs[0].chance - 0.5


def test_equal_width_keeps_the_directions_that_vary_most():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(300, 10, generator=generator) * torch.tensor([9.0, 8.0, 7.0] + [0.01] * 7)
    train = torch.arange(200)
    reduced = reduce_width(table, train, 3, "pca", 0)
    assert reduced.shape == (300, 3)
    torch.testing.assert_close(reduced.var(0).sum(), table.var(0).sum(), rtol=1e-3, atol=0)
    directions = reduce_width(table, train, 3, "random", 0)
    assert directions.var(0).sum() < table.var(0).sum()
    with pytest.raises(ValueError, match="at most 10"):
        reduce_width(table, train, 11, "pca", 0)
    with pytest.raises(ValueError, match="Did you mean 'random'"):
        reduce_width(table, train, 3, "randm", 0)
    run = train_alignment(table, unit(300, D), AlignmentConfig(steps=2), width=3)
    assert run.width == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection": "lineer"}, "Did you mean 'linear'"),
        ({"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"duplicates": "shared"}, "Did you mean 'share'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"batch_size": 1}, "at least 2 pairs"),
        ({"heldout": 1.0}, "between 0 and 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(**settings)


def test_bad_features_are_refused():
    text = unit(40, D)
    with pytest.raises(ValueError, match="40 text features"):
        train_alignment(unit(39, D), text)
    broken = unit(40, D)
    broken[3, 0] = math.nan
    with pytest.raises(ValueError, match="1 vision features contain NaN"):
        train_alignment(broken, text)
    with pytest.raises(ValueError, match="too few"):
        train_alignment(unit(4, D), unit(4, D))


def test_intervals():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302652729696142 * 1 / math.sqrt(3))
    assert interval([5.0]).half is None
    assert not interval([5.0]).excludes_zero
    assert paired([1.1, 2.1, 3.1], [1.0, 2.0, 3.0]).excludes_zero
    assert not paired([1.1, 1.9, 3.1], [1.0, 2.0, 3.0]).excludes_zero
    with pytest.raises(ValueError, match="the same number of runs"):
        paired([1.0], [1.0, 2.0])
