"""The mini suite: about 1,000 questions on held-out pictures of the mini data, in the paper's four groups.

`mini_tables` asks more of the same kind, 2,000 questions that begin with those of `mini`, for tables that must tell
rows apart. `mini_drawings` asks 300 questions about the kinds of picture that people draw to try a model.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, cast

from florence_vl.evaluate.suites import PackagedSuite
from florence_vl.files import atomic_folder, cache_dir
from florence_vl.registry import did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from florence_vl_mini.scenes.annotations import Question

PICTURES = 260  # of the split `test`, whose sprites, fonts and words are in no training picture
QUESTIONS_PER_GROUP = 300
TABLES_PICTURES, TABLES_QUESTIONS_PER_GROUP = 1400, 500
DRAWINGS = ("drawing", "sign", "price_list", "plain_chart", "dialog")
DRAWINGS_OF_EACH, QUESTIONS_PER_DRAWING = 20, 3
SEED = 0
SIZE = 256, 256  # px


def mini_rows(
    pictures: int = PICTURES,
    per_group: int = QUESTIONS_PER_GROUP,
    prefix: str = "mini",
    size: tuple[int, int] = SIZE,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the suite by benchmark name; the same on every machine.

    Args:
        pictures: How many pictures are asked about.
        per_group: At most that many questions of each group.
        prefix: Of the benchmarks' names.
        size: Width and height of the pictures in pixels.
    """
    from florence_vl_mini.scenes import GROUPS, SceneGenerator

    scenes = SceneGenerator(seed=SEED, split="test", size=min(size))
    rows: dict[str, list[dict[str, Any]]] = {f"{prefix}_{group}": [] for group in GROUPS}
    for index in range(pictures):
        scene = scenes[index]
        image = None
        for number, question in enumerate(scene.questions):
            group = rows[f"{prefix}_{question.group}"]
            if len(group) >= per_group:
                continue
            image = image or _png(scene.image, size)
            group.append(_row(str(index), number, image, question))
    return rows


def drawing_rows(
    of_each: int = DRAWINGS_OF_EACH, per_drawing: int = QUESTIONS_PER_DRAWING, size: tuple[int, int] = SIZE
) -> dict[str, list[dict[str, Any]]]:
    """Rows of `mini_drawings`: questions of different skills about each picture; the same on every machine.

    Args:
        of_each: Pictures of each kind.
        per_drawing: Questions about a picture, at most.
        size: Width and height of the pictures in pixels.
    """
    from florence_vl_mini.scenes import SceneGenerator

    rows = []
    for kind in DRAWINGS:
        scenes = SceneGenerator(seed=SEED, split="test", size=min(size), mix={kind: 1.0})
        for index in range(of_each):
            scene = scenes[index]
            asked = list(enumerate(scene.questions))
            Random(index).shuffle(asked)
            by_skill = {question.skill: (number, question) for number, question in reversed(asked)}
            image = _png(scene.image, size)
            chosen = list(by_skill.values())[:per_drawing]
            rows += [_row(f"{kind}-{index}", number, image, question) for number, question in chosen]
    return {"mini_drawings": rows}


def _row(picture: str, number: int, image: bytes, question: Question) -> dict[str, Any]:
    row = {"id": f"{picture}-{number}", "picture": picture, "image": {"bytes": image, "path": None}}
    row |= {"skill": question.skill, "prompt": question.prompt, "answer": question.answer}
    return row | {"choices": list(question.choices or ())}


def _png(image: Image, size: tuple[int, int]) -> bytes:
    from PIL import ImageOps

    file = io.BytesIO()
    if image.size != size:
        image = ImageOps.pad(image, size, color=cast(tuple[int, ...], image.getpixel((0, 0))))
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_suite(folder: Path, name: str = "mini", size: tuple[int, int] = SIZE) -> None:
    """Write a suite's parquet files.

    Args:
        folder: To write to; created if it does not exist.
        name: mini, mini_tables or mini_drawings.
        size: Width and height of the pictures in pixels. A scene is drawn as a square of the shorter side, in the
            middle of a canvas of its corner's color. The pages of `mini_drawings` are the same at every size; of the
            other scenes some arrangements differ.

    Raises:
        ValueError: No such suite.
    """
    if name not in ROWS:
        raise ValueError(f"no mini suite {name!r}. {did_you_mean(name, ROWS)}")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, ROWS[name](size))


def mini_folder() -> Path:
    """A folder in the cache with the parquet files of `mini`, made when it isn't there."""
    return _cached("mini-suite", "mini")


def tables_folder() -> Path:
    """A folder in the cache with the parquet files of `mini_tables`, made when it isn't there."""
    return _cached("mini-tables", "mini_tables")


def drawings_folder() -> Path:
    """A folder in the cache with the parquet file of `mini_drawings`, made when it isn't there."""
    return _cached("mini-drawings", "mini_drawings")


def _cached(name: str, suite: str) -> Path:
    folder = cache_dir() / name / _version()
    if folder.is_dir():
        return folder
    try:
        with atomic_folder(folder) as partial:
            write_suite(partial, suite)
    except (OSError, ValueError):
        if not folder.is_dir():  # else another process was first
            raise
    return folder


@lru_cache(maxsize=1)
def _version() -> str:
    """Digest of all that the suite is made of: this module, the generator's, and the package's data."""
    import florence_vl_mini
    import florence_vl_mini.scenes as scenes

    assert scenes.__file__ is not None
    code = [Path(__file__), *Path(scenes.__file__).parent.glob("*.py")]
    data = [path for path in florence_vl_mini.DATA.rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted([*code, *data]):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([(k, pa.string()) for k in ("id", "picture", "skill", "prompt", "answer")])
    schema = schema.append(pa.field("choices", pa.list_(pa.string()))).append(pa.field("image", image))
    # The Hugging Face `datasets` library reads the column as images.
    features = {name: {"dtype": "string", "_type": "Value"} for name in ("id", "picture", "skill", "prompt", "answer")}
    choices = {"feature": features["id"], "_type": "List"}
    known: dict[str, Any] = {**features, "choices": choices, "image": {"_type": "Image"}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": known}})})
    for name, group in rows.items():
        pq.write_table(pa.Table.from_pylist(group, schema=schema), folder / f"{name}.parquet", row_group_size=128)


ROWS: dict[str, Callable[[tuple[int, int]], dict[str, list[dict[str, Any]]]]] = {
    "mini": lambda size: mini_rows(size=size),
    "mini_tables": lambda size: mini_rows(TABLES_PICTURES, TABLES_QUESTIONS_PER_GROUP, "mini_tables", size),
    "mini_drawings": lambda size: drawing_rows(size=size),
}
SUITE = PackagedSuite(Path(__file__).parent / "suites", "florence-vl-mini", mini_folder)
TABLES_SUITE = PackagedSuite(Path(__file__).parent / "suites_tables", "florence-vl-mini-tables", tables_folder)
DRAWINGS_SUITE = PackagedSuite(Path(__file__).parent / "suites_drawings", "florence-vl-mini-drawings", drawings_folder)
