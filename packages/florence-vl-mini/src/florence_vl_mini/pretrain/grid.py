"""An auxiliary loss for small budgets: predict the content of each cell of the image grid from the image tokens.

With the seq2seq loss alone, a small Florence-2 ignores the image for a long time: the decoder first learns the
language of the answers, and meanwhile the post-norm encoder removes the differences between images (measured: the
spread fell from 0.09 to 0.00005 over its three layers in 1000 steps). The position of everything in a scene is known,
so names and letters are predicted in every cell, from `V` and from the encoder's output under each prompt. Letters are
predicted on a grid twice as fine as the tokens', by four heads per token and, before the last downsampling, from
DaViT's third stage: a token of 32 px covers several letters and must keep their order. The heads are not part of the
model and are not exported.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from florence_vl_mini.scenes import Scene, Text, assets

CHARACTERS = tuple(chr(c) for c in range(33, 127))
FINER = 2  # ratio of the letters' grid to the tokens' grid
EMPTY = 0.1  # weight of empty cells


@lru_cache
def grid_classes() -> tuple[str, ...]:
    """Printable ASCII characters, then the names of the training sprites."""
    return (*CHARACTERS, *sorted({s.name for s in assets.sprites("train")}))


@lru_cache
def _name_numbers() -> dict[str, int]:
    names = grid_classes()[len(CHARACTERS) :]
    return {name: i for i, name in enumerate(names, 1)}


def name_targets(scene: Scene, side: int) -> dict[int, int]:
    """Cell of a `side` x `side` grid, row by row -> number of the name (from 1) of the object in it.

    An object occupies the cells whose center is in its box, and the cell of its own center.
    """
    names, size = _name_numbers(), scene.image.width
    return {
        cell: names[region.name]
        for region in scene.regions
        if region.name in names
        for cell in cells_of(region.box, size, side)
    }


def letter_targets(scene: Scene, side: int) -> dict[int, int]:
    """Cell of a `side` x `side` grid -> number of the printable ASCII character (from 1) in it.

    A character occupies the cell of its position along the line; all characters are assumed to have the same width.
    """
    out = {}
    for text in scene.texts:
        for i, character in enumerate(text.text):
            if 33 <= ord(character) < 127:
                out[place_of(text, i, scene.image.width, side)] = ord(character) - 32
    return out


def _cell(x: float, y: float, side: int) -> int:
    return min(max(int(y), 0), side - 1) * side + min(max(int(x), 0), side - 1)


def cells_of(box: tuple[float, float, float, float], size: int, side: int) -> list[int]:
    """The cells whose center is in a box, and the cell of the box's own center."""
    left, top, right, bottom = (v * side / size for v in box)
    held = {
        row * side + column
        for row in range(side)
        for column in range(side)
        if left <= column + 0.5 <= right and top <= row + 0.5 <= bottom
    }
    return sorted(held | {_cell((left + right) / 2, (top + bottom) / 2, side)})


def place_of(text: Text, index: int, size: int, side: int) -> int:
    """The cell of a line's character number `index`; all characters are assumed to have the same width."""
    x = [v * side / size for v in text.quad[0::2]]
    y = [v * side / size for v in text.quad[1::2]]
    t = (index + 0.5) / len(text.text)
    across = ((x[0] + x[3]) * (1 - t) + (x[1] + x[2]) * t) / 2
    return _cell(across, ((y[0] + y[3]) * (1 - t) + (y[1] + y[2]) * t) / 2, side)


def token_targets(
    scene: Scene, task: str, side: int, step: int, tokenizer: Any, spelling: Any
) -> list[tuple[int, list[int]]]:
    """(cell, token ids) of the part of a task's answer about each occupied cell.

    Reading tasks: the letters in it. Captions: the words of the object's name. Detection: its name and the corners of
    its box.
    """
    out: dict[int, set[int]] = {}
    if "OCR" in task:
        for text in scene.texts:
            for i, character in enumerate(text.text):
                if character != " ":
                    ids = spelling.encode(character, add_special_tokens=False).ids
                    out.setdefault(place_of(text, i, scene.image.width, side), set()).update(ids)
        return [(cell, sorted(ids)) for cell, ids in sorted(out.items())]
    for region in scene.regions:
        caption = task in ("<CAPTION>", "<DETAILED_CAPTION>")
        said = f" {region.name}" if caption else region.name + scene.locations(region.box, step)
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        for cell in cells_of(region.box, scene.image.width, side):
            out.setdefault(cell, set()).update(ids)
    return [(cell, sorted(ids)) for cell, ids in sorted(out.items())]


def token_loss(model: Any, prompted_TND: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the model's output embedding at each occupied cell against the tokens of the cell.

    Args:
        model: The model whose `lm_head` reads the encoder's output.
        prompted_TND: The encoder's output at the grid's cells.
        targets: (R, 2 + M): task, cell, and up to M token ids, -1 where there are fewer.
    """
    if targets.shape[1] == 2:  # all cells are empty
        return prompted_TND.new_zeros(())
    tokens = targets[:, 2:]
    logits = model.lm_head(prompted_TND[targets[:, 0], targets[:, 1]]).float()
    chosen = logits.log_softmax(-1).gather(1, tokens.clamp(min=0)) * (tokens >= 0)
    return -(chosen.sum(1) / (tokens >= 0).sum(1)).mean()


class GridHeads(nn.Module):
    """Linear maps from image features to the content of their cells.

    Args:
        width: Channels of `V` and of the encoder's output.
        early_width: Channels of DaViT's stage before the last, whose grid is `FINER` times as fine.
    """

    def __init__(self, width: int, early_width: int) -> None:
        super().__init__()
        letters, names = len(CHARACTERS) + 1, len(_name_numbers()) + 1
        self.early_letters = nn.Linear(early_width, letters)
        self.image_letters, self.prompted_letters = (nn.Linear(width, FINER**2 * letters) for _ in range(2))
        self.image_names, self.prompted_names = (nn.Linear(width, names) for _ in range(2))

    def forward(
        self,
        early_BCHW: Tensor,
        image_BND: Tensor,
        prompted_TND: Tensor,
        letters_BHW: Tensor,
        names_BN: Tensor,
        owner: Tensor,
        asks_text: Tensor,
    ) -> Tensor:
        """Sum of the cross-entropies; empty cells have `EMPTY` times the weight of occupied ones.

        Args:
            early_BCHW: Output of DaViT's stage before the last.
            image_BND: `V` at the grid's cells, B images.
            prompted_TND: The encoder's output there for T tasks.
            letters_BHW: Number of the character in each fine cell, 0 if empty.
            names_BN: Number of the name in each cell, 0 if empty.
            owner: The image of each task, (T,).
            asks_text: Whether a task asks for text, (T,): such tasks predict letters, the others names.
        """
        letters_B4N = _within_tokens(letters_BHW)
        loss = _cross_entropy(self.early_letters(early_BCHW.flatten(2).transpose(1, 2)), letters_BHW.flatten(1))
        loss = loss + _cross_entropy(self.image_letters(image_BND), letters_B4N)
        loss = loss + _cross_entropy(self.image_names(image_BND), names_BN)
        if asks_text.any():
            logits = self.prompted_letters(prompted_TND[asks_text])
            loss = loss + _cross_entropy(logits, letters_B4N[owner[asks_text]])
        if not asks_text.all():
            logits = self.prompted_names(prompted_TND[~asks_text])
            loss = loss + _cross_entropy(logits, names_BN[owner[~asks_text]])
        return loss


def _within_tokens(fine_BHW: Tensor) -> Tensor:
    """(B, FINER H, FINER W) to (B, H W, FINER²): the fine cells of each token."""
    cells = fine_BHW.unflatten(1, (-1, FINER)).unflatten(3, (-1, FINER))  # (B, H, FINER, W, FINER)
    return cells.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits with one or more classifications per row; class 0 (empty) is weighted by `EMPTY`."""
    logits = logits.float().reshape(targets.numel(), -1)
    targets = targets.flatten()
    weights = torch.where(targets == 0, EMPTY, 1.0)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum()
