"""The head at supervised positions against full logits: memory and time of one training step's loss.

    python benchmarks/loss.py [--vocabulary 128256] [--images 600] [--supervised 120] [--width 1024]

One row of `--images` image tokens and a prompt, and `--supervised` answer tokens, Llama-3's vocabulary: forward and
backward of head and cross-entropy, and the peak memory that they add, each alternative in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import peak_memory, side_by_side
from torch import Tensor, nn


def prepare(
    which: str, vocabulary: int, images: int, supervised: int, width: int, train_head: bool = True
) -> Callable[[], Tensor]:
    """Forward and backward of `which`: `full` logits, or the `supervised` positions only (the model's own code).

    With `train_head=False` the gradient of the head's weight, of which both need one, is left out: what remains is the
    memory of the logits and their gradient.
    """
    from florence_vl import FlorenceVLForConditionalGeneration

    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False)
    states = torch.randn(1, images + supervised, width, requires_grad=True)
    labels = torch.full((1, images + supervised), -100)
    labels[0, images:] = torch.randint(vocabulary, (supervised,))
    head.weight.requires_grad_(train_head)
    head.weight.grad, states.grad = torch.zeros_like(head.weight), torch.zeros_like(states)

    def full() -> Tensor:
        logits = head(states).float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    class Holder:
        lm_head = head
        supervised_loss = FlorenceVLForConditionalGeneration.supervised_loss

    def step() -> Tensor:
        loss = full() if which == "full" else Holder().supervised_loss(states, labels)
        loss.backward()
        return loss.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--images", type=int, default=600, help="positions without supervision")
    parser.add_argument("--supervised", type=int, default=120)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes: tuple[Any, ...] = (arguments.vocabulary, arguments.images, arguments.supervised, arguments.width)
    steps = {which: prepare(which, *sizes) for which in ("full", "supervised")}
    losses = {which: step().item() for which, step in steps.items()}
    assert abs(losses["full"] - losses["supervised"]) < 1e-4, losses
    seconds = side_by_side(steps, arguments.rounds)
    memory = {which: peak_memory(prepare, which, *sizes) for which in steps}
    logits = {which: peak_memory(prepare, which, *sizes, False) for which in steps}
    print(f"vocabulary {sizes[0]}, {sizes[1]} unsupervised and {sizes[2]} supervised positions, width {sizes[3]}")
    for which in steps:
        print(
            f"  {which:11s} loss {losses[which]:.4f}  {seconds[which]:.2f} s  {memory[which] / 2**20:.0f} MiB, "
            f"{logits[which] / 2**20:.0f} MiB of them not the gradient of the head's weight"
        )
    print(
        f"  full / supervised: {seconds['full'] / seconds['supervised']:.2f} times the time, "
        f"{memory['full'] / memory['supervised']:.2f} times the memory, "
        f"{logits['full'] / logits['supervised']:.2f} times without the gradient of the head's weight"
    )


if __name__ == "__main__":
    main()
