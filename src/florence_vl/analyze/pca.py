"""PCA visualization: the first three principal components of an encoder's token features as colors (paper Figure 3).

The background is removed by a threshold on the first component, as in DINOv2 (arXiv 2304.07193): the color components
are then fitted on the foreground only. Shape letters: M images, N = rows x columns tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from florence_vl.analyze.encoders.base import Preprocess, VisionEncoder

BACKGROUND = (255, 255, 255)


@dataclass(frozen=True)
class PCAConfig:
    """Settings of the visualization.

    Args:
        joint: One fit for all images, so that colors are comparable; otherwise one fit per image.
        background: Remove the background by the first component. If False, all tokens are colored.
        threshold: Value of the first component, scaled to [0, 1] over the fit, above which a token is foreground; None
            uses Otsu's threshold.
        flip: Use the other side of the first component as the foreground. The sign of a principal component is
            arbitrary; by default the background is the side with most of the images' corners.
        refit: Fit the three color components on the foreground only (DINOv2). Otherwise they are the first three of the
            first fit.
        standardize: Divide each channel by its standard deviation before the fit.
    """

    joint: bool = True
    background: bool = True
    threshold: float | None = None
    flip: bool = False
    refit: bool = True
    standardize: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; the first component is scaled to [0, 1]")


@dataclass
class PCAMap:
    """The map of one feature of one image.

    Args:
        rgb: (rows, columns, 3) colors in [0, 1].
        foreground: (rows, columns) whether a token is foreground.
        first: (rows, columns) first component of the first fit, scaled to [0, 1], foreground high.
        threshold: The threshold on `first`.
        explained: Fraction of variance of the three color components.
    """

    rgb: np.ndarray
    foreground: np.ndarray
    first: np.ndarray
    threshold: float
    explained: tuple[float, ...] = field(default=())


def otsu(values: Tensor, bins: int = 256) -> float:
    """Otsu's threshold of values in [0, 1]: the cut with the maximum variance between both sides."""
    counts = torch.histc(values.double().cpu(), bins=bins, min=0, max=1)
    centers = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    below = counts.cumsum(0)
    above = counts.sum() - below
    sums = (counts * centers).cumsum(0)
    mean_below = sums / below.clamp_min(1)
    mean_above = (sums[-1] - sums) / above.clamp_min(1)
    between = below * above * (mean_below - mean_above) ** 2
    best = (between >= between.max() * (1 - 1e-12)).nonzero().flatten()  # a gap is a plateau: use its middle
    return float((best.double().mean() + 1) / bins)


def principal_components(tokens_ND: Tensor, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), directions (D, count) and their fractions of variance (count,), by the covariance's eigenvectors.

    Signs are fixed: the largest entry of each direction is positive, so that the same tokens give the same map.

    Raises:
        ValueError: There are fewer tokens or channels than components.
    """
    if min(tokens_ND.shape) < count:
        raise ValueError(f"{count} components need as many tokens and channels, got {tuple(tokens_ND.shape)}")
    tokens = tokens_ND.double()
    mean = tokens.mean(0)
    centered = tokens - mean
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)[:, :count]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return mean, vectors * signs, values[:count] / values.sum().clamp_min(1e-12)


def pca_maps(
    features_MND: Sequence[Tensor], grids: Sequence[tuple[int, int]], config: PCAConfig | None = None
) -> list[PCAMap]:
    """Maps of one feature of several images.

    Args:
        features_MND: (N, D) tokens of each image.
        grids: Rows and columns of each image.
        config: Settings.

    Returns:
        One map per image.

    Raises:
        ValueError: There are no images, or tokens do not fill their grid.
    """
    config = config or PCAConfig()
    if not features_MND:
        raise ValueError("no features to draw")
    for tokens, (rows, columns) in zip(features_MND, grids, strict=True):
        if len(tokens) != rows * columns:
            raise ValueError(f"{len(tokens)} tokens do not fill a grid of {rows}x{columns}")
    if not config.joint:
        single = PCAConfig(**{**config.__dict__, "joint": True})
        return [pca_maps([t], [g], single)[0] for t, g in zip(features_MND, grids, strict=True)]

    tokens = torch.cat([t.detach().double().cpu() for t in features_MND])
    if config.standardize:
        tokens = (tokens - tokens.mean(0)) / tokens.std(0, unbiased=False).clamp_min(1e-9)
    mean, directions, explained = principal_components(tokens)
    scores = (tokens - mean) @ directions
    first = _unit(scores[:, 0])
    threshold = config.threshold if config.threshold is not None else otsu(first)
    foreground = first > threshold
    if _is_background(foreground, grids):
        first, foreground, threshold = 1 - first, first < threshold, 1 - threshold
    if config.flip:
        first, foreground, threshold = 1 - first, ~foreground, 1 - threshold
    if not config.background:
        foreground = torch.ones_like(foreground)
    if config.background and config.refit and int(foreground.sum()) >= 4:
        mean, directions, explained = principal_components(tokens[foreground])
        scores = (tokens - mean) @ directions
    colors = torch.stack([_unit(c, within=foreground) for c in scores.T], dim=1)
    maps, start = [], 0
    for rows, columns in grids:
        part = slice(start, start + rows * columns)
        start += rows * columns
        maps.append(
            PCAMap(
                rgb=colors[part].view(rows, columns, 3).float().numpy(),
                foreground=foreground[part].view(rows, columns).numpy(),
                first=first[part].view(rows, columns).float().numpy(),
                threshold=float(threshold),
                explained=tuple(explained.tolist()),
            )
        )
    return maps


def _unit(values: Tensor, within: Tensor | None = None) -> Tensor:
    """Scale to [0, 1] by the 1 % and 99 % quantiles (of the values `within`), clipped."""
    chosen = values if within is None or not within.any() else values[within]
    low, high = torch.quantile(chosen, torch.tensor([0.01, 0.99], dtype=values.dtype))
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def _is_background(side: Tensor, grids: Sequence[tuple[int, int]]) -> bool:
    """Whether a side of the first component is the background: it has most corners, or most of the border."""
    corners = torch.cat([_frame(r, c, max(1, min(r, c) // 8), corners=True) for r, c in grids])
    share = float(side[corners].double().mean())
    if share != 0.5:
        return share > 0.5
    border = torch.cat([_frame(r, c, 1) for r, c in grids])
    return bool(side[border].double().mean() > side[~border].double().mean())


def _frame(rows: int, columns: int, width: int, corners: bool = False) -> Tensor:
    """(rows * columns,) whether a position is within `width` of an edge, or of two adjacent edges."""
    row = torch.ones(rows, 1, dtype=torch.bool)
    row[width : rows - width] = False
    column = torch.ones(1, columns, dtype=torch.bool)
    column[:, width : columns - width] = False
    return (row & column if corners else row | column).flatten()


def map_image(pca: PCAMap, size: tuple[int, int], preprocess: Preprocess, smooth: bool = False) -> Image.Image:
    """The map as an RGB image over the whole image, without padding, with a white background.

    Args:
        pca: The map.
        size: (width, height) of the image.
        preprocess: Preprocessing of the image for the encoder.
        smooth: Interpolate between tokens instead of showing them as squares.
    """
    colors = pca.rgb * 255
    colors[~pca.foreground] = BACKGROUND
    return to_image_frame(Image.fromarray(colors.round().astype(np.uint8)), size, preprocess, smooth)


def to_image_frame(picture: Image.Image, size: tuple[int, int], preprocess: Preprocess, smooth: bool) -> Image.Image:
    """Map an image in the encoder's input frame back to the original image's frame and size."""
    left, top, right, bottom = preprocess.placed(*size)
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    scale_x, scale_y = picture.width / preprocess.width, picture.height / preprocess.height
    box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
    if box[0] >= 0 and box[1] >= 0 and box[2] <= picture.width and box[3] <= picture.height:
        return picture.resize(size, resample, box=box)
    result = Image.new("RGB", size, BACKGROUND)  # after cropping, the part outside the encoder's input stays white
    shown_x = (max(0, -left) * size[0] / (right - left), max(0, -top) * size[1] / (bottom - top))
    shown = (
        round(preprocess.width * size[0] / (right - left)) if left < 0 else size[0],
        round(preprocess.height * size[1] / (bottom - top)) if top < 0 else size[1],
    )
    result.paste(picture.resize(shown, resample), (round(shown_x[0]), round(shown_x[1])))
    return result


def overlay(image: Image.Image, pca: PCAMap, preprocess: Preprocess, strength: float = 0.6) -> Image.Image:
    """The map over its image; the background shows the image in gray."""
    colors = map_image(pca, image.size, preprocess, smooth=True)
    mask = Image.fromarray((pca.foreground * np.uint8(255)).astype(np.uint8)).convert("RGB")
    mask = to_image_frame(mask, image.size, preprocess, smooth=False).convert("L")
    gray = image.convert("L").convert("RGB")
    return Image.composite(Image.blend(image, colors, strength), gray, mask)


def encoder_maps(
    encoder: VisionEncoder, images: Sequence[Image.Image], config: PCAConfig | None = None, batch_size: int = 8
) -> dict[str, list[PCAMap]]:
    """Maps of every feature of an encoder, one list entry per image."""
    tokens: dict[str, list[Tensor]] = {name: [] for name in encoder.feature_dims}
    for start in range(0, len(images), batch_size):
        for name, x_BND in encoder(images[start : start + batch_size]).items():
            tokens[name].extend(x_BND.float().cpu())
    grids = encoder.grids()
    return {name: pca_maps(parts, [grids[name]] * len(images), config) for name, parts in tokens.items()}


def sheet(
    image: Image.Image, columns: Mapping[str, tuple[PCAMap, Preprocess]], title: str = "", height: float = 2.4
) -> Any:
    """One figure per image: the image, then each feature's map with the overlay below it.

    Args:
        image: The image.
        columns: Title of a column -> its map and the preprocessing of its encoder.
        title: Title of the sheet.
        height: Height of a row in inches.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.figure import Figure

    shown = image.copy()
    shown.thumbnail((512, 512))
    count = len(columns) + 1
    width = height * shown.width / shown.height
    figure = Figure(figsize=(max(count * width, 4.0), 2 * height + 0.6), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    axes[0, 0].imshow(shown)
    axes[0, 0].set_title("image", fontsize=8)
    for (name, (pca, preprocess)), column in zip(columns.items(), axes.T[1:], strict=True):
        column[0].imshow(map_image(pca, shown.size, preprocess))
        column[0].set_title(name.replace(":", ":\n"), fontsize=8)
        column[1].imshow(overlay(shown, pca, preprocess))
    if title:
        figure.suptitle(title, fontsize=9)
    return figure
