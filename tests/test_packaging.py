"""What a built wheel must carry: every recipe folder is listed, as setuptools' data files know no folders."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_recipe_folder_is_packaged():
    listed = (ROOT / "pyproject.toml").read_text()
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert folders
    missing = [
        folder for folder in sorted(folders) if f'"share/florence-vl/{folder}" = ["{folder}/*.yaml"]' not in listed
    ]
    assert not missing, f"add to [tool.setuptools.data-files] in pyproject.toml: {missing}"
