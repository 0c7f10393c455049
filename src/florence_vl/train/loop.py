"""The training loop: recipe in, run folder out; the same code for one CPU process and for sharded GPUs.

The loss is the sum over supervised tokens divided by their global number, over processes and accumulation steps. All
random numbers are functions of (seed, step, rank) and the position in the data is a function of the step, so a killed
run resumes from its last checkpoint with exactly the same losses.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from florence_vl.data.sampler import mix
from florence_vl.files import write_text
from florence_vl.model.tiles import overview_pixels
from florence_vl.train.checkpoint import find_checkpoint
from florence_vl.train.config import Recipe
from florence_vl.train.evaluation import SuiteReader, describe_scores, read_suite
from florence_vl.train.fingerprint import encoding_settings
from florence_vl.train.gradients import clip_gradients, fill_missing_gradients, loss_and_norms
from florence_vl.train.guards import (
    BadRecordNotices,
    TrainingError,
    blame,
    check_finite,
    describe_sample,
    dump_batch,
    first_loss_warning,
    nothing_to_learn,
)
from florence_vl.train.lock import hold_folder
from florence_vl.train.metrics import FlopsMeter, Reporter, memory_gib
from florence_vl.train.optimizer import format_table, trainable_table
from florence_vl.train.recipes import load_recipe
from florence_vl.train.schedule import lr_factor
from florence_vl.train.setup import BatchFactory, Run, prepare_run, refuse_early, settle_precision
from florence_vl.train.signals import StopSignals
from florence_vl.train.step import (
    Batch,
    StepCounts,
    StepProfiler,
    TowerCalls,
    forward_backward,
    seed_everything,
    tower_calls,
)
from florence_vl.train.world import init_world

if TYPE_CHECKING:
    from florence_vl.data.report import DataReport
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

# Written when a signal stopped the run and everything was saved, for launchers that hide exit codes.
STOPPED_FILE = "STOPPED"
Callback = Callable[["Trainer", dict[str, Any]], None]


@dataclass
class TrainResult:
    """Result of a run.

    Attributes:
        run_dir: Its folder.
        steps: Optimizer steps done, over all sessions.
        finished: False if a signal or an error ended the run early.
        metrics: The row of the last step.
        exported: The `save_pretrained` folder, if one was written.
        is_main: Whether this is the main process.
        bad_records: Skipped records, `source/kind` -> number.
    """

    run_dir: Path
    steps: int
    finished: bool
    metrics: dict[str, Any]
    exported: Path | None = None
    is_main: bool = True
    bad_records: dict[str, int] = field(default_factory=dict)


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: FlorenceVLForConditionalGeneration | None = None,
    processor: Any = None,
    batches: BatchFactory | None = None,
    resume: str | Path = "never",
    callbacks: Sequence[Callback] = (),
    overrides: Sequence[str] = (),
    suite_reader: SuiteReader | None = None,
) -> TrainResult:
    """Train a model from a recipe.

    Args:
        recipe: A recipe, its path, name or content.
        model: Used instead of the recipe's `model`.
        processor: Its processor; required with `model` unless `batches` is given and nothing is exported.
        batches: Used instead of the recipe's `data`.
        resume: `never` raises an error for a folder that contains a run; `auto` resumes from its newest checkpoint or
            starts a run; the path of a checkpoint resumes from it.
        callbacks: Called as `callback(trainer, row)` on the main process after every step.
        overrides: `key.path=value` texts.
        suite_reader: Scores `evaluate.suite` during the run: `florence_vl.evaluate.sample.suite_scorer`.

    Returns:
        The folder and the metrics of the run.

    Raises:
        ValueError: The recipe, the data or the checkpoint are invalid.
        TrainingError: The run stopped because of a failure (non-finite loss or gradient, nothing to learn).

    Example:
        >>> result = train("mini/pretrain", overrides=["steps=20"])  # doctest: +SKIP
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = load_recipe(recipe.to_dict(), overrides)
    recipe.check()
    world = init_world(recipe.device)
    try:
        refuse_early(recipe, world, batches)
        suite = read_suite(recipe, world, suite_reader)
        folder = recipe.run_dir
        with hold_folder(folder, world):
            checkpoint = world.decide(lambda: find_checkpoint(folder, resume))
            recipe = settle_precision(recipe, world, checkpoint)
            run = prepare_run(recipe, world, model, processor, batches, checkpoint, suite)
            return Trainer(run, callbacks).run()
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not (cause := blame(error)):
            raise
        raise TrainingError(cause) from error
    finally:
        world.close()


class Trainer:
    """Repeats the optimizer step until the end of the run; reports, evaluates and saves. Usually created by `train`.

    Args:
        run: A prepared run.
        callbacks: As in `train`.

    Attributes:
        recipe: The recipe.
        world: The processes.
        model: The model inside its parallel wrapper.
        processor: Its processor, if given.
        run_dir: The run's folder.
        state: Progress of the run.
        stop_requested: The signal that requests a stop; None otherwise.
    """

    def __init__(self, run: Run, callbacks: Sequence[Callback] = ()) -> None:
        self.recipe, self.world, self.processor, self.state = run.recipe, run.world, run.processor, run.state
        self.parallel, self.model = run.parallel, run.parallel.model
        self.groups, self.optimizer, self.stream = run.groups, run.optimizer, run.stream
        self.checkpoints, self.evaluation, self.total_steps = run.checkpoints, run.evaluation, run.total_steps
        self.callbacks = list(callbacks)
        self.run_dir, self.digests = run.recipe.run_dir, run.digests
        self.reporter, self.flops = Reporter(run), FlopsMeter(run)
        self.bad_records = BadRecordNotices(run.recipe.data.max_bad_share)
        trace = self.run_dir / "profile" / f"rank-{run.world.rank}.json"
        self.profiler = StepProfiler(run.recipe.logging.profile_steps, trace)
        self.signals = StopSignals()
        self.stop_requested: str | None = None
        self._began, self._minutes_before = time.monotonic(), run.state.minutes
        # Of the time budget, as the main process sees it; the same on every process.
        self.time_fraction = run.state.minutes / self.recipe.max_minutes if self.recipe.max_minutes else 0.0

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self.state.step

    def run(self) -> TrainResult:
        """Train, save a checkpoint and, at the end, export the model."""
        finished = False
        if self.world.is_main:
            (self.run_dir / STOPPED_FILE).unlink(missing_ok=True)
        self._introduce()
        with self.signals:
            try:
                self.model.train()
                if self.step:
                    self._report_last_step()
                while not self._is_done() and self.stop_requested is None:
                    self.train_step()
                finished = self._is_done()
                self.profiler.close()
                if self.stop_requested:
                    self.reporter.message(f"{self.stop_requested}: saving step {self.step} and stopping")
                self.checkpoints.finish()
                if self.world.decide(lambda: self.checkpoints.last_saved_step != self.step):
                    self._save(blocking=True)
            finally:
                self.checkpoints.finish()  # a checkpoint that is being written is always completed
                self.stream.close()
                self.reporter.close()
        bad = self._bad_records()
        exported = None
        if finished and self.recipe.checkpoint.export:
            exported = self.export(self.run_dir / "model")
        if self.world.is_main:
            if not finished:
                write_text(self.run_dir / STOPPED_FILE, f"{self.stop_requested}: saved step {self.step}\n")
            summary = {"steps": self.step, "finished": finished, "bad_records": bad, "metrics": self.state.metrics}
            write_text(self.run_dir / "summary.json", json.dumps(summary, indent=1))
        return TrainResult(self.run_dir, self.step, finished, self.state.metrics, exported, self.world.is_main, bad)

    def train_step(self) -> None:
        """Run one optimizer step. Every process calls it."""
        began = time.perf_counter()
        self.profiler.before(self.step + 1)
        micro_batches = [next(self.stream) for _ in range(self.stream.batches_per_rank)]
        counts, calls, data_wait = self._exchange(micro_batches, time.perf_counter() - began)
        if self.step == 0:
            self._show_sample(micro_batches[0])
        seed_everything(mix(self.recipe.seed, self.step, self.world.rank))
        self._set_learning_rates()
        try:
            loss_sum = forward_backward(self.parallel, micro_batches, counts.supervised, self.world.device, calls)
            fill_missing_gradients(self.groups)
            loss, norms = loss_and_norms(loss_sum, self.groups, self.world)
        except (ValueError, RuntimeError) as error:
            raise TrainingError(f"step {self.step + 1}: {self._blame(error, micro_batches)}") from error
        norm = float(np.sqrt(sum(part**2 for part in norms.values())))
        self._guard(loss, norm, norms, micro_batches)
        clip_gradients(self.groups, norm, self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.add(counts)
        self.state.minutes = self._elapsed_minutes()
        self.profiler.after(self.step)
        self.state.metrics = self._row(counts, data_wait, loss, norm, norms, time.perf_counter() - began)
        self._save_if_due()
        self._report()

    # ----------------------------------------------------------------------------------------------- parts of a step

    def _exchange(self, micro_batches: list[Batch], data_wait: float) -> tuple[StepCounts, list[TowerCalls], float]:
        """Exchange what every process needs to know before a step, in one small collective.

        Returns:
            The step's counts over all processes, the passes through the tower that each micro-batch makes on every
            process, and the longest wait for data in seconds.
        """
        own = list(vars(StepCounts.of(micro_batches, overview_pixels(self.model.config))).values())
        calls = [number for batch in micro_batches for number in tower_calls(batch)]
        budget = self._elapsed_minutes() / self.recipe.max_minutes if self.recipe.max_minutes else 0.0
        numbers = [*own, *calls, data_wait, self.signals.received, budget]
        table = self.world.gather([float(number) for number in numbers])
        counts = StepCounts(*(int(total) for total in table[:, : len(own)].sum(0).tolist()))
        most = table[:, len(own) : -3].max(0).values.int().tolist()
        waits, signals, budgets = table[:, -3:].unbind(1)
        if signals.any():
            self.stop_requested = f"signal {signal.Signals(int(signals.max())).name}"
        self.time_fraction = budgets[0].item()
        if counts.supervised == 0:
            raise TrainingError(nothing_to_learn(self.step + 1, self._data_report(), self.recipe.data.sources))
        if warning := self.bad_records.update(self._data_report()):
            self.reporter.message(warning)
        return counts, list(zip(most[::2], most[1::2], strict=True)), waits.max().item()

    def _data_report(self) -> DataReport | None:
        """Skipped records of this process; None for batches that were passed in."""
        report = getattr(self.stream, "report", None)
        return None if report is None else report()

    def _bad_records(self) -> dict[str, int]:
        """Skipped records of the run, over all processes: `source/kind` -> number."""
        report = self._data_report()
        own = {} if report is None else report.bad_by_name()
        total: Counter[str] = Counter()
        for found in self.world.gather_objects(own):
            total.update(found)
        return dict(total)

    def _set_learning_rates(self) -> None:
        position = max(float(self.step), self.time_fraction * self.total_steps)
        for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True):
            settings["lr"] = group.lr * lr_factor(group.schedule, position, self.total_steps, self.step)

    def _blame(self, error: Exception, micro_batches: list[Batch]) -> str:
        """The message for an error in a step; the batch is saved if it may be the cause."""
        if lost := blame(error):
            return lost
        path = dump_batch(self.run_dir, self.step + 1, self.world.rank, micro_batches, {"problem": str(error)})
        return f"{error}. The batch is in {path}"

    def _guard(self, loss: float, norm: float, norms: Mapping[str, float], micro_batches: list[Batch]) -> None:
        """Stop before the update if a number is not finite; report anomalies."""
        if problem := check_finite(loss, norm, norms):
            notes = {"problem": problem, **norms}
            path = dump_batch(self.run_dir, self.step + 1, self.world.rank, micro_batches, notes)
            raise TrainingError(
                f"step {self.step + 1}: {problem}. Nothing was updated; the batch is in {path}. The last checkpoint is "
                f"of step {self.checkpoints.last_saved_step or 0}"
            )
        if self.step == 0 and (warning := first_loss_warning(loss, self.model.config.get_text_config().vocab_size)):
            self.reporter.message(f"warning: {warning}")
        if report := self.state.spikes.update(norm):
            self.reporter.message(f"step {self.step + 1}: {report}")

    # ------------------------------------------------------------------------------------- reporting and checkpoints

    def _is_done(self) -> bool:
        return self.step >= self.total_steps or self.time_fraction >= 1

    def _elapsed_minutes(self) -> float:
        return self._minutes_before + (time.monotonic() - self._began) / 60

    def _introduce(self) -> None:
        """Print what is trained and where, before the first step."""
        lines = [
            format_table(trainable_table(self.model, self.groups)),
            f"{self.total_steps} steps, {self.world.size} process(es), {self.parallel.strategy}, "
            f"{self.recipe.precision}, {self.stream.batches_per_rank} micro-batch(es) per step and process, "
            f"output {self.run_dir}",
        ]
        if self.step:
            lines.append(f"resumed at step {self.step}")
        self.reporter.message("\n".join(lines))

    def _show_sample(self, batch: Batch) -> None:
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or not self.recipe.guards.show_sample:
            return
        sample = describe_sample(batch, tokenizer, getattr(self.model.config, "image_token_id", None))
        self.reporter.message("first sample, [[supervised]]:\n  " + sample.replace("\n", "\n  "))

    def _row(
        self,
        counts: StepCounts,
        data_wait: float,
        loss: float,
        norm: float,
        norms: Mapping[str, float],
        seconds: float,
    ) -> dict[str, Any]:
        """The step's line of metrics.jsonl."""
        settings = self.optimizer.param_groups
        rates = {group.name: one["lr"] for group, one in zip(self.groups, settings, strict=True)}
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            **{f"grad_norm/{part}": value for part, value in norms.items()},
            **{f"lr/{name}": rate for name, rate in rates.items()},
            "samples": self.state.samples,
            "tokens": self.state.tokens,
            "seconds": seconds,
            "tokens_per_s": counts.tokens / seconds,
            "supervised_tokens_per_s": counts.supervised / seconds,
            "images_per_s": counts.images / seconds,
            "padding_share": 1 - counts.tokens / max(counts.slots, 1),
            "data_wait_share": min(1.0, data_wait / seconds),
            "mfu": self.flops.mfu(counts, seconds),
            "memory_gib": memory_gib(self.world.device.type),
            "minutes": self.state.minutes,
        }

    def _report(self) -> None:
        """Evaluate if it is due, and report the step; a run that is asked to stop leaves both to its next session."""
        due = self.evaluation is not None and self.evaluation.is_due(self.step, last=self._is_done())
        if due and self.stop_requested and not self._is_done():
            self.reporter.message(f"step {self.step}: the evaluation is left to the resumed run")
            return
        scores = self._evaluate() if due else {}
        self.state.metrics |= scores
        self.reporter.report(self.state.metrics, max(self.step / self.total_steps, self.time_fraction), bool(scores))
        if self.world.is_main:
            for callback in self.callbacks:
                callback(self, self.state.metrics)

    def _report_last_step(self) -> None:
        """Report the step of the checkpoint if the previous session ended between saving and reporting it."""
        row = self.world.decide(self.reporter.last_row)
        if row["step"] == self.step:
            self.state.metrics = row
        elif row["step"] == self.step - 1 and self.state.metrics:
            self._report()

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluation is not None
        found = self.evaluation.run(self.parallel)
        self.reporter.message(f"step {self.step}: {describe_scores(found)}")
        return found

    def _save_if_due(self) -> None:
        self.checkpoints.poll()
        every = self.recipe.checkpoint.every_steps
        if self._is_done():
            self._save(blocking=True)
        elif every is not None and self.step % every == 0:
            self._save()

    def _save(self, blocking: bool = False) -> None:
        run = {
            "total_steps": self.total_steps,
            "seed": self.recipe.seed,
            "precision": self.recipe.precision,
            "world_size": self.world.size,
            "encoding": encoding_settings(self.recipe),
            "digests": self.digests,
            "data": self.world.gather_objects(self.stream.state()),
        }
        self.checkpoints.save(self.step, self.state.to_dict() | run, blocking)

    def export(self, folder: Path) -> Path:
        """Write the model as a `save_pretrained` folder with merged LoRA. Every process calls it."""
        from florence_vl.train.export import export_state

        return export_state(self.model, self.processor, folder, self.world)


__all__ = ["Callback", "TrainResult", "Trainer", "train"]
