"""Questions in the words of ordinary users, with and without LLaVA's demand for a short answer; answers in sentences."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import yaml

from florence_vl_mini.scenes import assets

if TYPE_CHECKING:
    from florence_vl_mini.scenes.annotations import Question, Scene

SHORT = "Answer the question using a single word or phrase."
ASIS = 0.3  # chance that a question keeps its wording
ALONE = 0.4  # chance that an open question comes without `SHORT`
DESCRIBE = ("Describe the picture.", "Describe this image.", "What do you see?", "What does the image show?",
            "Tell me what is in the picture.", "What is going on in this picture?", "Describe in detail what you see.",
            "Can you describe the image?")  # fmt: skip
CAPTION = ("What is in the picture?", "What is this?", "What is shown here?", "What does the picture show?",
           "What can you see in the image?", "What is this a picture of?")  # fmt: skip


@lru_cache
def _wordings() -> list[tuple[re.Pattern[str], tuple[str, ...], str | None]]:
    """Pattern of a question, other wordings of it, and the sentence that answers it."""
    rows = yaml.safe_load((Path(__file__).parent / "wording.yaml").read_text(encoding="utf-8"))
    return [(re.compile(row["question"]), tuple(row["also"]), row.get("sentence")) for row in rows]


def chat(scene: Scene, rng: Random, most: int = 4) -> list[tuple[str, str]]:
    """Turns of a conversation about a scene: its questions in any order and in other words.

    Args:
        scene: What is asked about.
        rng: Source of every choice.
        most: Number of turns, at most.

    Returns:
        Prompts with answers. Prompts without LLaVA's demand for a short answer are answered by a sentence where one
        is natural.
    """
    asked = [question for question in scene.questions if len(question.answer) <= 60]
    rng.shuffle(asked)
    turns, seen = [], set()
    for question in asked:
        if len(turns) < most and question.question not in seen:
            seen.add(question.question)
            turns.append(_turn(question, rng))
    if rng.random() < 0.25 and scene.caption:
        if rng.random() < 0.5 and scene.detailed_caption:
            told = rng.choice(DESCRIBE), scene.detailed_caption
        else:
            told = rng.choice(CAPTION), f"{scene.caption[0].upper()}{scene.caption[1:]}."
        turns.insert(rng.randint(0, len(turns)), told)
    return turns[:most]


def _turn(question: Question, rng: Random) -> tuple[str, str]:
    if question.choices:
        return question.prompt, question.answer
    text, answer = question.question, question.answer
    sentence = None
    for pattern, others, wording in _wordings():
        found = pattern.fullmatch(text)
        if found:
            if others and rng.random() > ASIS:
                text = _fill(rng.choice(others), found, answer)
            sentence = wording
            break
    else:
        found = None
    if rng.random() < 0.3:
        text = text.replace(" picture", rng.choice((" image", " image", " drawing", " photo")))
    if rng.random() > ALONE:
        return f"{text}\n{SHORT}", answer
    if rng.random() < 0.06:  # as typed in haste
        text = text.lower().rstrip("?") if '"' not in text else text
    if answer in ("yes", "no"):
        return text, f"{answer.capitalize()}."
    if sentence and found and (answer != "1" or "{a}" not in sentence or "are" not in sentence):
        return text, _fill(sentence, found, answer)
    return text, answer


def _fill(template: str, found: re.Match[str], answer: str) -> str:
    groups = [group or "" for group in found.groups()]
    article = assets.with_article(answer) if "{article}" in template else answer
    return template.format(*groups, a=answer, article=article)
