"""Questions per second of the evaluation runner against a plain batch-1 `generate` loop, and the cost per image.

    python benchmarks/evaluate.py [--model FOLDER|mini] [--pictures 12] [--batch-size 16] [--new-tokens 4] [--rounds 3]

The plain loop is what evaluation harnesses do: per question, process prompt and image and call `generate`. Both sides
answer the same questions of the mini suite with the same model and alternate, so a busy machine slows both. Without
`--model` the mini model's parts are put together untrained (Florence-2 mini, SmolLM2-135M): speed doesn't depend on
weights as long as answers have the same length, hence the fixed number of new tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.local import LocalAnswerer
from florence_vl.evaluate.question import Question
from florence_vl.evaluate.suites import choose
from florence_vl_mini.suite import mini_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a saved Florence-VL, or mini for the embedded one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--lmms-eval", type=int, metavar="N", help="instead, all questions about N pictures in lmms-eval's evaluator"
    )
    options = parser.parse_args()
    if options.lmms_eval:
        lmms_eval_loops(options.model or "mini", options.lmms_eval, options.batch_size)
        return
    model, processor = load(options.model, options.device)
    model.generation_config.eos_token_id = None  # every answer has exactly --new-tokens tokens
    questions = [q for benchmark in choose("mini") for q in benchmark.questions(mini_folder())]
    pictures = sorted({q.picture_key for q in questions})[: options.pictures]
    questions = [q for q in questions if q.picture_key in pictures]
    print(
        f"{len(questions)} questions on {len(pictures)} pictures, {options.new_tokens} new tokens each, {model.device}"
    )

    ways = {
        "plain generate, batch 1": lambda: plain(model, processor, questions, options.new_tokens),
        "runner, no shared beginnings": lambda: runner(model, processor, questions, options, share=False),
        "runner": lambda: runner(model, processor, questions, options, share=True),
    }
    plain(model, processor, questions[:2], options.new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start, work = time.perf_counter(), time.process_time()
            texts[name] = way()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - work)
    base = statistics.median(seconds["plain generate, batch 1"])
    base_cpu = statistics.median(cpu["plain generate, batch 1"])
    reference = texts["plain generate, batch 1"]
    print(f"{'':32}{'questions/s':>12}{'ratio':>8}{'ratio of CPU time':>20}{'same answers':>14}")
    for name in ways:
        middle, work = statistics.median(seconds[name]), statistics.median(cpu[name])
        same = sum(a == b for a, b in zip(texts[name], reference, strict=True)) / len(reference)
        print(f"{name:32}{len(questions) / middle:12.2f}{base / middle:8.2f}{base_cpu / work:20.2f}{same:14.1%}")
    vision(model, processor, questions)


def load(name: str | None, device: str) -> tuple[Any, Any]:
    from florence_vl.model.loading import choose_device, load_model

    if name is not None:
        return load_model(name, device)
    from florence_vl import build_model
    from florence_vl_mini.models import smollm2
    from florence_vl_mini.pretrain.model import build_mini_florence2

    with tempfile.TemporaryDirectory() as folder:
        build_mini_florence2(Path(folder))
        model, processor = build_model(folder, smollm2(), dtype="float32")
    return model.to(choose_device(device)).eval(), processor


@torch.inference_mode()
def plain(model: Any, processor: Any, questions: Sequence[Question], new_tokens: int) -> list[str]:
    """Per question: open and process the image, fill the template, generate."""
    from florence_vl.model.pictures import open_image

    texts = []
    for question in questions:
        text = processor.apply_chat_template(
            [{"role": "user", "content": question.content()}], add_generation_prompt=True, tokenize=False
        )
        images = [open_image(image.read()) for image in question.images]
        inputs = processor(text=[text], images=[images], return_tensors="pt").to(model.device)
        inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        pad = processor.tokenizer.pad_token_id
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
        texts.append(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def runner(
    model: Any, processor: Any, questions: Sequence[Question], options: argparse.Namespace, share: bool
) -> list[str]:
    """What `florence-vl evaluate` does, without writing."""
    answerer = LocalAnswerer(model, processor, options.batch_size, {"model": "benchmark"}, share_prefix=share)
    answerer._stop = []
    return [answer.text for answer in answerer.answer_all(questions, Generation(options.new_tokens))]


class ImagesOnly:
    """A processor without `videos` and `audios`: lmms-eval 0.7.3 passes both, transformers 5.23 refuses the latter."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, text: Any, images: Any, videos: Any, audios: Any, **kwargs: Any) -> Any:
        assert not videos
        assert not audios
        return self.processor(text=text, images=[[image] for image in images], **kwargs)


def keep_pictures(folder: Path, number: int) -> None:
    """Drop all questions about other than the first pictures from the tasks' parquet files."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    tables = {path: pq.read_table(path) for path in sorted(folder.glob("*.parquet"))}
    pictures = sorted({name for table in tables.values() for name in table["picture"].to_pylist()})[:number]
    questions = 0
    for path, table in tables.items():
        kept = table.filter(pc.is_in(table["picture"], value_set=pa.array(pictures)))
        pq.write_table(kept, path)
        questions += len(kept)
    print(f"{questions} questions about {number} pictures in {len(tables)} tasks: {questions / number:.1f} a picture")


def lmms_eval_loops(name: str, pictures: int, batch_size: int) -> None:
    """The mini suite's tasks in lmms-eval's evaluator: its own adapter for transformers' models against ours.

    Counted are CPU seconds inside `generate_until`, float32 on both sides. The evaluator passes the questions of all
    tasks in one call, so that those about one picture meet.
    """
    os.environ.setdefault("OPENAI_API_KEY", "none")  # some of its tasks build a client when they are imported
    from lmms_eval import evaluator
    from lmms_eval.models.chat.huggingface import Huggingface
    from lmms_eval.tasks import TaskManager

    from florence_vl.evaluate.lmms_eval_plugin import FlorenceVLAdapter
    from florence_vl.model.loading import check_folder, load_model
    from florence_vl_mini.lmms_tasks import write_tasks

    model, processor = load_model(name, "cpu", "float32")

    def theirs(size: int) -> Any:
        adapter = Huggingface(pretrained=str(check_folder(name)), device="cpu", device_map="cpu", batch_size=size)
        adapter._model = model  # it loads bfloat16
        adapter.processor = ImagesOnly(processor)
        return adapter

    adapters = {
        "lmms-eval huggingface, batch 1": theirs(1),
        f"lmms-eval huggingface, batch {batch_size}": theirs(batch_size),
        f"florence_vl, batch {batch_size}": FlorenceVLAdapter(
            answerer=LocalAnswerer(model, processor, batch_size, {"model": "benchmark"})
        ),
    }
    base: float | None = None
    first: list[str] = []
    header = f"{'':36}{'calls':>6}{'questions/CPU s':>16}{'ratio':>8}{'same answers':>14}"
    with tempfile.TemporaryDirectory() as folder:
        names = write_tasks(Path(folder))
        keep_pictures(Path(folder), pictures)
        print(header)
        manager = TaskManager("ERROR", include_path=folder, include_defaults=False)
        for title, adapter in adapters.items():
            spent, calls, answers, generate = 0.0, 0, [], adapter.generate_until

            def timed(requests: Any, generate: Any = generate, answers: list[str] = answers) -> Any:
                nonlocal spent, calls
                start = time.process_time()
                found = generate(requests)
                spent += time.process_time() - start
                calls += 1
                answers += [result.text for result in found]
                return found

            adapter.generate_until = timed
            settings = {"task_manager": manager, "batch_size": batch_size, "bootstrap_iters": 0}
            evaluator.simple_evaluate(model=adapter, tasks=names, **settings)
            base, first = base or spent, first or answers
            same = sum(a.strip() == b.strip() for a, b in zip(answers, first, strict=True)) / len(first)
            print(f"{title:36}{calls:6}{len(answers) / spent:16.2f}{base / spent:8.2f}{same:14.1%}", flush=True)


def vision(model: Any, processor: Any, questions: Sequence[Question]) -> None:
    """Several questions on one image: how often the vision side runs."""
    by_picture: dict[str, list[Question]] = {}
    for question in questions:
        by_picture.setdefault(question.picture_key, []).append(question)
    group = max(by_picture.values(), key=len)
    answerer = LocalAnswerer(model, processor, len(group), {"model": "benchmark"})
    answerer.answer(group, Generation(1))
    print(f"{len(group)} questions on one image: the vision side ran {answerer.encoded_images} time")


if __name__ == "__main__":
    main()
