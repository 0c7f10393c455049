"""The language modelling head: logits, or the summed loss of many positions without ever holding all their logits.

Shape letters: K supervised positions, H width of the LLM, X vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

CHUNK_BYTES = 1 << 28
"""Float32 logits that `LanguageHead` holds at once, in bytes: 523 positions of a vocabulary of 128,256."""


def chunk_rows(vocab_size: int) -> int:
    """Positions whose logits are held at once."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of `states @ weight.T`, chunk by chunk; each chunk's gradients are computed with its logits.

    The method of Liger-Kernel's fused linear cross-entropy (Hsu et al., 2024), in plain torch. Products of several
    chunks add up in float32.
    """

    @staticmethod
    def forward(ctx: Any, states_KH: Tensor, weight_XH: Tensor, targets_K: Tensor, with_gradients: bool) -> Tensor:
        kind = states_KH.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_XH.dtype
        rows = chunk_rows(len(weight_XH))
        several = len(states_KH) > rows
        for_states, for_weight = (needed and with_gradients for needed in ctx.needs_input_grad[:2])
        total = states_KH.new_zeros((), dtype=torch.float32)
        grad_states = torch.zeros_like(states_KH) if for_states else None
        grad_weight = None
        if for_weight:
            grad_weight = torch.zeros_like(weight_XH, dtype=torch.float32 if several else weight_XH.dtype)
        with torch.autocast(kind, enabled=False):
            compute_XH = weight_XH.to(dtype)
            for start in range(0, len(states_KH), rows):
                chunk = slice(start, start + rows)
                part_CH, targets_C1 = states_KH[chunk].to(dtype), targets_K[chunk].unsqueeze(1)
                logits_CX = nn.functional.linear(part_CH, compute_XH).float()
                sums_C1 = logits_CX.logsumexp(1, keepdim=True)
                total += (sums_C1 - logits_CX.gather(1, targets_C1)).sum()
                if not (for_states or for_weight):
                    continue
                # softmax minus the target's one, in the place of the logits
                probabilities_CX = logits_CX.sub_(sums_C1).exp_()
                gradient_CX = probabilities_CX.scatter_add_(1, targets_C1, -torch.ones_like(sums_C1)).to(dtype)
                if grad_states is not None:
                    grad_states[chunk] = (gradient_CX @ compute_XH).to(grad_states.dtype)
                if grad_weight is None:
                    continue
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(gradient_CX.T, part_CH)
                else:
                    grad_weight += gradient_CX.T @ part_CH
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_XH.dtype)
        ctx.save_for_backward(grad_states, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_states, grad_weight = ctx.saved_tensors
        return _scaled(grad_states, grad), _scaled(grad_weight, grad), None, None


def _scaled(gradient: Tensor | None, scale: Tensor) -> Tensor | None:
    """A gradient times a float32 scalar, which CUDA would round to the gradient's type first (bfloat16: 0.4 %)."""
    if gradient is None or gradient.dtype == torch.float32:
        return None if gradient is None else gradient * scale
    scaled = torch.empty_like(gradient)
    rows = chunk_rows(gradient.shape[1])
    for start in range(0, len(gradient), rows):
        scaled[start : start + rows] = gradient[start : start + rows].float() * scale
    return scaled


class LanguageHead(nn.Linear):
    """A linear layer without bias that also gives the loss of its logits.

    One call for all positions: under FSDP2 the weights are gathered once, whatever their number.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)

    def forward(self, states: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, (..., H) -> (..., X); with targets, (K, H) and (K,), the summed cross-entropy, a float32 scalar."""
        if targets is None:
            return super().forward(states)
        if isinstance(self.weight, DTensor):  # tensor parallel; FSDP2 has put its whole weights in place by now
            return _whole_loss(super().forward(states), targets)
        return _ChunkedLoss.apply(states, self.weight, targets, torch.is_grad_enabled())


def summed_loss(head: nn.Module, states_KH: Tensor, targets_K: Tensor) -> Tensor:
    """Summed cross-entropy of a head's logits; chunk by chunk, unless the head was replaced (PEFT, quantizers).

    Args:
        head: The head, or what stands in its place.
        states_KH: The LLM's last hidden states where something is supervised.
        targets_K: Token ids.

    Returns:
        Scalar float32.
    """
    if isinstance(head, LanguageHead):
        return head(states_KH, targets_K)
    return _whole_loss(head(states_KH), targets_K)


def _whole_loss(logits_KX: Tensor, targets_K: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_KX.float(), targets_K, reduction="sum")


__all__ = ["CHUNK_BYTES", "LanguageHead", "chunk_rows", "summed_loss"]
