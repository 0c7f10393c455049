"""Captioned figures, for training only: manuals of GIMP, scikit-learn and scikit-image, and GCompris' photographs.

Fetched from Debian packages checked by SHA-256, and written to the user's cache as LLaVA JSON lines with an images
folder; never part of the package.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import shutil
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from florence_vl_mini import build as base
from florence_vl_mini import gcompris
from florence_vl_mini.build import Source

VERSION = 1
COMMAND = "florence-vl mini assets --figures"
MAX_SIDE, MIN_SIDE = 1024, 48

SOURCES = {
    "gimp": Source(
        "deb", "gimp-help-en", "2.10.34-2", "a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36"
    ),
    "gimp-licence": Source(  # holds gimp-help-en's copyright file
        "deb", "gimp-help-common", "2.10.34-2", "5186e5ba19dfca73c141965abb6fbd8cc8abae4a623af5dfea03195e07c4bda8"
    ),
    "scikit-learn": Source(
        "deb", "python-sklearn-doc", "1.2.1+dfsg-1", "4e244556326064e87e7563e3e544c2288d44b5719db2d7b3a85c9a84ae93488d"
    ),
    "scikit-image": Source(
        "deb", "python-skimage-doc", "0.19.3-8", "2c87d8f7d4504b29fe80283a24a153fb4175b0e4964bd90a2a0152b36bb6b468"
    ),
    "gcompris": gcompris.SOURCE,
}
LICENCES = {
    "gimp": "GFDL-1.2+ without invariant sections",
    "scikit-learn": "BSD-3-Clause",
    "scikit-image": "BSD-3-Clause",
}
_HTML = {
    "gimp": "usr/share/gimp/2.0/help/en",
    "scikit-learn": "usr/share/doc/python-sklearn-doc/html",
    "scikit-image": "usr/share/doc/python-skimage-doc/html",
}
QUESTIONS = (
    "Write a caption for this figure.",
    "What does this figure show?",
    "Describe the image concisely.",
    "Provide a short caption for the provided image.",
)
PHOTO_QUESTIONS = ("What does this photograph show?", "What is shown in the picture?", "Describe the image concisely.")
MORE = "Tell me more about it."  # asks for the paragraph that goes with a photograph

# What a caption may not consist of: words that say that it is a picture, not of what.
_EMPTY = frozenset(base._SELECTION["figures_empty"])


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Args:
        name: What it is called in its source, for the record's id: the path of its file.
        data: The picture's bytes.
        caption: The text that goes with it.
        page: Where in the source it stands.
        licence: As its source states it.
        more: What else is known of what it shows, or "".
        questions: Wordings of what asks for the caption.
    """

    name: str
    data: bytes
    caption: str
    page: str
    licence: str
    more: str = ""
    questions: tuple[str, ...] = QUESTIONS


@dataclass
class Node:
    """An element of a page: its children are elements and text, in order."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        """Whether it is of a class."""
        return name in self.attributes.get("class", "").split()

    def walk(self, skip: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
        """It and all below it, but for what is `skip`ped with all below that."""
        if not skip(self):
            yield self
            for child in self.children:
                if isinstance(child, Node):
                    yield from child.walk(skip)

    def first(self, test: Callable[[Node], bool], skip: Callable[[Node], bool] = lambda node: False) -> Node | None:
        """The first of `walk` that passes the test."""
        return next((n for n in self.walk(skip) if test(n)), None)

    def text(self) -> str:
        """What a reader sees of it, with single spaces."""
        parts = [c if isinstance(c, str) else "" if c.has("headerlink") else c.text() for c in self.children]
        glue = " " if self.tag in ("div", "p", "li", "ul", "ol", "td", "tr", "dd", "dt") else ""
        return re.sub(r"\s+", " ", glue + "".join(parts) + glue)


class _Builder(HTMLParser):
    _VOID = frozenset(
        ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("")
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {k: v or "" for k, v in attrs})
        self._open[-1].children.append(node)
        if tag not in self._VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Node(tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        depth = next((i for i in range(len(self._open) - 1, 0, -1) if self._open[i].tag == tag), None)
        if depth is not None:  # an end without a start is passed over
            del self._open[depth:]

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parse_html(text: str) -> Node:
    """A page as a tree; tags that are not closed end with what holds them."""
    builder = _Builder()
    builder.feed(text)
    builder.close()
    return builder.root


def gimp_figures(page: Node) -> Iterator[tuple[str, str]]:
    """(path of the picture, caption) of a page of GIMP's manual (DocBook).

    The caption is the figure's title and what stands below the picture; of several pictures in a figure, those with a
    telling text of their own are taken.
    """

    def visit(node: Node, title: str, alone: bool) -> Iterator[tuple[str, str]]:
        if node.has("figure"):
            heading = node.first(lambda n: n.has("title"))
            title = re.sub(r"^Figure\s+[\w.]+?\.\s+", "", clean(heading.text())) if heading else ""
            alone = sum(n.has("mediaobject") for n in node.walk()) == 1
        if node.has("mediaobject"):
            image = node.first(lambda n: n.tag == "img")
            below = node.first(lambda n: n.has("caption"))
            own = clean(below.text()) if below else ""
            if image and (own or alone) and not (own and empty(own) and not alone):
                yield image.attributes.get("src", ""), join(title, own)
            return
        for child in node.children:
            if isinstance(child, Node):
                yield from visit(child, title, alone)

    yield from visit(page, "", False)


def sphinx_figures(page: Node) -> Iterator[tuple[str, str]]:
    """(path of the picture, caption) of a page made by Sphinx.

    Captions of figures, alternative texts of a gallery's pictures (titles of their axes, below the page's title) and
    of pictures in the text.
    """
    skip = _sphinx_furniture
    heading = page.first(lambda n: n.tag == "h1", skip)
    title = clean(heading.text()) if heading else ""
    captioned = set()
    for node in page.walk(skip):
        if node.tag != "figure" and not (node.tag == "div" and node.has("figure")):
            continue
        image = node.first(lambda n: n.tag == "img")
        below = node.first(lambda n: n.has("caption-text"))
        if image is not None and below is not None:
            captioned.add(id(image))
            yield image.attributes.get("src", ""), clean(below.text())
    if title.startswith("Release Highlights"):
        title = ""
    gallery = [n for n in page.walk(skip) if n.has("sphx-glr-single-img") or n.has("sphx-glr-multi-img")]
    alternatives = Counter(image.attributes.get("alt", "") for image in gallery)
    for image in gallery:
        alt, source = clean(image.attributes.get("alt", "")), image.attributes.get("src", "")
        if alternatives[image.attributes.get("alt", "")] > 1:
            continue  # sphinx-gallery gave all pictures of a block the titles of its last one
        if not alt or _is_file_name(alt, source) or len(alt) > 400:
            if len(gallery) == 1 and title:
                yield source, title
        elif not empty(alt):
            yield source, join(title, ", ".join(dict.fromkeys(alt.split(", "))))
    done = captioned | {id(image) for image in gallery}
    for image in page.walk(skip):
        alt = clean(image.attributes.get("alt", "")) if image.tag == "img" and id(image) not in done else ""
        if " " in alt and not _is_file_name(alt, image.attributes.get("src", "")):  # one word: what the source calls it
            yield image.attributes["src"], alt


def _sphinx_furniture(node: Node) -> bool:
    """Menus, logos, thumbnails and formulas."""
    return (
        node.tag in ("nav", "head", "script", "footer")
        or any(
            node.has(name) for name in ("sphx-glr-thumbcontainer", "sk-sidebar-toc-wrapper", "navbar", "logo", "math")
        )
        or any(node.has(name) for name in ("sk-footer-funding-logo", "sk-index-img", "sk-who-uses-carousel-img"))
        or (node.tag == "img" and "_static" in node.attributes.get("src", ""))
    )


def _is_file_name(alt: str, source: str) -> bool:
    stem = re.sub(r"^sphx_glr_|_\d+$|_thumb$", "", Path(source).stem)
    words = re.sub(r"[\W_]+", "", alt).lower()
    return (
        "/" in alt or bool(re.search(r"\.(png|jpe?g|svg|gif)\b", alt)) or words == re.sub(r"[\W_]+", "", stem).lower()
    )


def clean(text: str) -> str:
    """One line without markup; LaTeX's Greek letters as letters."""

    def letter(match: re.Match[str]) -> str:
        kind = "CAPITAL" if match[1][0].isupper() else "SMALL"
        try:
            return unicodedata.lookup(f"GREEK {kind} LETTER {match[1].replace('lambda', 'lamda').upper()}")
        except KeyError:
            return match[0]

    text = html.unescape(text).replace("\u200b", "").replace("¶", "")
    if "$" in text or r"\(" in text:
        text = re.sub(r"\\([A-Za-z]+)", letter, re.sub(r"\$|\\[()]", "", text))
    return re.sub(r"\s+", " ", text).strip()


def join(title: str, own: str) -> str:
    """Title and caption as one text; either may be empty, or say what the other says."""
    plain = [re.sub(r"\W+", " ", t).strip().lower() for t in (title, own)]
    if not own or plain[1] in plain[0]:
        return title
    if not title or plain[0] in plain[1]:
        return own
    return f"{title.rstrip(' .:')}: {own}"


def empty(caption: str) -> bool:
    """Whether a caption says nothing about its picture: a file's name, or only words like "original image"."""
    words = re.findall(r"[^\W\d_]+", caption.lower())
    telling = [w for w in words if w not in _EMPTY and len(w) > 1]
    return not telling or (len(words) == 1 and len(telling[0]) < 4) or bool(re.fullmatch(r"\S+\.\w{2,4}", caption))


def _documentation(name: str, root: Path) -> Iterator[Figure]:
    folder = root / _HTML[name]
    pages = sorted(folder.rglob("*.html"))
    if not pages:
        raise ValueError(f"{SOURCES[name].name} has no pages in {folder}: another version?")
    find = gimp_figures if name == "gimp" else sphinx_figures
    names = Counter(page.name for page in pages if "auto_examples" in page.parts)
    for page in pages:
        if names[page.name] > 1:
            continue  # sphinx-gallery wrote the pictures of both examples to the same files
        text = page.read_text(encoding="utf-8", errors="replace")
        for source, caption in find(parse_html(text)) if "<img" in text else ():
            path = (page.parent / source).resolve()
            if source and path.is_relative_to(folder.resolve()) and path.is_file() and path.suffix != ".svg":
                where = page.relative_to(folder).as_posix()
                yield Figure(
                    path.relative_to(folder.resolve()).as_posix(), path.read_bytes(), caption, where, LICENCES[name]
                )


def _photographs(root: Path, keep: Callable[[str], bool]) -> Iterator[Figure]:
    for picture in gcompris.Archive(root).photographs():
        if not keep(picture.name):
            continue
        yield Figure(
            picture.path.removeprefix("gcompris/src/activities/").replace("/resource/", "/"),
            picture.data,
            f"{picture.name[0].upper()}{picture.name[1:]}.",
            picture.path,
            picture.licence,
            picture.text,
            PHOTO_QUESTIONS,
        )


def _picture(data: bytes) -> tuple[bytes, str, str] | None:
    """(bytes, suffix, digest of the pixels): as it is, or on white, or shrunk; None if it is too small or long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # palettes with transparency
        stored = Image.open(io.BytesIO(data))
        as_is = (
            stored.mode in ("RGB", "L") and max(stored.size) <= MAX_SIDE and stored.format in ("PNG", "JPEG", "WEBP")
        )
        suffix = {"JPEG": "jpg", "WEBP": "webp"}.get(stored.format or "", "png") if as_is else "png"
        image: Image.Image = stored
        if image.mode in ("RGBA", "LA", "PA", "P"):
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        image = image.convert("RGB")
    if min(image.size) < MIN_SIDE or max(image.size) > 6 * min(image.size):
        return None
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    if as_is:
        return data, suffix, digest
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), suffix, digest


def write_figures(
    target: Path, sets: dict[str, Iterator[Figure]], licences: dict[str, tuple[str, str]]
) -> dict[str, int]:
    """Write `data.jsonl`, `images/`, `licences/` and a manifest; `target` is replaced once all is there.

    A picture stands once, with the longest of its captions; captions that say nothing are dropped.

    Args:
        target: The cache's folder.
        sets: Name of the source -> its figures.
        licences: Name of the source -> (licence text, where it is from).

    Returns:
        Number of figures by source.
    """
    staging = target.with_name(target.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "images").mkdir(parents=True)
    counts, seen = dict.fromkeys(sets, 0), set()
    with (staging / "data.jsonl").open("w", encoding="utf-8") as file:
        for name, figures in sets.items():
            best: dict[str, Figure] = {}
            for figure in figures:
                if not empty(figure.caption) and (
                    figure.name not in best or len(figure.caption) > len(best[figure.name].caption)
                ):
                    best[figure.name] = figure
            (staging / "images" / name).mkdir()
            for figure in best.values():
                try:
                    picture = _picture(figure.data)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                    continue  # a few files are damaged in the archives
                if picture is None or picture[2] in seen:
                    continue
                data, suffix, digest = picture
                seen.add(digest)
                code = re.sub(r"[^\w.-]+", "-", figure.name.rpartition(".")[0])
                image = f"images/{name}/{code}-{digest[:8]}.{suffix}"
                (staging / image).write_bytes(data)
                file.write(json.dumps(_row(name, image, figure), ensure_ascii=False) + "\n")
                counts[name] += 1
    for name, texts in licences.items():
        folder = staging / "licences" / name
        folder.mkdir(parents=True)
        for part, text in zip(("LICENSE", "SOURCE"), texts, strict=True):
            (folder / part).write_text(text, encoding="utf-8")
    files = {f.relative_to(staging).as_posix(): f.stat().st_size for f in sorted(staging.rglob("*")) if f.is_file()}
    manifest = {"version": VERSION, "sources": {n: s.sha256 for n, s in SOURCES.items()}, "counts": counts}
    manifest["data"] = hashlib.sha256((staging / "data.jsonl").read_bytes()).hexdigest()
    (staging / "manifest.json").write_text(json.dumps(manifest | {"files": files}, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    return counts


def _row(source: str, image: str, figure: Figure) -> dict[str, Any]:
    talk = [(figure.questions[int(base._unit("ask:" + image) * len(figure.questions))], figure.caption)]
    talk += [(MORE, figure.more)] if figure.more else []
    turns = [{"from": who, "value": text} for pair in talk for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {
        "id": f"{source}/{Path(image).stem}",
        "image": image,
        "conversations": turns,
        "source": source,
        "page": figure.page,
        "licence": figure.licence,
    }


def read_figures(folder: Path) -> dict[str, int]:
    """Number of figures by source in a folder written by `build_figures`.

    Raises:
        FileNotFoundError: Nothing was fetched yet.
        ValueError: A file is missing or cut off, or they are of another version.
    """
    known = base.read_manifest(folder, "figures", COMMAND, VERSION, SOURCES, ("files", "data", "counts"))
    for name, size in known["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise ValueError(f"{folder / name} is missing or damaged: run `{COMMAND}`, which makes it again")
    if hashlib.sha256((folder / "data.jsonl").read_bytes()).hexdigest() != known["data"]:
        raise ValueError(f"{folder / 'data.jsonl'} was changed: run `{COMMAND}`, which makes it again")
    return known["counts"]


def build_figures(sources: Path, target: Path, keep: Callable[[str], bool]) -> dict[str, int]:
    """Fetch the packages and write their captioned figures to `target`; see `write_figures`.

    Args:
        sources: Folder with the archives; what is missing is fetched into it.
        target: The cache's folder.
        keep: Whether a thing of this name may be shown (it is not held out for validation or test); asked of GCompris.

    Raises:
        ValueError: A package is missing, or of another version (checksum).
    """
    for source in SOURCES.values():
        base.fetch(source, sources)  # all of them, before the first is unpacked
    roots = {name: base._unpack(source, sources) for name, source in SOURCES.items()}
    sets = {name: _documentation(name, roots[name]) for name in _HTML}
    sets["gcompris"] = _photographs(roots["gcompris"], keep)
    texts = {name: base._copyright(roots["gimp-licence" if name == "gimp" else name]) for name in sets}
    licences = {
        name: (
            texts[name],
            f"package: {SOURCES[name].name} {SOURCES[name].version} ({SOURCES[name].kind})\n"
            f"fetch: {SOURCES[name].how}\nsha256: {SOURCES[name].sha256}\n"
            f"licence: {LICENCES.get(name, 'as each record states')}\n"
            f"used for: training only; transparency laid on white, shrunk to {MAX_SIDE} px\n",
        )
        for name in sets
    }
    return write_figures(target, sets, licences)
