"""The size at which an image is encoded: fixed (`pad`, `squash`), or its own aspect ratio within a token budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from florence_vl.model.views import FULL_VIEW

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

MAX_UPSCALE = 2.0


def native_size(
    height: int, width: int, stride: int, token_budget: int, max_upscale: float = MAX_UPSCALE
) -> tuple[int, int]:
    """Height and width in pixels that keep an image's aspect ratio and give as many tokens as the budget allows.

    Args:
        height: The image's, px.
        width: The image's, px.
        stride: Pixels a side of one token: the tower's stride, times `merge`. Both sides are multiples of it.
        token_budget: Tokens at most.
        max_upscale: The image is enlarged by this factor at most.

    Returns:
        (height, width); the aspect ratio is kept up to rounding to whole tokens.

    Raises:
        ValueError: A side, the stride or the budget below 1.

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
        # A side that cannot go below one token takes from the other one's share.
        limit = max(1, token_budget // r)
        for c in {min(limit, max(1, math.floor(columns))), min(limit, max(1, math.ceil(columns)))}:
            error = abs(math.log(r / rows)) + abs(math.log(c / columns))
            if r * c <= token_budget and error < least:
                best, least = (r, c), error
    return best[0] * stride, best[1] * stride


def set_resolution(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    *,
    image_size: int | None = None,
    aspect: str | None = None,
    token_budget: int | None = None,
    positions: str | None = None,
    view: str | None = None,
) -> None:
    """Let a loaded model see images at another resolution, without training.

    Args:
        model: Its config changes in place.
        processor: Its image processor changes in place.
        image_size: Pixels a side of the square input; with `native`, the square of as many tokens as the budget.
        aspect: `pad`, `squash` or `native`.
        token_budget: Tokens an image at most, for `native`; by default what `image_size` gives.
        positions: `absolute` or `resampled`. By default resampled when images get another size: the trained grid is
            taken from the processor's size before the change.
        view: The view of every image for which no other one is named; see `florence_vl.model.views`.

    Raises:
        ValueError: An unknown choice or view, a size or budget that the tower or the LLM's context can't take.
    """
    images: Any = processor.image_processor
    if token_budget is not None and (aspect or images.image_aspect_ratio) != "native":
        raise ValueError(f"a token budget is for the aspect 'native', found {aspect or images.image_aspect_ratio!r}")
    tower: Any = model.model.vision_tower
    other = image_size is not None and (image_size, image_size) != (images.size["height"], images.size["width"])
    changes = other or aspect == "native" or token_budget is not None
    if model.config.tower == "florence2":
        if model.config.position_grid is None:
            model.config.position_grid = tower.grid_size(images.size["height"], images.size["width"])
        tower.set_positions(positions or ("resampled" if changes else model.config.positions))
    elif positions is not None:
        raise ValueError(f"positions is for Florence-2 towers; this model's tower is {model.config.tower!r}")
    if image_size is not None:
        images.size = type(images.size)(height=image_size, width=image_size)
    if aspect is not None:
        images.image_aspect_ratio = aspect
    if token_budget is not None:
        images.token_budget = token_budget
    if view is not None:
        images.view_settings(view)
        images.view = None if view == FULL_VIEW else view
    images.check()
    height, width = images.output_size(images.size["height"], images.size["width"])
    tokens = model.num_image_tokens(height, width)
    context = model.config.context_length
    if context is not None and tokens >= context:
        raise ValueError(f"an image takes {tokens} tokens at that resolution, but the LLM's context has {context}")


def resolution_settings(model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor) -> dict[str, Any]:
    """How a model sees images now, as JSON values: what tells its answers from those at another resolution."""
    images: Any = processor.image_processor
    settings = {
        "image_size": [images.size["height"], images.size["width"]],
        "aspect": images.image_aspect_ratio,
        "token_budget": images.token_budget,
        "view": images.view or FULL_VIEW,
    }
    if model.config.tower == "florence2":
        settings["positions"] = model.config.positions
    return settings
