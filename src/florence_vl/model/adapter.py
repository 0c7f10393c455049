"""A fine-tuned model as a small file: the whole fusion and projector, and the LLM's change as LoRA factors.

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

UP, DOWN, WHOLE = ".lora_B", ".lora_A", ".whole"


@torch.no_grad()
def extract_adapter(
    model: FlorenceVLForConditionalGeneration,
    base: FlorenceVLForConditionalGeneration,
    rank: int,
    dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, Tensor], float]:
    """Changes made by training: the best rank-`rank` approximation for the LLM's matrices, all others whole.

    Args:
        model: The trained model.
        base: The model that `build_model` assembles from the same parts.
        rank: Rank of each difference; the sum of the ranks of all merged LoRA adapters is lossless.
        dtype: Data type of the result.

    Returns:
        Tensors by name (`NAME.lora_B` (out, r), `NAME.lora_A` (r, in) or `NAME.whole`), and the fraction of the
        differences' energy (sum of squares) that the factors omit.

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
    total = lost = 0.0
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
        if "multi_modal_projector" in name or ".fusion." in name or change.ndim != 2 or min(change.shape) <= 2 * rank:
            kept[name + WHOLE] = value.to(dtype).contiguous()
            continue
        left, scale, right = torch.linalg.svd(change, full_matrices=False)
        root = scale[:rank].sqrt()
        kept[name + UP] = (left[:, :rank] * root).to(dtype).contiguous()
        kept[name + DOWN] = (right[:rank] * root[:, None]).to(dtype).contiguous()
        total += scale.square().sum().item()
        lost += scale[rank:].square().sum().item()
    return kept, lost / total if total else 0.0


@torch.no_grad()
def apply_adapter(model: FlorenceVLForConditionalGeneration, adapter: Mapping[str, Tensor]) -> None:
    """Apply an adapter to the base model in place.

    Raises:
        ValueError: The adapter belongs to another model: the model lacks a name, or a shape differs.
    """
    state = model.state_dict()
    for key, value in adapter.items():
        name = key
        for suffix in (UP, DOWN, WHOLE):
            name = name.removesuffix(suffix)
        if name not in state or name == key:
            raise ValueError(f"the adapter changes {name!r}, which is not in this model: it belongs to another model")
        target = state[name]
        if key.endswith(DOWN):
            continue
        if key.endswith(UP) and key.removesuffix(UP) + DOWN not in adapter:
            raise ValueError(f"the adapter contains {key!r} without the other factor")
        new = value.float() if key.endswith(WHOLE) else target.float() + value.float() @ adapter[name + DOWN].float()
        if new.shape != target.shape:
            raise ValueError(f"the adapter has {name} of shape {tuple(new.shape)}, the model {tuple(target.shape)}")
        target.copy_(new)
