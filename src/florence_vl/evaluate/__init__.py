"""Benchmarks: metrics, suites, runner, judge, report."""

from __future__ import annotations

from florence_vl.registry import make_callable

make_callable(__name__, "florence_vl.evaluate.api")
