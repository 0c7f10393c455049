"""Training with message trees: exact resume, counts, errors before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from florence_vl.model.tiny import tiny_model, tiny_recipe
from florence_vl.train import load_recipe, train
from florence_vl.train.metrics import read_metrics
from florence_vl.train.step import StepCounts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures with four LLaVA records of two turns each."""
    folder = tmp_path_factory.mktemp("album")
    records = []
    for index in range(12):
        picture = f"{index % 3}.png"
        Image.new("RGB", (40, 30), (60 * (index % 3), 99, 10)).save(folder / picture)
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"red {index}"), ("human", "More?"), ("gpt", "blue " * 3)]
        conversations = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": f"r{index}", "image": picture, "conversations": conversations})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def recipe(data: Path, output: Path, **packing: Any) -> dict[str, Any]:
    values = {
        "sources": [{"path": str(data / "data.json"), "name": "album", "image_root": str(data)}],
        "max_length": 160,
        "packing": {"mode": "packed", "tokens_per_row": 160, "window": 12, "trees": True, **packing},
    }
    return tiny_recipe(output, data=values)


def test_a_run_resumes_to_the_same_losses(data: Path, tmp_path: Path, train_tiny: Callable[..., list[float]]) -> None:
    def losses(output: Path, **how: Any) -> list[float]:
        return train_tiny(recipe(data, output, split_turns=True), **how)

    whole = losses(tmp_path / "whole")
    assert len(losses(tmp_path / "cut", stop_at=3)) == 3
    assert losses(tmp_path / "cut", resume="auto") == whole
    last = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert last["samples"] > 3 * 8  # pairs in the eight rows
    model, processor = tiny_model()
    with pytest.raises(ValueError, match=r"packing\.trees was split turns at the checkpoint and is records now"):
        train(recipe(data, tmp_path / "whole") | {"steps": 6}, model=model, processor=processor, resume="auto")


def test_counts_of_a_step_with_trees() -> None:
    #  a sample of 3; a tree with a trunk of 2 and branches of 3, 1 and 2; two tokens of padding
    positions = [0, 1, 2, 0, 1, 2, 3, 4, 2, 2, 3, 0, 1]
    branches = [0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 0, 0]
    labels = [-100, 7, 7, -100, -100, -100, 7, 7, -100, -100, 7, -100, -100]
    tokens = [5, 7, 7, 3, 3, 6, 7, 7, 8, 9, 7, 0, 0]
    batch = {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "branch_ids": torch.tensor([branches]),
        "labels": torch.tensor([labels]),
    }
    found = StepCounts.of([batch])
    alone = [3**2, *(((2 + n) ** 2 - 2**2) for n in (3, 1, 2)), 2**2]
    assert found == StepCounts(supervised=5, tokens=11, slots=13, images=0, samples=4, pairs=sum(alone), pixels=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.packing.mode=padded"], r"data\.packing\.trees` is for packed rows"),
        (["data.packing.trees=false", "data.packing.split_turns=true"], r"split_turns` needs `data\.packing\.trees`"),
        (["data.sources=[]", "data.stream.path=shards"], r"data\.packing\.trees` is for `data\.sources`"),
        (["model.attn_implementation=flash_attention_2"], "can't be computed by the attention 'flash_attention_2'"),
    ],
)
def test_wrong_recipes_are_refused(data: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe(data, tmp_path), overrides=[*changes, "model.path=nowhere"])
    assert load_recipe(recipe(data, tmp_path)).data.packing.trees
