"""Recipes: the typed configuration of a run, read from YAML by `florence_vl.train.recipes`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ConfigDict

from florence_vl.data.filters import Filter
from florence_vl.model.build_config import BuildConfig
from florence_vl.train.bounds import check_numbers

STRICT = ConfigDict(extra="forbid")

Strategy = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
Precision = Literal["auto", "fp32", "bf16", "bf16_pure"]
CheckpointingMode = Literal["none", "selective", "full"]


@dataclass
class ModelConfig:
    """The model to train: a saved one (`path`) or a new one (`build`).

    Attributes:
        path: Folder or hub id of a saved Florence-VL; `mini` is the packaged one.
        build: Parts of a new model. Exactly one of `path` and `build` must be given.
        image_aspect_ratio: `pad` or `squash` to a square, or `native`; None keeps the processor's setting.
        image_size: Height and width of images in pixels; None keeps the processor's setting.
        token_budget: Maximum tokens per image, for `native`; by default the number at `image_size`.
        positions: `absolute` or `resampled`; by default `resampled` if the size differs from the tower's trained size.
        fusion: With `path`: another fusion, e.g. `gated` for a model with `channel` fusion.
        gate: With `fusion: gated`: its options, see `FlorenceVLConfig`.
        tiles: With `path`: large images as tiles, `{max: 4, global: true}`; see `FlorenceVLConfig`.
        views: With `path`: the views to add to the model, see `FlorenceVLConfig`.
        attn_implementation: One attention backend, or one for each of `vision_config` and `text_config`. None uses
            transformers' choice, and `sdpa_varlen` for the LLM's packed rows on a CPU.
        feature_store: Folder that stores the features of a frozen tower between runs; None computes them at every
            step.
    """

    __pydantic_config__ = STRICT

    path: str | None = None
    build: BuildConfig | None = None
    image_aspect_ratio: Literal["pad", "squash", "native"] | None = None
    image_size: int | None = None
    token_budget: int | None = None
    positions: Literal["absolute", "resampled"] | None = None
    fusion: str | None = None
    gate: dict[str, Any] | None = None
    tiles: dict[str, Any] | None = None
    views: dict[str, Any] | None = None
    attn_implementation: str | dict[str, str] | None = None
    feature_store: str | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of a saved model's config that get another value."""
        values = {key: getattr(self, key) for key in ("fusion", "gate", "tiles", "views")}
        return {key: value for key, value in values.items() if value is not None}


@dataclass
class SourceConfig:
    """One source of records.

    Attributes:
        path: File, folder, glob or fsspec URL for the reader. Relative paths start at the working folder.
        reader: Name of the reader; None detects it from the path.
        dataset: Name of a registered data set (its layout, filters and license), instead of `reader`.
        image_root: Folder or archive, or several, with the images.
        weight: Number of passes over the source per epoch, or its fraction of the stream (`data.weighting`).
        name: Name in reports; the path's stem by default.
        limit: Use only the first records.
        options: Further arguments of the reader.
    """

    __pydantic_config__ = STRICT

    path: str
    reader: str | None = None
    dataset: str | None = None
    image_root: str | list[str] | None = None
    weight: float = 1.0
    name: str | None = None
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PackingConfig:
    """Layout of records in rows.

    Attributes:
        mode: `packed`: rows of a fixed token budget hold several samples, attention isolated between them; `padded`:
            every sample is a row, padded to the batch's longest.
        tokens_per_row: Token budget of a packed row, image tokens included.
        max_images_per_row: Images in a packed row at most, which bounds the tower's memory.
        window: Records that are looked at together, for packing or for grouping by length.
        pad_to_max_length: Packed: every row is `tokens_per_row` long (one shape for compilation).
        group_by_length: Padded: batches of samples of like length.
        trees: Packed: records of a window that show the same picture share its tokens and its pass through the tower;
            attention, positions and loss stay those of separate samples.
        split_turns: With `trees`: the turns of a record about a picture become independent pairs, which no longer see
            the turns before them. For data sets that merge unrelated questions in a record.
    """

    __pydantic_config__ = STRICT

    mode: Literal["packed", "padded"] = "padded"
    tokens_per_row: int = 4096
    max_images_per_row: int = 16
    window: int = 256
    pad_to_max_length: bool = False
    group_by_length: bool = False
    trees: bool = False
    split_turns: bool = False


@dataclass
class StreamConfig:
    """WebDataset shards, read sequentially through megatron-energon (extra `[stream]`).

    Attributes:
        path: Folder of shards that `florence-vl data prepare` has indexed, a `.yaml` metadataset of energon that blends
            several by weight, or a URL of either.
        shuffle_buffer: Samples in the shuffle buffer of a worker; shards are always shuffled.
        name: Name in reports; the folder's by default.
        caption: Key of the caption in the JSON member; None uses the text member.
        prompts: Questions for captions; None uses the reader's.
        strip_prefixes: Prefixes to remove from captions.
        filters: Samples to keep.
    """

    __pydantic_config__ = STRICT

    path: str
    shuffle_buffer: int = 1000
    name: str | None = None
    caption: str | None = None
    prompts: str | list[str] | None = None
    strip_prefixes: list[str] = field(default_factory=list)
    filters: list[Filter] = field(default_factory=list)


@dataclass
class DataConfig:
    """Training data: `sources` with random access by record number, or a `stream` of shards.

    Attributes:
        sources: The mixture.
        stream: Shards, instead of `sources`. The number of processes and workers must not change during the run.
        weighting: `repeats`: a source's weight is the number of passes per epoch; `proportions`: its fraction of the
            stream, independent of its size.
        template: Chat template that determines the labels; None uses the processor's own.
        template_options: Options of the template: `system`, `newline_after_image`, `double_bos`, `end`.
        max_length: Maximum tokens per sample, including image tokens. None means no limit, except that of a packed row.
        on_long: Treatment of longer samples.
        packing: See PackingConfig.
        workers: Processes that decode and encode; 0 uses the training process.
        max_bad_share: The run stops if more than this fraction of records is bad.
        shuffle: Draw records in random order.
        views: Name of a view -> relative frequency; the seed and a record's position determine its view. None uses the
            processor's own view.
        feature_dropout: Probability of dropping each feature except the first from a record's images, drawn likewise.
    """

    __pydantic_config__ = STRICT

    sources: list[SourceConfig] = field(default_factory=list)
    stream: StreamConfig | None = None
    weighting: Literal["repeats", "proportions"] = "repeats"
    template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = 2048
    on_long: Literal["error", "drop", "truncate_turns"] = "truncate_turns"
    packing: PackingConfig = field(default_factory=PackingConfig)
    workers: int = 0
    max_bad_share: float = 0.01
    shuffle: bool = True
    views: dict[str, float] | None = None
    feature_dropout: float = 0.0


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a factor of each group's peak.

    Attributes:
        name: `cosine`, `linear`, `constant`, or `wsd` (warm-up, stable, decay).
        warmup_steps: Steps of linear warm-up. Overrides `warmup_ratio`.
        warmup_ratio: The same as a fraction of the run.
        min_lr_ratio: Factor at the end of the run.
        decay_ratio: Fraction of the run in which `wsd` decays, at its end.
    """

    __pydantic_config__ = STRICT

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0
    decay_ratio: float = 0.2


@dataclass
class PartConfig:
    """Training of one part of the model.

    Attributes:
        train: False freezes it: no gradient, no optimizer state, evaluation mode (no dropout, no DropPath).
        lr: Peak learning rate; None uses `optimizer.lr`.
        weight_decay: None uses `optimizer.weight_decay`.
        schedule: None uses the run's `schedule`.
    """

    __pydantic_config__ = STRICT

    train: bool = True
    lr: float | None = None
    weight_decay: float | None = None
    schedule: ScheduleConfig | None = None


@dataclass
class LoraConfig:
    """Low-rank adapters on the LLM's linear layers (peft).

    Attributes:
        rank: Rank of the update.
        alpha: Scale; the update is multiplied by alpha / rank.
        dropout: Dropout on the adapter's input.
        target_modules: Names of linear layers in an LLM block, or "all-linear".
    """

    __pydantic_config__ = STRICT

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


@dataclass
class ProjectorPartConfig(PartConfig):
    """Training of the projector and of the fusion's own parameters, the gates of `gated` fusion.

    Attributes:
        gate_lr: Peak learning rate of the gates; None uses `lr`. New gates need more than a trained projector.
    """

    __pydantic_config__ = STRICT

    gate_lr: float | None = None


@dataclass
class LLMPartConfig(PartConfig):
    """Training of the LLM: whole, its last layers only, or through low-rank adapters.

    Attributes:
        last_layers: Train only this many blocks from the end, the final norm and the head.
        lora: Freeze the LLM and train adapters instead.
    """

    __pydantic_config__ = STRICT

    last_layers: int | None = None
    lora: LoraConfig | None = None


@dataclass
class PartsConfig:
    """One entry per part of the model; `projector` includes the fusion."""

    __pydantic_config__ = STRICT

    tower: PartConfig = field(default_factory=PartConfig)
    projector: ProjectorPartConfig = field(default_factory=ProjectorPartConfig)
    llm: LLMPartConfig = field(default_factory=LLMPartConfig)


@dataclass
class OptimizerConfig:
    """Options of AdamW.

    Attributes:
        lr: Peak learning rate of parts without their own.
        weight_decay: Weight decay of parts without their own. Biases, norms and other 1-D parameters are never decayed.
        betas: Decay of the moments.
        eps: Added to the denominator.
        max_grad_norm: The gradient over all parts is clipped to this norm; None disables clipping.
        fused: Use one kernel for the whole step; None: on CPUs and CUDA GPUs.
    """

    __pydantic_config__ = STRICT

    lr: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    fused: bool | None = None


@dataclass
class ParallelConfig:
    """Distribution of the run over processes.

    Attributes:
        strategy: `none` (one process), `ddp`, `fsdp` (FSDP2 over all processes), `hsdp` (sharded within groups of
            `shard_size`, replicated across them). `auto` is `none` for one process; for several, `ddp` on CPUs and
            `fsdp` on GPUs.
        shard_size: Processes per sharding group; None uses those of one node.
    """

    __pydantic_config__ = STRICT

    strategy: Strategy = "auto"
    shard_size: int | None = None


@dataclass
class ActivationCheckpointingConfig:
    """Recomputation of activations in the backward pass, by block: none, all, or all except matrix products."""

    __pydantic_config__ = STRICT

    tower: CheckpointingMode = "none"
    llm: CheckpointingMode = "none"


@dataclass
class CompileConfig:
    """torch.compile of every block of a part.

    Attributes:
        tower: DaViT and BART blocks, or the backbone's.
        llm: The LLM's layers.
        backend: One of `torch.compiler.list_backends(exclude_tags=())`.
    """

    __pydantic_config__ = STRICT

    tower: bool = False
    llm: bool = False
    backend: str = "inductor"


@dataclass
class CheckpointConfig:
    """Checkpoints for resuming the run.

    Attributes:
        every_steps: Number of steps between checkpoints.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Checkpoints at multiples of this step are always kept.
        asynchronous: Write in the background while training continues.
        export: Write a `save_pretrained` folder at the end of the run.
    """

    __pydantic_config__ = STRICT

    every_steps: int | None = 500
    keep_last: int = 2
    keep_every: int | None = None
    asynchronous: bool = True
    export: bool = True


@dataclass
class LoggingConfig:
    """Reporting.

    Attributes:
        every_steps: Number of steps between progress lines and tracker updates; metrics.jsonl has every step.
        trackers: Any of tensorboard, trackio and wandb.
        project: Name of the project in trackio and wandb.
        progress: `rich` bar, `plain` lines, `none`; `auto` is `rich` on a terminal.
        peak_tflops: Peak of one device at the run's precision, for MFU; None uses a table of known devices.
        profile_steps: First and last step that torch.profiler records into RUN/profile, counted from 1.
    """

    __pydantic_config__ = STRICT

    every_steps: int = 10
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    project: str = "florence-vl"
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    peak_tflops: float | None = None
    profile_steps: tuple[int, int] | None = None


@dataclass
class GuardsConfig:
    """Output that helps to detect a wrong run early.

    Attributes:
        show_sample: Print a decoded sample and its label mask before step 1.
    """

    __pydantic_config__ = STRICT

    show_sample: bool = True


@dataclass
class EvaluateConfig:
    """A small evaluation during the run: the loss on held-out records, scores on a suite, or both.

    Attributes:
        every_steps: Number of steps between evaluations; the run also evaluates at the end.
        sources: Held-out records, for `eval/loss`.
        samples: Number of records, from the first one.
        suite: Comma-separated suites or benchmarks, as in `florence-vl evaluate`, for `eval/<benchmark>`. The model
            must be whole in one process: none or ddp.
        limit: Approximate number of questions per benchmark; the same ones every time.
        data: Folder with the benchmarks' files; the mini suite needs none.
        batch_size: Number of questions per batch.
    """

    __pydantic_config__ = STRICT

    every_steps: int
    sources: list[SourceConfig] = field(default_factory=list)
    samples: int = 256
    suite: str | None = None
    limit: int = 100
    data: str | None = None
    batch_size: int = 16


@dataclass
class WarmUpConfig:
    """Contrastive warm-up of the projector, before the first step (`florence_vl.train.warm_up`).

    Attributes:
        pairs: Number of images with captions from `data.sources`; their features are held in memory. 0: only `regions`.
        regions: Sources with answers in Florence-2's region format, `dog<loc_102><loc_31><loc_500><loc_877>`. The same
            number of images is taken from them (all, if `pairs` is 0), and each text is aligned with the tokens in its
            box. Texts with four points are written in the image: each token of the LLM has its own part of the line.
        steps: Number of optimizer steps.
        batch_size: Pairs per step, which are each other's negatives.
        lr: Peak learning rate of AdamW.
    """

    __pydantic_config__ = STRICT

    pairs: int = 4000
    regions: list[SourceConfig] = field(default_factory=list)
    steps: int = 500
    batch_size: int = 256
    lr: float = 1.0e-3


@dataclass
class Recipe:
    """Complete configuration of a run.

    Attributes:
        name: Name of the run; the recipe's path by default.
        description: One line for `florence-vl recipes list`.
        seed: Seed of new weights, of the data's order and of dropout.
        output: Folder of the run.
        model: See ModelConfig.
        data: See DataConfig.
        parts: What is trained and how.
        optimizer: See OptimizerConfig.
        schedule: Schedule of every part without its own.
        steps: Optimizer steps. Exactly one of `steps` and `epochs` must be given.
        epochs: Passes over the mixture.
        max_minutes: Time budget: the schedule ends at the budget or at `steps`, whichever comes first.
        batch_size: Rows per optimizer step over all processes: samples if padded, packed rows if packed.
        micro_batch_size: Rows per forward pass of one process; gradients are accumulated up to `batch_size`.
        precision: `fp32`; `bf16`: fp32 weights, bf16 compute, fp32 reduction; `bf16_pure`: also bf16 weights; `auto`:
            `bf16` if a short measurement finds it faster, otherwise `fp32`. A resumed run keeps its precision.
        device: `auto`, `cpu`, `cuda` or `mps`.
        threads: Number of CPU threads of torch; None keeps torch's default.
        warm_up: Align the projector with the LLM's word embeddings first; done only in the first session of a run.
        distill: Weight of the Kullback-Leibler divergence from the model's own answers with all features at the full
            size, for `data.views` and `data.feature_dropout`.
    """

    __pydantic_config__ = STRICT

    name: str = ""
    description: str = ""
    seed: int = 42
    output: str = "runs/{name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parts: PartsConfig = field(default_factory=PartsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    steps: int | None = None
    epochs: float | None = None
    max_minutes: float | None = None
    batch_size: int = 128
    micro_batch_size: int = 8
    precision: Precision = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    evaluate: EvaluateConfig | None = None
    warm_up: WarmUpConfig | None = None
    distill: float = 0.0

    # Texts written with `${NAME}`: key path -> (as written, as filled in). Set by `load_recipe`.
    unexpanded = MappingProxyType[str, tuple[str, str]]({})

    def with_precision(self, precision: Precision) -> Recipe:
        """The same recipe with another precision."""
        other = copy.copy(self)
        other.precision = precision
        return other

    @property
    def run_dir(self) -> Path:
        """The run's folder, with `{name}` filled in."""
        return Path(self.output.format(name=self.name))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain YAML types; `${NAME}` is restored, because its value may be a secret."""
        content = plain_types(dataclasses.asdict(self))
        for path, (written, filled) in self.unexpanded.items():
            *parents, key = path.split(".")
            node = content
            with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
                for piece in parents:
                    node = node[int(piece)] if isinstance(node, list) else node[piece]
                place = int(key) if isinstance(node, list) else key
                if str(node[place]) == filled:
                    node[place] = written
        return content

    def check(self) -> Recipe:
        """Check for contradictions between values, which types cannot express.

        Raises:
            ValueError: The message names the keys and what to do.
        """
        problems = check_numbers(dataclasses.asdict(self))
        if (self.steps is None) == (self.epochs is None):
            problems.append("give exactly one of `steps` and `epochs`")
        problems += self._check_stream() + self._check_evaluate() + self._check_views()
        if self.warm_up is not None:
            problems += [
                f"`warm_up.{key}` must be 2 or more, found {value}"
                for key in ("pairs", "batch_size")
                if (value := getattr(self.warm_up, key)) == 1
            ]
            if not self.warm_up.pairs and not self.warm_up.regions:
                problems.append("`warm_up.pairs: 0` needs `warm_up.regions`")
            if self.data.stream is not None:
                problems.append("`warm_up` needs the pairs of `data.sources`: a stream has none")
        first, last = self.logging.profile_steps or (1, 1)
        if not 1 <= first <= last:
            problems.append(
                f"`logging.profile_steps` [{first}, {last}] must be a first and a last step, counted from 1"
            )
        if self.data.template_options and self.data.template is None:
            problems.append("`data.template_options` needs `data.template`")
        if self.model.path is not None and self.model.build is not None:
            problems.append("give only one of `model.path` and `model.build`")
        if self.model.feature_store is not None and (self.parts.tower.train or self.compile.tower):
            problems.append("`model.feature_store` is for a tower that neither trains nor compiles")
        llm = self.parts.llm
        if llm.last_layers is not None and llm.lora is not None:
            problems.append("give only one of `parts.llm.last_layers` and `parts.llm.lora`")
        if not llm.train and (llm.last_layers is not None or llm.lora is not None):
            problems.append("`parts.llm.train` is false but `last_layers` or `lora` asks for training")
        if not any(part.train for part in (self.parts.tower, self.parts.projector, llm)):
            problems.append("every part is frozen: set `parts.<part>.train` to true for one of tower, projector, llm")
        packing = self.data.packing
        if packing.mode == "padded" and packing.pad_to_max_length:
            problems.append("`data.packing.pad_to_max_length` is for packed rows")
        if packing.mode == "packed" and packing.group_by_length:
            problems.append("`data.packing.group_by_length` is for padded rows; packed rows have no padding to save")
        if packing.trees and packing.mode != "packed":
            problems.append("`data.packing.trees` is for packed rows: set `data.packing.mode` to packed")
        if packing.split_turns and not packing.trees:
            problems.append("`data.packing.split_turns` needs `data.packing.trees`")
        if packing.trees and self.data.stream is not None:
            problems.append("`data.packing.trees` is for `data.sources`; a stream has no windows of records to look at")
        if packing.mode == "packed" and (self.data.max_length or 0) > packing.tokens_per_row:
            problems.append(
                f"`data.max_length` {self.data.max_length} exceeds `data.packing.tokens_per_row` "
                f"{packing.tokens_per_row}: a sample must fit a row"
            )
        if self.batch_size > 0 and self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size:
            problems.append(
                f"`batch_size` {self.batch_size} is not a multiple of `micro_batch_size` {self.micro_batch_size}"
            )
        if self.parallel.shard_size is not None and self.parallel.strategy != "hsdp":
            problems.append("`parallel.shard_size` needs `parallel.strategy: hsdp`")
        if problems:
            raise ValueError(f"recipe {self.name or '(unnamed)'}: " + "; ".join(problems))
        return self

    def _check_stream(self) -> list[str]:
        """Settings that a stream does not support; a setting that would be ignored is an error."""
        data, problems = self.data, []
        if data.stream is None:
            return []
        if data.sources:
            problems.append("give only one of `data.sources` and `data.stream`")
        if self.epochs is not None:
            problems.append("`epochs` is for `data.sources`; a `data.stream` has no end: give `steps`")
        if data.weighting != "repeats":
            problems.append("`data.weighting` is for `data.sources`; a metadataset's weights blend a `data.stream`")
        if not data.shuffle:
            problems.append("`data.shuffle: false` is for `data.sources`; the shards of a `data.stream` are shuffled")
        return problems

    def _check_views(self) -> list[str]:
        model, problems = self.model, []
        draws = self.data.views is not None or self.data.feature_dropout > 0
        if self.distill and not draws:
            problems.append("`distill` compares with all features: it needs `data.views` or `data.feature_dropout`")
        if self.data.feature_dropout >= 1:
            problems.append(f"`data.feature_dropout` must be below 1, found {self.data.feature_dropout}")
        if self.data.views is not None and not sum(self.data.views.values()) > 0:
            problems.append("`data.views` must give at least one view a weight above 0")
        if model.token_budget is not None and model.image_aspect_ratio not in (None, "native"):
            problems.append("`model.token_budget` needs `model.image_aspect_ratio: native`")
        if model.gate is not None and model.fusion != "gated":
            problems.append("`model.gate` needs `model.fusion: gated`")
        if model.changes and model.path is None:
            key = next(iter(model.changes))
            problems.append(f"`model.{key}` changes a saved model; for a new one give `model.build.{key}`")
        return problems

    def _check_evaluate(self) -> list[str]:
        config, problems = self.evaluate, []
        if config is None:
            return []
        if not config.sources and config.suite is None:
            problems.append("`evaluate` evaluates nothing: give `evaluate.sources`, `evaluate.suite` or both")
        if config.suite is None and config.data is not None:
            problems.append("`evaluate.data` is for `evaluate.suite`")
        return problems


def plain_types(value: Any) -> Any:
    """Convert tuples to lists, for YAML and JSON."""
    if isinstance(value, dict):
        return {key: plain_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_types(item) for item in value]
    return value
