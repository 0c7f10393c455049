"""The first process loads, the others receive: the same shards, buffers and losses, and no second full copy."""

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
from torch import nn

from florence_vl import FlorenceVLForConditionalGeneration
from florence_vl.model.tiny import tiny_model
from florence_vl.train import load_recipe
from florence_vl.train.first_rank import FirstRankWeights, _slots
from florence_vl.train.model import load_model
from florence_vl.train.optimizer import apply_parts
from florence_vl.train.world import World

SCRIPT = Path(__file__).with_name("first_rank_run.py")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"llm": "llama"},
    "tied": {"llm": "gemma3_text"},
    "clip": {"llm": "qwen3", "tower": "clip_vision_model"},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"model.attn_implementation": "eager"}),
    "tied": ("tied", {"parts.tower.train": False}),
    "clip": ("clip", {"precision": "bf16_pure"}),
    "lora": ("llama", {"parts.llm.lora.rank": 2}),
}


def torchrun(script: str, cases: list[dict[str, Any]]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    command.append(json.dumps(cases))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny saved models."""
    folder = tmp_path_factory.mktemp("saved")
    for seed, (name, options) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model, processor = tiny_model(**options)
        with torch.no_grad():  # buffers that a new model would not have
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def recipe(saved: Path, name: str, out: Path) -> dict[str, Any]:
    folder, changes = CASES[name]
    values = {"steps": 1, "precision": "fp32", "device": "cpu", "output": str(out)}
    overrides = [f"model.path={saved / folder}", *(f"{key}={value}" for key, value in changes.items())]
    return load_recipe(values, overrides).to_dict()


@pytest.fixture(scope="module")
def held(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes holds, for every case, from one start of torchrun."""
    folder = tmp_path_factory.mktemp("held")
    cases = [{"recipe": recipe(saved, name, folder), "out": str(folder / name)} for name in CASES]
    unusable = {"steps": 1, "precision": "fp32", "device": "cpu", "output": str(folder)}
    cases.append({"recipe": load_recipe(unusable).to_dict(), "out": str(folder / "unusable")})
    torchrun(str(SCRIPT), cases)
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_every_process_holds_its_shards_and_all_buffers_of_the_one_process_model(
    saved: Path, held: Path, name: str
) -> None:
    loaded = load_recipe(recipe(saved, name, held))
    model, processor = load_model(loaded)
    apply_parts(model, loaded.parts)
    if loaded.precision == "bf16_pure":
        rotary = load_model(loaded)[0].model.language_model.rotary_emb
        model.to(torch.bfloat16)
        model.model.language_model.rotary_emb = rotary
    weights = {key: value.detach() for key, value in model.named_parameters()}
    ranks = [torch.load(held / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(ranks[0]["whole"]) > 0
    assert ranks[1]["whole"] == []
    for rank, found in enumerate(ranks):
        assert found["gathered"].keys() == weights.keys()
        for key, value in weights.items():
            if ".lora_" in key:  # drawn by the first process
                value = ranks[0]["gathered"][key]
                assert value.any() == ("lora_A" in key)
            assert found["gathered"][key].dtype == value.dtype
            assert torch.equal(found["gathered"][key], value), key
            chunks = value.chunk(2)
            own = chunks[rank] if rank < len(chunks) else value[:0]
            assert torch.equal(found["shards"][key], own), key
        buffers = dict(model.named_buffers())
        assert found["buffers"].keys() == buffers.keys()
        for key, value in buffers.items():
            assert torch.equal(found["buffers"][key], value), key
            assert found["buffers"][key].dtype == value.dtype
        assert found["trainable"] == sorted(key for key, p in model.named_parameters() if p.requires_grad)
        assert found["tied"] == (name == "tied")
        assert found["attention"] == model.config.text_config._attn_implementation
        assert found["template"] == processor.chat_template
        assert found["training"] == model.model.vision_tower.training
    if name == "llama":
        assert ranks[1]["attention"] == "eager"


def test_a_model_that_cannot_be_loaded_is_refused_on_every_process(held: Path) -> None:
    for rank in range(2):
        assert "model.path (a saved one) or model.build" in (held / f"unusable-{rank}.txt").read_text()


def test_a_sharded_run_from_a_folder_has_the_losses_of_one_process(
    saved: Path, tiny_run: ModuleType, tmp_path: Path
) -> None:
    base = {"steps": 3, "micro": 1, "checkpoint": {"every_steps": 2, "export": True}, "saved": str(saved / "llama")}
    base["parts"] = {"tower": {"train": False}}  # DropPath draws per process
    one = tiny_run.run(tmp_path / "one", **base)
    sharded = {**base, "parallel": {"strategy": "fsdp"}}
    short = {**sharded, "output": str(tmp_path / "cut"), "steps": 2, "schedule": {"name": "constant"}}
    whole = {**sharded, "output": str(tmp_path / "whole"), "schedule": {"name": "constant"}}
    resumed = {**short, "steps": 3, "resume": "auto"}
    torchrun(str(tiny_run.__file__), [{**sharded, "output": str(tmp_path / "two")}, short, resumed, whole])
    assert tiny_run.losses(tmp_path / "two") == pytest.approx(one, abs=2e-5)
    assert tiny_run.losses(tmp_path / "cut") == pytest.approx(tiny_run.losses(tmp_path / "whole"), abs=1e-6)
    exported = [
        FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / name / "model") for name in ("one", "two")
    ]
    for (key, left), right in zip(exported[0].named_parameters(), exported[1].parameters(), strict=True):
        assert torch.allclose(left, right, atol=2e-4), key


def test_tied_and_plain_tensors_are_listed_once_and_everywhere() -> None:
    module = nn.Module()
    module.first, module.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    module.second.weight = module.first.weight
    module.register_buffer("table", torch.ones(3), persistent=False)
    module.plain = module.table
    slots = _slots(module)
    assert {(s.where, s.kind) for s in slots} == {
        (".table", "buffer"),
        (".plain", "attribute"),
        ("first.weight", "parameter"),
        ("second.weight", "parameter"),
    }
    by_name = {s.where: s for s in slots}
    assert by_name["second.weight"].tied_to == by_name["first.weight"].tied_to
    assert by_name[".plain"].tied_to == by_name[".table"].tied_to


def test_another_model_on_another_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "decide", lambda *_: _slots(nn.Linear(2, 3, bias=False)))
    with pytest.raises(RuntimeError, match=r"rank 1 built another model .*weight is \(2, 2\) here and \(3, 2\) there"):
        FirstRankWeights(nn.Linear(2, 2, bias=False), World(torch.device("cpu"), rank=1, size=2))
