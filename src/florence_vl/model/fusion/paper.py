"""The paper's three fusions: along channels (its choice), along the sequence, and the mean (section 3.3, Table 1).

Shape letters: B images, N tokens of a feature, D channels of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from florence_vl.model.fusion.base import FUSIONS, Fusion


@FUSIONS.register("channel")
class ChannelFusion(Fusion):
    """Concatenates along channels: (B, N, sum of D). The paper's choice: as many tokens as one feature."""

    @property
    def out_dim(self) -> int:
        return sum(self.feature_dims.values())

    def forward(self, features: Mapping[str, Tensor], context: Tensor | None = None) -> Tensor:
        return torch.cat(self.ordered(features), dim=-1)


@FUSIONS.register("token")
class TokenFusion(Fusion):
    """Concatenates along the sequence: (B, k N, D). The paper's 1728 tokens are three features of 576."""

    def __init__(self, feature_dims: Mapping[str, int]) -> None:
        super().__init__(feature_dims)
        self._dim = self._same_width("token")

    @property
    def out_dim(self) -> int:
        return self._dim

    def num_tokens(self, num_feature_tokens: int) -> int:
        return num_feature_tokens * len(self.feature_dims)

    def forward(self, features: Mapping[str, Tensor], context: Tensor | None = None) -> Tensor:
        return torch.cat(self.ordered(features), dim=1)


@FUSIONS.register("average")
class AverageFusion(Fusion):
    """Mean over the features: (B, N, D)."""

    def __init__(self, feature_dims: Mapping[str, int]) -> None:
        super().__init__(feature_dims)
        self._dim = self._same_width("average")

    @property
    def out_dim(self) -> int:
        return self._dim

    def forward(self, features: Mapping[str, Tensor], context: Tensor | None = None) -> Tensor:
        return torch.stack(self.ordered(features)).mean(dim=0)
