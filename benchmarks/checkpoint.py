"""Time that a checkpoint blocks training: written in the background or synchronously.

python benchmarks/checkpoint.py --width 512
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.tiny import tiny_config
from florence_vl.train.checkpoint import CheckpointManager
from florence_vl.train.config import CheckpointConfig
from florence_vl.train.world import World


def main() -> None:
    """Print stall and total time of both kinds of save, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512, help="hidden size of the LLM")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    width = arguments.width
    text = {"model_type": "llama", "vocab_size": 32000, "hidden_size": width, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 4 * width}  # fmt: skip
    model = FlorenceVLForConditionalGeneration(tiny_config(text_config=text))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    size = 3 * 4 * sum(p.numel() for p in model.parameters()) / 2**20
    stall: dict[bool, list[float]] = {True: [], False: []}
    total: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        managers = {
            kind: CheckpointManager(Path(folder) / str(kind), CheckpointConfig(asynchronous=kind, keep_last=1), model,
                                    optimizer, World(torch.device("cpu"))) for kind in (True, False)
        }  # fmt: skip
        for number in range(arguments.rounds + 1):
            for kind, manager in managers.items():
                began = time.perf_counter()
                manager.save(number + 1, {})
                stood = time.perf_counter() - began
                manager.finish()
                if number:  # the first round warms up
                    stall[kind].append(stood)
                    total[kind].append(time.perf_counter() - began)
    synchronous = statistics.median(stall[False])
    print(f"{size:.0f} MiB of weights and optimizer state")
    for kind, name in ((False, "synchronous"), (True, "asynchronous")):
        value = statistics.median(stall[kind])
        print(
            f"{name:14} stands still {value:6.2f} s ({value / synchronous:5.1%} of synchronous), "
            f"written after {statistics.median(total[kind]):6.2f} s"
        )


if __name__ == "__main__":
    main()
