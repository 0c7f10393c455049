"""A fine-tuned model as a small file: the whole fusion and projector, and the LLM's change as 4-bit low-rank factors.

A saved Florence-VL contains copies of the tower and the LLM from which it was assembled. If these are available, the
changes made by training are sufficient: `extract_adapter` computes them, `apply_adapter` applies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

UP, DOWN, SCALE, WHOLE = ".up", ".down", ".scale", ".whole"
STEP = 0.3352
"""Step of the best uniform 16-level quantizer of a standard normal distribution (Max, 1960)."""


@torch.no_grad()
def extract_adapter(
    model: FlorenceVLForConditionalGeneration, base: FlorenceVLForConditionalGeneration, rank: int
) -> tuple[dict[str, Tensor], float]:
    """Changes made by training: a low-rank approximation for the LLM's matrices, all others whole.

    The singular components of all matrices compete for the bytes that factors of rank `rank` would take: those with the
    most energy per byte are kept. Each is stored as two vectors of 4-bit integers and one scale. Half of the components
    are taken from the change, the other half from what the first half leaves, which includes its rounding errors.

    Args:
        model: The trained model.
        base: The model that `build_model` assembles from the same parts.
        rank: Mean rank of the differences, which sets the size of the file.

    Returns:
        Tensors by name (`NAME.up` (r, out / 2) and `NAME.down` (r, in / 2) with two integers per byte, and `NAME.scale`
        (r,) float32; or `NAME.whole` in float16), and the fraction of the differences' energy (sum of squares) that the
        factors omit, rounding to integers included.

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
            if not torch.isfinite(kept[name + WHOLE]).all():
                raise ValueError(f"{name} contains numbers beyond the range of float16, in which an adapter stores it")
        else:
            changes[name] = change
    if not changes:
        return kept, 0.0
    ranks = _share_ranks(changes, rank)
    total = lost = 0.0
    for name, change in changes.items():
        rest, found = change, []
        for part in (ranks[name] - ranks[name] // 2, ranks[name] // 2):
            left, scale, right = torch.linalg.svd(rest, full_matrices=False)
            up, up_scale = _to_int4(left.T[:part])
            down, down_scale = _to_int4(right[:part])
            found.append({UP: up, DOWN: down, SCALE: up_scale * down_scale * scale[:part]})
            rest = rest - _product(found[-1], change.shape)
        kept |= {name + kind: torch.cat([one[kind] for one in found]) for kind in (UP, DOWN, SCALE)}
        total += change.square().sum().item()
        lost += rest.square().sum().item()
    return kept, lost / total


def _share_ranks(changes: Mapping[str, Tensor], rank: int) -> dict[str, int]:
    scales = {name: torch.linalg.svdvals(change) for name, change in changes.items()}
    widths = {name: sum(change.shape) for name, change in changes.items()}
    density_K = torch.cat([scale.square() / widths[name] for name, scale in scales.items()])
    width_K = torch.cat([torch.full_like(scale, widths[name]) for name, scale in scales.items()])
    order_K = density_K.argsort(descending=True)
    fits = int((width_K[order_K].double().cumsum(0) <= rank * sum(widths.values())).sum())
    least = density_K[order_K[max(fits, 1) - 1]]
    return {name: max(1, int((scale.square() / widths[name] >= least).sum())) for name, scale in scales.items()}


def _to_int4(vectors_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of integers from 0 to 15 in a byte, and the scale of each vector; `_from_int4` reverses it."""
    scale_R = STEP * vectors_RN.square().mean(1).sqrt()
    codes_RN = (vectors_RN / scale_R[:, None] + 7.5).round().clamp(0, 15).to(torch.uint8)
    codes_RN = nn.functional.pad(codes_RN, (0, codes_RN.shape[1] % 2))
    return codes_RN[:, ::2] | codes_RN[:, 1::2] << 4, scale_R


def _from_int4(codes_RM: Tensor, width: int) -> Tensor:
    return torch.stack([codes_RM & 15, codes_RM >> 4], -1).flatten(1)[:, :width] - 7.5


def _product(factors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    up_RO, down_RI = (_from_int4(factors[kind], width) for kind, width in zip((UP, DOWN), shape, strict=True))
    return (up_RO.T * factors[SCALE]) @ down_RI


@torch.no_grad()
def apply_adapter(model: FlorenceVLForConditionalGeneration, adapter: Mapping[str, Tensor]) -> None:
    """Apply an adapter to the base model in place.

    Raises:
        ValueError: The adapter belongs to another model: the model lacks a name, or a shape differs.
    """
    state = model.state_dict()
    for key, value in adapter.items():
        name, _, kind = key.rpartition(".")
        if name not in state or f".{kind}" not in (UP, DOWN, SCALE, WHOLE):
            raise ValueError(f"the adapter changes {name!r}, which is not in this model: it belongs to another model")
        target = state[name]
        if f".{kind}" == WHOLE:
            _check_shape(name, value.shape, target.shape, target.shape)
            target.copy_(value)
        else:
            factors = {part: adapter[name + part] for part in (UP, DOWN, SCALE) if name + part in adapter}
            if len(factors) < 3:
                raise ValueError(f"the adapter contains {key!r} without the other factor or the scale")
            if f".{kind}" != UP:
                continue
            found = tuple(2 * factors[part].shape[1] for part in (UP, DOWN))
            _check_shape(name, found, tuple(side + side % 2 for side in target.shape), target.shape)
            target.copy_(target.float() + _product(factors, target.shape).to(target.device))


def _check_shape(name: str, found: Sequence[int], expected: Sequence[int], model: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise ValueError(f"the adapter has {name} of shape {tuple(found)}, the model {tuple(model)}")
