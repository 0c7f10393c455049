"""Vision towers of the model as encoders: Florence-2 with its prompts; CLIP, SigLIP and DINOv2 with their layers.

Features of a Florence-2: `davit`, and any prompt's name (`caption`, `ocr`, `grounding`, ...). Features of a backbone:
`last` (its `last_hidden_state`, with the final norm if it has one) and `layerK` (hidden state K; 0 is the patch
embedding). Shape letters: B images, N tokens, D channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from florence_vl.analyze.encoders.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MissingWeights,
    Preprocess,
    VisionEncoder,
    missing,
)
from florence_vl.analyze.encoders.registry import ENCODERS
from florence_vl.model.assemble import florence2_features
from florence_vl.model.configuration import DBFUSION_FEATURES, FLORENCE2_PROMPTS, FlorenceVLConfig
from florence_vl.model.features import identity_digest
from florence_vl.model.geometry import DAVIT
from florence_vl.model.packaged import resolve
from florence_vl.model.parts import (
    load_tower_weights,
    prompt_tokenizer,
    read_config,
    read_preprocessing,
    vision_part,
)
from florence_vl.model.towers import BackboneTower, Florence2Tower, VisionTower
from florence_vl.registry import did_you_mean


class TowerEncoder(VisionEncoder):
    """Grid tokens of a `VisionTower`.

    Args:
        name: Registered name.
        tower: The tower, with the required features.
        preprocess: Preprocessing of images.
        settings: Other values that determine the features.

    Raises:
        ValueError: The tower does not support this image size.
    """

    def __init__(
        self, name: str, tower: VisionTower, preprocess: Preprocess, settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(name, tower, preprocess, tower.feature_names, settings)
        self.tower = tower
        try:
            tower.num_tokens(preprocess.height, preprocess.width)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.grid()

    @property
    def feature_dims(self) -> dict[str, int]:
        return self.tower.feature_dims

    def grid(self) -> tuple[int, int]:
        return self.tower.grid_size(self.preprocess.height, self.preprocess.width)

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self.tower(pixel_values)


class BackboneEncoder(TowerEncoder):
    """Hidden layers of a backbone by name; `last` includes the final norm, unlike the last layer of `BackboneTower`."""

    tower: BackboneTower

    @property
    def feature_dims(self) -> dict[str, int]:
        return dict.fromkeys(self.features, self.tower.config.vision_config.hidden_size)

    def grid(self) -> tuple[int, int]:
        height, width = self.preprocess.height, self.preprocess.width
        patch = self.tower.config.vision_config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"{self.name}: input of {height}x{width} px; both sides must be multiples of {patch} px")
        return height // patch, width // patch

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        rows, columns = self.grid()
        output = self.tower.backbone(pixel_values, output_hidden_states=True)
        states = {"last": output.last_hidden_state}
        states |= {f"layer{i}": state for i, state in enumerate(output.hidden_states)}
        return {feature: states[feature][:, -rows * columns :] for feature in self.features}


def load_encoder_of(
    name: str,
    default: str | None,
    weights: str | None = None,
    features: Sequence[str] = (),
    size: int | None = None,
    fit: str | None = None,
    install: str | None = None,
) -> VisionEncoder:
    """Load the tower of any supported weights.

    Args:
        name: Registered name; a name that begins with `florence2` needs a Florence-2 or a Florence-VL.
        default: Default weights of this name, a folder or hub id; None if the user must name them.
        weights: Other weights than the default.
        features: Feature names; if empty, the four of the paper, the Florence-VL's own, or `last`.
        size: Side of the square input in pixels; that of the weights if None.
        fit: `squash`, `pad` or `crop`.
        install: Command that installs the weights, for the error; `hf download` if None.

    Raises:
        MissingWeights: The weights are not on this machine.
        ValueError: The weights are of another kind, or the feature or size is not supported.
    """
    source = weights or default
    if source is None:
        raise ValueError(f"the encoder {name!r} needs weights: {name}=FOLDER or {name}=OWNER/NAME")
    florence2 = name.startswith("florence2")
    load = load_florence2 if florence2 else load_backbone
    return load(name, source, features, size, fit, install)


def load_florence2(
    name: str,
    weights: str | Path,
    features: Sequence[str] = (),
    size: int | None = None,
    fit: str | None = None,
    install: str | None = None,
    prompts: Mapping[str, str] | None = None,
) -> TowerEncoder:
    """A Florence-2, or the tower of a Florence-VL; see `load_encoder_of`.

    Args:
        name: Registered name.
        weights: Folder, or hub id of weights that were downloaded before.
        features: `davit` and prompt names.
        size: Side of the square input in pixels.
        fit: `squash`, `pad` or `crop`.
        install: Command that installs the weights.
        prompts: More prompts by feature name; tokenized with the weights' own tokenizer.
    """
    with local_weights(name, weights, install):
        folder = local_folder(weights)
        raw = read_config(folder, "vision")
    if raw.model_type not in ("florence2", "florence_vl"):
        raise ValueError(f"{name}: {weights} is a {raw.model_type!r}, neither a Florence-2 nor a Florence-VL")
    if raw.model_type == "florence_vl":
        if prompts:
            raise ValueError(f"{name}: a Florence-VL has its own prompts; more prompts are not supported")
        tower = florence_vl_tower(name, Path(folder), raw, features)
        known: dict[str, list[int]] = dict(raw.prompt_token_ids or {})
    else:
        prompts = dict(prompts or {})
        tokenize = prompt_tokenizer(folder)
        chosen = florence2_features(raw, tuple(features) or DBFUSION_FEATURES, prompts, tokenize)
        every = [DAVIT, *FLORENCE2_PROMPTS, *prompts]
        known = florence2_features(raw, every, prompts, tokenize)["prompt_token_ids"]
        tower = Florence2Tower(FlorenceVLConfig(vision_config=raw, **chosen))
        load_tower_weights(tower, folder)
    settings = {
        # includes every prompt of these weights, used or not, so that subsets of the features share one cache
        "prompts": identity_digest({prompt: list(ids) for prompt, ids in known.items()}),
        "prompt_padding": tower.config.prompt_padding,
        "prompt_length": tower.config.prompt_length,
        "mean_token": tower.config.mean_token,
    }
    return TowerEncoder(name, tower, published_preprocess(folder, 768, size, fit), settings)


def florence_vl_tower(name: str, folder: Path, config: FlorenceVLConfig, features: Sequence[str]) -> Florence2Tower:
    """The tower of a saved Florence-VL, fp32, without loading its LLM.

    Raises:
        ValueError: The model has another tower, or the feature does not exist.
    """
    if config.tower != "florence2":
        raise ValueError(f"{name}: the tower of {folder} is {config.tower!r}; use backbone=FOLDER with its backbone")
    known = [DAVIT, *(config.prompt_token_ids or {})]
    for feature in features:
        if feature not in known:
            raise ValueError(f"{name}: {folder} has no feature {feature!r}. {did_you_mean(feature, known)}")
    fields: dict[str, Any] = config.to_dict()
    fields["features"] = list(features or config.features or ())
    if fields["mean_token"] == "all":
        fields["mean_token"] = "grid"  # the same grid tokens, without the mean token, which has no position
    for key in ("model_type", "architectures", "dtype", "transformers_version"):
        fields.pop(key, None)
    tower = Florence2Tower(FlorenceVLConfig(**fields))
    state = read_tensors(folder, "model.vision_tower.")
    if tower.encoder is None:
        state = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    tower.load_state_dict(state)
    return tower.float()


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a saved model with a prefix, without loading the others.

    Raises:
        ValueError: The folder contains no safetensors, or none with the prefix.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    state: dict[str, Tensor] = {}
    for file in names or ["model.safetensors"]:
        if not (folder / file).is_file():
            raise ValueError(f"{folder} is incomplete: {file} is missing")
        with safe_open(str(folder / file), "pt") as tensors:
            found = [key for key in tensors.keys() if key.startswith(prefix)]  # noqa: SIM118
            state.update((key.removeprefix(prefix), tensors.get_tensor(key)) for key in found)
    if not state:
        raise ValueError(f"{folder} contains no tensor named {prefix}*")
    return state


def load_backbone(
    name: str,
    weights: str | Path,
    features: Sequence[str] = (),
    size: int | None = None,
    fit: str | None = None,
    install: str | None = None,
) -> BackboneEncoder:
    """The vision part of a transformers model; see `load_encoder_of`."""
    with local_weights(name, weights, install):
        config = read_config(weights, "vision", local_files_only=True)
        vision = vision_part(config)
        if not hasattr(vision, "patch_size") or not hasattr(vision, "num_hidden_layers"):
            raise ValueError(
                f"{name}: {weights} is a {config.model_type!r}, not a vision transformer with patches and hidden "
                "layers (CLIP, SigLIP, DINOv2, ViT ...)"
            )
        chosen = tuple(features) or ("last",)
        layers = {feature: layer_index(name, feature, vision.num_hidden_layers) for feature in chosen}
        tower = BackboneTower(
            FlorenceVLConfig(vision_config=vision, tower="backbone", feature_layers=layers, features=chosen)
        )
        load_tower_weights(tower, weights, local_files_only=True)
    return BackboneEncoder(
        name, tower, published_preprocess(weights, int(getattr(vision, "image_size", 224)), size, fit)
    )


def layer_index(name: str, feature: str, depth: int) -> int:
    """Index into the hidden states for a feature's name; `last` is the last one.

    Raises:
        ValueError: The feature or layer does not exist.
    """
    known = ["last", *(f"layer{i}" for i in range(depth + 1))]
    if feature not in known:
        near = (
            did_you_mean(feature, known) if re.fullmatch(r"\D+", feature) else f"Known: last, layer0 ... layer{depth}."
        )
        raise ValueError(f"{name} has no feature {feature!r}. {near}")
    return -1 if feature == "last" else int(feature.removeprefix("layer"))


def local_folder(weights: str | Path) -> str:
    """The local folder of weights: itself, or the hub's cached snapshot.

    Raises:
        OSError: Neither exists.
    """
    if Path(weights).is_dir():
        return str(weights)
    from huggingface_hub import snapshot_download

    return snapshot_download(str(weights), local_files_only=True)


@contextmanager
def local_weights(name: str, weights: str | Path, install: str | None = None) -> Iterator[None]:
    """Convert transformers' errors about missing files to one line with the download command."""
    text = str(weights)
    is_folder = Path(text).is_dir()
    if not is_folder and (text.count("/") != 1 or text.startswith((".", "/", "~"))):
        raise missing(name, f"the folder {text!r} does not exist", install or "hf download OWNER/NAME")
    try:
        yield
    except OSError as error:
        if is_folder:
            raise ValueError(f"{name}: {text} can't be loaded: {str(error).splitlines()[0]}") from error
        raise missing(name, f"{text} is not on this machine", install or f"hf download {text}") from None


def published_preprocess(
    weights: str | Path,
    default_size: int,
    size: int | None = None,
    fit: str | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Preprocess:
    """Size, mean and standard deviation from the weights' own preprocessing file, if there is one."""
    own = read_preprocessing(weights, local_files_only=True)
    side = size or own.size or default_size
    mean, std = own.mean or mean, own.std or std
    return Preprocess(side, side, mean, std, fit or "squash")


def _register_hub() -> None:
    listed = yaml.safe_load(files("florence_vl.analyze.encoders").joinpath("hub.yaml").read_text(encoding="utf-8"))
    for name, hub_name in listed.items():
        factory = partial(load_encoder_of, name, hub_name)
        kind = "Florence-2, or the tower of a Florence-VL" if name.startswith("florence2") else "vision transformer"
        needs = f"{name}=FOLDER" if hub_name is None else "from a folder or from the hub's local cache"
        factory.__doc__ = f"{hub_name or 'Any ' + kind}, {needs}."
        ENCODERS.register(name)(factory)


_register_hub()


@ENCODERS.register("florence2_mini")
def florence2_mini(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> VisionEncoder:
    """The mini Florence-2 of the package florence-vl-mini: trained on synthetic scenes, offline."""
    if weights is None:
        try:
            weights = resolve("mini", "vision")
        except FileNotFoundError as error:
            raise MissingWeights(f"florence2_mini: {error}") from None
    return load_florence2("florence2_mini", weights, features, size, fit)
