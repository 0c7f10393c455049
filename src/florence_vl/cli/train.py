"""`florence-vl train`: train from a recipe, in one process or in all that torchrun starts."""

from __future__ import annotations

import sys
from typing import Any

import typer

from florence_vl.registry import did_you_mean

STOPPED = 75  # EX_TEMPFAIL of sysexits: stopped by a signal with everything saved; resume with --resume auto

epilog = """[bold]Examples[/bold]

  florence-vl train mini/pretrain

  florence-vl train mini/finetune steps=200 parts.llm.lr=1e-5 output=runs/try

  florence-vl train llava15/vicuna-7b-finetune --resume auto

  torchrun --nproc-per-node 8 -m florence_vl train paper/8b-finetune --resume auto

  florence-vl train paper/8b-finetune-fast --dry-run --world 64"""


def command(
    recipe: str = typer.Argument(..., help="Name (florence-vl recipes list) or path of a recipe."),
    overrides: list[str] = typer.Argument(None, help="Overrides, key.path=value.", show_default=False),
    resume: str = typer.Option(
        "never", "--resume", help="'auto' resumes from the newest checkpoint, if any; or a checkpoint's path."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Play the first steps of every process without weights; exit 1 if the run would fail."
    ),
    world: int = typer.Option(None, "--world", min=1, help="Dry run: number of processes, 1 by default."),
    first_steps: int = typer.Option(None, "--first-steps", min=1, help="Dry run: steps to play, 2 by default."),
    nproc_per_node: int = typer.Option(
        None, "--nproc-per-node", min=1, help="Dry run: processes of a node, 8 by default."
    ),
    device: str = typer.Option(
        None, "--device", help="Dry run: device of florence-vl plan; h100-80gb by default, cpu if the recipe names it."
    ),
    as_json: bool = typer.Option(False, "--json", help="Dry run: print JSON."),
) -> None:
    """Train from a recipe. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit with code 75."""
    _check_overrides(overrides or [])
    settings = {"world_size": world, "steps": first_steps, "processes_per_node": nproc_per_node, "device": device}
    given = {key: value for key, value in settings.items() if value is not None}
    if dry_run:
        if resume != "never":
            raise ValueError("--dry-run plays a run's first steps; it doesn't go with --resume")
        _dry_run(recipe, overrides or [], given, as_json)
        return
    if given or as_json:
        raise ValueError("--world, --first-steps, --nproc-per-node, --device and --json are for --dry-run")
    from florence_vl.evaluate.sample import suite_scorer
    from florence_vl.train.checkpoint import CheckpointError
    from florence_vl.train.guards import TrainingError
    from florence_vl.train.loop import train

    try:
        result = train(recipe, resume=resume, overrides=overrides or [], suite_reader=suite_scorer)
    except (TrainingError, CheckpointError) as error:
        print(f"florence-vl: stopped: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not result.is_main:
        raise typer.Exit(0 if result.finished else STOPPED)
    if result.bad_records:
        skipped = ", ".join(f"{number} x {name}" for name, number in sorted(result.bad_records.items()))
        typer.echo(f"skipped bad records: {skipped} (see {result.run_dir}/bad_records*.jsonl)", err=True)
    if not result.finished:
        typer.echo(f"saved step {result.steps} in {result.run_dir}; resume with: --resume auto")
        raise typer.Exit(STOPPED)
    typer.echo(f"{result.steps} steps done, loss {result.metrics['loss']:.4f}: {result.run_dir}")
    if result.exported is not None:
        typer.echo(f"model: {result.exported}")


def _dry_run(name: str, overrides: list[str], settings: dict[str, Any], as_json: bool) -> None:
    import json

    from florence_vl.cli.dry_run import show
    from florence_vl.train.dry_run import dry_run
    from florence_vl.train.recipes import load_recipe

    loaded = load_recipe(name, overrides)
    settings.setdefault("device", "cpu" if loaded.device == "cpu" else "h100-80gb")
    found = dry_run(loaded, **settings)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        show(found, loaded.name, settings["device"])
    for problem in found.problems:
        print(f"florence-vl: {problem}", file=sys.stderr)
    if found.problems:
        raise typer.Exit(1)


def _check_overrides(overrides: list[str]) -> None:
    for override in overrides:
        if "=" not in override:
            near = did_you_mean(override.lstrip("-"), ["--resume"]) if override.startswith("-") else ""
            raise ValueError(f"{override!r} is not of the form key.path=value. {near}".strip())
