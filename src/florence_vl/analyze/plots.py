"""Figures and tables of the alignment comparison: curves as PNG, SVG, CSV and JSON, and a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from florence_vl.analyze.bill import BillRow
from florence_vl.analyze.compare import AlignmentComparison, Row
from florence_vl.analyze.headroom import Headroom
from florence_vl.files import atomic_file, write_text
from florence_vl.statistics import interval

# Okabe and Ito's colors, distinguishable with any color vision; line styles repeat them.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
STYLES = ("-", "--", "-.", ":")


def save_figure(figure: Any, path: Path, formats: Sequence[str] = ("png", "svg"), dpi: int = 150) -> list[Path]:
    """Save a matplotlib figure under `path` in each format; the same data give the same bytes."""
    import matplotlib

    written = []
    with matplotlib.rc_context({"svg.hashsalt": "florence-vl"}):
        for ending in formats:
            buffer = io.BytesIO()
            metadata = {"Date": None} if ending == "svg" else {"Software": None}
            figure.savefig(buffer, format=ending, dpi=dpi, metadata=metadata)
            written.append(path.with_name(f"{path.name}.{ending}"))
            with atomic_file(written[-1]) as temporary:
                temporary.write_bytes(buffer.getvalue())
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
        color, style = COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]
        steps = row.runs[0].steps
        held = [interval(values) for values in zip(*(run.heldout_loss for run in row.runs), strict=True)]
        train = [interval(values).mean for values in zip(*(run.train_loss for run in row.runs), strict=True)]
        label = f"{row.name} ({row.loss.text()})"
        axes.plot(steps, [i.mean for i in held], color=color, linestyle=style, linewidth=1.8, label=label)
        if held[0].half is not None:
            axes.fill_between(steps, [i.low for i in held], [i.high for i in held], color=color, alpha=0.1, linewidth=0)
        axes.plot(steps, train, color=color, linestyle=style, linewidth=0.7, alpha=0.6)
    axes.axhline(chance, color="gray", linewidth=0.8, linestyle=":")
    axes.annotate("guessing", (0, chance), fontsize=7, color="gray", va="bottom")
    axes.set_xlabel("step")
    axes.set_ylabel("alignment loss (thick: held-out, thin: training pairs)")
    axes.legend(fontsize=7, title="held-out loss at the chosen step", title_fontsize=7)
    axes.grid(alpha=0.2)
    if title:
        axes.set_title(title, fontsize=10)
    return figure


def curves_csv(rows: Sequence[Row]) -> str:
    """All curves as CSV: one line per row, width control, seed and step."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["name", "width_control", "width", "seed", "step", "train_loss", "validation_loss", "heldout_loss"])
    for row in rows:
        for run in row.runs:
            for point in zip(run.steps, run.train_loss, run.validation_loss, run.heldout_loss, strict=True):
                writer.writerow([row.name, row.width_control, run.width, run.seed, *(f"{v:.6g}" for v in point)])
    return buffer.getvalue()


def table_rows(rows: Sequence[Row], reference: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the printed and reported table."""
    names = ("name", "channels", "held-out loss", "difference to the first", "aligned %", "training loss")
    header = [*names, "R@1 %", "R@5 %", "R@10 %"]
    base = next(row for row in rows if row.name == reference)
    cells = []
    for row in rows:
        difference = "" if row is base else row.difference(base).text()
        if row is not base and not row.difference(base).excludes_zero:
            difference += " (not significant)" if len(row.runs) > 1 else " (one seed)"
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
        comparison: The comparison.
        folder: Destination.
        command: The command that reproduces it, stored in the JSON.

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


def headroom_figure(found: Headroom) -> Any:
    """Accuracy and likelihood of every fixed option against its FLOPs, with the oracles; a matplotlib `Figure`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    split = [choice for choice in found.choices if "other half" in choice.name]
    for ax, name, label in ((axes[0], "accuracy", "right answers, %"), (axes[1], "nll", "nats a right answer")):
        scale = 100 if name == "accuracy" else 1
        for group, color, marker, text in (
            (found.options, COLORS[0], "o", "fixed option"),
            (split, COLORS[1], "D", "chosen on the other half"),
        ):
            means = [scale * getattr(choice, name).mean for choice in group]
            halves = [scale * (getattr(choice, name).half or 0) for choice in group]
            flops = [choice.flops / 1e9 for choice in group]
            ax.errorbar(flops, means, yerr=halves, fmt=marker, color=color, label=text, markersize=4, linewidth=0.7)
        ax.set_xlabel("GFLOPs of tower and prefill")
        ax.set_ylabel(label)
        ax.grid(alpha=0.2)
    axes[0].legend(fontsize=7)
    return figure


def bill_figure(rows: Sequence[BillRow]) -> Any:
    """Accuracy against FLOPs and latency, with the fixed options of the Pareto front; a matplotlib `Figure`.

    A router and each of its rivals are one line over the trades.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True)
    fixed = [row for row in rows if not row.seeds]
    lines: dict[str, list[BillRow]] = {}
    for row in rows:
        if row.seeds:
            lines.setdefault(row.choice.name.rpartition(", trade ")[0], []).append(row)
    for ax, cost, label in (
        (axes[0], lambda row: row.choice.flops / 1e9, "GFLOPs of tower and prefill"),
        (axes[1], lambda row: 1000 * row.latency, "ms to the first token"),
    ):

        def draw(shown: Sequence[BillRow], ax: Any = ax, cost: Callable[[BillRow], float] = cost, **style: Any) -> None:
            accuracy = [100 * row.choice.accuracy.mean for row in shown]
            halves = [100 * (row.choice.accuracy.half or 0) for row in shown] if shown is fixed else None
            ax.errorbar([cost(row) for row in shown], accuracy, yerr=halves, linewidth=0.7, markersize=4, **style)

        draw(fixed, fmt="o", color=COLORS[0], label="fixed" if lines else None)
        for row in fixed:
            point = (cost(row), 100 * row.choice.accuracy.mean)
            ax.annotate(row.choice.name, point, fontsize=5, xytext=(3, 3), textcoords="offset points")
        for index, (name, shown) in enumerate(lines.items()):
            draw(sorted(shown, key=cost), marker="sv^x"[index % 4], color=COLORS[(index + 2) % len(COLORS)], label=name)
        ax.set_xlabel(label)
        ax.grid(alpha=0.2)
    front = [row for row in fixed if row.on_front]
    axes[0].plot(
        [row.choice.flops / 1e9 for row in front], [100 * row.choice.accuracy.mean for row in front], color=COLORS[1]
    )
    axes[0].set_ylabel("right answers, %")
    if lines:
        axes[1].legend(fontsize=7, loc="lower right")
    return figure
