"""Reader of WebDataset tar shards by number: members are indexed once, then read in place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from florence_vl.data.filters import Filter
from florence_vl.data.readers import files
from florence_vl.data.readers.base import READERS, Caption, Reader, as_prompts
from florence_vl.data.readers.conversation import SYSTEM_KEYS, from_row, refuse_meaning, row_images
from florence_vl.data.readers.images import ImageStore, check_tar_end, open_tar
from florence_vl.data.readers.index import cached_array
from florence_vl.data.records import BadRecord, ImageRef, ImageSource, Record, decode_text, printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_TEXT_EXTENSIONS = ("txt", "caption", "text")
_MEMBER = np.dtype([("sample", "<u4"), ("name", "<u8"), ("length", "<u2"), ("offset", "<u8"), ("size", "<u8")])


@READERS.register("webdataset")
class WebDatasetReader(Reader):
    """Samples of tar shards: members with the same key (the name up to the first dot) belong together.

    The text of a sample is its `.json` member (`conversations`, `messages`, `texts`, or a caption under the key
    `caption`) or its `.txt` / `.caption` member; its images are the image members in order of their names.

    Args:
        path: A `.tar`, a folder of them, or a glob; local or fsspec URL.
        caption: Key of the caption in the JSON member; "txt" uses the text member.
        prompts: User texts for captions, see `Caption`.
        strip_prefixes: Prefixes to remove from captions.
        filters: Samples to keep by values of the JSON member (which is read once for every sample).
        name: Name of the source.

    Raises:
        FileNotFoundError: There is no shard.
        ValueError: A file is not a tar, or there are no samples.
    """

    def __init__(
        self,
        path: str | Path,
        caption: str | None = None,
        prompts: str | Sequence[str] | None = None,
        strip_prefixes: Sequence[str] = (),
        filters: Sequence[Filter] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(path, name)
        self.shards = files.find_files(path, (".tar",))
        self.filters = tuple(filters)
        self.caption = Caption(caption or "txt", as_prompts(prompts), tuple(strip_prefixes))
        self._identities = [files.identity(shard) for shard in self.shards]
        self._members: dict[int, np.ndarray] = {}
        key = [self._identities, [f.key() for f in self.filters]]
        # (shard, sample in the shard, first member, number of members) of every kept sample
        self._samples_key = key
        self._samples = cached_array(key, "samples", self._scan_samples)
        if not len(self._samples):
            rest = f" that pass the filters {[f.key() for f in self.filters]}" if self.filters else ""
            raise ValueError(f"{self.path} holds no samples{rest}")
        self._length = len(self._samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": {}, "_samples": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._samples = cached_array(self._samples_key, "samples", self._scan_samples)

    def __len__(self) -> int:
        return self._length

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._members:
            self._members[number] = cached_array(
                self._identities[number], "tar", lambda: _scan_shard(self.shards[number])
            )
        return self._members[number]

    def _scan_samples(self) -> np.ndarray:
        tables = []
        for number in range(len(self.shards)):
            members = self._shard(number)
            firsts = np.flatnonzero(np.diff(members["sample"], prepend=np.uint32(0xFFFFFFFF)))
            counts = np.diff(firsts, append=len(members))
            table = np.stack([np.full(len(firsts), number), np.arange(len(firsts)), firsts, counts], axis=1)
            if self.filters:
                keep = [self._passes(number, int(f), int(c)) for f, c in zip(firsts, counts, strict=True)]
                table = table[np.array(keep, dtype=bool)]
            tables.append(table.astype(np.uint32))
        return np.concatenate(tables)

    def _passes(self, shard: int, first: int, count: int) -> bool:
        try:
            row = self._sample(shard, first, count).row()
            return row is not None and all(f(row) for f in self.filters)
        except Exception:
            return True  # kept, so that reading it counts it as bad

    def _sample(self, shard: int, first: int, count: int) -> Members:
        path = self.shards[shard]
        parts = {_read_name(path, member): member for member in self._shard(shard)[first : first + count]}
        places = {name: (int(member["offset"]), int(member["size"])) for name, member in parts.items()}
        sources: dict[str, ImageSource] = {n: ImageRef(path, *place, name=f"{path}/{n}") for n, place in places.items()}
        return Members(path, _split_key(next(iter(parts)))[0], sources, lambda n: files.read_range(path, *places[n]))

    def _read(self, index: int) -> Record:
        shard, _, first, count = (int(x) for x in self._samples[index])
        sample = self._sample(shard, first, count)
        return sample.record(sample.row() or {}, self.caption, self.name, index)

    def json(self, index: int) -> dict[str, Any] | None:
        """The object in a sample's JSON member; None without one.

        Raises:
            BadRecord: The member is malformed.
        """
        shard, _, first, count = (int(x) for x in self._samples[index])
        return self._sample(shard, first, count).row()


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON member.

    Raises:
        BadRecord: Kind "messages": the member is not an object.
    """
    try:
        row = json.loads(decode_text(data, where))
    except RecursionError:
        raise BadRecord("messages", f"{where}: the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadRecord("messages", f"{where}: invalid JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRecord("messages", f"{where}: expected an object, found {type(row).__name__}")
    return row


def is_image(name: str) -> bool:
    """Whether a member is an image, by its last extension."""
    return name.lower().rsplit(".", 1)[-1] in IMAGE_EXTENSIONS


def is_text(name: str) -> bool:
    """Whether a member is a caption, by its last extension."""
    return name.lower().rsplit(".", 1)[-1] in _TEXT_EXTENSIONS


@dataclass(frozen=True)
class Members:
    """The members of one WebDataset sample.

    Args:
        root: The shard, or the data set, for messages.
        key: The sample's key; its id if the JSON has none.
        sources: Name of each member -> where it is, if it is an image.
        read: Returns the content of a member.
    """

    root: str
    key: str
    sources: Mapping[str, ImageSource]
    read: Callable[[str], bytes]

    def row(self) -> dict[str, Any] | None:
        """The object in the JSON member; None without one.

        Raises:
            BadRecord: The member is malformed.
        """
        found = [name for name in self.sources if name.lower().endswith(".json")]
        return parse_json(self.read(found[0]), f"{self.root}/{found[0]}") if found else None

    def record(self, row: Mapping[str, Any], caption: Caption, source: str, index: int) -> Record:
        """Create the sample's record.

        Args:
            row: The JSON member; empty without one.
            caption: Converts a caption to messages; its column "txt" uses the text member, or the JSON's `caption`.
            source: Name of the data set.
            index: Number that determines the prompt.

        Raises:
            BadRecord: The sample is malformed.
        """
        where = f"{self.root}/{self.key}"
        identifier = str(row.get("id") or row.get("uid") or row.get("key") or self.key)
        layout = next((key for key in ("messages", "conversations", "texts") if key in row), None)
        images = self._shown(row if layout else {}, layout == "messages", where)
        if layout:  # the members are the images, whatever the messages name
            messages, _ = from_row(row, layout, [b"member"] * len(images), ImageStore(None), where)
            return Record(identifier, source, messages, images)
        refuse_meaning(row, where, SYSTEM_KEYS)
        text = row.get(caption.column)
        if caption.column == "txt":
            found = [name for name in self.sources if is_text(name)]
            text = decode_text(self.read(found[0]), f"{self.root}/{found[0]}") if found else row.get("caption")
        return Record(identifier, source, caption.messages(text, index, where), images)

    def _shown(self, row: Mapping[str, Any], strict: bool, where: str) -> list[ImageSource]:
        """The images in the order in which the row lists them, or of their names if it lists no members.

        Raises:
            BadRecord: The row lists images that are not members, `strict` or beside others that are.
        """
        own = {PurePosixPath(name).name: self.sources[name] for name in sorted(self.sources) if is_image(name)}
        listed = row_images(row, where)
        chosen = [own[name] for image in listed if (name := PurePosixPath(str(image)).name) in own]
        if len(chosen) < len(listed) and (strict or chosen):
            raise BadRecord("image", f"{where}: the JSON names images {listed} that are not in the sample")
        return chosen or list(own.values())


def _split_key(name: str) -> tuple[str, str]:
    """(key, extension): WebDataset splits at the first dot of the last path component."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension


def _scan_shard(path: str) -> np.ndarray:
    """Members of a shard. `name` and `length` give the position of the name's bytes in the tar's headers.

    Raises:
        ValueError: The file is not a tar, or is truncated.
    """
    import tarfile

    rows = []
    sample, last = -1, None
    keys: set[str] = set()
    names: dict[str, str] = {}  # of the sample: kind of member -> its name
    with files.open_file(path) as file, open_tar(file, path) as tar:
        try:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]
                if not member.isfile():
                    continue
                key, extension = _split_key(member.name)
                base = member.name.rpartition("/")[2]
                if not extension or base.startswith(("__", ".")) or member.name.startswith("__MACOSX/"):
                    continue  # WebDataset's own members, or hidden files of a desktop
                if key != last:
                    if key in keys:
                        raise ValueError(
                            f"{path}: the sample {printable(key)!r} comes back with the member "
                            f"{printable(member.name)!r} after another sample: the members of a sample must be "
                            "adjacent (tar --sort=name)"
                        )
                    keys.add(key)
                    names.clear()
                    sample, last = sample + 1, key
                ending = extension.lower().rpartition(".")[2]
                what = "text" if is_text(base) else "json" if ending == "json" else member.name
                if what in names:
                    raise ValueError(
                        f"{path}: the sample {printable(key)!r} has two members {printable(names[what])!r} and "
                        f"{printable(member.name)!r}: a sample has one text, one .json and no duplicate names. Its key "
                        "is the name up to the first dot, so keys must not contain dots"
                    )
                names[what] = member.name
                rows.append(
                    (
                        sample,
                        member.offset,
                        len(os.fsencode(member.name)),
                        member.offset_data,
                        member.size,
                    )
                )
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{path} is damaged after {len(rows)} members: {error}") from None
        check_tar_end(file, tar, path, len(rows))
    return np.array(rows, dtype=_MEMBER)


def _read_name(path: str, member: np.void) -> str:
    """The name of a member, parsed from its header (ustar, GNU and pax forms)."""
    import tarfile

    start, data = int(member["name"]), int(member["offset"])
    header = files.read_range(path, start, data - start)
    if len(header) == tarfile.BLOCKSIZE:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    import io

    padding = b"\0" * (int(member["size"]) + 2 * tarfile.BLOCKSIZE)  # long names precede the last header
    with tarfile.open(fileobj=io.BytesIO(header + padding), mode="r:") as tar:
        found = tar.next()
    assert found is not None
    return found.name
