"""Benchmarks as YAML: source of the rows, conversion of rows to questions, and the scoring protocol."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from florence_vl.evaluate.metrics import METRICS, Metric
from florence_vl.evaluate.question import IMAGE, Picture, Question
from florence_vl.evaluate.tables import Table, find_files
from florence_vl.files import parse_yaml
from florence_vl.registry import did_you_mean

GROUPS = ("General", "OCR & Chart", "Knowledge", "Vision-centric")
PROTOCOLS = ("current", "authors")
JUDGES = ("none", "optional", "required")


@dataclass(frozen=True)
class Source:
    """Source of a benchmark's rows.

    Attributes:
        dataset: Hugging Face data set id.
        split: Split of the data set.
        config: Configuration of the data set.
        task: The lmms-eval task with the same rows and prompts.
    """

    dataset: str = ""
    split: str = "test"
    config: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class OtherTable:
    """Images in a second table: the column `image` of the row whose `key` equals this table's `match`."""

    config: str
    split: str
    key: str
    match: str
    image: str = "image"


@dataclass(frozen=True)
class Rows:
    """Conversion of a row to a question. Values are Jinja expressions over the row's columns (`row["..."]` for names
    that are not identifiers; `number` is the row number).

    Attributes:
        id: Id of the question; duplicates get a running number.
        images: Image columns, in order.
        image_key: Expression for the identity of a row's images, if the data set has one; otherwise their content is
            hashed. images_from: Images in a second table. interleave: Pattern whose first group names the image column
            at that position of the prompt. optional_images: Whether a row may have no image. where: Rows for which
            this is false are skipped. reference: Inputs of the metric, by name.
    """

    id: str
    reference: Mapping[str, str]
    images: Sequence[str] = ("image",)
    image_key: str | None = None
    images_from: OtherTable | None = None
    interleave: str | None = None
    optional_images: bool = False
    where: str | None = None


@dataclass(frozen=True)
class Generation:
    """Generation settings: greedy unless a temperature is given.

    Attributes:
        max_new_tokens: Maximum tokens of an answer.
        temperature: Sampling temperature; 0 is greedy.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and its protocol, as described by a YAML file.

    Attributes:
        name: Name on the command line.
        title: Name in reports.
        group: One of `GROUPS`, or any other heading.
        source: Source of the rows.
        rows: Conversion of a row to a question.
        prompt: Jinja template of the question's text.
        metric: Name in `METRICS`.
        generation: Generation settings.
        columns: The paper's column name -> name of the score.
        judge: `none`, `required` (nothing can be scored without one) or `optional`.
        authors: Fields that differ in the authors' protocol (lmms-eval of August 2024), used by `--protocol authors`.
        size: Number of questions of the whole benchmark, if known: a data folder with fewer is incomplete.
        differences: Differences between the authors' run, this protocol and lmms-eval's current one.
        protocol: `current` or `authors`.
    """

    name: str
    title: str
    group: str
    rows: Rows
    prompt: str
    metric: str
    source: Source = Source()
    generation: Generation = Generation()
    columns: Mapping[str, str] = field(default_factory=dict)
    judge: str = "none"
    authors: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    differences: str = ""
    protocol: str = "current"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> Benchmark:
        """Check and build a benchmark.

        Raises:
            ValueError: A field is unknown or missing, or the metric or judge is invalid; the message names `where`.
        """
        nested = {"source": Source, "rows": Rows, "generation": Generation}
        built = {
            key: _dataclass(nested[key], value, f"{where}, {key}") if key in nested else value
            for key, value in values.items()
        }
        found: Benchmark = _dataclass(cls, built, where)
        for value, options, what in ((found.metric, METRICS, "metric"), (found.judge, JUDGES, "judge")):
            if value not in options:
                raise ValueError(f"{where}: unknown {what} {value!r}. {did_you_mean(str(value), options)}")
        if found.generation.max_new_tokens < 1:
            raise ValueError(f"{where}: max_new_tokens must be at least 1, found {found.generation.max_new_tokens}")
        try:
            found.with_protocol("authors")
        except TypeError as error:
            raise ValueError(f"{where}, authors: {error}") from None
        return found

    @property
    def scorer(self) -> Metric:
        """The metric."""
        return METRICS[self.metric]

    def with_protocol(self, protocol: str) -> Benchmark:
        """This benchmark with the authors' protocol (`authors`) or the current one (`current`).

        Raises:
            ValueError: The protocol is unknown.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}. {did_you_mean(protocol, PROTOCOLS)}")
        if protocol == "current" or not self.authors:
            return replace(self, protocol=protocol)
        changes = dict(self.authors)
        if "generation" in changes:
            changes["generation"] = replace(self.generation, **changes["generation"])
        return replace(self, protocol=protocol, **changes)

    @property
    def fingerprint(self) -> str:
        """Hash of everything except the model that determines an answer: rows, prompt, generation."""
        facts = {"source": asdict(self.source), "rows": asdict(self.rows), "prompt": self.prompt}
        facts |= {"generation": asdict(self.generation), "name": self.name}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode()).hexdigest()[:16]

    def questions(self, folder: Path) -> list[Question]:
        """All questions, from parquet files under `folder` (see `find_files`).

        Raises:
            FileNotFoundError: There is no file of this benchmark.
            ValueError: A column is missing, a row has no image, or its values are invalid.
        """
        try:
            paths = find_files(folder, self.name, self.source.split, self.source.config)
        except FileNotFoundError as error:
            hint = f". The data set is {self.source.dataset} on the Hugging Face Hub" if self.source.dataset else ""
            raise FileNotFoundError(f"{error}{hint}") from None
        table = Table(paths)
        wanted = [*self.rows.images] if not (self.rows.images_from or self.rows.interleave) else []
        for column in wanted:
            if column not in table.columns:
                near = did_you_mean(column, table.columns)
                raise ValueError(f"{paths[0]} has no column {column!r}, which {self.name!r} needs. {near}")
        others = self._other_pictures(folder)
        seen: dict[str, int] = {}
        found = []
        for number, (row, path, group, index) in enumerate(table.rows()):
            where = f"{path}, row {number}"
            row.setdefault("number", number)
            if self.rows.where and not evaluate(self.rows.where, row, where):
                continue
            name = str(evaluate(self.rows.id, row, where))
            seen[name] = seen.get(name, 0) + 1
            name = name if seen[name] == 1 else f"{name}#{seen[name]}"
            key = evaluate(self.rows.image_key, row, where) if self.rows.image_key else None
            text = render(self.prompt, row, where)

            def pictures(
                columns: Sequence[str], key: Any = key, at: tuple[str, int, int] = (path, group, index)
            ) -> Any:
                keys = [None if key is None else f"{self.name}/{key}/{column}" for column in columns]
                return [p for c, k in zip(columns, keys, strict=True) for p in table.pictures(*at, c, k)]

            images: list[Picture]
            if self.rows.images_from:
                images = others.get(str(row[self.rows.images_from.match]), [])
            elif self.rows.interleave:
                parts, columns = split_at_images(text, self.rows.interleave)
                images = pictures(columns)
            else:
                images = pictures(self.rows.images)
            if not images and not self.rows.optional_images:
                raise ValueError(f"missing image: {where} ({self.name} question {name}) has none")
            if not self.rows.interleave:
                parts = (*[IMAGE] * len(images), text)
            elif len(images) != len(columns):
                raise ValueError(f"missing image: {where} ({self.name} question {name}) names {', '.join(columns)}")
            reference = {k: plain(evaluate(e, row, where)) for k, e in self.rows.reference.items()}
            found.append(Question(name, self.name, parts, tuple(images), reference))
        if not found:
            raise ValueError(f"{', '.join(map(str, paths))} has no question of {self.name!r}")
        return found

    def _other_pictures(self, folder: Path) -> dict[str, list[Any]]:
        other = self.rows.images_from
        if other is None:
            return {}
        table = Table(find_files(folder, self.name, other.split, other.config, main=False))
        found = {}
        for row, path, group, index in table.rows():
            key = str(row[other.key])
            found[key] = table.pictures(path, group, index, other.image, f"{self.name}/{key}")
        return found


def split_at_images(text: str, pattern: str) -> tuple[tuple[Any, ...], list[str]]:
    """Text and image marks of an interleaved prompt, and the image column of each mark; a repeated name stays text."""
    parts: list[Any] = []
    columns: list[str] = []
    position = 0
    for match in re.finditer(pattern, text):
        column = match[1].replace(" ", "_")
        if column in columns:
            continue
        parts += [text[position : match.start()].strip(), IMAGE]
        columns.append(column)
        position = match.end()
    parts.append(text[position:].strip())
    return tuple(part for part in parts if part is IMAGE or part), columns


def select(questions: Sequence[Question], metric: Metric, limit: int | None, seed: int = 0) -> list[Question]:
    """A sample of about `limit` questions with complete units (pairs, rotations), determined by the seed.

    The seed alone determines the order of units, so a larger limit includes the sample of a smaller one.

    Raises:
        ValueError: `limit` is not positive.
    """
    if limit is None:
        return list(questions)
    if limit < 1:
        raise ValueError(f"--limit must be at least 1, found {limit}")
    units: dict[Any, list[Question]] = {}
    for question in questions:
        unit = metric.unit(question.reference)
        key = question.id if unit is None else (metric.stratum(question.reference), unit)
        units.setdefault(key, []).append(question)
    order = sorted(units, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    chosen: set[str] = set()
    for key in order:
        if len(chosen) >= limit:
            break
        chosen |= {question.id for question in units[key]}
    return [question for question in questions if question.id in chosen]


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["existing"] = _existing
    environment.filters["lettered"] = _lettered
    environment.filters["letters"] = lambda options: ", ".join(ascii_uppercase[: len(options)])
    environment.filters["letter"] = lambda index: ascii_uppercase[int(index)]
    environment.filters["without"] = lambda text, gone: text.replace(gone, "")
    environment.filters["literal"] = _literal
    environment.filters["found"] = lambda text, pattern: [m.strip() for m in re.findall(pattern, text)]
    environment.tests["given"] = lambda value: bool(_existing([value]))
    return environment


def _existing(values: Sequence[Any]) -> list[Any]:
    return [v for v in values if v is not None and v == v and v != "" and v != "nan"]


def _lettered(options: Sequence[Any], form: str = "{}. {}", between: str = "\n") -> str:
    return between.join(form.format(letter, option) for letter, option in zip(ascii_uppercase, options, strict=False))


def _literal(text: str) -> Any:
    import ast

    return ast.literal_eval(text)


@lru_cache(maxsize=256)
def _compiled(text: str, template: bool) -> Any:
    environment = _environment()
    return environment.from_string(text) if template else environment.compile_expression(text, undefined_to_none=False)


def evaluate(expression: str, row: Mapping[str, Any], where: str) -> Any:
    """Value of a Jinja expression over a row's columns.

    Raises:
        ValueError: The expression names a missing column, or fails; the message names `where`.
    """
    return _run(expression, row, where, template=False)


def render(template: str, row: Mapping[str, Any], where: str) -> str:
    """Render a Jinja template with a row's columns; raises as `evaluate`."""
    return _run(template, row, where, template=True)


def _run(text: str, row: Mapping[str, Any], where: str, template: bool) -> Any:
    from jinja2 import TemplateError, Undefined
    from jinja2.exceptions import UndefinedError

    names = {"".join(c if c.isalnum() else "_" for c in key): value for key, value in row.items()}
    try:
        compiled = _compiled(text, template)
        value = compiled.render(row=row, **names) if template else compiled(row=row, **names)
        if isinstance(value, Undefined):
            value._fail_with_undefined_error()
        return value
    except UndefinedError as error:
        raise ValueError(f"{where}: {error}; the columns are {', '.join(row)}") from None
    except (TemplateError, TypeError, ValueError, SyntaxError, KeyError, IndexError) as error:
        raise ValueError(f"{where}: {text!r} can't be computed: {error}") from None


def plain(value: Any) -> Any:
    """A value as JSON types."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _dataclass(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected fields, found {values!r}")
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown field {key!r}. {did_you_mean(str(key), known)}")
    if kind is Rows and values.get("images_from"):
        values = {**values, "images_from": _dataclass(OtherTable, values["images_from"], f"{where}, images_from")}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def read_benchmark(path: Path) -> Benchmark:
    """Read a benchmark from a YAML file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not YAML or does not describe a benchmark.
    """
    return Benchmark.from_mapping(parse_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))
