"""The chunked loss of the head equals the loss on full logits, and never materializes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from florence_vl.model import head as head_module
from florence_vl.model.head import LanguageHead, chunk_rows, summed_loss
from florence_vl.model.tiny import tiny_model

WIDTH, VOCAB = 24, 96


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * VOCAB * 7)  # 7 positions at once


def plain(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(states).float(), targets, reduction="sum")


def run(chunked: bool, count: int, dtype: torch.dtype = torch.float32, autocast: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    head = LanguageHead(WIDTH, VOCAB).to(dtype)
    states = torch.randn(count, WIDTH).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (count,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (summed_loss if chunked else plain)(head, states, targets)
    assert loss.dtype == torch.float32
    (loss / 335 * 2).backward()
    assert states.grad is not None
    assert head.weight.grad is not None
    return [loss.detach(), states.grad.float(), head.weight.grad.float()]


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("count", [0, 1, 7, 8, 50])
def test_loss_and_gradients_are_those_of_whole_logits(count: int) -> None:
    assert chunk_rows(VOCAB) == 7
    for ours, reference in zip(run(True, count), run(False, count), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bf16_is_as_near_to_float32_as_whole_logits_are(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = run(False, 200)
    ours, reference = run(True, 200, dtype, autocast), run(False, 200, dtype, autocast)
    for one, whole, right in zip(ours, reference, exact, strict=True):
        # gradients are rounded twice, before and after they are scaled: the square root of 2
        assert (one - right).norm() <= 1.6 * (whole - right).norm() + 1e-6


@pytest.mark.usefixtures("_small_chunks")
def test_whole_logits_never_exist() -> None:
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else [result]) if hasattr(t, "numel"))
            return result

    head, states = LanguageHead(WIDTH, VOCAB), torch.randn(500, WIDTH, requires_grad=True)
    with Watch():
        summed_loss(head, states, torch.randint(VOCAB, (500,))).backward()
    assert max(sizes) == 500 * WIDTH  # the states' gradient
    assert 500 * WIDTH < 500 * VOCAB


@pytest.mark.usefixtures("_small_chunks")
def test_what_is_frozen_or_not_asked_for_costs_no_gradient() -> None:
    head, states = LanguageHead(WIDTH, VOCAB).requires_grad_(False), torch.randn(9, WIDTH, requires_grad=True)
    targets = torch.randint(VOCAB, (9,))
    summed_loss(head, states, targets).backward()
    assert head.weight.grad is None
    assert states.grad is not None
    with torch.no_grad():
        assert not summed_loss(head, states, targets).requires_grad


def test_heads_that_were_replaced_still_give_the_loss() -> None:
    torch.manual_seed(0)
    head, states, targets = nn.Linear(WIDTH, VOCAB, bias=False), torch.randn(9, WIDTH), torch.randint(VOCAB, (9,))
    assert summed_loss(head, states, targets) == plain(head, states, targets)


def test_the_model_s_loss_is_the_same_with_and_without_logits() -> None:
    model, processor = tiny_model()
    ids = processor.tokenizer("a red car next to a small house", return_tensors="pt").input_ids
    assert isinstance(model.lm_head, LanguageHead)
    with_logits = model(input_ids=ids, labels=ids)
    without = model(input_ids=ids, labels=ids, skip_logits=True)
    assert without.logits is None
    torch.testing.assert_close(without.loss, with_logits.loss)
