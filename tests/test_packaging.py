"""What a built wheel must carry: recipes, templates, suites and reports are package data."""

from importlib import resources

import pytest

from florence_vl.train.recipes import list_recipes


@pytest.mark.parametrize(
    "path",
    [
        "recipes/_base/gpu.yaml",
        "recipes/paper/8b-pretrain.yaml",
        "model/templates/chatml.jinja",
        "evaluate/report.html",
    ],
)
def test_the_package_carries_its_data(path):
    assert resources.files("florence_vl").joinpath(path).is_file()


def test_recipes_are_found_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "paper/8b-pretrain" in list_recipes()
