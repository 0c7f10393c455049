"""All examples of docs/api.md run in order on tiny models with the names of the page."""

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, Florence2Config, Florence2ForConditionalGeneration

import florence_vl
from florence_vl.model.tiny import tiny_config, tiny_florence2, tiny_model, tiny_processor, tiny_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with everything that the page names."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60), "red").save("photo.jpg")
    model, processor = tiny_model()
    model.save_pretrained("mini")
    processor.save_pretrained("mini")
    tokenizer = processor.tokenizer
    fields = tiny_florence2(text_config={"vocab_size": len(tokenizer)}, image_token_id=len(tokenizer) - 1)
    fields.pop("model_type")
    Florence2ForConditionalGeneration(Florence2Config(**fields)).save_pretrained("florence2")
    tiny_processor().tokenizer.save_pretrained("florence2")
    (tmp_path / "florence2" / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    AutoModelForCausalLM.from_config(tiny_config().text_config).save_pretrained("llm")
    tiny_processor().tokenizer.save_pretrained("llm")
    folders = {("mini", "models"): "mini", ("mini", "vision"): "florence2", ("smollm2", "llms"): "llm"}
    for module in ("loading", "assemble"):
        monkeypatch.setattr(
            f"florence_vl.model.{module}.resolve", lambda name, kind: folders.get((name, kind), str(name))
        )
    records = [
        {
            "id": str(index),
            "image": "photo.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWhich color?"}, {"from": "gpt", "value": "red"}],
        }
        for index in range(4)
    ]
    Path("data.json").write_text(json.dumps(records))
    recipe = tiny_recipe("runs/tiny", data={"sources": [{"path": "data.json", "image_root": "."}]})
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    spec = importlib.util.spec_from_file_location("upstream", ROOT / "tests" / "convert" / "convert_upstream.py")
    upstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    upstream.make_released(tmp_path / "released", "llama", shards=1)


def test_every_example_of_the_page_runs(workspace, capsys):
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(examples) >= 8
    namespace: dict = {}
    torch.manual_seed(0)
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), namespace)
    assert namespace["result"].steps == 2
    assert namespace["image"].pooler_output.ndim == 3
    assert namespace["model"].config.features == ["davit", "caption", "colors"]
    assert Path("converted/config.json").is_file()
    assert len(namespace["scores"].benchmarks) >= 1


def test_every_name_of_the_page_is_exported():
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in PAGE.splitlines() if "|" in line[1:])))
    assert named - {"name"} == set(florence_vl.__all__) - {"__version__"}
    for name in florence_vl.__all__:
        assert inspect.getdoc(getattr(florence_vl, name)) or name == "__version__"


def test_packages_are_called_like_their_functions():
    import florence_vl.train.loop

    assert florence_vl.train.train is sys.modules["florence_vl.train.loop"].train
    assert callable(florence_vl.train)
    assert callable(florence_vl.convert)
    assert callable(florence_vl.evaluate)
    with pytest.raises(FileNotFoundError, match="no recipe"):
        florence_vl.train("no/such/recipe")
    with pytest.raises(FileNotFoundError):
        florence_vl.convert("no/such/folder", "out")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = florence_vl.trian
