"""The package florence-vl-mini: pictures open, licenses are included, archives are checked; `florence-vl mini data`."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from florence_vl.cli.main import main

mini = pytest.importorskip("florence_vl_mini")
build = pytest.importorskip("florence_vl_mini.assets.build")


def test_every_picture_opens_and_is_small() -> None:
    rows = mini.load_index()
    assert len(rows) == len({r["id"] for r in rows}) > 2000
    for row in rows[::40]:
        image = mini.open_sprite(row)
        assert image.mode == "RGBA"
        assert list(image.size) == row["size"]
        assert max(image.size) == 112
        assert image.getchannel("A").getextrema()[1] > 200
    assert sum(p.stat().st_size for p in mini.DATA.rglob("*") if p.is_file()) < 25e6


def test_splits_hold_out_concepts_and_images() -> None:
    rows = mini.load_index()
    train = {r["concept"] for r in rows if r["split"] == "train"}
    for row in rows:
        assert (row["concept"] not in train) == row["new_concept"], row["id"]
    sizes = Counter((r["split"], r["new_concept"]) for r in rows)
    assert sizes["test", True] > 100
    assert sizes["test", False] > 100
    assert sizes["train", True] == 0


def test_each_source_has_licence_and_origin() -> None:
    for name, source in build.SOURCES.items():
        folder = mini.DATA / "licences" / name
        assert len((folder / "LICENSE").read_text()) > 100
        assert source.how in (folder / "SOURCE").read_text()
    assert all(p.suffix in (".ttf", ".otf") for p in mini.font_paths())
    photos = mini.photos()
    assert {p["id"] for p in photos} >= {"astronaut", "chelsea", "coffee"}
    assert all(Path(p["file"]).is_file() and ("CC0" in p["source"] or "public domain" in p["source"]) for p in photos)


def test_nothing_unsuitable_is_named() -> None:
    for row in mini.load_index():
        if row["set"] == "openclipart":
            assert not set(row["caption"].split()) & build.UNSUITABLE, row["id"]


def test_weights_or_how_to_get_them() -> None:
    if (mini.WEIGHTS / "florence2").exists():
        path = mini.florence2_path()
        assert (path / "model.safetensors").is_file()
        assert (path / "README.md").is_file()
    else:
        with pytest.raises(FileNotFoundError, match="florence-vl mini train"):
            mini.florence2_path()


def test_wrong_archive_is_named(tmp_path: Path) -> None:
    source = build.SOURCES["emojibase"]
    (tmp_path / "emojibase-data-17.0.0.tgz").write_bytes(b"not it")
    with pytest.raises(ValueError, match=r"emojibase-data-17.0.0.tgz has SHA-256 .*npm pack emojibase-data@17.0.0"):
        build.fetch(source, tmp_path)


def test_missing_package_manager_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="npm is not installed: run `npm pack"):
        build.fetch(build.SOURCES["fluent"], tmp_path)


def test_half_unpacked_archive_is_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "thing-1.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/file.txt")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"whole"))
    source = build.Source("npm", "thing", "1.0", hashlib.sha256(archive.read_bytes()).hexdigest())
    target = tmp_path / "unpacked/thing/package"
    target.mkdir(parents=True)
    (target / "file.txt").write_text("ha")  # cut off: no mark of completion
    root = build._unpack(source, tmp_path)
    assert (root / "package/file.txt").read_text() == "whole"


def test_titles_of_clip_art_are_cleaned() -> None:
    class WordNet:
        counts = Counter({"fish": 5, "brown": 3, "dog": 9, "gun": 3})

        def lemma(self, word: str) -> str | None:
            return word if word in self.counts else None

        def is_noun(self, word: str) -> bool:
            return word in ("fish", "dog", "gun")

    title = build._title
    assert title("Brown Fish", WordNet()) == "brown fish"
    assert title("brown_fish_02 (Architetto)", WordNet()) == "brown fish"
    assert title("Pesce", WordNet()) is None
    assert title("Brown Gun", WordNet()) is None
    assert title("Dog Brown", WordNet()) is None  # no noun at the end


def test_command_writes_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["florence-vl", "mini", *args])
        try:
            return main() or 0  # type: ignore[func-returns-value]
        except SystemExit as end:
            return int(end.code or 0)

    out = str(tmp_path / "d")
    assert run("data", "--out", out, "--samples", "4", "--size", "64", "--task", "caption") == 0
    lines = [json.loads(line) for line in (tmp_path / "d/data.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["caption"] * 4
    assert run("data", "--out", out, "--samples", "4") == 2
    assert "not empty" in capsys.readouterr().err
    assert run("data", "--out", out, "--samples", "2", "--size", "64", "--overwrite") == 0
    assert len((tmp_path / "d/data.jsonl").read_text().splitlines()) == 2
    assert run("data", "--out", str(tmp_path / "e"), "--split", "trian") == 2
    assert run("data", "--set", "caption") == 2
    assert run("data", "--set", "captions", "--seed", "3") == 2
    assert run("data", "--samples", "4") == 2
    assert run("data", "--set", "captions", "--samples", "3", "--out", str(tmp_path / "set")) == 0
    lines = [json.loads(line) for line in (tmp_path / "set/data.jsonl").read_text().splitlines()]
    assert [line["id"].split("-")[:2] for line in lines] == [["train", "2"]] * 3
    assert "Known: train, val, test" in capsys.readouterr().err
