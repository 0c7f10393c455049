"""`florence-vl chat`: one question, or a conversation in the terminal, with streaming."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import typer

from florence_vl.cli.common import DEVICE, DTYPE
from florence_vl.cli.resolution import ASPECT, IMAGE_SIZE, POSITIONS, TILES, TOKEN_BUDGET, TRADE, VIEW, apply, given
from florence_vl.registry import did_you_mean

if TYPE_CHECKING:
    from florence_vl.serve.session import ChatSession

epilog = """[bold]Examples[/bold]

  florence-vl chat --model runs/demo/model --image photo.jpg "What is shown?"

  florence-vl chat --model runs/demo/model --image photo.jpg

  florence-vl chat --model mini --image a.png --image b.png --temperature 0.7 "What differs?"

In a conversation, /help lists the commands."""

HELP = """/image FILE   switch to another picture and restart the conversation
/add FILE     add a picture to the next question
/reset        restart with the same pictures
/help         this list
/quit         quit (or end of input)"""
COMMANDS = ("/image", "/add", "/reset", "/help", "/quit")


def command(
    question: Optional[str] = typer.Argument(None, help="The question; omit it to start a conversation."),  # noqa: UP045
    model: str = typer.Option(..., "--model", "-m", help="Folder or hub id of a model, or `mini`, the included model."),
    image: list[Path] = typer.Option([], "--image", "-i", help="Picture that the question is about; may be repeated."),
    system: Optional[str] = typer.Option(None, "--system", help="System message."),  # noqa: UP045
    max_new_tokens: int = typer.Option(256, "--max-new-tokens", help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, "--temperature", help="0 takes the most likely token; above 0 samples."),
    top_p: Optional[float] = typer.Option(None, "--top-p", help="Sample from this share of the probability."),  # noqa: UP045
    top_k: Optional[int] = typer.Option(None, "--top-k", help="Sample from this number of most likely tokens."),  # noqa: UP045
    repetition_penalty: float = typer.Option(1.0, "--repetition-penalty", help="Above 1 discourages repeating."),
    seed: Optional[int] = typer.Option(None, "--seed", help="Makes sampling repeatable."),  # noqa: UP045
    device: str = DEVICE,
    dtype: str = DTYPE,
    image_size: Optional[int] = IMAGE_SIZE,  # noqa: UP045
    aspect: Optional[str] = ASPECT,  # noqa: UP045
    token_budget: Optional[int] = TOKEN_BUDGET,  # noqa: UP045
    tiles: Optional[int] = TILES,  # noqa: UP045
    positions: Optional[str] = POSITIONS,  # noqa: UP045
    view: Optional[str] = VIEW,  # noqa: UP045
    trade: Optional[float] = TRADE,  # noqa: UP045
) -> None:
    """Ask a model about an image, once or in a conversation."""
    from florence_vl.model.loading import check_folder, load_model
    from florence_vl.model.pictures import open_image

    for name, value in (("--top-p", top_p), ("--top-k", top_k), ("--seed", seed)):
        if temperature == 0 and value is not None:
            raise ValueError(f"{name} applies to sampling only: add a --temperature above 0, for example 0.7")
    if question is not None and not question.strip():
        raise ValueError("the question is empty: give one, or omit it to start a conversation")
    resolution = given(image_size, aspect, token_budget, tiles, positions, view, trade)
    pictures = [open_image(path) for path in image]
    check_folder(model)
    from florence_vl.serve.session import ChatSession, GenerationOptions  # takes seconds: torch and transformers

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    loaded, processor = load_model(model, device, dtype)
    routing = apply(loaded, processor, model, resolution)
    session = ChatSession(loaded, processor, options=options, system=system, routing=routing)
    for picture in pictures:
        session.show(picture)
    if question is not None:
        _print_answer(session.stream(question))
        return
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history in input()
        typer.echo("Ask about the picture; /help lists the other commands.")
    converse(session, read=lambda: input("> " if interactive else ""))


def _print_answer(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def converse(session: ChatSession, read: Callable[[], str]) -> None:
    """Read lines until the end of input or `/quit`: questions, and commands that begin with a slash.

    Errors in a line are reported and the conversation continues. Ctrl-C interrupts an answer.
    """
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if not line:
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                typer.echo(obey(session, line))
            else:
                _print_answer(session.stream(line))
        except KeyboardInterrupt:
            typer.echo(" (interrupted)")
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: no memory, or generation failed
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)


def obey(session: ChatSession, line: str) -> str:
    """Execute a slash command.

    Returns:
        A message for the user.

    Raises:
        ValueError: The command is unknown, or lacks its file.
    """
    word, _, rest = line.partition(" ")
    rest = rest.strip().strip("'\"")
    if word not in COMMANDS:
        raise ValueError(f"unknown command {word!r}. {did_you_mean(word, COMMANDS)}")
    if word == "/help":
        return HELP
    if word == "/reset":
        session.reset(keep_images=True)
        return "(started again)"
    if not rest:
        raise ValueError(f"{word} needs a file: {word} photo.jpg")
    from florence_vl.model.pictures import open_image

    picture = open_image(Path(rest).expanduser())
    if word == "/image":
        session.reset()
    width, height = session.show(picture)
    return f"({Path(rest).name}, {width}x{height})"
