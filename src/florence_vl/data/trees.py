"""Message trees: the question-answer pairs about one picture as one sample, with one copy of its image tokens.

A tree has a trunk, which is all tokens up to the last image (system message, image tokens), and branches: what each
pair has behind it. A branch sees the trunk and itself, and its positions go on behind the trunk, so every pair is
computed as if it were a sample of its own (`florence_vl.model.varlen_attention`), while the picture runs through tower
and LLM once. Pairs are records that show the same picture in the same window, and with `split_turns` the turns of one
record. Trunks are compared token by token, so pairs with different system messages do not meet.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from florence_vl.data.encode import IGNORE, RecordEncoder, Sample
from florence_vl.data.mixture import MapReader
from florence_vl.data.records import BadRecord, Record, normalize_messages
from florence_vl.data.sampler import GroupShuffles

WHOLE = -1
"""The turn of a pair that is a whole record."""


class Pair(NamedTuple):
    """What becomes one sample, or one branch of a tree.

    Attributes:
        position: Of its record in the mixture.
        turn: Which turn of the record, see `split_turns`.
    """

    position: int
    turn: int = WHOLE


Tree = list[Pair]
"""Pairs that share a picture, or a pair by itself."""


@dataclass(frozen=True)
class Leaf:
    """Size of a pair, and what it can share with others.

    Attributes:
        tokens: Length of its sample, trunk included.
        images: Images of its sample.
        turn: See `Pair`.
        trunk: Tokens that it shares with leaves of the same `picture`.
        picture: Digest of its pictures and of the trunk's tokens; None where it can share nothing.
    """

    tokens: int
    images: int
    turn: int = WHOLE
    trunk: int = 0
    picture: bytes | None = None


def split_turns(record: Record) -> list[Record]:
    """The turns of a record as records of their own, each with its system message and all its pictures.

    Only turns about pictures are split: all images must stand before the first question, and each question must have
    its answer. Any other record comes back whole, as the only one.

    Raises:
        BadRecord: kind "messages": the conversation is malformed.
    """
    messages = normalize_messages(record.messages, where=f"record {record.id!r} of {record.source!r}")
    system = messages[:1] if messages[0]["role"] == "system" else []
    questions, answers = messages[len(system) :: 2], messages[len(system) + 1 :: 2]
    alternate = len(questions) == len(answers) and all(
        (question["role"], answer["role"]) == ("user", "assistant")
        for question, answer in zip(questions, answers, strict=True)
    )
    if not alternate or len(questions) < 2:
        return [record]
    shown = list(itertools.takewhile(lambda part: part["type"] == "image", questions[0]["content"]))
    if not shown or len(shown) != record.num_image_parts:
        return [record]
    texts = [questions[0]["content"][len(shown) :], *(question["content"] for question in questions[1:])]
    return [
        replace(record, messages=[*system, {"role": "user", "content": [*shown, *text]}, answer])
        for text, answer in zip(texts, answers, strict=True)
    ]


def picture_key(record: Record) -> bytes | None:
    """Equal for records that show the same pictures, by place or encoded content; None without, or for PIL images."""
    if not record.images or any(isinstance(image, Image.Image) for image in record.images):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for image in record.images:
        digest.update(hashlib.sha256(image if isinstance(image, bytes) else repr(image).encode()).digest())
    return digest.digest()


def keep_pictures_together(reader: MapReader) -> GroupShuffles | None:
    """Shuffles of a reader's records that keep those of a picture together, so that they meet in a window.

    Every record is read once, without its image. None if no picture is shown by several records.
    """
    groups = np.arange(len(reader))
    first: dict[bytes, int] = {}
    for index in range(len(reader)):
        try:
            key = picture_key(reader[index])
        except BadRecord:
            continue
        if key is not None:
            groups[index] = first.setdefault(key, index)
    return GroupShuffles(groups) if (groups != np.arange(len(reader))).any() else None


def shares_pictures(encoder: RecordEncoder) -> bool:
    """Whether a picture's tokens are the same in every record: no fusion with the question, no drawn views."""
    return not encoder.processor.question_context and encoder.views is None and not encoder.distill


def trunk_length(sample: Sample, image_token_id: int) -> int:
    """Tokens of a sample up to its last image; 0 where they can't be shared.

    That is without an image, and where something is learned before the last image ends or from its last token.
    """
    places = (sample.input_ids == image_token_id).nonzero()
    if not len(places):
        return 0
    trunk = int(places[-1]) + 1
    return 0 if (sample.labels[: trunk + 1] != IGNORE).any() else trunk


def measure_leaf(encoder: RecordEncoder, record: Record, turn: int = WHOLE) -> Leaf:
    """The leaf of a record that can share its picture; no image is decoded.

    Raises:
        BadRecord: As `RecordEncoder.outline`.
    """
    sample = encoder.outline(record)
    trunk = trunk_length(sample, encoder.processor.image_token_id)
    key = picture_key(record) if trunk else None
    if key is None:
        return Leaf(len(sample), len(sample.image_tokens), turn)
    picture = hashlib.blake2b(key + sample.input_ids[:trunk].numpy().tobytes(), digest_size=16).digest()
    return Leaf(len(sample), len(sample.image_tokens), turn, trunk, picture)


def tree_tokens(leaves: Sequence[Leaf]) -> int:
    """Tokens of a tree: its trunk once, and every branch."""
    return sum(leaf.tokens for leaf in leaves) - sum(leaf.trunk for leaf in leaves[1:])


def grow_trees(leaves: Sequence[Leaf], budget: int) -> list[list[int]]:
    """Leaves of one picture together, in trees of at most so many tokens.

    Args:
        leaves: In the order of the stream.
        budget: Tokens of a tree, as those of a row.

    Returns:
        Trees as lists of indices into `leaves`, each index once; a leaf that shares nothing is a tree of its own.
    """
    trees: list[list[int]] = []
    tokens: list[int] = []
    latest: dict[bytes, int] = {}  # picture -> its last tree
    for index, leaf in enumerate(leaves):
        tree = None if leaf.picture is None else latest.get(leaf.picture)
        if tree is not None and tokens[tree] + leaf.tokens - leaf.trunk <= budget:
            trees[tree].append(index)
            tokens[tree] += leaf.tokens - leaf.trunk
            continue
        if leaf.picture is not None:
            latest[leaf.picture] = len(trees)
        trees.append([index])
        tokens.append(leaf.tokens)
    return trees


def compare_layouts(
    records: MapReader, encoder: RecordEncoder, count: int, window: int, budget: int
) -> dict[str, tuple[int, int]]:
    """What trees would save: tokens and images of the first records, laid out with and without.

    Args:
        records: Reader or mixture.
        encoder: Counts tokens.
        count: How many records.
        window: Records that are looked at together.
        budget: Most tokens of a tree.

    Returns:
        (tokens, images) of `records`, `records as trees`, `turns` (each turn about a picture by itself, with the
        picture) and `turns as trees`.
    """
    totals: dict[str, list[int]] = {}
    for first in range(0, count, window):
        for name in ("records", "turns"):
            leaves: list[Leaf] = []
            for index in range(first, min(first + window, count)):
                with contextlib.suppress(BadRecord):
                    parts = [records[index]] if name == "records" else split_turns(records[index])
                    leaves += [measure_leaf(encoder, part) for part in parts]
            trees = [[leaves[i] for i in tree] for tree in grow_trees(leaves, budget)]
            for layout, groups in ((name, [[leaf] for leaf in leaves]), (f"{name} as trees", trees)):
                total = totals.setdefault(layout, [0, 0])
                total[0] += sum(map(tree_tokens, groups))
                total[1] += sum(group[0].images for group in groups)
    return {layout: (tokens, images) for layout, (tokens, images) in totals.items()}


def join_samples(samples: Sequence[Sample], image_token_id: int) -> Sample:
    """The tree of samples that begin with the same trunk; only the first needs its pixels."""
    first = samples[0]
    if len(samples) == 1:
        return first
    trunk = trunk_length(first, image_token_id)
    assert all(torch.equal(sample.input_ids[:trunk], first.input_ids[:trunk]) for sample in samples[1:])
    starts = itertools.accumulate((len(sample) - trunk for sample in samples[:-1]), initial=trunk)
    return replace(
        first,
        input_ids=torch.cat([first.input_ids, *(sample.input_ids[trunk:] for sample in samples[1:])]),
        labels=torch.cat([first.labels, *(sample.labels[trunk:] for sample in samples[1:])]),
        branches=tuple(starts),
    )
