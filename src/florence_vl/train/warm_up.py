"""Warm-up: the projector learns to put an image where its caption lies among the LLM's word vectors, without the LLM.

A projector that starts from random numbers costs most of a short first stage. Contrastive warm-up on cached features
takes seconds: image tokens, averaged, against the averaged input embeddings of the caption's tokens.
Shape letters: I images, N tokens an image, D features, H width of the LLM.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from florence_vl.analyze.alignment import Groups, contrastive_loss
from florence_vl.data.records import BadRecord, caption_of
from florence_vl.model.image_processing import open_image

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.data.mixture import Mixture
    from florence_vl.data.records import ImageSource
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor
    from florence_vl.train.config import Recipe

TEMPERATURE = 0.07  # CLIP's initial one (arXiv 2103.00020)


@torch.inference_mode()
def cache_features(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    images: Iterable[Image.Image],
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The tower's features of all images by name, (I, N, D) each, on the tower's device.

    Args:
        model: Whose tower.
        processor: Its processor.
        images: Opened one batch at a time, so a generator holds few of them in memory.
        batch_size: Images of a forward pass.
        progress: Hears how many are done.
    """
    place = next(model.model.vision_tower.parameters())
    parts: dict[str, list[Tensor]] = {}
    left, done = iter(images), 0
    while batch := list(itertools.islice(left, batch_size)):
        pixels = processor.image_processor(batch, return_tensors="pt")
        features = model.model.vision_tower(pixels["pixel_values"].to(place.device, place.dtype))
        for name, value in features.items():
            parts.setdefault(name, []).append(value)
        done += len(batch)
        if progress is not None:
            progress(done)
    return {name: torch.cat(values).clone() for name, values in parts.items()}


@torch.inference_mode()
def caption_vectors(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, captions: Sequence[str]
) -> Tensor:
    """Mean input embedding of each caption's tokens, (I, H)."""
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    rows = [processor.tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"] for text in captions]
    return torch.stack([table[torch.tensor(ids, device=table.device)].mean(0) for ids in rows]).clone()


@torch.no_grad()
def standardise_input(model: FlorenceVLForConditionalGeneration, features: dict[str, Tensor]) -> None:
    """Make the projector's first layer see each fused channel with mean 0 and variance 1 over these images.

    Scale and shift are folded into its weights (data-dependent initialisation, arXiv 1511.06422), so what differs from
    image to image is not drowned by what is the same in all.
    """
    first = cast(nn.Linear, model.model.multi_modal_projector.layers[0])
    fused_INC: Tensor = model.model.fusion(features)
    mean_C, deviation_C = fused_INC.mean((0, 1)), fused_INC.std((0, 1))
    scale_C = 1 / (deviation_C + 1e-3 * deviation_C.max().clamp(min=1e-6))
    first.bias.sub_(first.weight @ (mean_C * scale_C))
    first.weight.mul_(scale_C)


def warm_up(
    model: FlorenceVLForConditionalGeneration,
    features: dict[str, Tensor],
    targets_IH: Tensor,
    seconds: float | None = None,
    steps: int | None = None,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train fusion and projector, the rest untouched, and leave what trains as it was.

    The projector's first layer is standardised first. The loss is InfoNCE over the batch in both directions, half
    for a picture's mean token and half for one of its tokens at random (so that each says something), plus the
    squared distance to the target measured in the targets' own variance, plus the squared log ratio of the mean squared
    sizes of image tokens and word vectors: an LLM that was never shown larger vectors answers them with noise.

    Args:
        model: Its fusion and projector are changed.
        features: `cache_features`.
        targets_IH: `caption_vectors` of the same images.
        seconds: Time budget; at least one step is done.
        steps: Number of steps; of the two the one that ends first counts, and one must be given.
        batch_size: Images of a step; captions that repeat in it are not each other's negatives.
        lr: Peak learning rate of AdamW, cosine to zero over the budget.
        seed: Of the order and of the tokens that are drawn.

    Returns:
        A row a step: `step`, `loss`, `seconds`.

    Raises:
        ValueError: Neither `seconds` nor `steps`.
    """
    if seconds is None and steps is None:
        raise ValueError("a warm-up needs seconds or steps")
    projector = nn.ModuleList([model.model.fusion, model.model.multi_modal_projector])
    standardise_input(model, features)
    wanted = {name: parameter.requires_grad for name, parameter in projector.named_parameters()}
    for parameter in projector.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.01)
    centre_H = targets_IH.mean(0)
    variance = (targets_IH - centre_H).square().mean()
    words: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    word_size = words.detach().square().sum(-1).mean()
    unit_IH = nn.functional.normalize(targets_IH - centre_H, dim=-1)
    captions_I = torch.unique(targets_IH, dim=0, return_inverse=True)[1]
    groups = Groups(captions_I, torch.arange(len(captions_I), device=captions_I.device))
    draws = torch.Generator().manual_seed(seed)
    order = _epochs(len(targets_IH), min(batch_size, len(targets_IH)), seed)
    rows: list[dict[str, float]] = []
    began = time.monotonic()
    while True:
        spent = max(
            (time.monotonic() - began) / seconds if seconds is not None else 0.0,
            len(rows) / steps if steps is not None else 0.0,
        )
        if rows and spent >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (len(rows) + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * spent))
        index = next(order)
        fused = model.model.fusion({name: value[index] for name, value in features.items()})
        tokens_BNH = model.model.multi_modal_projector(fused)
        pooled_BH = tokens_BNH.mean(1)
        places_B = torch.randint(tokens_BNH.shape[1], (len(index),), generator=draws)
        single_BH = tokens_BNH[torch.arange(len(index)), places_B]
        text_BH, same = unit_IH[index], groups[index].targets()
        loss = torch.zeros((), device=tokens_BNH.device)
        for vectors_BH in (pooled_BH, single_BH):
            vision_BH = nn.functional.normalize(vectors_BH - centre_H, dim=-1)
            loss = loss + contrastive_loss(vision_BH, text_BH, same, TEMPERATURE, symmetric=True) / 2
        distance = (pooled_BH - targets_IH[index]).square().mean() / variance
        optimizer.zero_grad()
        size = (tokens_BNH.square().sum(-1).mean() / word_size).log().square()
        (loss + distance + size).backward()
        optimizer.step()
        rows.append({"step": len(rows) + 1, "loss": loss.item(), "seconds": time.monotonic() - began})
    for name, parameter in projector.named_parameters():
        parameter.requires_grad_(wanted[name])
        parameter.grad = None
    return rows


def warm_up_for(
    recipe: Recipe,
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    records: Mixture,
    device: torch.device,
) -> list[dict[str, float]]:
    """The warm-up that a recipe asks for, on the first records that show one image and have a caption.

    Args:
        recipe: Its `warm_up` and `seed`.
        model: Whole; tower, fusion, projector and word vectors visit `device` meanwhile.
        processor: The model's.
        records: The recipe's data.
        device: Where to compute.

    Returns:
        A row a step, as `warm_up`.

    Raises:
        ValueError: Fewer than two records have an image and a caption.
    """
    config = recipe.warm_up
    assert config is not None
    pairs: list[tuple[ImageSource, str]] = []
    for index in range(len(records)):
        if len(pairs) == config.pairs:
            break
        try:
            found = caption_of(records[index])
        except BadRecord:
            continue  # counted where it is trained on
        if not isinstance(found, str):
            pairs.append(found)
    if len(pairs) < 2:
        raise ValueError(f"warm_up: of {len(records)} records {len(pairs)} show one image and have a caption; 2 needed")
    visitors = [model.model.vision_tower, model.model.fusion, model.model.multi_modal_projector]
    visitors.append(model.get_input_embeddings())
    home = next(visitors[0].parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for module in visitors:
            module.to(device)
        features = cache_features(model, processor, (open_image(source) for source, _ in pairs))
        targets = caption_vectors(model, processor, [caption for _, caption in pairs])
        return warm_up(
            model, features, targets, steps=config.steps, batch_size=config.batch_size, lr=config.lr, seed=recipe.seed
        )
    finally:
        for module in visitors:
            module.to(home)
        for module, training in modes.items():
            module.training = training


def _epochs(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = random.Random(seed)
    while True:
        order = generator.sample(range(count), count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield torch.tensor(order[start : start + batch_size])
