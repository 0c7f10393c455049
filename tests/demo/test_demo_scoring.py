"""Scoring of the demo's answers: exact match, intervals, wrong pictures, batched answers."""

import pytest
import torch
from PIL import Image

from florence_vl.demo.scoring import Question, answer, derangement, scores, wilson
from florence_vl.testing import tiny_model


def picture(colour="red"):
    return Image.new("RGB", (64, 64), colour)


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for right, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
    for right, total in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="need 0 <= right <= total"):
            wilson(right, total)


def test_right_ignores_case_articles_and_number_words():
    question = Question(
        picture(), "k", "?", "red apple", {"a": "A red Apple.", "b": "apple", "c": "", "d": "red apples"}
    )
    assert [question.right(name) for name in "abcd"] == [True, False, False, False]
    assert Question(picture(), "k", "?", "3", {"a": "three"}).right("a")


def test_scores_by_kind_and_over_all():
    questions = [Question(picture(), kind, "?", "x", {"after": text}) for kind, text in ["ax", "ay", "bx", "bx"]]
    result = scores(questions, "after")
    assert list(result) == ["a", "b", "all"]
    assert (result["a"]["right"], result["a"]["total"], result["all"]["share"]) == (1, 2, 0.75)
    assert result["b"]["low"] < 1 == result["b"]["high"]


def test_derangement_gives_each_question_a_wrong_picture():
    questions = [
        Question(picture(colour), kind, "?", colour)
        for kind in ("k", "l")
        for colour in ("red", "blue", "green", "red")
    ]
    for question, other in zip(questions, derangement(questions), strict=True):
        pixel = other.getpixel((0, 0))
        assert pixel != question.image.getpixel((0, 0))


def test_batched_answers_equal_single_ones():
    model, processor = tiny_model()
    asked = [
        ("What is shown in this very long question about a picture?", picture()),
        ("What?", picture("blue")),
        ("Hello", None),
        ("What colour is the background of it?", None),
    ]
    together = answer(model, processor, asked, max_new_tokens=5, batch_size=4)
    single = [answer(model, processor, [item], max_new_tokens=5)[0] for item in asked]
    assert together == single
    assert len(set(together)) > 1
    model.train()
    answer(model, processor, asked[:1], max_new_tokens=1)
    assert model.training
    assert torch.is_grad_enabled()
