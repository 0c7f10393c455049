"""Ablation tables: planned, shared and resumed runs, and verdicts that respect the confidence interval."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from florence_vl.analyze import ablation, ablation_run
from florence_vl.analyze.ablation import AblationConfig, load_tables, plan, table_of
from florence_vl.analyze.ablation_report import (
    RowScores,
    build_table,
    difference,
    paper_scores,
    read_scores,
    verdict,
)
from florence_vl.analyze.ablation_run import Stopped, describe_remaining, execute
from florence_vl.cli.main import main
from florence_vl.evaluate.store import ResultsFolder

COLUMNS = ["Mini-General", "Mini-Knowledge", "Mini-OCR", "Mini-Vision"]


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A recipe folder with the mini scale's two recipes."""
    folder = tmp_path / "recipes/mini"
    folder.mkdir(parents=True)
    build = {"vision": "mini", "llm": "smollm2"}
    for stage, model in (("pretrain", {"build": build}), ("finetune", {"path": "runs/x"})):
        recipe = {
            "model": model,
            "steps": 3,
            "micro_batch_size": 1,
            "batch_size": 1,
            "parts": {"tower": {"train": False}},
            "data": {"sources": [{"path": "x.jsonl"}]},
        }
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("FLORENCE_VL_RECIPES", str(tmp_path / "recipes"))
    return tmp_path / "recipes"


@pytest.fixture
def commands(monkeypatch):
    """Commands that `execute` starts, at once done; `codes` maps a part of a command to its exit code."""
    started: list[list[str]] = []
    codes: dict[str, int] = {}
    ends: dict[str, threading.Event] = {}

    class Process:
        def __init__(self, words, env=None, **_):
            started.append(words)
            text = " ".join(words)
            self.returncode = next((c for part, c in codes.items() if part in text), 0)
            self.wait_for = next((e for part, e in ends.items() if part in text), None)
            output = next((Path(word.removeprefix("output=")) for word in words if word.startswith("output=")), None)
            for name in ("checkpoints", "model") if output else ():
                (output / name).mkdir(parents=True, exist_ok=True)
            if "evaluate" in words:  # refuses a folder with files of others
                ResultsFolder(Path(words[words.index("--out") + 1])).open({}, {})

        def poll(self):
            return self.returncode if self.wait_for is None or self.wait_for.is_set() else None

        def terminate(self):
            self.returncode, self.wait_for = -signal.SIGTERM, None

        def wait(self):
            return self.returncode

    monkeypatch.setattr(ablation_run.subprocess, "Popen", Process)
    monkeypatch.setattr(ablation_run, "POLL_SECONDS", 0.001)
    environment = {"git": {"commit": "abc", "dirty": False}, "versions": {}}
    monkeypatch.setattr("florence_vl.train.setup.describe_environment", lambda: environment)
    return started, codes, ends


def rows_of(number: int, *names: str):
    return table_of(number).choose(list(names) or None)


def test_every_row_of_the_tables_is_the_papers_and_has_a_variant():
    from florence_vl.evaluate.scoring import reported_results

    variants = ablation._file()["variants"]
    for number, table in load_tables().items():
        assert table.reference in {row.name for row in table.rows}
        assert {row.variant for row in table.rows} <= set(variants)
        for part in table.parts:
            reported = {row["name"] for row in reported_results()[part.paper]["rows"]}
            named = {row.paper for row in table.rows if row.paper}
            assert reported <= named, f"table {number} leaves out a row that the paper reports"
            assert all(paper_scores(part, row) for row in table.rows if row.paper in reported)


@pytest.mark.parametrize("scale", ["mini", "llava15"])
def test_every_row_is_a_valid_recipe(scale, tmp_path):
    rows = [row for table in load_tables().values() for row in table.rows]
    config = AblationConfig(scale, tmp_path, seeds=1, data=tmp_path)
    steps = [step for step in plan(rows, config) if step.kind in ablation.STAGES]
    assert len(steps) == 2 * len(ablation._file()["variants"])
    minus = next(s for s in steps if (s.kind, s.variant) == ("pretrain", "minus-ocr"))
    assert 'model.build.features=["davit", "caption", "grounding"]' in minus.command
    assert len({step.identity for step in steps}) == len(steps), "two variants are the same training"


def test_a_variant_is_trained_once_and_finetuning_starts_from_its_own_first_stage(recipes, tmp_path):
    config = AblationConfig("mini", tmp_path / "out", seeds=2)
    steps = plan([*rows_of(5), *rows_of(6)], config)
    assert len(steps) == 4 * 2 * 3
    assert len({step.folder for step in steps}) == len(steps)
    finetune = next(s for s in steps if (s.kind, s.variant, s.seed) == ("finetune", "minus-ocr", 1))
    assert f"model.path={tmp_path}/out/mini/smollm2/minus-ocr/seed-1/pretrain/model" in finetune.command
    assert finetune.command[:2] == ("train", "mini/finetune")
    shared = plan(rows_of(5, "full"), AblationConfig("mini", tmp_path / "out", seeds=2, share_pretraining=True))
    assert [s.kind for s in shared] == ["pretrain", "finetune", "evaluate", "finetune", "evaluate"]
    assert "seed-0/pretrain/model" in " ".join(shared[3].command)


def test_rows_start_from_the_named_llm_and_keep_apart(recipes, tmp_path):
    first = plan(rows_of(5, "full"), AblationConfig("mini", tmp_path, seeds=1))[0]
    other = plan(rows_of(5, "full"), AblationConfig("mini", tmp_path, seeds=1, start="mini"))[0]
    assert "model.build.llm=smollm2" in first.command
    assert "model.build.llm=mini" in other.command
    assert first.folder != other.folder
    with pytest.raises(ValueError, match="Did you mean 'smollm2'"):
        AblationConfig("mini", tmp_path, start="smolm2")


def test_overrides_reach_their_stage_and_win(recipes, tmp_path):
    words = ("batch_size=16", "pretrain:steps=7", "finetune:schedule.name=linear")
    config = AblationConfig("mini", tmp_path, seeds=1, overrides=words)
    first, second, _ = plan(rows_of(4, "[V]"), config)
    assert first.command.index("steps=7") > first.command.index("steps=30")
    assert "steps=7" not in second.command
    assert "schedule.name=linear" in second.command
    assert "batch_size=16" in first.command
    assert "batch_size=16" in second.command
    for wrong in ("steps", "pretrian:steps=3"):
        with pytest.raises(ValueError, match="not of the form"):
            plan(rows_of(4), AblationConfig("mini", tmp_path, overrides=(wrong,)))


def test_mini_data_is_written_where_it_is_absent(recipes, tmp_path, commands):
    started, _, _ = commands
    for stage, name in (("pretrain", "captions"), ("finetune", "questions")):
        path = recipes / f"mini/{stage}.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe["data"]["sources"] = [{"path": f"{tmp_path}/data/{name}/data.jsonl", "name": name}]
        path.write_text(yaml.safe_dump(recipe))
    (tmp_path / "data/questions").mkdir(parents=True)
    (tmp_path / "data/questions/data.jsonl").write_text("{}")
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    steps = plan(rows_of(4, "[V]"), config)
    assert [step.kind for step in steps] == ["data", "pretrain", "finetune", "evaluate"]
    assert steps[0].command == ("mini", "data", "--set", "captions", "--out", f"{tmp_path}/data/captions")
    execute(steps, config, lambda _: None)
    assert started[0][1:5] == ["-m", "florence_vl", "mini", "data"]
    count = len(started)
    execute(plan(rows_of(4, "[V]"), config), config, lambda _: None)
    assert len(started) == count, "data is not written again for rows that are done"


def test_tables_share_their_runs_and_go_on_where_they_stopped(recipes, tmp_path, commands):
    started, codes, _ = commands
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    codes["average/seed-0/finetune"] = ablation_run.STOPPED
    with pytest.raises(Stopped, match="average"):
        execute(plan(rows_of(1), config), config, lambda _: None)
    runs = tmp_path / "out/mini/smollm2/average/seed-0"
    assert sorted(p.name for p in (runs / "pretrain").iterdir() if p.is_dir()) == ["model"]  # done: checkpoints go
    assert (runs / "finetune/checkpoints").is_dir()  # stopped: they stay
    codes.clear()
    before = len(started)
    execute(plan(rows_of(1), config), config, lambda _: None)
    assert before + len(started[before:]) == 4 * 3 + 1  # the stopped step once more, nothing else twice
    before = len(started)
    execute(plan(rows_of(4), config), config, lambda _: None)
    assert not any("/all/" in word for words in started[before:] for word in words)
    marker = json.loads((runs / "evaluate/done.json").read_text())
    assert marker["git"]["commit"] == "abc"
    assert marker["machine"] == ablation_run.machine_class()
    assert marker["seconds"] >= 0
    assert marker["cpu_seconds"] >= 0


def test_a_stage_whose_model_is_gone_runs_again_only_if_it_is_needed(recipes, tmp_path, commands):
    started, _, _ = commands
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    steps = plan(rows_of(4, "[V]"), config)
    execute(steps, config, lambda _: None)
    for step in steps[:2]:
        shutil.rmtree(step.folder / "model")
    execute(steps, config, lambda _: None)
    assert len(started) == 3, "the answers are there, so no model is needed"
    steps[2].marker.unlink()
    execute(steps, config, lambda _: None)
    assert len(started) == 6, "the answers need the second stage's model, and that the first's"


def test_two_jobs_run_at_a_time_and_a_stage_waits_for_the_one_before(recipes, tmp_path, commands):
    started, _, ends = commands
    ends["davit/seed-0/pretrain"] = held = threading.Event()
    config = AblationConfig("mini", tmp_path / "out", seeds=1, jobs=2)
    steps = plan(rows_of(4), config)
    runner = threading.Thread(target=execute, args=(steps, config, lambda _: None))
    runner.start()
    deadline = time.monotonic() + 20
    while len(started) < 7 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert len(started) == 7, "the other two variants run beside the one that is held"
    assert not any("output=" + str(config.root / "davit/seed-0/finetune") in words for words in started)
    held.set()
    runner.join(20)
    assert len(started) == 9


def test_a_signal_stops_what_runs_and_nothing_is_marked_done(recipes, tmp_path, commands):
    _, _, ends = commands
    ends["davit/seed-0/pretrain"] = threading.Event()
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    steps = plan(rows_of(4, "[V]"), config)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped, match="same command again"):
        execute(steps, config, lambda _: None)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not any(step.done for step in steps)


def test_what_is_left_is_told_from_what_was_measured(recipes, tmp_path, commands):
    config = AblationConfig("mini", tmp_path / "out", seeds=2)
    steps = plan(rows_of(4, "[V]"), config)
    assert describe_remaining(steps, 1) == "0 of 6 steps done, time left unknown until a row is done"
    execute(steps[:3], config, lambda _: None)
    for step in steps[:3]:
        step.marker.write_text(json.dumps({**json.loads(step.marker.read_text()), "seconds": 120}))
    assert describe_remaining(steps, 1) == "3 of 6 steps done, about 6 min left"
    assert describe_remaining(steps, 2) == "3 of 6 steps done, about 3 min left"
    execute(steps, config, lambda _: None)
    assert describe_remaining(steps, 1) == "6 of 6 steps done"


def test_other_settings_do_not_go_into_the_same_folder(recipes, tmp_path, commands):
    rows = rows_of(4, "[V]")
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    execute(plan(rows, config), config, lambda _: None)
    changed = AblationConfig("mini", tmp_path / "out", seeds=1, overrides=("steps=4",))
    with pytest.raises(ValueError, match="other settings"):
        execute(plan(rows, changed), changed, lambda _: None)


def test_a_change_of_the_first_stage_reaches_the_later_ones(recipes, tmp_path, commands):
    rows = rows_of(4, "[V]")
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    steps = plan(rows, config)
    execute(steps, config, lambda _: None)
    changed = plan(rows, replace(config, overrides=("pretrain:steps=4",)))
    for step in changed:
        with pytest.raises(ValueError, match="other settings"):
            print(step.done)
    shutil.rmtree(steps[0].folder)
    assert not changed[0].done
    with pytest.raises(ValueError, match="other settings"):
        print(changed[1].done)


def test_a_step_that_was_stopped_does_not_continue_with_other_settings(recipes, tmp_path, commands):
    _, codes, _ = commands
    rows = rows_of(4, "[V]")
    config = AblationConfig("mini", tmp_path / "out", seeds=1, dtype="bfloat16")
    codes["davit/seed-0/pretrain"] = ablation_run.STOPPED
    with pytest.raises(Stopped):
        execute(plan(rows, config), config, lambda _: None)
    codes.clear()
    with pytest.raises(ValueError, match="other settings"):
        execute(plan(rows, replace(config, overrides=("steps=4",))), config, lambda _: None)
    elsewhere = plan(rows, replace(config, dtype="float32"))
    assert {step.dtype for step in elsewhere} == {"bfloat16"}
    execute(elsewhere, config, lambda _: None)
    assert all(step.done for step in elsewhere)
    assert not list((tmp_path / "out").rglob("*begun.json"))


def test_results_can_be_moved(recipes, tmp_path, commands):
    rows = rows_of(4, "[V]")
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    execute(plan(rows, config), config, lambda _: None)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert all(step.done for step in plan(rows, replace(config, out=tmp_path / "elsewhere")))


def test_a_seed_keeps_its_data_type_on_another_machine(recipes, tmp_path, commands):
    begun = AblationConfig("mini", tmp_path / "out", seeds=1, dtype="bfloat16")
    rows = table_of(5).choose(["full", "minus OCR"])
    execute(plan(rows[:1], begun), begun, lambda _: None)
    elsewhere = AblationConfig("mini", tmp_path / "out", seeds=2, dtype="float32")
    steps = plan(rows, elsewhere)
    assert [step.dtype for step in steps if step.seed == 0 and step.kind != "data"] == ["bfloat16"] * 6
    assert [step.dtype for step in steps if step.seed == 1] == ["float32"] * 6
    assert [step.done for step in steps if step.seed == 0 and step.variant == "all"] == [True] * 3
    texts = [" ".join(step.command) for step in steps if step.variant == "minus-ocr"]
    assert ["bf16" in t or "bfloat16" in t for t in texts] == [True] * 3 + [False] * 3


def test_a_failed_command_names_its_log(recipes, tmp_path, commands):
    _, codes, _ = commands
    codes["evaluate"] = 1
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    with pytest.raises(RuntimeError, match=r"evaluate of davit failed with exit code 1.*evaluate\.log"):
        execute(plan(rows_of(4, "[V]"), config), config, lambda _: None)
    assert not read_scores(table_of(4), config)


def scores(table, name: str, values: list[float], noise: float = 0.0, questions: int = 40) -> RowScores:
    """Scores of a row whose seeds have these means, with the same questions in every column."""
    row = table.choose([name])[0]
    result = RowScores(row)
    for seed, value in enumerate(values):
        rng = np.random.default_rng(seed + len(name))
        per_question = {str(q): value + noise * float(rng.standard_normal()) for q in range(questions)}
        result.seeds[seed] = dict.fromkeys(COLUMNS, float(np.mean(list(per_question.values()))))
        result.questions[seed] = dict.fromkeys(COLUMNS, per_question)
    return result


def test_verdicts_respect_the_interval_and_say_what_could_be_seen():
    table = table_of(5)
    full = scores(table, "full", [50.0, 51.0, 52.0])

    def words(values, noise=0.0, paper=None):
        return verdict(difference(scores(table, "minus OCR", values, noise), full, COLUMNS), paper)

    assert words([48.0, 49.1, 49.9]) == "worse than the full model"
    assert words([48.0, 49.1, 49.9], paper=-1.0).endswith("the paper's direction is confirmed")
    assert words([52.0, 53.1, 53.9], paper=-1.0).endswith("the paper's direction is contradicted")
    assert words([48.0, 53.0, 52.0]).startswith("not significant (80 % power to detect ")
    assert words([40.0]) == "no verdict: fewer than two seeds or questions"
    few, many = (
        difference(scores(table, "minus OCR", [49, 50, 51], 30, q), scores(table, "full", [50, 51, 52], 30, q), COLUMNS)
        for q in (20, 500)
    )
    assert many.detectable < few.detectable, "more questions detect smaller differences"


def test_the_table_stands_beside_the_paper(tmp_path):
    table = table_of(6)
    rows = [scores(table, "full", [50, 51, 52]), scores(table, "minus OCR", [40, 41, 42.5])]
    fewer = [scores(table, "minus caption", [50, 51]), scores(table, "minus grounding", [50])]
    assert build_table(table, rows + fewer, AblationConfig("mini", tmp_path))["notes"][0].startswith("1 to 3 seeds")
    made = build_table(table, rows, AblationConfig("mini", tmp_path))
    assert made["notes"][0].startswith("3 seeds per row, 160 questions")
    first = made["parts"][0]
    assert first["title"] == "(a) OCR & chart"
    assert first["header"][1] == "Mini-OCR"
    row = first["rows"][1]["cells"]
    assert row[0] == "minus OCR"
    assert row[1].startswith("41.2")
    assert row[4] == "worse than the full model: the paper's direction is confirmed"
    assert row[5:] == ["34.3", "-0.6"]  # the mean of what table 6a reports: 40.9 22.9 44.4 29.0 (it prints 34.2)
    assert any("minus caption" in note for note in made["notes"])
    assert made["seeds"] == {"full": [0, 1, 2], "minus OCR": [0, 1, 2]}


def test_parts_of_a_table_without_scores_are_left_out(tmp_path):
    table = table_of(6)
    rows = [scores(table, "full", [50, 51, 52]), scores(table, "minus OCR", [40, 41, 42.5])]
    for row in rows:  # as after --suite with one benchmark
        row.seeds = {seed: {"Mini-OCR": values["Mini-OCR"]} for seed, values in row.seeds.items()}
    rows[1].other_settings = [0, 2]
    about = {"git": {"commit": "abc", "dirty": False}, "machine": "CPU", "cpu_seconds": 1}
    rows[1].made_by = {seed: [{"dtype": dtype, **about}] for seed, dtype in ((0, "bfloat16"), (2, "float32"))}
    made = build_table(table, rows, AblationConfig("mini", tmp_path))
    assert [part["title"] for part in made["parts"]] == ["(a) OCR & chart"]
    assert any(note.startswith("Left out") and "(b)" in note for note in made["notes"])
    assert any("other settings" in note and "minus OCR (seeds 0, 2)" in note for note in made["notes"])
    assert any("bfloat16: seeds 0; float32: seeds 2" in note for note in made["notes"])


def test_results_of_other_settings_are_named(recipes, tmp_path, monkeypatch):
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    for step in plan(rows_of(4, "[V]", "all four"), config):
        if step.kind == "evaluate":
            step.folder.mkdir(parents=True)
            identity = step.identity if step.variant == "davit" else "of --set steps=4"
            step.marker.write_text(json.dumps({"identity": identity, "command": ""}))
    run = SimpleNamespace(columns=dict, verdicts={}, benchmarks={})
    monkeypatch.setattr("florence_vl.evaluate.scoring.score_folder", lambda *_, **__: run)
    found = {row.row.name: row.other_settings for row in read_scores(table_of(4), config)}
    assert found == {"[V]": [], "all four": [0]}


def llava_table(tmp_path, number, leave_out=()):
    """A table whose scores are the paper's."""
    table = table_of(number)
    ours = []
    for row in table.choose([row.name for row in table.rows if row.paper]):
        reported = paper_scores(table.parts[0], row)
        ours.append(RowScores(row, {0: {c: score for c, score in reported.items() if c not in leave_out}}))
    return build_table(table, ours, AblationConfig("llava15", tmp_path, data=tmp_path))


def test_averages_are_over_the_same_columns_as_the_papers(tmp_path):
    made = llava_table(tmp_path, 1, leave_out=("MM-Vet", "LLaVA-W"))
    for row in made["parts"][0]["rows"]:
        average = row["cells"][made["parts"][0]["header"].index("average")]
        assert row["paper"] or average == row["cells"][-2], "our scores are the paper's"
    assert any("not every row has scores: LLaVA-W, MM-Vet." in note for note in made["notes"])
    assert len(llava_table(tmp_path, 1)["notes"]) == len(made["notes"]) - 1


def test_benchmarks_with_a_judge_are_asked_only_if_there_is_one(tmp_path):
    config = AblationConfig("llava15", tmp_path / "out", data=tmp_path)
    assert "mmvet" not in config.benchmarks.split(",")
    judged = replace(config, judge="http://localhost:9")
    assert {"mmvet", "llava_in_the_wild"} <= set(judged.benchmarks.split(","))
    command = plan(rows_of(4, "[V]"), replace(judged, seeds=1))[-1].command
    assert command[command.index("--judge") + 1] == "http://localhost:9"


def test_a_question_counts_for_its_own_column(tmp_path):
    from florence_vl.evaluate.metrics import METRICS

    mme = METRICS["mme"]
    found = {
        (key, c): mme.counts_for(key, {"category": c})
        for key in ("perception", "cognition")
        for c in ("OCR", "code_reasoning")
    }
    assert [pair for pair, counts in found.items() if counts] == [
        ("perception", "OCR"),
        ("cognition", "code_reasoning"),
    ]
    assert mme.counts_for("accuracy", {"category": "OCR"})


def test_llava_scale_prints_the_papers_columns(tmp_path):
    made = llava_table(tmp_path, 4)["parts"][0]
    assert made["header"][1:4] == ["MMB-EN", "POPE", "MM-Vet"]
    ours, paper = made["rows"][-2:]
    assert paper["paper"]
    assert ours["cells"][1] == paper["cells"][1] == "66.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "2"], "the paper's are 1, 4, 5, 6"),
        (["--table", "5", "--rows", "minus OCT"], "Did you mean 'minus OCR'"),
        (["--rows", "full"], "--rows needs --table"),
        (["--table", "5", "--scale", "minni"], "Did you mean 'mini'"),
        (["--table", "5", "--scale", "llava15"], "needs --data"),
        (["--table", "5", "--dtype", "bfloat61"], "Did you mean 'bfloat16'"),
        (["--table", "5", "--report"], "has been evaluated yet"),
        (["--table", "5", "--seeds", "0"], "0 seeds"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["ablate", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_dry_run_prints_the_commands(recipes, tmp_path, capsys):
    arguments = [
        "ablate",
        "--table",
        "1",
        "--rows",
        "token, equal compute",
        "--rows",
        "average,channel",
        "--seeds",
        "1",
    ]
    assert main([*arguments, "--dry-run", "--out", str(tmp_path / "o")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert "train mini/pretrain" in lines[0]
    assert "model.build.fusion=token" in lines[0]
    assert not (tmp_path / "o").exists()


def test_the_result_is_part_of_the_report(tmp_path):
    from florence_vl.analyze.report import write_report

    table = table_of(5)
    made = build_table(table, [scores(table, "full", [50.0, 51.0])], AblationConfig("mini", tmp_path))
    (tmp_path / "table5.json").write_text(json.dumps({"type": "ablation", "command": "x", "table": made}))
    path, found = write_report(tmp_path, tmp_path / "r.html", "title")
    assert found == {"ablation": 1}
    assert "Table 5: Breadth (mini scale, start smollm2)" in path.read_text()


def test_unset_options_are_not_part_of_an_identity():
    assert ablation._given({"a": None, "b": [{"c": None, "d": 1}], "e": 0}) == {"b": [{"d": 1}], "e": 0}


@pytest.mark.slow
def test_a_row_from_its_data_to_the_table(tmp_path, monkeypatch, capsys):
    """The real commands, at the smallest size."""
    monkeypatch.setenv("FLORENCE_VL_MINI_DATA", str(tmp_path / "data"))
    for name in ("captions", "questions", "regions"):
        assert main(["mini", "data", "--set", name, "--samples", "24", "--out", str(tmp_path / "data" / name)]) == 0
    command = ["ablate", "--start", "mini", "--table", "4", "--rows", "[V]", "--seeds", "1", "--limit", "1"]
    command += ["--set", "pretrain:warm_up.pairs=8", "--set", "pretrain:warm_up.steps=2", "--set", "steps=1"]
    command += ["--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(command) == 0
    made = json.loads((tmp_path / "out" / "mini" / "mini" / "table4.json").read_text())["table"]
    assert made["seeds"] == {"[V]": [0]}
    assert len(list((tmp_path / "out").rglob("done.json"))) == 3
    capsys.readouterr()
    assert main(command) == 0
    assert "started" not in "".join(capsys.readouterr())
