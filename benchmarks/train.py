"""Training: packed against padded rows and a plain HF `Trainer`, the plan against measurement, MFU on a GPU.

    python benchmarks/train.py packing           supervised tokens/s of the same samples, laid out differently
    python benchmarks/train.py trees             the same for five questions a picture, with and without message trees
    python benchmarks/train.py plan [key=value]  memory of mini/pretrain, planned and measured
    python benchmarks/train.py frozen            a step of mini/pretrain with less and less to train
    python benchmarks/train.py casts             a step in bfloat16 with and without kept casts of frozen weights
    python benchmarks/train.py attention         attention of one sample in bfloat16 on the CPU, and PyTorch's kernel
    python benchmarks/train.py mfu --recipe paper/3b-finetune-packed precision=bf16_pure compile.llm=true

`packing` has the lengths of LLaVA-1.5's 665K mix (benchmarks/data.py); `--scale 9` divides image tokens (64 instead of
576) and text alike, so that the proportions stay. It is stage 2: the tower is frozen and the LLM does most of the work.
`trees` makes pictures with five question-answer pairs about each, of 60 tokens (median) before scaling.
`mfu` needs a CUDA device: real shapes, random weights, synthetic rows of the recipe's size.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import peak_memory, return_freed_memory, side_by_side
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data import llava_665k_lengths
from florence_vl.data.collate import PackedCollator, PaddedCollator
from florence_vl.data.encode import Sample
from florence_vl.data.layout import pack_first_fit
from florence_vl.data.trees import join_samples
from florence_vl.model import varlen_attention
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.tiny import tiny_config, tiny_florence2
from florence_vl.model.varlen_attention import SDPA_VARLEN
from florence_vl.train.optimizer import apply_parts, build_optimizer, parameter_groups
from florence_vl.train.parallel import LossModule
from florence_vl.train.plan import Workload, plan_recipe
from florence_vl.train.recipes import load_recipe
from florence_vl.train.step import count_supervised

IMAGE_SIZE, VOCABULARY = 256, 8192

ALBUM_TEXT = (60, 0.6)  # tokens of a pair with its template's: median, and sigma of the logarithm


@dataclass(frozen=True)
class Scale:
    """LLaVA-1.5's lengths divided by 9, 4 or 1."""

    divisor: int = 9

    @property
    def image_size(self) -> int:
        """Pixels a side: 32 a token."""
        return round(768 / self.divisor**0.5)

    @property
    def image_tokens(self) -> int:
        """Of 576."""
        return 576 // self.divisor

    @property
    def row_tokens(self) -> int:
        """A packed row, of 4096."""
        return 4096 // self.divisor


def small_model() -> FlorenceVLForConditionalGeneration:
    """A Llama of 6 blocks and width 384 behind a tiny frozen DaViT: 64 tokens per image of 256 px."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    vision = tiny_florence2(vision_config={"max_position_embeddings": 24})
    config = tiny_config(text_config=text, vision_config=vision, features=["davit"])
    model = FlorenceVLForConditionalGeneration(config)
    model.set_trainable(tower=False, projector=True, llm=True)
    return model


def make_samples(count: int, scale: Scale) -> list[Sample]:
    """Samples with the mix's lengths, scaled down; 40 % of the text is supervised, at its end."""
    lengths, images = llava_665k_lengths(count)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length, has_image in zip(lengths.tolist(), images.tolist(), strict=True):
        text = max(8, (length - 576 * has_image) // scale.divisor)
        ids = torch.randint(10, VOCABULARY, (text,), generator=generator)
        labels = ids.clone()
        labels[: int(0.6 * text)] = -100
        pixels = None
        if has_image:
            ids = torch.cat([torch.full((scale.image_tokens,), 3), ids])
            labels = torch.cat([torch.full((scale.image_tokens,), -100), labels])
            pixels = torch.randn(1, 3, scale.image_size, scale.image_size, generator=generator)
        samples.append(Sample(ids, labels, pixels))
    return samples


def chunks(items: list[Any], size: int) -> list[list[Any]]:
    """Consecutive lists of a size."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def layouts(samples: list[Sample], batch: int, row_tokens: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The same samples as batches: packed, padded in order of drawing, padded by length."""
    padded = PaddedCollator(0)
    by_length = sorted(samples, key=len)
    rows = pack_first_fit([len(s) for s in samples], [s.num_images for s in samples], row_tokens, 16)
    per_batch = max(1, round(batch * sum(map(len, samples)) / len(samples) / row_tokens))
    packed = PackedCollator(0)
    return {
        "packed rows": [packed([[samples[i] for i in row] for row in part]) for part in chunks(rows, per_batch)],
        "padded, random order": [padded(part) for part in chunks(samples, batch)],
        "padded, grouped by length": [padded(part) for part in chunks(by_length, batch)],
    }


def engine_epoch(batches: list[dict[str, torch.Tensor]], image_size: int) -> Callable[[], None]:
    """One pass of the engine's step: loss at supervised positions, AdamW; packed rows by sample, as on all CPUs."""
    model = small_model().train()
    model.set_attn_implementation({"text_config": SDPA_VARLEN})
    module = LossModule(model, (image_size, image_size))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        for batch in batches:
            module(batch, count_supervised(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def make_album(pictures: int, questions: int, scale: Scale) -> list[Sample]:
    """Question-answer pairs of a few words, some about each picture, scaled down; 40 % of the text is supervised."""
    generator = torch.Generator().manual_seed(0)
    median, sigma = ALBUM_TEXT
    shown = (scale.image_tokens,)
    samples = []
    for _ in range(pictures):
        pixels = torch.randn(1, 3, scale.image_size, scale.image_size, generator=generator)
        for _ in range(questions):
            words = median * math.exp(sigma * torch.randn((), generator=generator).item())
            text = max(4, round(words / scale.divisor))
            ids = torch.cat([torch.full(shown, 3), torch.randint(10, VOCABULARY, (text,), generator=generator)])
            labels = ids.clone()
            labels[: scale.image_tokens + round(0.6 * text)] = -100
            samples.append(Sample(ids, labels, pixels))
    return samples


def bench_trees(pictures: int, questions: int, batch: int, rounds: int, scale: Scale) -> None:
    """Print supervised tokens/s of padded rows, packed rows and packed rows of trees, of the same pairs."""
    samples = make_album(pictures, questions, scale)
    trees = [join_samples(pairs, 3) for pairs in chunks(samples, questions)]
    batches = {name: found for name, found in layouts(samples, batch, scale.row_tokens).items() if "random" not in name}
    batches["packed rows of message trees"] = layouts(trees, batch // questions, scale.row_tokens)["packed rows"]
    runs = {name: engine_epoch(found, scale.image_size) for name, found in batches.items()}
    supervised = sum(sample.num_supervised for sample in samples)
    seconds = side_by_side(runs, rounds)
    base = seconds["padded, grouped by length"]
    print(f"{pictures} pictures of {scale.image_tokens} tokens, {questions} pairs each, {supervised} supervised tokens")
    print(f"{'layout':34}{'slots':>9}{'pictures':>10}{'CPU s':>9}{'supervised/s':>14}{'of padded':>11}")
    for name, value in seconds.items():
        slots = sum(b["input_ids"].numel() for b in batches[name])
        shown = sum(len(b["pixel_values"]) for b in batches[name])
        print(f"{name:34}{slots:>9}{shown:>10}{value:>9.2f}{supervised / value:>14.0f}{base / value:>10.2f}x")


def trainer_epoch(samples: list[Sample], batch: int, full_logits: bool) -> Callable[[], None]:
    """One pass of transformers' Trainer over the same samples, padded to the longest of each batch.

    Args:
        samples: The samples.
        batch: Samples a batch.
        full_logits: Compute logits at every position, as transformers' LLaVA does.
    """
    from transformers import Trainer, TrainingArguments

    model = small_model()
    if full_logits:

        def supervised_loss(states: torch.Tensor, labels: torch.Tensor, num_items: Any = None) -> torch.Tensor:
            return model.loss_function(
                model.lm_head(states), labels, vocab_size=VOCABULARY, num_items_in_batch=num_items
            )

        model.supervised_loss = supervised_loss  # type: ignore[method-assign, assignment]
    padded = PaddedCollator(0)
    folder = tempfile.mkdtemp()

    def run() -> None:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=1e-4,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            max_grad_norm=0.0,
        )
        Trainer(model=model, args=arguments, train_dataset=samples, data_collator=padded).train()

    return run


def bench_packing(count: int, batch: int, rounds: int, scale: Scale) -> None:
    """Print supervised tokens/s of every layout and its ratio to the plain Trainer."""
    samples = make_samples(count, scale)
    supervised = sum(s.num_supervised for s in samples)
    tokens = sum(map(len, samples))
    runs: dict[str, Callable[[], None]] = {}
    share: dict[str, float] = {}
    for name, batches in layouts(samples, batch, scale.row_tokens).items():
        runs[name] = engine_epoch(batches, scale.image_size)
        share[name] = tokens / sum(b["input_ids"].numel() for b in batches)
    runs["HF Trainer, padded, random"] = trainer_epoch(samples, batch, full_logits=False)
    runs["HF Trainer, padded, full logits"] = trainer_epoch(samples, batch, full_logits=True)
    seconds = side_by_side(runs, rounds)
    base = seconds["HF Trainer, padded, full logits"]
    print(f"{count} samples, {tokens / count:.0f} tokens each, {supervised} supervised; batches of {batch}")
    print(f"{'layout':34}{'useful slots':>13}{'CPU s':>9}{'supervised/s':>14}{'of HF Trainer':>15}")
    for name, value in seconds.items():
        used = f"{share[name]:.0%}" if name in share else ""
        print(f"{name:34}{used:>13}{value:>9.2f}{supervised / value:>14.0f}{base / value:>14.2f}x")
    ratio = seconds["padded, random order"] / seconds["packed rows"]
    print(f"packed against padded in the same engine: {ratio:.2f}x")


FROZEN = {
    "whole LLM and projector train": ["parts.llm.last_layers=null"],
    "LLM's last third and projector": [],
    "LLM's last third alone": ["parts.projector.train=false"],
}


def bench_frozen(tokens: int, rounds: int, overrides: list[str]) -> None:
    """Print what a step of mini/pretrain costs with less and less to train: CPU seconds, and memory that it adds."""
    overrides = ["precision=fp32", *overrides]
    runs = {name: mini_step(tokens, 4, [*overrides, *settings]) for name, settings in FROZEN.items()}
    seconds = side_by_side(runs, rounds)
    memory = {
        name: peak_memory(mini_step_in_little_memory, tokens, 4, [*overrides, *settings])
        for name, settings in FROZEN.items()
    }
    base = seconds["LLM's last third and projector"]
    print(f"rows of {tokens} tokens with 4 images, one thread")
    print(f"{'':34}{'CPU s a row':>12}{'rows/s':>10}{'GiB added':>11}")
    for name, value in seconds.items():
        print(f"{name:34}{value / 4:>12.2f}{base / value:>9.2f}x{memory[name] / 2**30:>11.2f}")


def bench_casts(tokens: int, rounds: int) -> None:
    """Print CPU seconds of a row of mini/pretrain in bfloat16 with and without kept casts and AdamW's one kernel."""
    runs = {
        "weights cast at each use": mini_step(tokens, 4, ["precision=bf16", "optimizer.fused=false"]),
        "frozen weights cast once": mini_step(tokens, 4, ["precision=bf16", "optimizer.fused=false"], keep=True),
        "and AdamW as one kernel": mini_step(tokens, 4, ["precision=bf16", "optimizer.fused=true"], keep=True),
    }
    seconds = side_by_side(runs, rounds)
    base = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"{name:28}{value / 4:>8.3f}{base / value:>9.2f}x")


def bench_attention(lengths: list[int], rounds: int) -> None:
    """Print CPU milliseconds of a forward and backward pass for one sample of a packed row."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True  # type: ignore[assignment]
    passes = 20

    def run(attend: Callable[..., Any], states: list[torch.Tensor], gradient: torch.Tensor) -> None:
        for _ in range(passes):
            attend(module, *states, None, scaling=0.125)[0].backward(gradient)

    print(f"{'tokens':>6}{'kernel ms':>12}{'products ms':>13}")
    for length in lengths:
        states = [torch.randn(1, heads, length, 64).bfloat16().requires_grad_() for heads in (9, 3, 3)]
        gradient = torch.randn(1, length, 9, 64).bfloat16()
        kinds = {"kernel": sdpa_attention_forward, "products": varlen_attention._bf16_attention}
        alternatives = {name: partial(run, attend, states, gradient) for name, attend in kinds.items()}
        kernel, products = (1000 * seconds / passes for seconds in side_by_side(alternatives, rounds).values())
        print(f"{length:>6}{kernel:>12.2f}{products:>13.2f}  {kernel / products:.2f}x")


def mini_step(tokens: int, images: int, overrides: list[str], keep: bool = False) -> Callable[[], None]:
    """Two accumulated steps of mini/pretrain, so that optimizer state, gradients and activations meet, as in a run.

    Args:
        tokens: Tokens of a row.
        images: Images of a row.
        overrides: Changes to the recipe.
        keep: Keep casts of frozen weights.
    """
    from florence_vl.train.casts import keep_casts
    from florence_vl.train.model import choose_attention, load_model

    torch.set_num_threads(1)
    recipe = load_recipe("mini/pretrain", overrides)
    device = torch.device("cpu")
    model, _ = load_model(recipe)
    apply_parts(model, recipe.parts)
    choose_attention(model, recipe, device)
    autocast = torch.bfloat16 if recipe.precision == "bf16" else None
    module = LossModule(model, (IMAGE_SIZE, IMAGE_SIZE), autocast=autocast)
    if keep:
        keep_casts(model, torch.bfloat16)
    groups = parameter_groups(model, recipe.parts, recipe.optimizer, recipe.schedule)
    optimizer = build_optimizer(groups, recipe.optimizer, device)
    lengths = [tokens // images] * images
    ids = torch.cat([torch.cat([torch.full((64,), model.config.image_token_id), torch.randint(100, 1000, (n - 64,))])
                     for n in lengths])  # fmt: skip
    labels = ids.clone()
    positions = torch.cat([torch.arange(n) for n in lengths])
    for start in range(0, sum(lengths), tokens // images):
        labels[start : start + tokens // images - 40] = -100
    batch = {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "pixel_values": torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE),
    }

    def run() -> None:
        for _ in range(2):
            for _ in range(2):
                module(batch, count_supervised(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def mini_step_in_little_memory(*args: Any) -> Callable[[], None]:
    """`mini_step` for a measurement of memory; returning freed blocks takes time."""
    return_freed_memory()
    return mini_step(*args)


def bench_plan(overrides: list[str]) -> None:
    """Print the plan's memory for mini/pretrain against the resident memory that a step adds."""
    overrides = ["precision=fp32", *overrides]
    recipe = load_recipe("mini/pretrain", overrides)
    plan = plan_recipe(recipe, workload=Workload(images=1, text_tokens=64, supervised=40))
    planned = sum(value for kind, value in plan.memory.items() if kind != "weights")
    rows, images = recipe.data.packing.tokens_per_row, recipe.data.packing.max_images_per_row
    measured = peak_memory(mini_step_in_little_memory, rows, images, overrides) / 2**30
    print(f"parameters      {sum(total for total, _ in plan.parameters.values()):,}")
    print(f"planned memory  {planned:.2f} GiB besides weights: {plan.memory}")
    print(f"measured        {measured:.2f} GiB added by a step; planned / measured {planned / measured:.2f}")


def bench_mfu(name: str, overrides: list[str], steps: int) -> None:
    """Train a recipe's real shapes on random weights and synthetic rows; print MFU, memory and the plan."""
    from florence_vl.train.loop import train
    from florence_vl.train.metrics import read_metrics
    from florence_vl.train.plan import model_config

    if not torch.cuda.is_available():
        raise SystemExit("mfu needs a CUDA device")
    folder = tempfile.mkdtemp()
    recipe = load_recipe(
        name, [*overrides, f"steps={steps}", "epochs=null", f"output={folder}", "checkpoint.every_steps=null"]
    )
    recipe.checkpoint.export = False
    recipe.logging.trackers = []
    config, (height, width) = model_config(recipe)
    if recipe.model.attn_implementation is not None:
        config._attn_implementation = recipe.model.attn_implementation
    torch.set_default_dtype(torch.bfloat16 if recipe.precision == "bf16_pure" else torch.float32)
    with torch.device("cuda"):
        model = FlorenceVLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    image_tokens = model.num_image_tokens(height, width)
    text, tokens = 180, recipe.data.packing.tokens_per_row
    each = image_tokens + text
    per_row = tokens // each

    class Rows:
        batches_per_rank = recipe.batch_size // recipe.micro_batch_size

        def __next__(self) -> dict[str, torch.Tensor]:
            rows = recipe.micro_batch_size
            ids = torch.randint(100, 1000, (rows, per_row * each))
            labels = ids.clone()
            positions = torch.arange(each).repeat(per_row).expand(rows, -1)
            for i in range(per_row):
                ids[:, i * each : i * each + image_tokens] = config.image_token_id
                labels[:, i * each : (i + 1) * each - 120] = -100
            pixels = torch.randn(rows * per_row, 3, height, width)
            return {"input_ids": ids, "labels": labels, "position_ids": positions, "pixel_values": pixels}

        def state(self) -> dict[str, Any]:
            return {}

        def close(self) -> None:
            return None

    began = time.perf_counter()
    train(recipe, model=model, batches=lambda *_: Rows())
    rows = read_metrics(Path(folder) / "metrics.jsonl")[3:]
    device = "h200-141gb" if "H200" in torch.cuda.get_device_name() else "h100-80gb"
    plan = plan_recipe(recipe, device=device, workload=Workload(text_tokens=text))
    mean = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    print(f"{name} on {torch.cuda.get_device_name()}, {steps} steps in {time.perf_counter() - began:.0f} s")
    print(f"step {mean:.3f} s, MFU {sorted(row['mfu'] for row in rows)[len(rows) // 2]:.1%}, "
          f"{sorted(row['tokens_per_s'] for row in rows)[len(rows) // 2]:,.0f} tokens/s")  # fmt: skip
    print(f"peak memory {rows[-1]['memory_gib']:.1f} GiB, planned {sum(plan.memory.values()):.1f} GiB {plan.memory}")


def main() -> None:
    """Run the benchmark that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("packing")
    packing.add_argument("--samples", type=int, default=128)
    packing.add_argument("--batch", type=int, default=16)
    packing.add_argument("--rounds", type=int, default=3)
    packing.add_argument("--scale", type=int, choices=(1, 4, 9), default=9)
    trees = commands.add_parser("trees")
    trees.add_argument("--pictures", type=int, default=24)
    trees.add_argument("--questions", type=int, default=5)
    trees.add_argument("--batch", type=int, default=20)
    trees.add_argument("--rounds", type=int, default=3)
    trees.add_argument("--scale", type=int, choices=(1, 4, 9), default=9)
    plan = commands.add_parser("plan")
    plan.add_argument("overrides", nargs="*")
    frozen = commands.add_parser("frozen")
    frozen.add_argument("--tokens", type=int, default=512)
    frozen.add_argument("--rounds", type=int, default=1)
    frozen.add_argument("overrides", nargs="*")
    casts = commands.add_parser("casts")
    casts.add_argument("--tokens", type=int, default=512)
    casts.add_argument("--rounds", type=int, default=3)
    attention = commands.add_parser("attention")
    attention.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 210, 400, 800])
    attention.add_argument("--rounds", type=int, default=3)
    mfu = commands.add_parser("mfu")
    mfu.add_argument("--recipe", default="paper/3b-finetune-packed")
    mfu.add_argument("--steps", type=int, default=12)
    mfu.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.command == "packing":
        torch.set_num_threads(1)
        bench_packing(arguments.samples, arguments.batch, arguments.rounds, Scale(arguments.scale))
    elif arguments.command == "trees":
        torch.set_num_threads(1)
        scale = Scale(arguments.scale)
        bench_trees(arguments.pictures, arguments.questions, arguments.batch, arguments.rounds, scale)
    elif arguments.command == "attention":
        torch.set_num_threads(1)
        bench_attention(arguments.lengths, arguments.rounds)
    elif arguments.command == "casts":
        bench_casts(arguments.tokens, arguments.rounds)
    elif arguments.command == "plan":
        bench_plan(arguments.overrides)
    elif arguments.command == "frozen":
        bench_frozen(arguments.tokens, arguments.rounds, arguments.overrides)
    else:
        bench_mfu(arguments.recipe, arguments.overrides, arguments.steps)


if __name__ == "__main__":
    main()
