"""Potential gain of choosing size and features per question, estimated before anything is trained for it.

The best fixed option and an oracle are both chosen on one half of the pictures and scored on the other, so that neither
profits from noise. The oracle chooses the best option for each group of questions (skill). Its gain is that of a router
that knows the type of question. The best option of each single question is an upper bound that no router reaches,
because it uses the answer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from florence_vl.analyze.options import Measurement, cluster_mean
from florence_vl.statistics import Interval


@dataclass(frozen=True)
class Choice:
    """Scores of a method for choosing options, on questions that were not used for the choice.

    Attributes:
        name: Name of the method.
        nll: Negative log-likelihood of the correct answer, nats per question.
        accuracy: Fraction of correct greedy answers.
        flops: Mean FLOPs of tower, projector and prefill.
        gain_nll: NLL of the full model minus its own, paired by question: positive is better.
        gain_accuracy: Its accuracy minus the full model's, paired by question.
    """

    name: str
    nll: Interval
    accuracy: Interval
    flops: float
    gain_nll: Interval
    gain_accuracy: Interval

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Headroom:
    """Results of the analysis.

    Attributes:
        options: Every option as a fixed choice; the first is the full model.
        choices: The best fixed option and the oracles.
        by_group: Group -> (number of questions, most frequent option of the oracle, its gain in NLL there).
        questions: Number of questions.
        pictures: Number of pictures.
    """

    options: list[Choice]
    choices: list[Choice]
    by_group: dict[str, tuple[int, str, Interval]]
    questions: int
    pictures: int

    @property
    def cheapest_equal(self) -> Choice:
        """The cheapest fixed option whose accuracy is not significantly below the full model's."""
        fitting = [o for o in self.options if o.gain_accuracy.high >= 0]
        return min(fitting, key=lambda option: option.flops)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "questions": self.questions,
            "pictures": self.pictures,
            "options": [option.to_dict() for option in self.options],
            "choices": [choice.to_dict() for choice in self.choices],
            "by_group": {
                group: {"questions": n, "option": name, "gain_nll": asdict(gain)}
                for group, (n, name, gain) in self.by_group.items()
            },
            "cheapest_equal": self.cheapest_equal.name,
        }


def choose_by_halves(
    measured: Measurement, keys: list[str] | None, splits: int = 20, seed: int = 0, criterion: str = "nll"
) -> np.ndarray:
    """How often each option is chosen for each question by data without its picture, (Q, O); rows sum to 1.

    Args:
        measured: The measurement.
        keys: Group of each question: an option is chosen per group; None chooses one for all.
        splits: Number of random splits of the pictures into halves, each of which chooses for the other.
        seed: Seed of the splits.
        criterion: `nll`, or `accuracy` with ties broken by NLL.
    """
    pictures = sorted(set(measured.pictures))
    index = np.array([pictures.index(picture) for picture in measured.pictures])
    groups = np.array(keys if keys is not None else [""] * len(index))
    cost_QO = measured.nll_QO if criterion == "nll" else 1e-6 * measured.nll_QO - measured.right_QO
    share_QO = np.zeros(cost_QO.shape)
    generator = np.random.default_rng(seed)
    for _ in range(splits):
        half_Q = generator.permutation(len(pictures))[index] % 2 == 0
        for side in (half_Q, ~half_Q):
            everywhere = cost_QO[side].mean(0)
            for group in np.unique(groups):
                here = side & (groups == group)
                # a group that is not in this half gets the choice for the average question
                best = int(np.argmin(cost_QO[here].mean(0) if here.any() else everywhere))
                share_QO[~side & (groups == group), best] += 1 / splits
    return share_QO


def score_choice(measured: Measurement, name: str, share_QO: np.ndarray, extra_flops: float = 0.0) -> Choice:
    """What a choice of options scores.

    Args:
        measured: The measurement; its first option is the full model.
        name: Of the choice.
        share_QO: How often each option is chosen for each question; rows sum to 1.
        extra_flops: What choosing costs, a question.
    """
    nll_Q = (share_QO * measured.nll_QO).sum(1)
    right_Q = (share_QO * measured.right_QO).sum(1)
    return Choice(
        name,
        measured.by_picture(nll_Q),
        measured.by_picture(right_Q),
        float((share_QO * measured.flops_O).sum(1).mean()) + extra_flops,
        measured.by_picture(measured.nll_QO[:, 0] - nll_Q),
        measured.by_picture(right_Q - measured.right_QO[:, 0]),
    )


def headroom(measured: Measurement, splits: int = 20, seed: int = 0) -> Headroom:
    """Compute the headroom of a measurement.

    Args:
        measured: The measurement; its first option is the full model.
        splits: Number of random splits of the pictures.
        seed: Seed of the splits.

    Raises:
        ValueError: There are fewer than four pictures, too few for halves.
    """
    pictures = len(set(measured.pictures))
    if pictures < 4:
        raise ValueError(f"questions about {pictures} pictures: two halves need at least 4; raise --limit")
    count = len(measured.options)
    eye = np.eye(count)

    def choice(name: str, share_QO: np.ndarray) -> Choice:
        return score_choice(measured, name, share_QO)

    shape = (len(measured.groups), 1)
    options = [choice(option.name, np.tile(eye[i], shape)) for i, option in enumerate(measured.options)]
    oracle_QO = choose_by_halves(measured, measured.groups, splits, seed)
    choices = [
        choice("best fixed option, chosen on the other half", choose_by_halves(measured, None, splits, seed)),
        choice("best option of each skill, chosen on the other half", oracle_QO),
        choice(
            "best option of each skill by accuracy, chosen on the other half",
            choose_by_halves(measured, measured.groups, splits, seed, "accuracy"),
        ),
        choice("random option", np.full(oracle_QO.shape, 1 / count)),
        choice("best option of each question (chosen by its own answer: a bound)", eye[measured.nll_QO.argmin(1)]),
    ]
    gain_Q = measured.nll_QO[:, 0] - (oracle_QO * measured.nll_QO).sum(1)
    by_group = {}
    for group in sorted(set(measured.groups)):
        here = np.array([g == group for g in measured.groups])
        taken = measured.options[int(oracle_QO[here].sum(0).argmax())].name
        own = [picture for picture, inside in zip(measured.pictures, here, strict=True) if inside]
        by_group[group] = (int(here.sum()), taken, cluster_mean(gain_Q[here], own))
    return Headroom(options, choices, by_group, len(measured.groups), pictures)
