"""Digests of the training files, and settings of their encoding, to detect changes between sessions of a run."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from florence_vl.train.config import Recipe, SourceConfig

WHOLE = 1 << 30  # bytes; sources with more are sampled
_PIECES, _PIECE = 256, 1 << 16
_SAMPLED = "sampled:"  # files that earlier versions read completely; digests of both kinds are not comparable


def fingerprint(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """A digest of each source's files, by path; their pictures are not read.

    Files of up to 1 GiB together are read completely; of larger ones, their sizes and 256 pieces spread over their
    content. For a folder, the names and sizes of its files are included, and the content of its JSON files. URLs and
    other non-local paths are skipped.
    """
    found = {}
    for source in sources:
        path = Path(source.path).expanduser()
        files = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if path.is_dir():
            files = [path]
        if files:
            found[source.path] = _digest(files)
    return found


def encoding_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that determine a record's text, images, tokens and labels, as JSON values by name.

    Those of order and packing are in the state of the data; `florence_vl.data.packing.check_fingerprint` checks both.
    """
    values = recipe.to_dict()
    data, model = values["data"], values["model"]
    found = {f"data.{key}": data[key] for key in ("template", "template_options", "max_length", "on_long")}
    for number, source in enumerate(data["sources"]):
        found |= {f"data.sources.{number}.{key}": source[key] for key in ("image_root", "options")}
    for name, part in (("model", model), ("model.build", model["build"] or {})):
        keys = ("image_aspect_ratio", "image_size", "token_budget", "tiles", "views")
        found |= {f"{name}.{key}": part[key] for key in keys if key in part}
    return json.loads(json.dumps(found | {"distill": recipe.distill > 0}, default=str))


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that the training files have not changed.

    Raises:
        ValueError: Files changed; the message names them.
    """
    both = [(path, then, now[path]) for path, then in saved.items() if path in now]
    if edited := [p for p, a, b in both if a != b and a.startswith(_SAMPLED) == b.startswith(_SAMPLED)]:
        raise ValueError(
            f"cannot resume at the same data: {', '.join(edited)} changed since the checkpoint was saved. Restore the "
            "file, or start a new run from the checkpoint's weights (florence-vl export, model.path)"
        )


def _digest(files: Sequence[Path]) -> str:
    parts: list[tuple[str, Path | None]] = []  # what is known of a file, and the file if its content counts
    for file in files:
        if not file.is_dir():
            parts.append((f"{file.stat().st_size}\n", file))
            continue
        for inner in sorted(file.rglob("*")):
            if inner.is_file():
                known = f"{inner.relative_to(file)} {inner.stat().st_size}\n"
                parts.append((known, inner if inner.suffix in (".json", ".jsonl") else None))
    contents = [(path, path.stat().st_size) for _, path in parts if path is not None]
    total = sum(size for _, size in contents)
    digest = hashlib.sha256()
    for known, path in parts:
        digest.update(known.encode())
        if path is not None and total <= WHOLE:
            with path.open("rb") as opened:
                while chunk := opened.read(1 << 22):
                    digest.update(chunk)
    if total <= WHOLE:
        return digest.hexdigest()
    first, wanted = 0, [number * (total - _PIECE) // (_PIECES - 1) for number in range(_PIECES)]
    for path, size in contents:  # as if they were one file
        if places := [place - first for place in wanted if first <= place < first + size]:
            with path.open("rb") as opened:
                for place in places:
                    opened.seek(place)
                    digest.update(opened.read(_PIECE))
        first += size
    return digest.hexdigest() if len(parts) == 1 else _SAMPLED + digest.hexdigest()
