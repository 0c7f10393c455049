"""Figures and tables of the alignment comparison: curves as PNG, SVG, CSV and JSON, and a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from florence_vl.analyze.compare import AlignmentComparison, Row
from florence_vl.statistics import interval
from florence_vl.files import atomic_file, write_text

# Okabe and Ito's colors, told apart by readers with any color vision; line styles repeat them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
STYLES = ("-", "--", "-.", ":")


def save_figure(figure: Any, path: Path, formats: Sequence[str] = ("png", "svg"), dpi: int = 150) -> list[Path]:
    """Save a matplotlib figure under `path` with each ending; the same data give the same bytes."""
    import matplotlib

    written = []
    with matplotlib.rc_context({"svg.hashsalt": "florence-vl"}):
        for ending in formats:
            buffer = io.BytesIO()
            metadata = {"Date": None} if ending == "svg" else {"Software": None}
            figure.savefig(buffer, format=ending, dpi=dpi, metadata=metadata)
            with atomic_file(path.with_suffix(f".{ending}")) as temporary:
                temporary.write_bytes(buffer.getvalue())
            written.append(path.with_suffix(f".{ending}"))
    return written


def curves(rows: Sequence[Row], chance: float, title: str = "") -> Any:
    """Held-out (lines, with their interval over seeds) and training loss (thin) by step, as in Figures 4 and 5.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        color, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
        steps = row.runs[0].steps
        held = [interval(values) for values in zip(*(run.heldout_loss for run in row.runs), strict=True)]
        train = [interval(values).mean for values in zip(*(run.train_loss for run in row.runs), strict=True)]
        label = f"{row.name} ({row.loss.text()})"
        axes.plot(steps, [i.mean for i in held], color=color, linestyle=style, linewidth=1.8, label=label)
        if held[0].half is not None:
            axes.fill_between(steps, [i.low for i in held], [i.high for i in held], color=color, alpha=0.1, linewidth=0)
        axes.plot(steps, train, color=color, linestyle=style, linewidth=0.7, alpha=0.6)
    axes.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate("guessing", (0, chance), fontsize=7, color="grey", va="bottom")
    axes.set_xlabel("step")
    axes.set_ylabel("alignment loss (thick: held-out, thin: training pairs)")
    axes.legend(fontsize=7, title="held-out loss at the chosen step", title_fontsize=7)
    axes.grid(alpha=0.2)
    if title:
        axes.set_title(title, fontsize=10)
    return figure


def curves_csv(rows: Sequence[Row]) -> str:
    """All curves as CSV: one line a row, width control, seed and step."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["name", "width_control", "width", "seed", "step", "train_loss", "validation_loss", "heldout_loss"])
    for row in rows:
        for run in row.runs:
            for point in zip(run.steps, run.train_loss, run.validation_loss, run.heldout_loss, strict=True):
                writer.writerow([row.name, row.width_control, run.width, run.seed, *(f"{v:.6g}" for v in point)])
    return buffer.getvalue()


def table_rows(rows: Sequence[Row], reference: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table that is printed and reported."""
    names = ("name", "channels", "held-out loss", "difference to the first", "aligned %", "training loss")
    header = [*names, "R@1 %", "R@5 %", "R@10 %"]
    base = next(row for row in rows if row.name == reference)
    cells = []
    for row in rows:
        difference = "" if row is base else row.difference(base).text()
        if row is not base and not row.difference(base).excludes_zero:
            difference += " (not told apart)" if len(row.runs) > 1 else " (one seed)"
        cells.append(
            [
                row.name,
                str(row.runs[0].width),
                row.loss.text(),
                difference,
                row.aligned.text(1, 100),
                row.train_loss.text(),
                *(row.recall(k).text(1, 100) for k in (1, 5, 10)),
            ]
        )
    return header, cells


def write_comparison(comparison: AlignmentComparison, folder: Path, command: str = "") -> list[Path]:
    """Write `NAME.json`, `NAME.csv`, `NAME.png`, `NAME.svg` and the same figure at equal width.

    Args:
        comparison: What was measured.
        folder: Where to.
        command: The command that makes it again, kept in the JSON.

    Returns:
        The files.
    """
    name = "alignment" if comparison.kind == "encoders" else "feature_ablation"
    record = {"type": name, "command": command, **comparison.to_dict()}
    written = [folder / f"{name}.json", folder / f"{name}.csv"]
    write_text(written[0], json.dumps(record, indent=1) + "\n")
    write_text(written[1], curves_csv([*comparison.rows, *comparison.equal_width]))
    title = "Alignment loss by " + ("encoder" if comparison.kind == "encoders" else "features")
    written += save_figure(curves(comparison.rows, comparison.chance, title), folder / name)
    if comparison.equal_width:
        width = comparison.equal_width[0].runs[0].width
        equal = f"{title}, {width} channels each ({comparison.equal_width[0].width_control})"
        written += save_figure(curves(comparison.equal_width, comparison.chance, equal), folder / f"{name}_equal_width")
    return written
