"""The projector: an MLP from fused vision channels to the LLM's width (paper section 3.4; LLaVA-1.5's mlpNx_gelu)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN


class Projector(nn.Module):
    """`depth` linear layers with an activation between them.

    Args:
        in_dim: Channels C of the fused features.
        out_dim: Width H of the LLM.
        depth: Number of linear layers; 3 in the paper's models, 2 in LLaVA-1.5.
        hidden_act: Activation, by transformers' name; `gelu` is the exact (erf) one.
    """

    def __init__(self, in_dim: int, out_dim: int, depth: int = 3, hidden_act: str = "gelu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_dim if i == 0 else out_dim, out_dim) for i in range(depth))
        self.act = ACT2FN[hidden_act]

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, H)."""
        x_BNH = self.layers[0](x_BNC)
        for layer in self.layers[1:]:
            x_BNH = layer(self.act(x_BNH))
        return x_BNH
