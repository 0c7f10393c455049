"""Answers from an OpenAI-compatible endpoint: retried, and when it fails for good, a question without answer."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from florence_vl.evaluate.answer import Answer, Answerer
from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.question import IMAGE, Question

KEY_VARIABLE = "OPENAI_API_KEY"


class EndpointError(Exception):
    """An endpoint that gave no answer; the message says what it gave instead."""


class ChatEndpoint:
    """Client of one OpenAI-compatible server.

    Args:
        url: Base address, with or without `/v1`.
        model: Name of the model; the server's only one by default.
        key: API key; `$OPENAI_API_KEY` by default.
        retries: Further attempts after a lost connection, a timeout, 429 or a server's error.
        wait: Seconds before the second attempt; doubles with each.
        timeout: Seconds for one attempt.
        sleep: For tests.

    Raises:
        ValueError: The address is none, or no model is named and the server can't be asked, or serves several.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: str | None = None,
        retries: int = 4,
        wait: float = 1.0,
        timeout: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"an endpoint's address begins with http:// or https://, found {url!r}")
        base = url.rstrip("/").removesuffix("/chat/completions")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        key = key or os.environ.get(KEY_VARIABLE)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout = timeout
        self.retries, self.wait, self._sleep = retries, wait, sleep
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        try:
            served = [item["id"] for item in self._send("GET", "/models", None)["data"]]
        except (EndpointError, KeyError, TypeError) as error:
            raise ValueError(f"{self.url} doesn't say which models it serves ({error}); name one") from None
        if len(served) != 1:
            raise ValueError(f"{self.url} serves {len(served)} models ({', '.join(served)}); name one")
        return served[0]

    def chat(self, messages: list[dict[str, Any]], max_tokens: int, temperature: float = 0.0) -> tuple[str, bool]:
        """The reply to a conversation, and whether it ended by itself.

        Raises:
            EndpointError: No reply after all attempts.
        """
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        reply = self._send("POST", "/chat/completions", body)
        try:
            choice = reply["choices"][0]
            return choice["message"]["content"] or "", choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError):
            raise EndpointError(f"{self.url} sent no chat completion: {str(reply)[:200]}") from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self._sleep(self.wait * 2 ** (attempt - 1))
            request = urllib.request.Request(f"{self.url}{path}", data, self._headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                    text = reply.read().decode("utf-8", "replace")
            except urllib.error.HTTPError as error:
                text = error.read().decode("utf-8", "replace")[:200]
                if error.code != 429 and error.code < 500:
                    raise EndpointError(f"{self.url}{path} refused: HTTP {error.code}: {text}") from None
                problem = f"HTTP {error.code}: {text}"
                continue
            except (OSError, http.client.HTTPException) as error:  # lost connections and timeouts
                problem = f"{type(error).__name__}: {error}"
                continue
            try:
                return json.loads(text)
            except ValueError:
                problem = f"no JSON: {text[:200]!r}"
        raise EndpointError(f"{self.url}{path} failed {self.retries + 1} times, last with {problem}")


class EndpointAnswerer(Answerer):
    """A served model.

    Args:
        endpoint: The server.
        batch_size: Requests at a time.
    """

    def __init__(self, endpoint: ChatEndpoint, batch_size: int = 16) -> None:
        self.endpoint = endpoint
        self.batch_size = batch_size
        self.identity = {"model": endpoint.model, "url": endpoint.url}
        self._pool = ThreadPoolExecutor(batch_size)

    def close(self) -> None:
        self._pool.shutdown()

    def answer(self, questions: Sequence[Question], generation: Generation) -> list[Answer]:
        return list(self._pool.map(lambda question: self._one(question, generation), questions))

    def _one(self, question: Question, generation: Generation) -> Answer:
        messages = [{"role": "user", "content": message_content(question)}]
        try:
            text, finished = self.endpoint.chat(messages, generation.max_new_tokens, generation.temperature)
        except EndpointError as error:
            return Answer("", error=str(error))
        return Answer(text, finished)


def message_content(question: Question) -> list[dict[str, Any]]:
    """Message parts of a question as OpenAI's API has them, images as PNG or JPEG data addresses.

    Raises:
        ValueError: An image is missing or broken.
    """
    from florence_vl.model.pictures import open_image

    images = iter(question.images)
    parts: list[dict[str, Any]] = []
    for part in question.parts:
        if part is not IMAGE:
            parts.append({"type": "text", "text": part})
            continue
        data = next(images).read()
        if data[:3] == b"\xff\xd8\xff":
            kind = "jpeg"
        elif data[:4] == b"\x89PNG":
            kind = "png"
        else:
            file = io.BytesIO()
            open_image(data, name=f"image of {question.benchmark} question {question.id}").save(file, "PNG")
            data, kind = file.getvalue(), "png"
        address = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return parts
