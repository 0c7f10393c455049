"""Fixtures of the training tests: the tiny run as a module, one CPU thread."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture
def train_tiny() -> Callable[..., list[float]]:
    """Trains the tiny model by a recipe, perhaps dying at the end of a step: the losses of all steps in its folder."""
    from florence_vl.model.tiny import tiny_model
    from florence_vl.train import train
    from florence_vl.train.metrics import read_metrics

    def losses(values: dict[str, Any], resume: str = "never", stop_at: int | None = None) -> list[float]:
        model, processor = tiny_model()

        def stop(trainer: Any, row: dict[str, Any]) -> None:
            if row["step"] == stop_at:
                raise KeyboardInterrupt

        try:
            train(values, model=model, processor=processor, resume=resume, callbacks=[stop])
        except KeyboardInterrupt:
            assert stop_at is not None
        return [row["loss"] for row in read_metrics(Path(values["output"]) / "metrics.jsonl")]

    return losses
