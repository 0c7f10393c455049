"""Chat templates with generation marks, which determine the supervised tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from florence_vl.registry import Registry, did_you_mean

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PHI3_SYSTEM = "You are a helpful AI assistant."

BREAK = "\U0010fffd"
"""A private-use character that splits tokens. It prevents control tokens in user text from being matched, with any
tokenizer and version of transformers; `FlorenceVLProcessor` drops its tokens."""

OPTIONS: dict[str, type] = {"system": str, "newline_after_image": bool, "double_bos": bool, "end": str}
PLAIN_ENDS = ("eos", "newline")


@dataclass(frozen=True)
class ChatTemplate:
    """A named template: its Jinja text and the tokens that it requires.

    Args:
        name: Registered name.
        end: Token that ends an answer; it is supervised and stops generation. None: the tokenizer's end token.
        control_tokens: Tokens that the template writes, each of which must be one token of the tokenizer.
        bos: Token at the start; None: the one that the tokenizer adds, if any.
        system: Text of the system turn if the conversation has none; "" for no system turn.
        newline_after_image: Whether a newline follows each image.
        answer_prefix: Text that the model generates before its answer (supervised).
        allows: Names of the options that `build` accepts.
        jinja: Text that renders `turns` (the messages without the system message). It can use `bos`, `end`, `system`,
            `add_generation_prompt` and the macro `content_of(message)`, and must put each answer with its `end` between
            `{% generation %}` marks. None reads `templates/<name>.jinja` of this package.
    """

    name: str
    end: str | None = None
    control_tokens: tuple[str, ...] = ()
    bos: str | None = None
    system: str = ""
    newline_after_image: bool = True
    answer_prefix: str = ""
    allows: tuple[str, ...] = ("system", "newline_after_image", "double_bos")
    jinja: str | None = None

    @property
    def source(self) -> str:
        """The Jinja text without the variables that `build` sets."""
        return _read("common") + (self.jinja if self.jinja is not None else _read(self.name))

    def missing_tokens(self, tokenizer: Any) -> list[str]:
        """Control tokens of the template that are not one token of this tokenizer."""
        needed = [*self.control_tokens, *([self.end] if self.end else []), *([self.bos] if self.bos else [])]
        return [token for token in dict.fromkeys(needed) if not _is_one_token(tokenizer, token)]

    def problem(self, tokenizer: Any) -> str | None:
        """Why the template does not fit a tokenizer; None if it does."""
        end = f"this tokenizer (end token {tokenizer.eos_token!r})"
        if missing := self.missing_tokens(tokenizer):
            ends = f"ends answers with {self.end!r}" if self.end in missing else "writes control tokens"
            return f"{ends}, but {end} lacks {', '.join(map(repr, missing))} as single tokens"
        if self.end is None and tokenizer.eos_token is None:
            return "needs a tokenizer with an end token (eos_token)"
        if self.name == "vicuna_v1" and tokenizer.eos_token != self.end:
            return f"ends answers with {self.end!r}, but {end} ends them otherwise"
        return None

    def check(self, tokenizer: Any) -> None:
        """Check that the template fits a tokenizer.

        Raises:
            ValueError: Tokens are missing, or the tokenizer has no end token; the message names the templates that fit.
        """
        if problem := self.problem(tokenizer):
            fitting = ", ".join(_fitting(tokenizer))
            others = f"Templates that fit it: {fitting}." if fitting else "No registered chat template fits it."
            raise ValueError(f"chat template {self.name!r} {problem}. {others}")

    def end_text(self, tokenizer: Any, end: str = "eos") -> str:
        """The end of an answer: the end token, or a newline for `plain` with `end="newline"`."""
        if end == "newline":
            return "\n"
        return self.end or tokenizer.eos_token

    def end_ids(self, tokenizer: Any, end: str = "eos") -> list[int]:
        """The id of `end_text` after an answer, which stops generation; empty if that is not one token."""
        texts = ["a", "a" + self.end_text(tokenizer, end)]
        answer, ended = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ended[len(answer) :] if len(ended) == len(answer) + 1 else []

    def build(self, tokenizer: Any, image_token: str = "<image>", **options: Any) -> str:
        """The template as one self-contained Jinja text for `processor.chat_template`.

        Args:
            tokenizer: The LLM's tokenizer.
            image_token: The processor's image placeholder.
            **options: `system`: text of the system turn if the conversation has none ("" for none).
                `newline_after_image`: by default True except for `plain`; the released Llama-3 weights were most
                probably trained without it. `double_bos`: two begin tokens, as in the released scripts with tokenizers
                that add one themselves. `end` (plain only): "eos" ends a caption with the tokenizer's end token,
                "newline" with a newline only, as in the released scripts.

        Raises:
            ValueError: The tokenizer lacks tokens of the template, or an option is unknown, has the wrong type or is
                not for this template.
        """
        self.check(tokenizer)
        for name, value in options.items():
            if name not in OPTIONS:
                raise ValueError(f"unknown chat template option {name!r}. {did_you_mean(name, OPTIONS)}")
            if name not in self.allows:
                raise ValueError(
                    f"option {name!r} is not for chat template {self.name!r}, which accepts {', '.join(self.allows)}"
                )
            if not isinstance(value, OPTIONS[name]):
                raise ValueError(f"chat template option {name}={value!r} is not of type {OPTIONS[name].__name__}")
        end = options.get("end", "eos")
        if end not in PLAIN_ENDS:
            raise ValueError(f"unknown end {end!r} of a caption. {did_you_mean(end, PLAIN_ENDS)}")
        bos = self.bos if self.bos is not None else own_bos(tokenizer)
        if options.get("double_bos"):
            bos = self.bos or tokenizer.bos_token
            if bos is None:
                raise ValueError("double_bos needs a tokenizer with a begin token, and this one has no bos_token")
            bos = bos * 2
        body = self.source
        written = " ".join([body, *self.control_tokens, self.end_text(tokenizer), bos])
        variables = {
            "break_mark": BREAK,
            "control_tokens": control_tokens(tokenizer, written, image_token.strip()),
            "image_token": image_token,
            "bos": bos,
            "end": self.end_text(tokenizer, end),
            "system": options.get("system", self.system),
            "newline_after_image": options.get("newline_after_image", self.newline_after_image),
        }
        head = "".join(
            f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in variables.items()
        )
        return head + body


CHAT_TEMPLATES: Registry[ChatTemplate] = Registry("chat template")

_LLAMA3_HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
for _template in (
    ChatTemplate(
        "llama3", end="<|eot_id|>", control_tokens=_LLAMA3_HEADERS, bos="<|begin_of_text|>", system=VICUNA_SYSTEM
    ),
    ChatTemplate("phi3", end="<|end|>", control_tokens=("<|user|>", "<|assistant|>", "<|system|>"), system=PHI3_SYSTEM),
    ChatTemplate("chatml", end="<|im_end|>", control_tokens=("<|im_start|>",)),
    ChatTemplate("vicuna_v1", end="</s>", system=VICUNA_SYSTEM, answer_prefix=" "),
    ChatTemplate("plain", newline_after_image=False, allows=("newline_after_image", "double_bos", "end")),
):
    CHAT_TEMPLATES.register(_template.name)(_template)


def choose_template(tokenizer: Any) -> str:
    """Name of the chat template whose control tokens are in the tokenizer's vocabulary.

    Raises:
        ValueError: No template fits; the message lists the missing tokens.
    """
    if fitting := _fitting(tokenizer):
        return fitting[0]
    lacks = "; ".join(
        f"{name} needs {', '.join(CHAT_TEMPLATES[name].missing_tokens(tokenizer)) or 'another end token'}"
        for name in CHAT_TEMPLATES
        if name != "plain"
    )
    raise ValueError(
        f"no chat template fits this tokenizer (end token {tokenizer.eos_token!r}): {lacks}. Register a ChatTemplate, "
        "or give the processor a Jinja chat_template with generation marks"
    )


def control_tokens(tokenizer: Any, chat_template: str, image_token: str) -> list[str]:
    """Tokens that only a template may write: the image token, special tokens, and added tokens in the template.

    Args:
        tokenizer: The LLM's tokenizer.
        chat_template: Jinja text.
        image_token: The image placeholder.

    Returns:
        Tokens, longest first, so that splitting one never leaves a longer one intact.
    """
    found = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1 and not token.content.isspace() and (token.special or token.content in chat_template)
    }
    return sorted({*found, image_token}, key=lambda token: (-len(token), token))


def has_generation_marks(chat_template: str) -> bool:
    """Whether a Jinja template marks the assistant's text."""
    return "endgeneration" in chat_template


def _is_one_token(tokenizer: Any, token: str) -> bool:
    index = tokenizer.get_vocab().get(token)
    return index is not None and tokenizer.encode(token, add_special_tokens=False) == [index]


def own_bos(tokenizer: Any) -> str:
    """The begin token, if the tokenizer adds one to every text itself."""
    if tokenizer.bos_token_id is None:
        return ""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""


def _fitting(tokenizer: Any) -> list[str]:
    """Names of the chat templates that fit a tokenizer, without `plain`, which is for captions."""
    names = (name for name in CHAT_TEMPLATES if name != "plain")
    return [name for name in names if CHAT_TEMPLATES[name].problem(tokenizer) is None]


@cache
def _read(name: str) -> str:
    return resources.files("florence_vl.model").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")
