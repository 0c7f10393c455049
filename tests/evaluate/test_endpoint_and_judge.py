"""Endpoints that fail, and judges whose replies are parsed strictly and never guessed."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from florence_vl.cli.main import main
from florence_vl.evaluate.answer import Answer
from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.endpoint import (
    JUDGE_KEY_VARIABLE,
    KEY_VARIABLE,
    ChatEndpoint,
    EndpointAnswerer,
    EndpointError,
    message_content,
)
from florence_vl.evaluate.judge import Judge, fill
from florence_vl.evaluate.metrics import Verdict
from florence_vl.evaluate.question import IMAGE, BytesPicture, Question
from florence_vl.evaluate.runner import judge_answers, open_results, plan, run
from florence_vl.evaluate.scoring import compare_runs, score_folder
from florence_vl.evaluate.store import ResultsFolder
from florence_vl.evaluate.suites import choose

Reply = Callable[[dict[str, Any]], tuple[int, Any]]


class Server:
    """An OpenAI-compatible server in a thread."""

    def __init__(self, reply: Reply, models: tuple[str, ...] = ("served",), location: str | None = None) -> None:
        self.reply, self.models = reply, models
        self.headers: list[dict[str, str]] = []
        self.seen: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": name} for name in outer.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append(body)
                outer.headers.append(dict(self.headers))
                self._send(*outer.reply(body))

            def _send(self, code: int, value: Any) -> None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                if location is not None:
                    self.send_header("Location", location)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def said(text: str, finish: str = "stop") -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(reply: Reply, **options: Any) -> Server:
        servers.append(Server(reply, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def client(server: Server, **options: Any) -> ChatEndpoint:
    return ChatEndpoint(server.url, sleep=lambda seconds: None, **options)


QUESTION = Question("1", "b", (IMAGE, "What?"), (BytesPicture(b"\x89PNG picture"),))


def test_a_question_as_openai_has_it(serve: Callable[..., Server]) -> None:
    server = serve(lambda body: said("a cat", "length"))
    (answer,) = EndpointAnswerer(client(server), 2).answer([QUESTION], Generation(7))
    assert answer == Answer("a cat", finished=False)
    (body,) = server.seen
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("served", 7, 0.0)
    image, text = body["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")) == b"\x89PNG picture"
    assert text == {"type": "text", "text": "What?"}


def test_other_formats_are_sent_as_png(benchmark_tables: dict[str, Any]) -> None:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "BMP")
    question = Question("1", "b", (IMAGE, "What?"), (BytesPicture(file.getvalue()),))
    assert message_content(question)[0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_failures_are_retried(serve: Callable[..., Server]) -> None:
    codes = iter([(500, b"down"), (429, b"slow down"), (200, b"<html>")])
    server = serve(lambda body: next(codes, said("yes")))
    waits: list[float] = []
    endpoint = ChatEndpoint(server.url, retries=3, wait=0.5, sleep=waits.append)
    assert endpoint.chat([], 5) == ("yes", True)
    assert waits == [0.5, 1.0, 2.0]


def test_an_endpoint_that_fails_for_good(serve: Callable[..., Server], benchmark_folder: Path, tmp_path: Path) -> None:
    server = serve(lambda body: (503, b"overloaded") if "dog" in str(body) else said("yes"))
    answerer = EndpointAnswerer(client(server, retries=1), 4)
    made = plan(choose("pope,mmvp"), lambda benchmark: benchmark.questions(benchmark_folder))
    folder = ResultsFolder(tmp_path / "run")
    open_results(folder, answerer, made)
    failed = run(answerer, made, folder)
    assert len(failed["pope"]) == 4
    assert "failed 2 times, last with HTTP 503: overloaded" in failed["pope"]["0"]
    scores = score_folder(folder.path, draws=0)
    assert scores.benchmarks["pope"].note == "not scored: no question was answered"
    assert scores.benchmarks["mmvp"].complete


def test_a_refusal_is_not_retried(serve: Callable[..., Server]) -> None:
    server = serve(lambda body: (400, b"context too long"))
    with pytest.raises(EndpointError, match="refused: HTTP 400: context too long"):
        client(server).chat([], 5)
    assert len(server.seen) == 1


def test_keys_stay_with_their_host(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(lambda body: said("yes"))
    client(server).chat([], 5)
    client(server, key_variable=JUDGE_KEY_VARIABLE).chat([], 5)
    assert "secret" not in str(server.headers)
    assert "authorization" not in str(server.headers).lower()
    monkeypatch.setenv(KEY_VARIABLE, "for-the-model")
    client(server).chat([], 5)
    assert server.headers[-1]["Authorization"] == "Bearer for-the-model"
    client(server, key_variable=JUDGE_KEY_VARIABLE).chat([], 5)
    assert "Authorization" not in server.headers[-1]
    openai = ChatEndpoint("https://api.openai.com", "x", key_variable=JUDGE_KEY_VARIABLE)
    assert openai._headers["Authorization"] == "Bearer secret"
    for url in ("https://api.openai.com.example.org", "https://example.org/api.openai.com"):
        assert "Authorization" not in ChatEndpoint(url, "x", key_variable=JUDGE_KEY_VARIABLE)._headers


def test_redirects_are_not_followed(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    other = serve(lambda body: said("yes"))
    server = serve(lambda body: (307, b""), location=f"{other.url}/v1/chat/completions")
    with pytest.raises(EndpointError, match=r"redirects to 'http://127.0.0.1:\d+/v1/chat/completions', which is not"):
        client(server).chat([], 5)
    assert other.headers == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org:8000", "unencrypted: use https://, or an SSH tunnel"),
        ("http://10.0.0.7/v1", "unencrypted"),
        ("http://localhost.example.org", "unencrypted"),
        ("ftp://localhost", "begins with http:// or https://"),
        ("https://user:word@example.org", "put the key into"),
        ("https:///v1", "begins with http:// or https://"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatEndpoint(url, "x")


def test_odd_replies_end_no_evaluation(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence_vl.evaluate.endpoint.MAX_BODY", 1 << 20)
    deep = b"[" * 100_000 + b"]" * 100_000
    choice: Callable[[Any], Any] = lambda content: (200, {"choices": [{"message": {"content": content}}]})  # noqa: E731
    replies: list[tuple[Any, Any]] = [
        (choice([{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]), "a cat"),
        (choice([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "cat"}]), "cat"),
        (choice(None), ""),
        (choice(7), "sent no chat completion"),
        (choice(["cat"]), "sent no chat completion"),
        ((200, []), "sent no chat completion"),
        ((200, {"choices": [None]}), "sent no chat completion"),
        ((200, deep), "no JSON"),
        ((200, b" " * (2 << 20)), "more than 1048576 bytes"),
        ((500, b"x" * (2 << 20)), "HTTP 500"),
    ]
    for reply, expected in replies:
        server = serve(lambda body, reply=reply: reply)
        (answer,) = EndpointAnswerer(client(server, retries=1), 1).answer([QUESTION], Generation(7))
        assert (answer.text if answer.error is None else answer.error).find(expected) >= 0, (reply[1], answer)
        assert (answer.error is None) == (expected in ("a cat", "cat", ""))


def test_a_broken_picture_loses_its_question_only(serve: Callable[..., Server]) -> None:
    broken = Question("2", "b", (IMAGE, "What?"), (BytesPicture(b"no picture"),))
    found = EndpointAnswerer(client(serve(lambda body: said("yes"))), 2).answer([broken, QUESTION], Generation(7))
    assert found[1] == Answer("yes")
    assert "image of b question 2" in (found[0].error or "")


def test_the_model_must_be_clear(serve: Callable[..., Server]) -> None:
    two = serve(lambda body: said(""), models=("a", "b"))
    with pytest.raises(ValueError, match=r"serves 2 models \(a, b\); name one"):
        client(two)
    assert client(two, model="b").model == "b"
    with pytest.raises(ValueError, match="doesn't say which models it serves"):
        ChatEndpoint("http://127.0.0.1:9", retries=0)


def test_fill_leaves_braces_of_answers_alone() -> None:
    assert fill("{question}|{answer}", {"question": "{answer}", "answer": "{x}"}) == "{answer}|{x}"


def judge(serve: Callable[..., Server], reply: str) -> tuple[Judge, Server]:
    server = serve(lambda body: said(reply))
    return Judge(client(server)), server


MMVET = {"question": "What is x?", "answer": "-1<AND>-5", "capability": "math"}
LLAVA = {"question": "Describe.", "answer": "A cat.", "category": "conv", "caption": "cat"}
HALLUSION = {"question": "Is it?", "details": "yes", "answer": "1", "category": "VS", "figure_id": "0"}
OPTIONS = {"question": "Which", "choices": ["a cat", "a dog"], "answer": "B", "unit": 1}
LENGTH = {"query": "How long?", "question_type": "free_form", "answer_type": "integer", "answer": "14", "choices": None}


@pytest.mark.parametrize(
    ("metric", "reference", "reply", "score"),
    [
        ("mmvet", MMVET, "0.5", 0.5),
        ("mmvet", MMVET, "1.0 because", 1.0),
        ("mmvet", MMVET, "about half", None),
        ("mmvet", MMVET, "7", None),
        ("llava_bench", LLAVA, "8 4\nThe second is worse.", 0.5),
        ("llava_bench", LLAVA, "Both are fine.", None),
        ("llava_bench", LLAVA, "8 40", None),
        ("hallusion_bench", HALLUSION, "“correct”.", 1.0),
        ("hallusion_bench", HALLUSION, "incorrect", 0.0),
        ("hallusion_bench", HALLUSION, "unclear", 1.0),
        ("hallusion_bench", {**HALLUSION, "figure_id": "1"}, "unclear", 0.0),
        ("hallusion_bench", HALLUSION, "I can't say", None),
        ("hallusion_bench", HALLUSION, "not correct", None),
        ("hallusion_bench", HALLUSION, "<think>it is not incorrect</think>correct", 1.0),
        ("mmvet", MMVET, "<think>half of it</think>\n0.5", 0.5),
        ("circular_choice", OPTIONS, "B", 1.0),
        ("circular_choice", OPTIONS, "E", 0.0),
        ("circular_choice", OPTIONS, "A or B", None),
        ("mathvista", LENGTH, "14", 1.0),
        ("mathvista", LENGTH, "unknown", None),
    ],
)
def test_replies_are_read_strictly(
    serve: Callable[..., Server], metric: str, reference: dict[str, Any], reply: str, score: float | None
) -> None:
    asked, server = judge(serve, reply)
    word = asked.decide(metric, "the given answer", reference)
    assert (None if word.verdict is None else word.verdict.score) == score
    prompt = server.seen[0]["messages"][0]["content"]
    assert "the given answer" in prompt
    assert "{" not in prompt.replace("{x}", "")
    empty = asked.decide(metric, "  ", reference)
    assert empty.verdict is not None
    assert empty.verdict.score == 0
    assert len(server.seen) == 1


def test_a_reply_that_was_cut_is_no_verdict_and_reasoning_is_not_judged(serve: Callable[..., Server]) -> None:
    server = serve(lambda body: said("correct or", finish="length"))
    cut = Judge(client(server)).decide("hallusion_bench", "<think>Is it? Yes.</think>No.", HALLUSION)
    assert (cut.verdict, cut.reply) == (None, "correct or")
    assert "Is it? Yes." not in server.seen[0]["messages"][0]["content"]
    unclosed = Judge(client(server)).decide("hallusion_bench", "<think>Is it? Yes", HALLUSION)
    assert unclosed.verdict is not None
    assert unclosed.verdict.kind == "empty"
    assert len(server.seen) == 1


def test_who_is_asked(serve: Callable[..., Server]) -> None:
    asked, _ = judge(serve, "")
    unread, wrong = Verdict(None, 0, "unparsed"), Verdict("A", 0, "wrong")
    assert asked.wants("mmvet", None)
    assert asked.wants("hallusion_bench", wrong)
    assert asked.wants("mathvista", unread)
    assert not asked.wants("mathvista", wrong)
    assert not asked.wants("pope", unread)


def test_judged_benchmarks_from_end_to_end(
    serve: Callable[..., Server], benchmark_folder: Path, tmp_path: Path
) -> None:
    model = serve(lambda body: said("It shows a picture"))
    names = "mmvet,llava_in_the_wild,hallusion_bench_image,mathvista_testmini"
    made = plan(choose(names), lambda benchmark: benchmark.questions(benchmark_folder))
    answerer = EndpointAnswerer(client(model), 4)
    folder = ResultsFolder(tmp_path / "run")
    open_results(folder, answerer, made)
    run(answerer, made, folder)
    before = score_folder(folder.path, draws=0)
    assert before.benchmarks["mmvet"].note == "not scored: needs a judge"
    assert before.benchmarks["mmvet"].scores == {}
    assert before.benchmarks["hallusion_bench_image"].scores["aAcc"] == 0
    assert set(before.columns()) == {"HallB", "MathV"}

    def word(body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["messages"][0]["content"]
        if "Assistant 1" in prompt:
            return said("10 5")
        if "Prediction answer:" in prompt:
            return said("correct")
        return (500, b"down") if "Extracted answer" in prompt else said("0.3")

    server = serve(word, models=("judge-1",))
    asked = Judge(client(server, retries=0))
    folder.write_description(folder.description | {"judge": asked.identity})
    metrics = {name: b.metric for name, b in made.benchmarks.items()}
    judged = judge_answers(asked, folder, metrics)
    assert sum(line["verdict"] is None for line in judged.values()) == 3
    after = score_folder(folder.path, draws=10)
    assert after.benchmarks["mmvet"].scores["score"] == pytest.approx(30)
    assert after.benchmarks["llava_in_the_wild"].scores["all"] == pytest.approx(50)
    hallusion = after.benchmarks["hallusion_bench_image"]
    assert (hallusion.scores["aAcc"], hallusion.scores["without_judge/aAcc"]) == (100, 0)
    assert hallusion.judged_by == "judge-1"
    mathvista = after.benchmarks["mathvista_testmini"]
    assert mathvista.scores["accuracy"] == 0  # its judge failed: the parsed answer counts
    assert (mathvista.unjudged, mathvista.complete) == (3, False)
    assert mathvista.note.startswith("incomplete: 3 answers not judged")
    with pytest.raises(ValueError, match=r"'hallusion_bench_image' was scored by two judges: none in .*, judge-1 in "):
        compare_runs(before, after)
    asked_before = len(server.seen)
    judge_answers(asked, folder, metrics)
    assert len(server.seen) == asked_before + 3  # only the three that failed


def test_a_run_whose_judge_failed_is_incomplete_until_it_answered(
    serve: Callable[..., Server], benchmark_folder: Path, tmp_path: Path
) -> None:
    works = False

    def word(body: dict[str, Any]) -> tuple[int, Any]:
        return said("0.3") if works else (500, b"down")

    model, judging = serve(lambda body: said("It shows a picture")), serve(word, models=("judge-1",))
    command = ["evaluate", "--model", model.url, "--suite", "mmvet", "--data", str(benchmark_folder), "--draws", "0"]
    command += ["--out", str(tmp_path / "run"), "--retries", "0"]
    assert main([*command, "--judge", judging.url]) == 1
    assert main(command) == 1  # without the judge it is still incomplete
    works = True
    assert main([*command, "--judge", judging.url]) == 0
    assert main(command) == 0
