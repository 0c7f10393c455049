"""Reports of a run: terminal, Markdown, JSON, and HTML with pictures of failures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.evaluate.benchmark import GROUPS
from florence_vl.evaluate.metrics import KINDS
from florence_vl.evaluate.question import Question
from florence_vl.evaluate.scoring import Scores, averages, headline, reported_row
from florence_vl.files import write_text
from florence_vl.statistics import PairedComparison

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_ROW = "Florence-VL 3B"


def lines(scores: Scores, row: str | None) -> list[dict[str, Any]]:
    """The table: one line per benchmark and column, by group in the paper's order.

    Args:
        scores: Scores of the run.
        row: Name of the paper's row to show next to it; None for none.

    Returns:
        `name`, `group`, `title`, `column`, `key`, `score`, `interval`, `paper`, `questions`, `note` of each line.

    Raises:
        ValueError: The paper has no such row.
    """
    paper = reported_row(row) if row else {}
    found = []
    for score in scores.benchmarks.values():
        columns = dict(score.facts["columns"]) or {score.facts["title"]: None}
        for column, key in columns.items():
            if key is None and score.scores:
                key = headline(score.facts)
            value = score.scores.get(key) if key else None
            found.append(
                {
                    "name": score.name,
                    "group": score.facts["group"],
                    "title": score.facts["title"],
                    "column": column,
                    "key": key,
                    "score": value,
                    "interval": score.intervals.get(key or ""),
                    "paper": paper.get(column),
                    "questions": score.answered,
                    "note": score.note,
                }
            )
    order = {group: i for i, group in enumerate(GROUPS)}
    return sorted(found, key=lambda line: order.get(line["group"], len(order)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.1f} to {value[1]:.1f}"


def _samples(scores: Scores) -> str:
    partial = [s for s in scores.benchmarks.values() if s.facts["limit"] is not None]
    if not partial:
        return ""
    limit = partial[0].facts
    return f"A sample: --limit {limit['limit']}, seed {limit['seed']}. Not comparable with scores on all questions."


def _header(scores: Scores) -> dict[str, Any]:
    description = scores.description
    return {
        "model": description["identity"],
        "versions": description.get("versions", {}),
        "judge": description.get("judge"),
        "data": description.get("data"),
    }


def as_json(scores: Scores, row: str | None = DEFAULT_ROW) -> dict[str, Any]:
    """The whole report as JSON values."""
    paper = reported_row(row) if row else {}
    return {
        **_header(scores),
        "paper_row": row,
        "table": lines(scores, row),
        "average": averages(scores.columns(), paper),
        "benchmarks": {
            name: {**{k: v for k, v in asdict(score).items() if k not in ("facts",)}, "complete": score.complete}
            | {"protocol": dict(score.facts)}
            for name, score in scores.benchmarks.items()
        },
    }


def _average_lines(scores: Scores, row: str | None) -> list[str]:
    columns = scores.columns()
    if not columns:
        return []
    found = averages(columns, reported_row(row) if row else {})
    out = [f"Average over {len(columns)} columns (MME-P / 20, MME-C / 8): {found['ours']:.1f}"]
    shared = found["shared_columns"]
    if shared:
        out.append(
            f"Over the {len(shared)} columns that {row} of the paper has: {found['ours_shared']:.1f}, "
            f"the paper {found['paper_shared']:.1f}"
        )
    return out


def as_markdown(scores: Scores, row: str | None = DEFAULT_ROW) -> str:
    """The report as Markdown."""
    head = _header(scores)
    model = ", ".join(f"{k} {v}" for k, v in head["model"].items())
    out = ["# Evaluation", "", f"Model: {model}", ""]
    if sample := _samples(scores):
        out += [f"**{sample}**", ""]
    out += [
        f"| group | benchmark | score | 95 % interval | {_paper_title(row)} | questions | |",
        "|---|---|--:|---|--:|--:|---|",
    ]
    for line in lines(scores, row):
        cells = [line["group"], f"{line['title']} ({line['key'] or line['column']})", _number(line["score"])]
        cells += [_interval(line["interval"]), _number(line["paper"]), str(line["questions"]), line["note"]]
        out.append("| " + " | ".join(cells) + " |")
    out += ["", *_average_lines(scores, row), ""]
    out += ["## All scores", ""]
    for score in scores.benchmarks.values():
        if not score.scores:
            continue
        values = ", ".join(f"{key} {value:.2f}" for key, value in score.scores.items())
        kinds = ", ".join(f"{kind} {score.kinds[kind]}" for kind in KINDS if score.kinds.get(kind))
        judged = f" Judged by {score.judged_by}." if score.judged_by else ""
        out += [f"- **{score.facts['title']}**: {values}. Answers: {kinds}.{judged}"]
    out += ["", "## Protocols", ""]
    for score in scores.benchmarks.values():
        facts = score.facts
        out.append(f"- **{facts['title']}** ({score.name}): {_protocol(facts)} {facts['differences']}".rstrip())
    out += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in head["versions"].items()), ""]
    return "\n".join(out)


def _paper_title(row: str | None) -> str:
    return f"paper, {row}" if row else "paper"


def _protocol(facts: Mapping[str, Any]) -> str:
    source, generation = facts["source"], facts["generation"]
    where = "/".join(part for part in (source["dataset"], source["config"], source["split"]) if part)
    how = "greedy" if not generation["temperature"] else f"temperature {generation['temperature']}"
    return (
        f"{where}, {facts['questions']} of {facts['available']} questions, {facts['protocol']} protocol "
        f"{facts['fingerprint']}, metric {facts['metric']}, at most {generation['max_new_tokens']} new tokens, {how}."
    )


def as_terminal(scores: Scores, row: str | None = DEFAULT_ROW) -> RenderableType:
    """The table for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(scores.description["identity"].get("model", ""))), title_justify="left")
    table.add_column("benchmark", no_wrap=True)
    for name in ("score", "95 %", "paper", "asked"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    group = None
    for line in lines(scores, row):
        if line["group"] != group:
            group = line["group"]
            table.add_section()
            table.add_row(Text(group, style="bold"))
        several = len(scores.benchmarks[line["name"]].facts["columns"]) > 1
        name = f"  {line['title']} {line['key']}" if several else f"  {line['title']}"
        cells = [name, _number(line["score"]), _interval(line["interval"]), _number(line["paper"])]
        table.add_row(*map(Text, [*cells, str(line["questions"]), line["note"]]))
    paper = f"paper: {row}" if row else ""
    notes = [paper, *_average_lines(scores, row), _samples(scores)]
    return Group(table, *(Text(note) for note in notes if note))


def failures(scores: Scores, name: str, of_kind: int = 6) -> dict[str, list[dict[str, Any]]]:
    """Some of a benchmark's failures by kind: answers with the most severe kinds first, at most `of_kind` of each."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, (verdict, reference) in scores.verdicts[name].items():
        if verdict.kind == "right":
            continue
        rows = found.setdefault(verdict.kind, [])
        if len(rows) < of_kind:
            row = scores.rows[name, key]
            wanted = reference.get("answers", reference.get("answer"))
            rows.append(
                {
                    "id": key,
                    "prompt": row["prompt"],
                    "answer": row["answer"],
                    "parsed": verdict.parsed,
                    "wanted": wanted,
                }
            )
    return {kind: found[kind] for kind in reversed(KINDS) if kind in found}


def as_html(
    scores: Scores, row: str | None = DEFAULT_ROW, questions: Mapping[str, Sequence[Question]] | None = None
) -> str:
    """The report as one HTML file, with pictures of failures if the questions are available."""
    from jinja2 import Environment

    from florence_vl.model.pictures import data_url, open_image

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["interval"] = _interval
    template = environment.from_string((files(__package__) / "report.html").read_text(encoding="utf-8"))
    pictures = {(name, q.id): q for name, members in (questions or {}).items() for q in members}
    shown = []
    for name, score in scores.benchmarks.items():
        kinds = failures(scores, name)
        for rows in kinds.values():
            for failure in rows:
                question = pictures.get((name, failure["id"]))
                images = () if question is None else question.images
                failure["pictures"] = [data_url(open_image(image.read()), "jpeg", 224) for image in images]
        shown.append({"score": score, "failures": kinds, "protocol": _protocol(score.facts)})
    return template.render(
        **_header(scores), table=lines(scores, row), paper=_paper_title(row), benchmarks=shown, sample=_samples(scores),
        averages=_average_lines(scores, row), kinds=KINDS,
    )  # fmt: skip


def write_reports(
    scores: Scores, row: str | None = DEFAULT_ROW, questions: Mapping[str, Sequence[Question]] | None = None
) -> list[Path]:
    """Write `scores.json`, `report.md` and `report.html` into the results folder, atomically."""
    texts = {
        "scores.json": json.dumps(as_json(scores, row), indent=2, ensure_ascii=False, default=str) + "\n",
        "report.md": as_markdown(scores, row),
        "report.html": as_html(scores, row, questions),
    }
    for name, text in texts.items():
        write_text(scores.folder / name, text, errors="backslashreplace")  # answers may hold halves of characters
    return [scores.folder / name for name in texts]


def comparison_table(
    first: Scores, found: Mapping[str, PairedComparison]
) -> tuple[list[str], list[list[str]], dict[str, Any]]:
    """A comparison of the run `first` with another: header and cells of a table, and the same as JSON values."""
    header = ["benchmark", "first", "second", "difference", "95 % interval", "p", "won", "lost", "tied", ""]
    cells, values = [], {}
    columns = {
        column: (f"{score.facts['title']}: {column}" if column != name else score.facts["title"], key)
        for name, score in first.benchmarks.items()
        for column, key in {name: headline(score.facts), **score.facts["columns"]}.items()
    }
    for name, result in found.items():
        title, key = columns[name]
        means = [f"{result.first:.1f}", f"{result.second:.1f}", f"{result.difference:+.1f}"]
        counts = map(str, (result.won, result.lost, result.tied))
        word = "significant" if result.significant else "not significant"
        cells.append([title, *means, _interval(result.interval), f"{result.p_value:.3f}", *counts, word])
        values[name] = asdict(result) | {"score": key, "significant": result.significant}
    return header, cells, values
