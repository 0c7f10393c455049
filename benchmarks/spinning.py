"""Cost of waiting OpenMP threads: the default, a limited count (`florence-vl` sets 10000) and passive waiting.

    python benchmarks/spinning.py [--threads 2] [--competitors 0 1 3] [--rounds 3] [--seconds 3]

Each setting has a process of its own that trains a stack of linear layers with several threads. The settings take
turns, first alone, then beside busy single-threaded processes, so that other load on the machine hits all alike.
Printed are steps a second relative to the default of the same condition, and processor seconds a step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def work(threads: int) -> None:
    """Train when a line with a duration arrives on standard input; answer with steps, seconds and CPU seconds."""
    import torch

    torch.set_num_threads(threads)
    layers = [torch.nn.Linear(576, 576) for _ in range(24)]
    model = torch.nn.Sequential(*(layer for linear in layers for layer in (linear, torch.nn.GELU())))
    batch = torch.randn(256, 576)

    def step() -> None:
        model(batch).square().mean().backward()
        model.zero_grad()

    step()
    for line in sys.stdin:
        steps, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < float(line):
            step()
            steps += 1
        print(steps, time.perf_counter() - began, time.process_time() - cpu, flush=True)


@contextmanager
def competitors(number: int) -> Iterator[None]:
    """Processes that keep one core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--competitors", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.threads)
        return
    unset = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    command = [sys.executable, __file__, "--work", "--threads", str(options.threads)]
    workers = {
        name: subprocess.Popen(command, env=unset | extra, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, extra in SETTINGS.items()
    }
    try:
        print(
            f"{options.threads} threads, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} of other work at start"
        )
        print(f"{'beside':>8} {'setting':24} {'steps/s':>8} {'of default':>11} {'CPU s/step':>11}")
        for number in options.competitors:
            rates: dict[str, list[float]] = {name: [] for name in workers}
            costs: dict[str, list[float]] = {name: [] for name in workers}
            with competitors(number):
                for _ in range(options.rounds):
                    for name, worker in workers.items():
                        assert worker.stdin is not None
                        assert worker.stdout is not None
                        print(options.seconds, file=worker.stdin, flush=True)
                        steps, seconds, cpu = map(float, worker.stdout.readline().split())
                        rates[name].append(steps / seconds)
                        costs[name].append(cpu / steps)
            base = statistics.median(rates["default"])
            for name in workers:
                rate, cost = statistics.median(rates[name]), statistics.median(costs[name])
                print(f"{number:>8} {name:24} {rate:8.1f} {rate / base:11.2f} {cost:11.4f}")
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


if __name__ == "__main__":
    main()
