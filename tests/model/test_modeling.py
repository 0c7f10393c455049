"""The composite model: image tokens at their placeholders, loss and freezing, file round trips."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForImageTextToText

from florence_vl import FlorenceVLForConditionalGeneration, FlorenceVLModel
from florence_vl.model.tiny import TINY_IMAGE_TOKEN_ID as IMG
from florence_vl.model.tiny import TINY_LLMS, tiny_config, tiny_model

IDS = torch.tensor([[1, IMG, IMG, IMG, IMG, 20, 21, 22], [1, IMG, IMG, IMG, IMG, 30, 31, 32]])


def pixels(count=2, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def labelled(ids, start=5):
    labels = ids.clone()
    labels[:, :start] = -100
    return labels


@pytest.fixture(scope="module")
def model():
    return tiny_model()[0]


@pytest.mark.parametrize("llm", list(TINY_LLMS))
def test_every_llm_trains_and_generates(llm):
    model, _ = tiny_model(llm)
    model.train()
    loss = model(input_ids=IDS, pixel_values=pixels(), labels=labelled(IDS)).loss
    loss.backward()
    for part in ("tower", "projector", "llm"):
        gradients = [p.grad for _, p in model.part_parameters(part) if p.grad is not None]
        assert sum(g.abs().sum() for g in gradients) > 0, part
    assert model.model.vision_tower.davit.convs[0].conv.weight.grad.abs().max() > 0
    model.eval()
    out = model.generate(input_ids=IDS, pixel_values=pixels(), attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    assert out.shape[1] > IDS.shape[1]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (llm == "gemma3_text")


def test_image_tokens_stand_at_their_placeholders_in_order(model):
    images = pixels(3)
    ids = torch.tensor([[1, *[IMG] * 4, 9, *[IMG] * 4, 10], [1, 11, 12, *[IMG] * 4, 13, 14, 15, 16]])
    tokens = model.get_image_features(images).pooler_output.flatten(0, 1)
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == IMG] = tokens
    expected = model.model.language_model(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(model.model(input_ids=ids, pixel_values=images).last_hidden_state, expected)


def test_counts_of_placeholders_and_image_tokens_must_agree(model):
    with pytest.raises(ValueError, match="8 image placeholder tokens, but the images give 4"):
        model(input_ids=IDS, pixel_values=pixels(1))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=pixels(1))
    with pytest.raises(ValueError, match="not both"):
        model(input_ids=IDS, pixel_values=pixels(), mm_encoder_outputs={"image": None})


def test_cached_image_features_give_the_same_logits(model):
    cached = model.get_image_features(pixels(), output_features=True)
    assert list(cached.features) == list(model.config.features)
    assert [tuple(t.shape) for t in cached.pooler_output] == [(4, 48)] * 2
    with_pixels = model(input_ids=IDS, pixel_values=pixels()).logits
    torch.testing.assert_close(model(input_ids=IDS, mm_encoder_outputs={"image": cached}).logits, with_pixels)


def test_loss_is_the_textbook_one_and_normalized_as_asked(model):
    labels = labelled(IDS)
    labels[1, 6] = -100
    out = model(input_ids=IDS, pixel_values=pixels(), labels=labels)
    expected = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(out.loss, expected / 5)
    for count in (20, torch.tensor(20)):
        normalized = model(input_ids=IDS, pixel_values=pixels(), labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(normalized, expected / 20)


def test_the_head_can_run_at_supervised_positions_only():
    model, _ = tiny_model()  # eval mode: no dropout
    rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    out = model(input_ids=IDS, pixel_values=pixels(), labels=labelled(IDS), skip_logits=True)
    assert out.logits is None
    assert rows == [6]
    whole = model(input_ids=IDS, pixel_values=pixels(), labels=labelled(IDS))
    torch.testing.assert_close(out.loss, whole.loss)
    nothing = model(input_ids=IDS, pixel_values=pixels(), labels=torch.full_like(IDS, -100), skip_logits=True).loss
    nothing.backward()
    assert nothing.item() == 0


def test_logits_stand_where_every_trainer_reads_them():
    model, _ = tiny_model()
    model.train()
    labels = labelled(IDS)
    out = model(input_ids=IDS, pixel_values=pixels(), labels=labels)
    assert out.logits.shape == (*IDS.shape, model.config.text_config.vocab_size)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, out.loss)
    loss.backward()
    assert model.model.multi_modal_projector.layers[0].weight.grad.abs().sum() > 0
    as_tuple = model.eval()(input_ids=IDS, pixel_values=pixels(), labels=labels, return_dict=False)
    assert as_tuple[0].shape == ()
    assert as_tuple[1].shape == out.logits.shape


def test_shifted_labels_are_honored(model):
    labels = labelled(IDS)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    whole = model(input_ids=IDS, pixel_values=pixels(), labels=labels).loss
    torch.testing.assert_close(model(input_ids=IDS, pixel_values=pixels(), shift_labels=shifted).loss, whole)
    other = shifted.clone()
    other[other != -100] = 7
    beside = model(input_ids=IDS, pixel_values=pixels(), labels=labels, shift_labels=other).loss
    torch.testing.assert_close(beside, model(input_ids=IDS, pixel_values=pixels(), shift_labels=other).loss)
    assert not torch.isclose(beside, whole)


def test_a_loss_function_that_was_set_is_used():
    model, _ = tiny_model()
    seen = {}

    def loss_function(logits, labels, vocab_size, **kwargs):
        seen.update(kwargs, shape=tuple(logits.shape), vocab_size=vocab_size)
        return logits.sum() * 0 + 42

    model.loss_function = loss_function
    out = model(input_ids=IDS, pixel_values=pixels(), labels=labelled(IDS), num_items_in_batch=3)
    assert out.loss.item() == 42
    assert seen["shape"] == (*IDS.shape, seen["vocab_size"])
    assert seen["num_items_in_batch"] == 3


def test_image_placeholders_are_no_targets(model):
    labels = labelled(IDS)
    as_trl = torch.where(IDS == IMG, IDS, labels)  # its collator leaves them to the model
    expected = model(input_ids=IDS, pixel_values=pixels(), labels=labels).loss
    assert (as_trl == IMG).sum() == 8
    torch.testing.assert_close(model(input_ids=IDS, pixel_values=pixels(), labels=as_trl).loss, expected)
    only = torch.where(IDS == IMG, IDS, -100)
    assert model(input_ids=IDS, pixel_values=pixels(), labels=only).loss == 0
    states = model.model(input_ids=IDS, pixel_values=pixels()).last_hidden_state
    torch.testing.assert_close(model.supervised_loss(states, as_trl), expected)


def test_accumulated_steps_equal_one_step():
    model, _ = tiny_model()  # eval mode: no dropout
    labels = labelled(IDS)
    labels[0, :7] = -100
    whole = model(input_ids=IDS, pixel_values=pixels(), labels=labels).loss
    parts = sum(
        model(
            input_ids=IDS[i : i + 1], pixel_values=pixels()[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=4
        ).loss
        for i in range(2)
    )
    torch.testing.assert_close(whole, parts)


def test_packed_rows_equal_separate_rows(model):
    packed = IDS.flatten().unsqueeze(0)
    positions = torch.arange(8).repeat(2).unsqueeze(0)
    together = model(input_ids=packed, pixel_values=pixels(), position_ids=positions).logits[0]
    alone = [model(input_ids=IDS[i : i + 1], pixel_values=pixels()[i : i + 1]).logits[0] for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="use_cache=True is not for packed rows"):
        model(input_ids=packed, pixel_values=pixels(), position_ids=positions, use_cache=True)
    one = model(input_ids=IDS, pixel_values=pixels(), position_ids=positions[:, :8], use_cache=True)
    torch.testing.assert_close(one.logits, torch.stack(alone), atol=1e-5, rtol=0)


def test_frozen_parts_stay_in_eval_whatever_is_called():
    model, _ = tiny_model()
    model.set_trainable(tower=False, projector=True, llm=True)
    for call in (model.train, model.model.train, model.model.vision_tower.train):
        call()
        assert not any(module.training for module in model.model.vision_tower.modules())
    assert model.model.multi_modal_projector.training
    assert model.model.language_model.training
    first, second = (model.model.vision_tower(pixels())["ocr"] for _ in range(2))
    assert torch.equal(first, second)
    model.set_trainable(tower=True, projector=True, llm=True)
    model.train()
    first, second = (model.model.vision_tower(pixels())["ocr"] for _ in range(2))
    assert not torch.equal(first, second), "dropout and DropPath work in a tower that trains"


def test_a_frozen_llm_still_checkpoints():
    model, _ = tiny_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.set_trainable(tower=False, projector=True, llm=False)
    model.train()
    calls = []
    layer = model.model.language_model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=IDS, pixel_values=pixels(), labels=labelled(IDS)).loss.backward()
    assert len(calls) == 2
    assert not layer.self_attn.training
    assert model.model.multi_modal_projector.layers[0].weight.grad.abs().max() > 0
    assert all(p.grad is None for _, p in model.part_parameters("llm"))


def test_parts_cover_every_parameter_once():
    for llm in ("llama", "gemma3_text"):
        model, _ = tiny_model(llm)
        names = [name for part in ("tower", "projector", "llm") for name, _ in model.part_parameters(part)]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="the parts are tower, projector, llm"):
        list(model.part_parameters("vision"))


@pytest.mark.parametrize("fields", [{}, {"fusion": "token", "mean_token": "all"}, {"tower": "siglip_vision_model"}])
def test_save_and_load(fields, tmp_path):
    model, _ = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    for cls in (FlorenceVLForConditionalGeneration, AutoModelForImageTextToText):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        count = model.num_image_tokens(64, 64)
        ids = torch.tensor([[1, *[IMG] * count, 9, 10]])
        assert torch.equal(
            loaded(input_ids=ids, pixel_values=pixels(1)).logits, model(input_ids=ids, pixel_values=pixels(1)).logits
        )
    assert isinstance(AutoModel.from_pretrained(tmp_path), FlorenceVLModel)


def test_attention_backend_of_each_part():
    backends = {"vision_config": "eager", "text_config": "sdpa"}
    model = FlorenceVLForConditionalGeneration._from_config(tiny_config(), attn_implementation=backends)
    assert model.model.vision_tower.davit.config._attn_implementation == "eager"
    assert model.model.vision_tower.encoder.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    reference = FlorenceVLForConditionalGeneration(tiny_config()).eval()
    model.load_state_dict(reference.state_dict())
    out = model.eval()(input_ids=IDS, pixel_values=pixels()).logits
    torch.testing.assert_close(out, reference(input_ids=IDS, pixel_values=pixels()).logits, atol=1e-5, rtol=0)


def test_returns_a_tuple_when_asked(model):
    as_tuple = model(input_ids=IDS, pixel_values=pixels(), return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], model(input_ids=IDS, pixel_values=pixels()).logits)
