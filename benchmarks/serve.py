"""The engine against a loop of `generate`: process CPU time of one workload, as ratios (the loop is 1).

    python benchmarks/serve.py [--model FOLDER|mini] [--image-size 768] [--requests 8] [--new-tokens 12] [--rounds 2]

Workloads: several questions on one image, and several images under one question; at once and one after the other.
Every answer has the same length. With `--image-size` the model looks at larger images, so that they take more tokens;
answers then mean nothing, and the work is that of a larger model's prompts. Nothing is kept from round to round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from florence_vl.model.loading import load_model
from florence_vl.model.resolution import set_resolution
from florence_vl.serve.engine import Engine
from florence_vl.serve.sampling import GenerationOptions

COLORS = ("red", "green", "blue", "gold", "white", "black", "orange", "purple")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image-size", type=int, help="pixels a side; by default the model's own")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model(options.model, options.device)
    if options.image_size:
        set_resolution(model, processor, image_size=options.image_size)
    model.generation_config.eos_token_id = None
    print(
        f"{processor.num_image_tokens()} tokens an image, {options.requests} requests, {options.new_tokens} new tokens"
    )
    pictures = [Image.new("RGB", (320, 240), COLORS[i % 8]) for i in range(options.requests)]
    questions = [f"What is the color of thing number {i}?" for i in range(options.requests)]
    for title, requests in {
        "questions on one image": [(pictures[0], question) for question in questions],
        "images, one question": [(picture, questions[0]) for picture in pictures],
    }.items():
        compare(f"{options.requests} {title}", model, processor, requests, options.new_tokens, options.rounds)


def compare(title: str, model: Any, processor: Any, requests: list[tuple[Any, str]], length: int, rounds: int) -> None:
    """Run every way `rounds` times in turn and print the best of each, and how many answers equal the loop's."""
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "generate, one by one": lambda: loop(model, processor, requests, length),
        "engine, one by one": lambda: engine(model, processor, requests, length, at_once=False),
        "engine, at once": lambda: engine(model, processor, requests, length, at_once=True),
    }
    best = dict.fromkeys(ways, float("inf"))
    answers: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            answers[name] = way()
            best[name] = min(best[name], time.process_time() - start)
    base = best["generate, one by one"]
    print(title)
    for name, seconds in best.items():
        same = sum(a == b for a, b in zip(answers[name], answers["generate, one by one"], strict=True))
        print(
            f"  {name:24}{seconds:8.2f} s CPU{base / seconds:8.2f}x   same answers {same}/{len(requests)}", flush=True
        )


def chat(question: str) -> list[dict[str, Any]]:
    """A question behind its image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


@torch.inference_mode()
def loop(model: Any, processor: Any, requests: list[tuple[Any, str]], length: int) -> list[list[int]]:
    """One `generate` a request."""
    answers = []
    for picture, question in requests:
        text = processor.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[[picture]], return_tensors="pt").to(model.device)
        wanted = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
        inputs = {name: inputs[name] for name in wanted if name in inputs}
        out = model.generate(**inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def engine(model: Any, processor: Any, requests: list[tuple[Any, str]], length: int, at_once: bool) -> list[list[int]]:
    """The same through a new engine."""
    with Engine(model, processor) as running:
        running.ends.clear()  # every answer has the same length
        made = []
        for picture, question in requests:
            answer = running.submit(running.prepare(chat(question), [picture]), GenerationOptions(length))
            made.append(answer)
            if not at_once:
                answer.result()
        for answer in made:
            for _ in answer if at_once else ():
                pass
        return [answer.ids for answer in made]


if __name__ == "__main__":
    main()
