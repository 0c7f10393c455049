"""Records become samples or are rejected with a reason; long ones lose whole turns, never part of an image."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from florence_vl.data.encode import RecordEncoder
from florence_vl.data.records import BadRecord, ImageRef, Record
from florence_vl.model.tiny import tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def png(colour=(10, 200, 30), size=(40, 20)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def turns(*pairs, images=0):
    messages = []
    for index, (question, answer) in enumerate(pairs):
        pictures = [{"type": "image"}] * (images if index == 0 else 0)
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return messages


def test_sample(processor):
    record = Record("7", "set", turns(("What?", "A car."), images=2), [png(), png((0, 0, 255))])
    sample = RecordEncoder(processor)(record)
    assert (sample.id, sample.source, sample.num_images) == ("7", "set", 2)
    assert sample.input_ids.dtype == sample.labels.dtype == torch.int64
    assert len(sample) == len(sample.input_ids) == len(sample.labels)
    assert sample.labels[0] == -100
    assert sample.num_supervised == len(processor.tokenizer("A car.<|im_end|>")["input_ids"])
    expected = processor.image_processor([Image.open(io.BytesIO(i)) for i in record.images], return_tensors="pt")
    assert torch.equal(sample.pixel_values, expected["pixel_values"])
    text_only = RecordEncoder(processor)(Record("8", "set", turns(("What?", "A car.")), []))
    assert text_only.pixel_values is None
    assert text_only.num_images == 0


def test_image_tokens_stand_where_the_images_do(processor):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": "d"},
    ]
    ids = RecordEncoder(processor).tokenize(Record("1", "s", messages, [png()] * 3))[0]
    image = "<image>" * 4 + "\n"
    assert processor.tokenizer.decode(ids) == (
        f"<|im_start|>user\na{image}b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
        f"<|im_start|>user\n{image}{image}<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )


def test_image_sources(processor, tmp_path):
    data = png()
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "all.tar").write_bytes(b"head" + data + b"tail")
    sources = [data, tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(io.BytesIO(data))]
    sources.append(ImageRef(str(tmp_path / "all.tar"), 4, len(data)))
    encode = RecordEncoder(processor)
    expected = encode(Record("1", "s", turns(("?", "!"), images=1), [data])).pixel_values
    for source in sources:
        assert torch.equal(encode(Record("1", "s", turns(("?", "!"), images=1), [source])).pixel_values, expected)


def test_named_template_leaves_the_processors_alone(processor):
    before = processor.chat_template
    plain = RecordEncoder(processor, template="plain")
    ids = plain.tokenize(Record("1", "s", turns(("Describe it.", "A car."), images=1), [png()]))[0]
    assert processor.tokenizer.decode(ids) == "<image>" * 4 + "A car.<|im_end|>"
    newline = RecordEncoder(processor, template="plain", template_options={"end": "newline"})
    ids = newline.tokenize(Record("1", "s", turns(("Describe it.", "A car."), images=1), [png()]))[0]
    assert processor.tokenizer.decode(ids) == "<image>" * 4 + "A car.\n"
    assert processor.chat_template == before


# ---------------------------------------------------------------- bad records


@pytest.mark.parametrize(
    ("kind", "messages", "images", "text"),
    [
        ("messages", [], [], "no messages"),
        ("messages", "hello", [], "must be a list"),
        ("messages", [{"role": "user"}], [], "'role' and 'content'"),
        ("messages", [{"role": "human", "content": "x"}], [], "unknown role 'human'.*user"),
        ("messages", [{"role": "user", "content": []}], [], "no content"),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": None}]}], [], "without text"),
        ("messages", [{"role": "user", "content": [{"type": "video"}]}], [], "unknown type 'video'"),
        ("messages", [{"role": "assistant", "content": [{"type": "image"}]}], [png()], "only user messages"),
        ("messages", turns(("a", "b"), images=2), [png()], "2 image parts .* 1 images"),
        ("messages", turns(("a", "b")), [png()], "0 image parts .* 1 images"),
        ("messages", [*turns(("a", "b")), {"role": "system", "content": "s"}], [], "first message"),
        ("unsupervised", [{"role": "user", "content": "a"}], [], "no assistant token"),
        ("image", turns(("a", "b"), images=1), [b"not an image"], "image 0 of record 'r9' of 'set'"),
        ("image", turns(("a", "b"), images=1), ["/no/such/file.jpg"], "no such image file.*file\\.jpg"),
        ("image", turns(("a", "b"), images=2), [png(), png()[:50]], "image 1 of record 'r9'"),
        ("image", turns(("a", "b"), images=1), [ImageRef("/no/such.tar", 0, 10)], "such.tar"),
    ],
)
def test_bad_records_have_a_kind_and_name_the_record(processor, kind, messages, images, text):
    with pytest.raises(BadRecord, match=text) as caught:
        RecordEncoder(processor)(Record("r9", "set", messages, images))
    assert caught.value.kind == kind
    assert "r9" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).kind == kind  # crosses worker processes


def test_unknown_kind_of_bad_record():
    with pytest.raises(ValueError, match="unsupervised"):
        BadRecord("unsupervise", "x")


def test_the_record_is_not_changed(processor):
    record = Record("1", "s", turns(("a", "b"), images=1), [png()])
    before = repr(record.messages)
    RecordEncoder(processor)(record)
    assert repr(record.messages) == before


# ---------------------------------------------------------------- long records

LONG = turns(("First question", "First answer"), ("Second", "Second answer"), ("Third", "Third answer"), images=1)


def test_on_long_error_stops_with_both_numbers(processor):
    record = Record("1", "s", LONG, [png()])
    length = RecordEncoder(processor).length(record)
    assert RecordEncoder(processor, max_length=length).length(record) == length
    with pytest.raises(ValueError, match=f"{length} tokens, more than max_length={length - 1}") as caught:
        RecordEncoder(processor, max_length=length - 1)(record)
    assert not isinstance(caught.value, BadRecord)


def test_on_long_drop_is_a_bad_record(processor):
    with pytest.raises(BadRecord) as caught:
        RecordEncoder(processor, max_length=20, on_long="drop")(Record("1", "s", LONG, [png()]))
    assert caught.value.kind == "too_long"


def test_truncate_turns_drops_whole_last_turns(processor):
    record = Record("1", "s", LONG, [png()])
    lengths = [RecordEncoder(processor).length(Record("1", "s", LONG[: 2 * n], [png()])) for n in (1, 2, 3)]
    for limit, expected in [
        (lengths[2], 3),
        (lengths[2] - 1, 2),
        (lengths[1], 2),
        (lengths[1] - 1, 1),
        (lengths[0], 1),
    ]:
        sample = RecordEncoder(processor, max_length=limit, on_long="truncate_turns")(record)
        whole = RecordEncoder(processor)(Record("1", "s", LONG[: 2 * expected], [png()]))
        assert sample.input_ids.tolist() == whole.input_ids.tolist()
        assert sample.labels.tolist() == whole.labels.tolist()
    with pytest.raises(BadRecord, match="max_length") as caught:
        RecordEncoder(processor, max_length=lengths[0] - 1, on_long="truncate_turns")(record)
    assert caught.value.kind == "too_long"


def test_images_of_dropped_turns_are_dropped_and_not_read(processor):
    messages = [*turns(("One", "1"), images=1), *turns(("Two", "2" * 60), images=2)]
    record = Record("1", "s", messages, [png((1, 2, 3)), b"broken", b"broken"])
    limit = RecordEncoder(processor).length(Record("1", "s", messages[:2], [png()]))
    sample = RecordEncoder(processor, max_length=limit, on_long="truncate_turns")(record)
    assert sample.num_images == 1
    assert int((sample.input_ids == processor.image_token_id).sum()) == 4
    assert torch.equal(
        sample.pixel_values,
        processor.image_processor(Image.new("RGB", (40, 20), (1, 2, 3)), return_tensors="pt")["pixel_values"],
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"on_long": "truncate"}, "truncate_turns"),
        ({"max_length": 1}, "at least 2"),
        ({"template": "lama3"}, "llama3"),
        ({"template_options": {"double_bos": True}}, "template name"),
        ({"template": "chatml", "template_options": {"bos": True}}, "double_bos"),
    ],
)
def test_wrong_options(processor, options, text):
    with pytest.raises(ValueError, match=text):
        RecordEncoder(processor, **options)


def test_templates_without_generation_marks_are_refused():
    processor = tiny_processor()
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="generation"):
        RecordEncoder(processor)


def test_threads_and_processes(processor):
    encode = RecordEncoder(processor)
    records = [Record(str(i), "s", turns((f"Q{i}" * i, f"A{i}")), []) for i in range(24)]
    alone = [encode(record) for record in records]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(encode, records))
    for a, b in zip(alone, together, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.labels.tolist() == b.labels.tolist()
    again = pickle.loads(pickle.dumps(encode))
    assert again(records[5]).labels.tolist() == alone[5].labels.tolist()


def test_samples_longer_than_the_context_are_refused_whatever_max_length_says(processor):
    record = Record("long", "data", turns(("word " * 400, "A")))
    for max_length in (None, 1 << 20):
        with pytest.raises(
            BadRecord, match=r"has \d{4} tokens, more than the context of the LLM, 1024 tokens"
        ) as error:
            RecordEncoder(processor, max_length=max_length, on_long="drop")(record)
        assert error.value.kind == "too_long"
