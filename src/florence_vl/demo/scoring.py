"""Answers of a model to held-out questions, and how many of them are right, with an interval."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from florence_vl.data.records import image_part, text_part
from florence_vl.evaluate.metrics.text import vqa_normalise

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor


@dataclass
class Question:
    """A question about a held-out picture.

    Attributes:
        image: The picture.
        kind: Name of the group that it is scored in.
        question: What is asked.
        expected: The right answer.
        answers: What was answered, by condition: `before`, `after`, `other picture`, `no picture`.
    """

    image: Image.Image
    kind: str
    question: str
    expected: str
    answers: dict[str, str] = field(default_factory=dict)

    def right(self, condition: str) -> bool:
        """Whether the answer of that condition is the expected one, as the VQA script normalises both."""
        return vqa_normalise(self.answers[condition]) == vqa_normalise(self.expected)


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default (Wilson 1927).

    Args:
        right: Number of hits.
        total: Number of trials, at least 1.
        z: Normal quantile.

    Returns:
        Lower and upper bound, in [0, 1].
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} right of {total}: need 0 <= right <= total and total >= 1")
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # exact at 0 and 1, where rounding shows


@torch.inference_mode()
def answer(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    asked: Sequence[tuple[str, Image.Image | None]],
    max_new_tokens: int = 12,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to questions, each with its picture or with none; batched, left-padded.

    Args:
        model: Put in eval mode here, and back.
        processor: The model's.
        asked: Question and picture; `None` asks without one.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions of one forward pass; with and without a picture may be mixed.
    """
    training = model.training
    model.eval()
    # Questions of like length side by side waste less padding.
    order = sorted(range(len(asked)), key=lambda i: (asked[i][1] is None, len(asked[i][0])))
    answers = [""] * len(asked)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts, images = [], []
        for index in chosen:
            question, image = asked[index]
            content = [text_part(question)] if image is None else [image_part(), text_part(question)]
            messages = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            images.append([] if image is None else [image])
        shown = images if any(images) else None
        inputs = processor(text=texts, images=shown, padding=True, add_special_tokens=False, return_tensors="pt")
        wanted = ("input_ids", "attention_mask", "pixel_values")
        inputs = {name: value.to(model.device) for name, value in inputs.items() if name in wanted}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        for index, text in zip(chosen, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[index] = text.strip()
    model.train(training)
    return answers


def derangement(questions: Sequence[Question], seed: int = 0) -> list[Image.Image]:
    """For each question a picture of another question of its kind, with another right answer where there is one."""
    generator = random.Random(seed)
    pictures = []
    for index, question in enumerate(questions):
        others = [q for i, q in enumerate(questions) if i != index and q.kind == question.kind]
        different = [q for q in others if vqa_normalise(q.expected) != vqa_normalise(question.expected)]
        pictures.append(generator.choice(different or others or list(questions)).image)
    return pictures


def scores(questions: Sequence[Question], condition: str) -> dict[str, dict[str, float]]:
    """Exact match by kind, and over all.

    Returns:
        Kind (or "all") -> `right`, `total`, `share`, `low`, `high` (Wilson's 95 % interval).
    """
    kinds = [*dict.fromkeys(question.kind for question in questions), "all"]
    result = {}
    for kind in kinds:
        group = [question for question in questions if kind in ("all", question.kind)]
        right = sum(question.right(condition) for question in group)
        low, high = wilson(right, len(group))
        result[kind] = {"right": right, "total": len(group), "share": right / len(group), "low": low, "high": high}
    return result
