"""Freely licensed images, fonts, words and small weights with which florence-vl runs offline.

The license and source of every set are in `data/licences/<package>/`.
"""

from __future__ import annotations

import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

DATA = Path(__file__).parent / "data"
WEIGHTS = Path(__file__).parent / "weights"
RECIPES = Path(__file__).parent / "recipes"  # entry point of `florence_vl.recipes`
_ARCHIVES: dict[str, zipfile.ZipFile] = {}


@lru_cache
def load_index() -> list[dict[str, Any]]:
    """All sprites: id, set, file, size [w, h], caption, keywords, category, folder, concept, new_concept, split.

    `split` is train, val or test. With `new_concept`, no image of the concept is in the training split; otherwise only
    the image itself is held out.
    """
    return json.loads((DATA / "index.json").read_text())


def open_sprite(row: dict[str, Any]) -> Image.Image:
    """The RGBA image of an index row, at most 112 px per side, trimmed to its visible part."""
    from PIL import Image

    archive = _ARCHIVES.get(row["set"])
    if archive is None:
        archive = _ARCHIVES[row["set"]] = zipfile.ZipFile(io.BytesIO((DATA / f"{row['set']}.zip").read_bytes()))
    return Image.open(io.BytesIO(archive.read(row["file"]))).convert("RGBA")


def font_paths() -> list[Path]:
    """The included fonts, sorted by name."""
    return sorted(p for p in (DATA / "fonts").iterdir() if p.suffix in (".ttf", ".otf"))


@lru_cache
def words() -> list[str]:
    """About 4,700 common English words, sorted."""
    return (DATA / "words.txt").read_text().split()


@lru_cache
def load_tables() -> list[dict[str, Any]]:
    """Small tables of real numbers: id, kind, title, label, labels, columns (name, unit, values), source, licence,
    split.

    `kind` is series (over time), groups, parts (percent of a whole) or pairs (two measures per item); `values` are
    numbers as written, at most 4 characters.
    """
    return json.loads((DATA / "tables.json").read_text())


def photos() -> list[dict[str, str]]:
    """The sample photographs: id, file (absolute path), caption, source."""
    rows = json.loads((DATA / "photos/index.json").read_text())
    return [row | {"file": str(DATA / "photos" / row["file"])} for row in rows]


def photo_files() -> list[str]:
    """Files of the photographs with a visible subject: the entry point of `florence_vl.pictures`, for web pages."""
    textures = ("brick", "grass", "gravel")
    return [row["file"] for row in photos() if row["id"] not in textures]


def florence2_path() -> Path:
    """The folder of the mini Florence-2 (weights, tokenizer, processor, model card).

    Raises:
        FileNotFoundError: This build of the package does not include the weights.
    """
    path = WEIGHTS / "florence2"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"florence-vl-mini does not include Florence-2 weights (looked for {path}/model.safetensors): "
            "train them with `florence-vl mini train`, or build an untrained one with "
            "florence_vl_mini.pretrain.model.build_mini_florence2"
        )
    return path


def florence_vl_path() -> Path:
    """The file that turns the mini Florence-2 and SmolLM2-135M-Instruct into a mini Florence-VL (safetensors).

    `florence_vl_mini.models.mini_florence_vl()` assembles the model. The model card is in the same folder.

    Raises:
        FileNotFoundError: This build of the package does not include these weights.
    """
    path = WEIGHTS / "florence-vl" / "adapter.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"florence-vl-mini does not include Florence-VL weights (looked for {path}): make mini-train trains them"
        )
    return path
