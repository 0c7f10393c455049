"""Accuracy of a Florence-2 by size: text, boxes, shapes, colors and counts on held-out pictures.

Sizes are in pixels of the model input, after resizing to the tower's side.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from florence_vl_mini.pretrain.runner import Florence2Runner, character_accuracy, held_out, iou, with_interval
from florence_vl_mini.scenes import Scene, assets, draw

TEXT_SIZES = ((10, 14), (14, 24), (24, 40), (40, 64))
OBJECT_SIZES = ((0, 64), (64, 96), (96, 1000))
COUNTED = 5  # largest number that the counts ask for


def word_picture(rng: Random, size: int, pixels: float) -> tuple[Image.Image, str]:
    """One word of the test split in a font of about `pixels` pixels on a plain background."""
    ground, ink = rng.choice((("white", "black"), ("black", "white"), ("light yellow", "dark blue"), ("blue", "white")))
    image = Image.new("RGB", (size, size), draw.jitter(rng, draw.COLORS[ground]))
    font = assets.font(rng.choice(assets.font_files()), round(pixels))
    words = [w for w in assets.words("test") if font.getlength(w.upper()) < size - 16]
    word = rng.choice(words)
    word = rng.choice((word, word.capitalize(), word.upper()))
    left, top, right, bottom = font.getbbox(word)
    x, y = rng.uniform(4, size - 4 - (right - left)), rng.uniform(4, size - 4 - (bottom - top))
    ImageDraw.Draw(image).text((x - left, y - top), word, font=font, fill=draw.COLORS[ink])
    return image, word


def evaluate_details(runner: Florence2Runner, pictures: int = 300, seed: int = 0) -> dict[str, Any]:
    """Scores by size of text and object, and of shapes, colors and counts.

    Args:
        runner: The model.
        pictures: Pictures per figure; those with small objects are the ones that occur among them.
        seed: Seed of the pictures.

    Returns:
        {"text size": ..., "object size": ..., "geometry": ...}: figures with intervals and their "chance", the score of
        the answers to the next picture.
    """
    size = runner.processor.image_processor.size["height"]
    return {
        "text size": _reading(runner, size, pictures, seed),
        "object size": _boxes(runner, size, pictures, seed),
        "geometry": _geometry(runner, size, pictures, seed),
    }


def _reading(runner: Florence2Runner, size: int, pictures: int, seed: int) -> dict[str, Any]:
    out: dict[str, Any] = {"chance": {}}
    for low, high in TEXT_SIZES:
        rng = Random(f"details/{seed}/{low}")
        drawn = [word_picture(rng, size, rng.uniform(low, high) * size / 256) for _ in range(pictures)]
        said = runner.answer([image for image, _ in drawn], "<OCR>")
        words = [word for _, word in drawn]
        name = f"characters at {low} to {high} px"
        out[name], out["chance"][name] = _against_chance(said, words, character_accuracy)
    return out


def _boxes(runner: Florence2Runner, size: int, pictures: int, seed: int) -> dict[str, Any]:
    scenes = held_out("objects", pictures, seed + 1, size)
    found = [boxes for _, boxes in runner.detect([s.image for s in scenes])]
    out: dict[str, Any] = {"chance": {}}
    for low, high in OBJECT_SIZES:
        scores: dict[str, list[float]] = defaultdict(list)
        for kind, boxes in (("", found), ("chance", found[1:] + found[:1])):
            for scene, given in zip(scenes, boxes, strict=True):
                for box in (r.box for r in scene.regions):
                    if low <= max(box[2] - box[0], box[3] - box[1]) * 256 / size < high:
                        scores[kind].append(float(any(iou(box, other) >= 0.5 for other in given)))
        name = f"boxes found, {low} to {high} px" if high < 1000 else f"boxes found, {low} px and above"
        out[name] = with_interval(scores[""])
        out["chance"][name] = with_interval(scores["chance"])["mean"]
    return out


def _geometry(runner: Florence2Runner, size: int, pictures: int, seed: int) -> dict[str, Any]:
    alone = held_out("shapes", pictures, seed, size, lambda s: len(s.regions) == 1 and not s.texts)
    captions = runner.answer([s.image for s in alone], "<CAPTION>")
    details = runner.answer([s.image for s in alone], "<DETAILED_CAPTION>")
    several = held_out("shapes", pictures, seed + 1, size, lambda s: 1 <= len(s.regions) <= COUNTED)
    numbers = [str(len(boxes)) for _, boxes in runner.detect([s.image for s in several])]
    measures = {
        "shape": (captions, [s.regions[0].name for s in alone], _says),
        "color": (captions, [_color(s) for s in alone], _says),
        "background color": ([_ground(text) for text in details], [_ground(s.detailed_caption) for s in alone], _same),
        f"number of boxes, up to {COUNTED}": (numbers, [str(len(s.regions)) for s in several], _same),
    }
    out: dict[str, Any] = {"chance": {}}
    for name, (said, wanted, right) in measures.items():
        out[name], out["chance"][name] = _against_chance(said, wanted, right)
    return out


def _against_chance(said: Sequence[str], wanted: Sequence[str], score: Any) -> tuple[dict[str, float], float]:
    own = [float(score(a, b)) for a, b in zip(said, wanted, strict=True)]
    other = [float(score(a, b)) for a, b in zip([*said[1:], *said[:1]], wanted, strict=True)]
    return with_interval(own), float(np.mean(other))


def _says(answer: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", answer) is not None


def _same(answer: str, wanted: str) -> bool:
    return answer == wanted


def _color(scene: Scene) -> str:
    return scene.regions[0].description.removesuffix(f" {scene.regions[0].name}")


def _ground(text: str) -> str:
    found = re.search(r"on an? ([a-z ]+) background", text)
    return found[1] if found else ""
