"""Trains a small Florence-2 from scratch with transformers' classes, on scenes with the seq2seq loss.

`V` is computed once per image and shared by all tasks of the image. The position in the data depends only on the step,
so an interrupted run continues with the same samples as an uninterrupted one.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from florence_vl.files import atomic_file, atomic_folder
from florence_vl.model.packaged import resolve
from florence_vl.model.precision import bf16_is_faster
from florence_vl.train.config import ScheduleConfig
from florence_vl.train.metrics import MetricsFile
from florence_vl.train.schedule import lr_factor
from florence_vl.train.world import World, init_world
from florence_vl_mini.pretrain.config import SAME_DATA, Florence2Training
from florence_vl_mini.pretrain.data import Batches, SceneTasks, collate, normalize
from florence_vl_mini.pretrain.grid import GridHeads, grid_classes, token_loss
from florence_vl_mini.pretrain.model import build_mini_florence2


def seq2seq_loss(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of every target token.

    The same computation as `Florence2ForConditionalGeneration.forward` with labels, but DaViT runs once per image
    for all of its tasks, and the LM head runs only at positions with a label.

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
    for rows in lengths.argsort().chunk(2):  # the shorter half does not need the length of the longest row
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


def train(config: Florence2Training, device: str = "auto") -> Path:
    """Train, or continue the run in `config.out`, up to `config.steps`; SIGTERM and SIGINT save first.

    Under torchrun the images of a step are divided among the processes and the gradients are averaged.

    Args:
        config: Settings. Model, tokenizer and data of an existing run must not change; steps, decay, learning rate may.
        device: `auto`, `cpu`, `cuda` or `mps`. Under torchrun `cuda` is one GPU per process.

    Returns:
        The folder of the exported model (moving average of the weights).

    Raises:
        ValueError: The loss is not finite, the device is missing, or the checkpoint was made with another seed, mix or
            size. Raised on every process if the first one cannot prepare the start.
    """
    world = init_world(device)
    try:
        if config.images_per_step % world.size:
            raise ValueError(
                f"images_per_step ({config.images_per_step}) must be a multiple of the {world.size} processes"
            )
        run = Pretraining(config, world)
        with _asked_to_stop() as signals:
            for batch in run.batches():
                stopping = run.take_step(batch, stop=bool(signals))
                run.log()
                if stopping:
                    break
                if run.step % config.save_every == 0:
                    run.save()
        run.save()
        return export(run.out) if world.is_main else run.out / "model"
    finally:
        world.close()


class Pretraining:
    """The state of a run between two steps.

    Args:
        config: Settings; the start is prepared, or the checkpoint read, in `config.out`.
        world: The processes of the run.

    Attributes:
        step: Number of completed steps.
        model: The Florence-2 in training.
        heads: The heads of the auxiliary loss, see `florence_vl_mini.pretrain.grid`.
        ema: Moving average of the model's weights by name; empty if `ema_decay` is 0.
    """

    def __init__(self, config: Florence2Training, world: World) -> None:
        from transformers import Florence2ForConditionalGeneration, Florence2Processor

        self.world = world
        self.out = Path(config.out).expanduser()
        if config.precision == "auto":
            config = replace(config, precision=world.decide(self._choose_precision))
        self.config = config
        self.step = 0
        if world.device.type == "cpu":
            torch.set_num_threads(config.threads)
        start = self.out / "start"
        world.decide(lambda: _prepare_start(config, start))
        # on a CPU plain attention is 1.6 times as fast as the fused kernel for DaViT's many small windows
        attention = "eager" if world.device.type == "cpu" else "sdpa"
        self.model: Any = Florence2ForConditionalGeneration.from_pretrained(
            start, dtype=torch.float32, attn_implementation=attention
        )
        self.model.to(world.device).train()
        vision = self.model.config.vision_config
        with torch.random.fork_rng(devices=[]):  # the same in every process and after every restart
            torch.manual_seed(config.seed)
            self.heads = GridHeads(vision.projection_dim, vision.embed_dim[-2]).to(world.device)
        self._early: list[Tensor] = []  # input of the last downsampling
        last = self.model.model.vision_tower.convs[-1]
        last.register_forward_pre_hook(lambda _, args: self._early.append(args[0]))
        self.optimizers = make_optimizers(self.model, self.heads, config)
        self.ema = {n: p.detach().clone() for n, p in self.model.named_parameters()} if config.ema_decay else {}
        self._parameters = [*self.model.parameters(), *self.heads.parameters()]
        if self.checkpoint.exists():
            self._load()
        self.data = SceneTasks(config, Florence2Processor.from_pretrained(start).tokenizer)
        self._names = {tuple(ids): task for task, ids in self.data.prompts.items()}
        self._window = _Window(list(config.tasks), world.device)
        self._metrics = MetricsFile(self.out / "metrics.jsonl", self.step) if world.is_main else None

    @property
    def checkpoint(self) -> Path:
        """The file from which an interrupted run continues."""
        return self.out / "checkpoint.pt"

    def _choose_precision(self) -> str:
        if self.checkpoint.exists():
            began = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
            return str(began["config"]["precision"])
        return "bfloat16" if bf16_is_faster(self.world.device) else "float32"

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.world.device, weights_only=True)
        now = asdict(self.config)
        changed = [key for key in SAME_DATA if state["config"][key] != now[key]]
        if changed:
            raise ValueError(f"{self.checkpoint} was made with other {', '.join(changed)}: choose another folder")
        if state["classes"] != list(grid_classes()):
            raise ValueError(
                f"{self.checkpoint} was made with another version of florence-vl-mini: choose another folder"
            )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        if self.config.ema_decay:
            ema = state["ema"] or dict(self.model.named_parameters())
            self.ema = {name: value.detach().clone().to(self.world.device) for name, value in ema.items()}

    def save(self) -> None:
        """Write the checkpoint atomically."""
        if not self.world.is_main:
            return
        with atomic_file(self.checkpoint) as temporary:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "heads": self.heads.state_dict(),
                    "classes": list(grid_classes()),
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                    "ema": self.ema,
                    "step": self.step,
                    "config": asdict(self.config),
                },
                temporary,
            )

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the remaining steps, with the images of this process."""
        config, world = self.config, self.world
        yield from torch.utils.data.DataLoader(
            self.data,
            batch_sampler=Batches(self.step, config.steps, config.images_per_step, world.rank, world.size),
            collate_fn=collate,
            num_workers=config.workers,
            prefetch_factor=6 if config.workers else None,
            worker_init_fn=_worker_init if config.workers else None,
        )

    def take_step(self, batch: Mapping[str, Tensor], stop: bool = False) -> bool:
        """One optimizer step.

        Args:
            batch: Batch of `collate`.
            stop: Whether this process was asked to stop.

        Returns:
            Whether any process was asked to stop.

        Raises:
            ValueError: The loss is not finite.
        """
        config, device = self.config, self.world.device
        asked = [self._names[tuple(v for v in row if v != 1)] for row in batch["prompt_ids"].tolist()]
        batch = {k: v.to(device) for k, v in batch.items()}
        rate = self._set_learning_rate()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            losses, task_of, image_BND, prompted_TND = seq2seq_loss(self.model, batch)
            text_tasks = torch.tensor(["OCR" in task for task in asked], device=device)
            places = batch["letters"], batch["names"], batch["owner"], text_tasks
            grid = self.heads(self._early.pop(), image_BND[:, 1:], prompted_TND[:, 1:], *places)
            said = token_loss(self.model, prompted_TND[:, 1:], batch["cell_tokens"])
        loss = losses.mean() + config.grid_weight * (grid + said)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.step}; lower learning_rate")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        stopping = _average_gradients(self._parameters, stop, self.world.size)
        norm = nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.ema:
            decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            weights = [p.detach() for p in self.model.parameters()]
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)
        self._window.add(asked, losses.detach(), task_of, torch.stack([grid.detach(), said.detach()]))
        self._window.rate, self._window.norm = rate, norm
        self._window.images += len(batch["pixels"]) * self.world.size
        return stopping

    def _set_learning_rate(self) -> float:
        c = self.config
        shape = ScheduleConfig(name="wsd", warmup_steps=c.warmup_steps, decay_ratio=c.decay_steps / c.steps)
        rate = c.learning_rate * lr_factor(shape, self.step, c.steps)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        return rate

    def log(self) -> None:
        """Write a line of `metrics.jsonl` every `log_every` steps."""
        due = self.step % self.config.log_every == 0 or self.step == self.config.steps
        if self._metrics is not None and due:
            self._metrics.write({"step": self.step, **self._window.close(self.config.images_per_step)})


class _Window:
    """Sums since the last line of the metrics file."""

    def __init__(self, tasks: list[str], device: torch.device) -> None:
        self.tasks = tasks
        self._losses = torch.zeros(2, len(tasks), device=device)  # sum and count per task
        self._grids = torch.zeros(2, device=device)
        self.rate, self.norm, self.images, self._began = 0.0, torch.zeros(()), 0, time.perf_counter()

    def add(self, asked: Sequence[str], losses: Tensor, task_of: Tensor, grids: Tensor) -> None:
        numbers = torch.tensor([self.tasks.index(task) for task in asked], device=losses.device)[task_of]
        self._losses[0].index_add_(0, numbers, losses)
        self._losses[1].index_add_(0, numbers, torch.ones_like(losses))
        self._grids += grids

    def close(self, images_per_step: int) -> dict[str, float]:
        """The means; starts a new window."""
        now = time.perf_counter()
        (total, count), steps = self._losses.cpu(), self.images / images_per_step
        row = {
            "loss": round(float(total.sum() / count.sum()), 4),
            "lr": round(self.rate, 7),
            "grid": round(self._grids[0].item() / steps, 4),
            "grid_tokens": round(self._grids[1].item() / steps, 4),
            "grad_norm": round(self.norm.item(), 3),
            "images_per_second": round(self.images / (now - self._began), 2),
            **{t: round(float(x / n), 4) for t, x, n in zip(self.tasks, total, count, strict=True) if n},
        }
        self._losses.zero_()
        self._grids.zero_()
        self.images, self._began = 0, now
        return row


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that receives SIGTERM and SIGINT, which then do not end the process."""
    received: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _worker_init(_: int) -> None:
    torch.set_num_threads(1)
    os.nice(10)


def _average_gradients(parameters: Sequence[nn.Parameter], stop: bool, world: int) -> bool:
    """Mean of the gradients over the processes; whether any process was asked to stop."""
    if world == 1:
        return stop
    for p in parameters:  # a head without targets on a process has no gradient there
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), grads[0].new_tensor([float(stop)])])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat[:-1] / world).split([g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))
    return bool(flat[-1] > 0)


def _prepare_start(config: Florence2Training, folder: Path) -> None:
    """Write the untrained start model of a run unless it exists."""
    from transformers import Florence2Processor

    if (folder / "processor_config.json").exists():
        return
    if config.start_from is None:
        with atomic_folder(folder) as partial:
            build_mini_florence2(partial, config.seed, config.image_size)
        return
    source = Path(resolve(config.start_from, "vision")).expanduser()
    if not (source / "processor_config.json").exists():
        raise ValueError(f"start_from: no mini Florence-2 in {source} (processor_config.json is missing)")
    side = Florence2Processor.from_pretrained(source).image_processor.size["height"]
    if side != config.image_size:
        raise ValueError(f"start_from: {source} takes images of {side} px, but image_size is {config.image_size}")
    with atomic_folder(folder) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)


def export(run: str | Path, target: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Write the moving average of a run's weights as a folder for `from_pretrained`.

    Args:
        run: The run's folder.
        target: Folder to write; `model` in the run's folder by default.
        dtype: Data type of the stored weights.

    Raises:
        FileNotFoundError: No checkpoint in the folder.
    """
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    run = Path(run).expanduser()
    if not (run / "checkpoint.pt").exists():
        raise FileNotFoundError(f"no checkpoint in {run}: train first")
    target = Path(target) if target else run / "model"
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = Florence2ForConditionalGeneration.from_pretrained(run / "start", dtype=torch.float32)
    model.load_state_dict(state["model"])
    if state["ema"]:
        model.load_state_dict(state["ema"], strict=False)
    with atomic_folder(target, overwrite=True, owned=lambda folder: folder.parent == run.resolve()) as partial:
        model.to(dtype).save_pretrained(partial)
        Florence2Processor.from_pretrained(run / "start").save_pretrained(partial)
    return target
