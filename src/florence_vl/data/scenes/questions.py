"""Questions about objects and lettering."""

from __future__ import annotations

from random import Random

from florence_vl.data.scenes.annotations import Question, Scene


def ask(scene: Scene, rng: Random, split: str) -> list[Question]:
    return []
