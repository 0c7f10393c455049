"""`florence-vl web`: a web page for OpenAI-compatible servers, or for a model that it serves itself."""

from __future__ import annotations

from pathlib import Path

import typer

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
    from florence_vl.serve.web import Server, build_page, launch

    pictures = _examples(examples)
    process = None
    addresses = [address.rstrip("/").removesuffix("/v1") for address in server]
    try:
        if model is not None:
            address = f"http://127.0.0.1:{server_port}"
            process = _start_server(model, server_port, api_key, address)
            addresses = [address]
        page = build_page([Server(address, api_key) for address in addresses], pictures)
        typer.echo(f"page: http://{host}:{port}")
        launch(page, host, port)
    finally:
        if process is not None:
            process.terminate()
            process.wait()


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


def _start_server(model: str, port: int, key: str, address: str):  # type: ignore[no-untyped-def]
    import os
    import subprocess
    import sys
    import time
    import urllib.request

    command = [sys.executable, "-m", "florence_vl", "serve", model, "--port", str(port)]
    environment = {**os.environ, **({"FLORENCE_VL_API_KEY": key} if key else {})}
    process = subprocess.Popen(command, env=environment)
    typer.echo(f"starting a server for {model} ...")
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=2):
                return process
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"the server exited with code {process.returncode}; see its message above")
