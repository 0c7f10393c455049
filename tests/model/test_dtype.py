"""Every part has the requested dtype, also after saving and loading."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from florence_vl import FlorenceVLForConditionalGeneration
from florence_vl.model.tiny import TINY_IMAGE_TOKEN_ID, tiny_model

TOWERS = ("florence2", "clip_vision_model", "siglip_vision_model", "dinov2")


def answer(model):
    ids = torch.tensor([[1, *[TINY_IMAGE_TOKEN_ID] * 4, 20, 21, 22]])
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    generated = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return generated[0, ids.shape[1] :].tolist()


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_in_one_dtype_loaded_in_any(tower, saved, tmp_path):
    model, _ = tiny_model(tower=tower)
    model.to(saved).save_pretrained(tmp_path)
    for asked in ("auto", torch.float32, torch.bfloat16, torch.float16):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=asked)
        assert dtypes(loaded) == {saved if asked == "auto" else asked}
        assert len(answer(loaded)) == 3
    default = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path)
    assert dtypes(default) == {saved}


def test_dtypes_of_nested_configs_do_not_count(tmp_path):
    model, _ = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for part in (config["vision_config"]["vision_config"], config["vision_config"]["text_config"]):
        part["dtype"] = "float32"  # what any Florence-2 has that was loaded and saved again
    file.write_text(json.dumps(config))
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert dtypes(loaded) == {torch.bfloat16}
    assert answer(loaded)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert dtypes(FlorenceVLForConditionalGeneration.from_pretrained(again)) == {torch.bfloat16}


def test_half_precision_answers_as_the_same_weights_in_float32(tmp_path):
    model, _ = tiny_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    ids = torch.tensor([[1, *[TINY_IMAGE_TOKEN_ID] * 4, 20, 21, 22]])
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        loaded = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        with torch.no_grad():
            outputs.append(loaded(input_ids=ids, pixel_values=pixels).logits.float())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tower", TOWERS[:2])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_exports_of_training_load(tower, name, tmp_path):
    from florence_vl.train.export import write_pretrained

    model, processor = tiny_model(tower=tower)
    write_pretrained(model, dict(model.state_dict()), processor, tmp_path / "out", name)
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert dtypes(loaded) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[name]}
    assert len(answer(loaded)) == 3


def test_a_siglip_tower_has_no_pooling_head(tmp_path):
    model, _ = tiny_model(tower="siglip_vision_model")
    names = [name for name, _ in model.model.vision_tower.named_parameters()]
    assert names
    assert not [name for name in names if ".head." in name]
    model.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["vision_config"]["vision_use_head"]
