"""Native aspect ratio within a token budget; other resolutions for a trained model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from florence_vl.model.fusion import merge_tokens
from florence_vl.model.geometry import native_size
from florence_vl.model.image_processing import FlorenceVLImageProcessor
from florence_vl.model.resolution import resolution_settings, set_resolution
from florence_vl.model.tiny import tiny_model

SIDE = st.integers(1, 20_000)


@given(SIDE, SIDE, st.integers(1, 4), st.integers(1, 2000))
@settings(max_examples=300, deadline=None)
def test_native_sizes_stay_within_the_budget(height, width, stride, budget):
    stride *= 16
    out_height, out_width = native_size(height, width, stride, budget)
    assert out_height % stride == out_width % stride == 0
    assert 1 <= out_height // stride * (out_width // stride) <= budget
    for out, side in ((out_height, height), (out_width, width)):
        assert out <= max(stride, math.ceil(2.0 * side / stride) * stride)


@pytest.mark.parametrize(
    ("image", "expected"),
    [((768, 768), (768, 768)), ((1080, 1920), (576, 1024)), ((1920, 1080), (1024, 576)), ((100, 100), (192, 192))],
)
def test_native_sizes_of_usual_images(image, expected):
    assert native_size(*image, stride=32, token_budget=576) == expected


def test_a_wide_picture_uses_its_budget():
    height, width = native_size(1080, 1920, stride=32, token_budget=576)
    assert height // 32 * (width // 32) == 576, "padding to a square would leave 44 % of the tokens empty"


@pytest.mark.parametrize("arguments", [(0, 5, 32, 10), (5, 5, 32, 0), (5, 5, 0, 10)])
def test_bad_sizes_and_budgets(arguments):
    with pytest.raises(ValueError, match=r"pixels|at least 1"):
        native_size(*arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tiles": 2}, "no tiles"),
        ({"image_size": "96"}, "height and width in pixels"),
        ({"image_size": -64}, "height and width in pixels"),
        ({"aspect": "native", "token_budget": 1030}, "1029 tokens, but the LLM's context has 1024"),
        ({"image_size": 64 * 40}, "context"),
        ({"aspect": "nativ"}, "Did you mean"),
        ({"view": "glanse"}, "Did you mean"),
        ({"positions": "relative"}, "unknown positions"),
    ],
)
def test_a_refused_resolution_changes_nothing(wrong, message):
    model, processor = tiny_model(views={"glance": {"features": ["davit"]}})
    before = model.config.to_dict(), processor.image_processor.to_dict()
    with pytest.raises(ValueError, match=message):
        set_resolution(model, processor, **{"image_size": 96, "view": "glance", **wrong})
    assert (model.config.to_dict(), processor.image_processor.to_dict()) == before
    assert model.model.vision_tower.trained_grid == model.config.trained_grid


def picture(height, width):
    rng = np.random.default_rng(height * width)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_images_of_several_sizes_stand_in_one_tensor():
    images = FlorenceVLImageProcessor(size=64, image_aspect_ratio="native", stride=32, max_upscale=1.0)
    out = images([picture(64, 64), picture(32, 128)], return_tensors="pt")
    assert out["image_sizes"].tolist() == [[64, 64], [32, 128]]
    assert out["pixel_values"].shape == (2, 3, 64, 128)
    alone = images([picture(32, 128)], return_tensors="pt")["pixel_values"]
    assert torch.equal(out["pixel_values"][1, :, :32], alone[0])


def test_processor_and_model_count_the_same_tokens_for_every_image():
    model, processor = tiny_model(positions="resampled", position_grid=[2, 2])
    set_resolution(model, processor, aspect="native", token_budget=6)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture(*size)}, {"type": "text", "text": "What?"}]}]
        for size in [(64, 64), (40, 200), (300, 100)]
    ]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, padding=True
    )
    counts = [processor.image_tokens(*size) for size in [(64, 64), (40, 200), (300, 100)]]
    assert len(set(counts)) > 1
    found = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert found == counts
    hook = processor._get_num_multimodal_tokens([(64, 64), (40, 200), (300, 100)])
    assert list(hook["num_image_tokens"]) == counts
    together = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, chat in zip(together, chats, strict=True):
        one = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        alone = model.generate(**one, max_new_tokens=5, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_another_size_resamples_positions_and_refuses_what_does_not_fit():
    model, processor = tiny_model()
    set_resolution(model, processor, image_size=96)
    assert model.config.positions == "resampled"
    assert model.config.position_grid == (2, 2)
    assert processor.num_image_tokens() == model.num_image_tokens(96, 96) == 9
    with pytest.raises(ValueError, match="context has 1024"):
        set_resolution(model, processor, image_size=1024)
    with pytest.raises(ValueError, match="Did you mean 'native'"):
        set_resolution(model, processor, aspect="nativ")
    with pytest.raises(ValueError, match="Did you mean 'absolute'"):
        set_resolution(model, processor, positions="absolut")


def test_merged_tokens_hold_their_neighbors():
    grid = torch.arange(4 * 6).float().view(1, 24, 1)
    merged = merge_tokens(grid, (4, 6), 2)
    assert merged.shape == (1, 6, 4)
    assert merged[0, 0].tolist() == [0, 1, 6, 7]
    assert merged[0, -1].tolist() == [16, 17, 22, 23]
    assert merge_tokens(grid, (4, 6), 1) is grid


@pytest.mark.parametrize("fusion", ["channel", "token", "average", "gated"])
def test_merge_quarters_the_tokens(fusion):
    one, _ = tiny_model(fusion=fusion, positions="resampled", position_grid=[2, 2])
    model, processor = tiny_model(fusion=fusion, merge=2, positions="resampled", position_grid=[2, 2])
    assert 4 * model.num_image_tokens(128, 64) == one.num_image_tokens(128, 64)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture(64, 64)}, {"type": "text", "text": "A?"}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == model.num_image_tokens(64, 64)
    assert model(**inputs).logits.isfinite().all()
    for count in (model.num_image_tokens, processor.num_image_tokens):
        with pytest.raises(ValueError, match="merge=2 does not"):
            count(96, 64)


def test_merge_and_the_mean_token_contradict():
    with pytest.raises(ValueError, match="cannot be combined with mean_token='all'"):
        tiny_model(merge=2, mean_token="all")


def test_a_view_as_the_default_of_a_processor():
    views = {"glance": {"size": 32, "features": ["davit"]}}
    model, processor = tiny_model(views=views, positions="resampled", position_grid=[2, 2])
    named = processor.image_processor([picture(70, 90)], view="glance", return_tensors="pt")
    set_resolution(model, processor, view="glance")
    found = processor.image_processor([picture(70, 90)], return_tensors="pt")
    assert found.keys() == named.keys()
    assert all(torch.equal(found[key], named[key]) for key in named)
    assert processor.image_tokens(70, 90) == 1
    assert processor.image_tokens(70, 90, view="full") == 4
    assert resolution_settings(model, processor)["view"] == "glance"
    set_resolution(model, processor, view="full")
    assert processor.image_tokens(70, 90) == 4
    with pytest.raises(ValueError, match="Did you mean 'glance'"):
        set_resolution(model, processor, view="glanse")
    with pytest.raises(ValueError, match="token budget is for the aspect 'native'"):
        set_resolution(model, processor, token_budget=2)


def test_a_budget_of_no_tokens_is_refused():
    _, processor = tiny_model()
    with pytest.raises(ValueError, match="token_budget and stride must be at least 1, found 0"):
        processor.image_processor(picture(64, 64), image_aspect_ratio="native", token_budget=0)


def test_any_error_changes_nothing():
    model, processor = tiny_model()
    before = processor.image_processor.to_dict()
    with pytest.raises(TypeError):
        set_resolution(model, processor, image_size=96, aspect="native", token_budget="9")
    assert processor.image_processor.to_dict() == before


def test_no_image_has_more_tokens_than_the_largest():
    for budget in (4, 7, 30, 57):
        images = FlorenceVLImageProcessor(size=64, image_aspect_ratio="native", stride=32, token_budget=budget)
        sides = range(200, 801, 25)
        counts = {math.prod(images.output_size(height, width)) for height in sides for width in sides}
        assert max(counts) <= math.prod(images.largest_size) <= budget * 32 * 32


def test_towers_of_one_size_refuse_other_sizes_when_they_are_set():
    views = {"glance": {"size": 32}}
    model, processor = tiny_model(tower="clip_vision_model")
    with pytest.raises(ValueError, match="this clip_vision_model accepts one size only"):
        set_resolution(model, processor, aspect="native")
    assert processor.image_processor.image_aspect_ratio == "pad"
    model, processor = tiny_model(tower="clip_vision_model", views=views)
    with pytest.raises(ValueError, match=r"view 'glance': .* accepts only 64x64"):
        set_resolution(model, processor, view="glance")
    model, processor = tiny_model(tower="clip_vision_model", tiles={"max": 4})
    with pytest.raises(ValueError, match="at least 1, found 0"):
        set_resolution(model, processor, tiles=0)
    model, processor = tiny_model(tower="dinov2")
    set_resolution(model, processor, aspect="native")
