"""Command-line entry point: listing without imports, suggestions for typos, one-line errors, exit codes."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
import typer

from florence_vl.cli import main as cli

QUIET = {**os.environ, "COLUMNS": "120", "TERM": "dumb"}


@pytest.fixture
def fake_command(monkeypatch):
    """Put a function in the command table as `fake`."""

    def install(function):
        module = types.ModuleType("fake_command")
        module.command = function
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "A fake.", "More"))

    monkeypatch.delenv("FLORENCE_VL_DEBUG", raising=False)
    return install


def raising(error):
    def command() -> None:
        raise error

    return command


def test_every_listed_command_has_its_module():
    missing = [name for name, (module, _, _) in cli.commands().items() if importlib.util.find_spec(module) is None]
    assert missing == []


def test_no_help_imports_torch():
    code = (
        "import sys\n"
        "sys.argv = ['florence-vl']  # as the console script starts\n"
        "from florence_vl.cli.main import commands, main\n"
        "calls = [['--help'], ['--version']] + [[name, '--help'] for name in commands()]\n"
        "for call in calls:\n"
        "    assert main(call) == 0, call\n"
        "    heavy = {'torch', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, (call, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=QUIET, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, (_, line, _) in cli.commands().items():
        assert name in done.stdout
        assert line[:40] in done.stdout


def test_every_help_has_an_example(capsys):
    for name in cli.commands():
        assert cli.main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert "Examples" in out, f"`florence-vl {name} --help` shows no example"
        assert f"florence-vl {name}" in out.split("Examples")[-1]


def test_no_arguments_show_the_help(capsys):
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_unknown_command_names_the_near_ones(capsys):
    assert cli.main(["bild", "--vision", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "florence-vl: error: no command 'bild'. Did you mean 'build'?\n"
    assert captured.out == ""


def test_unknown_flag_is_wrong_usage(capsys):
    assert cli.main(["doctor", "--jsn"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--jsn" in error
    assert "--json" in error
    assert "florence-vl doctor --help" in error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("unknown fusion 'chanel'.\nDid you mean 'channel'?"), 2, "unknown fusion 'chanel'. Did you mean"),
        (FileNotFoundError(2, "No such file or directory", "a.jpg"), 2, "No such file or directory: a.jpg"),
        (FileNotFoundError("no picture a.jpg"), 2, "no picture a.jpg"),
        (NotADirectoryError(20, "Not a directory", "model"), 2, "Not a directory: model"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Permission denied: /x"),
        (ModuleNotFoundError("No module named 'gradio'", name="gradio"), 1, "florence-vl doctor"),
        (RuntimeError("loss is not finite"), 1, "RuntimeError: loss is not finite (at test_cli_main.py:"),
        (typer.BadParameter("size must be positive"), 2, "size must be positive"),
    ],
)
def test_errors_are_one_line(fake_command, capsys, error, code, message):
    fake_command(raising(error))
    assert cli.main(["fake"]) == code
    captured = capsys.readouterr().err
    assert captured.startswith("florence-vl: error: ")
    assert captured.count("\n") == 1
    assert message in captured
    assert "Traceback" not in captured


@pytest.mark.parametrize("how", ["flag", "flag after the command", "environment"])
def test_debug_shows_the_traceback(fake_command, capsys, monkeypatch, how):
    fake_command(raising(ValueError("nope")))
    if how == "environment":
        monkeypatch.setenv("FLORENCE_VL_DEBUG", "1")
    arguments = {"flag": ["--debug", "fake"], "flag after the command": ["fake", "--debug"], "environment": ["fake"]}
    assert cli.main(arguments[how]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("florence-vl: error: nope\n")


def test_interrupt_is_130(fake_command, capsys):
    fake_command(raising(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_exit_code_of_a_command_is_kept(fake_command):
    fake_command(raising(typer.Exit(1)))
    assert cli.main(["fake"]) == 1


def test_module_entry_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "florence_vl", "trian"], capture_output=True, text=True, env=QUIET, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == "florence-vl: error: no command 'trian'. Did you mean 'train'?\n"


def test_what_the_terminal_cannot_show_is_escaped(tmp_path):
    row = {
        "id": "coco[/red]/\ud83d é",
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "漢"}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    ascii_only = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, "-m", "florence_vl", "data", "inspect", str(tmp_path / "rows.jsonl"), "--lengths", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert r"coco[/red]/\ud83d \xe9" in done.stdout
    assert r"\u6f22" in done.stdout
