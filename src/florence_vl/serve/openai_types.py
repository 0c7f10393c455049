"""Request bodies of the HTTP API: every field is used or rejected, none is ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from florence_vl.serve.sampling import GenerationOptions

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOP = 4

Text = Annotated[str, Field(max_length=4_000_000)]


class Strict(BaseModel):
    """A body whose unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A part of a message: text."""

    type: Literal["text"]
    text: Text


class ImageURL(Strict):
    """Location of a picture: a `data:image/...;base64,` URL, or another one if the server allows it.

    The server's settings decide at which resolution the picture is encoded, so `detail` must be `auto`.
    """

    url: str
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    """A part of a message: a picture."""

    type: Literal["image_url"]
    image_url: ImageURL


def _parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("it must be text or a list of parts")
    return content


class Message(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], BeforeValidator(_parts)]
    name: None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class StreamOptions(Strict):
    """Additional content of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class JSONSchema(Strict):
    """A named JSON schema."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """`text`, any JSON object, or JSON with a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', which needs it")
        return self


class Conversation(Strict):
    """Body of `/tokenize`, and the fields that chat has too."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)

    def chat(self) -> list[dict[str, Any]]:
        """The messages for the processor; pictures are passed separately."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": [
                    {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                    for part in message.content
                ],
            }
            for message in self.messages
        ]

    def image_urls(self) -> list[str]:
        """URLs of the pictures in reading order."""
        return [
            part.image_url.url for message in self.messages for part in message.content if isinstance(part, ImagePart)
        ]


class ChatRequest(Conversation):
    """Body of `/v1/chat/completions`.

    Fields that clients send with their neutral value are accepted only with that value.
    """

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    # neutral values only
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=0)
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if not all(self.stop_texts()) or len(self.stop_texts()) > MAX_STOP:
            raise ValueError(f"stop takes up to {MAX_STOP} texts, none of them empty")
        return self

    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def answer_schema(self) -> str | None:
        """The JSON schema of the answer as text, if it has one."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        given = self.response_format.json_schema
        return json.dumps(given.schema_ if given else {"type": "object"})

    def options(self, choice: int, longest: int) -> GenerationOptions:
        """Settings of one of the `n` choices.

        Args:
            choice: Its index; each has its own seed, and the first has the given one.
            longest: The server's limit of an answer in tokens, if the client sets none.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        seed = None if self.seed is None else (self.seed + choice + (1 << 63)) % (1 << 64) - (1 << 63)
        return GenerationOptions(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or longest,
            temperature=temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=seed,
            stop=self.stop_texts(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self.answer_schema(),
        )


class FeaturesRequest(Strict):
    """Body of `/v1/features`: the tower's features of a picture under each prompt.

    Attributes:
        image: URL of the picture, as in a message.
        format: `picture`: PCA in one basis for all features, as PNG `data:` URLs; `array`: the features themselves,
            float32 little-endian in base64 with their shape.
        features: Names to return; all by default.
        prompts: More prompts for the vision tower, in words; each is a feature of its own, under its text.
    """

    model: str | None = None
    image: str
    format: Literal["picture", "array"] = "picture"
    features: list[str] | None = Field(None, min_length=1)
    prompts: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(None, min_length=1, max_length=4)


class AttributionRequest(Strict):
    """Body of `/v1/attribution`: the contribution of each feature to an answer.

    Attributes:
        image: URL of the picture, as in a message.
        question: The user's text.
        answer: The answer to score; the model's own if None.
    """

    model: str | None = None
    image: str
    question: Text = Field(min_length=1)
    answer: Text | None = None
