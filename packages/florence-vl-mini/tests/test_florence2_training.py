"""The mini Florence-2: a folder that transformers loads, its loss, exact resume, settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("florence_vl_mini")

from transformers import AutoTokenizer, Florence2ForConditionalGeneration, Florence2Processor

from florence_vl_mini.pretrain import train as florence2
from florence_vl_mini.pretrain.config import Florence2Training, read_recipe
from florence_vl_mini.pretrain.data import Batches, SceneTasks, collate, encode_prompt, normalize
from florence_vl_mini.pretrain.model import build_mini_florence2
from florence_vl_mini.scenes import TASK_PROMPTS, SceneGenerator

TINY = {"images_per_step": 2, "tasks_per_image": 2, "image_size": 64, "workers": 0, "warmup_steps": 1, "log_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mini_florence2(tmp_path_factory.mktemp("mini"), seed=0, image_size=64, tokenizer_scenes=100)


def test_folder_loads_in_transformers(folder: Path) -> None:
    model = Florence2ForConditionalGeneration.from_pretrained(folder)
    processor = Florence2Processor.from_pretrained(folder)
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 8e6
    scene = SceneGenerator(0, "train", 64)[0]
    inputs = processor(text="<OCR>", images=scene.image, return_tensors="pt")
    image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert image_tokens == 2 * 2 + 1
    assert inputs["input_ids"][0, image_tokens:].tolist() == encode_prompt(processor.tokenizer, "<OCR>")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 1


def test_tokenizer_is_laid_out_as_barts(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    ids = tokenizer("What is the text in the image?")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert ids == tokenizer("<s>What is the text in the image?</s>", add_special_tokens=False)["input_ids"]
    for i in (0, 7, 999):
        assert tokenizer.tokenize(f"<loc_{i}>") == [f"<loc_{i}>"]
    text = "Café №5: naïve <loc_3><loc_4> ok"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_pixels_equal_the_processors(folder: Path) -> None:
    processor = Florence2Processor.from_pretrained(folder)
    data = SceneTasks(Florence2Training("x", **TINY), processor.tokenizer)
    pixels, *_ = data[1]
    image = SceneGenerator(0, "train", 64, data.config.mix)[1].image
    expected = processor(text="<OCR>", images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalize(pixels[None]), expected)


def test_loss_equals_transformers(folder: Path) -> None:
    model = Florence2ForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = Florence2Processor.from_pretrained(folder).tokenizer
    data = SceneTasks(Florence2Training("x", **{**TINY, "tasks_per_image": 3}), tokenizer)
    batch = collate([data[i] for i in range(4)])
    losses, task_of, image, prompted = florence2.seq2seq_loss(model, batch)
    assert image.shape == (4, 5, 192)
    assert prompted.shape == (len(batch["owner"]), 5, 192)
    image_ids = torch.full((len(batch["owner"]), 2 * 2 + 1), model.config.image_token_id)
    expected = model(
        input_ids=torch.cat([image_ids, batch["prompt_ids"]], 1),
        attention_mask=torch.cat([torch.ones_like(image_ids), batch["prompt_mask"]], 1),
        pixel_values=normalize(batch["pixels"])[batch["owner"]],
        labels=batch["labels"],
    )
    torch.testing.assert_close(losses.mean(), expected.loss, rtol=1e-4, atol=1e-5)
    assert task_of.bincount().tolist() == (batch["labels"] != -100).sum(1).tolist()


def test_targets_decode_to_the_scenes_annotations(folder: Path) -> None:
    tokenizer = Florence2Processor.from_pretrained(folder).tokenizer
    data = SceneTasks(Florence2Training("x", **TINY), tokenizer)
    names = {tuple(ids): task for task, ids in data.prompts.items()}
    seen = set()
    for index in range(60):
        scene = data.scenes[index]
        for prompt, target, _ in data[index][1]:
            task = names[tuple(prompt)]
            seen.add(task)
            assert tokenizer.decode(target) == f"<s>{scene.target(task, data.step)}</s>"
            assert len(target) <= data.config.max_target_tokens
    assert seen == set(TASK_PROMPTS)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_cut_ends_where_an_uncut_one_does(
    folder: Path, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TINY, "optimizer": optimizer}
    whole = Florence2Training(str(tmp_path / "whole"), steps=4, decay_steps=2, save_every=100, **settings)
    shutil.copytree(folder, tmp_path / "whole/start")  # spares training the tokenizer twice
    shutil.copytree(folder, tmp_path / "cut/start")
    florence2.train(whole, "cpu")
    cut = replace(whole, out=str(tmp_path / "cut"), steps=2, decay_steps=0, precision="auto")
    monkeypatch.setattr(florence2, "bf16_is_faster", lambda _: False)
    florence2.train(cut, "cpu")
    monkeypatch.setattr(florence2, "bf16_is_faster", lambda _: True)  # a resumed run keeps its precision
    florence2.train(replace(whole, out=cut.out, precision="auto"), "cpu")
    a, b = (torch.load(Path(c.out) / "checkpoint.pt", weights_only=True) for c in (whole, cut))
    assert a["step"] == b["step"] == 4
    for part in ("model", "ema"):
        for name, value in a[part].items():
            torch.testing.assert_close(value, b[part][name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["lr"] < lines[1]["lr"]
    exported = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "whole/model")
    torch.testing.assert_close(exported.state_dict()["model.vision_tower.convs.0.conv.weight"],
                               a["ema"]["model.vision_tower.convs.0.conv.weight"])  # fmt: skip


def test_loss_falls_and_reaches_every_part(folder: Path) -> None:
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration.from_pretrained(folder).train()
    data = SceneTasks(Florence2Training("x", **TINY), Florence2Processor.from_pretrained(folder).tokenizer)
    batch = collate([data[i] for i in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(6):
        loss = florence2.seq2seq_loss(model, batch)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        values.append(loss.item())
        optimizer.step()
    assert values[-1] < values[0] - 0.5
    for name in ("vision_tower.convs.0.conv.weight", "multi_modal_projector.image_projection.weight"):
        assert model.model.get_parameter(name).grad.abs().max() > 0


def _average(rank: int, rendezvous: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    first, second = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
    first.grad = torch.full((2, 3), float(rank + 1))
    if rank:
        second.grad = torch.ones(4)  # the other process has none
    stop = florence2._average_gradients([first, second], stop=bool(rank), world=2)
    torch.save({"grads": [first.grad, second.grad], "stop": stop}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_gradients_and_the_wish_to_stop(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_average, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert state["grads"][0].unique().tolist() == [1.5]
        assert state["grads"][1].unique().tolist() == [0.5]
        assert state["stop"]


def _refuse(rank: int, rendezvous: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    config = Florence2Training(f"{out}/run", steps=1, decay_steps=0, start_from=out, **TINY)
    try:
        florence2.train(config, "cpu")
    except ValueError as error:
        Path(out, f"{rank}.txt").write_text(str(error))
    assert dist.is_initialized()  # the group of the caller stays
    dist.destroy_process_group()


def test_a_start_that_cannot_be_made_is_refused_on_every_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_refuse, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert "no mini Florence-2" in (tmp_path / f"{rank}.txt").read_text()


def test_two_processes_train_under_torchrun(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = {"out": str(tmp_path / "run"), "start_from": str(folder), "steps": 2, "decay_steps": 1, **TINY}
    recipe.write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "florence_vl", "mini", "train", str(recipe), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    alone = Florence2Training(**{**values, "out": str(tmp_path / "alone")})
    florence2.train(alone, "cpu")
    expected = torch.load(tmp_path / "alone/checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    # gradients are averaged over processes, not over tokens: the same images, nearly the same step
    moved, wanted = (_moved(s["model"], folder) for s in (state, expected))
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.9
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    exported = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "run/model").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in state["ema"].items() if name in exported)


def _moved(weights: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    start = Florence2ForConditionalGeneration.from_pretrained(folder).state_dict()
    return torch.cat([(weights[name] - value).flatten() for name, value in start.items()])


def test_processes_share_out_the_images_of_a_step() -> None:
    whole = list(Batches(3, 5, 4))
    shares = [list(Batches(3, 5, 4, rank, 2)) for rank in range(2)]
    assert whole == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == whole
    assert len(Batches(3, 5, 4, 1, 2)) == 2


def test_second_mix_begins_at_its_step(folder: Path) -> None:
    mixes = {"mix": {"single": 1.0}, "second_mix": {"lettering": 1.0}, "second_mix_at": 3}
    config = Florence2Training("x", **{**TINY, **mixes, "images_per_step": 2})
    data = SceneTasks(config, Florence2Processor.from_pretrained(folder).tokenizer)
    written = [bool(data[i][2]) for i in range(12)]  # whether letters lie anywhere
    assert written == [False] * 6 + [True] * 6
    with pytest.raises(ValueError, match="must be set together"):
        Florence2Training("x", second_mix={"single": 1.0})


def test_new_run_starts_from_other_weights(folder: Path, tmp_path: Path) -> None:
    config = Florence2Training(str(tmp_path / "run"), steps=1, decay_steps=0, start_from=str(folder), **TINY)
    florence2.train(config, "cpu")
    started = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    name = "model.language_model.shared.weight"
    near = Florence2ForConditionalGeneration.from_pretrained(folder).state_dict()[name]
    assert (started[name] - near).abs().max() < 0.01
    with pytest.raises(ValueError, match="no mini Florence-2"):
        florence2.train(replace(config, out=str(tmp_path / "other"), start_from=str(tmp_path)), "cpu")
    with pytest.raises(ValueError, match="64 px, but image_size is 128"):
        florence2.train(replace(config, out=str(tmp_path / "other"), image_size=128), "cpu")


def test_float16_weights_such_as_the_shipped_are_trained_in_float32(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    Florence2ForConditionalGeneration.from_pretrained(folder).to(torch.float16).save_pretrained(half)
    config = Florence2Training(str(tmp_path / "run"), steps=1, decay_steps=0, start_from=str(half), **TINY)
    trained = Florence2ForConditionalGeneration.from_pretrained(florence2.train(config, "cpu"))
    assert trained.dtype == torch.float32


def test_numbers_are_read_as_in_every_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("out: here\nlearning_rate: 6e-4\n")
    assert read_recipe(recipe).learning_rate == 6e-4
    assert read_recipe(recipe, ["learning_rate=1e-5"]).learning_rate == 1e-5
    with pytest.raises(ValueError, match="`learning_rate` should be a valid number"):
        read_recipe(recipe, ["learning_rate=fast"])
    recipe.write_text("steps: 5\n")
    with pytest.raises(ValueError, match=r"`out` is missing"):
        read_recipe(recipe)


def test_another_data_order_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "start")
    config = Florence2Training(str(tmp_path), steps=1, decay_steps=0, **TINY)
    florence2.train(config, "cpu")
    with pytest.raises(ValueError, match="seed"):
        florence2.train(replace(config, seed=1), "cpu")


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision"):
        Florence2Training("x", precision="fp16")
    with pytest.raises(ValueError, match="decay_steps"):
        Florence2Training("x", steps=5, decay_steps=6)
    with pytest.raises(ValueError, match="<OCT>"):
        Florence2Training("x", tasks={"<OCT>": 1.0})
    with pytest.raises(ValueError, match="multiple of 32"):
        build_mini_florence2(tmp_path / "m", image_size=100)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        florence2.export(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("out: here\nstep: 5\n")
    with pytest.raises(ValueError, match="'steps'"):
        read_recipe(recipe)
    recipe.write_text("out: here\nsteps: 700\n")
    assert read_recipe(recipe, ["learning_rate=0.5", "mix.single=2"]).learning_rate == 0.5
    with pytest.raises(ValueError, match=r"key\.path=value"):
        read_recipe(recipe, ["steps"])
    assert read_recipe().image_size == 256
