"""What scenes are made of: named sprites, fonts and words from the florence-vl-mini package, divided by split."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageFont

import florence_vl_mini as package

SPLITS = ("train", "val", "test")

_WORDS = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text())
_NAMEABLE, _OBSCURE, _CLIP_ART, _MASS, _PLURAL = (
    frozenset(_WORDS[key]) for key in ("nameable", "obscure", "clip_art", "mass", "plural")
)
_IRREGULAR: dict[str, str] = _WORDS["irregular"]
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Sprite:
    """One cut-out picture with its name.

    Attributes:
        id: Its id in the package's index.
        name: What it shows, without an article.
        category: "animal", "fruit", ... or None.
        related: Words that would make another name ambiguous beside it.
        style: "fluent", "noto" or "openclipart".
        new_concept: No picture of this concept belongs to the training split.
    """

    id: str
    name: str
    category: str | None
    related: frozenset[str]
    style: str
    new_concept: bool

    @property
    def countable(self) -> bool:
        """Whether "two ...s" is good English."""
        return (
            not is_plural(self.name)
            and self.name not in _MASS
            and not re.search(r" (with|of|in|and|behind|on) ", self.name)
        )

    def conflicts(self, other: Sprite) -> bool:
        """Whether a person might call one of the two by the other's name."""
        mine, theirs = set(_words(self.name)), set(_words(other.name))
        if mine & (theirs | other.related) or theirs & (mine | self.related):
            return True
        # cupcake ~ cake, paintbrush ~ paint
        return any(a in b or b in a for a in mine for b in theirs if min(len(a), len(b)) > 3)


def _words(text: str) -> list[str]:
    generic = {
        "face",
        "with",
        "and",
        "of",
        "in",
        "on",
        "behind",
        "red",
        "green",
        "blue",
        "yellow",
        "black",
        "white",
        "the",
    }
    return [w.removesuffix("s") for w in re.findall(r"[a-z']+", text.lower()) if w not in generic]


def with_article(name: str) -> str:
    """ "a dog", "an owl", "some popcorn", "scissors"."""
    bare = re.sub("^(large|small) ", "", name)
    if bare in _MASS:
        return f"some {name}"
    if is_plural(bare):
        return name
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "one", "eu", "use"))
    return f"an {name}" if vowel or name.startswith(("hour", "x-")) else f"a {name}"


def is_plural(name: str) -> bool:
    """Whether the name is a plural already ("scissors", "paw prints"), of which people may count one or many."""
    return name in _PLURAL


def plural(name: str) -> str:
    """The plural of a countable name."""
    head, _, last = name.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith("fish"):
        pass
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    else:
        last += "s"
    return f"{head} {last}".strip()


def counted(name: str, n: int) -> str:
    """ "a dog", "two dogs"."""
    return with_article(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}"


def _nameable(row: dict[str, Any]) -> bool:
    name = row["caption"]
    if row["set"] == "openclipart":
        return name in _CLIP_ART
    if name in _OBSCURE or len(name) > 24 or len(name.split()) > 4 or not name.isascii():
        return False
    folder = row["folder"].replace(" & ", "-").replace(" ", "-")
    return folder in _NAMEABLE or any(
        folder.startswith(f) for f in ("face", "heart", "emotion", "sky", "light", "arts")
    )


@lru_cache
def sprites(split: str) -> tuple[Sprite, ...]:
    """Named sprites of a split, in the index's order."""
    return tuple(_sprite(row) for row in package.load_index() if row["split"] == split and _nameable(row))


def _sprite(row: dict[str, Any]) -> Sprite:
    # a tag that is a word of the name, or of another name, marks synonyms: automobile ~ car, cat face ~ cat
    related = frozenset(w for k in row["keywords"][:40] for w in _words(k))
    return Sprite(row["id"], row["caption"], row["category"], related, row["set"], row["new_concept"])


@lru_cache
def by_category(split: str) -> dict[str, tuple[Sprite, ...]]:
    """Sprites of a split by category, only those that have one."""
    groups: dict[str, list[Sprite]] = defaultdict(list)
    for sprite in sprites(split):
        if sprite.category:
            groups[sprite.category].append(sprite)
    return {name: tuple(group) for name, group in groups.items()}


def vocabulary(name: str) -> list[str]:
    """A list of `words.yaml`, e.g. "cities"."""
    return _WORDS[name]


def facts() -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Wording -> (names of which it is true, categories of which it surely is not unless named)."""
    return {wording: (frozenset(f["holds"]), frozenset(f["fails"])) for wording, f in _WORDS["facts"].items()}


@lru_cache
def _rows() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in package.load_index()}


@lru_cache(maxsize=4096)
def picture(sprite_id: str) -> Image.Image:
    """The RGBA picture of a sprite; do not change it in place."""
    return package.open_sprite(_rows()[sprite_id])


@lru_cache
def font_files() -> tuple[Path, ...]:
    """The package's fonts."""
    return tuple(package.font_paths())


@lru_cache(maxsize=512)
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at a pixel size."""
    return ImageFont.truetype(str(path), size)


def sans(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The plain font of labels in charts and documents."""
    name = "LiberationSans-Bold.ttf" if bold else "LiberationSans-Regular.ttf"
    return font(next(p for p in font_files() if p.name == name), size)


@lru_cache
def words(split: str) -> tuple[str, ...]:
    """Words for text in pictures, 3 to 8 letters; every word belongs to one split."""
    cuts = {"train": (0.0, 0.9), "val": (0.9, 0.94), "test": (0.94, 1.0)}
    low, high = cuts[split]
    return tuple(w for w in package.words() if len(w) <= 8 and low <= _unit(w) < high)


def table_rows() -> list[dict[str, Any]]:
    """The package's tables of real numbers, of all splits."""
    return package.load_tables()


def _unit(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


@lru_cache
def photo_textures() -> tuple[Image.Image, ...]:
    """Grass, gravel, brick and sky photographs for busy backgrounds."""
    wanted = ("brick", "grass", "gravel", "hubble_deep_field")
    return tuple(Image.open(p["file"]).convert("RGB") for p in package.photos() if p["id"] in wanted)
