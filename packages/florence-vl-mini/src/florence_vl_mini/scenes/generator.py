"""Scenes by (seed, split, index): the same arguments always give the same picture and annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random

from florence_vl_mini.scenes import charts, documents, drawings, objects, screens, shapes
from florence_vl_mini.scenes.annotations import Scene, known
from florence_vl_mini.scenes.assets import SPLITS
from florence_vl_mini.scenes.questions import ask

Maker = Callable[[Random, str, int, str], Scene]
KINDS: dict[str, Maker] = {
    "single": objects.single,
    "objects": objects.arrangement,
    "lettering": objects.lettering,
    "receipt": documents.receipt,
    "form": documents.form,
    "table": documents.table,
    "bar_chart": charts.bar,
    "line_chart": charts.line,
    "pie_chart": charts.pie,
    "scatter_chart": charts.scatter,
    "shapes": shapes.shapes,
    "interface": screens.interface,
    "small_text": screens.small_text,
    "drawing": drawings.drawing,
    "sign": drawings.sign,
    "price_list": drawings.price_list,
    "plain_chart": drawings.plain_chart,
    "dialog": drawings.dialog,
}

# What the mini suite asks about: another mix would be another suite. The kinds that are not in it are for training.
DEFAULT_MIX: dict[str, float] = {
    "single": 0.1, "objects": 0.42, "lettering": 0.2, "receipt": 0.05, "form": 0.05, "table": 0.04,
    "bar_chart": 0.05, "line_chart": 0.04, "pie_chart": 0.03, "scatter_chart": 0.02,
}  # fmt: skip


class SceneGenerator:
    """Scenes without end, by index.

    Args:
        seed: Another seed, other scenes.
        split: "train", "val" or "test": sprites, words and random numbers of the splits are disjoint.
        size: Side of the square pictures in pixels, at least 64; documents and charts are meant for 192 and more.
        mix: Weight of each kind of scene; `DEFAULT_MIX` by default.

    Raises:
        ValueError: An unknown split or kind, or a size below 64.

    Example:
        >>> scene = SceneGenerator(0)[7]
        >>> scene.image.size, scene.caption, scene.od()  # doctest: +SKIP
    """

    def __init__(
        self,
        seed: int = 0,
        split: str = "train",
        size: int = 256,
        mix: Mapping[str, float] | None = None,
    ) -> None:
        known("split", split, SPLITS)
        if size < 64:
            raise ValueError(f"scenes of {size} px cannot be read: size must be 64 or more")
        self.seed, self.split, self.size = seed, split, size
        self.mix = dict(DEFAULT_MIX if mix is None else mix)
        for kind in self.mix:
            known("kind of scene", kind, KINDS)
        if not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise ValueError(f"weights of the kinds of scene must be positive, found {self.mix}")

    def __getitem__(self, index: int) -> Scene:
        """The scene number `index`, 0 or more."""
        if index < 0:
            raise IndexError(f"scenes are numbered from 0, not {index}")
        rng = Random(f"{self.seed}/{self.split}/{index}")
        kind = rng.choices(list(self.mix), list(self.mix.values()))[0]
        scene = KINDS[kind](rng, self.split, self.size, f"{self.split}-{self.seed}-{index}")
        scene.questions.extend(ask(scene, Random(f"q/{self.seed}/{self.split}/{index}"), self.split))
        return scene

    def scenes(self, n: int, start: int = 0) -> Iterator[Scene]:
        """The scenes `start` to `start + n`."""
        for index in range(start, start + n):
            yield self[index]
