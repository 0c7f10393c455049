"""What is known about a picture: regions, texts, captions, questions; and their wording in Florence-2's format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from PIL import Image

# Florence-2's task -> the prompt that `Florence2Processor` makes of it.
TASK_PROMPTS = {
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<OCR>": "What is the text in the image?",
    "<OCR_WITH_REGION>": "What is the text in the image, with regions?",
    "<OD>": "Locate the objects with category name in the image.",
    "<DENSE_REGION_CAPTION>": "Locate the objects in the image, with their descriptions.",
}
GROUPS = ("general", "knowledge", "ocr_chart", "vision_centric")
RECORD_TASKS = ("caption", "detailed_caption", "ocr", "ocr_with_region", "od", "dense_region_caption", "vqa", "chat",
                *GROUPS)  # fmt: skip

Box = tuple[float, float, float, float]


def known(kind: str, name: str, options: Iterable[str]) -> str:
    """`name`, if it is one of the options.

    Raises:
        ValueError: It is not; the options are listed.
    """
    names = list(options)
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}. Known: {', '.join(names)}.")
    return name


@dataclass(frozen=True)
class Region:
    """An object: `box` is (left, top, right, bottom) in pixels; `description` says more than `name`."""

    name: str
    description: str
    box: Box
    category: str | None = None


@dataclass(frozen=True)
class Text:
    """A line of text: `quad` is (x, y) of the corners, clockwise from the text's own top left, in pixels."""

    text: str
    quad: tuple[float, ...]
    color: str | None = None

    @property
    def box(self) -> Box:
        """The upright box around the quad."""
        xs, ys = self.quad[0::2], self.quad[1::2]
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        group: One of `GROUPS`, the paper's four groups of benchmarks.
        skill: What it asks for: "existence", "counting", "spatial", "reading", "chart_value", ...
        question: Wording, without the choices.
        answer: A letter for multiple choice, else "yes"/"no", a number or a few words.
        choices: Texts of A, B, C, ...; None for open questions.
    """

    group: str
    skill: str
    question: str
    answer: str
    choices: tuple[str, ...] | None = None

    @property
    def prompt(self) -> str:
        """Question, choices and how to answer, as LLaVA-1.5's instruction data words it."""
        if self.choices:
            lines = [self.question, *(f"{chr(65 + i)}. {c}" for i, c in enumerate(self.choices))]
            return "\n".join([*lines, "Answer with the option's letter from the given choices directly."])
        return f"{self.question}\nAnswer the question using a single word or phrase."


@dataclass
class Scene:
    """A picture with all its annotations."""

    id: str
    kind: str
    image: Image.Image
    caption: str = ""
    detailed_caption: str = ""
    regions: list[Region] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    @property
    def ocr(self) -> str:
        """All text in reading order, lines joined by spaces (Florence-2's `<OCR>`)."""
        return " ".join(t.text for t in self.texts)

    def locations(self, values: tuple[float, ...], step: int = 1) -> str:
        """Location tokens of alternating x and y in pixels; `step` > 1 rounds to coarser bins' centers."""
        sides = self.image.size
        out = []
        for i, value in enumerate(values):
            bin_ = min(max(int(value * 1000 / sides[i % 2]), 0), 999)
            out.append(f"<loc_{min(999, bin_ // step * step + step // 2)}>")
        return "".join(out)

    def od(self, step: int = 1) -> str:
        """`name<loc_x1><loc_y1><loc_x2><loc_y2>` for each object; `step` > 1 rounds to coarser bins' centers."""
        return "".join(r.name + self.locations(r.box, step) for r in self.regions)

    def dense_region_caption(self, step: int = 1) -> str:
        """Like `od` with descriptions, text lines too (without what they say)."""
        parts = [(r.box, r.description) for r in self.regions]
        parts += [(t.box, f"{t.color} text" if t.color else "text") for t in self.texts]
        return "".join(text + self.locations(box, step) for box, text in parts)

    def ocr_with_region(self, step: int = 1) -> str:
        """`text<loc_x1><loc_y1>...<loc_y4>` for each line of text."""
        return "".join(t.text + self.locations(t.quad, step) for t in self.texts)

    def target(self, task: str, step: int = 1) -> str:
        """What Florence-2 should answer to a task token, e.g. `<OCR>`.

        Raises:
            ValueError: No such task.
        """
        if task == "<CAPTION>":
            return self.caption
        if task == "<DETAILED_CAPTION>":
            return self.detailed_caption
        if task == "<OCR>":
            return self.ocr
        if task == "<OCR_WITH_REGION>":
            return self.ocr_with_region(step)
        if task == "<OD>":
            return self.od(step)
        if task == "<DENSE_REGION_CAPTION>":
            return self.dense_region_caption(step)
        raise ValueError(f"unknown Florence-2 task {task!r}. Known: {', '.join(TASK_PROMPTS)}.")

    def chat(self, most: int = 5) -> list[tuple[str, str]]:
        """Up to `most` questions with answers in the words of ordinary users, drawn by the scene's id."""
        from florence_vl_mini.scenes.wording import chat

        return chat(self, Random(f"chat/{self.id}"), most)

    def record(self, task: str = "vqa") -> dict[str, Any]:
        """The scene as a training record: `id`, `source`, `messages` (transformers' chat format) and `images` (PIL).

        Args:
            task: "caption", "detailed_caption" (as LLaVA's pretraining data words them), "ocr", "ocr_with_region",
                "od", "dense_region_caption" (Florence-2's prompts), "vqa" (all questions as one conversation), one of
                the four groups (the questions of that group), or "chat" (up to five questions in other words).

        Raises:
            ValueError: No such task, or the scene has no annotation for it.
        """
        known("task", task, RECORD_TASKS)
        if task == "chat":
            turns = self.chat()
        elif task in ("vqa", *GROUPS):
            turns = [(q.prompt, q.answer) for q in self.questions if task in ("vqa", q.group)]
        else:
            token = f"<{task.upper()}>"
            turns = [(TASK_PROMPTS[token], self.target(token))]
        if not turns or not turns[0][1]:
            raise ValueError(f"scene {self.id} ({self.kind}) has no annotation for task {task!r}")
        messages = []
        for i, (ask, answer) in enumerate(turns):
            content = ([{"type": "image"}] if i == 0 else []) + [{"type": "text", "text": ask}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return {"id": f"{self.id}-{task}", "source": "scenes", "messages": messages, "images": [self.image]}
