"""The pretrained parts of a model: their configs, their own preprocessing, their weights. One reader for each."""

from __future__ import annotations

import json
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

from florence_vl.files import locate
from florence_vl.model.contract import load_whole
from florence_vl.model.towers import BackboneTower, Florence2Tower, VisionTower

DEFAULT_IMAGE_SIZE = 768  # pixels a side, of the released Florence-2 weights


def read_config(path: str | Path, kind: str, **options: Any) -> PreTrainedConfig:
    """Config of a model's folder or hub id.

    Args:
        path: Folder or hub id.
        kind: "vision" or "LLM", for the error texts.
        **options: Keywords of `AutoConfig.from_pretrained`, e.g. `local_files_only`.

    Raises:
        ValueError: A folder without config.json, or a Florence-2 in Microsoft's layout.
        FileNotFoundError: No such folder, and the hub gave none.
    """
    where = locate(path, f"{kind} model")
    if isinstance(where, Path):
        file = where / "config.json"
        if not file.is_file():
            raise ValueError(f"{where} is not a {kind} model: it has no config.json")
        raw = json.loads(file.read_text(encoding="utf-8"))
        if "auto_map" in raw and raw.get("model_type") == "florence2":
            raise ValueError(
                f"{where} is a Florence-2 in Microsoft's remote-code layout. Convert it first: "
                f"florence-vl convert {where} {where}-converted"
            )
    try:
        return AutoConfig.from_pretrained(str(where), trust_remote_code=False, **options)
    except OSError as error:
        raise FileNotFoundError(f"no {kind} model {str(path)!r}: no such folder here, and the hub gave none") from error


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the vision model: a Florence-2's is whole, of CLIP and SigLIP only the vision part counts."""
    return config if config.model_type == "florence2" else getattr(config, "vision_config", config)


@dataclass(frozen=True)
class Preprocessing:
    """What a vision model's own preprocessing file says; None where it says nothing.

    Attributes:
        size: Pixels a side.
        mean: Of each channel, after scaling to 0 to 1.
        std: Standard deviation of each channel.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_preprocessing(vision: str | Path, **options: Any) -> Preprocessing:
    """The preprocessing of a vision model's folder or hub id.

    Args:
        vision: Folder or hub id.
        **options: As of `from_pretrained`, e.g. `local_files_only`.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        raw, _ = ImageProcessingMixin.get_image_processor_dict(str(vision), **options)
    except OSError:
        return Preprocessing()
    size = raw.get("crop_size") if raw.get("do_center_crop") else raw.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    mean, std = (tuple(raw[key]) if raw.get(key) else None for key in ("image_mean", "image_std"))
    return Preprocessing(size, mean, std)


def image_size(vision: str | Path | None, config: PreTrainedConfig) -> int:
    """Pixels a side that a vision model works at: its preprocessing's, else its config's, else Florence-2's."""
    own = read_preprocessing(vision).size if vision is not None else None
    return own or getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE


def prompt_tokenizer(vision: str | Path) -> Callable[[str], list[int]] | None:
    """Text -> ids by a Florence-2's own tokenizer; None where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(vision), trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return lambda text: tokenizer(text)["input_ids"]


def load_tower_weights(tower: VisionTower, vision: str | Path, **options: Any) -> None:
    """Copy the weights of a Florence-2, or of a vision backbone, into a tower.

    Args:
        tower: With storage; keeps its dtype and device.
        vision: Folder or hub id.
        **options: As of `from_pretrained`, e.g. `local_files_only`.

    Raises:
        ValueError: Weights are missing or do not fit the tower.
    """
    if isinstance(tower, Florence2Tower):
        source = load_whole(Florence2ForConditionalGeneration, vision, dtype=torch.float32, **options).model
        tower.davit.load_state_dict(source.vision_tower.state_dict())
        tower.image_projector.load_state_dict(source.multi_modal_projector.state_dict())
        if tower.encoder is not None:
            tower.encoder.load_state_dict(source.language_model.encoder.state_dict())
    else:
        assert isinstance(tower, BackboneTower)
        source = load_whole(
            AutoModel,
            vision,
            unused=r"(^|\.)pooler\.",  # ViT's, which checkpoints of classifiers lack
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
        ValueError: Not a decoder LLM, or one whose head is more than a linear layer.
        FileNotFoundError: Nothing is there.
    """
    where = locate(path, "LLM")
    options: dict[str, Any] = {"dtype": dtype}
    config: Any = None
    tokenizer_options: dict[str, Any] = {}
    if isinstance(where, Path) and where.suffix == ".gguf":
        from transformers import GgufConfig

        # Without dequantize=True the model counts as quantized and can neither be trained nor saved.
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
