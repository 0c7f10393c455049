"""The gates of `gated` fusion: what they gain, on which information, and which features a kind of question asks for.

Shape letters: S seeds, Q questions, F gated features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from florence_vl.analyze.options import Measurement, cluster_mean
from florence_vl.model.fusion import GatedFusion
from florence_vl.statistics import Interval, crossed, interval

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor


@torch.inference_mode()
def gates_by_group(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, measured: Measurement
) -> dict[str, dict[str, Interval]]:
    """Mean gate of each prompted feature by group of questions, with 95 % intervals over pictures.

    Args:
        model: A model in eval mode.
        processor: Its processor.
        measured: Its questions and their groups; questions about the same picture are adjacent.

    Returns:
        Group -> feature -> mean gate in (0, 2); empty if the fusion has no gates.
    """
    from florence_vl.model.pictures import open_image

    fusion = model.model.fusion
    if not isinstance(fusion, GatedFusion):
        return {}
    shown, features = "", {}
    rows: list[Tensor] = []
    for question in measured.questions:
        if question.picture_key != shown:
            image = open_image(question.images[0].read())
            pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
            height, width = pixels.shape[-2:]
            features = model.model.vision_tower(pixels.to(model.device, model.dtype))
            features, shown = model.model.merge_features(features, (height, width)), question.picture_key
        asked = processor.question_inputs([[{"role": "user", "content": question.content()}]])
        context = model.model.question_context(*(torch.tensor(asked[k], device=model.device) for k in asked))
        rows.append(fusion.gates(features, context).float().mean(1)[0].cpu())
    gates_QF = torch.stack(rows).double().numpy()
    names = list(fusion.feature_dims)[1:]  # the first feature is never gated
    found: dict[str, dict[str, Interval]] = {}
    for group in sorted(set(measured.groups)):
        here = np.array([name == group for name in measured.groups])
        pictures = [picture for picture, inside in zip(measured.pictures, here, strict=True) if inside]
        found[group] = {name: cluster_mean(gates_QF[here, i], pictures) for i, name in enumerate(names)}
    return found


@dataclass(frozen=True)
class GateRow:
    """Results of one kind of gate, over its models (one per seed).

    Attributes:
        name: Its name.
        seeds: Number of models.
        right: Fraction of questions whose greedy answer is the correct one, token for token.
        right_gain: The same minus that of the first kind; None for the first kind.
        nll: Negative log-likelihood of the correct answer, nats.
        nll_gain: The same of the first kind minus this one's; None for the first kind.
        shuffled_right: For gates that see the question: gain in `right` if they see another question's text instead.
        shuffled_nll: Likewise in `nll`.
    """

    name: str
    seeds: int
    right: float
    nll: float
    right_gain: Interval | None = None
    nll_gain: Interval | None = None
    shuffled_right: Interval | None = None
    shuffled_nll: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def compare_gates(
    kinds: Mapping[str, Sequence[Measurement]], shuffled: Mapping[str, Sequence[Measurement]]
) -> list[GateRow]:
    """Compare kinds of gates on the same questions.

    Differences are paired by question and, if both kinds have several seeds, by seed. Their intervals treat questions
    and seeds as random samples; with one seed they are over pictures.

    Args:
        kinds: Name of a kind -> the measurements of its models, of one option each; the first kind is the reference.
        shuffled: The measurements with the gates of shuffled questions, for kinds that see the question.

    Raises:
        ValueError: The questions differ.
    """
    reference = next(iter(kinds.values()))
    asked = [question.id for question in reference[0].questions]
    for name, found in kinds.items():
        if any([question.id for question in one.questions] != asked for one in found):
            raise ValueError(f"the models of {name!r} answered other questions than the first kind's")

    def gain(found: Sequence[Measurement], others: Sequence[Measurement]) -> tuple[Interval, Interval]:
        """Gains of the first over the second, in correct answers and in nats."""
        gains = []
        for sign, what in ((1, "right"), (-1, "nll")):
            found_SQ, others_SQ = (np.stack([_column(one, what) for one in side]) for side in (found, others))
            if len(found_SQ) != len(others_SQ):
                others_SQ = others_SQ.mean(0, keepdims=True)
            gain_SQ = sign * (found_SQ - others_SQ)
            several = len(gain_SQ) > 1
            gains.append(crossed(gain_SQ).interval if several else reference[0].by_picture(gain_SQ[0]))
        return gains[0], gains[1]

    rows = []
    for name, found in kinds.items():
        right, nll = (float(np.mean([_column(one, what) for one in found])) for what in ("right", "nll"))
        gains = (None, None) if found is reference else gain(found, reference)
        lost = gain(shuffled[name], found) if name in shuffled else (None, None)
        rows.append(GateRow(name, len(found), right, nll, *gains, *lost))
    return rows


def _column(measured: Measurement, what: str) -> np.ndarray:
    return (measured.right_QO if what == "right" else measured.nll_QO)[:, 0].astype(np.float64)


def mean_gates(found: Sequence[Mapping[str, Mapping[str, Interval]]]) -> dict[str, dict[str, Interval]]:
    """`gates_by_group` of the models of one kind: means and 95 % intervals over the models."""
    return {
        group: {name: interval([one[group][name].mean for one in found]) for name in gates}
        for group, gates in found[0].items()
    }
