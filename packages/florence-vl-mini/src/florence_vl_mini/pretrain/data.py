"""Training samples of the mini Florence-2: pixels of scenes, prompts with targets, content of each grid cell."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from florence_vl_mini.pretrain.grid import FINER, letter_targets, name_targets, token_targets
from florence_vl_mini.scenes import TASK_PROMPTS, Scene, SceneGenerator

if TYPE_CHECKING:
    from florence_vl_mini.pretrain.config import Florence2Training

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in Florence-2 (ImageNet)

# (prompt ids, target ids, [(grid cell, token ids), ...])
TaskSample = tuple[list[int], list[int], list[tuple[int, list[int]]]]
# (pixels (3, H, W) uint8, tasks, fine grid cell -> character, grid cell -> name)
Sample = tuple[Tensor, list[TaskSample], dict[int, int], dict[int, int]]


class SceneTasks(torch.utils.data.Dataset):
    """Sample `i`: the pixels of training scene `i` and the token ids of some of its tasks, drawn by `i`."""

    def __init__(self, config: Florence2Training, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.scenes = SceneGenerator(config.seed, "train", config.image_size, config.mix)
        self.later, self.first_later = self.scenes, config.second_mix_at * config.images_per_step
        if config.second_mix is not None:
            self.later = SceneGenerator(config.seed, "train", config.image_size, config.second_mix)
        self.step = max(1, 1000 // config.location_bins)
        self.prompts = {t: encode_prompt(tokenizer, t) for t in config.tasks}
        self.spelling = copy.deepcopy(tokenizer.backend_tokenizer)
        self.spelling.model.dropout = 1.0  # disables all merges: one token per byte

    def __len__(self) -> int:
        return self.config.steps * self.config.images_per_step

    def __getitem__(self, index: int) -> Sample:
        """Pixels, prompts with targets, and the letters and names in the cells of the image grid."""
        scene = (self.scenes if index < self.first_later else self.later)[index]
        rng = Random(f"tasks/{self.config.seed}/{index}")
        pixels = torch.from_numpy(np.asarray(scene.image).copy()).permute(2, 0, 1)
        left = dict(self.config.tasks)
        side = self.config.image_size // 32
        samples: list[TaskSample] = []
        while left and len(samples) < self.config.tasks_per_image:
            task = rng.choices(list(left), list(left.values()))[0]
            del left[task]
            if "OCR" in task and not scene.texts and rng.random() > 0.15:
                continue  # "no text" is useful but learned quickly
            ids = self.target_ids(scene, task)
            if ids is not None:
                cells = token_targets(scene, task, side, self.step, self.tokenizer, self.spelling)
                samples.append((self.prompts[task], ids, cells))
        return pixels, samples, letter_targets(scene, side * FINER), name_targets(scene, side)

    def target_ids(self, scene: Scene, task: str) -> list[int] | None:
        """`<s> ... </s>`, or None if the scene has no annotation for the task or a too long one."""
        text = scene.target(task, self.step)
        if not text and "OCR" not in task:
            return None
        if "OCR" in task:  # spelled out: letters are visible, and words of the test split have no tokens
            ids = [0, *self.spelling.encode(text, add_special_tokens=False).ids, 2]
        else:
            ids = self.tokenizer(f"<s>{text}</s>", add_special_tokens=False)["input_ids"]
        return ids if len(ids) <= self.config.max_target_tokens else None


class Batches(torch.utils.data.Sampler[list[int]]):
    """The image numbers of steps `first` to `last`: step `s` shows `s * size` to `(s + 1) * size`.

    Of `world` processes, number `rank` takes every `world`-th of them.
    """

    def __init__(self, first: int, last: int, size: int, rank: int = 0, world: int = 1) -> None:
        self.first, self.last, self.size, self.rank, self.world = first, last, size, rank, world

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield list(range(step * self.size + self.rank, (step + 1) * self.size, self.world))


def encode_prompt(tokenizer: Any, task: str) -> list[int]:
    """Token ids of a task's prompt as `Florence2Processor` lays it out: `<s> prompt </s>`."""
    return tokenizer(f"<s>{TASK_PROMPTS[task]}</s>", add_special_tokens=False)["input_ids"]


def collate(batch: list[Sample]) -> dict[str, Tensor]:
    """Pad the tasks of a batch of images.

    Returns:
        pixels (B, 3, H, W) uint8; owner (T,), the image of each task; prompt_ids, prompt_mask (T, P); labels (T, L),
        -100 where padded; letters (B, H, W) and names (B, N), the content of each (fine) grid cell, 0 if empty;
        cell_tokens (R, 2 + M), rows of task, cell and the tokens of the cell, -1 where padded.
    """
    owner = [i for i, (_, samples, _, _) in enumerate(batch) for _ in samples]
    pairs = [pair for _, samples, _, _ in batch for pair in samples]
    side = batch[0][0].shape[-1] // 32
    letters = torch.zeros(len(batch), (side * FINER) ** 2, dtype=torch.long)
    names = torch.zeros(len(batch), side**2, dtype=torch.long)
    for i, (_, _, letter_in, name_in) in enumerate(batch):
        for rows, targets in ((letters, letter_in), (names, name_in)):
            rows[i, list(targets)] = torch.tensor(list(targets.values()), dtype=torch.long)

    def pad(rows: list[list[int]], value: int) -> Tensor:
        out = torch.full((len(rows), max(map(len, rows))), value)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
        return out

    prompt_ids = pad([p for p, _, _ in pairs], 1)
    return {
        "pixels": torch.stack([pixels for pixels, _, _, _ in batch]),
        "letters": letters.unflatten(1, (side * FINER, side * FINER)),
        "names": names,
        "owner": torch.tensor(owner),
        "prompt_ids": prompt_ids,
        "prompt_mask": (prompt_ids != 1).long(),
        "labels": pad([t for _, t, _ in pairs], -100),
        "cell_tokens": pad(
            [[i, cell, *ids] for i, (_, _, rows) in enumerate(pairs) for cell, ids in rows] or [[0, 0]], -1
        ),
    }


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to inputs of the vision tower: ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (pixels.float() / 255 - mean) / std
