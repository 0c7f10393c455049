"""The library works without any plug-in package: no entry points, no florence_vl_mini."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Hides the package and everything that installed packages add by entry points, then runs the command line.
ALONE = """
import importlib.abc, importlib.metadata, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "florence_vl_mini":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
everything = importlib.metadata.entry_points
def alone(**params):
    found = everything(**params)
    return type(found)(point for point in found if not point.value.startswith("florence_vl_mini"))
importlib.metadata.entry_points = alone
from florence_vl.cli.main import main
sys.exit(main())
"""


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ALONE, *args], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("args", [("--help",), ("recipes", "list"), ("plan", "paper/8b-pretrain")])
def test_commands_work(args: tuple[str, ...]) -> None:
    done = _run(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not [word for word in done.stdout.split() if word.startswith(("mini/", "demo/"))]  # the package's recipes


def test_names_of_the_package_are_unknown() -> None:
    for args in (("mini", "try"), ("chat", "What is shown?", "--model", "mini")):
        done = _run(*args)
        assert done.returncode == 2, done.stdout
        assert "mini" in done.stderr
        assert "Traceback" not in done.stderr
