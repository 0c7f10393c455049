"""The mini suite: the same questions on every machine, and the same score with our runner and with lmms-eval."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from florence_vl.evaluate.local import LocalAnswerer
from florence_vl.evaluate.metrics import METRICS
from florence_vl.evaluate.metrics.short import short_normalize
from florence_vl.evaluate.runner import open_results, plan, run
from florence_vl.evaluate.scoring import score_folder
from florence_vl.evaluate.store import ResultsFolder
from florence_vl.evaluate.suites import choose, data_folder
from florence_vl.model.tiny import tiny_model
from florence_vl_mini.suite import mini_rows

pytest.importorskip("florence_vl_mini")


@pytest.fixture(scope="module")
def mini_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite on its first pictures."""
    from florence_vl_mini import suite as mini

    folder = tmp_path_factory.mktemp("mini")
    mini._write(folder, mini_rows(pictures=12))
    return folder


def test_rows_are_the_same_each_time() -> None:
    first, second = mini_rows(pictures=4), mini_rows(pictures=4)
    assert first == second
    assert set(first) == {benchmark.name for benchmark in choose("mini")}


def test_the_questions_are_those_of_the_first_release() -> None:
    """Kinds of scene may be added, but the suite asks what it always asked."""
    digest = hashlib.sha256()
    rows = mini_rows(pictures=60)
    for name in sorted(rows):
        for row in rows[name]:
            content = [row[key] for key in ("id", "skill", "prompt", "answer", "choices")]
            digest.update(json.dumps(content).encode())
    assert digest.hexdigest() == "e6e507ea4d4c3a2cde9f96abfc2ee72d75ce5e78b9bcc4f526f40f61fbc6bc80"


def test_drawings_are_the_same_at_every_size() -> None:
    from io import BytesIO

    from PIL import Image

    from florence_vl_mini.suite import drawing_rows

    small, wide = (drawing_rows(of_each=2, size=size)["mini_drawings"] for size in ((256, 256), (320, 256)))
    for row, other in zip(small, wide, strict=True):
        assert {**row, "image": None} == {**other, "image": None}
        square, page = (Image.open(BytesIO(one["image"]["bytes"])) for one in (row, other))
        assert square.size == (256, 256)
        assert page.size == (320, 256)
        assert page.crop((32, 0, 288, 256)).tobytes() == square.tobytes(), "letters keep their shape"
        assert page.getpixel((0, 255)) == square.getpixel((0, 0))


def test_mini_suite_writes_a_suite_that_evaluate_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from florence_vl.cli.main import main
    from florence_vl_mini import suite as mini

    monkeypatch.setitem(mini.ROWS, "mini_drawings", lambda size: mini.drawing_rows(1, 1, size))
    assert main(["mini", "suite", "mini_drawings", "--size", "320x192", "--out", str(tmp_path / "wide")]) == 0
    (benchmark,) = choose("mini_drawings")
    assert data_folder(benchmark, tmp_path / "wide") == tmp_path / "wide"
    assert len(list(benchmark.questions(tmp_path / "wide"))) == 5
    (other,) = choose("mini_general")
    assert data_folder(other, tmp_path / "wide") == mini.mini_folder()

    def command(*options: str) -> int:
        return main(["mini", "suite", *options, "--out", str(tmp_path / "none")])

    assert command("mini_drawing") == 2
    assert "Did you mean 'mini_drawings'" in capsys.readouterr().err
    assert command("mini", "--size", "32") == 2
    assert "at least 64" in capsys.readouterr().err
    assert command("mini", "--size", "1x2x3") == 2
    assert "320x192" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_suite_for_tables_asks_more_and_begins_with_the_same() -> None:
    few, many = mini_rows(3, 4), mini_rows(9, 8, "mini_tables")
    assert set(many) == {benchmark.name for benchmark in choose("mini_tables")}
    for name, rows in few.items():
        others = many[name.replace("mini_", "mini_tables_")]
        assert others[: len(rows)] == rows
        assert len(others) > len(rows) or len(rows) < 4
    columns = {column for benchmark in choose("mini") for column in benchmark.columns}
    assert columns == {column for benchmark in choose("mini_tables") for column in benchmark.columns}


def test_the_suite_of_drawings_asks_different_skills_about_each_picture(tmp_path: Path) -> None:
    from florence_vl_mini import suite

    (benchmark,) = choose("mini_drawings")
    rows = suite.drawing_rows(of_each=3)
    assert rows == suite.drawing_rows(of_each=3)
    pictures: dict[str, list[str]] = {}
    for row in rows[benchmark.name]:
        pictures.setdefault(row["picture"], []).append(row["skill"])
    assert Counter(name.rsplit("-", 1)[0] for name in pictures) == dict.fromkeys(suite.DRAWINGS, 3)
    assert all(len(set(skills)) == len(skills) <= 3 for skills in pictures.values())
    suite._write(tmp_path, rows)
    for question in benchmark.questions(tmp_path):
        assert benchmark.scorer.judge(question.reference["answer"], question.reference).score == 1


def test_every_right_answer_is_read_as_right(mini_small: Path) -> None:
    skills: Counter[str] = Counter()
    for benchmark in choose("mini"):
        for question in benchmark.questions(mini_small):
            right = question.reference["answer"]
            for form in (right, f"{right}.", right.capitalize()):
                assert benchmark.scorer.judge(form, question.reference).score == 1
            assert benchmark.scorer.judge(f"not {right}", question.reference).score == 0
            skills[question.reference["skill"]] += 1
    assert len(skills) >= 6


def test_short_answers() -> None:
    assert short_normalize("The red bus.") == "red bus"
    assert short_normalize("$16.25") == "16.25" != short_normalize("1625")
    assert short_normalize("three") == "3"
    scorer = METRICS["short_answer"]
    assert scorer.judge("Yes, it is", {"answer": "yes", "choices": []}).score == 1
    assert scorer.judge("tiger", {"answer": "A", "choices": ["tiger", "cap"]}).score == 1
    assert scorer.judge("7 objects", {"answer": "7", "choices": []}).score == 0


def test_both_routes_give_the_same_score(mini_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lmms_eval")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from florence_vl.evaluate.lmms_eval_plugin import FlorenceVLAdapter
    from florence_vl_mini import lmms_tasks

    def only_small(folder: Path) -> None:
        for file in mini_small.glob("*.parquet"):
            (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(lmms_tasks, "write_suite", only_small)
    (tmp_path / "tasks").mkdir()
    names = lmms_tasks.write_tasks(tmp_path / "tasks")
    name = "florence_vl_mini_general"
    assert name in names

    model, processor = tiny_model(seed=3)
    # A tiny random model never says yes; this one's likeliest words are put in its mouth.
    answerer = LocalAnswerer(model, processor, 8)
    plain = answerer._read
    words = ["Yes.", "no", "A", "B", "two", "3", "red", ""]
    from florence_vl.evaluate.answer import Answer

    answerer._read = lambda generated, lengths: [  # type: ignore[method-assign]
        Answer(words[(len(a.text) + sum(map(ord, a.text))) % len(words)]) for a in plain(generated, lengths)
    ]

    benchmarks = choose("mini_general")
    made = plan(benchmarks, lambda benchmark: benchmark.questions(mini_small))
    folder = ResultsFolder(tmp_path / "run")
    open_results(folder, answerer, made)
    run(answerer, made, folder)
    ours = score_folder(folder.path, draws=0).benchmarks["mini_general"].scores["accuracy"]

    manager = TaskManager("ERROR", include_path=str(tmp_path / "tasks"), include_defaults=False)
    found: dict[str, Any] = evaluator.simple_evaluate(
        model=FlorenceVLAdapter(answerer=answerer), tasks=[name], task_manager=manager, batch_size=8, bootstrap_iters=0
    )
    theirs = 100 * found["results"][name]["accuracy,none"]
    assert theirs == pytest.approx(ours)
    assert 0 < ours < 100


@pytest.mark.parametrize("first", ["lmms_eval.models", "florence_vl.evaluate.lmms_eval_plugin"])
def test_the_plugin_is_found_by_lmms_eval_in_any_order_of_imports(first: str) -> None:
    pytest.importorskip("lmms_eval")
    code = (
        f"import {first}\nfrom lmms_eval.models import MODEL_REGISTRY_V2\n"
        "assert 'florence_vl' in MODEL_REGISTRY_V2.list_model_names()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lmms_eval_gets_the_adapter_and_its_options_are_checked() -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.models import MODEL_REGISTRY_V2

    from florence_vl.evaluate.lmms_eval_manifest import manifest
    from florence_vl.evaluate.lmms_eval_plugin import FlorenceVLAdapter

    assert manifest().model_id == "florence_vl"
    assert "florence_vl" in MODEL_REGISTRY_V2.list_model_names()
    assert MODEL_REGISTRY_V2.get_model_class("florence_vl") is FlorenceVLAdapter
    with pytest.raises(ValueError, match="has no option dtipe"):
        FlorenceVLAdapter(pretrained="x", dtipe="float32")
    with pytest.raises(ValueError, match="pretrained=FOLDER"):
        FlorenceVLAdapter()
