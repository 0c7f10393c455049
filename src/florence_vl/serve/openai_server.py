"""The HTTP API: OpenAI's chat completions over the engine, and additional endpoints of a Florence-VL."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pydantic
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from florence_vl.model.pictures import MAX_PIXELS, UPLOADS, MediaPolicy, open_image
from florence_vl.serve.engine import (
    Answer,
    ContextTooLong,
    Engine,
    EngineClosed,
    Event,
    OutOfMemory,
    Prompt,
    QueueFull,
    is_out_of_memory,
)
from florence_vl.serve.openai_types import (
    AttributionRequest,
    ChatRequest,
    Conversation,
    FeaturesRequest,
    Strict,
)
from florence_vl.serve.sampling import TokenLogprob, token_bytes

logger = logging.getLogger(__name__)
Body = TypeVar("Body", bound=Strict)
MAX_DECODING = 4  # requests whose decoded pictures are in memory at the same time
OPEN_PATHS = ("/health", "/ready", "/metrics")  # need no key


@dataclass(frozen=True)
class ServerConfig:
    """Limits and settings of the server.

    Attributes:
        name: Name of the model in requests and `/v1/models`.
        api_key: Required as `Authorization: Bearer KEY`; None requires no key.
        media: Allowed sources of pictures; by default only `data:` URLs.
        max_body: Maximum size of a request in bytes.
        max_images: Maximum number of pictures per request.
        max_pixels: Maximum number of pixels of a request's pictures together.
        max_new_tokens: Longest answer if the request sets no limit, within the context.
    """

    name: str
    api_key: str | None = None
    media: MediaPolicy = UPLOADS
    max_body: int = 32 << 20
    max_images: int = 32
    max_pixels: int = MAX_PIXELS
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class Tools:
    """Additional endpoints, provided by other modules; each runs on the engine's thread.

    Attributes:
        features: (picture, names or None, format, prompts or None) -> JSON for `/v1/features`.
        attribution: (picture, question, answer or None) -> JSON for `/v1/attribution`.
    """

    features: Callable[..., dict[str, Any]] | None = None
    attribution: Callable[..., dict[str, Any]] | None = None


class ApiError(Exception):
    """An error response with OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else None
        return JSONResponse(self.body, self.status, headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """The client's error for an exception; server failures are logged and not described."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "queue_full", retry_after=1)
    if isinstance(error, ContextTooLong):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        return ApiError(503, str(OutOfMemory()), "out_of_memory", retry_after=5)
    if isinstance(error, EngineClosed):
        return ApiError(503, "the server is shutting down", "shutting_down")
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client closed the connection")
    if isinstance(error, (ValueError, FileNotFoundError)):
        return ApiError(400, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; see its log")


@dataclass
class _Choice:
    answer: Answer
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Server:
    """Handlers of the HTTP API over one engine.

    Args:
        engine: The engine, started by its first request.
        config: Limits and settings.
        tools: Functions of the additional endpoints.
    """

    def __init__(self, engine: Engine, config: ServerConfig, tools: Tools | None = None) -> None:
        self.engine, self.config, self.tools = engine, config, tools or Tools()
        self.created = int(time.time())
        self._preparing = 0  # requests between the queue check and the queue
        self._decoding, self._tool_turn = asyncio.Semaphore(MAX_DECODING), asyncio.Lock()
        self._metrics = CollectorRegistry()
        self._metrics.register(self)

    # ------------------------------------------------------------ shared by handlers

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The validated body.

        Raises:
            ApiError: Too large, not JSON, or a field is unknown, malformed or not supported.
        """
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self.config.max_body:
                raise ApiError(413, f"the request is larger than the limit of {self.config.max_body} bytes")
        try:
            return kind.model_validate_json(bytes(data))
        except pydantic.ValidationError as error:
            errors = error.errors(include_url=False, include_input=False, include_context=False)
            deepest = max(errors, key=lambda found: len(found["loc"]))  # of a union, the choice that fits best
            where = ".".join(str(part) for part in deepest["loc"]) or None
            reason = deepest["msg"].removeprefix("Value error, ")
            known = "unknown or unsupported field" if deepest["type"] == "extra_forbidden" else reason
            raise ApiError(400, f"{where or 'body'}: {known}", "invalid_request", where) from None

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request's `model` names; None for the base model.

        Raises:
            ApiError: The model does not exist.
        """
        if model is None or model == self.config.name:
            return None
        if model in self.engine.adapters:
            return model
        names = ", ".join([self.config.name, *self.engine.adapters])
        raise ApiError(404, f"no model {model!r} here; there are: {names}", "model_not_found", "model")

    async def prompt(self, body: Conversation, adapter: str | None) -> Prompt:
        """Decode the pictures and tokenize, off the event loop."""
        urls = body.image_urls()
        if len(urls) > self.config.max_images:
            raise ApiError(400, f"{len(urls)} images; the limit is {self.config.max_images}", param="messages")
        async with self._decoding:
            return await asyncio.to_thread(self._prepare, body, urls, adapter)

    def _prepare(self, body: Conversation, urls: Sequence[str], adapter: str | None) -> Prompt:
        pictures: list[Any] = []
        for url in urls:
            left = self.config.max_pixels - sum(picture.width * picture.height for picture in pictures)
            pictures.append(self.picture(url, left))
        return self.engine.prepare(body.chat(), pictures, adapter)

    def picture(self, url: str, max_pixels: int | None = None) -> Any:
        """Decode a picture according to the media policy."""
        return open_image(url, policy=self.config.media, max_pixels=max_pixels)

    def check_room(self, choices: int) -> None:
        """Reject requests immediately if the queue is full, with those that are being prepared.

        Raises:
            QueueFull: See `Engine.check_room`.
        """
        self.engine.check_room(self._preparing + choices)

    # ------------------------------------------------------------ chat

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        self.check_room(1)
        body = await self.read(request, ChatRequest)
        adapter = self.adapter(body.model)
        choices = body.n or 1
        if choices > self.engine.capacity:
            raise ApiError(400, f"n is {choices}; this server takes at most {self.engine.capacity}", param="n")
        self.check_room(choices)
        self._preparing += choices
        try:
            prompt = await self.prompt(body, adapter)
            if (schema := body.answer_schema()) is not None:
                await asyncio.to_thread(self.engine.compile_schema, schema)
            events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def sink(index: int) -> Callable[[Event], None]:
                def put(event: Event) -> None:
                    with contextlib.suppress(RuntimeError):  # the loop has ended
                        loop.call_soon_threadsafe(events.put_nowait, (index, event))

                return put

            longest = min(self.config.max_new_tokens, self.engine.context - len(prompt.ids))
            answers: list[_Choice] = []
            try:
                for index in range(choices):
                    answers.append(_Choice(self.engine.submit(prompt, body.options(index, longest), sink(index))))
            except Exception:
                _cancel(answers)
                raise
        finally:
            self._preparing -= choices
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or self.config.name,
        }
        logger.info("%s: %d prompt tokens, user %r", head["id"], len(prompt.ids), body.user)
        if body.stream:
            # The first event shows whether there is an answer; an error before it gets its own status.
            first = await self._or_gone(request, events.get(), answers)
            if first[1].error is not None:
                _cancel(answers)
                raise first[1].error
            return _EventStream(self._stream(body, head, answers, events, first), answers)
        return await self._or_gone(request, self._collect(head, answers, events), answers)

    async def _or_gone(self, request: Request, work: Any, answers: Sequence[_Choice] = ()) -> Any:
        """Wait for work, but cancel it and the answers if the client disconnects."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        except BaseException:
            _cancel(answers)
            raise
        finally:
            gone.cancel()
            task.cancel()

    async def _collect(
        self, head: Mapping[str, Any], choices: list[_Choice], events: asyncio.Queue[tuple[int, Event]]
    ) -> Response:
        open_choices = len(choices)
        while open_choices:
            index, event = await events.get()
            if event.error is not None:
                raise event.error
            choices[index].text.append(event.text)
            choices[index].logprobs += event.logprobs
            open_choices -= event.finish is not None
        listed = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": self._logprobs(choice.answer, choice.logprobs),
                "finish_reason": choice.answer.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return JSONResponse({**head, "object": "chat.completion", "choices": listed, "usage": usage(choices)})

    async def _stream(
        self,
        body: ChatRequest,
        head: Mapping[str, Any],
        choices: list[_Choice],
        events: asyncio.Queue[tuple[int, Event]],
        first: tuple[int, Event],
    ) -> AsyncIterator[str]:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        extra = {"usage": None} if with_usage else {}

        def chunk(listed: list[dict[str, Any]], **more: Any) -> str:
            data = {**head, "object": "chat.completion.chunk", "choices": listed, **extra, **more}
            return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"

        for index in range(len(choices)):
            delta = {"role": "assistant", "content": ""}
            yield chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        open_choices = len(choices)
        index, event = first
        while True:
            if event.error is not None:
                yield f"data: {json.dumps(as_api_error(event.error).body)}\n\n"
                return
            if event.text or event.logprobs:
                logprobs = self._logprobs(choices[index].answer, event.logprobs)
                delta = {"content": event.text}
                yield chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}])
            if event.finish is not None:
                yield chunk([{"index": index, "delta": {}, "logprobs": None, "finish_reason": event.finish}])
                open_choices -= 1
            if not open_choices:
                break
            index, event = await events.get()
        if with_usage:
            yield chunk([], usage=usage(choices))
        yield "data: [DONE]\n\n"

    def _logprobs(self, answer: Answer, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if answer.options.logprobs is None:
            return None
        tokenizer = self.engine.processor.tokenizer

        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = token_bytes(tokenizer, token)
            return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

        content = [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in entries
        ]
        return {"content": content, "refusal": None}

    # ------------------------------------------------------------ the other endpoints

    def _model(self, adapter: str | None) -> dict[str, Any]:
        return {
            "id": adapter or self.config.name,
            "object": "model",
            "created": self.created,
            "owned_by": "florence-vl",
            "parent": self.config.name if adapter else None,
            "max_model_len": self.engine.context,
        }

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        listed = [self._model(adapter) for adapter in (None, *self.engine.adapters)]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        return JSONResponse(self._model(self.adapter(request.path_params["model"])))

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the ids of a conversation's prompt, a placeholder for each image token."""
        body = await self.read(request, Conversation)
        prompt = await self.prompt(body, self.adapter(body.model))
        return JSONResponse(
            {
                "tokens": prompt.ids,
                "count": len(prompt.ids),
                "image_tokens": prompt.image_tokens,
                "max_model_len": self.engine.context,
            }
        )

    async def features(self, request: Request) -> Response:
        """`POST /v1/features`."""
        body = await self.read(request, FeaturesRequest)
        return await self._tool(request, self.tools.features, body, body.features, body.format, body.prompts)

    async def attribution(self, request: Request) -> Response:
        """`POST /v1/attribution`."""
        body = await self.read(request, AttributionRequest)
        return await self._tool(request, self.tools.attribution, body, body.question, body.answer)

    async def _tool(
        self,
        request: Request,
        tool: Callable[..., dict[str, Any]] | None,
        body: FeaturesRequest | AttributionRequest,
        *arguments: Any,
    ) -> Response:
        if tool is None:
            raise ApiError(404, "this server does not provide this endpoint")
        if self.adapter(body.model) is not None:
            raise ApiError(400, "this endpoint supports only the base model, not an adapter", param="model")
        self.check_room(1)
        self._preparing += 1
        try:
            async with self._tool_turn:
                picture = await asyncio.to_thread(self.picture, body.image)
                called = asyncio.wrap_future(self.engine.call(lambda: tool(picture, *arguments)))
                return JSONResponse(await self._or_gone(request, called))
        finally:
            self._preparing -= 1

    async def health(self, request: Request) -> Response:
        """`GET /health`: the process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """`GET /ready`: it accepts requests."""
        if self.engine.load >= self.engine.capacity:
            return JSONResponse({"status": "full"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: Prometheus metrics."""
        return Response(generate_latest(self._metrics), media_type="text/plain; version=0.0.4")

    def collect(self) -> list[Any]:
        """Metric families of the engine, for prometheus_client."""
        engine = self.engine
        gauges = {
            "running": ("Rows that are being answered.", engine.running),
            "waiting": ("Waiting requests.", engine.load - engine.running),
            "feature_bytes": ("Bytes of cached image features.", engine.features.bytes),
            "prefix_bytes": ("Bytes of cached prefixes.", engine.prefixes.bytes),
        }
        return [
            *(
                CounterMetricFamily(
                    f"florence_vl_{one.name}", one.metadata["help"], value=getattr(engine.stats, one.name)
                )
                for one in dataclasses.fields(engine.stats)
            ),
            *(GaugeMetricFamily(f"florence_vl_{name}", text, value=value) for name, (text, value) in gauges.items()),
        ]


def usage(choices: Sequence[_Choice]) -> dict[str, Any]:
    """Token counts of a request, in OpenAI's form; image tokens count as prompt tokens."""
    answers = [choice.answer for choice in choices]
    prompt, said = len(answers[0].prompt.ids), sum(len(answer.ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {
            "cached_tokens": answers[0].cached_tokens,
            "image_tokens": answers[0].prompt.image_tokens,
        },
    }


class _EventStream(StreamingResponse):
    """Server-sent events; at their end, or if the client disconnects at any time, the answers are cancelled."""

    def __init__(self, events: AsyncIterator[str], answers: Sequence[_Choice]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._answers)


def _cancel(choices: Sequence[_Choice]) -> None:
    for choice in choices:
        choice.answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_app(server: Server) -> FastAPI:
    """The FastAPI application of a server; `app.state.server` is the server.

    Args:
        server: Its engine is closed when the application ends.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)

    app = FastAPI(title="Florence-VL", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.server = server
    for method, path, handler in (
        ("POST", "/v1/chat/completions", server.chat),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{model:path}", server.model),
        ("POST", "/v1/features", server.features),
        ("POST", "/v1/attribution", server.attribution),
        ("POST", "/tokenize", server.tokenize),
        ("GET", "/health", server.health),
        ("GET", "/ready", server.ready),
        ("GET", "/metrics", server.metrics),
    ):
        app.add_api_route(path, _guarded(server, path, handler), methods=[method])

    async def refused(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return ApiError(status, f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}").response()

    app.add_exception_handler(HTTPException, refused)
    return app


def _guarded(server: Server, path: str, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
    async def guarded(request: Request) -> Response:
        try:
            key = server.config.api_key
            if key is not None and path not in OPEN_PATHS:
                given = request.headers.get("authorization", "").encode()
                if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                    raise ApiError(401, "give the server's key as 'Authorization: Bearer KEY'", "invalid_api_key")
            return await handler(request)
        except asyncio.CancelledError:  # uvicorn cancels what does not end
            return as_api_error(EngineClosed()).response()
        except Exception as error:
            return as_api_error(error).response()

    return guarded


class HTTPServer(uvicorn.Server):
    """uvicorn, but answers that still run after the grace period end with an error that their clients receive.

    Args:
        server: The handlers.
        grace: Seconds that running answers have after a signal to end.
    """

    def __init__(self, server: Server, grace: float) -> None:
        cancelling = int(grace) + 5  # for what runs longer than one step of the engine
        settings: dict[str, Any] = {"log_level": "warning", "server_header": False}
        super().__init__(uvicorn.Config(build_app(server), timeout_graceful_shutdown=cancelling, **settings))
        self._engine, self._grace = server.engine, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._grace, lambda: loop.run_in_executor(None, self._engine.close))
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
