"""The cache of pooled features: one pass, runs never mix, resume; text features; pairs from data sets."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from florence_vl.analyze.alignment import AlignmentConfig, split_pairs
from florence_vl.analyze.compare import collect, compare, default_width, feature_subsets
from florence_vl.analyze.encoders import load_encoder
from florence_vl.analyze.pairs import read_pairs
from florence_vl.analyze.plots import save_figure
from florence_vl.analyze.pooling import image_key, pool_images
from florence_vl.analyze.text import TextEncoder, pool_texts
from florence_vl.model.features import FeatureStore


@pytest.fixture
def encoder(tiny_weights):
    weights, _, _ = tiny_weights("dinov2_small")
    return load_encoder(f"dinov2_small={weights}:layer1+last@32")


@pytest.fixture
def llm():
    from transformers import LlamaConfig, LlamaModel

    from florence_vl.model.tiny import TINY_VOCAB_SIZE, tiny_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=TINY_VOCAB_SIZE
    )
    return TextEncoder(LlamaModel(config), tiny_tokenizer())


def test_pooled_features_are_the_mean_over_tokens(encoder, pictures, tmp_path):
    store, report = pool_images(encoder, pictures, FeatureStore(encoder.identity, tmp_path), batch_size=2)
    expected = encoder(pictures)
    assert report.computed == 3
    torch.testing.assert_close(store.matrix(report.keys, ["last"]), expected["last"].mean(1), rtol=1e-4, atol=1e-5)
    both = store.matrix(report.keys, ["layer1", "last"])
    torch.testing.assert_close(both[:, :24], expected["layer1"].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(store.matrix(report.keys[::-1], ["last"]), both[:, 24:].flip(0))


def test_a_second_run_computes_nothing_and_a_longer_one_the_rest(encoder, pictures, tmp_path, monkeypatch):
    pool_images(encoder, pictures[:2], FeatureStore(encoder.identity, tmp_path))
    calls = []
    original = encoder.encode_batch
    monkeypatch.setattr(encoder, "encode_batch", lambda x: calls.append(len(x)) or original(x))
    _, again = pool_images(encoder, pictures[:2], FeatureStore(encoder.identity, tmp_path))
    assert (again.computed, calls) == (0, [])
    _, longer = pool_images(encoder, [*pictures, pictures[0]], FeatureStore(encoder.identity, tmp_path))
    assert (longer.computed, calls) == (1, [1])


def test_another_preprocessing_is_another_cache(encoder, tiny_weights, pictures, tmp_path):
    weights, _, _ = tiny_weights("dinov2_small")
    other = load_encoder(f"dinov2_small={weights}:layer1+last@32", fit="crop")
    store, first = pool_images(encoder, pictures, FeatureStore(encoder.identity, tmp_path))
    other_store, second = pool_images(other, pictures, FeatureStore(other.identity, tmp_path))
    assert store.folder != other_store.folder
    assert second.computed == 3
    assert not torch.allclose(store.matrix(first.keys, ["last"]), other_store.matrix(second.keys, ["last"]))


def test_a_tampered_or_damaged_cache_is_refused(encoder, pictures, tmp_path):
    store, _ = pool_images(encoder, pictures, FeatureStore(encoder.identity, tmp_path))
    shard = next(store.folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{shard.name}.*delete it"):
        FeatureStore(encoder.identity, tmp_path)
    shard.unlink()
    identity = store.folder / "identity.json"
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "encoder": "another"}))
    with pytest.raises(ValueError, match="does not match the name of its folder"):
        FeatureStore(encoder.identity, tmp_path)


def test_unreadable_images_are_counted(encoder, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    sources = [pictures[0], broken, tmp_path / "absent.png", pictures[1]]
    from collections import Counter

    from florence_vl.analyze.pooling import image_keys

    problems: Counter[str] = Counter()
    keys = image_keys(sources, problems)
    assert [key is None for key in keys] == [False, False, True, False]
    _, report = pool_images(encoder, sources, FeatureStore(encoder.identity, tmp_path / "c"), keys=keys)
    assert [key is None for key in report.keys] == [False, True, True, False]
    assert report.computed == 2
    assert any("broken.png" in problem for problem in report.problems)


def test_image_key_is_of_the_content(tmp_path):
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    picture.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    picture.putpixel((0, 0), (9, 9, 9))
    picture.save(tmp_path / "c.png")
    assert image_key(tmp_path / "a.png") == image_key(str(tmp_path / "b.png"))
    assert image_key(tmp_path / "a.png") != image_key(tmp_path / "c.png")
    assert image_key((tmp_path / "a.png").read_bytes()) == image_key(tmp_path / "a.png")


def test_text_features_are_the_mean_of_the_last_layer(llm, tmp_path):
    texts = ["a red car", "people walk with a dog on the street", "tree"]
    pooled = pool_texts(llm, texts, FeatureStore(llm.identity, tmp_path), batch_size=2)
    for text, row in zip(texts, pooled, strict=True):
        ids = torch.tensor([llm.tokenizer(text)["input_ids"]])
        keep = [i for i, t in enumerate(ids[0].tolist()) if t not in llm.tokenizer.all_special_ids]
        with torch.no_grad():
            states = llm.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row, states[keep].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled, pool_texts(llm, texts, FeatureStore(llm.identity, tmp_path)))
    with pytest.raises(ValueError, match="no token"):
        llm([""])


def write_pairs(folder, captions, generator):
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for index, caption in enumerate(captions):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    return folder


def test_pairs_and_comparison_end_to_end(encoder, llm, tmp_path):
    captions = [f"picture number {i // 2 if i < 10 else i} of a car" for i in range(60)]
    data = write_pairs(tmp_path / "data", captions, torch.Generator().manual_seed(0))
    (data / "3.png").write_bytes(b"broken")
    pairs = read_pairs(data)
    assert len(pairs) == 60
    assert read_pairs(data, 7).ids == read_pairs(data, 7).ids == pairs.ids[:7]
    features = collect([("tiny", lambda: encoder)], llm, pairs, root=tmp_path / "cache")
    assert features.pairs == 59
    assert features.skipped == {"unreadable image": 1}
    assert features.duplicates["pairs with a caption that others have"] == 8
    result = compare(
        features, AlignmentConfig(steps=4), subsets=feature_subsets(["layer1", "last"]), seeds=(0, 1), width=5
    )
    assert [row.name for row in result.rows] == ["all", "minus layer1", "minus last"]
    assert [row.runs[0].width for row in result.rows] == [48, 24, 24]
    assert {row.runs[0].width for row in result.equal_width} == {5}
    few = AlignmentConfig(steps=1, heldout=0.8)
    narrow = compare(features, few, subsets=feature_subsets(["layer1", "last"]), seeds=(0, 1))
    training = min(len(split_pairs(features.groups, few, seed).train) for seed in (0, 1))
    assert {row.runs[0].width for row in narrow.equal_width} == {training // 4}
    record = json.loads(json.dumps(result.to_dict()))
    assert record["rows"][0]["difference"] is None
    assert record["rows"][1]["difference"]["runs"] == 2


def test_data_without_pairs_is_refused(tmp_path):
    with (tmp_path / "text.jsonl").open("w") as file:
        for index in range(3):
            turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
            file.write(json.dumps({"id": str(index), "conversations": turns}) + "\n")
    with pytest.raises(ValueError, match="3 have no image"):
        read_pairs(tmp_path / "text.jsonl")
    with pytest.raises(ValueError, match="positive number"):
        read_pairs(tmp_path / "text.jsonl", 0)


def test_feature_subsets():
    names = ["davit", "caption", "ocr", "grounding"]
    found = feature_subsets(names)
    assert list(found)[:2] == ["all", "minus davit"]
    assert found["minus ocr"] == ["davit", "caption", "grounding"]
    assert found["only ocr"] == ["ocr"]
    assert len(found) == 9
    assert len(feature_subsets(names, "all")) == 15
    with pytest.raises(ValueError, match="two features"):
        feature_subsets(["davit"])
    assert default_width([768, 192], 10_000) == 192
    assert default_width([768], 100) == 25


def test_figures_of_files_with_a_dot_in_the_name_stay_apart(tmp_path):
    from matplotlib.figure import Figure

    files = [file for name in ("at 10.15.30", "at 10.15.45") for file in save_figure(Figure(), tmp_path / name)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)
    assert len(set(files)) == 4


def test_features_of_an_input_may_come_from_several_shards(tmp_path):
    store = FeatureStore({"encoder": "x"}, tmp_path)
    keys = [bytes([i]) * 16 for i in range(4)]
    tables = {"a": torch.arange(8.0).view(4, 2), "b": 10 + torch.arange(4.0).view(4, 1)}
    store.add(keys[:2], {"a": tables["a"][:2]})
    store.add(keys[2:], {name: table[2:] for name, table in tables.items()})
    assert store.has(keys[3], ["a", "b"])
    assert not store.has(keys[0], ["a", "b"])
    store.flush()
    store.add(keys[:2], {"b": tables["b"][:2]})
    store.flush()
    again = FeatureStore({"encoder": "x"}, tmp_path)
    expected = torch.cat([tables["b"], tables["a"]], dim=1)
    assert torch.equal(again.matrix(keys, ["b", "a"]), expected)
    assert torch.equal(again.matrix(keys[::-1], ["b", "a"]), expected.flip(0))
    with pytest.raises(KeyError, match="is not in"):
        again.matrix([b"?" * 16], ["a"])
