"""Stored features: content of a store, separation of stores, and a tower that reads features of another run."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from florence_vl.model import features as module
from florence_vl.model.features import (
    FeatureStore,
    encode_images,
    feature_identity,
    identity_digest,
    store_features,
    tower_features,
)
from florence_vl.model.tiny import tiny_model


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def close(model):
    for stores in model.model.vision_tower.forward._stores.values():
        for store in stores.values():
            store.flush()


def test_a_stored_tower_gives_the_towers_features_and_computes_each_picture_once(tmp_path, pixels):
    model, _ = tiny_model()
    expected = model.model.vision_tower(pixels)
    keys = list(model.state_dict())
    stored = store_features(model, tmp_path)
    first = model.get_image_features(pixels[[0, 1, 0]], output_features=True).features
    assert stored.computed == 2
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value[[0, 1, 0]], rtol=1e-3, atol=1e-3)
    assert list(model.state_dict()) == keys
    close(model)

    again, _ = tiny_model()
    other = store_features(again, tmp_path)
    second = again.get_image_features(pixels, output_features=True).features
    assert other.computed == 1
    for name in expected:
        assert torch.equal(second[name][:2], first[name][:2]), "read or computed, the same bits"


def test_autocast_and_gradients_work_on_stored_features(tmp_path, pixels):
    model, _ = tiny_model()
    model.set_trainable(tower=False, projector=True, llm=False)
    stored = store_features(model, tmp_path)
    with torch.inference_mode():
        model.get_image_features(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        model.get_image_features(pixels).last_hidden_state.float().sum().backward()
        close(model)
    assert stored.computed == 6, "what was computed in another data type is another feature"
    assert model.model.multi_modal_projector.layers[0].weight.grad.abs().sum() > 0
    model.get_image_features(pixels).last_hidden_state.sum().backward()


def test_models_of_fewer_features_share_what_is_stored(tmp_path, pixels):
    model, _ = tiny_model()
    store_features(model, tmp_path)
    whole = model.model.vision_tower(pixels)
    close(model)
    fewer, _ = tiny_model(features=["caption", "davit"])
    fewer.model.vision_tower.davit.load_state_dict(model.model.vision_tower.davit.state_dict())
    fewer.model.vision_tower.image_projector.load_state_dict(model.model.vision_tower.image_projector.state_dict())
    fewer.model.vision_tower.encoder.load_state_dict(model.model.vision_tower.encoder.state_dict())
    stored = store_features(fewer, tmp_path)
    part = fewer.model.vision_tower(pixels)
    assert stored.computed == 0
    assert list(part) == ["caption", "davit"]
    assert torch.equal(part["caption"], whole["caption"])


def test_another_tower_prompt_or_size_is_never_mixed(tmp_path, pixels):
    model, _ = tiny_model()
    tower = model.model.vision_tower
    names = {identity_digest(feature_identity(tower, name)) for name in tower.feature_names}
    assert len(names) == len(tower.feature_names)
    before = {name: identity_digest(feature_identity(tower, name)) for name in tower.feature_names}
    with torch.no_grad():
        next(tower.encoder.parameters())[0, 0] += 1
    after = {name: identity_digest(feature_identity(tower, name)) for name in tower.feature_names}
    assert after["davit"] == before["davit"]
    assert after["ocr"] != before["ocr"]
    tower.config.prompt_token_ids = {**tower.config.prompt_token_ids, "ocr": [0, 5, 2]}
    assert identity_digest(feature_identity(tower, "ocr")) != after["ocr"]
    stored = store_features(model, tmp_path)
    small = torch.nn.functional.interpolate(pixels, size=(32, 32))
    assert tower(pixels)["davit"].shape != tower(small)["davit"].shape
    assert stored.stores(pixels)["davit"].folder != stored.stores(small)["davit"].folder


def test_a_tower_that_trains_is_refused(tmp_path, pixels):
    model, _ = tiny_model()
    store_features(model, tmp_path)
    model.set_trainable(tower=True, projector=True, llm=True)
    model.train()
    with pytest.raises(ValueError, match=r"parts\.tower\.train=false"):
        model.get_image_features(pixels)


def test_a_full_disk_is_one_line_and_keeps_what_was_written(tmp_path, monkeypatch):
    store = FeatureStore({"encoder": "x"}, tmp_path)
    keys = [bytes([i]) * 16 for i in range(2)]
    store.add(keys[:1], {"a": torch.ones(1, 2)})
    store.flush()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    store.add(keys[1:], {"a": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"no space left for features.*start the same command again"):
        store.flush()
    again = FeatureStore({"encoder": "x"}, tmp_path)
    assert again.has(keys[0], ["a"])
    assert not again.has(keys[1], ["a"])
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".safetensors"]


def test_a_store_of_another_identity_is_refused(tmp_path):
    store = FeatureStore({"encoder": "x"}, tmp_path)
    path = store.folder / "identity.json"
    path.write_text(json.dumps({"encoder": "y"}))
    with pytest.raises(ValueError, match="does not match the name of its folder"):
        FeatureStore({"encoder": "x"}, tmp_path)


def test_encoded_images_are_what_the_model_makes_of_their_features():
    from PIL import Image

    model, processor = tiny_model()
    pictures = [Image.new("RGB", (40, 30), (10 * i, 200, 30)) for i in range(3)]
    tokens = encode_images(model, processor, pictures)
    features = tower_features(model, processor, iter(pictures), batch_size=2)
    assert all(value.shape[0] == 3 for value in features.values())
    expected = model.model.multi_modal_projector(model.model.fusion(features))
    torch.testing.assert_close(torch.stack(tokens), expected)
