"""Find a record's images: under a folder or URL, or inside tar and zip archives without unpacking them."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from florence_vl.data.readers import files
from florence_vl.data.readers.index import cached_array
from florence_vl.data.records import MAX_IMAGE_BYTES, BadRecord, ImageRef, ImageSource

_MEMBER = np.dtype([("hash", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("method", "<u2"), ("crc", "<u4")])
_IN_TAR, _STORED, _DEFLATED = 0, 1, 2
_ARCHIVES = (".tar", ".zip")


class ImageStore:
    """Images by the name that records use: `store["coco/train2017/1.jpg"] -> ImageSource`.

    Args:
        roots: A folder, an fsspec URL, a `.tar` or `.zip`, or several of these, searched in order. With None, names are
            paths. Archives are indexed once (hash of the member's name -> offset, memory-mapped).
        allow_outside: With roots, also allow absolute names, names with `..`, and URLs. Links are always followed.

    Raises:
        FileNotFoundError: A root does not exist.
        ValueError: A root is a compressed tar.
    """

    def __init__(self, roots: str | Path | Sequence[str | Path] | None, allow_outside: bool = False) -> None:
        if roots is None:
            roots = []
        elif isinstance(roots, (str, Path)):
            roots = [roots]
        self.roots = [files.local(root) for root in roots]
        self.allow_outside = allow_outside
        self._near: str | None = None
        self._indices: dict[str, np.ndarray] = {}
        for root in self.roots:
            if root.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
                raise ValueError(f"images cannot be picked from the compressed archive {root}: decompress it to .tar")
            if root.endswith(_ARCHIVES):
                self._index(root)
            elif not files.exists(root):
                raise FileNotFoundError(f"no such image folder: {root}")

    def _index(self, root: str) -> np.ndarray:
        if root not in self._indices:
            build = _scan_zip if root.endswith(".zip") else _scan_tar
            self._indices[root] = cached_array(files.identity(root), "members", lambda: build(root))
        return self._indices[root]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_indices": {}}

    def __getitem__(self, name: str) -> ImageSource:
        """The source of an image.

        Raises:
            BadRecord: Kind "image": the name is outside the roots, or no archive among the roots contains it. A missing
                file in a folder is detected when it is opened.
        """
        if name.startswith("data:"):
            return name
        if self.roots and not self.allow_outside:
            self._check_inside(name)
        folders = [root for root in self.roots if not root.endswith(_ARCHIVES)]
        for root in self.roots:
            if root.endswith(_ARCHIVES):
                found = self._in_archive(root, name)
                if found is not None:
                    return found
        path = files.join(folders[0], name) if folders else name
        for folder in folders[1:]:
            if files.exists(path):
                break
            path = files.join(folder, name)
        if self.roots and not folders:
            raise BadRecord("image", f"no image {name!r} in {', '.join(self.roots)}{self._hint(name)}")
        return ImageRef(path, name=path) if files.is_url(path) else path

    def _check_inside(self, name: str) -> None:
        under_url = any(files.is_url(root) and name.startswith(f"{root.rstrip('/')}/") for root in self.roots)
        outside = (files.is_url(name) and not under_url) or name.startswith(("/", "~")) or os.path.isabs(name)
        if outside or ".." in re.split(r"[/\\]", name):
            raise BadRecord(
                "image",
                f"the image name {name!r:.200} is outside {', '.join(self.roots)}: give names "
                "relative to image_root, or allow it with allow_outside=true",
            )

    def _hint(self, name: str) -> str:
        """Path in the first archive of a file with the same name in another folder; searched once."""
        if self._near is None:
            self._near = ""
            base = name.rpartition("/")[2]
            for root in self.roots:
                members = _names(root)
                near = next((member for member in members if member.rpartition("/")[2] == base), None)
                if near or members:
                    self._near = f"; {root} holds {near or members[0]!r}" + ("" if near else " and others")
                    break
        return self._near

    def _in_archive(self, root: str, name: str) -> ImageSource | None:
        index = self._index(root)
        wanted = _hash(name)
        at = int(np.searchsorted(index["hash"], wanted))
        if at == len(index) or index["hash"][at] != wanted:
            return None
        offset, size, method, crc = (int(index[at][key]) for key in ("offset", "size", "method", "crc"))
        if method != _IN_TAR:  # a zip's local header has separate lengths of name and extra field
            header = files.read_range(root, offset, 30)
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            offset += 30 + name_length + extra_length
        if method == _DEFLATED:
            return _inflate(files.read_range(root, offset, min(size, MAX_IMAGE_BYTES)), f"{root}/{name}", crc)
        return ImageRef(root, offset, size, name=f"{root}/{name}", crc=None if method == _IN_TAR else crc)


def _inflate(data: bytes, name: str, crc: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(data, MAX_IMAGE_BYTES)
    except zlib.error as error:
        raise BadRecord("image", f"{name} is damaged: {error}") from None
    if not inflater.eof:
        size = "larger than the limit" if len(content) == MAX_IMAGE_BYTES else "truncated"
        raise BadRecord("image", f"{name} is {size} (the limit is {MAX_IMAGE_BYTES} bytes)")
    if zlib.crc32(content) != crc:
        raise BadRecord("image", f"{name} is damaged: its checksum differs from the archive's")
    return content


def _names(root: str, most: int = 200_000) -> list[str]:
    """Names of an archive's first files."""
    with files.open_file(root) as file:
        if root.endswith(".zip"):
            return [name for name in zipfile.ZipFile(file).namelist()[:most] if not name.endswith("/")]
        with open_tar(file, root) as tar:
            return [member.name for member in itertools.islice(tar, most) if member.isfile()]


def _hash(name: str) -> np.uint64:
    name = name.lstrip("/").removeprefix("./")
    return np.frombuffer(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), dtype="<u8")[0]


def _members(rows: list[tuple[np.uint64, int, int, int, int]]) -> np.ndarray:
    array = np.array(rows, dtype=_MEMBER)
    return array[np.argsort(array["hash"], kind="stable")]


def _scan_tar(path: str) -> np.ndarray:
    rows = []
    with files.open_file(path) as file, open_tar(file, path) as tar:
        try:
            for member in tar:
                if member.isfile():
                    rows.append((_hash(member.name), member.offset_data, member.size, _IN_TAR, 0))
                tar.members = []  # type: ignore[attr-defined]  # keeps memory flat
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{path} is damaged after {len(rows)} files: {error}") from None
        check_tar_end(file, tar, path, len(rows))
    return _members(rows)


def check_tar_end(file: IO[bytes], tar: tarfile.TarFile, path: str, members: int) -> None:
    """Check that `tarfile` stopped at the end of a tar: it also ends silently at a damaged header.

    Args:
        file: The tar's stream.
        tar: The tar, read to its end.
        path: Name of the tar, for messages.
        members: Number of files found.

    Raises:
        ValueError: The tar is truncated or damaged, or several archives are concatenated.
    """
    end = file.seek(0, os.SEEK_END)
    if tar.offset > end:
        raise ValueError(f"{path} is truncated inside its last member")
    file.seek(tar.offset)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise ValueError(
                f"{path} is damaged, or several archives in one: the data after {members} files is not a tar's end. "
                "Write it again as one archive"
            )


def open_tar(file: object, path: str) -> tarfile.TarFile:
    """Open an uncompressed tar for reading.

    Raises:
        ValueError: The file is not an uncompressed tar.
    """
    try:
        return tarfile.open(fileobj=file, mode="r:")  # type: ignore[call-overload]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar file: {error}{files.pointer_hint(path)}") from None


def _scan_zip(path: str) -> np.ndarray:
    rows = []
    with files.open_file(path) as file:
        try:
            entries = zipfile.ZipFile(file).infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a zip file: {error}{files.pointer_hint(path)}") from None
    for entry in entries:
        if entry.is_dir():
            continue
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise ValueError(f"{path}: {entry.filename} is encrypted or packed by an unknown method; unpack the zip")
        method = _STORED if entry.compress_type == zipfile.ZIP_STORED else _DEFLATED
        rows.append((_hash(entry.filename), entry.header_offset, entry.compress_size, method, entry.CRC))
    return _members(rows)
