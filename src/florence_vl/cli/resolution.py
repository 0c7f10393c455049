"""Resolution flags that all commands with a model share."""

from __future__ import annotations

from typing import Any

import typer

IMAGE_SIZE = typer.Option(None, "--image-size", min=1, help="Side of the image in pixels, for a Florence-VL.")
ASPECT = typer.Option(None, "--aspect", help="pad, squash, or native: the image's own aspect ratio.")
TOKEN_BUDGET = typer.Option(None, "--token-budget", min=1, help="With --aspect native: maximum tokens per image.")
POSITIONS = typer.Option(
    None, "--positions", help="absolute, or resampled (the default if the size or the aspect changes)."
)
VIEW = typer.Option(None, "--view", help="View of all images, for a model with views; full: no view.")


def given(
    image_size: int | None, aspect: str | None, token_budget: int | None, positions: str | None, view: str | None
) -> dict[str, Any]:
    """The flags that were set, as keyword arguments of `florence_vl.model.resolution.set_resolution`."""
    settings = {
        "image_size": image_size,
        "aspect": aspect,
        "token_budget": token_budget,
        "positions": positions,
        "view": view,
    }
    return {name: value for name, value in settings.items() if value is not None}
