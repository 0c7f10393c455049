"""Estimate the cost of a recipe: parameters, FLOPs, memory by kind, micro-batch, throughput, device-hours.

Everything is computed from configs on the meta device: no weights, no data, no network.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from florence_vl.model.geometry import native_size
from florence_vl.model.head import chunk_rows
from florence_vl.model.views import FULL_VIEW, check_views
from florence_vl.registry import did_you_mean
from florence_vl.train.config import BuildConfig, Recipe
from florence_vl.train.flops import DEVICES, ActivationMeter, ModelFlops, Multipliers, build_shell, count_flops
from florence_vl.train.known_parts import KNOWN_PARTS
from florence_vl.train.model import NO_MODEL
from florence_vl.train.optimizer import apply_parts, count_parameters
from florence_vl.train.parallel import part_blocks, resolve_strategy, shard_groups
from florence_vl.train.recipes import list_recipes, load_recipe
from florence_vl.train.throughput import (
    DEVICES_PER_NODE,
    GB_PER_S_BETWEEN_NODES,
    GB_PER_S_IN_NODE,
    Throughput,
    estimate_throughput,
)
from florence_vl.train.world import World

if TYPE_CHECKING:
    from florence_vl.model.configuration import FlorenceVLConfig

GIB = 2**30
RESERVE_GIB = 2.0  # CUDA context, NCCL buffers, allocator fragments
USABLE = 0.95  # fraction of the rest


@dataclass(frozen=True)
class Workload:
    """An average sample.

    Attributes:
        images: Number of images.
        text_tokens: Number of tokens without image tokens.
        supervised: Number of supervised tokens.
    """

    images: float = 1.0
    text_tokens: float = 180.0
    supervised: float = 120.0


@dataclass
class CostPlan:
    """Result of `plan_recipe`; sizes in GiB per device, FLOPs as plain numbers.

    Attributes:
        recipe: Name of the recipe.
        devices: Number of devices.
        device: Name in `DEVICES`.
        strategy: `none`, `ddp`, `fsdp`, `hsdp`.
        parameters: Part -> (all, trainable).
        image_tokens: Tokens per image in the LLM.
        sample_tokens: Tokens per average sample.
        flops_per_sample: Training step, by part.
        memory: GiB by kind at the recipe's micro-batch.
        memory_available: Usable memory in GiB.
        fits: Whether the micro-batch fits.
        largest_micro_batch: Rows of the largest micro-batch that fits; 0 if none does.
        samples: Samples of the whole run.
        flops_per_run: FLOPs of the whole run.
        samples_per_s: Over all devices, at the given MFU.
        tokens_per_s: Likewise.
        device_hours: Device-hours of the whole run.
        hours: Wall time of the whole run.
        estimate: Speed with what the settings cost: recomputation, masked attention, exchange between devices.
        assumptions: Assumptions of the estimates.
    """

    recipe: str
    devices: int
    device: str
    strategy: str
    parameters: dict[str, tuple[int, int]]
    image_tokens: int
    sample_tokens: float
    flops_per_sample: dict[str, float]
    memory: dict[str, float]
    memory_available: float
    fits: bool
    largest_micro_batch: int
    samples: int | None
    flops_per_run: float | None
    samples_per_s: float
    tokens_per_s: float
    device_hours: float | None
    hours: float | None
    estimate: Throughput
    assumptions: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def model_config(recipe: Recipe) -> tuple[FlorenceVLConfig, tuple[int, int]]:
    """The model's config and the pixels of its images, from the recipe alone, as `load_model` sets them.

    Images of their own aspect ratio are counted as squares that use the whole token budget, and images with tiles as
    having the most tiles. A `model.path` that another
    recipe will write is taken from that recipe.

    Raises:
        ValueError: The shapes of a part are unknown.
        FileNotFoundError: `model.path` is neither a folder nor a recipe's output.
    """
    config, size = _saved_or_built_config(recipe)
    model = recipe.model
    config.update(model.changes)
    if model.token_budget is not None:
        stride = config.merge * _stride(config)
        size = native_size(*size, stride, model.token_budget, max_upscale=math.inf)
    resampled = config.tower == "florence2" and bool(model.token_budget or model.image_size)
    config.positions = model.positions or ("resampled" if resampled else config.positions)
    config.check()
    if config.tiles is not None:
        config.tiles["size"] = side = size[1]  # the width also of the size that another recipe's config gave
        size = (config.tiles["max"] * side, side)
    return config, size


def _saved_or_built_config(recipe: Recipe) -> tuple[FlorenceVLConfig, tuple[int, int]]:
    from florence_vl.model.configuration import FlorenceVLConfig
    from florence_vl.model.packaged import resolve
    from florence_vl.model.parts import image_size

    build, size = recipe.model.build, recipe.model.image_size
    if recipe.model.path is not None:
        folder = Path(resolve(recipe.model.path, "models"))
        if (folder / "config.json").is_file():
            config = FlorenceVLConfig.from_pretrained(folder)
            side = size or image_size(folder, config.vision_config)
            return config, (side, side)
        other = recipe_that_writes(recipe.model.path)
        if other is None:
            raise FileNotFoundError(f"model.path {recipe.model.path!r} is not a folder, and no recipe writes it")
        config, written = model_config(other)
        return config, (size, size) if size else written
    if build is None:
        raise ValueError(NO_MODEL)
    return _built_config(build, size)


def recipe_that_writes(folder: str) -> Recipe | None:
    """The recipe whose run exports a model to a folder, if there is one."""
    for path in list_recipes().values():
        with contextlib.suppress(ValueError, FileNotFoundError):  # of a recipe that this one does not need
            if (other := load_recipe(path)).run_dir / "model" == Path(folder):
                return other
    return None


def _stride(config: FlorenceVLConfig) -> int:
    """Pixels a side of one position of the tower."""
    if config.tower == "florence2":
        return math.prod(config.vision_config.vision_config.patch_stride)
    return int(config.vision_config.patch_size)


def _looks(recipe: Recipe, config: FlorenceVLConfig, size: tuple[int, int]) -> list[tuple[float, ModelFlops]]:
    """How often each view of `data.views` is drawn, as a share, and what it costs; the full one alone without."""
    full = count_flops(config, *size)
    weights = recipe.data.views or {FULL_VIEW: 1.0}
    table = check_views(config.views or {}, config.features)
    looks = []
    for name, weight in weights.items():
        if name != FULL_VIEW and name not in table:
            raise ValueError(f"data.views: unknown view {name!r}. {did_you_mean(name, [FULL_VIEW, *table])}")
        side = None if name == FULL_VIEW else table[name]["size"]
        looks.append((weight / sum(weights.values()), full if side is None else count_flops(config, side, side)))
    return looks


def _built_config(build: BuildConfig, size: int | None) -> tuple[FlorenceVLConfig, tuple[int, int]]:
    from florence_vl.model.assemble import config_fields
    from florence_vl.model.configuration import FlorenceVLConfig
    from florence_vl.model.parts import image_size, read_preprocessing

    vision, folder = _part_config(build.vision, "vision")
    text, _ = _part_config(build.llm, "llm")
    known_ids = vision.model_type == "florence2" and vision.text_config.vocab_size >= 50265 and not build.prompts
    own_size = read_preprocessing(folder).size if folder is not None else None
    fields = config_fields(build, vision, own_size, lambda: None if known_ids else _guessed_ids)
    config = FlorenceVLConfig(text_config=text, **fields)
    side = size or build.image_size or image_size(folder, config.vision_config)
    return config, (side, side)


def _guessed_ids(text: str) -> list[int]:
    """An estimated number of ids of a text: only lengths are needed, and tokenizers are not read."""
    return [4] * (2 + round(1.3 * len(text.split())))


def _part_config(name: str, kind: str) -> tuple[Any, Path | None]:
    """Config of a part: of a folder, a packaged part, a known part, or a cached download."""
    from transformers import AutoConfig

    from florence_vl.model.packaged import resolve

    resolved = resolve(name, "vision" if kind == "vision" else "llms")
    folder = Path(resolved).expanduser()
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder), folder
    if name in KNOWN_PARTS:
        values = dict(KNOWN_PARTS[name])
        return AutoConfig.for_model(values.pop("model_type"), **values), None
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True), None
    except (OSError, ValueError):
        raise ValueError(
            f"the shapes of {kind} {name!r} are unknown: it is not a folder, not in the hub's cache, and not among "
            f"the known parts. {did_you_mean(name, KNOWN_PARTS)}"
        ) from None


def plan_recipe(
    recipe: Recipe,
    devices: int = 1,
    device: str = "h100-80gb",
    mfu: float = 0.4,
    workload: Workload | None = None,
    samples: int | None = None,
) -> CostPlan:
    """Estimate the cost of a recipe.

    Args:
        recipe: The recipe.
        devices: Number of devices.
        device: Name in `florence_vl.train.flops.DEVICES`.
        mfu: Assumed fraction of the devices' peak.
        workload: The average sample.
        samples: Samples of the run; by default from the recipe's steps, or the sizes of its registered data sets.

    Raises:
        ValueError: The device or the shapes of a part are unknown, or the strategy does not fit several devices.
    """
    available = usable_memory(device)
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is a fraction between 0 and 1, found {mfu}")
    workload = workload or Workload()
    if recipe.precision == "auto":
        recipe = recipe.with_precision("bf16")  # the result on every device of the table
    peak = DEVICES[device][0]
    config, (height, width) = model_config(recipe)
    flops = count_flops(config, height, width)
    multipliers = Multipliers.of(recipe.parts, flops.num_layers)
    sample_tokens = workload.images * flops.image_tokens + workload.text_tokens
    per_sample: dict[str, float] = {}
    forward = Multipliers(1.0, 1.0, 1.0, 1.0, 1.0)  # of the model that is distilled, with all features
    passes = [(share, look, multipliers) for share, look in _looks(recipe, config, (height, width))]
    for share, look, times in [*passes, *([(1.0, flops, forward)] if recipe.distill else [])]:
        tokens = workload.images * look.image_tokens + workload.text_tokens
        for part, count in look.step(times, workload.images, tokens, tokens**2, workload.supervised).items():
            per_sample[part] = per_sample.get(part, 0.0) + share * count
    world = World(torch.device("meta"), size=devices, local_size=min(devices, DEVICES_PER_NODE))
    strategy = "none" if devices == 1 else resolve_strategy(recipe.parallel, world)
    _, shards = shard_groups(recipe.parallel, strategy, world)
    plan = MemoryPlan(recipe, config, (height, width), devices, shards)
    memory, largest = _memory(plan, recipe, flops, workload, available)
    total_samples = samples if samples is not None else _samples(recipe, sample_tokens)
    run = sum(per_sample.values()) * total_samples if total_samples else None
    rate = devices * peak * 1e12 * mfu / sum(per_sample.values())
    shell = build_shell(config)
    apply_parts(shell, recipe.parts)
    parameters = count_parameters(shell)
    estimate = estimate_throughput(
        recipe,
        flops,
        multipliers,
        sum(per_sample.values()),
        workload.images,
        sample_tokens,
        (sum(count for count, _ in parameters.values()), sum(count for _, count in parameters.values())),
        devices,
        shards,
        peak * 1e12 * mfu,
    )
    return CostPlan(
        recipe=recipe.name,
        devices=devices,
        device=device,
        strategy=strategy,
        parameters=parameters,
        image_tokens=flops.image_tokens,
        sample_tokens=sample_tokens,
        flops_per_sample=per_sample,
        memory=memory,
        memory_available=available,
        fits=sum(memory.values()) <= available,
        largest_micro_batch=largest,
        samples=total_samples,
        flops_per_run=run,
        samples_per_s=rate,
        tokens_per_s=rate * sample_tokens,
        device_hours=None if run is None else run / (peak * 1e12 * mfu * 3600),
        hours=None if run is None else run / (devices * peak * 1e12 * mfu * 3600),
        estimate=estimate,
        assumptions=_assumptions(recipe, config, workload, height, width, mfu, peak, device, total_samples, strategy),
    )


def _rows(recipe: Recipe, flops: ModelFlops, workload: Workload, micro: int) -> tuple[int, int, int]:
    """Maximum images, tokens and supervised tokens of a micro-batch: every text token may be supervised."""
    sample = workload.images * flops.image_tokens + workload.text_tokens
    packing = recipe.data.packing
    if packing.mode == "packed":
        length, average = packing.tokens_per_row, packing.tokens_per_row / sample
        images = min(packing.max_images_per_row, max(1, round(average * workload.images)))
    else:
        length, average = recipe.data.max_length or round(sample), 1.0
        images = round(max(1.0, workload.images))
    text = max(length - images * flops.image_tokens, round(average * workload.supervised))
    return micro * images, micro * length, micro * text


def usable_memory(device: str) -> float:
    """GiB of a device that a run may fill.

    Raises:
        ValueError: Unknown device.
    """
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}. {did_you_mean(device, DEVICES)}")
    return (DEVICES[device][1] - RESERVE_GIB) * USABLE


class MemoryPlan:
    """What a process holds at the peak of a step, by kind.

    Args:
        recipe: Its parts, precision and activation checkpointing count.
        config: Of the model.
        size: Height and width of images in pixels.
        devices: Number of processes.
        shards: Number of processes that share one copy of the model.
    """

    def __init__(
        self, recipe: Recipe, config: FlorenceVLConfig, size: tuple[int, int], devices: int, shards: int
    ) -> None:
        self.recipe, self.size = recipe, size
        text = config.get_text_config()
        self.width, self.vocab = text.hidden_size, text.vocab_size
        self.compute = 4 if recipe.precision == "fp32" else 2
        self.master = 2 if recipe.precision == "bf16_pure" else 4
        self._meter = ActivationMeter(config, recipe.parts, torch.float32 if self.compute == 4 else torch.bfloat16)
        shell: Any = build_shell(config)
        apply_parts(shell, recipe.parts)
        parameters = list(shell.parameters())
        found = [[p.numel() for p in block.parameters()] for part in part_blocks(shell).values() for block in part]
        head, embeddings = shell.lm_head.weight, shell.get_input_embeddings().weight
        self.shards, self.sharded, self.buckets = shards, shards > 1, shards == 1 < devices
        self.total = sum(p.numel() for p in parameters)
        self.trainable = sum(p.numel() for p in parameters if p.requires_grad)
        self.largest = max((p.numel() for p in parameters if p.requires_grad), default=0)
        self.block = max((sum(sizes) for sizes in found), default=0)
        self.head, self.head_trains = int(head.numel()), bool(head.requires_grad)
        own_units = 0 if head is embeddings else int(embeddings.numel()) + self.head
        self.root = self.total - sum(map(sum, found)) - own_units
        # what a copy in the compute type is kept of: all but embeddings and a trained head, see `keep_casts`
        self.cast = self.total - (own_units or self.head) + (0 if self.head_trains else self.head)

    def at(self, images: int, tokens: int, supervised: int) -> dict[str, float]:
        """GiB by kind at a micro-batch of a step that accumulates.

        Args:
            images: Its images.
            tokens: Its tokens, with padding.
            supervised: Its supervised tokens.
        """
        saved = self._meter.measure(images, *self.size, tokens)
        checkpointing = self.recipe.activation_checkpointing
        modes = {"tower": checkpointing.tower, "llm": checkpointing.llm}
        held = sum(part.held(modes.get(name, "none")) for name, part in saved.items())
        block_again = max(part.brought_back(modes.get(name, "none")) for name, part in saved.items())
        static = {
            "weights": self.master * self.total / self.shards,
            "gradients": self.master * self.trainable / self.shards,
            "optimizer": 2 * self.master * self.trainable / self.shards,
        }
        if self.buckets:
            static["gradient buckets (ddp)"] = self.master * self.trainable
        if self.recipe.precision == "bf16" and not self.sharded:
            static["bf16 copies (autocast)"] = 2 * self.cast
        *losses, block = self._moments(supervised)
        moments = [moment | {"activations": held} for moment in losses]
        moments.append(block | {"activations": held + block_again})
        if not self.sharded:  # the optimizer's own, when activations are gone
            moments.append({"temporaries": 2 * self.master * self.largest})
        peak = max(moments, key=lambda moment: sum(moment.values()))
        return {kind: size / GIB for kind, size in (static | peak).items()}

    def _moments(self, supervised: int) -> list[dict[str, float]]:
        """What is held beside weights, states and activations: in the loss, behind it, and in a block's backward pass.

        A unit's gradient is whole before it is reduced, in fp32.
        """
        rows = min(supervised, chunk_rows(self.vocab))
        logits = rows * self.vocab * 8 + supervised * self.width * self.compute  # and the gradient of the states
        if self.recipe.distill:  # whole: both models' log-probabilities, the student's logits and two gradients
            logits = supervised * self.vocab * 5 * 4
        head_gradient = head_backward = block = 0
        if self.head_trains:
            head_gradient = self.head * (self.compute if rows == supervised or self.compute == 4 else 4 + self.compute)
            head_backward = self.head * 2 * self.compute
        if not self.sharded:
            copy = self.head * self.compute if self.recipe.precision == "bf16" else 0
            return [{"logits": logits, "temporaries": copy + head_gradient}, {"temporaries": copy + head_backward}, {}]
        head_backward += 4 * self.head if self.head_trains else 0
        block = (self.compute + 4) * self.block
        gathered = self.compute * self.root  # stays, as the root's weights are used last and first
        # a unit is gathered into one buffer and copied from there
        with_head, with_blocks = gathered + 2 * self.compute * self.head, gathered + 2 * self.compute * self.block
        return [
            {"gathered weights": with_head, "logits": logits, "temporaries": head_gradient},
            {"gathered weights": with_head, "temporaries": head_backward},
            {"gathered weights": with_blocks, "temporaries": block},
        ]


def _memory(
    plan: MemoryPlan, recipe: Recipe, flops: ModelFlops, workload: Workload, available: float
) -> tuple[dict[str, float], int]:
    """GiB per device by kind at the recipe's micro-batch, and the largest micro-batch that fits."""
    now, one, two = (plan.at(*_rows(recipe, flops, workload, n)) for n in (recipe.micro_batch_size, 1, 2))
    first = sum(one.values())
    step = max(sum(two.values()) - first, 1e-9)
    return now, max(0, 1 + int((available - first) // step)) if available >= first else 0


def _samples(recipe: Recipe, sample_tokens: float) -> int | None:
    packing = recipe.data.packing
    if recipe.steps is not None:
        per_row = packing.tokens_per_row / sample_tokens if packing.mode == "packed" else 1.0
        return round(recipe.steps * recipe.batch_size * per_row)
    from florence_vl.data.sources import DATASETS

    total = 0.0
    for source in recipe.data.sources:
        records = source.limit
        if records is None and source.dataset is not None and source.dataset in DATASETS:
            records = DATASETS[source.dataset].records
        if records is None:
            return None
        total += records * (source.weight if recipe.data.weighting == "repeats" else 1.0)
    return round(total * (recipe.epochs or 1.0))


def _assumptions(
    recipe: Recipe,
    config: FlorenceVLConfig,
    workload: Workload,
    height: int,
    width: int,
    mfu: float,
    peak: float,
    device: str,
    samples: int | None,
    strategy: str,
) -> list[str]:
    packed = recipe.data.packing.mode == "packed"
    rows = (
        f"rows are full: {recipe.data.packing.tokens_per_row} tokens"
        if packed
        else f"memory is for rows of max_length {recipe.data.max_length}; FLOPs are for average samples, no padding"
    )
    found = [
        "logits exist for a chunk of positions at a time; every text token of a full row may be supervised",
        "a step accumulates: sharded gradients are scattered in each micro-batch; a unit's is whole before that",
        f"a sample has {workload.images:g} image(s) of {height}x{width} px, {workload.text_tokens:g} text tokens, "
        f"{workload.supervised:g} of them supervised",
        rows,
        f"{mfu:.0%} of {peak:g} TFLOP/s (bf16, dense) is reached on {device}; recomputation is not counted as useful",
        "attention keeps no score matrix (flash or memory-efficient kernels) in BART and the LLM",
        f"AdamW with two moments, {strategy}, {recipe.precision}; {RESERVE_GIB:g} GiB and {1 - USABLE:.0%} set aside",
    ]
    if recipe.data.views is not None or recipe.model.image_aspect_ratio == "native":
        found.append("memory is for the full view and for images that use the whole token budget")
    if config.tiles is not None:
        found.append(f"every image has the most tiles, {config.tiles['max']}; smaller images have fewer")
    if strategy != "none":
        found.append(
            f"the estimate: {GB_PER_S_IN_NODE:g} GB/s a device inside a node of {DEVICES_PER_NODE}, "
            f"{GB_PER_S_BETWEEN_NODES:g} GB/s between nodes, exchange hidden behind arithmetic, no padding, no gain of "
            "compilation"
        )
    if samples is None:
        found.append("the number of samples is unknown: give --samples")
    elif recipe.steps is None:
        found.append(f"{samples:,} samples: the data sets' stated sizes x epochs")
    return found
