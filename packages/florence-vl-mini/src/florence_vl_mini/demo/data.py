"""The demo's task: describe a picture as JSON. Pictures are scenes, written as the LLaVA JSON that any recipe reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from florence_vl_mini.scenes import Scene

PROMPT = 'Describe the picture as JSON with the keys "picture", "background", "things" and "text".'
KEYS = ("picture", "background", "things", "text")
# Kinds of scene with their fraction, and their name in plain words.
MIX = {
    "single": 0.1, "objects": 0.3, "lettering": 0.4,
    "receipt": 0.05, "bar_chart": 0.05, "line_chart": 0.05, "pie_chart": 0.05,
}  # fmt: skip
PICTURES = {
    "single": "objects", "objects": "objects", "lettering": "words",
    "receipt": "receipt", "bar_chart": "bar chart", "line_chart": "line chart", "pie_chart": "pie chart",
}  # fmt: skip
ALIKE = ("beige", "light gray")  # backgrounds that are easily confused with light yellow and white
ONE_COLOR, MIXED = 24, 45  # range of a background's widest channel: up to the first one color, from the second several
NEAR = 40  # of 765: maximum distance at which a color is called by its name
WRITTEN_ON = re.compile(
    "sign|newspaper|calendar|bus stop|receipt|ticket|book|hospital|police|taxi|chart|letter|sleeping"
)
SEED = 1000  # added to the demo's: other scenes than those of the mini suite, and than a run's of small seed

Answer = dict[str, Any]  # value by key of `KEYS`: three texts, and the whole number "things"


@dataclass(frozen=True)
class Example:
    """A held-out picture with the expected answer.

    Attributes:
        image: The picture, JPEG.
        expected: The correct value of each key.
    """

    image: bytes
    expected: Answer


@dataclass(frozen=True)
class DemoData:
    """The data of a run.

    Attributes:
        train: LLaVA JSON of the training pictures.
        images: Base folder of its relative paths.
        commonest: The most common value of each key in training: a guess that ignores the picture.
        held_out: Pictures whose sprites and written words do not occur in training.
    """

    train: Path
    images: Path
    commonest: Answer
    held_out: list[Example]


def describe(scene: Scene) -> Answer | None:
    """The expected answer for a scene; None if it is ambiguous.

    "picture" is the subject; "background" its color, or "mixed"; "things" the number of objects, of a chart's
    bars, points or parts, or of a receipt's items; "text" the only word, or the heading; "none" if there is none.
    Excluded are scenes whose objects are hard to count or contain writing, scenes with several words or with words and
    objects, and backgrounds between two color names.
    """
    picture = PICTURES.get(scene.kind)
    if picture is None:
        return None
    if picture == "objects" and not {region.name for region in scene.regions} <= plain_names():
        return None
    if picture == "words" and (scene.regions or len(scene.texts) != 1):
        return None
    background = background_of(scene)
    if background is None:
        return None
    lines = len(scene.texts)
    things = {"line chart": (lines - 1) // 2, "pie chart": lines - 1, "receipt": (lines - 3) // 2}
    return {
        "picture": picture,
        "background": background,
        "things": things.get(picture, len(scene.regions)),
        "text": scene.texts[0].text if scene.texts else "none",
    }


@lru_cache(maxsize=1)
def plain_names() -> frozenset[str]:
    """Names of objects that are a single thing and contain no writing."""
    from florence_vl_mini.scenes.assets import SPLITS, sprites

    everything = [sprite for split in SPLITS for sprite in sprites(split)]
    unclear = {sprite.name for sprite in everything if not sprite.countable or WRITTEN_ON.search(sprite.name)}
    return frozenset(sprite.name for sprite in everything) - unclear


def background_of(scene: Scene) -> str | None:
    """The name of a scene's background; None unless the drawn and the visible color agree.

    The visible color is that of the outermost frame of the picture, which is never covered.
    """
    from florence_vl_mini.scenes.draw import BACKGROUNDS, COLORS

    pixels = np.asarray(scene.image, dtype=np.int16)
    width = max(1, scene.image.width // 128)
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[width:-width, width:-width] = True
    frame = pixels[~inner]
    spread = int(np.ptp(frame, axis=0).max())
    drawn = re.search(r" on an? ([a-z ]+) background", scene.detailed_caption)
    if drawn is not None and drawn[1] == "patterned":
        return "mixed" if spread >= MIXED else None
    distances = {name: float(np.abs(frame.mean(axis=0) - COLORS[name]).sum()) for name in BACKGROUNDS}
    seen = min(distances, key=distances.__getitem__)
    if spread > ONE_COLOR or distances[seen] > NEAR or seen in ALIKE or (drawn is not None and drawn[1] != seen):
        return None
    return seen


def make_data(folder: Path, pictures: int, held_out: int, size: int, seed: int = 0) -> DemoData:
    """Render pictures with their JSON into `folder`; the same arguments give the same files.

    Args:
        folder: Created if necessary.
        pictures: Number of training pictures.
        held_out: Number of held-out pictures, from the test split.
        size: Side of a picture in pixels.
        seed: Seed of the pictures.

    Raises:
        ValueError: No training or held-out pictures, or pictures too small to read.
    """
    from florence_vl_mini.datasets.writers import encode_image

    if pictures < 1 or held_out < 1:
        raise ValueError(f"{pictures} training and {held_out} held-out pictures; both must be at least 1")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    values: dict[str, Counter[Any]] = {key: Counter() for key in KEYS}
    for scene, answer in _described("train", size, seed, pictures):
        name = f"{scene.id}.jpg"
        (images / name).write_bytes(encode_image(scene.image))
        talk = [("human", f"<image>\n{PROMPT}"), ("gpt", json.dumps(answer))]
        rows.append(
            {"id": scene.id, "image": name, "conversations": [{"from": who, "value": text} for who, text in talk]}
        )
        for key in KEYS:
            values[key][answer[key]] += 1
    file = folder / "train.json"
    file.write_text(json.dumps(rows, indent=0), encoding="utf-8")
    commonest = {key: counter.most_common(1)[0][0] for key, counter in values.items()}
    asked = [Example(encode_image(scene.image), answer) for scene, answer in _described("test", size, seed, held_out)]
    return DemoData(file, images, commonest, asked)


def _described(split: str, size: int, seed: int, number: int) -> Iterator[tuple[Scene, Answer]]:
    from florence_vl_mini.scenes import SceneGenerator

    scenes = SceneGenerator(SEED + seed, split, size, MIX)
    index = found = 0
    while found < number:
        scene = scenes[index]
        index += 1
        answer = describe(scene)
        if answer is not None:
            found += 1
            yield scene, answer
        elif index > 100 * (found + 10):
            raise ValueError(f"only {found} of {index} scenes of {size} px can be described")
