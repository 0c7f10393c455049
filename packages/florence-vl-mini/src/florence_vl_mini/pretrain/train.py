"""Trains a small Florence-2 from scratch, transformers' own classes, on scenes with the seq2seq loss.

`V` is computed once an image and shared by all of the image's tasks. The position in the data is the step alone, so a
run that was killed continues with exactly the samples it would have seen.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from florence_vl.registry import did_you_mean
from florence_vl.train.world import World, init_world
from florence_vl_mini.pretrain.data import Batches, SceneTasks, collate, encode_prompt, normalize
from florence_vl_mini.pretrain.grid import GridHeads, grid_classes, token_loss
from florence_vl_mini.pretrain.model import build_mini_florence2
from florence_vl_mini.scenes import FLORENCE2_PROMPTS, assets

# Text and charts are shown more often than in `DEFAULT_MIX`'s evaluation mix: reading takes the longest to learn.
TRAINING_MIX = {
    "single": 0.13, "objects": 0.37, "lettering": 0.36, "receipt": 0.02, "form": 0.03, "table": 0.02,
    "bar_chart": 0.02, "line_chart": 0.02, "pie_chart": 0.02, "scatter_chart": 0.01,
}  # fmt: skip
TASK_WEIGHTS = {
    "<CAPTION>": 1.0, "<DETAILED_CAPTION>": 1.0, "<OCR>": 1.6, "<OCR_WITH_REGION>": 0.7, "<OD>": 1.0,
    "<DENSE_REGION_CAPTION>": 1.0,
}  # fmt: skip


@dataclass
class Florence2Training:
    """Settings of a run.

    Attributes:
        out: Folder of checkpoint, metrics and tokenizer.
        steps: Optimizer steps in all; more can be asked for later.
        decay_steps: The last steps, over which the learning rate falls linearly to zero (warm-up, stable, decay).
        images_per_step: Images an optimizer step.
        tasks_per_image: Tasks drawn for each image; they share its `V`.
        location_bins: Grid of the box corners: targets use the centres of this many bins out of Florence-2's 1000.
        max_target_tokens: Longer targets (full documents) are replaced by another task of the same image.
        optimizer: "adamw" or "muon" (for the hidden linear layers; AdamW for the rest).
        mix: Weights of the kinds of scene.
        second_mix: Other weights from step `second_mix_at` on: small print pays once letters are known.
        copyleft: Also train on the pictures that `florence-vl mini assets --copyleft` fetched.
        start_from: Folder of a mini Florence-2 whose weights and tokenizer a new run starts from.
        precision: "bfloat16" (autocast; weights stay float32) or "float32".
        grid_weight: Weight of the grid's loss, see `florence2_grid`; 0 for the seq2seq loss alone.
        ema_decay: Decay of the running mean of the weights, which is what is exported; 0 switches it off.
    """

    out: str
    steps: int = 6000
    decay_steps: int = 600
    warmup_steps: int = 300
    images_per_step: int = 16
    tasks_per_image: int = 3
    learning_rate: float = 6e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 0
    image_size: int = 256
    location_bins: int = 64
    max_target_tokens: int = 96
    precision: str = "float32"
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
    copyleft: bool = False
    tasks: dict[str, float] = field(default_factory=lambda: dict(TASK_WEIGHTS))

    def __post_init__(self) -> None:
        for f in fields(self):
            found = getattr(self, f.name)
            if f.type in ("int", "float") and not isinstance(found, (int, float)):
                hint = ": YAML reads it as text, write 6.0e-4" if isinstance(found, str) and "e" in found else ""
                raise ValueError(f"{f.name} must be a number, found {found!r}{hint}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, found {self.precision!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, found {self.optimizer!r}")
        if (self.second_mix is None) != (self.second_mix_at == 0):
            raise ValueError("second_mix and second_mix_at, the step it begins at, go together")
        if self.decay_steps > self.steps:
            raise ValueError(f"decay_steps ({self.decay_steps}) must not exceed steps ({self.steps})")
        if not 1 <= self.tasks_per_image <= len(FLORENCE2_PROMPTS):
            raise ValueError(f"tasks_per_image must be 1 to {len(FLORENCE2_PROMPTS)}, found {self.tasks_per_image}")
        unknown = set(self.tasks) - set(FLORENCE2_PROMPTS)
        if unknown:
            raise ValueError(f"unknown Florence-2 tasks {sorted(unknown)}; known: {', '.join(FLORENCE2_PROMPTS)}")

    @property
    def pool(self) -> str:
        """The sprites that scenes are made of, as `data.scenes.assets` names them."""
        return assets.EXTENDED if self.copyleft else "train"


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Florence2Training:
    """Settings from a YAML file and `key=value` or `key.sub=value` overrides.

    Raises:
        ValueError: Not a mapping, an unknown key, or an override without "=".
    """
    import yaml

    values = yaml.safe_load(Path(path).read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold key: value pairs, found {type(values).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"an override is key=value, found {override!r}")
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = yaml.safe_load(text)
    known = {f.name for f in fields(Florence2Training)}
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown setting {key!r}. {did_you_mean(str(key), known)}")
    if "out" not in values:
        raise ValueError(f"{path}: out is missing: the folder of the run")
    return Florence2Training(**values)


def seq2seq_loss(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of every target token.

    The same computation as `Florence2ForConditionalGeneration.forward` with labels, but DaViT runs once an image
    however many tasks it has, and the LM head only where there is a label.

    Returns:
        (loss of each supervised token (S,), index of its task (S,), `V` (B, N, D), encoder's output at the image
        positions (T, N, D)).
    """
    image = model.model.get_image_features(normalize(batch["pixels"])).pooler_output  # (B, N, D)
    owned = image[batch["owner"]]
    embeds = torch.cat([owned, model.get_input_embeddings()(batch["prompt_ids"]).to(image.dtype)], dim=1)
    mask = torch.cat([batch["prompt_mask"].new_ones(owned.shape[:2]), batch["prompt_mask"]], dim=1)
    text = model.config.text_config
    encoded = model.model.language_model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    losses, tasks = [], []
    lengths = (batch["labels"] != -100).sum(1)
    for rows in lengths.argsort().chunk(2):  # the short half need not run at the length of the longest
        labels = batch["labels"][rows, : int(lengths[rows].max())]
        shifted = labels.new_full(labels.shape, text.pad_token_id)
        shifted[:, 0] = text.decoder_start_token_id
        shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, text.pad_token_id)
        hidden = model.model.language_model.decoder(
            input_ids=shifted, encoder_hidden_states=encoded[rows], encoder_attention_mask=mask[rows], use_cache=False
        ).last_hidden_state
        supervised = labels != -100
        logits = model.lm_head(hidden[supervised]).float()
        losses.append(F.cross_entropy(logits, labels[supervised], reduction="none"))
        tasks.append(rows[supervised.nonzero()[:, 0]])
    return torch.cat(losses), torch.cat(tasks), image, encoded[:, : image.shape[1]]


def _save(path: Path, state: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".partial", delete=False) as file:
        torch.save(state, file)
    os.replace(file.name, path)


def _lr_factor(step: int, config: Florence2Training) -> float:
    from florence_vl.train.config import ScheduleConfig
    from florence_vl.train.schedule import lr_factor

    shape = ScheduleConfig(name="wsd", warmup_steps=config.warmup_steps, decay_ratio=config.decay_steps / config.steps)
    return lr_factor(shape, step, config.steps)


def make_optimizers(model: nn.Module, heads: nn.Module, config: Florence2Training) -> list[torch.optim.Optimizer]:
    """AdamW; with `optimizer: muon` the weights of the model's hidden linear layers go to Muon instead.

    Muon (torch.optim.Muon, arXiv 2502.16982) scales its steps to AdamW's, so both take the same learning rate.
    """
    hidden: list[Tensor] = []
    if config.optimizer == "muon":
        output = model.get_output_embeddings()  # type: ignore[operator]
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
        hidden = [m.weight for m in linears]
    left = {id(p): p for p in (*model.parameters(), *heads.parameters())}
    for p in hidden:
        del left[id(p)]
    groups = [
        {"params": [p for p in left.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in left.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _worker_init(_: int) -> None:
    torch.set_num_threads(1)
    os.nice(10)


def _average_gradients(parameters: Sequence[nn.Parameter], stop: bool, world: int) -> bool:
    """Mean of the gradients over the processes; whether any of them was asked to stop."""
    if world == 1:
        return stop
    for p in parameters:  # a process whose images ask nothing of a head has no gradient there
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), grads[0].new_tensor([float(stop)])])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat[:-1] / world).split([g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))
    return bool(flat[-1] > 0)


def _copy_start(source: Path, folder: Path) -> None:
    if not (source / "processor_config.json").exists():
        raise ValueError(f"start_from: no mini Florence-2 in {source} (processor_config.json is missing)")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(folder)


def _prepare_start(config: Florence2Training, folder: Path) -> None:
    """Write the untrained model that a run starts from, unless it's there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (folder / "processor_config.json").exists():
        return
    if config.start_from:
        _copy_start(Path(config.start_from).expanduser(), folder)
    else:
        build_mini_florence2(folder, config.seed, config.image_size)


def train(config: Florence2Training, device: str | None = None) -> Path:
    """Train, or continue what `config.out` holds, up to `config.steps`; SIGTERM and SIGINT save first.

    Under torchrun the images of a step are shared out among the processes and the gradients averaged.

    Args:
        config: Settings. Model, tokenizer and data of an existing run must not change; steps, decay, learning rate may.
        device: "cpu", "cuda" or "mps"; the GPU where there is one. Under torchrun "cuda" is a GPU a process.

    Returns:
        The folder of the exported model (weights of the running mean).

    Raises:
        ValueError: The loss is not finite, the device isn't there, or the checkpoint was made with another seed, mix or
            size. On every process, if the first one cannot prepare the start.
    """
    world = init_world(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        return _train(config, world)
    finally:
        world.close()


def _train(config: Florence2Training, world: World) -> Path:
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    if config.images_per_step % world.size:
        raise ValueError(f"images_per_step ({config.images_per_step}) must be a multiple of the {world.size} processes")
    device = world.device
    if device.type == "cpu":
        torch.set_num_threads(config.threads)
    out = Path(config.out).expanduser()
    start_folder, checkpoint = out / "start", out / "checkpoint.pt"
    world.decide(lambda: _prepare_start(config, start_folder))
    # on a CPU plain attention is 1.6 times as fast as the fused kernel for DaViT's many small windows
    attention = "eager" if device.type == "cpu" else "sdpa"
    model: Any = Florence2ForConditionalGeneration.from_pretrained(start_folder, attn_implementation=attention)
    model.to(device).train()
    tokenizer = Florence2Processor.from_pretrained(start_folder).tokenizer
    vision = model.config.vision_config
    with torch.random.fork_rng(devices=[]):  # the same in every process and after every restart
        torch.manual_seed(config.seed)
        heads = GridHeads(vision.projection_dim, vision.embed_dim[-2], config.pool).to(device)
    early: list[Tensor] = []  # what enters the last downsampling
    model.model.vision_tower.convs[-1].register_forward_pre_hook(lambda _, args: early.append(args[0]))
    optimizers = make_optimizers(model, heads, config)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()} if config.ema_decay else {}
    same = (
        "seed",
        "image_size",
        "images_per_step",
        "tasks_per_image",
        "location_bins",
        "max_target_tokens",
        "mix",
        "second_mix",
        "second_mix_at",
        "copyleft",
        "tasks",
        "optimizer",
    )
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        changed = [k for k in same if state["config"].get(k, getattr(Florence2Training, k, None)) != asdict(config)[k]]
        if changed:
            raise ValueError(f"{checkpoint} was made with other {', '.join(changed)}: choose another folder")
        if state["classes"] != list(grid_classes(config.pool)):
            raise ValueError(f"{checkpoint} was made with another version of florence-vl-mini: choose another folder")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
        if config.ema_decay:
            ema = {k: v.to(device) for k, v in (state["ema"] or dict(model.named_parameters())).items()}

    data = SceneTasks(config, tokenizer)
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=Batches(step, config.steps, config.images_per_step, world.rank, world.size),
        collate_fn=collate,
        num_workers=config.workers,
        prefetch_factor=6 if config.workers else None,
        worker_init_fn=_worker_init if config.workers else None,
    )
    stop: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    names = {tuple(ids): task for task, ids in data.prompts.items()}
    tasks = list(config.tasks)
    sums, grids = torch.zeros(2, len(tasks), device=device), torch.zeros(2, device=device)
    began, seen = time.perf_counter(), 0

    trained = [*model.parameters(), *heads.parameters()]

    def save() -> None:
        if not world.is_main:
            return
        _save(
            checkpoint,
            {
                "model": model.state_dict(),
                "heads": heads.state_dict(),
                "classes": list(grid_classes(config.pool)),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "ema": ema,
                "step": step,
                "config": asdict(config),
            },
        )

    try:
        for batch in loader:
            asked = [names[tuple(v for v in row if v != 1)] for row in batch["prompt_ids"].tolist()]
            numbers = torch.tensor([tasks.index(task) for task in asked], device=device)
            text_tasks = torch.tensor(["OCR" in task for task in asked], device=device)
            batch = {k: v.to(device) for k, v in batch.items()}
            rate = config.learning_rate * _lr_factor(step, config)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                losses, task_of, image, prompted = seq2seq_loss(model, batch)
                places = batch["letters"], batch["names"], batch["owner"], text_tasks
                grid = heads(early.pop(), image[:, 1:], prompted[:, 1:], *places)
                said = token_loss(model, prompted[:, 1:], batch["cell_tokens"])
            loss = losses.mean() + config.grid_weight * (grid + said)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {step}; lower learning_rate")
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stopping = _average_gradients(trained, bool(stop), world.size)
            norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            if ema:
                decay = min(config.ema_decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - decay)
            seen += len(batch["pixels"])
            sums[0].index_add_(0, numbers[task_of], losses.detach())
            sums[1].index_add_(0, numbers[task_of], torch.ones_like(losses))
            grids += torch.stack([grid.detach(), said.detach()])
            if world.is_main and (step % config.log_every == 0 or step == config.steps):
                now = time.perf_counter()
                (total, count), steps = sums.cpu(), seen * world.size / config.images_per_step
                by_task = {t: round(float(x / n), 4) for t, x, n in zip(tasks, total, count, strict=True) if n}
                line = {
                    "step": step,
                    "loss": round(float(total.sum() / count.sum()), 4),
                    "lr": round(rate, 7),
                    "grid": round(grids[0].item() / steps, 4),
                    "grid_tokens": round(grids[1].item() / steps, 4),
                    "grad_norm": round(norm.item(), 3),
                    "images_per_second": round(seen * world.size / (now - began), 2),
                    **by_task,
                }
                with (out / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                began, seen = now, 0
                sums.zero_()
                grids.zero_()
            if step % config.save_every == 0:
                save()
            if stopping:
                break
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    save()
    return export(out) if world.is_main else out / "model"


def export(out: str | Path, target: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Write the running mean of the weights of a run as a folder that `from_pretrained` loads.

    Args:
        out: The run's folder.
        target: Where to, `out/model` by default.
        dtype: Type of the stored weights.

    Raises:
        FileNotFoundError: No checkpoint there.
    """
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    out = Path(out).expanduser()
    if not (out / "checkpoint.pt").exists():
        raise FileNotFoundError(f"no checkpoint in {out}: train first")
    target = Path(target) if target else out / "model"
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = Florence2ForConditionalGeneration.from_pretrained(out / "start")
    model.load_state_dict(state["model"])
    if state["ema"]:
        model.load_state_dict(state["ema"], strict=False)
    model.to(dtype).save_pretrained(target)
    Florence2Processor.from_pretrained(out / "start").save_pretrained(target)
    return target


__all__ = [
    "Florence2Training",
    "SceneTasks",
    "collate",
    "encode_prompt",
    "export",
    "normalize",
    "read_recipe",
    "seq2seq_loss",
    "train",
]
