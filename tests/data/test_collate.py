"""Padded and packed batches give the same logits and losses as single samples."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from florence_vl.data.collate import FlorenceVLCollator, PackedCollator, PaddedCollator
from florence_vl.data.encode import RecordEncoder, Sample
from florence_vl.data.records import BadRecord, Record
from florence_vl.model.tiny import tiny_model


def sample(length, seed=0, images=0, side=4):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (length,), generator=generator)
    labels = torch.where(torch.arange(length) < length // 2, -100, ids)
    pixels = torch.randn(images, 3, side, side, generator=generator) if images else None
    return Sample(ids, labels, pixels, id=str(seed), source="s")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def records(*image_counts):
    rng = np.random.default_rng(0)
    result = []
    for index, count in enumerate(image_counts):
        pictures = [Image.fromarray(rng.integers(0, 256, (20, 30 + index, 3), dtype=np.uint8)) for _ in range(count)]
        content = [{"type": "image"}] * count + [{"type": "text", "text": "What is it?" * (index + 1)}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Answer {index}."}]
        result.append(Record(str(index), "s", messages, pictures))
    return result


# ---------------------------------------------------------------- padded


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(llama, side):
    samples = [sample(7, 1), sample(12, 2), sample(3, 3)]
    batch = PaddedCollator(pad_token_id=0, padding_side=side, pad_to_multiple_of=8)(samples)
    assert batch["input_ids"].shape == (3, 16)
    assert "pixel_values" not in batch
    for row, one in enumerate(samples):
        inside = batch["attention_mask"][row].bool()
        assert int(inside.sum()) == len(one)
        assert batch["input_ids"][row][inside].tolist() == one.input_ids.tolist()
        assert batch["labels"][row][inside].tolist() == one.labels.tolist()
        assert (batch["labels"][row][~inside] == -100).all()
        assert inside[0 if side == "right" else -1]
    if side == "right":
        logits = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, one in enumerate(samples):
            torch.testing.assert_close(logits[row, : len(one)], llama(one.input_ids[None]).logits[0], atol=1e-5, rtol=0)


def test_images_are_in_reading_order():
    samples = [sample(5, 1, images=2), sample(6, 2), sample(4, 3, images=1)]
    expected = torch.cat([samples[0].pixel_values, samples[2].pixel_values])
    assert torch.equal(PaddedCollator(0)(samples)["pixel_values"], expected)
    assert torch.equal(PackedCollator(0, max_length=9)(samples)["pixel_values"], expected)
    rows = [[samples[2], samples[1]], [samples[0]]]
    expected = torch.cat([samples[2].pixel_values, samples[0].pixel_values])
    assert torch.equal(PackedCollator(0)(rows)["pixel_values"], expected)


def test_images_of_different_sizes_stand_in_the_top_left_corner():
    small, large = sample(5, 1, images=2), sample(5, 2, images=1, side=8)
    batch = PaddedCollator(0)([small, large])
    assert batch["image_sizes"].tolist() == [[4, 4], [4, 4], [8, 8]]
    assert torch.equal(batch["pixel_values"][:2, :, :4, :4], small.pixel_values)
    assert torch.equal(batch["pixel_values"][2:], large.pixel_values)
    assert not batch["pixel_values"][:2, :, 4:].any()
    assert not batch["pixel_values"][:2, :, :, 4:].any()


# ---------------------------------------------------------------- packed


def test_packed_layout():
    rows = [[sample(3, 1), sample(4, 2)], [sample(5, 3)]]
    batch = PackedCollator(0, max_length=10, pad_to_max_length=True)(rows)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert batch["input_ids"].shape == (2, 10)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert batch["input_ids"][0, 3:7].tolist() == rows[0][1].input_ids.tolist()
    assert batch["labels"][0, 5:7].tolist() == rows[0][1].labels[2:].tolist()
    assert (batch["labels"][0, 7:] == -100).all()


def test_flat_lists_fill_rows_in_order():
    samples = [sample(n, n) for n in (4, 5, 3, 8, 1)]
    batch = PackedCollator(0, max_length=10)(samples)
    rows = [[samples[0], samples[1]], [samples[2]], [samples[3], samples[4]]]
    expected = PackedCollator(0)(rows)
    assert batch["input_ids"].shape == (3, 9)
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_are_those_of_single_samples(llama, attention):
    llama.set_attn_implementation(attention)
    rows = [[sample(7, 1), sample(12, 2), sample(3, 3)], [sample(9, 4), sample(5, 5)]]
    batch = PackedCollator(0, max_length=32)(rows)
    logits = llama(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    for row, samples in enumerate(rows):
        start = 0
        for one in samples:
            alone = llama(one.input_ids[None]).logits[0]
            torch.testing.assert_close(logits[row, start : start + len(one)], alone, atol=1e-5, rtol=0)
            start += len(one)


def test_packed_loss_is_the_mean_over_all_targets(llama):
    samples = [sample(7, 1), sample(12, 2), sample(3, 3)]
    batch = PackedCollator(0, max_length=32)(samples)
    targets = [int((one.labels[1:] != -100).sum()) for one in samples]
    assert int((batch["labels"][:, 1:] != -100).sum()) == sum(targets)
    alone = sum(
        llama(one.input_ids[None], labels=one.labels[None]).loss * n for one, n in zip(samples, targets, strict=True)
    )
    together = llama(**batch, use_cache=False).loss
    torch.testing.assert_close(together, alone / sum(targets), atol=1e-5, rtol=0)


def test_the_shift_never_crosses_samples():
    first = sample(3, 1)
    everything = Sample(torch.tensor([7, 8, 9]), torch.tensor([7, 8, 9]))  # even its first token is labelled
    batch = PackedCollator(0)([[first, everything]])
    assert batch["labels"][0, 3:].tolist() == [-100, 8, 9]
    padded = PaddedCollator(0, padding_side="left")([sample(5, 2), everything])
    assert padded["labels"][1].tolist() == [-100, -100, -100, 8, 9]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedCollator(0)([sample(3)]), "needs max_length"),
        (lambda: PackedCollator(0, max_length=5)([sample(6)]), "6 tokens, more than max_length=5"),
        (lambda: PackedCollator(0, max_length=5)([[sample(3), sample(3)]]), "6 tokens, more than max_length=5"),
        (lambda: PackedCollator(0, pad_to_max_length=True), "needs max_length"),
        (lambda: PackedCollator(0, max_length=5)([]), "at least one"),
        (lambda: PaddedCollator(0)([]), "at least one"),
        (lambda: PaddedCollator(None), "no pad token"),
        (lambda: PaddedCollator(0, padding_side="top"), "left"),
    ],
)
def test_wrong_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- with images, through the model


def test_packed_and_padded_images_through_the_model(tiny):
    model, processor = tiny
    samples = [RecordEncoder(processor)(record) for record in records(1, 0, 2)]
    pad = processor.tokenizer.pad_token_id
    with torch.no_grad():
        alone = [model(input_ids=s.input_ids[None], pixel_values=s.pixel_values).logits[0] for s in samples]
        padded = model(**PaddedCollator(pad)(samples)).logits
        packed = model(**PackedCollator(pad, max_length=400)(samples), use_cache=False).logits[0]
    for row, logits in enumerate(alone):
        torch.testing.assert_close(padded[row, : len(logits)], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- raw records, for other trainers


def test_collator_of_raw_records(tiny):
    model, processor = tiny
    encode = RecordEncoder(processor)
    raw = records(1, 0, 2)
    batch = FlorenceVLCollator(encode)(raw)
    expected = PaddedCollator(processor.tokenizer.pad_token_id)([encode(record) for record in raw])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert model(**batch).loss.isfinite()


def test_collator_of_table_rows(tiny):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    _, processor = tiny
    raw = records(1, 2)
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(messages=List({"role": Value("string"), "content": List(part)}), images=List(ImageFeature()))
    rows = [
        {
            "messages": [
                {"role": m["role"], "content": [{"text": None, **p} for p in _parts(m)]} for m in record.messages
            ],
            "images": record.images,
        }
        for record in raw
    ]
    table = Dataset.from_list(rows, features=features)
    collate = FlorenceVLCollator(RecordEncoder(processor))
    expected = collate(raw)
    for got in (
        collate([table[0], table[1]]),
        collate([*table.cast_column("images", List(ImageFeature(decode=False)))]),
    ):
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    inline = [
        {"messages": [{"role": m["role"], "content": _with_images(m, record.images)} for m in record.messages]}
        for record in raw
    ]
    got = collate(inline)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def _parts(message):
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _with_images(message, images):
    left = iter(images)
    return [{"type": "image", "image": next(left)} if p["type"] == "image" else p for p in _parts(message)]


def test_bad_rows_raise_or_are_reported(tiny):
    _, processor = tiny
    good = records(1)[0]
    bad = Record("x", "s", good.messages, [b"broken"])
    with pytest.raises(BadRecord, match="record 'x'"):
        FlorenceVLCollator(RecordEncoder(processor))([good, bad])
    seen = []
    collate = FlorenceVLCollator(RecordEncoder(processor), on_bad=seen.append)
    assert len(collate([bad, good])["input_ids"]) == 1
    assert [error.kind for error in seen] == ["image"]
    with pytest.raises(BadRecord, match="all 2 rows"):
        collate([bad, bad])
    with pytest.raises(BadRecord, match="no 'messages'"):
        FlorenceVLCollator(RecordEncoder(processor))([{"text": "hello"}])
