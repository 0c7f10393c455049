"""Depth-breadth fusion: named features in, one sequence of image tokens out. Fusions are registered by name."""

from florence_vl.model.fusion.base import FUSIONS, Fusion, build_fusion, merge_tokens
from florence_vl.model.fusion.gated import GatedFusion
from florence_vl.model.fusion.paper import AverageFusion, ChannelFusion, TokenFusion

__all__ = [
    "FUSIONS",
    "AverageFusion",
    "ChannelFusion",
    "Fusion",
    "GatedFusion",
    "TokenFusion",
    "build_fusion",
    "merge_tokens",
]
