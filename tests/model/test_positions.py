"""Image sizes other than the training size: resampled positions, batches of mixed sizes."""

import pytest
import torch

from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.tiny import TINY_IMAGE_TOKEN_ID, tiny_config, tiny_model


def resampled(model, grid, **overrides):
    """The same weights with positions resampled from `grid`."""
    config = tiny_config(positions="resampled", position_grid=list(grid), **overrides)
    other = FlorenceVLForConditionalGeneration(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("mean_token", ["grid", "all", "grid_before_encoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_trained_size_resampled_positions_are_the_identity(mean_token, dtype):
    model, _ = tiny_model(mean_token=mean_token)
    other = resampled(model, (2, 3), mean_token=mean_token).to(dtype)
    pixels = torch.randn(2, 3, 64, 96, dtype=dtype)
    expected = model.to(dtype).model.vision_tower(pixels)
    found = other.model.vision_tower(pixels)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_prompts_stay_where_they_were_trained():
    """With constant image positions and zero image tokens, only the prompts' positions could differ between sizes."""
    model, _ = tiny_model()
    tower = resampled(model, (2, 2)).model.vision_tower
    positions = tower.encoder.embed_positions
    offset, prefix, prompt = positions.offset, 1, tower.prompt_ids.shape[1]
    for grid in [(2, 2), (4, 2), (3, 5)]:
        table = positions(grid=grid, trained=(2, 2), num_prefix=prefix, num_prompt=prompt)
        assert table.shape[0] == prefix + grid[0] * grid[1] + prompt
        assert torch.equal(table[:prefix], positions.weight[offset : offset + prefix])
        start = offset + prefix + 4
        assert torch.equal(table[-prompt:], positions.weight[start : start + prompt])


def test_resampling_is_linear_in_rows_and_columns():
    model, _ = tiny_model()
    tower = resampled(model, (2, 2)).model.vision_tower
    positions = tower.encoder.embed_positions
    with torch.no_grad():
        top, bottom = torch.zeros(32), torch.ones(32)
        positions.weight[positions.offset : positions.offset + 4] = torch.stack([top, top, bottom, bottom])
    table = positions(grid=(4, 3), trained=(2, 2)).view(4, 3, 32)
    expected = torch.tensor([0.0, 0.25, 0.75, 1.0]).view(4, 1, 1).expand(4, 3, 32)
    torch.testing.assert_close(table, expected)


def test_no_size_limit_with_resampled_positions():
    model, _ = tiny_model()
    with pytest.raises(ValueError, match="positions='resampled'"):
        model.num_image_tokens(64, 640)
    other = resampled(model, (2, 2))
    assert other.num_image_tokens(64, 640) == 40
    assert other.model.vision_tower(torch.randn(1, 3, 64, 640))["ocr"].shape == (1, 40, 32)


@pytest.mark.parametrize("positions", ["absolute", "resampled"])
def test_new_prompts_are_checked_before_the_encoder_runs(positions):
    config = tiny_config(positions=positions, position_grid=[2, 2])
    tower = FlorenceVLForConditionalGeneration(config).eval().model.vision_tower
    text = config.vision_config.text_config
    room = text.max_position_embeddings - 5  # the mean token and 2x2
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert tower.prompt_features(pixels, [[5] * room])[0].shape == (1, 4, 32)
        with pytest.raises(
            ValueError, match=rf"takes 5 positions and the longest prompt {room + 1}.*horten the prompts"
        ):
            tower.prompt_features(pixels, [[5], [5] * (room + 1)])
        for token in (-1, text.vocab_size):
            with pytest.raises(ValueError, match=r"ids outside \[0, .*own tokenizer"):
                tower.prompt_features(pixels, [[token]])


def test_absolute_positions_warn_of_another_size(caplog, monkeypatch):
    from transformers.utils import logging

    config = tiny_config(position_grid=[2, 2])
    tower = FlorenceVLForConditionalGeneration(config).eval().model.vision_tower
    heard = []
    monkeypatch.setattr(logging.get_logger("florence_vl.model.towers.florence2"), "warning_once", heard.append)
    tower(torch.randn(1, 3, 64, 64))
    assert heard == []
    tower(torch.randn(1, 3, 64, 96))
    assert len(heard) == 1
    assert "2x3" in heard[0]
    assert "positions='resampled'" in heard[0]


def test_a_grid_beyond_the_tables_is_refused():
    with pytest.raises(ValueError, match="position_grid is 24x24"):
        tiny_config(positions="resampled")


def mixed_batch(model):
    """Three images of two sizes in one tensor, and prompts with their placeholders."""
    sizes = torch.tensor([[64, 64], [32, 96], [64, 64]])
    pixels = torch.zeros(3, 3, 64, 96)
    images = []
    for index, (height, width) in enumerate(sizes.tolist()):
        images.append(torch.randn(1, 3, height, width))
        pixels[index, :, :height, :width] = images[-1][0]
    counts = [model.num_image_tokens(*size) for size in sizes.tolist()]
    rows = [[TINY_IMAGE_TOKEN_ID] * count + [7, 8, 9] for count in counts]
    return sizes, pixels, images, rows


def test_a_batch_of_mixed_sizes_equals_single_images():
    model, _ = tiny_model(positions="resampled", position_grid=[2, 2])
    sizes, pixels, images, rows = mixed_batch(model)
    ids_BL = torch.tensor([[token for row in rows for token in row]])
    features = model.get_image_features(pixels, image_sizes=sizes)
    for image, found in zip(images, features.pooler_output, strict=True):
        torch.testing.assert_close(found, model.get_image_features(image).pooler_output[0])
    logits = model(input_ids=ids_BL, pixel_values=pixels, image_sizes=sizes).logits
    alone = [model.get_image_features(image).pooler_output[0] for image in images]
    given = model(
        input_ids=ids_BL,
        mm_encoder_outputs={"image": type(features)(pooler_output=alone)},
    ).logits
    torch.testing.assert_close(logits, given)


def test_generate_takes_image_sizes():
    model, _ = tiny_model(positions="resampled", position_grid=[2, 2])
    sizes, pixels, images, rows = mixed_batch(model)
    together = model.generate(
        input_ids=torch.tensor([rows[1]]),
        pixel_values=pixels[1:2],
        image_sizes=sizes[1:2],
        max_new_tokens=4,
        do_sample=False,
    )
    alone = model.generate(input_ids=torch.tensor([rows[1]]), pixel_values=images[1], max_new_tokens=4, do_sample=False)
    assert together.tolist() == alone.tolist()


@pytest.mark.parametrize("sizes", [[[64, 64]], [[64, 64], [64, 97]]])
def test_sizes_that_do_not_fit_are_refused(sizes):
    model, _ = tiny_model()
    with pytest.raises(ValueError, match="image_sizes"):
        model.get_image_features(torch.randn(2, 3, 64, 96), image_sizes=torch.tensor(sizes))
