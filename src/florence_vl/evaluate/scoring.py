"""Scores of a results folder: strict verdicts, judgements if present, intervals, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from florence_vl.evaluate.judge import Judge
from florence_vl.evaluate.metrics import METRICS, Units, Verdict, stratify
from florence_vl.evaluate.metrics.base import Judged, Metric, group_units
from florence_vl.evaluate.metrics.judged import JudgedMetric
from florence_vl.evaluate.runner import load_judgements, strict_verdict, verdict_of
from florence_vl.evaluate.store import ResultsFolder
from florence_vl.registry import did_you_mean
from florence_vl.statistics import PairedComparison, compare, intervals, paper_average


@dataclass
class BenchmarkScore:
    """Scores of one benchmark in one run.

    Attributes:
        name: The benchmark.
        facts: Its entry in `run.json`.
        scores: By name, in percent unless the metric defines otherwise; empty if not scored.
        intervals: 95 % bootstrap interval of each score.
        answered: Number of answers.
        expected: Number of questions of the run.
        kinds: Number of answers of each kind (see `florence_vl.evaluate.metrics.KINDS`).
        judged_by: The judge's model, if there was one.
        unjudged: Number of answers without a judgement that need one. Where rules have a verdict, that one counts.
        note: Why there is no score, or what is incomplete; otherwise empty.
    """

    name: str
    facts: Mapping[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    answered: int = 0
    expected: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    judged_by: str | None = None
    unjudged: int = 0
    note: str = ""

    @property
    def another_size(self) -> bool:
        """Whether the number of questions in the data differs from the whole benchmark, for example for a shard."""
        return self.facts.get("size") not in (None, self.facts["available"])

    @property
    def complete(self) -> bool:
        """Whether every question of the run was answered and scored."""
        return bool(self.scores) and self.answered >= self.expected and not self.unjudged


@dataclass
class Scores:
    """All scores of one run.

    Attributes:
        folder: The results folder.
        description: Its `run.json`.
        benchmarks: By name.
        verdicts: Each question's verdict and reference, by benchmark and question id.
        rows: The answers.
    """

    folder: Path
    description: Mapping[str, Any]
    benchmarks: dict[str, BenchmarkScore]
    verdicts: dict[str, dict[str, Judged]]
    rows: dict[tuple[str, str], dict[str, Any]]

    def columns(self) -> dict[str, float]:
        """Scores by the paper's column names."""
        found = {}
        for score in self.benchmarks.values():
            for column, key in score.facts["columns"].items():
                if key in score.scores:
                    found[column] = score.scores[key]
        return found


def score_folder(path: Path, draws: int = 1000) -> Scores:
    """Score the answers in a results folder.

    Args:
        path: The folder.
        draws: Bootstrap samples; 0 omits intervals.

    Raises:
        FileNotFoundError: There are no results.
    """
    folder = ResultsFolder(path)
    description = folder.description
    if not description:
        raise FileNotFoundError(f"no results in {path}: it has no run.json")
    rows = folder.answers()
    judgements = load_judgements(folder, description.get("judge"))
    by_name: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in description["benchmarks"]}
    for (name, key), row in rows.items():
        if name in by_name and row["protocol"] == description["benchmarks"][name]["fingerprint"]:
            by_name[name][key] = row
    scores, verdicts = {}, {}
    for name, facts in description["benchmarks"].items():
        mine = {key: line for (benchmark, key), line in judgements.items() if benchmark == name}
        scores[name], verdicts[name] = _score(
            name, facts, by_name[name], mine, draws, has_judge=description.get("judge") is not None
        )
    return Scores(path, description, scores, verdicts, rows)


def _score(
    name: str,
    facts: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    judgements: Mapping[str, Mapping[str, Any]],
    draws: int,
    has_judge: bool,
) -> tuple[BenchmarkScore, dict[str, Judged]]:
    metric = METRICS[facts["metric"]]
    needs = isinstance(metric, JudgedMetric)
    found: dict[str, Judged] = {}
    strict: dict[str, Judged] = {}
    result = BenchmarkScore(name, facts, answered=len(rows), expected=facts["questions"])
    for key, row in rows.items():
        own = strict_verdict(facts["metric"], row)
        line = judgements.get(key)
        if line is not None and line["answer"] == row["answer"]:
            result.judged_by = line["judge"]["model"]
            word: Verdict | None = verdict_of(line)
        else:
            word = own
            result.unjudged += own is not None and has_judge and Judge.wants(facts["metric"], own)
        if own is not None:
            strict[key] = (own, row["reference"])
        if word is None:
            result.unjudged += 1
        else:
            found[key] = (word, row["reference"])
    result.kinds = dict(Counter(verdict.kind for verdict, _ in found.values()))
    if needs and not found:
        result.note = "not scored: needs a judge"
        return result, found
    units = _units(facts["metric"], found)
    if units is None or not units.vectors:
        result.note = "not scored: no question was answered"
        return result, found
    result.scores = metric.combine(units.means())
    if draws:
        result.intervals = intervals(units, metric.combine, draws=draws)
    if result.judged_by and strict:  # the table shows the judge's score, with the strict one next to it
        alone = _units(facts["metric"], strict)
        if alone is not None and alone.vectors:
            result.scores |= {f"without_judge/{k}": v for k, v in metric.combine(alone.means()).items()}
    missing = result.expected - result.answered
    notes = [f"{missing} of {result.expected} questions unanswered"] if missing > 0 else []
    notes += [f"{result.unjudged} answers not judged"] if result.unjudged else []
    parts = ["incomplete: " + ", ".join(notes)] if notes else []
    if result.another_size:
        parts.append(
            f"not the published benchmark: {facts['available']} questions in the data, {facts['size']} are published"
        )
    unknown = [f"{column} ({key})" for column, key in facts["columns"].items() if key not in result.scores]
    if unknown:
        names = ", ".join(key for key in result.scores if "/" not in key)
        parts.append(f"no such score: {', '.join(unknown)}; {facts['metric']} has {names}")
    result.note = "; ".join(parts)
    return result, found


def _units(metric: str, judged: Mapping[str, Judged]) -> Units | None:
    if not judged:
        return None
    return stratify(METRICS[metric], list(judged.values()), list(judged), drop_incomplete=True)


def compare_runs(first: Scores, second: Scores, draws: int = 1000) -> dict[str, PairedComparison]:
    """Compare two runs on the questions that both answered.

    Returns:
        A comparison by benchmark, or by column if a benchmark has several.

    Raises:
        ValueError: They share no benchmark, or ran one under different protocols or with different judges.
    """
    shared = [name for name in first.benchmarks if name in second.benchmarks]
    if not shared:
        raise ValueError(
            f"{first.folder} ({', '.join(first.benchmarks)}) and {second.folder} ({', '.join(second.benchmarks)}) "
            "share no benchmark"
        )
    found = {}
    for name in shared:
        facts, other = first.benchmarks[name].facts, second.benchmarks[name].facts
        if facts["fingerprint"] != other["fingerprint"]:
            raise ValueError(
                f"{name!r} was run under two protocols: {facts['protocol']} {facts['fingerprint']} in {first.folder}, "
                f"{other['protocol']} {other['fingerprint']} in {second.folder}"
            )
        ids = [key for key in first.verdicts[name] if key in second.verdicts[name]]
        if not ids:
            continue
        judges = [(run.description.get("judge") or {}).get("model") for run in (first, second)]
        if judges[0] != judges[1] and any(run.benchmarks[name].judged_by for run in (first, second)):
            raise ValueError(
                f"{name!r} was scored by two judges: {judges[0] or 'none'} in {first.folder}, {judges[1] or 'none'} in "
                f"{second.folder}. Run evaluate again on both folders with the same --judge"
            )
        columns = facts["columns"] if len(facts["columns"]) > 1 else {name: headline(facts)}
        for column, key in columns.items():
            compared = _compare(first.verdicts[name], second.verdicts[name], METRICS[facts["metric"]], ids, key, draws)
            if compared is not None:
                found[column] = compared
    return found


def _compare(
    first: Mapping[str, Judged], second: Mapping[str, Judged], metric: Metric, ids: list[str], key: str, draws: int
) -> PairedComparison | None:
    ids = [i for i in ids if metric.counts_for(key, first[i][1])]
    sides = [_units(metric.name, {i: run[i] for i in ids}) for run in (first, second)]
    if sides[0] is None or sides[1] is None or not sides[0].vectors:
        return None
    units = [group_units(metric, [run[i] for i in ids], ids).values() for run in (first, second)]
    scores = [(sum(v.score for v, _ in one), sum(v.score for v, _ in other)) for one, other in zip(*units, strict=True)]
    return compare(sides[0], sides[1], metric.combine, key, scores, draws)


def headline(facts: Mapping[str, Any]) -> str:
    """The score that represents a benchmark in a table."""
    return next(iter(facts["columns"].values()), METRICS[facts["metric"]].headline)


@lru_cache(maxsize=1)
def reported_results() -> dict[str, Any]:
    """The paper's tables from `reported_results.yaml`."""
    return yaml.safe_load((files(__package__) / "reported_results.yaml").read_text(encoding="utf-8"))


def reported_rows() -> dict[str, dict[str, float]]:
    """The paper's rows by name. Table 2 (`Florence-VL 8B`) and table 3, LLaVA-1.5 data (`table 3: Florence-VL 7B`)."""
    tables = reported_results()
    rows: dict[str, dict[str, float]] = {}
    for prefix, names in (("", ("table_2a", "table_2b")), ("table 3: ", ("table_3a", "table_3b"))):
        for name in names:
            for row in tables[name]["rows"]:
                scores = {k: v for k, v in row["scores"].items() if k != "Avg"}
                rows[prefix + row["name"]] = rows.get(prefix + row["name"], {}) | scores
    return rows


def reported_row(name: str) -> dict[str, float]:
    """One of `reported_rows`.

    Raises:
        ValueError: The paper has no such row; similar names are suggested.
    """
    rows = reported_rows()
    if name not in rows:
        raise ValueError(f"the paper has no row {name!r}. {did_you_mean(name, rows)}")
    return rows[name]


def averages(columns: Mapping[str, float], paper: Mapping[str, float]) -> dict[str, Any]:
    """The average as in the paper: over all columns of a run, and over those that the paper's row also has."""
    shared = [column for column in columns if column in paper]
    return {
        "columns": list(columns),
        "ours": paper_average(columns) if columns else None,
        "shared_columns": shared,
        "ours_shared": paper_average(columns, shared) if shared else None,
        "paper_shared": paper_average(paper, shared) if shared else None,
    }
