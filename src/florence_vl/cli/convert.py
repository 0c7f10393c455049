"""`florence-vl convert`: released Florence-VL, Florence-2 and gguf checkpoints to this package's layout and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

epilog = """[bold]Examples[/bold]

  florence-vl convert jiuhai/florence-vl-3b-sft models/florence-vl-3b

  florence-vl convert Florence-2-large-ft models/florence-2-large-ft

  florence-vl convert models/florence-vl-3b theirs --to original

  florence-vl convert runs/stage1/model tuned-florence-2 --to vision-tower --decoder models/florence-2-large-ft

  florence-vl convert models/florence-vl-3b --probe references.jsonl --apply"""


def command(
    source: str = typer.Argument(
        help="Checkpoint folder, .gguf file or hub id; its kind is detected from the content."
    ),
    destination: Path = typer.Argument(None, help="Folder to write; not needed with --probe."),
    to: str = typer.Option("native", help="native, original (the authors' or Microsoft's layout) or vision-tower."),
    tower: str = typer.Option(None, help="Separate vision tower folder of a released Florence-VL."),
    decoder: str = typer.Option(None, help="Florence-2 whose decoder goes into `original` and `vision-tower`."),
    tokenizer: str = typer.Option(None, help="Folder of the LLM's tokenizer, if the source has none."),
    template: str = typer.Option(None, help="Chat template by name; by default the one that fits the tokenizer."),
    keep_decoder: bool = typer.Option(
        True,
        "--keep-decoder/--drop-decoder",
        help="Keep the decoder, which Florence-VL does not use, so that `original` is exact.",
    ),
    max_shard_size: str = typer.Option("5GB", help="Largest file to write."),
    license: str = typer.Option(None, help="License tag for the model card."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace DESTINATION."),
    revision: str = typer.Option(None, help="Revision of a hub id."),
    probe: Path = typer.Option(
        None, help='Score the open switches on JSON lines {"image", "question", "answer"} of the released model.'
    ),
    apply: bool = typer.Option(False, "--apply", help="With --probe: write the best variant into the folder."),
    device: str = typer.Option("auto", help="With --probe: auto, cpu, cuda or mps."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Convert checkpoints between layouts; the destination is written atomically."""
    if destination is None and probe is None:
        raise typer.BadParameter("missing; name the folder to write", param_hint="DESTINATION")
    if probe is None and (apply or device != "auto"):
        raise typer.BadParameter("only with --probe", param_hint="--apply" if apply else "--device")
    if destination is None:
        given = {"tower": tower, "decoder": decoder, "tokenizer": tokenizer, "template": template, "license": license}
        given |= {"revision": revision, "overwrite": overwrite or None, "drop-decoder": None if keep_decoder else True}
        given |= {"max-shard-size": None if max_shard_size == "5GB" else max_shard_size}
        if wrong := [f"--{name}" for name, value in given.items() if value is not None]:
            raise typer.BadParameter("only with DESTINATION, as nothing is converted", param_hint=", ".join(wrong))
    if probe is not None and to != "native":
        raise typer.BadParameter("only with --to native", param_hint="--probe")
    folder = Path(source).expanduser()
    report: dict[str, Any] = {}
    if destination is not None:
        from florence_vl.convert.conversion import convert

        report = _with_progress(
            convert,
            source,
            destination,
            to=to,
            tower=tower,
            decoder=decoder,
            tokenizer=tokenizer,
            template=template,
            keep_decoder=keep_decoder,
            max_shard_size=max_shard_size,
            license=license,
            overwrite=overwrite,
            revision=revision,
        )
        folder = destination.expanduser()
        if not as_json:
            _print_report(report, folder)
    if probe is not None:
        report = {**report, "probe": _probe(folder, probe, apply, device, as_json)}
    if as_json:
        json.dump(report, sys.stdout, indent=2)
        print()


def _with_progress(convert: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Call `convert` and show the bytes written on standard error if it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def start(total: int) -> Callable[[int], None]:
            task = progress.add_task("", total=total)
            return lambda done: progress.advance(task, done)

        return convert(*arguments, on_start=start, **options)


def _print_report(report: dict[str, Any], folder: Path) -> None:
    print(f"{folder}: {report['written']}, from {report['source']} ({report['source_layout']})")
    if "tensors" in report:
        print(f"  {report['tensors']} tensors converted, {len(report['dropped'])} omitted")
    reasons: dict[str, int] = {}
    for reason in report["dropped"].values():
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        print(f"    {count:5d}  {reason}")
    for name, value in report.get("settings", {}).items():
        print(f"  {name}: {value}")
    for note in report.get("notes", []):
        print(f"  note: {note}")


def _probe(folder: Path, references: Path, apply: bool, device: str, as_json: bool) -> dict[str, Any]:
    from florence_vl.convert.layouts import LAYOUTS, read_config
    from florence_vl.convert.probe import apply_reading, probe, read_references, template_of

    found = read_references(references.expanduser())
    if not folder.is_dir() or not LAYOUTS["florence-vl"].matches(read_config(folder), ()):
        raise ValueError(
            f"{folder} is not a converted Florence-VL. To convert and probe in one command:"
            " florence-vl convert SOURCE DESTINATION --probe REFERENCES"
        )
    from florence_vl.model.loading import load_model

    model, processor = load_model(str(folder), device, "auto")
    result = probe(model, processor, found, template_of(folder, processor))
    if apply:
        apply_reading(folder, model, processor, result.best.reading)
    if not as_json:
        _print_probe(result, len(found), apply)
    return result.to_dict()


def _print_probe(result: Any, count: int, applied: bool) -> None:
    names = list(result.best.reading.settings())
    print(f"{'perplexity':>12} {'greedy':>7}  " + "  ".join(names))
    shown = 12
    for score in result.scores[:shown]:
        settings = {n: ",".join(v) if isinstance(v, list) else v for n, v in score.reading.settings().items()}
        values = "  ".join(str(v).ljust(len(n)) for n, v in settings.items())
        print(f"{score.perplexity:12.4f} {score.agreement:7.1%}  {values}")
    if len(result.scores) > shown:
        print(f"{'':12} and {len(result.scores) - shown} more variants (--json lists all)")
    exact = result.best.agreement == 1
    how = "reproduce all answers greedily" if exact else "are within two standard errors of the best"
    if result.ties:
        print(f"Undecided: {len(result.ties)} other variants {how} over {count} references; give more of them.")
    else:
        one = "Only the first variant reproduces" if exact else "No other variant is close to the best over"
        print(f"{one} {'all answers of ' if exact else ''}{count} references: decided.")
    if applied:
        print("The best variant was written into the folder.")
