"""Checks of a local copy of a known data set before training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from florence_vl.data.inspect import inspect_records
from florence_vl.data.readers import ParquetReader, Reader, files
from florence_vl.data.readers.json_files import IndexedJson
from florence_vl.data.records import BadRecord
from florence_vl.data.sources import DATASETS, open_dataset
from florence_vl.model.pictures import open_image

_SIDE = 32  # pixels per side of a thumbnail
SAME_PICTURE = 0.985
"""Minimum correlation of thumbnails of the same picture, re-encoded or resized."""


class PictureIndex:
    """Thumbnails of pictures, to find copies of them in another size or encoding.

    Args:
        pictures: Pairs of a name and a source for `open_image`. Unreadable and plain pictures are skipped.

    Attributes:
        names: The names of the pictures in the index.
    """

    def __init__(self, pictures: Iterable[tuple[str, Any]]) -> None:
        self.names: list[str] = []
        rows = []
        for name, source in pictures:
            try:
                row = _thumbnail(open_image(source))
            except (OSError, ValueError):
                continue
            if row is not None:
                self.names.append(name)
                rows.append(row)
        self._thumbnails_ND = np.array(rows, dtype=np.float32).reshape(-1, _SIDE * _SIDE)

    def __len__(self) -> int:
        return len(self.names)

    def find(self, image: Image.Image) -> str | None:
        """Name of the picture of which `image` is a copy, or None."""
        row_D = _thumbnail(image)
        if row_D is None or not self.names:
            return None
        likeness_N = self._thumbnails_ND @ row_D
        best = int(likeness_N.argmax())
        return self.names[best] if likeness_N[best] >= SAME_PICTURE else None


def _thumbnail(image: Image.Image) -> np.ndarray | None:
    """Gray levels (D,), mean 0 and norm 1; None for a plain picture, which correlates with every other one."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    levels = np.asarray(small, dtype=np.float32).ravel()
    levels -= levels.mean()
    norm = float(np.linalg.norm(levels))
    return levels / norm if norm > 4 * _SIDE else None  # a standard deviation of 4 of 255 levels


def verify_dataset(
    name: str, path: str | Path, sample: int = 1000, benchmarks: PictureIndex | None = None, **options: Any
) -> list[str]:
    """Problems of a local copy of a known data set.

    Args:
        name: Name in `DATASETS`.
        path: As in `open_dataset`.
        sample: Number of evenly spaced records whose images are decoded; 0 for all.
        benchmarks: Pictures that should not be among them.
        options: Arguments of the reader.

    Returns:
        One line per finding; empty if the copy equals the published data set.

    Raises:
        FileNotFoundError, ValueError: As in `open_dataset`: the path does not exist, has another layout, or lacks a
            column that the reader needs.
    """
    dataset = DATASETS[name]
    reader = open_dataset(name, path, **options)
    found = []
    if dataset.records is not None and len(reader) != dataset.records:
        found.append(f"{len(reader):,} records, {dataset.records:,} are published")
    shards = getattr(reader, "files", None) or getattr(reader, "shards", [])
    found += _missing_columns(reader, dataset.columns)
    found += _missing_shards(shards)
    found += _dead_links(path)
    digests: dict[bytes, str] = {}
    repeated, copies, examined, images = 0, Counter[str](), 0, 0
    bad: Counter[str] = Counter()
    examples: dict[str, str] = {}
    step = max(1, len(reader) // sample) if sample else 1
    for item in inspect_records(reader, range(0, len(reader), step), check_images=False):
        examined += 1
        error: Exception | None = item.error
        for image in item.record.images if item.record is not None and error is None else []:
            try:
                picture = open_image(image)
            except (OSError, ValueError) as failure:
                error = failure
                break
            images += 1
            assert item.record is not None
            digest = hashlib.sha256(picture.tobytes()).digest()
            repeated += digests.setdefault(digest, item.record.id) != item.record.id
            copy = benchmarks.find(picture) if benchmarks is not None else None
            if copy is not None:
                copies[copy.partition(" ")[0]] += 1
                examples.setdefault("copy", f"an image of record {item.record.id!r} and {copy}")
        if error is not None:
            kind = getattr(error, "kind", "image")
            bad[kind] += 1
            examples.setdefault(kind, str(error))
    found += [f"{count} of {examined} records: {kind}, e.g. {examples[kind]}" for kind, count in bad.most_common()]
    if repeated:
        found.append(f"{repeated} of the {images} examined images are also in another record")
    if copies:
        parts = ", ".join(f"{count} in {benchmark}" for benchmark, count in copies.most_common())
        found.append(
            f"{copies.total()} of the {images} examined images are pictures of benchmarks ({parts}), e.g. "
            f"{examples['copy']}"
        )
    return found


def _missing_columns(reader: Reader, columns: Sequence[str]) -> list[str]:
    """Published columns or keys that the copy lacks."""
    if isinstance(reader, ParquetReader):
        present = set(reader.schema_names())
    elif isinstance(rows := getattr(reader, "rows", None), IndexedJson):
        present = set()
        for index in range(min(len(rows), 100)):  # text-only rows have no image
            with contextlib.suppress(BadRecord):
                present |= set(rows[index])
    else:
        return []
    missing = [column for column in columns if column not in present]
    return [f"missing columns: {', '.join(missing)}"] if missing else []


def _missing_shards(paths: Sequence[str]) -> list[str]:
    """Shards named `...-00003-of-00010...` of an incomplete series."""
    series: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        match = re.search(r"(.*)-(\d+)-of-(\d+)[^/]*$", str(path))
        if match:
            series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    return [
        f"{name}-*: {total - len(numbers)} of {total} shards are missing, e.g. number "
        f"{min(set(range(total)) - numbers, default=0)}"
        for (name, total), numbers in series.items()
        if len(numbers) < total
    ]


def _dead_links(path: str | Path) -> list[str]:
    """Links that img2dataset could not download, from its `*_stats.json`."""
    if not files.is_folder(path):
        return []
    try:
        reports = files.find_files(path, ("_stats.json",))
    except FileNotFoundError:
        return []
    count, failed = 0, 0
    reasons: Counter[str] = Counter()
    for report in reports:
        with files.open_file(report) as file:
            text = file.read()
        try:
            figures = json.loads(text)
            count += int(figures["count"])
            failed += int(figures["count"]) - int(figures["successes"])
            reasons.update({str(key): int(n) for key, n in figures.get("status_dict", {}).items() if key != "success"})
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{report} is not a report of img2dataset"]
    if not failed:
        return []
    most = "".join(f", {n} x {reason}" for reason, n in reasons.most_common(3))
    return [f"{failed} of {count} links are dead ({failed / count:.1%}{most})"]
