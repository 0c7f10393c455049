"""Atomic writes, folders that may be replaced, and the meaning of model names."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from florence_vl import files
from florence_vl.files import (
    MARK,
    atomic_file,
    atomic_folder,
    check_destination,
    locate,
    parse_yaml,
    read_json,
    sha256,
    write_text,
)


def _write(folder: Path, name: str = "a.txt", text: str = "a", **options: object) -> None:
    with atomic_folder(folder, **options) as partial:
        (partial / name).write_text(text)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "state.json"
    write_text(path, "first")
    with pytest.raises(TypeError), atomic_file(path) as temporary:
        temporary.write_text(1)
    assert temporary.suffix == ".json"
    assert temporary.parent == path.parent
    assert path.read_text() == "first"
    assert _names(path.parent) == ["state.json"]
    write_text(path, "second é")
    assert path.read_bytes() == "second é".encode()


def test_sha256_is_the_known_digest(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TypeError), atomic_folder(out) as partial:
        (partial / "half").write_text(1)
    assert _names(tmp_path) == []
    _write(out)
    assert _names(tmp_path) == ["out"]
    assert json.loads((out / MARK).read_text()) == {"files": ["a.txt"]}


def test_overwrite_replaces_own_folders_only(tmp_path):
    out = tmp_path / "out"
    _write(out)
    with pytest.raises(ValueError, match="--overwrite"):
        _write(out)
    _write(out, "b.txt", overwrite=True)
    assert _names(out) == [MARK, "b.txt"]
    (out / "docs").mkdir()
    (out / "docs" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"docs.thesis\.txt"):
        _write(out, overwrite=True)
    assert (out / "docs" / "thesis.txt").read_text() == "years of work"
    unmarked = tmp_path / "unmarked"
    (unmarked / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="did not write"):
        _write(unmarked, overwrite=True)
    _write(unmarked, overwrite=True, owned=lambda folder: folder.name == "unmarked")
    assert _names(unmarked) == [MARK, "a.txt"]


def test_a_destination_that_is_no_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (file, fifo, tmp_path / "link"):
        if path.name == "link":
            path.symlink_to(file)
        with pytest.raises(ValueError, match="not a folder"):
            _write(path, overwrite=True)
    assert file.read_text() == "kept"
    assert fifo.is_fifo()


def test_a_link_is_followed(tmp_path):
    disk = tmp_path / "disk"
    (disk / "models").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(disk / "models")
    _write(link)
    _write(link, "b.txt", overwrite=True)
    assert link.is_symlink()
    assert _names(disk / "models") == [MARK, "b.txt"]
    assert _names(disk) == ["models"]


def test_source_and_destination_may_not_nest(tmp_path):
    source = tmp_path / "zoo" / "mine"
    _write(source)
    _write(tmp_path / "zoo" / "sibling")
    link = tmp_path / "link"
    link.symlink_to(source)
    for destination in (tmp_path / "zoo", source, source / "inside", link):
        with pytest.raises(ValueError, match="inside"):
            check_destination(destination, overwrite=True, sources=[source])
    assert check_destination(tmp_path / "zoo" / "other", sources=[source]) == tmp_path / "zoo" / "other"


_KILLED = """
import os, sys
from florence_vl.files import atomic_folder
replace = os.replace
def replace_once(a, b):
    replace(a, b)
    if sys.argv[2] == "between":
        os._exit(9)
os.replace = replace_once
with atomic_folder(sys.argv[1], overwrite=True) as partial:
    (partial / "new.txt").write_text("new")
    if sys.argv[2] == "inside":
        os._exit(9)
"""


@pytest.mark.parametrize("moment", ["inside", "between"])
def test_what_a_killed_process_left_is_swept(tmp_path, moment):
    out = tmp_path / "out"
    _write(out)
    other = tmp_path / ".other.partial"
    other.mkdir()
    done = subprocess.run([sys.executable, "-c", _KILLED, str(out), moment], check=False)
    assert done.returncode == 9
    assert len(_names(tmp_path)) >= 3
    with pytest.raises(RuntimeError), atomic_folder(out, overwrite=True):
        raise RuntimeError
    assert _names(tmp_path) == [".other.partial", "out"]
    assert (out / "a.txt").read_text() == "a"


def _leave(folder: Path, pid: int, kind: str) -> None:
    """What a killed process leaves: the folder that it wrote, or the one that it was replacing."""
    host = files._process().partition("-")[0]
    left = folder.with_name(f".{folder.name}.{host}-{pid}-0123abcd.{kind}")
    left.mkdir()
    (left / "a.txt").write_text("good")


@pytest.mark.parametrize("check", [_write, check_destination])
@pytest.mark.parametrize("same", [False, True])  # in a container, every process has pid 1
def test_a_folder_that_was_being_replaced_is_restored_before_it_is_checked(tmp_path, check, same):
    _leave(tmp_path / "out", os.getpid() if same else 2**22 + 1, "old")  # above every pid of Linux
    with pytest.raises(ValueError, match="exists and is not empty"):
        check(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "good"


def test_leftovers_of_an_own_pid_are_swept_and_folders_being_written_are_not(tmp_path):
    _leave(tmp_path / "out", os.getpid(), "partial")
    with atomic_folder(tmp_path / "out") as first:
        assert _names(tmp_path) == [first.name]
        _write(tmp_path / "out")
        assert first.is_dir()
        (tmp_path / "out" / MARK).unlink()
        (tmp_path / "out" / "a.txt").unlink()
    assert _names(tmp_path) == ["out"]


def test_a_json_object_or_the_reason_with_the_file(tmp_path):
    path = tmp_path / "x.json"
    for text, reason in [
        ("{broken", "not a JSON object"),
        ("[1]", "but a list"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a":' * 9000 + "1" + "}" * 9000, "nested too deeply"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"x\.json is .*{reason}"):
            read_json(path)
    path.write_text('{"a": {"b": "é"}}', encoding="utf-8")
    assert read_json(path) == {"a": {"b": "é"}}


def test_a_name_is_a_path_or_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert locate("runs/demo") == Path("runs/demo")
    assert locate(tmp_path) == tmp_path
    assert locate("openai/clip-vit-large-patch14-336") == "openai/clip-vit-large-patch14-336"
    assert locate("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    for name in ("runs/dmeo", "./demo", "~/nothing-here", "/nothing/here", "dmeo", "a/b/c", "a/b c", "", "../x/y"):
        if name == "":
            assert locate(name) == Path()
            continue
        with pytest.raises(FileNotFoundError, match="no LLM"):
            locate(name, "LLM")
    with pytest.raises(FileNotFoundError, match="'demo'"):
        locate("runs/dmeo")


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path))
    assert files.cache_dir() == tmp_path
    monkeypatch.delenv("FLORENCE_VL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "florence-vl"


def test_a_file_is_written_through_links_and_never_over_devices(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "disk" / "a.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "disk" / "a.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "disk"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            write_text(tmp_path / name, "new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link.txt", "pipe"]


def test_yaml_is_bounded_with_its_aliases():
    assert parse_yaml("a: [1, {b: 2}]", "x.yaml") == {"a": [1, {"b": 2}]}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    for text, message in (("\n".join(lines), "more than 20000"), ("a: [", "not valid YAML"), ("&a [*a]", "own anchor")):
        with pytest.raises(ValueError, match=rf"x\.yaml: .*{message}"):
            parse_yaml(text, "x.yaml")
