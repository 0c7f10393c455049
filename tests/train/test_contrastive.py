"""The contrastive loss: equal to torch's cross-entropy, by blocks, targets for pairs with equal caption or image."""

from __future__ import annotations

import pytest
import torch

from florence_vl.train.contrastive import Groups, contrastive_loss

D = 24


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=1)


def test_loss_is_torchs_cross_entropy():
    vision, text = unit(50, D, seed=1), unit(50, D, seed=2)
    for temperature in (1.0, 0.1):
        logits = vision @ text.T / temperature
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(50))
        found = contrastive_loss(vision, text, temperature=temperature, chunk=7)
        torch.testing.assert_close(found, expected)
        both = (expected + torch.nn.functional.cross_entropy(logits.T, torch.arange(50))) / 2
        torch.testing.assert_close(contrastive_loss(vision, text, None, temperature, symmetric=True, chunk=7), both)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_by_blocks_is_the_whole_gradient(symmetric):
    text = unit(40, D, seed=2)
    groups = Groups(torch.arange(40) // 3, torch.arange(40))
    gradients = []
    for backward in (True, False):
        vision = unit(40, D, seed=1).requires_grad_(True)
        loss = contrastive_loss(vision, text, groups.targets(), 0.2, symmetric, chunk=9, backward=backward)
        if not backward:
            loss.backward()
        gradients.append(vision.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_shared_captions_share_the_target():
    groups = Groups.of(["A  cat", "a dog", "a cat", "a bird"], [b"1", b"2", b"3", b"2"])
    targets = groups.targets(chunk=3).to_dense()
    expected = torch.tensor([[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]])
    torch.testing.assert_close(targets, expected)
    vision, text = unit(4, D, seed=1), unit(4, D, seed=2)
    found = contrastive_loss(vision, text, groups.targets(), chunk=3)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(vision @ text.T, expected))
    assert groups.first().tolist() == [0, 1]
    assert Groups.of(["a", "b"], [b"1", b"2"]).targets() is None
