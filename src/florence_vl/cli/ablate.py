"""`florence-vl ablate`: train, score and compare the rows of the paper's ablation tables."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import typer

epilog = """[bold]Examples[/bold]

  florence-vl ablate --scale mini

  florence-vl ablate --table 5 --scale mini --start mini --seeds 2

  florence-vl ablate --table 1 --scale mini --rows token --rows channel --dry-run

  florence-vl ablate --table 1 --scale llava15 --data data --launcher "torchrun --nproc-per-node 8 -m florence_vl"
"""


def command(
    tables: list[int] = typer.Option(
        None, "--table", help="1 (fusion), 4 (depth), 5 (breadth) or 6 (breadth by group); repeat. All by default."
    ),
    scale: str = typer.Option("mini", "--scale", help="mini (two CPU cores) or llava15 (the paper's setting)."),
    start: str | None = typer.Option(
        None, "--start", help="LLM that rows start from: smollm2 (has seen no image; the default), or mini."
    ),
    rows: list[str] = typer.Option(None, "--rows", help="Only these rows of the one table; repeat."),
    seeds: int = typer.Option(8, "--seeds", help="Seeds of each row."),
    out: Path = typer.Option(Path("runs/ablations"), "--out", help="Folder of all runs; tables share it."),
    share_pretraining: bool = typer.Option(
        False,
        "--share-pretraining",
        help="All seeds finetune from seed 0's first stage; the interval is then narrower.",
    ),
    set_: list[str] = typer.Option(
        None, "--set", help="key.path=value for the recipes; pretrain:... or finetune:... for one stage. Repeat."
    ),
    data: Path | None = typer.Option(None, "--data", help="Folder with the benchmarks' files (llava15)."),
    suite: str | None = typer.Option(None, "--suite", help="Benchmarks instead of the scale's own."),
    limit: int | None = typer.Option(None, "--limit", min=1, help="Approximate number of questions per benchmark."),
    judge: str | None = typer.Option(
        None, "--judge", help="URL of a judge, as of evaluate (llava15); without it MM-Vet and LLaVA-W are left out."
    ),
    judge_model: str | None = typer.Option(
        None, "--judge-model", help="Model of the judge, if its server has several."
    ),
    launcher: str = typer.Option(
        "python -m florence_vl", "--launcher", help="Command that starts training, e.g. torchrun ..."
    ),
    jobs: int | None = typer.Option(
        None, "--jobs", help="Commands that run in parallel and share the cores; at mini scale one per core."
    ),
    dtype: str = typer.Option(
        "auto", "--dtype", help="Mini scale: float32 or bfloat16; auto measures which is faster here."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print the commands and what remains to be done; run nothing."
    ),
    report: bool = typer.Option(False, "--report", help="Print the tables of the existing results; train nothing."),
) -> None:
    """Train and score the rows of the paper's ablation tables; an interrupted run resumes."""
    import os

    from florence_vl.analyze.ablation import STAGES, AblationConfig, load_tables, plan, table_of
    from florence_vl.analyze.ablation_report import build_table, read_scores
    from florence_vl.analyze.ablation_run import Stopped, describe_remaining, execute, unfinished
    from florence_vl.cli.common import called, print_table, refuse, say
    from florence_vl.files import write_text
    from florence_vl.model.loading import choose_device
    from florence_vl.model.precision import bf16_is_faster
    from florence_vl.registry import did_you_mean

    refuse({"--judge-model": judge_model and judge is None}, "needs --judge, the URL of the judge's server")
    chosen = [table_of(number) for number in tables or load_tables()]
    if rows and len(chosen) != 1:
        raise ValueError("--rows needs --table, as rows belong to one table")
    names = [name for word in rows for name in _names(word, [row.name for row in chosen[0].rows])] if rows else None
    dtypes = ("auto", "float32", "bfloat16")
    if dtype not in dtypes:
        raise ValueError(f"unknown --dtype {dtype!r}. {did_you_mean(dtype, dtypes)}")
    if dtype == "auto":
        dtype = "bfloat16" if bf16_is_faster(choose_device()) else "float32"
    config = AblationConfig(
        scale=scale,
        out=out,
        start=start,
        seeds=seeds,
        share_pretraining=share_pretraining,
        overrides=tuple(set_ or ()),
        data=data,
        suite=suite,
        limit=limit,
        judge=judge,
        judge_model=judge_model,
        launcher=tuple(shlex.split(launcher)),
        jobs=jobs if jobs is not None else (os.cpu_count() or 1) if scale == "mini" else 1,
        dtype=dtype,
    )
    if not report:
        for seed in range(seeds):
            if (begun := config.of_seed(seed).dtype) != dtype:
                say(f"seed {seed} was begun in {begun} and continues in it")
        steps = plan([row for table in chosen for row in table.choose(names)], config)
        if dry_run:
            todo = unfinished(steps)
            for step in steps:
                words = (*config.launcher, *step.command) if step.kind in STAGES else ("florence-vl", *step.command)
                if step in todo or step.done:  # else it is data that no step needs
                    typer.echo(("" if step in todo else "# done: ") + shlex.join(words))
            say(describe_remaining(steps, config.jobs))
            return
        try:
            execute(steps, config, say)
        except Stopped as stopped:
            print(f"florence-vl: {stopped}", file=sys.stderr)
            raise typer.Exit(75) from None
    for table in chosen:
        made = build_table(table, read_scores(table, config), config)
        record = {"type": "ablation", "command": called(), "table": made}
        path = config.root / f"table{table.number}.json"
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        for part in made["parts"]:
            title = f"Table {table.number}: {part['title']} ({scale})"
            print_table(title, part["header"], [row["cells"] for row in part["rows"]])
        for note in made["notes"]:
            typer.echo(note)
        say(f"wrote {path}")


def _names(word: str, known: list[str]) -> list[str]:
    """Row names in one value; a name may itself contain commas."""
    return [word] if word in known else [name.strip() for name in word.split(",")]
