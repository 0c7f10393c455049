"""Any transformers vision backbone as a tower: CLIP (LLaVA-1.5, the baseline of Table 3), SigLIP, DINOv2 ...

Shape letters: B images, N image tokens, D channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from florence_vl.model.geometry import backbone_prefix_tokens
from florence_vl.model.towers import TOWERS, VisionTower, check_pixels


@TOWERS.register("backbone")
class BackboneTower(VisionTower):
    """Named hidden layers of one vision model.

    Args:
        config: `vision_config` is the backbone's, `feature_layers` names the layers (LLaVA-1.5: `{"clip": -2}`).

    Raises:
        ValueError: A layer index is out of range, or the model is not a vision transformer of one patch size.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision_config
        for field in ("hidden_size", "image_size", "num_hidden_layers", "patch_size"):
            if not isinstance(getattr(vision, field, None), int):
                raise ValueError(
                    f"a {vision.model_type} cannot be a backbone: its config has no {field} that is a number"
                )
        if vision.model_type.startswith("siglip"):
            vision.vision_use_head = False  # SigLIP's pooling head, which is not used as a feature
        self.backbone = AutoModel.from_config(vision, dtype=torch.get_default_dtype())
        depth = vision.num_hidden_layers
        for name, layer in config.feature_layers.items():
            if not -depth - 1 <= layer <= depth:
                raise ValueError(
                    f"feature_layers[{name!r}] is {layer}, but this {vision.model_type} has {depth} layers: an index "
                    f"into its {depth + 1} hidden states is {-depth - 1} to {depth} (0 = the embeddings)"
                )

    @property
    def vision_model(self) -> nn.Module:
        return self.backbone

    @property
    def feature_dims(self) -> dict[str, int]:
        return dict.fromkeys(self.config.features, self.config.vision_config.hidden_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens before the grid."""
        return backbone_prefix_tokens(self.config.vision_config)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for an image of this size in pixels."""
        patch = self.config.vision_config.patch_size
        return height // patch, width // patch

    def num_tokens(self, height: int, width: int) -> int:
        vision = self.config.vision_config
        patch = vision.patch_size
        if min(height, width) < patch:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than one patch of {patch}x{patch}")
        if self.fixed_size and (height, width) != (vision.image_size, vision.image_size):
            raise ValueError(
                f"an image of {height}x{width} pixels: this {vision.model_type} accepts only {vision.image_size}x"
                f"{vision.image_size}. Set the processor's size to that"
            )
        return (height // patch) * (width // patch) + (self.num_prefix_tokens if self.config.mean_token == "all" else 0)

    @property
    def fixed_size(self) -> bool:
        """Whether the backbone has positions for one size only (DINOv2 interpolates its own)."""
        return not self.config.vision_config.model_type.startswith(("dinov2", "dinov3"))

    def forward(self, pixel_values: Tensor, feature_mask: Tensor | None = None) -> dict[str, Tensor]:
        check_pixels(pixel_values)
        num_tokens = self.num_tokens(*pixel_values.shape[-2:])
        total = math.prod(self.grid_size(*pixel_values.shape[-2:])) + self.num_prefix_tokens
        pixel_values = self.with_input_gradients(pixel_values.to(self.dtype))
        states = self.backbone(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        features: dict[str, Tensor] = {}
        for name in self.config.features:
            layer = self.config.feature_layers[name]
            state_BND = states[layer]
            expected = (total, self.config.vision_config.hidden_size)
            if state_BND.shape[1:] != expected:
                raise ValueError(
                    f"layer {layer} of this {self.config.vision_config.model_type} has shape "
                    f"{tuple(state_BND.shape[1:])}, expected {expected}: a backbone must keep one token per patch, "
                    f"after {self.num_prefix_tokens} others (as CLIP, SigLIP, DINO and ViT do)"
                )
            features[name] = state_BND if self.config.mean_token == "all" else state_BND[:, -num_tokens:]
        return features
