"""The warm-up brings images near their captions' word vectors and changes the projector only."""

import pytest
import torch
from PIL import Image

from florence_vl.analyze.alignment import recall_at
from florence_vl.testing import tiny_model
from florence_vl.train.warm_up import cache_features, caption_vectors, warm_up

COLOURS = ("red", "green", "blue", "black", "white", "yellow")


@pytest.fixture(scope="module")
def setting():
    model, processor = tiny_model()
    images = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    features = cache_features(model, processor, images, batch_size=4)
    return model, processor, images, features, caption_vectors(model, processor, COLOURS)


def test_cached_features_are_the_towers(setting):
    model, processor, images, features, _ = setting
    pixels = processor.image_processor(images[:2], return_tensors="pt")["pixel_values"]
    for name, value in model.model.vision_tower(pixels).items():
        torch.testing.assert_close(features[name][:2], value)
        assert len(features[name]) == len(images)


def test_caption_vector_is_the_mean_of_its_words(setting):
    model, processor, _, _, targets = setting
    ids = processor.tokenizer(" red", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(targets[0], model.get_input_embeddings().weight[ids].mean(0))


def test_images_find_their_captions_and_nothing_else_changes(setting):
    model, _, _, features, targets = setting
    model.set_trainable(tower=False, projector=False, llm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = warm_up(model, features, targets, seconds=60, steps=60, lr=3e-3)
    assert len(rows) == 60
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert not any(parameter.requires_grad for _, parameter in model.part_parameters("projector"))
    with torch.no_grad():
        pooled = model.model.multi_modal_projector(model.model.fusion(features)).mean(1)
    centre = targets.mean(0)
    vision, text = (torch.nn.functional.normalize(value - centre, dim=-1) for value in (pooled, targets))
    assert recall_at(vision, text, None, ks=(1,))[1] == 1.0
    # image tokens get the size of word vectors
    assert 0.5 < pooled.norm(dim=-1).mean() / targets.norm(dim=-1).mean() < 2


def test_time_ends_the_warm_up_after_one_step_at_least(setting):
    model, _, _, features, targets = setting
    assert len(warm_up(model, features, targets, seconds=1e-9)) == 1
