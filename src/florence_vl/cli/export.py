"""`florence-vl export`: write a run's checkpoint as a folder that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

import typer

epilog = """[bold]Examples[/bold]

  florence-vl export runs/mini-finetune

  florence-vl export runs/8b/checkpoints/step-00005000 --out models/8b-5000 --dtype bf16"""


def command(
    run: Path = typer.Argument(..., help="Folder of a run (its newest checkpoint), or one of its checkpoints."),
    out: Path = typer.Option(None, "--out", help="Folder to write; RUN/model by default.", show_default=False),
    dtype: str = typer.Option(None, "--dtype", help="fp32, bf16 or fp16; the checkpoint's by default.", metavar="TYPE"),
    overwrite: bool = typer.Option(False, "--overwrite", "--force", help="Replace the model in --out."),
) -> None:
    """Write a training checkpoint as a model folder: gathered weights, merged LoRA, and the processor."""
    from florence_vl.train.export import export_run

    folder, step = export_run(run, out, dtype, overwrite)
    typer.echo(f"step {step}: {folder}")
