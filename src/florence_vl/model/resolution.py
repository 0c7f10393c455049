"""Let a loaded model see images at another size, aspect ratio or view, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from florence_vl.model.views import FULL_VIEW

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor


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
