"""What florence-vl-mini ships: a Florence-2 that reads and finds, and a Florence-VL that looks at the picture."""

from pathlib import Path

import pytest

pytest.importorskip("florence_vl_mini")

from florence_vl import parts
from florence_vl.data.scenes import SceneGenerator
from florence_vl.evaluate.florence2 import Florence2Runner, character_accuracy, iou


@pytest.fixture(scope="module")
def runner() -> Florence2Runner:
    return Florence2Runner(parts.mini_florence2(), "cpu")


def test_reads_words_that_no_training_picture_shows(runner: Florence2Runner) -> None:
    scenes = list(SceneGenerator(11, "test", 256, {"lettering": 1.0}).scenes(16))
    answers = runner.answer([scene.image for scene in scenes], "<OCR>")
    right = [character_accuracy(given, scene.ocr) for given, scene in zip(answers, scenes, strict=True)]
    assert sum(right) / len(right) > 0.6
    shifted = [character_accuracy(given, scene.ocr) for given, scene in zip(answers, scenes[1:], strict=False)]
    assert sum(shifted) / len(shifted) < 0.3  # another picture's words are no answer


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
    assert Path(parts.resolve_vision("mini")) == parts.mini_florence2()
    assert parts.resolve_vision("elsewhere") == "elsewhere"


@pytest.mark.slow
def test_mini_florence_vl_is_assembled_once_and_answers() -> None:
    if parts.SMOLLM2.source() is None and not parts.is_converted(parts.SMOLLM2):
        pytest.skip(parts.SMOLLM2.install)
    from florence_vl.serve.chat import ChatSession
    from florence_vl.serve.loading import load_model

    folder = parts.mini_florence_vl()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert parts.mini_florence_vl() == folder
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
