"""Configuration: defaults, round trip, and errors that name the remedy."""

import pytest
from transformers import AutoConfig

from florence_vl import FlorenceVLConfig
from florence_vl.model.configuration import FLORENCE2_PROMPT_IDS
from florence_vl.model.tiny import TINY_PROMPT_IDS, tiny_config, tiny_florence2


def test_defaults_are_the_papers():
    config = FlorenceVLConfig()
    assert config.tower == "florence2"
    assert config.features == ["davit", "caption", "ocr", "grounding"]
    assert (config.fusion, config.projector_depth, config.mean_token) == ("channel", 3, "grid")
    assert config.prompt_padding == "masked"
    assert config.prompts["ocr"] == "What is the text in the image?"
    assert len(config.prompt_token_ids["grounding"]) == 14
    assert not config.is_encoder_decoder


def test_prompt_ids_are_whole_prompts():
    for ids in FLORENCE2_PROMPT_IDS.values():
        assert ids[0] == 0
        assert ids[-1] == 2
        assert 1 not in ids


@pytest.mark.parametrize("tower", ["florence2", "siglip_vision_model"])
def test_round_trip(tower, tmp_path):
    config = tiny_config(tower=tower, projector_depth=2)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, FlorenceVLConfig)
    ours, theirs = config.to_dict(), loaded.to_dict()
    assert {**theirs, "_name_or_path": ""} == {**ours, "_name_or_path": ""}
    assert loaded.get_text_config().model_type == "llama"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": ["davit", "captoin"]}, "Did you mean 'caption'"),
        ({"features": []}, "at least one"),
        ({"features": "davit"}, "give a list"),
        ({"features": ["ocr", "ocr"]}, "twice"),
        ({"fusion": "chanel"}, "Did you mean 'channel'"),
        ({"mean_token": "gird"}, "Did you mean"),
        ({"prompt_padding": "mask"}, "Did you mean 'masked'"),
        ({"projector_depth": 5}, "1 to 4"),
        ({"prompt_length": 3}, "has 6 tokens"),
        ({"prompt_token_ids": {"caption": [0, 5000]}, "features": ["caption"]}, r"\[0, 96\)"),
        ({"feature_layers": {"last": -1}}, "'backbone' tower"),
        ({"prompt_token_ids": {**TINY_PROMPT_IDS, "davit": [0, 2]}}, "cannot be a prompt"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_tower_and_vision_config_must_fit():
    with pytest.raises(ValueError, match="does not fit a vision_config"):
        FlorenceVLConfig(tower="backbone", vision_config=tiny_florence2(), prompt_token_ids=TINY_PROMPT_IDS)
    with pytest.raises(ValueError, match="feature_layers has no such name"):
        tiny_config(tower="dinov2", features=["middle"])
    with pytest.raises(ValueError, match="florence2 tower only"):
        tiny_config(tower="dinov2", mean_token="grid_before_encoder")
