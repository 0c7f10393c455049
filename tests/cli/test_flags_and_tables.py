"""Flags that would be ignored are errors; tables and help show square brackets as text, not as markup."""

import re
from types import SimpleNamespace

import pytest
import typer
from rich.console import Console
from rich.text import Text

from florence_vl.cli.common import print_table
from florence_vl.cli.main import build_app, commands, main
from florence_vl.evaluate.report import as_terminal

SERVER = "http://localhost:1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "--model", SERVER, "--device", "cuda", "--dtype", "nope", "--image-size", "96"],
            f"--image-size, --device, --dtype: the server at {SERVER} determines",
        ),
        (["evaluate", "--model", SERVER, "--feature-store", "x"], "--feature-store: the server at"),
        (["evaluate", "--model", "mini", "--judge-model", "x"], "--judge-model: needs --judge"),
        (["evaluate", "--model", "mini", "--served-model", "x"], "--served-model: --model mini is not the URL"),
        (["evaluate", "--model", "mini", "--retries", "0"], "--retries: --model mini is not the URL"),
        (
            ["evaluate", "--draws", "9", "compare", "a", "b"],
            "--draws: give the flags of `florence-vl evaluate compare`",
        ),
        (["data", "sources", "--sample", "5"], "--sample: needs --verify"),
        (
            ["analyze", "pca", "x.png", "-e", "x", "--keep-background", "--threshold", "0.5", "--no-refit"],
            "--threshold, --no-refit: not with --keep-background",
        ),
    ],
)
def test_a_flag_without_effect_is_an_error(arguments, message, tmp_path, capsys):
    if "--model" in arguments:
        arguments = [*arguments, "--suite", "pope", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def _all(node, path):
    yield path, node
    for name, child in getattr(node, "commands", {}).items():
        yield from _all(child, f"{path} {name}")


@pytest.mark.parametrize("name", commands())
def test_help_keeps_square_brackets(name):
    for path, node in _all(typer.main.get_command(build_app(name)).commands[name], name):
        for text in (node.help, node.epilog, *(getattr(parameter, "help", None) for parameter in node.params)):
            written = (text or "").replace("[bold]Examples[/bold]", "Examples")
            assert Text.from_markup(written).plain == written.replace("\\[", "["), f"florence-vl {path} --help"


def test_help_of_an_encoder_names_its_size(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    assert main(["analyze", "pca", "--help"]) == 0
    assert "[@size]" in re.sub(r"[\s│]", "", capsys.readouterr().out)


def test_a_title_longer_than_the_table_stays_one_line(capsys):
    print_table("a title / " * 20, ["feature"], [["ocr"]])
    assert "a title / " * 20 in capsys.readouterr().out


def test_tables_print_any_text(capsys):
    print_table("What does [/INST] mean?", ["[b]feature"], [["[red]ocr[/red]"]])
    out = " ".join(capsys.readouterr().out.split())
    for text in ("What does [/INST] mean?", "[b]feature", "[red]ocr[/red]"):
        assert text in out


def test_titles_of_evaluations_are_text(capsys):
    scores = SimpleNamespace(description={"identity": {"model": "[/a]"}}, benchmarks={}, columns=dict)
    Console().print(as_terminal(scores, None))
    assert "[/a]" in capsys.readouterr().out


def test_recipes_show_their_description(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("extends: mini/pretrain\ndescription: with [/INST] in the [bold]template\n")
    monkeypatch.setenv("FLORENCE_VL_RECIPES", str(tmp_path))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any output for a terminal
    assert main(["recipes", "list", "mine"]) == 0
    assert "with [/INST] in the [bold]template" in capsys.readouterr().out


def test_the_page_of_an_inspection_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "conversations": [{"from": "human", "value": "Q"}]}')
    main(["data", "inspect", "rows.jsonl", "--lengths", "0", "--html", "[b]page.html"])
    assert "page: [b]page.html" in capsys.readouterr().out
