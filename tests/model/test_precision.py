"""Bfloat16 is chosen by the measured time of a matrix product, not by the processor's feature flags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from florence_vl.cli.main import main
from florence_vl.model import precision


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[torch.dtype, float]]:
    """Stand-in for the device: seconds of a matrix product by type."""
    clock, seconds = [0.0], {torch.float32: 2e-3, torch.bfloat16: 1e-3}
    real = torch.nn.functional.linear

    def linear(*operands: Any) -> torch.Tensor:
        clock[0] += seconds[operands[0].dtype]
        return real(*operands)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr("time.process_time", lambda: clock[0])
    precision.bf16_gain.cache_clear()
    yield seconds
    precision.bf16_gain.cache_clear()


@pytest.mark.parametrize(
    ("bf16", "gain", "faster"), [(1e-3, 2.0, True), (3.6e-3, 1 / 1.8, False), (1.9e-3, 1.05, False)]
)
def test_the_faster_type_is_measured(costs: dict[torch.dtype, float], bf16: float, gain: float, faster: bool) -> None:
    costs[torch.bfloat16] = bf16
    assert precision.bf16_gain("cpu") == pytest.approx(gain, rel=0.01)
    assert precision.bf16_is_faster("cpu") is faster


def test_a_device_without_the_product_has_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError('"addmm" not implemented for BFloat16')

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    precision.bf16_gain.cache_clear()
    assert precision.bf16_gain("cpu") == 0
    precision.bf16_gain.cache_clear()


@pytest.mark.parametrize(("bf16", "verdict"), [(1e-3, "faster (measured: 2.0 "), (4e-3, "use float32 (measured: 0.5 ")])
def test_doctor_reports_the_measurement(
    costs: dict[torch.dtype, float], bf16: float, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    costs[torch.bfloat16] = bf16
    main(["doctor", "--json"])
    found = {check["name"]: check["found"] for check in json.loads(capsys.readouterr().out)}
    assert verdict in found["cpu bf16"]


@pytest.mark.parametrize(("bf16", "chosen"), [(1e-3, "bfloat16"), (4e-3, "float32")])
def test_ablate_takes_the_faster_type(
    costs: dict[torch.dtype, float], bf16: float, chosen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("florence_vl_mini")
    costs[torch.bfloat16] = bf16
    arguments = ["--table", "5", "--seeds", "1", "--dry-run", "--out", str(tmp_path)]
    assert main(["ablate", *arguments]) == 0
    assert f"--dtype {chosen}" in capsys.readouterr().out
