"""The tower against stock Florence-2: V and the features of three prompts for one image.

    python benchmarks/tower.py [--size base|large] [--pixels 384 768] [--compile]
    TORCHINDUCTOR_FREEZING=1 python benchmarks/tower.py --pixels 384 --compile      # weights as constants: faster still

Alternatives, all float32, the same weights, in one process:
- stock: `Florence2ForConditionalGeneration.generate(max_new_tokens=1)` once a prompt, encoder states read from it;
- authors: DaViT once, the prompts as one batch, and one decoder step as their `generate` call takes;
- ours: `Florence2Tower`, eager and (with --compile) compiled, where stock's DaViT and encoder are compiled too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import florence2_config, matmul, peak_memory, side_by_side
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Florence2ForConditionalGeneration, LlamaConfig
from transformers.modeling_outputs import BaseModelOutput

from florence_vl import FlorenceVLConfig
from florence_vl.model.configuration import FLORENCE2_PROMPT_IDS
from florence_vl.model.towers import Florence2Tower

PROMPTS = ("caption", "ocr", "grounding")


def build(size: str) -> tuple[Florence2ForConditionalGeneration, Florence2Tower]:
    """Stock model and our tower with the same random weights."""
    torch.manual_seed(0)
    florence2 = florence2_config(size)
    stock = Florence2ForConditionalGeneration(florence2).eval()
    config = FlorenceVLConfig(vision_config=florence2, text_config=LlamaConfig(num_hidden_layers=1), mean_token="all")
    tower = Florence2Tower(config).eval()
    tower.davit.load_state_dict(stock.model.vision_tower.state_dict())
    tower.image_projector.load_state_dict(stock.model.multi_modal_projector.state_dict())
    assert tower.encoder is not None
    tower.encoder.load_state_dict(stock.model.language_model.encoder.state_dict())
    return stock, tower


@torch.inference_mode()
def run_stock(stock: Florence2ForConditionalGeneration, image: Tensor, num_tokens: int) -> dict[str, Tensor]:
    """One `generate` a prompt, as stock transformers users do."""
    features: dict[str, Tensor] = {}
    for name in PROMPTS:
        ids = torch.tensor([[stock.config.image_token_id] * num_tokens + list(FLORENCE2_PROMPT_IDS[name])])
        output = stock.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=image,
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        features[name] = output.encoder_hidden_states[-1][:, :num_tokens]
    return features


@torch.inference_mode()
def run_authors(stock: Florence2ForConditionalGeneration, tower: Florence2Tower, image: Tensor) -> Any:
    """The authors' shape of computation: the tower's, then a decoder step and the vocabulary for each prompt."""
    features = tower(image)
    states = torch.cat([features[name] for name in PROMPTS])
    start = torch.full((len(PROMPTS), 1), stock.config.text_config.decoder_start_token_id)
    return stock(encoder_outputs=BaseModelOutput(states), decoder_input_ids=start, use_cache=False).logits


@torch.inference_mode()
def run_ours(tower: Callable[[Tensor], dict[str, Tensor]], image: Tensor) -> dict[str, Tensor]:
    return tower(image)


def prepare(which: str, size: str, pixels: int) -> Callable[[], Any]:
    """For the memory measurement in a separate process."""
    stock, tower = build(size)
    image = torch.randn(1, 3, pixels, pixels)
    if which == "stock":
        return lambda: run_stock(stock, image, tower.num_tokens(pixels, pixels))
    return lambda: run_ours(tower, image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("base", "large"), default="base")
    parser.add_argument("--pixels", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure compiled alternatives too (compiles minutes)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stock, tower = build(arguments.size)
    product, product_flops = matmul()
    print(f"Florence-2-{arguments.size}, float32, {arguments.threads} threads")
    for pixels in arguments.pixels:
        image = torch.randn(1, 3, pixels, pixels)
        num_tokens = tower.num_tokens(pixels, pixels)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ours = tower(image)
        theirs = run_stock(stock, image, num_tokens)
        difference = max((ours[name] - theirs[name]).abs().max().item() for name in PROMPTS)
        alternatives: dict[str, Callable[[], Any]] = {
            "stock": lambda image=image, n=num_tokens: run_stock(stock, image, n),
            "authors": lambda image=image: run_authors(stock, tower, image),
            "ours": lambda image=image: run_ours(tower, image),
        }
        if arguments.compile:
            compiled = torch.compile(tower, fullgraph=True)
            alternatives["ours compiled"] = lambda image=image, run=compiled: run_ours(run, image)
        seconds = side_by_side(alternatives | {"matrix product": product}, arguments.rounds)
        rate = product_flops / seconds.pop("matrix product")
        flops = counter.get_total_flops()
        memory = {which: peak_memory(prepare, which, arguments.size, pixels) for which in ("stock", "ours")}
        print(f"\n{pixels} px, {num_tokens} tokens, tower {flops / 1e9:.0f} GFLOP, largest difference {difference:.1e}")
        for name, value in seconds.items():
            print(f"  {name:14s} {value:7.3f} s   stock is {seconds['stock'] / value:4.2f} times as long")
        share = flops / seconds["ours"] / rate
        print(f"  share of the machine's matrix-product rate, {rate / 1e9:.0f} GFLOP/s: {share:.0%}")
        print(
            f"  peak memory of a call: stock {memory['stock'] / 2**20:.0f} MiB, ours {memory['ours'] / 2**20:.0f} MiB"
        )
        assert difference < 1e-5, f"features differ by {difference}"


if __name__ == "__main__":
    main()
