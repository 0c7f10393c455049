"""Helpers of several commands: common flags, messages, tables, the command line as typed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

import typer

DEVICE = typer.Option("auto", "--device", help="auto, cpu, cuda, cuda:1, mps.")
DTYPE = typer.Option("auto", "--dtype", help="auto, float32, bfloat16, float16.")


def say(text: str) -> None:
    """Print progress to stderr; results go to stdout."""
    typer.echo(text, err=True)


def called() -> str:
    """The command line as typed, for the record of a result."""
    return shlex.join(["florence-vl", *sys.argv[1:]])


def is_given(context: typer.Context, option: str) -> bool:
    """Whether an option was given on the command line or by the environment."""
    source = context.get_parameter_source(option)  # an enum of click, or of the click inside newer typers
    return source is not None and source.name != "DEFAULT"


def refuse(flags: Mapping[str, object], reason: str) -> None:
    """Refuse flags that would be ignored.

    Args:
        flags: Flag -> whether it was given.
        reason: Why it has no effect, and what to do.

    Raises:
        ValueError: A flag was given.
    """
    if given := [flag for flag, value in flags.items() if value]:
        raise ValueError(f"{', '.join(given)}: {reason}")


def named(texts: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE arguments of an option as a dict.

    Raises:
        ValueError: An argument has another form, or a name is given twice.
    """
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ValueError(f"{option} {text!r} is not of the form NAME=VALUE")
        if name.strip() in pairs:
            raise ValueError(f"{option} names {name.strip()!r} twice")
        pairs[name.strip()] = value.strip()
    return pairs


def print_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout without truncating it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for name in header:
        table.add_column(Text(name), no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    widest = sum(max(map(len, column)) + 3 for column in zip(header, *cells, strict=True))
    console = Console(width=max(widest + 2, len(title) + 2, 80))
    console.print(Text(title, style="italic"))  # as the table's title it would wrap at the table's width
    console.print(table)
