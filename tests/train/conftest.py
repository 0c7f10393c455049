"""Fixtures of the training tests: the tiny run as a module, one CPU thread."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).with_name("tiny_run.py")


def _load() -> ModuleType:
    if "florence_vl_tiny_run" not in sys.modules:
        spec = importlib.util.spec_from_file_location("florence_vl_tiny_run", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["florence_vl_tiny_run"] = module
        spec.loader.exec_module(module)
    return sys.modules["florence_vl_tiny_run"]


@pytest.fixture(scope="session")
def tiny_run() -> ModuleType:
    """tests/train/tiny_run.py as a module."""
    return _load()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
