"""Two processes (gloo): DDP and FSDP2 give one process's losses; ranks without images do not hang; resharding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from florence_vl.model.tiny import tiny_model
from florence_vl.train import load_recipe
from florence_vl.train.casts import keep_casts
from florence_vl.train.config import ActivationCheckpointingConfig, CompileConfig, ParallelConfig
from florence_vl.train.data import TrainingData
from florence_vl.train.parallel import (
    LossModule,
    apply_activation_checkpointing,
    apply_compile,
    blocks,
    part_blocks,
    resolve_strategy,
)
from florence_vl.train.setup import refuse_early
from florence_vl.train.step import count_pixels, tower_calls
from florence_vl.train.world import World

BASE: dict[str, Any] = {"steps": 3, "micro": 1, "checkpoint": {"every_steps": None, "export": False}}
# DropPath and dropout draw per process, so parts that have them are frozen: parallelism must be the only difference
FROZEN_TOWER = {"tower": {"train": False}}

# 317 supervised tokens in step 1, which bf16 rounds to 316
HALF: dict[str, Any] = {"precision": "bf16", "per_step": 80, "micro": 8, "steps": 1, "optimizer": {"lr": 1e-4}}


# Images of different sizes, gates that depend on the question, randomly drawn views and features, distillation.
LOOKS: dict[str, Any] = {
    "tiny_data": True,
    "aspect": "native",
    "options": {
        "fusion": "gated",
        "gate": {"context": "question"},
        "positions": "resampled",
        "position_grid": (2, 2),
        "views": {"glance": {"size": 32, "features": ["davit"]}, "read": {"features": ["davit", "ocr"]}},
    },
    "micro_batch_size": 1,
    "distill": 0.5,
    "parts": {"tower": {"train": False}, "projector": {"lr": 0.03}},
}


# Some processes have images of several tiles and others none, whose row ends are trained all the same.
TILED: dict[str, Any] = {
    "tiny_data": True,
    "options": {"tiles": {"max": 4, "global": True, "size": 64}},
    "micro_batch_size": 1,
    "parts": {"tower": {"train": False}, "projector": {"lr": 0.03}},
}


# A whole backbone trains, of which the last block has no gradient: the feature is from the one before.
BACKBONE: dict[str, Any] = {
    "tiny_data": True,
    "options": {"tower": "backbone"},
    "micro_batch_size": 1,
    "parts": {},
}


def tiled_data(folder: Path) -> dict[str, Any]:
    """The data section of `TILED`."""
    return {key: value for key, value in look_data(folder).items() if key not in ("views", "feature_dropout")}


def look_data(folder: Path) -> dict[str, Any]:
    """The data section of `LOOKS`: every fourth record has no image, others one or two of several sizes."""
    records = []
    for index in range(20):
        sizes = [(50 + 9 * index, 64), (40, 150)][: min(index % 4, 2)]
        images = []
        for number, size in enumerate(sizes):
            images.append(f"{index}-{number}.png")
            Image.new("RGB", size, (12 * index, 99, 10)).save(folder / images[-1])
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": f"What is {index}?"}]
        answer = {"role": "assistant", "content": "red green blue"[: 3 + index % 11]}
        records.append({"id": str(index), "images": images, "messages": [{"role": "user", "content": content}, answer]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {
        "sources": [{"path": str(folder / "data.jsonl")}],
        "max_length": 160,
        "packing": {"mode": "packed", "tokens_per_row": 160, "window": 8},
        "views": {"full": 1.0, "glance": 1.0, "read": 1.0},
        "feature_dropout": 0.3,
    }


def torchrun(script: str, cases: list[dict[str, Any]], processes: int = 2) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    done = subprocess.run([*command, json.dumps(cases)], env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tiny_run: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases of two processes in one start of torchrun, as most of its time is imports."""
    folder = tmp_path_factory.mktemp("two")
    cases: list[dict[str, Any]] = []

    def case(name: str, **changes: Any) -> None:
        cases.append({"output": str(folder / name), "parts": FROZEN_TOWER, **BASE, **changes})

    case("ddp", parallel={"strategy": "ddp"})
    exported = {"every_steps": None, "export": True}
    case("fsdp", parallel={"strategy": "fsdp"}, checkpoint=exported)
    case("fsdp-packed", parallel={"strategy": "fsdp"}, packed=True, micro=2)
    case("fsdp-text-only", parallel={"strategy": "fsdp"}, text_only=2)
    case("fsdp-all", parallel={"strategy": "fsdp"}, parts={}, activation_checkpointing={"tower": "full", "llm": "full"})
    case("fsdp-bf16", parallel={"strategy": "fsdp"}, precision="bf16", parts={})
    case("ddp-half", parallel={"strategy": "ddp"}, **HALF)
    case("fsdp-half", parallel={"strategy": "fsdp"}, **HALF)
    case("fsdp-pure", parallel={"strategy": "fsdp"}, **HALF | {"precision": "bf16_pure"})
    case("fsdp-first", parallel={"strategy": "fsdp"}, steps=2, checkpoint={"every_steps": None, "export": False})
    case("fsdp-first", parallel={"strategy": "fsdp"}, steps=3, resume="auto")
    looks = LOOKS | {"data": look_data(folder)}
    case("ddp-looks", parallel={"strategy": "ddp"}, **looks)
    case("fsdp-looks", parallel={"strategy": "fsdp"}, **looks)
    case(
        "fsdp-looks-all",
        parallel={"strategy": "fsdp"},
        **looks | {"parts": {}, "activation_checkpointing": {"tower": "full", "llm": "full"}},
    )
    case("ddp-tiles", parallel={"strategy": "ddp"}, **TILED, data=tiled_data(folder))
    case("fsdp-tiles", parallel={"strategy": "fsdp"}, **TILED, data=tiled_data(folder), checkpoint=exported)
    case("ddp-backbone", parallel={"strategy": "ddp"}, **BACKBONE, data=tiled_data(folder))
    torchrun(str(tiny_run.__file__), cases)
    return folder


@pytest.fixture(scope="module")
def one(tiny_run: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("one")
    return {
        "images": tiny_run.run(folder / "a", parts=FROZEN_TOWER, **BASE),
        "text-only": tiny_run.run(folder / "b", parts=FROZEN_TOWER, text_only=2, **BASE),
    }


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp-packed"])
def test_two_processes_give_the_losses_of_one(
    tiny_run: ModuleType, one: dict[str, list[float]], two: Path, name: str
) -> None:
    assert tiny_run.losses(two / name) == pytest.approx(one["images"], abs=2e-5)


def test_a_rank_without_images_does_not_hang(tiny_run: ModuleType, one: dict[str, list[float]], two: Path) -> None:
    # every second sample has no image, and with one sample a micro-batch rank 0 sees only those
    assert tiny_run.losses(two / "fsdp-text-only") == pytest.approx(one["text-only"], abs=2e-5)


def test_images_of_all_sizes_views_and_questions_train_alike_on_one_and_two_processes(
    tiny_run: ModuleType, two: Path, tmp_path: Path
) -> None:
    data = look_data(tmp_path)
    processor = tiny_model(**LOOKS["options"])[1]
    processor.image_processor.image_aspect_ratio = "native"
    streams = [
        TrainingData(load_recipe(tiny_run.recipe(tmp_path, data=data, micro_batch_size=1)), processor).batches(
            0, rank, 2, None
        )
        for rank in range(2)
    ]
    calls = [[tower_calls(next(stream))[0] for _ in range(6)] for stream in streams]
    assert 0 in calls[0] + calls[1], "some micro-batches have no image"
    assert max(calls[0] + calls[1]) > 1, "some have images of several sizes"
    assert sum(a != b for a, b in zip(*calls, strict=True)) > 1, "the processes differ in it"
    one = tiny_run.run(tmp_path / "one", **BASE | LOOKS | {"data": data})
    assert one == pytest.approx(tiny_run.run(tmp_path / "rows", **BASE | LOOKS | {"data": data, "micro_batch_size": 4}))
    plain = tiny_run.run(tmp_path / "plain", **BASE | LOOKS | {"data": data, "distill": 0.0})
    assert one[0] > plain[0] + 1e-6, "the divergence adds to the loss"
    for name in ("ddp-looks", "fsdp-looks"):
        assert tiny_run.losses(two / name) == pytest.approx(one, abs=2e-5), name
    assert len(tiny_run.losses(two / "fsdp-looks-all")) == BASE["steps"]


def test_images_with_and_without_tiles_train_alike_on_one_and_two_processes(
    tiny_run: ModuleType, two: Path, tmp_path: Path
) -> None:
    data = tiled_data(tmp_path)
    processor = tiny_model(**TILED["options"])[1]
    recipe = load_recipe(tiny_run.recipe(tmp_path, data=data, micro_batch_size=1))
    streams = [TrainingData(recipe, processor).batches(0, rank, 2, None) for rank in range(2)]
    pixels = [[count_pixels(next(stream)) for _ in range(6)] for stream in streams]
    assert any(min(pair) <= 64 * 64 < max(pair) for pair in zip(*pixels, strict=True)), "one process has tiles"
    one = tiny_run.run(tmp_path / "one", **BASE | TILED | {"data": data})
    for name in ("ddp-tiles", "fsdp-tiles"):
        assert tiny_run.losses(two / name) == pytest.approx(one, abs=2e-5), name
    trained = load_file(two / "fsdp-tiles" / "model" / "model.safetensors")["model.row_end.vector"]
    assert not torch.allclose(trained, tiny_model(**TILED["options"])[0].model.row_end.vector, atol=1e-3)


def test_a_backbone_trains_although_its_last_block_is_not_used(tiny_run: ModuleType, two: Path, tmp_path: Path) -> None:
    one = tiny_run.run(tmp_path / "one", **BASE | BACKBONE | {"data": tiled_data(tmp_path)})
    assert tiny_run.losses(two / "ddp-backbone") == pytest.approx(one, abs=2e-5)


def test_everything_trains_sharded_with_activation_checkpointing_and_in_bf16(tiny_run: ModuleType, two: Path) -> None:
    full, half = tiny_run.losses(two / "fsdp-all"), tiny_run.losses(two / "fsdp-bf16")
    assert len(full) == len(half) == 3
    assert full[0] == pytest.approx(half[0], abs=0.1)


@pytest.mark.parametrize("name", ["ddp-half", "fsdp-half", "fsdp-pure"])
def test_in_bf16_the_loss_is_divided_by_the_very_number_of_tokens(
    tiny_run: ModuleType, two: Path, tmp_path: Path, name: str
) -> None:
    supervised = sum(int((torch.tensor(tiny_run.make_sample(n)[1][1:]) != -100).sum()) for n in range(80))
    assert abs(float(torch.tensor(float(supervised), dtype=torch.bfloat16)) / supervised - 1) > 2e-3
    exact = tiny_run.run(tmp_path, parts=FROZEN_TOWER, **BASE | HALF | {"precision": "fp32"})
    assert tiny_run.losses(two / name) == pytest.approx(exact, rel=1e-3)


def test_frozen_weights_are_cast_once_and_give_the_same_step(
    tiny_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(keep: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        model = tiny_run.tiny()
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
        if keep:
            keep_casts(model, torch.bfloat16)
        module, casts = LossModule(model, (64, 64), autocast=torch.bfloat16), 0
        frozen = {p.data_ptr() for p in model.parameters() if p.ndim == 2 and not p.requires_grad}
        own = torch.Tensor.to

        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal casts
            casts += tensor.data_ptr() in frozen and torch.bfloat16 in args
            return own(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", to)
        batch = tiny_run.collate([tiny_run.make_sample(1), tiny_run.make_sample(2)], packed=False)
        losses = []
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(module(batch, 10))
            losses[-1].backward()
        with torch.no_grad():  # as a checkpoint that is loaded
            model.lm_head.weight.mul_(0.5)
        losses.append(module(batch, 10))
        monkeypatch.undo()
        assert all(p.dtype == torch.float32 for p in model.state_dict().values() if p.is_floating_point())
        return losses, [p.grad for p in model.parameters() if p.grad is not None], casts

    (plain, gradients, of_head), (kept, kept_gradients, casts) = steps(False), steps(True)
    assert torch.equal(torch.stack(plain), torch.stack(kept))
    assert plain[1] != plain[2]
    assert len(gradients)
    assert all(map(torch.equal, gradients, kept_gradients))
    frozen_layers = sum(isinstance(m, torch.nn.Linear) for m in tiny_run.tiny().model.language_model.modules())
    assert of_head == 3
    assert casts == frozen_layers + 2


def test_a_sharded_run_resumes_on_two_processes_and_on_one(tiny_run: ModuleType, two: Path, tmp_path: Path) -> None:
    whole = tiny_run.losses(two / "fsdp")
    assert tiny_run.losses(two / "fsdp-first") == pytest.approx(whole, abs=1e-6)
    checkpoint = two / "fsdp-first" / "checkpoints" / "step-00000002"
    arguments = {**BASE, "parts": FROZEN_TOWER, "resume": str(checkpoint)}
    assert tiny_run.run(tmp_path / "one", **arguments)[-1] == pytest.approx(whole[-1], abs=2e-5)


def test_a_sharded_run_exports_the_whole_model(tiny_run: ModuleType, two: Path, tmp_path: Path) -> None:
    from florence_vl import FlorenceVLForConditionalGeneration

    model = tiny_run.tiny()
    tiny_run.run(tmp_path, model=model, parts=FROZEN_TOWER, **BASE)
    exported = FlorenceVLForConditionalGeneration.from_pretrained(two / "fsdp" / "model").state_dict()
    assert exported.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, exported[name], atol=2e-4), name
    assert not torch.equal(exported["lm_head.weight"], tiny_run.tiny().lm_head.weight)


def test_blocks_are_found_in_every_tower_and_llm(tiny_run: ModuleType) -> None:
    model = tiny_run.tiny()
    found = part_blocks(model)
    assert {type(b).__name__ for b in found["tower"]} == {"DaViTBlock", "SwitchedEncoderLayer"}
    assert {type(b).__name__ for b in found["llm"]} == {"LlamaDecoderLayer"}
    assert len(found["llm"]) == 2
    for tower in ("clip_vision_model", "siglip_vision_model", "dinov2"):
        assert len(blocks(tiny_run.tiny(tower=tower).model.vision_tower)) == 2


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_keeps_gradients_and_saves_less(tiny_run: ModuleType, mode: str) -> None:
    def step(modes: ActivationCheckpointingConfig) -> tuple[dict[str, torch.Tensor], int]:
        model = tiny_run.tiny()
        apply_activation_checkpointing(model, modes)
        model.train()
        kept: set[int] = set()
        size = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in kept:
                kept.add(pointer)
                size += tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        batch = tiny_run.collate([tiny_run.make_sample(1), tiny_run.make_sample(2)], packed=False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, size

    plain, plain_size = step(ActivationCheckpointingConfig())
    saved, saved_size = step(ActivationCheckpointingConfig(tower=mode, llm=mode))  # type: ignore[arg-type]
    assert saved_size < 0.8 * plain_size
    for name, gradient in plain.items():
        assert torch.allclose(gradient, saved[name], atol=1e-6), name


def test_impossible_strategies_are_refused() -> None:
    alone, several = World(torch.device("cpu")), World(torch.device("cpu"), rank=0, size=4)
    assert resolve_strategy(ParallelConfig(), alone) == "none"
    assert resolve_strategy(ParallelConfig(), several) == "ddp"
    assert resolve_strategy(ParallelConfig(), World(torch.device("cuda"), rank=0, size=4)) == "fsdp"
    with pytest.raises(ValueError, match="4 processes run"):
        resolve_strategy(ParallelConfig(strategy="none"), several)
    with pytest.raises(ValueError, match="torchrun"):
        resolve_strategy(ParallelConfig(strategy="ddp"), alone)
    with pytest.raises(ValueError, match=r"`batch_size` 12 makes 6 micro-batches .* 4 processes cannot share them"):
        refuse_early(load_recipe({"steps": 1, "batch_size": 12, "micro_batch_size": 2}), several)


def test_an_unknown_compiler_is_refused(tiny_run: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"unknown compile.backend 'inducter'. Did you mean 'inductor'"):
        apply_compile(tiny_run.tiny(), CompileConfig(llm=True, backend="inducter"))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tiny_run: ModuleType, tmp_path: Path) -> None:
    eager = tiny_run.run(tmp_path / "eager", parts=FROZEN_TOWER, **{**BASE, "steps": 2})
    for backend, compile_config in {"llm": {"llm": True}, "both": {"llm": True, "tower": True}}.items():
        compiled = {**compile_config, "backend": "aot_eager"}  # traces as inductor does, without a C++ compiler
        losses = tiny_run.run(tmp_path / backend, parts=FROZEN_TOWER, compile=compiled, **{**BASE, "steps": 2})
        assert losses == pytest.approx(eager, abs=1e-5)


@pytest.mark.slow
def test_four_processes_shard_inside_groups_and_replicate_between(tiny_run: ModuleType, tmp_path: Path) -> None:
    case = {**BASE, "parts": FROZEN_TOWER, "output": str(tmp_path / "hsdp")}
    torchrun(str(tiny_run.__file__), [{**case, "parallel": {"strategy": "hsdp", "shard_size": 2}}], processes=4)
    reference = tiny_run.run(tmp_path / "one", parts=FROZEN_TOWER, **BASE)
    assert tiny_run.losses(tmp_path / "hsdp") == pytest.approx(reference, abs=2e-5)


class _Unsendable(ValueError):
    """Its pickle calls it with the message alone."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")


def _decide(rank: int, meet: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    world = World(torch.device("cpu"), rank, 2)
    found = [world.decide(lambda: f"seen by {rank}")]
    for error in (FileNotFoundError(f"nothing there for {rank}"), _Unsendable("number", rank)):

        def fail(error: Exception = error) -> None:
            raise error

        try:
            world.decide(fail)
        except Exception as caught:
            found.append(f"{type(caught).__name__} {caught}")
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_the_first_process_decides_for_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_decide, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    for rank, kind in enumerate(("_Unsendable", "ValueError")):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == ["seen by 0", "FileNotFoundError nothing there for 0", f"{kind} number 0"]
    assert World(torch.device("cpu")).decide(lambda: 7) == 7
