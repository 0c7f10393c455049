"""`florence-vl plan` against measurements: exact parameters, FLOPs and memory within bounds, throughput arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from florence_vl.model.tiny import tiny_config
from florence_vl.train.config import LLMPartConfig, LoraConfig, PartConfig, PartsConfig
from florence_vl.train.flops import ActivationMeter, Multipliers, _set_attention, build_shell, count_flops
from florence_vl.train.optimizer import apply_parts, count_parameters
from florence_vl.train.plan import Workload, model_config, plan_recipe, recipe_that_writes
from florence_vl.train.recipes import load_recipe
from florence_vl.train.step import count_pairs, count_samples, count_supervised, count_tokens
from florence_vl.train.throughput import estimate_throughput

STAGE_2 = PartsConfig(tower=PartConfig(train=False))
ADAPTERS = PartsConfig(tower=PartConfig(train=False), llm=LLMPartConfig(lora=LoraConfig(rank=2)))


def convolution_backward_flops(
    grad_out: Any, x: Any, w: Any, _b: Any, _s: Any, _p: Any, _d: Any, _t: Any, _o: Any, _g: Any, mask: Any, **_: Any
) -> int:
    """Twice the forward pass; torch's own formula takes a depthwise convolution's weight gradient for a dense one's."""
    out = torch.Size(grad_out)
    return 2 * out.numel() * int(torch.Size(w[1:]).numel()) * sum(mask[:2])


def measured_flops(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    _set_attention(model, "eager")
    model.train()
    mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(**batch, skip_logits=True).loss.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    "parts",
    [PartsConfig(), STAGE_2, PartsConfig(tower=PartConfig(train=False), llm=LLMPartConfig(train=False))],
    ids=["everything", "stage 2", "projector only"],
)
def test_flops_of_a_step_match_torchs_counter(tiny_run: ModuleType, parts: PartsConfig) -> None:
    model = tiny_run.tiny()
    apply_parts(model, parts)
    batch = tiny_run.collate([tiny_run.make_sample(1), tiny_run.make_sample(2)], packed=False)
    rows, length = batch["input_ids"].shape
    flops = count_flops(model.config, 64, 64)
    step = flops.step(Multipliers.of(parts, 2), 2, rows * length, rows * length**2, count_supervised(batch))
    assert sum(step.values()) == pytest.approx(measured_flops(model, batch), rel=0.1)


@pytest.mark.parametrize("tower", ["florence2", "clip_vision_model", "dinov2"])
def test_any_tower_is_counted_exactly(tiny_run: ModuleType, tower: str) -> None:
    model = tiny_run.tiny(tower=tower)
    _set_attention(model, "eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.vision_tower(torch.zeros(1, 3, 64, 64))
    assert count_flops(model.config, 64, 64).tower_per_image == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    "parts",
    [PartsConfig(), ADAPTERS, PartsConfig(tower=PartConfig(train=False), llm=LLMPartConfig(last_layers=1))],
    ids=["everything", "LoRA", "last layer"],
)
def test_saved_activations_match_what_autograd_keeps(tiny_run: ModuleType, parts: PartsConfig) -> None:
    model = tiny_run.tiny()
    batch = tiny_run.collate([tiny_run.make_sample(n) for n in range(4)], packed=True)
    planned = ActivationMeter(model.config, parts, torch.float32).measure(4, 64, 64, batch["input_ids"].shape[1])
    apply_parts(model, parts)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        states = model.model(**inputs, use_cache=False).last_hidden_state
    measured = sum(size for _, size in kept.values())
    assert states.requires_grad
    assert sum(part.total for part in planned.values()) == pytest.approx(measured, rel=0.2)


def test_frozen_towers_keep_nothing_and_recomputation_keeps_less() -> None:
    frozen = ActivationMeter(tiny_config(), STAGE_2, torch.float32).measure(4, 64, 64, 60)
    assert frozen["tower"].total == 0
    planned = ActivationMeter(tiny_config(), PartsConfig(), torch.float32).measure(4, 64, 64, 60)
    for part in ("tower", "llm"):
        saved = planned[part]
        full, selective, none = (saved.held(m) + saved.brought_back(m) for m in ("full", "selective", "none"))
        assert full <= selective <= none


def test_parameters_are_exact_with_lora_too() -> None:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

    parts = PartsConfig(llm=LLMPartConfig(lora=LoraConfig(rank=2)))
    shell, model = build_shell(tiny_config()), FlorenceVLForConditionalGeneration(tiny_config())
    apply_parts(shell, parts)
    apply_parts(model, parts)
    assert count_parameters(shell) == count_parameters(model)
    lora = [p.numel() for name, p in model.named_parameters() if ".lora_" in name]
    assert lora
    assert count_parameters(model)["llm"] == (sum(p.numel() for _, p in model.part_parameters("llm")), sum(lora))


@pytest.fixture(scope="module")
def plan_8b() -> Any:
    return plan_recipe(
        load_recipe("paper/8b-finetune"), devices=64, workload=Workload(text_tokens=180), samples=10_000_000
    )


def test_the_papers_8b_is_planned_without_weights_or_network(plan_8b: Any) -> None:
    total = sum(count for count, _ in plan_8b.parameters.values())
    # facts of the parts: Llama-3.1-8B 8.030 B, projector 50.3 M, DaViT and BART encoder of Florence-2-large 567.6 M
    assert total == pytest.approx(8.030e9 + 50.3e6 + 567.6e6, rel=1e-3)
    assert plan_8b.parameters["tower"][1] == 0
    assert plan_8b.image_tokens == 576
    assert plan_8b.sample_tokens == 756
    # 6 FLOPs a parameter and token for the LLM, give or take attention and the unsupervised positions' head
    assert plan_8b.flops_per_sample["llm"] == pytest.approx(6 * (8.030e9 - 2 * 128256 * 4096) * 756, rel=0.01)
    assert plan_8b.memory["optimizer"] == pytest.approx(8 * 8.0806e9 / 64 / 2**30, rel=0.01)
    assert plan_8b.fits
    assert plan_8b.largest_micro_batch >= 4


def test_throughput_follows_from_flops_and_mfu(plan_8b: Any) -> None:
    per_sample = sum(plan_8b.flops_per_sample.values())
    assert plan_8b.samples_per_s == pytest.approx(64 * 989e12 * 0.4 / per_sample)
    assert plan_8b.tokens_per_s == pytest.approx(756 * plan_8b.samples_per_s)
    assert plan_8b.samples == 10_000_000
    assert plan_8b.hours == pytest.approx(plan_8b.device_hours / 64)
    assert plan_8b.device_hours == pytest.approx(10_000_000 * per_sample / (989e12 * 0.4 * 3600))


def test_the_fast_recipe_fits_and_is_estimated_to_gain_what_is_not_recomputed(plan_8b: Any) -> None:
    fast = plan_recipe(load_recipe("paper/8b-finetune-fast"), devices=64)
    assert fast.fits
    assert fast.strategy == "hsdp"
    assert fast.parameters == plan_8b.parameters
    assert fast.flops_per_sample == plan_8b.flops_per_sample
    paper, ours = plan_8b.estimate, fast.estimate
    assert ours.recomputed == ours.masked == 0
    llm = plan_8b.flops_per_sample["llm"] + plan_8b.flops_per_sample["attention"]
    assert paper.recomputed == pytest.approx(llm / 3)  # one more forward pass of three
    useful = sum(plan_8b.flops_per_sample.values())
    assert paper.compute_seconds == pytest.approx(4 * (useful + paper.recomputed) / (989e12 * 0.4))
    assert ours.samples_per_s / paper.samples_per_s == pytest.approx((useful + paper.recomputed) / useful, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8b-pretrain", "3b-pretrain", "3b-finetune"])
def test_fast_recipes_fit_64_devices_and_gain(name: str) -> None:
    fast, paper = (plan_recipe(load_recipe(f"paper/{name}{end}"), devices=64) for end in ("-fast", ""))
    assert fast.fits
    assert fast.estimate.samples_per_s > 1.2 * paper.estimate.samples_per_s


def test_packed_rows_under_a_dense_mask_pay_for_the_whole_row() -> None:
    packed = load_recipe("paper/8b-finetune-packed")
    config, size = model_config(packed)
    flops = count_flops(config, *size)

    def masked(*overrides: str) -> float:
        recipe = load_recipe("paper/8b-finetune-packed", overrides)
        options = (1.0, 756.0, (8_000_000_000, 8_000_000_000), 8, 8, 4e14)
        return estimate_throughput(recipe, flops, Multipliers.of(recipe.parts, 32), 3e13, *options).masked

    assert masked() == pytest.approx(3 * flops.attention_per_pair * (3072 - 756) * 756)
    assert masked("model.attn_implementation=flash_attention_2") == 0


def test_mistakes_are_named() -> None:
    recipe = load_recipe("paper/8b-finetune")
    with pytest.raises(ValueError, match=r"unknown device 'h100'. Did you mean .*'h100-80gb'"):
        plan_recipe(recipe, device="h100")
    with pytest.raises(ValueError, match="mfu is a fraction"):
        plan_recipe(recipe, mfu=40)
    with pytest.raises(ValueError, match=r"parallel.strategy is none but 2 processes run"):
        plan_recipe(load_recipe("paper/8b-finetune", ["parallel.strategy=none"]), devices=2)
    with pytest.raises(ValueError, match="12 processes do not form two whole groups"):
        plan_recipe(load_recipe("paper/8b-finetune-fast"), devices=12)
    recipe.model.path = "runs/nobody/model"
    with pytest.raises(FileNotFoundError, match="no recipe writes it"):
        plan_recipe(recipe)


def test_a_step_counts_samples_tokens_and_pairs_alike_padded_and_packed(tiny_run: ModuleType) -> None:
    samples = [tiny_run.make_sample(n) for n in range(3)]
    lengths = [len(ids) for ids, _, _ in samples]
    for packed in (False, True):
        batch = tiny_run.collate(samples, packed)
        if packed:  # as the collator pads rows: with a run of one token, numbered from 0
            pad = {"input_ids": 0, "labels": -100}
            for key, value in pad.items():
                batch[key] = torch.cat([batch[key], torch.full((1, 5), value)], dim=1)
            batch["position_ids"] = torch.cat([batch["position_ids"], torch.arange(5)[None]], dim=1)
        assert count_samples(batch) == 3
        assert count_tokens(batch) == sum(lengths)
        assert count_pairs(batch) == sum(length**2 for length in lengths)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [[], ["parts.llm.last_layers=null", "parts.llm.lora.rank=16"], ["parts.llm.last_layers=null"]],
    ids=["as it is", "LoRA", "whole LLM"],
)
def test_the_mini_recipe_is_planned_within_ten_percent(overrides: list[str]) -> None:
    pytest.importorskip("florence_vl_mini")
    from florence_vl.model.packaged import is_converted
    from florence_vl.train.model import load_model
    from florence_vl_mini.models import SMOLLM2

    if SMOLLM2.source() is None and not is_converted(SMOLLM2):
        pytest.skip(SMOLLM2.install)

    recipe = load_recipe("mini/pretrain", overrides)
    model, _ = load_model(recipe)
    apply_parts(model, recipe.parts)
    ids = torch.randint(100, 1000, (1, 244))
    ids[:, :64] = model.config.image_token_id
    labels = ids.clone()
    labels[:, :125] = -100
    batch = {"input_ids": ids, "labels": labels, "pixel_values": torch.zeros(1, 3, 256, 256)}
    plan = plan_recipe(recipe, workload=Workload(text_tokens=180, supervised=119))
    counted = {part: sum(p.numel() for _, p in model.part_parameters(part)) for part in ("tower", "projector", "llm")}
    assert {part: total for part, (total, _) in plan.parameters.items()} == counted
    assert sum(plan.flops_per_sample.values()) == pytest.approx(measured_flops(model, batch), rel=0.1)


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one process": ("none", 1, {"precision": "fp32"}),
    "one process, autocast": ("none", 1, {"precision": "bf16"}),
    "ddp": ("ddp", 2, {"precision": "fp32"}),
    "fsdp": ("fsdp", 4, {"precision": "fp32"}),
    "fsdp in bf16": ("fsdp", 4, {"precision": "bf16"}),
    "fsdp, tied head": ("fsdp", 4, {"precision": "bf16", "tied": True}),
    "hsdp": ("hsdp", 8, {"precision": "bf16", "parallel": {"strategy": "hsdp", "shard_size": 4}}),
    "recomputing": ("fsdp", 4, {"precision": "fp32", "activation_checkpointing": {"tower": "full", "llm": "full"}}),
    "adapters": ("fsdp", 4, {"precision": "bf16", "parts": {"tower": {"train": False}, "llm": {"lora": {"rank": 4}}}}),
}


@pytest.fixture(scope="module")
def peaks() -> dict[str, tuple[float, float]]:
    """Measured and planned bytes at a step's peak, for every case, from one process."""
    script = Path(__file__).with_name("peak_run.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(list(CASES.values()))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(CASES, (json.loads(line) for line in done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_planned_memory_is_what_a_step_holds_at_its_peak(peaks: dict[str, tuple[float, float]], case: str) -> None:
    measured, planned = peaks[case]
    assert 0.95 * measured <= planned <= 1.2 * measured  # rather too much than too little


def test_a_recipe_that_does_not_load_is_no_obstacle_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.yaml").write_text("steps: 1\noutput: ${NOT_SET_ANYWHERE}\n")
    (tmp_path / "writes.yaml").write_text("steps: 1\noutput: runs/found\n")
    monkeypatch.setenv("FLORENCE_VL_RECIPES", str(tmp_path))
    found = recipe_that_writes("runs/found/model")
    assert found is not None
    assert found.name == "writes"
