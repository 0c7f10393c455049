"""Recipes: strictness, inheritance, overrides, origins."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from florence_vl.train.recipes import list_recipes, load_recipe, resolve_recipe


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_values_reach_the_typed_recipe() -> None:
    recipe = load_recipe({"steps": 5, "parts": {"tower": {"lr": "1e-5"}}, "optimizer": {"betas": [0.9, 0.95]}})
    assert recipe.steps == 5
    assert recipe.parts.tower.lr == 1e-5  # YAML 1.1 would leave 1e-5 a text
    assert recipe.optimizer.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"stepz": 5}, "unknown key `stepz`. Did you mean 'steps'"),
        ({"steps": 5, "optimizer": {"lrr": 1}}, "unknown key `optimizer.lrr`. Did you mean 'lr'"),
        ({"steps": 5, "data": {"sources": [{"pth": "x"}]}}, "unknown key `data.sources.0.pth`. Did you mean 'path'"),
        ({"steps": 5, "parts": {"llm": {"lora": {"rnk": 3}}}}, "unknown key `parts.llm.lora.rnk`. Did you mean 'rank'"),
        ({"steps": 5, "precision": "bf61"}, "found 'bf61'. Did you mean 'bf16'"),
        ({"steps": "many"}, "`steps` should be a valid integer"),
        ({"steps": 5, "model": {"build": {"llm": "x"}}}, "`model.build.vision` is missing"),
        ({}, "exactly one of `steps` and `epochs`"),
        ({"steps": 1, "epochs": 1}, "exactly one of `steps` and `epochs`"),
        ({"steps": 1, "batch_size": 10, "micro_batch_size": 4}, "not a multiple of `micro_batch_size`"),
        ({"steps": 1, "parts": {k: {"train": False} for k in ("tower", "projector", "llm")}}, "every part is frozen"),
        ({"steps": 1, "parts": {"llm": {"last_layers": 1, "lora": {}}}}, "only one of `parts.llm.last_layers`"),
        ({"steps": 1, "parts": {"llm": {"train": False, "lora": {}}}}, "`parts.llm.train` is false but"),
        ({"steps": 1, "logging": {"profile_steps": [0, 3]}}, "`logging.profile_steps` [0, 3] must be a first and"),
        ({"steps": 1, "logging": {"profile_steps": [5, 3]}}, "counted from 1"),
        (
            {"steps": 1, "data": {"stream": {"path": "x", "filters": [{"column": "a", "test": "="}]}}},
            "unknown test '=' in a filter. Did you mean",
        ),
        (
            {"steps": 1, "data": {"stream": {"path": "x", "filters": [{"column": "a", "test": "==", "vale": 1}]}}},
            "unknown key `data.stream.filters.0.vale`. Did you mean 'value'",
        ),
        ({"steps": 1, "output": "runs/{nam}"}, "may contain only the field {name}"),
        (
            {"steps": 1, "data": {"max_length": 9000, "packing": {"mode": "packed", "tokens_per_row": 4096}}},
            "a sample must fit a row",
        ),
    ],
)
def test_mistakes_are_named(content: dict, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe(content)
    assert expected in str(error.value)


def test_extends_merges_and_tells_the_origin_of_each_value(tmp_path: Path) -> None:
    write(tmp_path, "base", "steps: 10\ndescription: base\noptimizer: {lr: 1e-3, weight_decay: 0.1}\n")
    write(tmp_path, "data", "data: {sources: [{path: a.json}]}\n")
    child = write(tmp_path, "sub/child", "extends: [../base, ../data.yaml]\noptimizer: {lr: 2e-3}\n")
    resolved = resolve_recipe(child, ["data.sources.0.path=b.json", "seed=7"])
    recipe, origins = resolved.recipe, resolved.origins
    assert (recipe.steps, recipe.optimizer.lr, recipe.optimizer.weight_decay) == (10, 2e-3, 0.1)
    assert recipe.data.sources[0].path == "b.json"
    assert recipe.name == "child"
    assert recipe.description == ""  # a description belongs to its file alone
    assert origins["steps"] == "base.yaml"
    assert origins["optimizer.lr"] == "child.yaml"
    assert origins["seed"] == origins["data.sources.0.path"] == "command line"
    assert origins["optimizer.eps"] == "default"
    assert [path.name for path in resolved.files] == ["base.yaml", "data.yaml", "child.yaml"]


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", "extends: b\nsteps: 1\n")
    write(tmp_path, "b", "extends: a\n")
    with pytest.raises(ValueError, match=r"circle: a.yaml -> b.yaml -> a.yaml"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("override", ["steps", "=3", "data.sources.4.path=x"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match="override"):
        load_recipe({"steps": 1, "data": {"sources": [{"path": "a"}]}}, [override])


def test_environment_variables_fill_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"steps": 1, "data": {"sources": [{"path": "${FVL_DATA:-data}/x.json"}]}}
    assert load_recipe(content).data.sources[0].path == "data/x.json"
    monkeypatch.setenv("FVL_DATA", "/mnt")
    assert load_recipe(content).data.sources[0].path == "/mnt/x.json"
    with pytest.raises(ValueError, match="FVL_UNSET"):
        load_recipe({"steps": 1, "output": "${FVL_UNSET}"})


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe({"name": "x", "steps": 3, "parts": {"llm": {"lora": {"rank": 4}}}})
    path = write(tmp_path, "again", yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(path) == recipe


def test_unknown_names_list_near_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "mini/pretrain", "steps: 1\n")
    write(tmp_path, "_base", "steps: 1\n")
    monkeypatch.setenv("FLORENCE_VL_RECIPES", str(tmp_path))
    assert "mini/pretrain" in list_recipes()
    assert "_base" not in list_recipes()
    with pytest.raises(FileNotFoundError, match="mini/pretrain"):
        load_recipe("mini/pretrian")


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.data.sources or name.startswith("demo/")  # the demo makes its own data
