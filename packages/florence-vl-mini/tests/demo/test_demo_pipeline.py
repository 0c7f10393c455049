"""The demo from model to report with a tiny model: task, output files, and answers of the saved model."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from florence_vl.cli import main
from florence_vl_mini.demo.data import ALIKE, KEYS, MIX, PICTURES, PROMPT, describe, make_data
from florence_vl_mini.demo.pipeline import DemoSettings, run_demo
from florence_vl_mini.demo.report import choose_cards, count, duration, read_jsonl, write_report
from florence_vl_mini.demo.scoring import ROWS, ask, judge

pytest.importorskip("florence_vl_mini")
CONDITIONS = {"before", "after", "other picture", "no picture"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_suite):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    arguments = ["--steps", "2", "--pictures", "16", "--held-out", "4", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("florence_vl_mini.demo.scoring.MAX_NEW_TOKENS", 8)
        assert main.main(["demo", "--smoke", "--out", str(folder), *arguments]) == 0
    return folder


# ------------------------------------------------------------------- the task


def scenes(number, kinds=tuple(MIX), split="test", size=256):
    from florence_vl_mini.scenes import SceneGenerator

    yield from SceneGenerator(3, split, size, dict.fromkeys(kinds, 1)).scenes(number)


def test_every_kind_of_picture_is_described():
    answers = [(scene, describe(scene)) for scene in scenes(140)]
    found = Counter(scene.kind for scene, answer in answers if answer)
    assert set(found) == set(MIX)
    for scene, answer in answers:
        if answer is None:
            continue
        assert tuple(answer) == KEYS
        assert answer["picture"] == PICTURES[scene.kind]
        assert answer["background"] not in ALIKE
        assert type(answer["things"]) is int
        counted = {"bar_chart": "bars", "pie_chart": "parts", "receipt": "items", "objects": "objects"}.get(scene.kind)
        asked = [q for q in scene.questions if counted and q.question.startswith(f"How many {counted} ")]
        assert all(str(answer["things"]) == q.answer for q in asked)
        titles = [
            q.answer for q in scene.questions if "title of the chart" in q.question or "of the shop" in q.question
        ]
        assert all(answer["text"] == title for title in titles)
        if scene.kind in ("single", "objects"):
            assert answer["things"] == len(scene.regions)
            assert answer["text"] == (scene.ocr or "none")
        if scene.kind == "lettering":
            assert (answer["things"], answer["text"]) == (0, scene.ocr)
        if scene.kind == "line_chart":
            assert f"through {('four', 'five')[answer['things'] - 4]} points" in scene.detailed_caption


def test_background_is_what_is_seen():
    from florence_vl_mini.scenes.draw import COLORS

    seen = Counter()
    for scene in scenes(80, ("objects", "receipt", "bar_chart")):
        answer = describe(scene)
        if answer is None:
            continue
        corner = np.asarray(scene.image)[0, 0].astype(int)
        seen[answer["background"]] += 1
        if answer["background"] == "mixed":
            assert "patterned" in scene.detailed_caption
        else:
            assert np.abs(corner - COLORS[answer["background"]]).max() <= 48
    assert {"mixed", "white"} < set(seen)
    assert len(seen) > 4


def test_unclear_pictures_are_left_out():
    for scene in scenes(60, ("objects",), split="train"):
        described = describe(scene)
        if described is None:
            continue
        for other in ("scissors", "stop sign", "couch and lamp"):
            region = scene.regions[0]
            scene.regions[0] = type(region)(other, other, region.box, region.category)
            assert describe(scene) is None
            scene.regions[0] = region
        scene.kind = "lettering"
        assert describe(scene) is None  # an object in addition to the words, or no word
        break
    else:
        pytest.fail("no scene of sixty could be described")


def test_data_is_llava_json_and_the_same_again(tmp_path):
    from florence_vl.data.readers import open_reader

    data = make_data(tmp_path, pictures=12, held_out=5, size=64)
    rows = json.loads(data.train.read_text())
    assert len(rows) == 12
    for row in rows:
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        assert row["conversations"][0]["value"] == f"<image>\n{PROMPT}"
        answer = json.loads(row["conversations"][1]["value"])
        assert judge(row["conversations"][1]["value"], answer) == dict.fromkeys(ROWS, True)
        assert Image.open(data.images / row["image"]).size == (64, 64)
    records = open_reader(data.train, "llava", image_root=data.images)
    assert len(records) == 12
    assert len(data.held_out) == 5
    assert not {example.image for example in data.held_out} & {path.read_bytes() for path in data.images.iterdir()}
    values = Counter(json.loads(row["conversations"][1]["value"])["picture"] for row in rows)
    assert values[data.commonest["picture"]] == max(values.values())
    again = make_data(tmp_path / "again", pictures=12, held_out=5, size=64)
    assert again.train.read_text() == data.train.read_text()
    assert again.held_out == data.held_out
    other = make_data(tmp_path / "other", pictures=12, held_out=5, size=64, seed=1)
    assert other.held_out != data.held_out


def test_held_out_pictures_share_no_sprite_and_no_word_with_training():
    from florence_vl_mini.scenes.assets import sprites, words

    assert not {sprite.id for sprite in sprites("train")} & {sprite.id for sprite in sprites("test")}
    assert not set(words("train")) & set(words("test"))


# ------------------------------------------------------------------- the run


def test_everything_is_written(run):
    names = {path.name for path in run.iterdir()}
    assert {"report.html", "model", "data", "held-out", "answers.jsonl", "demo.json", "finetune"} <= names
    assert [row["step"] for row in read_jsonl(run / "finetune" / "metrics.jsonl")] == [1, 2]
    assert not (run / "finetune" / "checkpoints").exists()
    summary = json.loads((run / "demo.json").read_text())
    assert summary["training"]["steps"] == 2
    assert set(summary["scores"]) == CONDITIONS | {"guess"}
    assert all(list(found) == list(ROWS) for found in summary["scores"].values())
    assert summary["scores"]["guess"]["valid JSON"]["share"] == 1
    assert set(summary["suite"]) == {"guess", "before", "after"}
    assert "correct answers occur only by chance" in summary["note"]
    rows = read_jsonl(run / "answers.jsonl")
    assert len(rows) == 4
    assert all(set(row["answers"]) == CONDITIONS for row in rows)


def test_tower_is_frozen_and_the_rest_trains(run):
    tower, projector, llm = json.loads((run / "demo.json").read_text())["parts"]
    assert tower["trained"] == 0
    assert projector["trained"] == projector["parameters"]
    assert 0 < llm["trained"] < llm["parameters"]
    assert all("grad_norm/tower" not in row for row in read_jsonl(run / "finetune" / "metrics.jsonl"))


def test_saved_model_gives_the_reported_answers(run, monkeypatch):
    from florence_vl.model.loading import load_model

    monkeypatch.setattr("florence_vl_mini.demo.scoring.MAX_NEW_TOKENS", 8)
    rows = read_jsonl(run / "answers.jsonl")
    images = [(run / row["image"]).read_bytes() for row in rows]
    assert ask(*load_model(run / "model", "cpu"), images) == [row["answers"]["after"] for row in rows]


def test_demo_starts_from_a_saved_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr("florence_vl_mini.demo.scoring.MAX_NEW_TOKENS", 8)
    heard = []
    settings = DemoSettings(steps=1, pictures=8, held_out=4, suite_questions=1, threads=1, model=str(run / "model"))
    assert run_demo(tmp_path / "demo", settings, say=heard.append) == tmp_path / "demo" / "report.html"
    assert heard[-1].startswith("Fine-tuned for ")
    first, second = (read_jsonl(folder / "answers.jsonl") for folder in (run, tmp_path / "demo"))
    assert [row["answers"]["before"] for row in second] == [row["answers"]["after"] for row in first]
    assert f"The start is {run / 'model'}" in (tmp_path / "demo" / "report.html").read_text()


def test_report_stands_alone(run):
    page = (run / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert page.count("<svg") == 2
    assert page.count("data:image/jpeg;base64,") == 4
    assert "A smoke run" in page
    for text in (*KEYS, "all four", "Vision-centric", "florence-vl chat --model mini", f"{run}/model"):
        assert text in page
    assert write_report(run).read_text() == page


def test_report_shows_each_value_and_escapes_it(run, tmp_path):
    (tmp_path / "demo.json").write_text((run / "demo.json").read_text())
    (tmp_path / "held-out").symlink_to(run / "held-out")
    rows = read_jsonl(run / "answers.jsonl")
    rows[0]["answers"]["after"] = json.dumps({**rows[0]["expected"], "text": "<script>alert(1)</script>"})
    rows[0]["right"]["after"] = judge(rows[0]["answers"]["after"], rows[0]["expected"])
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = write_report(tmp_path).read_text()
    assert "<script>" not in page
    assert '<span class="wrong">&lt;script&gt;' in page
    assert f'<span class="right">{rows[0]["expected"]["background"]}</span>' in page


def test_cards_show_right_and_wrong_in_proportion():
    rows = [
        {"expected": {"picture": kind}, "right": {"after": {"all four": index < 6}}, "name": (kind, index)}
        for kind in "ab"
        for index in range(20)
    ]
    cards = choose_cards(rows, 20)
    assert len(cards) == 20
    for kind in "ab":
        mine = [card for card in cards if card["expected"]["picture"] == kind]
        assert len(mine) == 10
        assert sum(card["right"]["after"]["all four"] for card in mine) == 3


def test_numbers_for_people():
    assert [duration(seconds) for seconds in (9.6, 95, 3600)] == ["10 s", "1 min 35 s", "60 min 00 s"]
    assert [count(number) for number in (12, 1500, 134_515_008)] == ["12", "1.5 k", "134.5 M"]


# ------------------------------------------------------------------- wrong usage


def test_a_demo_replaces_no_other_folder_and_no_model_in_it(run, tmp_path, capsys):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert main.main(["demo", "--smoke", "--out", str(other)]) == 2
    assert "which a demo did not write" in capsys.readouterr().err
    assert (other / "thesis.txt").read_text() == "years of work"
    assert main.main(["demo", "--smoke", "--out", str(other / "thesis.txt")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main.main(["demo", "--model", str(run / "model"), "--out", str(run)]) == 2
    assert "which the run empties" in capsys.readouterr().err
    assert (run / "model" / "config.json").is_file()


def test_report_without_a_demo_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"demo.json is missing. Run `florence-vl demo`"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0}, "minutes is 0"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"pictures": -1}, "pictures is -1"),
        ({"held_out": 1}, "held_out is 1; it must be at least 2"),
        ({"threads": 0}, "threads is 0"),
        ({"smoke": True, "model": "runs/mine"}, "remove either"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**settings)


def test_without_shipped_weights_the_demo_stops(tmp_path, monkeypatch, capsys):
    def missing():
        raise FileNotFoundError("florence-vl-mini does not include Florence-VL weights")

    monkeypatch.setattr("florence_vl_mini.models.mini_florence2", lambda: tmp_path)
    monkeypatch.setattr("florence_vl_mini.florence_vl_path", missing)
    assert main.main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "florence-vl-mini does not include Florence-VL weights" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_unknown_key_of_set_is_said_at_once(tmp_path, capsys):
    assert main.main(["demo", "--smoke", "--out", str(tmp_path / "demo"), "--set", "optimizer.lrr=1"]) == 2
    assert "optimizer.lrr" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_an_earlier_demo_is_replaced_but_not_files_of_the_user(run, tmp_path):
    from florence_vl_mini.demo.pipeline import OWNED, prepare_folder

    folder = tmp_path / "demo"
    shutil.copytree(run, folder)
    assert list(prepare_folder(folder).iterdir()) == []
    (folder / OWNED).write_text("{}")
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"contains thesis\.txt, which a demo did not write"):
        prepare_folder(folder)
    assert (folder / "thesis.txt").read_text() == "mine"
