"""`convert`: detect the source's layout, plan, check, and write the destination atomically."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from florence_vl.convert import florence2, florence2_plans, florence_vl, florence_vl_plans
from florence_vl.convert.card import license_of, write_card
from florence_vl.convert.layouts import LAYOUTS, Source, detect, read_config
from florence_vl.convert.llm import convert_gguf, find_gguf
from florence_vl.convert.plan import Plan
from florence_vl.convert.processors import ReleasedProcessor
from florence_vl.convert.shards import Checkpoint, Progress, parse_size
from florence_vl.files import check_destination, locate
from florence_vl.registry import did_you_mean

TARGETS = ("native", "original", "vision-tower")
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
_HUB_SKIP = ["checkpoint-*", "global_step*", "optimizer*", "scheduler*", "rng_state*", "training_args*"]


def resolve(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A local path unchanged; a hub id ("owner/name") downloaded (without code).

    Raises:
        FileNotFoundError: Neither a path nor a reachable repository.
    """
    found = locate(source, "checkpoint")
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(found, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP))
    except Exception as error:  # the hub's client raises a dozen types, all meaning "not reachable"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{source}: no such folder, and the hub didn't give it ({reason}). Download it and name the folder"
        ) from error


def open_source(source: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Open a checkpoint folder and detect its layout.

    Raises:
        FileNotFoundError: The folder or a part of it does not exist.
        ValueError: The checkpoint is damaged, unsafe or of an unknown layout.
    """
    folder = resolve(source, revision)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file that is not a gguf; name the checkpoint's folder")
    config = read_config(folder)
    checkpoint = Checkpoint(folder)
    return Source(folder, checkpoint, config, detect(checkpoint, config))


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "native",
    tower: str | os.PathLike[str] | None = None,
    decoder: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    template: str | None = None,
    keep_decoder: bool = True,
    max_shard_size: str | int = "5GB",
    license: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    on_start: Callable[[int], Progress] | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint, shard by shard; the destination is written atomically.

    | source | `native` | `original` | `vision-tower` |
    |---|---|---|---|
    | released Florence-VL | this package's Florence-VL | - | a transformers Florence-2 |
    | this package's Florence-VL | - | the authors' layout | a transformers Florence-2 |
    | Florence-2, Microsoft's layout | a transformers Florence-2 | - | - |
    | Florence-2, transformers' | the same, checked, as safetensors | Microsoft's layout | - |
    | an LLM's gguf | safetensors, fp32 | - | - |

    Args:
        source: Folder, gguf file or hub id.
        destination: Folder to write.
        to: `native`, `original` or `vision-tower`.
        tower: Separate tower folder of a released Florence-VL; `vision_tower/` inside the source is found
            automatically.
        decoder: A Florence-2 (or a converted Florence-VL) whose decoder is used by `original` and `vision-tower`.
        tokenizer: Folder of the LLM's tokenizer if the source has none.
        template: Chat template by name, if it should not be chosen by the tokenizer's control tokens.
        keep_decoder: Keep the tensors that Florence-VL does not use in `original/`, so that `to="original"` restores
            the source bit for bit (0.4 GB for the released models).
        max_shard_size: Largest file, e.g. "5GB".
        license: License tag for the card's front matter.
        overwrite: Replace an existing folder.
        revision: Revision of a hub id.
        on_start: Called with the number of bytes to write, when all checks have passed; its result is called
            with the bytes of each tensor.

    Returns:
        The report: source and destination, settings, omitted tensors with reasons, notes.

    Raises:
        FileNotFoundError: A source or a shard is missing.
        ValueError: Source or destination are invalid; nothing was written.
    """
    if to not in TARGETS:
        raise ValueError(f"unknown target {to!r}. {did_you_mean(to, TARGETS)}")
    target = Path(destination).expanduser()
    max_bytes = parse_size(max_shard_size)
    check_destination(target, overwrite=overwrite)
    path = resolve(source, revision)
    check_destination(target, overwrite=overwrite, sources=[path])
    gguf = find_gguf(path)
    if gguf is not None:
        if to != "native":
            raise ValueError(f"a gguf can only be converted to 'native', not to {to!r}")
        _refuse("a gguf", tower=tower, decoder=decoder, tokenizer=tokenizer, template=template)
        _refuse("a gguf", **{"drop-decoder": None if keep_decoder else True})
        convert_gguf(gguf, target, overwrite, license)
        return {"source": str(gguf), "source_layout": "gguf", "written": "transformers LLM, float32", "dropped": {}}
    if to == "original":
        _refuse("the original layout, which has no card", license=license)
    opened = open_source(path)
    plan = make_plan(opened, to, tower, decoder, tokenizer, template)
    plan.source = str(source)
    is_florence_vl = plan.kind == "Florence-VL"
    if to != "original":
        terms, tag = _terms(str(plan.settings.get("template")), is_florence_vl)
        title = opened.layout.title
        plan.files.append(
            lambda folder: _write_text(
                folder / "README.md", write_card(plan.report(), title, license or tag, terms, is_florence_vl)
            )
        )
    if not keep_decoder:
        plan.side = []
    progress = on_start(plan.nbytes) if on_start is not None else None
    plan.write(target, max_bytes, keep_decoder, overwrite, progress)
    return plan.report()


def make_plan(
    opened: Source,
    to: str,
    tower: str | os.PathLike[str] | None = None,
    decoder: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    template: str | None = None,
) -> Plan:
    """The checked plan of a conversion; writes nothing. Arguments as in `convert`.

    Raises:
        ValueError: The source cannot be converted to the target, or an option does not apply to this source.
    """
    name = opened.layout.name
    folder, checkpoint, config = opened.folder, opened.checkpoint, opened.config
    if name == "florence-vl-original" and to in ("native", "vision-tower"):
        found = resolve(tower) if tower is not None else folder / "vision_tower"
        tower_source = florence_vl_plans.open_tower(found) if tower is not None or found.is_dir() else None
        if to == "native":
            _refuse("a released Florence-VL", decoder=decoder)
            processor = ReleasedProcessor.open(
                folder, config, resolve(tokenizer) if tokenizer else None, found, template
            )
            return florence_vl_plans.plan_from_original(checkpoint, config, tower_source, processor)
        _refuse("extracting a tower", tokenizer=tokenizer, template=template)
        infos = florence_vl.tower_infos(checkpoint, florence_vl.ORIGINAL_TOWER)
        fields = (
            florence2.native_config(tower_source.config, infos)
            if tower_source is not None and tower_source.config
            else florence2.config_from_shapes(infos)
        )
        return _plan_tower(opened, fields, decoder, found)
    if name == "florence-vl" and to == "vision-tower":
        _refuse("extracting a tower", tower=tower, tokenizer=tokenizer, template=template)
        if config.get("tower", "florence2") != "florence2":
            raise ValueError(f"{folder}: its tower is {config['tower']!r}, no Florence-2; load its backbone directly")
        return _plan_tower(opened, config["vision_config"], decoder, folder)
    if name == "florence-vl" and to == "original":
        _refuse("writing the authors' layout", tower=tower, template=template)
        return florence_vl_plans.plan_to_original(
            opened, open_source(decoder) if decoder is not None else None, resolve(tokenizer) if tokenizer else None
        )
    if name in ("florence2", "florence2-microsoft") and to == "native":
        _refuse("a Florence-2", tower=tower, decoder=decoder, tokenizer=tokenizer, template=template)
        return florence2_plans.plan_native(checkpoint, config, name)
    if name == "florence2" and to == "original":
        _refuse("a Florence-2", tower=tower, decoder=decoder, tokenizer=tokenizer, template=template)
        return florence2_plans.plan_microsoft(checkpoint, config)
    already = {"florence-vl": "native", "florence-vl-original": "original", "florence2-microsoft": "original"}
    if already.get(name) == to:
        raise ValueError(f"{folder} is already {LAYOUTS[name].title}; nothing to convert")
    raise ValueError(f"{folder} is {LAYOUTS[name].title}: {to!r} is for a Florence-VL")


def _plan_tower(
    opened: Source, fields: dict[str, Any], decoder: str | os.PathLike[str] | None, tower_folder: Path
) -> Plan:
    other = open_source(decoder) if decoder is not None else None
    if other is not None and other.layout.name not in ("florence2", "florence2-microsoft"):
        raise ValueError(f"--decoder needs a Florence-2; {other.folder} is {other.layout.title}")
    return florence2_plans.plan_vision_tower(opened, fields, other, tower_folder)


def _refuse(what: str, **options: Any) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} does not apply to {what}")


def _terms(template: str, florence_vl_model: bool) -> tuple[list[str], str]:
    if not florence_vl_model:
        return ["Florence-2: MIT (Microsoft)"], "mit"
    tag, sentence = license_of(template)
    return [
        "the authors' repositories of weights state no license; their code is Apache-2.0",
        sentence,
        "the vision tower is Florence-2: MIT (Microsoft)",
        "training data include ShareGPT4V and other sets for non-commercial use (CC BY-NC 4.0)",
    ], tag


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
