"""The demo's pictures, captions and questions, written as the LLaVA JSON that any recipe reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.demo.scoring import Question

if TYPE_CHECKING:
    from florence_vl.data.scenes import Scene

TRAIN_MIX = {"single": 0.6, "objects": 0.4}  # documents and charts need more pixels and more time than a demo has


@dataclass(frozen=True)
class DataPlan:
    """How much is made.

    Attributes:
        scenes: Pictures to train on; each gives a caption and a conversation of questions.
        held_out: Questions about pictures whose sprites no training picture holds.
        size: Side of a picture in pixels.
        seed: Other pictures for another seed.
    """

    scenes: int
    held_out: int
    size: int
    seed: int = 0


@dataclass(frozen=True)
class DemoData:
    """What was made.

    Attributes:
        captions: LLaVA JSON of stage 1.
        questions: LLaVA JSON of stage 2.
        images: Folder that their relative paths start at.
        pairs: The pictures of `captions` with their captions, for the warm-up.
        held_out: Questions that nothing trains on.
    """

    captions: Path
    questions: Path
    images: Path
    pairs: list[tuple[Path, str]]
    held_out: list[Question]


COLOR, KIND, NUMBER, NAME = "the background's color", "the kind of thing", "the number of things", "what it is"
ASK = {
    COLOR: "What color is the background?",
    KIND: "What kind of thing is it?",
    NUMBER: "How many things are in the picture?",
    NAME: "What is shown in the picture?",
}
KINDS_OF_THING = {
    "animal": "animal",
    "bird": "bird",
    "sea animal": "sea animal",
    "vehicle": "vehicle",
    "clothing": "clothing",
    "food": "food",
    "sweet food": "food",
    "fruit": "fruit",
    "vegetable": "vegetable",
    "musical instrument": "musical instrument",
    "building": "building",
    "plant": "plant",
}


def questions_of(scene: Scene) -> list[tuple[str, str, str]]:
    """Questions about a scene that a look answers: kind (a key of `ASK`), question, answer."""
    answers = {}
    ground = re.search(r" on an? ([a-z ]+) background", scene.detailed_caption)
    if ground is not None and ground[1] != "patterned":
        answers[COLOR] = ground[1]
    if scene.kind == "single":
        region = scene.regions[0]
        answers[NAME] = region.name
        if region.category in KINDS_OF_THING:
            answers[KIND] = KINDS_OF_THING[region.category]
    elif scene.regions and not scene.texts:
        answers[NUMBER] = str(len(scene.regions))
    return [(kind, ASK[kind], answers[kind]) for kind in ASK if kind in answers]


def make_data(folder: Path, plan: DataPlan, progress: Callable[[int, int], None] | None = None) -> DemoData:
    """Render pictures with their captions and questions into `folder`.

    Raises:
        ModuleNotFoundError: florence-vl-mini is not installed.
        ValueError: The plan asks for nothing to train on, or for no question.
    """
    from florence_vl.data.scenes import SceneGenerator

    if plan.scenes < 1 or plan.held_out < 1:
        raise ValueError(f"{plan.scenes} scenes and {plan.held_out} held-out questions; both must be at least 1")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    pairs: list[tuple[Path, str]] = []
    for index, scene in enumerate(SceneGenerator(plan.seed, "train", plan.size, TRAIN_MIX).scenes(plan.scenes)):
        file = images / f"{scene.id}.png"
        scene.image.save(file, compress_level=1)
        caption = scene.detailed_caption if scene.kind == "single" else scene.caption
        captions.append(_llava(scene.id, file.name, [("", caption)]))
        pairs.append((file, caption))
        if turns := [(question, answer) for _, question, answer in questions_of(scene)]:
            first = index % len(turns)  # each kind opens as many conversations as the others
            questions.append(_llava(scene.id, file.name, turns[first:] + turns[:first]))
        if progress is not None:
            progress(index + 1, plan.scenes)
    paths = folder / "captions.json", folder / "questions.json"
    for path, rows in zip(paths, (captions, questions), strict=True):
        path.write_text(json.dumps(rows, indent=0), encoding="utf-8")
    return DemoData(*paths, images, pairs, held_out_questions(plan))


def _llava(name: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    conversations = []
    for place, (question, answer) in enumerate(turns):
        opening = "<image>\n" if place == 0 else ""
        conversations.append({"from": "human", "value": f"{opening}{question}".strip()})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": conversations}


def held_out_questions(plan: DataPlan) -> list[Question]:
    """Questions about pictures whose sprites belong to the test split; names are asked of things that training names.

    Kinds take turns, so that each has as many questions as it can, and no picture is asked about twice.
    """
    from florence_vl.data.scenes import SceneGenerator
    from florence_vl.data.scenes.assets import sprites

    known = {sprite.name for sprite in sprites("train")}
    wanted = dict.fromkeys(ASK, 0)
    chosen: list[Question] = []
    fruitless = 0
    for scene in _test_scenes(SceneGenerator(plan.seed, "test", plan.size, TRAIN_MIX)):
        if len(chosen) == plan.held_out or fruitless > 400:
            break
        fruitless += 1
        options = questions_of(scene)
        if not {region.name for region in scene.regions} <= known:
            options = [option for option in options if option[0] != NAME]
        if not options:
            continue
        # The kind that has been asked least; naming only where it is all that can be asked would starve it.
        kind, question, answer = min(options, key=lambda option: wanted[option[0]])
        wanted[kind] += 1
        chosen.append(Question(scene.image, kind, question, answer))
        fruitless = 0
    if not chosen:
        raise ValueError(f"no held-out question in scenes of {plan.size} px")
    return sorted(chosen, key=lambda question: list(ASK).index(question.kind))


def _test_scenes(generator: Any) -> Iterator[Scene]:
    index = 0
    while True:
        yield generator[index]
        index += 1
