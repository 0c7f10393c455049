"""Attribution: blocks of the projector's first layer, and the likelihood of the answer without a feature."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from florence_vl.analyze.attribution import attribute, attribution_figure, first_layer_norms
from florence_vl.model.tiny import tiny_model

QUESTION, ANSWER = "What is shown in the image?", "a red car"


@pytest.fixture(scope="module")
def picture():
    pixels = torch.randint(0, 256, (50, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_norms_are_those_of_the_column_blocks():
    model, _ = tiny_model(projector_depth=3)
    features = model.model.vision_tower(torch.randn(1, 3, 64, 64))
    weight = model.model.multi_modal_projector.layers[0].weight
    with torch.no_grad():
        norms = first_layer_norms(model, features)
        for index, (name, x) in enumerate(features.items()):
            block = weight[:, 32 * index : 32 * (index + 1)]
            torch.testing.assert_close(norms[name], (x[0] @ block.T).norm(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["channel", "token", "average"])
def test_a_feature_that_the_projector_ignores_contributes_nothing(picture, fusion):
    model, processor = tiny_model(fusion=fusion)
    inner = model.model
    with torch.no_grad():
        inner.multi_modal_projector.layers[0].weight.mul_(20)
        if fusion == "channel":
            inner.multi_modal_projector.layers[0].weight[:, 32:64] = 0
    result = attribute(model, processor, picture, QUESTION, ANSWER)
    by_name = {feature.name: feature for feature in result.features}
    assert sum(feature.share for feature in result.features) == pytest.approx(1, abs=1e-5)
    assert all(feature.map_HW.shape == (2, 2) for feature in result.features)
    total = sum(feature.map_HW for feature in result.features)
    torch.testing.assert_close(torch.from_numpy(total), torch.ones(2, 2))
    if fusion == "channel":
        assert by_name["caption"].share == 0
        assert by_name["caption"].drop == pytest.approx(0, abs=1e-4)
        assert abs(by_name["davit"].drop) > 1e-4


def test_merged_tokens_have_a_smaller_map(picture):
    model, processor = tiny_model(merge=2)
    result = attribute(model, processor, picture, QUESTION, ANSWER)
    assert all(feature.map_HW.shape == (1, 1) for feature in result.features)
    assert sum(feature.share for feature in result.features) == pytest.approx(1, abs=1e-5)


def test_likelihood_is_the_models_own(picture):
    model, processor = tiny_model()
    result = attribute(model, processor, picture, QUESTION, ANSWER)
    from florence_vl.data.encode import RecordEncoder
    from florence_vl.data.records import Record, image_part, text_part

    messages = [
        {"role": "user", "content": [image_part(), text_part(QUESTION)]},
        {"role": "assistant", "content": [text_part(ANSWER)]},
    ]
    sample = RecordEncoder(processor)(Record("r", "s", messages, [picture]))
    ids, labels = (torch.as_tensor(x)[None] for x in (sample.input_ids, sample.labels))
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=sample.pixel_values).logits[0, :-1].log_softmax(-1)
    wanted = labels[0, 1:]
    expected = logits[wanted != -100].gather(1, wanted[wanted != -100][:, None]).sum()
    assert result.log_likelihood == pytest.approx(float(expected), rel=1e-4)
    assert result.tokens == int((wanted != -100).sum())
    assert not result.generated


def test_zero_and_mean_replace_differently_and_the_model_can_answer_itself(picture):
    model, processor = tiny_model()
    with torch.no_grad():
        model.model.multi_modal_projector.layers[0].weight.mul_(20)
    zero = attribute(model, processor, picture, QUESTION, ANSWER, replacement="zero")
    mean = attribute(model, processor, picture, QUESTION, ANSWER, replacement="mean")
    assert zero.log_likelihood == pytest.approx(mean.log_likelihood)
    assert zero.features[0].drop != mean.features[0].drop
    own = attribute(model, processor, picture, QUESTION, max_new_tokens=4)
    assert own.generated
    assert own.answer
    figure = attribution_figure(picture, own)
    assert sum(ax.get_title().endswith("%") for ax in figure.axes) == 4


def test_bad_input(picture):
    model, processor = tiny_model()
    with pytest.raises(ValueError, match="Did you mean 'zero'"):
        attribute(model, processor, picture, QUESTION, ANSWER, replacement="zeros")
    with pytest.raises(ValueError, match="answer is empty"):
        attribute(model, processor, picture, QUESTION, "  ")
    single, processor = tiny_model(features=["davit"])
    with pytest.raises(ValueError, match="one feature"):
        attribute(single, processor, picture, QUESTION, ANSWER)
