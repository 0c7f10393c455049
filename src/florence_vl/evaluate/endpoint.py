"""Answers from an OpenAI-compatible endpoint. Failed requests are retried; then the question stays unanswered.

This module has its own client, because the `openai` package follows redirects, reads bodies of any size, and sends the
key of `OPENAI_API_KEY` to any address.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from florence_vl.evaluate.answer import Answer, Answerer
from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.question import IMAGE, Question

OPENAI_HOST = "api.openai.com"
KEY_VARIABLE = "FLORENCE_VL_MODEL_API_KEY"
JUDGE_KEY_VARIABLE = "FLORENCE_VL_JUDGE_API_KEY"
MAX_BODY = 16 << 20  # bytes of a reply


class EndpointError(Exception):
    """An endpoint returned no answer; the message says what it returned."""


class ChatEndpoint:
    """Client of one OpenAI-compatible server.

    Args:
        url: Base URL, with or without `/v1`: https, or plain http on this machine. Redirects are not followed.
        model: Name of the model; by default the server's only model.
        key: API key. By default that of the environment variable `key_variable`; `OPENAI_API_KEY` is sent only to
            api.openai.com.
        retries: Further attempts after a lost connection, a timeout, 429 or a server error.
        wait: Seconds before the second attempt; doubled for each further one.
        timeout: Seconds per attempt.
        sleep: Replaceable for tests.
        key_variable: Environment variable with the key.

    Raises:
        ValueError: The URL is not allowed, or no model is named and the server cannot be asked, or serves several.
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
        key_variable: str = KEY_VARIABLE,
    ) -> None:
        host = _check_address(url)
        base = url.rstrip("/").removesuffix("/chat/completions")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        key = key or os.environ.get(key_variable)
        if not key and host == OPENAI_HOST:
            key = os.environ.get("OPENAI_API_KEY")
        handlers: list[Any] = [_NoRedirect()]
        if _is_loopback(host):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout = timeout
        self.retries, self.wait, self._sleep = retries, wait, sleep
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        try:
            served = [str(item["id"]) for item in self._send("GET", "/models", None)["data"]]
        except (EndpointError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.url} doesn't say which models it serves: {error}. Check the URL and that the server runs"
            ) from None
        if len(served) != 1:
            raise ValueError(f"{self.url} serves {len(served)} models ({', '.join(served)}); name one")
        return served[0]

    def chat(self, messages: list[dict[str, Any]], max_tokens: int, temperature: float = 0.0) -> tuple[str, bool]:
        """The reply to a conversation, and whether it ended before the token limit.

        Raises:
            EndpointError: There was no reply after all attempts.
        """
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        reply = self._send("POST", "/chat/completions", body)
        try:
            choice = reply["choices"][0]
            return _text(choice["message"]["content"]), choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(f"{self.url} sent no chat completion: {json.dumps(reply)[:200]}") from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self._sleep(self.wait * 2 ** (attempt - 1))
            request = urllib.request.Request(f"{self.url}{path}", data, self._headers, method=method)
            try:
                with self._opener.open(request, timeout=self._timeout) as reply:
                    body_bytes = reply.read(MAX_BODY + 1)
            except urllib.error.HTTPError as error:
                text = error.read(1 << 12).decode("utf-8", "replace")[:200]
                if 300 <= error.code < 400:
                    where = error.headers.get("Location", "")
                    raise EndpointError(
                        f"{self.url}{path} redirects to {where!r}, which is not followed: give that URL instead"
                    ) from None
                if error.code != 429 and error.code < 500:
                    raise EndpointError(f"{self.url}{path} refused: HTTP {error.code}: {text}") from None
                problem = f"HTTP {error.code}: {text}"
                continue
            except (OSError, http.client.HTTPException) as error:  # lost connections and timeouts
                problem = f"{type(error).__name__}: {error}"
                continue
            if len(body_bytes) > MAX_BODY:
                raise EndpointError(f"{self.url}{path} sent more than {MAX_BODY} bytes")
            text = body_bytes.decode("utf-8", "replace")
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                problem = f"no JSON: {text[:200]!r}"
        raise EndpointError(f"{self.url}{path} failed {self.retries + 1} times, last with {problem}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # urllib then raises the HTTPError of the redirect


def _check_address(url: str) -> str:
    """Host of a URL to which requests may be sent; see `ChatEndpoint`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"an endpoint's URL begins with http:// or https://, found {url!r}")
    if parts.username or parts.password:
        raise ValueError(f"put the key into ${KEY_VARIABLE}, not into the URL of {parts.hostname}")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError(
            f"{url} would send questions, pictures and keys unencrypted: use https://, or an SSH tunnel to a port of "
            "this machine (ssh -L 8000:localhost:8000 HOST, then http://localhost:8000)"
        )
    return parts.hostname


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text(content: Any) -> str:
    """Text of a message: a string, or the text parts of a list."""
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type", "text") in ("text", "output_text"))
    if not isinstance(content, str):
        raise TypeError("content is neither text nor a list of parts")
    return content


class EndpointAnswerer(Answerer):
    """A served model.

    Args:
        endpoint: The server.
        batch_size: Number of parallel requests.
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
        try:
            messages = [{"role": "user", "content": message_content(question)}]
            text, finished = self.endpoint.chat(messages, generation.max_new_tokens, generation.temperature)
        except (EndpointError, ValueError, OSError) as error:  # including unreadable pictures
            return Answer("", error=str(error))
        return Answer(text, finished)


_KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}  # by the first bytes of a file


def message_content(question: Question) -> list[dict[str, Any]]:
    """Message parts of a question for OpenAI's API, with images as PNG or JPEG `data:` URLs.

    Raises:
        ValueError: An image is missing or broken.
    """
    from florence_vl.model.pictures import data_url, open_image

    images = iter(question.images)
    parts: list[dict[str, Any]] = []
    for part in question.parts:
        if part is not IMAGE:
            parts.append({"type": "text", "text": part})
            continue
        data = next(images).read()
        kind = next((kind for head, kind in _KINDS.items() if data.startswith(head)), None)
        if kind is None:
            address = data_url(open_image(data, name=f"image of {question.benchmark} question {question.id}"))
        else:
            address = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return parts
