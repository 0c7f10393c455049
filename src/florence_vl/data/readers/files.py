"""Random access to bytes of local files and fsspec URLs, and lists of files that match a pattern."""

from __future__ import annotations

import glob
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

from florence_vl.files import LFS_POINTER

_MAX_OPEN = 64
_lock = threading.Lock()
_descriptors: OrderedDict[tuple[int, str], int] = OrderedDict()


def is_url(path: str | Path) -> bool:
    """Whether a path is an fsspec URL (`s3://...`, `memory://...`) rather than a local file."""
    return "://" in str(path)


def local(path: str | Path) -> str:
    """A local path with `~` expanded and without `file://`; URLs are unchanged."""
    text = str(path)
    if text.startswith("file://"):
        text = text[len("file://") :]
    return text if is_url(text) else os.path.expanduser(text)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    return cast(tuple[Any, str], fsspec.core.url_to_fs(url))


def exists(path: str | Path) -> bool:
    """Whether a file or folder exists."""
    text = local(path)
    if not is_url(text):
        return os.path.exists(text)
    filesystem, inner = _filesystem(text)
    return bool(filesystem.exists(inner))


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder."""
    text = local(path)
    if not is_url(text):
        return os.path.isdir(text)
    filesystem, inner = _filesystem(text)
    return bool(filesystem.isdir(inner))


def identity(path: str | Path) -> tuple[str, int, str]:
    """(absolute path or URL, size in bytes, version of the content); changes when the file does.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    text = local(path)
    if not is_url(text):
        _forget(text)  # the file may have been replaced since the last read
        try:
            stat = os.stat(text)
        except FileNotFoundError:
            raise FileNotFoundError(f"no such data file: {text}") from None
        return os.path.abspath(text), stat.st_size, str(stat.st_mtime_ns)
    filesystem, inner = _filesystem(text)
    try:
        info = filesystem.info(inner)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such data file: {text}") from None
    mark = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    return text, int(info["size"]), str(mark)


def open_file(path: str | Path) -> IO[bytes]:
    """A seekable binary stream.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    text = local(path)
    try:
        if not is_url(text):
            return open(text, "rb")
        filesystem, inner = _filesystem(text)
        return cast(IO[bytes], filesystem.open(inner, "rb"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such data file: {text}") from None


def pointer_hint(path: str | Path) -> str:
    """Addition to an error about a file's format if the file is a Git LFS pointer."""
    with open_file(path) as file:
        pointer = file.read(64).startswith(LFS_POINTER)
    return ". It is a Git LFS pointer, not the file itself: fetch the file with `git lfs pull`" if pointer else ""


def read_range(path: str | Path, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, in one positioned read that is safe in forked workers and threads.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is shorter than when it was indexed.
    """
    text = local(path)
    if is_url(text):
        filesystem, inner = _filesystem(text)
        data = cast(bytes, filesystem.cat_file(inner, start=offset, end=offset + length))
    else:
        data = _pread(text, offset, length)
    if len(data) != length:
        raise ValueError(f"{text} ends at byte {offset + len(data)}, expected {length} bytes from {offset} on")
    return data


def _pread(path: str, offset: int, length: int) -> bytes:
    key = (os.getpid(), path)
    with _lock:
        descriptor = _descriptors.get(key)
        if descriptor is None:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise FileNotFoundError(f"no such data file: {path}") from None
            _descriptors[key] = descriptor
            while len(_descriptors) > _MAX_OPEN:
                os.close(_descriptors.popitem(last=False)[1])
        else:
            _descriptors.move_to_end(key)
        pieces = []
        while length > 0:
            piece = os.pread(descriptor, length, offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
    return b"".join(pieces)


def _forget(path: str) -> None:
    with _lock:
        descriptor = _descriptors.pop((os.getpid(), path), None)
        if descriptor is not None:
            os.close(descriptor)


def find_files(path: str | Path, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted files for a path, a folder, or a glob without braces.

    Args:
        path: A file, a folder (searched recursively), or a glob; local or URL.
        suffixes: Endings to keep in a folder, in lower case.

    Raises:
        FileNotFoundError: No file matches.
    """
    text = local(path)
    if not is_url(text):
        if os.path.isfile(text):
            return [text]
        pattern = os.path.join(glob.escape(text), "**", "*") if os.path.isdir(text) else text
        found = [name for name in glob.iglob(pattern, recursive=True) if os.path.isfile(name)]
    else:
        filesystem, inner = _filesystem(text)
        if filesystem.isfile(inner):
            return [text]
        names = filesystem.find(inner) if filesystem.isdir(inner) else filesystem.glob(inner)
        found = [filesystem.unstrip_protocol(name) for name in names]
    found = sorted(name for name in found if name.lower().endswith(suffixes))
    if not found:
        raise FileNotFoundError(f"no file ending in {' or '.join(suffixes)} at {text}")
    return found


def join(root: str | Path | None, name: str) -> str:
    """A name under a root; absolute names and URLs are unchanged."""
    if root is None or is_url(name) or os.path.isabs(name):
        return name
    text = local(root)
    return f"{text.rstrip('/')}/{name}" if is_url(text) else os.path.join(text, name)
