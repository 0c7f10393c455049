"""Compare encoders, or subsets of one encoder's features, by the alignment loss (paper Figures 4 and 5).

Each encoder runs over the images once; every subset, seed and width is then trained from the cached pooled features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import Tensor

from florence_vl.analyze.alignment import AlignmentConfig, AlignmentRun, split_pairs, train_alignment
from florence_vl.analyze.pairs import Pairs
from florence_vl.analyze.pooling import image_keys, pool_images
from florence_vl.analyze.text import TextEncoder, pool_texts
from florence_vl.model.features import FeatureStore
from florence_vl.statistics import Interval, interval, paired
from florence_vl.train.contrastive import Groups

if TYPE_CHECKING:
    from pathlib import Path

    from florence_vl.analyze.encoders import VisionEncoder

Log = Callable[[str], None]


@dataclass
class Features:
    """Pooled features of all encoders for the same pairs, and the pairs' pooled text features.

    Args:
        dims: Label of an encoder -> feature name -> channels D.
        table: (label, feature names) -> (N, sum of D), read lazily from the cache.
        text: (N, T).
        groups: Duplicate captions and images.
        pairs: Number of pairs N.
        skipped: Number of skipped pairs by reason.
        duplicates: Number of pairs that share a caption or an image.
        identities: Values that determine each encoder's and the LLM's features.
        speed: Encoder -> number of computed images and images per second; missing if all were cached.
    """

    dims: dict[str, dict[str, int]]
    table: Callable[[str, Sequence[str]], Tensor]
    text: Tensor
    groups: Groups
    pairs: int
    skipped: Counter[str]
    duplicates: dict[str, int]
    identities: dict[str, Any]
    speed: dict[str, tuple[int, float]]


def collect(
    encoders: Sequence[tuple[str, Callable[[], VisionEncoder]]],
    llm: TextEncoder,
    pairs: Pairs,
    *,
    root: Path | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    log: Log = lambda _: None,
) -> Features:
    """Pool all features, computing only those missing in the cache; one encoder is in memory at a time.

    Args:
        encoders: Label and loader of each encoder.
        llm: The LLM's text encoder.
        pairs: The pairs; those with unreadable images are skipped for every encoder, and counted.
        root: Folder of the cache; `cache_dir()/features` by default.
        batch_size: Images per forward pass.
        device: Device of the encoders.
        log: Called with progress messages.

    Raises:
        ValueError: No image is readable.
    """
    problems: Counter[str] = Counter()
    keys = image_keys(pairs.images, problems)
    stores: dict[str, tuple[FeatureStore, dict[str, int]]] = {}
    identities: dict[str, Any] = {}
    speed: dict[str, tuple[int, float]] = {}
    for label, load in encoders:
        encoder = load().to(device)
        store, report = pool_images(
            encoder,
            pairs.images,
            FeatureStore(encoder.identity, root),
            batch_size=batch_size,
            keys=keys,
            progress=_progress(log, label),
        )
        keys, identities[label] = report.keys, encoder.identity
        stores[label] = (store, dict(encoder.feature_dims))
        problems.update(report.problems)
        if report.computed:
            speed[label] = (report.computed, report.computed / report.seconds)
        log(f"{label}: {report.computed} images computed, {sum(k is not None for k in keys) - report.computed} cached")
        del encoder
    rows = [row for row, key in enumerate(keys) if key is not None]
    skipped = Counter(pairs.skipped)
    if len(rows) < len(pairs):
        skipped["unreadable image"] += len(pairs) - len(rows)
    if not rows:
        first = next(iter(problems), "")
        raise ValueError(f"none of the {len(pairs)} images can be read; the first error: {first}")
    pairs, found = pairs.keep(rows), [key for key in keys if key is not None]
    text = pool_texts(llm, pairs.captions, FeatureStore(llm.identity, root), progress=_progress(log, "captions"))
    return Features(
        dims={label: dims for label, (_, dims) in stores.items()},
        table=lambda label, names: stores[label][0].matrix(found, names),
        text=text,
        groups=Groups.of(pairs.captions, found),
        pairs=len(pairs),
        skipped=skipped,
        duplicates=pairs.duplicates(found),
        identities={"encoders": identities, "llm": llm.identity},
        speed=speed,
    )


def _progress(log: Log, label: str) -> Callable[[int, int], None]:
    marks = {"next": 0.25}

    def report(done: int, total: int) -> None:
        if done / total >= marks["next"] and done < total:
            log(f"{label}: {done} of {total}")
            marks["next"] = done / total + 0.25

    return report


@dataclass
class Row:
    """One line of the comparison: an encoder or a subset of features, over all seeds.

    Args:
        name: Label.
        runs: One run per seed.
        features: Names of the features, concatenated along channels.
        width_control: `none`, `pca` or `random`.
    """

    name: str
    runs: list[AlignmentRun]
    features: list[str]
    width_control: str

    @property
    def loss(self) -> Interval:
        """Held-out loss at the step selected by the other held-out half."""
        return interval([run.loss for run in self.runs])

    @property
    def train_loss(self) -> Interval:
        """Loss on training pairs at the last step."""
        return interval([run.train_loss[-1] for run in self.runs])

    @property
    def aligned(self) -> Interval:
        """Position of the loss between chance (0) and the lowest value for any vision features (1)."""
        return interval([run.aligned for run in self.runs])

    def recall(self, k: int, text_to_vision: bool = False) -> Interval:
        """R@K over seeds."""
        return interval([(run.recall_text if text_to_vision else run.recall)[k] for run in self.runs])

    def difference(self, reference: Row) -> Interval:
        """Held-out loss minus the reference's, paired by seed."""
        return paired([run.loss for run in self.runs], [run.loss for run in reference.runs])


@dataclass
class AlignmentComparison:
    """All rows of a comparison, with their settings.

    Args:
        kind: `encoders` (Figure 4) or `features` (Figure 5).
        rows: Rows with each encoder's own width.
        equal_width: Rows after `reduce_width` to one width.
        reference: Name of the reference row of differences.
        settings: Settings of the alignment.
        about: Pairs, skipped records, duplicates, identities, speeds.
    """

    kind: str
    rows: list[Row]
    equal_width: list[Row]
    reference: str
    settings: AlignmentConfig
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """Chance level of the loss: log of the number of held-out pairs, mean over seeds."""
        return math.fsum(run.chance for run in self.rows[0].runs) / len(self.rows[0].runs)

    @property
    def floor(self) -> float:
        """Lowest loss that any vision features can reach on the held-out texts, mean over seeds."""
        return math.fsum(run.floor for run in self.rows[0].runs) / len(self.rows[0].runs)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "kind": self.kind,
            "reference": self.reference,
            "chance": self.chance,
            "floor": self.floor,
            "settings": asdict(self.settings),
            "about": self.about,
            "rows": [_row_dict(row, self) for row in self.rows],
            "equal_width": [_row_dict(row, self) for row in self.equal_width],
        }


def _row_dict(row: Row, comparison: AlignmentComparison) -> dict[str, Any]:
    rows = comparison.rows if row.width_control == "none" else comparison.equal_width
    reference = next(r for r in rows if r.name == comparison.reference)
    return {
        "name": row.name,
        "features": row.features,
        "width": row.runs[0].width,
        "width_control": row.width_control,
        "parameters": row.runs[0].parameters,
        "heldout_loss": asdict(row.loss),
        "difference": None if row is reference else asdict(row.difference(reference)),
        "aligned": asdict(row.aligned),
        "train_loss": asdict(row.train_loss),
        "recall": {str(k): asdict(row.recall(k)) for k in row.runs[0].recall},
        "recall_text_to_vision": {str(k): asdict(row.recall(k, True)) for k in row.runs[0].recall_text},
        "runs": [asdict(run) for run in row.runs],
    }


def default_width(widths: Iterable[int], pairs: int) -> int:
    """Width of the control: the narrowest row's, at most 256 and a quarter of the training pairs (for PCA)."""
    return max(1, min([*widths, 256, pairs // 4]))


def feature_subsets(names: Sequence[str], kind: str = "leave-one-out") -> dict[str, list[str]]:
    """Subsets of an encoder's features for Figure 5.

    Args:
        names: All features, in order.
        kind: `leave-one-out` (all, minus each, each alone) or `all` (every non-empty subset).

    Returns:
        Label -> features.

    Raises:
        ValueError: There are fewer than two features, or the kind is unknown.
    """
    names = list(names)
    if len(names) < 2:
        raise ValueError(f"a feature ablation needs an encoder with two features or more, got {names}")
    if kind not in ("leave-one-out", "all"):
        raise ValueError(f"unknown kind of subsets {kind!r}; known: leave-one-out, all")
    subsets = {"all": names}
    if kind == "all":
        for size in range(len(names) - 1, 0, -1):
            subsets.update({"+".join(part): list(part) for part in combinations(names, size)})
        return subsets
    subsets.update({f"minus {name}": [n for n in names if n != name] for name in names})
    if len(names) > 2:
        subsets.update({f"only {name}": [name] for name in names})
    return subsets


def compare(
    features: Features,
    config: AlignmentConfig | None = None,
    *,
    subsets: dict[str, list[str]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    width: int | None = None,
    width_control: str = "pca",
    device: str = "cpu",
    log: Log = lambda _: None,
) -> AlignmentComparison:
    """Train a projection for every encoder, or every subset of one encoder's features, and every seed.

    Args:
        features: From `collect`.
        config: Settings of the alignment.
        subsets: Label -> features of the one encoder; None compares encoders with all their features.
        seeds: Seeds of split, initialization and batches, the same for every row.
        width: Channels of the equal-width control; `default_width` if None.
        width_control: `pca`, `random`, or `none` to omit the control.
        device: Device for the computation.
        log: Called with progress messages.

    Raises:
        ValueError: There are no seeds, too few pairs, an impossible width, or subsets of more than one encoder.
    """
    config = config or AlignmentConfig()
    if not seeds:
        raise ValueError("at least one seed is needed")
    if subsets is not None and len(features.dims) != 1:
        raise ValueError(f"a feature ablation is of one encoder, got {list(features.dims)}")
    (encoder,) = features.dims if subsets is not None else ("",)
    chosen: dict[str, tuple[str, list[str]]] = (
        {label: (label, list(dims)) for label, dims in features.dims.items()}
        if subsets is None
        else {label: (encoder, names) for label, names in subsets.items()}
    )
    widths = {label: sum(features.dims[source][name] for name in names) for label, (source, names) in chosen.items()}
    controls: list[tuple[str, int | None]] = [("none", None)]
    if width_control != "none":
        pairs = min(len(split_pairs(features.groups, config, seed).train) for seed in seeds)
        controls.append((width_control, default_width(widths.values(), pairs) if width is None else width))
    made: dict[str, list[Row]] = {control: [] for control, _ in controls}
    for label, (source, names) in chosen.items():
        table = features.table(source, names)
        for control, channels in controls:
            runs = [
                train_alignment(
                    table,
                    features.text,
                    config,
                    groups=features.groups,
                    seed=seed,
                    width=channels,
                    width_control=width_control,
                    device=device,
                )
                for seed in seeds
            ]
            made[control].append(Row(label, runs, list(names), control))
            log(f"{label} ({runs[0].width} channels): held-out loss {made[control][-1].loss.text()}")
    return AlignmentComparison(
        kind="encoders" if subsets is None else "features",
        rows=made["none"],
        equal_width=made[width_control] if width_control != "none" else [],
        reference=next(iter(chosen)),
        settings=config,
        about={
            "pairs": features.pairs,
            "skipped": dict(features.skipped),
            "duplicates": features.duplicates,
            "identities": features.identities,
            "images_per_second": {k: {"images": n, "per_second": s} for k, (n, s) in features.speed.items()},
            "seeds": list(seeds),
        },
    )
