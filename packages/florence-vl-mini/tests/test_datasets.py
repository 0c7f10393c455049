"""Scenes written as LLaVA JSONL, parquet and WebDataset are read back by the project's readers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("florence_vl_mini")

from PIL import Image

from florence_vl.data.readers import open_reader
from florence_vl.data.records import ImageRef
from florence_vl_mini.datasets import writers
from florence_vl_mini.scenes import SceneGenerator


def _pixels(source: Any) -> np.ndarray:
    if isinstance(source, ImageRef):
        source = source.read()
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("format", writers.FORMATS)
def test_round_trip(tmp_path: Path, format: str) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow")
    generator = SceneGenerator(1, "train", 96)
    path = writers.write(tmp_path / "out", generator, 12, format, ("vqa", "detailed_caption"))
    reader = open_reader(path)
    assert len(reader) == 12
    wanted = []
    for index in range(12):
        scene = generator[index]
        wanted.append((scene, scene.record(("vqa", "detailed_caption")[index % 2])))
    for record, (scene, expected) in zip((reader[i] for i in range(12)), wanted, strict=True):
        assert record.id == expected["id"]
        assert [m["role"] for m in record.messages] == [m["role"] for m in expected["messages"]]
        answers = [m["content"][-1]["text"] for m in record.messages]
        assert answers == [m["content"][-1]["text"] for m in expected["messages"]]
        assert np.abs(_pixels(record.images[0]) - np.asarray(scene.image).astype(int)).mean() < 6  # JPEG


def test_same_arguments_same_files(tmp_path: Path) -> None:
    one = writers.write(tmp_path / "a", SceneGenerator(1, "train", 64), 5)
    other = writers.write(tmp_path / "b", SceneGenerator(1, "train", 64), 5)
    assert one.read_bytes() == other.read_bytes()
    assert [p.read_bytes() for p in sorted((tmp_path / "a/images").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "b/images").iterdir())
    ]


def test_scenes_without_the_annotation_are_passed_over(tmp_path: Path) -> None:
    rows = list(writers.rows(SceneGenerator(0, "train", 64, {"objects": 1.0}), ["ocr"], 5))
    assert len(rows) == 5
    assert all(row["conversations"][1]["value"] for row in rows)


def test_bad_arguments(tmp_path: Path) -> None:
    generator = SceneGenerator(0, "train", 64)
    with pytest.raises(ValueError, match="parquet"):
        writers.write(tmp_path / "x", generator, 1, "parket")
    with pytest.raises(ValueError, match="vqa"):
        writers.write(tmp_path / "x", generator, 1, tasks=("vqaa",))
    with pytest.raises(ValueError, match="at least one"):
        writers.write(tmp_path / "x", generator, 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="not empty"):
        writers.write(tmp_path / "full", generator, 1)
    assert not list(tmp_path.glob(".*partial*"))
    with pytest.raises(ValueError, match="has an annotation for the task 'ocr'"):
        writers.write(tmp_path / "y", SceneGenerator(0, "train", 64, {"single": 1.0}), 1, tasks=("ocr",))
    assert not (tmp_path / "y").exists()
