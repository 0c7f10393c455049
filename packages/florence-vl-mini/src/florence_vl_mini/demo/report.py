"""The demo's report: a self-contained HTML file made from the files of the run's folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from florence_vl_mini.demo.data import PROMPT
from florence_vl_mini.demo.scoring import VALID, WHOLE, parse

CONDITIONS = {
    "before": "before",
    "guess": "commonest values",
    "no picture": "after, no picture",
    "other picture": "after, another picture",
    "after": "after",
}
CARDS = 12
TEMPLATE = Path(__file__).with_name("report.html")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def duration(seconds: float) -> str:
    """`95` -> `1 min 35 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def count(number: float) -> str:
    """`134515008` -> `134.5 M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f}"


def percent(cell: dict[str, float]) -> str:
    """The fraction of a score as a percentage: `97 %`."""
    return f"{100 * cell['share']:.0f} %"


def curve(points: list[dict[str, float]]) -> str:
    """Loss over training time as SVG, from rows of `seconds` and `loss`."""
    figure, axes = _figure("Loss of the fine-tuning")
    minutes, losses = [point["seconds"] / 60 for point in points], [point["loss"] for point in points]
    axes.plot(minutes, losses, color="#2457c5", alpha=0.22, linewidth=1)
    axes.plot(minutes, _smooth(losses), color="#2457c5", linewidth=1.8)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("loss (nats per token)")
    return _svg(figure)


def bars(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """Fraction correct per key and condition with 95 % intervals, as SVG."""
    figure, axes = _figure("Held-out pictures")
    colors = {"before": "#d3d9e2", "no picture": "#b7c0cd", "other picture": "#9aa5b4", "after": "#2457c5"}
    keys = list(scores["after"])
    width = 0.8 / len(colors)
    for offset, (condition, color) in enumerate(colors.items()):
        cells = [scores[condition][key] for key in keys]
        places = [i - 0.4 + width * (offset + 0.5) for i in range(len(keys))]
        shares = [100 * cell["share"] for cell in cells]
        low = [100 * (cell["share"] - cell["low"]) for cell in cells]
        high = [100 * (cell["high"] - cell["share"]) for cell in cells]
        error = {"elinewidth": 0.8, "ecolor": "#5d6b7e"}
        label = CONDITIONS[condition]
        axes.bar(places, shares, width * 0.92, yerr=[low, high], color=color, label=label, error_kw=error)
    axes.set_xticks(range(len(keys)), [key.replace(" ", "\n") for key in keys], fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_ylabel("right, %")
    axes.legend(frameon=False, fontsize=7)
    return _svg(figure)


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e7ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "florence-vl", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _smooth(values: list[float], share: float = 0.06) -> list[float]:
    """Exponential moving average, bias-corrected, over about that fraction of the values."""
    beta = 1 - 1 / max(1.0, share * len(values))
    average, result = 0.0, []
    for step, value in enumerate(values, start=1):
        average = beta * average + (1 - beta) * value
        result.append(average / (1 - beta**step))
    return result


def choose_cards(rows: list[dict[str, Any]], number: int = CARDS) -> list[dict[str, Any]]:
    """Answers to show: all kinds of picture in turn, with correct and wrong answers in their true proportion."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["expected"]["picture"], []).append(row)
    groups = []
    for group in kinds.values():
        wanted = max(1, round(number * len(group) / len(rows)))
        right = [row for row in group if row["right"]["after"][WHOLE]]
        wrong = [row for row in group if not row["right"]["after"][WHOLE]]
        take = min(len(right), round(wanted * len(right) / len(group)))
        groups.append(right[:take] + wrong[: wanted - take])
    return [group[turn] for turn in range(number) for group in groups if turn < len(group)][:number]


def write_report(folder: Path) -> Path:
    """Write `report.html` from `demo.json`, `answers.jsonl` and the pictures of a run's folder.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: The folder does not contain a finished demo.
    """
    for name in ("demo.json", "answers.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} contains no finished demo: {name} is missing. Run `florence-vl demo`")
    run: dict[str, Any] = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    answers = read_jsonl(folder / "answers.jsonl")
    found, suite, training = run["scores"], run["suite"], run["training"]
    page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True).render(
        run=run,
        prompt=PROMPT,
        example=json.dumps(answers[0]["expected"], ensure_ascii=False),
        tiles=[
            {
                "value": percent(found["after"][VALID]),
                "label": f"valid JSON, {percent(found['before'][VALID])} before",
            },
            {
                "value": percent(found["after"][WHOLE]),
                "label": f"all four values right, {percent(found['before'][WHOLE])} before",
            },
            {"value": percent(found["other picture"][WHOLE]), "label": "the same with another picture"},
            {"value": duration(run["seconds"]), "label": f"in total, {duration(training['seconds'])} of it training"},
        ],
        conditions=list(CONDITIONS.values()),
        score_rows=_table(found, CONDITIONS),
        cards=[_card(folder, row) for row in choose_cards(answers)],
        figures=[curve(training["curve"]), bars(found)],
        training={
            **training,
            "time": duration(training["seconds"]),
            "loss": f"{training['first_loss']:.2f} → {training['last_loss']:.2f}",
        },
        suite_rows=_table(suite, ("guess", "before", "after")),
        parts=[{**part, **{name: count(part[name]) for name in ("parameters", "trained")}} for part in run["parts"]],
        commands=(
            "florence-vl chat --model mini --image FILE\n"
            f"florence-vl chat --model {run['folder']}/model --image FILE '{PROMPT}'\n"
            f"florence-vl evaluate --model {run['folder']}/model --suite mini --out {run['folder']}-suite\n"
            "florence-vl recipes show demo/finetune"
        ),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _table(scores: dict[str, dict[str, dict[str, float]]], conditions: Iterable[str]) -> list[dict[str, Any]]:
    """One row per key or group: its name, the number of questions, and one cell (percent, bounds) per condition."""
    return [
        {
            "name": name,
            "total": whole["total"],
            "cells": [
                {
                    "main": condition == "after",
                    "percent": round(100 * scores[condition][name]["share"]),
                    "low": round(100 * scores[condition][name]["low"]),
                    "high": round(100 * scores[condition][name]["high"]),
                }
                for condition in conditions
            ],
        }
        for name, whole in scores["after"].items()
    ]


def _card(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    found = parse(row["answers"]["after"])
    lines = []
    for key, expected in row["expected"].items():
        right = row["right"]["after"][key]
        value = found and found[key]
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append({"key": key, "right": right, "value": shown, "expected": "" if right else expected})
    return {
        "source": _data_url(folder / row["image"]),
        "before": row["answers"]["before"],
        "invalid": None if found else row["answers"]["after"],
        "expected": json.dumps(row["expected"], ensure_ascii=False),
        "lines": lines,
    }


def _data_url(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
