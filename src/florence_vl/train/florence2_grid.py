"""A training aid for small budgets: what lies in each cell of the image grid, told linearly from the image tokens.

The seq2seq loss alone leaves a small Florence-2 blind for long: the decoder first learns the language of the answers,
and meanwhile the post-norm encoder shrinks what differs between images (measured: the spread fell from 0.09 to 0.00005
over its three layers in 1000 steps). Scenes know where everything is, so names and letters can be asked of every cell,
of `V` and of the encoder's output under each prompt. The heads are not part of the model and are not exported.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from florence_vl.data.scenes import Scene, Text, assets

CHARACTERS = tuple(chr(c) for c in range(33, 127))


@lru_cache
def grid_classes() -> tuple[str, ...]:
    """Printable ASCII characters, then the names of the training sprites."""
    return (*CHARACTERS, *sorted({s.name for s in assets.sprites("train")}))


@lru_cache
def _class_numbers() -> dict[str, int]:
    classes = grid_classes()
    return {name: i for i, name in enumerate(classes[len(CHARACTERS) :], len(CHARACTERS))}


def grid_targets(scene: Scene, side: int) -> list[tuple[int, int]]:
    """(cell, class) of what lies in each cell of a `side` x `side` grid, row by row.

    An object counts in the cells whose centre its box holds, and in the cell of its own centre; a character in the
    cell of its place along the line (characters are taken as equally wide).
    """
    names, size = _class_numbers(), scene.image.width
    out: set[tuple[int, int]] = set()
    for region in scene.regions:
        if region.name in names:
            out |= {(cell, names[region.name]) for cell in cells_of(region.box, size, side)}
    for text in scene.texts:
        for i, character in enumerate(text.text):
            if 33 <= ord(character) < 127:
                out.add((place_of(text, i, size, side), ord(character) - 33))
    return sorted(out)


def _cell(x: float, y: float, side: int) -> int:
    return min(max(int(y), 0), side - 1) * side + min(max(int(x), 0), side - 1)


def cells_of(box: tuple[float, float, float, float], size: int, side: int) -> list[int]:
    """The cells whose centre a box holds, and the cell of its own centre."""
    left, top, right, bottom = (v * side / size for v in box)
    held = {
        row * side + column
        for row in range(side)
        for column in range(side)
        if left <= column + 0.5 <= right and top <= row + 0.5 <= bottom
    }
    return sorted(held | {_cell((left + right) / 2, (top + bottom) / 2, side)})


def place_of(text: Text, index: int, size: int, side: int) -> int:
    """The cell of a line's character number `index`; characters are taken as equally wide."""
    x = [v * side / size for v in text.quad[0::2]]
    y = [v * side / size for v in text.quad[1::2]]
    t = (index + 0.5) / len(text.text)
    across = ((x[0] + x[3]) * (1 - t) + (x[1] + x[2]) * t) / 2
    return _cell(across, ((y[0] + y[3]) * (1 - t) + (y[1] + y[2]) * t) / 2, side)


def token_targets(
    scene: Scene, task: str, side: int, step: int, tokenizer: Any, spelling: Any
) -> list[tuple[int, list[int]]]:
    """(cell, token ids) of what a task's answer says about each occupied cell.

    Reading tasks: the letters there. Captions: the words of the object's name. Detection: its name and the corners of
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
    """Cross-entropy of the model's own output embedding at each occupied cell against the tokens that belong there.

    Args:
        model: Whose `lm_head` reads the encoder's output.
        prompted_TND: The encoder's output at the grid's cells.
        targets: (R, 2 + M): task, cell, and up to M token ids, -1 where there are fewer.
    """
    if targets.shape[1] == 2:  # nothing lies anywhere
        return prompted_TND.new_zeros(())
    tokens = targets[:, 2:]
    logits = model.lm_head(prompted_TND[targets[:, 0], targets[:, 1]]).float()
    chosen = logits.log_softmax(-1).gather(1, tokens.clamp(min=0)) * (tokens >= 0)
    return -(chosen.sum(1) / (tokens >= 0).sum(1)).mean()


class GridHeads(nn.Module):
    """Linear maps from image tokens to what lies in their cells: one for `V`, one for the encoder's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.prompted = nn.Linear(width, len(grid_classes())), nn.Linear(width, len(grid_classes()))
        for head in (self.image, self.prompted):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, -5.0)  # almost every class is absent from almost every cell

    def forward(
        self, image_BND: Tensor, prompted_TND: Tensor, cells_BNK: Tensor, owner: Tensor, asks_text: Tensor
    ) -> Tensor:
        """Binary cross-entropy summed over classes, averaged over cells.

        Args:
            image_BND: `V` at the grid's cells, B images.
            prompted_TND: The encoder's output there for T tasks.
            cells_BNK: Which of K classes lie in each cell.
            owner: The image of each task, (T,).
            asks_text: Whether a task asks for text, (T,): letters are asked of it, of the others names.
        """
        present = cells_BNK.float()
        loss = _binary(self.image(image_BND), present).sum(-1).mean()
        letters = torch.arange(present.shape[-1], device=present.device) < len(CHARACTERS)
        asked_TK = letters[None] == asks_text[:, None]
        prompted = _binary(self.prompted(prompted_TND), present[owner]) * asked_TK[:, None]
        return loss + prompted.sum(-1).mean()


def _binary(logits: Tensor, present: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), present, reduction="none")
