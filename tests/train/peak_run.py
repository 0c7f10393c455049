"""Run by test_plan: the measured peak of a step beside the planned one, case by case, as JSON lines.

Sharded worlds are of torch's "fake" processes, whose collectives do nothing: what this one holds is the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.tiny import TINY_IMAGE_TOKEN_ID, tiny_config
from florence_vl.train import load_recipe
from florence_vl.train.gradients import fill_missing_gradients
from florence_vl.train.optimizer import apply_parts, build_optimizer, parameter_groups
from florence_vl.train.parallel import parallelize, shard_groups
from florence_vl.train.plan import GIB, MemoryPlan
from florence_vl.train.step import forward_backward
from florence_vl.train.world import World

sys.path.insert(0, str(Path(__file__).parent))
from peak import Peak

TEXT = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "max_position_embeddings": 4096,
}
IMAGES, LENGTH, UNSUPERVISED = 4, 512, 20


def measure(strategy: str, size: int, options: dict[str, Any]) -> tuple[int, float]:
    """Bytes at the peak of a step of two micro-batches, measured and planned."""
    config = tiny_config(text_config=TEXT | {"tie_word_embeddings": options.pop("tied", False)})
    recipe = load_recipe({"steps": 1, "device": "cpu", "parallel": {"strategy": strategy}} | options)
    model = FlorenceVLForConditionalGeneration(config)
    world = World(torch.device("cpu"), 0, size, 0, size)
    apply_parts(model, recipe.parts)
    ready = parallelize(model, world, recipe, (64, 64))
    groups = parameter_groups(ready.model, recipe.parts, recipe.optimizer, recipe.schedule)
    optimizer = build_optimizer(groups, recipe.optimizer, world.device)
    ids = torch.randint(10, 500, (1, LENGTH))
    ids[0, : IMAGES * 4] = TINY_IMAGE_TOKEN_ID
    labels = ids.clone()
    labels[0, :UNSUPERVISED] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(LENGTH)[None]}
    batch["pixel_values"] = torch.zeros(IMAGES, 3, 64, 64)
    model.train()

    def step() -> None:
        forward_backward(ready, [batch, batch], LENGTH, world.device)
        fill_missing_gradients(groups)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    peak = Peak()
    peak.count([list(ready.module.parameters()), [list(state.values()) for state in optimizer.state.values()]])
    with peak, peak.resizing():
        step()
    _, shards = shard_groups(recipe.parallel, strategy, world)
    planned = MemoryPlan(recipe, config, (64, 64), size, shards).at(IMAGES, LENGTH, LENGTH - UNSUPERVISED)
    return peak.peak, sum(planned.values()) * GIB


def main(cases: list[tuple[str, int, dict[str, Any]]]) -> None:
    torch.set_num_threads(1)
    for strategy, size, options in cases:
        if strategy == "ddp":
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        elif size > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        print(json.dumps(measure(strategy, size, options)), flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
