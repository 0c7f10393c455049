"""Extract the final answer from a generated text: without reasoning, wrappers and emphasis.

All functions take time linear in the length of the text.
"""

from __future__ import annotations

import ast
import json
import re

_TAG_NAMES = "think|thinking|thought|reasoning|reason|analysis|scratchpad"
_REASONING = re.compile(
    rf"<(/?)(?:[a-z]{{1,10}}:)?(?:{_TAG_NAMES})>|◁(/?)(?:{_TAG_NAMES})▷|\[(/?)(?:{_TAG_NAMES})\]"
    rf"|<\|(end_of|begin_of)_thought\|>|<\|(/?)(?:{_TAG_NAMES})\|>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(
    r"<(/?)(?:answer|final_answer|final answer)>|<\|(begin|end)_of_(?:box|solution|answer)\|>|◁(/?)answer▷",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}")
_TEX = re.compile(
    r"\\(?:(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|sf|it|tt)|bf|rm|displaystyle|left|right|q?quad)(?![a-zA-Z])"
    r"|[,;:!()\[\] ])"
)
_HTML = re.compile(r"</?(?:b|i|u|p|em|strong|span|div|br)\s?/?>", re.IGNORECASE)
_SYMBOLS = re.compile("[\u2190-\u21ff\u2600-\u27bf\ufe0f\U0001f300-\U0001faff]")  # arrows, check marks, emoji
_QUOTED = re.compile(r"'([^']*)'[.!]?")
_FENCE = re.compile(r"```[a-z]{0,10}", re.IGNORECASE)
# Full-width ASCII, the ideographic space, comma and full stop, dashes, curly quotes.
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ", 0x3001: ",", 0x3002: ".", 0xFF61: ".", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"',
    0x300C: '"', 0x300D: '"', 0x2010: "-", 0x2011: "-",
    0x2012: "-", 0x2013: "-", 0x2014: "-", 0x2212: "-", 0x3010: "[", 0x3011: "]",
}  # fmt: skip
_EMPHASIS = str.maketrans("", "", '*`"#$')


def without_reasoning(text: str) -> str:
    """The text after its last reasoning block; an unclosed block and all text after it are not part of the answer."""
    start, opened = 0, None
    for tag in _REASONING.finditer(text):
        closes = "/" in tag.groups() or tag[4] == "end_of"
        if closes:
            start, opened = tag.end(), None
        elif opened is None:
            opened = tag.start()
    return text[start:opened].strip()


def unwrapped(text: str) -> list[str]:
    """The content of answer tags, boxes or the field `answer` of JSON, in order; otherwise the text itself."""
    found = _tagged(text) or _boxed(text)
    if found:
        return [_boxed(part)[-1] if _boxed(part) else part for part in found]
    bare = _FENCE.sub("", text).strip()
    if bare.startswith("{") and bare.endswith("}") and len(bare) < 4096:
        try:
            value = json.loads(bare)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(bare)  # quotes as Python writes them
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                return [text]
        fields = {key.lower(): v for key, v in value.items()} if isinstance(value, dict) else {}
        for key in ("answer", "final_answer", "choice", "option"):
            if isinstance(fields.get(key), (str, int, float)):
                return [str(fields[key])]
    return [text]


def _tagged(text: str) -> list[str]:
    found, start = [], None
    for tag in _ANSWER_TAG.finditer(text):
        if "/" in tag.groups() or (tag[2] or "").lower() == "end":
            if start is not None:
                found.append(text[start : tag.start()].strip())
            start = None
        else:
            start = tag.end()
    if start is not None:
        found.append(text[start:].strip())
    return [part for part in found if part]


def _boxed(text: str) -> list[str]:
    found, end = [], 0
    for box in _BOXED.finditer(text):
        if box.start() < end:  # a box within a box
            continue
        depth, end = 1, box.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        content = text[box.end() : end - 1 if depth == 0 else end]
        found.append(plain_tex(content).strip())
    return [part for part in found if part]


def plain_tex(text: str) -> str:
    """TeX as plain text, as far as short answers need it: fractions with a slash, without font commands and braces."""
    if "\\" not in text and "{" not in text:
        return text
    return _TEX.sub(" ", _FRACTION.sub(r"\1/\2", text)).replace("{", "").replace("}", "")


def plain_text(text: str) -> str:
    """Text in ASCII punctuation, without emphasis, headings, quotes, dollar signs, symbols, HTML and TeX commands."""
    plain = plain_tex(_HTML.sub("", _SYMBOLS.sub("", text.translate(_PLAIN)))).translate(_EMPHASIS).strip(" \t\r\n_")
    quoted = _QUOTED.fullmatch(plain)
    return quoted[1].strip() if quoted else plain
