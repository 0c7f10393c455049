"""Registries of objects by exact name, and suggestions for mistyped names."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def did_you_mean(word: str, options: Iterable[str], limit: int = 3) -> str:
    """A sentence that names the options closest to a mistyped word, or all options if none is close.

    Args:
        word: The word that the user typed.
        options: The known names.
        limit: Maximum number of suggestions.
    """
    names = sorted(options)
    near = difflib.get_close_matches(word, names, n=limit, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return f"Known: {', '.join(names)}." if names else "None is registered."


class Registry(Generic[T]):
    """Objects by exact name.

    Example:
        >>> FUSIONS: Registry[type] = Registry("fusion")
        >>> @FUSIONS.register("channel")
        ... class ChannelFusion: ...
        >>> FUSIONS["channel"] is ChannelFusion
        True
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores its object under `name`.

        Raises:
            ValueError: The name is registered for another object.
        """

        def decorate(item: T) -> T:
            if name in self._items and self._items[name] is not item:
                raise ValueError(f"{self.kind} {name!r} is registered already, by {self._items[name]!r}")
            self._items[name] = item
            return item

        return decorate

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            raise ValueError(f"unknown {self.kind} {name!r}. {did_you_mean(str(name), self._items)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def names(self) -> list[str]:
        """All registered names, in the order of registration."""
        return list(self._items)


def plugins(kind: str) -> dict[str, EntryPoint]:
    """Entry points of the group `florence_vl.<kind>` in installed packages, by name.

    Args:
        kind: `models`, `vision`, `llms` (see `florence_vl.model.packaged`), `suites`, `recipes`, `datasets`,
            `pictures` or `commands`.
    """
    return {point.name: point for point in entry_points(group=f"florence_vl.{kind}")}


def make_callable(package: str, module: str) -> None:
    """Make a package callable as its main function, which has the same name as the package.

    `florence_vl.train(recipe)` then works in addition to `florence_vl.train.loop`, in either import order.

    Args:
        package: Name of the imported package, e.g. `florence_vl.train`.
        module: The module with the function; imported at the first call.
    """
    function = package.rpartition(".")[2]

    def call(self: ModuleType, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    sys.modules[package].__class__ = type("CallablePackage", (ModuleType,), {"__call__": call})
