"""The recipe's model: a saved one or a new one, with suitable attention for its rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from florence_vl.model import loading
from florence_vl.model.features import tower_features
from florence_vl.model.frozen import eval_mode
from florence_vl.model.pictures import open_image
from florence_vl.model.resolution import set_resolution
from florence_vl.model.varlen_attention import SDPA_VARLEN
from florence_vl.train.config import Recipe

NO_MODEL = "the recipe names no model: set model.path (a saved one) or model.build (its parts)"
PICTURES_FOR_MEANS = 64  # sufficient for a feature's mean over tokens and pictures

if TYPE_CHECKING:
    from florence_vl.data.mixture import Mixture
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration


def load_model(recipe: Recipe) -> tuple[FlorenceVLForConditionalGeneration, Any]:
    """The recipe's model and processor, fp32: loaded from `model.path`, or assembled from `model.build`.

    Raises:
        ValueError: The recipe names no model, or a part is invalid.
        FileNotFoundError: The folder does not exist.
    """
    config = recipe.model
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.path is not None:
        model, processor = loading.load_model(config.path, "cpu", "float32", **options, **config.changes)
    elif config.build is not None:
        from florence_vl.model.assemble import build_model

        model, processor = build_model(config.build, dtype="float32", seed=recipe.seed)
        if config.attn_implementation is not None:
            model.set_attn_implementation(config.attn_implementation)
    else:
        raise ValueError(NO_MODEL)
    set_images(recipe, model, processor)
    if config.feature_store is not None:
        from florence_vl.model.features import store_features

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("model.feature_store is for training in one process; remove it")
        store_features(model, config.feature_store)
    return model, processor


def estimate_fill(
    model: FlorenceVLForConditionalGeneration, processor: Any, records: Mixture, device: torch.device
) -> int:
    """Set the replacements of missing features to their means over the first pictures, if they are still zero.

    Args:
        model: A model with views; the tower is moved to `device` temporarily.
        processor: The model's processor.
        records: The recipe's data.
        device: Device for the computation.

    Returns:
        The number of pictures; 0 if there was nothing to do.

    Raises:
        ValueError: No record has a readable picture.
    """
    fill, tower = model.model.feature_fill, model.model.vision_tower
    if fill is None or any(vector.is_meta or bool(vector.any()) for vector in fill.vectors.values()):
        return 0
    home = next(tower.parameters()).device
    with eval_mode(model):
        try:
            tower.to(device)
            pictures = islice(_pictures(records), PICTURES_FOR_MEANS)
            batches = iter(lambda: list(islice(pictures, 8)), [])
            found = (tower_features(model, processor, batch) for batch in batches)
            return fill.estimate({name: x_BND.to(home) for name, x_BND in features.items()} for features in found)
        finally:
            tower.to(home)


def _pictures(records: Mixture) -> Iterator[Any]:
    for index in range(len(records)):
        with contextlib.suppress(OSError, ValueError):  # bad records are counted during training
            yield from map(open_image, records[index].images[:1])


def set_images(recipe: Recipe, model: FlorenceVLForConditionalGeneration, processor: Any) -> None:
    """Set how the model sees images as the recipe says: sizes, positions, tiles, views and the question."""
    config = recipe.model
    processor.fit(model.config)
    settings: dict[str, Any] = {"aspect": config.image_aspect_ratio, "image_size": config.image_size}
    settings |= {"token_budget": config.token_budget, "positions": config.positions}
    if any(value is not None for value in [*settings.values(), model.config.tiles]):
        set_resolution(model, processor, **settings)


def check_attention(names: Iterable[str | None], device: torch.device) -> None:
    """Check that an attention implementation can train on a device.

    Raises:
        ValueError: flex attention on a CPU, which has no backward pass there.
    """
    if "flex_attention" in names and device.type == "cpu":
        raise ValueError(
            "model.attn_implementation flex_attention has no backward pass on a CPU. Remove the key (packed rows "
            "then use sdpa_varlen), or name sdpa"
        )


def choose_attention(model: FlorenceVLForConditionalGeneration, recipe: Recipe, device: torch.device) -> None:
    """Use `sdpa_varlen` for the LLM's packed rows on a CPU, unless the recipe names a backend or compiles the LLM.

    Raises:
        ValueError: As in `check_attention`.
    """
    text = model.config.get_text_config()
    check_attention([text._attn_implementation, model.config.vision_config._attn_implementation], device)
    packed = recipe.data.packing.mode == "packed"
    free = recipe.model.attn_implementation is None and not recipe.compile.llm
    if packed and free and device.type == "cpu" and text._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": SDPA_VARLEN})
