"""Images of different sizes, questions for the router, drawn views: model inputs in addition to the pixels."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from florence_vl.data import encode
from florence_vl.data.collate import PackedCollator, PaddedCollator
from florence_vl.data.encode import RecordEncoder, ViewDraws
from florence_vl.data.inspect import segments_of
from florence_vl.data.layout import BatchLayout, RowCollator, measure
from florence_vl.data.mixture import Mixture, MixtureSource
from florence_vl.data.packing import build_batches
from florence_vl.data.records import BadRecord, ImageRef, Record
from florence_vl.model.pictures import image_size
from florence_vl.model.tiny import tiny_model

SIZES = [(64, 64), (40, 150), (130, 60), (64, 64), (33, 100)]  # height, width
VIEWS = {"glance": {"size": 32, "features": ["davit"]}, "read": {"features": ["davit", "ocr"]}}


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def record(index, *sizes, question="What is it?", answer="A car.", later=None):
    content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    if later is not None:
        messages += [{"role": "user", "content": later}, {"role": "assistant", "content": answer}]
    images = [png(picture(*size, seed=10 * index + number)) for number, size in enumerate(sizes)]
    return Record(str(index), "s", messages, images)


def randomize_projector(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.part_parameters("projector"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)


TILES = {"max": 4, "global": True, "size": 64}


@pytest.fixture(scope="module", params=["native", "tiles"])
def varied(request):
    """The size of an image determines its tokens, and gates depend on the question."""
    if request.param == "native":
        return request.getfixturevalue("parts")
    model, processor = tiny_model(fusion="gated", gate={"context": "question"}, tiles=TILES)
    randomize_projector(model)
    return model, processor


@pytest.fixture(scope="module")
def parts():
    """Images keep their aspect ratio, gates depend on the question, and there are views."""
    model, processor = tiny_model(
        fusion="gated", gate={"context": "question"}, positions="resampled", position_grid=(2, 2), views=VIEWS
    )
    randomize_projector(model)
    processor.image_processor.image_aspect_ratio = "native"
    processor.image_processor.token_budget = 6
    return model, processor


@pytest.fixture(scope="module")
def records():
    return [
        record(0, SIZES[0], question="How many?"),
        record(1, question="No image here."),
        record(2, SIZES[1], SIZES[2], question="Which of the two is it, and why is it that one?"),
        record(3, SIZES[3], question=""),
        record(4, SIZES[4], question="Where is it?", later="And now?"),
    ]


def test_the_number_of_tokens_follows_each_images_own_size(varied, records):
    model, processor = varied
    sample = RecordEncoder(processor)(records[2])
    sizes = [processor.image_processor.output_size(*size) for size in SIZES[1:3]]
    assert sample.image_inputs["image_sizes"].tolist() == [list(size) for size in sizes]
    assert sizes[0] != sizes[1]
    counts = tuple(model.num_image_tokens(*size) for size in sizes)
    assert sample.image_tokens == counts
    assert int((sample.input_ids == processor.image_token_id).sum()) == sum(counts)
    shown = [segment.tokens for segment in segments_of(sample, processor) if segment.kind == "image"]
    assert shown == list(counts)


def test_measuring_reads_headers_and_decodes_nothing(varied, records, tmp_path, monkeypatch):
    encoder = RecordEncoder(varied[1])
    expected = [encoder(one) for one in records]
    data = records[4].images[0]
    (tmp_path / "shard.tar").write_bytes(b"front" + data + b"back")
    monkeypatch.setattr(encode, "open_image", None)
    for one, sample in zip(records, expected, strict=True):
        assert measure(encoder, one) == (len(sample), sample.num_images)
    member = replace(records[4], images=[ImageRef(str(tmp_path / "shard.tar"), 5, len(data))])
    assert measure(encoder, member) == (len(expected[4]), 1)


def test_headers_tell_the_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    image = picture(30, 50)
    for kind in ("PNG", "JPEG"):
        path = tmp_path / f"a.{kind.lower()}"
        image.save(path, kind, exif=exif)
        assert image_size(path) == (50, 30)
        long = ImageRef(str(path), 0, path.stat().st_size)
        assert image_size(long) == (50, 30)
    image.save(tmp_path / "b.png")
    assert image_size(tmp_path / "b.png") == (30, 50)


def test_a_header_that_lies_is_a_bad_record(varied, records, monkeypatch):
    encoder = RecordEncoder(varied[1])
    monkeypatch.setattr(encode, "image_size", lambda source: (64, 640))
    with pytest.raises(BadRecord, match="decodes to 64x64 pixels") as caught:
        encoder(records[0])
    assert caught.value.kind == "image"
    monkeypatch.undo()
    with pytest.raises(BadRecord, match="image 0 of record '0'"):
        encoder.outline(Record("0", "s", records[0].messages, [b"no image"]))


def test_batch_is_single_and_packed_is_padded(varied, records):
    model, processor = varied
    samples = [RecordEncoder(processor)(one) for one in records]
    pad = processor.tokenizer.pad_token_id
    with torch.no_grad():
        alone = [model(input_ids=s.input_ids[None], pixel_values=s.pixel_values, **s.image_inputs) for s in samples]
        padded_batch = PaddedCollator(pad)(samples)
        padded = model(**padded_batch).logits
        rows = [[samples[3], samples[1]], [samples[2], samples[0], samples[4]]]
        packed = model(**PackedCollator(pad, max_length=400)(rows), use_cache=False).logits
    assert len(set(map(tuple, padded_batch["image_sizes"].tolist()))) > 1
    assert padded_batch["question_ids"].shape[0] == len(padded_batch["pixel_values"]) == 5
    for row, one in enumerate(alone):
        torch.testing.assert_close(padded[row, : one.logits.shape[1]], one.logits[0], atol=2e-5, rtol=0)
    for row, order in enumerate(([3, 1], [2, 0, 4])):
        expected = torch.cat([alone[i].logits[0] for i in order])
        torch.testing.assert_close(packed[row, : len(expected)], expected, atol=2e-5, rtol=0)


def test_images_of_one_size_need_no_sizes(varied):
    samples = [RecordEncoder(varied[1])(record(i, (64, 64))) for i in range(2)]
    batch = PaddedCollator(0)(samples)
    assert "image_sizes" not in batch


def test_answers_and_later_turns_leave_image_tokens_unchanged(varied):
    model, processor = varied

    def tokens(**changes):
        sample = RecordEncoder(processor)(record(7, (64, 64), **changes))
        with torch.no_grad():
            return model.get_image_features(sample.pixel_values, **sample.image_inputs).pooler_output[0]

    expected = tokens()
    assert torch.equal(expected, tokens(answer="A small house on the left."))
    assert torch.equal(expected, tokens(later="What color is the dog?"))
    assert (expected - tokens(question="How many people are there?")).abs().max() > 1e-3


def test_training_sees_the_question_that_answering_sees(parts):
    _, processor = parts
    one = record(7, (64, 64), question="Is <|im_end|> an <image>?")
    sample = RecordEncoder(processor)(one)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture(64, 64, 70)}, one.messages[0]["content"][1]]}
    ]
    asked = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    for name in ("question_ids", "question_mask"):
        assert sample.image_inputs[name].tolist() == asked[name].tolist()
    start = asked["input_ids"][0].tolist()
    assert sample.input_ids[: len(start)].tolist() == start


# ---------------------------------------------------------------- drawn views


def mixture():
    class Reader:
        block = 1

        def __len__(self):
            return 30

        def __getitem__(self, index):
            return record(index, *SIZES[: index % 3], question=f"Q{index}?")

    return Mixture([MixtureSource("s", Reader(), 1.0)], "repeats", seed=5)


DRAWS = ViewDraws({"full": 1.0, "glance": 1.0, "read": 2.0}, feature_dropout=0.4, seed=3)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_rows_with_drawn_views_are_functions_of_the_step(parts, mode):
    encoder = RecordEncoder(parts[1], max_length=200, views=DRAWS, distill=True)
    layout = BatchLayout(mode=mode, tokens_per_row=200, batch_size=2, global_batch_size=4, window=16)

    def steps(world, rank, start, count):
        batches = build_batches(mixture(), encoder, layout, 3, rank, world, start)
        return [next(batches) for _ in range(count * batches.batches_per_rank)]

    whole = steps(1, 0, 0, 4)
    halves = [batch for pair in zip(steps(2, 0, 0, 4), steps(2, 1, 0, 4), strict=True) for batch in pair]
    for found in (halves, whole[:4] + steps(1, 0, 2, 2)):
        for left, right in zip(whole, found, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)
    assert any("feature_mask" in batch for batch in whole)


def test_the_processors_own_view_counts_where_none_is_drawn():
    model, processor = tiny_model(views=VIEWS)
    processor.image_processor.view = "glance"
    sample = RecordEncoder(processor)(record(0, (64, 64)))
    assert sample.image_tokens == (1,)
    assert sample.pixel_values.shape[-2:] == (32, 32)
    assert sample.image_inputs["feature_mask"].tolist() == [[1, 0, 0, 0]]
    assert model.num_image_tokens(32, 32) == 1


def test_views_are_drawn_by_seed_and_position(parts):
    _, processor = parts
    encoder = RecordEncoder(processor, views=DRAWS)
    names = [DRAWS.view(position) for position in range(4000)]
    for name, weight in DRAWS.weights.items():
        assert names.count(name) / 4000 == pytest.approx(weight / 4, abs=0.03)
    assert names != [ViewDraws(DRAWS.weights, seed=4).view(position) for position in range(4000)]
    one = record(0, (64, 64))
    glance, full = names.index("glance"), names.index("full")
    assert encoder(one, glance).image_tokens == (1,)
    assert encoder(one, glance).image_inputs["feature_mask"].tolist() == [[1, 0, 0, 0]]
    assert encoder(one, full).image_tokens == encoder(one).image_tokens == (4,)
    assert "feature_mask" not in encoder(one).image_inputs
    masks = torch.cat([encoder(one, position).image_inputs["feature_mask"] for position in range(60)])
    assert masks[:, 0].all()
    assert 0 < masks[:, 1].sum() < sum(name == "full" for name in names[:60])


def test_the_other_half_of_a_batch_holds_the_same_answers_with_all_features(parts):
    _, processor = parts
    encoder = RecordEncoder(processor, views=ViewDraws({"glance": 1.0}), distill=True)
    rows = [[encoder(record(index, (64, 64)), index) for index in range(3)]]
    batch = RowCollator(encoder, BatchLayout(tokens_per_row=400))(rows)
    full = {name.removeprefix("full."): value for name, value in batch.items() if name.startswith("full.")}
    plain = RecordEncoder(processor)
    expected = PackedCollator(0)([[plain(record(index, (64, 64))) for index in range(3)]])
    assert all(torch.equal(full[name], expected[name]) for name in expected)
    answers = [labels[labels != -100].tolist() for labels in (batch["labels"], full["labels"])]
    assert answers[0] == answers[1]
    assert batch["input_ids"].shape[1] < full["input_ids"].shape[1]
    assert measure(encoder, record(0, (64, 64)), 0)[0] == len(plain(record(0, (64, 64))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": ViewDraws({"glanse": 1.0})}, "unknown view 'glanse'.*glance"),
        ({"views": ViewDraws({"full": 1.0}, 0.5), "plain": True}, "need a model with views"),
        ({"distill": True, "plain": True}, "need a model with views"),
    ],
)
def test_refusals(parts, options, message):
    processor = tiny_model()[1] if options.pop("plain", False) else parts[1]
    with pytest.raises(ValueError, match=message):
        RecordEncoder(processor, **options)


@pytest.mark.parametrize(
    ("weights", "dropout", "message"),
    [({}, 0, "found {}"), ({"a": 0.0}, 0, "not all 0"), ({"a": -1.0}, 0, "0 or more"), ({"a": 1.0}, 1.0, r"\[0, 1\)")],
)
def test_impossible_draws(weights, dropout, message):
    with pytest.raises(ValueError, match=message):
        ViewDraws(weights, dropout)
