"""Training on stored features of a frozen tower: the same losses as without, and one tower pass per image."""

from __future__ import annotations

import json

import pytest

from florence_vl.model.features import StoredTower
from florence_vl.model.tiny import tiny_model, tiny_recipe
from florence_vl.train import train
from florence_vl.train.recipes import load_recipe


@pytest.fixture
def folders(tmp_path):
    from PIL import Image

    model, _ = tiny_model()
    from florence_vl.model.tiny import tiny_processor

    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    rows = []
    for index in range(6):
        Image.new("RGB", (40, 30), (40 * index, 100, 30)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"a car {index}"}]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def recipe(folders, name, **model):
    data = {"sources": [{"path": str(folders / "data.json"), "image_root": str(folders)}], "template": "chatml"}
    parts = {"tower": {"train": False}}
    path = str(folders / "model")
    return tiny_recipe(folders / name, model={"path": path, **model}, data=data, parts=parts, steps=3)


def losses(folders, name):
    return [json.loads(line)["loss"] for line in (folders / name / "metrics.jsonl").read_text().splitlines()]


def test_training_on_stored_features_is_training(folders, monkeypatch):
    train(recipe(folders, "plain"))
    store = str(folders / "store")
    seen = []
    monkeypatch.setattr(
        StoredTower, "__init__", lambda self, *a, _real=StoredTower.__init__: (_real(self, *a), seen.append(self))[0]
    )
    train(recipe(folders, "first", feature_store=store))
    for stored in seen:
        for stores in stored._stores.values():
            for one in stores.values():
                one.flush()
    assert 2 <= seen[0].computed <= 6, "each picture once, in three steps of two"
    train(recipe(folders, "second", feature_store=store))
    assert seen[1].computed == 0
    assert losses(folders, "first") == losses(folders, "second"), "computed or read, the same losses"
    assert losses(folders, "first") == pytest.approx(losses(folders, "plain"), rel=1e-3)


def test_a_store_for_a_tower_that_trains_is_refused(folders, monkeypatch):
    values = recipe(folders, "x", feature_store="store")
    with pytest.raises(ValueError, match="neither trains nor compiles"):
        load_recipe({**values, "parts": {"tower": {"train": True}}})
    monkeypatch.setenv("WORLD_SIZE", "2")
    from florence_vl.train.model import load_model

    with pytest.raises(ValueError, match="one process"):
        load_model(load_recipe(values))
