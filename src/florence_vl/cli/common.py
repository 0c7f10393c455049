"""Helpers of several commands: messages, tables, the command line as typed, the file of a result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import typer


def say(text: str) -> None:
    """Print progress to stderr; results go to stdout."""
    typer.echo(text, err=True)


def called() -> str:
    """The command line as typed, for the record of a result."""
    return shlex.join(["florence-vl", *sys.argv[1:]])


def print_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout without truncating it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in cells:
        table.add_row(*row)
    widest = sum(max(map(len, column)) + 3 for column in zip(header, *cells, strict=True))
    Console(width=max(widest + 2, len(title) + 2, 80)).print(table)
