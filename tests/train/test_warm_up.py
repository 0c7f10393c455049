"""The warm-up moves image tokens toward their captions' word vectors and changes only the projector."""

import itertools

import pytest
import torch
from PIL import Image

from florence_vl.analyze.alignment import recall_at
from florence_vl.model.features import tower_features
from florence_vl.model.tiny import tiny_model
from florence_vl.train.warm_up import parse_regions, region_phrases, text_tokens, text_vectors, tokens_in_boxes, warm_up

COLOURS = ("red", "green", "blue", "black", "white", "yellow")


def vectors(model, processor, texts):
    return text_vectors(model, [text_tokens(processor.tokenizer, text) for text in texts])


@pytest.fixture(scope="module")
def setting():
    model, processor = tiny_model()
    images = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    features = tower_features(model, processor, images, batch_size=4)
    return model, processor, images, features, vectors(model, processor, COLOURS)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_find_their_captions_and_nothing_else_changes(setting, dtype):
    model, _, _, features, targets = setting
    model.set_trainable(tower=False, projector=False, llm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = warm_up(model, features, targets, steps=60, lr=3e-3, dtype=dtype)
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


def test_regions_are_read_from_florence2s_format():
    answer = (
        "two dogs<loc_0><loc_111><loc_999><loc_222>EXIT<loc_0><loc_0><loc_333><loc_0><loc_333><loc_999><loc_0><loc_999>"
    )
    (dogs, corners), (exit_, quad) = parse_regions(answer)
    assert (dogs, exit_) == ("two dogs", "EXIT")
    assert corners == [(0, pytest.approx(1 / 9)), (1, pytest.approx(2 / 9))]
    assert quad == [(0, 0), (pytest.approx(1 / 3), 0), (pytest.approx(1 / 3), 1), (0, 1)]
    assert parse_regions("no regions here") == []


def test_each_token_of_written_text_has_its_part_of_the_line(setting):
    processor = setting[1]
    tokenizer = processor.tokenizer
    line = [(0.2, 0.1), (0.8, 0.4), (0.8, 0.6), (0.2, 0.3)]  # descends to the right
    phrases = region_phrases(tokenizer, "red blue", line, image=3)
    assert tokenizer.decode([token for phrase in phrases for token in phrase.tokens]) == "red blue"
    assert len(phrases) > 1
    assert {phrase.image for phrase in phrases} == {3}
    for before, after in itertools.pairwise(phrases):
        assert before.box[2] == pytest.approx(after.box[0])  # in order of reading, without gaps
        assert before.box[1] < after.box[1]
    assert phrases[0].box[:2] == pytest.approx((0.2, 0.1))
    assert phrases[-1].box[2:] == pytest.approx((0.8, 0.6))
    (whole,) = region_phrases(tokenizer, "red blue", [(0.2, 0.1), (0.8, 0.6)], image=0)  # an object
    assert whole.box == (0.2, 0.1, 0.8, 0.6)
    assert whole.tokens == text_tokens(tokenizer, "red blue")


def test_a_trained_projector_is_not_standardized(setting):
    model, _, _, features, targets = setting
    first = model.model.multi_modal_projector.layers[0]
    before = first.weight.detach().clone()
    warm_up(model, features, targets, steps=1, lr=0.0, new=False)
    assert torch.equal(first.weight, before)
    warm_up(model, features, targets, steps=1, lr=0.0)
    assert not torch.equal(first.weight, before)


def test_tokens_in_boxes():
    quarter, sliver, whole = (0.0, 0.0, 0.5, 0.5), (0.55, 0.05, 0.56, 0.06), (0.0, 0.0, 1.0, 1.0)
    inside = tokens_in_boxes([quarter, sliver, whole], (4, 4), 16).view(3, 4, 4)
    assert inside[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert inside[1].nonzero().tolist() == [[0, 2]]
    assert inside[2].all()
    assert torch.equal(tokens_in_boxes([quarter], (4, 4), 48).view(3, 16), inside[:1].view(1, 16).expand(3, 16))
    with pytest.raises(ValueError, match="17 tokens, grid of 4 x 4"):
        tokens_in_boxes([quarter], (4, 4), 17)


def test_regions_teach_what_lies_where():
    """Two colors side by side: each half's tokens learn to name their own color, which captions alone cannot teach."""
    model, processor = tiny_model()
    images, texts, shown, boxes = [], [], [], []
    for left in COLOURS:
        for right in COLOURS:
            image = Image.new("RGB", (64, 64), left)
            image.paste(Image.new("RGB", (32, 64), right), (32, 0))
            texts += [left, right]
            shown += [len(images)] * 2
            boxes += [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
            images.append(image)
    features = tower_features(model, processor, images)
    targets = vectors(model, processor, texts)
    inside = tokens_in_boxes(boxes, model.model.vision_tower.grid_size(64, 64), model.num_image_tokens(64, 64))
    rows = warm_up(model, features, targets, torch.tensor(shown), inside, steps=150, batch_size=48, lr=3e-3)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    with torch.no_grad():
        tokens = model.model.multi_modal_projector(model.model.fusion(features))[torch.tensor(shown)]
    pooled = torch.einsum("pn,pnh->ph", inside / inside.sum(1, keepdim=True), tokens)
    known = vectors(model, processor, COLOURS)
    nearest = torch.nn.functional.cosine_similarity(
        pooled[:, None] - known.mean(0), known[None] - known.mean(0), dim=-1
    ).argmax(1)
    right = sum(COLOURS[int(n)] == text for n, text in zip(nearest, texts, strict=True))
    assert right > 0.8 * len(texts)
