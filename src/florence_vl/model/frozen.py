"""What is frozen is deterministic: the one rule of training mode."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def keep_frozen_in_eval(root: nn.Module) -> None:
    """After `root.train()`: put every module whose parameters are all frozen back in eval, so without dropout.

    A frozen block inside a part that trains (LoRA's base, an LLM's first layers) counts too. A layer that recomputes
    activations keeps its own flag, which transformers reads to checkpoint, as gradients still pass through it; the
    modules inside, where dropout lies, are in eval.
    """
    for module in root.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            checkpoints = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
            for child in module.modules():
                child.training = checkpoints and child is module
