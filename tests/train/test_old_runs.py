"""Runs of version 0.1.0's first layout load: recipe.yaml, checkpoint, saved model and processor.

data/old_run.tar.xz was written by that code: six steps on one record, the checkpoint of step 3, the final model.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from florence_vl import FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl.train import load_recipe, train
from florence_vl.train.export import export_run

ARCHIVE = Path(__file__).with_name("data") / "old_run.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder; its recipe's paths are relative to the working folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "old"


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_old_run_resumes_to_its_own_losses(old: Path) -> None:
    expected = _losses(old)
    overrides = ["model.path=runs/old/model", "output=runs/again"]
    recipe = load_recipe(old / "recipe.yaml", overrides)
    assert recipe.parallel.strategy == "auto"
    again = shutil.copytree(old, old.with_name("again"))
    with pytest.raises(ValueError, match="draws records in order 1, this version in order 2"):
        train(recipe, resume="auto")
    # Model, optimizer and counters are as good as ever. All records are alike here, so the order does not matter.
    state = again / "checkpoints" / "step-00000003" / "trainer.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"data": []}))
    result = train(recipe, resume="auto")
    assert result.finished
    assert _losses(old.with_name("again")) == pytest.approx(expected, abs=1e-5)


def test_an_old_run_is_exported_and_its_saved_model_answers_alike(old: Path) -> None:
    folder, step = export_run(old, old.parent / "exported")
    assert step == 3
    earlier = FlorenceVLForConditionalGeneration.from_pretrained(folder).state_dict()
    model = FlorenceVLForConditionalGeneration.from_pretrained(old / "model").eval()
    processor = FlorenceVLProcessor.from_pretrained(old / "model")
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, earlier[name])}
    assert moved
    assert not any("vision_tower" in name for name in moved)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[Image.open("a.png")], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_retired_key_with_another_value_is_refused(old: Path) -> None:
    with pytest.raises(ValueError, match=r"`parallel.cpu_offload` is no longer a key"):
        load_recipe(old / "recipe.yaml", ["parallel.cpu_offload=true"])
