"""Views: size and features by name; features outside a view are not computed and are replaced by their mean."""

import numpy as np
import pytest
import torch
from PIL import Image

from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.router import Router, RouterConfig, save_routers, set_view
from florence_vl.model.tiny import tiny_config, tiny_model

VIEWS = {"glance": {"size": 32, "features": ["davit"]}, "read": {"features": ["davit", "ocr"]}}
OPTIONS = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}


@pytest.fixture
def parts():
    model, processor = tiny_model(views=VIEWS, positions="resampled", position_grid=[2, 2])
    with torch.no_grad():
        for vector in model.model.feature_fill.parameters():
            vector.normal_()
    return model, processor


def chat(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    image = {"type": "image", "image": Image.fromarray(pixels)}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]


def count_encoded(model):
    """Image and prompt pairs that pass through the encoder."""
    rows = []
    model.model.vision_tower.encoder.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    return rows


def test_a_view_decides_size_placeholders_and_features(parts):
    model, processor = parts
    rows = count_encoded(model)
    expected = {"full": (4, 3), "glance": (1, 0), "read": (4, 1)}
    for view, (tokens, prompts) in expected.items():
        rows.clear()
        batch = processor.apply_chat_template(chat(0), view=view, **OPTIONS)
        assert int((batch["input_ids"] == processor.image_token_id).sum()) == tokens
        assert processor.image_tokens(70, 90, view=view) == tokens
        assert model(**batch).logits.isfinite().all()
        assert sum(rows) == prompts, view


def test_views_of_a_batch_equal_single_images(parts):
    model, processor = parts
    rows = count_encoded(model)
    names = ["glance", "read", "full"]
    batch = processor.apply_chat_template([chat(i) for i in range(3)], view=names, **OPTIONS)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert sum(rows) == 4, "one pair for read, three for full"
    for index, name in enumerate(names):
        one = processor.apply_chat_template(chat(index), view=name, **OPTIONS)
        alone = model.generate(**one, max_new_tokens=4, do_sample=False)[:, one["input_ids"].shape[1] :]
        assert together[index].tolist() == alone[0].tolist(), name


def test_what_is_left_out_is_its_mean(parts):
    model, _ = parts
    pixels = torch.randn(2, 3, 64, 64)
    fill = model.model.feature_fill
    images = fill.estimate([model.model.vision_tower(pixels[:1]), model.model.vision_tower(pixels[1:])])
    features = model.model.vision_tower(pixels)
    assert images == 2
    torch.testing.assert_close(fill.vectors["ocr"].data, features["ocr"].mean((0, 1)))
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
    found = model.get_image_features(pixels, feature_mask=mask).last_hidden_state
    features["caption"] = torch.where(mask[:, 1, None, None] == 1, features["caption"], fill.vectors["caption"])
    expected = model.model.multi_modal_projector(model.model.fusion(features))
    torch.testing.assert_close(found, expected)


def test_training_runs_all_prompts_and_masks(parts):
    model, _ = parts
    model.train()
    rows = count_encoded(model)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])
    model.get_image_features(torch.randn(2, 3, 64, 64), feature_mask=mask).last_hidden_state.sum().backward()
    assert rows == [6]
    assert model.model.feature_fill.vectors["ocr"].grad.abs().sum() > 0


def test_a_checkpoint_gains_views_and_keeps_them(tmp_path):
    model, _ = tiny_model()
    model.save_pretrained(tmp_path / "a")
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / "a", views=VIEWS)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.get_image_features(pixels).last_hidden_state, model.get_image_features(pixels)[0])
    assert not any(vector.any() for vector in loaded.model.feature_fill.parameters())
    loaded.save_pretrained(tmp_path / "b")
    again = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert again.config.views["read"] == {"size": None, "features": ["davit", "ocr"]}


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"a": {"features": ["davit", "orc"]}}, "Did you mean 'ocr'"),
        ({"a": {"features": ["ocr"]}}, "lacks the feature 'davit'"),
        ({"a": {"sice": 3}}, "keys size and features"),
        ({"a": {"size": 0}}, "pixels per side"),
        ({"full": {}}, "rename this one"),
        (["a"], "mapping of names"),
    ],
)
def test_refusals(views, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(views=views)


def test_unknown_views_and_models_without(parts):
    _, processor = parts
    with pytest.raises(ValueError, match="Did you mean 'glance'"):
        processor.apply_chat_template(chat(0), view="glanse", **OPTIONS)
    model, _ = tiny_model()
    with pytest.raises(ValueError, match=r"config\.views is None"):
        model.get_image_features(torch.randn(1, 3, 64, 64), feature_mask=torch.ones(1, 4))


@pytest.mark.parametrize("text", ["{broken", "[1]", '{"question_dim": 48, "width": 3}'])
def test_a_damaged_router_is_named(tmp_path, text):
    (tmp_path / "router.json").write_text(text)
    with pytest.raises(ValueError, match=r"router\.json is not"):
        Router.load(tmp_path)


def test_a_negative_trade_is_refused_before_the_first_image(parts, tmp_path):
    model, processor = parts
    costs = {"full": 1.0, "glance": 0.1}
    save_routers(tmp_path, [Router(RouterConfig(question_dim=48, image_dim=32, costs=costs, thumbnail="glance"))])
    with pytest.raises(ValueError, match="trade must be 0 or more, found -1"):
        set_view(model, processor, tmp_path, view="auto", trade=-1)
    assert set_view(model, processor, tmp_path, view="auto", trade=0).trade == 0
