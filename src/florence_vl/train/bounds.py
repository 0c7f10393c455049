"""Allowed ranges of the numbers in a recipe, by their names."""

from __future__ import annotations

import math
from typing import Any

# Any other number only has to be finite.
# fmt: off
POSITIVE = {
    "alpha", "batch_size", "epochs", "eps", "every_steps", "gate_lr", "image_size", "keep_every", "keep_last",
    "last_layers", "limit", "lr", "max_grad_norm", "max_images_per_row", "max_length", "max_minutes",
    "micro_batch_size", "peak_tflops", "projector_depth", "prompt_length", "rank", "samples", "shard_size", "steps",
    "threads", "token_budget", "tokens_per_row", "weight", "window",
}
NOT_NEGATIVE = {"distill", "pairs", "seed", "shuffle_buffer", "warmup_steps", "weight_decay", "workers"}
SHARES = {"decay_ratio", "dropout", "feature_dropout", "max_bad_share", "min_lr_ratio", "warmup_ratio"}
# fmt: on


def check_numbers(value: Any, path: str = "") -> list[str]:
    """Problems of the numbers in a recipe: not finite, or outside the range of their name."""
    if isinstance(value, dict):
        free = ("options", "template_options", "filters")  # checked by the code that uses them
        inner = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items() if key not in free]
        return [problem for key, item in inner for problem in check_numbers(item, key)]
    if isinstance(value, (list, tuple)):
        return [problem for i, item in enumerate(value) for problem in check_numbers(item, f"{path}.{i}")]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return []
    name = path.rsplit(".", 1)[-1]
    if not math.isfinite(value):
        return [f"`{path}` must be a finite number, found {value}"]
    if name in POSITIVE and value <= 0:
        return [f"`{path}` must be above 0, found {value}"]
    if name in NOT_NEGATIVE and value < 0:
        return [f"`{path}` must be 0 or more, found {value}"]
    if name in SHARES and not 0 <= value <= 1:
        return [f"`{path}` must be between 0 and 1, found {value}"]
    if ".betas." in path and not 0 <= value < 1:
        return [f"`{path}` must be 0 or more and below 1, found {value}"]
    return []
