"""Training: recipes, the loop, parallelism, checkpoints and plans."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from florence_vl.train.config import Recipe, list_recipes, load_recipe
    from florence_vl.train.guards import TrainingError
    from florence_vl.train.loop import Trainer, TrainResult, train

_EXPORTS = {
    "Recipe": "florence_vl.train.config",
    "list_recipes": "florence_vl.train.config",
    "load_recipe": "florence_vl.train.config",
    "Trainer": "florence_vl.train.loop",
    "TrainingError": "florence_vl.train.guards",
    "TrainResult": "florence_vl.train.loop",
    "train": "florence_vl.train.loop",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'florence_vl.train' has no attribute {name!r}")
