"""`florence-vl analyze`: alignment loss, PCA visualizations, attribution, headroom, cost, and a report of all."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from florence_vl.cli.common import DEVICE, DTYPE, called, print_table, refuse, say
from florence_vl.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from florence_vl.analyze.encoders import EncoderSpec, VisionEncoder
    from florence_vl.analyze.options import Measurement
    from florence_vl.analyze.routed import RoutedChoice

app = typer.Typer(
    help="Alignment loss, PCA, attribution: compare encoders, features and fusions.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="""[bold]Examples[/bold]

  florence-vl analyze alignment --encoders dinov2_small_focus efficientnet_lite0 --data pairs.jsonl --out runs/alignment

  florence-vl analyze alignment --encoders florence2_mini --ablate --data pairs.jsonl --out runs/features

  florence-vl analyze pca photo.jpg --encoder florence2_mini dinov2_small_focus@448 --out runs/pca

  florence-vl analyze attribution --model runs/demo/model --image photo.jpg --question "What is shown?"

  florence-vl analyze headroom --model mini --suite mini --limit 100 --out runs/headroom

  florence-vl analyze bill --model mini --suite mini --size 128 256 --limit 100 --out runs/bill

  florence-vl analyze report runs""",
)


class SeveralValues(TyperCommand):
    """A command whose list options accept several values: `--encoders a b c` is the same as repeating the option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {o for p in self.params if getattr(p, "multiple", False) for o in p.opts}
        expanded: list[str] = []
        flag, fresh = None, False
        for word in args:
            if word.startswith("-") and len(word) > 1:
                flag, fresh = (word if word in several else None), True
            elif flag is not None and not fresh:
                expanded.append(flag)
            else:
                fresh = False
            expanded.append(word)
        return super().parse_args(ctx, expanded)


ENCODERS_HELP = (
    "name[=weights][:features]\\[@size], features joined by +; `florence-vl analyze encoders` lists the names."
)
_FIT = typer.Option("squash", "--fit", help="How an image is fitted to the encoder's square: squash, pad or crop.")


@app.command("encoders")
def encoders_command() -> None:
    """List the encoders and their requirements."""
    from florence_vl.analyze.encoders import ENCODERS

    width = max(map(len, ENCODERS.names()))
    for name in ENCODERS.names():
        typer.echo(f"{name:<{width}}  {(ENCODERS[name].__doc__ or '').splitlines()[0]}")


@app.command("alignment", cls=SeveralValues)
def alignment_command(
    encoders: list[str] = typer.Option(..., "--encoders", "-e", help=f"One or several: {ENCODERS_HELP}"),
    data: Path = typer.Option(..., "--data", help="Image-caption pairs: LLaVA JSON, parquet, WebDataset, a folder ..."),
    out: Path = typer.Option(..., "--out", help="Folder for curves (PNG, SVG), numbers (CSV, JSON) and tables."),
    llm: str = typer.Option("smollm2", "--llm", help="Folder or hub name of the LLM, or smollm2 (from its package)."),
    llm_dtype: str = typer.Option("float32", "--llm-dtype", help="float32, bfloat16 or float16."),
    image_root: Path | None = typer.Option(None, "--image-root", help="Base folder of relative image paths in DATA."),
    pairs: int | None = typer.Option(None, "--pairs", help="Number of pairs to use, chosen at random. All by default."),
    ablate: bool = typer.Option(
        False, "--ablate", help="Evaluate one encoder without each of its features, and with each alone."
    ),
    subsets: str = typer.Option("leave-one-out", "--subsets", help="With --ablate: leave-one-out, or all subsets."),
    projection: str = typer.Option("linear", "--projection", help="linear, or mlp (pools first, then projects)."),
    steps: int = typer.Option(300, "--steps", help="Optimizer steps."),
    batch_size: int | None = typer.Option(
        None, "--batch-size", help="Pairs in a batch. All up to 20,000, else 8,192, by default."
    ),
    learning_rate: float = typer.Option(3e-3, "--learning-rate", help="Adam's learning rate; cosine decay to 0."),
    temperature: float = typer.Option(1.0, "--temperature", help="Divides similarities; 1 is the paper's loss."),
    symmetric: bool = typer.Option(False, "--symmetric", help="Add the text-to-image direction."),
    center: bool = typer.Option(False, "--center", help="Subtract the mean text feature before normalizing."),
    heldout: float = typer.Option(0.2, "--heldout", help="Fraction of held-out pairs; half of them selects the step."),
    duplicates: str = typer.Option("share", "--duplicates", help="Same captions: share the target, or keep the first."),
    seeds: int = typer.Option(3, "--seeds", help="Number of seeds; intervals are over them."),
    width_control: str = typer.Option("pca", "--width-control", help="Equal width by pca, random, or none."),
    width: int | None = typer.Option(None, "--width", help="The equal width; the narrowest encoder's by default."),
    fit: str = _FIT,
    encode_batch: int = typer.Option(16, "--encode-batch", help="Images in one forward of an encoder."),
    dtype: str = typer.Option(
        "float32", "--dtype", help="Of the optimizer steps' products: float32 or bfloat16. Losses use float32."
    ),
    device: str = DEVICE,
) -> None:
    """Alignment loss of encoders, or of one encoder's features (paper section 4, Figures 4 and 5).

    Features are pooled once and cached; only the projection is trained. Losses are on held-out pairs.
    """
    from florence_vl.analyze.alignment import WIDTH_CONTROLS, AlignmentConfig
    from florence_vl.analyze.compare import collect, compare, feature_subsets
    from florence_vl.analyze.encoders import EncoderSpec, load_encoder
    from florence_vl.analyze.pairs import read_pairs
    from florence_vl.analyze.plots import table_rows, write_comparison
    from florence_vl.model.loading import choose_device

    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; give 1 or more")
    config = AlignmentConfig(
        projection=projection,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        temperature=temperature,
        symmetric=symmetric,
        center=center,
        heldout=heldout,
        duplicates=duplicates,
        dtype=dtype,
    )
    specs = [EncoderSpec.parse(text) for text in encoders]
    labels = unique_labels(specs)
    if ablate and len(specs) != 1:
        raise ValueError(f"--ablate needs one encoder with several features, got {len(specs)} encoders")
    if not ablate and subsets != "leave-one-out":
        raise ValueError("--subsets needs --ablate")
    if width_control not in (*WIDTH_CONTROLS, "none"):
        raise ValueError(f"unknown --width-control {width_control!r}; known: {', '.join(WIDTH_CONTROLS)}, none")
    if width is not None and width_control == "none":
        raise ValueError("--width is for --width-control pca or random; leave it out")
    where = choose_device(device)
    options: dict[str, Any] = {"image_root": image_root} if image_root else {}
    found = read_pairs(data, pairs, **options)
    say(f"{len(found)} pairs from {data}")

    def loader(spec: EncoderSpec) -> Callable[[], VisionEncoder]:
        return lambda: load_encoder(spec, fit)

    features = collect(
        [(label, loader(spec)) for label, spec in zip(labels, specs, strict=True)],
        load_llm(llm, where, llm_dtype),
        found,
        batch_size=encode_batch,
        device=where,
        log=say,
    )
    chosen = feature_subsets(list(features.dims[labels[0]]), subsets) if ablate else None
    comparison = compare(
        features,
        config,
        subsets=chosen,
        seeds=range(seeds),
        width=width,
        width_control=width_control,
        device=where,
        log=say,
    )
    files = write_comparison(comparison, out, command=called())
    print_notes(comparison.about, comparison.chance, comparison.floor)
    for title, rows in (("own width", comparison.rows), ("equal width", comparison.equal_width)):
        if rows:
            print_table(
                f"{rows[0].runs[0].heldout_pairs} held-out pairs, {title}", *table_rows(rows, comparison.reference)
            )
    say("wrote " + ", ".join(str(path) for path in files))


@app.command("pca", cls=SeveralValues)
def pca_command(
    images: list[Path] = typer.Argument(..., help="Image files, before --encoder.", metavar="IMAGES..."),
    encoder: list[str] = typer.Option(..., "--encoder", "-e", help=f"One or several: {ENCODERS_HELP}"),
    out: Path = typer.Option(Path("pca"), "--out", help="Folder for one sheet per image (PNG) and the arrays (NPZ)."),
    joint: bool = typer.Option(False, "--joint", help="One fit over all images, so that colors are comparable."),
    threshold: float | None = typer.Option(
        None, "--threshold", help="Foreground above this value of the first component in [0, 1]; Otsu's by default."
    ),
    flip: bool = typer.Option(False, "--flip", help="Use the other side of the first component as the foreground."),
    background: bool = typer.Option(True, "--cut-background/--keep-background", help="Cut the background."),
    refit: bool = typer.Option(True, "--refit/--no-refit", help="Fit the colors on the foreground only."),
    fit: str = _FIT,
    svg: bool = typer.Option(False, "--svg", help="Also write each sheet as SVG."),
    device: str = DEVICE,
) -> None:
    """First three principal components of the features as colors, one sheet per image (paper Figure 3)."""
    import numpy as np

    from florence_vl.analyze.encoders import EncoderSpec, load_encoder
    from florence_vl.analyze.pca import PCAConfig, encoder_maps, sheet
    from florence_vl.analyze.plots import save_figure
    from florence_vl.model.loading import choose_device
    from florence_vl.model.pictures import open_image

    if not background:
        cutting = {"--threshold": threshold is not None, "--no-refit": not refit}
        refuse(cutting, "not with --keep-background, which draws every token as foreground; leave them out")
    config = PCAConfig(joint=joint, background=background, threshold=threshold, flip=flip, refit=refit)
    if len({path.stem for path in images}) != len(images):
        raise ValueError("two images have the same name, so their sheets would overwrite each other; rename one")
    pictures = [open_image(path) for path in images]
    where = choose_device(device)
    columns: list[dict[str, Any]] = [{} for _ in images]
    specs = [EncoderSpec.parse(text) for text in encoder]
    for label, spec in zip(unique_labels(specs), specs, strict=True):
        loaded = load_encoder(spec, fit).to(where)
        prefix = label.replace(":" + "+".join(spec.features), "") if spec.features else label
        for feature, maps in encoder_maps(loaded, pictures, config).items():
            for column, pca in zip(columns, maps, strict=True):
                column[f"{prefix}:{feature}"] = (pca, loaded.preprocess)
        say(f"{spec}: done")
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"type": "pca", "command": called(), "settings": vars(config), "sheets": []}
    for path, picture, column in zip(images, pictures, columns, strict=True):
        save_figure(sheet(picture, column), out / f"{path.stem}_pca", ("png", "svg") if svg else ("png",))
        arrays = {
            f"{name}/{part}": getattr(pca, part)
            for name, (pca, _) in column.items()
            for part in ("rgb", "foreground", "first")
        }
        with (out / f"{path.stem}_pca.npz").open("wb") as file:
            np.savez_compressed(file, **arrays)
        record["sheets"].append(
            {
                "image": path.name,
                "file": f"{path.stem}_pca.png",
                "maps": {
                    name: {
                        "explained": pca.explained,
                        "threshold": pca.threshold,
                        "foreground": float(pca.foreground.mean()),
                    }
                    for name, (pca, _) in column.items()
                },
            }
        )
    write_text(out / "pca.json", json.dumps(record, indent=1) + "\n")
    say(f"wrote {len(images)} sheets to {out}")


@app.command("attribution")
def attribution_command(
    model: str = typer.Option(
        ..., "--model", "-m", help="Folder or hub id of a Florence-VL with two features or more, or `mini`."
    ),
    image: list[Path] = typer.Option(..., "--image", help="Image; repeat for several."),
    question: str = typer.Option(..., "--question", help="Question about the image."),
    answer: str | None = typer.Option(None, "--answer", help="The answer to score. The model's own by default."),
    out: Path = typer.Option(Path("attribution"), "--out", help="Folder for figures (PNG), maps (NPZ) and JSON."),
    replacement: str = typer.Option(
        "mean", "--replacement", help="What replaces a removed feature: its mean, or zero."
    ),
    device: str = DEVICE,
) -> None:
    """Contribution of each feature to an answer: norms through the projector, and removing each feature."""
    import numpy as np

    from florence_vl.analyze.attribution import attribute, attribution_figure
    from florence_vl.analyze.plots import save_figure
    from florence_vl.model.loading import load_model
    from florence_vl.model.pictures import open_image

    if len({path.stem for path in image}) != len(image):
        raise ValueError("two images have the same name, so their figures would overwrite each other; rename one")
    loaded, processor = load_model(model, device, "float32")
    _as_one_tile(loaded, processor)
    record: dict[str, Any] = {"type": "attribution", "command": called(), "results": []}
    for path in image:
        picture = open_image(path)
        result = attribute(loaded, processor, picture, question, answer, replacement=replacement)
        save_figure(attribution_figure(picture, result), out / f"{path.stem}_attribution", ("png",))
        with (out / f"{path.stem}_attribution.npz").open("wb") as file:
            maps: dict[str, Any] = {feature.name: feature.map_HW for feature in result.features}
            np.savez_compressed(file, **maps)
        record["results"].append({"image": path.name, "file": f"{path.stem}_attribution.png", **result.to_dict()})
        title = f"{path.name}: {question} -> {result.answer} ({result.log_likelihood:.2f} nats, {result.tokens} tokens)"
        header = ["feature", "norm", "share", "lost without it (nats)", "lost with it alone (nats)"]
        cells = [
            [f.name, f"{f.norm:.3f}", f"{f.share:.1%}", f"{f.drop:+.3f}", f"{f.drop_alone:+.3f}"]
            for f in result.features
        ]
        print_table(title, header, [*cells, ["(no image)", "", "", "", f"{result.without_image:+.3f}"]])
    write_text(out / "attribution.json", json.dumps(record, indent=1) + "\n")
    say(f"wrote {out}")


SUBSETS_HELP = "Subsets of the features: all, leave-one-out (and each alone), none; or views: the model's views."
OUT_HELP = "Folder for the figure (PNG, SVG) and the numbers (JSON)."
_MODEL = typer.Option(..., "--model", "-m", help="Folder or hub id of a trained Florence-VL, or `mini`.")
_SUITE = typer.Option(
    "mini",
    "--suite",
    "-s",
    help="Comma-separated suites and benchmarks whose questions have one picture and an answer in text.",
)
_SIZES = typer.Option(None, "--size", help="Pixels per side; accepts several values. The model's own by default.")
_LIMIT = typer.Option(None, "--limit", "-n", min=1, help="Approximate number of questions per benchmark.")
_DATA = typer.Option(None, "--data", "-d", help="Folder with the benchmarks' parquet files.")


@app.command("headroom", cls=SeveralValues)
def headroom_command(
    model: str = _MODEL,
    suite: str = _SUITE,
    out: Path = typer.Option(Path("headroom"), "--out", help=OUT_HELP),
    sizes: list[int] = _SIZES,
    subsets: str = typer.Option("all", "--subsets", help=SUBSETS_HELP),
    limit: int | None = _LIMIT,
    data: Path | None = _DATA,
    splits: int = typer.Option(20, "--splits", min=1, help="Number of random halves on which options are chosen."),
    seed: int = typer.Option(0, "--seed", help="Seed of the sample that --limit draws, and of the halves."),
    device: str = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Estimate the gain of choosing features and size per question, before training anything.

    For every subset of the features: the likelihood of the correct answer, and whether greedy decoding gives it.
    """
    from florence_vl.analyze.headroom import headroom
    from florence_vl.analyze.plots import headroom_figure, save_figure
    from florence_vl.analyze.report import headroom_tables

    measured = _measured(model, suite, sizes, subsets, limit, data, seed, device, dtype)[2]
    found = headroom(measured, splits, seed)
    record = {"type": "headroom", "command": called(), "skipped": dict(measured.skipped), **found.to_dict()}
    write_text(out / "headroom.json", json.dumps(record, indent=1) + "\n")
    files = save_figure(headroom_figure(found), out / "headroom")
    for table in headroom_tables(record):
        print_table(table["title"], table["header"], table["cells"])
    say(f"wrote {out / 'headroom.json'}, " + ", ".join(map(str, files)))


@app.command("bill", cls=SeveralValues)
def bill_command(
    model: str = _MODEL,
    suite: str = _SUITE,
    out: Path = typer.Option(Path("bill"), "--out", help=OUT_HELP),
    sizes: list[int] = _SIZES,
    subsets: str = typer.Option("leave-one-out", "--subsets", help=SUBSETS_HELP),
    limit: int | None = _LIMIT,
    data: Path | None = _DATA,
    rounds: int = typer.Option(5, "--rounds", min=1, help="Number of latency measurements per option."),
    trades: list[float] = typer.Option(
        None, "--trade", help="With --subsets views: trades (nats per full view) at which the router chooses."
    ),
    seed: int = typer.Option(0, "--seed", help="Seed of the sample that --limit draws."),
    device: str = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Accuracy against cost: FLOPs of tower and prefill, and time to the first token, by size and features."""
    from florence_vl.analyze.bill import bill, time_options
    from florence_vl.analyze.gates import gates_by_group
    from florence_vl.analyze.plots import bill_figure, save_figure
    from florence_vl.analyze.report import bill_table, gates_tables
    from florence_vl.model.loading import check_folder
    from florence_vl.model.resolution import set_resolution
    from florence_vl.model.router import ROUTER_CONFIG

    router = Path(check_folder(model)) if subsets == "views" else None
    if router is None or not (router / ROUTER_CONFIG).is_file():
        if trades:  # told before hours of measuring
            raise ValueError("--trade needs --subsets views and a router in the model's folder (train-router)")
        router = None
    loaded, processor, measured = _measured(model, suite, sizes, subsets, limit, data, seed, device, dtype)
    latencies = time_options(loaded, processor, measured.options, measured.tokens_O, rounds, _every("latency: round"))
    routed, router_latency = _routed(loaded, processor, measured, router, trades, seed, rounds)
    rows = bill(measured, latencies, routed, router_latency)
    set_resolution(loaded, processor, image_size=measured.options[0].size)
    record = {
        "type": "bill",
        "command": called(),
        "device": str(loaded.device),
        "questions": len(measured.groups),
        "pictures": len(set(measured.pictures)),
        "skipped": dict(measured.skipped),
        "rows": [row.to_dict() for row in rows],
        "gates": {
            group: {name: asdict(gate) for name, gate in found.items()}
            for group, found in gates_by_group(loaded, processor, measured).items()
        },
    }
    write_text(out / "bill.json", json.dumps(record, indent=1) + "\n")
    files = save_figure(bill_figure(rows), out / "bill")
    for table in (bill_table(record), *gates_tables(record)):
        print_table(table["title"], table["header"], table["cells"])
    say(f"wrote {out / 'bill.json'}, " + ", ".join(map(str, files)))


@app.command("gates", cls=SeveralValues)
def gates_command(
    models: list[str] = typer.Option(
        ..., "--model", "-m", help="NAME=MODEL, or NAME=MODEL,MODEL,... for one per seed. The first is the reference."
    ),
    suite: str = _SUITE,
    out: Path = typer.Option(Path("gates"), "--out", help="Folder for the numbers (JSON)."),
    limit: int | None = _LIMIT,
    data: Path | None = _DATA,
    seed: int = typer.Option(0, "--seed", help="Seed of the sample that --limit draws, and of the shuffled questions."),
    device: str = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Compare kinds of gates: learned constants, gates that see the image, and gates that see the question.

    Gates that see the question are also measured with the text of other questions.
    """
    from florence_vl.analyze.gates import compare_gates, gates_by_group, mean_gates
    from florence_vl.analyze.options import measure
    from florence_vl.analyze.report import gate_comparison_tables

    chosen: dict[str, list[str]] = {}
    for word in models:
        name, _, listed = word.partition("=")
        if not (name and listed) or name in chosen:
            raise ValueError(f"--model {word!r} is not NAME=MODEL[,MODEL...] with a name of its own")
        chosen[name] = listed.split(",")
    kinds: dict[str, list[Measurement]] = {}
    shuffled: dict[str, list[Measurement]] = {}
    gates: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for name, paths in chosen.items():
        for path in paths:
            say(f"{name}: {path}")
            loaded, processor, measured = _measured(path, suite, None, "none", limit, data, seed, device, dtype)
            kinds.setdefault(name, []).append(measured)
            if loaded.model.fusion.uses_context:
                again = measure(loaded, processor, measured.questions, measured.options, _every("shuffled"), seed)
                shuffled.setdefault(name, []).append(again)
            if found := gates_by_group(loaded, processor, measured):
                gates.setdefault(name, []).append(found)
    rows = compare_gates(kinds, shuffled)
    record = {
        "type": "gates",
        "command": called(),
        "questions": len(measured.groups),
        "pictures": len(set(measured.pictures)),
        "skipped": dict(measured.skipped),
        "rows": [row.to_dict() for row in rows],
        "gates": {
            name: {
                group: {feature: asdict(gate) for feature, gate in means.items()}
                for group, means in mean_gates(found).items()
            }
            for name, found in gates.items()
        },
    }
    write_text(out / "gates.json", json.dumps(record, indent=1) + "\n")
    for table in gate_comparison_tables(record):
        print_table(table["title"], table["header"], table["cells"])
    say(f"wrote {out / 'gates.json'}")


def _as_one_tile(loaded: Any, processor: Any) -> None:
    from florence_vl.model.resolution import set_resolution

    if loaded.config.tiles is not None:
        set_resolution(loaded, processor, tiles=1)
        say("this model has tiles; here every image is one tile")


def _measured(
    model: str,
    suite: str,
    sizes: list[int] | None,
    subsets: str,
    limit: int | None,
    data: Path | None,
    seed: int,
    device: str,
    dtype: str,
) -> tuple[Any, Any, Measurement]:
    from florence_vl.analyze.options import make_options, measure
    from florence_vl.evaluate.runner import plan
    from florence_vl.evaluate.suites import choose, data_folder
    from florence_vl.model.loading import load_model

    made = plan(choose(suite), lambda benchmark: benchmark.questions(data_folder(benchmark, data)), limit, seed)
    loaded, processor = load_model(model, device, dtype)
    _as_one_tile(loaded, processor)
    if subsets == "views":
        from florence_vl.analyze.routed import view_options

        if sizes:
            raise ValueError("--size is for subsets of features; each view has its own. Leave it out")
        options = view_options(loaded, processor)
    else:
        options = make_options(loaded.config.features, sizes or [processor.image_processor.size["height"]], subsets)
    questions = [question for asked in made.questions.values() for question in asked]
    say(f"{len(questions)} questions, {len(options)} options")
    return loaded, processor, measure(loaded, processor, questions, options, _every("question"))


def _routed(
    loaded: Any,
    processor: Any,
    measured: Measurement,
    folder: Path | None,
    trades: list[float] | None,
    seed: int,
    rounds: int,
) -> tuple[list[RoutedChoice], float]:
    """The choices of the routers in a folder with their rivals, and a router's own latency; none without a folder."""
    if folder is None:
        return [], 0.0
    from florence_vl.analyze.routed import TRADES, routed_choices, time_router
    from florence_vl.model.resolution import set_resolution
    from florence_vl.model.router import check_views_of, load_routers

    routers = [router.to(loaded.device) for router in load_routers(folder)]
    check_views_of(routers[0], loaded)
    set_resolution(loaded, processor, image_size=measured.options[0].size)
    routed = routed_choices(loaded, processor, routers, measured, trades or TRADES, seed)
    return routed, time_router(loaded, processor, routers[0], rounds)


def _every(what: str, share: float = 0.1) -> Callable[[int, int], None]:
    """Report the progress of a long loop at most ten times."""
    told = [0.0]

    def tell(done: int, total: int) -> None:
        if done / total >= told[0] + share or done == total:
            told[0] = done / total
            say(f"{what} {done} of {total}")

    return tell


@app.command("report")
def report_command(
    folder: Path = typer.Argument(..., help="Folder with results of the other commands, at any depth."),
    out: Path | None = typer.Option(None, "--out", help="The HTML file. FOLDER/report.html by default."),
    title: str = typer.Option("Florence-VL analysis", "--title", help="Heading of the page."),
) -> None:
    """Write one HTML page with all figures and tables in a folder."""
    from florence_vl.analyze.report import write_report

    path, found = write_report(folder, out or folder / "report.html", title)
    say(f"wrote {path} ({', '.join(f'{count} {kind}' for kind, count in found.items())})")


def unique_labels(specs: list[EncoderSpec]) -> list[str]:
    """Short names of encoders; full names if two short names are equal.

    Raises:
        ValueError: An encoder is named twice.
    """
    full, short = [str(spec) for spec in specs], [spec.label for spec in specs]
    if len(set(full)) != len(full):
        raise ValueError(f"an encoder is named twice: {' '.join(full)}")
    return [label if short.count(label) == 1 else name for label, name in zip(short, full, strict=True)]


def load_llm(name: str, device: str, dtype: str = "float32") -> Any:
    """The LLM of the alignment: `smollm2`, a folder or a hub id.

    Raises:
        ValueError: Unknown data type.
    """
    import torch

    from florence_vl.analyze.text import TextEncoder
    from florence_vl.model.packaged import resolve
    from florence_vl.registry import did_you_mean

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"unknown --llm-dtype {dtype!r}. {did_you_mean(dtype, dtypes)}")
    encoder = TextEncoder.load(resolve(name, "llms"), dtype=dtypes[dtype])
    _ = encoder.identity  # computed before the encoder moves to the device
    encoder.model.to(device)
    return encoder


def print_notes(about: dict[str, Any], chance: float, floor: float) -> None:
    """Print what is needed to read the table: omitted pairs, duplicates, chance level."""
    for reason, count in about["skipped"].items():
        typer.echo(f"left out: {count} records ({reason})")
    for reason, count in about["duplicates"].items():
        if count:
            typer.echo(f"{count} {reason}")
    typer.echo(f"chance level is a loss of {chance:.3f}; the lower bound for any vision features is {floor:.3f}")
