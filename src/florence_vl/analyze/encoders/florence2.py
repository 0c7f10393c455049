"""Florence-2 as Florence-VL asks it: DaViT's features and the encoder's, one set a prompt, through the training tower.

Features: `davit`, and any prompt's name (`caption`, `ocr`, `grounding`, ...). Weights: a Florence-2 in transformers'
layout (`florence-vl convert` makes one of Microsoft's), or a trained Florence-VL, whose tower it takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence_vl.analyze.encoders.backbone import local_weights, published_preprocess
from florence_vl.analyze.encoders.base import Encoder, Preprocess, digest, missing
from florence_vl.analyze.encoders.registry import ENCODERS
from florence_vl.model.assemble import florence2_features, read_config
from florence_vl.model.configuration import DAVIT, DBFUSION_FEATURES, FLORENCE2_PROMPTS, FlorenceVLConfig
from florence_vl.model.towers import Florence2Tower
from florence_vl.registry import did_you_mean

MINI_INSTALL = "pip install florence-vl-mini"


class Florence2Encoder(Encoder):
    """Grid tokens of a Florence-2 tower.

    Args:
        name: Registered name.
        tower: The tower, with the features that are wanted.
        preprocess: How pictures become its input.
        prompt_ids: Token ids of every prompt that these weights know, used or not: part of the identity, so that the
            caches of two subsets of features are one.
    """

    def __init__(
        self, name: str, tower: Florence2Tower, preprocess: Preprocess, prompt_ids: Mapping[str, Sequence[int]]
    ) -> None:
        config = tower.config
        settings = {
            "prompts": digest({prompt: list(ids) for prompt, ids in prompt_ids.items()}),
            "prompt_padding": config.prompt_padding,
            "prompt_length": config.prompt_length,
            "mean_token": config.mean_token,
        }
        super().__init__(name, tower, preprocess, tower.feature_names, settings)
        self.tower = tower
        self.grid()  # refuses a size that the tower can't take

    @property
    def feature_dims(self) -> dict[str, int]:
        return self.tower.feature_dims

    def grid(self) -> tuple[int, int]:
        height, width = self.preprocess.height, self.preprocess.width
        try:
            self.tower.num_tokens(height, width)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return self.tower.grid_size(height, width)

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self.tower(pixel_values)


def load_florence2(
    name: str,
    weights: str | Path,
    features: Sequence[str] = (),
    size: int | None = None,
    fit: str | None = None,
    prompts: Mapping[str, str] | None = None,
    install: str | None = None,
) -> Florence2Encoder:
    """Load a Florence-2, or the tower of a Florence-VL.

    Args:
        name: Registered name.
        weights: Folder, or hub name of weights that were downloaded before.
        features: `davit` and prompt names; the four of the paper, or the Florence-VL's own, when empty.
        size: Side of the square input; the weights' own when None.
        fit: `squash`, `pad` or `crop`.
        prompts: More prompts by feature name; tokenized with the weights' own tokenizer.
        install: Command that gets the weights, for the error.

    Raises:
        MissingWeights: They are not on this machine.
        ValueError: Not a Florence-2 or Florence-VL, Microsoft's layout (convert it), or an unknown feature.
    """
    with local_weights(name, weights, install):
        raw = read_config(resolve(weights), "vision")
    if raw.model_type == "florence_vl":
        if prompts:
            raise ValueError(f"{name}: a Florence-VL brings its own prompts; more can't be given")
        return _of_florence_vl(name, Path(resolve(weights)), raw, features, size, fit)
    if raw.model_type != "florence2":
        raise ValueError(f"{name}: {weights} is a {raw.model_type!r}, neither a Florence-2 nor a Florence-VL")
    from transformers import Florence2ForConditionalGeneration

    prompts = dict(prompts or {})
    chosen = florence2_features(resolve(weights), raw, tuple(features) or DBFUSION_FEATURES, prompts)
    known = florence2_features(resolve(weights), raw, [DAVIT, *FLORENCE2_PROMPTS, *prompts], prompts)
    config = FlorenceVLConfig(vision_config=raw, **chosen)
    source = Florence2ForConditionalGeneration.from_pretrained(resolve(weights), dtype=torch.float32)
    tower = Florence2Tower(config)
    tower.davit.load_state_dict(source.model.vision_tower.state_dict())
    tower.image_projector.load_state_dict(source.model.multi_modal_projector.state_dict())
    if tower.encoder is not None:
        tower.encoder.load_state_dict(source.model.language_model.encoder.state_dict())
    preprocess = published_preprocess(resolve(weights), 768, size, fit)
    return Florence2Encoder(name, tower, preprocess, known["prompt_token_ids"])


def resolve(weights: str | Path) -> str:
    """The local folder of weights: itself, or the hub's cached snapshot.

    Raises:
        OSError: Neither is there.
    """
    if Path(weights).is_dir():
        return str(weights)
    from huggingface_hub import snapshot_download

    return snapshot_download(str(weights), local_files_only=True)


def _of_florence_vl(
    name: str, folder: Path, config: FlorenceVLConfig, features: Sequence[str], size: int | None, fit: str | None
) -> Florence2Encoder:
    if config.tower != "florence2":
        raise ValueError(f"{name}: the tower of {folder} is {config.tower!r}; use backbone=FOLDER with its backbone")
    prompt_ids = dict(config.prompt_token_ids or {})
    known = [DAVIT, *prompt_ids]
    for feature in features:
        if feature not in known:
            raise ValueError(f"{name}: {folder} has no feature {feature!r}. {did_you_mean(feature, known)}")
    fields: dict[str, Any] = config.to_dict()
    fields["features"] = list(features or config.features or ())
    if fields["mean_token"] == "all":
        fields["mean_token"] = "grid"  # the same grid tokens; the mean token belongs to no place
    for key in ("model_type", "architectures", "dtype", "transformers_version"):
        fields.pop(key, None)
    tower = Florence2Tower(FlorenceVLConfig(**fields))
    state = read_tensors(folder, "model.vision_tower.")
    if tower.encoder is None:
        state = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    tower.load_state_dict(state)
    return Florence2Encoder(name, tower.float(), published_preprocess(folder, 768, size, fit), prompt_ids)


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a saved model under a prefix, without loading the rest.

    Raises:
        ValueError: The folder holds no safetensors, or none under the prefix.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    state: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder} is incomplete: {file} is not there")
        with safe_open(str(folder / file), "pt") as tensors:
            names = [key for key in tensors.keys() if key.startswith(prefix)]  # noqa: SIM118
            state.update((key.removeprefix(prefix), tensors.get_tensor(key)) for key in names)
    if not state:
        raise ValueError(f"{folder} holds no tensor named {prefix}*")
    return state


@ENCODERS.register("florence2")
def florence2(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> Encoder:
    """Any Florence-2, or the tower of a Florence-VL: `florence2=FOLDER:davit+caption`."""
    if weights is None:
        raise ValueError("the encoder 'florence2' needs weights: florence2=FOLDER, or use florence2_large or _base")
    return load_florence2("florence2", weights, features, size, fit)


@ENCODERS.register("florence2_large")
def florence2_large(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> Encoder:
    """Florence-2-large-ft, the paper's encoder, in transformers' layout, at 768 px."""
    return load_florence2("florence2_large", weights or "florence-community/Florence-2-large-ft", features, size, fit)


@ENCODERS.register("florence2_base")
def florence2_base(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> Encoder:
    """Florence-2-base-ft in transformers' layout, at 768 px."""
    return load_florence2("florence2_base", weights or "florence-community/Florence-2-base-ft", features, size, fit)


@ENCODERS.register("florence2_mini")
def florence2_mini(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> Encoder:
    """The mini Florence-2 that comes with florence-vl-mini: trained on composed scenes, offline."""
    if weights is None:
        try:
            import florence_vl_mini
        except ImportError:
            raise missing("florence2_mini", "florence-vl-mini is not installed", MINI_INSTALL) from None
        try:
            weights = str(florence_vl_mini.florence2_path())
        except FileNotFoundError as error:
            raise missing("florence2_mini", str(error).split(":")[0], "florence-vl mini train-florence2") from None
    return load_florence2("florence2_mini", weights, features, size, fit)
