"""Run by torchrun: models are loaded on the first process and sharded; every process writes its state to files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from florence_vl.train import load_recipe
from florence_vl.train.first_rank import load_on_first_rank
from florence_vl.train.optimizer import apply_parts
from florence_vl.train.parallel import parallelize
from florence_vl.train.world import init_world


def main(cases: list[dict]) -> None:
    torch.set_num_threads(1)
    world = init_world("cpu")
    for case in cases:
        recipe = load_recipe(case["recipe"], ["parallel.strategy=fsdp"])
        torch.manual_seed(world.rank)  # what another process draws must not matter
        try:
            model, processor = load_on_first_rank(recipe, world)
        except ValueError as error:
            Path(f"{case['out']}-{world.rank}.txt").write_text(str(error))
            continue
        whole = {name for name, p in model.named_parameters() if not p.is_meta}
        apply_parts(model, recipe.parts)
        ready = parallelize(model, world, recipe, (64, 64), weights_on_first=True)
        shards, gathered = {}, {}
        for name, p in ready.model.named_parameters():
            assert isinstance(p, DTensor), name
            shards[name], gathered[name] = p.to_local().detach(), p.full_tensor().detach()
        found = {
            "whole": sorted(whole),
            "shards": shards,
            "gathered": gathered,
            "trainable": sorted(name for name, p in ready.model.named_parameters() if p.requires_grad),
            "buffers": dict(ready.model.named_buffers()),
            "tied": ready.model.lm_head.weight is ready.model.get_input_embeddings().weight,
            "attention": ready.model.config.text_config._attn_implementation,
            "template": processor.chat_template,
            "training": ready.model.model.vision_tower.training,
        }
        torch.save(found, f"{case['out']}-{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
