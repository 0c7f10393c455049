"""Shared by the benchmarks: alternating timing of alternatives, peak memory in a separate process, real shapes."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import BartConfig, Florence2Config, Florence2VisionConfig

_LARGE = {"embed_dim": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64), "num_groups": (8, 16, 32, 64)}


def florence2_config(size: str = "base") -> Florence2Config:
    """The released Florence-2 `base` or `large` shapes (BART position table of the -ft revisions)."""
    width, layers, heads = {"base": (768, 6, 12), "large": (1024, 12, 16)}[size]
    text = BartConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        vocab_size=51290,
        max_position_embeddings=1024,
    )
    vision = Florence2VisionConfig(projection_dim=width, **(_LARGE if size == "large" else {}))
    return Florence2Config(vision_config=vision, text_config=text)


def side_by_side(alternatives: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each alternative; rounds interleave them, so that load on the machine hits all alike.

    With one thread they are CPU seconds of this process.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul(size: int = 2048) -> tuple[Callable[[], Any], int]:
    """A float32 matrix product as an alternative of `side_by_side`, and its FLOPs."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return lambda: torch.mm(a, b), 2 * size**3


def _measure(connection: Any, prepare: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> None:
    run = prepare(*args)
    page = resource.getpagesize()

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * page

    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    connection.send(max(peak, resident()) - before)


def return_freed_memory() -> None:
    """Make glibc's malloc hand freed blocks back at once: resident memory is then what is in use, without fragments."""
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h; setting it also ends its growth
    ctypes.CDLL(None).mallopt(threshold, 1 << 16)


def peak_memory(prepare: Callable[..., Callable[[], Any]], *args: Any) -> int:
    """Bytes of resident memory that a run adds at its peak, in a fresh process (Linux).

    Args:
        prepare: Importable function that builds everything and returns the run to measure.
        *args: Its arguments.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(there, prepare, args))
    process.start()
    there.close()
    try:
        return int(here.recv())
    finally:
        process.join()
