"""Entry point of `florence-vl`: finds the sub-command's module, imports it alone, and turns user errors into one line."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click
import typer
from typer.core import TyperGroup

from florence_vl.registry import did_you_mean

# name -> (module, one-line help). A module exposes `app` (sub-commands) or `command` (a single command).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("florence_vl.cli.demo", "See the whole method run offline: build, train, answer, report."),
    "doctor": ("florence_vl.cli.doctor", "Versions, devices, what is missing and the command that mends it."),
    "build": ("florence_vl.cli.build", "Assemble a Florence-2 and an LLM into one Florence-VL."),
    "chat": ("florence_vl.cli.chat", "Ask a model about an image, once or in a conversation."),
    "data": ("florence_vl.cli.data", "Inspect and count training data."),
    "recipes": ("florence_vl.cli.recipes", "List and show training recipes."),
    "train": ("florence_vl.cli.train", "Train from a recipe."),
    "plan": ("florence_vl.cli.plan", "Parameters, FLOPs, memory and GPU-hours of a recipe before it runs."),
    "export": ("florence_vl.cli.export", "Write a training checkpoint as a folder that from_pretrained loads."),
    "evaluate": ("florence_vl.cli.evaluate", "Score a model on benchmarks."),
    "analyze": ("florence_vl.cli.analyze", "Alignment loss, PCA pictures, attribution."),
    "ablate": ("florence_vl.cli.ablate", "Run the rows of the paper's ablation tables."),
    "convert": ("florence_vl.cli.convert", "Convert released checkpoints to this layout and back."),
    "diff": ("florence_vl.cli.diff", "Compare two checkpoints part by part."),
}


class LazyGroup(TyperGroup):
    """A command group that imports a sub-command's module only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _) in COMMANDS.items() if importlib.util.find_spec(module)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module_name, help_line = COMMANDS[name]
        if ctx.invoked_subcommand is None and not getattr(ctx, "_protected_args", None):
            return click.Command(name, help=help_line)  # only listed
        module = importlib.import_module(module_name)
        if hasattr(module, "app"):
            command = typer.main.get_command(module.app)
        else:
            single = typer.Typer(add_completion=False, rich_markup_mode="rich")
            single.command(name)(module.command)
            command = typer.main.get_command(single)
        command.name = name
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            raise click.UsageError(f"no command {args[0]!r}. {did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


def main() -> None:
    """Run the command line; exit 0 when done, 1 when it failed, 2 on wrong usage."""
    raise SystemExit("to be written")
