"""Inspect training data: supervised tokens, lengths and bad records, as text and HTML."""

from __future__ import annotations

import html
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from florence_vl.data.mixture import MapReader
from florence_vl.data.records import BadRecord, Record
from florence_vl.data.sampler import Permutation

if TYPE_CHECKING:
    from florence_vl.data.encode import RecordEncoder, Sample

KINDS = ("supervised", "context", "image")


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind.

    Args:
        kind: "supervised", "context" (not supervised) or "image".
        text: Decoded text with special tokens; for images "image 1" and so on.
        tokens: Number of tokens.
    """

    kind: str
    text: str
    tokens: int


@dataclass
class Inspected:
    """A record as training sees it.

    Args:
        index: Number of the record, or position in the mixture.
        record: The record; None if the reader failed.
        segments: Its tokens; by role if there is no encoder, with `tokens` 0.
        num_tokens: Length, including image tokens.
        num_supervised: Number of supervised tokens.
        error: Why training would skip it; None for a good record.
    """

    index: int
    record: Record | None
    segments: list[Segment] = field(default_factory=list)
    num_tokens: int = 0
    num_supervised: int = 0
    error: BadRecord | None = None


def segments_of(sample: Sample, processor: Any) -> list[Segment]:
    """Runs of a sample's tokens by kind, decoded.

    Args:
        sample: The sample; its pixels are not needed.
        processor: Provides the tokenizer and the image token's id.
    """
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    kinds = [
        "image" if token == processor.image_token_id else "supervised" if label != -100 else "context"
        for token, label in zip(ids, labels, strict=True)
    ]
    result: list[Segment] = []
    start, shown = 0, 0
    for kind, run in itertools.groupby(kinds):
        end = start + len(list(run))
        if kind == "image":
            while start < end:  # images may be adjacent
                tokens = sample.image_tokens[shown]
                shown, start = shown + 1, start + tokens
                result.append(Segment("image", f"image {shown}", tokens))
        else:
            text = processor.tokenizer.decode(ids[start:end], skip_special_tokens=False)
            result.append(Segment(kind, text, end - start))
        start = end
    return result


def inspect_records(
    records: MapReader, indices: Iterable[int], encoder: RecordEncoder | None = None, check_images: bool = True
) -> Iterator[Inspected]:
    """Read some records and, with an encoder, encode them.

    Args:
        records: Reader or mixture.
        indices: Their indices.
        encoder: Without it segments follow the roles, and no tokens are counted.
        check_images: Also decode the images, to find broken ones.
    """
    for index in indices:
        record = None
        try:
            record = records[index]
            if encoder is None:
                found = Inspected(index, record, _segments_by_role(record))
                if check_images:
                    _open_images(record)
            else:
                sample = encoder(record) if check_images else encoder.outline(record)
                found = Inspected(
                    index, record, segments_of(sample, encoder.processor), len(sample), sample.num_supervised
                )
            yield found
        except BadRecord as error:
            yield Inspected(index, record, _segments_by_role(record) if record else [], error=error)


def _segments_by_role(record: Record) -> list[Segment]:
    result, shown = [], 0
    for message in record.messages:
        learned = message["role"] == "assistant"
        result.append(Segment("context", f"{message['role']}: ", 0))
        for part in message["content"]:
            if part["type"] == "image":
                shown += 1
                result.append(Segment("image", f"image {shown}", 0))
            else:
                result.append(Segment("supervised" if learned else "context", part["text"], 0))
        result.append(Segment("context", "\n", 0))
    return result


def _open_images(record: Record) -> None:
    from florence_vl.model.pictures import open_image

    for number, image in enumerate(record.images):
        try:
            open_image(image)
        except (OSError, ValueError) as error:
            raise BadRecord("image", f"image {number} of record {record.id!r} of {record.source!r}: {error}") from error


@dataclass
class DataStats:
    """Statistics of a data set or a sample of it.

    Args:
        records: Records in the data set.
        examined: Number of records examined.
        tokens: Length of every good record; empty without an encoder.
        supervised: Supervised tokens of every good record.
        images: Images of every good record.
        turns: Answers of the assistant in every good record.
        characters: Text length of every good record.
        bad: Kind -> number.
        examples: First message of every kind.
        sources: Source -> number of good records.
    """

    records: int
    examined: int = 0
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Counts, fractions, and mean, median, 95 % quantile and maximum of each length, as plain types."""
        good = len(self.images)
        result: dict[str, Any] = {
            "records": self.records,
            "examined": self.examined,
            "bad": dict(self.bad),
            "bad_share": sum(self.bad.values()) / self.examined if self.examined else 0.0,
            "text_only_share": sum(n == 0 for n in self.images) / good if good else 0.0,
            "sources": dict(self.sources),
        }
        for name in ("images", "turns", "characters", "tokens", "supervised"):
            values = getattr(self, name)
            if values:
                array = np.asarray(values)
                result[name] = {
                    "mean": float(array.mean()),
                    "median": float(np.median(array)),
                    "p95": float(np.percentile(array, 95)),
                    "max": int(array.max()),
                    "total": int(array.sum()),
                }
        return result


def collect_stats(
    records: MapReader, limit: int | None = 10_000, encoder: RecordEncoder | None = None, check_images: bool = False
) -> DataStats:
    """Statistics of a data set, over a uniform sample if it is larger than `limit`.

    Args:
        records: Reader or mixture.
        limit: Maximum number of records; None means all.
        encoder: Counts tokens.
        check_images: Decode every image.
    """
    total = len(records)
    stats = DataStats(total)
    count = total if limit is None else min(limit, total)
    indices: Iterable[int] = range(total)
    if count < total:
        shuffle = Permutation(total, seed=0)
        indices = sorted(shuffle(i) for i in range(count))
    for found in inspect_records(records, indices, encoder, check_images):
        stats.examined += 1
        if found.error is not None or found.record is None:
            assert found.error is not None
            stats.bad[found.error.kind] += 1
            stats.examples.setdefault(found.error.kind, str(found.error))
            continue
        stats.sources[found.record.source] += 1
        stats.images.append(len(found.record.images))
        stats.turns.append(sum(message["role"] == "assistant" for message in found.record.messages))
        stats.characters.append(len(found.record.text()))
        if encoder is not None:
            stats.tokens.append(found.num_tokens)
            stats.supervised.append(found.num_supervised)
    return stats


def histogram(values: Sequence[int], bins: int = 12, width: int = 40) -> list[str]:
    """Text lines of a histogram: range, bar, count."""
    if not len(values):
        return []
    low, high = min(values), max(values)
    bins = max(1, min(bins, high - low + 1))
    counts, edges = np.histogram(values, bins=bins, range=(low, high + 1))
    labels = [f"{int(np.ceil(a))}-{int(np.ceil(b)) - 1}" for a, b in itertools.pairwise(edges)]
    pad = max(map(len, labels))
    return [
        f"{label:>{pad}} {'█' * round(width * n / counts.max()) or ('▏' if n else ''):<{width}} {n}"
        for label, n in zip(labels, counts, strict=True)
    ]


_COLORS = {"supervised": "#14532d;background:#bbf7d0", "context": "#475569", "image": "#1e3a8a;background:#dbeafe"}


def html_page(samples: Sequence[Inspected], title: str, thumbnail: int = 320) -> str:
    """A self-contained page: every sample with its pictures, supervised text on green.

    Args:
        samples: From `inspect_records`.
        title: Heading.
        thumbnail: Longest side of the embedded pictures, px.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#0f172a}"
        "article{border-top:1px solid #cbd5e1;padding:1rem 0}pre{white-space:pre-wrap;font:inherit;margin:.5rem 0}"
        "img{max-height:20rem;margin:.3rem .3rem 0 0}.meta{color:#64748b}.bad{color:#b91c1c}span{border-radius:3px}"
        + "".join(f".{kind}{{color:{color}}}" for kind, color in _COLORS.items())
        + "</style>",
        f"<h1>{html.escape(title)}</h1>",
        "<p><span class=supervised>supervised</span> <span class=context>not supervised</span> "
        "<span class=image>image</span></p>",
    ]
    for sample in samples:
        record = sample.record
        name = f"{record.source} / {record.id}" if record else "unreadable"
        parts.append(f"<article><h2>{sample.index}: {html.escape(name)}</h2>")
        if sample.num_tokens:
            parts.append(f"<p class=meta>{sample.num_tokens} tokens, {sample.num_supervised} supervised</p>")
        if sample.error is not None:
            parts.append(f"<p class=bad>{html.escape(sample.error.kind)}: {html.escape(str(sample.error))}</p>")
        parts += [_thumbnail(image, thumbnail) for image in (record.images if record else [])]
        text = "".join(
            f"<span class={segment.kind}>{html.escape(_caption_of(segment))}</span>" for segment in sample.segments
        )
        parts.append(f"<pre>{text}</pre></article>")
    return "\n".join(parts) + "</html>\n"


def _caption_of(segment: Segment) -> str:
    if segment.kind != "image":
        return segment.text
    return f"[{segment.text}: {segment.tokens} tokens]" if segment.tokens else f"[{segment.text}]"


def _thumbnail(image: Any, side: int) -> str:
    from florence_vl.model.pictures import data_url, open_image

    try:
        picture = open_image(image)
    except (OSError, ValueError) as error:
        return f"<p class=bad>{html.escape(str(error))}</p>"
    size = f"{picture.width}x{picture.height}"
    return f'<img alt="{size}" title="{size} px" src="{data_url(picture, "jpeg", side)}">'


def plain_text(sample: Inspected) -> str:
    """A sample as text for files and pipes, with supervised tokens between ⟦ and ⟧."""
    return "".join(
        f"⟦{segment.text}⟧" if segment.kind == "supervised" else _caption_of(segment) for segment in sample.segments
    )


def rich_text(sample: Inspected) -> Any:
    """A sample as `rich.text.Text`: supervised tokens green, images blue, others dim."""
    from rich.text import Text

    styles = {"supervised": "bold green", "context": "dim", "image": "blue"}
    text = Text()
    for segment in sample.segments:
        text.append(_caption_of(segment), style=styles[segment.kind])
    return text
