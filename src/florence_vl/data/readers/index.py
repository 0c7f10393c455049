"""Offset indices: the start of every record of a JSON, JSON-lines or tar file, scanned once and memory-mapped later.

An index is stored in the cache folder under the hash of the file's path, size and version. Opening it again maps 8
bytes per record from the page cache, which all processes share: ten million records open at once without private
memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from florence_vl.data.readers import files
from florence_vl.files import atomic_file, cache_dir

_VERSION = 2
_CHUNK = 1 << 24
_SPACE = b" \t\r\n\x0b\x0c"


def cached_array(key: Any, kind: str, build: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of `build()`, created once and then memory-mapped from the cache folder.

    Args:
        key: JSON-serializable; identifies the sources of the array (identities of files, options).
        kind: Name of the index; part of the key and of the file name.
        build: Creates the array.

    Returns:
        A read-only memory map.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, kind, key]).encode()).hexdigest()[:32]
    folder = cache_dir() / "index"
    path = folder / f"{kind}-{digest}.npy"
    if not path.exists():
        array = build()
        with atomic_file(path) as temporary:
            np.save(temporary, array)
    return np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path)


def _chunks(path: str | Path, size: int = _CHUNK) -> Iterator[bytes]:
    with files.open_file(path) as file:
        while chunk := file.read(size):
            yield chunk


def scan_json_lines(path: str | Path) -> np.ndarray:
    """Start of every non-blank line, and the file's end: uint64 (records + 1,)."""
    starts: list[np.ndarray] = []
    base = 0
    line_start = 0  # of the line at the beginning of the chunk
    blank = True  # only space in that line so far
    for chunk in _chunks(path):
        data = np.frombuffer(chunk, dtype=np.uint8)
        breaks = np.flatnonzero(data == 0x0A)
        begins = np.concatenate([[0], breaks + 1])
        ends = np.concatenate([breaks, [len(data)]])
        # a line is blank if all its bytes are space: test the first byte, and the others only if it is space
        first = data[np.minimum(begins, len(data) - 1)]
        maybe = np.isin(first, np.frombuffer(_SPACE, dtype=np.uint8)) | (begins == ends)
        filled = ~maybe
        for i in np.flatnonzero(maybe):
            filled[i] = bool(chunk[begins[i] : ends[i]].strip(_SPACE))
        offsets = begins.astype(np.int64) + base
        offsets[0] = line_start
        filled[0] = filled[0] or not blank
        starts.append(offsets[:-1][filled[:-1]])
        line_start, blank = int(offsets[-1]), not bool(filled[-1])
        base += len(data)
    if not blank:
        starts.append(np.array([line_start]))
    starts.append(np.array([base]))
    return np.concatenate(starts).astype(np.uint64)


def scan_json_array(path: str | Path) -> np.ndarray:
    """Start of every object in a JSON list of objects, and the list's closing bracket: uint64 (records + 1,).

    A streaming scan: brackets outside strings are counted per chunk, nothing is parsed.

    Raises:
        ValueError: The file is not a list of objects, or ends inside one.
    """
    starts: list[np.ndarray] = []
    base, depth, in_string = 0, 0, 0
    end = -1
    carry = b""
    first = True
    for chunk in _chunks(path):
        chunk = carry + chunk
        # a chunk must not end inside an escape: keep trailing backslashes for the next one
        tail = len(chunk) - len(chunk.rstrip(b"\\"))
        carry, chunk = (chunk[len(chunk) - tail :], chunk[: len(chunk) - tail]) if tail else (b"", chunk)
        if not chunk:
            continue
        if first:
            head = chunk.removeprefix(b"\xef\xbb\xbf").lstrip(_SPACE)
            if not head:
                raise ValueError(f"{path} is empty")
            if head[:1] != b"[":
                raise ValueError(f"{path} is not a JSON list of records: it begins with {head[:20]!r}")
            first = False
        data = np.frombuffer(chunk, dtype=np.uint8)
        quotes = np.flatnonzero(data == 0x22)
        slashes = np.flatnonzero(data == 0x5C)
        if slashes.size and quotes.size:
            quotes = quotes[~_escaped(quotes, slashes)]
        folded = data | 0x20  # '[' and '{' become 0x7b, ']' and '}' 0x7d
        brackets = np.flatnonzero((folded == 0x7B) | (folded == 0x7D))
        inside = (np.searchsorted(quotes, brackets) + in_string) % 2 == 1
        brackets = brackets[~inside]
        steps = np.where(folded[brackets] == 0x7B, 1, -1)
        depths = depth + np.cumsum(steps)
        opened = brackets[(depths == 2) & (steps == 1)]
        if opened.size and (data[opened] != 0x7B).any():
            raise ValueError(f"{path} is not a list of objects: found a list at byte {base + int(opened[0])}")
        starts.append(opened.astype(np.int64) + base)
        closed = brackets[(depths == 0) & (steps == -1)]
        if closed.size:
            end = base + int(closed[0])
        if brackets.size:
            depth = int(depths[-1])
        in_string = (in_string + quotes.size) % 2
        base += len(chunk)
    if first:
        raise ValueError(f"{path} is empty")
    count = sum(map(len, starts))
    if end < 0 or depth != 0 or in_string:
        raise ValueError(f"{path} is truncated: the JSON list does not end; its last record is number {count - 1}")
    offsets = np.concatenate([*starts, [end]])
    if count and offsets[-2] > end:
        raise ValueError(f"{path} contains more than one JSON list: the first ends at byte {end}")
    return offsets.astype(np.uint64)


def _escaped(quotes: np.ndarray, slashes: np.ndarray) -> np.ndarray:
    """Which quotes follow an odd run of backslashes."""
    run_begins = np.concatenate([[True], np.diff(slashes) != 1])
    first_of_run = slashes[np.maximum.accumulate(np.where(run_begins, np.arange(slashes.size), 0))]
    at = np.searchsorted(slashes, quotes) - 1  # the last backslash before each quote
    safe = np.maximum(at, 0)
    follows = (at >= 0) & (slashes[safe] == quotes - 1)
    return follows & ((quotes - first_of_run[safe]) % 2 == 1)


def line_number(path: str | Path, offset: int) -> int:
    """Line number of a byte, from 1; reads the file up to it (for error messages)."""
    line, seen = 1, 0
    for chunk in _chunks(path):
        part = chunk[: max(0, offset - seen)]
        line += part.count(b"\n")
        seen += len(chunk)
        if seen >= offset:
            break
    return line
