"""The gates of `gated` fusion by group of questions: which features a kind of question asks for.

Shape letters: Q questions, F gated features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from florence_vl.analyze.options import Measurement, cluster_mean
from florence_vl.model.fusion import GatedFusion
from florence_vl.statistics import Interval

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
