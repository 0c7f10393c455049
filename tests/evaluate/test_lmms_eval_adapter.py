"""As a model of lmms-eval: the requests of all tasks come in one call, and each picture is encoded once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.local import LocalAnswerer
from florence_vl.evaluate.question import IMAGE, ImagePicture, Question
from florence_vl.model.tiny import tiny_model

pytest.importorskip("lmms_eval")

COLORS = ("red", "green", "blue")


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["prompt"]}]
    return [{"role": "user", "content": content}]


def requests(tasks: dict[str, Any]) -> list[Any]:
    settings = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    return [
        SimpleNamespace(args=("", messages, settings, number, task, "test"))
        for task, splits in tasks.items()
        for number in range(len(splits["test"]))
    ]


def test_questions_of_several_tasks_about_one_picture_meet() -> None:
    from florence_vl.evaluate.lmms_eval_plugin import FlorenceVLAdapter

    model, processor = tiny_model()
    answerer = LocalAnswerer(model, processor, batch_size=4, identity={"model": "tiny"})
    adapter = FlorenceVLAdapter(answerer=answerer)
    adapter.task_dict = {
        task: {"test": [{"image": Image.new("RGB", (64, 64), color), "prompt": f"{task}?"} for color in COLORS]}
        for task in ("What", "Where", "How many")
    }
    found = adapter.generate_until(requests(adapter.task_dict))
    assert answerer.encoded_images == len(COLORS)
    alone = []
    for task, splits in adapter.task_dict.items():
        for number, doc in enumerate(splits["test"]):
            question = Question(str(number), task, (IMAGE, doc["prompt"]), (ImagePicture(doc["image"]),))
            alone += LocalAnswerer(model, processor, 1, {"model": "tiny"}).answer([question], Generation(4))
    assert [result.text for result in found] == [answer.text for answer in alone]


def test_questions_without_an_answer_are_told() -> None:
    from florence_vl.evaluate.lmms_eval_plugin import FlorenceVLAdapter

    model, processor = tiny_model()
    adapter = FlorenceVLAdapter(answerer=LocalAnswerer(model, processor, batch_size=4, identity={"model": "tiny"}))
    long = "word " * model.config.get_text_config().max_position_embeddings
    picture = Image.new("RGB", (64, 64), "red")
    adapter.task_dict = {"ask": {"test": [{"image": picture, "prompt": text} for text in ("What?", long)]}}
    with pytest.warns(UserWarning, match=r"1 of 2 questions have no answer .* ask: the prompt has \d+ tokens"):
        found = adapter.generate_until(requests(adapter.task_dict))
    assert found[1].text == ""


def test_a_picture_is_known_by_its_size_and_pixels() -> None:
    wide, high = (ImagePicture(Image.new("RGB", size, "red")) for size in ((4, 2), (2, 4)))
    assert wide.key != high.key
    assert wide.key == ImagePicture(Image.new("RGB", (4, 2), "red")).key
    assert wide.read().startswith(b"\x89PNG")
