"""Contrastive warm-up: aligns the projected image tokens with the LLM's word embeddings of their text.

A randomly initialized projector costs most of a short first stage. Contrastive warm-up on cached features takes seconds
and does not run the LLM: averaged image tokens against the averaged input embeddings of a text. The text is the whole
image's caption or, with annotated regions, the text of a box against the tokens in that box (as RegionCLIP aligns
regions, arXiv 2112.09106), so the LLM finds words at their locations from its first step. Of text written in the image
(regions of four points), each of the LLM's tokens is aligned with its own part of the line.
Shape letters: I images, P texts (captions and regions), N tokens of an image, D features, H width of the LLM.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from florence_vl.data.records import BadRecord, caption_of
from florence_vl.model.features import tower_features
from florence_vl.model.frozen import eval_mode
from florence_vl.model.pictures import open_image
from florence_vl.train.contrastive import Groups, contrastive_loss

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.data.mixture import Mixture
    from florence_vl.data.records import ImageSource
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor
    from florence_vl.train.config import Recipe

TEMPERATURE = 0.07  # CLIP's initial temperature (arXiv 2103.00020)
WHOLE = (0.0, 0.0, 1.0, 1.0)
REGION = re.compile(r"([^<>]+)((?:<loc_\d+>){4,})")  # Florence-2's format: two corners, or four points

Point = tuple[float, float]  # x and y, as fractions of the image
Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the image


@dataclass(frozen=True)
class Phrase:
    """Tokens of the LLM and the part of an image that shows their text.

    Attributes:
        tokens: Token ids.
        image: Number of the image.
        box: Location; the whole image for a caption.
    """

    tokens: tuple[int, ...]
    image: int
    box: Box = WHOLE


def parse_regions(answer: str) -> list[tuple[str, list[Point]]]:
    """Texts and points of an answer in Florence-2's region format, `dog<loc_102><loc_31><loc_500><loc_877>`.

    Args:
        answer: Two corners or four points follow each text, in thousandths of width and height, in turn.
    """
    found = []
    for text, places in REGION.findall(answer):
        numbers = [int(n) / 999 for n in re.findall(r"\d+", places)]
        if text.strip():
            found.append((text.strip(), list(zip(numbers[0::2], numbers[1::2], strict=False))))
    return found


def region_phrases(tokenizer: Any, text: str, points: Sequence[Point], image: int) -> list[Phrase]:
    """The phrases of a region: one, or for four points (a line of written text) one for each token of the text.

    Args:
        tokenizer: The LLM's tokenizer; without character offsets (slow tokenizers) a region is always one phrase.
        text: Text of the region.
        points: Two corners, or the corners of a line of text, clockwise from the first letter's upper corner. All
            characters are taken to be equally wide.
        image: Number of the image.
    """
    if len(points) != 4 or not tokenizer.is_fast:
        return [Phrase(text_tokens(tokenizer, text), image, _bounds(points))]
    first_top, last_top, last_bottom, first_bottom = points
    sides = ((first_top, last_top), (first_bottom, last_bottom))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    phrases = []
    for token, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        corners = [_between(*side, index / len(text)) for index in span for side in sides]
        phrases.append(Phrase((token,), image, _bounds(corners)))
    return phrases


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _bounds(points: Sequence[Point]) -> Box:
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def tokens_in_boxes(boxes: Sequence[Box], grid: tuple[int, int], num_tokens: int) -> Tensor:
    """Which image tokens are in each box, (P, N) bool: cells whose center is in it, and the cell of the box's own
    center.

    Args:
        boxes: Boxes in fractions of the image.
        grid: Rows and columns of the tower's grid.
        num_tokens: N; with several grids in a sequence (token fusion) the mask is repeated.

    Raises:
        ValueError: The tokens do not form whole grids (`mean_token: all`).
    """
    rows, columns = grid
    if num_tokens % (rows * columns):
        raise ValueError(f"regions need image tokens that are a grid: {num_tokens} tokens, grid of {rows} x {columns}")
    left, top, right, bottom = torch.tensor(boxes, dtype=torch.float64).view(-1, 4).unbind(1)

    def inside(low: Tensor, high: Tensor, cells: int) -> Tensor:
        centers = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        middle = ((low + high) / 2 * cells).long().clamp(0, cells - 1)
        hit = (low[:, None] <= centers) & (centers <= high[:, None])
        return hit | (torch.arange(cells) == middle[:, None])

    cells_PRC = inside(top, bottom, rows)[:, :, None] & inside(left, right, columns)[:, None, :]
    return cells_PRC.flatten(1).repeat(1, num_tokens // (rows * columns))


def text_tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text inside a sentence."""
    return tuple(tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def text_vectors(model: FlorenceVLForConditionalGeneration, texts: Sequence[tuple[int, ...]]) -> Tensor:
    """Mean input embedding of each text's tokens, (P, H)."""
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return torch.stack([table[torch.tensor(ids, device=table.device)].mean(0) for ids in texts]).clone()


@torch.no_grad()
def standardize_input(model: FlorenceVLForConditionalGeneration, features: dict[str, Tensor]) -> None:
    """Standardize the fused channels over these images in the projector's first layer.

    Scale and shift are folded into its weights (data-dependent initialization, arXiv 1511.06422), so that differences
    between images are not dominated by what all images have in common.
    """
    first = cast(nn.Linear, model.model.multi_modal_projector.layers[0])
    images = len(next(iter(features.values())))
    fused_INC: Tensor = model.model.fusion(features, model.model.no_question(images))
    mean_C, deviation_C = fused_INC.mean((0, 1)), fused_INC.std((0, 1))
    scale_C = 1 / (deviation_C + 1e-3 * deviation_C.max().clamp(min=1e-6))
    first.bias.sub_(first.weight @ (mean_C * scale_C))
    first.weight.mul_(scale_C)


class _Objective:
    """The loss of a batch of image tokens against the word embeddings of their texts, see `warm_up`."""

    def __init__(self, targets_PH: Tensor, words_XH: Tensor, inside_PN: Tensor | None, seed: int) -> None:
        self.targets_PH, self.inside_PN = targets_PH, inside_PN
        self.center_H = targets_PH.mean(0)
        self.variance = (targets_PH - self.center_H).square().mean()
        self.word_size = words_XH.detach().square().sum(-1).mean()
        self.unit_PH = nn.functional.normalize(targets_PH - self.center_H, dim=-1)
        texts_P = torch.unique(targets_PH, dim=0, return_inverse=True)[1]
        self.groups = Groups(texts_P, torch.arange(len(texts_P), device=texts_P.device))
        self.draws = torch.Generator().manual_seed(seed)

    def __call__(self, tokens_BNH: Tensor, texts_B: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE, and the squared distance to the targets; both scalars.

        Args:
            tokens_BNH: Tokens of each text's image.
            texts_B: Index of each text.
        """
        share_BN = torch.ones(tokens_BNH.shape[:2]) if self.inside_PN is None else self.inside_PN[texts_B].float()
        places_B = torch.multinomial(share_BN, 1, generator=self.draws)[:, 0]
        share_BN = (share_BN / share_BN.sum(1, keepdim=True)).to(tokens_BNH)
        pooled_BH = torch.einsum("bn,bnh->bh", share_BN, tokens_BNH)
        single_BH = tokens_BNH[torch.arange(len(texts_B)), places_B]
        text_BH, same = self.unit_PH[texts_B], self.groups[texts_B].targets()
        loss = torch.zeros((), device=tokens_BNH.device)
        for vectors_BH in (pooled_BH, single_BH):
            vision_BH = nn.functional.normalize(vectors_BH - self.center_H, dim=-1)
            loss = loss + contrastive_loss(vision_BH, text_BH, same, TEMPERATURE, symmetric=True) / 2
        return loss, (pooled_BH - self.targets_PH[texts_B]).square().mean() / self.variance

    def size(self, tokens_INH: Tensor) -> Tensor:
        """Squared log ratio of the mean squared norms of image tokens and word embeddings, a scalar."""
        return (tokens_INH.square().sum(-1).mean() / self.word_size).log().square()


def warm_up(
    model: FlorenceVLForConditionalGeneration,
    features: dict[str, Tensor],
    targets_PH: Tensor,
    images_P: Tensor | None = None,
    inside_PN: Tensor | None = None,
    *,
    steps: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    new: bool = True,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, float]]:
    """Train fusion and projector; other parts are unchanged, and trainable flags are restored.

    A new projector's first layer is standardized first. The loss is InfoNCE over the batch in both directions, half for
    an image's mean token and half for one of its tokens at random (so that each becomes informative), plus the squared
    distance to the target relative to the targets' variance, plus the squared log ratio of the mean squared norms of
    image tokens and word embeddings: an LLM responds with noise to larger vectors than in its training.

    Args:
        model: Its fusion and projector are changed.
        features: Result of `tower_features`, merged (`FlorenceVLModel.merge_features`).
        targets_PH: Result of `text_vectors`.
        images_P: Index of each text's image; by default the texts are the images' captions in their order.
        inside_PN: `tokens_in_boxes` of each text; by default all tokens.
        steps: Number of steps.
        batch_size: Approximate number of texts per step: images are taken with all their texts, which are each other's
            negatives unless they are equal.
        lr: Peak learning rate of AdamW, after ten steps of linear warm-up; cosine to zero.
        seed: Seed of the order and of the drawn tokens.
        new: Whether the projector was never trained.
        dtype: Type of the projector's matrix products; the losses are computed in float32.
        progress: Called with a progress message after every step.

    Returns:
        One row per step: `step`, `loss` (InfoNCE), `seconds`.
    """
    projector = nn.ModuleList([model.model.fusion, model.model.multi_modal_projector])
    if new:
        standardize_input(model, features)
    wanted = {name: parameter.requires_grad for name, parameter in projector.named_parameters()}
    projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.01)
    words_XH: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    objective = _Objective(targets_PH, words_XH, inside_PN, seed)
    if images_P is None:
        images_P = torch.arange(len(targets_PH))
    numbers = images_P.unique()
    of_image = [(images_P == number).nonzero()[:, 0] for number in numbers]
    share = max(2, round(batch_size * len(numbers) / len(targets_PH)))
    order = _epochs(len(numbers), min(share, len(numbers)), seed)
    rows: list[dict[str, float]] = []
    began = time.monotonic()
    for step, chosen in enumerate(itertools.islice(order, steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 10) * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
        texts = [of_image[int(i)] for i in chosen]
        drawn = {name: value[numbers[chosen]] for name, value in features.items()}
        with torch.autocast(words_XH.device.type, dtype, enabled=dtype != torch.float32):
            fused = model.model.fusion(drawn, model.model.no_question(len(chosen)))
            tokens_INH = model.model.multi_modal_projector(fused).float()
        rows_B = torch.repeat_interleave(torch.tensor([len(own) for own in texts]))
        loss, distance = objective(tokens_INH[rows_B], torch.cat(texts))
        optimizer.zero_grad()
        (loss + distance + objective.size(tokens_INH)).backward()
        optimizer.step()
        rows.append({"step": step, "loss": loss.item(), "seconds": time.monotonic() - began})
        if progress is not None:
            progress(f"warm-up: step {step} of {steps}, loss {loss.item():.2f}")
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
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, float]]:
    """The recipe's warm-up, on the first records with one image and a caption or regions.

    Args:
        recipe: Its `warm_up`, `seed` and `data`.
        model: The complete model; tower, fusion, projector and word embeddings are moved to `device` temporarily.
        processor: The model's processor.
        records: The recipe's data.
        device: Device for the computation.
        progress: Called with progress messages.

    Returns:
        One row per step, as in `warm_up`.

    Raises:
        ValueError: Fewer than two records have an image and a caption, or an image and regions, fewer than two images
            can be opened, or the images' tokens do not form a grid.
    """
    from florence_vl.train.data import build_mixture

    config = recipe.warm_up
    assert config is not None
    tokenizer = processor.tokenizer
    pairs = list(itertools.islice(_pairs(records), config.pairs))
    if config.pairs and len(pairs) < 2:
        raise ValueError(f"warm_up: of {len(records)} records {len(pairs)} show one image and have a caption; 2 needed")
    images = [source for source, _ in pairs]
    phrases = [Phrase(text_tokens(tokenizer, caption), number) for number, (_, caption) in enumerate(pairs)]
    if config.regions:
        annotated = build_mixture(config.regions, recipe.data, recipe.seed)
        for source, answer in itertools.islice(_pairs(annotated), config.pairs or len(annotated)):
            if found := parse_regions(answer):
                for text, points in found:
                    phrases += region_phrases(tokenizer, text, points, len(images))
                images.append(source)
        if len(images) < len(pairs) + 2:
            raise ValueError(
                f"warm_up.regions: of {len(annotated)} records {len(images) - len(pairs)} show one image and answer "
                "in Florence-2's region format (dog<loc_102><loc_31><loc_500><loc_877>); 2 needed"
            )
    visitors = [model.model.vision_tower, model.model.fusion, model.model.multi_modal_projector]
    visitors.append(model.get_input_embeddings())
    home = next(visitors[0].parameters()).device
    opened: list[int] = []
    sizes: list[tuple[int, int]] = []

    def count(done: int) -> None:
        if progress is not None:
            progress(f"warm-up: features of {done} of {len(images)} images")

    with eval_mode(model):
        try:
            for module in visitors:
                module.to(device)
            features = tower_features(model, processor, _opened(images, opened, sizes), progress=count)
            if len(opened) < 2:
                raise ValueError(f"warm_up: {len(opened)} of {len(images)} images can be opened; 2 needed")
            places = {number: place for place, number in enumerate(opened)}
            phrases = [replace(one, image=places[one.image]) for one in phrases if one.image in places]
            side = processor.image_processor.size
            features = model.model.merge_features(features, (side["height"], side["width"]))
            targets = text_vectors(model, [phrase.tokens for phrase in phrases])
            images_P = torch.tensor([phrase.image for phrase in phrases])
            inside_PN = _inside(model, processor, phrases, sizes) if config.regions else None
            return warm_up(
                model,
                features,
                targets,
                images_P,
                inside_PN,
                steps=config.steps,
                batch_size=config.batch_size,
                lr=config.lr,
                seed=recipe.seed,
                new=recipe.model.path is None,
                dtype=torch.float32 if recipe.precision == "fp32" else torch.bfloat16,
                progress=progress,
            )
        finally:
            for module in visitors:
                module.to(home)


def _pairs(records: Mixture) -> Iterator[tuple[ImageSource, str]]:
    """Image and first answer of every record with both, in one pass."""
    for index in range(len(records)):
        try:
            found = caption_of(records[index])
        except BadRecord:
            continue  # counted during training
        if not isinstance(found, str):
            yield found


def _opened(sources: Iterable[ImageSource], numbers: list[int], sizes: list[tuple[int, int]]) -> Iterator[Image.Image]:
    """The images that can be opened; adds their numbers, and their widths and heights."""
    for number, source in enumerate(sources):
        try:
            image = open_image(source)
        except (OSError, ValueError):
            continue  # counted during training
        numbers.append(number)
        sizes.append(image.size)
        yield image


def _inside(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    phrases: Sequence[Phrase],
    sizes: Sequence[tuple[int, int]],
) -> Tensor:
    """The tokens of each phrase, (P, N); `sizes` are the images' widths and heights."""
    images = processor.image_processor
    height, width = images.size["height"], images.size["width"]
    rows, columns = (side // model.config.merge for side in model.model.vision_tower.grid_size(height, width))
    padded = images.image_aspect_ratio != "squash"  # the features are from padded images, see `tower_features`
    boxes = [_on_square(phrase.box, *sizes[phrase.image]) if padded else phrase.box for phrase in phrases]
    return tokens_in_boxes(boxes, (rows, columns), model.num_image_tokens(height, width))


def _on_square(box: Box, width: int, height: int) -> Box:
    """Convert a box of an image to the square on which the image is centered."""
    side = max(width, height)
    x, y = (side - width) / 2, (side - height) / 2
    left, top, right, bottom = box
    return (
        (left * width + x) / side,
        (top * height + y) / side,
        (right * width + x) / side,
        (bottom * height + y) / side,
    )


def _epochs(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = random.Random(seed)
    while True:
        order = generator.sample(range(count), count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield torch.tensor(order[start : start + batch_size])
