"""A fine-tuned model as a small file: fusion and projector whole, the LLM's change as LoRA factors.

A whole Florence-VL repeats the tower and the LLM that it was assembled from. Where those are at hand, what training
changed is enough: `extract_adapter` takes it out, `apply_adapter` puts it back.
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
    """What training changed: matrices of the LLM as the best rank-`rank` difference (Eckart-Young), the rest whole.

    Args:
        model: The trained model.
        base: The model that `build_model` assembles of the same parts.
        rank: Of each difference; the sum of the ranks of all LoRA adapters that were merged loses nothing.
        dtype: Of what is kept.

    Returns:
        Tensors by name (`NAME.lora_B` (out, r), `NAME.lora_A` (r, in) or `NAME.whole`), and the share of the
        differences' energy (sum of squares) that the rank leaves out.

    Raises:
        ValueError: The two have different layouts, the tower was changed, or a difference is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    trained, origin = model.state_dict(), base.state_dict()
    if trained.keys() != origin.keys():
        only = sorted(trained.keys() ^ origin.keys())
        raise ValueError(f"{len(only)} weights are in one of the two models only, for example {only[0]}")
    tower = {name for name, _ in base.part_parameters("tower")}
    kept: dict[str, Tensor] = {}
    total = lost = 0.0
    seen: set[int] = set()
    for name, value in trained.items():
        if value.data_ptr() in seen:
            continue  # a tied head is the embedding under a second name
        seen.add(value.data_ptr())
        if value.shape != origin[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)} and {tuple(origin[name].shape)} in the base")
        change = value.float() - origin[name].float()
        if not change.any():
            continue
        if not torch.isfinite(change).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        if name in tower:
            raise ValueError(f"{name}, a weight of the tower, was trained: an adapter leaves the tower as it is")
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
    """Turn the base into the trained model, in place.

    Raises:
        ValueError: The adapter belongs to another model: a name or a shape is not the model's.
    """
    state = model.state_dict()
    for key, value in adapter.items():
        name = key
        for suffix in (UP, DOWN, WHOLE):
            name = name.removesuffix(suffix)
        if name not in state or name == key:
            raise ValueError(f"the adapter changes {name!r}, which this model has not: it belongs to another one")
        target = state[name]
        if key.endswith(DOWN):
            continue
        if key.endswith(UP) and key.removesuffix(UP) + DOWN not in adapter:
            raise ValueError(f"the adapter holds {key!r} without its other half")
        new = value.float() if key.endswith(WHOLE) else target.float() + value.float() @ adapter[name + DOWN].float()
        if new.shape != target.shape:
            raise ValueError(f"the adapter has {name} of shape {tuple(new.shape)}, the model {tuple(target.shape)}")
        target.copy_(new)
