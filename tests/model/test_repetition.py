"""The rule that ends a repetitive answer: detection of repetitions, and of words that are merely repeated."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteriaList

from florence_vl.model.repetition import RepetitionStop
from florence_vl.model.tiny import tiny_model


def _ids(*tokens: int) -> torch.Tensor:
    return torch.tensor([list(tokens)])


def test_blocks_over_and_over_are_a_repetition() -> None:
    rule = RepetitionStop(repeats=4, tokens=12, longest=4)
    assert rule.repeating(_ids(*[9, 8], *[1, 2] * 6)).item()
    assert rule.repeating(_ids(*[5] * 12)).item()
    assert rule.repeating(_ids(*[1, 2, 3, 4] * 4)).item()
    assert not rule.repeating(_ids(*[1, 2] * 5)).item()  # too short
    assert not rule.repeating(_ids(*[1, 2, 3, 4] * 3)).item()  # three times only
    assert not rule.repeating(_ids(*[1, 2] * 6, 7)).item()  # continues with something else
    assert not rule.repeating(_ids(*range(40))).item()
    assert not rule.repeating(_ids(*[1, 2, 3, 4, 5] * 8)).item()  # a block longer than `longest`


def test_rows_are_judged_on_their_own_and_the_prompt_does_not_count() -> None:
    rule = RepetitionStop(repeats=2, tokens=4, longest=2)
    prompt = torch.full((2, 9), 7)
    answers = torch.tensor([[1, 2, 1, 2], [1, 2, 3, 4]])
    told = [rule(torch.cat([prompt, answers[:, :n]], 1), None).tolist() for n in range(1, 5)]
    assert told == [[False, False]] * 3 + [[True, False]]


def test_numbers_that_make_no_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        RepetitionStop(repeats=1)


def test_generate_ends_where_a_model_cannot_stop() -> None:
    model, _ = tiny_model(seed=0)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
        head.weight[11] = 1e-3  # whatever was said before: token 11 or, where its logit is negative, token 0
    ids = torch.tensor([[5, 6, 7]])
    limits = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": model.config.text_config.vocab_size - 1}
    free = model.generate(input_ids=ids, **limits)
    stopped = model.generate(input_ids=ids, **limits, stopping_criteria=StoppingCriteriaList([RepetitionStop()]))
    assert free.shape[1] == 3 + 60
    assert 3 + 20 <= stopped.shape[1] < 3 + 40
    assert torch.equal(free[:, : stopped.shape[1]], stopped)
