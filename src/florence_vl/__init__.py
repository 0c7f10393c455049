"""Florence-VL: vision-language models with depth-breadth fusion of Florence-2 features.

Importing this package registers its classes with transformers: immediately if transformers is already imported,
otherwise after it is imported. `AutoModelForImageTextToText.from_pretrained(folder)` therefore loads a saved
Florence-VL whichever package is imported first, and importing this package alone takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from florence_vl.import_hook import register_when_possible

if TYPE_CHECKING:
    from florence_vl import convert, evaluate, train
    from florence_vl.data.collate import FlorenceVLCollator
    from florence_vl.model.assemble import build_model
    from florence_vl.model.build_config import BuildConfig
    from florence_vl.model.configuration import FlorenceVLConfig
    from florence_vl.model.image_processing import FlorenceVLImageProcessor
    from florence_vl.model.loading import load_model as load
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration, FlorenceVLModel
    from florence_vl.model.processing import FlorenceVLProcessor
    from florence_vl.serve.session import ChatSession, GenerationOptions

__version__ = "0.1.0"

_EXPORTS = {
    "BuildConfig": "florence_vl.model.build_config",
    "ChatSession": "florence_vl.serve.session",
    "FlorenceVLCollator": "florence_vl.data.collate",
    "FlorenceVLConfig": "florence_vl.model.configuration",
    "FlorenceVLForConditionalGeneration": "florence_vl.model.modeling",
    "FlorenceVLImageProcessor": "florence_vl.model.image_processing",
    "FlorenceVLModel": "florence_vl.model.modeling",
    "FlorenceVLProcessor": "florence_vl.model.processing",
    "GenerationOptions": "florence_vl.serve.session",
    "build_model": "florence_vl.model.assemble",
}
# Callable packages: `florence_vl.train(recipe)` is `florence_vl.train.train(recipe)`.
_ROOMS = ("convert", "evaluate", "train")
__all__ = [
    "BuildConfig",
    "ChatSession",
    "FlorenceVLCollator",
    "FlorenceVLConfig",
    "FlorenceVLForConditionalGeneration",
    "FlorenceVLImageProcessor",
    "FlorenceVLModel",
    "FlorenceVLProcessor",
    "GenerationOptions",
    "__version__",
    "build_model",
    "convert",
    "evaluate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name == "load":
        return importlib.import_module("florence_vl.model.loading").load_model
    if name in _ROOMS:
        return importlib.import_module(f"florence_vl.{name}")
    raise AttributeError(f"module 'florence_vl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_possible()
