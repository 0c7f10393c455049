"""Frozen modules stay in eval mode, so they are deterministic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def keep_frozen_in_eval(root: nn.Module) -> None:
    """Put every module whose parameters are all frozen back in eval mode after `root.train()`.

    This includes frozen blocks inside a trained part (LoRA's base, an LLM's first layers). A layer with activation
    checkpointing keeps its flag, which transformers reads, because gradients still pass through it; the modules inside
    it, which contain dropout, are in eval mode.
    """
    for module in root.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            checkpoints = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
            for child in module.modules():
                child.training = checkpoints and child is module


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own mode again, so that frozen ones stay in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
