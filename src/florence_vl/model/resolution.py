"""Change the image size, aspect ratio or view of a loaded model without training."""

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
    tiles: int | None = None,
    positions: str | None = None,
    view: str | None = None,
) -> None:
    """Change the resolution at which a loaded model encodes images, without training; an error changes nothing.

    Args:
        model: Its config is changed in place.
        processor: Its image processor is changed in place.
        image_size: Pixels per side of the square input; with `native`, of the square with the same number of tokens;
            with tiles, of a tile.
        aspect: `pad`, `squash` or `native`.
        token_budget: Maximum tokens per image, for `native`; by default the number at `image_size`.
        tiles: Maximum number of tiles of an image, for a model with tiles; 1 is one image of the tower's size.
        positions: `absolute` or `resampled`. By default `resampled` if images get another size; the trained grid is
            then derived from the processor's size before the change.
        view: Default view of an image; see `florence_vl.model.views`.

    Raises:
        ValueError: A choice or view is unknown, or the tower or the LLM's context does not support a size or budget.
    """
    images: Any = processor.image_processor
    config = model.config
    before = dict(vars(images)), config.positions, config.position_grid, config.tiles
    try:
        _change(model, processor, image_size, aspect, token_budget, tiles, positions, view)
    except Exception:
        images.__dict__ = before[0]
        config.positions, config.position_grid, config.tiles = before[1:]
        if config.tower == "florence2":
            tower: Any = model.model.vision_tower
            tower.set_positions(config.positions)
        raise


def _change(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    image_size: int | None,
    aspect: str | None,
    token_budget: int | None,
    tiles: int | None,
    positions: str | None,
    view: str | None,
) -> None:
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
    if tiles is not None and model.config.tiles is None:
        raise ValueError(
            "this model has no tiles, whose row ends are learned: build one with tiles, or train this one (model.tiles)"
        )
    if model.config.tiles is not None:
        images.tiles = {**model.config.tiles, "size": images.size["height"]}
        if tiles is not None:
            images.tiles["max"] = tiles
        model.config.tiles = dict(images.tiles)
    if aspect is not None:
        images.image_aspect_ratio = aspect
    if token_budget is not None:
        images.token_budget = token_budget
    if view is not None:
        images.view_settings(view)
        images.view = None if view == FULL_VIEW else view
    images.check()
    check_context(model, processor)


def check_context(model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor) -> None:
    """Check that the image with most tokens fits the LLM's context, also in the views with a size of their own.

    Raises:
        ValueError: It does not, or the tower does not support its size or images with their own aspect ratio.
    """
    images: Any = processor.image_processor
    context = model.config.context_length
    if images.image_aspect_ratio == "native" and model.model.vision_tower.fixed_size:
        raise ValueError(
            f"aspect 'native' needs a tower for images of any size, but this {model.config.vision_config.model_type} "
            "accepts one size only: use 'pad' or 'squash', or build a model with tiles"
        )
    for name in (FULL_VIEW, *(images.views or {})):
        side = images.view_settings(name)["size"]
        where = "" if name == FULL_VIEW else f"view {name!r}: "
        try:
            height, width = images.largest_size if side is None else images.output_size(side, side, view=name)
            tokens = model.num_image_tokens(height, width)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        if context is not None and tokens >= context:
            raise ValueError(
                f"{where}an image of {height}x{width} pixels takes {tokens} tokens, but the LLM's context has "
                f"{context}: choose a smaller size{'' if images.tiles is None else ', or fewer tiles'}"
            )


def resolution_settings(model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor) -> dict[str, Any]:
    """Resolution settings of a model as JSON values, which distinguish its answers from those at other resolutions."""
    images: Any = processor.image_processor
    settings = {
        "image_size": [images.size["height"], images.size["width"]],
        "aspect": images.image_aspect_ratio,
        "token_budget": images.token_budget,
        "view": images.view or FULL_VIEW,
    }
    if model.config.tower == "florence2":
        settings["positions"] = model.config.positions
    if images.tiles is not None:
        settings["tiles"] = dict(images.tiles)
    return settings
