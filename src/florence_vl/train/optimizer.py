"""Trained parameters: freezing by part, last LLM layers, LoRA, and AdamW groups for tower, projector and LLM."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from florence_vl.model.modeling import PARTS
from florence_vl.registry import did_you_mean
from florence_vl.train.config import LoraConfig, OptimizerConfig, PartConfig, PartsConfig, ScheduleConfig

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration


@dataclass
class Group:
    """A parameter group of the optimizer with its settings.

    Attributes:
        part: `tower`, `projector` or `llm`.
        name: The part, or `gates` for gates with their own learning rate.
        lr: Peak learning rate.
        weight_decay: Zero for biases and norms.
        schedule: Shape of its learning rate.
        parameters: Trainable parameters by name.
    """

    part: str
    name: str
    lr: float
    weight_decay: float
    schedule: ScheduleConfig
    parameters: dict[str, nn.Parameter]


def apply_parts(model: FlorenceVLForConditionalGeneration, parts: PartsConfig) -> None:
    """Freeze and unfreeze the model as the recipe specifies, and add its LoRA adapters.

    Raises:
        ValueError: There are fewer layers than requested, LoRA targets are unknown, or peft is missing.
    """
    model.set_trainable(tower=parts.tower.train, projector=parts.projector.train, llm=parts.llm.train)
    if parts.llm.last_layers is not None:
        _train_last_layers(model, parts.llm.last_layers)
    if parts.llm.lora is not None:
        add_lora(model, parts.llm.lora)
    model.train()


def llm_layers(model: FlorenceVLForConditionalGeneration) -> nn.ModuleList:
    """The LLM's blocks, first to last.

    Raises:
        ValueError: The LLM has no list of blocks named `layers`.
    """
    layers = getattr(model.model.language_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model.model.language_model).__name__} has no list of blocks named `layers`")
    return layers


def _train_last_layers(model: FlorenceVLForConditionalGeneration, count: int) -> None:
    layers = llm_layers(model)
    if count > len(layers):
        raise ValueError(f"parts.llm.last_layers is {count}, but this LLM has {len(layers)} layers")
    for _, parameter in model.part_parameters("llm"):
        parameter.requires_grad_(False)
    modules: list[nn.Module] = [*layers[-count:], model.lm_head]
    if isinstance(norm := getattr(model.model.language_model, "norm", None), nn.Module):
        modules.append(norm)
    embeddings = model.get_input_embeddings().weight
    for module in modules:
        for parameter in module.parameters():
            if parameter is not embeddings:  # a tied head stays frozen with the embeddings, which are the first layer
                parameter.requires_grad_(True)


def add_lora(model: FlorenceVLForConditionalGeneration, config: LoraConfig) -> None:
    """Freeze the LLM and add LoRA adapters to its linear layers, in place (`peft.inject_adapter_in_model`).

    Raises:
        ValueError: There is no linear layer of that name, or peft is missing.
    """
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f'parts.llm.lora needs peft ({error}): pip install "florence-vl[peft]"') from None
    llm_layers(model)
    language_model = model.model.language_model
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.")
    }
    targets = sorted(linear) if config.target_modules == "all-linear" else list(config.target_modules)
    for target in targets:
        if target not in linear:
            raise ValueError(
                f"parts.llm.lora.target_modules: this LLM has no linear {target!r}. {did_you_mean(target, linear)}"
            )
    for _, parameter in model.part_parameters("llm"):
        parameter.requires_grad_(False)
    pattern = rf"layers\..*\.({'|'.join(map(re.escape, targets))})"
    inject_adapter_in_model(
        PeftLoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=pattern),
        language_model,
    )


def parameter_groups(
    model: FlorenceVLForConditionalGeneration, parts: PartsConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> list[Group]:
    """Trainable parameters by part, with weight decay (matrices) or without (biases, norms).

    Raises:
        ValueError: Every parameter is frozen, or gates have a learning rate and there are none.
    """
    groups = []
    gate_lr = parts.projector.gate_lr
    gates = {name for name, _ in model.named_parameters() if gate_lr and name.startswith("model.fusion.")}
    if gate_lr and not gates:
        raise ValueError(
            f"parts.projector.gate_lr is for `gated` fusion, but this model's fusion is `{model.config.fusion}`"
        )
    for part in PARTS:
        config: PartConfig = getattr(parts, part)
        named = [(name, p) for name, p in model.part_parameters(part) if p.requires_grad]
        lr = optimizer.lr if config.lr is None else config.lr
        decay = optimizer.weight_decay if config.weight_decay is None else config.weight_decay
        for rate, of_gates in ((lr, False), (gate_lr or lr, True)):
            name = "gates" if of_gates else part
            own = [(key, p) for key, p in named if (key in gates) == of_gates]
            for weight_decay, chosen in (
                (decay, {key: p for key, p in own if p.ndim >= 2}),
                (0.0, {key: p for key, p in own if p.ndim < 2}),
            ):
                if chosen:
                    groups.append(Group(part, name, rate, weight_decay, config.schedule or schedule, chosen))
    if not groups:
        raise ValueError("nothing trains: every parameter is frozen. Set parts.<part>.train to true")
    return groups


def build_optimizer(groups: list[Group], config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the groups, in their order."""
    return torch.optim.AdamW(
        [
            {"params": list(group.parameters.values()), "lr": group.lr, "weight_decay": group.weight_decay}
            for group in groups
        ],
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cpu", "cuda") if config.fused is None else config.fused,
    )


def count_parameters(model: FlorenceVLForConditionalGeneration) -> dict[str, tuple[int, int]]:
    """Part -> numbers of all parameters and of trainable ones."""
    counts: dict[str, tuple[int, int]] = {}
    for part in PARTS:
        sizes = [(p.numel(), p.requires_grad) for _, p in model.part_parameters(part)]
        counts[part] = (sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains))
    return counts


def trainable_table(model: FlorenceVLForConditionalGeneration, groups: list[Group]) -> list[dict[str, Any]]:
    """Rows of the table printed before step 1: part, parameters, trainable ones, learning rate, decay."""
    rows = []
    for part, (total, trainable) in count_parameters(model).items():
        own = [group for group in groups if group.part == part]
        rows.append(
            {
                "part": part,
                "parameters": total,
                "trainable": trainable,
                "lr": own[0].lr if own else None,
                "weight_decay": max((group.weight_decay for group in own), default=None),
                "schedule": own[0].schedule.name if own else None,
            }
        )
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `trainable_table` as text."""
    lines = [f"{'part':<10}{'parameters':>16}{'trainable':>16}{'lr':>10}{'decay':>8}  schedule"]
    for row in rows:
        lr = f"{row['lr']:.1e}" if row["lr"] is not None else "frozen"
        decay = f"{row['weight_decay']:g}" if row["weight_decay"] is not None else ""
        lines.append(
            f"{row['part']:<10}{row['parameters']:>16,}{row['trainable']:>16,}{lr:>10}{decay:>8}  "
            f"{row['schedule'] or ''}"
        )
    return "\n".join(lines)
