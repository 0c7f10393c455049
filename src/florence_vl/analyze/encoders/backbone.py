"""Any transformers vision backbone as an encoder, every hidden layer selectable; CLIP, SigLIP and DINOv2 are this.

Features: `last` (the model's `last_hidden_state`, with its final norm where it has one) and `layerK` (hidden state K;
0 is the patch embedding). Shape letters: B images, N tokens, D channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence_vl.analyze.encoders.base import IMAGENET_MEAN, IMAGENET_STD, Encoder, Preprocess, missing
from florence_vl.analyze.encoders.registry import ENCODERS
from florence_vl.model.configuration import FlorenceVLConfig
from florence_vl.model.towers import BackboneTower
from florence_vl.registry import did_you_mean


class BackboneEncoder(Encoder):
    """Hidden layers of one vision backbone.

    Args:
        name: Registered name.
        tower: The backbone as the training tower holds it (it knows class tokens, patch size and fixed sizes).
        preprocess: How pictures become its input.
        features: `last` and `layerK` names, in order.
    """

    def __init__(self, name: str, tower: BackboneTower, preprocess: Preprocess, features: Sequence[str]) -> None:
        self.tower = tower
        self.vision: Any = tower.config.vision_config
        self.layers = {feature: layer_index(name, feature, tower) for feature in features}
        super().__init__(name, tower.backbone, preprocess, features)
        self.grid()  # refuses a size that the backbone can't take

    @classmethod
    def load(
        cls,
        name: str,
        weights: str | Path,
        features: Sequence[str] = (),
        size: int | None = None,
        fit: str | None = None,
        install: str | None = None,
    ) -> BackboneEncoder:
        """Load the vision part of a transformers model, from a folder or from the hub's local cache.

        Args:
            name: Registered name of the encoder.
            weights: Folder, or hub name of weights that were downloaded before.
            features: `last` and `layerK` names; `last` alone when empty.
            size: Side of the square input; the weights' own when None.
            fit: `squash`, `pad` or `crop`.
            install: Command that gets the weights, for the error; `hf download` when None.

        Raises:
            MissingWeights: The weights are not on this machine.
            ValueError: Not a vision model, unknown feature, or a size that it can't take.
        """
        from transformers import AutoConfig, AutoModel

        with local_weights(name, weights, install):
            config = AutoConfig.from_pretrained(weights, local_files_only=True)
            vision = getattr(config, "vision_config", config)
            if not hasattr(vision, "patch_size") or not hasattr(vision, "num_hidden_layers"):
                raise ValueError(
                    f"{name}: {weights} is a {config.model_type!r}, not a vision transformer with patches and hidden "
                    "layers (CLIP, SigLIP, DINOv2, ViT ...)"
                )
            backbone = AutoModel.from_pretrained(
                weights, config=vision, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
            )
        vl_config = FlorenceVLConfig(vision_config=vision, tower="backbone", feature_layers={"last": -1})
        with torch.device("meta"):
            tower = BackboneTower(vl_config)
        tower.backbone = backbone
        preprocess = published_preprocess(weights, int(getattr(vision, "image_size", 224)), size, fit)
        return cls(name, tower, preprocess, tuple(features) or ("last",))

    @property
    def feature_dims(self) -> dict[str, int]:
        return dict.fromkeys(self.features, self.vision.hidden_size)

    def grid(self) -> tuple[int, int]:
        height, width = self.preprocess.height, self.preprocess.width
        try:
            self.tower.num_tokens(height, width)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        patch = self.vision.patch_size
        if height % patch or width % patch:
            raise ValueError(f"{self.name}: input of {height}x{width} px; both sides must be multiples of {patch} px")
        return height // patch, width // patch

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        hidden = any(layer is not None for layer in self.layers.values())
        output = self.tower.backbone(pixel_values, output_hidden_states=hidden, return_dict=True)
        rows, columns = self.grid()
        return {
            feature: (output.last_hidden_state if layer is None else output.hidden_states[layer])[:, -rows * columns :]
            for feature, layer in self.layers.items()
        }


def layer_index(name: str, feature: str, tower: BackboneTower) -> int | None:
    """Index into the hidden states that a feature's name means; None for `last`.

    Raises:
        ValueError: No such feature, or no such layer.
    """
    vision: Any = tower.config.vision_config
    depth = vision.num_hidden_layers
    known = ["last", *(f"layer{i}" for i in range(depth + 1))]
    if feature not in known:
        near = (
            did_you_mean(feature, known) if re.fullmatch(r"\D+", feature) else f"Known: last, layer0 ... layer{depth}."
        )
        raise ValueError(f"{name} has no feature {feature!r}. {near}")
    return None if feature == "last" else int(feature.removeprefix("layer"))


class local_weights:
    """Turns transformers' errors about absent files into one line with the command that gets them."""

    def __init__(self, name: str, weights: str | Path, install: str | None = None) -> None:
        self.name, self.weights, self.install = name, str(weights), install

    def __enter__(self) -> None:
        if not Path(self.weights).is_dir() and (
            self.weights.count("/") != 1 or self.weights.startswith((".", "/", "~"))
        ):
            raise missing(self.name, f"there is no folder {self.weights!r}", self.install or "hf download OWNER/NAME")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            if Path(self.weights).is_dir():
                raise ValueError(
                    f"{self.name}: {self.weights} can't be loaded: {str(error).splitlines()[0]}"
                ) from error
            command = self.install or f"hf download {self.weights}"
            raise missing(self.name, f"{self.weights} is not on this machine", command) from None


def published_preprocess(
    weights: str | Path,
    default_size: int,
    size: int | None = None,
    fit: str | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Preprocess:
    """Size, mean and standard deviation from the weights' own preprocessing file, where there is one."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        own, _ = ImageProcessingMixin.get_image_processor_dict(str(weights), local_files_only=True)
    except OSError:
        own = {}
    own_size = own.get("crop_size") if own.get("do_center_crop") else own.get("size")
    if isinstance(own_size, dict):
        own_size = own_size.get("height") or own_size.get("shortest_edge")
    side = size or own_size or default_size
    mean, std = tuple(own.get("image_mean") or mean), tuple(own.get("image_std") or std)
    return Preprocess(side, side, mean, std, fit or "squash")


def register_hub_encoder(name: str, hub_name: str) -> Callable[..., Encoder]:
    """Register a backbone of the hub under an exact name; other weights of its kind with `name=FOLDER`."""

    def factory(
        weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
    ) -> Encoder:
        return BackboneEncoder.load(name, weights or hub_name, features, size, fit)

    factory.__name__ = name
    factory.__doc__ = f"{hub_name}, from a folder or from the hub's local cache."
    return ENCODERS.register(name)(factory)


@ENCODERS.register("backbone")
def backbone(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> Encoder:
    """Any `AutoModel` vision transformer: `backbone=FOLDER:layer6+last`."""
    if weights is None:
        raise ValueError("the encoder 'backbone' needs weights: backbone=FOLDER or backbone=OWNER/NAME")
    return BackboneEncoder.load("backbone", weights, features, size, fit)
