"""Image files to `pixel_values`: padding, resizing or native size, and normalization (PIL, without torchvision)."""

import math
import os
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from florence_vl.model.geometry import MAX_UPSCALE, native_size
from florence_vl.model.pictures import ReadableImage, open_image, pad_and_resize
from florence_vl.model.tiles import check_tiles, choose_grid
from florence_vl.model.views import FULL_VIEW, feature_mask
from florence_vl.registry import did_you_mean

ASPECT_RATIOS = ("pad", "squash", "native")


class FlorenceVLImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Image keyword arguments of transformers and of this processor; see `FlorenceVLImageProcessor`."""

    image_aspect_ratio: Literal["pad", "squash", "native"] | None
    token_budget: int | None
    stride: int | None
    max_upscale: float | None
    tiles: dict[str, Any] | None
    view: str | list[str] | None


class FlorenceVLImageProcessor(PilBackend):
    """Converts images of any format and size to `pixel_values` of one size, (n, 3, H, W) float32.

    Args:
        image_aspect_ratio: `pad` centers the image on a square of the mean color, `int(mean * 255)`, before resizing
            (as in the second stage and inference of LLaVA and Florence-VL); `squash` resizes to the square directly (as
            in the released first stage); `native` keeps the aspect ratio of each image (see
            `florence_vl.model.geometry.native_size`).
        size: Output height and width, 768 px by default.
        token_budget: For `native`: maximum tokens per image, by default the number at `size`.
        stride: Pixels per side of one token.
        max_upscale: For `native`: maximum enlargement of a small image.
        tiles: The model's tiles, see `florence_vl.model.tiles`: the output is a canvas of tiles of `size`.
        views: The model's views; see `florence_vl.model.views`.
        view: Default view of an image; `full` if None.
        features: Names of the model's features, for the views.
        resample: Pillow's filter, bicubic by default.
        image_mean: Channel means in [0, 1]; ImageNet's by default. CLIP and SigLIP towers have different ones.
        image_std: Channel standard deviations.

    Raises:
        ValueError: `image_aspect_ratio` is unknown, `size` has no height and width, or an image is unreadable.
    """

    valid_kwargs = FlorenceVLImagesKwargs
    image_aspect_ratio = "pad"
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 768, "width": 768}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    token_budget: int | None = None
    stride = 32
    max_upscale = MAX_UPSCALE
    tiles: dict[str, Any] | None = None
    views: dict[str, Any] | None = None
    view: str | None = None
    features: list[str] | None = None
    model_input_names = ["pixel_values", "image_sizes", "feature_mask"]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Check the settings.

        Raises:
            ValueError: `image_aspect_ratio` is unknown, `size` has no height and width, a budget is below 1, or the
                tiles do not fit the other settings.
        """
        self._check(self.image_aspect_ratio, self.size, self.tiles)
        if self.tiles is not None:
            self.tiles = check_tiles(self.tiles)
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget is {self.token_budget}; it must be at least 1")

    @property
    def varies(self) -> bool:
        """Whether the size at which an image is encoded depends on the image."""
        return self.image_aspect_ratio == "native" or (self.tiles is not None and self.tiles["max"] > 1)

    @property
    def one_size(self) -> dict[str, Any]:
        """Keyword arguments with which all images are encoded at `size`; none if they are anyway."""
        if self.tiles is not None:
            return {"tiles": {**self.tiles, "max": 1}}
        return {"image_aspect_ratio": "pad"} if self.image_aspect_ratio == "native" else {}

    @property
    def largest_size(self) -> tuple[int, int]:
        """Height and width in pixels of the output with most tokens: with tiles a column of them, as rows have ends.

        Of `native` sizes, that of the image with most tokens whose sides differ by a factor of up to 4.
        """
        size: Any = self.size
        if self.tiles is not None:
            return self.tiles["max"] * size["height"], size["width"]
        if self.image_aspect_ratio != "native":
            return size["height"], size["width"]
        budget = self.token_budget or (size["height"] // self.stride) * (size["width"] // self.stride)
        grids = [(rows, budget // rows) for rows in range(1, math.isqrt(budget) + 1) if 4 * rows >= budget // rows]
        rows, columns = max(grids, key=lambda grid: (math.prod(grid), grid), default=(1, 1))
        return rows * self.stride, columns * self.stride

    def view_settings(self, name: str | None) -> dict[str, Any]:
        """Size and features of a view; those of this processor for None and `full`.

        Raises:
            ValueError: The view is unknown; similar names are suggested.
        """
        if name is None or name == FULL_VIEW:
            return {"size": None, "features": self.features}
        if name not in (self.views or {}):
            known = [FULL_VIEW, *(self.views or {})]
            raise ValueError(f"unknown view {name!r}. {did_you_mean(name, known)}")
        assert self.views is not None
        return self.views[name]

    def output_size(self, height: int, width: int, **settings: Any) -> tuple[int, int]:
        """Height and width in pixels at which an image of `height` x `width` is encoded.

        Args:
            height: Height of the image, px.
            width: Width of the image, px.
            **settings: Override this processor's `image_aspect_ratio`, `size`, `token_budget`, `stride`, `max_upscale`,
                `tiles`; and `view`, the name of a view.

        Raises:
            ValueError: The view is unknown; similar names are suggested.
        """

        def setting(name: str) -> Any:
            value = settings.get(name)
            return getattr(self, name) if value is None else value

        size, stride = setting("size"), setting("stride")
        side = self.view_settings(setting("view"))["size"]
        if side is not None:
            size, settings = {"height": side, "width": side}, {**settings, "token_budget": (side // stride) ** 2}
        if (tiles := setting("tiles")) is not None:
            rows, columns = choose_grid(height, width, size["height"], tiles["max"])
            return rows * size["height"], columns * size["width"]
        if setting("image_aspect_ratio") != "native":
            return size["height"], size["width"]
        budget = setting("token_budget")
        if budget is None:
            budget = (size["height"] // stride) * (size["width"] // stride)
        return native_size(height, width, stride, budget, setting("max_upscale"))

    @staticmethod
    def _check(image_aspect_ratio: str | None, size: SizeDict, tiles: dict[str, Any] | None) -> None:
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(
                f"unknown image_aspect_ratio {image_aspect_ratio!r}. "
                f"{did_you_mean(str(image_aspect_ratio), ASPECT_RATIOS)}"
            )
        if not all(isinstance(side, int) and side > 0 for side in (size.height, size.width)):
            raise ValueError(f"size must give height and width in pixels, found {dict(size)}")
        if tiles is None:
            return
        side = check_tiles(tiles)["size"]
        if image_aspect_ratio == "native":
            raise ValueError("image_aspect_ratio 'native' cannot be combined with tiles: use 'pad' or 'squash'")
        if (size.height, size.width) != (side, side):
            raise ValueError(f"the tiles have {side} pixels per side, but images are of {size.height}x{size.width}")

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Decode paths and URLs (nested lists allowed) that `florence_vl.model.pictures` permits."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or (
            isinstance(image_url_or_urls, ReadableImage) and not isinstance(image_url_or_urls, np.ndarray)
        ):
            return open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Image.Image:
        """Convert one image of any accepted type to an RGB PIL image."""
        if isinstance(image, Image.Image):
            return open_image(image)
        pixels = super().process_image(image, *args, **kwargs)  # (C, H, W)
        if pixels.dtype != np.uint8:
            raise ValueError(
                f"expected images as PIL images, files or uint8 arrays in [0, 255], found an array of {pixels.dtype}"
            )
        return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))

    def _preprocess(
        self,
        images: list[Image.Image],
        size: SizeDict,
        resample: int | None,
        do_resize: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        image_aspect_ratio: str = "pad",
        token_budget: int | None = None,
        stride: int | None = None,
        max_upscale: float | None = None,
        tiles: dict[str, Any] | None = None,
        view: str | list[str] | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        self._check(image_aspect_ratio, size, tiles)
        view = self.view if view is None else view
        mean = tuple(np.broadcast_to(image_mean, 3).tolist())
        std = tuple(np.broadcast_to(image_std, 3).tolist())
        red, green, blue = (int(channel * 255) for channel in mean)
        levels = _levels(rescale_factor if do_rescale else 1.0, mean if do_normalize else None, std)
        filter_ = PILImageResampling.BICUBIC if resample is None else resample
        names = list(view) if isinstance(view, (list, tuple)) else [view] * len(images)
        if len(names) != len(images):
            raise ValueError(f"{len(names)} views were given for {len(images)} images: give one name, or one per image")
        settings = {"image_aspect_ratio": image_aspect_ratio, "size": size, "token_budget": token_budget}
        settings |= {"stride": stride, "max_upscale": max_upscale, "tiles": tiles}
        stack = []
        for image, name in zip(images, names, strict=True):
            if do_resize:
                height, width = self.output_size(image.height, image.width, view=name, **settings)
                if image_aspect_ratio == "pad":
                    shape = (1, 1) if tiles is None else (height, width)
                    image = pad_and_resize(image, (height, width), (red, green, blue), filter_, shape)
                else:
                    image = image.resize((width, height), filter_)
            pixels_HWC = np.asarray(image)
            stack.append(np.stack([levels[c].take(pixels_HWC[..., c]) for c in range(3)]))
        data: dict[str, Any] = {"pixel_values": stack}
        if image_aspect_ratio == "native" or tiles is not None or view is not None:
            data = {"pixel_values": stack_sizes(stack), "image_sizes": [pixels.shape[-2:] for pixels in stack]}
        if view is not None and self.views and self.features:
            data["feature_mask"] = [feature_mask(self.features, self.view_settings(name)["features"]) for name in names]
        return BatchFeature(data=data, tensor_type=return_tensors)


def stack_sizes(images: list[np.ndarray]) -> np.ndarray:
    """Images (3, h, w) in the top left corner of one array (n, 3, H, W), zero elsewhere."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    if all(image.shape[1:] == (height, width) for image in images):
        return np.stack(images)
    stack = np.zeros((len(images), 3, height, width), dtype=images[0].dtype)
    for slot, image in zip(stack, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return stack


@lru_cache(maxsize=16)
def _levels(factor: float, mean: tuple[float, ...] | None, std: tuple[float, ...]) -> np.ndarray:
    """Values of the 256 levels after rescaling and normalizing, (3, 256) float32."""
    values = np.tile(np.arange(256, dtype=np.float64) * factor, (3, 1))
    if mean is not None:
        values = (values - np.array(mean)[:, None]) / np.array(std)[:, None]
    return values.astype(np.float32)
