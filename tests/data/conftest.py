"""Files in formats of others, made small."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_rcc() -> Callable[..., bytes]:
    """Writes a Qt resource file: path -> content; those in `packed` with zlib."""

    def write(files: dict[str, bytes], packed: tuple[str, ...] = (), version: int = 3, flags: int = 0) -> bytes:
        tree: dict = {}
        for path, content in files.items():
            *folders, name = path.split("/")
            at = tree
            for folder in folders:
                at = at.setdefault(folder, {})
            at[name] = (path, content)
        names, data, nodes = b"", b"", []

        def name_at(text: str) -> int:
            nonlocal names
            start = len(names)
            names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
            return start

        level = [("", tree)]
        first = 1
        while level:  # children of a folder stand together, level by level
            below = []
            for name, item in level:
                at = name_at(name)
                if isinstance(item, dict):
                    nodes.append(struct.pack(">IHII", at, 2, len(item), first))
                    first += len(item)
                    below += list(item.items())
                else:
                    path, content = item
                    zipped = path in packed
                    content = struct.pack(">I", len(content)) + zlib.compress(content) if zipped else content
                    nodes.append(struct.pack(">IHHHI", at, int(zipped) | flags, 0, 0, len(data)))
                    data += struct.pack(">I", len(content)) + content
            level = below
        nodes = [n if version == 1 else n + bytes(8) for n in nodes]
        head = 20
        at_data = head + sum(map(len, nodes))
        header = b"qres" + struct.pack(">4I", version, head, at_data, at_data + len(data))
        return header + b"".join(nodes) + data + names

    return write


@pytest.fixture
def make_archive() -> Callable[..., Any]:
    """Writes an npm archive of version 1.0 (path -> content) and returns the source that it then is."""

    def write(folder: Path, name: str, files: dict[str, bytes]) -> Any:
        from florence_vl_mini.assets.build import Source

        path = folder / f"{name}-1.0.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for file, content in files.items():
                member = tarfile.TarInfo(file)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return Source("npm", name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())

    return write
