"""A tiny model and synthetic batches for the tests of training: imported by them, and run by torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from florence_vl.data.sampler import mix
from florence_vl.evaluate.sample import suite_scorer
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.tiny import TINY_IMAGE_TOKEN_ID, tiny_config, tiny_model, tiny_recipe
from florence_vl.train import train
from florence_vl.train.parallel import Parallelized

IMAGE_TOKENS = 4
ACCUMULATE = Parallelized.accumulate


def tiny(seed: int = 0, **config: Any) -> FlorenceVLForConditionalGeneration:
    """The tests' model, the same for the same seed."""
    torch.manual_seed(seed)
    return FlorenceVLForConditionalGeneration(tiny_config(**config))


def make_sample(number: int, text_only_every: int = 0) -> tuple[list[int], list[int], torch.Tensor | None]:
    """Ids, labels and image of sample `number`: lengths differ, some have no image."""
    generator = torch.Generator().manual_seed(mix(7, number) & 0xFFFFFFFF)
    length = 6 + int(torch.randint(0, 9, (), generator=generator))
    text = torch.randint(10, 500, (length,), generator=generator).tolist()
    supervised = 2 + int(torch.randint(0, length - 4, (), generator=generator))
    has_image = not (text_only_every and number % text_only_every == 0)
    pixels = torch.randn(1, 3, 64, 64, generator=generator) if has_image else None
    ids = [1, *([TINY_IMAGE_TOKEN_ID] * IMAGE_TOKENS if has_image else []), *text]
    labels = [-100] * (len(ids) - supervised) + ids[len(ids) - supervised :]
    return ids, labels, pixels


def collate(samples: list[tuple[list[int], list[int], torch.Tensor | None]], packed: bool) -> dict[str, torch.Tensor]:
    """One padded batch of all samples, or one packed row."""
    batch: dict[str, torch.Tensor] = {}
    pixels = [p for _, _, p in samples if p is not None]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    if packed:
        batch["input_ids"] = torch.tensor([[i for ids, _, _ in samples for i in ids]])
        batch["labels"] = torch.tensor([[v for _, labels, _ in samples for v in labels]])
        batch["position_ids"] = torch.tensor([[p for ids, _, _ in samples for p in range(len(ids))]])
        return batch
    longest = max(len(ids) for ids, _, _ in samples)
    batch["input_ids"] = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _, _ in samples])
    batch["labels"] = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels, _ in samples])
    batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in samples])
    return batch


class SyntheticBatches:
    """`per_step` samples per step for any number of processes and micro-batches; a pure function of the step."""

    def __init__(
        self,
        step: int,
        rank: int,
        size: int,
        per_step: int = 4,
        micro: int = 2,
        packed: bool = False,
        text_only: int = 0,
    ) -> None:
        self.step, self.rank, self.size = step, rank, size
        self.per_step, self.micro, self.packed, self.text_only = per_step, micro, packed, text_only
        self.batches_per_rank = per_step // micro // size
        self._queue: list[dict[str, torch.Tensor]] = []

    def __next__(self) -> dict[str, torch.Tensor]:
        if not self._queue:
            numbers = range(self.step * self.per_step, (self.step + 1) * self.per_step)
            micros = [numbers[i : i + self.micro] for i in range(0, self.per_step, self.micro)]
            own = micros[self.rank :: self.size]
            self._queue = [collate([make_sample(n, self.text_only) for n in ns], self.packed) for ns in own]
            self.step += 1
        return self._queue.pop(0)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._queue.clear()


def recipe(output: str | Path, **changes: Any) -> dict[str, Any]:
    """A quiet recipe for a CPU."""
    base = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "optimizer": {"lr": 1e-3, "weight_decay": 0.1}}
    return tiny_recipe(output, **base | changes)


def run(
    output: str | Path,
    *,
    resume: str = "never",
    kill_at: int | None = None,
    per_step: int = 4,
    micro: int = 2,
    packed: bool = False,
    text_only: int = 0,
    model: FlorenceVLForConditionalGeneration | None = None,
    kill_with: int = signal.SIGKILL,
    processor: Any = None,
    tiny_data: bool = False,
    saved: str | None = None,
    options: dict[str, Any] | None = None,
    aspect: str = "pad",
    watched: bool = False,
    **changes: Any,
) -> list[float]:
    """Train, perhaps die at a step; the losses of all steps that the folder knows.

    `tiny_data` reads the recipe's own data with the tiny processor instead of making synthetic batches; the model gets
    `options`, its images that `aspect`. `saved` is the folder of a model that the run loads itself; `watched` writes
    down what each process does.
    """

    def maybe_die(_trainer: Any, row: Mapping[str, Any]) -> None:
        if kill_at is not None and row["step"] == kill_at:
            os.kill(os.getpid(), kill_with)

    def batches(step: int, rank: int, size: int, _state: Any) -> SyntheticBatches:
        return SyntheticBatches(step, rank, size, per_step, micro, packed, text_only)

    if tiny_data:
        model, processor = tiny_model(**options or {})
        processor.image_processor.image_aspect_ratio = aspect
    if saved is not None:
        changes["model"] = {"path": saved}
    elif model is None:
        model = tiny()
    if watched:
        assert model is not None
        Path(output).mkdir(parents=True, exist_ok=True)
        watch(output, model)
    train(
        recipe(output, **changes),
        model=model,
        processor=processor,
        batches=None if tiny_data else batches,
        resume=resume,
        callbacks=[maybe_die],
        suite_reader=suite_scorer,
    )
    return losses(output)


def watch(output: str | Path, model: FlorenceVLForConditionalGeneration) -> None:
    """Write what each process does, as JSON lines in `output`/rank-<r>.jsonl: its counts, passes and collectives."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from florence_vl.train import loop
    from florence_vl.train.step import StepCounts, forward_backward

    base, passes = model.model, []
    kinds = {"c10d._allgather": "gather", "c10d._reduce_scatter": "reduce-scatter", "c10d.allreduce": "all-reduce"}
    found: set[str] = set()

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.update(kind for name, kind in kinds.items() if str(function).startswith(name))
            return function(*args, **(kwargs or {}))

    def tower(_module: Any, args: Any, _kwargs: Any) -> None:
        images, _, height, width = args[0].shape
        passes[-1]["passes"].append(f"tower {images} x {height}x{width}")

    def llm(_module: Any, _args: Any, kwargs: Any) -> None:
        passes[-1]["passes"].append(f"LLM {'x'.join(map(str, kwargs['inputs_embeds'].shape[:2]))}")

    def head(_module: Any, args: Any, _kwargs: Any) -> None:
        passes[-1]["passes"].append(f"head {len(args[0])}")

    for module, hook in ((base.vision_tower, tower), (base.language_model, llm), (model.lm_head, head)):
        module.register_forward_pre_hook(hook, with_kwargs=True)

    @contextlib.contextmanager
    def accumulate(self: Parallelized, last: bool) -> Any:
        passes.append({"passes": []})
        found.clear()
        with Collectives(), ACCUMULATE(self, last):
            yield
        passes[-1]["collectives"] = sorted(found)

    def recorded(parallel: Any, micro_batches: Any, *others: Any) -> torch.Tensor:
        passes.clear()
        result = forward_backward(parallel, micro_batches, *others)
        line = {"counts": vars(StepCounts.of(micro_batches)), "micro_batches": passes}
        with (Path(output) / f"rank-{torch.distributed.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    loop.forward_backward = recorded  # type: ignore[attr-defined]
    Parallelized.accumulate = accumulate  # type: ignore[method-assign]


def losses(output: str | Path) -> list[float]:
    """Losses of a run's metrics file."""
    return [json.loads(line)["loss"] for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":  # for torchrun and forked children: a JSON list of `run`'s arguments
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")  # one for all cases
    for case in json.loads(globals().get("CASES") or sys.argv[1]):
        run(**case)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a group left to the interpreter's exit can abort the process
