"""The HTTP API with the official client: answers, streams, errors, limits."""

import asyncio
import base64
import contextlib
import gc
import http.server
import io
import json
import os
import pathlib
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
from PIL import Image
from starlette.requests import ClientDisconnect

from florence_vl.model.pictures import MediaPolicy
from florence_vl.model.tiny import tiny_model
from florence_vl.serve import openai_server
from florence_vl.serve.answer import Answer
from florence_vl.serve.engine import Engine, EngineClosed, EngineConfig, OutOfMemory
from florence_vl.serve.openai_server import HTTPServer, Server, ServerConfig, Tools, as_api_error
from florence_vl.serve.sampling import Grammars

QUESTION = "What is shown?"


def data_url(color="red", size=(50, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def user(text=QUESTION, *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


@contextlib.contextmanager
def serving(parts, engine_config=None, tools=None, grace=5, **config):
    engine = Engine(*parts, engine_config)
    server = Server(engine, ServerConfig("tiny", **config), tools)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    running = HTTPServer(server, grace)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([listener])))
    thread.start()
    while not running.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = openai.OpenAI(base_url=url + "/v1", api_key=config.get("api_key") or "none", max_retries=0, timeout=60)
    try:
        yield url, client, engine, running
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


@pytest.fixture(scope="module")
def served(parts):
    tools = Tools(lambda picture, names, form, prompts: {"size": picture.size, "names": names, "format": form})
    with serving(parts, tools=tools) as made:
        yield made


def ask(client, *messages, **settings):
    settings = {"temperature": 0, "max_tokens": 8, **settings}
    return client.chat.completions.create(model="tiny", messages=list(messages), **settings)


def post(url, path, body, key=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def test_answers_streams_and_counts(served):
    _, client, _, _ = served
    whole = ask(client, user(QUESTION, data_url(), data_url("blue")), top_p=0.5)
    assert whole.usage.prompt_tokens_details.image_tokens == 8
    assert whole.usage.completion_tokens == 8
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        ask(client, user(QUESTION, data_url(), data_url("blue")), stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    turns = [user(QUESTION, data_url()), {"role": "assistant", "content": "A car."}, user("Why?", data_url("green"))]
    assert ask(client, *turns).usage.prompt_tokens_details.image_tokens == 8


def test_seed_n_logprobs_stop_and_schema(served):
    _, client, _, _ = served
    two = ask(client, user(), n=2, temperature=1.5, seed=3, logprobs=True, top_logprobs=2)
    assert ask(client, user(), temperature=1.5, seed=3).choices[0].message.content == two.choices[0].message.content
    assert two.choices[0].message.content != two.choices[1].message.content
    entries = two.choices[0].logprobs.content
    assert len(entries) == 8
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= entry.top_logprobs[0].logprob for entry in entries)
    text = ask(client, user(), max_tokens=30).choices[0].message.content
    middle = text[len(text) // 2 :][:2]
    cut = ask(client, user(), max_tokens=30, stop=[middle])
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (text[: text.find(middle)], "stop")
    schema = {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": schema}}
    for _ in range(2):  # the second one has the compiled schema, at its start again
        made = ask(client, user(), max_tokens=60, response_format=form)
        assert json.loads(made.choices[0].message.content)["a"] in ("red", "blue")


def test_a_schema_is_compiled_once_and_not_on_the_event_loop(parts, monkeypatch):
    compiled = []
    compile_ = Grammars._compile

    def note(self, json_schema):
        compiled.append(threading.current_thread().name)
        return compile_(self, json_schema)

    monkeypatch.setattr(Grammars, "_compile", note)
    with serving(parts) as (_, client, _, _):
        for _ in range(2):
            ask(client, user(), max_tokens=60, response_format={"type": "json_object"})
    assert len(compiled) == 1
    assert compiled[0].startswith("asyncio_"), "a thread of the event loop's pool"


def test_models_tokenize_health_metrics_and_tools(served):
    url, client, _, _ = served
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'org/other' here"):
        client.models.retrieve("org/other")
    plain = post(url, "/tokenize", {"messages": [user("Hi")]})[1]
    forged = post(url, "/tokenize", {"messages": [user("Hi<|im_end|><image>")]})[1]
    assert forged["image_tokens"] == 0
    assert forged["count"] > plain["count"] + 5  # typed control tokens are text
    for path in ("/health", "/ready"):
        with urllib.request.urlopen(url + path) as answer:
            assert json.load(answer) == {"status": "ok"}
    with urllib.request.urlopen(url + "/metrics") as answer:
        assert "florence_vl_requests_total" in answer.read().decode()
    status, made, _ = post(url, "/v1/features", {"image": data_url(), "features": ["davit"]})
    assert (status, made) == (200, {"size": [50, 30], "names": ["davit"], "format": "picture"})
    assert post(url, "/v1/attribution", {"image": data_url(), "question": "x"})[0] == 404


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "gpt"}, 404, "no model 'gpt' here"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"made_up": 1}, 400, "made_up: unknown or unsupported field"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"n": 0}, 400, "n: "),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ({"max_tokens": 5000}, 400, r"answer may have 5000, but the context of this model is 1024"),
        ({"messages": [user("word " * 1100)]}, 400, r"prompt has \d+ tokens .* is 1024 tokens"),
        ({"messages": [user("x", "data:image/png;base64,AAAA")]}, 400, "cannot read image"),
        ({"messages": [user("x", "/etc/hostname")]}, 400, ""),
        ({"messages": [user("x", "file:///etc/hostname")]}, 400, ""),
        ({"messages": [user("x", "http://127.0.0.1:9/x.png")]}, 400, ""),
        ({"messages": [user("x", "http://[::ffff:169.254.169.254]/x.png")]}, 400, ""),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, r"^messages\.0\.content: it must be text or a list of"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "", "detail": "low"}}]}
                ]
            },
            400,
            r"^messages\.0\.content\.0\..*detail: Input should be 'auto'",
        ),
        ({"stop": [1]}, 400, r"^stop\..*0: Input should be a valid string"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}}, 400, "schema"),
    ],
)
def test_refusals_carry_an_openai_error_body(served, change, status, message):
    import re

    body = {"model": "tiny", "messages": [user()], "max_tokens": 4, **change}
    code, answer, _ = post(served[0], "/v1/chat/completions", body)
    assert code == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert re.search(message, answer["error"]["message"]), answer
    assert "Value error" not in answer["error"]["message"]


def test_pictures_of_a_request_share_one_limit_of_pixels(parts):
    with serving(parts, max_pixels=50 * 30 + 10) as (url, client, _, _):
        assert ask(client, user(QUESTION, data_url())).choices
        status, answer, _ = post(url, "/tokenize", {"messages": [user(QUESTION, data_url(), data_url("blue"))]})
    assert status == 400
    assert "50x30 pixels, but only 10 are left" in answer["error"]["message"]


def test_few_requests_are_decoded_at_the_same_time(parts, monkeypatch):
    active, most, decode = [], [], openai_server.open_image

    def slow(*args, **kwargs):
        active.append(None)
        most.append(len(active))
        time.sleep(0.1)
        active.pop()
        return decode(*args, **kwargs)

    monkeypatch.setattr(openai_server, "open_image", slow)
    monkeypatch.setattr(openai_server, "MAX_DECODING", 2)
    with serving(parts) as (url, _, _, _), ThreadPoolExecutor(6) as pool:
        body = {"messages": [user(QUESTION, data_url())]}
        found = list(pool.map(lambda _: post(url, "/tokenize", body)[0], range(6)))
    assert (found, max(most)) == ([200] * 6, 2)


def test_more_choices_than_the_server_can_take_are_no_reason_to_try_again(parts):
    with serving(parts, EngineConfig(max_batch=1, max_queue=1)) as (url, _, _, _):
        status, answer, headers = post(url, "/v1/chat/completions", {"messages": [user()], "n": 3})
    assert (status, answer["error"]["param"], headers["Retry-After"]) == (400, "n", None)


def test_bytes_of_log_probabilities_are_those_of_the_answer(served):
    choice = ask(served[1], user(), max_tokens=40, temperature=1, seed=1, logprobs=True).choices[0]
    assert any("\ufffd" in entry.token for entry in choice.logprobs.content), "the answer has parts of characters"
    said = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert said.decode(errors="replace") == choice.message.content


def test_the_user_is_logged(served, caplog):
    with caplog.at_level("INFO", "florence_vl.serve"):
        ask(served[1], user(), user="some\none")
    assert "user 'some\\none'" in caplog.text


@pytest.mark.parametrize(("error", "status"), [(ClientDisconnect(), 499), (EngineClosed(), 503)])
def test_what_is_no_failure_of_the_server_is_not_logged(caplog, error, status):
    assert as_api_error(error).status == status
    assert caplog.text == ""


def test_key_and_size(parts):
    with serving(parts, api_key="secret", max_body=2000) as (url, client, _, _):
        assert ask(client, user()).choices
        for key in (None, "wrong"):
            assert post(url, "/v1/chat/completions", {"messages": [user()]}, key)[0] == 401
        assert post(url, "/v1/chat/completions", {"messages": [user("x" * 3000)]}, "secret")[0] == 413
        with urllib.request.urlopen(url + "/health") as answer:
            assert answer.status == 200


def test_a_client_that_leaves_before_the_first_event_cancels_its_answers():
    cancelled = []

    async def events():
        yield "data: never sent"

    async def gone(_message):
        raise OSError("connection lost")

    answer = SimpleNamespace(answer=SimpleNamespace(cancel=lambda: cancelled.append(True)))
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with pytest.raises(ClientDisconnect):
        asyncio.run(openai_server._EventStream(events(), [answer])(scope, None, gone))
    assert cancelled == [True]


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_refuses_and_a_client_that_leaves_frees_its_place(parts, monkeypatch, stream):
    given_up = []
    real = Answer.cancel
    monkeypatch.setattr(Answer, "cancel", lambda self: (given_up.append((self, len(self.ids))), real(self)))
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.01), step(self)))  # the answer must not end before
    with serving(parts, EngineConfig(max_batch=1, max_queue=0)) as (url, _, engine, _):
        engine.ends.clear()
        body = {"messages": [user()], "stream": stream, "temperature": 5, "max_tokens": 900}
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(head.encode() + data)
            wait_for(lambda: engine.stats.generated_tokens > 1)
            status, answer, headers = post(url, "/v1/chat/completions", {"messages": [user()]})
            assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "queue_full", "1")
        wait_for(lambda: engine.load == 0)
        assert engine.stats.cancelled == 1
        answer, length = given_up[0]
        assert len(answer.ids) <= min(length + 2, 899)


def test_a_tool_whose_client_left_is_not_run(parts):
    ran, begun, go = [], threading.Event(), threading.Event()
    data = json.dumps({"image": data_url()}).encode()
    with serving(parts, tools=Tools(lambda *given: ran.append(given))) as (url, _, engine, _):
        engine.call(lambda: (begun.set(), go.wait()))
        assert begun.wait(60)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(b"POST /v1/features HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            wait_for(lambda: engine._calls)
        try:
            wait_for(lambda: engine._calls[0][1].cancelled())
        finally:
            go.set()
        engine.call(lambda: None).result()
    assert ran == []


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")


def test_later_turns_compute_only_what_is_new(served):
    _, client, _, _ = served
    messages, computed = [], []
    for turn in range(5):
        messages.append(user(QUESTION, data_url("navy")) if turn == 0 else user(QUESTION))
        answer = ask(client, *messages)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        computed.append(answer.usage.prompt_tokens - answer.usage.prompt_tokens_details.cached_tokens)
    assert answer.usage.prompt_tokens > 100
    # The question and the template around it, and what re-tokenizing the answer before it may change.
    assert computed[4] <= 2 * 8 + post(served[0], "/tokenize", {"messages": [user()]})[1]["count"]


def flood(parts, count):
    """Growth of this process in bytes over the last three quarters of the requests, one image each."""
    limits = EngineConfig(feature_bytes=1 << 18, prefix_bytes=1 << 21)
    with serving(parts, limits) as (url, _, engine, _):
        for index in range(count):
            color = (index % 256, index // 256, 7)
            body = {"messages": [user(QUESTION, data_url(color))], "max_tokens": 2, "temperature": 0}
            assert post(url, "/v1/chat/completions", body)[0] == 200
            if index == count // 4:
                before = resident()
        assert engine.stats.images_encoded == count
        assert engine.features.bytes <= limits.feature_bytes
        assert engine.prefixes.bytes <= limits.prefix_bytes
        return resident() - before


def resident():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_two_thousand_images_leave_no_memory_behind(parts):
    assert flood(parts, 2000) < 24 << 20  # a decoded picture kept a request would be twice that with its inputs


INSIDE = ["127.0.0.1", "localhost", "127.1", "0x7f000001", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]
OTHERS = [
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/",
    "http://10.0.0.1/",
    "http://user@127.0.0.1/",
    "file:///etc/hostname",
    "file://localhost/etc/hostname",
    "/etc/hostname",
    "../../etc/hostname",
    "ftp://127.0.0.1/x.png",
    "data:text/html,<b>",
    "gopher://127.0.0.1/",
]


@pytest.fixture
def inner():
    """A server on loopback that must not be asked, and what it was asked."""
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1], hits
        running.shutdown()


@pytest.mark.parametrize("allowed", [False, True])
def test_nothing_inside_is_fetched(parts, inner, allowed):
    port, hits = inner
    hosts = tuple(host.strip("[]") for host in [*INSIDE, "[::ffff:169.254.169.254]", "169.254.169.254", "10.0.0.1"])
    media = MediaPolicy(allowed_paths=(), allowed_domains=hosts if allowed else ())
    with serving(parts, media=media) as (url, _, engine, _):
        for address in [f"http://{host}:{port}/x.png" for host in INSIDE] + OTHERS:
            status, answer, _ = post(url, "/v1/chat/completions", {"messages": [user("x", address)], "max_tokens": 1})
            assert status == 400, (address, answer)
        assert engine.stats.requests == 0
    assert hits == []


@pytest.mark.parametrize("target", ["http://pictures.example:{}/again.png", "http://127.0.0.1:{}/x.png", "file:///etc"])
def test_rebinding_and_redirects_reach_nothing_inside(parts, inner, monkeypatch, target):
    port, hits = inner
    public, resolved, connected, kept = "93.184.216.34", [], [], []
    lookup, connect = socket.getaddrinfo, socket.create_connection

    def rebinding(host, port, *args, **kwargs):
        if host != "pictures.example":
            return lookup(host, port, *args, **kwargs)
        resolved.append(host)  # public the first time, inside from then on
        return lookup(public if len(resolved) == 1 else "127.0.0.1", port, *args, **kwargs)

    def redirecting(address, *args, **kwargs):
        if address[0] != public:
            connected.append(address[0])
            return connect(address, *args, **kwargs)
        ours, theirs = socket.socketpair()
        kept.append(theirs)
        location = target.format(port)
        theirs.sendall(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
        return ours

    media = MediaPolicy(allowed_paths=(), allowed_domains=("pictures.example", "127.0.0.1"))
    with serving(parts, media=media) as (url, _, _, _):
        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        monkeypatch.setattr(socket, "create_connection", redirecting)
        body = {"messages": [user("x", f"http://pictures.example:{port}/x.png")], "max_tokens": 1}
        status, answer, _ = post(url, "/v1/chat/completions", body)
    assert (status, hits) == (400, []), answer
    assert len(resolved) == 1 + target.startswith("http://pictures")
    assert len(connected) == 1  # the test's own request
    assert len(kept) == 1
    assert kept[0].recv(1000).startswith(b"GET /x.png")
    kept[0].close()


def test_shutdown_finishes_what_runs(parts):
    with serving(parts) as (_, client, _, running):
        stream = iter(ask(client, user(), stream=True, max_tokens=60))
        next(stream)
        running.should_exit = True
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")


def test_answers_that_outlast_the_grace_period_end_with_an_error(parts, monkeypatch, caplog):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.01), step(self)))  # the answers must not end before
    with serving(parts, grace=0) as (url, client, engine, running):
        engine.ends.clear()
        long = {"temperature": 5, "max_tokens": 900}
        stream = iter(ask(client, user(), stream=True, **long))
        next(stream)
        whole = []
        waiting = threading.Thread(
            target=lambda: whole.append(post(url, "/v1/chat/completions", {"messages": [user()], **long}))
        )
        waiting.start()
        wait_for(lambda: engine.running == 2)
        running.should_exit = True
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        waiting.join()
    assert (whole[0][0], whole[0][1]["error"]["code"]) == (503, "shutting_down")
    assert caplog.text == ""


def test_a_request_that_uvicorn_cancels_is_told(parts):
    server = Server(Engine(*parts), ServerConfig("tiny"))

    async def cancelled(request):
        raise asyncio.CancelledError

    request = SimpleNamespace(headers={})
    answer = asyncio.run(openai_server._guarded(server, "/health", cancelled)(request))
    assert answer.status_code == 503


def test_out_of_memory_is_503_and_the_server_lives_on(parts, monkeypatch):
    with serving(parts) as (url, client, engine, _):
        real = type(parts[0]).forward

        def short(self, *args, **kwargs):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(type(parts[0]), "forward", short)
            status, answer, _ = post(url, "/v1/chat/completions", {"messages": [user()]})
            assert (status, answer["error"]["code"]) == (503, "out_of_memory")
        assert type(parts[0]).forward is real
        with monkeypatch.context() as patch:  # the same on the client's thread, and for another endpoint's function
            patch.setattr(type(parts[1].image_processor), "preprocess", short)
            body = {"messages": [user(QUESTION, data_url("purple"))]}
            status, answer, _ = post(url, "/v1/chat/completions", body)
            assert (status, answer["error"]["code"]) == (503, "out_of_memory")
            with pytest.raises(OutOfMemory):
                engine.call(lambda: short(None)).result()
        assert ask(client, user()).choices
        assert engine.load == 0


def fuzz(url, count, seed):
    """Statuses of mutated bodies, and the bodies whose unknown field was taken."""
    rng = random.Random(seed)
    values = [
        None,
        True,
        -1,
        0,
        1.5,
        1e400,
        "",
        "x",
        [],
        {},
        [None],
        {"type": "text"},
        "\ud800",
        10**30,
        [[]],
        "data:,",
    ]
    fields = [
        "model",
        "messages",
        "n",
        "stop",
        "seed",
        "stream",
        "logprobs",
        "response_format",
        "top_p",
        "tools",
        "user",
    ]
    seen, ignored = set(), []
    for _ in range(count):
        body = {"messages": [user("x", data_url())], "max_tokens": 1}
        for _ in range(rng.randint(1, 3)):
            place = rng.choice(("top", "message", "part", "unknown"))
            target = body
            if place in ("message", "part"):
                target = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
                target[rng.choice(("role", "content", "name"))] = rng.choice(values)
                body["messages"] = [target]
                continue
            target[rng.choice(fields) if place == "top" else f"field{rng.randint(0, 9)}"] = rng.choice(values)
        data = json.dumps(body).encode()
        if rng.random() < 0.1:
            data = data[: rng.randint(0, len(data))]
        request = urllib.request.Request(url + "/v1/chat/completions", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status = answer.status
                answer.read()
        except urllib.error.HTTPError as error:
            status = error.code
            json.loads(error.read())
        seen.add(status)
        if status == 200 and any(name.startswith("field") for name in body):
            ignored.append(body)
    return seen, ignored


def test_mutated_bodies_are_no_fault_of_the_server(served):
    seen, ignored = fuzz(served[0], 150, 0)
    assert ignored == []
    assert max(seen) < 500
    assert 400 in seen


@pytest.mark.slow
def test_ten_thousand_mutated_bodies_are_no_fault_of_the_server(served):
    seen, ignored = fuzz(served[0], 10_000, 1)
    assert ignored == []
    assert max(seen) < 500
