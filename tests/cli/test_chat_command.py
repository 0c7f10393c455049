"""`florence-vl chat`: one question, a conversation from standard input, slash commands, usage errors."""

import io

import pytest
from PIL import Image

from florence_vl.cli import chat, main
from florence_vl.model import loading
from florence_vl.model.tiny import tiny_model
from florence_vl.serve.session import ChatSession, GenerationOptions


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


@pytest.fixture
def model(parts, monkeypatch):
    """Any `--model` is the tiny one."""
    monkeypatch.setattr(loading, "check_folder", lambda model: model)
    monkeypatch.setattr(loading, "load_model", lambda model, device, dtype: parts)
    return parts


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (40, 20), "green").save(path)
    return path


def run(*arguments):
    return main.main(["chat", "--model", "tiny", "--max-new-tokens", "5", *map(str, arguments)])


def test_one_question(model, photo, capsys):
    assert run("--image", photo, "What is shown?") == 0
    session = ChatSession(*model, options=GenerationOptions(max_new_tokens=5))
    session.show(photo)
    assert capsys.readouterr().out.strip() == session.ask("What is shown?")


def test_images_at_another_resolution(photo, capsys, monkeypatch):
    monkeypatch.setattr(loading, "check_folder", lambda model: model)
    views = {"glance": {"size": 32, "features": ["davit"]}}
    model, processor = tiny_model(views=views, positions="resampled", position_grid=[2, 2])
    monkeypatch.setattr(loading, "load_model", lambda *arguments: (model, processor))
    for flags, tokens in ((["--image-size", "96"], 9), (["--image-size", "64", "--view", "glance"], 1)):
        assert run("--image", photo, *flags, "What is shown?") == 0
        assert processor.image_tokens(20, 40) == tokens
        session = ChatSession(model, processor, options=GenerationOptions(max_new_tokens=5))
        session.show(photo)
        assert capsys.readouterr().out.strip() == session.ask("What is shown?")
    assert run("--image", photo, "--view", "glanse", "What?") == 2
    assert "Did you mean 'glance'" in capsys.readouterr().err


def test_conversation_from_standard_input(model, photo, capsys, monkeypatch):
    lines = f"What is it?\n\n/imag {photo}\n/image {photo}\n/image /no/such.png\nAnd now?\n/help\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run("--image", photo) == 0
    captured = capsys.readouterr()
    session = ChatSession(*model, options=GenerationOptions(max_new_tokens=5))
    session.show(photo)
    assert captured.out.splitlines()[0].strip() == session.ask("What is it?")
    assert "(photo.jpg, 40x20)" in captured.out
    assert "/reset" in captured.out
    errors = captured.err.splitlines()
    assert errors[0] == "error: unknown command '/imag'. Did you mean '/image'?"
    assert "/no/such.png" in errors[1]
    assert len(errors) == 2


def test_a_conversation_goes_on_after_too_little_memory(parts, capsys, monkeypatch):
    real, calls = type(parts[0]).forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) <= 2:  # the engine tries again once, without its caches
            raise MemoryError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(parts[0]), "forward", forward)
    lines = iter(("What is shown?", "What is shown?", "/quit"))
    session = ChatSession(*parts, options=GenerationOptions(max_new_tokens=5))
    chat.converse(session, lambda: next(lines))
    assert "error: no memory for this request" in capsys.readouterr().err
    assert len(session.messages) == 2


def test_end_of_input_ends_the_conversation(model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run() == 0


def test_add_and_reset(parts, photo):
    session = ChatSession(*parts, options=GenerationOptions(max_new_tokens=3))
    chat.obey(session, f"/image {photo}")
    session.ask("one")
    chat.obey(session, f"/add '{photo}'")
    session.ask("two")
    assert len(session.images) == 2
    chat.obey(session, "/reset")
    assert session.messages == []
    session.ask("three")
    assert len(session.images) == 2
    chat.obey(session, f"/image {photo}")
    session.ask("four")
    assert len(session.images) == 1
    with pytest.raises(ValueError, match="/add needs a file"):
        chat.obey(session, "/add")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "/no/such.png", "x"], "/no/such.png"),
        (["--top-p", "0.5", "x"], "--top-p applies to sampling only"),
        (["--temperature", "-2", "x"], "temperature is -2.0"),
        (["--temperature", "warm", "x"], "--temperature"),
        (["--device", "cuba", "x"], "unknown device 'cuba'"),
        (["--dtype", "float", "x"], "unknown dtype 'float'"),
        (["--trade", "0.1", "x"], "--trade is for --view auto"),
        ([" "], "the question is empty"),
        (["--modle", "x"], "--model"),
    ],
)
def test_wrong_usage_is_one_line_and_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(loading, "check_folder", lambda model: model)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("florence-vl: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_image_that_is_none_is_named(model, tmp_path, capsys):
    path = tmp_path / "not.png"
    path.write_text("hello")
    assert run("--image", path, "x") == 2
    assert "not.png" in capsys.readouterr().err


def test_model_that_is_none(tmp_path, capsys):
    assert main.main(["chat", "--model", str(tmp_path), "x"]) == 2
    assert "has no config.json" in capsys.readouterr().err
