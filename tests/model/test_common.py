"""What transformers' common tests ask of every model, in our own words: states, embeddings, attention, training."""

from __future__ import annotations

import copy

import pytest
import torch

from florence_vl.model.head import LanguageHead
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.tiny import tiny_config, tiny_model

IMAGE_TOKENS = 4


@pytest.fixture
def model():
    return tiny_model()[0]


def inputs(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 400, (count, 10), generator=generator)
    ids[:, 1 : 1 + IMAGE_TOKENS] = 3
    pixels = torch.rand((count, 3, 64, 64), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def test_hidden_states_and_attentions_are_returned_when_asked(model):
    model.set_attn_implementation("eager")
    batch, text = inputs(), model.config.text_config
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == text.num_hidden_layers + 1
    assert {tuple(state.shape) for state in out.hidden_states} == {(2, 10, text.hidden_size)}
    assert len(out.attentions) == text.num_hidden_layers
    assert out.attentions[0].shape == (2, text.num_attention_heads, 10, 10)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, text.num_attention_heads, 10))
    plain = model(**batch)
    assert plain.hidden_states is None
    assert plain.attentions is None
    torch.testing.assert_close(plain.logits, out.logits)
    model.config.text_config.output_hidden_states = True
    assert model(**batch, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_attention_backends_agree_and_reach_every_part(model):
    batch = inputs()
    found = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        parts = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
        assert parts == {name}
        found[name] = model(**batch).logits
    torch.testing.assert_close(found["eager"], found["sdpa"], atol=1e-5, rtol=1e-4)
    model.set_attn_implementation({"text_config": "eager"})
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_can_be_resized_and_tied(tied, tmp_path):
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = FlorenceVLForConditionalGeneration(config).eval()
    batch, rows = inputs(), config.text_config.vocab_size
    before = model(**batch).logits
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.resize_token_embeddings(rows + 10)
    assert model.config.text_config.vocab_size == rows + 10
    assert model.get_output_embeddings().weight.shape[0] == rows + 10
    assert isinstance(model.lm_head, LanguageHead), "the loss of a plain layer needs all logits at once"
    torch.testing.assert_close(model(**batch).logits[..., :rows], before)
    model.save_pretrained(tmp_path)
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_embeddings_in_place_of_ids_give_the_same_logits(model):
    batch = inputs()
    embedded = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    torch.testing.assert_close(model(**embedded).logits, model(**batch).logits)


def test_fresh_weights_are_finite_and_of_the_configured_spread():
    """What `from_config` makes: norms of one, biases of zero, no weight left uninitialized."""
    torch.manual_seed(0)
    model = FlorenceVLForConditionalGeneration(tiny_config())
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all(), name
        assert weight.abs().max() < 3, name
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(model, reentrant):
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    other.enable_input_require_grads()
    gradients = []
    for each in (model, other):
        each.train()
        each.model.vision_tower.eval()  # dropout of the tower would differ
        each(**batch, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_a_step_of_training_reaches_every_weight_and_lowers_the_loss(model):
    batch = {**inputs(), "labels": inputs()["input_ids"]}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        unreached = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert unreached == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_padding_does_not_change_logits(model):
    batch = inputs(1)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), batch["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 3, dtype=torch.long), batch["attention_mask"]], dim=1),
        "pixel_values": batch["pixel_values"],
    }
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = model(**padded, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, model(**batch).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True},
    ],
)
def test_ways_to_generate(model, options):
    batch = inputs()
    found = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, pad_token_id=0, **options)
    ids = found.sequences if options.get("return_dict_in_generate") else found
    assert ids.shape == (2 * options.get("num_return_sequences", 1), 14)
    assert torch.equal(ids[:: options.get("num_return_sequences", 1), :10], batch["input_ids"])
    if options.get("return_dict_in_generate"):
        assert len(found.scores) == len(found.hidden_states) == 4
