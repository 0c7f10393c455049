"""Overhead of a second process: DDP and FSDP2 over gloo against one process of one or two threads, same global batch.

    python benchmarks/parallel.py

Starts itself under torchrun. With p processes on p cores the ideal is 1/p of one process's time; where cores are shared
that can't be told from their load, so one process is also run twice at the same time, without any exchange: the ratio
to that is the overhead of the exchange alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 8


def measure(strategy: str, output: str, rows: int, threads: int) -> None:
    """One run of the engine on synthetic rows; writes its metrics to `output`."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from florence_vl.train.loop import train
    from train import IMAGE_SIZE, PaddedCollator, Scale, make_samples, small_model

    torch.set_num_threads(threads)
    samples = [s for s in make_samples(4 * rows, Scale(9)) if s.num_images][:rows]
    collate = PaddedCollator(0)

    class Rows:
        def __init__(self, rank: int, size: int) -> None:
            self.batches_per_rank = 1
            self.batch = collate(samples[rank::size])

        def __next__(self) -> dict[str, Any]:
            return self.batch

        def state(self) -> dict[str, Any]:
            return {}

        def close(self) -> None:
            return None

    assert IMAGE_SIZE == 256
    recipe = {"name": "parallel", "output": output, "steps": STEPS, "precision": "fp32", "device": "cpu",
              "threads": threads, "batch_size": rows, "micro_batch_size": 1, "parallel": {"strategy": strategy},
              "checkpoint": {"every_steps": None, "export": False}, "logging": {"progress": "none"}}  # fmt: skip
    train(recipe, model=small_model(), batches=lambda _step, rank, size, _state: Rows(rank, size))


def launch(strategy: str, processes: int, output: Path, rows: int, threads: int = 1) -> subprocess.Popen[bytes]:
    """Start a run; one process needs no torchrun."""
    arguments = [__file__, "--child", strategy, "--output", str(output), "--rows", str(rows)]
    arguments += ["--threads", str(threads)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env={"GOMP_SPINCOUNT": "10000", **os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def seconds(output: Path) -> float:
    """Median step of a run, without the first two."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds"] for row in rows[2:])


def main() -> None:
    """Print step times and overheads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child")
    parser.add_argument("--output")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child, arguments.output, arguments.rows, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = launch("none", 1, folder / "one", arguments.rows)
        assert alone.wait() == 0
        assert launch("none", 1, folder / "threads", arguments.rows, threads=2).wait() == 0
        halves = [launch("none", 1, folder / f"half{i}", arguments.rows // 2) for i in (0, 1)]
        assert all(process.wait() == 0 for process in halves)
        for strategy in ("ddp", "fsdp"):
            assert launch(strategy, 2, folder / strategy, arguments.rows).wait() == 0
        one = seconds(folder / "one")
        threads = seconds(folder / "threads")
        free = max(seconds(folder / f"half{i}") for i in (0, 1))
        print(f"1 process, {arguments.rows} rows a step            {one:7.3f} s")
        print(f"1 process of two threads              {threads:7.3f} s  {threads / one:5.2f} of one thread")
        print(f"2 processes without any exchange      {free:7.3f} s  {free / one:5.2f} of one process")
        for strategy in ("ddp", "fsdp"):
            value = seconds(folder / strategy)
            print(
                f"2 processes, {strategy:5}                    {value:7.3f} s  {value / one:5.2f} of one process, "
                f"overhead of the exchange {value / free - 1:+.0%}"
            )


if __name__ == "__main__":
    main()
