"""Vision towers: pixels in, named features out. Registered by exact name; `florence2` is the paper's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from florence_vl.model.frozen import keep_frozen_in_eval
from florence_vl.registry import Registry

TOWERS: Registry[type[VisionTower]] = Registry("tower")


class VisionTower(nn.Module, ABC):
    """Base class of towers: `(B, 3, H, W) -> {feature name: (B, N, D)}`, with sizes known before any forward pass."""

    def train(self, mode: bool = True) -> VisionTower:
        """`nn.Module.train`, but frozen modules stay in eval mode; see `florence_vl.model.frozen`."""
        super().train(mode)
        if mode:
            keep_frozen_in_eval(self)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    def with_input_gradients(self, pixel_values: Tensor) -> Tensor:
        """The pixels, with gradients required if re-entrant checkpointing would otherwise pass none to the layers.

        Re-entrant checkpointing passes gradients only to layers whose input requires them, which is not the case after
        a frozen first convolution with adapters.
        """
        if self.training and torch.is_grad_enabled() and _checkpoints_reentrant(self):
            return pixel_values.detach().requires_grad_()
        return pixel_values

    @property
    @abstractmethod
    def vision_model(self) -> nn.Module:
        """The transformers model that receives the pixels."""

    @contextmanager
    def recording(self, hidden_states: bool = False, attentions: bool = False) -> Iterator[dict[str, Any]]:
        """Record the vision model's hidden states and attentions of a forward pass inside the block.

        Args:
            hidden_states: Whether to record them, as the vision model's own `output_hidden_states`.
            attentions: Whether to record them, as its own `output_attentions`.

        Yields:
            A dict with `hidden_states` and `attentions` after the forward pass, as requested.
        """
        wanted = {"output_hidden_states": hidden_states, "output_attentions": attentions}
        wanted = {name: True for name, asked in wanted.items() if asked}
        kept: dict[str, Any] = {}
        if not wanted:
            yield kept
            return

        def ask(_: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
            return arguments, {**keywords, **wanted}

        def keep(_: nn.Module, arguments: Any, output: Any) -> None:
            kept.update({(name := key.removeprefix("output_")): output[name] for key in wanted})

        handles = [
            self.vision_model.register_forward_pre_hook(ask, with_kwargs=True),
            self.vision_model.register_forward_hook(keep),
        ]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    @property
    def fixed_size(self) -> bool:
        """Whether it accepts images of one size only."""
        return False

    @property
    @abstractmethod
    def feature_dims(self) -> dict[str, int]:
        """Channels D by feature name, in the order of fusion."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features, in the order of fusion."""
        return tuple(self.feature_dims)

    @abstractmethod
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of one feature for an image of this size in pixels."""

    @abstractmethod
    def num_tokens(self, height: int, width: int) -> int:
        """Number of tokens N of one feature for an image of this size in pixels.

        Raises:
            ValueError: The tower does not support this image size.
        """

    @abstractmethod
    def forward(self, pixel_values: Tensor, feature_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Compute all features of the images.

        Args:
            pixel_values: (B, 3, H, W), normalized.
            feature_mask: (B, F), 0 for a feature (in the order of fusion) of an image that the caller does not need. In
                eval mode a tower may skip it; its values are then zero.

        Returns:
            Name -> (B, N, D).

        Raises:
            ValueError: The number of dimensions or channels is wrong, or the tower does not support the size.
        """


def _checkpoints_reentrant(module: nn.Module) -> bool:
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            return bool(getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False))
    return False


def check_pixels(pixel_values: Tensor) -> None:
    """Check that the input is a batch of RGB images.

    Raises:
        ValueError: `pixel_values` is not (B, 3, H, W), is empty, or contains NaN or infinity (checked on the CPU only).
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not len(pixel_values):
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, 3, height, width): RGB images as "
            "the processor returns them, all images of the batch along the first dimension"
        )
    # Elsewhere this would synchronize with the device at every step; there the trainer's loss guard detects it.
    if pixel_values.device.type == "cpu" and not torch.compiler.is_compiling():
        finite = torch.isfinite(pixel_values).flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"pixel_values of image {int((~finite).nonzero()[0])} are not finite (NaN or infinity): "
                "the image file or its preprocessing is broken"
            )


from florence_vl.model.towers.backbone import BackboneTower  # noqa: E402
from florence_vl.model.towers.florence2 import Florence2Tower  # noqa: E402

__all__ = ["TOWERS", "BackboneTower", "Florence2Tower", "VisionTower", "check_pixels"]
