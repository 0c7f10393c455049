"""`sdpa_varlen` computes what the block mask does, and is transformers' `sdpa` everywhere else."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from florence_vl.model.tiny import tiny_model
from florence_vl.model.varlen_attention import SDPA_VARLEN, sample_bounds

LLMS = ["llama", "qwen2", "qwen3", "phi3", "mistral"]


def language_model(kind: str):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, sliding_window=5))


def test_bounds_of_samples():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert sample_bounds(positions) == [[0, 3, 5, 6], [0, 6]]


@pytest.mark.parametrize("kind", LLMS)
def test_packed_rows_are_those_of_the_block_mask(kind):
    model = language_model(kind)
    tokens = torch.randint(1, 64, (2, 12))
    positions = torch.tensor([[*range(4), *range(7), 0], [*range(9), *range(3)]])
    found = {}
    for name in ("sdpa", SDPA_VARLEN):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(tokens, position_ids=positions, use_cache=False).logits
        logits.square().mean().backward()
        found[name] = (logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*(logits for logits, _ in found.values()))
    for mine, theirs in zip(found[SDPA_VARLEN][1], found["sdpa"][1], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_padding_and_cached_decoding_are_sdpa_itself():
    model = language_model("llama").eval()
    tokens = torch.randint(1, 64, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = []
    for name in ("sdpa", SDPA_VARLEN):
        model.set_attn_implementation(name)
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        answers = model.generate(tokens, **options)
        found.append((model(tokens, attention_mask=mask).logits, model(tokens).logits, answers))
    for sdpa, varlen in zip(*found, strict=True):
        assert torch.equal(sdpa, varlen)


def test_it_can_be_chosen_for_the_llm_of_a_florence_vl():
    model, _ = tiny_model()
    model.set_attn_implementation({"text_config": SDPA_VARLEN})
    assert model.model.language_model.config._attn_implementation == SDPA_VARLEN
    assert model.config.vision_config._attn_implementation != SDPA_VARLEN
