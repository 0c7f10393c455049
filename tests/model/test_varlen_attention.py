"""`sdpa_varlen` is equal to the block mask for packed rows, and to transformers' `sdpa` otherwise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

from florence_vl.model import varlen_attention
from florence_vl.model.tiny import tiny_model
from florence_vl.model.varlen_attention import SDPA_VARLEN, row_spans, tree_mask

LLMS = ["llama", "qwen2", "qwen3", "phi3", "mistral"]


def language_model(kind: str):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, sliding_window=5))


def test_spans_of_samples_and_trees():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert row_spans(positions) == [[(0, 3, 0, 0), (3, 5, 3, 3), (5, 6, 5, 5)], [(0, 6, 0, 0)]]
    positions = torch.tensor([[0, 0, 1, 2, 3, 2, 2, 0, 1]])
    branches = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 0, 0]])
    trunk = (1, 3)
    spans = [(0, 1, 0, 0), (1, 3, 1, 1), (3, 5, *trunk), (5, 6, *trunk), (6, 7, *trunk), (7, 9, 7, 7)]
    assert row_spans(positions, branches) == [spans]
    with pytest.raises(ValueError, match="branch_ids, which assign tokens to branches, are missing"):
        row_spans(positions)


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


@pytest.mark.parametrize("masked", [False, True])
def test_products_in_bfloat16_are_the_attention_of_float32(masked):
    torch.manual_seed(0)
    query = torch.randn(1, 6, 12, 16, requires_grad=True)
    key, value = (torch.randn(1, 2, 12, 16, requires_grad=True) for _ in range(2))
    mask = (torch.ones(12, 12).tril().bool() & (torch.rand(12, 12) < 0.7) | torch.eye(12).bool())[None, None]
    mask = mask if masked else None
    module = language_model("llama").model.layers[0].self_attn  # 2 query heads for a key-value head
    module.num_key_value_groups = 3
    found = []
    for attend in (varlen_attention._bf16_attention, varlen_attention.sdpa_attention_forward):
        out, _ = attend(module, query, key, value, mask, scaling=0.3)
        found.append((out.float(), *torch.autograd.grad(out.float().square().sum(), (query, key, value))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("trees", [False, True])
def test_bfloat16_rows_on_cpus_take_products(trees, monkeypatch):
    model = tree_model("llama").eval()
    model.set_attn_implementation({"text_config": SDPA_VARLEN})
    tokens, positions, branches, _ = tree_rows()
    if not trees:
        positions, branches = torch.arange(tokens.shape[1]).expand_as(tokens) % 7, None
    calls = []
    products = varlen_attention._bf16_attention
    monkeypatch.setattr(varlen_attention, "_bf16_attention", lambda *a, **k: calls.append(1) or products(*a, **k))
    with torch.no_grad():
        expected = model(tokens, position_ids=positions, branch_ids=branches).logits
        assert not calls
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens, position_ids=positions, branch_ids=branches).logits
    assert calls
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)


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
        for row, spans in enumerate(row_spans(positions)):
            for start, end, *_ in spans:
                alone = model(tokens[row : row + 1, start:end]).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-4, atol=1e-5)
    assert bool(called) == (name == "flash_attention_2")


# A row with a plain sample, a tree of three branches, a tree of two and padding; another of one tree.
TREE_ROWS = [[(3,), (4, 5, 1, 3), (2, 2, 2), (1,)], [(6, 8, 9)]]


def tree_rows(layout=TREE_ROWS):
    """(tokens, positions, branches) of rows, and for each sequence that corresponds to a sample: row and columns."""
    generator = torch.Generator().manual_seed(3)
    tokens, positions, branches, samples = [], [], [], []
    for row, trees in enumerate(layout):
        position, branch, start = [], [], 0
        for trunk, *parts in trees:
            columns = list(range(start, start + trunk))
            position += range(trunk)
            branch += [0] * trunk
            start += trunk
            for number, length in enumerate(parts, start=1):
                samples.append((row, [*columns, *range(start, start + length)]))
                position += range(trunk, trunk + length)
                branch += [number] * length
                start += length
            if not parts:
                samples.append((row, columns))
        tokens.append(torch.randint(4, 64, (start,), generator=generator))
        positions.append(torch.tensor(position))
        branches.append(torch.tensor(branch))
    return *(torch.stack(rows) for rows in (tokens, positions, branches)), samples


def tree_model(kind):
    """A tiny Florence-VL with an LLM of a family; its windows, where it has any, are shorter than a sample."""
    text = language_model(kind).config.to_dict()
    if kind == "llama":
        del text["sliding_window"]
    elif kind in ("qwen2", "gemma2"):
        text |= {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    model, _ = tiny_model(text_config=text)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "name"), [*itertools.product(LLMS, ["eager", "sdpa", SDPA_VARLEN]), ("gemma2", "eager")]
)
def test_trees_are_the_same_pairs_as_separate_samples(kind, name):
    model = tree_model(kind)
    tokens, positions, branches, samples = tree_rows()
    inner = (branches > 0) & torch.cat([torch.zeros(2, 1, dtype=torch.bool), branches.diff(dim=-1) == 0], dim=-1)
    inner[0, 1:3] = True  # the plain sample
    labels = torch.where(inner, tokens, -100)  # nothing in a trunk, nor what would be predicted from it
    items = int(inner.sum())
    model.set_attn_implementation({"text_config": "eager"})
    expected_loss = torch.zeros(())
    expected_logits = {}
    for number, (row, columns) in enumerate(samples):
        out = model(tokens[row : row + 1, columns], labels=labels[row : row + 1, columns], num_items_in_batch=items)
        out.loss.backward()
        expected_loss += out.loss.detach()
        expected_logits[number] = out.logits.detach()[0]
    expected = gradients(model)
    model.zero_grad()
    model.set_attn_implementation({"text_config": name})
    found = model(tokens, position_ids=positions, branch_ids=branches, labels=labels, num_items_in_batch=items)
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), expected_loss)
    for number, (row, columns) in enumerate(samples):
        torch.testing.assert_close(found.logits[row, columns], expected_logits[number], rtol=1e-4, atol=1e-5)
    assert gradients(model).keys() == expected.keys()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", ["sdpa", SDPA_VARLEN])
def test_a_changed_branch_leaves_the_others_unchanged(name):
    model = tree_model("llama")
    model.set_attn_implementation({"text_config": name})
    tokens, positions, branches, _ = tree_rows()
    changed = (branches == 2) & (positions >= 6)  # in row 1 alone
    others = ~changed & ~((branches == 2) & (torch.arange(2)[:, None] == 1))
    found = []
    for text in (tokens, torch.where(changed, 63 - tokens, tokens)):
        embeddings = model.get_input_embeddings()(text).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, position_ids=positions, branch_ids=branches).logits
        logits[others].square().sum().backward()
        found.append((logits.detach(), embeddings.grad))
    (before, gradient), (after, gradient_after) = found
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[changed], after[changed])
    assert torch.equal(gradient[others], gradient_after[others])
    assert (gradient[changed] == 0).all()
    assert (gradient[1, :6] != 0).any()  # the trunk learns from every branch


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_the_block_mask_of_flex_attention_is_the_dense_mask(kind, monkeypatch):
    config = tree_model(kind).model.language_model.config
    _, *rows, _ = tree_rows()
    found = {}
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", lambda mask_mod, **sizes: mask_mod)
    for config._attn_implementation in ("sdpa", "flex_attention"):
        mask = tree_mask(config, torch.zeros(2, 23, 1), *rows)
        found[config._attn_implementation] = mask if isinstance(mask, dict) else {"all": mask}
    assert len(found["sdpa"]) == (2 if kind == "qwen2" else 1)
    for layers, dense in found["sdpa"].items():
        assert torch.equal(create_mask(found["flex_attention"][layers], 2, 1, 23, 23, "cpu"), dense)


def test_what_cannot_compute_trees_is_refused(monkeypatch):
    model = tree_model("llama")
    tokens, positions, branches, _ = tree_rows()
    with pytest.raises(ValueError, match="branch_ids are for packed rows"):
        model(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions, branch_ids=branches)
    with pytest.raises(ValueError, match="branch_ids are for packed rows"):
        model(tokens, branch_ids=branches)
    config = model.model.language_model.config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"this one \(llama\) has layers of the type linear_attention"):
        model(tokens, position_ids=positions, branch_ids=branches)
    config.layer_types = None
    called = implement(model, "flash_attention_2", monkeypatch)
    with pytest.raises(ValueError, match="can't be computed by the attention 'flash_attention_2': set attn_impl"):
        model(tokens, position_ids=positions, branch_ids=branches)
    assert not called
