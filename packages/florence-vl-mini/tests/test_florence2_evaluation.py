"""Measures of the mini Florence-2: boxes, characters, intervals, likelihoods, probes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("florence_vl_mini")

from florence_vl_mini.pretrain import card as florence2_card
from florence_vl_mini.pretrain import evaluate as evaluation
from florence_vl_mini.pretrain import grid as florence2_grid
from florence_vl_mini.pretrain import probes
from florence_vl_mini.pretrain.config import Florence2Training
from florence_vl_mini.pretrain.data import SceneTasks
from florence_vl_mini.pretrain.model import build_mini_florence2
from florence_vl_mini.pretrain.runner import Florence2Runner, character_accuracy, iou, matches, with_interval
from florence_vl_mini.scenes import Region, SceneGenerator, Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mini_florence2(tmp_path_factory.mktemp("mini"), seed=0, image_size=64, tokenizer_scenes=100)


def test_boxes_are_matched_by_overlap_and_name() -> None:
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    wanted = [("dog", (0, 0, 10, 10)), ("cat", (20, 20, 30, 30))]
    found = [("cat", (0, 0, 10, 9)), ("cat", (20, 20, 30, 29)), ("cat", (20, 20, 30, 30))]
    assert matches(found, wanted, labels=False) == 2
    assert matches(found, wanted, labels=True) == 1  # one cat is there, however often it is found
    assert matches([], wanted, labels=False) == 0


def test_character_accuracy() -> None:
    assert character_accuracy("", "") == 1
    assert character_accuracy("ship", "shop") == 0.75
    assert character_accuracy("", "shop") == 0


def test_interval_holds_the_mean_and_shrinks() -> None:
    few, many = with_interval([0.0, 1.0] * 10), with_interval([0.0, 1.0] * 500)
    assert few["low"] < few["mean"] == 0.5 < few["high"]
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 3
    assert with_interval([])["n"] == 0


def test_likelihood_equals_transformers_loss(folder: Path) -> None:
    runner = Florence2Runner(folder, "cpu")
    image = SceneGenerator(0, "test", 64)[0].image
    answers = ["a dog", "two cats and a very long answer"]
    scores = runner.log_likelihood(image, "<CAPTION>", answers)
    for answer, score in zip(answers, scores, strict=True):
        labels = runner.processor.tokenizer(answer, return_tensors="pt")["input_ids"]
        loss = runner.model(**runner.inputs([image], "<CAPTION>"), labels=labels).loss
        assert score.item() == pytest.approx(-loss.item() * labels.numel(), rel=1e-4)


def test_probe_finds_what_is_linearly_there_and_nothing_else() -> None:
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    features = torch.randn(400, 12)
    features[:, 5] += 3.0 * labels
    told = probes.linear_probe(features[:300], labels[:300], features[300:], labels[300:])
    silent = probes.linear_probe(torch.randn(300, 12), labels[:300], torch.randn(100, 12), labels[300:])
    assert told > 0.7
    assert silent < 0.45


def test_probe_pictures_have_independent_labels() -> None:
    images, labels = probes.probe_pictures(60, seed=1, size=128)
    again, _ = probes.probe_pictures(60, seed=1, size=128)
    assert images[7].tobytes() == again[7].tobytes()
    assert set(labels) == {"text", "object", "position"}
    assert all(len(v) == 60 for v in labels.values())
    assert max(labels["text"].max(), labels["position"].max()) < 16 < labels["object"].max() < 80
    assert len(set(zip(labels["text"].tolist(), labels["object"].tolist(), strict=True))) > 40


@pytest.mark.slow
def test_whole_evaluation_of_an_untrained_model_is_at_chance(folder: Path) -> None:
    report = evaluation.evaluate_florence2(folder, 20, device="cpu")
    report["probe"] = probes.probe_prompts(folder, pictures=40, seeds=(0, 1), device="cpu")
    assert report["ocr"]["exact word"]["mean"] == 0
    assert report["od"]["box and name F1 at IoU 0.5"]["mean"] == 0
    table = evaluation.to_markdown(report)
    assert "| grounding |" in table
    assert "retrieval of 20, known concept" in table


def test_grid_tells_where_names_and_letters_lie() -> None:
    scene = SceneGenerator(0, "train", 128, {"lettering": 1.0})[0]
    scene.regions = [Region("dog", "dog", (0.0, 0.0, 64.0, 64.0))]
    scene.texts = [Text("Hi", (64.0, 96.0, 128.0, 96.0, 128.0, 128.0, 64.0, 128.0))]
    classes = ("", *florence2_grid.grid_classes()[len(florence2_grid.CHARACTERS) :])
    named = {cell: classes[number] for cell, number in florence2_grid.name_targets(scene, 4).items()}
    assert named == {0: "dog", 1: "dog", 4: "dog", 5: "dog"}
    letters = {cell: chr(32 + number) for cell, number in florence2_grid.letter_targets(scene, 8).items()}
    assert letters == {7 * 8 + 5: "H", 7 * 8 + 7: "i"}


def test_fine_cells_of_a_token_are_its_own() -> None:
    fine = torch.arange(16).view(1, 4, 4)  # four tokens of 2 x 2 fine cells
    assert florence2_grid._within_tokens(fine).tolist() == [
        [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    ]


def test_grid_asks_letters_of_reading_tasks_and_names_of_the_others() -> None:
    torch.manual_seed(0)
    heads = florence2_grid.GridHeads(8, 6)
    letters, names = torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    letters[0, 1, 2], names[0, 3] = 40, 7
    image, early, owner = torch.randn(1, 4, 8), torch.randn(1, 6, 4, 4), torch.tensor([0])

    def prompted_gradients(asks_text: bool) -> list[bool]:
        heads.zero_grad()
        prompted = torch.randn(1, 4, 8)
        heads(early, image, prompted, letters, names, owner, torch.tensor([asks_text])).backward()
        return [h.weight.grad is not None for h in (heads.prompted_letters, heads.prompted_names, heads.early_letters)]

    assert prompted_gradients(True) == [True, False, True]
    heads.zero_grad(set_to_none=True)
    assert prompted_gradients(False) == [False, True, True]


def test_grid_learns_where_a_letter_lies_inside_a_token() -> None:
    torch.manual_seed(0)
    heads = florence2_grid.GridHeads(16, 6)
    letters, names = torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    letters[0, 0, 1], letters[0, 1, 0] = 40, 50  # both in the first token
    image, early, owner = torch.randn(1, 4, 16), torch.randn(1, 6, 4, 4), torch.tensor([0])
    optimizer = torch.optim.Adam(heads.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        heads(early, image, image, letters, names, owner, torch.tensor([True])).backward()
        optimizer.step()
    told = heads.image_letters(image).view(4, 4, -1).argmax(-1)
    assert told[0].tolist() == [0, 40, 50, 0]
    assert told[1:].sum() == 0


def test_cells_say_what_the_task_asks(folder: Path) -> None:
    tokenizer = Florence2Runner(folder, "cpu").processor.tokenizer
    data = SceneTasks(Florence2Training("x", image_size=64), tokenizer)
    scene = SceneGenerator(0, "train", 128, {"lettering": 1.0})[0]
    scene.regions = [Region("red apple", "red apple", (0.0, 0.0, 32.0, 32.0))]
    scene.texts = [Text("Hi", (64.0, 96.0, 128.0, 96.0, 128.0, 128.0, 64.0, 128.0))]

    def said(task: str) -> dict[int, str]:
        rows = florence2_grid.token_targets(scene, task, 4, 15, tokenizer, data.spelling)
        return {cell: "".join(sorted(tokenizer.convert_ids_to_tokens(ids))) for cell, ids in rows}

    assert said("<OCR>") == {14: "H", 15: "i"}
    assert set(said("<CAPTION>")) == {0}
    assert "loc" not in said("<DETAILED_CAPTION>")[0]
    assert "<loc_7>" in said("<OD>")[0]
    assert "<loc_247>" in said("<DENSE_REGION_CAPTION>")[0]


def test_token_loss_is_cross_entropy_with_the_bag(folder: Path) -> None:
    model = Florence2Runner(folder, "cpu").model
    prompted = torch.randn(2, 4, 192)
    targets = torch.tensor([[1, 3, 7, 9], [0, 2, 5, -1]])
    logs = model.lm_head(prompted).log_softmax(-1)
    expected = -((logs[1, 3, 7] + logs[1, 3, 9]) / 2 + logs[0, 2, 5]) / 2
    torch.testing.assert_close(florence2_grid.token_loss(model, prompted, targets), expected)
    assert florence2_grid.token_loss(model, prompted, torch.tensor([[0, 0]])) == 0


def test_decoder_starts_as_a_copy_of_what_it_attends_to(folder: Path) -> None:
    model = Florence2Runner(folder, "cpu").model
    attention = model.model.language_model.decoder.layers[-1].encoder_attn
    same = torch.randn(1, 1, 192).expand(1, 5, 192)
    out = attention(torch.randn(1, 2, 192), key_value_states=same)[0]
    torch.testing.assert_close(out, same[:, :2], rtol=1e-4, atol=1e-5)


def test_card_says_what_is_and_what_is_not_above_chance() -> None:
    def figure(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 100}

    lead = {"davit": "", "caption": "object", "ocr": "text", "grounding": "object"}
    report = {
        "caption": {
            "retrieval of 20, known concept": figure(0.5),
            "retrieval of 20, new concept": figure(0.06),
            "chance": {"exact": 0.0, "retrieval": 0.05},
        },
        "ocr": {"character accuracy": figure(0.4), "chance": {"character accuracy": 0.1, "exact": 0.0}},
        "od": {
            "box F1 at IoU 0.5": figure(0.6),
            "box and name F1 at IoU 0.5": figure(0.3),
            "chance": {"box": 0.1, "box and name": 0.0},
        },
        "probe": {
            "chance": dict.fromkeys(probes.PROBE_TARGETS, 0.1),
            **{
                name: {t: {"mean": 0.2 + 0.3 * (t == target), "half": 0.02, "runs": 3} for t in probes.PROBE_TARGETS}
                for name, target in lead.items()
            },
        },
    }
    report["probe"]["ocr"]["position"]["mean"] = 0.4
    lines = florence2_card.verdicts(report)
    assert lines[0] == "retrieval of 20, known concept: above chance (0.500 against 0.050)"
    assert "**not** above chance" in lines[1]
    assert "text: the `ocr` features lead by 0.300" in lines
    assert "position: **not** the `grounding` but the `ocr` features lead, by 0.200" in lines
    run = {"step": 10, "config": vars(Florence2Training("x"))}
    card = florence2_card.model_card(report, run, 6.4, "One core.")
    assert "10 steps of 16 images" in card
    assert "160 pictures" in card
    assert "| ocr | 0.500 ± 0.020 | 0.200 ± 0.020 | 0.400 ± 0.020 |" in card
