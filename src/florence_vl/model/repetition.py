"""Stops an answer that repeats itself endlessly, as small models do when uncertain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class RepetitionStop(StoppingCriteria):
    """Ends a row of `generate` if the end of its answer is one block of tokens, repeated.

    The prompt does not count. Create one instance per call of `generate`.

    Args:
        repeats: Minimum number of consecutive repetitions of the block.
        tokens: Minimum number of tokens that the repetition covers, so that "no no no no" is allowed.
        longest: Maximum length of the block in tokens.

    Example:
        >>> model.generate(**inputs, stopping_criteria=StoppingCriteriaList([RepetitionStop()]))  # doctest: +SKIP
    """

    def __init__(self, repeats: int = 4, tokens: int = 20, longest: int = 16) -> None:
        if repeats < 2 or tokens < 2 or longest < 1:
            raise ValueError(
                f"repeats and tokens must be at least 2, longest at least 1; found {repeats}, {tokens}, {longest}"
            )
        self.repeats, self.tokens, self.longest = repeats, tokens, longest
        self._prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row repeats itself.

        Args:
            input_ids: Prompt and answer so far, (B, L).
            scores: Not used.

        Returns:
            Bool, (B,).
        """
        if self._prompt is None:
            self._prompt = input_ids.shape[1] - 1  # first called when the answer has one token
        answer_BL = input_ids[:, self._prompt :]
        return self.repeating(answer_BL)

    def repeating(self, answer_BL: Tensor) -> Tensor:
        """Whether each answer, without its prompt, ends in a repetition: bool, (B,)."""
        length = answer_BL.shape[1]
        found_B = torch.zeros(len(answer_BL), dtype=torch.bool, device=answer_BL.device)
        for period in range(1, self.longest + 1):
            span = max(self.repeats * period, self.tokens)
            if span > length:
                break
            tail_BS = answer_BL[:, length - span :]
            found_B |= (tail_BS[:, period:] == tail_BS[:, :-period]).all(dim=1)
        return found_B
