"""Conversations: history, images encoded once, streaming, interruption, and loading with clear errors."""

import json

import pytest
import torch
from PIL import Image

from florence_vl.model.loading import check_folder, choose_device, load_model
from florence_vl.model.resolution import set_resolution
from florence_vl.model.tiny import tiny_model
from florence_vl.serve.session import ChatSession, GenerationOptions


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


@pytest.fixture
def session(parts):
    return ChatSession(*parts, options=GenerationOptions(max_new_tokens=6))


def picture(colour="red", size=(50, 30)):
    return Image.new("RGB", size, colour)


def reference(model, processor, messages, images, **kwargs):
    """The answer by transformers' own path, without streaming and without cached image tokens."""
    sources = iter(images)
    turns = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(sources)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
    output = model.generate(**inputs, do_sample=False, max_new_tokens=6, **kwargs)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_streamed_answer_is_the_generated_one(parts, session):
    session.show(picture())
    pieces = list(session.stream("What is shown?"))
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}
    expected = reference(*parts, [user], [picture()])
    assert "".join(pieces) == expected
    assert expected != ""
    assert session.messages[0] == user
    assert session.messages[1]["content"][0]["text"] == expected.strip()


def test_second_turn_sees_the_first(parts, session):
    session.show(picture())
    session.ask("What is shown?")
    history = [dict(message) for message in session.messages]
    answer = "".join(session.stream("And now?"))
    user = {"role": "user", "content": [{"type": "text", "text": "And now?"}]}
    assert answer == reference(*parts, [*history, user], [picture()])
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_images_are_encoded_once_each(parts, session, monkeypatch):
    counts = []
    real = type(parts[0]).get_image_features

    def counting(self, pixel_values, **kwargs):
        counts.append(len(pixel_values))
        return real(self, pixel_values, **kwargs)

    monkeypatch.setattr(type(parts[0]), "get_image_features", counting)
    session.show(picture())
    session.ask("one")
    session.ask("two")
    session.show(picture("blue"))
    session.ask("three")
    assert counts == [1, 1]  # the second turn's picture alone goes through the tower
    assert len(session.images) == 2


def test_another_picture_starts_again(session):
    session.show(picture())
    first = session.ask("What?")
    session.reset()
    assert session.messages == []
    assert session.images == []
    session.show(picture("blue", (20, 60)))
    session.ask("What?")
    assert session.images[0].getpixel((0, 0)) == (0, 0, 255)
    session.reset(keep_images=True)
    assert session.images == []
    session.ask("What?")
    assert len(session.images) == 1
    session.reset()
    session.show(picture())
    assert session.ask("What?") == first


def test_without_a_picture(parts, session):
    answer = "".join(session.stream("Hello"))
    user = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    assert answer == reference(*parts, [user], [])


def test_breaking_off_stops_generation_and_keeps_what_was_said(parts):
    session = ChatSession(*parts, options=GenerationOptions(max_new_tokens=500, temperature=5.0, seed=0))
    stream = session.stream("Tell me a long story")
    first = next(stream)
    stream.close()
    assert session.messages[-1]["role"] == "assistant"
    assert len(session.messages[-1]["content"][0]["text"]) <= len(first)
    assert session.ask("again") is not None


def test_failed_answer_takes_the_question_back(session, monkeypatch):
    session.show(picture())

    def broken(*args, **kwargs):
        raise RuntimeError("broken weights")

    with monkeypatch.context() as patch:
        patch.setattr(type(session.model), "forward", broken)
        with pytest.raises(RuntimeError, match="broken weights"):
            session.ask("What?")
    assert session.messages == []
    session.ask("What?")
    assert len(session.images) == 1


def test_system_message_reaches_the_prompt(parts):
    told = ChatSession(*parts, options=GenerationOptions(max_new_tokens=6), system="Answer in French, please.")
    system = {"role": "system", "content": [{"type": "text", "text": "Answer in French, please."}]}
    user = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    assert told.ask("Hello") == reference(*parts, [system, user], []).strip()
    assert [message["role"] for message in told.messages] == ["user", "assistant"]


def test_sampling_with_a_seed_repeats(parts):
    options = GenerationOptions(max_new_tokens=12, temperature=2.0, seed=3)
    one = ChatSession(*parts, options=options).ask("Hello")
    two = ChatSession(*parts, options=options).ask("Hello")
    other = ChatSession(*parts, options=GenerationOptions(max_new_tokens=12, temperature=2.0, seed=4)).ask("Hello")
    assert one == two != other


def test_empty_question_is_refused(session):
    with pytest.raises(ValueError, match="question is empty"):
        session.ask("  ")


def test_later_turns_prefill_only_what_is_new(parts, monkeypatch):
    model, processor = parts
    session = ChatSession(model, processor, options=GenerationOptions(max_new_tokens=6))
    seen = []
    real = type(model).forward

    def counting(self, *args, **kwargs):
        if kwargs.get("inputs_embeds") is not None:
            seen.append(kwargs["inputs_embeds"].shape[1])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    session.show(picture())
    for _ in range(5):
        session.ask("What is shown?")
    text = processor.apply_chat_template(session.messages[:-1], add_generation_prompt=True, tokenize=False)
    whole = len(processor.tokenize(text)[0]) + processor.num_image_tokens() - 1
    assert session.cached_tokens + seen[-1] == whole
    new_turn = len(processor.tokenize(text)[0]) - len(
        processor.tokenize(processor.apply_chat_template(session.messages[:-2], tokenize=False))[0]
    )
    assert seen[-1] <= new_turn + 6 + 4  # the question, and what re-tokenizing the answer before it may change


def test_a_conversation_beyond_the_context_is_refused_with_both_numbers(session):
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens .* the context of this model is 1024 tokens"):
        session.ask("word " * 1100)
    assert session.messages == []
    session.options = GenerationOptions(max_new_tokens=5000)
    assert "".join(session.stream("word " * 250)) != ""  # the longest answer is what the context leaves


def test_another_resolution_takes_effect_in_an_open_session():
    model, processor = tiny_model()
    options = GenerationOptions(max_new_tokens=4)
    session = ChatSession(model, processor, options=options)
    session.show(picture(size=(300, 200)))
    for change in ({}, {"image_size": 128}, {"image_size": 96}, {"aspect": "squash"}, {"positions": "absolute"}):
        set_resolution(model, processor, **change)
        fresh = ChatSession(model, processor, options=options)
        fresh.show(picture(size=(300, 200)))
        assert session.ask("What is shown?") == fresh.ask("What is shown?")
        assert session.cached_tokens < 6  # what comes before the picture
        session.reset(keep_images=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"temperature": 1, "top_k": 0}, "top_k"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ("",)}, "stop text is empty"),
    ],
)
def test_options_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**settings)


def test_saved_model_loads_and_answers_the_same(parts, session, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ChatSession(*load_model(tmp_path, "cpu"), options=session.options)
    for talk in (session, loaded):
        talk.show(picture())
    assert loaded.ask("What is shown?") == session.ask("What is shown?")
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert load_model(tmp_path, "cpu", "bfloat16")[0].dtype == torch.bfloat16


def test_folders_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model"):
        check_folder(tmp_path / "nowhere")
    embedded = tmp_path / "cache" / "embedded"
    embedded.mkdir(parents=True)
    (embedded / "config.json").write_text(json.dumps({"model_type": "florence_vl"}))
    monkeypatch.setattr(
        "florence_vl.model.loading.resolve", lambda name, kind: str(embedded) if name == "mini" else name
    )
    with pytest.raises(ValueError, match=r"not a whole model, it has no weights .* processor_config.json, tokenizer"):
        check_folder("mini")
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json"):
        (embedded / name).write_text("{}")
    assert check_folder("mini") == embedded
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no config.json. Its sub-folders inner are models"):
        check_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_folder(tmp_path / "inner" / "config.json")
    with pytest.raises(ValueError, match="has no model_type"):
        check_folder(tmp_path / "inner")
    (tmp_path / "inner" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="is a 'llama', not a 'florence_vl'"):
        check_folder(tmp_path / "inner")
    (tmp_path / "inner" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON object"):
        check_folder(tmp_path / "inner")
    assert check_folder("owner/name") == "owner/name"


def test_devices_that_are_not_here():
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"unknown device 'cuba'\. Did you mean 'cuda'"):
        choose_device("cuba")
    with pytest.raises(ValueError, match="finds no device 'cuda:99'"):
        choose_device("cuda:99")
