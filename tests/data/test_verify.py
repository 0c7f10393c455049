"""A local copy of a data set is compared with the published figures before a run uses it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from florence_vl.cli.data import app
from florence_vl.data.verify import PictureIndex, verify_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))


def photo(seed):
    """A picture with structure at every scale, like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    fine = rng.integers(0, 40, (240, 320, 3), dtype=np.uint8)
    return Image.fromarray(np.asarray(coarse.resize((320, 240), Image.Resampling.BICUBIC)) // 2 + fine)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_docmatix(root, pictures):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [[{"bytes": data, "path": None}] for data in pictures]
    texts = [[{"user": "Q?", "assistant": "A.", "source": "x"}]] * len(cells)
    (root / "data").mkdir(parents=True)
    table = pa.table({"images": cells, "texts": texts})
    parquet.write_table(table, root / "data" / "train-00001-of-01106.parquet")
    return root


def test_counts_shards_broken_and_repeated_images(tmp_path):
    one = encoded(photo(0), "JPEG")
    write_docmatix(tmp_path / "set", [one, one, encoded(photo(1), "PNG"), b"no picture"])
    found = "\n".join(verify_dataset("docmatix", tmp_path / "set"))
    assert "4 records, 1,273,215 are published" in found
    assert "1105 of 1106 shards are missing, e.g. number 0" in found
    assert "1 of 4 records: image, e.g. " in found
    assert "1 of the 3 examined images are also in another record" in found
    assert "benchmark" not in found


def test_missing_columns_and_dead_links(tmp_path):
    row = {"id": "1", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    (tmp_path / "a.json").write_text(json.dumps([row, {**row, "image": "a.png"}]))
    found = verify_dataset("cambrian-7m", tmp_path / "a.json", image_root=tmp_path)
    assert "missing columns: source" in found
    folder = tmp_path / "set" / "data"
    write_docmatix(tmp_path / "set", [encoded(photo(0), "JPEG")])
    report = {"count": 10, "successes": 7, "failed_to_download": 3, "failed_to_resize": 0}
    (folder / "00000_stats.json").write_text(json.dumps({**report, "status_dict": {"success": 7, "HTTP 404": 3}}))
    assert "3 of 10 links are dead (30.0%, 3 x HTTP 404)" in verify_dataset("docmatix", tmp_path / "set")
    (folder / "00001_stats.json").write_text("[]")
    assert any("00001_stats.json is not a report" in line for line in verify_dataset("docmatix", tmp_path / "set"))


def test_a_copy_is_found_in_another_size_and_encoding_and_others_are_not():
    index = PictureIndex((f"b question {n}", encoded(photo(n), "PNG")) for n in range(40))
    assert len(index) == 40
    copy = Image.open(io.BytesIO(encoded(photo(7).resize((200, 150)), "JPEG", quality=60)))
    assert index.find(copy) == "b question 7"
    assert [index.find(photo(seed)) for seed in range(100, 140)] == [None] * 40
    plain = PictureIndex([("b question 1", Image.new("RGB", (30, 30), "white")), ("b question 2", b"broken")])
    assert len(plain) == 0
    assert plain.find(photo(1)) is None
    assert index.find(Image.new("RGB", (30, 30), "white")) is None


def test_pictures_of_benchmarks_are_named_on_the_command_line(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = tmp_path / "benchmarks"
    data.mkdir()
    rows = {"id": ["7"], "question": ["Is it a cat?"], "answer": ["yes"], "category": ["random"]}
    rows |= {"question_id": ["1"], "image_source": ["x"], "image": [{"bytes": encoded(photo(3), "PNG"), "path": None}]}
    parquet.write_table(pa.table(rows), data / "pope.parquet")
    pictures = [encoded(photo(seed).resize((160, 120)), "JPEG") for seed in (3, 4)]
    write_docmatix(tmp_path / "set", pictures)
    run = CliRunner().invoke
    done = run(app, ["sources", "docmatix", "--verify", str(tmp_path / "set"), "--benchmarks", str(data)])
    assert done.exit_code == 1
    assert (
        "1 of the 2 examined images are pictures of benchmarks (1 in pope), e.g. an image of record '0' and pope"
        in (done.output)
    )
    empty = run(app, ["sources", "docmatix", "--verify", str(tmp_path / "set"), "--benchmarks", str(tmp_path / "set")])
    assert isinstance(empty.exception, FileNotFoundError)
    assert isinstance(run(app, ["sources", "docmatix", "--benchmarks", str(data)]).exception, ValueError)
