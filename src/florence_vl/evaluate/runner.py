"""Runs benchmarks: asks unanswered questions, writes every answer immediately, and can be resumed after a kill."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from florence_vl.evaluate.answer import Answerer, batches
from florence_vl.evaluate.benchmark import Benchmark, Generation, select
from florence_vl.evaluate.judge import Judge
from florence_vl.evaluate.metrics import METRICS, Verdict
from florence_vl.evaluate.metrics.judged import JudgedMetric
from florence_vl.evaluate.question import Question
from florence_vl.evaluate.store import ResultsFolder, append_lines, drop_truncated_line, read_lines
from florence_vl.evaluate.tables import TablePicture

# Called with the number of questions that were just answered.
Progress = Callable[[int], None]


@dataclass
class EvaluationPlan:
    """The questions of a run.

    Attributes:
        questions: The chosen questions of each benchmark, by name.
        benchmarks: The benchmarks by name.
        limit: The `--limit` of the sample.
        seed: The seed of the sample.
        available: Number of questions of each benchmark without a limit.
        fingerprints: Digest of each benchmark's protocol and questions, under which answers are stored.
        pictures: Digest of each benchmark's picture keys.
    """

    questions: dict[str, list[Question]]
    benchmarks: dict[str, Benchmark]
    limit: int | None = None
    seed: int = 0
    available: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of questions."""
        return sum(map(len, self.questions.values()))


def plan(
    chosen: Sequence[Benchmark],
    load: Callable[[Benchmark], Sequence[Question]],
    limit: int | None = None,
    seed: int = 0,
) -> EvaluationPlan:
    """Read and sample the questions of benchmarks.

    Args:
        chosen: The benchmarks.
        load: Returns a benchmark's questions.
        limit: Approximate number of questions per benchmark (units stay complete).
        seed: Seed of the sample.

    Raises:
        FileNotFoundError: A benchmark's file does not exist.
        ValueError: A file has the wrong schema, or the limit is not positive.
    """
    made = EvaluationPlan({}, {b.name: b for b in chosen}, limit, seed)
    for benchmark in chosen:
        everything = load(benchmark)
        made.available[benchmark.name] = len(everything)
        made.fingerprints[benchmark.name] = _fingerprint(benchmark, everything)
        keys = {question.picture_key for question in everything}
        if benchmark.rows.image_key:  # such keys name pictures; the files' sizes tell whether they are the same ones
            paths = {p.path for q in everything for p in q.images if isinstance(p, TablePicture)}
            keys |= {f"{Path(path).name}: {Path(path).stat().st_size} bytes" for path in paths}
        made.pictures[benchmark.name] = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
        made.questions[benchmark.name] = select(everything, benchmark.scorer, limit, seed)
        if not isinstance(benchmark.scorer, JudgedMetric):
            _check_reference(benchmark, everything[0])
    return made


def _check_reference(benchmark: Benchmark, question: Question) -> None:
    """Judge one answer, so that a reference which the metric cannot use is found before anything is generated."""
    try:
        benchmark.scorer.judge("?", question.reference)
    except (KeyError, TypeError, ValueError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        where = f"{benchmark.name}, question {question.id!r}"
        raise ValueError(f"{where}: the metric {benchmark.metric!r} cannot use its reference: {detail}") from None


def _fingerprint(benchmark: Benchmark, questions: Sequence[Question]) -> str:
    digest = hashlib.sha256(benchmark.fingerprint.encode())
    for question in questions:
        digest.update(repr((question.id, question.prompt, sorted(question.reference.items()))).encode())
    return digest.hexdigest()[:16]


def shard(made: EvaluationPlan, rank: int, processes: int) -> EvaluationPlan:
    """The part of a plan for one of several processes: whole picture groups, by hash."""

    def mine(question: Question) -> bool:
        digest = hashlib.sha256(f"{question.benchmark}/{question.picture_key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % processes == rank

    own = {name: [q for q in questions if mine(q)] for name, questions in made.questions.items()}
    return replace(made, questions=own)


def describe(made: EvaluationPlan) -> dict[str, dict[str, Any]]:
    """The entry of `run.json` for each benchmark of a plan."""
    found = {}
    for name, benchmark in made.benchmarks.items():
        facts = asdict(benchmark)
        found[name] = {
            "fingerprint": made.fingerprints[name],
            "pictures": made.pictures.get(name),
            "questions": len(made.questions[name]),
            "available": made.available.get(name, len(made.questions[name])),
            "size": benchmark.size,
            "limit": made.limit,
            "seed": made.seed,
            **{k: facts[k] for k in ("title", "group", "columns", "metric", "judge", "protocol", "differences")},
            **{k: facts[k] for k in ("source", "generation", "prompt")},
        }
    return found


def versions() -> dict[str, str]:
    """Versions of the libraries on which a score depends."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("florence-vl", "torch", "transformers", "tokenizers", "pillow", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def open_results(
    folder: ResultsFolder, answerer: Answerer, made: EvaluationPlan, data: Path | None = None
) -> dict[str, Any]:
    """Open or create a results folder; see `ResultsFolder.open` for errors."""
    description = folder.open(answerer.identity, describe(made))
    description["versions"] = versions()
    if data is not None:
        description["data"] = str(data)
    folder.write_description(description)
    return description


def run(
    answerer: Answerer,
    made: EvaluationPlan,
    folder: ResultsFolder,
    progress: Progress | None = None,
) -> dict[str, dict[str, str]]:
    """Ask every question of a plan without an answer in the folder.

    Args:
        answerer: The model.
        made: The questions.
        folder: Where answers are written after each batch; opened before (see `open_results`).
        progress: Called after each batch; first with the number of existing answers.

    Returns:
        Unanswered questions: question ids and errors for each benchmark.
    """
    known = folder.answers()
    failed: dict[str, dict[str, str]] = {}
    todo: dict[Generation, list[Question]] = {}  # benchmarks with the same settings share batches, so also images
    for name, questions in made.questions.items():
        new = [q for q in questions if known.get((name, q.id), {}).get("protocol") != made.fingerprints[name]]
        todo.setdefault(made.benchmarks[name].generation, []).extend(new)
        if progress and len(new) < len(questions):
            progress(len(questions) - len(new))
    for generation, questions in todo.items():
        for batch in batches(questions, answerer.batch_size):
            started = time.perf_counter()
            answers = answerer.answer(batch, generation)
            seconds = round((time.perf_counter() - started) / len(batch), 4)
            rows = []
            for question, answer in zip(batch, answers, strict=True):
                if answer.error is not None:
                    failed.setdefault(question.benchmark, {})[question.id] = answer.error
                    continue
                row = {
                    "benchmark": question.benchmark,
                    "id": question.id,
                    "protocol": made.fingerprints[question.benchmark],
                    "prompt": question.prompt,
                    "answer": answer.text,
                    "finished": answer.finished,
                    "tokens": answer.tokens,
                    "seconds": seconds,
                    "reference": dict(question.reference),
                }
                rows.append(row | _stored(strict_verdict(made.benchmarks[question.benchmark].metric, row)))
            folder.append(rows)
            if progress:
                progress(len(batch))
    return failed


def strict_verdict(metric: str, row: Mapping[str, Any]) -> Verdict | None:
    """The verdict of the metric's rules on an answer; None if only a judge can score it."""
    chosen = METRICS[metric]
    if isinstance(chosen, JudgedMetric):
        return None
    return chosen.judge(row["answer"], row["reference"], row["finished"])


def _stored(verdict: Verdict | None) -> dict[str, Any]:
    """What is stored of a verdict with its answer."""
    if verdict is None:
        return {"parsed": None, "score": None, "kind": "not scored: needs a judge"}
    return {"parsed": verdict.parsed, "score": verdict.score, "kind": verdict.kind}


def judge_answers(
    judge: Judge, folder: ResultsFolder, metrics: Mapping[str, str], progress: Progress | None = None, workers: int = 8
) -> dict[tuple[str, str], dict[str, Any]]:
    """Let a judge score what rules cannot; judgements are stored with the answers and not requested again.

    Args:
        judge: The judge.
        folder: Results.
        metrics: Metric of each benchmark.
        progress: Called with 1 after each judgement.
        workers: Number of parallel requests.

    Returns:
        Judgements by benchmark and question: `verdict` (None if the judge failed) and `reply`.
    """
    file = folder.path / "judgements.jsonl"
    drop_truncated_line(file)
    known = load_judgements(folder, judge.identity)
    todo = []
    for key, row in folder.answers().items():
        name = metrics.get(key[0])
        if name is None or (key in known and known[key]["answer"] == row["answer"]):
            continue
        if judge.wants(name, strict_verdict(name, row)):
            todo.append((key, row, name))

    def one(item: tuple[tuple[str, str], dict[str, Any], str]) -> None:
        key, row, name = item
        word = judge.decide(name, row["answer"], row["reference"])
        line = {"benchmark": key[0], "id": key[1], "judge": judge.identity, "answer": row["answer"]}
        line |= {"reply": word.reply, "verdict": None if word.verdict is None else asdict(word.verdict)}
        known[key] = line
        if word.verdict is not None:  # a failed judgement is requested again next time
            append_lines(file, [line])
        if progress:
            progress(1)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, todo))
    return known


def load_judgements(folder: ResultsFolder, identity: Mapping[str, Any] | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Judgements in a folder by benchmark and question; of one judge, or of the most recent one."""
    rows: Iterable[dict[str, Any]] = read_lines(folder.path / "judgements.jsonl")
    return {(r["benchmark"], r["id"]): r for r in rows if identity is None or r["judge"] == dict(identity)}


def verdict_of(line: Mapping[str, Any]) -> Verdict | None:
    """The verdict in a line of `judgements.jsonl`."""
    return None if line["verdict"] is None else Verdict(**line["verdict"])
