"""Questions in the words of ordinary users, with or without a demand for short answers; else answers in sentences."""

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
BRIEF = 0.7  # chance that a conversation asks for short answers
REPEATED = 0.25  # chance that a later question of such a conversation says so again
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


def chat(scene: Scene, rng: Random, most: int = 5) -> list[tuple[str, str]]:
    """Turns of a conversation about a scene: its questions in any order and in other words.

    As in LLaVA's instruction data, a conversation either demands short answers, with its first question at least, or
    is answered in sentences where they are natural.

    Args:
        scene: What is asked about.
        rng: Source of every choice.
        most: Number of turns, at most.

    Returns:
        Prompts with answers.
    """
    asked = [question for question in scene.questions if len(question.answer) <= 60]
    rng.shuffle(asked)
    asked = list({question.question: question for question in asked}.values())[:most]
    if rng.random() < BRIEF:
        return [_brief(question, rng, first=i == 0) for i, question in enumerate(asked)]
    turns = [_told(question, rng) for question in asked]
    if rng.random() < 0.6 and scene.caption:
        if rng.random() < 0.5 and scene.detailed_caption:
            told = rng.choice(DESCRIBE), scene.detailed_caption
        else:
            told = rng.choice(CAPTION), f"{scene.caption[0].upper()}{scene.caption[1:]}."
        turns.insert(rng.randint(0, len(turns)), told)
    return turns[:most]


def _brief(question: Question, rng: Random, first: bool) -> tuple[str, str]:
    if question.choices:
        return question.prompt, question.answer
    text = _reworded(question, rng)[0]
    return f"{text}\n{SHORT}" if first or rng.random() < REPEATED else text, question.answer


def _told(question: Question, rng: Random) -> tuple[str, str]:
    if question.choices:
        return question.prompt, question.answer
    answer = question.answer
    text, sentence = _reworded(question, rng)
    if rng.random() < 0.06 and '"' not in text:  # as typed in haste
        text = text.lower().rstrip("?")
    if answer in ("yes", "no"):
        return text, f"{answer.capitalize()}."
    return text, answer if sentence is None or (answer == "1" and " are " in sentence) else sentence


def _reworded(question: Question, rng: Random) -> tuple[str, str | None]:
    """The question in other words, and the sentence that answers it."""
    text, sentence = question.question, None
    for pattern, others, wording in _wordings():
        if found := pattern.fullmatch(text):
            if others and rng.random() > ASIS:
                text = _fill(rng.choice(others), found, question.answer)
            sentence = wording and _fill(wording, found, question.answer)
            break
    if rng.random() < 0.3:
        text = text.replace(" picture", rng.choice((" image", " image", " drawing", " photo")))
    return text, sentence


def _fill(template: str, found: re.Match[str], answer: str) -> str:
    groups = [group or "" for group in found.groups()]
    article = assets.with_article(answer) if "{article}" in template else answer
    return template.format(*groups, a=answer, article=article)
