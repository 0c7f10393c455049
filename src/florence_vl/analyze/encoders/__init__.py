"""Vision encoders to compare, by exact name: images in, named (B, N, D) token features out."""

from __future__ import annotations

from florence_vl.analyze.encoders import (  # noqa: F401  (each registers its encoders)
    dinov2_small_focus,
    efficientnet_lite0,
    stable_diffusion,
    tower,
)
from florence_vl.analyze.encoders.base import MissingWeights, Preprocess, VisionEncoder
from florence_vl.analyze.encoders.registry import ENCODERS, EncoderSpec

__all__ = [
    "ENCODERS",
    "EncoderSpec",
    "MissingWeights",
    "Preprocess",
    "VisionEncoder",
    "load_encoder",
]


def load_encoder(spec: str | EncoderSpec, fit: str | None = None) -> VisionEncoder:
    """Load an encoder from its spec, `name[=weights][:feature+feature][@size]`.

    Args:
        spec: The spec, e.g. `"dinov2_small_focus:layer6+last@448"` or `"florence2=models/base:davit+ocr"`.
        fit: How images are fitted to the input's shape: `squash` (default), `pad` or `crop`.

    Raises:
        MissingWeights: The weights are not on this machine; the message gives the download command.
        ValueError: The name, feature, size or fit is unknown.
    """
    return (EncoderSpec.parse(spec) if isinstance(spec, str) else spec).load(fit)
