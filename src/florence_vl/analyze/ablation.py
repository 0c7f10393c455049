"""The paper's ablation tables 1, 4, 5 and 6: their rows, and the commands that train and score them.

Every step is a separate `florence-vl` command (`train`, `evaluate`), so an interrupted table can be resumed. A variant
that is part of several tables is trained once per seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from florence_vl.model.features import identity_digest
from florence_vl.registry import did_you_mean

STAGES = ("pretrain", "finetune")
DONE = "done.json"


@dataclass(frozen=True)
class TableRow:
    """A row of a table: its label, the trained variant, and the paper's label if the paper reports it."""

    name: str
    variant: str
    paper: str | None = None


@dataclass(frozen=True)
class TablePart:
    """A block of columns: the paper's table, and the corresponding columns of the mini suite."""

    paper: str
    mini: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True)
class AblationTable:
    """One of the paper's tables.

    Attributes:
        number: Its number in the paper.
        title: The varied component.
        text: Notes for the reader.
        reference: The reference row of differences: the full model.
        rows: Its rows, in order.
        parts: Its blocks of columns.
    """

    number: int
    title: str
    text: str
    reference: str
    rows: tuple[TableRow, ...]
    parts: tuple[TablePart, ...]

    def choose(self, names: Sequence[str] | None) -> list[TableRow]:
        """Rows by name; all if None.

        Raises:
            ValueError: A row does not exist; similar names are suggested.
        """
        known = {row.name: row for row in self.rows}
        for name in names or ():
            if name not in known:
                raise ValueError(f"table {self.number} has no row {name!r}. {did_you_mean(name, known)}")
        return [row for row in self.rows if names is None or row.name in names]


@lru_cache(maxsize=1)
def _file() -> dict[str, Any]:
    return yaml.safe_load(files("florence_vl.analyze").joinpath("ablation_tables.yaml").read_text(encoding="utf-8"))


def load_tables() -> dict[int, AblationTable]:
    """The tables by number."""
    return {
        number: AblationTable(
            number=number,
            title=table["title"],
            text=table["text"],
            reference=table["reference"],
            rows=tuple(TableRow(name, **fields) for name, fields in table["rows"].items()),
            parts=tuple(TablePart(p["paper"], tuple(p["mini"]), p.get("title", "")) for p in table["parts"]),
        )
        for number, table in _file()["tables"].items()
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


@dataclass(frozen=True)
class AblationConfig:
    """Settings of a table's runs.

    Attributes:
        scale: `mini` (two CPU cores, the mini suite) or `llava15` (the paper's setting: LLaVA-1.5 data, Vicuna-7B).
        out: Folder of all runs; tables in the same folder share their variants.
        start: Initial LLM of every row, from those of the scale; the scale's first if None.
        seeds: Number of seeds.
        share_pretraining: All seeds finetune from seed 0's first stage. This saves time, but the interval then covers
            the second stage only.
        overrides: `key.path=value` for both stages' recipes, `pretrain:key.path=value` for one.
        data: Folder with the benchmarks' files, for `llava15`.
        suite: Benchmarks; the scale's own if None.
        limit: Approximate number of questions per benchmark.
        judge: URL of a judge for the benchmarks that need one; without it they are left out.
        judge_model: Its model, if the server has several.
        launcher: Command before the sub-command of training, e.g. `torchrun --nproc-per-node 8 -m florence_vl`.
        jobs: Number of parallel commands; at mini scale each gets its share of the cores.
        dtype: Data type of training and evaluation at mini scale: `float32` or `bfloat16`. A seed that was begun with
            the other one continues with it, so that all rows of a seed have the same.

    Raises:
        ValueError: The scale or start is unknown, there are no seeds or jobs, or `llava15` has no benchmark files.
    """

    scale: str
    out: Path
    start: str | None = None
    seeds: int = 8
    share_pretraining: bool = False
    overrides: tuple[str, ...] = ()
    data: Path | None = None
    suite: str | None = None
    limit: int | None = None
    judge: str | None = None
    judge_model: str | None = None
    launcher: tuple[str, ...] = ("python", "-m", "florence_vl")
    jobs: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        scales = _file()["scales"]
        if self.scale not in scales:
            raise ValueError(f"unknown scale {self.scale!r}. {did_you_mean(self.scale, scales)}")
        if self.seeds < 1 or self.jobs < 1:
            raise ValueError(f"{self.seeds} seeds and {self.jobs} jobs; give 1 or more of each")
        if self.scale == "llava15" and self.data is None:
            raise ValueError("--scale llava15 needs --data, the folder with the benchmarks' parquet files")
        starts = self.about.get("starts", {})
        if self.start is not None and self.start not in starts:
            raise ValueError(f"scale {self.scale} has no start {self.start!r}. {did_you_mean(self.start, starts)}")

    @property
    def about(self) -> Mapping[str, Any]:
        """Entry of the scale in the table file."""
        return _file()["scales"][self.scale]

    @property
    def chosen_start(self) -> str | None:
        """The start; the scale's first if none was named, and None if the scale has none."""
        return self.start or next(iter(self.about.get("starts", {})), None)

    @property
    def root(self) -> Path:
        """Folder of this scale's runs with this start."""
        return self.out / self.scale / (self.chosen_start or "")

    @property
    def benchmarks(self) -> str:
        """The suite, or comma-separated benchmarks."""
        return self.suite or self.about.get("suite") or _columns_of_the_tables(self.judge is not None)

    def of_seed(self, seed: int) -> AblationConfig:
        """The settings of a seed: with the data type in which its first step was begun, of any row."""
        if self.scale != "mini":
            return self
        names = (f"*/{DONE}", "*.begun.json")
        markers = (read_marker(file) for name in names for file in sorted(self.root.glob(f"*/seed-{seed}/{name}")))
        return replace(self, dtype=next((m["dtype"] for m in markers if m and m.get("dtype")), self.dtype))


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Attributes:
        kind: `data`, `pretrain`, `finetune` or `evaluate`.
        variant: Name of the variant or data set.
        seed: The seed.
        folder: Output folder.
        command: Arguments of the command, without the launcher.
        identity: Hash of everything that determines its result, with that of the step before; a folder begun with
            another hash is an error.
        needs: Folders of the steps that must be finished before.
        dtype: Its data type at mini scale, otherwise None.
    """

    kind: str
    variant: str
    seed: int
    folder: Path
    command: tuple[str, ...]
    identity: str
    needs: tuple[Path, ...] = ()
    dtype: str | None = None

    @property
    def title(self) -> str:
        """A short description of the step."""
        return f"{self.kind}: {self.variant}" + (f", seed {self.seed}" if self.kind != "data" else "")

    @property
    def marker(self) -> Path:
        """Written when the step is done."""
        return self.folder / DONE

    @property
    def begun_marker(self) -> Path:
        """Exists while the step is unfinished; beside the folder, which belongs to the command."""
        return self.folder.with_name(f"{self.folder.name}.begun.json")

    @property
    def done(self) -> bool:
        """Whether the step is done.

        Raises:
            ValueError: It was begun or done with other settings.
        """
        if self.kind == "data":
            return (self.folder / "data.jsonl").is_file()
        found = read_marker(self.marker)
        known = found or (read_marker(self.begun_marker) if self.folder.is_dir() else None)
        if known is not None and known["identity"] != self.identity:
            raise ValueError(
                f"{self.folder} contains the result of other settings ({known['command']}); delete it or change --out"
            )
        return found is not None


def read_marker(file: Path) -> dict[str, Any] | None:
    """The record of a step: what it is, and once done how it ran; None if there is none."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def plan(rows: Sequence[TableRow], config: AblationConfig) -> list[Step]:
    """The commands for the rows, in order; each variant and seed once.

    Raises:
        FileNotFoundError: A recipe is missing.
        ValueError: A recipe and the overrides contradict each other.
    """
    from florence_vl.evaluate.suites import choose

    variants = list(dict.fromkeys(row.variant for row in rows))
    data = list(_data(config)) if variants and config.scale == "mini" else []
    written = tuple(step.folder for step in data)
    protocol = {b.name: b.fingerprint for b in choose(config.benchmarks)}
    steps, pretrained = list(data), {}
    for seed in range(config.seeds):
        own = config.of_seed(seed)
        for variant in variants:
            if seed == 0 or not config.share_pretraining:
                pretrained[variant] = _training("pretrain", variant, seed, own, None, written)
                steps.append(pretrained[variant])
            trained = _training("finetune", variant, seed, own, pretrained[variant], written)
            folder = trained.folder.with_name("evaluate")
            command = ["evaluate", "--model", str(trained.folder / "model"), "--suite", config.benchmarks]
            command += ["--out", str(folder), "--paper-row", "", "--draws", "0"]
            command += ["--data", str(config.data)] if config.data else []
            command += ["--limit", str(config.limit)] if config.limit else []
            command += ["--judge", config.judge] if config.judge else []
            command += ["--judge-model", config.judge_model] if config.judge_model else []
            facts = {"of": trained.identity, "benchmarks": protocol, "limit": config.limit, "judge": config.judge_model}
            if config.scale == "mini":
                command += ["--dtype", own.dtype, "--feature-store", str(_store(config))]
            identity, needs = identity_digest(facts), (trained.folder,)
            steps += [trained, Step("evaluate", variant, seed, folder, tuple(command), identity, needs, trained.dtype)]
    return steps


def _store(config: AblationConfig) -> Path:
    return config.out / config.scale / "features"


def _data(config: AblationConfig) -> Iterator[Step]:
    """Steps that create the recipes' data if it is missing and an installed package provides it."""
    from florence_vl.data.sources import writers
    from florence_vl.train.recipes import load_recipe

    known = writers()
    seen: set[Path] = set()
    for stage in STAGES:
        recipe = load_recipe(config.about["recipes"][stage])
        for source in (*recipe.data.sources, *(recipe.warm_up.regions if recipe.warm_up else ())):
            path = Path(source.path)
            if source.name in known and path.name == "data.jsonl" and not path.exists() and path not in seen:
                seen.add(path)
                words = (*known[source.name], "--out", str(path.parent))
                yield Step("data", source.name, 0, path.parent, words, "")


def _columns_of_the_tables(judged: bool) -> str:
    """The benchmarks with the columns of the four tables; those that need a judge only if there is one."""
    from florence_vl.evaluate.scoring import reported_results
    from florence_vl.evaluate.suites import choose

    wanted = {
        column
        for table in load_tables().values()
        for part in table.parts
        for row in reported_results()[part.paper]["rows"]
        for column in row["scores"]
    }
    known = (b for b in choose("paper") if judged or b.judge != "required")
    return ",".join(b.name for b in known if wanted.intersection(b.columns))


def stage_of(override: str) -> str | None:
    """The stage of an override; None for both.

    Raises:
        ValueError: It is not of the form `[pretrain:|finetune:]key.path=value`.
    """
    key, equals, _ = override.partition("=")
    stage, colon, _ = key.partition(":")
    if not equals or (colon and stage not in STAGES):
        raise ValueError(f"{override!r} is not of the form [pretrain:|finetune:]key.path=value")
    return stage if colon else None


def row_settings(stage: str, variant: str, config: AblationConfig) -> list[str]:
    """Changes from the scale's recipe to a variant's, as `key.path=value` texts: scale, start, variant, user."""
    about, own = config.about, _file()["variants"][variant]
    settings = dict(about.get("set", {}).get(stage, {}))
    if stage == "pretrain":
        build = {**about.get("starts", {}).get(config.chosen_start, {}), **own.get("build", {})}
        settings |= {f"model.build.{key}": value for key, value in build.items()}
    extra = own.get("set", {}).get(config.scale, {})
    settings |= extra.get(stage, {}) if set(extra) & set(STAGES) else extra
    if about.get("frozen_tower"):
        settings["model.feature_store"] = str(_store(config))
    if config.scale == "mini":
        settings["precision"] = "bf16" if config.dtype == "bfloat16" else "fp32"
    words = [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in settings.items()]
    return words + [w.removeprefix(f"{stage}:") for w in config.overrides if stage_of(w) in (None, stage)]


def _training(
    stage: str, variant: str, seed: int, config: AblationConfig, start: Step | None, needs: tuple[Path, ...]
) -> Step:
    from florence_vl.train.recipes import load_recipe

    name = config.about["recipes"][stage]

    def settings(config: AblationConfig) -> tuple[str, ...]:
        folder = config.root / variant
        path = (f"model.path={folder / f'seed-{start.seed}' / start.kind / 'model'}",) if start else ()
        output = f"output={folder / f'seed-{seed}' / stage}"
        return (*row_settings(stage, variant, config), *path, f"seed={seed}", output, "checkpoint.keep_last=1")

    # The identity is that of the same settings in a folder `out`, so results can be moved.
    recipe = load_recipe(name, settings(replace(config, out=Path("out")))).to_dict()
    facts = {"recipe": _given(json.loads(json.dumps(recipe, default=str))), "of": start.identity if start else None}
    command = ("train", name, *settings(config), "--resume", "auto")
    needs = (start.folder, *needs) if start else needs
    dtype = config.dtype if config.scale == "mini" else None
    folder = config.root / variant / f"seed-{seed}" / stage
    return Step(stage, variant, seed, folder, command, identity_digest(facts), needs, dtype)


def _given(value: Any) -> Any:
    """A recipe without its unset options, so that a new option does not invalidate earlier results."""
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value
