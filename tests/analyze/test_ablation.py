"""Ablation tables: what is planned, shared and resumed, and verdicts that respect the interval."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from florence_vl.analyze import ablation
from florence_vl.analyze.ablation import (
    AblationConfig,
    RowScores,
    Stopped,
    build_table,
    execute,
    load_tables,
    paper_scores,
    plan,
    read_scores,
    table_of,
    verdict,
)
from florence_vl.cli.main import main

COLUMNS = ["Mini-General", "Mini-Knowledge", "Mini-OCR", "Mini-Vision"]


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A recipe folder with one pair for each variant."""
    folder = tmp_path / "recipes/ablations/mini"
    folder.mkdir(parents=True)
    for variant in {row.variant for table in load_tables().values() for row in table.rows}:
        build = {"vision": "mini", "llm": "smollm2"}
        for stage, model in (("pretrain", {"build": build}), ("finetune", {"path": "runs/x"})):
            recipe = {"model": model, "steps": 3, "data": {"sources": [{"path": "x.jsonl"}]}}
            (folder / f"{variant}-{stage}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("FLORENCE_VL_RECIPES", str(tmp_path / "recipes"))
    return tmp_path / "recipes"


@pytest.fixture
def commands(monkeypatch):
    """Commands that `execute` starts; `codes` maps a part of a command to the exit code that it ends with."""
    started: list[list[str]] = []
    codes: dict[str, int] = {}

    def run(words, **_):
        started.append(words)
        code = next((c for part, c in codes.items() if part in " ".join(words)), 0)
        output = next((Path(word.removeprefix("output=")) for word in words if word.startswith("output=")), None)
        for name in ("checkpoints", "model") if output else ():
            (output / name).mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(words, code)

    monkeypatch.setattr(ablation.subprocess, "run", run)
    return started, codes


def test_every_row_of_the_tables_is_the_papers():
    from florence_vl.evaluate.scoring import reported_results

    for number, table in load_tables().items():
        assert table.reference in {row.name for row in table.rows}
        for part in table.parts:
            reported = {row["name"] for row in reported_results()[part.paper]["rows"]}
            named = {row.paper for row in table.rows if row.paper}
            assert reported <= named, f"table {number} leaves out a row that the paper reports"
            assert all(paper_scores(part, row) for row in table.rows if row.paper in reported)


def test_a_variant_is_trained_once_and_finetuning_starts_from_its_own_first_stage(recipes, tmp_path):
    config = AblationConfig("mini", tmp_path / "out", seeds=2)
    table = table_of(5)
    steps = plan(table, table.choose(None), config)
    assert len(steps) == 4 * 2 * 3
    assert len({step.folder for step in steps}) == len(steps)
    finetune = next(s for s in steps if (s.kind, s.variant, s.seed) == ("finetune", "minus-ocr", 1))
    assert f"model.path={tmp_path}/out/mini/minus-ocr/seed-1/pretrain/model" in finetune.command
    assert finetune.command[:2] == ("train", "ablations/mini/minus-ocr-finetune")
    shared = plan(table, table.choose(["full"]), AblationConfig("mini", tmp_path / "out", 2, share_pretraining=True))
    assert [s.kind for s in shared] == ["pretrain", "finetune", "evaluate", "finetune", "evaluate"]
    assert "seed-0/pretrain/model" in " ".join(shared[3].command)


def test_overrides_reach_their_stage(recipes, tmp_path):
    table = table_of(4)
    words = ("batch_size=16", "pretrain:steps=7", "finetune:parts.tower.train=false")
    config = AblationConfig("mini", tmp_path, seeds=1, overrides=words)
    first, second, _ = plan(table, table.choose(["[V]"]), config)
    assert "steps=7" in first.command
    assert "steps=7" not in second.command
    assert "parts.tower.train=false" in second.command
    assert "batch_size=16" in first.command
    assert "batch_size=16" in second.command
    for wrong in ("steps", "pretrian:steps=3"):
        with pytest.raises(ValueError, match="not of the form"):
            plan(table, table.rows, AblationConfig("mini", tmp_path, overrides=(wrong,)))


def test_mini_data_is_written_where_it_is_absent(recipes, tmp_path, commands):
    started, _ = commands
    for path in (recipes / "ablations/mini").glob("davit-*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        name = "captions" if "pretrain" in path.name else "questions"
        recipe["data"]["sources"] = [{"path": f"{tmp_path}/data/{name}/data.jsonl", "name": name}]
        path.write_text(yaml.safe_dump(recipe))
    (tmp_path / "data/questions").mkdir(parents=True)
    (tmp_path / "data/questions/data.jsonl").write_text("{}")
    table = table_of(4)
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    steps = plan(table, table.choose(["[V]"]), config)
    assert [step.kind for step in steps] == ["data", "pretrain", "finetune", "evaluate"]
    assert steps[0].command == ("mini", "data", "--set", "captions", "--out", f"{tmp_path}/data/captions")
    execute(steps, config, lambda _: None)
    assert started[0][1:5] == ["-m", "florence_vl", "mini", "data"]


def test_tables_share_their_runs_and_go_on_where_they_stopped(recipes, tmp_path, commands):
    started, codes = commands
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    one, four = table_of(1), table_of(4)
    codes["average-finetune"] = ablation.STOPPED
    with pytest.raises(Stopped, match="average"):
        execute(plan(one, one.choose(None), config), config, lambda _: None)
    runs = tmp_path / "out/mini/average/seed-0"
    assert sorted(p.name for p in (runs / "pretrain").iterdir() if p.is_dir()) == ["model"]  # done: checkpoints go
    assert (runs / "finetune/checkpoints").is_dir()  # stopped: they stay
    codes.clear()
    before = len(started)
    execute(plan(one, one.choose(None), config), config, lambda _: None)
    assert before + len(started[before:]) == 3 * 3 + 1  # the stopped step once more, nothing else twice
    before = len(started)
    execute(plan(four, four.choose(None), config), config, lambda _: None)
    assert not any("ablations/mini/all-" in word for words in started[before:] for word in words)


def test_other_settings_do_not_go_into_the_same_folder(recipes, tmp_path, commands):
    table = table_of(4)
    rows = table.choose(["[V]"])
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    execute(plan(table, rows, config), config, lambda _: None)
    changed = AblationConfig("mini", tmp_path / "out", seeds=1, overrides=("steps=4",))
    with pytest.raises(ValueError, match="other settings"):
        execute(plan(table, rows, changed), changed, lambda _: None)


def test_a_failed_command_names_its_log(recipes, tmp_path, commands):
    _, codes = commands
    codes["evaluate"] = 1
    table = table_of(4)
    config = AblationConfig("mini", tmp_path / "out", seeds=1)
    with pytest.raises(RuntimeError, match=r"evaluate of davit failed with exit code 1.*evaluate\.log"):
        execute(plan(table, table.choose(["[V]"]), config), config, lambda _: None)
    assert not read_scores(table, config)


def scores(table, name: str, values: list[float]) -> RowScores:
    row = table.choose([name])[0]
    return RowScores(row, {seed: dict.fromkeys(COLUMNS, value) for seed, value in enumerate(values)})


def test_verdicts_respect_the_interval():
    table = table_of(5)
    full = scores(table, "full", [50.0, 51.0, 52.0])
    assert verdict(scores(table, "minus OCR", [48.0, 49.1, 49.9]), full, COLUMNS)[1] == "worse than the full model"
    assert verdict(scores(table, "minus OCR", [52.0, 53.1, 53.9]), full, COLUMNS)[1] == "better than the full model"
    assert verdict(scores(table, "minus OCR", [48.0, 53.0, 52.0]), full, COLUMNS)[1] == "not told apart by 3 seeds"
    assert verdict(scores(table, "minus OCR", [40.0]), full, COLUMNS) == (
        verdict(scores(table, "minus OCR", [40.0]), full, COLUMNS)[0],
        "one seed: no verdict",
    )


def test_the_table_stands_beside_the_paper():
    table = table_of(6)
    made = build_table(table, [scores(table, "full", [50, 51, 52]), scores(table, "minus OCR", [40, 41, 42.5])], "mini")
    first = made["parts"][0]
    assert first["title"] == "(a) OCR & chart"
    assert first["header"][1] == "Mini-OCR"
    row = first["rows"][1]["cells"]
    assert row[0] == "minus OCR"
    assert row[1].startswith("41.2")
    assert row[4] == "worse than the full model"
    assert row[5:] == ["34.3", "-0.6"]  # the mean of what table 6a reports: 40.9 22.9 44.4 29.0 (it prints 34.2)
    assert any("minus caption" in note for note in made["notes"])


def test_llava_scale_prints_the_papers_columns():
    from florence_vl.evaluate.scoring import reported_results

    table = table_of(4)
    reported = {row["name"]: row["scores"] for row in reported_results()["table_4"]["rows"]}
    ours = [RowScores(table.choose(["all four"])[0], {0: dict(reported["all four"])})]
    made = build_table(table, ours, "llava15")["parts"][0]
    assert made["header"][1:4] == ["MMB-EN", "POPE", "MM-Vet"]
    assert made["rows"][1]["paper"]
    assert made["rows"][0]["cells"][1] == made["rows"][1]["cells"][1] == "66.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "2"], "the paper's are 1, 4, 5, 6"),
        (["--table", "5", "--rows", "minus OCT"], "Did you mean 'minus OCR'"),
        (["--table", "5", "--scale", "minni"], "Did you mean 'mini'"),
        (["--table", "5", "--scale", "llava15"], "needs --data"),
        (["--table", "5", "--report"], "has been evaluated yet"),
        (["--table", "5", "--seeds", "0"], "0 seeds"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["ablate", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_dry_run_prints_the_commands(recipes, tmp_path, capsys):
    assert main(["ablate", "--table", "4", "--seeds", "1", "--dry-run", "--out", str(tmp_path / "o")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert "train ablations/mini/davit-pretrain" in lines[0]
    assert not (tmp_path / "o").exists()


def test_the_result_is_part_of_the_report(tmp_path):
    from florence_vl.analyze.report import write_report

    table = table_of(5)
    made = build_table(table, [scores(table, "full", [50.0, 51.0])], "mini")
    (tmp_path / "table5.json").write_text(json.dumps({"type": "ablation", "command": "x", "table": made}))
    path, found = write_report(tmp_path, tmp_path / "r.html", "title")
    assert found == {"ablation": 1}
    assert "Table 5: Breadth (mini scale)" in path.read_text()
