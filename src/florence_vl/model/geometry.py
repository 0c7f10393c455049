"""Geometry of the grid of image tokens: its size and its prefix tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

DAVIT = "davit"  # name of the unprompted feature: DaViT's last stage through its projection
MAX_UPSCALE = 2.0  # for images with their own aspect ratio


def convolved_size(height: int, width: int, convolutions: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
    """Rows and columns of an image after convolutions of (kernel, stride, padding) in pixels."""
    for kernel, stride, padding in convolutions:
        height = (height + 2 * padding - kernel) // stride + 1
        width = (width + 2 * padding - kernel) // stride + 1
    return height, width


def davit_convolutions(vision: Any) -> tuple[tuple[int, int, int], ...]:
    """(kernel, stride, padding) of each of DaViT's four convolutions, from its config."""
    return tuple(zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True))


# Vision models, by the beginning of their type, with another number of tokens before the grid than one.
_PREFIX_TOKENS = {"siglip": 0, "aimv2": 0, "ijepa": 0, "pixtral": 0, "deit": 2}


def backbone_prefix_tokens(vision: Any) -> int:
    """Number of class, distillation and register tokens before a vision backbone's grid, from its config."""
    other = (count for kind, count in _PREFIX_TOKENS.items() if vision.model_type.startswith(kind))
    return next(other, 1 + (getattr(vision, "num_register_tokens", None) or 0))


def native_size(
    height: int, width: int, stride: int, token_budget: int, max_upscale: float = MAX_UPSCALE
) -> tuple[int, int]:
    """Largest size in pixels that keeps the aspect ratio of an image within a token budget.

    Args:
        height: Height of the image, px.
        width: Width of the image, px.
        stride: Pixels per side of one token: the tower's stride times `merge`. Both sides are multiples of it.
        token_budget: Maximum number of tokens.
        max_upscale: Maximum factor by which the image is enlarged.

    Returns:
        (height, width); the aspect ratio is kept up to rounding to whole tokens.

    Raises:
        ValueError: A side, the stride or the budget is below 1.

    Example:
        >>> native_size(1080, 1920, stride=32, token_budget=576)
        (576, 1024)
    """
    if min(height, width) < 1:
        raise ValueError(f"an image of {height}x{width} pixels has no area")
    if token_budget < 1 or stride < 1:
        raise ValueError(f"token_budget and stride must be at least 1, found {token_budget} and {stride}")
    scale = min(max_upscale, stride * math.sqrt(token_budget / (height * width)))
    rows, columns = scale * height / stride, scale * width / stride
    best, least = (1, 1), math.inf
    for r in {max(1, math.floor(rows)), max(1, math.ceil(rows))}:
        # If one side is limited to one token, the other side is shortened.
        limit = max(1, token_budget // r)
        for c in {min(limit, max(1, math.floor(columns))), min(limit, max(1, math.ceil(columns)))}:
            error = abs(math.log(r / rows)) + abs(math.log(c / columns))
            if r * c <= token_budget and error < least:
                best, least = (r, c), error
    return best[0] * stride, best[1] * stride
