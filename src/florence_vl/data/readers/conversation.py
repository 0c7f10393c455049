"""Convert conversations of data sets (LLaVA, ShareGPT, chat messages, question-answer pairs) to messages and images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from florence_vl.data.readers.images import ImageStore
from florence_vl.data.records import BadRecord, ImageSource, image_part, printable, text_part
from florence_vl.registry import did_you_mean

_log = logging.getLogger(__name__)

PLACEHOLDER = "<image>"
_LLAVA_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


def split_placeholders(text: str) -> list[dict[str, str]]:
    """Text with `<image>` placeholders as parts, each image at its place.

    Space around a placeholder is stripped (as in LLaVA), because the chat template determines it.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return [text_part(text)]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(image_part())
        if piece.strip():
            parts.append(text_part(piece.strip()))
    return parts


def from_llava(conversations: Any, num_images: int, where: str) -> list[dict[str, Any]]:
    """LLaVA `conversations` as messages.

    `<image>` in a human turn is the position of an image. If a record has images but no placeholder, they come first.
    Leading turns of the assistant are dropped, as in LLaVA.

    Args:
        conversations: List of `{"from": "human" | "gpt" | "system", "value": text}`.
        num_images: Number of images in the record.
        where: Name of the record, for messages.

    Raises:
        BadRecord: Kind "messages".
    """

    def bad(text: str) -> BadRecord:
        return BadRecord("messages", f"{where}: {text}")

    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise bad(f"'conversations' must be a list of turns, found {type(conversations).__name__}")
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(conversations):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise bad(f"turn {number} must have 'from' and 'value', found {turn!r:.80}")
        if not isinstance(turn["from"], str) or turn["from"] not in _LLAVA_ROLES:
            raise bad(f"turn {number} is from {turn['from']!r}. {did_you_mean(str(turn['from']), _LLAVA_ROLES)}")
        if not isinstance(turn["value"], str):
            raise bad(f"turn {number} has no text, found {turn['value']!r:.80}")
        refuse_meaning(turn, f"{where}: turn {number}", turn=True)
        role = _LLAVA_ROLES[turn["from"]]
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            continue
        # only a human turn can contain an image: elsewhere `<image>` is text
        content = split_placeholders(turn["value"]) if role == "user" else [text_part(turn["value"])]
        messages.append({"role": role, "content": content})
    return place_images(messages, num_images, where)


def place_images(messages: list[dict[str, Any]], num_images: int, where: str) -> list[dict[str, Any]]:
    """Put images without a placeholder at the start of the first user turn, and check the numbers.

    Raises:
        BadRecord: Kind "messages": there is no user turn, or the numbers of placeholders and images differ.
    """
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        raise BadRecord("messages", f"{where}: there is no turn of the user")
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if shown == 0 and num_images:
        users[0]["content"] = [image_part() for _ in range(num_images)] + users[0]["content"]
    elif shown != num_images:
        raise BadRecord("messages", f"{where}: the text shows {shown} images, the record names {num_images}")
    return messages


def from_pairs(texts: Any, num_images: int, where: str) -> list[dict[str, Any]]:
    """Question-answer pairs (`texts` of Docmatix and the-cauldron) as one conversation about all images.

    Args:
        texts: List of `{"user": question, "assistant": answer}`.
        num_images: Images, all shown before the first question.
        where: Name of the record, for messages.

    Raises:
        BadRecord: Kind "messages".
    """
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise BadRecord("messages", f"{where}: 'texts' must be a list of question-answer pairs, found {texts!r:.60}")
    messages = []
    for number, pair in enumerate(texts):
        if isinstance(pair, Mapping):
            refuse_meaning(pair, f"{where}: pair {number}", SYSTEM_KEYS, turn=True)
        question, answer = (pair.get("user"), pair.get("assistant")) if isinstance(pair, Mapping) else (None, None)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise BadRecord("messages", f"{where}: pair {number} needs 'user' and 'assistant', found {pair!r:.80}")
        messages.append({"role": "user", "content": [text_part(question)]})
        messages.append({"role": "assistant", "content": [text_part(answer)]})
    return place_images(messages, num_images, where)


def from_messages(
    messages: Any, images: Any, store: ImageStore, where: str
) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """Convert chat messages in their common forms to the form of `Record`.

    Content is a string (with `<image>` placeholders if the row has an `images` list) or a list of parts: text,
    `{"type": "image"}` with its source in `image`, `path`, `url` or in the row's list, and OpenAI's
    `{"type": "image_url", "image_url": {"url": ...}}`.

    Args:
        messages: The row's messages.
        images: The row's image list, a single image, or None.
        store: Resolves names.
        where: Name of the record, for messages.

    Raises:
        BadRecord: Kind "messages" or "image".
    """

    def bad(text: str) -> BadRecord:
        return BadRecord("messages", f"{where}: {text}")

    listed = as_list(images)
    given = iter(listed)
    sources: list[ImageSource] = []
    result: list[dict[str, Any]] = []
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise bad(f"'messages' must be a list, found {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise bad(f"message {number} must have 'role' and 'content', found {message!r:.80}")
        refuse_meaning(message, f"{where}: message {number}", turn=True)
        content = message["content"]
        if isinstance(content, str):
            if message["role"] == "user" and PLACEHOLDER in content and not listed:
                raise bad(
                    f"message {number} shows {PLACEHOLDER} but the record names no image (as text, the word belongs "
                    "into a text part)"
                )
            content = split_placeholders(content) if message["role"] == "user" else [text_part(content)]
        parts = []
        for part in content if isinstance(content, Sequence) else []:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("image", "image_url"):
                parts.append(dict(part) if isinstance(part, Mapping) else part)
                continue
            own = part.get("image_url") if kind == "image_url" else None
            own = own.get("url") if isinstance(own, Mapping) else own
            own = own or next((part[key] for key in ("image", "path", "url") if part.get(key)), None)
            if own is None:
                own = next(given, None)
            if own is None:
                raise bad(f"message {number} shows an image but the record names only {len(listed)}")
            sources.append(image_source(own, store))
            parts.append(image_part())
        result.append({"role": message["role"], "content": parts})
    rest = list(given)
    if rest:
        if sources:
            raise bad(f"the text shows {len(sources)} images, the record names {len(rest)} more")
        sources = [image_source(image, store) for image in rest]
        place_images(result, len(sources), where)
    return result, sources


def from_row(
    row: Mapping[str, Any], layout: str, images: Sequence[Any], store: ImageStore, where: str
) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """Messages and images of a row of any layout. Keys that change the meaning are used, or make the record bad.

    Args:
        row: The stored record.
        layout: The key of its conversation: `conversations`, `messages` or `texts`.
        images: Its images, as the row names them.
        store: Resolves names.
        where: Name of the record, for messages.

    Raises:
        BadRecord: Kind "messages" or "image".
    """
    refuse_meaning(row, where)
    if layout == "messages":
        messages, sources = from_messages(row.get("messages"), list(images), store, where)
    else:
        convert = from_llava if layout == "conversations" else from_pairs
        messages = convert(row.get(layout), len(images), where)
        sources = [image_source(image, store) for image in images]
    systems = [row[key] for key in SYSTEM_KEYS if row.get(key)]
    if systems:
        system = systems[0]
        if len(systems) > 1 or not isinstance(system, str) or any(m["role"] == "system" for m in messages):
            raise BadRecord("messages", f"{where}: expected one system text, found also {system!r:.80}")
        messages.insert(0, {"role": "system", "content": [text_part(system)]})
    return messages, sources


SYSTEM_KEYS = ("system", "system_prompt")
_OTHER_MEDIA = ("video", "videos", "audio", "audios", "speech", "pdf", "point_cloud")
_TOOLS = ("tools", "functions", "tool_calls", "function_call")
_REASONING = ("reasoning", "reasoning_content", "thinking")
_WEIGHTS = ("weight", "loss_weight", "loss", "loss_mask", "train", "training", "trainable", "learn")
_MASKS = ("mask", "masked", "ignore", "skip")  # true: not supervised
MEANING_KEYS = (*SYSTEM_KEYS, *_OTHER_MEDIA, *_TOOLS)
"""Keys of a row that change its meaning; tables are read with these columns."""
# read, or known to contain nothing for training
_KNOWN = (
    *("id", "image", "images", "source", "url", "width", "height", "license", "model", "task_name"),
    *("kind", "task"),  # of florence-vl-mini's data sets
)


def refuse_meaning(row: Mapping[str, Any], where: str, further: Sequence[str] = (), turn: bool = False) -> None:
    """Raise an error for a row or turn with a key that changes its meaning and that this package does not use.

    Args:
        row: The row or turn.
        where: Its name, for messages.
        further: Further unused keys, e.g. a system text in addition to a caption.
        turn: Whether it is a turn, for which weights, masks and reasoning are not supported.

    Raises:
        BadRecord: Kind "messages": media other than images, tools, or the weight of a turn.
    """
    for key in (*_OTHER_MEDIA, *_TOOLS, *further, *(_REASONING if turn else ())):
        if not _is_empty(row.get(key)):
            raise BadRecord("messages", f"{where} has {key!r}, which is not supported: {row[key]!r:.60}")
    for keys, plain in ((_WEIGHTS, 1), (_MASKS, 0)) if turn else ():
        for key in keys:
            if row.get(key) is not None and row[key] != plain:
                raise BadRecord(
                    "messages", f"{where} has {key}={row[key]!r:.60}; turns cannot be weighted individually: remove it"
                )


def warn_unused(path: str, keys: Iterable[Any], used: Iterable[str]) -> None:
    """Warn about keys or columns of a file that are not read.

    Args:
        path: The file, for the message.
        keys: Keys of its first record.
        used: Keys that the reader reads.
    """
    unused = {str(key) for key in keys} - {*used, *_KNOWN, *MEANING_KEYS}
    if unused:
        _log.warning("%s: keys that are not used: %s", path, printable(", ".join(sorted(unused))))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, bytes, Sequence, Mapping)) and not value)


def row_images(row: Mapping[str, Any], where: str) -> list[Any]:
    """Images of a row, from `image` or `images`, whichever is filled.

    Raises:
        BadRecord: Kind "messages": both are filled, with different images.
    """
    found = [listed for key in ("image", "images") if (listed := as_list(row.get(key)))]
    if len(found) == 2 and found[0] != found[1]:
        raise BadRecord("messages", f"{where} names images under 'image' and under 'images', and they differ")
    return found[0] if found else []


def as_list(images: Any) -> list[Any]:
    """`image` as a list: None or "" gives an empty list, a single image a list of one."""
    if images is None or (isinstance(images, str) and not images):
        return []
    if isinstance(images, (list, tuple)):
        return [image for image in images if image is not None]
    return [images]


def image_source(image: Any, store: ImageStore) -> ImageSource:
    """An image as stored by a data set: a name, encoded bytes, or Hugging Face's `{"bytes": ..., "path": ...}`.

    Raises:
        BadRecord: Kind "image": neither a name nor bytes.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (bytes, bytearray, memoryview)) and len(image):
        return bytes(image)
    if isinstance(image, str) and image:
        return store[image]
    raise BadRecord("image", f"an image must be a file name or bytes, found {image!r:.60}")
