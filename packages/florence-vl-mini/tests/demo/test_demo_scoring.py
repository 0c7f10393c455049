"""Scoring of the demo's answers: strict JSON, intervals, other pictures, batched answers, the mini suite."""

import io
import json

import pytest
import torch
from PIL import Image

from florence_vl.evaluate.controls import commonest_answers
from florence_vl.model.tiny import tiny_model
from florence_vl_mini.demo.data import KEYS, Example
from florence_vl_mini.demo.scoring import (
    ROWS,
    ask,
    derangement,
    judge,
    parse,
    scores,
    suite_sample,
    suite_scores,
)

EXPECTED = {"picture": "words", "background": "light blue", "things": 0, "text": "Hello"}


def picture(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "JPEG")
    return file.getvalue()


def said(**changes):
    return json.dumps({**EXPECTED, **changes})


def test_right_json_in_any_order_and_case_is_right():
    backwards = json.dumps({key: EXPECTED[key] for key in reversed(KEYS)}, indent=2)
    for text in (said(), backwards, said(text="HELLO")):
        assert judge(text, EXPECTED) == dict.fromkeys(ROWS, True)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"picture": "objects"}, "picture"),
        ({"background": "blue"}, "background"),
        ({"things": "0"}, "things"),
        ({"things": False}, "things"),
        ({"things": 0.0}, "things"),
        ({"text": None}, "text"),
        ({"text": "Hello there"}, "text"),
    ],
)
def test_one_wrong_value_is_wrong_in_its_key_and_in_the_whole(change, wrong):
    found = judge(said(**change), EXPECTED)
    assert {name for name, right in found.items() if not right} == {wrong, "all four"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "words",
        "[1]",
        said() + " and more",
        f"```json\n{said()}\n```",
        said()[:-1],
        said(color="red"),
        json.dumps({key: EXPECTED[key] for key in KEYS[:3]}),
        "[" * 100_000,
    ],
)
def test_invalid_json_is_wrong_everywhere(text):
    assert parse(text) is None
    assert judge(text, EXPECTED) == dict.fromkeys(ROWS, False)


def test_scores_are_shares_of_all_answers():
    texts = [said(), said(things=2), "nonsense", said()]
    result = scores(texts, [EXPECTED] * 4)
    assert {name: cell["right"] for name, cell in result.items()} == {
        "valid JSON": 3, "picture": 3, "background": 3, "things": 2, "text": 3, "all four": 2,
    }  # fmt: skip
    assert result["all four"]["share"] == 0.5
    assert result["things"]["low"] < 0.5 < result["things"]["high"]


@pytest.mark.parametrize("number", [2, 3, 10])
def test_derangement_moves_every_picture(number):
    examples = [Example(bytes([index]), EXPECTED) for index in range(number)]
    moved = derangement(examples, seed=number)
    assert sorted(moved) == [example.image for example in examples]
    assert all(new != example.image for new, example in zip(moved, examples, strict=True))
    assert moved == derangement(examples, seed=number)
    with pytest.raises(ValueError, match="at least 2"):
        derangement(examples[:1])


def test_batched_answers_equal_single_ones(monkeypatch):
    monkeypatch.setattr("florence_vl_mini.demo.scoring.MAX_NEW_TOKENS", 4)
    model, processor = tiny_model(seed=1)
    for part in (model.model.multi_modal_projector, model.model.language_model.layers):
        for parameter in part.parameters():
            parameter.data *= 5  # small random weights see little: let pictures matter
    images = [picture(colour) for colour in ("red", "blue", "white", "black")] + [None]
    together = ask(model, processor, images)
    assert together == [ask(model, processor, [image])[0] for image in images]
    assert len(set(together)) > 1
    model.train()
    ask(model, processor, images[:1])
    assert model.training
    assert torch.is_grad_enabled()


def test_suite_sample_and_scores(small_suite):
    sample, guesses = suite_sample(5)
    assert set(guesses) == {"General", "Knowledge", "OCR & Chart", "Vision-centric", "all"}
    assert {len(questions) for _, questions in sample} == {5}
    assert guesses["all"]["total"] == 20
    assert guesses["all"]["right"] == sum(guesses[b.group]["right"] for b, _ in sample) > 0
    for benchmark, chosen in sample:
        whole = benchmark.questions(small_suite)
        said = dict(zip([q.id for q in whole], commonest_answers(whole), strict=True))
        right = [benchmark.scorer.judge(said[q.id], q.reference).score for q in chosen]
        assert guesses[benchmark.group]["right"] == sum(right)
    model, processor = tiny_model()
    found = suite_scores(model, processor, sample)
    assert found.keys() == guesses.keys()
    assert all(found[name]["total"] == guesses[name]["total"] for name in found)
