"""Training: recipes, the loop, parallelism, checkpoints and plans."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from florence_vl.registry import make_callable

if TYPE_CHECKING:
    from florence_vl.train.config import Recipe
    from florence_vl.train.guards import TrainingError
    from florence_vl.train.loop import Trainer, TrainResult, train
    from florence_vl.train.recipes import list_recipes, load_recipe

_EXPORTS = {
    "Recipe": "florence_vl.train.config",
    "list_recipes": "florence_vl.train.recipes",
    "load_recipe": "florence_vl.train.recipes",
    "Trainer": "florence_vl.train.loop",
    "TrainingError": "florence_vl.train.guards",
    "TrainResult": "florence_vl.train.loop",
    "train": "florence_vl.train.loop",
}
__all__ = ["Recipe", "TrainResult", "Trainer", "TrainingError", "list_recipes", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'florence_vl.train' has no attribute {name!r}")


make_callable(__name__, "florence_vl.train.loop")
