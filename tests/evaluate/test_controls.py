"""Controls: the questions are unchanged, the information needed to answer them is removed."""

import pytest
import torch

from florence_vl.evaluate.benchmark import Benchmark
from florence_vl.evaluate.controls import (
    MAJORITY,
    commonest_answers,
    mean_features,
    only_features,
    score_controls,
    with_other_images,
    without_images,
)
from florence_vl.evaluate.question import IMAGE, BytesPicture, Question
from florence_vl.evaluate.suites import choose
from florence_vl.model.tiny import tiny_model


def png(colour: str) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    answers = [("yes", "red"), ("yes", "blue"), ("no", "green"), ("red", "red"), ("red", "black"), ("blue", "blue")]
    return [
        Question(
            str(i), "mini_general", (IMAGE, f"Question {i}?"), (BytesPicture(png(colour)),),
            {"answer": answer, "choices": [], "skill": "color"},
        )
        for i, (answer, colour) in enumerate(answers)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    return choose("mini_general")[0]


def test_commonest_answer_is_of_the_same_skill_and_form(questions: list[Question]) -> None:
    assert commonest_answers(questions) == ["yes", "yes", "yes", "red", "red", "red"]
    assert commonest_answers(questions[2:3]) == ["no"]
    assert commonest_answers(questions[2:3], among=questions) == ["yes"]


def test_pictures_are_taken_away_or_changed_and_nothing_else(questions: list[Question]) -> None:
    for blind, question in zip(without_images(questions), questions, strict=True):
        assert (blind.images, blind.parts) == ((), (question.parts[1],))
        assert (blind.id, blind.reference) == (question.id, question.reference)
    changed = with_other_images(questions)
    assert all(a.picture_key != b.picture_key for a, b in zip(changed, questions, strict=True))
    assert [q.prompt for q in changed] == [q.prompt for q in questions]
    assert changed == with_other_images(questions)
    assert with_other_images(questions[:1]) == questions[:1]


def test_silent_features_are_the_same_for_every_picture(questions: list[Question]) -> None:
    model, processor = tiny_model()
    means = mean_features(model, processor, questions)
    pixels = torch.randn(2, 3, 64, 64)
    plain = model.model.vision_tower(pixels)
    with only_features(model, ["davit"], means):
        features = model.model.vision_tower(pixels)
    assert list(features) == list(plain)
    torch.testing.assert_close(features["davit"], plain["davit"])
    for name in set(plain) - {"davit"}:
        torch.testing.assert_close(features[name][0], features[name][1])
        assert not torch.allclose(plain[name][0], plain[name][1])
    torch.testing.assert_close(model.model.vision_tower(pixels)["ocr"], plain["ocr"])  # as before
    with (
        pytest.raises(ValueError, match="nothing: the model's features are davit"),
        only_features(model, ["nothing"], means),
    ):
        pass


def test_scores_of_all_conditions(questions: list[Question], benchmark: Benchmark) -> None:
    model, processor = tiny_model()
    scores = score_controls(model, processor, [(benchmark, questions)], llm=model)["mini_general"]
    assert list(scores) == [
        "full", MAJORITY, "no picture", "another picture", "the LLM before training, no picture", "[V] alone",
    ]  # fmt: skip
    assert scores[MAJORITY].value == pytest.approx(400 / 6)
    assert scores["full"].against is None
    lost = scores[MAJORITY].against
    assert lost is not None
    assert lost.questions == 6
    assert lost.difference == pytest.approx(scores["full"].value - scores[MAJORITY].value)
    assert scores["no picture"].value == scores["the LLM before training, no picture"].value  # here the same model
