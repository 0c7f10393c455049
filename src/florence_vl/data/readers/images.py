"""Finding a record's images: under a folder or URL, or inside tar and zip archives without unpacking them."""

from __future__ import annotations

import hashlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from florence_vl.data.readers import files
from florence_vl.data.readers.index import cached_array
from florence_vl.data.records import BadRecord, ImageRef, ImageSource

_MEMBER = np.dtype([("hash", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("method", "<u2")])
_IN_TAR, _STORED, _DEFLATED = 0, 1, 2
_ARCHIVES = (".tar", ".zip")


class ImageStore:
    """Images by the name that records use: `store["coco/train2017/1.jpg"] -> ImageSource`.

    Args:
        roots: A folder, an fsspec URL, a `.tar` or `.zip`, or several of these, searched in order. None takes names as
            paths. Archives are indexed once (hash of the member's name -> offset, memory-mapped).

    Raises:
        FileNotFoundError: A root does not exist.
        ValueError: A root is a compressed tar.
    """

    def __init__(self, roots: str | Path | Sequence[str | Path] | None) -> None:
        if roots is None:
            roots = []
        elif isinstance(roots, (str, Path)):
            roots = [roots]
        self.roots = [files.local(root) for root in roots]
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
        return {"roots": self.roots, "_indices": {}}

    def __getitem__(self, name: str) -> ImageSource:
        """The source of an image.

        Raises:
            BadRecord: kind "image": no archive among the roots holds it. A missing file in a folder is found out when
                it is opened.
        """
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
            raise BadRecord("image", f"no image {name!r} in {', '.join(self.roots)}")
        return ImageRef(path, name=path) if files.is_url(path) and not path.startswith("data:") else path

    def _in_archive(self, root: str, name: str) -> ImageSource | None:
        index = self._index(root)
        wanted = _hash(name)
        at = int(np.searchsorted(index["hash"], wanted))
        if at == len(index) or index["hash"][at] != wanted:
            return None
        offset, size, method = (int(index[at][key]) for key in ("offset", "size", "method"))
        if method != _IN_TAR:  # a zip's local header has its own lengths of name and extra field
            header = files.read_range(root, offset, 30)
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            offset += 30 + name_length + extra_length
        if method == _DEFLATED:
            return zlib.decompress(files.read_range(root, offset, size), -zlib.MAX_WBITS)
        return ImageRef(root, offset, size, name=f"{root}/{name}")


def _hash(name: str) -> np.uint64:
    name = name.lstrip("/").removeprefix("./")
    return np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), dtype="<u8")[0]


def _members(rows: list[tuple[np.uint64, int, int, int]]) -> np.ndarray:
    array = np.array(rows, dtype=_MEMBER)
    return array[np.argsort(array["hash"], kind="stable")]


def _scan_tar(path: str) -> np.ndarray:
    rows = []
    with files.open_file(path) as file, open_tar(file, path) as tar:
        for member in tar:
            if member.isfile():
                rows.append((_hash(member.name), member.offset_data, member.size, _IN_TAR))
            tar.members = []  # type: ignore[attr-defined]  # keeps memory flat
    return _members(rows)


def open_tar(file: object, path: str) -> tarfile.TarFile:
    """An uncompressed tar for reading.

    Raises:
        ValueError: It is not one.
    """
    try:
        return tarfile.open(fileobj=file, mode="r:")  # type: ignore[call-overload]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar file: {error}") from None


def _scan_zip(path: str) -> np.ndarray:
    rows = []
    with files.open_file(path) as file:
        try:
            entries = zipfile.ZipFile(file).infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a zip file: {error}") from None
    for entry in entries:
        if entry.is_dir():
            continue
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise ValueError(f"{path}: {entry.filename} is encrypted or packed by an unknown method; unpack the zip")
        method = _STORED if entry.compress_type == zipfile.ZIP_STORED else _DEFLATED
        rows.append((_hash(entry.filename), entry.header_offset, entry.compress_size, method))
    return _members(rows)
