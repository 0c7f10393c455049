"""Text features: the last hidden layer of a decoder LLM, mean-pooled over a caption's tokens (paper section 4).

The LLM reads the caption with its tokenizer's special tokens (such as a begin token), but these are not pooled, as the
paper averages "the text representations". Shape letters: B texts, L tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence_vl.analyze.encoders.tower import local_weights
from florence_vl.model.features import FeatureStore, content_key, state_hash

FEATURE = "last"


class TextEncoder:
    """Mean-pooled last-layer states of an LLM.

    Args:
        model: A headless decoder (`AutoModel`); put in eval mode and frozen.
        tokenizer: Its tokenizer.
        max_length: Maximum length of a caption in tokens; longer ones are truncated.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 256) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._weights: str | None = None

    @classmethod
    def load(cls, llm: str | Path, max_length: int = 256, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Load an LLM from a folder or from the hub's local cache.

        Raises:
            MissingWeights: The LLM is not on this machine.
            ValueError: Its tokenizer is missing.
        """
        from transformers import AutoModel, AutoTokenizer

        with local_weights("LLM", llm, None if Path(llm).is_dir() or "/" not in str(llm) else f"hf download {llm}"):
            tokenizer = AutoTokenizer.from_pretrained(llm, local_files_only=True)
            model = AutoModel.from_pretrained(llm, local_files_only=True, dtype=dtype)
        return cls(model, tokenizer, max_length)

    @property
    def identity(self) -> dict[str, Any]:
        """Values that determine the vectors: weights, tokenizer, pooling."""
        if self._weights is None:
            self._weights = state_hash(self.model)
        vocabulary = "\n".join(f"{t}\t{i}" for t, i in sorted(self.tokenizer.get_vocab().items()))
        return {
            "llm": self.model.config.model_type,
            "weights": self._weights,
            "tokenizer": content_key(vocabulary.encode()).hex(),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "pooling": "mean of the last layer over tokens without special tokens",
            "max_length": self.max_length,
        }

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, D) pooled states, fp32.

        Raises:
            ValueError: A text has no tokens.
        """
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, return_special_tokens_mask=True, padding=False
        )
        device = next(self.model.parameters()).device
        length = max(len(ids) for ids in encoded["input_ids"])
        ids_BL = torch.zeros(len(texts), length, dtype=torch.long)
        mask_BL, pool_BL = torch.zeros_like(ids_BL), torch.zeros_like(ids_BL)
        for row, (ids, special) in enumerate(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            mask_BL[row, : len(ids)] = 1
            pool_BL[row, : len(ids)] = 1 - torch.tensor(special)
        empty = (pool_BL.sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"the caption {texts[empty[0]]!r} has no token")
        output = self.model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False)
        states_BLD = output.last_hidden_state.float()
        weight_BL1 = pool_BL.to(device).unsqueeze(-1)
        return (states_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)


def pool_texts(
    encoder: TextEncoder,
    texts: Sequence[str],
    store: FeatureStore | None = None,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Pooled states of all texts, (n, D), computing only those missing in the cache. Sorted by length for speed."""
    store = store or FeatureStore(encoder.identity)
    keys = [content_key(text.encode()) for text in texts]
    todo = {key: text for key, text in zip(keys, texts, strict=True) if not store.has(key, [FEATURE])}
    order = sorted(todo, key=lambda key: len(todo[key]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        store.add(part, {FEATURE: encoder([todo[key] for key in part])})
        if progress:
            progress(min(start + batch_size, len(order)), len(order))
    store.flush()
    return store.matrix(keys, [FEATURE])
