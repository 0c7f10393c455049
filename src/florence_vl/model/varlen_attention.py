"""Attention of packed rows sample by sample, where no variable-length kernel exists (CPU): `sdpa_varlen`.

Under `sdpa` transformers gives packed rows a dense (L, L) block mask, and PyTorch computes all of it: of eight samples
a row seven eighths for nothing, and with a mask it can't leave out the future either. Here every sample is one causal
call without a mask. Everything else (padding, cached decoding, sliding windows) is transformers' `sdpa`, to the letter.

Shape letters: B rows, A heads, L tokens of a row, D width of a head.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA_VARLEN = "sdpa_varlen"


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
    """`transformers.masking_utils.sdpa_mask`, but None for packed rows: `sdpa_varlen` takes bounds from the positions.

    Of all masks that transformers makes, a plain causal one may not be skipped, without cache and padding, only for
    packed rows.
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


def sample_bounds(position_ids: Tensor) -> list[list[int]]:
    """Where each row's samples begin, and the row's end: a sample begins where positions don't go on by one.

    Args:
        position_ids: (B, L).
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    return [[*row.nonzero()[:, 0].tolist(), row.numel()] for row in begins]


def flash_bounds(position_ids: Tensor) -> dict[str, Any]:
    """What tells flash attention where the samples of packed rows are, by transformers' names.

    transformers derives it from the positions for a single row only; several rows would get plain causal attention
    across their samples.

    Args:
        position_ids: (B, L), restarting with each sample.
    """
    begins_BL = torch.ones_like(position_ids, dtype=torch.bool)
    begins_BL[:, 1:] = position_ids.diff(dim=-1) != 1
    starts = begins_BL.flatten().nonzero()[:, 0]
    bounds = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def sdpa_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; packed rows are those with several samples and no mask.

    Args:
        module: The attention layer.
        query: (B, A, L, D).
        key: (B, key-value heads, L, D).
        value: Like `key`.
        attention_mask: None for packed rows.
        position_ids: (B or 1, L), restarting with each sample.
        **kwargs: As for `sdpa`.

    Returns:
        (B, L, A, D), and no weights.
    """
    packed = None
    if attention_mask is None and query.shape[2] == key.shape[2] > 1:
        assert position_ids is not None, "this LLM hides the positions from its attention; use attn_implementation sdpa"
        packed = sample_bounds(position_ids.expand(query.shape[0], -1))
    if packed is None or all(len(bounds) == 2 for bounds in packed):
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_ids=position_ids, **kwargs)
    rows = []
    for index, bounds in enumerate(packed):
        row = [tensor[index : index + 1] for tensor in (query, key, value)]
        samples = []
        for start, end in itertools.pairwise(bounds):
            q, k, v = (tensor[:, :, start:end] for tensor in row)
            samples.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0])
        rows.append(torch.cat(samples, dim=1))
    return torch.cat(rows), None


def register_attention() -> None:
    """Make `sdpa_varlen` known to transformers; importing `florence_vl.model` does."""
    AttentionInterface.register(SDPA_VARLEN, sdpa_varlen)
    AttentionMaskInterface.register(SDPA_VARLEN, sdpa_varlen_mask)


__all__ = ["SDPA_VARLEN", "flash_bounds", "register_attention", "sample_bounds", "sdpa_varlen", "sdpa_varlen_mask"]
