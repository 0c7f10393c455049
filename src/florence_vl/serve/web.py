"""A web page for OpenAI-compatible servers: chat, feature maps, attribution, and two servers side by side.

The page loads no model: it is a client of the HTTP API in a separate process. The tabs for features and attribution
appear if the server has `/v1/features` and `/v1/attribution`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from florence_vl.model.pictures import data_url, open_image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

MAX_UPLOAD = "16mb"
PNG_PIXELS = 1 << 20
"""Larger pictures are sent as JPEG, so that a conversation about several stays below a server's limit."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
        url: Its URL without `/v1`.
        key: Its API key; empty if there is none.
    """

    url: str
    key: str = ""

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """The JSON response to a JSON request.

        Raises:
            ValueError: The server rejected it, or is not reachable; the message is the server's own.
        """
        try:
            with urllib.request.urlopen(self._request(path, body), timeout=timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ValueError(_message(error.read(), error.code)) from None
        except OSError as error:
            raise ValueError(f"no answer from {self.url}: {error}") from None

    def _request(self, path: str, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key or 'none'}"}
        return urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)

    def client(self) -> Any:
        """The official client for this server."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def models(self) -> list[str]:
        """Names of its models.

        Raises:
            ValueError: The server is not reachable.
        """
        import openai

        try:
            return [model.id for model in self.client().models.list()]
        except openai.OpenAIError as error:
            raise ValueError(f"no models from {self.url}: {error}") from None

    def has(self, path: str) -> bool:
        """Whether the server has a path: an empty POST gives another status than 404."""
        try:
            urllib.request.urlopen(self._request(path, {}), timeout=10)
        except urllib.error.HTTPError as error:
            return error.code not in (404, 405)
        except OSError:
            return False
        return True


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}"


@lru_cache(maxsize=8)
def picture_url(path: str) -> str:
    """An uploaded picture as a `data:` URL, encoded once: gradio's paths contain the hash of the file.

    Raises:
        ValueError: The file is not a readable picture.
    """
    picture = open_image(path, name="the picture")
    return data_url(picture, "png" if picture.width * picture.height <= PNG_PIXELS else "jpeg")


def from_data_url(url: str) -> Image.Image:
    """The picture of a `data:` URL from this server."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def to_messages(history: Sequence[dict[str, Any]], question: str, picture: str | None) -> list[dict[str, Any]]:
    """The request's messages: earlier turns unchanged, and the new question with its picture.

    Args:
        history: `{"role", "text", "image"}` per turn; `image` is a `data:` URL or None.
        question: The new text.
        picture: The `data:` URL of the new picture, or None.
    """

    def turn(role: str, text: str, image: str | None) -> dict[str, Any]:
        if image is None:
            return {"role": role, "content": text}
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
        return {"role": role, "content": parts}

    earlier = [turn(item["role"], item["text"], item.get("image")) for item in history]
    return [*earlier, turn("user", question, picture)]


def stream_answer(
    server: Server, model: str, messages: list[dict[str, Any]], **options: Any
) -> Iterator[tuple[str, str]]:
    """The answer so far and a line on its speed, repeatedly.

    Raises:
        ValueError: The server rejected the request.
    """
    import openai

    text, status, started = "", "", time.monotonic()
    first = None
    try:
        stream = server.client().chat.completions.create(
            model=model, messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
        with stream:
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    first = first or time.monotonic()
                    text += chunk.choices[0].delta.content
                if chunk.usage is not None:
                    status = _speed(chunk.usage, started, first)
                yield text, status
    except openai.APIStatusError as error:
        body = error.response.read() if not error.response.is_closed else error.response.content
        raise ValueError(_message(body, error.status_code)) from None
    except openai.OpenAIError as error:
        raise ValueError(f"no answer from {server.url}: {error}") from None


def _speed(usage: Any, started: float, first: float | None) -> str:
    now = time.monotonic()
    count = usage.completion_tokens
    rate = f", {(count - 1) / (now - first):.1f} tokens/s" if first is not None and count > 1 and now > first else ""
    details = getattr(usage, "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None) or 0
    return (
        f"{usage.prompt_tokens} prompt tokens ({cached} cached), {count} answer tokens{rate}; "
        f"first token after {(first or now) - started:.2f} s"
    )


def build_page(servers: Sequence[Server], examples: Sequence[str] = ()) -> Any:
    """The page.

    Args:
        servers: One server, or two to compare.
        examples: Picture files offered in the chat.

    Raises:
        ValueError: A server is not reachable.
    """
    import gradio as gr

    names = [server.models() for server in servers]
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with gr.Blocks(title="Florence-VL", analytics_enabled=False) as page:
        gr.Markdown("# Florence-VL")
        with gr.Tab("Chat"):
            _chat_tab(gr, servers[0], names[0], examples)
        if servers[0].has("/v1/features"):
            with gr.Tab("What it sees"):
                _features_tab(gr, servers[0], names[0], examples)
        if servers[0].has("/v1/attribution"):
            with gr.Tab("Why"):
                _attribution_tab(gr, servers[0], names[0], examples)
        with gr.Tab("Compare"):
            _compare_tab(gr, servers, names, examples)
    page.florence_vl_theme = theme
    return page


def _controls(gr: Any, names: list[str]) -> tuple[Any, Any, Any, Any]:
    with gr.Accordion("Options", open=False):
        model = gr.Dropdown(names, value=names[0], label="Model", interactive=True)
        tokens = gr.Slider(1, 512, value=128, step=1, label="Answer tokens at most")
        temperature = gr.Slider(0, 1.5, value=0, step=0.05, label="Temperature")
        seed = gr.Number(0, label="Seed", precision=0)
    return model, tokens, temperature, seed


def _options(tokens: float, temperature: float, seed: float) -> dict[str, Any]:
    return {"max_tokens": int(tokens), "temperature": float(temperature), "seed": int(seed)}


def _picture(gr: Any, examples: Sequence[str]) -> Any:
    picture = gr.Image(type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"], height=320)
    if examples:
        gr.Examples([[path] for path in examples], [picture], label="Pictures", cache_examples=False)
    return picture


def _chat_tab(gr: Any, server: Server, names: list[str], examples: Sequence[str]) -> None:
    turns = gr.State([])
    sent = gr.State(None)  # the picture that is already in the conversation
    with gr.Row():
        with gr.Column(scale=1):
            picture = _picture(gr, examples)
            model, tokens, temperature, seed = _controls(gr, names)
        with gr.Column(scale=2):
            chat = gr.Chatbot(label="Conversation", height=420)
            question = gr.Textbox(label="Question", placeholder="What is shown in the picture?", submit_btn=True)
            status = gr.Markdown("")
            with gr.Row():
                stop = gr.Button("Stop", variant="stop")
                clear = gr.Button("New conversation")

    def ask(text, image, turns, sent, model, tokens, temperature, seed):  # type: ignore[no-untyped-def]
        if not text or not text.strip():
            raise gr.Error("Type a question.", print_exception=False)
        try:
            url = picture_url(image) if image is not None else None
            new = url if url != sent else None
            messages = to_messages(turns, text, new)
            turns = [*turns, {"role": "user", "text": text, "image": new}]
            shown = [{"role": turn["role"], "content": turn["text"]} for turn in turns]
            for answer, line in stream_answer(server, model, messages, **_options(tokens, temperature, seed)):
                done = [*turns, {"role": "assistant", "text": answer}]
                yield [*shown, {"role": "assistant", "content": answer}], line, done, url or sent, ""
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    inputs = [question, picture, turns, sent, model, tokens, temperature, seed]
    running = question.submit(ask, inputs, [chat, status, turns, sent, question], concurrency_limit=4)
    stop.click(None, cancels=[running])
    clear.click(lambda: ([], "", [], None), None, [chat, status, turns, sent], cancels=[running])


def _features_tab(gr: Any, server: Server, names: list[str], examples: Sequence[str]) -> None:
    gr.Markdown("The first three principal components of each prompt's features, in one shared basis.")
    with gr.Row():
        with gr.Column(scale=1):
            picture = _picture(gr, examples)
            model = gr.Dropdown(names, value=names[0], label="Model")
            prompt = gr.Textbox(label="Your own prompt", placeholder="Where is the dog?", max_length=200)
            look = gr.Button("Look", variant="primary")
        with gr.Column(scale=2):
            gallery = gr.Gallery(label="Features", columns=2, height="auto")
            note = gr.Markdown("")

    def show(image, model, prompt):  # type: ignore[no-untyped-def]
        body = {"model": model, "format": "picture"}
        told = ""
        try:
            found = _ask(server, "/v1/features", image, {**body, **({"prompts": [prompt]} if prompt.strip() else {})})
        except ValueError as error:
            if not prompt.strip() or image is None:
                raise gr.Error(str(error), print_exception=False) from None
            told = str(error)
            found = _post(gr, server, "/v1/features", image, body)
        size = _shown_size(from_data_url(picture_url(image)))
        return [
            (from_data_url(feature["picture"]).resize(size, Image.Resampling.NEAREST), name)
            for name, feature in found["features"].items()
        ], told

    look.click(show, [picture, model, prompt], [gallery, note])
    # While one prompt is computed, only the last one that was typed since waits.
    prompt.input(
        lambda image, model, prompt: show(image, model, prompt) if image is not None else ([], ""),
        [picture, model, prompt],
        [gallery, note],
        trigger_mode="always_last",
        show_progress="hidden",
    )


WHOLE = "the whole answer"


def word_choices(words: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """(label, index) of the whole answer, -1, and of each word."""
    return [(WHOLE, -1), *((word["text"], index) for index, word in enumerate(words))]


def gains(found: dict[str, Any], index: int) -> dict[str, float]:
    """By how many nats each feature makes the whole answer (-1) or one of its words likelier."""
    if index < 0:
        return {part["name"]: part["drop"] for part in found["features"]}
    return dict(found["words"][index]["drops"])


def _attribution_tab(gr: Any, server: Server, names: list[str], examples: Sequence[str]) -> None:
    gr.Markdown("Contribution of each feature to the likelihood of an answer or a word, and its place in the picture.")
    state = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1):
            picture = _picture(gr, examples)
            model = gr.Dropdown(names, value=names[0], label="Model")
            question = gr.Textbox(label="Question", value="What is shown in the picture?")
            answer = gr.Textbox(label="Answer to explain", placeholder="the model's own when empty")
            ask = gr.Button("Explain", variant="primary")
        with gr.Column(scale=2):
            words = gr.Radio([], label="Explain", visible=False)
            gain = gr.Markdown("", elem_id="gain")
            shares = gr.Label(label="Share of each feature in the image tokens")
            maps = gr.Gallery(label="Where", columns=2, height="auto")

    def rows(found, index):  # type: ignore[no-untyped-def]
        lines = [f"| {name} | {nats:+.3f} |" for name, nats in gains(found, index).items()]
        return "\n".join(["| feature | makes it likelier by (nats) |", "|---|---|", *lines])

    def explain(image, model, question, answer):  # type: ignore[no-untyped-def]
        body = {"model": model, "question": question, "answer": answer.strip() or None}
        found = _post(gr, server, "/v1/attribution", image, body)
        parts = found["features"]
        return (
            {"features": parts, "words": found["words"]},
            gr.Radio(word_choices(found["words"]), value=-1, label=found["answer"], visible=True),
            rows(found, -1),
            {part["name"]: part["share"] for part in parts},
            [(heat_map(from_data_url(picture_url(image)), part["map"]), part["name"]) for part in parts],
        )

    ask.click(explain, [picture, model, question, answer], [state, words, gain, shares, maps])
    words.input(rows, [state, words], gain)


def _ask(server: Server, path: str, image: str | None, body: dict[str, Any]) -> dict[str, Any]:
    if image is None:
        raise ValueError("Choose a picture.")
    return server.post(path, {**body, "image": picture_url(image)})


def _post(gr: Any, server: Server, path: str, image: str | None, body: dict[str, Any]) -> dict[str, Any]:
    try:
        return _ask(server, path, image, body)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _shown_size(picture: Image.Image, side: int = 320) -> tuple[int, int]:
    scale = side / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def heat_map(picture: Image.Image, values_HW: Sequence[Sequence[float]]) -> Image.Image:
    """A picture in gray with a heat map: red at the maximum, without color at the minimum.

    Args:
        picture: RGB picture.
        values_HW: Rows of numbers.
    """
    size = _shown_size(picture)
    values = np.asarray(values_HW, dtype=np.float32)
    values = (values - values.min()) / ((values.max() - values.min()) or 1.0)
    heat = Image.fromarray((values * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    gray = np.asarray(picture.convert("L").resize(size), dtype=np.float32)[..., None].repeat(3, -1)
    weight = 0.75 * np.asarray(heat, dtype=np.float32)[..., None] / 255
    red = np.array([230.0, 40.0, 30.0], dtype=np.float32)
    return Image.fromarray((gray * (1 - weight) + red * weight).round().astype(np.uint8))


def _compare_tab(gr: Any, servers: Sequence[Server], names: list[list[str]], examples: Sequence[str]) -> None:
    pairs = [(server, model) for server, found in zip(servers, names, strict=True) for model in found]
    known = {f"{model} at {server.url}": (server, model) for server, model in pairs}
    labels = list(known)
    with gr.Row():
        with gr.Column(scale=1):
            picture = _picture(gr, examples)
            question = gr.Textbox(label="Question", value="What is shown in the picture?")
            tokens = gr.Slider(1, 512, value=128, step=1, label="Answer tokens at most")
            seed = gr.Number(0, label="Seed", precision=0)
            ask = gr.Button("Compare", variant="primary")
        with gr.Column(scale=1):
            left = gr.Dropdown(labels, value=labels[0], label="Left")
            left_text, left_line = gr.Textbox(label="Answer", lines=8), gr.Markdown("")
        with gr.Column(scale=1):
            right = gr.Dropdown(labels, value=labels[-1], label="Right")
            right_text, right_line = gr.Textbox(label="Answer", lines=8), gr.Markdown("")

    def run(which, image, question, tokens, seed):  # type: ignore[no-untyped-def]
        server, model = known[which]
        try:
            url = picture_url(image) if image is not None else None
            yield from stream_answer(server, model, to_messages([], question, url), **_options(tokens, 0, seed))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    for which, outputs in ((left, [left_text, left_line]), (right, [right_text, right_line])):
        ask.click(run, [which, picture, question, tokens, seed], outputs, concurrency_limit=4)


def launch(page: Any, host: str = "127.0.0.1", port: int = 7860, block: bool = True) -> Any:
    """Serve the page; nothing is shared outside the host.

    Returns:
        The result of gradio's `launch`.
    """
    return page.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        max_file_size=MAX_UPLOAD,
        prevent_thread_lock=not block,
        theme=page.florence_vl_theme,
    )
