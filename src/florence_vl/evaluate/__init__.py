"""Benchmarks: metrics, suites, runner, judge, report."""
