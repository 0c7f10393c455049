"""GCompris' pictures out of its Qt resource files (`.rcc`): named cut-outs, and photographs with a word or paragraph.

Taken is only what a README beside it, or Debian's copyright file by name, states a licence for.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath

from florence_vl_mini.build import Source

SOURCE = Source("deb", "gcompris-qt-data", "3.1-2", "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f")
_ACTIVITIES = "gcompris/src/activities/"
_ZLIB, _FOLDER, _ZSTD = 1, 2, 4  # a node's flags

# Lesson of the word list -> (category of its members or None, a word that the right sense of their names leads up to).
_LESSONS = {"animal": ("animal", "animal"), "fruit": ("fruit", "fruit")}
# Pictures that show another number of things, or something else, than their names say.
_NOT_AS_NAMED = {
    "bongo",
    "cymbal",
    "organ",
    "timpani",
    "chicken-farm",
    "duck-farm",
    "reptile",
    "bug",
    "farm-animals-farm",
    "background",
}
_SPELLED = {"flute_traversiere": "flute", "drum_kit": "drum kit", "horn": "french horn"}

_TITLES = {"Cabrillo": "Cabrillo National Monument", "Navajo": "Navajo National Monument"}

# What the photographs of the sorting game are called; others are what their file says.
_PHOTO_NAMES: dict[str, str | None] = {
    "cuttingTool": "wire cutter",
    "sideCutter": "wire cutter",
    "nailCutter": "nail clipper",
    "plier": "pliers",
    "tweezer": "tweezers",
    "screwDriver": "screwdriver",
    "spray": "spray bottle",
    "solar": "solar panels",
    "solar1": "solar cooker",
    "solar2": "solar cooker",
    "solar3": "solar cookers",
    "windmill3": "windmills",
    "windmill6": "wind turbine",
    "windmill13": "windmills",
    "geothermal": "geothermal power plant",
    "blackslate": "blackboard",
    "buffetset": "cup and saucer",
    "bulb": "light bulb",
    "weighingMachine": "weighing scale",
    "IndiaGate": "India Gate",
    "arcDeTriomphe": "Arc de Triomphe du Carrousel",
    "bayterek": "Bayterek tower",
    "brandenburgGate": "Brandenburg Gate",
    "burj": "Burj Khalifa",
    "christTheRedeemer": "Christ the Redeemer",
    "colosseum": "Colosseum",
    "eiffelTower": "Eiffel Tower",
    "empireState": "Empire State Building",
    "greatPyramid": "Great Pyramid of Giza",
    "greatWall": "Great Wall of China",
    "jucheTower": "Juche Tower",
    "kutubMinar": "Qutub Minar",
    "leMusee": "Louvre",
    "leaningTowerOfPisa": "Leaning Tower of Pisa",
    "mountRushmore": "Mount Rushmore",
    "operaHouse": "Sydney Opera House",
    "parthenon": "Parthenon",
    "statueOfLiberty": "Statue of Liberty",
    "tajMahal": "Taj Mahal",
    "usCapitol": "United States Capitol",
    "victoriaMemorial": "Victoria Memorial",
    "zimniPalace": "Winter Palace",
    "monument": None,
    "fish": None,  # some show a swarm
    "alphabets": None,
    "numbers": None,
}


@dataclass(frozen=True)
class Picture:
    """A picture as stored: its path in the archive, its bytes, what is said of it, and its stated licence."""

    path: str
    data: bytes
    name: str
    text: str
    licence: str
    known: tuple[str | None, str] = (None, "")


def read_rcc(path: Path) -> dict[str, bytes]:
    """The files in a Qt resource file by path, unpacked (Qt: `rcc -binary`, formats 1 to 3).

    Raises:
        ValueError: No resource file, cut off, or packed in a way that is not read here (zstd).
    """
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{path} is no Qt resource file: it begins with {blob[:4]!r}, not b'qres'")
    out: dict[str, bytes] = {}
    try:
        version, tree, data, names = struct.unpack_from(">4I", blob, 4)
        node_size = 14 if version == 1 else 22  # later ones end in a time

        def walk(number: int, folder: str) -> None:
            at = tree + number * node_size
            name_at, flags = struct.unpack_from(">IH", blob, at)
            (length,) = struct.unpack_from(">H", blob, names + name_at) if number else (0,)
            start = names + name_at + 6  # the length and a hash come first
            where = folder + blob[start : start + 2 * length].decode("utf-16-be")
            if flags & _FOLDER:
                count, first = struct.unpack_from(">II", blob, at + 6)
                if first <= number and count:
                    raise ValueError("a folder lies in itself")
                for child in range(first, first + count):
                    walk(child, f"{where}/" if number else "")
                return
            (start,) = struct.unpack_from(">I", blob, at + 10)
            (length,) = struct.unpack_from(">I", blob, data + start)
            content = blob[data + start + 4 : data + start + 4 + length]
            if len(content) != length:
                raise ValueError("it ends too early")
            if flags & _ZSTD:
                raise ValueError(f"{where} is packed with zstd, which is not read here")
            out[where] = zlib.decompress(content[4:]) if flags & _ZLIB else content

        walk(0, "")
    except (struct.error, ValueError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a Qt resource file: {error}") from None
    return out


def readme_licences(files: dict[str, bytes]) -> dict[str, str]:
    """Path -> licence, as the READMEs among `files` state it for the files that they list by name."""
    out: dict[str, str] = {}
    for readme, content in files.items():
        folder, _, name = readme.rpartition("/")
        if name != "README":
            continue
        for block in re.split(r"\n\s*\n", content.decode("utf-8", "replace")):
            licence = re.search(r"^License:\s*(\S.*?)\s*$", block, re.M)
            listed = re.search(r"^Files:\s*\n(.*)", block, re.M | re.S)
            if licence and listed:
                out |= {f"{folder}/{file.strip()}": licence[1] for file in listed[1].splitlines() if file.strip()}
    return out


def debian_licence(copyright_file: str, path: str) -> str | None:
    """The licence that Debian's copyright file (DEP-5) states for `path`; None if only its `Files: *` does."""
    found = None
    for patterns, licence in _stanzas(copyright_file):
        if any(p != "*" and fnmatchcase(path, p) for p in patterns):
            found = licence  # the last one counts
    return found


@lru_cache(maxsize=4)
def _stanzas(copyright_file: str) -> tuple[tuple[tuple[str, ...], str | None], ...]:
    out = []
    for stanza in re.split(r"\n\s*\n", copyright_file):
        fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*((?:.*\n?)(?:[ \t]+.*\n?)*)", stanza, re.M))
        if "Files" in fields:
            out.append((tuple(fields["Files"].split()), fields.get("License", "").partition("\n")[0].strip() or None))
    return tuple(out)


class Archive:
    """The unpacked package.

    Args:
        root: Folder it was unpacked to.

    Raises:
        ValueError: It holds no resource files.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / "usr/share/gcompris-qt/rcc"
        if not self._folder.is_dir():
            raise ValueError(f"gcompris-qt-data has no pictures in {self._folder}: another version?")
        copyright_file = next(root.glob("usr/share/doc/*/copyright"), None)
        self._copyright = copyright_file.read_text(encoding="utf-8") if copyright_file else ""

    def activity(self, name: str) -> tuple[dict[str, bytes], dict[str, str]]:
        """Files of an activity and their stated licences, by path; nothing if the package has no such activity."""
        path = self._folder / f"{name}.rcc"
        files = read_rcc(path) if path.exists() else {}
        licences = readme_licences(files)
        for file in files:
            if file not in licences and (stated := debian_licence(self._copyright, file.removeprefix("gcompris/"))):
                licences[file] = stated
        return files, licences

    def cut_outs(self) -> Iterator[Picture]:
        """Drawings on transparent ground of animals, fruit and instruments; `known` as in `copyleft._entry`."""
        files, licences = self.activity("lang")
        chapters = json.loads(files.get(f"{_ACTIVITIES}lang/resource/words_sample.json", b"[]"))
        for lesson in (lesson for chapter in chapters for lesson in chapter["content"]):
            for word in lesson["content"] if lesson["name"] in _LESSONS else ():
                path = f"{_ACTIVITIES}lang/resource/words_sample/{word['image']}"
                name = PurePosixPath(path).stem
                if path in files and path in licences and name not in _NOT_AS_NAMED:
                    yield Picture(path, files[path], name, "", licences[path], _LESSONS[lesson["name"]])
        known = {
            "explore_farm_animals": ("resource/animals", ("animal", "animal")),
            "instruments": ("resource", ("musical instrument", "musical_instrument")),
        }
        for activity, (folder, kind) in known.items():
            files, licences = self.activity(activity)
            suffix = "-farm" if activity == "explore_farm_animals" else ""
            for path in sorted(files):
                where = PurePosixPath(path)
                inside = where.parent.as_posix() == f"{_ACTIVITIES}{activity}/{folder}"
                if inside and where.suffix == ".svg" and path in licences and where.stem + suffix not in _NOT_AS_NAMED:
                    name = _SPELLED.get(where.stem, where.stem)
                    yield Picture(path, files[path], name, "", licences[path], kind)

    def photographs(self) -> Iterator[Picture]:
        """Photographs of animals and monuments with a paragraph, and of things with a word."""
        for activity in ("explore_monuments", "explore_world_animals", "explore_farm_animals"):
            files, licences = self.activity(activity)
            for board in sorted(f for f in files if f.endswith(".qml") and "/board/" in f):
                for path, name, text in read_board(files[board].decode("utf-8")):
                    if path in files and path in licences:
                        yield Picture(path, files[path], _TITLES.get(name, name), text, licences[path])
        files, licences = self.activity("categorization")
        for path in sorted(files):
            where = PurePosixPath(path)
            if where.suffix == ".webp" and path in licences and (shown := photo_name(where.stem)):
                yield Picture(path, files[path], shown, "", licences[path])


def read_board(qml: str) -> Iterator[tuple[str, str, str]]:
    """(path of the picture, title, paragraph) of each place on a board of the exploring games."""
    for entry in re.split(r"\n\s*\{\s*\n", qml):
        found = {}
        for key in ("title", "text", "image2"):
            match = re.search(rf'"{key}":\s*(?:qsTr\()?"((?:[^"\\]|\\.)*)"', entry)
            if match:
                found[key] = re.sub(r"\\(.)", r"\1", match[1]).strip()
        if len(found) == 3:
            yield found["image2"].removeprefix("qrc:/"), found["title"], found["text"]


def photo_name(stem: str) -> str | None:
    """What a photograph of the sorting game shows, by its file's name ("measuringTape4"), or None."""
    bare = stem.rstrip("0123456789")
    for known in (stem, bare):
        if known in _PHOTO_NAMES:
            return _PHOTO_NAMES[known]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", bare).replace("_", " ").lower()
