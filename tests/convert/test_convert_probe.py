"""`convert --probe` finds the variant that produced the reference answers; the commands `convert` and `diff`."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import florence_vl
from florence_vl.cli import main
from florence_vl.convert import convert
from florence_vl.convert.probe import (
    MEAN_TOKENS,
    Reading,
    Reference,
    orders,
    probe,
    read_references,
    readings,
    set_reading,
)

sys.path.insert(0, str(Path(__file__).parent))
import convert_upstream as upstream


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted Florence-VL for 64 px images, and its source."""
    folder = tmp_path_factory.mktemp("probe")
    upstream.make_released(folder / "src", "llama")
    tower = folder / "src" / "vision_tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(upstream.MICROSOFT_CONFIG))
    (tower / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 64, "width": 64}}))
    convert(folder / "src", folder / "ours")
    model, processor = load(folder / "ours")
    _printable_only(model, processor)
    model.save_pretrained(folder / "answering")
    processor.save_pretrained(folder / "answering")
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (48, 40 + 8 * i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


def load(folder):
    model = florence_vl.FlorenceVLForConditionalGeneration.from_pretrained(folder).eval()
    return model, florence_vl.FlorenceVLProcessor.from_pretrained(folder)


OWN = ("davit", "caption", "ocr", "grounding")
TRUTH = Reading("all", "masked", "llama3", (("newline_after_image", True), ("double_bos", False)), OWN)


def _messages(folder, i):
    question = {"type": "text", "text": f"What is {i}?"}
    return [{"role": "user", "content": [{"type": "image", "image": str(folder / f"{i}.png")}, question]}]


def _prompt(processor, messages):
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    return processor.apply_chat_template(messages, **options, processor_kwargs={"return_tensors": "pt"})


def _printable_only(model, processor):
    """Make the greedy token always a printable character: the others copy the head's row of the first character."""
    text = processor.tokenizer.convert_ids_to_tokens(range(len(processor.tokenizer)))
    printable = torch.tensor([len(t) == 1 and "!" <= t <= "~" for t in text])
    assert printable[0]
    with torch.no_grad():
        model.lm_head.weight[~printable] = model.lm_head.weight[0] * 0.5
        model.lm_head.weight[~printable, 0] -= 1


def _answers(model, processor, folder, truth=TRUTH):
    """What the model answers greedily under a reading, cut at 48 tokens."""
    fitted = set_reading(model, processor, truth)
    rows = []
    for i in range(3):
        batch = _prompt(fitted, _messages(folder, i))
        out = model.generate(**batch, max_new_tokens=48, do_sample=False)
        answer = processor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :])
        rows.append({"image": f"{i}.png", "question": f"What is {i}?", "answer": answer, "ended": False})
    return rows


@pytest.fixture(scope="module")
def references(converted):
    """Greedy answers of `answering` under the true reading."""
    rows = _answers(*load(converted / "answering"), converted)
    path = converted / "references.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_readings_cover_the_grid():
    found = list(readings("llama3", OWN))
    assert len(found) == len(set(found)) == 3 * 2 * 2 * 2 * 6
    assert {r.mean_token for r in found} == set(MEAN_TOKENS)
    assert TRUTH in found
    assert next(orders(OWN)) == OWN
    assert all(order[0] == "davit" for order in orders(OWN))


def test_probe_scores_are_the_likelihood(converted, references):
    """The score of the reading that gave the answers is their negative log-likelihood, computed apart."""
    model, processor = load(converted / "answering")
    found = read_references(references)
    result = probe(model, processor, found, "llama3")
    truth = next(score for score in result.scores if score.reading == TRUTH)
    fitted = set_reading(model, processor, TRUTH)
    total, count = 0.0, 0
    with torch.no_grad():
        for i, reference in enumerate(found):
            batch = _prompt(fitted, _messages(converted, i))
            answer = processor.tokenizer(reference.answer, add_special_tokens=False).input_ids
            ids = torch.cat([batch["input_ids"], torch.tensor([answer])], 1)
            logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[0].log_softmax(-1)
            start = batch["input_ids"].shape[1]
            for offset, token in enumerate(answer):
                total -= float(logits[start + offset - 1, token])
                count += 1
    assert truth.nll == pytest.approx(total / count, rel=1e-5)
    assert len(truth.by_reference) == 3
    assert len(result.scores) == 144
    ended = probe(model, processor, [replace(found[0], ended=True)], "llama3")
    assert next(s for s in ended.scores if s.reading == TRUTH).nll != pytest.approx(truth.by_reference[0])


def test_probe_finds_the_reading_that_gave_the_answers(converted, references):
    """Exactly one of 144 readings reproduces the greedy answers, and it is the one they were made with."""
    model, processor = load(converted / "answering")
    result = probe(model, processor, read_references(references), "llama3")
    assert result.best.reading == TRUTH
    assert result.best.agreement == 1
    assert result.scores[1].agreement < 1
    assert not result.ties
    assert model.config.mean_token == TRUTH.mean_token  # left at the best
    assert model.config.prompt_padding == TRUTH.prompt_padding


def test_probe_finds_another_order_of_prompts(converted):
    truth = replace(TRUTH, features=("davit", "grounding", "caption", "ocr"))
    rows = _answers(*load(converted / "answering"), converted, truth)
    model, processor = load(converted / "answering")
    references = [Reference(converted / r["image"], r["answer"], r["question"], False) for r in rows]
    result = probe(model, processor, references, "llama3")
    assert result.best.agreement == 1
    assert result.best.reading == truth
    assert list(model.model.fusion.feature_dims) == list(truth.features)


def test_ties_are_told(converted):
    """One short answer under an image-blind model can't settle the tower's switches."""
    model, processor = load(converted / "answering")
    with torch.no_grad():
        model.model.multi_modal_projector.layers[-1].weight.zero_()
    result = probe(model, processor, [Reference(converted / "0.png", "a", "Q")], "llama3")
    assert len(result.ties) >= 5  # at least the orders of the prompts
    same = [s for s in result.ties if s.reading.options == result.best.reading.options]
    padding = {(s.reading.mean_token, s.reading.prompt_padding) for s in [result.best, *same]}
    assert {(m, p) for m in ("grid", "grid_before_encoder") for p in ("attended", "masked")} <= padding or {
        ("all", "attended"),
        ("all", "masked"),
    } <= padding


def test_probe_command_writes_the_best_reading(converted, references, tmp_path, capsys):
    folder = tmp_path / "applied"
    shutil.copytree(converted / "answering", folder)
    assert main.main(["convert", str(folder), "--probe", str(references), "--apply"]) == 0
    shown = capsys.readouterr().out
    assert "and 132 more variants" in shown
    assert "davit,caption,ocr,grounding" in shown
    assert "Only the first variant reproduces all answers of 3 references: decided." in shown
    config = json.loads((folder / "config.json").read_text())
    assert (config["mean_token"], config["prompt_padding"]) == (TRUTH.mean_token, TRUTH.prompt_padding)
    settings = json.loads((folder / "conversion.json").read_text())["settings"]
    assert settings["settled_by"] == "probe"
    assert settings["newline_after_image"] is True
    model, processor = load(folder)
    assert processor.num_image_tokens() == model.num_image_tokens(64, 64) == 5
    assert f"{processor.image_token}\nQ" in processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}], tokenize=False
    )


def test_convert_and_probe_in_one_go(converted, tmp_path, capsys):
    path = converted / "one.jsonl"
    path.write_text(json.dumps({"image": "0.png", "answer": "a"}))
    arguments = [str(converted / "src"), str(tmp_path / "dst"), "--probe", str(path), "--json"]
    assert main.main(["convert", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"] == 245
    assert len(report["probe"]["readings"]) == 144
    assert {"nll", "perplexity", "agreement", "mean_token", "features"} <= set(report["probe"]["readings"][0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: not JSON"),
        ('{"image": "0.png"}', ":1: expected the fields image, answer"),
        ('{"image": "0.png", "answer": "x", "extra": 1}', ":1: expected the fields"),
        ('{"image": "none.png", "answer": "x"}', "none.png does not exist"),
        ('{"image": "0.png", "answer": " "}', "the answer is empty"),
        ('{"image": "0.png", "answer": "x", "ended": "no"}', "ended is 'no'"),
        ("", "no references"),
    ],
)
def test_bad_references(converted, line, message):
    path = converted / "bad.jsonl"
    path.write_text(line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_references(path)


# ------------------------------------------------------------ commands


def test_convert_and_diff_commands(converted, tmp_path, capsys):
    ours = converted / "ours"
    assert main.main(["convert", str(ours), str(tmp_path / "back"), "--to", "original"]) == 0
    assert "the authors' Florence-VL layout" in capsys.readouterr().out
    assert main.main(["diff", str(tmp_path / "back"), str(converted / "src")]) == 0
    assert capsys.readouterr().out.endswith("equal\n")
    model, _ = load(ours)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    model.save_pretrained(tmp_path / "moved")
    assert main.main(["diff", str(ours), str(tmp_path / "moved"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [p["part"] for p in report["parts"] if not p["same"]] == ["head"]
    assert main.main(["diff", str(ours), str(tmp_path / "moved")]) == 1
    shown = capsys.readouterr().out
    assert "lm_head.weight" in shown
    assert shown.endswith("different\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{src}"], "missing; name the folder"),
        (["{src}", "{new}", "--apply"], "only with --probe"),
        (["{src}", "{new}", "--to", "tower"], "unknown target 'tower'"),
        (["{src}", "{new}", "--to", "original", "--license", "mit"], "--license does not apply to the original layout"),
        (["{src}", "--probe", "{src}/none.jsonl", "--template", "llama3", "--overwrite"], "only with DESTINATION"),
        (["{src}", "--probe", "{src}/none.jsonl"], "the file of references does not exist"),
        (["{none}", "{new}"], "there is no such file or folder"),
        (["{src}", "{new}", "--max-shard-size", "huge"], "is not a size"),
    ],
)
def test_wrong_usage(converted, tmp_path, capsys, arguments, message):
    places = {"src": converted / "src", "new": tmp_path / "new", "none": tmp_path / "none"}
    assert main.main(["convert", *(a.format(**places) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_probe_needs_a_converted_model(converted, references, capsys):
    assert main.main(["convert", str(converted / "src"), "--probe", str(references)]) == 2
    assert "is not a converted Florence-VL" in capsys.readouterr().err
