"""The model: configuration -> towers -> fusion -> projector -> modeling; processing; assemble; loading."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from florence_vl.model.build_config import BuildConfig
    from florence_vl.model.configuration import FlorenceVLConfig
    from florence_vl.model.image_processing import FlorenceVLImageProcessor
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration, FlorenceVLModel
    from florence_vl.model.processing import FlorenceVLProcessor

_EXPORTS = {
    "BuildConfig": "florence_vl.model.build_config",
    "FlorenceVLConfig": "florence_vl.model.configuration",
    "FlorenceVLForConditionalGeneration": "florence_vl.model.modeling",
    "FlorenceVLImageProcessor": "florence_vl.model.image_processing",
    "FlorenceVLModel": "florence_vl.model.modeling",
    "FlorenceVLProcessor": "florence_vl.model.processing",
}
__all__ = [
    "BuildConfig",
    "FlorenceVLConfig",
    "FlorenceVLForConditionalGeneration",
    "FlorenceVLImageProcessor",
    "FlorenceVLModel",
    "FlorenceVLProcessor",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'florence_vl.model' has no attribute {name!r}")
