"""`florence-vl serve`: startup and clean shutdown, adapters by name, vLLM's command, usage errors."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from florence_vl.cli.main import main
from florence_vl.cli.serve import load, show_attribution, show_features, vllm_command
from florence_vl.model.resolution import set_resolution
from florence_vl.model.tiny import tiny_model
from florence_vl.serve.engine import Engine
from florence_vl.serve.sampling import GenerationOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tiny"
    for part in tiny_model():
        part.save_pretrained(path)
    return path


def test_a_process_answers_and_ends_on_sigterm(folder):
    command = [sys.executable, "-m", "florence_vl", "serve", str(folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        told = next((line for line in process.stdout if line.startswith("tiny on http://127.0.0.1:")), "")
        port = int(told.partition("/v1")[0].rpartition(":")[2])
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").read()
                break
            except OSError:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.1)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "user": "someone"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        body |= {"max_tokens": 400, "stream": True}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            answer.readline()
            process.send_signal(signal.SIGTERM)  # what runs is finished
            assert answer.read().strip().endswith(b"data: [DONE]")
        assert process.wait(60) == 0
        assert "user 'someone'" in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_adapters_answer_by_name_and_never_share_prefixes(folder, tmp_path):
    peft = pytest.importorskip("peft")
    import torch

    model, _ = tiny_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "other")
    loaded, processor = load(str(folder), {"other": str(tmp_path / "other")}, "cpu", "auto", False, False)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    picture = Image.new("RGB", (50, 30), "red")
    with Engine(loaded, processor, adapters=("other",)) as engine:
        names = [None, "other", None, "other"]
        answers = [
            engine.submit(engine.prepare(chat, [picture], name), GenerationOptions(max_new_tokens=8)) for name in names
        ]
        for answer in answers:
            answer.result()
    with Engine(*tiny_model()) as plain:
        base = plain.submit(plain.prepare(chat, [picture]), GenerationOptions(max_new_tokens=8))
        base.result()
    assert answers[0].ids == answers[2].ids == base.ids
    assert answers[1].ids == answers[3].ids != base.ids


def test_int8_answers(folder):
    pytest.importorskip("torchao")
    loaded, processor = load(str(folder), {}, "cpu", "auto", True, False)
    with Engine(loaded, processor) as engine:
        prompt = engine.prepare([{"role": "user", "content": "Hi"}])
        assert len(engine.submit(prompt, GenerationOptions(max_new_tokens=4)).result()) > 0


def test_features_and_attribution_are_json():
    model, processor = tiny_model()
    picture = Image.new("RGB", (60, 40), "red")
    shown = show_features(model, processor, picture, None, "picture")
    assert shown["grid"] == [2, 2]
    assert list(shown["features"]) == ["davit", "caption", "ocr", "grounding"]
    data = base64.b64decode(shown["features"]["ocr"]["picture"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (2, 2)
    array = show_features(model, processor, picture, ["davit"], "array")["features"]["davit"]
    assert len(base64.b64decode(array["data"])) == 4 * array["shape"][0] * array["shape"][1]
    with pytest.raises(ValueError, match=r"no feature 'davt'\. Did you mean 'davit'"):
        show_features(model, processor, picture, ["davt"], "array")
    for answer in (None, "A dog."):
        with pytest.raises(ValueError, match="but the context of this model is 1024 tokens: shorten the question"):
            show_attribution(model, processor, picture, "What? " * 1024, answer)
    found = json.loads(json.dumps(show_attribution(model, processor, picture, "What?", "A dog.")))
    assert abs(sum(part["share"] for part in found["features"]) - 1) < 1e-4
    assert [word["text"] for word in found["words"]] == ["A", "dog."]
    # The words' tokens are the answer's but for the end of turn, so no word has more than the whole.
    assert found["log_likelihood"] < sum(word["log_likelihood"] for word in found["words"]) < 0
    assert set(found["words"][1]["drops"]) == {"davit", "caption", "ocr", "grounding"}


def test_new_prompts_give_the_features_of_a_model_that_has_them():
    model, processor = tiny_model()
    tower = model.model.vision_tower
    known = tower.config.prompt_token_ids["ocr"]
    picture = Image.new("RGB", (60, 40), "red")
    whole = show_features(model, processor, picture, None, "array")["features"]
    found = show_features(model, processor, picture, ["ocr"], "array", ["Read it."], lambda text: known)["features"]
    assert list(found) == ["ocr", "Read it."]
    values = [np.frombuffer(base64.b64decode(found[name]["data"]), dtype="<f4") for name in found]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    longer = show_features(model, processor, picture, None, "array", ["Read it."], lambda text: [*known, 5, 6])
    assert longer["features"]["Read it."]["data"] != whole["ocr"]["data"]
    assert show_features(model, processor, picture, None, "array")["features"] == whole  # nothing stays behind
    with pytest.raises(ValueError, match=r"the longest prompt 200, but the encoder .*horten the prompts"):
        show_features(model, processor, picture, None, "array", ["Read it."], lambda text: [5] * 200)
    with pytest.raises(ValueError, match="start it with --prompt-tokenizer"):
        show_features(model, processor, picture, None, "array", ["Read it."])
    with pytest.raises(ValueError, match="is the name of a feature"):
        show_features(model, processor, picture, None, "array", ["ocr"], lambda text: known)


@pytest.mark.parametrize(
    ("resolution", "tokens"),
    [({"image_size": 96}, 9), ({"view": "glance"}, 1), ({"aspect": "native", "token_budget": 6}, 6)],
)
def test_images_are_seen_at_the_resolution_that_is_asked_for(tmp_path, resolution, tokens):
    for part in tiny_model(views={"glance": {"size": 32, "features": ["davit"]}}):
        part.save_pretrained(tmp_path)
    loaded, processor = load(str(tmp_path), {}, "cpu", "auto", False, False)
    set_resolution(loaded, processor, **resolution)
    with Engine(loaded, processor) as engine:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
        prompts = [engine.prepare(chat, [Image.new("RGB", (96, 64), color)]) for color in ("red", "blue")]
        assert [prompt.image_tokens for prompt in prompts] == [tokens, tokens]
        answers = [engine.submit(prompt, GenerationOptions(max_new_tokens=4)) for prompt in prompts]
        assert all(len(answer.result()) > 0 for answer in answers)


def test_pictures_of_several_grids_are_answered_together(tmp_path):
    for part in tiny_model(tower="siglip_vision_model", tiles={"max": 4, "global": True, "size": 64}):
        part.save_pretrained(tmp_path)
    model, processor = load(str(tmp_path), {}, "cpu", "auto", False, False)
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in [(60, 64), (190, 60), (200, 200)]]
    text = {"type": "text", "text": "Hi"}
    with Engine(model, processor) as engine:
        prompts = [engine.prepare([{"role": "user", "content": [{"type": "image"}, text]}], [p]) for p in pictures]
        assert [prompt.image_tokens for prompt in prompts] == [4, 4 + 3 * 4 + 2, 4 + 4 * 4 + 4]
        waiting = [engine.submit(prompt, GenerationOptions(max_new_tokens=6)) for prompt in prompts]
        answers = [answer.result() for answer in waiting]
    for picture, answer in zip(pictures, answers, strict=True):
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, text]}]
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.decode(ids, skip_special_tokens=True)
    shown = show_features(model, processor, pictures[2], None, "array")
    assert shown["grid"] == [2, 2], "the features that are shown are of the whole picture"


def test_vllm_gets_safe_flags(folder, monkeypatch):
    monkeypatch.setenv("VLLM_PYTHON", "/opt/vllm/bin/python")
    words = vllm_command(str(folder), "127.0.0.1", 8000, None, "auto", 16, [], [])
    assert words[:3] == ["/opt/vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert words[words.index("--allowed-media-domains") + 1] == "none.invalid"
    assert "--trust-remote-code" not in words
    assert "--allowed-local-media-path" not in words


def test_a_template_without_protection_is_told_before_vllm_starts(folder, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "execve", lambda *given: (started.append(given), sys.exit(0)))
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for path, warned in ((folder, False), (tmp_path / "old", True)):
        with pytest.raises(SystemExit):
            main(["serve", str(path), "--engine", "vllm"])
        assert ("does not escape control tokens" in capsys.readouterr().err) == warned
    assert len(started) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vlm"], "unknown engine 'vlm'. Did you mean 'vllm'"),
        (["--engine", "vllm", "--view", "full"], "--view: not supported with --engine vllm"),
        (["--engine", "vllm", "--int8"], "--int8: not supported with --engine vllm"),
        (["--engine", "vllm", "--allowed-media-domain", ".example.org"], "name each host"),
        (["--adapter", "x"], "not of the form NAME=VALUE"),
        (["--adapter", "x=a", "--adapter", "x=b"], "--adapter names 'x' twice"),
        (["--adapter", "v1.5=a"], "'v1.5' cannot be the name of a torch module"),
        (["--adapter", "keys=a"], "'keys' cannot be the name of a torch module"),
        (["--cache-gib", "inf"], "--cache-gib is inf"),
        (["--cache-gib", "nan"], "--cache-gib"),
        (["--allowed-media-domain", "https://example.org"], "give the host alone"),
        (["--adapter", "x=nowhere"], "no adapter_config.json"),
        (["--allowed-media-path", "nowhere"], "is not a folder"),
        (["--max-batch", "0"], "max_batch is 0"),
    ],
)
def test_wrong_usage(folder, capsys, arguments, message):
    assert main(["serve", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_address_that_cannot_be_used_is_told_before_the_model_loads(folder, capsys, monkeypatch):
    monkeypatch.setattr("florence_vl.cli.serve.load", lambda *given: pytest.fail("the model is loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 1
        assert f"cannot listen on 127.0.0.1:{port}: " in capsys.readouterr().err
    assert main(["serve", str(folder), "--host", "203.0.113.1"]) == 1
    assert "cannot listen on 203.0.113.1:8000: " in capsys.readouterr().err


def test_an_empty_key_file_is_an_error(folder, tmp_path, capsys):
    (tmp_path / "key").touch()
    assert main(["serve", str(folder), "--api-key-file", str(tmp_path / "key")]) == 2
    assert "is empty" in capsys.readouterr().err
    assert os.environ.get("FLORENCE_VL_API_KEY") is None
