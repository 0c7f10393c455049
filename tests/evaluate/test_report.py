"""Reports, comparison, the command line, and the small evaluation during training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from florence_vl.cli.evaluate import _run_processes, app
from florence_vl.evaluate.report import as_json, as_markdown, failures, write_reports
from florence_vl.evaluate.runner import EvaluationPlan, open_results, plan
from florence_vl.evaluate.scoring import compare_runs, score_folder
from florence_vl.evaluate.store import ResultsFolder, append_lines
from florence_vl.evaluate.suites import choose
from florence_vl.model.tiny import tiny_model


def fake_run(folder: Path, made: EvaluationPlan, say: Any, name: str = "fake") -> Path:
    """Results without a model."""
    results = ResultsFolder(folder)

    class Identity:
        identity = {"model": name}

    open_results(results, Identity(), made)  # type: ignore[arg-type]
    rows = []
    for benchmark, questions in made.questions.items():
        for question in questions:
            row = {"benchmark": benchmark, "id": question.id, "protocol": made.fingerprints[benchmark]}
            row |= {"prompt": question.prompt, "answer": say(question), "finished": True, "tokens": 1}
            rows.append(row | {"reference": dict(question.reference)})
    append_lines(results.file, rows)
    return folder


@pytest.fixture(scope="module")
def made(benchmark_folder: Path) -> EvaluationPlan:
    return plan(choose("paper"), lambda benchmark: benchmark.questions(benchmark_folder))


@pytest.fixture(scope="module")
def good_run(made: EvaluationPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def say(question: Any) -> str:
        answer = question.reference.get("answer", question.reference.get("answers", [""])[0])
        return {"1": "yes"}.get(answer, answer) if isinstance(answer, str) else answer[0]

    return fake_run(tmp_path_factory.mktemp("good"), made, say)


def test_the_table_has_the_papers_columns_and_averages(good_run: Path) -> None:
    values = as_json(score_folder(good_run, draws=20))
    table = {line["column"]: line for line in values["table"]}
    assert len(table) == 25
    assert table["MME-P"]["score"] == 200
    assert table["MME-P"]["paper"] == 1498.7
    low, high = table["POPE"]["interval"]
    assert low < high == table["POPE"]["score"] == 100
    assert table["MM-Vet"]["score"] is None
    assert table["MM-Vet"]["note"] == "not scored: needs a judge"
    shared = values["average"]
    assert len(shared["columns"]) == len(shared["shared_columns"]) == 23
    others = [
        line["score"]
        for line in values["table"]
        if line["score"] is not None and line["column"] not in ("MME-P", "MME-C")
    ]
    assert shared["ours"] == pytest.approx((sum(others) + 200 / 20 + 200 / 8) / 23)
    groups = [line["group"] for line in values["table"]]
    assert groups == sorted(groups, key=["General", "OCR & Chart", "Knowledge", "Vision-centric"].index)
    assert values["benchmarks"]["mmvp"]["scores"]["as_authors"] == 100
    assert "as_authors_3D" in values["benchmarks"]["cv_bench"]["scores"]
    json.dumps(values)


def test_reports_are_written_with_pictures_of_failures(good_run: Path, made: EvaluationPlan, tmp_path: Path) -> None:
    said = {"pope": "perhaps <script>alert(1)</script>", "mmvp": "", "ai2d": "A", "gqa": "half \ud83d [/red]"}
    folder = fake_run(tmp_path / "bad", made, lambda q: said.get(q.benchmark, "?"))
    scores = score_folder(folder, draws=10)
    assert list(failures(scores, "mmvp")) == ["empty"]
    assert list(failures(scores, "ai2d")) == ["wrong"]
    assert list(failures(scores, "pope")) == ["unparsed"]
    files = write_reports(scores, "Florence-VL 8B", made.questions)
    page = (folder / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert "<script>" not in page
    assert "perhaps &lt;script&gt;" in page
    assert "(empty)" in page
    assert "half \\ud83d [/red]" in page
    markdown = (folder / "report.md").read_text()
    assert "paper, Florence-VL 8B" in markdown
    assert "89.9" in markdown
    assert "lmms-lab-encoder/POPE/test, 4 of 4 questions, current protocol" in markdown
    assert {file.name for file in files} == {"scores.json", "report.md", "report.html"}
    assert json.loads((folder / "scores.json").read_text())["paper_row"] == "Florence-VL 8B"
    with pytest.raises(ValueError, match="the paper has no row"):
        as_markdown(scores, "Florence-VL 4B")


def test_a_sample_says_so(benchmark_folder: Path, tmp_path: Path) -> None:
    sample = plan(choose("pope"), lambda benchmark: benchmark.questions(benchmark_folder), limit=2)
    scores = score_folder(fake_run(tmp_path / "run", sample, lambda q: "yes"), draws=0)
    assert "A sample: --limit 2, seed 0. Not comparable" in as_markdown(scores)
    assert as_json(scores)["benchmarks"]["pope"]["protocol"]["available"] == 4


def test_comparing_runs(good_run: Path, made: EvaluationPlan, tmp_path: Path, benchmark_folder: Path) -> None:
    worse = fake_run(tmp_path / "worse", made, lambda q: "no" if q.benchmark == "pope" else "?", "worse")
    found = compare_runs(score_folder(worse, 0), score_folder(good_run, 0), draws=50)
    assert (found["pope"].won, found["pope"].lost, found["pope"].tied) == (2, 0, 2)
    assert found["gqa"].won == 2
    assert "mmvet" not in found
    assert (found["MME-P"].first, found["MME-P"].second) == (0, 200)
    assert {"MME-C", "mmvp"} <= set(found)
    assert "mme" not in found
    only = fake_run(tmp_path / "only", made, lambda q: "no" if q.reference.get("category") == "code_reasoning" else "?")
    mixed = compare_runs(score_folder(worse, 0), score_folder(only, 0), draws=50)
    assert (mixed["MME-P"].won, mixed["MME-P"].lost) == (0, 0), "the questions of another column do not count"
    assert mixed["MME-C"].won == 1, "the two questions of a picture are one sample"
    other = plan(choose("mmmu_val", "authors"), lambda benchmark: benchmark.questions(benchmark_folder))
    authors = fake_run(tmp_path / "authors", other, lambda q: "B")
    with pytest.raises(ValueError, match="'mmmu_val' was run under two protocols"):
        compare_runs(score_folder(good_run, 0), score_folder(authors, 0))
    small = plan(choose("gqa"), lambda benchmark: benchmark.questions(benchmark_folder))
    with pytest.raises(ValueError, match="share no benchmark"):
        compare_runs(score_folder(fake_run(tmp_path / "gqa", small, lambda q: ""), 0), score_folder(authors, 0))
    result = CliRunner().invoke(app, ["compare", str(worse), str(good_run), "--json", str(tmp_path / "c.json")])
    assert result.exit_code == 0, result.output
    assert f"{good_run} minus {worse}" in result.output
    for text in ("95 % interval", "+100.0", "not significant"):  # nothing is cut at 80 columns
        assert text in result.output
    assert json.loads((tmp_path / "c.json").read_text())["pope"]["difference"] == pytest.approx(100)


def test_comparing_a_sample_is_about_its_questions(benchmark_folder: Path, tmp_path: Path) -> None:
    made = [plan(choose("pope"), lambda b: b.questions(benchmark_folder), limit) for limit in (2, None)]
    inside = {question.id for question in made[0].questions["pope"]}
    sample = fake_run(tmp_path / "sample", made[0], lambda q: q.reference["answer"])
    whole = fake_run(tmp_path / "whole", made[1], lambda q: q.reference["answer"] if q.id in inside else "?")
    scores = score_folder(whole, 0)
    assert scores.benchmarks["pope"].scores["accuracy"] == 50
    arguments = ["compare", str(sample), str(whole), "--json", str(tmp_path / "c.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    pope = json.loads((tmp_path / "c.json").read_text())["pope"]
    assert (pope["first"], pope["second"], pope["difference"], pope["questions"]) == (100, 100, 0, 2)
    assert CliRunner().invoke(app, [*arguments, "--draws", "0"]).exit_code == 2


@pytest.mark.parametrize(("visible", "wanted"), [(None, ["0", "1", "0"]), ("5,GPU-7", ["5", "GPU-7", "5"])])
def test_processes_get_only_the_gpus_that_the_user_allows(
    visible: str | None, wanted: list[str], made: EvaluationPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    used: list[str] = []

    class Done:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            used.append(env["CUDA_VISIBLE_DEVICES"])

        def poll(self) -> int:
            return 0

        wait = poll

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", Done)
    folder = ResultsFolder(tmp_path)
    folder.write_description({})
    _run_processes(3, made, folder)
    assert used == wanted


def test_list_names_every_benchmark() -> None:
    result = CliRunner().invoke(app, ["list", "paper"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert all(benchmark.name in result.output for benchmark in choose("paper"))
    assert "suite mini: mini_general" in result.output


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_command_runs_resumes_and_reports(saved_model: Path, benchmark_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--model", str(saved_model), "--suite", "pope,gqa", "--data", str(benchmark_folder), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--draws", "10", "--limit", "2"])
    assert result.exit_code == 0, result.output
    assert "POPE" in result.output
    lines = (out / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 4
    result = CliRunner().invoke(app, [*arguments, "--draws", "10"])
    assert result.exit_code == 0, result.output
    assert (out / "answers.jsonl").read_text().splitlines()[:4] == lines
    assert len((out / "answers.jsonl").read_text().splitlines()) == 6
    run_json = json.loads((out / "run.json").read_text())
    assert run_json["identity"]["dtype"] == "float32"
    assert run_json["versions"]["transformers"]
    (out / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(out), "--paper-row", ""])
    assert result.exit_code == 0, result.output
    assert "data:image" in (out / "report.html").read_text()


@pytest.mark.slow
def test_processes_share_the_questions(saved_model: Path, benchmark_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "florence_vl",
        "evaluate",
        "--model",
        str(saved_model),
        "--suite",
        "pope,mme,seedbench",
    ]
    command += ["--data", str(benchmark_folder), "--out", str(tmp_path / "run"), "--processes", "2", "--limit", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run").glob("answers*.jsonl"))) == 2
    assert all(score.complete for score in score_folder(tmp_path / "run", draws=0).benchmarks.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "pope"], "missing --model and --out"),
        (["--model", "x", "--out", "o", "--suite", "popee"], "Did you mean 'pope'"),
        (
            ["--model", "x", "--out", "o", "--suite", "mini", "--processes", "2", "--device", "cuda:1"],
            "use --device cuda",
        ),
        (["--model", "x", "--out", "o", "--suite", "pope"], "needs a folder with its parquet files"),
        (["--model", "x", "--out", "o", "--suite", "pope", "--data", "nowhere"], "is not a folder"),
        (["--model", "x", "--out", "o", "--paper-row", "LLaVA"], "the paper has no row 'LLaVA'"),
        (["--model", "x", "--out", "o", "--protocol", "old"], "unknown protocol 'old'"),
        (["report", "nowhere"], "no results in nowhere"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code != 0
    assert message in f"{result.output} {result.exception}"
    assert not (tmp_path / "o").exists()


def test_a_sample_during_training(benchmark_folder: Path) -> None:
    from florence_vl.evaluate.sample import evaluate_sample

    model, processor = tiny_model()
    model.train()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = evaluate_sample(model, processor, "pope,chartqa", limit=2, data=benchmark_folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert set(first) == {"eval/pope", "eval/chartqa", "eval/mean", "eval/unfinished"}
    assert first == evaluate_sample(model, processor, "pope,chartqa", limit=2, data=benchmark_folder)
    assert all(0 <= value <= 100 for value in first.values())
    with pytest.raises(ValueError, match="mmvet can't be scored during training"):
        evaluate_sample(model, processor, "mmvet", data=benchmark_folder)
    with pytest.raises(ValueError, match="needs a folder"):
        evaluate_sample(model, processor, "pope")


def test_a_log_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    from florence_vl.cli.evaluate import _LogLine

    tell = _LogLine(100)
    now = [0.0]
    tell.clock = lambda: now[0]
    tell.started = tell.last = 0.0
    tell(20)  # from an earlier run
    for _ in range(4):
        now[0] += 20
        tell(10)
    assert capsys.readouterr().err.splitlines() == [
        "40 of 100 questions, 2 min left",
        "60 of 100 questions, 1 min left",
    ]
