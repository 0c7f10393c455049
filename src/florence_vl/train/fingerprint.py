"""Digests of the training files, and settings of their encoding, to detect changes between sessions of a run."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from florence_vl.train.config import DataConfig, SourceConfig

WHOLE = 1 << 30  # bytes; larger files are sampled
_PIECES, _PIECE = 256, 1 << 16


def fingerprint(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """A digest of each source's files, by path; their pictures are not read.

    A file below 1 GiB is read completely; of a larger one, its size and 256 pieces spread over its length. For a
    folder, the names and sizes of its files are included, and the content of the record files directly in it. URLs and
    other non-local paths are skipped.
    """
    found = {}
    for source in sources:
        path = Path(source.path).expanduser()
        files = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path)))
        if path.is_dir():
            files = [path]
        if files:
            found[source.path] = _digest(files)
    return found


def encoding_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that determine a record's tokens and labels, as JSON values by name.

    Those of order and packing are in the state of the data; `florence_vl.data.packing.check_fingerprint` checks both.
    """
    return {f"data.{key}": getattr(data, key) for key in ("template", "template_options", "max_length", "on_long")}


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that the training files have not changed.

    Raises:
        ValueError: Files changed; the message names them.
    """
    if edited := [path for path in saved if path in now and saved[path] != now[path]]:
        raise ValueError(
            f"cannot resume at the same data: {', '.join(edited)} changed since the checkpoint was saved. Restore the "
            "file, or start a new run from the checkpoint's weights (florence-vl export, model.path)"
        )


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_dir():
            for inner in sorted(file.rglob("*")):
                if inner.is_file():
                    digest.update(f"{inner.relative_to(file)} {inner.stat().st_size}\n".encode())
                    if inner.suffix in (".json", ".jsonl"):
                        _add(digest, inner)
        else:
            digest.update(f"{file.stat().st_size}\n".encode())
            _add(digest, file)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
            return
        for number in range(_PIECES):
            file.seek(number * (size - _PIECE) // (_PIECES - 1))
            digest.update(file.read(_PIECE))
