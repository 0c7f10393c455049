"""The web page in a real browser with a real server: `make test-web` (Chromium from the system, Playwright)."""

from __future__ import annotations

import contextlib
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

from florence_vl.cli.web import _serving
from florence_vl.model.pictures import data_url
from florence_vl.serve import web
from florence_vl.serve.web import Server, from_data_url, gains, heat_map, picture_url, to_messages, word_choices

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""


def test_messages_hold_the_picture_once():
    picture = Image.new("RGB", (4, 3), (1, 2, 3))
    history = [
        {"role": "user", "text": "What?", "image": data_url(picture)},
        {"role": "assistant", "text": "A picture."},
    ]
    assert to_messages([], "What?", history[0]["image"]) == to_messages(history[:1], "", None)[:1]
    messages = to_messages(history, "And now?", None)
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert messages[1:] == [{"role": "assistant", "content": "A picture."}, {"role": "user", "content": "And now?"}]
    again = from_data_url(messages[0]["content"][0]["image_url"]["url"])
    assert again.getpixel((0, 0)) == (1, 2, 3)


def test_an_uploaded_picture_is_encoded_once_and_white_behind_transparent_pixels(tmp_path, monkeypatch):
    Image.new("RGBA", (4, 3), (0, 0, 0, 0)).save(tmp_path / "drawing.png")
    Image.new("RGB", (1100, 1000), (90, 90, 90)).save(tmp_path / "photo.png")
    drawing, photo = (picture_url(str(tmp_path / name)) for name in ("drawing.png", "photo.png"))
    assert from_data_url(drawing).getpixel((0, 0)) == (255, 255, 255)
    assert photo.startswith("data:image/jpeg")
    monkeypatch.setattr(web, "data_url", lambda *given: pytest.fail("it is encoded again"))
    assert picture_url(str(tmp_path / "photo.png")) == photo
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read image the picture"):
        picture_url(str(tmp_path / "broken.png"))


def test_a_port_that_is_in_use_is_not_taken_for_the_models_server(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **settings: pytest.fail("a server is started"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*--server-port"):
            _serving("mini", port, "").__enter__()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_models_server_ends_with_the_page(tmp_path):
    server = tmp_path / "python"
    server.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 600\n")
    server.chmod(0o755)
    code = f"import sys; sys.executable = {str(server)!r}; from florence_vl.cli.web import _serving\n"
    code += f"with _serving('mini', {free_port()}, ''): pass"
    page = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists():
        assert page.poll() is None
        time.sleep(0.01)
    page.terminate()
    assert page.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_heat_map_is_red_where_the_values_are():
    drawn = np.asarray(heat_map(Image.new("RGB", (40, 20), (100, 100, 100)), [[0.0, 1.0]])).astype(int)
    assert drawn.shape == (160, 320, 3)
    left, right = drawn[80, 10], drawn[80, -10]
    assert abs(left - 100).max() <= 2
    assert right[0] > 180
    assert right[1] < 80


def test_gains_of_the_answer_and_of_its_words():
    words = [{"text": "A", "drops": {"davit": 0.5}}, {"text": "car.", "drops": {"davit": -1.0}}]
    found = {"features": [{"name": "davit", "drop": -0.5}], "words": words}
    assert word_choices(words) == [("the whole answer", -1), ("A", 0), ("car.", 1)]
    assert [gains(found, index) for index in (-1, 0, 1)] == [{"davit": -0.5}, {"davit": 0.5}, {"davit": -1.0}]


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ValueError, match=address):
        Server(address).models()
    with pytest.raises(ValueError, match="no answer from"):
        Server(address).post("/v1/features", {})
    assert not Server(address).has("/v1/features")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def page_address(tmp_path_factory):
    """`florence-vl web --model` with a tiny model, in separate processes."""
    from florence_vl.model.tiny import tiny_model

    folder = tmp_path_factory.mktemp("web") / "tiny"
    model, processor = tiny_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    port, server_port = free_port(), free_port()
    command = [sys.executable, "-m", "florence_vl", "web", "--model", str(folder), "--port", str(port)]
    command += ["--server-port", str(server_port)]
    process = subprocess.Popen(command, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "florence-vl web ended"
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture
def browser_page(page_address):
    """A page that fails on requests beyond loopback and on console errors."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    outside, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags, "--disable-component-update"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda r: None if _is_local(r.url) else outside.append(r.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_address)
        page.get_by_role("tab", name="Chat").wait_for()
        yield page
        browser.close()
    assert outside == []
    assert errors == []


def _is_local(url: str) -> bool:
    return url.startswith(("data:", "blob:", "http://127.0.0.1", "ws://127.0.0.1"))


def upload(page, path):
    page.locator("input[type=file]:visible, input[type=file]").first.set_input_files(str(path))


@pytest.fixture
def picture(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.browser
def test_ask_stream_and_stop(browser_page, picture):
    page = browser_page
    upload(page, picture)
    page.locator("img[src*='picture']").first.wait_for()
    box = page.get_by_label("Question").first
    box.fill("What is shown?")
    box.press("Enter")
    page.get_by_text("answer tokens").first.wait_for(timeout=60_000)
    assert "prompt tokens" in page.content()
    box.fill("And now?")
    box.press("Enter")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_function("!document.body.innerText.includes('answer tokens')")


@pytest.mark.browser
def test_features_attribution_and_comparison(browser_page, picture):
    page = browser_page
    page.get_by_role("tab", name="What it sees").click()
    page.locator("input[type=file]").nth(1).set_input_files(str(picture))
    page.locator("img[src*='picture']:visible").first.wait_for()
    page.get_by_role("button", name="Look").click()
    page.locator("text=grounding >> visible=true").first.wait_for(timeout=60_000)
    page.get_by_label("Your own prompt").press_sequentially("Where is it?")
    page.locator("text=start it with --prompt-tokenizer >> visible=true").first.wait_for(timeout=60_000)
    page.get_by_role("tab", name="Why").click()
    page.locator("input[type=file]").nth(2).set_input_files(str(picture))
    page.locator("img[src*='picture']:visible").first.wait_for()
    page.get_by_label("Answer to explain").fill("A red car.")
    page.get_by_role("button", name="Explain").click()
    page.locator("text=ocr >> visible=true").first.wait_for(timeout=60_000)
    before = page.locator("#gain table").inner_text()
    page.get_by_role("radio", name="red").check()
    page.wait_for_function("before => document.querySelector('#gain table').innerText != before", arg=before)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_function("(document.body.innerText.match(/answer tokens/g) || []).length == 2", timeout=60_000)


@pytest.mark.browser
def test_a_broken_file_is_told(browser_page, tmp_path):
    page = browser_page
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not a picture")
    upload(page, tmp_path / "broken.png")
    box = page.get_by_label("Question").first
    box.fill("What is shown?")
    box.press("Enter")
    told = page.locator(".toast-body >> visible=true").first.inner_text(timeout=30_000)
    assert "cannot identify image file" in told
