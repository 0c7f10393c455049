"""Detects the layout of a checkpoint folder from its tensors and config, never from its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence_vl.convert import florence2, florence_vl
from florence_vl.convert.plan import Copy, Op, Transpose
from florence_vl.convert.shards import Checkpoint, few
from florence_vl.files import read_json
from florence_vl.registry import Registry


@dataclass(frozen=True)
class Layout:
    """A naming scheme of tensors.

    Attributes:
        name: Registered name.
        title: Description for messages.
        matches: (config.json, tensor names) -> whether a checkpoint has this layout.
        canonical: Tensor name -> (name in this package's layout, operation); None if there is none.
    """

    name: str
    title: str
    matches: Callable[[Mapping[str, Any], Iterable[str]], bool]
    canonical: Callable[[str], tuple[str, Op] | None]


LAYOUTS: Registry[Layout] = Registry("checkpoint layout")


def _add(
    name: str,
    title: str,
    matches: Callable[[Mapping[str, Any], Iterable[str]], bool],
    canonical: Callable[[str], tuple[str, Op] | None],
) -> None:
    LAYOUTS.register(name)(Layout(name, title, matches, canonical))


def _florence2_canonical(native: str | None) -> str | None:
    if native is None:
        return None
    tower = florence2.native_to_tower(
        "model.language_model.encoder.embed_tokens.weight" if native == florence2.SHARED else native
    )
    if tower is not None:
        return florence_vl.TOWER + tower
    return "florence2." + native


def _native_canonical(name: str) -> tuple[str, Op] | None:
    found = _florence2_canonical(name if florence2.native_to_microsoft(name) else None)
    return None if found is None else (found, Copy())


def _microsoft_canonical(name: str) -> tuple[str, Op] | None:
    found = _florence2_canonical(florence2.microsoft_to_native(name))
    return None if found is None else (found, Transpose() if name == florence2.TRANSPOSED else Copy())


def _original_canonical(name: str) -> tuple[str, Op] | None:
    return florence_vl.original_to_ours(name)


def _has(*wanted: str) -> Callable[[Mapping[str, Any], Iterable[str]], bool]:
    return lambda config, names: set(wanted) <= set(names)


_add(
    "florence-vl",
    "Florence-VL of this package",
    lambda config, names: config.get("model_type") == "florence_vl",
    lambda name: (name, Copy()),
)
_add(
    "florence-vl-original",
    "a released Florence-VL (the authors' layout)",
    _has("model.mm_projector.encoder_mlp.0.weight"),
    _original_canonical,
)
_add("florence2", "a Florence-2 of transformers", _has("model.vision_tower.convs.0.conv.weight"), _native_canonical)
_add(
    "florence2-microsoft",
    "a Florence-2 in Microsoft's layout",
    _has("vision_tower.convs.0.proj.weight", florence2.TRANSPOSED),
    _microsoft_canonical,
)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint folder."""

    folder: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    layout: Layout


def detect(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Layout:
    """The layout of a checkpoint.

    Raises:
        ValueError: The layout is unknown; the message describes the content of the folder.
    """
    for name in LAYOUTS:
        if LAYOUTS[name].matches(config, checkpoint.tensors):
            return LAYOUTS[name]
    hint = ""
    if any(n.startswith("model.mm_projector.") for n in checkpoint.tensors):
        hint = " It looks like a LLaVA whose tower is not Florence-2."
    elif any(n.startswith("model.layers.") for n in checkpoint.tensors):
        hint = " It looks like a bare language model: florence_vl.build_model accepts it as `llm` without conversion."
    known = "; ".join(f"{LAYOUTS[n].title}" for n in LAYOUTS)
    raise ValueError(
        f"{checkpoint.folder}: model_type {config.get('model_type')!r} with tensors {few(list(checkpoint.tensors), 3)} "
        f"is none of the known layouts ({known}; an LLM's .gguf).{hint}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; empty if it does not exist."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}
