"""Conversion of released Florence-VL checkpoints, any Florence-2, and gguf LLMs to this package and back."""

from __future__ import annotations

from florence_vl.convert.conversion import convert, open_source
from florence_vl.convert.diff import Comparison, diff
from florence_vl.convert.layouts import Source
from florence_vl.registry import make_callable

__all__ = ["Comparison", "Source", "convert", "diff", "open_source"]

make_callable(__name__, "florence_vl.convert.conversion")
