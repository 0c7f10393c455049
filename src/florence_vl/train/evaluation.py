"""Evaluation during a run: the loss on held-out records over all processes, and scores on a sample of a suite.

Neither changes the run: no random numbers of training are drawn, and modes are restored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from florence_vl.data.encode import RecordEncoder
from florence_vl.data.layout import BatchLayout, RowCollator
from florence_vl.data.records import BadRecord
from florence_vl.model.frozen import eval_mode
from florence_vl.train.config import EvaluateConfig, Recipe
from florence_vl.train.data import build_mixture
from florence_vl.train.parallel import resolve_strategy
from florence_vl.train.step import count_supervised, to_device, tower_calls
from florence_vl.train.world import World

if TYPE_CHECKING:
    from florence_vl.train.parallel import Parallelized


class HeldOut:
    """The first records of some sources, encoded as in training.

    Args:
        recipe: Its data section determines how records are encoded.
        config: The held-out sources.
        processor: The model's processor, with the recipe's chat template.
        world: The processes; each evaluates its share.

    Raises:
        ValueError: No record can be used.
    """

    def __init__(self, recipe: Recipe, config: EvaluateConfig, processor: Any, world: World) -> None:
        data = recipe.data
        self.config, self.world = config, world
        self.mixture = build_mixture(config.sources, data, recipe.seed, shuffle=False)
        self.encoder = RecordEncoder(processor, max_length=data.max_length, on_long="drop")
        self.collate = RowCollator(self.encoder, BatchLayout(mode="padded"))
        self.size = recipe.micro_batch_size
        self.varies = processor.image_processor.varies  # images differ in size
        self.total = min(config.samples, len(self.mixture))
        world.decide(self._check_usable)

    def _check_usable(self) -> None:
        for position in range(self.total):
            try:
                self.encoder(self.mixture[position])
            except BadRecord as error:
                reason = error
            else:
                return
        raise ValueError(f"evaluate.sources: none of the first {self.total} records can be used; the last: {reason}")

    def _batch(self, positions: range) -> dict[str, torch.Tensor]:
        """The good records at these positions; if there are none, a batch without supervised tokens.

        Every process must run the same number of forward passes.
        """
        samples = []
        for position in positions:
            try:
                samples.append(self.encoder(self.mixture[position]))
            except BadRecord:
                continue
        return self.collate([samples])

    @torch.no_grad()
    def loss(self, module: nn.Module) -> float:
        """Mean loss per supervised token, in eval mode."""
        per_round = self.size * self.world.size
        loss, count = 0.0, 0.0
        with eval_mode(module):
            for first in range(0, self.total, per_round):
                start = min(self.total, first + self.world.rank * self.size)
                batch = self._batch(range(start, min(self.total, start + self.size)))
                own = tower_calls(batch)
                calls = self.world.gather([float(n) for n in own]).max(0).values.tolist() if self.varies else own
                loss += module(to_device(batch, self.world.device), 1, tuple(map(int, calls))).item()
                count += count_supervised(batch)
        sums = self.world.gather([loss, count]).sum(0)
        return float(sums[0] / sums[1])


# (model, processor) -> scores by name, as `eval/<benchmark>`
Scorer = Callable[[Any, Any], dict[str, float]]


class SuiteReader(Protocol):
    """Reads the questions of `evaluate.suite`; `florence_vl.evaluate.sample.suite_scorer` is one.

    The caller of `train` passes it in, because the training code does not depend on benchmarks.
    """

    def __call__(self, suite: str, limit: int, data: Path | None, batch_size: int) -> Scorer: ...


def read_suite(recipe: Recipe, world: World, reader: SuiteReader | None) -> Scorer | None:
    """Read the sample of `evaluate.suite` before a model is loaded. Every process calls it.

    Returns:
        The function that scores the model; only on the main process, while the others wait.

    Raises:
        FileNotFoundError: A benchmark's file does not exist.
        ValueError: A name is unknown, a benchmark needs a judge, there is no reader, or the model will be sharded.
    """
    config = recipe.evaluate
    if config is None or config.suite is None:
        return None
    suite = config.suite
    if reader is None:
        raise ValueError(
            f"evaluate.suite is {suite!r}, but no function that scores suites was passed: "
            "train(..., suite_reader=florence_vl.evaluate.sample.suite_scorer), as the command line does"
        )
    strategy = resolve_strategy(recipe.parallel, world)
    if strategy not in ("none", "ddp"):
        raise ValueError(
            f"evaluate.suite generates answers, which needs the whole model in a process, and parallel.strategy is "
            f"{strategy}. Use parallel.strategy=ddp, or only evaluate.sources (the loss on held-out records) and "
            "score exports: florence-vl export RUN, florence-vl evaluate --model RUN/model"
        )
    folder = None if config.data is None else Path(config.data).expanduser()
    scorer: list[Scorer] = []

    def read() -> None:
        scorer.append(reader(suite, config.limit, folder, config.batch_size))

    world.decide(read)
    return scorer[0] if scorer else None


class RunEvaluation:
    """Evaluation as specified by a recipe's `evaluate`.

    Args:
        recipe: The recipe; its `evaluate` is set.
        processor: The model's processor, with the recipe's chat template.
        world: The processes.
        suite: Result of `read_suite`.

    Raises:
        ValueError: There is no processor, or as in the sources' readers.
    """

    def __init__(self, recipe: Recipe, processor: Any, world: World, suite: Scorer | None) -> None:
        assert recipe.evaluate is not None
        if processor is None:
            raise ValueError("`evaluate` needs the model's processor")
        self.config, self.processor, self.suite = recipe.evaluate, processor, suite
        self.world = world
        self.held_out = HeldOut(recipe, self.config, processor, world) if self.config.sources else None
        self._recipe, self._device_type = recipe, world.device.type

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to evaluate after a step; the last one is always due."""
        return last or step % self.config.every_steps == 0

    def run(self, parallel: Parallelized) -> dict[str, float]:
        """`eval/loss`, `eval/<benchmark>` and `eval/seconds`, the same on every process. Every process calls it."""
        began = time.monotonic()
        found: dict[str, float] = {}
        if self.held_out is not None:
            found["eval/loss"] = self.held_out.loss(parallel.module)
        if self.config.suite is not None:
            scores: dict[str, float] = {}
            if self.suite is not None:
                with self._as_trained():
                    scores = self.suite(parallel.model, self.processor)
            found |= self.world.gather_objects(scores)[0]
        return found | {"eval/seconds": time.monotonic() - began}

    def _as_trained(self) -> ExitStack:
        """The run's compute type, without compiled blocks, because generation has one shape per token."""
        stack = ExitStack()
        if self._recipe.precision == "bf16":
            stack.enter_context(torch.autocast(self._device_type, torch.bfloat16))
        if self._recipe.compile.tower or self._recipe.compile.llm:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        return stack


def describe_scores(found: dict[str, float]) -> str:
    """Scores as a line of text."""
    shown = {key.removeprefix("eval/"): value for key, value in found.items()}
    seconds = shown.pop("seconds")
    return "evaluation: " + "  ".join(f"{key} {value:.4g}" for key, value in shown.items()) + f"  ({seconds:.1f} s)"
