"""Scores of ablation rows as a table, with differences to the full model paired by question and seed, and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from florence_vl.analyze.ablation import (
    DONE,
    STAGES,
    AblationConfig,
    AblationTable,
    TablePart,
    TableRow,
    plan,
    read_marker,
)
from florence_vl.statistics import Difference, crossed, interval, paper_average


@dataclass
class RowScores:
    """Scores of a row over seeds.

    Attributes:
        row: The row.
        seeds: Seed -> column -> score.
        questions: Seed -> column -> question -> score of the answer, in percent.
        made_by: Seed -> commit, machine and time of each step, from its record.
        other_settings: Seeds whose model or scores were made with other settings than those of the report.
    """

    row: TableRow
    seeds: dict[int, dict[str, float]] = field(default_factory=dict)
    questions: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    made_by: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    other_settings: list[int] = field(default_factory=list)

    def column(self, name: str) -> str:
        """Mean and interval over seeds of a column."""
        return interval([scores[name] for scores in self.seeds.values() if name in scores]).text(1)

    def average(self, columns: Sequence[str]) -> str:
        """Mean and interval over seeds of the paper's average over columns."""
        return interval([paper_average(scores, columns) for scores in self.seeds.values()]).text(1)


def paper_scores(part: TablePart, row: TableRow) -> dict[str, float]:
    """The paper's scores for a row, without its average; empty if it reports none."""
    from florence_vl.evaluate.scoring import reported_results

    for reported in reported_results()[part.paper]["rows"]:
        if row.paper is not None and reported["name"] == row.paper:
            return {column: score for column, score in reported["scores"].items() if column != "Avg"}
    return {}


def read_scores(table: AblationTable, config: AblationConfig) -> list[RowScores]:
    """Scores of every evaluated row of a table, from the folders."""
    from florence_vl.evaluate.metrics import METRICS
    from florence_vl.evaluate.scoring import score_folder

    identities = {step.folder: step.identity for step in plan(table.rows, config)}
    found = []
    for row in table.rows:
        scores = RowScores(row)
        for seed in range(config.seeds):
            folder = config.root / row.variant / f"seed-{seed}"
            marker = read_marker(folder / "evaluate" / DONE)
            if marker is None:
                continue
            if marker["identity"] != identities[folder / "evaluate"]:
                scores.other_settings.append(seed)
            run = score_folder(folder / "evaluate", draws=0)
            scores.seeds[seed] = run.columns()
            scores.questions[seed] = {
                column: {
                    q: 100 * v.score for q, (v, wanted) in run.verdicts[name].items() if of.counts_for(key, wanted)
                }
                for name, score in run.benchmarks.items()
                for of in [METRICS[score.facts["metric"]]]
                for column, key in score.facts["columns"].items()
            }
            markers = [*(read_marker(folder / kind / DONE) for kind in STAGES), marker]
            scores.made_by[seed] = [made for made in markers if made is not None]
        if scores.seeds:
            found.append(scores)
    return found


def difference(row: RowScores, reference: RowScores, columns: Sequence[str]) -> Difference | None:
    """Difference of the averages of a row and the reference, over the seeds and questions of both.

    Returns:
        The difference; None if they share fewer than two seeds, or fewer than two questions of a column.
    """
    seeds = [seed for seed in row.questions if seed in reference.questions]
    sides = [scores.questions[seed] for scores in (row, reference) for seed in seeds]
    keys = [(c, key) for c in columns for key in sides[0][c] if all(key in side[c] for side in sides)] if sides else []
    if len(seeds) < 2 or any(sum(of == c for of, _ in keys) < 2 for c in columns):
        return None
    values_SQ = np.array(
        [[row.questions[seed][c][k] - reference.questions[seed][c][k] for c, k in keys] for seed in seeds]
    )
    return crossed(values_SQ, [column for column, _ in keys])


def verdict(found: Difference | None, paper: float | None = None) -> str:
    """The verdict on a row and on the paper's claim, from the interval of the difference."""
    if found is None:
        return "no verdict: fewer than two seeds or questions"
    gap = found.interval
    if not gap.excludes_zero:
        return f"not significant (80 % power to detect a difference of {found.detectable:.1f} points)"
    words = "worse than the full model" if gap.mean < 0 else "better than the full model"
    if paper is None or paper == 0:
        return words
    return f"{words}: the paper's direction is {'confirmed' if (gap.mean < 0) == (paper < 0) else 'contradicted'}"


def build_table(table: AblationTable, scores: Sequence[RowScores], config: AblationConfig) -> dict[str, Any]:
    """The table as titles, headers and cells, with the paper's rows.

    Args:
        table: The table.
        scores: From `read_scores`.
        config: Settings of the runs.

    Returns:
        Input of `florence_vl.analyze.report.ablation_section`.

    Raises:
        ValueError: There are no scores.
    """
    if not scores:
        raise ValueError(f"no row of table {table.number} has been evaluated yet")
    markers = [marker for row in scores for made in row.made_by.values() for marker in made]
    start = f", start {config.chosen_start}" if config.chosen_start else ""
    return {
        "number": table.number,
        "title": f"{table.title} ({config.scale} scale{start})",
        "text": " ".join(table.text.split()),
        "notes": list(_notes(table, scores, config)),
        "parts": [
            _part(table, part, scores, config.scale, columns)
            for part in table.parts
            if (columns := _columns(table, part, scores, config.scale))
        ],
        "seeds": {row.row.name: sorted(row.seeds) for row in scores},
        "commits": sorted({str(m["git"]["commit"]) + ("+" if m["git"]["dirty"] else "") for m in markers}),
        "machines": sorted({m["machine"] for m in markers}),
        "cpu_seconds": round(sum(m["cpu_seconds"] for m in markers)),
    }


def _columns(table: AblationTable, part: TablePart, scores: Sequence[RowScores], scale: str) -> list[str]:
    """The columns of a part that every row has; none if the evaluated suite has no benchmark of it."""
    reported = (paper_scores(part, row) for row in table.rows)
    wanted = list(part.mini) if scale == "mini" else list(next(iter(filter(None, reported))))
    return [c for c in wanted if all(c in values for s in scores for values in s.seeds.values())]


def _part(
    table: AblationTable, part: TablePart, scores: Sequence[RowScores], scale: str, columns: list[str]
) -> dict[str, Any]:
    reported = {row.name: paper_scores(part, row) for row in table.rows}
    reference = next((s for s in scores if s.row.name == table.reference), None)
    base = reported[table.reference]
    header = ["row", *columns, "average", "difference to the full model", "verdict"]
    header += ["paper's average", "paper's difference"]
    rows: list[dict[str, Any]] = []
    for entry in scores:
        theirs = reported[entry.row.name]
        shared = [c for c in theirs if c in base and (scale == "mini" or c in columns)]
        paper = paper_average(theirs, shared) if theirs else None
        gap = None if paper is None or entry is reference else paper - paper_average(base, shared)
        found, words = None, ""
        if reference is not None and entry is not reference:
            found = difference(entry, reference, columns)
            words = verdict(found, gap)
        cells = [entry.row.name, *(entry.column(c) for c in columns), entry.average(columns)]
        cells += ["" if found is None else found.interval.text(1), words]
        cells += ["–" if paper is None else f"{paper:.1f}", "" if gap is None else f"{gap:+.1f}"]
        rows.append({"cells": cells, "paper": False})
        if scale != "mini" and paper is not None:
            own = [f"{theirs[c]:.1f}" for c in columns]
            rows.append({"cells": ["  paper", *own, f"{paper:.1f}", "", "", "", ""], "paper": True})
    return {"title": part.title or table.title, "header": header, "rows": rows}


def _seeds_by_dtype(scores: Sequence[RowScores]) -> dict[str, list[int]]:
    by_seed = [(seed, made.get("dtype")) for row in scores for seed, steps in row.made_by.items() for made in steps]
    found = {(dtype, seed) for seed, dtype in by_seed if dtype}
    return {dtype: sorted(seed for of, seed in found if of == dtype) for dtype in sorted({dtype for dtype, _ in found})}


def _range(counts: set[int]) -> str:
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def _notes(table: AblationTable, scores: Sequence[RowScores], config: AblationConfig) -> Iterator[str]:
    counts = {len(s.seeds) for s in scores}
    words = "1 seed" if counts == {1} else f"{_range(counts)} seeds"
    asked = {sum(map(len, by_column.values())) for row in scores for by_column in row.questions.values()}
    questions = f", {_range(asked)} questions" if asked else ""
    shared = "" if len(counts) == 1 else "; only seeds that both rows have count"
    yield (
        f"{words} per row{questions}. Scores: mean and 95 % interval over seeds. Differences: paired by question and "
        f"seed, which are both treated as random samples{shared}."
    )
    absent = [row.name for row in table.rows if row.name not in {s.row.name for s in scores}]
    if absent:
        yield f"Not evaluated yet: {', '.join(absent)}."
    if empty := [p.title or p.paper for p in table.parts if not _columns(table, p, scores, config.scale)]:
        yield f"Left out, because not every row has scores of their benchmarks: {', '.join(empty)}."
    wanted = {c for part in table.parts for c in paper_scores(part, table.choose([table.reference])[0])}
    scored = {c for part in table.parts for c in _columns(table, part, scores, config.scale)}
    if config.scale != "mini" and (unscored := sorted(wanted - scored)):
        yield f"Not part of our averages nor of the paper's, as not every row has scores: {', '.join(unscored)}."
    if odd := [f"{s.row.name} (seeds {', '.join(map(str, s.other_settings))})" for s in scores if s.other_settings]:
        yield (
            f"Made with other settings than this command's, which may differ between rows: {'; '.join(odd)}. "
            "done.json in their folders has the commands."
        )
    if len(dtypes := _seeds_by_dtype(scores)) > 1:
        each = "; ".join(f"{dtype}: seeds {', '.join(map(str, seeds))}" for dtype, seeds in dtypes.items())
        yield f"Seeds have different data types, all rows of a seed the same one ({each})."
    if config.scale == "mini":
        yield (
            "Mini scale: other data, other LLM, other benchmarks. The paper's numbers are from one run each, without "
            "intervals; only directions can be compared."
        )
    else:
        yield (
            "Differences are of the mean score of answers; the table shows columns that the paper computes differently "
            "(MME's sums, POPE's F1) as in the paper."
        )
