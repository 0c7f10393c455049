"""`florence-vl web`: a web page for OpenAI-compatible servers, or for a model that it serves itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer

from florence_vl.cli.common import refuse

epilog = """[bold]Examples[/bold]

  florence-vl web --model mini

  florence-vl web --server http://127.0.0.1:8000

  florence-vl web --server http://127.0.0.1:8000 --server http://127.0.0.1:8001 --port 7861"""


def command(
    server: list[str] = typer.Option([], "--server", help="URL of an OpenAI-compatible server; give two to compare."),
    model: str | None = typer.Option(None, "--model", "-m", help="Model to serve and show: folder, hub id or `mini`."),
    host: str = typer.Option("127.0.0.1", "--host", help="Address that the page listens on."),
    port: int = typer.Option(7860, "--port", help="Port of the page."),
    server_port: int = typer.Option(8000, "--server-port", help="Port of the server that --model starts."),
    api_key: str = typer.Option("", "--api-key", envvar="FLORENCE_VL_API_KEY", help="API key of the servers."),
    examples: Path | None = typer.Option(None, "--examples", help="Folder of example pictures."),
) -> None:
    """Chat with a model, inspect its features and attribution, and compare two models, in the browser.

    The page is a client of the HTTP API and sends nothing anywhere else. Needs the extra `web`.
    """
    if bool(server) == (model is not None):
        raise typer.BadParameter("give either --server (once or twice) or --model")
    if len(server) > 2:
        raise typer.BadParameter("at most two servers can be compared")
    refuse({"--server-port": server and server_port != 8000}, "is the port of the server that --model starts")
    from florence_vl.serve.web import Server, build_page, launch

    pictures = _examples(examples)
    addresses = [address.rstrip("/").removesuffix("/v1") for address in server]
    with contextlib.ExitStack() as stack:
        if model is not None:
            addresses = [stack.enter_context(_serving(model, server_port, api_key))]
        page = build_page([Server(address, api_key) for address in addresses], pictures)
        typer.echo(f"page: http://{host}:{port}")
        launch(page, host, port)


def _examples(folder: Path | None) -> list[str]:
    from florence_vl.registry import plugins

    if folder is None:
        return [str(path) for point in plugins("pictures").values() for path in point.load()()]
    if not folder.is_dir():
        raise FileNotFoundError(f"--examples {folder} does not exist")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not found:
        raise ValueError(f"--examples {folder} contains no PNG, JPEG or WEBP pictures")
    return [str(path) for path in found[:12]]


@contextlib.contextmanager
def _serving(model: str, port: int, key: str) -> Iterator[str]:
    """The address of a server for this model, a process that ends with the block."""
    import os
    import signal
    import subprocess
    import sys
    import time
    import urllib.request

    from florence_vl.cli.serve import bind

    try:
        bind("127.0.0.1", port).close()
    except OSError as error:
        raise ValueError(f"the model's server {error}: choose another port with --server-port") from None
    command = [sys.executable, "-m", "florence_vl", "serve", model, "--port", str(port)]
    environment = {**os.environ, **({"FLORENCE_VL_API_KEY": key} if key else {})}
    address = f"http://127.0.0.1:{port}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the block
    process = subprocess.Popen(command, env=environment)
    try:
        typer.echo(f"starting a server for {model} ...")
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/ready", timeout=2):
                break
            time.sleep(0.3)
        else:
            raise RuntimeError(f"the server exited with code {process.returncode}; see its message above")
        yield address
    finally:
        process.terminate()
        process.wait()
