"""Attention of packed rows sample by sample, for devices without a variable-length kernel (CPU): `sdpa_varlen`.

With `sdpa`, transformers uses a dense (L, L) block mask for packed rows, and PyTorch computes all of it: with eight
samples per row, seven eighths are wasted, and with a mask it cannot skip the future either. Here every sample is one
causal call without a mask. Everything else (padding, cached decoding, sliding windows) is exactly transformers' `sdpa`.

A sample can also be a tree: a trunk (the image) and branches (questions with their answers), each of which attends only
to the trunk and itself. `branch_ids` (B, L) is 0 in the trunk and in samples without branches, and 1, 2, ... in the
branches of a tree, whose positions all continue after the trunk. `tree_mask` is the mask of such rows.

Shape letters: B rows, A heads, L tokens of a row, D width of a head; of one sample, G key-value heads, M queries of all
heads of a group, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

SDPA_VARLEN = "sdpa_varlen"

LONGEST_PRODUCT = 512
"""Keys of a sample up to which `sdpa_varlen` computes bfloat16 on the CPU as matrix products."""

TREE_ATTENTION = ("eager", "flex_attention", "sdpa", SDPA_VARLEN)
"""Attention implementations that support trees."""


def sdpa_varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """`transformers.masking_utils.sdpa_mask`, but None for packed rows: `sdpa_varlen` derives bounds from the
    positions.

    transformers does not skip a plain causal mask, without cache and padding, only for packed rows.
    """
    bidirectional = "allow_is_bidirectional_skip" in kwargs
    custom = use_vmap or local_size is not None or attention_mask is not None or bidirectional
    if not allow_is_causal_skip and not custom and q_length == kv_length > 1:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        local_size=local_size,
        **kwargs,
    )


class Span(NamedTuple):
    """Consecutive tokens of a row that attend to each other causally, and the trunk before them.

    Attributes:
        start: First token.
        end: Index after the last token.
        trunk_start: First token of the trunk to which they also attend.
        trunk_end: Index after the trunk's last token; `trunk_start` for spans without a trunk (samples, trunks).
    """

    start: int
    end: int
    trunk_start: int
    trunk_end: int


def _begins(position_ids: Tensor) -> Tensor:
    begins_BL = torch.ones_like(position_ids, dtype=torch.bool)
    begins_BL[:, 1:] = position_ids.diff(dim=-1) != 1
    return begins_BL


def row_spans(position_ids: Tensor, branch_ids: Tensor | None = None) -> list[list[Span]]:
    """The spans of each row. A sample begins where positions do not increase by one, a branch where its number changes.

    Args:
        position_ids: (B, L).
        branch_ids: (B, L); None for rows without trees.

    Raises:
        ValueError: Positions go back, but not to 0, and there are no `branch_ids`.
    """
    branches_BL = torch.zeros_like(position_ids) if branch_ids is None else branch_ids
    begins_BL = _begins(position_ids)
    begins_BL[:, 1:] |= branches_BL.diff(dim=-1) != 0
    if branch_ids is None and ((position_ids[:, 1:] > 0) & (position_ids.diff(dim=-1) < 1)).any():
        raise ValueError(
            "positions go back, but not to 0, as in message trees; branch_ids, which assign tokens to branches, "
            "are missing or were not passed on by the LLM"
        )
    rows = []
    for begins_L, branches_L in zip(begins_BL, branches_BL, strict=True):
        starts = begins_L.nonzero()[:, 0]
        spans: list[Span] = []
        trunk = (0, 0)
        ends = [*starts[1:].tolist(), begins_L.numel()]
        for start, end, branch in zip(starts.tolist(), ends, branches_L[starts].tolist(), strict=True):
            spans.append(Span(start, end, *(trunk if branch else (start, start))))
            trunk = trunk if branch else (start, end)
        rows.append(spans)
    return rows


def _join_branches(spans: list[Span]) -> list[Span]:
    """Spans with branches of one trunk joined, where computing their scores together costs at most half as much again.

    Many short branches are then one product of matrices instead of many small ones.
    """
    joined: list[Span] = []
    useful = 0  # scores of the last span's branches
    for span in spans:
        own, trunk = span.end - span.start, span.trunk_end - span.trunk_start
        scores = own * (trunk + own)
        if joined and trunk and joined[-1].trunk_start == span.trunk_start < joined[-1].trunk_end:
            both = span.end - joined[-1].start
            if both * (trunk + both) <= 1.5 * (useful + scores):
                joined[-1] = joined[-1]._replace(end=span.end)
                useful += scores
                continue
        joined.append(span)
        useful = scores
    return joined


def tree_mask_function(
    position_ids: Tensor, branch_ids: Tensor, window: int | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which keys a query attends to in rows with trees, as a mask function of transformers and of flex attention.

    Args:
        position_ids: (B, L).
        branch_ids: (B, L).
        window: Size of a sliding window in positions; None for full attention.
    """
    begins_BL = _begins(position_ids)
    begins_BL[:, 1:] &= branch_ids[:, 1:] == 0
    sample_BL = begins_BL.cumsum(-1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch = branch_ids[batch, key]
        seen = (key <= query) & (sample_BL[batch, key] == sample_BL[batch, query])
        seen = seen & ((branch == 0) | (branch == branch_ids[batch, query]))
        return seen if window is None else seen & (position_ids[batch, query] - position_ids[batch, key] < window)

    return sees


def check_tree_attention(name: str) -> None:
    """Refuse an attention implementation that would let the branches of a message tree see each other.

    Raises:
        ValueError: `name` is none of `TREE_ATTENTION`.
    """
    if name not in TREE_ATTENTION:
        raise ValueError(
            f"rows with message trees can't be computed by the attention {name!r}: set attn_implementation of "
            f"text_config to {', '.join(TREE_ATTENTION)}, or lay the data out without trees"
        )


def tree_mask(config: PreTrainedConfig, inputs_embeds: Tensor, position_ids: Tensor, branch_ids: Tensor) -> Any:
    """The `attention_mask` of rows with trees, for the forward pass of an LLM.

    Args:
        config: Config of the LLM.
        inputs_embeds: (B, L, H).
        position_ids: (B, L).
        branch_ids: (B, L).

    Returns:
        The mask for the attention implementation: (B, 1, L, L) or a `BlockMask`, or None if `sdpa_varlen` reads
        `branch_ids` itself; a dict of these by layer type for an LLM with several types.

    Raises:
        ValueError: The attention implementation, or the LLM's type of layer, does not support trees.
    """
    name = config._attn_implementation
    check_tree_attention(name)
    sliding = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"message trees (branch_ids) need an LLM of attention layers; this one ({config.model_type}) has layers of "
            f"the type {', '.join(sorted(unknown))}, which would carry one branch into the next"
        )

    def mask(kind: str) -> Any:
        window = sliding if kind == "sliding_attention" else None
        if name == SDPA_VARLEN and window is None:
            return None
        make = sdpa_mask if name == SDPA_VARLEN else ALL_MASK_ATTENTION_FUNCTIONS[name]
        rows, length = inputs_embeds.shape[:2]
        return make(
            batch_size=rows,
            q_length=length,
            kv_length=length,
            q_offset=0,
            kv_offset=0,
            mask_function=tree_mask_function(position_ids.expand_as(branch_ids), branch_ids, window),
            allow_is_causal_skip=False,
            dtype=inputs_embeds.dtype,
            device=inputs_embeds.device,
            config=config,
        )

    masks = {kind: mask(kind) for kind in sorted(kinds)}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def flash_bounds(position_ids: Tensor) -> dict[str, Any]:
    """Bounds of the samples of packed rows for flash attention, by transformers' names.

    transformers derives them from the positions for a single row only; several rows would get plain causal attention
    across their samples.

    Args:
        position_ids: (B, L), restarting at each sample.
    """
    starts = _begins(position_ids).flatten().nonzero()[:, 0]
    bounds = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _bf16_on_cpu(query: Tensor) -> bool:
    if query.device.type != "cpu":
        return False
    return (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype) == torch.bfloat16


def _bf16_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one sample as matrix products, one for all query heads of a key-value head.

    PyTorch's fused kernel takes three times as long on CPUs in bfloat16, forward and backward, for samples of up to 200
    tokens, and 1.5 times for 400 (`benchmarks/train.py attention`). As in transformers' `eager`, scores are rounded to
    bfloat16 before the softmax, which is computed in float32.
    """
    heads, length, width = query.shape[1:]
    groups = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    seen_LK = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask[0, 0]
    bias_LK = torch.zeros(seen_LK.shape, dtype=torch.bfloat16).masked_fill_(~seen_LK, float("-inf"))
    bias_GMK = bias_LK.repeat(heads // groups, 1).expand(groups, -1, -1)
    q_GMD = query.reshape(groups, heads // groups * length, width).bfloat16()
    with torch.autocast("cpu", enabled=False):  # it would store the softmax in float32
        scores_GMK = torch.baddbmm(bias_GMK, q_GMD, key[0].bfloat16().mT, alpha=scaling)
        out_GMD = scores_GMK.softmax(-1) @ value[0].bfloat16()
    return out_GMD.view(1, heads, length, width).transpose(1, 2), None


def sdpa_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    branch_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; packed rows have several samples or a tree, and no mask.

    Args:
        module: The attention layer.
        query: (B, A, L, D).
        key: (B, key-value heads, L, D).
        value: Like `key`.
        attention_mask: None for packed rows.
        position_ids: (B or 1, L), restarting at each sample.
        branch_ids: (B, L), for rows with trees.
        **kwargs: As for `sdpa`.

    Returns:
        (B, L, A, D), and None for the attention weights.
    """
    packed = None
    if attention_mask is None and query.shape[2] == key.shape[2] > 1:
        assert position_ids is not None, "this LLM passes no positions to its attention; use attn_implementation sdpa"
        packed = row_spans(position_ids.expand(query.shape[0], -1), branch_ids)
    if packed is None or all(len(spans) == 1 for spans in packed):
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_ids=position_ids, **kwargs)
    products = _bf16_on_cpu(query) and not kwargs.get("dropout")
    rows = []
    for index, spans in enumerate(packed):
        q_row, k_row, v_row = (tensor[index : index + 1] for tensor in (query, key, value))
        found = []
        for start, end, trunk_start, trunk_end in _join_branches(spans):
            k, v = k_row[:, :, start:end], v_row[:, :, start:end]
            mask = None
            if trunk_end > trunk_start:
                assert branch_ids is not None
                branches = branch_ids[index, start:end]
                own = (branches[:, None] == branches).tril()
                mask = nn.functional.pad(own, (trunk_end - trunk_start, 0), value=True)[None, None]
                trunk = slice(trunk_start, trunk_end)
                k, v = torch.cat([k_row[:, :, trunk], k], dim=2), torch.cat([v_row[:, :, trunk], v], dim=2)
            attend = _bf16_attention if products and k.shape[2] <= LONGEST_PRODUCT else sdpa_attention_forward
            found.append(attend(module, q_row[:, :, start:end], k, v, mask, **kwargs)[0])
        rows.append(torch.cat(found, dim=1))
    return torch.cat(rows), None


def register_attention() -> None:
    """Register `sdpa_varlen` with transformers; importing `florence_vl.model` calls it."""
    AttentionInterface.register(SDPA_VARLEN, sdpa_varlen)
    AttentionMaskInterface.register(SDPA_VARLEN, sdpa_varlen_mask)


__all__ = [
    "SDPA_VARLEN",
    "TREE_ATTENTION",
    "Span",
    "check_tree_attention",
    "flash_bounds",
    "register_attention",
    "row_spans",
    "sdpa_varlen",
    "sdpa_varlen_mask",
    "tree_mask",
    "tree_mask_function",
]
