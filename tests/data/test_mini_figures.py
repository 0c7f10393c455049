"""Captioned figures of manuals: fetched into the cache from archives, for training; and GCompris' resource files."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("florence_vl_mini")
figures = pytest.importorskip("florence_vl_mini.figures")

from florence_vl.cli.main import main  # noqa: E402
from florence_vl.data.readers import open_reader  # noqa: E402
from florence_vl.data.scenes.assets import may_be_shown  # noqa: E402
from florence_vl_mini import gcompris  # noqa: E402

ACTIVITIES = "gcompris/src/activities/"
GIMP = """<html><body>
<div class="figure"><p class="title"><strong>Figure 14.86. The Airbrush tool in Toolbox</strong></p>
  <div class="figure-contents"><div class="mediaobject"><img src="images/airbrush.png" alt="The Airbrush tool" />
  </div></div></div>
<div class="figure"><p class="title"><strong>Figure 2.1. Example for the “Blur” filter</strong></p><div>
  <div class="mediaobject"><img src="images/before.png"/><div class="caption"><p>Original image</p></div></div>
  <div class="mediaobject"><img src="images/after.png"/><div class="caption"><p>“Blur”<br>
     applied</p></div></div>
  <div class="mediaobject"><img src="images/unsaid.png"/></div></div></div>
<div class="informalfigure">
  <div class="mediaobject"><img src="images/lone.png"/><div class="caption">The mask of a layer</div></div></div>
<p>Click <span class="guiicon"><img src="images/icon.png" /></span></p>
<div class="mediaobject"><img src="images/file.png"/><div class="caption"><p>shot.png</p></div></div>
</body></html>"""
SPHINX = r"""<html><head><title>x</title></head><body><nav><img src="_static/logo.png" alt="the logo of it"></nav>
<h1>Canny edge detector<a class="headerlink" href="#">¶</a></h1>
<img src="_images/sphx_glr_plot_canny_001.png" alt="noisy image, Canny filter, $\sigma=1$, noisy image"
  class = "sphx-glr-single-img"/>
<ul><li><img src="_images/sphx_glr_plot_two_001.png" alt="Same, titles" class="sphx-glr-multi-img"/></li>
<li><img src="_images/sphx_glr_plot_two_002.png" alt="Same, titles" class="sphx-glr-multi-img"/></li></ul>
<img src="_images/sphx_glr_plot_canny_002.png" alt="plot canny" class="sphx-glr-single-img"/>
<figure class="align-center"><a><img alt="_images/user.png" src="_images/user.png"></a>
<figcaption><p><span class="caption-text">Clusters of \(\lambda\) points</span></p></figcaption></figure>
<div class="sphx-glr-thumbcontainer"><figure><img src="_images/thumb.png">
<figcaption><p><span class="caption-text">A thumbnail</span>
</p></figcaption></figure></div>
<img src="_images/plain.png" alt="A plain picture in the text"><img src="_images/inria.png" alt="inria_logo">
</body></html>"""
LONE = """<h1>Swirl of a grid</h1>
<img src="_images/sphx_glr_plot_swirl_001.png" alt="plot swirl" class="sphx-glr-single-img"/>"""
BOARD = """QtObject {
    property var tab: [
        {
            "title": qsTr("Zorilla"),
            "text": qsTr("The zorilla says \\"sss\\"."),
            "image2": "qrc:/gcompris/src/activities/explore_world_animals/resource/animals/zorilla.webp",
            "x": 0.3
        },
        {
            "title": qsTr("Weta"),
            "text": qsTr("Nobody says whose picture it is."),
            "image2": "qrc:/gcompris/src/activities/explore_world_animals/resource/animals/weta.webp"
        }
    ]
}"""
README = """Copyright: Somebody
License: CC0-1.0
Source: https://example.org
Files:
zorilla.webp
other.webp

Copyright: Another
License: Public Domain
Files:
screwDriver2.webp
fish1.webp
"""
COPYRIGHT = """Format: dep5

Files: *
Copyright: all
License: GPL-3+

Files: src/activities/lang/resource/words_sample/*
       src/other.png
Copyright: Art4Apps
License: CC-BY-SA-3.0

License: GPL-3+
 Text of it.
"""


def picture(shade: int, size: tuple[int, int] = (80, 60), format: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", size, (shade, 90, 30)).convert(mode)
    if mode == "RGBA":
        image.putalpha(0)
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_rcc: Callable[..., bytes], make_archive: Callable[..., Any]
) -> Path:
    """A folder with small archives in place of those that are fetched."""
    folder = tmp_path / "archives"
    folder.mkdir()
    help_en, sphinx = "usr/share/gimp/2.0/help/en/", "usr/share/doc/python-{}-doc/html/"
    names = ("airbrush", "before", "after", "unsaid", "lone", "icon", "file")
    animals = f"{ACTIVITIES}explore_world_animals/resource/"
    tools = f"{ACTIVITIES}categorization/resource/images/tools/"
    rcc = "usr/share/gcompris-qt/rcc/"
    made = {
        "gimp": {
            help_en + "tool.html": GIMP.encode(),
            help_en + "again.html": GIMP.encode(),
            **{f"{help_en}images/{n}.png": picture(i) for i, n in enumerate(names)},
        },
        "gimp-licence": {"usr/share/doc/gimp-help-common/copyright": b"GFDL"},
        "scikit-learn": {
            sphinx.format("sklearn") + "auto_examples/canny.html": SPHINX.replace('src="_', 'src="../_').encode(),
            **{
                f"{sphinx.format('sklearn')}_images/{n}.png": picture(40 + i, (1200, 900), mode="RGBA" if i else "RGB")
                for i, n in enumerate(("sphx_glr_plot_canny_001", "user"))
            },
            **{f"{sphinx.format('sklearn')}auto_examples/{n}/swirl.html": LONE.encode() for n in "ab"},  # ambiguous
            **{
                f"{sphinx.format('sklearn')}auto_examples/{n}/_images/sphx_glr_plot_swirl_001.png": picture(70)
                for n in "ab"
            },
            sphinx.format("sklearn") + "_images/plain.png": b"\x89PNG cut off",
            "usr/share/doc/python-sklearn-doc/copyright": b"BSD",
        },
        "scikit-image": {
            sphinx.format("skimage") + "swirl.html": LONE.encode(),
            sphinx.format("skimage") + "_images/sphx_glr_plot_swirl_001.png": picture(99),
            "usr/share/doc/python-skimage-doc/copyright": b"BSD",
        },
        "gcompris": {
            rcc + "explore_world_animals.rcc": make_rcc(
                {
                    animals + "board/board1.qml": BOARD.encode(),
                    animals + "animals/README": README.encode(),
                    animals + "animals/zorilla.webp": picture(120, format="WEBP"),
                    animals + "animals/weta.webp": picture(130, format="WEBP"),
                },
                packed=(animals + "board/board1.qml",),
            ),
            rcc + "categorization.rcc": make_rcc(
                {tools + "README": README.encode()}
                | {tools + f"{n}.webp": picture(140 + len(n), format="WEBP") for n in ("screwDriver2", "fish1", "saw")}
            ),
            "usr/share/doc/gcompris-qt-data/copyright": COPYRIGHT.encode(),
        },
    }
    found = {name: make_archive(folder, name, files) for name, files in made.items()}
    monkeypatch.setattr(figures, "SOURCES", found)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["florence-vl", "mini", "assets", "--figures", *args])
    try:
        return main() or 0  # type: ignore[func-returns-value]
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_rcc_is_read(tmp_path: Path, make_rcc: Callable[..., bytes], version: int) -> None:
    files = {"a/b/one.txt": b"one" * 50, "a/two.bin": bytes(range(256)), "drei-ß": b"", "a/b/c/four": b"4"}
    (tmp_path / "x.rcc").write_bytes(make_rcc(files, packed=("a/b/one.txt",), version=version))
    assert gcompris.read_rcc(tmp_path / "x.rcc") == files


def test_rcc_that_cannot_be_read_is_refused(tmp_path: Path, make_rcc: Callable[..., bytes]) -> None:
    path = tmp_path / "x.rcc"
    whole = make_rcc({"a/one": b"one" * 50}, packed=("a/one",))
    for content, why in (
        (b"RIFF" + whole, "no Qt resource file"),
        (whole[:60], "cannot be read"),
        (whole.replace(b"x\x9c", b"xx"), "cannot be read"),
        (make_rcc({"a/one": b"one"}, flags=4), "zstd"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=why):
            gcompris.read_rcc(path)


def test_licences_are_those_stated_for_the_file() -> None:
    stated = gcompris.readme_licences({"a/README": README.encode(), "a/x.webp": b""})
    assert stated["a/zorilla.webp"] == "CC0-1.0"
    assert stated["a/screwDriver2.webp"] == "Public Domain"
    assert "a/x.webp" not in stated
    assert gcompris.debian_licence(COPYRIGHT, "src/activities/lang/resource/words_sample/bear.webp") == "CC-BY-SA-3.0"
    assert gcompris.debian_licence(COPYRIGHT, "src/activities/paintings/mona.webp") is None


def test_gimp_layout() -> None:
    assert list(figures.gimp_figures(figures.parse_html(GIMP))) == [
        ("images/airbrush.png", "The Airbrush tool in Toolbox"),
        ("images/after.png", "Example for the “Blur” filter: “Blur” applied"),
        ("images/lone.png", "The mask of a layer"),
    ]


def test_sphinx_layout() -> None:
    assert list(figures.sphinx_figures(figures.parse_html(SPHINX))) == [
        ("_images/user.png", "Clusters of λ points"),
        ("_images/sphx_glr_plot_canny_001.png", "Canny edge detector: noisy image, Canny filter, σ=1"),
        ("_images/plain.png", "A plain picture in the text"),
    ]
    assert list(figures.sphinx_figures(figures.parse_html(LONE))) == [
        ("_images/sphx_glr_plot_swirl_001.png", "Swirl of a grid")
    ]


def test_board_layout() -> None:
    path, title, text = next(iter(gcompris.read_board(BOARD)))
    assert (path.rpartition("/")[2], title, text) == ("zorilla.webp", "Zorilla", 'The zorilla says "sss".')
    assert [gcompris.photo_name(s) for s in ("screwDriver2", "fish3", "greatWall", "knife", "coffeeCup1")] == [
        "screwdriver",
        None,
        "Great Wall of China",
        "knife",
        "coffee cup",
    ]


def test_captions_that_say_nothing() -> None:
    for caption in ("Original image", "shot.png", "Example 1", "TODO", "", "The resulting image", "(a)"):
        assert figures.empty(caption), caption
    for caption in ("The mask", "Swirl", "Rank = 2", "Original and blurred image"):
        assert not figures.empty(caption), caption
    assert figures.join("The Blur filter", "blur filter") == "The Blur filter"
    assert figures.join("Blur", "The Blur filter applied") == "The Blur filter applied"


def test_figures_are_written_as_readers_read_them(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "figures"
    counts = figures.build_figures(sources, target, lambda name: name != "screwdriver")
    assert counts == {"gimp": 3, "scikit-learn": 2, "scikit-image": 1, "gcompris": 1} == figures.read_figures(target)
    assert [p.name for p in tmp_path.iterdir()] == ["archives", "figures"] or not list(tmp_path.glob("*.partial"))
    rows = [json.loads(line) for line in (target / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 7
    by_caption = {row["conversations"][1]["value"]: row for row in rows}
    zorilla = by_caption["Zorilla."]
    assert [t["value"] for t in zorilla["conversations"]][2:] == [figures.MORE, 'The zorilla says "sss".']
    assert (zorilla["source"], zorilla["licence"]) == ("gcompris", "CC0-1.0")
    assert by_caption["The mask of a layer"]["licence"].startswith("GFDL")
    shrunk = Image.open(target / by_caption["Clusters of λ points"]["image"])
    assert (shrunk.mode, shrunk.size, shrunk.getpixel((5, 5))) == ("RGB", (1024, 768), (255, 255, 255))
    airbrush = by_caption["The Airbrush tool in Toolbox"]["image"]
    assert (target / airbrush).read_bytes() == picture(0)  # untouched
    for name in counts:
        assert figures.SOURCES[name].how in (target / "licences" / name / "SOURCE").read_text()
        assert (target / "licences" / name / "LICENSE").read_text()
    reader = open_reader(target / "data.jsonl")
    records = [reader[i] for i in range(len(reader))]
    assert [r.id for r in records] == [row["id"] for row in rows]
    assert [part["type"] for part in records[0].messages[0]["content"]] == ["image", "text"]
    again = tmp_path / "again"
    figures.build_figures(sources, again, lambda name: name != "screwdriver")
    assert (again / "manifest.json").read_bytes() == (target / "manifest.json").read_bytes()


def test_command_fetches_once_and_mends_what_is_broken(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "cache" / "mini-figures"
    with pytest.raises(FileNotFoundError, match="florence-vl mini assets --figures"):
        figures.read_figures(target)
    assert run(monkeypatch, "--sources", str(sources)) == 0
    out = capsys.readouterr().out
    assert "3 gimp, 2 scikit-learn, 1 scikit-image, 2 gcompris in " in out
    assert f"path: {target / 'data.jsonl'}" in out
    assert run(monkeypatch, "--sources", str(sources)) == 0
    assert "8 figures are already in" in capsys.readouterr().out
    for damage in ("manifest.json", "data.jsonl", json.loads((target / "data.jsonl").open().readline())["image"]):
        (target / damage).write_bytes((target / damage).read_bytes()[:40])
        with pytest.raises(ValueError, match="florence-vl mini assets --figures"):
            figures.read_figures(target)
        assert run(monkeypatch, "--sources", str(sources)) == 0
        assert "making it again" in capsys.readouterr().err
        assert sum(figures.read_figures(target).values()) == 8
    assert run(monkeypatch, "--sources", str(sources), "--out", "x") == 2
    assert "--out does not go with --figures" in capsys.readouterr().err
    assert run(monkeypatch, "--copyleft") == 2
    assert "give one of them" in capsys.readouterr().err


def test_another_archive_is_refused_by_name(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))
    (sources / "scikit-learn-1.0.tgz").write_bytes(b"other")
    assert run(monkeypatch, "--sources", str(sources)) == 2
    error = capsys.readouterr().err
    assert "scikit-learn-1.0.tgz has SHA-256" in error
    assert "npm pack scikit-learn@1.0" in error
    assert not (tmp_path / "cache" / "mini-figures").exists()


def test_things_held_out_are_not_shown() -> None:
    import florence_vl_mini

    held = next(row for row in florence_vl_mini.load_index() if row["new_concept"])
    assert not may_be_shown(held["caption"])
    assert may_be_shown("zorilla")
