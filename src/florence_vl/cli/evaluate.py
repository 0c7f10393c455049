"""`florence-vl evaluate`: score a model on benchmarks, report and compare runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from florence_vl.cli.common import DEVICE, DTYPE, is_given, print_table, refuse
from florence_vl.cli.resolution import ASPECT, IMAGE_SIZE, POSITIONS, TILES, TOKEN_BUDGET, TRADE, VIEW, given

if TYPE_CHECKING:
    from collections.abc import Callable

    from florence_vl.evaluate.answer import Answerer
    from florence_vl.evaluate.runner import EvaluationPlan
    from florence_vl.evaluate.scoring import Scores
    from florence_vl.evaluate.store import ResultsFolder

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode="rich",
    help="Score a model on benchmarks.",
    epilog="""[bold]Examples[/bold]

  florence-vl evaluate --model mini --suite mini --out runs/eval-mini

  florence-vl evaluate --model runs/demo/model --suite pope,mme --data benchmarks-data --out runs/eval --limit 200

  florence-vl evaluate --model http://localhost:8000 --suite paper --data benchmarks-data --out runs/eval-served

  florence-vl evaluate compare runs/eval-a runs/eval-b""",
)

_ROW = typer.Option(
    "Florence-VL 3B", "--paper-row", help="Row of the paper's tables to show next to the scores; empty for none."
)
_DRAWS = typer.Option(1000, "--draws", min=0, help="Bootstrap samples of the intervals.")


@app.callback()
def run_command(
    context: typer.Context,
    model: str | None = typer.Option(
        None,
        "--model",
        "-m",
        help="Folder of any image-text-to-text model, hub id of a Florence-VL, `mini`, or the URL of an "
        "OpenAI-compatible server (its key: $FLORENCE_VL_MODEL_API_KEY).",
    ),
    suite: str = typer.Option("mini", "--suite", "-s", help="Comma-separated suites, benchmarks and YAML files."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Results folder; an interrupted run resumes from it."),
    data: Path | None = typer.Option(None, "--data", "-d", help="Folder with the benchmarks' parquet files."),
    limit: int | None = typer.Option(
        None, "--limit", "-n", min=1, help="Approximate number of questions per benchmark."
    ),
    seed: int = typer.Option(0, "--seed", help="Seed of the sample that --limit draws, and of sampled answers."),
    protocol: str = typer.Option(
        "current", "--protocol", help="`current`, or `authors` for the settings of the paper's runs."
    ),
    batch_size: int = typer.Option(16, "--batch-size", "-b", min=1, help="Questions per batch."),
    processes: int = typer.Option(1, "--processes", min=1, help="Processes that share the questions (one per GPU)."),
    judge: str | None = typer.Option(
        None, "--judge", help="URL of an OpenAI-compatible judge (its key: $FLORENCE_VL_JUDGE_API_KEY)."
    ),
    judge_model: str | None = typer.Option(
        None, "--judge-model", help="Model of the judge, if its server has several."
    ),
    served_model: str | None = typer.Option(
        None, "--served-model", help="Model to use if --model is a URL of a server with several."
    ),
    retries: int = typer.Option(4, "--retries", min=0, help="Further attempts when an endpoint fails."),
    device: str = DEVICE,
    dtype: str = DTYPE,
    feature_store: Path | None = typer.Option(
        None, "--feature-store", help="Folder that stores the vision tower's features between runs."
    ),
    image_size: int | None = IMAGE_SIZE,
    aspect: str | None = ASPECT,
    token_budget: int | None = TOKEN_BUDGET,
    tiles: int | None = TILES,
    positions: str | None = POSITIONS,
    view: str | None = VIEW,
    trade: float | None = TRADE,
    paper_row: str = _ROW,
    draws: int = _DRAWS,
    shard: str | None = typer.Option(None, "--shard", hidden=True),
) -> None:
    """Score a model on benchmarks. The results folder keeps every prompt, raw answer, parsed answer and score."""
    if context.invoked_subcommand is not None:
        before = {parameter.opts[0]: is_given(context, parameter.name) for parameter in context.command.params}
        refuse(before, f"give the flags of `florence-vl evaluate {context.invoked_subcommand}` after its name")
        return
    if model is None or out is None:
        missing = [name for name, value in (("--model", model), ("--out", out)) if value is None]
        raise typer.BadParameter(f"missing {' and '.join(missing)}")
    from florence_vl.evaluate.runner import judge_answers, open_results, plan
    from florence_vl.evaluate.scoring import reported_row
    from florence_vl.evaluate.store import ResultsFolder
    from florence_vl.evaluate.suites import choose

    if paper_row:
        reported_row(paper_row)
    chosen = choose(suite, protocol)
    resolution = given(image_size, aspect, token_budget, tiles, positions, view, trade)
    if _is_url(model):
        local: dict[str, Any] = {f"--{name.replace('_', '-')}": True for name in resolution}
        local |= {"--device": device != "auto", "--dtype": dtype != "auto", "--feature-store": feature_store}
        refuse(local, f"the server at {model} determines how it runs and how images are processed. Remove the flags")
    else:
        asking = {"--served-model": served_model, "--retries": retries != 4 and judge is None}
        refuse(asking, f"--model {model} is not the URL of a server. Remove the flags")
    refuse({"--judge-model": judge_model and judge is None}, "needs --judge, the URL of the judge's server")
    made = plan(chosen, _loader(data), limit, seed)
    answers = partial(_answerer, model, served_model, retries, device, dtype, batch_size, seed, resolution)
    if shard is not None:
        _run_shard(shard, answers, made, out, data)
        return
    if feature_store is not None and processes > 1:
        raise ValueError("--feature-store works with one process only; remove it or --processes")
    if processes > 1 and ":" in device:
        raise ValueError(
            f"--processes gives each process a GPU of its own, but --device {device} names one: use --device cuda and "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    folder = ResultsFolder(out)
    judge_client = None
    if judge is not None:
        from florence_vl.evaluate.endpoint import JUDGE_KEY_VARIABLE, ChatEndpoint
        from florence_vl.evaluate.judge import Judge

        judge_client = Judge(ChatEndpoint(judge, judge_model, retries=retries, key_variable=JUDGE_KEY_VARIABLE))
    if processes > 1:
        _run_processes(processes, made, folder)
    else:
        answerer = answers()
        if feature_store is not None:
            _store_features(answerer, feature_store)
        try:
            open_results(folder, answerer, made, data)
            _run_here(answerer, made, folder)
        finally:
            answerer.close()
    replies = []
    if judge_client is not None:
        description = folder.description
        folder.write_description(description | {"judge": judge_client.identity})
        judgements = judge_answers(judge_client, folder, {name: b.metric for name, b in made.benchmarks.items()})
        replies = [line["reply"] for line in judgements.values() if line["verdict"] is None]
    scores = _report(out, paper_row, draws, made.questions)
    unjudged = sum(score.unjudged for score in scores.benchmarks.values()) if "judge" in scores.description else 0
    failed = folder.unanswered()
    lost = sum(map(len, failed.values()))
    if lost:
        first = next(iter(next(iter(failed.values())).values()))
        typer.echo(
            f"{lost} questions are unanswered, so these scores are incomplete. The first failure: {first}", err=True
        )
    if unjudged:
        reply = f" Its first reply without a verdict: {replies[0]}" if replies else ""
        typer.echo(
            f"{unjudged} answers have no verdict of the judge, so these scores are incomplete; the same command with "
            f"--judge asks it for them.{reply}",
            err=True,
        )
    if lost or unjudged:
        raise typer.Exit(1)


@app.command("list")
def list_command(suite: str | None = typer.Argument(None, help="Suite to list; all benchmarks by default.")) -> None:
    """List benchmarks with their data sets, metrics and the differences of the authors' protocol."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from florence_vl.evaluate.suites import benchmark_names, choose, suites

    table = Table(show_lines=True)
    for name in ("name", "paper's columns", "data", "metric", "judge", "tokens", "differences"):
        table.add_column(name)
    for benchmark in choose(suite or benchmark_names()):
        source = benchmark.source
        where = "/".join(part for part in (source.dataset, source.config, source.split) if part)
        cells = [benchmark.name, ", ".join(benchmark.columns), where, benchmark.metric, benchmark.judge]
        table.add_row(*map(Text, [*cells, str(benchmark.generation.max_new_tokens), benchmark.differences]))
    console = Console(highlight=False)
    console.print(table)
    for name, members in suites().items():
        console.print(Text(f"suite {name}: {', '.join(members)}"))


@app.command("report")
def report_command(
    folder: Path = typer.Argument(..., help="Results folder."), paper_row: str = _ROW, draws: int = _DRAWS
) -> None:
    """Score the answers in a results folder again and rewrite its reports."""
    from florence_vl.evaluate.runner import plan
    from florence_vl.evaluate.store import ResultsFolder
    from florence_vl.evaluate.suites import BENCHMARKS, benchmark_names, choose

    description = ResultsFolder(folder).description
    questions: Any = {}
    benchmark_names()
    known = [name for name in description.get("benchmarks", {}) if name in BENCHMARKS]
    data = description.get("data")
    if known and (data is None or Path(data).is_dir()):
        try:  # only for its pictures: a report does not need the benchmark's files
            questions = plan(choose(known), _loader(Path(data) if data else None)).questions
        except (FileNotFoundError, ValueError) as error:
            typer.echo(f"no pictures in the report: {error}", err=True)
    _report(folder, paper_row, draws, questions)


@app.command("compare")
def compare_command(
    first: Path = typer.Argument(..., help="Results folder."),
    second: Path = typer.Argument(..., help="Results folder of the run to compare it with."),
    draws: int = typer.Option(1000, "--draws", min=1, help="Bootstrap samples of the intervals."),
    json_file: Path | None = typer.Option(None, "--json", help="Also write the comparison to this file."),
) -> None:
    """Compare two runs question by question: difference, interval, significance, questions won and lost."""
    import json

    from florence_vl.evaluate.report import comparison_table
    from florence_vl.evaluate.scoring import compare_runs, score_folder
    from florence_vl.files import write_text

    one, other = (score_folder(folder, draws=0) for folder in (first, second))
    header, cells, values = comparison_table(one, compare_runs(one, other, draws=draws))
    print_table(f"{second} minus {first}", header, cells)
    if json_file is not None:
        write_text(json_file, json.dumps(values, indent=2) + "\n")


def _loader(data: Path | None) -> Any:
    from florence_vl.evaluate.suites import data_folder

    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"--data {data} is not a folder")
    return lambda benchmark: benchmark.questions(data_folder(benchmark, data))


def _is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _answerer(
    model: str, served: str | None, retries: int, device: str, dtype: str, batch_size: int, seed: int,
    resolution: dict[str, Any],
) -> Answerer:  # fmt: skip
    if _is_url(model):
        from florence_vl.evaluate.endpoint import ChatEndpoint, EndpointAnswerer

        return EndpointAnswerer(ChatEndpoint(model, served, retries=retries), batch_size)
    from florence_vl.evaluate.local import load_answerer

    return load_answerer(model, device, dtype, batch_size, seed=seed, resolution=resolution)


def _store_features(answerer: Answerer, folder: Path) -> None:
    from florence_vl.model.features import store_features
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

    model = getattr(answerer, "model", None)
    if not isinstance(model, FlorenceVLForConditionalGeneration):
        raise ValueError("--feature-store needs a local Florence-VL; remove it")
    store_features(model, folder)


def _progress(total: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


class _LogLine:
    """Progress without a terminal: a line with the remaining time, at most every 30 seconds."""

    def __init__(self, total: int, every: float = 30.0) -> None:
        import time

        self.total, self.every, self.clock = total, every, time.monotonic
        self.started = self.last = self.clock()
        self.done = self.before = 0

    def __call__(self, count: int) -> None:
        now = self.clock()
        self.done += count
        if self.done == count and now - self.started < 1:
            self.before = count  # answered by an earlier run, so not part of the speed
        if now - self.last < self.every or self.done <= self.before:
            return
        self.last = now
        left = (self.total - self.done) * (now - self.started) / (self.done - self.before)
        typer.echo(f"{self.done} of {self.total} questions, {left / 60:.0f} min left", err=True)


def _run_here(answerer: Answerer, made: EvaluationPlan, folder: ResultsFolder) -> None:
    from florence_vl.evaluate.runner import run

    with _progress(made.total) as progress:
        task = progress.add_task("questions", total=made.total)
        tell = _LogLine(made.total) if progress.disable else None

        def advance(count: int) -> None:
            progress.advance(task, count)
            if tell is not None:
                tell(count)

        folder.write_unanswered(run(answerer, made, folder, advance))


def _run_shard(which: str, answers: Callable[[], Answerer], made: EvaluationPlan, out: Path, data: Path | None) -> None:
    from florence_vl.evaluate.runner import open_results, run, shard
    from florence_vl.evaluate.store import ResultsFolder

    rank, processes = map(int, which.split("/"))
    folder = ResultsFolder(out, rank)
    answerer = answers()
    try:
        open_results(folder, answerer, made, data)
        folder.write_unanswered(run(answerer, shard(made, rank, processes), folder))
    finally:
        answerer.close()


def _run_processes(processes: int, made: EvaluationPlan, folder: ResultsFolder) -> None:
    """Start this command once per process with its shard, and show the common progress."""
    import os
    import subprocess
    import sys
    import time

    import torch

    devices = list(map(str, range(torch.cuda.device_count())))
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        devices = visible.split(",")[: len(devices)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    children: list[subprocess.Popen[bytes]] = []
    try:
        with _progress(made.total) as progress:
            task = progress.add_task("questions", total=made.total)
            while len(children) < processes or any(child.poll() is None for child in children):
                opened = not children or (folder.path / "run.json").is_file()
                if len(children) < processes and opened:  # the first process opens the folder, or reports an error
                    rank = len(children)
                    command = [sys.executable, "-m", "florence_vl", *sys.argv[1:], "--shard", f"{rank}/{processes}"]
                    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
                    if devices:
                        environment["CUDA_VISIBLE_DEVICES"] = devices[rank % len(devices)]
                    children.append(subprocess.Popen(command, env=environment))
                elif any(child.poll() for child in children):
                    break
                time.sleep(0.2)
                progress.update(task, completed=folder.count_answers())
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if any(codes):
        raise RuntimeError(
            f"process {next(i for i, code in enumerate(codes) if code)} of {processes} failed; see above"
        )


def _report(folder: Path, paper_row: str, draws: int, questions: Any) -> Scores:
    from rich.console import Console

    from florence_vl.evaluate.report import as_terminal, write_reports
    from florence_vl.evaluate.scoring import score_folder

    scores = score_folder(folder, draws)
    files = write_reports(scores, paper_row or None, questions)
    Console(highlight=False).print(as_terminal(scores, paper_row or None))
    typer.echo(f"reports: {', '.join(map(str, files))}")
    return scores
