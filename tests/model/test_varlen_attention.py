"""`sdpa_varlen` computes what the block mask does, and is transformers' `sdpa` everywhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

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


def flash_stand_ins(monkeypatch):
    """transformers' dispatch of `flash_attention_2` with the two kernels computed by PyTorch; returns the calls."""
    called = []

    def attend(q, k, v, softmax_scale):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    def whole(q, k, v, causal=True, softmax_scale=None, **kwargs):
        called.append("whole")
        return attend(q, k, v, softmax_scale)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True, softmax_scale=None):
        called.append("varlen")
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        bounds = cu_seqlens_q.tolist()
        assert bounds[-1] == len(q)
        parts = [attend(q[None, a:b], k[None, a:b], v[None, a:b], softmax_scale) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts, 1)[0]

    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(
        modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: (whole, varlen, None, None, None)
    )
    return called


def implement(model, name, monkeypatch):
    if name == "flash_attention_2":  # not installed here, so it can't be chosen by `set_attn_implementation`
        called = flash_stand_ins(monkeypatch)
        model.model.language_model.config._attn_implementation = name
        return called
    model.set_attn_implementation({"text_config": name})
    return []


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    ["sdpa", "eager", SDPA_VARLEN, "flash_attention_2", pytest.param("flex_attention", marks=pytest.mark.slow)],
)
def test_samples_of_any_number_of_rows_are_isolated_with_every_backend(name, rows, monkeypatch):
    model, _ = tiny_model()
    model.eval()
    called = implement(model, name, monkeypatch)
    tokens = torch.randint(20, 500, (rows, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(4), *range(7), 0], [*range(9), *range(3)], [*range(12)]])[:rows]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions).logits
        assert set(called) <= {"varlen"}
        model.set_attn_implementation({"text_config": "eager"})
        for row, bounds in enumerate(sample_bounds(positions)):
            for start, end in itertools.pairwise(bounds):
                alone = model(tokens[row : row + 1, start:end]).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-4, atol=1e-5)
    assert bool(called) == (name == "flash_attention_2")
