"""A run's first steps without a model: the micro-batches of every process of a world, played in one process.

The data, the deal of the rows, the dummy images, the accumulation and the counts are those of the run itself; only
tower, LLM and head are replaced by one number each, which notes when it is used and when its gradient arrives. So the
order of collectives of each process is known before the first GPU is reserved: processes whose orders differ hang.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from florence_vl.model.modeling import group_by_size
from florence_vl.model.precision import bf16_is_faster
from florence_vl.train.config import PartsConfig, Recipe
from florence_vl.train.guards import nothing_to_learn
from florence_vl.train.parallel import LossModule, Parallelized, resolve_strategy, shard_groups
from florence_vl.train.plan import GIB, MemoryPlan, usable_memory
from florence_vl.train.setup import BatchFactory, image_size, refuse_early
from florence_vl.train.shell import load_shell
from florence_vl.train.step import (
    Batch,
    StepCounts,
    TowerCalls,
    count_supervised,
    forward_backward,
    most_calls,
    tower_calls,
)
from florence_vl.train.world import World

if TYPE_CHECKING:
    from florence_vl.data.packing import WindowPlan
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration


@dataclass
class PlayedBatch:
    """A micro-batch of one process.

    Attributes:
        rows: Rows.
        slots: Tokens with padding.
        images: Images.
        supervised: Tokens that are learned.
        passes: Passes through tower (with images and size), LLM and head, in order, a dummy image's too.
        collectives: What the process exchanges with others, in order, as far as the micro-batch decides about it.
    """

    rows: int
    slots: int
    images: int
    supervised: int
    passes: list[str] = field(default_factory=list)
    collectives: list[str] = field(default_factory=list)


@dataclass
class PlayedStep:
    """A step of one process: its counts and its micro-batches."""

    rank: int
    step: int
    counts: StepCounts
    micro_batches: list[PlayedBatch]


@dataclass
class DryRun:
    """What `dry_run` found.

    Attributes:
        strategy: `none`, `ddp`, `fsdp` or `hsdp`.
        world_size: Number of processes.
        steps: Of all processes, step by step.
        bad_records: Records that were skipped, `source/kind` -> number.
        memory: GiB of a process by kind, at the largest micro-batch that was met.
        memory_available: GiB that a process may use.
        shm: GiB of /dev/shm that the workers of a node fill.
        shm_available: GiB that /dev/shm has.
        problems: What would hang, run out or stop the run; empty when nothing would.
    """

    strategy: str
    world_size: int
    steps: list[PlayedStep]
    bad_records: dict[str, int]
    memory: dict[str, float]
    memory_available: float
    shm: float
    shm_available: float
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


class _PlayedBase(nn.Module):
    """Stands for `FlorenceVLModel`: one number for each part, which notes when the part is used and its gradient comes.

    Args:
        shell: The model on the meta device.
        parts: What trains.
        sharded: Whether weights are gathered when a part is used.
        exchanges: What is exchanged when a gradient arrives, now.
    """

    def __init__(
        self,
        shell: FlorenceVLForConditionalGeneration,
        parts: PartsConfig,
        sharded: bool,
        exchanges: Callable[[], list[str]],
    ) -> None:
        super().__init__()
        self.config, self.sharded, self.exchanges = shell.config, sharded, exchanges
        self.uses_context, self.has_fill = shell.model.fusion.uses_context, shell.model.feature_fill is not None
        self.passes: list[str] = []
        self.collectives: list[str] = []
        llm = parts.llm
        self.tower = self._part("tower", parts.tower.train)
        self.projector = self._part("projector", parts.projector.train)
        self.llm = self._part("LLM", llm.train)
        self.head = self._part("head", llm.train and llm.lora is None)
        self.embeddings = self._part("embeddings", llm.train and llm.lora is None and llm.last_layers is None)

    @property
    def fusion(self) -> SimpleNamespace:
        """As far as it is asked here."""
        return SimpleNamespace(uses_context=self.uses_context)

    @property
    def feature_fill(self) -> object | None:
        """Something, where the model has it."""
        return object() if self.has_fill else None

    def _part(self, name: str, trains: bool) -> nn.Parameter:
        part = nn.Parameter(torch.zeros(()), requires_grad=trains)

        def note(parameter: Tensor) -> None:
            parameter.grad = None
            self.collectives += [f"{kind} {name}" for kind in self.exchanges()]

        if trains:
            part.register_post_accumulate_grad_hook(note)
        return part

    def use(self, part: str, size: str = "") -> None:
        """Note a pass through a part."""
        if size:
            self.passes.append(f"{part} {size}")
        if self.sharded:
            self.collectives.append(f"gather {part}")

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, 1)."""
        self.use("embeddings")
        return self.embeddings * torch.ones(*input_ids.shape, 1)

    def mean_embedding(self, question_ids: Tensor, _mask: Tensor | None = None) -> Tensor:
        """As the model's."""
        return self.embed(question_ids).detach()

    def encode_images(self, pixel_values: Tensor, *_: Any) -> tuple[Tensor, None]:
        """As the model's: one pass through the tower, for images of one size."""
        count = len(pixel_values)
        self.use("tower", f"{count} x {pixel_values.shape[-2]}x{pixel_values.shape[-1]}")
        self.use("projector")
        return (self.tower * 1.0 * self.projector).expand(count, 1, 1), None

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        question_ids: Tensor | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """As the model's."""
        if self.uses_context and question_ids is not None:
            self.mean_embedding(question_ids)
        found = [
            self.encode_images(pixel_values[images][..., :height, :width])[0]
            for (height, width), images in group_by_size(pixel_values, image_sizes)
        ]
        return SimpleNamespace(pooler_output=[tokens for tokens_I11 in found for tokens in tokens_I11])

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        pixel_values: Tensor | None = None,
        **inputs: Any,
    ) -> SimpleNamespace:
        """As the model's."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids)
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            image = self.get_image_features(pixel_values, **inputs)
        if image is not None:
            inputs_embeds = inputs_embeds + torch.stack(list(image.pooler_output)).sum()
        self.use("LLM", "x".join(map(str, inputs_embeds.shape[:2])))
        return SimpleNamespace(last_hidden_state=inputs_embeds * self.llm)


class _PlayedModel(nn.Module):
    """Stands for `FlorenceVLForConditionalGeneration`; takes what `_PlayedBase` takes."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.model = _PlayedBase(*args)

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """As the model's."""
        return self.model.embed

    def supervised_logits(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As the model's, with a vocabulary of one."""
        count = count_supervised({"labels": labels})
        self.model.use("head", str(count))
        return (states.sum() * self.model.head).expand(count, 1), torch.zeros(count, dtype=torch.long)

    def supervised_loss(self, states: Tensor, labels: Tensor, _num_items: int) -> Tensor:
        """As the model's."""
        return self.supervised_logits(states, labels)[0].sum()


class _PlayedModule(LossModule):
    """The real unit of parallelism around the played model, with the switches of DDP and FSDP2."""

    def __init__(
        self,
        shell: FlorenceVLForConditionalGeneration,
        recipe: Recipe,
        strategy: str,
        size: tuple[int, int],
        several: bool,
    ) -> None:
        played: Any = _PlayedModel(shell, recipe.parts, strategy in ("fsdp", "hsdp"), self._exchanged)
        super().__init__(played, size, always_images=several, distill=recipe.distill)
        self.strategy, self.syncs = strategy, True

    def _exchanged(self) -> list[str]:
        if self.strategy == "none" or (self.strategy == "ddp" and not self.syncs):
            return []
        if self.strategy == "hsdp" and self.syncs:
            return ["reduce-scatter", "all-reduce"]
        return ["all-reduce" if self.strategy == "ddp" else "reduce-scatter"]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """As DistributedDataParallel's."""
        self.syncs = False
        try:
            yield
        finally:
            self.syncs = True

    def set_requires_all_reduce(self, value: bool) -> None:
        """As FSDPModule's."""
        self.syncs = value


def _play(module: _PlayedModule, micro_batches: Sequence[Batch], calls: Sequence[TowerCalls]) -> list[PlayedBatch]:
    """Forward and backward passes of one process's step, by the run's own loop, on numbers instead of a model."""
    base: Any = module.model.model
    found: list[PlayedBatch] = []

    def note(_module: nn.Module, args: Any) -> None:
        base.passes, base.collectives = [], []
        counts = StepCounts.of([args[0]])
        rows = len(args[0]["input_ids"])
        shape = (rows, counts.slots, counts.images, counts.supervised)
        found.append(PlayedBatch(*shape, base.passes, base.collectives))

    handle = module.register_forward_pre_hook(note)
    parallel = Parallelized(module, module.model, module.strategy, 1.0)
    forward_backward(parallel, micro_batches, 1, torch.device("cpu"), calls)
    handle.remove()
    return found


def _outline(batch: Batch) -> Batch:
    """The batch without its pixels, whose shape alone counts here."""
    pixels = {key: value for key, value in batch.items() if key.endswith("pixel_values")}
    return batch | {key: torch.zeros(()).expand(value.shape) for key, value in pixels.items()}


class _SharedPlans:
    """Plans each window once for all processes that are played: the first one's planner makes them."""

    def __init__(self) -> None:
        self._plans: list[WindowPlan] = []
        self._source: Iterator[WindowPlan] | None = None

    def __call__(self, make: Callable[[], Iterator[WindowPlan]]) -> Iterator[WindowPlan]:
        if self._source is None:
            self._source = make()
        for number in count():
            if number == len(self._plans):
                self._plans.append(next(self._source))
            yield self._plans[number]


def find_hang(steps: Sequence[PlayedStep]) -> str | None:
    """Where the processes of a step would wait for each other forever; None when nowhere.

    Args:
        steps: Of all processes.
    """
    first: dict[int, PlayedStep] = {}
    for played in steps:
        other = first.setdefault(played.step, played)
        mine, theirs = played.micro_batches, other.micro_batches
        where = f"step {played.step + 1} would hang: process {other.rank}"
        if len(mine) != len(theirs):
            return f"{where} has {len(theirs)} micro-batches, process {played.rank} has {len(mine)}"
        for number, (a, b) in enumerate(zip(theirs, mine, strict=True), 1):
            if a.collectives == b.collectives:
                continue
            at = next(
                (i for i, (x, y) in enumerate(zip(a.collectives, b.collectives, strict=False)) if x != y),
                min(len(a.collectives), len(b.collectives)),
            )
            left, right = (names[at] if at < len(names) else "nothing" for names in (a.collectives, b.collectives))
            return (
                f"{where} comes to `{left}` where process {played.rank} comes to `{right}`, in micro-batch {number}: "
                f"{', '.join(a.passes)} against {', '.join(b.passes)}"
            )
    return None


def dry_run(
    recipe: Recipe,
    world_size: int = 1,
    steps: int = 2,
    processes_per_node: int = 8,
    device: str = "h100-80gb",
    batches: BatchFactory | None = None,
) -> DryRun:
    """Play the first steps of every process of a run.

    Args:
        recipe: The recipe. No weights are read, but its data, configs and tokenizer are.
        world_size: Number of processes.
        steps: Optimizer steps that are played; their pictures are decoded, as bad ones are left out of the rows.
        processes_per_node: Processes that share a node's memory and /dev/shm.
        device: What each process runs on: a name in `florence_vl.train.flops.DEVICES`, or `cpu`.
        batches: Instead of the recipe's data, as in `train`.

    Raises:
        ValueError: The recipe can't start: sizes that don't divide, a missing file, an unknown device.
        FileNotFoundError: A file that the recipe names isn't there.
    """
    from florence_vl.data.packing import PREFETCH
    from florence_vl.train.data import TrainingData

    local_size = min(world_size, processes_per_node)
    world = World(torch.device("cpu" if device == "cpu" else "meta"), 0, world_size, 0, local_size)
    available = usable_memory(device) if device != "cpu" else _host_memory() / local_size
    refuse_early(recipe, world, batches)
    if recipe.precision == "auto":
        recipe = recipe.with_precision("bf16" if device != "cpu" or bf16_is_faster(world.device) else "fp32")
    strategy = resolve_strategy(recipe.parallel, world)
    _, shards = shard_groups(recipe.parallel, strategy, world)
    model, processor = load_shell(recipe)
    size = image_size(model, processor)
    taken: dict[tuple[int, int], list[Batch]] = {}  # (step, process) -> micro-batches
    bad: Counter[str] = Counter()
    largest = 0
    with tempfile.TemporaryDirectory() as folder:  # the data keeps a list of bad records; the run's own stays as it is
        quiet = replace(recipe, output=folder, data=replace(recipe.data, workers=_workers(recipe)))
        if batches is None:
            batches = TrainingData(quiet, processor, _SharedPlans()).batches
        for rank in range(world_size):
            stream = batches(0, rank, world_size, None)
            for step in range(steps):
                own = [next(stream) for _ in range(stream.batches_per_rank)]
                largest = max(largest, *map(_bytes, own))
                taken[step, rank] = [_outline(batch) for batch in own]
            report = getattr(stream, "report", None)  # given batches have none
            bad.update({} if report is None else report().bad_by_name())
            stream.close()
    module = _PlayedModule(model, recipe, strategy, size, world_size > 1)
    played = []
    for step in range(steps):
        all_calls = [[tower_calls(batch) for batch in taken[step, rank]] for rank in range(world_size)]
        calls = [most_calls(same) for same in zip(*all_calls, strict=False)]  # of micro-batches that all have
        for rank in range(world_size):
            own = taken[step, rank]
            needed = calls + all_calls[rank][len(calls) :]
            played.append(PlayedStep(rank, step, StepCounts.of(own), _play(module, own, needed)))
    every = [one for step in played for one in step.micro_batches]
    shape = (max(b.images for b in every), max(b.slots for b in every), max(b.supervised for b in every))
    largest_image = processor.image_processor.largest_size
    memory = MemoryPlan(recipe, model.config, largest_image, world_size, shards).at(*shape)
    # workers hold `PREFETCH` each; with page-locked memory one is on its way, without it a whole step's
    held = recipe.data.workers * PREFETCH + (1 if device != "cpu" else len(played[0].micro_batches))
    shm = held * largest * local_size / GIB if recipe.data.workers else 0.0
    result = DryRun(strategy, world_size, played, dict(bad), memory, available, shm, _shm_size(), [])
    result.problems = _problems(result, recipe, shape, device)
    return result


def _problems(found: DryRun, recipe: Recipe, shape: tuple[int, int, int], device: str) -> list[str]:
    problems = [hang] if (hang := find_hang(found.steps)) else []
    for step in sorted({played.step for played in found.steps}):
        if not sum(played.counts.supervised for played in found.steps if played.step == step):
            problems.append(nothing_to_learn(step + 1, None, recipe.data.sources))
    need = sum(found.memory.values())
    if need > found.memory_available:
        images, tokens, supervised = shape
        problems.append(
            f"a process needs {need:.1f} GiB of {device} memory and has {found.memory_available:.1f}: its largest "
            f"micro-batch has {images} images, {tokens} tokens, {supervised} of them supervised. Lower "
            "micro_batch_size, set activation_checkpointing, or use more devices"
        )
    if found.shm > found.shm_available:
        problems.append(
            f"the workers of a node fill {found.shm:.2f} GiB of /dev/shm, which has {found.shm_available:.2f} here. "
            "Give the container more (docker run --shm-size), or lower data.workers"
        )
    return problems


def _workers(recipe: Recipe) -> int:
    """What a stream gives depends on the number of its workers; what indexed data gives doesn't."""
    return recipe.data.workers if recipe.data.stream is not None else 0


def _bytes(batch: Batch) -> int:
    return sum(value.numel() * value.element_size() for value in batch.values() if isinstance(value, Tensor))


def _host_memory() -> float:
    return psutil.virtual_memory().total / GIB


def _shm_size() -> float:
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).total / GIB if folder.is_dir() else float("inf")


__all__ = ["DryRun", "PlayedBatch", "PlayedStep", "dry_run", "find_hang"]
