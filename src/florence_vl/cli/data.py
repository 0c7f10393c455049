"""`florence-vl data`: inspect training data before training."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import typer

from florence_vl.cli.common import is_given, refuse

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Inspect and count training data.",
    epilog="""[bold]Examples[/bold]

  florence-vl data inspect mini/pretrain --records 3 --html page.html

  florence-vl data inspect chat.jsonl --image-root photos --model runs/demo/model

  florence-vl data stats blip_laion_cc_sbu_558k.json --dataset llava-pretrain-558k --image-root images.zip

  florence-vl data sources docmatix""",
)

_DATASET = typer.Option(None, "--dataset", help="Name of a registered data set (florence-vl data sources).")
_READER = typer.Option(None, "--reader", help="llava, messages, parquet, webdataset or folder; detected by default.")
_ROOT = typer.Option(None, "--image-root", help="Folder, URL, .zip or .tar where image names are found; repeatable.")
_OPTION = typer.Option(None, "--option", help="key=value for the reader, e.g. caption=text; repeatable.")
_MODEL = typer.Option(
    None, "--model", help="Folder or hub id of the model whose processor encodes; recipes name their own."
)
_TEMPLATE = typer.Option(None, "--template", help="Chat template; the processor's own by default.")
_MAX_LENGTH = typer.Option(None, "--max-length", help="Longest sample in tokens; longer ones are bad records.")


@app.command("inspect")
def inspect_command(
    data: str = typer.Argument(..., help="A recipe (name or .yaml), or a data file, folder or URL."),
    overrides: list[str] = typer.Argument(None, help="Overrides of the recipe, key.path=value.", show_default=False),
    records: int = typer.Option(5, "--records", "-n", min=1, help="Number of records to show."),
    start: int = typer.Option(0, "--start", min=0, help="First record, or position in the recipe's stream."),
    page: Path = typer.Option(None, "--html", help="Also write a page with the pictures."),
    lengths: int = typer.Option(1000, "--lengths", min=0, help="Records measured for the histogram; 0 for none."),
    dataset: str = _DATASET,
    reader: str = _READER,
    image_root: list[str] = _ROOT,
    option: list[str] = _OPTION,
    model: str = _MODEL,
    template: str = _TEMPLATE,
    max_length: int = _MAX_LENGTH,
) -> None:
    """Show records as training sees them: supervised text in green, token and image counts, lengths, pictures."""
    from rich.console import Console
    from rich.text import Text

    from florence_vl.data import inspect
    from florence_vl.data.records import printable
    from florence_vl.files import write_text

    source, encoder, _ = _open(data, overrides, dataset, reader, image_root, option, model, template, max_length)
    if start >= len(source):
        raise ValueError(f"--start {start}: {data} has {len(source)} records")
    console = Console(highlight=False)
    shown = list(inspect.inspect_records(source, range(start, min(start + records, len(source))), encoder))
    for sample in shown:
        record = sample.record
        name = f"{record.source} / {record.id}" if record else "unreadable"
        counts = f", {sample.num_tokens} tokens, {sample.num_supervised} supervised" if sample.num_tokens else ""
        images = f", {len(record.images)} images" if record else ""
        console.rule(Text(printable(f"{sample.index}: {name}{images}{counts}")), align="left")
        if sample.error is not None:
            console.print(f"skipped in training ({sample.error.kind}): {sample.error}", style="red", markup=False)
        if console.is_terminal:
            console.print(inspect.rich_text(sample))
        else:
            print(inspect.plain_text(sample))
    if encoder is None:
        console.print("\nTokens are not counted without a processor: give --model.", style="yellow")
    if lengths:
        stats = inspect.collect_stats(source, lengths, encoder)
        name = "tokens" if encoder else "characters"
        console.rule(f"{name} per record, {stats.examined} of {stats.records} records", align="left")
        for line in inspect.histogram(stats.tokens or stats.characters):
            print(line)
        _print_bad(console, stats)
    if page is not None:
        write_text(page, inspect.html_page(shown, f"{data}: {len(source)} records"), errors="backslashreplace")
        console.print(f"\npage: {page}", markup=False)
    if all(sample.error is not None for sample in shown):
        raise typer.Exit(1)


@app.command("stats")
def stats_command(
    context: typer.Context,
    data: str = typer.Argument(..., help="A recipe (name or .yaml), or a data file, folder or URL."),
    overrides: list[str] = typer.Argument(None, help="Overrides of the recipe, key.path=value.", show_default=False),
    records: int = typer.Option(10_000, "--records", min=0, help="Records to read at most (a uniform sample); 0: all."),
    check_images: bool = typer.Option(False, "--check-images", help="Decode every image."),
    trees: int = typer.Option(2000, "--trees", min=0, help="First records measured with and without message trees."),
    as_json: bool = typer.Option(False, "--json", help="Print the counts as one JSON object."),
    dataset: str = _DATASET,
    reader: str = _READER,
    image_root: list[str] = _ROOT,
    option: list[str] = _OPTION,
    model: str = _MODEL,
    template: str = _TEMPLATE,
    max_length: int = _MAX_LENGTH,
) -> None:
    """Count the records, tokens and images of a data set, and its bad records by kind."""
    import json

    from rich.console import Console
    from rich.table import Table

    from florence_vl.data import inspect

    source, encoder, recipe = _open(data, overrides, dataset, reader, image_root, option, model, template, max_length)
    measured = {"--trees": encoder is None and is_given(context, "trees")}
    refuse(measured, "needs --model or a recipe, which determine the tokens of a record")
    stats = inspect.collect_stats(source, records or None, encoder, check_images)
    summary = stats.summary()
    trees = min(trees, len(source))
    if encoder is not None and trees:
        summary["layouts"] = _compare_layouts(source, encoder, recipe, trees)
    if dataset is not None:
        from florence_vl.data.sources import DATASETS

        summary["stated_records"] = DATASETS[dataset].records
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    console = Console(highlight=False)
    stated = summary.get("stated_records")
    note = f" (published: {stated})" if stated is not None and stated != summary["records"] else ""
    console.print(f"{summary['records']} records{note}, {summary['examined']} examined")
    console.print(f"text only: {summary['text_only_share']:.1%}")
    if len(stats.sources) > 1:
        for name, count in stats.sources.most_common():
            console.print(f"  {name}: {count / stats.examined:.1%}", markup=False)
    table = Table(box=None, pad_edge=False)
    for column in ("a record", "mean", "median", "95 %", "max"):
        table.add_column(column, justify="left" if column == "a record" else "right")
    for name in ("images", "turns", "characters", "tokens", "supervised"):
        if name in summary:
            row = summary[name]
            table.add_row(name, f"{row['mean']:.1f}", f"{row['median']:.0f}", f"{row['p95']:.0f}", str(row["max"]))
    console.print(table)
    if layouts := summary.get("layouts"):
        _print_layouts(console, layouts, f"the first {trees} records")
    _print_bad(console, stats)


@app.command("sources")
def sources_command(
    name: str = typer.Argument(None, help="Show all details of this data set.", show_default=False),
    verify: str = typer.Option(
        None, "--verify", help="Local copy to check: counts, shards, columns, dead links, images, duplicates."
    ),
    sample: int = typer.Option(1000, "--sample", min=0, help="With --verify: number of records to check; 0: all."),
    image_root: list[str] = _ROOT,
    benchmarks: Path = typer.Option(
        None, "--benchmarks", help="With --verify: the benchmarks' data folder; finds their pictures in the copy."
    ),
) -> None:
    """List the data sets of the paper: source, license, and where their images are."""
    if verify is not None:
        if name is None:
            raise ValueError("--verify needs the name of the data set: florence-vl data sources NAME --verify PATH")
        from florence_vl.data.verify import PictureIndex, verify_dataset

        index = None
        if benchmarks is not None:
            from florence_vl.evaluate.suites import benchmark_pictures

            index = PictureIndex(benchmark_pictures(benchmarks))
        options = {"image_root": image_root} if image_root else {}
        found = verify_dataset(name, verify, sample, index, **options)
        for line in found:
            print(line)
        if found:
            raise typer.Exit(1)
        print(f"{verify} is {name} as published")
        return
    refuse({"--image-root": image_root, "--benchmarks": benchmarks, "--sample": sample != 1000}, "needs --verify")
    from rich.console import Console
    from rich.table import Table

    from florence_vl.data.sources import DATASETS

    console = Console(highlight=False)
    commercial = {True: "yes", False: "no", None: "see licence"}
    if name is not None:
        found = DATASETS[name]
        rows = {
            "page": found.url + (f" at {found.revision}" if found.revision else ""),
            "files": "; ".join(found.files),
            "records": f"{found.records:,}" if found.records else "not published",
            "columns": ", ".join(found.columns),
            "images": found.images,
            "licence": found.licence,
            "commercial": commercial[found.commercial],
            "reader": ", ".join(found.layouts),
            "filters": "; ".join(
                f"{f.column} {f.test} {f.value}"
                for f in next((o["filters"] for o in found.layouts.values() if "filters" in o), ())
            ),
            "note": found.note,
        }
        for key, value in rows.items():
            if value:
                print(f"{key + ':':<12}{value}")
        return
    if not console.is_terminal:
        for key in DATASETS:
            found = DATASETS[key]
            print(f"{key}\t{found.records or '?'}\t{found.hub_id}\t{found.licence}")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("data set", "records", "commercial", "from", "licence"):
        table.add_column(column, justify="right" if column == "records" else "left", no_wrap=column == "data set")
    for key in DATASETS:
        found = DATASETS[key]
        size = f"{found.records:,}" if found.records else "?"
        table.add_row(key, size, commercial[found.commercial], found.hub_id, found.licence)
    console.print(table)


@app.command("prepare")
def prepare_command(
    folder: str = typer.Argument(..., help="Folder of WebDataset shards (.tar)."),
    workers: int = typer.Option(4, "--workers", min=1, help="Processes that index the shards."),
) -> None:
    """Index shards for streaming with megatron-energon (extra `stream`); other readers need no preparation."""
    try:
        from florence_vl.data.stream import prepare_shards
    except ImportError as error:
        raise ValueError(f'streaming needs the extra: pip install "florence-vl[stream]" ({error})') from None
    typer.echo(f"{prepare_shards(folder, workers)} samples: {folder}")


def _compare_layouts(source: Any, encoder: Any, recipe: Any, count: int) -> dict[str, dict[str, int]]:
    """Tokens and images of the first records by layout; none where the encoder's pictures can't be shared."""
    from florence_vl.data.trees import compare_layouts, shares_pictures

    if not shares_pictures(encoder):
        return {}
    window, budget = len(source), sys.maxsize
    if recipe is not None:  # in the order that trees would have
        from florence_vl.train.data import build_mixture

        packing = dataclasses.replace(recipe.data.packing, trees=True)
        source = build_mixture(recipe.data.sources, dataclasses.replace(recipe.data, packing=packing), recipe.seed)
        window, budget = packing.window, packing.tokens_per_row
    found = compare_layouts(source, encoder, count, window, budget)
    return {name: {"tokens": tokens, "images": images} for name, (tokens, images) in found.items()}


def _print_layouts(console: Any, layouts: dict[str, dict[str, int]], title: str) -> None:
    """Tokens and images with and without message trees (data.packing.trees)."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in (title, "tokens", "images", "tokens saved"):
        table.add_column(column, justify="left" if column == title else "right")
    for name, row in layouts.items():
        alone = layouts[name.removesuffix(" as trees")]["tokens"]
        saved = f"{1 - row['tokens'] / alone:.1%}" if name.endswith("trees") and alone else ""
        table.add_row(name, f"{row['tokens']:,}", f"{row['images']:,}", saved)
    console.print(table)


def _print_bad(console: Any, stats: Any) -> None:
    for kind, count in stats.bad.most_common():
        console.print(
            f"bad: {count} x {kind} ({count / stats.examined:.1%}), e.g. {stats.examples[kind]}",
            style="red",
            markup=False,
        )


def _open(
    data: str,
    overrides: list[str] | None,
    dataset: str | None,
    reader: str | None,
    image_root: list[str] | None,
    option: list[str] | None,
    model: str | None,
    template: str | None,
    max_length: int | None,
) -> tuple[Any, Any, Any]:
    """(reader or mixture, encoder or None, recipe or None) of a file or a recipe.

    Raises:
        FileNotFoundError: Neither a file nor a recipe.
        ValueError: Options contradict each other, the reader or the recipe.
    """
    from florence_vl.data.readers import files
    from florence_vl.train.config import SourceConfig
    from florence_vl.train.data import open_source

    if data.endswith((".yaml", ".yml")) or not (
        files.is_url(data) or files.exists(data) or any(c in data for c in "*?[")
    ):
        return _open_recipe(data, overrides or [], model, dataset, reader, image_root, option, template, max_length)
    if overrides:
        raise ValueError(f"{overrides[0]!r}: overrides are for recipes, but {data} is a data file; see --option")
    source = open_source(SourceConfig(data, reader, dataset, image_root or None, options=_options(option)))
    encoder = None
    if model is not None:
        from florence_vl.data.encode import RecordEncoder
        from florence_vl.model.processing import FlorenceVLProcessor

        processor = FlorenceVLProcessor.from_pretrained(_model_name(model))
        encoder = RecordEncoder(processor, template, max_length, on_long="drop")
    elif template is not None or max_length is not None:
        raise ValueError("--template and --max-length need --model for its tokenizer")
    return source, encoder, None


def _open_recipe(data: str, overrides: list[str], model: str | None, *file_options: Any) -> tuple[Any, Any, Any]:
    from florence_vl.train.data import TrainingData
    from florence_vl.train.recipes import list_recipes, resolve_recipe
    from florence_vl.train.shell import load_shell

    if any(option is not None and option != [] for option in file_options):
        raise ValueError(
            "--dataset, --reader, --image-root, --option, --template and --max-length are for data files; override a "
            "recipe with key.path=value"
        )
    if not data.endswith((".yaml", ".yml")) and data not in list_recipes():
        from florence_vl.registry import did_you_mean

        raise FileNotFoundError(f"neither a data file nor a recipe: {data}. {did_you_mean(data, list_recipes())}")
    recipe = resolve_recipe(data, overrides).recipe
    if model is not None:
        from florence_vl.model.processing import FlorenceVLProcessor

        processor: Any = FlorenceVLProcessor.from_pretrained(_model_name(model))
    else:
        processor = load_shell(recipe)[1]
    training = TrainingData(recipe, processor)
    return training.mixture, training.encoder, recipe


def _model_name(name: str) -> str:
    """Folder or hub id of a model.

    Raises:
        FileNotFoundError: The name can only be a folder, and it does not exist.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and (name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1):
        raise FileNotFoundError(f"model folder {name} does not exist (choose another with --model)")
    return str(path) if path.is_dir() else name


def _options(pairs: list[str] | None) -> dict[str, Any]:
    import yaml

    result = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} is not of the form key=value")
        result[key] = yaml.safe_load(value)
    return result
