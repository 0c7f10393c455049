"""A saved model gains views and gates by recipe: random views, distillation, export; the plan gives the same counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from florence_vl.model.loading import load_model
from florence_vl.model.tiny import tiny_model, tiny_recipe
from florence_vl.train import load_recipe, train
from florence_vl.train.dry_run import dry_run
from florence_vl.train.flops import count_flops
from florence_vl.train.model import load_model as recipe_model
from florence_vl.train.plan import model_config, plan_recipe

VIEWS = {"glance": {"size": 32, "features": ["davit"]}, "read": {"features": ["davit", "ocr"]}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    records = []
    for index in range(10):
        Image.effect_noise((40 + 20 * index, 60), 80).convert("RGB").save(folder / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\nWhat is {index}?"}, {"from": "gpt", "value": f"red {index}"}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    packing = {"mode": "packed", "tokens_per_row": 160, "window": 8}
    return {"sources": [{"path": str(folder / "data.json")}], "max_length": 160, "packing": packing}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny_model(position_grid=(2, 2))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def first_step(saved: Path, data: dict[str, Any], output: Path) -> dict[str, Any]:
    return tiny_recipe(
        output,
        model={"path": str(saved), "views": VIEWS, "positions": "resampled"},
        data={**data, "views": {"full": 1.0, "glance": 1.0, "read": 1.0}, "feature_dropout": 0.3},
        parts={"tower": {"train": False}},
        distill=1.0,
        checkpoint={"every_steps": None, "export": True},
        steps=3,
    )


def test_views_then_gates_from_one_saved_model(saved: Path, data: dict[str, Any], tmp_path: Path) -> None:
    first = train(first_step(saved, data, tmp_path / "views"))
    assert first.exported is not None
    model, processor = load_model(first.exported)
    assert processor.image_processor.view_settings("glance")["size"] == 32
    assert model.config.positions == "resampled"
    means = load_model(saved)[0].model.vision_tower
    assert all(bool(vector.any()) for vector in model.model.feature_fill.vectors.values()), "set from the data's means"
    second = train(
        tiny_recipe(
            tmp_path / "gate",
            model={"path": str(first.exported), "fusion": "gated", "gate": {"context": "question", "hidden": 8}},
            data={**data, "views": {"full": 1.0, "read": 1.0}},
            parts={"tower": {"train": False}, "llm": {"train": False}, "projector": {"lr": 0.05}},
            checkpoint={"every_steps": None, "export": True},
            steps=3,
        )
    )
    assert second.exported is not None
    gated, gated_processor = load_model(second.exported)
    assert gated_processor.question_context
    assert gated.model.fusion.gate.weight.abs().max() > 0
    assert torch.equal(gated.lm_head.weight, model.lm_head.weight)
    assert torch.equal(gated.model.vision_tower.davit.convs[0].conv.weight, means.davit.convs[0].conv.weight)


def test_means_of_features_are_those_of_the_pictures(saved: Path, data: dict[str, Any], tmp_path: Path) -> None:
    from florence_vl.model.features import tower_features
    from florence_vl.model.pictures import open_image
    from florence_vl.train.data import TrainingData
    from florence_vl.train.model import estimate_fill

    recipe = load_recipe(first_step(saved, data, tmp_path))
    model, processor = recipe_model(recipe)
    mixture = TrainingData(recipe, processor).mixture
    assert estimate_fill(model, processor, mixture, torch.device("cpu")) == 10
    pictures = [open_image(mixture[i].images[0]) for i in range(10)]
    for name, x_IND in tower_features(model, processor, pictures).items():
        torch.testing.assert_close(model.model.feature_fill.vectors[name].data, x_IND.mean((0, 1)), atol=1e-5, rtol=0)
    assert estimate_fill(model, processor, mixture, torch.device("cpu")) == 0, "what is there already stays"


def test_the_plan_counts_views_and_distillation(saved: Path, data: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(first_step(saved, data, tmp_path))
    config, size = model_config(recipe)
    assert config.views.keys() == VIEWS.keys()
    assert config.positions == "resampled"
    planned = plan_recipe(recipe).flops_per_sample
    full, small = count_flops(config, *size), count_flops(config, 32, 32)
    mean = (2 * full.tower_per_image + small.tower_per_image) / 3
    assert planned["tower"] == pytest.approx(mean + full.tower_per_image)
    tokens = [look.image_tokens + 180 for look in (full, full, small)]
    assert planned["llm"] == pytest.approx(full.llm_per_token * (3 * sum(tokens) / 3 + tokens[0]))
    recipe.data.views = {"glanse": 1.0}
    with pytest.raises(ValueError, match="unknown view 'glanse'"):
        plan_recipe(recipe)


def test_native_images_train_and_are_planned_at_their_budget(saved: Path, data: dict[str, Any], tmp_path: Path) -> None:
    look = {"path": str(saved), "image_aspect_ratio": "native", "token_budget": 9}
    recipe = tiny_recipe(tmp_path / "native", model=look, data=data, checkpoint={"every_steps": None, "export": True})
    assert model_config(load_recipe(recipe))[1] == (96, 96)
    exported = train(recipe).exported
    assert exported is not None
    model, processor = load_model(exported)
    assert model.config.positions == "resampled"
    assert processor.image_tokens(60, 240) == 6, "1 x 6 positions of a wide picture"
    assert processor.image_processor.image_aspect_ratio == "native"


def test_a_saved_model_learns_tiles(saved: Path, data: dict[str, Any], tmp_path: Path) -> None:
    look = {"path": str(saved), "tiles": {"max": 3, "global": False}, "image_aspect_ratio": "squash"}
    trained = {"parts": {"tower": {"train": False}}, "checkpoint": {"every_steps": None, "export": True}}
    recipe = tiny_recipe(tmp_path / "tiles", model=look, data=data, **trained)
    config, size = model_config(load_recipe(recipe))
    assert size == (192, 64)
    planned = plan_recipe(load_recipe(recipe))
    assert planned.image_tokens == 3 * 4 + 6 == count_flops(config, *size).image_tokens
    assert "every image has the most tiles, 3; smaller images have fewer" in planned.assumptions
    played = dry_run(load_recipe(recipe))
    passes = [line for step in played.steps for batch in step.micro_batches for line in batch.passes]
    assert any(line.endswith(" 64x128") for line in passes), "two tiles in a row"
    exported = train(recipe).exported
    assert exported is not None
    model, processor = load_model(exported)
    assert model.config.tiles == processor.image_processor.tiles == {"max": 3, "global": False, "size": 64}
    before = load_model(saved, tiles=model.config.tiles)[0]
    assert not torch.equal(model.model.row_end.vector, before.model.row_end.vector), "row ends are trained"
    assert processor.image_tokens(60, 240) == model.num_image_tokens(64, 192) == 3 * 4 + 2
    again = tiny_recipe(tmp_path / "off", model={"path": str(exported), "tiles": {"max": 1}}, data=data)
    assert model_config(load_recipe(again))[1] == (64, 64)
    off, processor = recipe_model(load_recipe(again))
    assert processor.image_tokens(60, 240) == off.num_image_tokens(64, 64) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": 1.0}, "it needs `data.views` or `data.feature_dropout`"),
        ({"data": {"feature_dropout": 1.0}}, "`data.feature_dropout` must be below 1"),
        ({"data": {"views": {"full": 0.0}}}, "at least one view a weight above 0"),
        ({"model": {"path": "x", "gate": {}}}, "`model.gate` needs `model.fusion: gated`"),
        ({"model": {"views": {}}}, "changes a saved model; for a new one give `model.build.views`"),
        ({"model": {"tiles": {"max": 4}}}, "changes a saved model; for a new one give `model.build.tiles`"),
        ({"model": {"path": "x", "token_budget": 9, "image_aspect_ratio": "pad"}}, "`model.token_budget` needs"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(tiny_recipe(tmp_path, **changes)).check()


def test_distillation_in_bf16_recomputes_what_its_own_pass_computed(data: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for mode in ("none", "selective"):
        settings = {"steps": 1, "precision": "bf16", "distill": 0.5, "parts": {"tower": {"train": False}}}
        settings |= {"data": data | {"views": {"full": 1, "glance": 1}}, "activation_checkpointing": {"llm": mode}}
        model, processor = tiny_model(views=VIEWS, positions="resampled", position_grid=(2, 2))
        losses.append(train(tiny_recipe(tmp_path / mode, **settings), model, processor).metrics["grad_norm"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_teacher_of_distillation_has_no_dropout(data: dict[str, Any], tmp_path: Path) -> None:
    model, processor = tiny_model(views=VIEWS, positions="resampled", position_grid=(2, 2))
    modes: list[tuple[bool, bool]] = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, _: modes.append((torch.is_grad_enabled(), module.training)))
    settings = {"steps": 1, "distill": 0.5, "data": data | {"views": {"full": 1, "glance": 1}}}
    train(tiny_recipe(tmp_path, **settings), model, processor)
    assert set(modes) == {(False, False), (True, True)}
