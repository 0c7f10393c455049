"""Resolution flags that all commands with a model share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from florence_vl.model.router import Routing

IMAGE_SIZE = typer.Option(None, "--image-size", min=1, help="Side of the image in pixels, for a Florence-VL.")
ASPECT = typer.Option(None, "--aspect", help="pad, squash, or native: the image's own aspect ratio.")
TOKEN_BUDGET = typer.Option(None, "--token-budget", min=1, help="With --aspect native: maximum tokens per image.")
TILES = typer.Option(None, "--tiles", min=1, help="Maximum tiles per image, for a model with tiles; 1: no tiles.")
POSITIONS = typer.Option(
    None, "--positions", help="absolute, or resampled (the default if the size or the aspect changes)."
)
VIEW = typer.Option(
    None, "--view", help="View of all images, for a model with views; full: no view; auto: the router's choice."
)
TRADE = typer.Option(
    None, "--trade", min=0, help="With --view auto: what the cost of one full view is worth in loss (nats)."
)


def given(
    image_size: int | None = None,
    aspect: str | None = None,
    token_budget: int | None = None,
    tiles: int | None = None,
    positions: str | None = None,
    view: str | None = None,
    trade: float | None = None,
) -> dict[str, Any]:
    """The flags that were set, as keyword arguments of `florence_vl.model.router.set_view`.

    Raises:
        ValueError: `--trade` without `--view auto`.
    """
    if trade is not None and view != "auto":
        raise ValueError("--trade is for --view auto; leave it out, or add that")
    settings = {
        "image_size": image_size,
        "aspect": aspect,
        "token_budget": token_budget,
        "tiles": tiles,
        "positions": positions,
        "view": view,
        "trade": trade,
    }
    return {name: value for name, value in settings.items() if value is not None}


def apply(model: Any, processor: Any, name: str, resolution: dict[str, Any]) -> Routing | None:
    """Set the resolution of a loaded model to the flags of `given`.

    Args:
        model: The model.
        processor: Its processor.
        name: The folder or hub id that it was loaded from.
        resolution: Result of `given`.

    Returns:
        What chooses the views with `--view auto`, else None.
    """
    if not resolution:
        return None
    from florence_vl.model.loading import check_folder
    from florence_vl.model.router import set_view

    return set_view(model, processor, check_folder(name), **resolution)
