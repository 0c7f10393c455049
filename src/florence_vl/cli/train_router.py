"""`florence-vl train-router`: train a router that chooses the view from the question and a thumbnail."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from florence_vl.cli.common import DEVICE, DTYPE

epilog = """[bold]Examples[/bold]

  florence-vl train-router runs/views/model data/mini/questions/data.jsonl

  florence-vl train-router runs/views/model questions.jsonl --seeds 3 --dtype bfloat16

  florence-vl train-router runs/views/model questions.jsonl --records 2000 --thumbnail glance --out runs/router"""


def command(
    model: str = typer.Argument(..., help="Folder of a Florence-VL with views."),
    data: str = typer.Argument(..., help="Questions about one picture each, in any supported data format."),
    out: Optional[Path] = typer.Option(None, "--out", help="Folder for the router; the model's own by default."),  # noqa: UP045
    records: int = typer.Option(1000, "--records", min=20, help="Records to use; a fifth of them is held out."),
    thumbnail: str | None = typer.Option(
        None, "--thumbnail", help="View that the router reads; the cheapest by default."
    ),
    image_root: Optional[Path] = typer.Option(None, "--image-root", help="Folder or archive of the pictures."),  # noqa: UP045
    seed: int = typer.Option(0, "--seed", help="Seed of the router's initial weights."),
    seeds: int = typer.Option(
        1, "--seeds", min=1, help="Number of routers, with seeds from --seed on; `analyze bill` averages over them."
    ),
    device: str = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Measure the loss of the correct answers under each view, and fit the router to it.

    Prints the results on held-out questions, next to shuffled questions and a random choice at the same cost.
    """
    import json
    from itertools import islice

    from rich.progress import Progress

    from florence_vl.data.readers import open_reader
    from florence_vl.files import write_text
    from florence_vl.model.loading import load_model
    from florence_vl.model.router import save_routers
    from florence_vl.train import router as training

    loaded, processor = load_model(model, device, dtype)
    reader = open_reader(data, **({"image_root": str(image_root)} if image_root else {}))
    with Progress(transient=True) as bar:
        task = bar.add_task("losses under each view", total=min(records, len(reader)))
        found = training.collect(
            loaded,
            processor,
            (reader[i] for i in islice(range(len(reader)), records)),
            thumbnail,
            lambda done: bar.update(task, completed=done),
        )
    count = len(found.losses_BW)
    if count < 10:
        raise ValueError(f"{count} of {records} records are usable, at least 10 are needed; bad: {found.bad}")
    held = count // 5
    train, test = _split(found, slice(0, count - held)), _split(found, slice(count - held, count))
    thumbnail = thumbnail or min(found.costs, key=found.costs.__getitem__)
    routers = [training.fit_router(train, thumbnail, seed=seed + number) for number in range(seeds)]
    fitted = routers[0]
    folder = out or Path(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_routers(folder, routers)
    rows = training.curve(fitted, test, (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
    fixed = {
        name: {"cost": test.costs[name], "loss": float(test.losses_BW[:, index].mean())}
        for index, name in enumerate(fitted.views)
    }
    report = {"questions": held, "bad": found.bad, "fixed": fixed, "routed": rows}
    write_text(folder / "router_report.json", json.dumps(report, indent=1) + "\n")
    typer.echo(f"{held} held-out questions; cost is FLOPs of tower and prefill relative to the full view")
    for name, row in fixed.items():
        typer.echo(f"  always {name}: cost {row['cost']:.2f}, loss {row['loss']:.3f}")
    for row in rows:
        typer.echo(
            f"  trade {row['trade']:g}: cost {row['cost']:.2f}, loss {row['loss']:.3f}"
            f" (shuffled questions {row['shuffled']:.3f}, random {row['random']:.3f})"
        )
    typer.echo(f"router: {folder}")


def _split(data, rows):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(
        data, questions_BH=data.questions_BH[rows], images_BD=data.images_BD[rows], losses_BW=data.losses_BW[rows]
    )
