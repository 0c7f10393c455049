"""Pictures under copyleft licences, for training only: fetched into the user's cache, never part of the package.

OpenMoji (CC-BY-SA-4.0), Tux Paint stamps (GPL-2), Art4Apps (CC-BY-SA) and GCompris' drawings (licence by file), from
npm and Debian archives that are checked by SHA-256 like those of `build`. Nothing is taken whose name could be meant by
a concept held out for validation or test.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from florence_vl_mini import build as base
from florence_vl_mini import gcompris
from florence_vl_mini.build import Source

Row = dict[str, Any]
Item = tuple[Row, Image.Image]
VERSION = 1
COMMAND = "florence-vl mini assets --copyleft"

SOURCES = {
    "openmoji": Source("npm", "openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
    "tuxpaint": Source(
        "deb",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    ),
    "art4apps": Source(
        "deb", "pysiogame", "4.20.01-1", "6b22766dfd8ef3a046c2665fe2598ac8a1ecee3d331bda38accf53de65bc59bf"
    ),
    "gcompris": gcompris.SOURCE,
}
_HELPERS = ("emojibase", "wordnet")  # names of the emoji; which word is a kind of which

# Folder (its beginning) -> (category of its members or None, a word that the right sense of their names leads up to).
_TUX_FOLDERS: dict[str, tuple[str | None, str]] = {
    "animals/birds": ("bird", "bird"),
    "animals/mammals/aquatic": ("sea animal", "animal"),
    "animals/mammals/bears/toys": (None, "bear"),
    "animals/fish": ("sea animal", "animal"),
    "animals/shellfish": ("sea animal", "animal"),
    "animals/insects": ("insect or other small animal", "animal"),
    "animals/dinosaur": (None, "animal"),
    "animals": ("animal", "animal"),
    "clothes/hats": ("clothing", "covering"),
    "clothes": (None, "covering"),
    "food/fruit": ("fruit", "fruit"),
    "food/vegetables": ("vegetable", "vegetable"),
    "food": (None, "food"),
    "plants/flowers": ("plant", "plant"),
    "plants/trees": ("plant", "plant"),
    "plants/mushrooms": (None, "fungus"),
    "vehicles": ("vehicle", "vehicle"),
    "household/tools": ("tool", "tool"),
    "household": (None, "artifact"),
    "hobbies/music": ("musical instrument", "musical_instrument"),
    "sports": (None, "artifact"),
    "town/monuments": (None, "structure"),
    "space": (None, "artifact"),
}
_ART_FOLDERS: dict[str, tuple[str | None, str]] = {
    "animals": ("animal", "animal"),
    "fruit_n_veg": (None, "food"),
    "food": (None, "food"),
    "transport": (None, "vehicle"),
    "clothes_n_accessories": (None, "covering"),
}
# A category that the folder does not tell: found among what the word is a kind of.
_BY_KIN = {
    "bird": "bird",
    "insect": "insect or other small animal",
    "arachnid": "insect or other small animal",
    "gastropod": "insect or other small animal",
    "fish": "sea animal",
    "crustacean": "sea animal",
    "cephalopod": "sea animal",
    "echinoderm": "sea animal",
    "aquatic_mammal": "sea animal",
    "bivalve": "sea animal",
    "coelenterate": "sea animal",
    "edible_fruit": "fruit",
    "vegetable": "vegetable",
}
# Words that say how a picture looks to its author, names nobody would give; and what cannot be counted.
_VAGUE, _MASS = (frozenset(base._SELECTION[key]) for key in ("copyleft_vague", "copyleft_mass"))


class _Kin:
    """What a word is a kind of, by WordNet's hypernyms."""

    def __init__(self, root: Path) -> None:
        folder = root / "usr/share/wordnet"
        self._synsets: dict[str, tuple[list[str], list[str]]] = {}
        for line in (folder / "data.noun").read_text().splitlines():
            if line.startswith(" "):
                continue
            parts = line.split(" | ")[0].split()
            n = int(parts[3], 16)
            words = [parts[4 + 2 * i].lower() for i in range(n)]
            at = 4 + 2 * n
            pointers = [parts[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(parts[at]))]
            self._synsets[parts[0]] = words, [p[1] for p in pointers if p[0] in ("@", "@i")]
        self._senses: dict[str, list[str]] = {}
        for line in (folder / "index.noun").read_text().splitlines():
            if not line.startswith(" "):
                parts = line.split()
                self._senses[parts[0]] = parts[-int(parts[2]) :]

    def of(self, name: str, anchor: str) -> tuple[list[str], list[str]] | None:
        """Synonyms, and they and hypernyms, of the name's first sense below `anchor`; None where there is none."""
        words = name.lower().split()
        for start in range(len(words)):  # the longest phrase that is known
            for sense in self._senses.get("_".join(words[start:]), ()):
                kin: list[str] = []
                level = [sense]
                while level:
                    kin += [w for s in level for w in self._synsets[s][0] if w not in kin]
                    level = [up for s in level for up in self._synsets[s][1]]
                if anchor in kin:
                    return self._synsets[sense][0], kin
            if "_".join(words[start:]) in self._senses:
                return None
        return None


def _svg(path: Path | None = None, text: str | None = None) -> Image.Image | None:
    try:
        import resvg_py
    except ImportError:
        raise ValueError("drawing SVG needs resvg-py: pip install './packages/florence-vl-mini[build]'") from None
    try:
        what = {"svg_string": text} if path is None else {"svg_path": str(path)}
        png = bytes(resvg_py.svg_to_bytes(**what, width=2 * base.SPRITE_SIDE, skip_system_fonts=True))
        return base._sprite(Image.open(io.BytesIO(png)))
    except ValueError:
        return None  # a few are not valid SVG


def _openmoji(root: Path, names: dict[str, Row]) -> Iterator[tuple[str, Item]]:
    folder = root / "package/color/svg"
    files = {f.stem.lower().replace("-fe0f", ""): f for f in folder.glob("*.svg")}
    if not files:
        raise ValueError(f"openmoji has no pictures in {folder}: another version?")
    for code, entry in names.items():
        path = files.get(code.replace("-fe0f", ""))
        if path and (image := _svg(path)):
            yield code, (entry, image)


def _folder(folders: dict[str, tuple[str | None, str]], name: str) -> tuple[str | None, str] | None:
    return next((value for key, value in folders.items() if name == key or name.startswith(key + "/")), None)


def clean_name(text: str) -> str | None:
    """A stamp's sentence ("A Sumatran tiger.") or a file's name as a name of one to three words, or None."""
    match = re.fullmatch(r"(?:An? )?([A-Za-z][A-Za-z -]*?)\.?", text.strip().replace("_", " "))
    if match is None:
        return None
    words = match[1].lower().replace("-", " ").split()
    if len(words) > 3 or len(" ".join(words)) > 24 or any(len(w) < 3 for w in words):
        return None
    last = words[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return None  # more than one of them: "two grapes" would count wrong
    if {*words} & (_VAGUE | base.FUNCTION_WORDS | base.UNSUITABLE) or last in _MASS:
        return None
    return " ".join(words)


def _entry(
    name: str, folder: str, known: tuple[str | None, str], kin: _Kin, emoji: dict[str, str | None]
) -> Row | None:
    """Caption, keywords, category and folder; a name that is also an emoji's (name -> category) has its category."""
    category, anchor = known
    found_kin = kin.of(name, anchor)
    if found_kin is None:
        return None
    synonyms, above = found_kin
    found = next((c for word, c in _BY_KIN.items() if word in above), None)
    if name in emoji:
        category = emoji[name]
    elif category in (None, "animal") and found:
        category = found
    return {
        "caption": name,
        "keywords": [w.replace("_", " ") for w in above[:40]],
        "synonyms": [w.replace("_", " ") for w in synonyms],
        "category": category,
        "folder": folder,
    }


def _tuxpaint(root: Path, kin: _Kin, emoji: dict[str, str | None]) -> Iterator[tuple[str, Item]]:
    folder = root / "usr/share/tuxpaint/stamps"
    for text in sorted(folder.rglob("*.txt")):
        where = text.parent.relative_to(folder).as_posix()
        known = _folder(_TUX_FOLDERS, where)
        sentence = text.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        if known is None or not sentence or not re.match("An? ", sentence[0]):
            continue
        name = clean_name(sentence[0])
        entry = _entry(name, where, known, kin, emoji) if name else None
        if entry is None:
            continue
        png, svg = text.with_suffix(".png"), text.with_suffix(".svg")
        image = base._sprite(Image.open(png)) if png.exists() else _svg(svg) if svg.exists() else None
        if image is not None:
            yield f"{where}/{text.stem}".replace("/", "-"), (entry, image)


def cut_out(image: Image.Image) -> Image.Image | None:
    """A picture on white without its ground; None where the ground is not white."""
    image = image.convert("RGB")
    w, h = image.size
    corners = [(0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1)]
    if any(min(image.getpixel(c)) < 240 for c in corners):  # type: ignore[type-var, arg-type]
        return None
    mark = (255, 0, 254)
    filled = image.copy()
    for corner in corners:
        if filled.getpixel(corner) != mark:
            ImageDraw.floodfill(filled, corner, mark, thresh=40)
    ground = Image.new("L", image.size)
    ground.putdata([255 if p == mark else 0 for p in filled.getdata()])  # type: ignore[arg-type]
    alpha = ground.filter(ImageFilter.MaxFilter(3)).point(lambda a: 255 - a).filter(ImageFilter.GaussianBlur(0.7))
    out = image.convert("RGBA")
    out.putalpha(alpha)
    return out


def _art4apps(root: Path, kin: _Kin, emoji: dict[str, str | None]) -> Iterator[tuple[str, Item]]:
    folder = root / "usr/share/games/pysiogame/res/images/art4apps"
    for path in sorted(folder.rglob("*.jpg")):
        where = path.parent.relative_to(folder).as_posix()
        known = _folder(_ART_FOLDERS, where)
        name = clean_name(path.stem)
        if known is None or name is None or (where == "food" and name not in emoji):
            continue  # most foods cannot be counted ("a bacon")
        entry = _entry(name, where, known, kin, emoji)
        image = cut_out(Image.open(path)) if entry else None
        image = base._sprite(image) if image else None
        if entry and image:
            yield f"{where}-{path.stem}", (entry, image)


def _gcompris(root: Path, kin: _Kin, emoji: dict[str, str | None], taken: set[str]) -> Iterator[tuple[str, Item]]:
    """Its drawings; those of Art4Apps (the word list) only for names that are not `taken`."""
    for picture in gcompris.Archive(root).cut_outs():
        activity, file = picture.path.split("/")[3], picture.path.rpartition("/")[2]
        name = clean_name(picture.name)
        if name is None or (activity == "lang" and name in taken):
            continue
        entry = _entry(name, activity, picture.known, kin, emoji)
        if entry is None:
            continue
        svg = file.endswith(".svg")
        image = _svg(text=picture.data.decode()) if svg else base._sprite(Image.open(io.BytesIO(picture.data)))
        if image is not None:
            yield f"{activity}-{file.rpartition('.')[0]}", (entry | {"licence": picture.licence}, image)


def write_cache(
    target: Path, sets: dict[str, dict[str, Item]], licences: dict[str, tuple[str, str]], keep: Callable[[Row], bool]
) -> dict[str, int]:
    """Write the pictures as one zip a set, an index and the licences; `target` is replaced once all is there.

    Args:
        target: The cache's folder.
        sets: Set -> code -> (caption, keywords, category and folder; RGBA picture).
        licences: Set -> (licence text, where it is from).
        keep: Whether a row may be used; asked of each.

    Returns:
        Number of pictures by set.
    """
    staging = target.with_name(target.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    rows: list[Row] = []
    for name, items in sets.items():
        with zipfile.ZipFile(staging / f"{name}.zip", "w", zipfile.ZIP_STORED) as archive:
            for code, (entry, image) in sorted(items.items()):
                row = {"id": f"{name}/{code}", "set": name, "file": f"{code}.webp", "size": list(image.size)}
                row |= {"concept": entry["caption"], **entry, "split": "train", "new_concept": False}
                if keep(row):
                    archive.writestr(zipfile.ZipInfo(row["file"], (2020, 1, 1, 0, 0, 0)), base._webp(image))
                    rows.append(row)
        folder = staging / "licences" / name
        folder.mkdir(parents=True)
        for file, text in zip(("LICENSE", "SOURCE"), licences[name], strict=True):
            (folder / file).write_text(text, encoding="utf-8")
    (staging / "index.json").write_text(json.dumps(rows, indent=0) + "\n")
    files = {f.relative_to(staging).as_posix(): _sha256(f) for f in sorted(staging.rglob("*")) if f.is_file()}
    manifest = {"version": VERSION, "sources": {n: s.sha256 for n, s in SOURCES.items()}, "files": files}
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    return {name: sum(r["set"] == name for r in rows) for name in sets}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_cache(folder: Path) -> list[Row]:
    """The index of the fetched pictures; its rows are as those of `florence_vl_mini.load_index`, all of split train.

    Raises:
        FileNotFoundError: Nothing was fetched yet.
        ValueError: A file is missing, cut off or of another version.
    """
    known = base.read_manifest(folder, "copyleft pictures", COMMAND, VERSION, SOURCES)
    for name, digest in known["files"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is missing or damaged: run `{COMMAND}`, which makes it again")
    return json.loads((folder / "index.json").read_text())


def open_picture(folder: Path, row: Row) -> Image.Image:
    """The RGBA picture of a row of `read_cache`, at most 112 px on a side."""
    with zipfile.ZipFile(folder / f"{row['set']}.zip") as archive:
        return Image.open(io.BytesIO(archive.read(row["file"]))).convert("RGBA")


def build_copyleft(sources: Path, target: Path, keep: Callable[[Row], bool]) -> dict[str, int]:
    """Fetch the archives, draw and cut out the pictures, and write them to `target`; see `write_cache`.

    Raises:
        ValueError: A package is missing, or of another version (checksum).
    """
    wanted = {**SOURCES, **{name: base.SOURCES[name] for name in _HELPERS}}
    for source in wanted.values():
        base.fetch(source, sources)  # all of them, before the first is unpacked
    roots = {name: base._unpack(source, sources) for name, source in wanted.items()}
    kin = _Kin(roots["wordnet"])
    names = base._emoji(roots["emojibase"])
    categories = {entry["caption"]: entry["category"] for entry in names.values()}
    sets = {
        "openmoji": dict(_openmoji(roots["openmoji"], names)),
        "tuxpaint": dict(_tuxpaint(roots["tuxpaint"], kin, categories)),
        "art4apps": dict(_art4apps(roots["art4apps"], kin, categories)),
    }
    taken = {entry["caption"] for entry, _ in sets["art4apps"].values()}
    sets["gcompris"] = dict(_gcompris(roots["gcompris"], kin, categories, taken))
    texts = {
        "openmoji": (roots["openmoji"] / "package/LICENSE.txt").read_text(),
        "tuxpaint": base._copyright(roots["tuxpaint"]),
        "art4apps": base._copyright(roots["art4apps"])
        + gzip.decompress((roots["art4apps"] / "usr/share/doc/pysiogame/CREDITS.txt.gz").read_bytes()).decode(),
        "gcompris": base._copyright(roots["gcompris"]),
    }
    licence = {
        "openmoji": "CC-BY-SA-4.0",
        "tuxpaint": "GPL-2",
        "art4apps": "CC-BY-SA",
        "gcompris": "GPL-3, CC-BY-SA-3.0 or CC-BY-SA-4.0, as each row states",
    }
    licences = {
        name: (
            texts[name],
            f"package: {s.name} {s.version} ({s.kind})\nfetch: {s.how}\nsha256: {s.sha256}\nlicence: {licence[name]}\n"
            "used for: training only; trimmed, shrunk to 112 px, re-encoded as webp\n",
        )
        for name, s in SOURCES.items()
    }
    return write_cache(target, sets, licences, keep)
