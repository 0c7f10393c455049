"""The paper's ablation tables 1, 4, 5 and 6: trains the rows, scores them, and says what the intervals allow to say.

Every step is a `florence-vl` command of its own (`train`, `evaluate`), so a table can be stopped at any time and goes
on where it was. A variant that stands in several tables is trained once a seed.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from florence_vl.model.features import identity_digest
from florence_vl.registry import did_you_mean
from florence_vl.statistics import Interval, interval, paired

SCALES = ("mini", "llava15")
STAGES = ("pretrain", "finetune")
STOPPED = 75  # exit code of `florence-vl train` that was stopped by a signal with everything saved


class Stopped(Exception):
    """A training command was stopped by a signal; the same command goes on later."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, the variant that is trained, and the paper's label where it reports one."""

    name: str
    variant: str
    paper: str | None = None


@dataclass(frozen=True)
class Part:
    """A block of columns: the paper's table, and the mini suite's columns that stand for it."""

    paper: str
    mini: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True)
class AblationTable:
    """One of the paper's tables.

    Args:
        number: Its number in the paper.
        title: What it varies.
        text: What a reader must know.
        reference: The row that differences are taken to: the full model.
        rows: Its rows, in order.
        parts: Its blocks of columns.
    """

    number: int
    title: str
    text: str
    reference: str
    rows: tuple[Row, ...]
    parts: tuple[Part, ...]

    def choose(self, names: Sequence[str] | None) -> list[Row]:
        """Rows by name; all when None.

        Raises:
            ValueError: No such row; near names are listed.
        """
        known = {row.name: row for row in self.rows}
        for name in names or ():
            if name not in known:
                raise ValueError(f"table {self.number} has no row {name!r}. {did_you_mean(name, known)}")
        return [row for row in self.rows if names is None or row.name in names]


def load_tables() -> dict[int, AblationTable]:
    """The tables by number."""
    raw = yaml.safe_load(files("florence_vl.analyze").joinpath("ablation_tables.yaml").read_text(encoding="utf-8"))
    return {
        number: AblationTable(
            number=number,
            title=table["title"],
            text=table["text"],
            reference=table["reference"],
            rows=tuple(Row(name, **fields) for name, fields in table["rows"].items()),
            parts=tuple(Part(p["paper"], tuple(p["mini"]), p.get("title", "")) for p in table["parts"]),
        )
        for number, table in raw.items()
    }


def table_of(number: int) -> AblationTable:
    """A table by its number in the paper.

    Raises:
        ValueError: The paper has no such ablation table.
    """
    tables = load_tables()
    if number not in tables:
        raise ValueError(f"no ablation table {number}; the paper's are {', '.join(map(str, tables))}")
    return tables[number]


def paper_scores(part: Part, row: Row) -> dict[str, float]:
    """What the paper reports for a row, without its average; empty where it reports nothing."""
    from florence_vl.evaluate.scoring import reported_results

    for reported in reported_results()[part.paper]["rows"]:
        if row.paper is not None and reported["name"] == row.paper:
            return {column: score for column, score in reported["scores"].items() if column != "Avg"}
    return {}


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Args:
        kind: `data`, `pretrain`, `finetune` or `evaluate`.
        variant: Which variant.
        seed: Which seed.
        folder: What it writes.
        command: Its arguments, without the launcher.
        identity: Hash of what decides its result; a finished step with another hash is refused.
    """

    kind: str
    variant: str
    seed: int
    folder: Path
    command: tuple[str, ...]
    identity: str

    @property
    def marker(self) -> Path:
        """Written when the step is done."""
        return self.folder / "done.json"

    @property
    def done(self) -> bool:
        """Whether it is done already.

        Raises:
            ValueError: It was done with other settings.
        """
        if self.kind == "data":
            return (self.folder / "data.jsonl").is_file()
        try:
            found = json.loads(self.marker.read_text())
        except (FileNotFoundError, ValueError):
            return False
        if found["identity"] != self.identity:
            raise ValueError(
                f"{self.folder} holds the result of other settings ({found['command']}); delete it or change --out"
            )
        return True


@dataclass(frozen=True)
class AblationConfig:
    """How a table is made.

    Args:
        scale: `mini` (two CPU cores, the mini suite) or `llava15` (the paper's setting: LLaVA-1.5 data, Vicuna-7B).
        out: Folder of all runs; tables that share it share their variants.
        seeds: Number of seeds.
        share_pretraining: All seeds finetune from seed 0's first stage. Saves time, and the interval is then of the
            second stage alone.
        overrides: `key.path=value` for both stages' recipes, `pretrain:key.path=value` for one.
        data: Folder with the benchmarks' files, for `llava15`.
        limit: About so many questions of each benchmark.
        launcher: Words before the sub-command of training, e.g. `torchrun --nproc-per-node 8 -m florence_vl`.

    Raises:
        ValueError: Unknown scale, no seed, or `llava15` without its benchmark files.
    """

    scale: str
    out: Path
    seeds: int = 3
    share_pretraining: bool = False
    overrides: tuple[str, ...] = ()
    data: Path | None = None
    limit: int | None = None
    launcher: tuple[str, ...] = ("python", "-m", "florence_vl")

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r}. {did_you_mean(self.scale, SCALES)}")
        if self.seeds < 1:
            raise ValueError(f"{self.seeds} seeds; give 1 or more")
        if self.scale == "llava15" and self.data is None:
            raise ValueError("--scale llava15 needs --data, the folder with the benchmarks' parquet files")

    @property
    def root(self) -> Path:
        """Folder of this scale's runs."""
        return self.out / self.scale


def plan(table: AblationTable, rows: Sequence[Row], config: AblationConfig) -> list[Step]:
    """The commands that make a table, in order; each variant and seed once.

    Raises:
        FileNotFoundError: A recipe is missing.
        ValueError: A recipe and the overrides do not fit.
    """
    from florence_vl.evaluate.suites import choose

    steps: list[Step] = list(_data(rows, config)) if config.scale == "mini" else []
    for seed in range(config.seeds):
        for variant in dict.fromkeys(row.variant for row in rows):
            folder = config.root / variant / f"seed-{seed}"
            first = folder if not config.share_pretraining else config.root / variant / "seed-0"
            if first == folder:
                steps.append(_training("pretrain", variant, seed, folder / "pretrain", config, ()))
            start = (f"model.path={first / 'pretrain' / 'model'}",)
            steps.append(_training("finetune", variant, seed, folder / "finetune", config, start))
            suite = suite_of(config.scale)
            command = ["evaluate", "--model", str(folder / "finetune" / "model"), "--suite", suite]
            command += ["--out", str(folder / "evaluate"), "--paper-row", "", "--draws", "0"]
            command += ["--data", str(config.data)] if config.data else []
            command += ["--limit", str(config.limit)] if config.limit else []
            protocol = {b.name: b.fingerprint for b in choose(suite)}
            identity = identity_digest({"of": steps[-1].identity, "benchmarks": protocol, "limit": config.limit})
            steps.append(Step("evaluate", variant, seed, folder / "evaluate", tuple(command), identity))
    return steps


def _data(rows: Sequence[Row], config: AblationConfig) -> Iterator[Step]:
    """What writes the recipes' data where it is absent and an installed package makes it."""
    from florence_vl.registry import plugins
    from florence_vl.train.recipes import load_recipe

    writers: dict[str, tuple[str, ...]] = {}
    for point in plugins("datasets").values():
        writers |= point.load()()

    seen: set[Path] = set()
    for stage in STAGES if rows else ():
        recipe = load_recipe(f"ablations/{config.scale}/{rows[0].variant}-{stage}")
        for source in (*recipe.data.sources, *(recipe.warm_up.regions if recipe.warm_up else ())):
            path = Path(source.path)
            if source.name in writers and path.name == "data.jsonl" and not path.exists() and path not in seen:
                seen.add(path)
                words = (*writers[source.name], "--out", str(path.parent))
                yield Step("data", source.name, 0, path.parent, words, "")


def suite_of(scale: str) -> str:
    """Benchmarks of a scale: the mini suite, or those whose columns the four tables have."""
    if scale == "mini":
        return "mini"
    from florence_vl.evaluate.scoring import reported_results
    from florence_vl.evaluate.suites import choose

    wanted = {
        column
        for table in load_tables().values()
        for part in table.parts
        for row in reported_results()[part.paper]["rows"]
        for column in row["scores"]
    }
    return ",".join(b.name for b in choose("paper") if wanted.intersection(b.columns))


def stage_of(override: str) -> str | None:
    """The stage that an override is for; None for both.

    Raises:
        ValueError: It is not of the form `[pretrain:|finetune:]key.path=value`.
    """
    key, equals, _ = override.partition("=")
    stage, colon, _ = key.partition(":")
    if not equals or (colon and stage not in STAGES):
        raise ValueError(f"{override!r} is not of the form [pretrain:|finetune:]key.path=value")
    return stage if colon else None


def _training(
    stage: str, variant: str, seed: int, folder: Path, config: AblationConfig, overrides: tuple[str, ...]
) -> Step:
    from florence_vl.train.recipes import load_recipe

    name = f"ablations/{config.scale}/{variant}-{stage}"
    mine = (word.removeprefix(f"{stage}:") for word in config.overrides if stage_of(word) in (None, stage))
    settings = (*mine, *overrides, f"seed={seed}", f"output={folder}", "checkpoint.keep_last=1")
    recipe = load_recipe(name, settings).to_dict()
    command = ("train", name, *settings, "--resume", "auto")
    return Step(stage, variant, seed, folder, command, identity_digest(json.loads(json.dumps(recipe, default=str))))


def execute(steps: Sequence[Step], config: AblationConfig, log: Callable[[str], None]) -> None:
    """Run what is not done yet.

    Raises:
        Stopped: A training was stopped by a signal.
        RuntimeError: A command failed; its log is named.
    """
    todo = [step for step in steps if not step.done]
    if len(todo) < len(steps):
        log(f"{len(steps) - len(todo)} of {len(steps)} steps are done already")
    for number, step in enumerate(todo, 1):
        log(
            f"[{number}/{len(todo)}] {step.kind}: {step.variant}"
            + (f", seed {step.seed}" if step.kind != "data" else "")
        )
        step.folder.mkdir(parents=True, exist_ok=True)
        launcher = config.launcher if step.kind in STAGES else AblationConfig.launcher
        words = [_python(word) for word in (*launcher, *step.command)]
        output = step.folder.parent / f"{step.kind}.log"
        with output.open("ab") as file:
            code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code == STOPPED:
            raise Stopped(f"{step.variant}, seed {step.seed}, {step.kind} was stopped; start the same command again")
        if code != 0:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(
                f"{step.kind} of {step.variant} failed with exit code {code}: {' '.join(last)} ({output})"
            )
        if step.kind == "data":
            continue
        from florence_vl.analyze.plots import write_atomically

        if step.kind in STAGES:  # its model is written: of a table's many runs the checkpoints would fill the disk
            shutil.rmtree(step.folder / "checkpoints", ignore_errors=True)
        done = {"identity": step.identity, "command": shlex.join(["florence-vl", *step.command])}
        write_atomically(step.marker, json.dumps(done, indent=1) + "\n")


def _python(word: str) -> str:
    import sys

    return sys.executable if word == "python" else word


@dataclass
class RowScores:
    """Scores of a row over seeds.

    Args:
        row: The row.
        seeds: Seed -> column -> score.
    """

    row: Row
    seeds: dict[int, dict[str, float]] = field(default_factory=dict)

    def column(self, name: str) -> Interval:
        """Mean and interval of a column.

        Raises:
            ValueError: No seed has that column.
        """
        return interval([scores[name] for scores in self.seeds.values() if name in scores])

    def average(self, columns: Sequence[str]) -> list[float]:
        """The paper's average over these columns, by seed."""
        from florence_vl.statistics import paper_average

        return [paper_average(scores, columns) for scores in self.seeds.values()]


def read_scores(table: AblationTable, config: AblationConfig) -> list[RowScores]:
    """Scores of every row of a table that has been evaluated, from the folders."""
    from florence_vl.evaluate.scoring import score_folder

    found = []
    for row in table.rows:
        scores = RowScores(row)
        for seed in range(config.seeds):
            folder = config.root / row.variant / f"seed-{seed}" / "evaluate"
            if (folder / "done.json").is_file():
                scores.seeds[seed] = score_folder(folder, draws=0).columns()
        if scores.seeds:
            found.append(scores)
    return found


def verdict(row: RowScores, reference: RowScores, columns: Sequence[str]) -> tuple[Interval | None, str]:
    """Difference of a row's average to the full model's, seed by seed, and what its interval allows to say."""
    shared = [seed for seed in row.seeds if seed in reference.seeds]
    if not shared:
        return None, "no seed in common with the full model"
    sides = [RowScores(r.row, {seed: r.seeds[seed] for seed in shared}).average(columns) for r in (row, reference)]
    difference = paired(*sides)
    if difference.half is None:
        return difference, "one seed: no verdict"
    if not difference.excludes_zero:
        return difference, f"not told apart by {len(shared)} seeds"
    return difference, "worse than the full model" if difference.mean < 0 else "better than the full model"


def build_table(table: AblationTable, scores: Sequence[RowScores], scale: str) -> dict[str, Any]:
    """The table as titles, headers and cells, with the paper's rows beside.

    Args:
        table: Which table.
        scores: From `read_scores`.
        scale: `mini` or `llava15`.

    Returns:
        What `florence_vl.analyze.report.ablation_section` shows.

    Raises:
        ValueError: There is no score.
    """
    if not scores:
        raise ValueError(f"no row of table {table.number} has been evaluated yet")
    parts = [_part(table, part, scores, scale) for part in table.parts]
    return {
        "number": table.number,
        "title": f"{table.title} ({scale} scale)",
        "text": " ".join(table.text.split()),
        "notes": list(_notes(table, scores, scale)),
        "parts": parts,
    }


def _part(table: AblationTable, part: Part, scores: Sequence[RowScores], scale: str) -> dict[str, Any]:
    from florence_vl.statistics import paper_average

    reported = {row.name: paper_scores(part, row) for row in table.rows}
    wanted = list(part.mini) if scale == "mini" else list(next(iter(filter(None, reported.values()))))
    columns = [c for c in wanted if all(c in values for s in scores for values in s.seeds.values())]
    reference = next((s for s in scores if s.row.name == table.reference), None)
    base = reported[table.reference]
    header = [
        "row",
        *columns,
        "average",
        "difference to the full model",
        "verdict",
        "paper's average",
        "paper's difference",
    ]
    rows = []
    for entry in scores:
        difference, words = (None, "") if reference in (None, entry) else verdict(entry, reference, columns)
        theirs = reported[entry.row.name]
        shared = [c for c in theirs if c in base]
        paper = paper_average(theirs, shared) if theirs else None
        gap = None if paper is None or entry is reference else paper - paper_average(base, shared)
        cells = [entry.row.name, *(entry.column(c).text(1) for c in columns)]
        cells += [interval(entry.average(columns)).text(1), "" if difference is None else difference.text(1), words]
        cells += ["–" if paper is None else f"{paper:.1f}", "" if gap is None else f"{gap:+.1f}"]
        rows.append({"cells": cells, "paper": False})
        if scale != "mini" and theirs:
            own = [f"{theirs[c]:.1f}" for c in columns]
            rows.append({"cells": ["  paper", *own, f"{paper:.1f}", "", "", "", ""], "paper": True})
    return {"title": part.title or table.title, "header": header, "rows": rows}


def _notes(table: AblationTable, scores: Sequence[RowScores], scale: str) -> Iterator[str]:
    counts = sorted({len(s.seeds) for s in scores})
    words = "1 seed" if counts == [1] else f"{' to '.join(map(str, counts))} seeds"
    yield f"{words} a row; 95 % intervals: Student's t over seeds, differences paired."
    absent = [row.name for row in table.rows if row.name not in {s.row.name for s in scores}]
    if absent:
        yield f"Not evaluated yet: {', '.join(absent)}."
    if scale == "mini":
        yield (
            "Mini scale: other data, other LLM, other benchmarks. The paper's figures beside it are one run each, "
            "without intervals; only directions can be compared."
        )
