"""Image-caption pairs for the alignment loss, from any supported data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.train.contrastive import Groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from florence_vl.data.records import ImageSource


@dataclass
class Pairs:
    """Images and their captions.

    Args:
        images: Image sources.
        captions: One caption per image.
        ids: Ids of the records.
        skipped: Number of skipped records by reason.
    """

    images: list[ImageSource] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.images)

    def keep(self, rows: Sequence[int]) -> Pairs:
        """The pairs of these rows."""
        return Pairs(
            [self.images[i] for i in rows], [self.captions[i] for i in rows], [self.ids[i] for i in rows], self.skipped
        )

    def duplicates(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Number of pairs that share their caption, or their image, with another pair."""
        groups = Groups.of(self.captions, keys)
        return {
            "pairs with a caption that others have": _shared(groups.caption_N.tolist()),
            "pairs with an image that others have": _shared(groups.image_N.tolist()),
        }


def _shared(ids: list[int]) -> int:
    counts = Counter(ids)
    return sum(count for count in counts.values() if count > 1)


def read_pairs(path: str | Path, count: int | None = None, seed: int = 0, **options: Any) -> Pairs:
    """Read the pairs of a data set in an order that depends only on the seed.

    Args:
        path: Anything that `florence_vl.data.readers.open_reader` reads.
        count: Number of pairs; None means all.
        seed: Seed of the selection.
        options: Options of the reader, e.g. `image_root`.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: No record has one image and a caption; the message counts the reasons.
    """
    import torch

    from florence_vl.data.readers import open_reader
    from florence_vl.data.records import BadRecord, caption_of

    if count is not None and count < 1:
        raise ValueError(f"{count} pairs were asked for; give a positive number")
    reader = open_reader(path, **options)
    pairs = Pairs()
    for index in torch.randperm(len(reader), generator=torch.Generator().manual_seed(seed)).tolist():
        if count is not None and len(pairs) == count:
            break
        try:
            record = reader[index]
            found = caption_of(record)
        except BadRecord as error:
            found = f"bad record ({error.kind})"
        if isinstance(found, str):
            pairs.skipped[found] += 1
            continue
        pairs.images.append(found[0])
        pairs.captions.append(found[1])
        pairs.ids.append(record.id)
    if not len(pairs):
        raise ValueError(
            f"{path} contains no pair of one image and a caption: of {len(reader)} records, "
            + ", ".join(f"{n} have {reason}" for reason, n in pairs.skipped.most_common())
        )
    return pairs
