"""Rows of the package's tables of real numbers, picked so that they can be read in a small chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from florence_vl_mini.scenes import assets

SHARE = 0.5  # of the charts and tables that show real numbers


@dataclass(frozen=True)
class Column:
    """A named column with its unit; `texts` are the numbers as written."""

    name: str
    unit: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; `kind` is "series" (over time), "groups", "parts" (percent of a whole) or "pairs" (two measures)."""

    kind: str
    title: str
    label: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def has_row_names(self) -> bool:
        """Whether the labels say something: the numbers of measured animals don't, years do."""
        return self.kind != "pairs" or not all(label.isdigit() for label in self.labels)


@dataclass(frozen=True)
class Series:
    """What one chart shows: labels with numbers, as written (`texts`) and as numbers (`values`)."""

    title: str
    labels: list[str]
    texts: list[str]
    note: str = ""

    @property
    def values(self) -> list[float]:
        """The numbers."""
        return [float(t) for t in self.texts]


@lru_cache
def tables(split: str) -> tuple[Table, ...]:
    """The tables of a split, in the package's order."""
    return tuple(
        Table(
            row["kind"],
            row["title"],
            row["label"],
            tuple(row["labels"]),
            tuple(Column(c["name"], c["unit"], tuple(c["values"])) for c in row["columns"]),
        )
        for row in assets.table_rows()
        if row["split"] == split
    )


def fit(texts: Sequence[str], width: float, high: float, low: float, bold: bool = False) -> int:
    """The largest font size from `high` down to `low` at which each text is at most `width` pixels wide, else `low`."""
    size, least = round(high), round(low)
    while size > least and any(assets.sans(size, bold).getlength(t) > width for t in texts):
        size -= 1
    return size


def pick(
    rng: Random, split: str, kinds: Sequence[str], numbers: tuple[int, int], fits: Callable[[str, int], bool]
) -> Series:
    """Some rows of one column.

    Args:
        rng: Where chance comes from.
        split: Whose tables to take.
        kinds: Kinds of table that the chart can show.
        numbers: The least and the most rows; of a whole ("parts") all are taken.
        fits: Whether a label can be written when so many rows are shown.
    """
    low, high = numbers
    pool = [t for t in tables(split) if t.kind in kinds]
    while True:  # almost every table passes
        table, n = rng.choice(pool), rng.randint(low, high)
        column = rng.choice(table.columns)
        if table.kind == "parts":
            n = len(table.labels)
        while n >= low:
            rows = [i for i, label in enumerate(table.labels) if fits(label, n)]
            if len(rows) >= n:
                break
            n -= 1
        if not low <= n <= high or (table.kind == "parts" and n < len(table.labels)):
            continue
        if table.kind == "series":  # neighbours, in order
            start = rng.randint(0, len(rows) - n)
            rows = rows[start : start + n]
        else:
            rows = rng.sample(rows, n)
        texts = [column.texts[i] for i in rows]
        if len(set(texts)) == 1:
            continue
        note = f"{column.name} ({column.unit})"
        return Series(table.title, [table.labels[i] for i in rows], texts, note)


def pick_table(rng: Random, split: str, rows: int) -> tuple[str, list[str], list[str], list[list[str]]]:
    """Name of the label column, `rows` labels, the names of two columns, and the numbers of each row as written."""
    table = rng.choice([t for t in tables(split) if len(t.columns) > 1 and len(t.labels) >= rows and t.has_row_names])
    columns = sorted(rng.sample(range(len(table.columns)), 2))
    if table.kind == "series":
        start = rng.randint(0, len(table.labels) - rows)
        chosen = list(range(start, start + rows))
    else:
        chosen = rng.sample(range(len(table.labels)), rows)
    numbers = [[table.columns[c].texts[i] for c in columns] for i in chosen]
    return table.label, [table.labels[i] for i in chosen], [table.columns[c].name for c in columns], numbers


def pick_points(rng: Random, split: str) -> tuple[str, str, list[tuple[float, float]]]:
    """Title, "y by x", and five or more points of a table of pairs."""
    table = rng.choice([t for t in tables(split) if t.kind == "pairs"])
    x, y = table.columns
    if rng.random() < 0.5:
        x, y = y, x
    points = [(float(a), float(b)) for a, b in zip(x.texts, y.texts, strict=True)]
    return table.title, f"{y.name} by {x.name.lower()}", rng.sample(points, rng.randint(5, len(points)))
