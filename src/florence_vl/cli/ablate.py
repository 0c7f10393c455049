"""`florence-vl ablate`: the rows of the paper's ablation tables, trained, scored and compared."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import typer

epilog = """[bold]Examples[/bold]

  florence-vl ablate --table 5 --scale mini

  florence-vl ablate --table 1 --scale mini --rows token --rows channel --seeds 2

  florence-vl ablate --table 1 --scale llava15 --data data --launcher "torchrun --nproc-per-node 8 -m florence_vl"
"""


def command(
    table: int = typer.Option(..., "--table", help="1 (fusion), 4 (depth), 5 (breadth) or 6 (breadth by group)."),
    scale: str = typer.Option("mini", "--scale", help="mini (two CPU cores) or llava15 (the paper's setting)."),
    rows: list[str] = typer.Option(None, "--rows", help="Only these rows; repeat, or separate with commas."),
    seeds: int = typer.Option(3, "--seeds", help="Seeds of each row; intervals are over them."),
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
    limit: int | None = typer.Option(None, "--limit", min=1, help="About so many questions of each benchmark."),
    launcher: str = typer.Option("python -m florence_vl", "--launcher", help="What starts training, e.g. torchrun ..."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the commands, run nothing."),
    report: bool = typer.Option(False, "--report", help="Train nothing; print the table of what is there."),
) -> None:
    """Train and score the rows of one of the paper's ablation tables; stopped at any time, it goes on where it was."""
    from florence_vl.analyze.ablation import (
        STAGES,
        AblationConfig,
        Stopped,
        build_table,
        execute,
        plan,
        read_scores,
        table_of,
    )
    from florence_vl.analyze.plots import write_atomically
    from florence_vl.cli.analyze import called, print_table, say

    chosen = table_of(table)
    names = [name.strip() for word in rows for name in word.split(",")] if rows else None
    picked = chosen.choose(names)
    config = AblationConfig(
        scale=scale,
        out=out,
        seeds=seeds,
        share_pretraining=share_pretraining,
        overrides=tuple(set_ or ()),
        data=data,
        limit=limit,
        launcher=tuple(shlex.split(launcher)),
    )
    if not report:
        steps = plan(chosen, picked, config)
        if dry_run:
            for step in steps:
                words = (*config.launcher, *step.command) if step.kind in STAGES else ("florence-vl", *step.command)
                typer.echo(("# done: " if step.done else "") + shlex.join(words))
            return
        try:
            execute(steps, config, say)
        except Stopped as stopped:
            print(f"florence-vl: {stopped}", file=sys.stderr)
            raise typer.Exit(75) from None
    made = build_table(chosen, read_scores(chosen, config), scale)
    record = {"type": "ablation", "command": called(), "table": made}
    path = write_atomically(out / scale / f"table{table}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for part in made["parts"]:
        print_table(f"Table {table}: {part['title']} ({scale})", part["header"], [row["cells"] for row in part["rows"]])
    for note in made["notes"]:
        typer.echo(note)
    say(f"wrote {path}")
