"""Base class of encoders: images in, named token features out, and an identity for caches.

Shape letters: B images, N tokens of a feature, D its channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from florence_vl.model.features import state_hash
from florence_vl.registry import did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FITS = ("squash", "pad", "crop")


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of images for an encoder; part of the encoder's identity.

    Args:
        height: Rows of the input, in pixels.
        width: Columns of the input, in pixels.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        fit: `squash` resizes both sides and changes the aspect ratio (as in Florence-2, and the default, because every
            encoder then receives exactly the whole image); `pad` pads to the input's aspect ratio with the mean color
            (LLaVA-1.5); `crop` fills the input and crops the rest (as in CLIP).

    Raises:
        ValueError: `fit` is unknown or a side is not positive.
    """

    height: int
    width: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    fit: str = "squash"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"unknown fit {self.fit!r}. {did_you_mean(self.fit, FITS)}")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"input size is {self.height}x{self.width}; both sides must be positive")

    def placed(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Position of the whole image in the input: (left, top, right, bottom), which may be outside of it."""
        if self.fit == "squash":
            return 0, 0, self.width, self.height
        choose = min if self.fit == "pad" else max
        scale = choose(self.width / width, self.height / height)
        new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (self.width - new_width) // 2, (self.height - new_height) // 2
        return left, top, left + new_width, top + new_height

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to (3, height, width), fp32, normalized. Bicubic, by Pillow."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        left, top, right, bottom = self.placed(*image.size)
        image = image.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        if image.size != (self.width, self.height):
            canvas = Image.new("RGB", (self.width, self.height), tuple(int(255 * m) for m in self.mean))
            canvas.paste(image, (left, top))
            image = canvas
        pixels_HWC = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
        pixels_HWC = (pixels_HWC - torch.tensor(self.mean)) / torch.tensor(self.std)
        return pixels_HWC.permute(2, 0, 1).contiguous()


class VisionEncoder(ABC):
    """One vision encoder: `encoder(images) -> {feature name: (B, N, D)}`.

    Features contain only grid tokens, row by row (class and register tokens have no position in the image), so mean
    pooling is over the image and `N == rows * columns` of `grid()`.

    Args:
        name: Registered name.
        module: The network; it is put in eval mode and frozen.
        preprocess: Preprocessing of images.
        features: Names of the features to compute.
        settings: Other values that determine the features (layer indices, noise level, prompt, ...).
    """

    #: The command that installs what this encoder needs, for error messages.
    install: str = ""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        preprocess: Preprocess,
        features: Sequence[str],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.module = module.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.features = tuple(features)
        self.settings = dict(settings or {})
        self._weights: str | None = None

    @abstractmethod
    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), normalized -> feature name -> (B, N, D)."""

    @property
    @abstractmethod
    def feature_dims(self) -> dict[str, int]:
        """Channels D by feature name, in order."""

    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid at the encoder's input size."""

    def grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns by feature name; overridden if the features differ in resolution."""
        return {name: self.grid() for name in self.feature_dims}

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.module.parameters()).dtype

    def to(self, device: str | torch.device) -> VisionEncoder:
        """Move the weights; the identity does not change."""
        _ = self.identity  # computed on the device where the weights were loaded
        self.module.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Compute features of images.

        Args:
            images: RGB images of any sizes.

        Returns:
            Name -> (B, N, D), in the encoder's data type and on its device.

        Raises:
            ValueError: No image is given.
        """
        if not images:
            raise ValueError("no image to encode")
        return self.encode_batch(torch.stack([self.preprocess(image) for image in images]))

    @torch.inference_mode()
    def encode_batch(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Features of preprocessed images (B, 3, H, W), moved to the encoder's device and data type."""
        features = self.encode(pixel_values.to(self.device, self.dtype, non_blocking=True))
        return {name: features[name] for name in self.feature_dims}

    @property
    def identity(self) -> dict[str, Any]:
        """Everything except the image that determines a feature's value, for cache keys."""
        if self._weights is None:
            self._weights = state_hash(self.module)
        return {
            "encoder": self.name,
            "weights": self._weights,
            "preprocess": asdict(self.preprocess),
            "dtype": str(self.dtype).removeprefix("torch."),
            "settings": self.settings,
        }

    def resized(self, size: int | None, fit: str | None) -> VisionEncoder:
        """The same encoder with another input size (square) and fit."""
        if size is not None:
            self.preprocess = replace(self.preprocess, height=size, width=size)
        if fit is not None:
            self.preprocess = replace(self.preprocess, fit=fit)
        return self


class MissingWeights(ValueError):
    """An encoder's or an LLM's weights are not on this machine; the message gives the download command."""


def missing(name: str, what: str, command: str) -> MissingWeights:
    """The error for missing weights."""
    return MissingWeights(f"{name}: {what}. Get it with: {command}")
