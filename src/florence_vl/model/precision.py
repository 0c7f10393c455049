"""Whether a device computes faster in bfloat16 than in float32, found by measurement.

Processor flags are not sufficient: some processors report AVX512-BF16 and are half as fast in bfloat16.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORTHWHILE = 1.25
"""Minimum speedup of matrix products for autocast to be worth its casts; norms, softmax and optimizer use float32."""

_SHAPE = (256, 768, 768)  # rows, inputs, outputs: a linear layer of a small model


@cache
def bf16_gain(device: torch.device | str = "cpu", seconds: float = 0.05) -> float:
    """Speedup of matrix products in bfloat16 over float32 on a device.

    The two are measured in turn until the time is over, and the best time of each counts. On the CPU, processor time is
    measured, so that other load does not affect the result. Each process measures a device once.

    Args:
        device: The device.
        seconds: Duration of the measurement; each type is measured at least three times.

    Returns:
        The ratio; 0 if the device does not support bfloat16 products.
    """
    import torch

    place = torch.device(device)
    clock = time.process_time if place.type == "cpu" else time.perf_counter
    rows, inputs, outputs = (size if place.type == "cpu" else 8 * size for size in _SHAPE)
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}

    def run(dtype: torch.dtype) -> float:
        began = clock()
        product = torch.nn.functional.linear(*operands[dtype])
        product[0, 0].item()  # synchronize with the device
        return clock() - began

    try:
        with torch.no_grad():
            operands = {
                dtype: (
                    torch.ones(rows, inputs, device=place, dtype=dtype),
                    torch.ones(outputs, inputs, device=place, dtype=dtype),
                )
                for dtype in best
            }
            for dtype in best:
                run(dtype)  # warm-up: selects kernels and allocates memory
            end, rounds = time.perf_counter() + seconds, 0
            while rounds < 3 or time.perf_counter() < end:
                for dtype in best:
                    best[dtype] = min(best[dtype], run(dtype))
                rounds += 1
    except (RuntimeError, TypeError, NotImplementedError):
        return 0.0
    return best[torch.float32] / max(best[torch.bfloat16], 1e-9)


def bf16_is_faster(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 autocast is worth it on a device; see `bf16_gain` and `WORTHWHILE`."""
    return bf16_gain(device) >= WORTHWHILE
