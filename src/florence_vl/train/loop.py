"""The training loop: recipe in, run folder out; the same code for one CPU process and for sharded GPUs.

The loss is the sum over supervised tokens divided by their global number, over processes and accumulation steps. All
randomness is a function of (seed, step, rank) and the data's position one of the step, so a run that was killed goes on
from its last checkpoint with the very losses that it would have had.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from florence_vl.data.sampler import mix
from florence_vl.train.checkpoint import CheckpointManager, find_checkpoint, read_trainer_state
from florence_vl.train.config import Recipe
from florence_vl.train.evaluation import RunEvaluation, check_suite, describe_scores
from florence_vl.train.first_rank import load_on_first_rank
from florence_vl.train.flops import Multipliers, count_flops, peak_tflops
from florence_vl.train.gradients import clip_gradients, fill_missing_gradients, loss_and_norms
from florence_vl.train.guards import (
    SpikeDetector,
    TrainingError,
    check_finite,
    describe_sample,
    dump_batch,
    first_loss_warning,
)
from florence_vl.train.metrics import TRACKERS, MetricsFile, Notices, Progress, Tracker, memory_gib
from florence_vl.train.optimizer import (
    Group,
    apply_parts,
    build_optimizer,
    format_table,
    parameter_groups,
    set_training_mode,
    trainable_table,
)
from florence_vl.train.parallel import Parallelised, World, init_world, parallelise, resolve_strategy
from florence_vl.train.recipes import load_recipe
from florence_vl.train.schedule import lr_factor
from florence_vl.train.setup import choose_attention, describe_run, load_model, write_atomically
from florence_vl.train.steps import (
    Batch,
    StepCounts,
    StepProfiler,
    StopSignals,
    count_images,
    count_pairs,
    count_samples,
    count_supervised,
    count_tokens,
    seed_everything,
    to_device,
)

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

log = logging.getLogger("florence_vl.train")


class BatchStream(Protocol):
    """Endless micro-batches of one process, `batches_per_rank` to a step (`florence_vl.data.packing.build_batches`)."""

    batches_per_rank: int

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


# (first step, rank, processes, data state of the checkpoint or None) -> stream
BatchFactory = Callable[[int, int, int, "Mapping[str, Any] | None"], BatchStream]
Callback = Callable[["Trainer", dict[str, Any]], None]


@dataclass
class TrainResult:
    """What a run left behind.

    Attributes:
        run_dir: Its folder.
        steps: Optimizer steps done, over all its sessions.
        finished: False when a signal or an error ended it before its time.
        metrics: The last step's row.
        exported: The `save_pretrained` folder, when one was written.
        is_main: Whether this is the process that speaks.
    """

    run_dir: Path
    steps: int
    finished: bool
    metrics: dict[str, Any]
    exported: Path | None = None
    is_main: bool = True


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: FlorenceVLForConditionalGeneration | None = None,
    processor: Any = None,
    batches: BatchFactory | None = None,
    resume: str | Path = "never",
    callbacks: Sequence[Callback] = (),
    overrides: Sequence[str] = (),
) -> TrainResult:
    """Train a model as a recipe says.

    Args:
        recipe: A recipe, its path, name or content.
        model: Use this instead of the recipe's `model`.
        processor: Its processor; needed with `model` unless `batches` is given and nothing is exported.
        batches: Use these instead of the recipe's `data`.
        resume: `never` refuses a folder that holds a run; `auto` goes on from its newest checkpoint or starts one;
            a checkpoint's path goes on from that.
        callbacks: Called as `callback(trainer, row)` on the main process after every step.
        overrides: `key.path=value` texts.

    Returns:
        Where everything lies.

    Raises:
        ValueError: The recipe, the data or the checkpoint can't be used.
        TrainingError: The run stopped itself (non-finite loss or gradient).

    Example:
        >>> result = train("mini/pretrain", overrides=["steps=20"])  # doctest: +SKIP
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = load_recipe(recipe.to_dict(), overrides)
    world = init_world(recipe.device)
    try:
        trainer = Trainer(recipe.check(), world, model, processor, batches, callbacks)
        return trainer.run(resume)
    finally:
        world.close()


class Trainer:
    """One run; `train` is the usual way in.

    Args:
        recipe: What to do.
        world: The processes.
        model: As in `train`, like the following.
        processor: ...
        batches: ...
        callbacks: ...
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        model: FlorenceVLForConditionalGeneration | None = None,
        processor: Any = None,
        batches: BatchFactory | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.recipe, self.world, self.processor = recipe, world, processor
        self.run_dir = recipe.run_dir
        self.callbacks = list(callbacks)
        self.step = 0
        self.samples = self.tokens = self.supervised_tokens = self.images = 0
        self.minutes = 0.0  # of earlier sessions
        self.stop_requested: str | None = None
        self._signals = StopSignals()
        self.spikes = SpikeDetector(recipe.guards.spike_factor)
        self._given_model = model
        self._given_batches = batches
        self._row: dict[str, Any] = {}

    def run(self, resume: str | Path = "never") -> TrainResult:
        """Set up, train, leave a checkpoint and, at the end, an export."""
        checkpoint = self.world.decide(lambda: find_checkpoint(self.run_dir, resume))
        if self.recipe.threads:
            torch.set_num_threads(self.recipe.threads)
        self._set_up(checkpoint)
        assert self.total_steps is not None
        finished = False
        with self._signals:
            try:
                self._loop()
                finished = self._is_done()
                if self.checkpoints.last_saved_step != self.step:
                    self._save(blocking=True)
            finally:
                self.checkpoints.finish(strict=False)  # what is being written is worth keeping, whatever happened
                self._close()
        exported = None
        if finished and self.recipe.checkpoint.export:
            exported = self.export(self.run_dir / "model")
        if self.world.is_main:
            summary = {"steps": self.step, "finished": finished, "metrics": self._row}
            write_atomically(self.run_dir / "summary.json", json.dumps(summary, indent=1))
        return TrainResult(self.run_dir, self.step, finished, self._row, exported, self.world.is_main)

    # ---------------------------------------------------------------------------------------------------- setting up

    def _set_up(self, checkpoint: Path | None) -> None:
        recipe, world = self.recipe, self.world
        self._preflight()
        seed_everything(recipe.seed)
        sharded = resolve_strategy(recipe.parallel, world) in ("fsdp", "hsdp")
        warms_up = recipe.warm_up is not None and checkpoint is None  # on the first process
        weights_on_first = sharded and world.size > 1 and (self._given_model is None or warms_up)
        if self._given_model is not None:
            model = self._given_model
        elif weights_on_first:
            model, self.processor = load_on_first_rank(recipe, world)
        else:
            model, self.processor = load_model(recipe)
        choose_attention(model, recipe, world.device)
        self._prepare_data(model)
        if warms_up:
            self._warm_up(model)
        apply_parts(model, recipe.parts)
        if world.is_main:
            describe_run(recipe, model, self.processor)
        self.parallel: Parallelised = parallelise(
            model,
            world,
            recipe.parallel,
            recipe.precision,
            recipe.activation_checkpointing,
            recipe.compile,
            self._image_size(model),
            weights_on_first,
        )
        self.model = self.parallel.model
        self.groups: list[Group] = parameter_groups(self.model, recipe.parts, recipe.optimizer, recipe.schedule)
        self.optimizer = build_optimizer(self.groups, recipe.optimizer, world.device)
        self.checkpoints = CheckpointManager(self.run_dir, recipe.checkpoint, self.model, self.optimizer)
        data_state = None
        if checkpoint is not None:
            data_state = self._restore(self.checkpoints.load(checkpoint))
            self.checkpoints.last_saved_step = self.step
        self.evaluation: RunEvaluation | None = None
        if recipe.evaluate is not None:
            self.evaluation = RunEvaluation(recipe, self.processor, world, self._suite)
        self.stream = self._batches(self.step, world.rank, world.size, data_state)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", self.step) if world.is_main else None
        self.trackers: list[Tracker] = (
            [TRACKERS[name](recipe, self.run_dir) for name in recipe.logging.trackers] if world.is_main else []
        )
        shown = recipe.logging if world.is_main else _silent(recipe)
        self.progress = Progress(self.total_steps, self.step, shown)
        self._profiler = StepProfiler(
            recipe.logging.profile_steps, self.run_dir / "profile" / f"rank-{world.rank}.json"
        )
        self._prepare_flops()
        self._print_table()

    def _warm_up(self, model: FlorenceVLForConditionalGeneration) -> None:
        """Place the projector before the first step; the other processes receive it with the weights."""
        if not self.world.is_main:
            return
        if self._given_batches is not None:
            raise ValueError("warm_up takes its pairs from the recipe's own data; it can't see given batches")
        from florence_vl.train.warm_up import warm_up_for

        assert self.recipe.warm_up is not None
        speaks = self.recipe.logging.progress != "none"
        if speaks:
            print(f"warm-up of the projector on {self.recipe.warm_up.pairs} pairs ...", file=sys.stderr, flush=True)
        say = Notices(sys.stderr) if speaks else None
        rows = warm_up_for(self.recipe, model, self.processor, self.data.mixture, self.world.device, say)
        if speaks:
            ends = f"loss {rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f}"
            print(f"warm-up done in {rows[-1]['seconds']:.0f} s: {ends}", file=sys.stderr, flush=True)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(self.run_dir / "warm_up.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _preflight(self) -> None:
        """Refuse what can be refused before a model is loaded."""
        if self.recipe.data.stream is not None and self._given_batches is None:
            from florence_vl.train.data import require_energon

            require_energon()
        self._suite = check_suite(self.recipe, self.world)

    def _prepare_flops(self) -> None:
        """Count the model once, for MFU, where the device's peak is known."""
        self._peak: float | None = self.recipe.logging.peak_tflops or peak_tflops(self.world.device)
        if self._peak is not None:
            self._flops = count_flops(self.model.config, *self._image_size(self.model))
            self._multipliers = Multipliers.of(self.recipe.parts, self._flops.num_layers)

    def _mfu(self, table: StepCounts, seconds: float) -> float | None:
        """Share of the devices' peak that the model's own arithmetic used; padding and recomputation don't count."""
        if self._peak is None:
            return None
        flops = self._flops.step(self._multipliers, table.images, table.tokens, table.pairs, table.supervised)
        return sum(flops.values()) / (seconds * self.world.size * self._peak * 1e12)

    def _prepare_data(self, model: nn.Module) -> None:
        """Decide where batches come from and how many steps the run has."""
        recipe = self.recipe
        if self._given_batches is not None:
            self._batches: BatchFactory = self._given_batches
            if recipe.steps is None:
                raise ValueError("give `steps`: `epochs` needs the recipe's own data")
            self.total_steps = recipe.steps
            return
        from florence_vl.train.data import TrainingData

        if self.processor is None:
            raise ValueError("pass the model's processor too: the recipe's data is encoded with it")
        self.data = TrainingData(recipe, self.processor)
        self._batches = self.data.batches
        self.total_steps = recipe.steps or self.data.steps(recipe.epochs or 1.0)

    def _image_size(self, model: FlorenceVLForConditionalGeneration) -> tuple[int, int]:
        """Pixels of the dummy image of text-only batches."""
        size = getattr(getattr(self.processor, "image_processor", None), "size", None)
        if size is not None:
            return int(size["height"]), int(size["width"])
        side = int(getattr(model.config.vision_config, "image_size", None) or 64)
        return side, side

    def _print_table(self) -> None:
        if not self.world.is_main or self.progress.kind == "none":
            return
        lines = [format_table(trainable_table(self.model, self.groups))]
        lines.append(
            f"{self.total_steps} steps, {self.world.size} process(es), {self.parallel.strategy}, "
            f"{self.recipe.precision}, {self.stream.batches_per_rank} micro-batch(es) a step and process, "
            f"output {self.run_dir}"
        )
        if self.step:
            lines.append(f"resumed at step {self.step}")
        self.progress.message("\n".join(lines))

    # ------------------------------------------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        set_training_mode(self.model)
        self._began = self._last_save_time = time.monotonic()
        while not self._is_done() and self.stop_requested is None:
            self._train_step()
        if self.stop_requested:
            self.progress.message(f"{self.stop_requested}: saving step {self.step} and leaving")

    def _is_done(self) -> bool:
        return self.step >= self.total_steps or self._time_fraction >= 1

    _time_fraction = 0.0  # of the budget, as the main process sees it; the same on every process

    def _elapsed_minutes(self) -> float:
        return self.minutes + (time.monotonic() - self._began) / 60

    def _train_step(self) -> None:
        world, recipe = self.world, self.recipe
        self._profiler.before(self.step + 1)
        began = time.perf_counter()
        micro_batches = [next(self.stream) for _ in range(self.stream.batches_per_rank)]
        data_wait = time.perf_counter() - began
        if self.step == 0 and recipe.guards.show_sample and world.is_main:
            self._show_sample(micro_batches[0])
        table = self._exchange(micro_batches, data_wait)
        num_items = max(table.supervised, 1)
        seed_everything(mix(recipe.seed, self.step, world.rank))
        position = max(float(self.step), self._time_fraction * self.total_steps)
        for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True):
            settings["lr"] = group.lr * lr_factor(group.schedule, position, self.total_steps)

        loss_sum = torch.zeros((), device=world.device)
        divisor = torch.tensor(float(num_items), device=world.device)
        try:
            for index, batch in enumerate(micro_batches):
                with self.parallel.accumulate(last=index == len(micro_batches) - 1):
                    loss = self.parallel.module(to_device(batch, world.device), divisor)
                    if loss.requires_grad:  # text alone reaches nothing that trains where the LLM is frozen
                        (loss * self.parallel.grad_scale).backward()
                loss_sum += loss.detach().float()
        except (ValueError, RuntimeError) as error:
            path = dump_batch(self.run_dir, self.step + 1, world.rank, micro_batches, {"problem": str(error)})
            raise TrainingError(f"step {self.step + 1}: {error}. The batch is in {path}") from error
        fill_missing_gradients(self.groups)
        loss_value, norms = loss_and_norms(loss_sum, self.groups, self.world)
        total_norm = float(np.sqrt(sum(norm**2 for norm in norms.values())))
        self._guard(loss_value, total_norm, norms, micro_batches)
        clip_gradients(self.groups, total_norm, recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.step += 1
        self.samples += table.samples
        self.tokens += table.tokens
        self.supervised_tokens += table.supervised
        self.images += table.images
        seconds = time.perf_counter() - began
        self._profiler.after(self.step)
        self._report(table, loss_value, total_norm, norms, seconds, self._maybe_evaluate())
        self._maybe_save()

    def _exchange(self, micro_batches: list[Batch], data_wait: float) -> StepCounts:
        """What every process has to know of the others before a step, in one small collective."""
        own = [
            float(sum(count_supervised(batch) for batch in micro_batches)),
            float(sum(count_tokens(batch) for batch in micro_batches)),
            float(sum(batch["input_ids"].numel() for batch in micro_batches)),
            float(sum(count_images(batch) for batch in micro_batches)),
            float(sum(count_samples(batch) for batch in micro_batches)),
            float(sum(count_pairs(batch) for batch in micro_batches)),
            data_wait,
            float(self._signals.received),
            self._elapsed_minutes() / self.recipe.max_minutes if self.recipe.max_minutes else 0.0,
            self._elapsed_minutes(),
        ]
        rows = self.world.gather(own)
        supervised, tokens, slots, images, samples, pairs = (int(value) for value in rows[:, :6].sum(0).tolist())
        if rows[:, 7].any():
            self.stop_requested = f"signal {signal.Signals(int(rows[:, 7].max())).name}"
        self._time_fraction, self._agreed_minutes = rows[0, 8].item(), rows[0, 9].item()
        if supervised == 0:
            log.warning("step %d has no supervised token at all", self.step + 1)
        return StepCounts(supervised, tokens, slots, images, samples, pairs, float(rows[:, 6].max()))

    _agreed_minutes = 0.0

    def _guard(self, loss: float, norm: float, norms: Mapping[str, float], micro_batches: list[Batch]) -> None:
        guards = self.recipe.guards
        problem = check_finite(loss, norm, norms)
        if problem and guards.non_finite:
            path = dump_batch(
                self.run_dir, self.step + 1, self.world.rank, micro_batches, {"problem": problem, **norms}
            )
            raise TrainingError(
                f"step {self.step + 1}: {problem}. Nothing was updated; the batch is in {path}. The last checkpoint is "
                f"of step {self.checkpoints.last_saved_step or 0}"
            )
        if self.step == 0 and self.world.is_main:
            vocabulary = self.model.config.get_text_config().vocab_size
            if warning := first_loss_warning(loss, vocabulary, guards.first_loss_factor):
                self.progress.message(f"warning: {warning}")
        if (report := self.spikes.update(norm)) and self.world.is_main:
            self.progress.message(f"step {self.step + 1}: {report}")

    def _show_sample(self, batch: Batch) -> None:
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or self.progress.kind == "none":
            return
        token = getattr(self.model.config, "image_token_id", None)
        self.progress.message(
            "first sample, [[supervised]]:\n  " + describe_sample(batch, tokenizer, token).replace("\n", "\n  ")
        )

    # ------------------------------------------------------------------------------------- reporting and checkpoints

    def _report(
        self,
        table: StepCounts,
        loss: float,
        norm: float,
        norms: Mapping[str, float],
        seconds: float,
        extra: Mapping[str, float],
    ) -> None:
        row: dict[str, Any] = {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            **{f"grad_norm/{part}": value for part, value in norms.items()},
            **{
                f"lr/{group.part}": settings["lr"]
                for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True)
            },
            "samples": self.samples,
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_s": table.tokens / seconds,
            "supervised_tokens_per_s": table.supervised / seconds,
            "images_per_s": table.images / seconds,
            "padding_share": 1 - table.tokens / max(table.slots, 1),
            "data_wait_share": min(1.0, table.data_wait / seconds),
            "mfu": self._mfu(table, seconds),
            "memory_gib": memory_gib(self.world.device.type),
            "minutes": self._elapsed_minutes(),
            **extra,
        }
        self._row = row
        if not self.world.is_main:
            return
        assert self.metrics is not None
        self.metrics.write(row)
        if self.step % self.recipe.logging.every_steps == 0 or self.step == self.total_steps or extra:
            numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
            for tracker in self.trackers:
                tracker.log(numbers, self.step)
        self.progress.update(row, max(self.step / self.total_steps, self._time_fraction))
        for callback in self.callbacks:
            callback(self, row)

    def _maybe_evaluate(self) -> dict[str, float]:
        if self.evaluation is None or not self.evaluation.is_due(self.step, last=self._is_done()):
            return {}
        found = self.evaluation.run(self.parallel)
        self.progress.message(f"step {self.step}: {describe_scores(found)}")
        return found

    def _maybe_save(self) -> None:
        self.checkpoints.poll()
        config = self.recipe.checkpoint
        due = config.every_steps is not None and self.step % config.every_steps == 0
        if config.every_minutes is not None:
            due |= (self._agreed_minutes - self._minutes_of_save) >= config.every_minutes
        if due and self.step < self.total_steps:
            self._save()

    _minutes_of_save = 0.0

    def _save(self, blocking: bool = False) -> None:
        self._minutes_of_save = self._agreed_minutes
        self.checkpoints.save(self.step, self._trainer_state(), blocking)

    def _trainer_state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "samples": self.samples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "images": self.images,
            "minutes": self._elapsed_minutes(),
            "seed": self.recipe.seed,
            "world_size": self.world.size,
            "spikes": self.spikes.state_dict(),
            "metrics": self._row,
            "data": self.world.gather_objects(self.stream.state()),
        }

    def _restore(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Take up the counters of a checkpoint; the data state for this process is returned."""
        from florence_vl.data.packing import merge_states

        if state["seed"] != self.recipe.seed:
            raise ValueError(
                f"the checkpoint is of a run with seed {state['seed']}, the recipe has {self.recipe.seed}: the data's "
                "order would differ. Restore the seed"
            )
        self.step = self._resumed_at = int(state["step"])
        for name in ("samples", "tokens", "supervised_tokens", "images"):
            setattr(self, name, int(state[name]))
        self.minutes = float(state["minutes"])
        self._minutes_of_save = self.minutes
        self.spikes.load_state_dict(state["spikes"])
        self._row = dict(state["metrics"])
        states = [s for s in state["data"] if s]
        return merge_states(states) if states else None

    def export(self, folder: Path) -> Path:
        """Write the model as a `save_pretrained` folder, LoRA merged. Every process calls it."""
        from florence_vl.train.export import export_state

        return export_state(self.model, self.processor, folder, self.world)

    def _close(self) -> None:
        self.stream.close()
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        for tracker in self.trackers:
            tracker.close()


def _silent(recipe: Recipe) -> Any:
    from dataclasses import replace

    return replace(recipe.logging, progress="none")


__all__ = [
    "Batch",
    "BatchFactory",
    "BatchStream",
    "TrainResult",
    "Trainer",
    "load_model",
    "read_trainer_state",
    "train",
]
