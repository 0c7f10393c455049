"""`florence-vl mini`: data, pretraining and evaluation of the small models that run offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from florence_vl.cli.common import is_given

epilog = """[bold]Examples[/bold]

  florence-vl mini data --out runs/mini-data --samples 5000 --split train

  florence-vl mini data --set captions --set regions --set questions

  florence-vl mini data --out runs/captions --task detailed_caption --format parquet

  florence-vl mini train

  florence-vl mini train my-florence2.yaml steps=20000 precision=float32

  florence-vl mini try --out runs/mini-try

  florence-vl mini suite mini_drawings --size 320x192 --out data/drawings-320x192

  florence-vl mini eval runs/mini-florence2/model --out runs/mini-florence2/scores.json

  florence-vl mini release runs/mini-florence2 --out runs/mini/florence2

  florence-vl mini pack runs/mini/finetune/model --vision runs/mini/florence2 --out runs/mini/florence-vl"""

app = typer.Typer(
    no_args_is_help=True,
    help="Data, pretraining and evaluation of the small Florence-2 that runs offline.",
    epilog=epilog,
    rich_markup_mode="rich",
)

OutOption = Annotated[Path, typer.Option(help="Folder to write to.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the pictures.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]


@app.command("data")
def data(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; with --set, data/mini/NAME by default.")] = None,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="Named set of the mini recipes: captions, regions, questions, ...; repeatable."),
    ] = None,
    format: Annotated[str, typer.Option(help="llava, parquet or webdataset.")] = "llava",
    samples: Annotated[int, typer.Option(min=1, help="Number of records; of a set, its own by default.")] = 1000,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="vqa (default), caption, detailed_caption, ocr, od, ..., or a group of questions; repeatable."
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=64, help="Side of the pictures in pixels.")] = 256,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a data set that this command wrote earlier.")] = False,
) -> None:
    """Write pictures composed of real sprites, with questions or captions, as a data set."""
    from florence_vl_mini.datasets.sets import scene_set
    from florence_vl_mini.datasets.writers import write
    from florence_vl_mini.scenes import SceneGenerator

    if set_:
        decided = ("format", "split", "task", "size", "seed")
        given = [name for name in decided if is_given(context, name)]
        if given:
            raise typer.BadParameter(f"a set defines these options: remove --{', --'.join(given)}")
        if out is not None and len(set_) > 1:
            raise typer.BadParameter("--out requires a single --set")
        number = samples if is_given(context, "samples") else None
        for name, wanted in [(name, scene_set(name, number)) for name in set_]:
            path = wanted.write(out or Path("data/mini") / name, overwrite)
            typer.echo(f"{wanted.samples} records in {path}")
        return
    if out is None:
        raise typer.BadParameter("give --out, the folder to write to, or --set")
    path = write(out, SceneGenerator(seed, split, size), samples, format, task or ["vqa"], overwrite)
    typer.echo(f"{samples} records in {path}")


@app.command("assets")
def assets(
    sources: Annotated[Optional[Path], typer.Option(help="Folder for the archives; the cache by default.")] = None,  # noqa: UP045
    out: Annotated[Path | None, typer.Option(help="Data folder to write; the installed package's by default.")] = None,
) -> None:
    """Rebuild florence-vl-mini's pictures, fonts and words from npm, Debian and PyPI archives."""
    import florence_vl_mini
    from florence_vl.files import cache_dir
    from florence_vl_mini.assets.build import build

    archives = sources or cache_dir() / "mini-sources"
    counts = build(archives, out or florence_vl_mini.DATA)
    typer.echo(", ".join(f"{n} {name}" for name, n in counts.items()))


@app.command("build")
def build(out: OutOption, seed: SeedOption = 0, size: Annotated[int, typer.Option(help="Pixels.")] = 256) -> None:
    """Write an untrained mini Florence-2 with tokenizer and processor."""
    from florence_vl_mini.pretrain.model import build_mini_florence2

    typer.echo(str(build_mini_florence2(out, seed, size)))


@app.command("train")
def pretrain(
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[RECIPE] [key=value ...]",
            help="YAML file of the run and overrides; without a YAML file, that of version 1 of the included weights.",
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Pretrain the mini Florence-2, or continue; Ctrl-C saves."""
    from florence_vl_mini.pretrain.config import RECIPE, read_recipe
    from florence_vl_mini.pretrain.train import train

    given = settings or []
    recipe, overrides = (RECIPE, given) if not given or "=" in given[0] else (Path(given[0]), given[1:])
    typer.echo(str(train(read_recipe(recipe, overrides), device)))


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a Florence-2, e.g. of `florence-vl mini train`.")],
    out: Annotated[Optional[Path], typer.Option(help="JSON file for all figures.")] = None,  # noqa: UP045
    scenes: Annotated[int, typer.Option(min=20, help="Held-out pictures per task.")] = 300,
    probe: Annotated[bool, typer.Option(help="Also probe the information in each prompt's features.")] = True,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Score captioning, reading and detection on held-out pictures against chance, and probe each prompt's features."""
    import json

    from florence_vl.files import write_text
    from florence_vl_mini.pretrain.evaluate import evaluate_florence2, to_markdown
    from florence_vl_mini.pretrain.probes import probe_prompts

    report = evaluate_florence2(model, scenes, seed, device)
    if probe:
        report["probe"] = probe_prompts(model, device=device)
    if out is not None:
        write_text(out, json.dumps(report, indent=1) + "\n")
    typer.echo(to_markdown(report))


@app.command("release")
def release(
    run: Annotated[Path, typer.Argument(help="Folder of a `florence-vl mini train` run.")],
    out: Annotated[Path, typer.Option(help="Folder for weights (float16), tokenizer, processor and card.")],
    note: Annotated[str, typer.Option(help="Remarks for the card, e.g. the hardware.")] = "",
    scenes: Annotated[int, typer.Option(min=20, help="Held-out pictures per task.")] = 300,
    pictures: Annotated[int, typer.Option(min=40, help="Pictures per seed of the probe.")] = 1200,
    device: DeviceOption = "auto",
) -> None:
    """Export a run in float16, score it and write its model card; replaces the output of an earlier call."""
    import torch

    from florence_vl.files import atomic_folder
    from florence_vl_mini.card import publish
    from florence_vl_mini.pretrain.card import facts, model_card
    from florence_vl_mini.pretrain.evaluate import evaluate_florence2
    from florence_vl_mini.pretrain.probes import probe_prompts
    from florence_vl_mini.pretrain.runner import Florence2Runner
    from florence_vl_mini.pretrain.train import export

    known = facts(run)
    with atomic_folder(out, overwrite=True, sources=[run]) as partial:
        export(run, partial, torch.float16)
        report = evaluate_florence2(partial, scenes, device=device)
        report["probe"] = probe_prompts(partial, pictures, device=device)
        parameters = Florence2Runner(partial, device).model.num_parameters() / 1e6
        typer.echo(publish(partial, report, model_card(report, known, parameters, note)))


@app.command("suite")
def suite(
    out: Annotated[Path, typer.Option(help="Folder for the suite's parquet files, for `evaluate --data`.")],
    name: Annotated[str, typer.Argument(help="mini, mini_tables or mini_drawings.")] = "mini",
    size: Annotated[str, typer.Option(help="Pixels of the pictures: a side, or WIDTHxHEIGHT.")] = "256",
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that this command wrote earlier.")] = False,
) -> None:
    """Write a mini suite with pictures of another size, to compare resolutions on the same questions."""
    from florence_vl.files import atomic_folder
    from florence_vl_mini.suite import write_suite

    sides = [int(side) if side.isdecimal() else 0 for side in size.split("x")]
    if len(sides) > 2 or min(sides) < 64:
        raise ValueError(f"--size is {size!r}; expected a side or WIDTHxHEIGHT of at least 64 pixels, e.g. 320x192")
    with atomic_folder(out, overwrite=overwrite) as partial:
        write_suite(partial, name, (sides[0], sides[-1]))
    typer.echo(str(out))


@app.command("start")
def start(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    vision: Annotated[str, typer.Option(help="The mini Florence-2 to use: a folder, or `mini`.")] = "mini",
    adapter: Annotated[Path | None, typer.Option(help="adapter.safetensors of `mini pack`; the included one.")] = None,
) -> None:
    """Apply an adapter to another mini Florence-2: the model from which the recipe mini/newcomers continues."""
    import florence_vl_mini
    from florence_vl.files import atomic_folder
    from florence_vl.model.packaged import resolve
    from florence_vl_mini.models import mini_with_adapter

    file = adapter or florence_vl_mini.florence_vl_path()
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {file}: pass the adapter.safetensors that `mini pack` wrote")
    model, processor = mini_with_adapter(Path(resolve(vision, "vision")), file)
    with atomic_folder(out) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    typer.echo(str(out))


@app.command("pack")
def pack(
    model: Annotated[Path, typer.Argument(help="Folder of the trained mini Florence-VL.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the scores and the card.")],
    vision: Annotated[str, typer.Option(help="The Florence-2 of the model: a folder, or `mini`.")] = "mini",
    rank: Annotated[
        int, typer.Option(min=1, help="Mean rank of the LLM's change; the card states the omitted part.")
    ] = 16,
    training: Annotated[str, typer.Option(help="Description of the training, for the card.")] = "See `recipes/mini`.",
    note: Annotated[str, typer.Option(help="Closing remark of the card.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Approximate questions per group; all by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Export the trained changes and score the model with and without pictures; replaces an earlier call's folder.

    The router in the model's folder, if there is one, is copied.
    """
    import json
    from dataclasses import asdict

    from safetensors.torch import save_file

    from florence_vl.evaluate.controls import score_controls
    from florence_vl.evaluate.sample import read_sample
    from florence_vl.files import atomic_folder
    from florence_vl.model.adapter import apply_adapter, extract_adapter
    from florence_vl.model.loading import load_model
    from florence_vl.model.packaged import resolve
    from florence_vl.model.router import copy_routers
    from florence_vl_mini.card import model_card, publish
    from florence_vl_mini.models import mini_base

    trained, _ = load_model(model, device, "float32")
    tower = Path(resolve(vision, "vision"))
    built, processor = mini_base(tower, trained.config.views)
    built.to(trained.device).eval()
    adapter, lost = extract_adapter(trained, built, rank)
    llm, _ = mini_base(tower)
    apply_adapter(built, adapter)  # scores the published weights
    whole = read_sample("mini", 10**9)
    sample = read_sample("mini", limit) if limit else whole
    scores = score_controls(
        built,
        processor,
        sample,
        llm.to(built.device).eval(),
        say=typer.echo,
        whole={benchmark.name: questions for benchmark, questions in whole},
    )
    plain = {name: {condition: asdict(score) for condition, score in rows.items()} for name, rows in scores.items()}
    sizes = {part: sum(p.numel() for _, p in built.part_parameters(part)) / 1e6 for part in ("tower", "projector")}
    card = model_card(
        scores,
        **sizes,
        features=", ".join(built.config.features or ()),
        rank=rank,
        lost=lost,
        training=training,
        questions=sum(len(questions) for _, questions in sample),
        note=note,
    )
    with atomic_folder(out, overwrite=True, sources=[model]) as partial:
        save_file(adapter, partial / "adapter.safetensors", {"views": json.dumps(trained.config.views)})
        copy_routers(model, partial)
        typer.echo(publish(partial, plain, card))


@app.command("try")
def try_(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A saved Florence-VL; `mini` is the included model.")
    ] = "mini",
    out: Annotated[Optional[Path], typer.Option(help="Folder for the pictures and answers.json.")] = None,  # noqa: UP045
    device: DeviceOption = "auto",
) -> None:
    """Ask a model about twenty pictures that a new user might draw, and count the correct answers."""
    import json

    from florence_vl.files import atomic_folder, check_destination
    from florence_vl.model.loading import load_model
    from florence_vl.serve.session import ChatSession
    from florence_vl_mini.tryout import run, table

    if out is not None:
        check_destination(out, overwrite=True)
    outcomes = run(ChatSession(*load_model(model, device)))
    typer.echo(table(outcomes))
    if out is not None:
        with atomic_folder(out, overwrite=True) as partial:
            rows = []
            for number, o in enumerate(outcomes):
                name = f"{number:02d}.png"
                o.trial.draw().save(partial / name)
                row = {"picture": name, "question": o.trial.question, "expected": o.trial.answers}
                rows.append({**row, "answer": o.answer, "right": o.right})
            (partial / "answers.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@app.command("lmms-tasks")
def lmms_tasks(folder: Annotated[Path, typer.Argument(help="Folder to write.")]) -> None:
    """Write the mini suite as lmms-eval tasks (YAML over parquet), for its `--include_path`."""
    from florence_vl_mini.lmms_tasks import write_tasks

    names = write_tasks(folder)
    typer.echo(
        f"lmms-eval --include_path {folder} --tasks {','.join(names)} --model florence_vl --model_args pretrained=..."
    )
