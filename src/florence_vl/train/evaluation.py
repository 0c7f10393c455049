"""Loss on held-out records during a run, over all processes, with nothing random in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from florence_vl.data.collate import PaddedCollator
from florence_vl.data.encode import IGNORE, Encoder
from florence_vl.data.records import BadRecord
from florence_vl.train.config import EvaluateConfig, Recipe
from florence_vl.train.data import build_mixture
from florence_vl.train.steps import count_supervised, to_device

if TYPE_CHECKING:
    from florence_vl.train.parallel import World


class HeldOut:
    """The first records of some sources, encoded as in training.

    Args:
        recipe: Its data section tells how records are encoded.
        config: What is held out.
        processor: The model's, with the recipe's chat template.
        world: The processes; each takes its share.
    """

    def __init__(self, recipe: Recipe, config: EvaluateConfig, processor: Any, world: World) -> None:
        data = recipe.data
        self.config, self.world = config, world
        self.mixture = build_mixture(config.sources, data, recipe.seed, shuffle=False)
        self.encoder = Encoder(processor, max_length=data.max_length, on_long="drop")
        self.collate = PaddedCollator(processor.tokenizer.pad_token_id)
        self.size = recipe.micro_batch_size

    def _batch(self, positions: range) -> dict[str, torch.Tensor]:
        """The records of these positions that are good; when there is none, a batch that counts for nothing.

        Every process must run the same number of forward passes.
        """
        samples = []
        for position in positions:
            try:
                samples.append(self.encoder(self.mixture[position]))
            except BadRecord:
                continue
        if samples:
            return self.collate(samples)
        ids = torch.zeros(1, 2, dtype=torch.long)
        return {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def loss(self, module: nn.Module) -> float:
        """Mean loss of a supervised token. The module is left in eval mode."""
        module.eval()
        total = min(self.config.samples, len(self.mixture))
        per_round = self.size * self.world.size
        loss, count = 0.0, 0.0
        for first in range(0, total, per_round):
            start = min(total, first + self.world.rank * self.size)
            batch = self._batch(range(start, min(total, start + self.size)))
            loss += module(to_device(batch, self.world.device), torch.ones((), device=self.world.device)).item()
            count += count_supervised(batch)
        sums = self.world.gather([loss, count]).sum(0)
        return float(sums[0] / sums[1].clamp(min=1))
