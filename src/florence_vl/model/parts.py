"""Read the pretrained parts of a model: config, preprocessing, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Florence2ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from florence_vl.files import locate, read_json
from florence_vl.model.contract import load_whole
from florence_vl.model.towers import BackboneTower, Florence2Tower, VisionTower

DEFAULT_IMAGE_SIZE = 768  # pixels per side, released Florence-2 weights


def read_config(path: str | Path, kind: str, **options: Any) -> PreTrainedConfig:
    """Config of a folder or hub id.

    Args:
        path: Folder or hub id.
        kind: "vision" or "LLM", for error messages.
        **options: Keyword arguments of `AutoConfig.from_pretrained`, e.g. `local_files_only`.

    Raises:
        ValueError: The folder has no config.json or a damaged one, or is a Florence-2 in Microsoft's layout.
        FileNotFoundError: Neither the folder nor the hub id exists.
    """
    where = locate(path, f"{kind} model")
    if isinstance(where, Path):
        file = where / "config.json"
        if not file.is_file():
            raise ValueError(f"{where} is not a {kind} model: it has no config.json")
        raw = read_json(file)
        if "auto_map" in raw and raw.get("model_type") == "florence2":
            raise ValueError(
                f"{where} is a Florence-2 in Microsoft's remote-code layout. Convert it first: "
                f"florence-vl convert {where} {where}-converted"
            )
    try:
        return AutoConfig.from_pretrained(str(where), trust_remote_code=False, **options)
    except OSError as error:
        raise FileNotFoundError(f"no {kind} model {str(path)!r}: not a local folder, not found on the hub") from error


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the vision model: the whole config of a Florence-2, the vision part of CLIP and SigLIP."""
    return config if config.model_type == "florence2" else getattr(config, "vision_config", config)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a vision model, from its files; None for missing values.

    Attributes:
        size: Pixels per side.
        mean: Mean of each channel, after scaling to [0, 1].
        std: Standard deviation of each channel.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_preprocessing(vision: str | Path, **options: Any) -> Preprocessing:
    """Preprocessing of a folder or hub id; empty if it has no such file.

    Args:
        vision: Folder or hub id.
        **options: Keyword arguments of `from_pretrained`, e.g. `local_files_only`.

    Raises:
        ValueError: The file is damaged.
    """
    whole, own = (_read_if_there(vision, f"{name}_config.json", **options) for name in ("processor", "preprocessor"))
    raw = whole.get("image_processor") or own
    size = raw.get("crop_size") if raw.get("do_center_crop") else raw.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    mean, std = (tuple(raw[key]) if raw.get(key) else None for key in ("image_mean", "image_std"))
    return Preprocessing(size, mean, std)


def _find(folder: str | Path, name: str, **options: Any) -> str | None:
    """Path of a file of a folder or hub id, which is downloaded; None if there is none."""
    return cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **options)


def _read_if_there(folder: str | Path, name: str, **options: Any) -> dict[str, Any]:
    file = _find(folder, name, **options)
    return {} if file is None else read_json(file)


def image_size(vision: str | Path | None, config: PreTrainedConfig) -> int:
    """Pixels per side of a vision model: from its preprocessing, its config, or Florence-2's default."""
    own = read_preprocessing(vision).size if vision is not None else None
    return own or getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE


def prompt_tokenizer(vision: str | Path) -> Callable[[str], list[int]] | None:
    """Function from text to ids with a Florence-2's own tokenizer; None if it has none.

    Raises:
        ValueError: Its files are damaged.
    """
    if not any(_find(vision, name) for name in ("tokenizer.json", "vocab.json")):
        return None  # transformers would make one without a vocabulary
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(vision), trust_remote_code=False)
    except Exception as error:  # readers of several formats raise many types
        raise ValueError(f"the tokenizer of {vision} is damaged ({error}): download its files again") from error
    return lambda text: tokenizer(text)["input_ids"]


def load_tower_weights(tower: VisionTower, vision: str | Path, **options: Any) -> None:
    """Copy the weights of a Florence-2, or of a vision backbone, into a tower.

    Args:
        tower: A tower with allocated storage; keeps its dtype and device.
        vision: Folder or hub id.
        **options: Keyword arguments of `from_pretrained`, e.g. `local_files_only`.

    Raises:
        ValueError: Weights are missing or do not fit the tower.
    """
    if isinstance(tower, Florence2Tower):
        unused = r"language_model\.decoder\.|^lm_head\."  # missing in a tower that `florence-vl convert` extracted
        source = load_whole(Florence2ForConditionalGeneration, vision, unused, dtype=torch.float32, **options).model
        tower.davit.load_state_dict(source.vision_tower.state_dict())
        tower.image_projector.load_state_dict(source.multi_modal_projector.state_dict())
        if tower.encoder is not None:
            tower.encoder.load_state_dict(source.language_model.encoder.state_dict())
    else:
        assert isinstance(tower, BackboneTower)
        source = load_whole(
            AutoModel,
            vision,
            unused=r"(^|\.)pooler\.",  # ViT's pooler, missing in checkpoints of classifiers
            config=tower.config.vision_config,
            dtype=torch.float32,
            **options,
        )
        tower.backbone.load_state_dict(source.state_dict())


def load_llm(path: str | Path, dtype: str | torch.dtype, weights: bool = True) -> tuple[Any, PreTrainedModel]:
    """Tokenizer and model of a decoder LLM.

    Args:
        path: Folder, hub id or `.gguf` file.
        dtype: Of the weights; `auto` is the LLM's own, and float32 for a gguf.
        weights: False gives a model on the meta device and reads no weights (but for a gguf).

    Raises:
        ValueError: The model is not a decoder LLM, or its head is more than a linear layer.
        FileNotFoundError: The file or folder does not exist.
    """
    where = locate(path, "LLM")
    options: dict[str, Any] = {"dtype": dtype}
    config: Any = None
    tokenizer_options: dict[str, Any] = {}
    if isinstance(where, Path) and where.suffix == ".gguf":
        from transformers import GgufConfig

        # Without dequantize=True the model is treated as quantized and cannot be trained or saved.
        tokenizer_options = {"gguf_file": where.name}
        options = {**tokenizer_options, "quantization_config": GgufConfig(dequantize=True)}
        options["dtype"] = torch.float32 if dtype == "auto" else dtype
        where = where.parent
    else:
        config = read_config(path, "LLM")
        if config.is_encoder_decoder or getattr(config, "model_type", "") == "florence_vl":
            raise ValueError(f"{path} is a {config.model_type}, not a decoder LLM")
    tokenizer = AutoTokenizer.from_pretrained(str(where), trust_remote_code=False, **tokenizer_options)
    if config is not None and not weights:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    else:
        model = load_whole(AutoModelForCausalLM, where, **options)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the head of {path} is {head}; Florence-VL needs a linear layer without bias")
    return tokenizer, model
