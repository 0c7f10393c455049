"""Generation with transformers: every mode gives the same result as recomputation from scratch."""

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline

from florence_vl.model.tiny import TINY_IMAGE_TOKEN_ID as IMG
from florence_vl.model.tiny import tiny_model

NEW = 6


@pytest.fixture(scope="module")
def parts():
    model, processor = tiny_model()
    model.generation_config.eos_token_id = None  # compare whole lengths
    model.generation_config.pad_token_id = 0
    return model, processor


def prompt(ids=(20, 21, 22)):
    return torch.tensor([[1, *[IMG] * 4, *ids]])


def pixels(count=1, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def recompute(model, ids, images, steps=NEW):
    """Greedy decoding without generate and without a cache."""
    for _ in range(steps):
        logits = model(input_ids=ids, pixel_values=images, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}],
    ids=["dynamic", "none", "static", "lookup"],
)
def test_greedy_equals_recomputing(parts, options):
    model, _ = parts
    ids = prompt()
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels(), max_new_tokens=NEW, **options
    )
    assert torch.equal(out, recompute(model, ids, pixels()))


def test_the_tower_runs_once_for_a_whole_answer(parts):
    model, _ = parts
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model.generate(
        input_ids=prompt(), attention_mask=torch.ones_like(prompt()), pixel_values=pixels(), max_new_tokens=NEW
    )
    handle.remove()
    assert len(calls) == 1


def test_cached_features_answer_several_questions(parts):
    model, _ = parts
    features = model.get_image_features(pixels())
    for question in ((20, 21), (30, 31, 32, 33)):
        ids = prompt(question)
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW}
        cached = model.generate(**options, mm_encoder_outputs={"image": features})
        assert torch.equal(cached, model.generate(**options, pixel_values=pixels()))


def test_cached_features_answer_several_questions_with_beams(parts):
    """transformers repeats image tokens for the beams in place; the caller's own features stay as they are."""
    model, _ = parts
    features = model.get_image_features(pixels(2))
    for beams in (2, 2, 1):
        ids = torch.cat([prompt(), prompt((30, 31, 32))])
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "num_beams": beams}
        cached = model.generate(**options, mm_encoder_outputs={"image": features})
        assert torch.equal(cached, model.generate(**options, pixel_values=pixels(2)))
    assert features.pooler_output.shape[0] == 2


def test_no_settings_bring_out_an_image_placeholder():
    model, _ = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[IMG] *= 50  # often the most likely token
    ids = torch.tensor([[1, 20, 21, 22]])
    settings = {"max_new_tokens": 12, "suppress_tokens": [5]}
    for options in (settings, {"generation_config": GenerationConfig(**settings)}):
        said = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 4:]
        assert not {5, IMG} & set(said.tolist())


def test_sampling_is_reproducible_and_beams_return_the_better_sequence(parts):
    model, _ = parts
    ids = prompt()
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(),
        "max_new_tokens": NEW,
    }
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(model.generate(**options, do_sample=True, top_p=0.9, temperature=1.5))
    assert torch.equal(*samples)

    def score(sequence):
        logits = model(input_ids=sequence, pixel_values=pixels()).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        return logits.gather(1, sequence[0, ids.shape[1] :].unsqueeze(1)).sum()

    assert score(model.generate(**options, num_beams=4)) >= score(model.generate(**options)) - 1e-5


def test_batch_of_eight_lengths_equals_eight_runs(parts):
    """Also with different numbers of images: none, one and two."""
    model, processor = parts
    questions = [
        "a",
        "what?",
        "what is it?",
        "is this a red square?",
        "x y",
        "hello there you",
        "count",
        "how many are it?",
    ]
    chats, images = [], []
    for index, question in enumerate(questions):
        count = index % 3
        own = [Image.new("RGB", (40 + 9 * index, 64), (20 * index, 90, 10 * k)) for k in range(count)]
        images.append(own)
        content = [{"type": "image", "image": image} for image in own] + [{"type": "text", "text": question}]
        chats.append([{"role": "user", "content": content}])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chats, padding=True, **options)
    width = batch["input_ids"].shape[1]
    together = model.generate(**batch, max_new_tokens=NEW)[:, width:]
    for row, chat in enumerate(chats):
        single = processor.apply_chat_template([chat], **options)
        alone = model.generate(**single, max_new_tokens=NEW)[:, single["input_ids"].shape[1] :]
        assert torch.equal(together[row], alone[0]), f"row {row}"


def test_streaming(parts, capsys):
    model, processor = parts
    ids = prompt()
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(),
        "max_new_tokens": NEW,
    }
    whole = processor.tokenizer.decode(model.generate(**options)[0, ids.shape[1] :])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    model.generate(**options, streamer=streamer)
    assert "".join(streamer) == whole
    model.generate(**options, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert whole.strip() in capsys.readouterr().out


def test_pipeline(parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answer = pipeline("image-text-to-text", model=str(tmp_path))
    image = Image.new("RGB", (80, 50), "red")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]
    result = answer(text=chat, max_new_tokens=4, return_full_text=False)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chat, **options)
    direct = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert result[0]["generated_text"] == processor.decode(direct, skip_special_tokens=True)
    batch = answer(text=[chat, chat], max_new_tokens=4, return_full_text=False, batch_size=2)
    assert [row[0]["generated_text"] for row in batch] == [result[0]["generated_text"]] * 2


def test_an_image_placeholder_is_never_an_answer(tmp_path):
    model, _ = tiny_model()
    ids = prompt()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely
    model.save_pretrained(tmp_path)
    for loaded in (model, type(model).from_pretrained(tmp_path)):
        assert loaded.config.image_token_id in loaded.generation_config.suppress_tokens
        torch.manual_seed(0)
        answers = loaded.generate(
            input_ids=ids.expand(64, -1),
            pixel_values=pixels(64),
            max_new_tokens=40,
            do_sample=True,
            top_k=0,
            eos_token_id=-1,
        )[:, ids.shape[1] :]
        assert answers.numel() == 64 * 40
        assert not (answers == model.config.image_token_id).any()


def test_prompt_lookup(parts):
    model, _ = parts
    ids, options = prompt(), {"max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(input_ids=ids, pixel_values=pixels(), **options)
    looked_up = model.generate(input_ids=ids, pixel_values=pixels(), prompt_lookup_num_tokens=3, **options)
    assert looked_up.tolist() == plain.tolist()
