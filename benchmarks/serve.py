"""The engine and the server against a loop of `generate`: process CPU time of one workload, as ratios (the loop is 1).

    python benchmarks/serve.py [--model FOLDER|mini] [--image-size 768] [--requests 8] [--new-tokens 12] [--rounds 2]

Workloads: several questions on one image, and several images under one question; at once and one after the other.
Every answer has the same length. With `--image-size` the model looks at larger images, so that they take more tokens;
answers then mean nothing, and the work is that of a larger model's prompts. Nothing is kept from round to round.
The server's row is the engine, one by one, behind HTTP: the client is another process and is not counted.
If $VLLM_PYTHON names the Python of an environment with vLLM (`make vllm-venv`), vLLM answers the same requests at once.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image

COLORS = ("red", "green", "blue", "gold", "white", "black", "orange", "purple")
Requests = list[tuple[Any, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image-size", type=int, help="pixels a side; by default the model's own")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = workloads(options.requests)
    if options.worker:
        vllm_worker(options.model, work, options.new_tokens, options.rounds)
        return
    from florence_vl.model.loading import load_model
    from florence_vl.model.resolution import set_resolution

    model, processor = load_model(options.model, options.device)
    if options.image_size:
        set_resolution(model, processor, image_size=options.image_size)
    model.generation_config.eos_token_id = None
    print(
        f"{processor.num_image_tokens()} tokens an image, {options.requests} requests, {options.new_tokens} new tokens"
    )
    vllm: dict[str, float] = {}
    if python := os.environ.get("VLLM_PYTHON"):
        vllm = vllm_seconds(python, model, processor, options)
    for title, requests in work.items():
        name = f"{options.requests} {title}"
        compare(name, model, processor, requests, options.new_tokens, options.rounds, vllm.get(title))


def workloads(count: int) -> dict[str, Requests]:
    """(picture, question) of every request."""
    pictures = [Image.new("RGB", (320, 240), COLORS[i % 8]) for i in range(count)]
    questions = [f"What is the color of thing number {i}?" for i in range(count)]
    return {
        "questions on one image": [(pictures[0], question) for question in questions],
        "images, one question": [(picture, questions[0]) for picture in pictures],
    }


def compare(
    title: str, model: Any, processor: Any, requests: Requests, length: int, rounds: int, vllm: float | None
) -> None:
    """Run every way `rounds` times in turn and print the best of each, and how many answers equal the loop's."""
    with serving(model, processor) as (running, client):
        ways: dict[str, Callable[[], list[list[int]]]] = {
            "generate, one by one": lambda: loop(model, processor, requests, length),
            "engine, one by one": lambda: engine(model, processor, requests, length, at_once=False),
            "server, one by one": lambda: client(running, requests, length),
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
    if vllm is not None:
        print(f"  {'vLLM, at once':24}{vllm:8.2f} s CPU{base / vllm:8.2f}x", flush=True)


def chat(question: str) -> list[dict[str, Any]]:
    """A question behind its image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


@torch.inference_mode()
def loop(model: Any, processor: Any, requests: Requests, length: int) -> list[list[int]]:
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


def engine(model: Any, processor: Any, requests: Requests, length: int, at_once: bool) -> list[list[int]]:
    """The same through a new engine."""
    from florence_vl.serve.engine import Engine
    from florence_vl.serve.sampling import GenerationOptions

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


CLIENT = """
import json, sys, urllib.request
for line in sys.stdin:
    url, body = json.loads(line)
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        print(json.dumps(json.load(answer)), flush=True)
"""


@contextlib.contextmanager
def serving(model: Any, processor: Any) -> Iterator[tuple[Any, Callable[..., list[list[int]]]]]:
    """A server in this process and a client in another one.

    Yields:
        The server, and what sends requests to it one after the other and gives the token ids of the answers.
    """
    import uvicorn

    from florence_vl.serve.engine import Engine
    from florence_vl.serve.openai_server import Server, ServerConfig, build_app

    engine = Engine(model, processor)
    engine.ends.clear()
    config = uvicorn.Config(build_app(Server(engine, ServerConfig("model"))), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def ask(running: Engine, requests: Requests, length: int) -> list[list[int]]:
        running.prefixes.clear()
        running.features.clear()
        said: list[list[int]] = []
        real = running.submit

        def submit(*given: Any) -> Any:  # the API gives text, and ids are compared
            answer = real(*given)
            said.append(answer.ids)
            return answer

        running.submit = submit  # type: ignore[method-assign]
        assert client.stdin is not None
        assert client.stdout is not None
        for picture, question in requests:
            parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": question}]
            body = {"messages": [{"role": "user", "content": parts}], "max_tokens": length, "temperature": 0}
            client.stdin.write(json.dumps([f"http://127.0.0.1:{port}/v1/chat/completions", body]) + "\n")
            json.loads(client.stdout.readline())
        running.submit = real  # type: ignore[method-assign]
        return said

    try:
        yield engine, ask
    finally:
        client.stdin.close()  # type: ignore[union-attr]
        client.wait()
        server.should_exit = True
        thread.join()


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def vllm_seconds(python: str, model: Any, processor: Any, options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of vLLM per workload, in a separate process, as vLLM modifies transformers in its own."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        command = [python, __file__, "--worker", "--model", folder, "--requests", str(options.requests)]
        command += ["--new-tokens", str(options.new_tokens), "--rounds", str(options.rounds)]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def vllm_worker(folder: str, work: dict[str, Requests], length: int, rounds: int) -> None:
    """Print vLLM's CPU seconds, the best of the rounds; nothing is kept from round to round."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=16,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        mm_processor_cache_gb=0,
    )
    how = SamplingParams(temperature=0, max_tokens=length, min_tokens=length, ignore_eos=True)
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds + 1):  # the first one warms up
        for title, requests in work.items():
            chats = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": data_url(picture)}},
                            {"type": "text", "text": question},
                        ],
                    }
                ]
                for picture, question in requests
            ]
            llm.reset_prefix_cache()
            llm.llm_engine.reset_encoder_cache()
            start = time.process_time()
            llm.chat(chats, how, use_tqdm=False)
            best[title] = min(best[title], time.process_time() - start)
    print(json.dumps(best))


if __name__ == "__main__":
    main()
