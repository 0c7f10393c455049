"""Scores by size of text and object, shapes, colors and counts: correct answers score 1, others score at chance."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from florence_vl_mini.pretrain import details
from florence_vl_mini.scenes import Scene


class Knowing:
    """Answers what was drawn, as far as `details` drew it through the wrapped functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processor = SimpleNamespace(image_processor=SimpleNamespace(size={"height": 128}))
        self.scenes: dict[int, Scene] = {}
        self.words: dict[int, str] = {}
        self.keep: list[Any] = []
        held_out, word_picture = details.held_out, details.word_picture

        def noted_scenes(*args: Any) -> list[Scene]:
            found = held_out(*args)
            self.scenes.update({id(scene.image): scene for scene in found})
            self.keep.append(found)
            return found

        def noted_word(*args: Any) -> Any:
            image, word = word_picture(*args)
            self.words[id(image)] = word
            self.keep.append(image)
            return image, word

        monkeypatch.setattr(details, "held_out", noted_scenes)
        monkeypatch.setattr(details, "word_picture", noted_word)

    def answer(self, images: list[Any], task: str) -> list[str]:
        if task == "<OCR>":
            return [self.words[id(image)] for image in images]
        return [self.scenes[id(image)].target(task) for image in images]

    def detect(self, images: list[Any]) -> list[tuple[list[str], list[Any]]]:
        scenes = [self.scenes[id(image)] for image in images]
        return [([r.name for r in s.regions], [r.box for r in s.regions]) for s in scenes]


def test_a_model_that_knows_has_full_marks_and_shuffled_answers_have_not(monkeypatch: pytest.MonkeyPatch) -> None:
    report = details.evaluate_details(Knowing(monkeypatch), pictures=12)  # type: ignore[arg-type]
    assert set(report) == {"text size", "object size", "geometry"}
    for group in report.values():
        chances = group.pop("chance")
        assert set(chances) == set(group)
        for name, figure in group.items():
            if figure["n"]:
                assert figure["mean"] == 1, name
                assert chances[name] < 0.8, name


def test_words_have_the_height_that_is_asked_for() -> None:
    for pixels in (12, 40):
        heights = []
        for i in range(12):
            image, word = details.word_picture(Random(i), 256, pixels)
            gray = image.convert("L")
            ground = gray.getpixel((0, 0))
            box = gray.point([255 if abs(v - ground) > 60 else 0 for v in range(256)]).getbbox()
            assert box is not None
            assert word
            heights.append(box[3] - box[1])
        assert 0.4 * pixels < sum(heights) / len(heights) < 1.1 * pixels
