"""`florence-vl build`: assemble a vision model and an LLM into one saved Florence-VL."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Optional

import typer

from florence_vl.cli.common import named
from florence_vl.files import atomic_folder, check_destination
from florence_vl.model.build_config import BuildConfig
from florence_vl.registry import did_you_mean

epilog = """[bold]Examples[/bold]

  florence-vl build --vision Florence-2-large-converted --llm meta-llama/Llama-3.1-8B-Instruct --out florence-vl-8b

  florence-vl build --vision mini --llm smollm2 --features davit,caption --fusion token --out runs/small

  florence-vl build --vision mini --llm smollm2 --prompt "colors=What colors are there?" --out runs/own

  florence-vl build --vision openai/clip-vit-large-patch14-336 --llm lmsys/vicuna-7b-v1.5 --out runs/llava-1.5

`mini` and `smollm2` are the included models (`florence-vl doctor` shows whether they are installed)."""


def _layers(texts: list[str]) -> dict[str, int] | None:
    layers = {}
    for name, value in named(texts, "--feature-layer").items():
        try:
            layers[name] = int(value)
        except ValueError:
            raise ValueError(f"--feature-layer {name}={value}: {value!r} is not a layer number") from None
    return layers or None


def _with_settings(build: BuildConfig, settings: list[str]) -> BuildConfig:
    """The options with those of `--set` applied, validated like those of a recipe."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    values = {name: yaml.safe_load(text) for name, text in named(settings, "--set").items()}
    known = {field.name for field in dataclasses.fields(BuildConfig)}
    for name in values:
        if name not in known:
            raise ValueError(f"--set {name}: unknown option. {did_you_mean(name, known)}")
    try:
        return TypeAdapter(BuildConfig).validate_python({**vars(build), **values})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where} is {first['input']!r}: {first['msg']}") from None


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("--features is empty; name at least one, for example --features davit,caption")
    return names


def command(
    vision: str = typer.Option(..., "--vision", help="Florence-2 or vision backbone: folder, hub id, or `mini`."),
    llm: str = typer.Option(..., "--llm", help="Decoder LLM: folder, hub id, .gguf file, or `smollm2`."),
    out: Path = typer.Option(..., "--out", "-o", help="Folder for the model; must be new or empty."),
    features: Optional[str] = typer.Option(  # noqa: UP045
        None, "--features", help="Comma-separated names of the fused features, in order: davit,caption,ocr,grounding."
    ),
    prompt: list[str] = typer.Option([], "--prompt", help="A custom prompt, NAME=TEXT; may be repeated."),
    feature_layer: list[str] = typer.Option(
        [], "--feature-layer", help="For a backbone: feature name and hidden layer, NAME=INDEX; may be repeated."
    ),
    fusion: str = typer.Option(BuildConfig.fusion, "--fusion", help="channel, token, average or gated."),
    projector_depth: int = typer.Option(
        BuildConfig.projector_depth, "--projector-depth", help="Linear layers of the projector, 1 to 4."
    ),
    mean_token: str = typer.Option(
        BuildConfig.mean_token, "--mean-token", help="grid (576 tokens at 768 px), all (577) ..."
    ),
    prompt_padding: str = typer.Option(BuildConfig.prompt_padding, "--prompt-padding", help="masked or attended."),
    prompt_length: Optional[int] = typer.Option(None, "--prompt-length", help="Pad prompts to this length."),  # noqa: UP045
    setting: list[str] = typer.Option(
        [], "--set", help="Any other option of BuildConfig, NAME=VALUE in YAML: --set merge=2; may be repeated."
    ),
    image_size: Optional[int] = typer.Option(None, "--image-size", help="Pixels per side; the tower's by default."),  # noqa: UP045
    image_token: Optional[str] = typer.Option(None, "--image-token", help="Token that represents images."),  # noqa: UP045
    chat_template: Optional[str] = typer.Option(  # noqa: UP045
        None, "--chat-template", help="llama3, phi3, chatml, vicuna_v1, plain; by default the one that fits."
    ),
    dtype: str = typer.Option("auto", "--dtype", help="auto (the LLM's), float32, bfloat16, float16."),
    seed: int = typer.Option(0, "--seed", help="Seed of the projector's initial weights."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a Florence-VL in --out."),
) -> None:
    """Assemble a Florence-2 and an LLM into one Florence-VL.

    The projector between them is untrained: `florence-vl train` with model.path=OUT trains it.
    """
    build = BuildConfig(
        vision,
        llm,
        features=_names(features),
        prompts=named(prompt, "--prompt") or None,
        feature_layers=_layers(feature_layer),
        fusion=fusion,
        projector_depth=projector_depth,
        mean_token=mean_token,  # type: ignore[arg-type]
        prompt_padding=prompt_padding,  # type: ignore[arg-type]
        prompt_length=prompt_length,
        image_size=image_size,
        image_token=image_token,
        chat_template=chat_template,
    )
    build = _with_settings(build, setting)
    from florence_vl.model.loading import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: {', '.join(DTYPES)}")
    check_destination(out, overwrite=overwrite, sources=[part for part in (vision, llm) if Path(part).exists()])

    from florence_vl.model.assemble import build_model
    from florence_vl.train.optimizer import count_parameters

    model, processor = build_model(build, dtype=dtype, seed=seed)
    with atomic_folder(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    size = processor.image_processor.size
    config = model.config
    typer.echo(f"features   {', '.join(config.features or ())} ({config.fusion} fusion)")
    tokens = str(model.num_image_tokens(size.height, size.width))
    if config.tiles is not None:
        tokens += f" to {model.num_image_tokens(*processor.image_processor.largest_size)}"
    typer.echo(f"image      {size.height}x{size.width} px, {tokens} tokens")
    for part, (count, _) in count_parameters(model).items():
        typer.echo(f"{part:10} {count / 1e6:,.1f} M parameters")
    typer.echo(f"saved      {out}")
