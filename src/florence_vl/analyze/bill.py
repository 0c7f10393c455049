"""Accuracy against cost: FLOPs of tower and prefill, and time to the first token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from florence_vl.analyze.headroom import Choice, score_choice
from florence_vl.analyze.options import Measurement, Option, synchronize
from florence_vl.analyze.routed import RoutedChoice

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor


@dataclass(frozen=True)
class BillRow:
    """Cost and accuracy of an option.

    Attributes:
        choice: Its scores and FLOPs.
        latency: Median seconds of tower, fusion, projector and prefill for one question; options are measured in turn.
        on_front: Whether no other option is more accurate for at most the same FLOPs, or as accurate for fewer.
        seeds: Accuracy with each router; empty for a fixed option.
    """

    choice: Choice
    latency: float
    on_front: bool
    seeds: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**self.choice.to_dict(), "latency": self.latency, "on_front": self.on_front, "seeds": self.seeds}


@torch.inference_mode()
def time_options(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    options: Sequence[Option],
    tokens_O: Sequence[float] | np.ndarray,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Median seconds from pixels to the first token's logits, for each option.

    Features outside an option are not computed.

    Args:
        model: A model in eval mode; its resolution is changed in place.
        processor: Its processor; likewise.
        options: The options.
        tokens_O: Prompt tokens of each option, including image tokens.
        rounds: Number of measurements per option, in turn with the others, after an uncounted one.
        progress: Called with the number of finished rounds and the total.
    """
    from florence_vl.model.modeling import FlorenceVLImageFeatures
    from florence_vl.model.resolution import set_resolution

    found: list[list[float]] = [[] for _ in options]
    names = model.config.features
    dims = model.model.vision_tower.feature_dims
    size = None
    for turn in range(rounds + 1):
        for index, option in enumerate(options):
            if option.size != size:
                set_resolution(model, processor, image_size=option.size)
                size = option.size
            height, width = processor.image_processor.output_size(size, size)
            pixels = torch.randn(1, 3, height, width, dtype=model.dtype, device=model.device)
            mask_1F = torch.tensor([[int(name in option.features) for name in names]], device=model.device)
            count = model.num_image_tokens(height, width)
            text = max(1, round(tokens_O[index]) - count)
            ids_1L = torch.zeros(1, count + text, dtype=torch.long, device=model.device)
            ids_1L[:, :count] = model.config.image_token_id
            synchronize(model)
            began = time.perf_counter()
            features = model.model.vision_tower(pixels, None if option.all_features else mask_1F)
            features = {
                name: x if name in option.features else torch.zeros(1, 1, dims[name]).to(x).expand_as(x)
                for name, x in features.items()
            }
            context = None
            if model.model.fusion.uses_context:
                context = model.get_input_embeddings()(ids_1L[:, :1])[:, 0]
            tokens_1NH = model.model.project_features(features, (height, width), context)
            encoded = FlorenceVLImageFeatures(pooler_output=list(tokens_1NH))
            model(input_ids=ids_1L, mm_encoder_outputs={"image": encoded}, logits_to_keep=1)
            synchronize(model)
            if turn:
                found[index].append(time.perf_counter() - began)
        if progress is not None:
            progress(turn + 1, rounds + 1)
    return [statistics.median(times) for times in found]


def bill(
    measured: Measurement,
    latencies: Sequence[float],
    routed: Sequence[RoutedChoice] = (),
    router_latency: float = 0.0,
) -> list[BillRow]:
    """Cost and accuracy of all options and routed choices, cheapest first.

    Args:
        measured: The measurement.
        latencies: Latency of each option, from `time_options`.
        routed: Choices of a router and their rivals.
        router_latency: Latency of the router, seconds.
    """
    eye, shape = np.eye(len(measured.options)), (len(measured.groups), 1)
    priced: list[tuple[Choice, float, tuple[float, ...]]] = [
        (score_choice(measured, option.name, np.tile(eye[i], shape)), latency, ())
        for i, (option, latency) in enumerate(zip(measured.options, latencies, strict=True))
    ]
    for one in routed:
        mean = float(one.share_O @ np.asarray(latencies))
        priced.append((one.choice, mean + (router_latency if one.asks_router else 0.0), one.seeds))

    def dominates(one: Choice, other: Choice) -> bool:
        gain, saved = one.accuracy.mean - other.accuracy.mean, other.flops - one.flops
        return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)

    rows = [BillRow(c, latency, not any(dominates(o, c) for o, *_ in priced), seeds) for c, latency, seeds in priced]
    return sorted(rows, key=lambda row: row.choice.flops)
