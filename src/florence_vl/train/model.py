"""The recipe's model: a saved one or a new one of its parts, with the attention that its rows ask for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from florence_vl.model import loading
from florence_vl.model.varlen_attention import SDPA_VARLEN
from florence_vl.train.config import Recipe

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration


def load_model(recipe: Recipe) -> tuple[FlorenceVLForConditionalGeneration, Any]:
    """The recipe's model and processor, fp32: loaded from `model.path`, or assembled from `model.build`.

    Raises:
        ValueError: The recipe names none, or a part can't be used.
        FileNotFoundError: The folder isn't there.
    """
    config = recipe.model
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.path is not None:
        model, processor = loading.load_model(config.path, "cpu", "float32", **options)
    elif config.build is not None:
        from florence_vl.model.assemble import build_model

        model, processor = build_model(config.build, dtype="float32", seed=recipe.seed)
        if options:
            model.set_attn_implementation(config.attn_implementation)
    else:
        raise ValueError("the recipe names no model: set model.path (a saved one) or model.build (its parts)")
    images = processor.image_processor
    if config.image_aspect_ratio is not None:
        images.image_aspect_ratio = config.image_aspect_ratio
    if config.image_size is not None:
        images.size = type(images.size)(height=config.image_size, width=config.image_size)
        model.num_image_tokens(config.image_size, config.image_size)  # refuses sizes that the tower can't take
    if config.feature_store is not None:
        from florence_vl.model.features import store_features

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("model.feature_store is for training in one process; leave it out")
        store_features(model, config.feature_store)
    return model, processor


def check_attention(names: Iterable[str | None], device: torch.device) -> None:
    """Refuse attention that can't train on a device.

    Raises:
        ValueError: flex attention on a CPU, which has no backward pass there.
    """
    if "flex_attention" in names and device.type == "cpu":
        raise ValueError(
            "model.attn_implementation flex_attention has no backward pass on a CPU. Leave the key out (packed rows "
            "then use sdpa_varlen), or name sdpa"
        )


def choose_attention(model: FlorenceVLForConditionalGeneration, recipe: Recipe, device: torch.device) -> None:
    """Give the LLM `sdpa_varlen` for packed rows on a CPU, unless the recipe names a backend or compiles the LLM.

    Raises:
        ValueError: As `check_attention`.
    """
    text = model.config.get_text_config()
    check_attention([text._attn_implementation, model.config.vision_config._attn_implementation], device)
    packed = recipe.data.packing.mode == "packed"
    free = recipe.model.attn_implementation is None and not recipe.compile.llm
    if packed and free and device.type == "cpu" and text._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": SDPA_VARLEN})
