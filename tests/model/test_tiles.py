"""Tiles: the grid of an image, the order of its tokens, and the same counts and answers everywhere."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from florence_vl.convert.florence_vl import check_expressible
from florence_vl.model.features import tower_features
from florence_vl.model.fusion import FUSIONS, Fusion
from florence_vl.model.loading import load_model
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.resolution import resolution_settings, set_resolution
from florence_vl.model.tiles import Canvas, RowEnd, check_tiles, choose_grid, grids, overview_pixels
from florence_vl.model.tiny import tiny_model, tiny_processor
from florence_vl.train.flops import count_flops
from florence_vl.train.step import count_pixels

TILES = {"max": 4, "global": True, "size": 64}
SIZES = [(64, 64), (50, 190), (300, 100), (200, 200)]  # height, width: 1x1, 1x3, 3x1 or 2x1, 2x2
SIDE = st.integers(1, 5000)


def picture(height, width):
    rng = np.random.default_rng(height * width)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def chat(image, text="What is it?"):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def prompt(processor, chats, **options):
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **options
    )


# ---------------------------------------------------------------- the grid


@given(SIDE, SIDE, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_grids_have_at_most_that_many_tiles(height, width, limit):
    rows, columns = choose_grid(height, width, 336, limit)
    assert 1 <= rows * columns <= limit
    assert choose_grid(width, height, 336, limit) in {(columns, rows), (rows, columns)}
    if max(height, width) <= 336:
        assert (rows, columns) == (1, 1)


@pytest.mark.parametrize("limit", [2, 4, 6, 9])
def test_grids_are_those_of_llava_next(limit):
    known = [(336 * rows, 336 * columns) for rows, columns in grids(limit)]
    for height, width in [(300, 300), (1080, 1920), (1920, 1080), (480, 640), (1000, 250), (337, 336), (4000, 3000)]:
        theirs = select_best_resolution((height, width), known)
        assert tuple(336 * side for side in choose_grid(height, width, 336, limit)) == theirs, (height, width)


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [((384, 384), 9, (1, 1)), ((1080, 1920), 4, (2, 2)), ((400, 1600), 4, (1, 4)), ((1600, 400), 4, (4, 1))],
)
def test_grids_of_usual_images(size, limit, expected):
    assert choose_grid(*size, 384, limit) == expected


# ---------------------------------------------------------------- tokens


def test_tokens_are_one_map_of_the_canvas_after_the_global_view():
    canvas = Canvas.of({**TILES, "size": 2}, 4, 6)
    assert canvas.views == 7
    number = torch.arange(24.0).view(1, 1, 4, 6)
    pixels = torch.cat([number.expand(1, 2, 4, 6), torch.ones(1, 1, 4, 6)], dim=1)
    views = canvas.cut(torch.cat([pixels, pixels + 100]))
    tokens = torch.cat([views, views + 1000], dim=-2).flatten(2).transpose(1, 2)  # as token fusion of two features
    end = RowEnd(3)
    torch.nn.init.constant_(end.vector, -1.0)
    placed = end(tokens, canvas, (2, 2))
    assert placed.shape == (2, canvas.num_tokens(8, 2), 3)
    first, second = placed[0, :8, 0], placed[0, 8:, 0].view(2, 4, 7)
    mean = torch.nn.functional.avg_pool2d(number, (2, 3))[0, 0].flatten()
    assert torch.equal(first, torch.cat([mean, mean + 1000]))
    for feature, shift in enumerate((0, 1000)):
        assert torch.equal(second[feature, :, :6], number[0, 0] + shift)
        assert (second[feature, :, 6] == -1).all()
    assert torch.equal(placed[1, :4, 0], mean + 100)
    assert (placed[0, :, 2] != 0).all()


@pytest.mark.parametrize("tower", ["florence2", "clip_vision_model", "siglip_vision_model", "dinov2"])
def test_an_image_of_one_tile_has_the_tokens_of_today(tower):
    plain, without = tiny_model(tower=tower)
    model, processor = tiny_model(tower=tower, tiles=TILES)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["model.row_end.vector"]
    for size in [(64, 64), (40, 40), (30, 61)]:
        images = {
            name: p.image_processor([picture(*size)], return_tensors="pt")
            for name, p in (("old", without), ("new", processor))
        }
        assert torch.equal(images["old"]["pixel_values"], images["new"]["pixel_values"])
        with torch.no_grad():
            old = plain.get_image_features(**images["old"], output_features=True)
            new = model.get_image_features(**images["new"], output_features=True)
        assert torch.equal(old.pooler_output, new.pooler_output)
        assert all(torch.equal(old.features[name], new.features[name]) for name in old.features)


def test_a_tile_is_what_the_tower_gives_for_its_part_of_the_picture():
    model, processor = tiny_model(tower="siglip_vision_model", tiles=TILES)
    set_resolution(model, processor, aspect="squash")
    whole = picture(128, 192)
    set_resolution(model, processor, tiles=6)
    pixels = processor.image_processor([whole], return_tensors="pt")
    assert pixels["image_sizes"].tolist() == [[128, 192]]
    with torch.no_grad():
        tokens = model.get_image_features(**pixels).pooler_output[0]
        part = processor.image_processor([whole.crop((64, 64, 128, 128))], return_tensors="pt")
        alone = model.get_image_features(**part).pooler_output[0]
    map_ = tokens[4:].view(4, 7, -1)
    torch.testing.assert_close(map_[2:, 2:4].flatten(0, 1), alone)
    assert torch.equal(map_[:, 6], model.model.row_end.vector.expand(4, -1))


@pytest.mark.parametrize("aspect", ["pad", "squash"])
def test_the_canvas_holds_the_whole_picture(aspect):
    model, processor = tiny_model(tower="clip_vision_model", tiles=TILES)
    set_resolution(model, processor, aspect=aspect)
    image = picture(50, 190)
    found = processor.image_processor([image], return_tensors="pt", do_normalize=False)["pixel_values"][0]
    if aspect == "pad":
        background = tuple(int(channel * 255) for channel in processor.image_processor.image_mean)
        square = Image.new("RGB", (190, 63), background)
        square.paste(image, (0, (63 - 50) // 2))
        image = square
    expected = np.asarray(image.resize((192, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    assert np.abs(found.numpy() - expected).max() < 1e-6
    tall = processor.image_processor([picture(190, 50)], return_tensors="pt")
    assert tall["image_sizes"].tolist() == [[192, 64]]


@pytest.mark.parametrize(
    "options",
    [
        {"tower": "clip_vision_model"},
        {"tower": "siglip_vision_model", "tiles": {**TILES, "global": False}},
        {"tower": "dinov2", "merge": 2},
        {"fusion": "token"},
        {"fusion": "gated", "views": {"read": {"features": ["davit", "ocr"]}}},
    ],
)
def test_processor_and_model_count_the_same_tokens_and_a_batch_answers_as_its_parts(options):
    model, processor = tiny_model(**{"tiles": TILES, **options})
    chats = [chat(picture(*size)) for size in SIZES]
    inputs = prompt(processor, chats, padding=True)
    counts = [processor.image_tokens(*size) for size in SIZES]
    assert len(set(counts)) > 2
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == counts
    canvases = [processor.image_processor.output_size(*size) for size in SIZES]
    assert inputs["image_sizes"].tolist() == [list(size) for size in canvases]
    assert [model.num_image_tokens(*size) for size in canvases] == counts
    hook = processor._get_num_multimodal_tokens(SIZES)
    assert list(hook["num_image_tokens"]) == counts
    assert [count_flops(model.config, *size).image_tokens for size in canvases] == counts
    together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, one in zip(together, chats, strict=True):
        alone = prompt(processor, one)
        said = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert row[: len(said)].tolist() == said.tolist()


def test_the_tower_costs_one_pass_for_each_tile_and_the_global_view():
    model, _ = tiny_model(tower="clip_vision_model", tiles=TILES)
    one, four = (count_flops(model.config, *size) for size in [(64, 64), (128, 128)])
    assert four.tower_per_image == pytest.approx(5 * one.tower_per_image)
    assert four.image_tokens == 5 * 4 + 4


def test_pixels_of_a_step_count_the_global_view():
    sizes = torch.tensor([[64, 64], [64, 192]])
    batch = {"pixel_values": torch.zeros(2, 3, 64, 192), "image_sizes": sizes}
    assert count_pixels(batch) == 4 * 64 * 64
    assert count_pixels(batch, overview=overview_pixels(tiny_model(tiles=TILES)[0].config)) == 5 * 64 * 64
    assert overview_pixels(tiny_model()[0].config) == 0


def test_row_ends_learn_and_take_part_without_tiles():
    model, processor = tiny_model(tower="clip_vision_model", tiles=TILES)
    model.train()
    for size, learns in [((64, 64), False), ((128, 128), True)]:
        model.zero_grad()
        pixels = processor.image_processor([picture(*size)], return_tensors="pt")
        model.get_image_features(**pixels).pooler_output.square().sum().backward()
        gradient = model.model.row_end.vector.grad
        assert gradient is not None
        assert bool(gradient.any()) == learns
    names = [name for name, _ in model.part_parameters("projector")]
    assert "model.row_end.vector" in names


# ---------------------------------------------------------------- saved models, other settings


def test_saved_models_with_and_without_tiles(tmp_path):
    plain, processor = tiny_model(tower="clip_vision_model")
    plain.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    assert "tiles" not in json.loads((tmp_path / "plain" / "config.json").read_text()) or plain.config.tiles is None
    again, old_processor = load_model(tmp_path / "plain")
    assert again.model.row_end is None
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert "tiles" not in resolution_settings(again, old_processor)
    grown, twin = (
        FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / "plain", tiles=TILES) for _ in range(2)
    )
    assert torch.equal(grown.model.row_end.vector, twin.model.row_end.vector)
    with pytest.raises(ValueError, match=r"tiles\.max must be a number of tiles of at least 1"):
        load_model(tmp_path / "plain", tiles={"max": 0})
    with pytest.raises(ValueError, match=r"unknown feature 'lst'\. Did you mean 'last'"):
        load_model(tmp_path / "plain", views={"a": {"features": ["lst"]}})
    assert load_model(tmp_path / "plain", tiles={"max": 2})[0].config.tiles["global"] is True
    assert float(grown.model.row_end.vector.detach().std()) == pytest.approx(48**-0.5, rel=0.4)
    grown.model.row_end.vector.data += 1
    grown.save_pretrained(tmp_path / "tiles")
    tiny_processor(grown.config).save_pretrained(tmp_path / "tiles")
    loaded, processor = load_model(tmp_path / "tiles")
    assert torch.equal(loaded.model.row_end.vector, grown.model.row_end.vector)
    assert loaded.config.tiles == processor.image_processor.tiles == TILES
    assert processor.image_tokens(200, 200) == loaded.num_image_tokens(128, 128)


def test_fewer_tiles_for_a_trained_model():
    model, processor = tiny_model(tower="clip_vision_model", tiles=TILES)
    set_resolution(model, processor, tiles=1)
    assert processor.image_tokens(200, 200) == 4
    assert resolution_settings(model, processor)["tiles"]["max"] == 1
    set_resolution(model, processor, tiles=9)
    assert processor.image_tokens(200, 200) == 9 * 4 + 4 + 6
    flexible, processor = tiny_model(tower="dinov2", tiles=TILES)
    set_resolution(flexible, processor, image_size=96)
    assert flexible.config.tiles["size"] == 96
    assert processor.image_tokens(192, 192) == flexible.num_image_tokens(192, 192) == 5 * 9 + 6


def test_features_for_analysis_are_those_of_one_tile():
    model, processor = tiny_model(tower="clip_vision_model", tiles=TILES)
    found = tower_features(model, processor, [picture(200, 200), picture(64, 300)])
    assert found["last"].shape == (2, 4, 32)


def test_the_authors_layout_has_no_tiles():
    model, processor = tiny_model(tiles=TILES)
    with pytest.raises(ValueError, match=r"tiles, up to 4 \(theirs: none\)"):
        check_expressible(model.config, processor.image_processor.to_dict())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (4, "must be a mapping"),
        ({}, "tiles.max must be a number of tiles of at least 1, found None"),
        ({"max": 0}, "at least 1, found 0"),
        ({"max": 2.5}, "at least 1, found 2.5"),
        ({"max": 4, "globl": True}, "unknown key 'globl'. Did you mean 'global'"),
        ({"max": 4, "global": "yes"}, "tiles.global must be true or false"),
        ({"max": 4, "size": 0}, "tiles.size must be pixels"),
    ],
)
def test_bad_tiles(tiles, message):
    with pytest.raises(ValueError, match=message):
        check_tiles(tiles)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_token": "all"}, "cannot be combined with mean_token='all'"),
        ({"views": {"glance": {"size": 32}}}, r"leave out the size of \['glance'\]"),
    ],
)
def test_what_cannot_be_combined_with_tiles(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(tiles=TILES, **options)


def test_resolutions_that_tiles_refuse():
    model, processor = tiny_model(tower="clip_vision_model", tiles=TILES)
    for settings_, message in [
        ({"aspect": "native"}, "'native' cannot be combined with tiles"),
        ({"token_budget": 5}, "token budget is for the aspect 'native'"),
        ({"image_size": 96}, "accepts only 64x64"),
        ({"tiles": 400}, "takes 2404 tokens, but the LLM's context has 1024: choose a smaller size, or fewer tiles"),
    ]:
        changed = copy.deepcopy(model), copy.deepcopy(processor)
        with pytest.raises(ValueError, match=message):
            set_resolution(*changed, **settings_)
    with pytest.raises(ValueError, match="this model has no tiles"):
        set_resolution(*tiny_model(), tiles=4)
    for count in (model.num_image_tokens, processor.num_image_tokens):
        with pytest.raises(ValueError, match="96x64 pixels is not a grid of tiles of 64x64"):
            count(96, 64)
    with pytest.raises(ValueError, match="the size of the tiles is unknown"):
        Canvas.of(check_tiles({"max": 4}), 64, 64)
    with pytest.raises(ValueError, match="tiles have 64 pixels per side, but images are of 32x32"):
        processor.image_processor([picture(64, 64)], size={"height": 32, "width": 32})


def test_a_prompt_beyond_the_context_is_named():
    _, processor = tiny_model(tower="clip_vision_model", tiles=TILES)
    processor.context_length = 30
    assert prompt(processor, chat(picture(60, 60), "A?"))["input_ids"].shape[1] < 30
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens \(24 of images\), but the context"):
        prompt(processor, chat(picture(200, 200), "A?"))


def test_fusions_that_do_not_keep_the_grid_are_refused(monkeypatch):
    class Pooled(FUSIONS["average"]):
        def num_tokens(self, num_feature_tokens: int) -> int:
            return 1

    monkeypatch.setitem(FUSIONS._items, "pooled", Pooled)
    assert issubclass(Pooled, Fusion)
    with pytest.raises(ValueError, match="tiles need a fusion that keeps the grid, which fusion 'pooled' does not"):
        tiny_model(fusion="pooled", tiles=TILES)
