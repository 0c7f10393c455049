"""Gradients between the backward pass and the optimizer: missing ones, norms by part, clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florence_vl.train.optimizer import Group
from florence_vl.train.world import World


def fill_missing_gradients(groups: Sequence[Group]) -> None:
    """Set missing gradients to zero (those of the tower, in a step without images).

    AdamW skips parameters without gradients. With several processes they have zero gradients, and the number of
    processes must not change the result.
    """
    for group in groups:
        for parameter in group.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def loss_and_norms(loss_sum: Tensor, groups: Sequence[Group], world: World) -> tuple[float, dict[str, float]]:
    """The global loss and the gradient norm by part, with one synchronization with the device.

    Args:
        loss_sum: This process's part of the loss, a scalar on its device; replaced by the sum over all processes.
        groups: The parameters, with their gradients.
        world: The processes.
    """
    values = [loss_sum]
    if world.size > 1:
        torch.distributed.all_reduce(loss_sum)
    parts: dict[str, list[Tensor]] = {}
    for group in groups:
        parts.setdefault(group.part, []).extend(p.grad for p in group.parameters.values() if p.grad is not None)
    for gradients in parts.values():
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        values.append(norm.detach().float().to(loss_sum.device))
    numbers = torch.stack([value.reshape(()) for value in values]).tolist()
    return numbers[0], dict(zip(parts, numbers[1:], strict=True))


def clip_gradients(groups: Sequence[Group], norm: float, limit: float | None) -> None:
    """Scale all gradients so that their norm is at most `limit`; None disables clipping.

    Args:
        groups: The parameters, with their gradients.
        norm: Norm of all gradients together.
        limit: Maximum norm.
    """
    if limit is None or norm <= limit:
        return
    gradients = [p.grad for g in groups for p in g.parameters.values() if p.grad is not None]
    torch._foreach_mul_(gradients, limit / (norm + 1e-6))
