"""Benchmarks and suites by name, from the YAML files in this folder and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import yaml

from florence_vl.evaluate.benchmark import Benchmark, read_benchmark
from florence_vl.evaluate.tables import find_files
from florence_vl.registry import Registry, did_you_mean, plugins

BENCHMARKS: Registry[Benchmark] = Registry("benchmark")

_FOLDER = Path(str(files(__package__)))


@dataclass(frozen=True)
class PackagedSuite:
    """A suite in a package, with its data; the value of an entry point of the group `florence_vl.suites`.

    Attributes:
        folder: Its YAML files: one per benchmark, and `suites.yaml`.
        dataset: `source.dataset` of its benchmarks.
        make: Returns the folder with their parquet files, created at the first call.
    """

    folder: Path
    dataset: str
    make: Callable[[], Path]


@lru_cache(maxsize=1)
def packaged_suites() -> dict[str, PackagedSuite]:
    """The suites of installed packages, by the data set's name."""
    found: list[PackagedSuite] = [point.load() for point in plugins("suites").values()]
    return {suite.dataset: suite for suite in found}


@lru_cache(maxsize=1)
def _load() -> dict[str, list[str]]:
    suites: dict[str, list[str]] = {}
    for folder in (_FOLDER, *(suite.folder for suite in packaged_suites().values())):
        suites |= yaml.safe_load((folder / "suites.yaml").read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.yaml")):
            if path.name != "suites.yaml":
                add_benchmark(path)
    return suites


def data_folder(benchmark: Benchmark, data: Path | None) -> Path:
    """Folder of a benchmark's parquet files: `data`, or the package that provides them if `data` does not have them.

    Raises:
        ValueError: No package provides them and `data` is None; the message gives the download command.
    """
    packaged = packaged_suites().get(benchmark.source.dataset)
    if packaged is not None:
        if data is None:
            return packaged.make()
        try:
            find_files(data, benchmark.name, benchmark.source.split, benchmark.source.config)
        except FileNotFoundError:
            return packaged.make()
        return data
    if data is None:
        raise ValueError(
            f"{benchmark.name!r} needs a folder with its parquet files in {benchmark.name}/ (--data; in a recipe, "
            f"evaluate.data): hf download {benchmark.source.dataset} --repo-type dataset --local-dir "
            f"DATA/{benchmark.name}"
        )
    return data


def benchmark_pictures(data: Path) -> Iterator[tuple[str, bytes]]:
    """Pictures of all benchmarks whose files are in a data folder, each once: a name and the encoded bytes.

    Raises:
        FileNotFoundError: There are no files of any benchmark.
        ValueError: A file has another schema.
    """
    _load()
    there = False
    for benchmark in (BENCHMARKS[name] for name in BENCHMARKS):
        if benchmark.source.dataset in packaged_suites():
            continue
        try:
            questions = benchmark.questions(data)
        except FileNotFoundError:
            continue
        there = True
        seen: set[str] = set()
        for question in questions:
            for picture in question.images:
                if picture.key not in seen:
                    seen.add(picture.key)
                    yield f"{benchmark.name} question {question.id}", picture.read()
    if not there:
        raise FileNotFoundError(f"no parquet files of a benchmark in {data}")


def add_benchmark(path: Path) -> Benchmark:
    """Register the benchmark of a YAML file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file does not describe a benchmark, or its name is used by another one.
    """
    found = read_benchmark(path)
    if found.name in BENCHMARKS and BENCHMARKS[found.name] != found:
        raise ValueError(f"{path}: the benchmark {found.name!r} exists already with another protocol; rename this one")
    if found.name not in BENCHMARKS:
        BENCHMARKS.register(found.name)(found)
    return found


def suites() -> dict[str, list[str]]:
    """Names of the benchmarks of each suite."""
    return {name: list(members) for name, members in _load().items()}


def benchmark_names() -> list[str]:
    """All registered benchmarks."""
    _load()
    return BENCHMARKS.names()


def choose(names: str | Sequence[str], protocol: str = "current") -> list[Benchmark]:
    """Benchmarks by name, by suite, or from YAML files; each once, in the given order.

    Args:
        names: Names, or one comma-separated text.
        protocol: `current` or `authors` (see `Benchmark.with_protocol`).

    Raises:
        FileNotFoundError: A YAML file does not exist.
        ValueError: A name is neither a suite nor a benchmark; similar names are suggested.
    """
    known = suites()
    chosen: dict[str, Benchmark] = {}
    for name in names.split(",") if isinstance(names, str) else names:
        name = name.strip()
        if name.endswith((".yaml", ".yml")):
            found = [add_benchmark(Path(name))]
        elif name in known:
            found = [BENCHMARKS[member] for member in known[name]]
        elif name in BENCHMARKS:
            found = [BENCHMARKS[name]]
        else:
            near = did_you_mean(name, [*known, *BENCHMARKS.names()])
            raise ValueError(f"unknown suite or benchmark {name!r}. {near}")
        chosen |= {benchmark.name: benchmark.with_protocol(protocol) for benchmark in found}
    return list(chosen.values())
