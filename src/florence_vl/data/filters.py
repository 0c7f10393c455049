"""Filters on the columns of rows; recipes contain them, so this file imports nothing heavy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from florence_vl.registry import did_you_mean

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "in": lambda value, options: any(value == option for option in options),
    "not in": lambda value, options: all(value != option for option in options),
    "filled": lambda value, wanted: bool(str(value or "").strip()) == wanted,
}


@dataclass(frozen=True)
class Filter:
    """Keeps the rows whose column passes a test; a missing (None) value passes only "!=", "not in", "filled" False.

    Args:
        column: Name of the column or JSON key.
        test: One of `== != <= >= in not in filled`.
        value: The value to compare with.
    """

    __pydantic_config__ = {"extra": "forbid"}

    column: str
    test: str
    value: Any = True

    def __post_init__(self) -> None:
        if self.test not in _OPERATORS:
            raise ValueError(f"unknown test {self.test!r} in a filter. {did_you_mean(self.test, _OPERATORS)}")

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is kept."""
        value = row.get(self.column)
        if value is None and self.test in ("==", "<=", ">=", "in"):
            return False
        return _OPERATORS[self.test](value, self.value)

    def key(self) -> list[Any]:
        """Key for caches."""
        value = list(self.value) if isinstance(self.value, (tuple, set, frozenset)) else self.value
        return [self.column, self.test, value]
