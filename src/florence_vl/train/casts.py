"""Copies of frozen weights in the compute type, which autocast would make again for every micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def keep_casts(root: nn.Module, dtype: torch.dtype) -> None:
    """Let every frozen linear layer keep a copy of its weight for autocast, which keeps those of trained weights only.

    Results are the same, bit for bit. The layers keep their float32 weights, for saving. The copies need no memory at
    the peak of a step, when autocast's own are saved for the backward pass, except those of the tower and of the head.

    Args:
        root: Module whose linear layers are changed; what is frozen must be decided.
        dtype: Autocast's compute type.
    """
    for module in root.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and _is_plain(module.weight):
            module.forward = _Forward(module, dtype)  # type: ignore[method-assign]


def _is_plain(weight: Tensor) -> bool:
    """Whether it is an ordinary float32 tensor; quantizers subclass linear layers and tensors."""
    return weight.dtype == torch.float32 and type(weight.data) is Tensor


class _Forward:
    """The forward pass of a linear layer with the copy in place of its weight; outside autocast, its own."""

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        self._module, self._dtype, self._own = module, dtype, module.forward
        self._copy: nn.Parameter | None = None
        self._made_of: tuple[int, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        weight, kind = self._module.weight, self._module.weight.device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != self._dtype or weight.requires_grad:
            return self._own(*args, **kwargs)
        made_of = (weight.data_ptr(), weight._version)  # a checkpoint that is loaded changes the version
        if self._copy is None or made_of != self._made_of:
            self._copy, self._made_of = nn.Parameter(weight.detach().to(self._dtype), requires_grad=False), made_of
        parameters = self._module._parameters
        parameters["weight"] = self._copy
        try:
            return self._own(*args, **kwargs)
        finally:
            parameters["weight"] = weight  # type: ignore[assignment]


__all__ = ["keep_casts"]
