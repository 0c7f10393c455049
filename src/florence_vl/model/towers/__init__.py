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
    """Contract of every tower: `(B, 3, H, W) -> {feature name: (B, N, D)}`, sizes known before any forward."""

    def train(self, mode: bool = True) -> VisionTower:
        """`nn.Module.train`, but what is frozen stays in eval; see `florence_vl.model.frozen`."""
        super().train(mode)
        if mode:
            keep_frozen_in_eval(self)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter that is a floating-point number."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.parameters()).device

    def with_input_gradients(self, pixel_values: Tensor) -> Tensor:
        """The pixels, made to need gradients where re-entrant checkpointing would else pass none to the layers.

        It hands gradients only to a layer whose input needs some. A frozen first convolution under adapters gives none.
        """
        if self.training and torch.is_grad_enabled() and _checkpoints_reentrant(self):
            return pixel_values.detach().requires_grad_()
        return pixel_values

    @property
    @abstractmethod
    def vision_model(self) -> nn.Module:
        """The transformers model that sees the pixels."""

    @contextmanager
    def recording(self, hidden_states: bool = False, attentions: bool = False) -> Iterator[dict[str, Any]]:
        """Keep the vision model's hidden states and attentions of a forward inside the block.

        Args:
            hidden_states: Keep them, as the vision model's own `output_hidden_states`.
            attentions: Keep them, as its own `output_attentions`.

        Yields:
            A dict that holds `hidden_states` and `attentions` after the forward, as far as they were asked for.
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
    @abstractmethod
    def feature_dims(self) -> dict[str, int]:
        """Channels D by feature name, in the order of fusion."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features, in the order of fusion."""
        return tuple(self.feature_dims)

    @abstractmethod
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of one feature for an image of that many pixels."""

    @abstractmethod
    def num_tokens(self, height: int, width: int) -> int:
        """Tokens N of one feature for an image of that many pixels.

        Raises:
            ValueError: The tower can't take an image of this size.
        """

    @abstractmethod
    def forward(self, pixel_values: Tensor, feature_mask: Tensor | None = None) -> dict[str, Tensor]:
        """All features of the images.

        Args:
            pixel_values: (B, 3, H, W), normalized.
            feature_mask: (B, F), 0 for a feature (in the order of fusion) of an image that the caller does not need.
                In eval mode a tower need not compute it, and its values are then zero.

        Returns:
            Name -> (B, N, D).

        Raises:
            ValueError: Wrong number of dimensions or channels, or a size that the tower can't take.
        """


def _checkpoints_reentrant(module: nn.Module) -> bool:
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            return bool(getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False))
    return False


def check_pixels(pixel_values: Tensor) -> None:
    """Refuse what is not a batch of RGB images.

    Raises:
        ValueError: `pixel_values` isn't (B, 3, H, W), or holds NaN or infinity (checked on the CPU only).
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, 3, height, width): RGB images as "
            "the processor returns them, all images of the batch along the first dimension"
        )
    # Elsewhere this would wait for the device at every step; there the trainer's loss guard finds it.
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
