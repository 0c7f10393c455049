"""`gated` fusion: the image and the question determine the weight of each prompted feature.

h_f = g_f * V'_f, concatenated along channels as `channel` does, g = 2 sigmoid(W2 silu(W1 [norm(q); norm(mean V)])).
W2 and its bias are initialized to zero, so g = 1 and the fusion equals `channel` bit for bit: released weights load,
and a trained `channel` model can continue training with gates. The first feature (V, DaViT's) is never gated.

Shape letters: B images, N tokens, D channels of a feature, F gated features, H width of the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from florence_vl.model.fusion.base import FUSIONS
from florence_vl.model.fusion.paper import ChannelFusion
from florence_vl.registry import did_you_mean

Context = Literal["none", "image", "question"]
CONTEXTS: tuple[Context, ...] = ("none", "image", "question")


class ZeroLinear(nn.Linear):
    """A linear layer that is initialized to zero."""

    def reset_parameters(self) -> None:
        """Zero the parameters that `from_pretrained` has not loaded."""
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


@FUSIONS.register("gated")
class GatedFusion(ChannelFusion):
    """Channel fusion with one gate per prompted feature.

    Args:
        feature_dims: Channels D of each feature by name, in the order of fusion.
        context_dim: Width H of the question's state; the LLM's hidden size.
        context: Inputs of the gates: `none` (learned constants), `image` (the mean of V), or `question` (both).
        per_token: Whether each token has separate gates, computed from V at its position.
        hidden: Width of the hidden layer.

    Raises:
        ValueError: The context is unknown, a `question` gate has no `context_dim`, or there is no feature to gate.
    """

    def __init__(
        self,
        feature_dims: Mapping[str, int],
        context_dim: int | None = None,
        context: Context | None = None,
        per_token: bool = False,
        hidden: int = 256,
    ) -> None:
        super().__init__(feature_dims)
        context = context or ("image" if context_dim is None else "question")
        if context not in CONTEXTS:
            raise ValueError(f"unknown gate context {context!r}. {did_you_mean(context, CONTEXTS)}")
        if context == "question" and context_dim is None:
            raise ValueError("a gate with context='question' needs context_dim, the width of the LLM")
        if len(self.feature_dims) < 2:
            raise ValueError(f"fusion 'gated' needs a second feature, as the first is never gated: {feature_dims}")
        self.context, self.per_token = context, per_token
        self.image_dim = next(iter(self.feature_dims.values()))
        num_gated = len(self.feature_dims) - 1
        in_dim = {"none": 0, "image": self.image_dim}.get(context, self.image_dim + (context_dim or 0))
        self.hidden = nn.Linear(in_dim, hidden) if in_dim else None
        self.gate = ZeroLinear(hidden, num_gated) if in_dim else None
        self.constant = None if in_dim else nn.Parameter(torch.zeros(num_gated))
        self.token_gate = ZeroLinear(self.image_dim, num_gated, bias=False) if per_token else None
        self.no_question = nn.Parameter(torch.zeros(context_dim or 0)) if context == "question" else None

    @property
    def uses_context(self) -> bool:
        return self.context == "question"

    def reset_constants(self) -> None:
        """Zero the parameters outside layers that `from_pretrained` has not loaded."""
        for parameter in (self.constant, self.no_question):
            if parameter is not None:
                init.zeros_(parameter)

    def gates(self, features: Mapping[str, Tensor], context: Tensor | None = None) -> Tensor:
        """The gates, (B, 1, F) or with `per_token` (B, N, F), each in (0, 2).

        Raises:
            ValueError: The gates depend on the question and `context` is None.
        """
        image_BND = features[next(iter(self.feature_dims))]
        if self.constant is not None:
            logits_BF = self.constant.expand(image_BND.shape[0], -1)
        else:
            assert self.hidden is not None
            assert self.gate is not None
            states = [_normalize(image_BND.mean(1))]
            if self.no_question is not None:
                self._check_context(context)
                assert context is not None
                context = context.to(image_BND.dtype)
                has_text_B1 = (context != 0).any(-1, keepdim=True)
                states.insert(0, _normalize(torch.where(has_text_B1, context, self.no_question)))
            logits_BF = self.gate(nn.functional.silu(self.hidden(torch.cat(states, -1))))
        logits_BNF = logits_BF.unsqueeze(1)
        if self.token_gate is not None:
            logits_BNF = logits_BNF + self.token_gate(_normalize(image_BND))
        return 2 * torch.sigmoid(logits_BNF)

    def forward(self, features: Mapping[str, Tensor], context: Tensor | None = None) -> Tensor:
        image_BND, *prompted = self.ordered(features)
        gates_BNF = self.gates(features, context)
        gated = [gates_BNF[..., i : i + 1] * feature_BND for i, feature_BND in enumerate(prompted)]
        return torch.cat([image_BND, *gated], dim=-1)


def _normalize(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def check_gate(gate: Mapping[str, Any]) -> None:
    """Check that the options of a config's `gate` are known.

    Raises:
        ValueError: An option is unknown; similar names are suggested.
    """
    known = ("context", "per_token", "hidden")
    for key in gate:
        if key not in known:
            raise ValueError(f"unknown option {key!r} of gate. {did_you_mean(str(key), known)}")
