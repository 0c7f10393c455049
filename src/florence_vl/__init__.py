"""Florence-VL: vision-language models on one generative vision encoder, Florence-2, with depth-breadth fusion.

Importing this package registers its classes with transformers: at once when transformers is imported already, else
as soon as it is. So `AutoModelForImageTextToText.from_pretrained(folder)` loads a saved Florence-VL, in whichever
order the two are imported, and this package alone imports in milliseconds.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from florence_vl import convert, evaluate, train
    from florence_vl.data.collate import FlorenceVLCollator
    from florence_vl.model import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLModel
    from florence_vl.model.assemble import BuildConfig, build_model
    from florence_vl.model.loading import load
    from florence_vl.model.processing import FlorenceVLImageProcessor, FlorenceVLProcessor
    from florence_vl.serve.session import ChatSession, GenerationOptions

__version__ = "0.1.0"

_EXPORTS = {
    "BuildConfig": "florence_vl.model.assemble",
    "ChatSession": "florence_vl.serve.session",
    "FlorenceVLCollator": "florence_vl.data.collate",
    "FlorenceVLConfig": "florence_vl.model.configuration",
    "FlorenceVLForConditionalGeneration": "florence_vl.model.modeling",
    "FlorenceVLImageProcessor": "florence_vl.model.image_processing",
    "FlorenceVLModel": "florence_vl.model.modeling",
    "FlorenceVLProcessor": "florence_vl.model.processing",
    "GenerationOptions": "florence_vl.serve.session",
    "build_model": "florence_vl.model.assemble",
    "load": "florence_vl.model.loading",
}
# Packages that can be called: `florence_vl.train(recipe)` is `florence_vl.train.train(recipe)`.
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
    if name in _ROOMS:
        return importlib.import_module(f"florence_vl.{name}")
    raise AttributeError(f"module 'florence_vl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterAfterTransformers(MetaPathFinder):
    """Imports `florence_vl.model`, which registers the classes, right after transformers was imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module("florence_vl.model")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    importlib.import_module("florence_vl.model")
else:
    sys.meta_path.insert(0, _RegisterAfterTransformers())
