"""`florence-vl diff`: compare two checkpoints part by part."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

epilog = """[bold]Examples[/bold]

  florence-vl diff runs/stage1/model runs/stage2/model

  florence-vl diff models/florence-vl-3b models/florence-2-large-ft --part davit

Exit code 0: equal. 1: different. 2: wrong usage."""


def command(
    a: str = typer.Argument(help="Checkpoint folder or hub id."),
    b: str = typer.Argument(help="Checkpoint to compare with; its layout may differ (a Florence-VL and a Florence-2)."),
    part: str = typer.Option(None, help="Compare only this part: davit, encoder, projector, 'language model' ..."),
    list_tensors: int = typer.Option(5, "--tensors", min=0, help="Number of differing tensors to list per part."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Compare two checkpoints by part: equal, or the largest difference. Reads one tensor at a time."""
    from florence_vl.convert.conversion import open_source
    from florence_vl.convert.diff import diff

    found = diff(open_source(a), open_source(b), part)
    if as_json:
        json.dump(found.to_dict(), sys.stdout, indent=2)
        print()
    else:
        _print(found, list_tensors)
    if not found.same:
        raise typer.Exit(1)


def _print(found: Any, limit: int) -> None:
    if found.shared_only:
        print(f"Layouts {found.layouts[0]} and {found.layouts[1]}: only the parts in both are compared.")
    print(f"{'part':<20} {'tensors':>7} {'equal':>6} {'largest':>10} {'relative':>10}")
    for part in found.parts:
        print(f"{part.part:<20} {part.tensors:7d} {part.equal:6d} {part.largest:10.3g} {part.relative:10.3g}")
        for name, largest in part.differing[:limit]:
            print(f"    {largest:10.3g}  {name}")
        if len(part.differing) > limit:
            print(f"    and {len(part.differing) - limit} more")
        for what, names in (("shape", part.reshaped), ("only in A", part.only_a), ("only in B", part.only_b)):
            for name in names[:limit]:
                print(f"    {what}: {name}")
            if len(names) > limit:
                print(f"    {what}: {len(names) - limit} more")
        if part.retyped:
            print(f"    {part.retyped} have different data types and are compared by value")
    print("equal" if found.same else "different")
