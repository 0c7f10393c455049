"""Registers the classes with transformers as soon as it is imported, in either import order."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class RegisterAfterTransformers(MetaPathFinder):
    """Imports `florence_vl.model.registration` once transformers is imported and no `model` module is half imported.

    If a module of `model` is the first to import transformers, its import is completed before.
    """

    def __init__(self) -> None:
        self.depth = 0  # modules of `model` that are being imported
        self.registered = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = name.startswith("florence_vl.model.")
        if self.registered or not (ours or name == "transformers"):
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.depth += ours
            try:
                execute(module)
            finally:
                self.depth -= ours
            if self.depth == 0 and not self.registered and "transformers" in sys.modules:
                self.registered = True
                sys.meta_path.remove(self)
                importlib.import_module("florence_vl.model.registration")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_possible() -> None:
    """Register immediately if transformers is already imported, otherwise after its import."""
    if "transformers" in sys.modules:
        importlib.import_module("florence_vl.model.registration")
    else:
        sys.meta_path.insert(0, RegisterAfterTransformers())
