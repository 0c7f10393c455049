"""Preparation of a run: the recipe's model and data, parallelized, at the step of its checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch
import yaml

from florence_vl.files import write_text
from florence_vl.model.precision import bf16_is_faster
from florence_vl.model.varlen_attention import check_tree_attention
from florence_vl.train.checkpoint import CheckpointManager
from florence_vl.train.checkpoint_files import read_trainer_state
from florence_vl.train.config import Precision, Recipe
from florence_vl.train.evaluation import RunEvaluation, Scorer
from florence_vl.train.fingerprint import check_fingerprint, encoding_settings, fingerprint
from florence_vl.train.guards import SpikeDetector
from florence_vl.train.model import check_attention, choose_attention, estimate_fill, load_model
from florence_vl.train.optimizer import Group, apply_parts, build_optimizer, parameter_groups
from florence_vl.train.parallel import Parallelized, parallelize, resolve_strategy
from florence_vl.train.step import Batch, StepCounts, seed_everything
from florence_vl.train.world import World

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration


class BatchStream(Protocol):
    """Endless micro-batches of one process, `batches_per_rank` per step (`florence_vl.data.packing.build_batches`)."""

    batches_per_rank: int

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


# (first step, rank, processes, data state of the checkpoint or None) -> stream
BatchFactory = Callable[[int, int, int, "Mapping[str, Any] | None"], BatchStream]


@dataclass
class RunState:
    """Progress of a run over all its sessions and processes.

    Attributes:
        step: Number of optimizer steps.
        samples: Number of samples trained on.
        tokens: Number of tokens without padding.
        supervised_tokens: Number of supervised tokens.
        images: Number of images.
        minutes: Wall time of training.
        metrics: The row of the last step.
        spikes: The moving average of the gradient norm.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    images: int = 0
    minutes: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    spikes: SpikeDetector = field(default_factory=SpikeDetector)

    def add(self, counts: StepCounts) -> None:
        """Add the counts of a finished step."""
        self.step += 1
        self.samples += counts.samples
        self.tokens += counts.tokens
        self.supervised_tokens += counts.supervised
        self.images += counts.images

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON types, for a checkpoint."""
        return {**asdict(self), "spikes": self.spikes.state_dict()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> RunState:
        """Restore the state from a checkpoint."""
        state = cls(**{name: saved[name] for name in asdict(cls()) if name != "spikes"})
        state.spikes.load_state_dict(saved["spikes"])
        return state


class Notices:
    """Prints at most one of its lines every few seconds.

    Args:
        file: Output stream.
        every: Seconds between lines.
    """

    def __init__(self, file: TextIO, every: float = 15.0) -> None:
        self._file, self._every, self._next = file, every, 0.0

    def __call__(self, text: str) -> None:
        if time.monotonic() >= self._next:
            print(text, file=self._file, flush=True)
            self._next = time.monotonic() + self._every


@dataclass
class Run:
    """A run that is ready for its next step, created by `prepare_run`.

    Attributes:
        recipe: The recipe.
        world: The processes.
        processor: The model's processor; None if batches were given without one.
        parallel: The model, ready to train.
        groups: Trainable parameters by part.
        optimizer: AdamW over `groups`.
        checkpoints: Writes and reads the run's checkpoints.
        stream: This process's micro-batches from the next step on.
        total_steps: Steps of the whole run.
        evaluation: Evaluation of `recipe.evaluate`; None if not set.
        image_size: Height and width of images in pixels.
        digests: Digests of the sources' files, by path.
        state: Progress so far.
    """

    recipe: Recipe
    world: World
    processor: Any
    parallel: Parallelized
    groups: list[Group]
    optimizer: torch.optim.Optimizer
    checkpoints: CheckpointManager
    stream: BatchStream
    total_steps: int
    evaluation: RunEvaluation | None
    image_size: tuple[int, int]
    digests: dict[str, str]
    state: RunState


def prepare_run(
    recipe: Recipe,
    world: World,
    model: FlorenceVLForConditionalGeneration | None = None,
    processor: Any = None,
    batches: BatchFactory | None = None,
    checkpoint: Path | None = None,
    suite: Scorer | None = None,
) -> Run:
    """Set up a run. Every process calls it.

    Args:
        recipe: The recipe.
        world: The processes.
        model: As in `train`, also for the next two.
        processor: The model's processor.
        batches: Used instead of the recipe's data.
        checkpoint: Checkpoint from which the run resumes; None for a new run.
        suite: Scores `evaluate.suite`; from `read_suite`, on the main process.

    Raises:
        ValueError: The recipe, the data or the checkpoint are invalid.
        FileNotFoundError: A file of the recipe does not exist.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    seed_everything(recipe.seed)
    warms_up = recipe.warm_up is not None and checkpoint is None
    sharded = resolve_strategy(recipe.parallel, world) in ("fsdp", "hsdp")
    weights_on_first = sharded and world.size > 1 and (model is None or warms_up)
    if model is None and weights_on_first:
        from florence_vl.train.first_rank import load_on_first_rank

        model, processor = load_on_first_rank(recipe, world)
    elif model is None:
        model, processor = load_model(recipe)
    choose_attention(model, recipe, world.device)
    data = None
    if batches is None:
        from florence_vl.train.data import TrainingData, plan_on_first

        if processor is None:
            raise ValueError("also pass the model's processor: the recipe's data is encoded with it")
        data = source = TrainingData(recipe, processor, plan_on_first(world))
        batches = source.batches
        total_steps = recipe.steps or world.decide(lambda: source.steps(recipe.epochs or 1.0))
    elif recipe.steps is None:
        raise ValueError("give `steps`: `epochs` needs the recipe's own data")
    else:
        total_steps = recipe.steps
    if warms_up:
        warm_up(recipe, world, model, processor, data)
    if checkpoint is None and data is not None and recipe.data.stream is None:
        estimate_fill(model, processor, data.mixture, world.device)
    apply_parts(model, recipe.parts)
    size = image_size(model, processor)
    parallel = parallelize(model, world, recipe, size, weights_on_first)
    groups = parameter_groups(parallel.model, recipe.parts, recipe.optimizer, recipe.schedule)
    optimizer = build_optimizer(groups, recipe.optimizer, world.device)
    checkpoints = CheckpointManager(recipe.run_dir, recipe.checkpoint, parallel.model, optimizer, world)
    digests = {} if data is None else world.decide(lambda: fingerprint(recipe.data.sources))
    state, data_state = RunState(), None
    if checkpoint is not None:
        state, data_state = _restore(recipe, world, checkpoints.load(checkpoint), digests)
        checkpoints.last_saved_step = state.step
    evaluation = None
    if recipe.evaluate is not None:
        evaluation = RunEvaluation(recipe, processor, world, suite)
    stream = batches(state.step, world.rank, world.size, data_state)
    # Written only now, so that a failed resume does not change the description of the run.
    world.decide(lambda: describe_run(recipe, model, processor))
    return Run(
        recipe,
        world,
        processor,
        parallel,
        groups,
        optimizer,
        checkpoints,
        stream,
        total_steps,
        evaluation,
        size,
        digests,
        state,
    )


def settle_precision(recipe: Recipe, world: World, checkpoint: Path | None) -> Recipe:
    """The recipe with `precision: auto` replaced. Every process calls it.

    Args:
        recipe: The recipe.
        world: The processes; the first one measures.
        checkpoint: Checkpoint from which the run resumes, with the precision of its start; None for a new run.
    """
    if recipe.precision != "auto":
        return recipe

    def choose() -> Precision:
        begun = None if checkpoint is None else read_trainer_state(checkpoint).get("precision")
        return begun or ("bf16" if bf16_is_faster(world.device) else "fp32")

    return recipe.with_precision(world.decide(choose))


def refuse_early(recipe: Recipe, world: World, batches: BatchFactory | None = None) -> None:
    """Raise errors that can be detected before a model is loaded.

    Raises:
        ValueError: The strategy or the batch does not fit the processes, a package is missing, or the attention cannot
            train here.
    """
    resolve_strategy(recipe.parallel, world)
    per_step = recipe.batch_size // recipe.micro_batch_size
    if batches is None and per_step % world.size:
        raise ValueError(
            f"`batch_size` {recipe.batch_size} makes {per_step} micro-batches of `micro_batch_size` "
            f"{recipe.micro_batch_size}; {world.size} processes cannot share them evenly"
        )
    if recipe.data.stream is not None and batches is None:
        from florence_vl.train.data import require_energon

        require_energon()
    chosen = recipe.model.attn_implementation
    check_attention(chosen.values() if isinstance(chosen, dict) else [chosen], world.device)
    llm = chosen.get("text_config") if isinstance(chosen, dict) else chosen
    if recipe.data.packing.trees and llm is not None:
        check_tree_attention(llm)


def _restore(
    recipe: Recipe, world: World, saved: Mapping[str, Any], digests: Mapping[str, str]
) -> tuple[RunState, Mapping[str, Any] | None]:
    """The state of a checkpoint, and the position of its data."""
    from florence_vl.data import packing

    if saved["seed"] != recipe.seed:
        raise ValueError(
            f"the checkpoint is of a run with seed {saved['seed']}, the recipe has {recipe.seed}: the data's order "
            "would differ. Restore the seed"
        )
    if "encoding" in saved:
        packing.check_fingerprint(saved["encoding"], encoding_settings(recipe))
    check_fingerprint(saved.get("digests", {}), digests)
    states = [state for state in saved["data"] if state]
    state = RunState.from_dict(saved)
    if not states:
        return state, None
    if "fingerprint" in states[0]:
        return state, packing.merge_states(states)
    if len(saved["data"]) != world.size:  # states of the caller's own batches
        raise ValueError(
            f"the checkpoint has the data states of {len(saved['data'])} processes, and this run has {world.size}: "
            "only the recipe's own data can resume with another number of processes. Use as many as before"
        )
    return state, saved["data"][world.rank]


def warm_up(recipe: Recipe, world: World, model: FlorenceVLForConditionalGeneration, processor: Any, data: Any) -> None:
    """Warm up the projector before the first step; the other processes receive it with the weights.

    Raises:
        ValueError: The recipe has no data for the pairs.
    """
    if data is None:
        raise ValueError("warm_up needs the recipe's own data; it cannot use given batches")
    if not world.is_main:
        return
    from florence_vl.train.warm_up import warm_up_for

    assert recipe.warm_up is not None
    say = None
    if recipe.logging.progress != "none":
        what = f"{recipe.warm_up.pairs} pairs" if recipe.warm_up.pairs else "regions"
        print(f"warm-up of the projector on {what} ...", file=sys.stderr, flush=True)
        say = Notices(sys.stderr)
    rows = warm_up_for(recipe, model, processor, data.mixture, world.device, say)
    if say is not None:
        ends = f"loss {rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f}"
        print(f"warm-up done in {rows[-1]['seconds']:.0f} s: {ends}", file=sys.stderr, flush=True)
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    write_text(recipe.run_dir / "warm_up.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def image_size(model: FlorenceVLForConditionalGeneration, processor: Any) -> tuple[int, int]:
    """Height and width of the dummy image of text-only batches, in pixels."""
    size = getattr(getattr(processor, "image_processor", None), "size", None)
    if size is not None:
        return int(size["height"]), int(size["width"])
    side = int(getattr(model.config.vision_config, "image_size", None) or 64)
    return side, side


def describe_environment() -> dict[str, Any]:
    """Versions, device, command and git state of this run."""
    import platform
    from importlib import metadata

    versions = {}
    for name in ("florence-vl", "torch", "transformers", "tokenizers", "peft", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "command": sys.argv,
        "git": {"commit": _git("rev-parse", "HEAD") or None, "dirty": bool(_git("status", "--porcelain", "-uno"))},
    }


def _git(*arguments: str) -> str:
    """Output of a git command; empty outside of a repository and without git."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def describe_run(recipe: Recipe, model: FlorenceVLForConditionalGeneration, processor: Any) -> None:
    """Write the description of a run to its folder: recipe, environment, and what an export needs except weights."""
    folder = recipe.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
    write_text(folder / "environment.json", json.dumps(describe_environment(), indent=1))
    model.config.save_pretrained(folder / "model_config")
    if processor is not None:
        processor.save_pretrained(folder / "model_config")
