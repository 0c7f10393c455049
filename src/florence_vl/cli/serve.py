"""`florence-vl serve`: an OpenAI-compatible server for one model, or vLLM's server with safe flags."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer

from florence_vl.cli.common import DEVICE, DTYPE, named, refuse
from florence_vl.cli.resolution import ASPECT, IMAGE_SIZE, POSITIONS, TILES, TOKEN_BUDGET, TRADE, VIEW, apply, given
from florence_vl.registry import did_you_mean

if TYPE_CHECKING:
    from florence_vl.serve.openai_server import Tools

ENGINES = ("transformers", "vllm")
ATTRIBUTION_TOKENS = 64  # of the answer that the model gives itself, at most

epilog = """[bold]Examples[/bold]

  florence-vl serve mini

  florence-vl serve runs/finetune/model --port 8080 --api-key-file key.txt --max-batch 32

  florence-vl serve runs/finetune/model --adapter charts=runs/charts/adapter --adapter forms=runs/forms/adapter

  florence-vl serve runs/finetune/model --engine vllm --dtype bfloat16

Use any OpenAI client with base_url=http://127.0.0.1:8000/v1"""


def command(
    model: str = typer.Argument(..., help="Folder or hub id of a model, or `mini`, the included model."),
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on; 0.0.0.0 for all."),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="Port to listen on."),
    name: Optional[str] = typer.Option(None, "--name", help="The model's name in requests; by default its folder's."),  # noqa: UP045
    adapter: list[str] = typer.Option([], "--adapter", help="NAME=FOLDER of a LoRA adapter (peft); may be repeated."),
    device: str = DEVICE,
    dtype: str = DTYPE,
    int8: bool = typer.Option(False, "--int8", help="Store the LLM's weights in 8 bits (torchao)."),
    compile_: bool = typer.Option(False, "--compile", help="Compile the LLM with torch.compile; needs a C++ compiler."),
    image_size: Optional[int] = IMAGE_SIZE,  # noqa: UP045
    aspect: Optional[str] = ASPECT,  # noqa: UP045
    token_budget: Optional[int] = TOKEN_BUDGET,  # noqa: UP045
    tiles: Optional[int] = TILES,  # noqa: UP045
    positions: Optional[str] = POSITIONS,  # noqa: UP045
    view: Optional[str] = VIEW,  # noqa: UP045
    prompt_tokenizer: Optional[str] = typer.Option(  # noqa: UP045
        None,
        "--prompt-tokenizer",
        help="Folder of the Florence-2 whose tokenizer reads new prompts for /v1/features; by default that of `mini`, "
        "for `mini`.",
    ),
    api_key_file: Optional[Path] = typer.Option(  # noqa: UP045
        None, "--api-key-file", help="File with the key that requests must carry; else $FLORENCE_VL_API_KEY, if set."
    ),
    allowed_media_domain: list[str] = typer.Option(
        [],
        "--allowed-media-domain",
        help="Host from which http(s) pictures are fetched, .HOST for its subdomains; may be repeated.",
    ),
    allowed_media_path: list[Path] = typer.Option(
        [], "--allowed-media-path", help="Folder below which `file:` pictures are opened; may be repeated."
    ),
    max_batch: int = typer.Option(16, "--max-batch", help="Answers generated in parallel."),
    max_queue: int = typer.Option(64, "--max-queue", help="Requests that may wait; more are refused with 429."),
    cache_gib: float = typer.Option(1.0, "--cache-gib", min=0, help="GiB for the key-value cache of prefixes."),
    max_body_mib: int = typer.Option(32, "--max-body-mib", min=1, help="Largest request, MiB."),
    max_new_tokens: int = typer.Option(
        1024, "--max-new-tokens", min=1, help="Longest answer if the request sets none."
    ),
    grace: int = typer.Option(30, "--grace", min=0, help="Seconds for running answers after SIGTERM."),
    trade: Optional[float] = TRADE,  # noqa: UP045
    engine: str = typer.Option("transformers", "--engine", help="transformers, or vllm: run vLLM's own server."),
) -> None:
    """Serve a model over HTTP with an OpenAI-compatible API."""
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}. {did_you_mean(engine, ENGINES)}")
    key = _key(api_key_file)
    if host not in ("127.0.0.1", "localhost", "::1") and key is None:
        typer.echo(f"warning: {host} is reachable from other machines and no key is set", err=True)
    resolution = given(image_size, aspect, token_budget, tiles, positions, view, trade)
    from florence_vl.model.pictures import MediaPolicy

    for folder in allowed_media_path:
        if not folder.is_dir():
            raise NotADirectoryError(f"--allowed-media-path {folder} is not a folder")
    media = MediaPolicy(tuple(path.resolve() for path in allowed_media_path), tuple(allowed_media_domain))
    if engine == "vllm":
        own: dict[str, Any] = {f"--{name.replace('_', '-')}": True for name in resolution}
        own |= {
            "--prompt-tokenizer": prompt_tokenizer,
            "--adapter": adapter,
            "--int8": int8,
            "--compile": compile_,
            "--device": device != "auto",
        }
        own |= {"--max-queue": max_queue != 64, "--cache-gib": cache_gib != 1.0, "--max-body-mib": max_body_mib != 32}
        own |= {"--max-new-tokens": max_new_tokens != 1024, "--grace": grace != 30}
        refuse(own, "not supported with --engine vllm; run vLLM directly for these")
        words = vllm_command(model, host, port, name, dtype, max_batch, allowed_media_domain, allowed_media_path)
        if not escapes_control_tokens(words[words.index("--model") + 1]):
            typer.echo(
                f"warning: the chat template of {model} does not escape control tokens, so with vLLM the text of a "
                "user can contain turns of its own; docs/serving.md explains how to renew the template",
                err=True,
            )
        environment = {**os.environ, **({"VLLM_API_KEY": key} if key else {}), "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
        os.execve(words[0], words, environment)

    from florence_vl.serve.engine import Engine, EngineConfig
    from florence_vl.serve.openai_server import HTTPServer, Server, ServerConfig

    adapters = named(adapter, "--adapter")
    for adapter_name, adapter_folder in adapters.items():
        _check_adapter(adapter_name, adapter_folder)
    if not math.isfinite(cache_gib):
        raise ValueError(f"--cache-gib is {cache_gib}; it must be a finite number")
    limits = EngineConfig(max_batch=max_batch, max_queue=max_queue, prefix_bytes=int(cache_gib * (1 << 30)))
    config = ServerConfig(
        name or Path(model).resolve().name,
        api_key=key,
        media=media,
        max_body=max_body_mib << 20,
        max_new_tokens=max_new_tokens,
    )
    if config.name in adapters:
        raise ValueError(f"--adapter {config.name} has the same name as the model; choose another, or give --name")
    with bind(host, port) as listener:
        loaded, processor = load(model, adapters, device, dtype, int8, compile_)
        routing = apply(loaded, processor, model, resolution)
        extras = tools(loaded, processor, tokenize_prompts(model, prompt_tokenizer))
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("florence_vl.serve").setLevel(logging.INFO)
        server = HTTPServer(Server(Engine(loaded, processor, limits, tuple(adapters), routing), config, extras), grace)
        address = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        typer.echo(f"{config.name} on http://{address}/v1 ({loaded.device}, {loaded.dtype})")
        # uvicorn raises the signal again after its graceful shutdown; ignoring it lets the process exit with 0.
        signal.signal(signal.SIGTERM, lambda *_: None)
        with contextlib.suppress(KeyboardInterrupt):
            server.run([listener])


def _key(file: Path | None) -> str | None:
    key = file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get("FLORENCE_VL_API_KEY")
    if file is not None and not key:
        raise ValueError(f"{file} is empty: write the key to it")
    return key or None


def _check_adapter(name: str, folder: str) -> None:
    import torch

    if "." in name or hasattr(torch.nn.ModuleDict(), name):  # peft registers modules with this name
        raise ValueError(f"--adapter {name}={folder}: {name!r} cannot be the name of a torch module; choose another")
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} is not an adapter: it has no adapter_config.json (peft's save_pretrained)")


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, not listening yet.

    Raises:
        OSError: The port is in use, or the host is not an address of this machine.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # elsewhere it lets two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return bound


def load(model: str, adapters: dict[str, str], device: str, dtype: str, int8: bool, compile_: bool) -> tuple[Any, Any]:
    """The model with its adapters, quantized and compiled if requested, and its processor.

    Raises:
        ValueError: `int8` together with adapters, or torchao or peft is missing.
    """
    from florence_vl.model.loading import load_model

    if int8 and adapters:
        raise ValueError("--int8 and --adapter cannot be combined: merge the adapter first")
    loaded, processor = load_model(model, device, dtype)
    for name, folder in adapters.items():
        try:
            loaded.load_adapter(folder, adapter_name=name)
        except ImportError as error:
            raise ValueError(f'--adapter needs peft ({error}): pip install "florence-vl[peft]"') from None
    llm: Any = loaded.model.language_model
    if int8:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ValueError(f'--int8 needs torchao ({error}): pip install "florence-vl[quant]"') from None
        quantize_(llm, Int8WeightOnlyConfig(version=2))
    if compile_:
        llm.compile(dynamic=True)
    return loaded.eval(), processor


def tokenize_prompts(model: str, florence2: str | None) -> Callable[[str], list[int]] | None:
    """Text -> ids of the vision tower's prompts; None where no tokenizer is known.

    Raises:
        ValueError: The folder that was named has no tokenizer.
    """
    from florence_vl.model.packaged import resolve
    from florence_vl.model.parts import prompt_tokenizer

    if florence2 is None and model != "mini":
        return None
    found = prompt_tokenizer(resolve(florence2 or "mini", "vision"))
    if found is None:
        raise ValueError(f"--prompt-tokenizer {florence2}: there is no tokenizer in this folder")
    return found


def tools(model: Any, processor: Any, tokenize: Callable[[str], list[int]] | None = None) -> Tools:
    """The analysis endpoints of the API: features as pictures or arrays, and attribution of an answer."""
    from florence_vl.serve.openai_server import Tools

    several = len(model.model.vision_tower.feature_names) > 1
    return Tools(
        features=lambda picture, names, form, prompts: show_features(
            model, processor, picture, names, form, prompts, tokenize
        ),
        attribution=(lambda picture, question, answer: show_attribution(model, processor, picture, question, answer))
        if several
        else None,
    )


def show_features(
    model: Any,
    processor: Any,
    picture: Any,
    names: Sequence[str] | None,
    form: str,
    prompts: Sequence[str] | None = None,
    tokenize: Callable[[str], list[int]] | None = None,
) -> dict[str, Any]:
    """Features of a picture by name: as PNG with PCA colors in one basis, or as arrays."""
    import base64

    import numpy as np
    import torch
    from PIL import Image

    from florence_vl.analyze.pca import PCAConfig, pca_maps
    from florence_vl.model.pictures import data_url

    one_tile = {} if processor.image_processor.tiles is None else processor.image_processor.one_size
    inputs = processor.image_processor([picture], return_tensors="pt", **one_tile)
    pixels = inputs["pixel_values"].to(model.device, model.dtype)
    with torch.inference_mode():
        features = model.model.vision_tower(pixels)
        features |= _prompted(model.model.vision_tower, pixels, prompts or (), tokenize)
    unknown = [name for name in names or () if name not in features]
    if unknown:
        raise ValueError(f"no feature {unknown[0]!r}. {did_you_mean(unknown[0], features)}")
    wanted = [*names, *(prompts or ())] if names else features
    chosen = {name: features[name][0].float().cpu() for name in wanted}
    grid = model.model.vision_tower.grid_size(*pixels.shape[-2:])
    count = grid[0] * grid[1]
    result: dict[str, Any] = {"size": list(picture.size), "grid": list(grid), "features": {}}
    if form == "array":
        for name, tokens_ND in chosen.items():
            data = tokens_ND.numpy().astype("<f4").tobytes()
            entry = {"shape": list(tokens_ND.shape), "dtype": "float32", "data": base64.b64encode(data).decode()}
            result["features"][name] = entry
        return result
    if len({tokens.shape[-1] for tokens in chosen.values()}) > 1:
        raise ValueError("features of different widths have no common basis; request one of them")
    maps = pca_maps([tokens[-count:] for tokens in chosen.values()], [grid] * len(chosen), PCAConfig(background=False))
    for name, drawn in zip(chosen, maps, strict=True):
        url = data_url(Image.fromarray((drawn.rgb * 255).round().astype(np.uint8)))
        result["features"][name] = {"picture": url, "explained": [float(share) for share in drawn.explained]}
    return result


def _prompted(
    tower: Any, pixels: Any, prompts: Sequence[str], tokenize: Callable[[str], list[int]] | None
) -> dict[str, Any]:
    if not prompts:
        return {}
    if getattr(tower, "encoder", None) is None:
        raise ValueError("this model's vision tower has no prompts, so none can be added")
    if tokenize is None:
        raise ValueError("the server has no tokenizer for prompts: start it with --prompt-tokenizer FLORENCE2")
    clash = next((text for text in prompts if text in tower.feature_names), None)
    if clash is not None:
        raise ValueError(f"{clash!r} is the name of a feature of this model; word the prompt differently")
    return dict(zip(prompts, tower.prompt_features(pixels, [tokenize(text) for text in prompts]), strict=True))


def show_attribution(model: Any, processor: Any, picture: Any, question: str, answer: str | None) -> dict[str, Any]:
    """Contribution of each feature to an answer, with a map of its share."""
    from florence_vl.analyze.attribution import attribute

    _check_context(model, processor, picture, question, answer)
    found = attribute(model, processor, picture, question, answer, max_new_tokens=ATTRIBUTION_TOKENS)
    return {
        "question": found.question,
        "answer": found.answer,
        "generated": found.generated,
        "log_likelihood": found.log_likelihood,
        "tokens": found.tokens,
        "without_image": found.without_image,
        "words": [
            {"text": word.text, "log_likelihood": word.log_likelihood, "drops": word.drops} for word in found.words
        ],
        "features": [
            {
                "name": part.name,
                "share": part.share,
                "drop": part.drop,
                "drop_alone": part.drop_alone,
                "map": part.map_HW.tolist(),
            }
            for part in found.features
        ],
    }


def _check_context(model: Any, processor: Any, picture: Any, question: str, answer: str | None) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    ids, _ = processor.tokenize(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    count = len(ids) - 1 + processor.image_tokens(picture.height, picture.width)
    count += ATTRIBUTION_TOKENS if answer is None else 0
    context = model.config.context_length
    if context is not None and count > context:
        raise ValueError(
            f"image, question and answer have up to {count} tokens, but the context of this model is {context} tokens: "
            "shorten the question or the answer"
        )


def escapes_control_tokens(folder: str) -> bool:
    """Whether the chat template of a saved model escapes control tokens by itself; True where it cannot be read."""
    template = Path(folder) / "chat_template.jinja"
    return not template.is_file() or "set break_mark" in template.read_text(encoding="utf-8")


def vllm_command(
    model: str,
    host: str,
    port: int,
    name: str | None,
    dtype: str,
    max_batch: int,
    domains: Sequence[str],
    paths: Sequence[Path],
) -> list[str]:
    """vLLM's server command with safe flags: no remote code, no pictures from unnamed hosts or folders.

    Raises:
        ValueError: There is more than one folder of pictures, of which vLLM accepts one, or a domain stands for its
            subdomains.
    """
    from florence_vl.model.loading import check_folder

    if len(paths) > 1:
        raise ValueError("vLLM accepts only one --allowed-media-path")
    if any(domain.startswith(".") for domain in domains):
        raise ValueError("vLLM compares whole host names: name each host of --allowed-media-domain in full")
    folder = str(check_folder(model))
    words = [os.environ.get("VLLM_PYTHON", sys.executable), "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", folder, "--served-model-name", name or Path(model).resolve().name]
    words += ["--host", host, "--port", str(port), "--dtype", dtype, "--max-num-seqs", str(max_batch)]
    # An empty list would allow every domain; a name that cannot exist allows none.
    words += ["--allowed-media-domains", *(domains or ["none.invalid"])]
    return words + (["--allowed-local-media-path", str(paths[0].resolve())] if paths else [])
