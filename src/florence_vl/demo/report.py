"""The demo's report: one HTML file that stands alone, made from what lies in the run's folder."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2

CONDITIONS = {
    "before": "before training",
    "no picture": "no picture",
    "other picture": "another picture",
    "after": "after training",
}
MAIN = "after"
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


def curve(phases: list[dict[str, Any]]) -> str:
    """Loss over training time, one line a phase, as SVG."""
    figure, axes = _figure()
    start = 0.0
    colours = ("#9aa5b4", "#2457c5", "#16794a", "#b3402e")
    for colour, phase in zip(colours, phases, strict=False):
        points = phase["curve"]
        if points:
            times = [(start + point["seconds"]) / 60 for point in points]
            losses = [point["loss"] for point in points]
            axes.plot(times, losses, color=colour, alpha=0.22, linewidth=1)
            axes.plot(times, _smooth(losses), color=colour, linewidth=1.8, label=phase["title"])
        start += phase["seconds"]
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("loss (nats)")
    axes.set_title("Loss", loc="left", fontsize=11, fontweight="bold")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def bars(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """Exact match by kind of question and condition with 95 % intervals, as SVG."""
    figure, axes = _figure()
    present = [condition for condition in CONDITIONS if condition in scores]
    colours = {"before": "#d3d9e2", "no picture": "#b7c0cd", "other picture": "#9aa5b4", "after": "#2457c5"}
    kinds = list(scores[MAIN])
    width = 0.8 / len(present)
    for offset, condition in enumerate(present):
        cells = [scores[condition][kind] for kind in kinds]
        places = [i - 0.4 + width * (offset + 0.5) for i in range(len(kinds))]
        shares = [100 * cell["share"] for cell in cells]
        low = [100 * (cell["share"] - cell["low"]) for cell in cells]
        high = [100 * (cell["high"] - cell["share"]) for cell in cells]
        error = {"elinewidth": 0.8, "ecolor": "#5d6b7e"}
        label = CONDITIONS[condition]
        axes.bar(places, shares, width * 0.92, yerr=[low, high], color=colours[condition], label=label, error_kw=error)
    axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n", 2) for kind in kinds], fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_ylabel("exact match, %")
    axes.set_title("Held-out questions", loc="left", fontsize=11, fontweight="bold")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e7ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "florence-vl", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _smooth(values: list[float], share: float = 0.06) -> list[float]:
    """Exponential moving average, bias-corrected, over about that share of the values."""
    beta = 1 - 1 / max(1.0, share * len(values))
    average, result = 0.0, []
    for step, value in enumerate(values, start=1):
        average = beta * average + (1 - beta) * value
        result.append(average / (1 - beta**step))
    return result


def choose_cards(questions: list[dict[str, Any]], number: int = CARDS) -> list[dict[str, Any]]:
    """Questions to show: all kinds in turn and, in each, right and wrong answers in their true proportion."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for question in questions:
        kinds.setdefault(question["kind"], []).append(question)
    chosen: list[dict[str, Any]] = []
    for group in kinds.values():
        wanted = max(1, round(number * len(group) / len(questions)))
        right = [q for q in group if q["right"][MAIN]]
        wrong = [q for q in group if not q["right"][MAIN]]
        take = min(len(right), round(wanted * len(right) / len(group)))
        chosen += right[:take] + wrong[: wanted - take]
    turns = {kind: [question for question in chosen if question["kind"] == kind] for kind in kinds}
    mixed = [group[turn] for turn in range(number) for group in turns.values() if turn < len(group)]
    return mixed[:number]


def write_report(folder: Path) -> Path:
    """Make `report.html` from `demo.json`, `answers.jsonl` and the pictures in a run's folder.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: The folder holds no finished demo.
    """
    summary_file, answers_file = folder / "demo.json", folder / "answers.jsonl"
    for path in (summary_file, answers_file):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no finished demo: {path.name} is missing. Run `florence-vl demo`")
    run: dict[str, Any] = json.loads(summary_file.read_text(encoding="utf-8"))
    questions = read_jsonl(answers_file)
    scores = run["scores"]
    after, other = scores[MAIN]["all"], scores["other picture"]["all"]
    present = [condition for condition in CONDITIONS if condition in scores]
    page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True).render(
        date=run["date"],
        machine=run["machine"],
        summary=run["summary"],
        tower_note=run["tower_note"],
        tiles=[
            {"value": f"{100 * after['share']:.0f} %", "label": "of held-out questions right after training"},
            {"value": f"{100 * other['share']:.0f} %", "label": "right when it is shown another picture"},
            {"value": duration(run["seconds"]), "label": "from the parts to this report"},
            {"value": count(sum(part["parameters"] for part in run["parts"])), "label": "parameters"},
        ],
        score_note=run["score_note"],
        conditions=[{"title": CONDITIONS[condition]} for condition in present],
        score_rows=[
            {
                "kind": kind,
                "total": scores[MAIN][kind]["total"],
                "cells": [_cell(scores[condition][kind], condition == MAIN) for condition in present],
            }
            for kind in scores[MAIN]
        ],
        cards=[
            {
                "source": _data_url(folder / question["image"]),
                "question": question["question"],
                "expected": question["expected"],
                "lines": [
                    {
                        "title": CONDITIONS[condition],
                        "answer": question["answers"][condition],
                        "right": question["right"][condition],
                    }
                    for condition in present
                ],
            }
            for question in choose_cards(questions)
        ],
        figures=[curve(run["phases"]), bars(scores)],
        phases=[
            {
                **phase,
                "time": duration(phase["seconds"]),
                "loss": f"{phase['first_loss']:.2f} → {phase['last_loss']:.2f}",
            }
            for phase in run["phases"]
        ],
        parts=[{**part, "parameters": count(part["parameters"])} for part in run["parts"]],
        commands=run["commands"],
        beside=run["beside"],
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _cell(score: dict[str, float], main: bool) -> dict[str, Any]:
    return {"main": main, **{name: round(100 * score[name]) for name in ("low", "high")}} | {
        "percent": round(100 * score["share"])
    }


def _data_url(path: Path) -> str:
    kind = {"jpg": "jpeg"}.get(path.suffix[1:], path.suffix[1:])
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
