"""Recipes: typed configuration of a run, read from YAML with `extends` and `key.path=value` overrides, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from florence_vl.registry import did_you_mean

STRICT = ConfigDict(extra="forbid")
OVERRIDE = "command line"
DEFAULT = "default"

Strategy = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
Precision = Literal["fp32", "bf16", "bf16_pure"]
CheckpointingMode = Literal["none", "selective", "full"]


@dataclass
class BuildConfig:
    """Parts to assemble into a new model; the arguments of `florence_vl.build_model`.

    `None` leaves the choice to `build_model`.
    """

    __pydantic_config__ = STRICT

    vision: str
    llm: str
    features: list[str] | None = None
    fusion: str | None = None
    projector_depth: int | None = None
    mean_token: Literal["grid", "all", "grid_before_encoder"] | None = None
    prompt_padding: Literal["masked", "attended"] | None = None
    prompts: dict[str, str] | None = None
    feature_layers: dict[str, int] | None = None


@dataclass
class ModelConfig:
    """Which model is trained: a saved one (`path`) or a new one (`build`).

    Attributes:
        path: Folder or hub name of a saved Florence-VL.
        build: Parts of a new one. Exactly one of `path` and `build` must be given.
        image_aspect_ratio: How images are made square: `pad` or `squash`; None leaves the processor as it is.
        image_size: Height and width of images in pixels; None leaves the processor as it is.
        attn_implementation: One attention backend, or one for each of `vision_config` and `text_config`.
    """

    __pydantic_config__ = STRICT

    path: str | None = None
    build: BuildConfig | None = None
    image_aspect_ratio: Literal["pad", "squash"] | None = None
    image_size: int | None = None
    attn_implementation: str | dict[str, str] | None = None


@dataclass
class SourceConfig:
    """One source of records.

    Attributes:
        path: File, folder, glob or fsspec address that the reader opens. Relative paths start at the working folder.
        reader: Name of the reader; None takes it from the file's name.
        dataset: Name of a registered data set (its layout, filters and licence), instead of `reader`.
        image_root: Folder or archive, or several, in which image names are found.
        weight: How often the source is passed in an epoch, or its share of the stream (`data.weighting`).
        name: Shown in reports; the path's stem by default.
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
    """How records become rows.

    Attributes:
        mode: `packed`: rows of a fixed token budget hold several samples, attention isolated between them; `padded`:
            every sample is a row, padded to the batch's longest.
        tokens_per_row: Token budget of a packed row, image tokens included.
        max_images_per_row: Images in a packed row at most, which bounds the tower's memory.
        window: Records that are looked at together, for packing or for grouping by length.
        group_by_length: Padded: batches of samples of like length.
    """

    __pydantic_config__ = STRICT

    mode: Literal["packed", "padded"] = "padded"
    tokens_per_row: int = 4096
    max_images_per_row: int = 16
    window: int = 256
    group_by_length: bool = False


@dataclass
class DataConfig:
    """What is trained on.

    Attributes:
        sources: The mixture.
        weighting: `repeats`: a source's weight is how often it is passed in an epoch; `proportions`: its share of the
            stream whatever its size.
        template: Chat template that labels come from; None takes the processor's own.
        template_options: Of the template: `system`, `newline_after_image`, `double_bos`, `end`.
        max_length: Tokens in a sample at most, image tokens included; None is without limit (padded rows only).
        on_long: What happens to longer samples.
        packing: See PackingConfig.
        workers: Processes that decode and encode; 0 does it in the training process.
        max_bad_share: The run stops when more than this share of records is bad.
        shuffle: Draw records in random order.
    """

    __pydantic_config__ = STRICT

    sources: list[SourceConfig] = field(default_factory=list)
    weighting: Literal["repeats", "proportions"] = "repeats"
    template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = 2048
    on_long: Literal["error", "drop", "truncate_turns"] = "truncate_turns"
    packing: PackingConfig = field(default_factory=PackingConfig)
    workers: int = 0
    max_bad_share: float = 0.01
    shuffle: bool = True


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a factor of each group's peak.

    Attributes:
        name: `cosine`, `linear`, `constant`, or `wsd` (warm-up, stable, decay).
        warmup_steps: Steps of linear warm-up. Wins over `warmup_ratio`.
        warmup_ratio: The same as a share of the run.
        min_lr_ratio: Factor at the end of the run.
        decay_ratio: Share of the run in which `wsd` decays, at its end.
    """

    __pydantic_config__ = STRICT

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0
    decay_ratio: float = 0.2


@dataclass
class PartConfig:
    """How one part of the model trains.

    Attributes:
        train: False freezes it: no gradient, no optimizer state, evaluation mode (no dropout, no DropPath).
        lr: Peak learning rate; None is `optimizer.lr`.
        weight_decay: None is `optimizer.weight_decay`.
        schedule: None is the run's `schedule`.
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
        dropout: On the adapter's input.
        target_modules: Names of linear layers in an LLM block, or "all-linear".
    """

    __pydantic_config__ = STRICT

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


@dataclass
class LLMPartConfig(PartConfig):
    """How the LLM trains: whole, its last layers only, or through low-rank adapters.

    Attributes:
        last_layers: Train only this many blocks from the end, the final norm and the head.
        lora: Freeze the LLM and train adapters instead.
    """

    __pydantic_config__ = STRICT

    last_layers: int | None = None
    lora: LoraConfig | None = None


@dataclass
class PartsConfig:
    """One entry for each part of the model; projector stands for fusion and projector."""

    __pydantic_config__ = STRICT

    tower: PartConfig = field(default_factory=PartConfig)
    projector: PartConfig = field(default_factory=PartConfig)
    llm: LLMPartConfig = field(default_factory=LLMPartConfig)


@dataclass
class OptimizerConfig:
    """AdamW.

    Attributes:
        lr: Peak learning rate of parts that name none.
        weight_decay: Of parts that name none. Biases, norms and embeddings' positions (1-D) are never decayed.
        betas: Decay of the moments.
        eps: Added to the denominator.
        max_grad_norm: The gradient is clipped to this norm, over all parts; None does not clip.
        fused: One kernel for the whole step; None asks the device.
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
    """How the run is spread over processes.

    Attributes:
        strategy: `none` (one process), `ddp`, `fsdp` (FSDP2 over all processes), `hsdp` (sharded inside groups of
            `shard_size`, replicated between them). `auto` is none for one process and fsdp for several.
        shard_size: Processes of a sharding group; None is those of one node.
        reshard_after_forward: Free gathered weights between forward and backward.
        cpu_offload: Keep weights, gradients and optimizer state in main memory.
    """

    __pydantic_config__ = STRICT

    strategy: Strategy = "auto"
    shard_size: int | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False


@dataclass
class ActivationCheckpointingConfig:
    """Recomputing of activations in the backward pass, block by block: none, all, or all but matrix products."""

    __pydantic_config__ = STRICT

    tower: CheckpointingMode = "none"
    llm: CheckpointingMode = "none"


@dataclass
class CompileConfig:
    """torch.compile of every block of a part."""

    __pydantic_config__ = STRICT

    tower: bool = False
    llm: bool = False


@dataclass
class CheckpointConfig:
    """What is kept so that the run can go on after any end.

    Attributes:
        every_steps: Save each so many steps.
        every_minutes: And each so many minutes.
        keep_last: Newest checkpoints kept.
        keep_every: Checkpoints at multiples of this step are kept for good.
        asynchronous: Write in the background while training goes on.
        export: Write a `save_pretrained` folder when the run is done.
    """

    __pydantic_config__ = STRICT

    every_steps: int | None = 500
    every_minutes: float | None = None
    keep_last: int = 2
    keep_every: int | None = None
    asynchronous: bool = True
    export: bool = True


@dataclass
class LoggingConfig:
    """What is reported.

    Attributes:
        every_steps: Progress lines and trackers hear of each so many steps; metrics.jsonl has every one.
        trackers: Of tensorboard, trackio and wandb.
        project: Name of the project at trackio and wandb.
        progress: `rich` bar, `plain` lines, `none`; `auto` is rich on a terminal.
        peak_tflops: Of one device at the run's precision, for MFU; None takes it from a table of known devices.
        profile_steps: First and last step that torch.profiler records into the run's folder.
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
    """What stops a run, or warns.

    Attributes:
        non_finite: Stop before the optimizer step when loss or gradient is not finite, and write the batch down.
        first_loss_factor: Warn when the first loss is above this many times log(vocabulary).
        spike_factor: Report a gradient norm above this many times its moving average.
        show_sample: Print a decoded sample and its label mask before step 1.
    """

    __pydantic_config__ = STRICT

    non_finite: bool = True
    first_loss_factor: float = 1.2
    spike_factor: float = 5.0
    show_sample: bool = True


@dataclass
class EvaluateConfig:
    """Loss on held-out records during the run.

    Attributes:
        every_steps: Each so many steps, and at the end.
        sources: Held-out records.
        samples: How many of them, the first ones.
    """

    __pydantic_config__ = STRICT

    every_steps: int
    sources: list[SourceConfig]
    samples: int = 256


@dataclass
class Recipe:
    """Everything about a run.

    Attributes:
        name: Of the run; the recipe's path by default.
        description: One line for `florence-vl recipes list`.
        seed: Of weights that are new, of the data's order and of dropout.
        output: Folder of the run.
        model: See ModelConfig.
        data: See DataConfig.
        parts: What trains and how.
        optimizer: See OptimizerConfig.
        schedule: Of every part that names none.
        steps: Optimizer steps. Exactly one of `steps` and `epochs` must be given.
        epochs: Passes over the mixture.
        max_minutes: Time budget: the schedule ends at the budget or at `steps`, whichever comes first.
        batch_size: Rows of one optimizer step over all processes: samples when padded, packed rows when packed.
        micro_batch_size: Rows of one forward pass of one process; what is missing to `batch_size` is accumulated.
        precision: `fp32`; `bf16`: fp32 weights, bf16 compute, fp32 reduction; `bf16_pure`: bf16 weights too.
        device: `auto`, `cpu`, `cuda` or `mps`.
        threads: CPU threads of torch; None leaves it.
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
    precision: Precision = "bf16"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    evaluate: EvaluateConfig | None = None

    @property
    def run_dir(self) -> Path:
        """The run's folder, with `{name}` filled in."""
        return Path(self.output.format(name=self.name))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain YAML types."""
        return _plain(dataclasses.asdict(self))

    def check(self) -> Recipe:
        """Refuse what the types cannot: contradictions between values.

        Raises:
            ValueError: Naming the keys and what to do.
        """
        problems = []
        if (self.steps is None) == (self.epochs is None):
            problems.append("give exactly one of `steps` and `epochs`")
        for key in ("steps", "epochs", "max_minutes", "batch_size", "micro_batch_size"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                problems.append(f"`{key}` must be above 0, found {value}")
        if self.data.template_options and self.data.template is None:
            problems.append("`data.template_options` needs `data.template`")
        if self.model.path is not None and self.model.build is not None:
            problems.append("give only one of `model.path` and `model.build`")
        llm = self.parts.llm
        if llm.last_layers is not None and llm.lora is not None:
            problems.append("give only one of `parts.llm.last_layers` and `parts.llm.lora`")
        if not llm.train and (llm.last_layers is not None or llm.lora is not None):
            problems.append("`parts.llm.train` is false but `last_layers` or `lora` asks for training")
        if llm.last_layers is not None and llm.last_layers <= 0:
            problems.append(f"`parts.llm.last_layers` must be above 0, found {llm.last_layers}")
        if not any(part.train for part in (self.parts.tower, self.parts.projector, llm)):
            problems.append("every part is frozen: set `parts.<part>.train` to true for one of tower, projector, llm")
        packing = self.data.packing
        if packing.mode == "packed" and packing.group_by_length:
            problems.append("`data.packing.group_by_length` is for padded rows; packed rows have no padding to save")
        if packing.mode == "packed" and (self.data.max_length or 0) > packing.tokens_per_row:
            problems.append(
                f"`data.max_length` {self.data.max_length} exceeds `data.packing.tokens_per_row` "
                f"{packing.tokens_per_row}: a sample must fit a row"
            )
        if self.batch_size > 0 and self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size:
            problems.append(
                f"`batch_size` {self.batch_size} is no multiple of `micro_batch_size` {self.micro_batch_size}"
            )
        if self.parallel.shard_size is not None and self.parallel.strategy != "hsdp":
            problems.append("`parallel.shard_size` needs `parallel.strategy: hsdp`")
        if self.checkpoint.keep_last < 1:
            problems.append(f"`checkpoint.keep_last` must be 1 or more, found {self.checkpoint.keep_last}")
        for path, schedule in [("schedule", self.schedule)] + [
            (f"parts.{name}.schedule", part.schedule)
            for name, part in (("tower", self.parts.tower), ("projector", self.parts.projector), ("llm", llm))
            if part.schedule is not None
        ]:
            for key in ("warmup_ratio", "min_lr_ratio", "decay_ratio"):
                if not 0 <= getattr(schedule, key) <= 1:
                    problems.append(f"`{path}.{key}` must be between 0 and 1, found {getattr(schedule, key)}")
        if problems:
            raise ValueError(f"recipe {self.name or '(unnamed)'}: " + "; ".join(problems))
        return self


@dataclass
class ResolvedRecipe:
    """A recipe and where each of its values comes from.

    Attributes:
        recipe: The typed recipe.
        origins: `a.b.c` -> the file, "command line", or "default".
        files: Files that were read, the most general one first.
    """

    recipe: Recipe
    origins: dict[str, str]
    files: list[Path]


def recipe_folders() -> list[Path]:
    """Folders in which recipes are looked up by name: `$FLORENCE_VL_RECIPES`, `./recipes`, the project's, the installed."""
    folders = []
    if explicit := os.environ.get("FLORENCE_VL_RECIPES"):
        folders.append(Path(explicit).expanduser())
    folders += [
        Path.cwd() / "recipes",
        Path(__file__).resolve().parents[3] / "recipes",
        Path(sys.prefix) / "share" / "florence-vl" / "recipes",
    ]
    unique: list[Path] = []
    for folder in folders:
        if folder.is_dir() and folder.resolve() not in unique:
            unique.append(folder.resolve())
    return unique


def list_recipes() -> dict[str, Path]:
    """All recipes by name: the path below its recipe folder without the suffix, as in `paper/8b-pretrain`.

    Files and folders that begin with an underscore are bases to extend, not recipes to run.
    """
    found: dict[str, Path] = {}
    for folder in recipe_folders():
        for path in sorted(folder.rglob("*.yaml")):
            relative = path.relative_to(folder)
            if not any(piece.startswith("_") for piece in relative.parts) and _is_training_recipe(path):
                found.setdefault(relative.with_suffix("").as_posix(), path)
    return found


def find_recipe(name: str | Path, relative_to: Path | None = None) -> Path:
    """The file of a recipe, from its path or its name.

    Raises:
        FileNotFoundError: Nothing is there; near names are listed.
    """
    text = str(name)
    candidates = [Path(text), Path(f"{text}.yaml")]
    bases = ([relative_to] if relative_to else []) + [Path.cwd(), *recipe_folders()]
    for base in bases:
        for candidate in candidates:
            path = candidate.expanduser() if candidate.is_absolute() else base / candidate.expanduser()
            if path.is_file():
                return path.resolve()
    raise FileNotFoundError(f"no recipe {text!r}. {did_you_mean(text, list_recipes())}")


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: Path or name of a recipe, or its content.
        overrides: `key.path=value` texts; values are YAML. List entries are addressed by number.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: Unknown keys (near names listed), wrong types, contradictions, or a cycle of `extends`.

    Example:
        >>> load_recipe({"steps": 10}, ["optimizer.lr=1e-3"]).optimizer.lr
        0.001
    """
    return resolve_recipe(source, overrides).recipe


def resolve_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> ResolvedRecipe:
    """Like `load_recipe`, with the origin of each value."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    files: list[Path] = []
    if isinstance(source, Mapping):
        content, name = dict(source), "given values"
        _extend(values, origins, files, content.pop("extends", None), Path.cwd(), ())
        _merge(values, deepcopy(content), origins, name)
        default_name = ""
    else:
        path = find_recipe(source)
        _read(path, values, origins, files, ())
        default_name = _recipe_name(path)
    for override in overrides:
        _apply_override(values, origins, override)
    values = _expand_variables(values)
    if not values.get("name"):
        values["name"] = default_name
    recipe = _validate(values)
    try:
        recipe.output.format(name=recipe.name)
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"output {recipe.output!r} may hold only the field {{name}}") from None
    for path_text in _leaves(recipe.to_dict()):
        origins.setdefault(path_text, _inherited_origin(path_text, origins))
    return ResolvedRecipe(recipe.check(), {k: origins[k] for k in _leaves(recipe.to_dict())}, files)


def _read(path: Path, values: dict, origins: dict[str, str], files: list[Path], chain: tuple[Path, ...]) -> None:
    if path in chain:
        raise ValueError("recipes extend each other in a circle: " + " -> ".join(p.name for p in (*chain, path)))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(content).__name__}")
    _extend(values, origins, files, content.pop("extends", None), path.parent, (*chain, path))
    inherited = {key: values.get(key) for key in ("name", "description")}
    for key in inherited:  # a name belongs to one file
        if key not in content:
            values.pop(key, None)
            origins.pop(key, None)
    _merge(values, content, origins, _display(path))
    files.append(path)


def _extend(
    values: dict, origins: dict[str, str], files: list[Path], parents: Any, folder: Path, chain: tuple[Path, ...]
) -> None:
    if parents is None:
        return
    for parent in [parents] if isinstance(parents, str) else parents:
        if not isinstance(parent, str):
            raise ValueError(f"`extends` takes a recipe's path or name, or a list of them, found {parent!r}")
        _read(find_recipe(parent, folder), values, origins, files, chain)


def _merge(base: dict, new: Mapping[str, Any], origins: dict[str, str], origin: str, prefix: str = "") -> None:
    for key, value in new.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value, origins, origin, f"{path}.")
            continue
        for old in [k for k in origins if k == path or k.startswith(f"{path}.")]:
            del origins[old]
        base[key] = deepcopy(dict(value)) if isinstance(value, Mapping) else deepcopy(value)
        for leaf in _leaves({key: base[key]}, prefix):
            origins[leaf] = origin


def _apply_override(values: dict, origins: dict[str, str], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"override {override!r} is not of the form key.path=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value is not valid YAML") from None
    pieces = key.strip().split(".")
    node: Any = values
    for depth, piece in enumerate(pieces[:-1]):
        if isinstance(node, list):
            node = node[_list_index(node, piece, override)]
            continue
        if not isinstance(node.get(piece), (dict, list)):
            node[piece] = {}
            origins.pop(".".join(pieces[: depth + 1]), None)
        node = node[piece]
    if isinstance(node, list):
        node[_list_index(node, pieces[-1], override)] = value
    else:
        node[pieces[-1]] = value
    path = key.strip()
    for old in [k for k in origins if k == path or k.startswith(f"{path}.")]:
        del origins[old]
    origins[path] = OVERRIDE


def _list_index(node: list, piece: str, override: str) -> int:
    if not piece.isdigit() or int(piece) >= len(node):
        raise ValueError(f"override {override!r}: {piece!r} is not an entry of a list of {len(node)}")
    return int(piece)


def _expand_variables(value: Any) -> Any:
    """Fill `${NAME}` and `${NAME:-default}` in texts from the environment."""
    if isinstance(value, dict):
        return {key: _expand_variables(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_variables(item) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(3)
        if name in os.environ:
            return os.environ[name]
        if default is None:
            raise ValueError(f"the recipe uses ${{{name}}}, which the environment does not set")
        return default

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}", fill, value)


def _validate(values: dict[str, Any]) -> Recipe:
    try:
        return TypeAdapter(Recipe).validate_python(_numbers(values))
    except ValidationError as error:
        raise ValueError("; ".join(_explain(item) for item in error.errors())) from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as text; make such texts numbers."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _explain(item: Any) -> str:
    location = [str(piece) for piece in item["loc"] if not _is_branch(piece)]
    path = ".".join(location)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _field_names_at(location[:-1])
        return f"unknown key `{path}`. {did_you_mean(location[-1], known) if known else ''}".strip()
    if item["type"] in ("missing", "missing_argument"):
        return f"`{path}` is missing"
    message = item["msg"].removeprefix("Input should be ")
    near = ""
    expected = (item.get("ctx") or {}).get("expected")
    if item["type"] == "literal_error" and isinstance(item["input"], str) and expected:
        options = re.findall(r"'([^']*)'", expected)
        matches = difflib.get_close_matches(item["input"], options, n=1)
        near = f". Did you mean {matches[0]!r}?" if matches else ""
    return f"`{path}` should be {message}, found {item['input']!r}{near}"


def _is_branch(piece: Any) -> bool:
    """True for what pydantic puts into a location to tell a union's branch: a type's name, not a key."""
    return isinstance(piece, str) and (
        "[" in piece or piece in {"str", "int", "float", "bool", "dict", "list"} or piece in globals()
    )


def _field_names_at(location: list[str]) -> list[str]:
    cls: Any = Recipe
    for piece in location:
        if piece.isdigit():
            continue
        hints = typing.get_type_hints(cls)
        if piece not in hints:
            return []
        cls = _dataclass_in(hints[piece])
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)]


def _dataclass_in(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType, list):
        return next((found for arg in typing.get_args(hint) if (found := _dataclass_in(arg))), None)
    return None


def _leaves(value: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all values; lists of mappings are walked by number, other lists are one value."""
    found = []
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            found += _leaves(item, f"{path}.")
        elif isinstance(item, list) and item and all(isinstance(entry, Mapping) for entry in item):
            for index, entry in enumerate(item):
                found += _leaves(entry, f"{path}.{index}.")
        else:
            found.append(path)
    return found


def _inherited_origin(path: str, origins: Mapping[str, str]) -> str:
    """Origin of the nearest enclosing key that was given whole, as by an override with a mapping."""
    pieces = path.split(".")
    for end in range(len(pieces) - 1, 0, -1):
        if origins.get(".".join(pieces[:end])) == OVERRIDE:
            return OVERRIDE
    return DEFAULT


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _recipe_name(path: Path) -> str:
    for folder in recipe_folders():
        if path.is_relative_to(folder):
            return path.relative_to(folder).with_suffix("").as_posix()
    return path.stem


def _display(path: Path) -> str:
    for folder in recipe_folders():
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name


def _is_training_recipe(path: Path) -> bool:
    """Recipes of other commands live beside these; they say so by a `kind` key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return True  # let loading tell what is wrong
    return not (isinstance(content, dict) and "kind" in content)
