"""Tiles: a large image as a grid of images of the tower's own size, for towers with fixed positions (as LLaVA-NeXT).

The image is resized to a canvas of rows x columns tiles. The model cuts it, encodes each tile as an image, and places
the tokens of all tiles as one map of the whole canvas with a learned vector after each of its rows. A global view, the
canvas averaged down to one tile, comes first. An image of one tile is encoded as without tiles, bit for bit.

Shape letters: I images, V views of an image (its tiles, and the global view before them), N tokens of a view, H width
of the LLM, k tokens after fusion per position of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from florence_vl.registry import did_you_mean

KEYS = ("max", "global", "size")


def check_tiles(tiles: Any) -> dict[str, Any]:
    """The tiles of a config, checked and completed.

    Args:
        tiles: `{"max": tiles of an image at most, "global": whether a global view comes first, "size": pixels per side
            of a tile}`. `global` is true by default; `size` is set from the processor's.

    Raises:
        ValueError: Not such a mapping.
    """
    if not isinstance(tiles, Mapping):
        raise ValueError(f"tiles must be a mapping such as {{'max': 4, 'global': True}}, found {tiles!r}")
    for key in tiles:
        if key not in KEYS:
            raise ValueError(f"tiles has an unknown key {key!r}. {did_you_mean(str(key), KEYS)}")
    limit, overview, size = tiles.get("max"), tiles.get("global", True), tiles.get("size")
    if type(limit) is not int or limit < 1:
        raise ValueError(f"tiles.max must be a number of tiles of at least 1, found {limit!r}")
    if type(overview) is not bool:
        raise ValueError(f"tiles.global must be true or false, found {overview!r}")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"tiles.size must be pixels per side, found {size!r}")
    return {"max": limit, "global": overview, "size": size}


def refuse_tiles(config: Any, what: str) -> None:
    """Refuse a model with tiles.

    Args:
        config: Of the model.
        what: What needs images of one size, for the message.

    Raises:
        ValueError: Its images may have several tiles.
    """
    if config.tiles is not None and config.tiles["max"] > 1:
        raise ValueError(
            f"{what} needs images of one size, but this model encodes an image as up to {config.tiles['max']} tiles: "
            "call set_resolution(model, processor, tiles=1) first (--tiles 1 in commands that have it)"
        )


def overview_pixels(config: Any) -> int:
    """Pixels of the global view that the tower sees of each image with several tiles; 0 if there is none."""
    tiles = getattr(config, "tiles", None)
    return tiles["size"] ** 2 if tiles is not None and tiles["global"] else 0


def grids(limit: int) -> list[tuple[int, int]]:
    """All grids (rows, columns) of at most `limit` tiles."""
    return [(rows, columns) for rows in range(1, limit + 1) for columns in range(1, limit // rows + 1)]


@lru_cache(maxsize=4096)
def choose_grid(height: int, width: int, size: int, limit: int) -> tuple[int, int]:
    """The grid that shows most of an image, and among those the one with least padding, as in LLaVA-NeXT.

    Args:
        height: Height of the image, px.
        width: Width of the image, px.
        size: Pixels per side of a tile.
        limit: Maximum number of tiles.

    Returns:
        (rows, columns). An image that is not larger than a tile has one tile.

    Example:
        >>> choose_grid(1080, 1920, size=384, limit=4)
        (2, 2)
    """
    if min(height, width) < 1:
        raise ValueError(f"an image of {height}x{width} pixels has no area")

    def shown(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid[0] * size, grid[1] * size
        if columns * height < rows * width:  # the width limits; integers, so that no rounding decides
            pixels = columns * (height * columns // width)
        else:
            pixels = rows * (width * rows // height)
        pixels = min(pixels, height * width)
        return pixels, pixels - rows * columns

    return max(grids(limit), key=shown)


@dataclass(frozen=True)
class Canvas:
    """The tiles of an image of given size.

    Attributes:
        rows: Rows of tiles.
        columns: Columns of tiles.
        height: Height of a tile, px.
        width: Width of a tile, px.
        overview: Whether a global view comes first.
    """

    rows: int
    columns: int
    height: int
    width: int
    overview: bool

    @classmethod
    def of(cls, tiles: Mapping[str, Any] | None, height: int, width: int) -> Canvas:
        """The canvas of an image of `height` x `width` pixels as the tower's input; one tile without `tiles`.

        Raises:
            ValueError: The size is not a multiple of the tile's, or that is unknown.
        """
        if tiles is None:
            return cls(1, 1, height, width, False)
        size = tiles.get("size")
        if size is None:
            raise ValueError("the size of the tiles is unknown: set config.tiles['size'] to the processor's, in pixels")
        rows, columns = height // size, width // size
        if (rows * size, columns * size) != (height, width) or not rows * columns:
            raise ValueError(
                f"an image of {height}x{width} pixels is not a grid of tiles of {size}x{size}: process it with the "
                "model's own processor"
            )
        return cls(rows, columns, size, size, tiles["global"] and rows * columns > 1)

    @property
    def views(self) -> int:
        """Images V that the tower encodes."""
        return self.rows * self.columns + self.overview

    def num_tokens(self, tokens: int, columns: int) -> int:
        """Number of tokens of the image.

        Args:
            tokens: Tokens of one view.
            columns: Columns of the grid of one view.
        """
        ends = self.rows * tokens // columns if self.rows * self.columns > 1 else 0
        return self.views * tokens + ends

    def cut(self, pixels_I3HW: Tensor) -> Tensor:
        """The views of images of this canvas, (I V, 3, height, width)."""
        if self.views == 1:
            return pixels_I3HW
        blocks = pixels_I3HW.unflatten(3, (self.columns, self.width)).unflatten(2, (self.rows, self.height))
        views = blocks.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if self.overview:
            squares = pixels_I3HW.unflatten(3, (self.width, self.columns)).unflatten(2, (self.height, self.rows))
            views = torch.cat([squares.mean((3, 5)).unsqueeze(1), views], dim=1)
        return views.flatten(0, 1)


class RowEnd(nn.Module):
    """Places the tokens of an image's views as one sequence, with a learned vector after each row of the map.

    Args:
        width: Width H of the LLM.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the vector, if `from_pretrained` has not loaded it, to the same random values in every process."""
        width = len(self.vector)
        drawn = torch.randn(width, generator=torch.Generator().manual_seed(0), device="cpu")
        init.copy_(self.vector, drawn / width**0.5)  # the standard deviation of LLaVA-NeXT's

    def forward(self, tokens: Tensor, canvas: Canvas, grid: tuple[int, int]) -> Tensor:
        """Place the tokens.

        Args:
            tokens: (I V, N, H), the views of each image in order.
            canvas: Of the images.
            grid: Rows and columns of the tokens of a view; N is k times their product, map after map.

        Returns:
            (I, N', H): the global view's tokens, then k maps with their row ends.
        """
        if canvas.rows * canvas.columns == 1:
            # Gradients of a batch without tiles are zero, not missing: processes exchange those of all parameters.
            return tokens + 0.0 * self.vector.sum().to(tokens.dtype) if self.training else tokens
        rows, columns = grid
        tokens_IVNH = tokens.unflatten(0, (-1, canvas.views))
        first = tokens_IVNH[:, : int(canvas.overview)].flatten(1, 2)
        tiles = tokens_IVNH[:, int(canvas.overview) :].unflatten(2, (-1, rows, columns))
        map_ = tiles.unflatten(1, (canvas.rows, canvas.columns)).permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5)
        ends = self.vector.to(tokens.dtype).expand(*map_.shape[:4], 1, -1)
        return torch.cat([first, torch.cat([map_, ends], dim=4).flatten(1, 4)], dim=1)
