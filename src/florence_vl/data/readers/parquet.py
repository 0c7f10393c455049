"""Reader of parquet tables that contain images (Hugging Face layout) or captions of images elsewhere."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_vl.data.filters import Filter
from florence_vl.data.readers import files
from florence_vl.data.readers.base import READERS, Caption, Reader, as_prompts
from florence_vl.data.readers.conversation import (
    MEANING_KEYS,
    SYSTEM_KEYS,
    as_list,
    from_row,
    image_source,
    refuse_meaning,
    warn_unused,
)
from florence_vl.data.readers.images import ImageStore
from florence_vl.data.readers.index import cached_array
from florence_vl.data.records import BadRecord, Record
from florence_vl.registry import did_you_mean

LAYOUTS = ("texts", "conversations", "messages")
_CACHED_BYTES = 512 << 20
_IMAGE_COLUMNS = ("images", "image", "jpg", "png")


def require_pyarrow() -> Any:
    """Import `pyarrow.parquet`.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError('parquet files need pyarrow: pip install "florence-vl[train]"') from None
    return parquet


@READERS.register("parquet")
class ParquetReader(Reader):
    """Rows of parquet files by number, read by row group.

    The columns determine the layout: `texts` (question-answer pairs: Docmatix, the-cauldron), `conversations`
    (LLaVA), `messages` (chat), or, if `caption` names a column, captions. Images are in the first of the columns
    `images`, `image`, `jpg`, `png` (bytes, `{bytes, path}`, a name, or a list of these), or found by name from
    `image_template` under `image_root`.

    Reading a row reads its row group. The last groups (512 MB) stay in memory, and `block` makes a mixture shuffle
    group-wise.

    Args:
        path: File, folder or glob; local or fsspec URL.
        image_root: Base folder of image names, see `ImageStore`; the file's folder by default.
        caption: Column of captions.
        prompts: User texts for captions, see `Caption`.
        strip_prefixes: Prefixes to remove from captions.
        filters: Rows to keep; their numbers are computed once and cached.
        image_template: Name of the image file from the row's columns, e.g. "{uid}.jpg".
        id_column: Column of record ids.
        source_column: Column with the collection of a row; it becomes part of the record's source.
        min_ratings: For `texts` with ratings per turn (FineVision): name of a rating (`relevance` for the column
            `relevance_ratings`) -> minimum value of the turns that are kept.
        allow_outside: Also open images outside `image_root`, see `ImageStore`.
        name: Name of the source.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: pyarrow is missing, the columns fit no layout, or a filter's column does not exist.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | Sequence[str | Path] | None = None,
        caption: str | None = None,
        prompts: str | Sequence[str] | None = None,
        strip_prefixes: Sequence[str] = (),
        filters: Sequence[Filter] = (),
        image_template: str | None = None,
        id_column: str = "id",
        name: str | None = None,
        source_column: str | None = None,
        min_ratings: Mapping[str, float] | None = None,
        allow_outside: bool = False,
    ) -> None:
        super().__init__(path, name)
        require_pyarrow()
        self.files = files.find_files(path, (".parquet",))
        for file in self.files:
            _OPEN.pop((os.getpid(), file), None)  # it may have been replaced since it was last read
        _check_splits(self.files)
        self.id_column, self.image_template = id_column, image_template
        self.source_column, self.min_ratings = source_column, dict(min_ratings or {})
        self.filters = tuple(filters)
        self.caption = Caption(caption, as_prompts(prompts), tuple(strip_prefixes)) if caption else None
        columns = self.schema_names()
        self.layout, self.columns = self._choose_layout(columns)
        if self.min_ratings and self.layout != "texts":
            raise ValueError(f"min_ratings go with the column 'texts'; {self.path} is read by {self.layout!r}")
        self.columns += [key for key in MEANING_KEYS if key in columns]
        warn_unused(self.path, columns, {*self.columns, *(f.column for f in self.filters)})
        folder = self.files[0].rsplit("/", 1)[0] if "/" in self.files[0] else "."
        self.images = ImageStore(image_root if image_root is not None else folder, allow_outside)
        identities = [files.identity(file) for file in self.files]
        # (file, row group, rows) of every row group
        self._groups = cached_array([identities, sorted(self.columns)], "parquet", self._scan_groups)
        self._ends = np.cumsum(self._groups[:, 2])
        total = int(self._ends[-1]) if len(self._ends) else 0
        self._kept: np.ndarray | None = None
        if self.filters:
            key = [identities, [f.key() for f in self.filters]]
            self._kept = cached_array(key, "kept", self._scan_kept)
            self._kept_key = key
        self._length = total if self._kept is None else len(self._kept)
        if self._length == 0:
            rest = f" after the filters {[f.key() for f in self.filters]}" if self.filters and total else ""
            raise ValueError(f"{self.path} holds no rows{rest}")
        self.block = max(1, int(np.median(self._groups[:, 2]) * self._length / max(total, 1)))
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        kept = None if self._kept is None else np.empty(0, dtype=np.uint64)
        return {**self.__dict__, "_cache": OrderedDict(), "_kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._kept is not None:
            self._kept = cached_array(self._kept_key, "kept", self._scan_kept)

    def _open(self, file: str) -> Any:
        parquet = require_pyarrow()
        key = (os.getpid(), file)
        found = _OPEN.get(key)
        if found is None:
            try:
                found = parquet.ParquetFile(file if not files.is_url(file) else files.open_file(file))
            except Exception as error:
                hint = files.pointer_hint(file)
                raise ValueError(f"{file} is not a readable parquet file: {error}{hint}") from None
            _OPEN[key] = found
            while len(_OPEN) > 32:
                _OPEN.popitem(last=False)
        return found

    def schema_names(self) -> list[str]:
        """Columns of the first file."""
        return list(self._open(self.files[0]).schema_arrow.names)

    def _choose_layout(self, columns: list[str]) -> tuple[str, list[str]]:
        known = set(columns)
        wanted = [f.column for f in self.filters] + ([self.caption.column] if self.caption else [])
        further = [f"{name}_ratings" for name in self.min_ratings]
        further += [self.source_column] if self.source_column else []
        wanted += further
        for column in wanted:
            if column not in known:
                raise ValueError(f"{self.path} has no column {column!r}. {did_you_mean(column, columns)}")
        layout = "caption" if self.caption else next((name for name in LAYOUTS if name in known), "")
        if not layout:
            raise ValueError(
                f"{self.path} fits no known layout: expected a column {', '.join(LAYOUTS)}, or caption=COLUMN; "
                f"found {', '.join(columns)}"
            )
        text = self.caption.column if self.caption else layout
        self.image_column = next((name for name in _IMAGE_COLUMNS if name in known), None)
        if self.image_template:
            import string

            fields = [field for _, field, _, _ in string.Formatter().parse(self.image_template) if field]
            for field in fields:
                if field not in known:
                    raise ValueError(
                        f"image_template {self.image_template!r} names column {field!r}. {did_you_mean(field, columns)}"
                    )
            self.image_column = None
            return layout, [text, *fields, *further, *([self.id_column] if self.id_column in known else [])]
        if layout == "caption" and self.image_column is None:
            raise ValueError(
                f"{self.path} has captions but no column of images ({', '.join(_IMAGE_COLUMNS)}); give image_template"
            )
        extra = [column for column in (self.image_column, self.id_column) if column in known]
        return layout, [text, *further, *extra]

    def _scan_groups(self) -> np.ndarray:
        rows: list[tuple[int, int, int]] = []
        telling = {*self.columns, *LAYOUTS, *_IMAGE_COLUMNS, *MEANING_KEYS}
        expected = telling & set(self.schema_names())
        for number, file in enumerate(self.files):
            found = telling & set(self._open(file).schema_arrow.names)
            if found != expected:
                raise ValueError(
                    f"{self.path} holds tables of different layouts: {self.files[0]} has "
                    f"{', '.join(sorted(expected))}; {file} has {', '.join(sorted(found)) or 'none of them'}. Name the "
                    "files of one data set, e.g. by a pattern"
                )
            metadata = self._open(file).metadata
            rows += [(number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def _scan_kept(self) -> np.ndarray:
        kept, start = [], 0
        columns = sorted({f.column for f in self.filters})
        for number, group, rows in self._groups:
            table = self._open(self.files[number]).read_row_group(int(group), columns=columns, use_threads=False)
            passing = [i for i, row in enumerate(table.to_pylist()) if all(f(row) for f in self.filters)]
            kept.append(np.array(passing, dtype=np.uint64) + np.uint64(start))
            start += int(rows)
        return np.concatenate(kept) if kept else np.empty(0, dtype=np.uint64)

    def __len__(self) -> int:
        return self._length

    def _row(self, index: int) -> dict[str, Any]:
        row = int(index if self._kept is None else self._kept[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        table = self._cache.get(number)
        if table is None:
            file, group, _ = (int(x) for x in self._groups[number])
            table = self._open(self.files[file]).read_row_group(group, columns=self.columns, use_threads=False)
            self._cache[number] = table
            while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > _CACHED_BYTES:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(number)
        offset = row - (int(self._ends[number - 1]) if number else 0)
        return dict(table.slice(offset, 1).to_pylist()[0])

    def _read(self, index: int) -> Record:
        row = self._row(index)
        identifier = str(index if row.get(self.id_column) is None else row[self.id_column])
        where = f"{self.name} row {index} (id {identifier!r:.80})"
        collection = row.get(self.source_column) if self.source_column else None
        source = f"{self.name}/{collection}" if collection else self.name
        if self.image_template:
            listed: list[Any] = [self.image_template.format(**row)]
        else:
            listed = as_list(row.get(self.image_column)) if self.image_column else []
        if self.caption:
            refuse_meaning(row, where, SYSTEM_KEYS)
            messages = self.caption.messages(row[self.caption.column], index, where)
            return Record(identifier, source, messages, [image_source(image, self.images) for image in listed])
        if self.min_ratings:
            row[self.layout] = self._rated(row, where)
        messages, sources = from_row(row, self.layout, listed, self.images, where)
        return Record(identifier, source, messages, sources)

    def _rated(self, row: dict[str, Any], where: str) -> list[Any]:
        """The question-answer pairs with sufficient ratings; a pair without a rating is kept."""
        turns = row[self.layout]
        for name, least in self.min_ratings.items():
            ratings = row[f"{name}_ratings"]
            if ratings is not None and len(ratings) != len(row[self.layout]):
                raise BadRecord(
                    "messages", f"{where} has {len(ratings)} {name} ratings for {len(row[self.layout])} turns"
                )
            low = {i for i, rating in enumerate(ratings or []) if rating is not None and rating < least}
            turns = [None if i in low else turn for i, turn in enumerate(turns)]
        turns = [turn for turn in turns if turn is not None]
        if not turns:
            raise BadRecord("unsupervised", f"{where}: no turn reaches the ratings {self.min_ratings}")
        return turns


def _check_splits(paths: Sequence[str]) -> None:
    """Check that a folder does not mix the training split with another one.

    Raises:
        ValueError: It does.
    """
    splits = {match[1]: path for path in paths if (match := _SPLIT.match(path.rpartition("/")[2]))}
    if len(splits) > 1:
        found = "; ".join(f"{name}: {path}" for name, path in sorted(splits.items()))
        raise ValueError(f"the files belong to several splits: {found}. Name one of them by a pattern, e.g. train-*")


_SPLIT = re.compile(r"(train|test|validation|val|dev)[-._]")
_OPEN: OrderedDict[tuple[int, str], Any] = OrderedDict()
