"""Entry point of `florence-vl`: imports only the called sub-command's module and reports errors in one line."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import typer

import florence_vl
from florence_vl.registry import did_you_mean, plugins

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# name -> (module, one-line help, panel). Installed packages add more by entry points of the group
# `florence_vl.commands` that refer to such a tuple. A module has `app` (sub-commands) or `command` (a single command,
# with its examples in `epilog`), and imports torch and transformers only inside its functions.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "doctor": (
        "florence_vl.cli.doctor",
        "Check versions, devices and extras, and show how to install what is missing.",
        "Start",
    ),
    "build": ("florence_vl.cli.build", "Assemble a Florence-2 and an LLM into one Florence-VL.", "Start"),
    "chat": ("florence_vl.cli.chat", "Ask a model about an image, once or in a conversation.", "Start"),
    "serve": ("florence_vl.cli.serve", "Serve a model over HTTP with an OpenAI-compatible API.", "Start"),
    "web": (
        "florence_vl.cli.web",
        "Open a web page to chat, to inspect features and attribution, and to compare models.",
        "Start",
    ),
    "data": ("florence_vl.cli.data", "Inspect and count training data.", "Train"),
    "recipes": ("florence_vl.cli.recipes", "List and show training recipes.", "Train"),
    "train": ("florence_vl.cli.train", "Train from a recipe.", "Train"),
    "plan": (
        "florence_vl.cli.plan",
        "Estimate parameters, FLOPs, memory and GPU-hours of a recipe before it runs.",
        "Train",
    ),
    "export": (
        "florence_vl.cli.export",
        "Write a checkpoint as a folder that from_pretrained loads.",
        "Train",
    ),
    "train-router": (
        "florence_vl.cli.train_router",
        "Train the router that chooses a view of the image for a question.",
        "Train",
    ),
    "evaluate": ("florence_vl.cli.evaluate", "Score a model on benchmarks.", "Measure"),
    "analyze": (
        "florence_vl.cli.analyze",
        "Compare encoders, features and fusion: alignment loss, PCA, attribution.",
        "Measure",
    ),
    "ablate": ("florence_vl.cli.ablate", "Run the rows of the paper's ablation tables.", "Measure"),
    "convert": ("florence_vl.cli.convert", "Convert released checkpoints to this layout and back.", "More"),
    "diff": ("florence_vl.cli.diff", "Compare two checkpoints part by part.", "More"),
}

EPILOG = """[bold]Examples[/bold]

  florence-vl demo

  florence-vl chat --model runs/demo/model --image photo.jpg "What is shown?"

  florence-vl COMMAND --help"""

SPIN_COUNT = "10000"  # on an idle machine as fast as libgomp's default of 300,000

# Errors that a user can fix by changing the command; every other exception is a failure of the run.
USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)


def commands() -> dict[str, tuple[str, str, str]]:
    """All commands, those of installed packages first in their panel: name -> (module, help, panel)."""
    return {name: point.load() for name, point in plugins("commands").items()} | COMMANDS


def _version(value: bool) -> None:
    if value:
        typer.echo(f"florence-vl {florence_vl.__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (also FLORENCE_VL_DEBUG=1)."),
) -> None:
    """Florence-VL: vision-language models on one generative vision encoder, Florence-2."""


def _only_listed() -> None:
    raise AssertionError("a command that is only listed was called")


def _attach(root: typer.Typer, name: str, module: ModuleType, help_line: str, panel: str) -> None:
    if hasattr(module, "app"):
        root.add_typer(module.app, name=name, rich_help_panel=panel)
        return
    command: Callable[..., None] = module.command
    epilog = getattr(module, "epilog", None)
    short = None if command.__doc__ else help_line
    root.command(name, help=short, epilog=epilog, rich_help_panel=panel, no_args_is_help=False)(command)


def build_app(called: str | None) -> typer.Typer:
    """The command tree: the called command in full, and one line of help for all others, without importing them.

    Args:
        called: A name of `commands()`, or None.
    """
    root = typer.Typer(add_completion=False, rich_markup_mode="rich", epilog=EPILOG)
    root.callback()(_root)
    order = ("Start", "Train", "Measure", "More")
    for name, (module, help_line, panel) in sorted(commands().items(), key=lambda item: order.index(item[1][2])):
        if name == called:
            _attach(root, name, importlib.import_module(module), help_line, panel)
        else:
            root.command(name, help=help_line, rich_help_panel=panel)(_only_listed)
    return root


def _share_processor() -> None:
    """Limit the time that idle OpenMP threads spin, before torch is imported. The user's own settings take precedence.

    By default they spin long enough to slow a command several times when another program is busy. See
    benchmarks/spinning.py.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def _quiet_libraries() -> None:
    """Keep advice and progress bars of libraries out of the terminal, except with `--debug`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|huggingface_hub|gguf)\b.*")


def _where(error: BaseException) -> str:
    """File and line of the innermost frame, for errors that are not wrong usage."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" (at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())


def explain(error: Exception) -> tuple[str, int]:
    """A one-line error message, and its exit code."""
    if hasattr(error, "format_message"):  # a usage error of typer, whichever click it uses
        context = getattr(error, "ctx", None)
        see = f" See '{context.command_path} --help'." if context is not None else ""
        message = " ".join(error.format_message().split()).rstrip(".")
        return f"{message}.{see}", getattr(error, "exit_code", USAGE)
    if isinstance(error, USER_ERRORS):
        return _text(error) or type(error).__name__, USAGE
    if isinstance(error, ModuleNotFoundError):
        root = (error.name or "").partition(".")[0]
        fix = "" if root == "florence_vl" or not root else " `florence-vl doctor` shows the command that installs it."
        return f"{_text(error)}.{fix}", FAILED
    if isinstance(error, (OSError, ImportError)):
        return _text(error), FAILED
    return f"{type(error).__name__}: {_text(error)}{_where(error)}. --debug shows the traceback.", FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; the process's own when None.

    Returns:
        Exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own or os.environ.get("FLORENCE_VL_DEBUG", "") not in ("", "0")
    if "--debug" in own:
        arguments.remove("--debug")
    called = next((word for word in arguments if not word.startswith("-")), None)
    if not arguments:
        arguments = ["--help"]
    _share_processor()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        if called is not None and called not in commands():
            message = f"no command {called!r}. {did_you_mean(called, commands())}"
            raise ValueError(message)
        if not debug:
            _quiet_libraries()
        app = typer.main.get_command(build_app(called))
        result = app.main(args=arguments, prog_name="florence-vl", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        print(f"florence-vl: error: {message}", file=sys.stderr)
        return code
    if result == INTERRUPTED:
        print("florence-vl: interrupted", file=sys.stderr)
    return result if isinstance(result, int) else DONE


if __name__ == "__main__":
    sys.exit(main())
