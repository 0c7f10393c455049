"""A fine-tuned model as a small file: the whole fusion and projector, and the LLM's change as 8-bit low-rank factors.

A saved Florence-VL contains copies of the tower and the LLM from which it was assembled. If these are available, the
changes made by training are sufficient: `extract_adapter` computes them, `apply_adapter` applies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

UP, DOWN, SCALE, WHOLE = ".lora_B", ".lora_A", ".scale", ".whole"


@torch.no_grad()
def extract_adapter(
    model: FlorenceVLForConditionalGeneration, base: FlorenceVLForConditionalGeneration, rank: int
) -> tuple[dict[str, Tensor], float]:
    """Changes made by training: a low-rank approximation for the LLM's matrices, all others whole.

    The singular components of all matrices compete for the bytes that factors of rank `rank` would take: those with the
    most energy per byte are kept. Each is stored as two vectors of 8-bit integers and one scale.

    Args:
        model: The trained model.
        base: The model that `build_model` assembles from the same parts.
        rank: Mean rank of the differences, which sets the size of the file.

    Returns:
        Tensors by name (`NAME.lora_B` (out, r) int8, `NAME.lora_A` (r, in) int8 and `NAME.scale` (r,) float32, or
        `NAME.whole` in float16), and the fraction of the differences' energy (sum of squares) that the factors omit,
        rounding to integers included.

    Raises:
        ValueError: The layouts differ, the tower was changed, or a difference is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    trained, origin = model.state_dict(), base.state_dict()
    if trained.keys() != origin.keys():
        only = sorted(trained.keys() ^ origin.keys())
        raise ValueError(f"{len(only)} weights are in only one of the two models, for example {only[0]}")
    tower = {name for name, _ in base.part_parameters("tower")}
    kept: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in trained.items():
        if value.data_ptr() in seen:
            continue  # a tied head is the embedding under another name
        seen.add(value.data_ptr())
        if value.shape != origin[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)} and {tuple(origin[name].shape)} in the base")
        change = value.float() - origin[name].float()
        if not change.any():
            continue
        if not torch.isfinite(change).all():
            raise ValueError(f"{name} contains non-finite numbers")
        if name in tower:
            raise ValueError(f"{name}, a weight of the tower, was trained: an adapter cannot change the tower")
        if "multi_modal_projector" in name or ".fusion." in name or change.ndim != 2:
            kept[name + WHOLE] = value.half().contiguous()
        else:
            changes[name] = change
    if not changes:
        return kept, 0.0
    parts = {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}
    least = _least_density({name: part[1] for name, part in parts.items()}, changes, rank)
    total = lost = 0.0
    for name, (left, scale, right) in parts.items():
        width = sum(changes[name].shape)
        n = max(1, int((scale.square() / width >= least).sum()))
        up, up_scale = _to_int8(left[:, :n], dim=0)
        down, down_scale = _to_int8(right[:n], dim=1)
        kept[name + UP], kept[name + DOWN] = up, down
        kept[name + SCALE] = up_scale * down_scale * scale[:n]
        total += changes[name].square().sum().item()
        lost += (changes[name] - _product(kept, name)).square().sum().item()
    return kept, lost / total


def _least_density(scales: Mapping[str, Tensor], changes: Mapping[str, Tensor], rank: int) -> float:
    """Energy per byte of the last singular component that fits into the bytes of factors of rank `rank`."""
    density_K = torch.cat([scale.square() / sum(changes[name].shape) for name, scale in scales.items()])
    width_K = torch.cat([torch.full_like(scale, sum(changes[name].shape)) for name, scale in scales.items()])
    budget = rank * sum(sum(change.shape) for change in changes.values())
    order_K = density_K.argsort(descending=True)
    fits = int((width_K[order_K].double().cumsum(0) <= budget).sum())
    return density_K[order_K[max(fits, 1) - 1]].item()


def _to_int8(vectors: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 and the scale of each vector along `dim`."""
    scale = vectors.abs().amax(dim) / 127
    return (vectors / scale.unsqueeze(dim)).round().to(torch.int8).contiguous(), scale


def _product(adapter: Mapping[str, Tensor], name: str) -> Tensor:
    return (adapter[name + UP].float() * adapter[name + SCALE]) @ adapter[name + DOWN].float()


@torch.no_grad()
def apply_adapter(model: FlorenceVLForConditionalGeneration, adapter: Mapping[str, Tensor]) -> None:
    """Apply an adapter to the base model in place.

    Raises:
        ValueError: The adapter belongs to another model: the model lacks a name, or a shape differs.
    """
    state = model.state_dict()
    for key, value in adapter.items():
        name, _, kind = key.rpartition(".")
        if name not in state or "." + kind not in (UP, DOWN, SCALE, WHOLE):
            raise ValueError(f"the adapter changes {name!r}, which is not in this model: it belongs to another model")
        if "." + kind in (DOWN, SCALE):
            continue
        if "." + kind == UP and not {name + DOWN, name + SCALE} <= adapter.keys():
            raise ValueError(f"the adapter contains {key!r} without the other factor or the scale")
        target = state[name]
        value = _product(adapter, name) if "." + kind == UP else value.float()
        if value.shape != target.shape:
            raise ValueError(f"the adapter has {name} of shape {tuple(value.shape)}, the model {tuple(target.shape)}")
        value = value.to(target.device)
        target.copy_(target.float() + value if "." + kind == UP else value)
