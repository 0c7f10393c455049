"""`florence-vl analyze`: every command writes its results, one report shows them, and usage errors are one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from florence_vl.cli.main import main


@pytest.fixture
def llm_folder(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    from florence_vl.model.tiny import TINY_VOCAB_SIZE, tiny_tokenizer

    folder = tmp_path / "llm"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=TINY_VOCAB_SIZE
    )
    LlamaModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    with (folder / "metadata.jsonl").open("w") as file:
        for index in range(40):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "text": f"a car and {index} people"}) + "\n")
    return folder


def test_alignment_pca_attribution_and_report(own_cache, llm_folder, data, tiny_weights, tmp_path, capsys, monkeypatch):
    dino, _, _ = tiny_weights("dinov2_small")
    clip, _, _ = tiny_weights("clip_base")
    out = tmp_path / "out"
    common = ["--llm", str(llm_folder), "--data", str(data), "--steps", "3", "--seeds", "2", "--device", "cpu"]
    specs = [f"dinov2_small={dino}@32", f"clip_base={clip}"]
    assert main(["analyze", "alignment", "--encoders", *specs, *common, "--out", str(out / "a")]) == 0
    printed = capsys.readouterr().out
    assert "own width" in printed
    assert "equal width" in printed
    for name in ("alignment.png", "alignment.svg", "alignment_equal_width.png", "alignment.csv", "alignment.json"):
        assert (out / "a" / name).stat().st_size > 500
    record = json.loads((out / "a/alignment.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["dinov2_small=weights@32", "clip_base=weights"]
    with (out / "a/alignment.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["width_control"] for row in rows} == {"none", "pca"}
    assert len(rows) == 2 * 2 * 2 * 4  # encoders, controls, seeds, points of the curve

    one = ["--encoders", f"dinov2_small={dino}:layer1+last@32", "--ablate", "--width-control", "none"]
    assert main(["analyze", "alignment", *one, *common, "--out", str(out / "b")]) == 0
    assert "minus layer1" in capsys.readouterr().out

    picture = data / "0.png"
    encoders = ["--encoder", f"dinov2_small={dino}:layer1+last@32", f"clip_base={clip}"]
    assert main(["analyze", "pca", str(picture), *encoders, "--out", str(out / "p"), "--device", "cpu"]) == 0
    with np.load(out / "p/0_pca.npz") as arrays:
        assert len([name for name in arrays if name.endswith("/rgb")]) == 3
        assert arrays[next(n for n in arrays if n.endswith("layer1/rgb"))].shape == (4, 4, 3)
    assert Image.open(out / "p/0_pca.png").width > 300

    from florence_vl.model.tiny import tiny_model

    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    ask = [
        "--model",
        str(tmp_path / "model"),
        "--image",
        str(picture),
        "--question",
        "What is it?",
        "--answer",
        "a car",
    ]
    assert main(["analyze", "attribution", *ask, "--out", str(out / "t"), "--device", "cpu"]) == 0
    assert "grounding" in capsys.readouterr().out

    assert main(["analyze", "report", str(out)]) == 0
    page = (out / "report.html").read_text()
    for text in (
        "over 2 seeds",
        "Alignment loss by encoder",
        "Alignment loss by features",
        "PCA of the features",
        "Attribution",
    ):
        assert text in page
    assert page.count("data:image/png;base64,") == 5
    assert 'src="http' not in page
    assert "minus layer1" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "alignment", "--encoders", "clip_lage", "--data", "x", "--out", "y"], "Did you mean 'clip_large'"),
        (["analyze", "alignment", "--encoders", "clip_base", "--data", "nowhere.json", "--out", "y"], "nowhere.json"),
        (
            ["analyze", "alignment", "-e", "clip_base", "dinov2_small", "--ablate", "--data", "x", "--out", "y"],
            "one enc",
        ),
        (["analyze", "alignment", "-e", "clip_base", "--subsets", "all", "--data", "x", "--out", "y"], "--ablate"),
        (["analyze", "alignment", "-e", "clip_base", "--steps", "0", "--data", "x", "--out", "y"], "steps is 0"),
        (["analyze", "pca", "nowhere.png", "--encoder", "clip_base"], "nowhere.png"),
        (["analyze", "report", "nowhere"], "no such folder"),
        (["analyze", "attribution", "--model", "nowhere", "--image", "x", "--question", "?"], "no model 'nowhere'"),
        (
            ["analyze", "alignment", "-e", "clip_base", "--data", "x", "--out", "o", "--width-control", "pcs"],
            "known: pca, random, none",
        ),
        (
            [
                "analyze",
                "alignment",
                "-e",
                "clip_base",
                "--data",
                "x",
                "--out",
                "o",
                "--width-control",
                "none",
                "--width",
                "8",
            ],
            "--width is for --width-control pca or random",
        ),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert "Traceback" not in "\n".join(error)


def test_an_empty_folder_has_no_report(tmp_path, capsys):
    assert main(["analyze", "report", str(tmp_path)]) == 2
    assert "contains no result" in capsys.readouterr().err


def test_encoders_are_listed(capsys):
    assert main(["analyze", "encoders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    from florence_vl.analyze.encoders import ENCODERS

    assert [line.split()[0] for line in lines] == ENCODERS.names()


@pytest.mark.parametrize("module", ["analyze", "ablate"])
def test_help_imports_nothing_heavy(module):
    import ast
    from importlib.util import find_spec

    tree = ast.parse(Path(find_spec(f"florence_vl.cli.{module}").origin).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    light = {"florence_vl.cli.common", "florence_vl.files"}
    assert imported <= light | {
        "__future__",
        "dataclasses",
        "json",
        "shlex",
        "sys",
        "pathlib",
        "typing",
        "typer",
        "typer.core",
    }
