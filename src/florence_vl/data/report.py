"""What a run read: bad records by kind and source, and the fill ratio of batches."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BadEntry:
    """A record that was skipped.

    Args:
        kind: See `BadRecord`.
        source: Name of the source.
        index: Number of the record in the source's reader.
        position: Position in the mixture's stream.
        message: What was found.
    """

    kind: str
    source: str
    index: int
    position: int
    message: str


class DataReport:
    """Counts of one rank; stops the run if too much of the data is bad.

    Args:
        max_bad_share: Maximum fraction of bad records.
        min_records: Number of records that must have been read before the fraction is checked.
        path: File to which bad records are appended as JSON lines; None writes none.
        counts: Results of `counts()` at the checkpoint, which are added up.
        size: Length of the file at the checkpoint; what the killed session wrote behind it is overwritten. None keeps
            it.
    """

    def __init__(
        self,
        max_bad_share: float = 0.05,
        min_records: int = 1000,
        path: str | Path | None = None,
        counts: Iterable[Mapping[str, Any]] = (),
        size: int | None = None,
    ) -> None:
        self.max_bad_share, self.min_records = max_bad_share, min_records
        self.path = Path(path) if path else None
        self.records = self.samples = self.tokens = self.slots = 0
        self.bad: Counter[tuple[str, str]] = Counter()
        self._last: list[BadEntry] = []
        self._size = size
        for saved in counts:
            for name in _NUMBERS:
                setattr(self, name, getattr(self, name) + int(saved[name]))
            self.bad.update({(kind, source): int(n) for kind, source, n in saved["bad"]})

    def add(self, *, records: int, bad: Sequence[BadEntry], samples: int, tokens: int, slots: int) -> None:
        """Count one micro-batch.

        Args:
            records: Number of newly read records.
            bad: Skipped records among them, or of the batch.
            samples: Number of samples.
            tokens: Their tokens, without padding.
            slots: Tokens of the collated batch, with padding.

        Raises:
            ValueError: More than `max_bad_share` of the records are bad.
        """
        self.records += records
        self.samples += samples
        self.tokens += tokens
        self.slots += slots
        if bad:
            self.bad.update((entry.kind, entry.source) for entry in bad)
            self._last = [*self._last, *bad][-3:]
            self._write(bad)
            self._check()

    def _write(self, bad: Sequence[BadEntry]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._size is not None and self._size < file.tell():
                file.truncate(self._size)
            for entry in bad:
                file.write(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
            self._size = file.seek(0, os.SEEK_END)

    def _check(self) -> None:
        if self.records < self.min_records or self.bad_share <= self.max_bad_share:
            return
        where = f" All are listed in {self.path}." if self.path else ""
        raise ValueError(
            f"{self.num_bad} of {self.records} records are bad ({self.bad_share:.1%}; max_bad_share allows "
            f"{self.max_bad_share:.1%}): {self.most_common}. The last: {self.last_message}.{where}"
        )

    @property
    def num_bad(self) -> int:
        """Number of skipped records."""
        return sum(self.bad.values())

    @property
    def most_common(self) -> str:
        """The commonest bad records by kind and source, with their numbers."""
        return ", ".join(f"{n} x {kind} in {source}" for (kind, source), n in self.bad.most_common(5))

    @property
    def last_message(self) -> str:
        """Message of the last skipped record."""
        return self._last[-1].message if self._last else ""

    @property
    def bad_share(self) -> float:
        """Skipped records over records read."""
        return self.num_bad / self.records if self.records else 0.0

    @property
    def efficiency(self) -> float:
        """Tokens of samples divided by computed tokens (with padding), in [0, 1]."""
        return self.tokens / self.slots if self.slots else 0.0

    def bad_by_name(self) -> dict[str, int]:
        """Skipped records, `source/kind` -> number."""
        return {f"{source}/{kind}": n for (kind, source), n in sorted(self.bad.items())}

    def counts(self) -> dict[str, Any]:
        """All counts as plain types, for a checkpoint."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        plain["bad"] = [[kind, source, n] for (kind, source), n in sorted(self.bad.items())]
        return plain | {"size": self._size}


def rank_file(path: str | None, rank: int) -> str | None:
    """The file of a rank: rank 0's is `path`, others have `.rank<r>` before the suffix."""
    if not path or not rank:
        return path
    return str(Path(path).with_name(f"{Path(path).stem}.rank{rank}{Path(path).suffix}"))


_NUMBERS = ("records", "samples", "tokens", "slots")
