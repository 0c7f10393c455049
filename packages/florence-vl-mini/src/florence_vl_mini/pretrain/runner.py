"""Run a Florence-2's tasks on pictures, and compare answers, boxes and names with the ground truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Florence2ForConditionalGeneration, Florence2Processor, StoppingCriteriaList

from florence_vl.evaluate.metrics.text import edit_distance
from florence_vl.model.contract import load_whole
from florence_vl.model.loading import choose_device
from florence_vl.model.repetition import RepetitionStop
from florence_vl.statistics import mean_interval
from florence_vl_mini.scenes import Scene, SceneGenerator

BATCH = 32
MAX_NEW_TOKENS = {"<CAPTION>": 40, "<OCR>": 40, "<OD>": 80}
Figure = dict[str, float]


class Florence2Runner:
    """A Florence-2 folder, loaded to run its tasks on batches of pictures.

    Raises:
        FileNotFoundError: No model in the folder.
        ValueError: Weights are missing or damaged.
    """

    def __init__(self, path: str | Path, device: str = "auto") -> None:
        if not Path(path).is_dir():
            raise FileNotFoundError(f"no such folder: {path} (a Florence-2 saved by save_pretrained is expected)")
        self.device = choose_device(device)
        self.model = load_whole(
            Florence2ForConditionalGeneration, path, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.to(self.device).eval()
        self.processor = Florence2Processor.from_pretrained(path)

    def inputs(self, images: Sequence[Image.Image], task: str) -> dict[str, Tensor]:
        """Model inputs of one task about several pictures."""
        batch = self.processor(text=[task] * len(images), images=list(images), return_tensors="pt", padding=True)
        return {k: v.to(self.device) for k, v in batch.items()}

    @torch.no_grad()
    def answer(self, images: Sequence[Image.Image], task: str) -> list[str]:
        """Greedy answers, with location tokens and without special tokens."""
        out: list[str] = []
        tokenizer = self.processor.tokenizer
        for start in range(0, len(images), BATCH):
            batch = self.inputs(images[start : start + BATCH], task)
            ids = self.model.generate(
                **batch,
                max_new_tokens=MAX_NEW_TOKENS.get(task, 96),
                do_sample=False,
                num_beams=1,
                stopping_criteria=StoppingCriteriaList([RepetitionStop()]),
            )
            for text in tokenizer.batch_decode(ids, skip_special_tokens=False):
                for token in ("<s>", "</s>", "<pad>"):
                    text = text.replace(token, "")
                out.append(text.strip())
        return out

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[list[str], list[list[float]]]]:
        """Names and boxes (left, top, right, bottom in pixels) that `<OD>` finds in each picture."""
        out = []
        for image, answer in zip(images, self.answer(images, "<OD>"), strict=True):
            parsed = self.processor.post_process_generation(text=answer, task="<OD>", image_size=image.size)["<OD>"]
            out.append((parsed["labels"], parsed["bboxes"]))
        return out

    @torch.no_grad()
    def log_likelihood(self, image: Image.Image, task: str, answers: Sequence[str]) -> Tensor:
        """Sum of the answers' token log-probabilities: (answers,)."""
        batch = self.inputs([image], task)
        tokenizer = self.processor.tokenizer
        rows = tokenizer([f"<s>{a}</s>" for a in answers], add_special_tokens=False)["input_ids"]
        labels = torch.full((len(rows), max(map(len, rows))), -100, device=self.device)
        for i, row in enumerate(rows):
            labels[i, : len(row)] = torch.tensor(row, device=self.device)
        model, text = self.model, self.model.config.text_config
        image_VD = model.get_image_features(batch["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds = embeds.masked_scatter((batch["input_ids"] == model.config.image_token_id)[..., None], image_VD)
        encoded = model.model.language_model.encoder(inputs_embeds=embeds).last_hidden_state.expand(len(rows), -1, -1)
        shifted = F.pad(
            labels[:, :-1].masked_fill(labels[:, :-1] == -100, text.pad_token_id),
            (1, 0),
            value=text.decoder_start_token_id,
        )
        hidden = model.model.language_model.decoder(
            input_ids=shifted, encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return -losses.sum(1)


def with_interval(values: Sequence[float]) -> Figure:
    """Mean of values in [0, 1] with its 95 % interval over pictures: {"mean", "low", "high", "n"}."""
    if not len(values):
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    low, high = mean_interval(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def character_accuracy(given: str, wanted: str) -> float:
    """1 - edit distance / longer length; 1 for two empty texts."""
    longest = max(len(given), len(wanted))
    return 1 - edit_distance(given, wanted) / longest if longest else 1.0


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two (left, top, right, bottom) boxes."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def matches(
    found: Sequence[tuple[str, Sequence[float]]],
    wanted: Sequence[tuple[str, Sequence[float]]],
    labels: bool,
    threshold: float = 0.5,
) -> int:
    """Number of pairs with IoU of at least `threshold` (and the same label), matched greedily by IoU."""
    pairs = sorted(
        (
            (iou(f[1], w[1]), i, j)
            for i, f in enumerate(found)
            for j, w in enumerate(wanted)
            if not labels or f[0] == w[0]
        ),
        reverse=True,
    )
    used_f: set[int] = set()
    used_w: set[int] = set()
    for value, i, j in pairs:
        if value >= threshold and i not in used_f and j not in used_w:
            used_f.add(i)
            used_w.add(j)
    return len(used_f)


def box_f1(found: list[Any], wanted: list[Any], labels: bool) -> float:
    """F1 of one picture; 1 if there are neither expected nor found boxes."""
    if not found and not wanted:
        return 1.0
    return 2 * matches(found, wanted, labels) / (len(found) + len(wanted))


def held_out(kind: str, n: int, seed: int, size: int, keep: Callable[[Scene], bool] = lambda _: True) -> list[Scene]:
    """The first `n` scenes of a kind on the test split that `keep` accepts; fewer if they are very rare."""
    generator = SceneGenerator(seed + 1000, "test", size, {kind: 1.0})
    out: list[Scene] = []
    for index in range(200 * n):
        if len(out) == n:
            break
        scene = generator[index]
        if keep(scene):
            out.append(scene)
    return out
