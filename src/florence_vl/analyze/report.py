"""One self-contained HTML page with every result in a folder."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from florence_vl.files import write_text
from florence_vl.statistics import Interval


@dataclass
class TableRow:
    """Cells of a table's row; `paper` marks figures that a paper reports."""

    cells: list[str]
    paper: bool = False


@dataclass
class ReportTable:
    """A table with its title."""

    title: str
    header: list[str]
    rows: list[TableRow]


@dataclass
class Figure:
    """An image inside the page."""

    alt: str
    data: str


@dataclass
class Section:
    """One result."""

    title: str
    text: str = ""
    command: str = ""
    notes: list[str] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def picture(path: Path, alt: str) -> Figure:
    """A PNG or SVG as a `data:` URL.

    Raises:
        FileNotFoundError: The result names a missing figure.
    """
    kind = {"png": "image/png", "svg": "image/svg+xml"}[path.suffix[1:]]
    return Figure(alt, f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")


def _figures(path: Path, titles: Mapping[str, str]) -> list[Figure]:
    """The figures beside a result that exist, by what follows the result's name in theirs."""
    files = ((path.with_name(f"{path.stem}{ending}.png"), title) for ending, title in titles.items())
    return [picture(file, title) for file, title in files if file.is_file()]


def _tables(made: Sequence[Mapping[str, Any]]) -> list[ReportTable]:
    return [ReportTable(t["title"], t["header"], [TableRow(cells) for cells in t["cells"]]) for t in made]


def _interval(record: dict[str, Any] | None, digits: int = 3, scale: float = 1.0) -> str:
    return "" if record is None else Interval(**record).text(digits, scale)


def alignment_section(record: dict[str, Any], path: Path) -> Section:
    """Curves and table of `analyze alignment`."""
    encoders = record["type"] == "alignment"
    about = record["about"]
    section = Section(
        title="Alignment loss by encoder" if encoders else "Alignment loss by features",
        text=(
            "Held-out cross-entropy after training only a projection from pooled vision to pooled text features "
            "(paper section 4, Figure " + ("4" if encoders else "5") + "). Lower is better; chance level is "
            f"{record['chance']:.3f} (aligned: 0 %), the lower bound for any features {record['floor']:.3f} "
            f"(100 %). Intervals are 95 % over {len(about['seeds'])} seeds."
        ),
        command=record.get("command", ""),
    )
    section.notes = [f"left out: {count} records ({reason})" for reason, count in about["skipped"].items()]
    section.notes += [f"{count} {reason}" for reason, count in about["duplicates"].items() if count]
    header = ["name", "channels", "held-out loss", "difference to the first", "aligned %", "training loss"]
    header += [f"R@{k} %" for k in record["rows"][0]["recall"]]
    for key, title in (("rows", "Each with its own width"), ("equal_width", "All at the same width")):
        rows = [
            TableRow(
                [
                    row["name"],
                    str(row["width"]),
                    _interval(row["heldout_loss"]),
                    _interval(row["difference"]),
                    _interval(row["aligned"], 1, 100),
                    _interval(row["train_loss"]),
                    *(_interval(value, 1, 100) for value in row["recall"].values()),
                ]
            )
            for row in record[key]
        ]
        if rows:
            section.tables.append(ReportTable(f"{title}: {about['pairs']} pairs", header, rows))
    section.figures = _figures(path, {"": "Curves, own width", "_equal_width": "Curves, equal width"})
    return section


def pca_section(record: dict[str, Any], path: Path) -> Section:
    """Sheets of `analyze pca`."""
    fit = "all images" if record["settings"]["joint"] else "each image"
    return Section(
        title="PCA of the features",
        text=(
            f"First three principal components as colors, fitted on {fit}; the background is removed by a threshold on "
            "the first component (paper Figure 3). Below each map is its overlay on the image."
        ),
        command=record.get("command", ""),
        figures=[picture(path.with_name(sheet["file"]), sheet["image"]) for sheet in record["sheets"]],
    )


def attribution_section(record: dict[str, Any], path: Path) -> Section:
    """Figures and tables of `analyze attribution`."""
    section = Section(
        title="Attribution to features",
        text=(
            "Share: norm of the feature's part in the projector's first layer. Lost without it: decrease of the "
            "answer's log-likelihood (nats) when the feature is replaced."
        ),
        command=record.get("command", ""),
    )
    header = ["feature", "norm", "share", "lost without it", "lost with it alone"]
    for result in record["results"]:
        rows = [
            TableRow(
                [f["name"], f"{f['norm']:.3f}", f"{f['share']:.1%}", f"{f['drop']:+.3f}", f"{f['drop_alone']:+.3f}"]
            )
            for f in result["features"]
        ]
        rows.append(TableRow(["(no image)", "", "", "", f"{result['without_image']:+.3f}"]))
        section.tables.append(
            ReportTable(f"{result['image']}: {result['question']} → {result['answer']}", header, rows)
        )
        section.figures.append(picture(path.with_name(result["file"]), result["image"]))
    return section


def ablation_section(record: dict[str, Any], path: Path) -> Section:
    """Table of `florence-vl ablate`."""
    table = record["table"]
    return Section(
        title=f"Table {table['number']}: {table['title']}",
        text=table["text"],
        command=record.get("command", ""),
        notes=table["notes"],
        tables=[
            ReportTable(part["title"], part["header"], [TableRow(row["cells"], row["paper"]) for row in part["rows"]])
            for part in table["parts"]
        ],
    )


def headroom_tables(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Title, header and cells of each table of `florence-vl analyze headroom`."""
    header = ["option", "correct %", "difference %", "nats", "nats gained", "GFLOPs", "relative to full"]
    whole = record["options"][0]["flops"]

    def cells(row: dict[str, Any]) -> list[str]:
        first = row is record["options"][0]
        differences = ("", "") if first else (_interval(row["gain_accuracy"], 1, 100), _interval(row["gain_nll"], 3))
        scores = [_interval(row["accuracy"], 1, 100), differences[0], _interval(row["nll"], 3), differences[1]]
        return [row["name"], *scores, f"{row['flops'] / 1e9:.2f}", f"{row['flops'] / whole:.0%}"]

    asked = f"{record['questions']} questions on {record['pictures']} pictures"
    groups = [
        [name, str(group["questions"]), group["option"], _interval(group["gain_nll"], 3)]
        for name, group in record["by_group"].items()
    ]
    return [
        {"title": f"Fixed options, {asked}", "header": header, "cells": [cells(row) for row in record["options"]]},
        {"title": "Chosen by question", "header": header, "cells": [cells(row) for row in record["choices"]]},
        {
            "title": "By skill",
            "header": ["skill", "questions", "option chosen on the other half", "nats gained"],
            "cells": groups,
        },
    ]


def headroom_section(record: dict[str, Any], path: Path) -> Section:
    """Tables and figure of `florence-vl analyze headroom`."""
    return Section(
        title="Headroom: the gain of choosing features per question",
        text=(
            "Features outside an option are replaced by their mean; nothing is trained. Correct: the greedy answer "
            "equals the reference token for token. Nats: negative log-likelihood of the reference. Intervals "
            "(95 %) are over pictures, differences to the full model paired by question."
        ),
        command=record.get("command", ""),
        notes=[f"Cheapest option, accuracy not significantly below the full model's: {record['cheapest_equal']}."],
        tables=_tables(headroom_tables(record)),
        figures=_figures(path, {"": "accuracy and likelihood by cost"}),
    )


def bill_table(record: dict[str, Any]) -> dict[str, Any]:
    """Title, header and cells of the table of `florence-vl analyze bill`."""
    cells = [
        [
            row["name"],
            _interval(row["accuracy"], 1, 100),
            _interval(row["gain_accuracy"], 1, 100),
            f"{row['flops'] / 1e9:.2f}",
            f"{1000 * row['latency']:.0f}",
            "yes" if row["on_front"] else "",
        ]
        for row in record["rows"]
    ]
    header = ["option", "correct %", "difference to the full model", "GFLOPs", "ms to the first token", "Pareto front"]
    if any(row.get("seeds") for row in record["rows"]):
        header.append("correct % of each router")
        for cell, row in zip(cells, record["rows"], strict=True):
            cell.append(" ".join(f"{100 * accuracy:.1f}" for accuracy in row["seeds"]))
    title = f"Cost of accuracy, {record['questions']} questions on {record['pictures']} pictures, {record['device']}"
    return {"title": title, "header": header, "cells": cells}


def gate_comparison_tables(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of `florence-vl analyze gates`."""
    first = record["rows"][0]["name"]
    header = ["gates", "models", "correct %", f"difference to {first}", "nats", "nats gained"]
    header += ["other questions' text: difference", "nats gained"]
    cells = []
    for row in record["rows"]:
        gains = [("right_gain", 1, 100), ("nll_gain", 3, 1), ("shuffled_right", 1, 100), ("shuffled_nll", 3, 1)]
        right, nll, *shuffled = ("" if row[key] is None else _interval(row[key], *how) for key, *how in gains)
        cells.append(
            [row["name"], str(row["seeds"]), f"{100 * row['right']:.1f}", right, f"{row['nll']:.3f}", nll, *shuffled]
        )
    title = f"Gates, {record['questions']} questions on {record['pictures']} pictures"
    tables = [{"title": title, "header": header, "cells": cells}]
    for name, groups in record["gates"].items():
        tables += [table | {"title": f"{table['title']}: {name}"} for table in gates_tables({"gates": groups})]
    return tables


def gates_section(record: dict[str, Any], path: Path) -> Section:
    """Tables of `florence-vl analyze gates`."""
    tables = gate_comparison_tables(record)
    return Section(
        title="Gates of the prompted features",
        text=(
            "Differences are paired by question and seed. Gates that use the question lose accuracy if they see the "
            "text of another one; otherwise they only reweight the features."
        ),
        command=record.get("command", ""),
        tables=_tables(tables),
    )


def gates_tables(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of mean gates by group of questions; none for a model without gates."""
    groups = record.get("gates") or {}
    if not groups:
        return []
    header = ["group", *next(iter(groups.values()))]
    cells = [[group, *(_interval(gate, 2) for gate in gates.values())] for group, gates in groups.items()]
    return [{"title": "Mean gate of each feature by group of questions", "header": header, "cells": cells}]


def bill_section(record: dict[str, Any], path: Path) -> Section:
    """Table and figure of `florence-vl analyze bill`."""
    tables = [bill_table(record), *gates_tables(record)]
    return Section(
        title="Cost: accuracy against FLOPs and latency",
        text="FLOPs are those of tower and prefill for one question; latency is the time to the first token.",
        command=record.get("command", ""),
        notes=[],
        tables=_tables(tables),
        figures=_figures(path, {"": "accuracy by cost"}),
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Path], Section]] = {
    "alignment": alignment_section,
    "feature_ablation": alignment_section,
    "pca": pca_section,
    "attribution": attribution_section,
    "ablation": ablation_section,
    "headroom": headroom_section,
    "bill": bill_section,
    "gates": gates_section,
}


def write_report(folder: Path, out: Path, title: str) -> tuple[Path, dict[str, int]]:
    """Write the page.

    Args:
        folder: Searched, at any depth, for the JSON files that the other commands write.
        out: The HTML file.
        title: Its heading.

    Returns:
        The file, and the number of results of each kind.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The folder contains no results.
    """
    from jinja2 import Environment

    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    found: list[tuple[str, Section]] = []
    for path in sorted(folder.rglob("*.json")):
        try:
            record = json.loads(path.read_text())
        except ValueError:
            continue
        kind = record.get("type") if isinstance(record, dict) else None
        if kind in SECTIONS and isinstance(kind, str):
            found.append((kind, SECTIONS[kind](record, path)))
    if not found:
        raise ValueError(
            f"{folder} contains no result of `florence-vl analyze` or `florence-vl ablate` "
            "(alignment.json, pca.json, attribution.json, ...)"
        )
    order = list(SECTIONS)
    found.sort(key=lambda item: order.index(item[0]))
    template = Environment(autoescape=True).from_string(
        files("florence_vl.analyze").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    write_text(out, template.render(title=title, sections=[section for _, section in found]))
    return out, dict(Counter(kind for kind, _ in found))
