"""The engine's answers equal those of `generate` under any concurrency and cache state; the caches are bounded."""

import random
import time
from concurrent.futures import Future

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from florence_vl.model.tiny import tiny_model
from florence_vl.serve.cache import RowBatch
from florence_vl.serve.engine import ContextTooLong, Engine, EngineConfig, OutOfMemory, QueueFull
from florence_vl.serve.sampling import GenerationOptions, Sampler, token_bytes

COLORS = ("red", "green", "blue", "gold", "white", "black")


def picture(color, size=(50, 30)):
    return Image.new("RGB", size, color)


def turn(role, text, images=0):
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def reference(parts, messages, images, options):
    model, processor = parts
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt")
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    inputs = {name: inputs[name] for name in names if name in inputs}
    if model.model.fusion.uses_context and images:
        questions = processor.question_inputs([messages])
        inputs |= {name: torch.tensor(rows) for name, rows in questions.items()}
    how = {"do_sample": False}
    if options.temperature:
        how = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p or 1.0}
        how["top_k"] = options.top_k or 0
        torch.manual_seed(options.seed)
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, repetition_penalty=options.repetition_penalty, **how
        )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


def random_request(rng):
    """A conversation, its pictures and options; few texts and pictures, so that beginnings and images repeat."""
    messages, images = [], []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": [{"type": "text", "text": "Answer in one word."}]})
    for index in range(rng.randint(1, 3)):
        count = rng.choice((0, 1, 1, 2)) if index == 0 else rng.choice((0, 0, 1))
        if messages and messages[-1]["role"] == "user":
            messages.append(turn("assistant", rng.choice(("A dog.", "Two people on the street"))))
        messages.append(turn("user", rng.choice(("What is shown?", "What is shown on the left of it?", "Why")), count))
        images += [picture(rng.choice(COLORS), rng.choice(((50, 30), (20, 60)))) for _ in range(count)]
    sampled = {}
    if rng.random() < 0.4:
        sampled = {"temperature": rng.choice((0.7, 1.0, 2.0)), "seed": rng.randint(0, 99)}
        sampled |= {"top_p": rng.choice((None, 0.9)), "top_k": rng.choice((None, 20))}
    penalty = rng.choice((1.0, 1.0, 1.3))
    return messages, images, GenerationOptions(rng.randint(1, 12), repetition_penalty=penalty, **sampled)


def run_schedules(parts, count, seed):
    """Random requests in random order and concurrency through engines of random limits; the number of differences."""
    rng = random.Random(seed)
    known = {}
    differences = 0
    for _ in range(count):
        config = EngineConfig(
            max_batch=rng.choice((1, 2, 5, 16)),
            feature_bytes=rng.choice((0, 1600, 1 << 20)),
            prefix_bytes=rng.choice((0, 100_000, 1 << 24)),
            max_prefill=rng.choice((40, 8192)),
        )
        with Engine(*parts, config) as engine:
            requests = [random_request(rng) for _ in range(rng.randint(1, 8))]
            answers = []
            for messages, images, options in requests:
                answers.append(engine.submit(engine.prepare(messages, images), options))
                if rng.random() < 0.3:
                    answers[-1].result()
            for (messages, images, options), answer in zip(requests, answers, strict=True):
                while answer.finish is None:
                    time.sleep(0.001)
                key = repr((messages, [image.tobytes() for image in images], options))
                if key not in known:
                    known[key] = reference(parts, messages, images, options)
                differences += answer.ids != known[key]
            assert engine.features.bytes <= config.feature_bytes
            assert engine.prefixes.bytes <= config.prefix_bytes
    return differences


def test_random_schedules_give_the_tokens_of_generate(parts):
    assert run_schedules(parts, 25, seed=0) == 0


@pytest.mark.slow
def test_five_hundred_random_schedules_give_the_tokens_of_generate(parts):
    assert run_schedules(parts, 500, seed=1) == 0


@pytest.mark.parametrize(
    "settings",
    [{"llm": "gemma3_text"}, {"llm": "qwen3"}, {"fusion": "token"}, {"fusion": "gated"}, {"llm": "mistral"}],
    ids=str,
)
def test_other_models_give_the_tokens_of_generate(settings):
    assert run_schedules(tiny_model(**settings), 3, seed=2) == 0


def test_a_sliding_window_gives_the_tokens_of_generate():
    parts = tiny_model("mistral")
    parts[0].config.text_config.sliding_window = 8
    long = turn("user", "What is shown on the left of it, and what on the right of it? " * 3, 1)
    options = GenerationOptions(12)
    with Engine(*parts) as engine:
        first = [engine.submit(engine.prepare([long], [picture(c)]), options) for c in ("red", "blue")]
        again = engine.submit(engine.prepare([long], [picture("red")]), options)
        for answer, color in zip([*first, again], ("red", "blue", "red"), strict=True):
            answer.result()
            assert answer.ids == reference(parts, [long], [picture(color)], options)


def test_an_llm_without_a_context_length_is_refused(monkeypatch):
    model, processor = tiny_model()
    monkeypatch.setattr(type(model.config), "context_length", None)
    with pytest.raises(ValueError, match=r"set model\.config\.text_config\.max_position_embeddings"):
        Engine(model, processor)


def test_limits_and_failures_leave_the_engine_alive(parts, monkeypatch):
    chat = [turn("user", "What is shown?", 1)]
    with Engine(*parts, EngineConfig(max_batch=1, max_queue=0)) as engine:
        prompt = engine.prepare(chat, [picture("red")])
        with pytest.raises(ContextTooLong, match=r"answer may have 2000, but the context of this model is 1024"):
            engine.submit(prompt, GenerationOptions(2000))
        running = engine.submit(prompt, GenerationOptions(900, temperature=5.0, seed=1))
        next(iter(running))
        with pytest.raises(QueueFull, match="the limit is 1"):
            engine.submit(prompt, GenerationOptions(4))
        before = len(running.ids)
        running.cancel()
        while engine.load:
            time.sleep(0.001)
        assert running.finish == "cancelled"
        assert before <= len(running.ids) < 900
        with monkeypatch.context() as patch:
            patch.setattr(type(parts[0]), "forward", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(OutOfMemory):
                engine.submit(prompt, GenerationOptions(4)).result()
        answer = engine.submit(prompt, GenerationOptions(4))
        answer.result()
        assert answer.ids == reference(parts, chat, [picture("red")], GenerationOptions(4))


def submit_together(engine, requests):
    """Answers to requests that the engine finds in its queue at the same time."""
    return engine.call(lambda: [engine.submit(*request) for request in requests]).result()


def test_a_failing_answer_leaves_those_beside_it(parts, monkeypatch):
    chats = [[turn("user", text, 1)] for text in ("What is shown?", "Why is it shown?")]
    options = GenerationOptions(8)
    real = Sampler.__call__

    def fail(self, logits_X, ids):
        if self.options.seed is not None and next(left) == 0:
            raise RuntimeError("no next token")
        return real(self, logits_X, ids)

    monkeypatch.setattr(Sampler, "__call__", fail)
    with Engine(*parts) as engine:
        prompts = [engine.prepare(chat, [picture("red")]) for chat in chats]
        for at in (0, 3):  # the first token, from the prefill, and a later one
            left = iter(range(at, -1, -1))
            asked = [(prompts[0], GenerationOptions(8, seed=1)), (prompts[1], options)]
            failing, going = submit_together(engine, asked)
            with pytest.raises(RuntimeError, match="no next token"):
                failing.result()
            going.result()
            assert len(failing.ids) == at
            assert going.ids == reference(parts, chats[1], [picture("red")], options)
        assert engine.load == 0


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([turn("user", "What?", 1)], 0, "1 image parts but 0 images"),
        ([turn("user", "What?")], 1, "0 image parts but 1 images"),
        ([{"role": "user", "content": ["What?"]}], 0, "unknown type None"),
        (["What?"], 0, "must be a dict"),
    ],
)
def test_malformed_conversations_are_refused(parts, messages, images, message):
    with pytest.raises(ValueError, match=message):
        Engine(*parts).prepare(messages, [picture("red")] * images)


def test_a_picture_that_the_template_leaves_out_is_refused():
    model, processor = tiny_model()
    processor.chat_template = processor.chat_template.replace("~ image_token", "")
    with pytest.raises(ValueError, match="0 image parts but 1 images"):
        Engine(model, processor).prepare([turn("user", "What?", 1)], [picture("red")])


def test_extreme_options_leave_the_answer_defined(parts):
    chat = [turn("user", "What is shown?", 1)]
    with Engine(*parts) as engine:
        prompt = engine.prepare(chat, [picture("red")])

        def ids(**settings):
            answer = engine.submit(prompt, GenerationOptions(6, seed=1, **settings))
            answer.result()
            return answer.ids

        assert ids(temperature=1e-40) == ids(temperature=1e-5) == ids()
        assert ids(temperature=2, repetition_penalty=2) == ids(temperature=2.0, repetition_penalty=2.0)
        assert ids(logprobs=10**6) == ids()
        assert len(ids(temperature=1.0, repetition_penalty=0.01)) > 0


def test_a_cancelled_call_is_not_made_and_ends_no_answer(parts):
    made = []
    with Engine(*parts) as engine:
        prompt = engine.prepare([turn("user", "What is shown?", 1)], [picture("red")])

        def cancel():
            waiting = engine.call(lambda: made.append("cancelled"))
            return waiting.cancel()

        answer = engine.submit(prompt, GenerationOptions(6))
        assert engine.call(cancel).result()
        engine.call(lambda: made.append("last")).result()
        answer.result()
        assert answer.ids == reference(
            parts, [turn("user", "What is shown?", 1)], [picture("red")], GenerationOptions(6)
        )
    assert made == ["last"]


@pytest.mark.parametrize("which", range(4))
def test_no_memory_for_a_prefix_only_empties_the_caches(parts, monkeypatch, which):
    """Of two answers, at the end of the prefill and at the end of the answer."""
    chats = [[turn("user", text, 1)] for text in ("What is shown?", "Why is it shown?")]
    options = GenerationOptions(5)
    real, left = RowBatch.segment, iter(range(which, -1, -1))

    def short(*args):
        if next(left, 1) == 0:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(RowBatch, "segment", short)
    with Engine(*parts) as engine:
        prompts = [engine.prepare(chat, [picture(color)]) for chat, color in zip(chats, ("red", "blue"), strict=True)]
        answers = submit_together(engine, [(prompt, options) for prompt in prompts])
        for answer, chat, color in zip(answers, chats, ("red", "blue"), strict=True):
            answer.result()
            assert answer.ids == reference(parts, chat, [picture(color)], options)
        assert engine.stats.out_of_memory == 1


def test_a_request_that_arrives_while_cancelled_ones_are_dropped_harms_none(parts):
    engine = Engine(*parts)

    class Waiting:
        @property
        def _cancelled(self):
            engine._waiting.append(self)  # as `submit` does on another thread
            return False

    first = Waiting()
    engine._waiting.append(first)
    engine._drop_cancelled()
    assert list(engine._waiting) == [first, first]


def test_calls_take_turns_with_the_answers(parts):
    engine, made = Engine(*parts), []
    futures = [Future() for _ in range(3)]
    for number, future in enumerate(futures):
        engine._calls.append((lambda number=number: made.append(number), future))
    for steps in range(1, 4):
        engine.step()
        assert made == list(range(steps))
        assert [future.done() for future in futures].count(True) == steps


def test_a_prompt_keeps_no_picture_and_outlives_the_caches(parts):
    chat = [turn("user", "What is shown?", 1)]
    options = GenerationOptions(4)
    expected = reference(parts, chat, [picture("red")], options)
    with Engine(*parts) as engine:
        for _ in range(2):  # the second prompt finds the features in the cache
            prompt = engine.prepare(chat, [picture("red")])
            assert not any(isinstance(value, Image.Image) for value in vars(prompt.images[0]).values())
            for _ in range(2):
                answer = engine.submit(prompt, options)
                answer.result()
                assert answer.ids == expected
                engine.call(engine._forget_caches).result()
            engine.submit(prompt, options).result()
        assert not prompt.images[0].inputs


@pytest.mark.parametrize("broken", ["compute_logit_bias", "consume_token"])
def test_a_grammar_that_fails_during_an_answer_is_an_error(broken):
    class Matcher:
        failed = False

        def compute_logit_bias(self):
            self.failed |= broken == "compute_logit_bias"
            return bytes([200] * 4)

        def consume_token(self, token):
            self.failed |= broken == "consume_token"

        def is_error(self):
            return self.failed

        def get_error(self):
            return "lexer error: too complex\n<state>"

    sampler = Sampler(GenerationOptions(4), (), Matcher(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the JSON schema cannot be used: lexer error: too complex$"):
        sampler(torch.zeros(4), ())


def test_bytes_of_tokens(parts):
    tokenizer = parts[1].tokenizer
    text = "Straße 👍"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids), "the text has a part of a character"
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()
    assert token_bytes(tokenizer, tokenizer.eos_token_id) == tokenizer.eos_token.encode()


def test_bytes_of_tokens_of_sentencepiece():
    pieces = {
        "<unk>": "<unk>",
        "<0xE2>": b"\xe2",
        "<0x41>": "A",
        "\u2581": " ",
        "\u2581the": " the",
        "caf\u00e9": "caf\u00e9",
        "\u00e9": "\u00e9",
    }
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    for token, expected in enumerate(pieces.values()):
        assert token_bytes(tokenizer, token) == (expected if isinstance(expected, bytes) else expected.encode())


def alternate(parts, count):
    """The number of answers to one question about images in turn that are not those of the image alone."""
    chat = [turn("user", "What is shown?", 1)]
    options = GenerationOptions(4)
    expected = {color: reference(parts, chat, [picture(color)], options) for color in COLORS}
    with Engine(*parts, EngineConfig(max_queue=count, feature_bytes=4000, prefix_bytes=300_000)) as engine:
        order = [COLORS[i % len(COLORS)] for i in range(count)]
        answers = [engine.submit(engine.prepare(chat, [picture(color)]), options) for color in order]
        for answer in answers:
            answer.result()
        return sum(answer.ids != expected[color] for color, answer in zip(order, answers, strict=True))


def test_images_that_alternate_under_one_text_never_cross(parts):
    assert alternate(parts, 120) == 0


@pytest.mark.slow
def test_a_thousand_images_that_alternate_under_one_text_never_cross(parts):
    assert alternate(parts, 1000) == 0
