"""The checks of docs/ecosystem.md, in fresh processes; the page lists exactly these checks and none fails."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATRIX = Path(__file__).with_name("ecosystem_matrix.py")


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("ecosystem_matrix", MATRIX)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("order", ["florence_vl", pytest.param("transformers", marks=pytest.mark.slow)])
def test_every_check_passes_in_a_fresh_process(matrix, order):
    results = matrix.run_fresh(order)
    assert [(r["package"], r["check"]) for r in results] == list(matrix.CHECKS)
    assert not [f"{r['package']}, {r['check']}: {r['error']}" for r in results if r["error"]]


def test_trl_knows_the_model_when_transformers_was_imported_first():
    """The quick part of the other order: a trainer that makes its own reference model by the class's name."""
    code = f"""
import transformers, florence_vl, importlib.util, json, pathlib, tempfile
spec = importlib.util.spec_from_file_location("matrix", {str(MATRIX)!r})
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)
from florence_vl.model.tiny import tiny_model
with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for part in tiny_model():
        part.save_pretrained(folder)
    matrix.dpo(folder)
print(json.dumps("done"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == "done"


def test_the_page_lists_the_checks(matrix):
    page = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\w+) \| \S+ \| (.*) \| (.*) \|$", page, flags=re.M)
    assert listed.pop(0)[0] == "package"  # the table's head
    assert [(package, what) for package, what, _ in listed] == list(matrix.CHECKS)
    assert {result for _, _, result in listed} == {"works"}
