"""The settings of a pretraining run of the mini Florence-2, as in the recipes of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from florence_vl.train.config import STRICT
from florence_vl.train.recipes import read_dataclass
from florence_vl_mini.scenes import TASK_PROMPTS

RECIPE = Path(__file__).with_name("florence2.yaml")

# Text and charts are shown more often than in `DEFAULT_MIX`'s evaluation mix: reading takes the longest to learn.
TRAINING_MIX = {
    "single": 0.13, "objects": 0.37, "lettering": 0.36, "receipt": 0.02, "form": 0.03, "table": 0.02,
    "bar_chart": 0.02, "line_chart": 0.02, "pie_chart": 0.02, "scatter_chart": 0.01,
}  # fmt: skip
TASK_WEIGHTS = {
    "<CAPTION>": 1.0, "<DETAILED_CAPTION>": 1.0, "<OCR>": 1.6, "<OCR_WITH_REGION>": 0.7, "<OD>": 1.0,
    "<DENSE_REGION_CAPTION>": 1.0,
}  # fmt: skip
SAME_DATA = (
    "seed", "image_size", "images_per_step", "tasks_per_image", "location_bins", "max_target_tokens", "mix",
    "second_mix", "second_mix_at", "tasks", "optimizer",
)  # fmt: skip
"""Settings that cannot change during a run."""


@dataclass
class Florence2Training:
    """Settings of a run.

    Attributes:
        out: Folder of checkpoint, metrics and exported model.
        steps: Total optimizer steps; a later call may increase it.
        decay_steps: The last steps, over which the learning rate falls linearly to zero (warm-up, stable, decay).
        warmup_steps: The first steps, over which the learning rate rises.
        images_per_step: Images per optimizer step.
        tasks_per_image: Tasks drawn per image; they share its `V`.
        learning_rate: Peak learning rate.
        optimizer: `adamw`, or `muon` for the hidden linear layers and AdamW for the rest.
        weight_decay: Decoupled weight decay of the matrices.
        max_grad_norm: Gradients are clipped to this norm.
        seed: Seed of the scenes, tasks and initial weights.
        image_size: Side of the square images in pixels, a multiple of 32.
        location_bins: Grid of the box corners: targets use the centers of this many bins out of Florence-2's 1000.
        max_target_tokens: Longer targets (full documents) are replaced by another task of the same image.
        precision: `bfloat16` (autocast; weights stay float32), `float32`, or `auto`: the faster of the two on this
            machine. A resumed run keeps its precision.
        ema_decay: Decay of the moving average of the weights, which is exported; 0 disables it.
        grid_weight: Weight of the grid's loss, see `florence_vl_mini.pretrain.grid`; 0 for the seq2seq loss alone.
        start_from: Folder of a mini Florence-2 whose weights and tokenizer a new run starts from; `mini` is the
            included one.
        workers: Processes that render scenes; 0 renders in the training process.
        threads: CPU threads per training process.
        save_every: Steps between checkpoints.
        log_every: Steps between lines of `metrics.jsonl`.
        mix: Weights of the kinds of scene.
        second_mix: Weights from step `second_mix_at` on: small print becomes useful once letters are learned.
        second_mix_at: First step of `second_mix`.
        tasks: Weights of Florence-2's tasks.
    """

    __pydantic_config__ = STRICT

    out: str
    steps: int = 6000
    decay_steps: int = 600
    warmup_steps: int = 300
    images_per_step: int = 16
    tasks_per_image: int = 3
    learning_rate: float = 6e-4
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 0
    image_size: int = 256
    location_bins: int = 64
    max_target_tokens: int = 96
    precision: Literal["auto", "bfloat16", "float32"] = "float32"
    ema_decay: float = 0.998
    grid_weight: float = 1.0
    start_from: str | None = None
    workers: int = 1
    threads: int = 1
    save_every: int = 100
    log_every: int = 20
    mix: dict[str, float] = field(default_factory=lambda: dict(TRAINING_MIX))
    second_mix: dict[str, float] | None = None
    second_mix_at: int = 0
    tasks: dict[str, float] = field(default_factory=lambda: dict(TASK_WEIGHTS))

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be auto, float32 or bfloat16, found {self.precision!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, found {self.optimizer!r}")
        if self.image_size < 64 or self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32 of at least 64, found {self.image_size}")
        if (self.second_mix is None) != (self.second_mix_at == 0):
            raise ValueError("second_mix and second_mix_at, the step at which it begins, must be set together")
        if self.decay_steps > self.steps:
            raise ValueError(f"decay_steps ({self.decay_steps}) must not exceed steps ({self.steps})")
        if not 1 <= self.tasks_per_image <= len(TASK_PROMPTS):
            raise ValueError(f"tasks_per_image must be 1 to {len(TASK_PROMPTS)}, found {self.tasks_per_image}")
        unknown = set(self.tasks) - set(TASK_PROMPTS)
        if unknown:
            raise ValueError(f"unknown Florence-2 tasks {sorted(unknown)}; known: {', '.join(TASK_PROMPTS)}")


def read_recipe(path: str | Path = RECIPE, overrides: Sequence[str] = ()) -> Florence2Training:
    """Settings from a YAML file and `key=value` or `key.sub=value` overrides, read like any recipe.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An unknown key, a value of the wrong type, or settings that contradict each other.
    """
    return read_dataclass(Florence2Training, path, overrides)
