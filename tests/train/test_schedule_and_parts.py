"""Schedules, freezing by part, last layers, LoRA, parameter groups."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from florence_vl.model.tiny import tiny_model
from florence_vl.train.config import (
    ActivationCheckpointingConfig,
    LLMPartConfig,
    LoraConfig,
    OptimizerConfig,
    PartConfig,
    PartsConfig,
    ProjectorPartConfig,
    ScheduleConfig,
)
from florence_vl.train.guards import SpikeDetector, describe_sample, first_loss_warning
from florence_vl.train.optimizer import apply_parts, build_optimizer, parameter_groups, trainable_table
from florence_vl.train.parallel import LossModule, apply_activation_checkpointing, blocks
from florence_vl.train.schedule import lr_factor


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedules_warm_up_and_end_where_they_should(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup_steps=10, min_lr_ratio=0.1, decay_ratio=0.25)  # type: ignore[arg-type]
    factors = [lr_factor(schedule, step, 100) for step in range(101)]
    assert 0 < factors[0] < factors[5] < factors[9] < 1
    assert factors[10] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    if name == "wsd":
        assert factors[74] == 1.0
        assert factors[80] < 1.0
    if name == "cosine":
        assert factors[55] == pytest.approx(0.1 + 0.9 * 0.5)


def test_warmup_ratio_is_a_share_of_the_run() -> None:
    schedule = ScheduleConfig(warmup_ratio=0.03)
    assert lr_factor(schedule, 29, 1000) < 1
    assert lr_factor(schedule, 30, 1000) == 1


def test_warmup_steps_are_steps_whatever_the_clock_says() -> None:
    schedule = ScheduleConfig(warmup_steps=100)
    for step in range(200):  # a budget of 200 steps of 100,000
        factor = lr_factor(schedule, step * 500.0, 100_000, step)
        assert factor <= (step + 1) / 101
    assert lr_factor(schedule, 5_000.0, 100_000, 10) == 11 / 101
    assert lr_factor(schedule, 50_000.0, 100_000, 100) == lr_factor(schedule, 50_000.0, 100_000)


def groups_of(model: nn.Module, parts: PartsConfig) -> list:
    return parameter_groups(model, parts, OptimizerConfig(lr=1e-3, weight_decay=0.1), ScheduleConfig())  # type: ignore[arg-type]


def test_each_part_has_its_own_rate_decay_and_schedule(tiny_run: ModuleType) -> None:
    model = tiny_run.tiny()
    parts = PartsConfig(
        tower=PartConfig(lr=1e-5, weight_decay=0.0),
        projector=ProjectorPartConfig(schedule=ScheduleConfig(name="constant")),
    )
    apply_parts(model, parts)
    groups = groups_of(model, parts)
    by_part = {part: [g for g in groups if g.part == part] for part in ("tower", "projector", "llm")}
    assert {g.lr for g in by_part["tower"]} == {1e-5}
    assert {g.lr for g in by_part["llm"]} == {1e-3}
    assert {g.schedule.name for g in by_part["projector"]} == {"constant"}
    for group in groups:
        decayed = group.weight_decay > 0
        assert all((p.ndim >= 2) == decayed for p in group.parameters.values()) or group.part == "tower"
    names = [name for g in groups for name in g.parameters]
    assert len(names) == len(set(names)) == len(list(model.parameters()))


def test_gates_have_a_rate_of_their_own() -> None:
    parts = PartsConfig(projector=ProjectorPartConfig(lr=1e-5, gate_lr=3e-3))
    model, _ = tiny_model(fusion="gated", gate={"context": "question"})
    groups = parameter_groups(model, parts, OptimizerConfig(), ScheduleConfig())
    rates = {name: group.lr for group in groups for name in group.parameters}
    assert {rate for name, rate in rates.items() if name.startswith("model.fusion.")} == {3e-3}
    assert {rate for name, rate in rates.items() if "multi_modal_projector" in name} == {1e-5}
    assert len(rates) == sum(len(group.parameters) for group in groups) == len(list(model.parameters()))
    ungated, _ = tiny_model()
    with pytest.raises(ValueError, match="gate_lr is for `gated` fusion, but this model's fusion is `channel`"):
        parameter_groups(ungated, parts, OptimizerConfig(), ScheduleConfig())


def test_a_frozen_part_has_no_gradient_no_state_and_no_dropout(tiny_run: ModuleType) -> None:
    model = tiny_run.tiny()
    parts = PartsConfig(tower=PartConfig(train=False))
    apply_parts(model, parts)
    groups = groups_of(model, parts)
    assert {g.part for g in groups} == {"projector", "llm"}
    assert not any(module.training for module in model.model.vision_tower.modules())
    assert model.model.language_model.training
    batch = tiny_run.collate([tiny_run.make_sample(1), tiny_run.make_sample(2)], packed=False)
    optimizer = build_optimizer(groups, OptimizerConfig(), torch.device("cpu"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(**batch).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        frozen = "vision_tower" in name
        assert (parameter.grad is None) == frozen, name
        assert (parameter not in optimizer.state) == frozen, name
        if frozen:
            assert torch.equal(parameter, before[name])


def test_training_reaches_the_first_convolution(tiny_run: ModuleType) -> None:
    model = tiny_run.tiny()
    apply_parts(model, PartsConfig())
    model(**tiny_run.collate([tiny_run.make_sample(1)], packed=False)).loss.backward()
    first = model.model.vision_tower.davit.convs[0].conv.weight
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_last_layers_train_alone(tiny_run: ModuleType) -> None:
    model = tiny_run.tiny()
    apply_parts(model, PartsConfig(llm=LLMPartConfig(last_layers=1)))
    trains = {name for name, p in model.part_parameters("llm") if p.requires_grad}
    assert any("layers.1." in name for name in trains)
    assert not any("layers.0." in name or "embed_tokens" in name for name in trains)
    assert {"lm_head.weight", "model.language_model.norm.weight"} <= trains
    assert not model.model.language_model.layers[0].training
    assert model.model.language_model.layers[1].training
    with pytest.raises(ValueError, match="has 2 layers"):
        apply_parts(model, PartsConfig(llm=LLMPartConfig(last_layers=3)))


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("projector", [True, False])
def test_no_gradient_is_prepared_for_what_is_frozen_below(
    tiny_run: ModuleType, projector: bool, checkpointing: Any
) -> None:
    model = tiny_run.tiny()
    parts = PartsConfig(
        tower=PartConfig(train=False), projector=ProjectorPartConfig(train=projector), llm=LLMPartConfig(last_layers=1)
    )
    apply_parts(model, parts)
    apply_activation_checkpointing(model, ActivationCheckpointingConfig(checkpointing, checkpointing))
    module = LossModule(model.train(), (64, 64), always_images=True)
    passed: dict[str, bool] = {}

    def watch(name: str, part: nn.Module) -> None:
        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            tensors = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
            passed.setdefault(name, any(value.requires_grad for value in tensors))

        part.register_forward_hook(keep)

    layers = model.model.language_model.layers
    named = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    named |= {f"tower block {i}": block for i, block in enumerate(blocks(model.model.vision_tower))}
    named |= {f"layer {i}": layer for i, layer in enumerate(layers)}
    for name, part in named.items():
        watch(name, part)
    assert len(layers) == 2
    with_image = tiny_run.collate([tiny_run.make_sample(1)], packed=False)
    text_only = tiny_run.collate([tiny_run.make_sample(0, text_only_every=1)], packed=False)
    for batch in (with_image, text_only):  # a dummy image replaces a missing one
        passed.clear()
        module(batch, 4).backward()
        below = {name for name, needs in passed.items() if needs}
        assert below == {"layer 1"} | ({"projector", "layer 0"} if projector else set())


def test_lora_trains_adapters_of_the_llm_only(tiny_run: ModuleType) -> None:
    model = tiny_run.tiny()
    apply_parts(model, PartsConfig(tower=PartConfig(train=False), llm=LLMPartConfig(lora=LoraConfig(rank=2))))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    llm = {name for name in trains if "language_model" in name}
    assert llm
    assert all(".lora_" in name for name in llm)
    assert {name for name in trains if "multi_modal_projector" in name}
    assert not any("vision_tower" in name or "lm_head" in name for name in trains)
    wrong = PartsConfig(llm=LLMPartConfig(lora=LoraConfig(target_modules=["q_prj"])))
    with pytest.raises(ValueError, match=r"no linear 'q_prj'. Did you mean 'q_proj'"):
        apply_parts(tiny_run.tiny(), wrong)


def test_the_table_counts_what_trains(tiny_run: ModuleType) -> None:
    model = tiny_run.tiny()
    parts = PartsConfig(tower=PartConfig(train=False))
    apply_parts(model, parts)
    rows = {row["part"]: row for row in trainable_table(model, groups_of(model, parts))}
    assert rows["tower"]["trainable"] == 0
    assert rows["tower"]["lr"] is None
    assert rows["llm"]["trainable"] == rows["llm"]["parameters"] > 0
    assert sum(row["parameters"] for row in rows.values()) == sum(p.numel() for p in model.parameters())


def test_spikes_are_told_once_the_average_stands() -> None:
    spikes = SpikeDetector(factor=5, warmup=10)
    assert all(spikes.update(1.0 + 0.1 * (i % 3)) is None for i in range(30))
    assert "times its moving average" in (spikes.update(20.0) or "")
    assert spikes.update(1.0) is None
    again = SpikeDetector()
    again.load_state_dict(spikes.state_dict())
    assert (again.average, again.count, again.spikes) == (spikes.average, spikes.count, 1)


def test_a_first_loss_worse_than_guessing_warns() -> None:
    assert first_loss_warning(6.3, 512) is None
    assert "worse than chance" in (first_loss_warning(9.0, 512) or "")


def test_a_sample_is_shown_with_its_mask() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(chr(96 + i) for i in ids)

    batch = {
        "input_ids": torch.tensor([[99, 99, 1, 2, 3, 4, 5]]),
        "labels": torch.tensor([[-100, -100, -100, 2, 3, -100, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1]]),
    }
    assert describe_sample(batch, Letters(), image_token_id=99) == "<2 image tokens>a[[bc]]"
