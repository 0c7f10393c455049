"""The alignment loss: how well a trained projection alone brings an encoder's features to an LLM's (paper section 4).

Stated by the paper and done here: features mean-pooled over tokens, L2-normalised over channels; only the projection
trains; cross-entropy of the vision-text similarity matrix with the identity as target, vision to text.
Left open by it, with the default here: projection (linear), temperature (1, as none is mentioned), batch (all pairs up
to 20,000), optimiser (Adam, 1e-3, cosine to 0), held-out pairs (the paper shows training loss only).

Two facts for reading the figures. With unit vectors and temperature 1 the loss of N pairs can't fall below
log(1 + (N - 1) e^-2), and text features of an LLM are far from orthogonal: `reference` is the loss of the text features
against themselves. And more channels overfit: compare held-out losses at equal width.
Shape letters: N pairs, V vision channels, T text channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from florence_vl.registry import did_you_mean

FULL_BATCH_LIMIT = 20_000
PROJECTIONS = ("linear", "mlp")
DUPLICATES = ("share", "first")
WIDTH_CONTROLS = ("pca", "random")


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of one alignment measurement.

    Args:
        projection: `linear`, or `mlp` (linear, GELU, linear; hidden width T). Features are pooled before the
            projection: for `linear` that equals projecting every token and pooling after; for `mlp` it does not.
        steps: Optimiser steps.
        batch_size: Pairs in a batch; None takes all training pairs up to 20,000 and 8,192 beyond.
        learning_rate: Of Adam, at the start of a cosine decay to 0.
        weight_decay: Decoupled.
        temperature: Divides the similarities.
        symmetric: Add the text-to-vision direction (mean of both), as CLIP does.
        standardize: Shift and scale each vision channel by the training pairs' mean and standard deviation. A linear
            projection can express the same, so this only conditions the optimisation.
        center: Subtract the training pairs' mean text feature before normalising. Off, as the paper has no such step.
        heldout: Share of pairs that is never trained on; half of it chooses the step, the other half is reported.
        max_heldout: At most so many pairs in each half.
        duplicates: Pairs with the same caption or the same image break identity targets. `share` spreads the target
            over all of them; `first` keeps one pair of each caption and of each image.
        evaluations: Number of points of the curve.

    Raises:
        ValueError: A setting is out of range.
    """

    projection: str = "linear"
    steps: int = 1000
    batch_size: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    temperature: float = 1.0
    symmetric: bool = False
    standardize: bool = True
    center: bool = False
    heldout: float = 0.2
    max_heldout: int = 2500
    duplicates: str = "share"
    evaluations: int = 25

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise ValueError(f"unknown projection {self.projection!r}. {did_you_mean(self.projection, PROJECTIONS)}")
        if self.duplicates not in DUPLICATES:
            raise ValueError(f"unknown duplicates {self.duplicates!r}. {did_you_mean(self.duplicates, DUPLICATES)}")
        for name in ("steps", "learning_rate", "temperature", "max_heldout", "evaluations"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; a contrastive batch needs at least 2 pairs")
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}; it must be a share between 0 and 1")


@dataclass
class AlignmentRun:
    """One projection trained with one seed.

    Args:
        seed: Of the split, the initialisation and the batches.
        steps: Step of each point of the curves.
        train_loss: Loss on as many training pairs as there are held-out pairs (so that both have the same log N).
        heldout_loss: Loss on the held-out pairs that are reported.
        validation_loss: Loss on the held-out pairs that choose the step.
        best_step: Step with the lowest validation loss.
        loss: Held-out loss at that step.
        last_loss: Held-out loss at the last step.
        reference: Loss of the held-out text features against themselves.
        heldout_pairs: Number of held-out pairs N; guessing has loss log N.
        train_pairs: Number of training pairs.
        recall: R@K from vision to text at that step, by K. An image whose caption others share may hit any of them.
        recall_text: R@K from text to vision.
        parameters: Trained parameters.
        width: Channels V that the projection reads.
    """

    seed: int
    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    heldout_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    best_step: int = 0
    loss: float = math.nan
    last_loss: float = math.nan
    reference: float = math.nan
    heldout_pairs: int = 0
    train_pairs: int = 0
    recall: dict[int, float] = field(default_factory=dict)
    recall_text: dict[int, float] = field(default_factory=dict)
    parameters: int = 0
    width: int = 0

    @property
    def chance(self) -> float:
        """Loss of guessing: log N."""
        return math.log(self.heldout_pairs)


@dataclass
class Groups:
    """Which pairs say the same: ids of captions and of images.

    Args:
        caption_N: Equal for pairs with the same caption.
        image_N: Equal for pairs with the same image.
    """

    caption_N: Tensor
    image_N: Tensor

    @classmethod
    def of(cls, captions: Sequence[str], images: Sequence[bytes]) -> Groups:
        """Number captions (case and white space ignored) and image keys."""
        plain = [" ".join(c.lower().split()) for c in captions]
        return cls(_number(plain), _number(list(images)))

    def __getitem__(self, rows: Tensor) -> Groups:
        return Groups(self.caption_N[rows], self.image_N[rows])

    def __len__(self) -> int:
        return len(self.caption_N)

    def to(self, device: torch.device) -> Groups:
        """Move both."""
        return Groups(self.caption_N.to(device), self.image_N.to(device))

    def same(self, rows: slice) -> Tensor:
        """(rows, N) whether two pairs share their caption or their image."""
        same = self.caption_N[rows, None] == self.caption_N[None]
        return same | (self.image_N[rows, None] == self.image_N[None])

    def components(self) -> Tensor:
        """(N,) id of the set of pairs that hang together by captions or images; splits never cut one."""
        parent: dict[tuple[str, int], tuple[str, int]] = {}

        def root(node: tuple[str, int]) -> tuple[str, int]:
            while parent.setdefault(node, node) != node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        nodes = [(("c", c), ("i", i)) for c, i in zip(self.caption_N.tolist(), self.image_N.tolist(), strict=True)]
        for caption, image in nodes:
            parent[root(caption)] = root(image)
        return _number([root(caption) for caption, _ in nodes])

    def first(self) -> Tensor:
        """Rows that are the first with their caption and with their image."""
        captions: set[int] = set()
        images: set[int] = set()
        rows = []
        for row, (c, i) in enumerate(zip(self.caption_N.tolist(), self.image_N.tolist(), strict=True)):
            if c not in captions and i not in images:
                rows.append(row)
            captions.add(c)
            images.add(i)
        return torch.tensor(rows, dtype=torch.long)


def _number(values: Sequence[object]) -> Tensor:
    ids: dict[object, int] = {}
    return torch.tensor([ids.setdefault(v, len(ids)) for v in values], dtype=torch.long)


@dataclass(frozen=True)
class Split:
    """Rows of the pairs: training, choosing the step, reporting."""

    train: Tensor
    validation: Tensor
    heldout: Tensor


def split_pairs(groups: Groups, config: AlignmentConfig, seed: int) -> Split:
    """Split so that no caption and no image is on two sides.

    Raises:
        ValueError: Too few pairs for two held-out halves of at least 2 and as many to train on.
    """
    rows = groups.first() if config.duplicates == "first" else torch.arange(len(groups))
    components = groups.components()[rows]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(components.max()) + 1 if len(rows) else 0, generator=generator)
    position = order.argsort()[components] if len(rows) else components
    rows = rows[position.argsort(stable=True)]
    position = position.sort(stable=True).values
    half = min(config.max_heldout, round(len(rows) * config.heldout / 2))
    cuts = []
    for target in (half, 2 * half):  # move each cut to the end of its component
        while 0 < target < len(rows) and position[target] == position[target - 1]:
            target += 1
        cuts.append(target)
    split = Split(rows[cuts[1] :], rows[: cuts[0]], rows[cuts[0] : cuts[1]])
    if min(len(split.train), len(split.validation), len(split.heldout)) < 2:
        raise ValueError(
            f"{len(groups)} pairs ({len(rows)} used) are too few: {len(split.train)} to train on, "
            f"{len(split.validation)} and {len(split.heldout)} held out; each needs 2 or more. Give more pairs, or a "
            "larger --heldout"
        )
    return split


def build_projection(kind: str, in_dim: int, out_dim: int, seed: int) -> nn.Module:
    """The trained projection, initialised from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(in_dim, out_dim)
        return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


def contrastive_loss(
    vision_ND: Tensor,
    text_ND: Tensor,
    groups: Groups | None = None,
    temperature: float = 1.0,
    symmetric: bool = False,
    chunk: int = 2048,
    backward: bool = False,
) -> Tensor:
    """Cross-entropy of the similarity matrix of unit vectors; target: the pair itself, or shared by equals.

    Works row block by row block, so that memory is `chunk` x N.

    Args:
        vision_ND: (N, D) unit vectors.
        text_ND: (N, D) unit vectors.
        groups: Which pairs say the same; None for identity targets.
        temperature: Divides the similarities.
        symmetric: Mean of both directions instead of vision to text.
        chunk: Rows of a block.
        backward: Add the gradient to `vision_ND.grad` right here, block by block.

    Returns:
        The loss, a scalar (without a graph when `backward`).
    """
    total = vision_ND.new_zeros(())
    count = len(vision_ND)
    directions = [(vision_ND, text_ND), (text_ND, vision_ND)][: 2 if symmetric else 1]
    for queries_ND, targets_ND in directions:
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            logits_MN = queries_ND[rows] @ targets_ND.T / temperature
            if groups is None:
                index_M = torch.arange(rows.start, rows.stop, device=logits_MN.device)
                loss = nn.functional.cross_entropy(logits_MN, index_M, reduction="sum")
            else:
                target_MN = groups.same(rows).to(logits_MN.dtype)
                target_MN = target_MN / target_MN.sum(1, keepdim=True)
                loss = nn.functional.cross_entropy(logits_MN, target_MN, reduction="sum")
            loss = loss / (count * len(directions))
            if backward:
                loss.backward()
                loss = loss.detach()
            total = total + loss
    return total


@torch.no_grad()
def recall_at(
    queries_ND: Tensor, targets_ND: Tensor, groups: Groups | None, ks: Sequence[int] = (1, 5, 10), chunk: int = 2048
) -> dict[int, float]:
    """Share of queries with a right target among the K nearest. Ties count against the query.

    Args:
        queries_ND: (N, D) unit vectors.
        targets_ND: (N, D) unit vectors.
        groups: Which pairs say the same: any of them is right; None for the pair itself only.
        ks: The K.
        chunk: Rows of a block.
    """
    hits = dict.fromkeys(ks, 0)
    count = len(queries_ND)
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        similarity_MN = queries_ND[rows] @ targets_ND.T
        if groups is None:
            right_MN = torch.zeros_like(similarity_MN, dtype=torch.bool)
            right_MN[torch.arange(rows.stop - rows.start), torch.arange(rows.start, rows.stop)] = True
        else:
            right_MN = groups.same(rows)
        best_M1 = similarity_MN.masked_fill(~right_MN, -torch.inf).amax(1, keepdim=True)
        rank_M = ((similarity_MN >= best_M1) & ~right_MN).sum(1)
        for k in ks:
            hits[k] += int((rank_M < k).sum())
    return {k: hit / count for k, hit in hits.items()}


def reduce_width(vision_NV: Tensor, train: Tensor, width: int, control: str, seed: int) -> Tensor:
    """Bring features to an equal width by a fixed map, before the trained projection.

    Args:
        vision_NV: (N, V) pooled features.
        train: Rows that the map may be fitted on.
        width: Channels out.
        control: `pca` (principal components of the training pairs) or `random` (orthonormal directions).
        seed: Of the random directions.

    Returns:
        (N, width).

    Raises:
        ValueError: Unknown control, or more channels out than the features or the training pairs have.
    """
    if control not in WIDTH_CONTROLS:
        raise ValueError(f"unknown width control {control!r}. {did_you_mean(control, WIDTH_CONTROLS)}")
    limit = min(vision_NV.shape[1], len(train)) if control == "pca" else vision_NV.shape[1]
    if not 1 <= width <= limit:
        raise ValueError(
            f"equal width {width} is not possible for features of {vision_NV.shape[1]} channels and {len(train)} training "
            f"pairs: at most {limit} by {control}"
        )
    rows = vision_NV[train]
    mean = rows.mean(0)
    if control == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(vision_NV.shape[1], width, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(noise).Q.to(vision_NV)
    else:
        covariance = ((rows - mean).T @ (rows - mean)).double()
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :width].to(vision_NV)
    return (vision_NV - mean) @ basis


def train_alignment(
    vision_NV: Tensor,
    text_NT: Tensor,
    config: AlignmentConfig | None = None,
    *,
    groups: Groups | None = None,
    seed: int = 0,
    width: int | None = None,
    width_control: str = "pca",
    device: str | torch.device = "cpu",
) -> AlignmentRun:
    """Train one projection and measure it on pairs that it never saw.

    Args:
        vision_NV: (N, V) pooled vision features.
        text_NT: (N, T) pooled text features of the same pairs.
        config: Settings; the defaults of `AlignmentConfig` when None.
        groups: Which pairs say the same; None when all captions and images differ.
        seed: Of split, initialisation and batches. Two encoders with the same seed see the same split.
        width: Channels after `reduce_width`; None leaves the features as they are.
        width_control: How, see `reduce_width`.
        device: Where to compute.

    Returns:
        Curves and held-out results.

    Raises:
        ValueError: Different numbers of pairs, values that are not finite, or too few pairs.
    """
    config = config or AlignmentConfig()
    if len(vision_NV) != len(text_NT):
        raise ValueError(f"{len(vision_NV)} vision features but {len(text_NT)} text features; they must be pairs")
    for kind, table in (("vision", vision_NV), ("text", text_NT)):
        if not torch.isfinite(table).all():
            raise ValueError(f"{int((~torch.isfinite(table)).any(1).sum())} {kind} features hold NaN or infinity")
    has_duplicates = groups is not None and (groups.components().bincount() > 1).any()
    ids = groups or Groups(torch.arange(len(vision_NV)), torch.arange(len(vision_NV)))
    split = split_pairs(ids, config, seed)
    if width is not None:
        vision_NV = reduce_width(vision_NV.float(), split.train, width, width_control, seed)
    device = torch.device(device)
    vision, text = vision_NV.float().to(device), text_NT.float().to(device)
    if config.standardize:
        rows = vision[split.train]
        vision = (vision - rows.mean(0)) / rows.std(0, unbiased=False).clamp_min(1e-6)
    if config.center:
        text = text - text[split.train].mean(0)
    text = normalize(text, dim=1)
    shared = ids.to(device) if has_duplicates and config.duplicates == "share" else None

    projection = build_projection(config.projection, vision.shape[1], text.shape[1], seed).to(device)
    probe_generator = torch.Generator().manual_seed(seed + 1)
    probe = split.train[torch.randperm(len(split.train), generator=probe_generator)[: len(split.heldout)]]
    parts = {"train": probe, "validation": split.validation, "heldout": split.heldout}
    parts = {name: rows.to(device) for name, rows in parts.items()}
    train = split.train.to(device)

    def group_of(rows: Tensor) -> Groups | None:
        return None if shared is None else shared[rows]

    def loss_of(vectors: Tensor, rows: Tensor, backward: bool = False) -> Tensor:
        return contrastive_loss(
            vectors, text[rows], group_of(rows), config.temperature, config.symmetric, backward=backward
        )

    run = AlignmentRun(
        seed=seed,
        heldout_pairs=len(split.heldout),
        train_pairs=len(split.train),
        parameters=sum(p.numel() for p in projection.parameters()),
        width=vision.shape[1],
        reference=float(loss_of(text[parts["heldout"]], parts["heldout"])),
    )
    best: tuple[float, dict[str, Tensor]] = (math.inf, {})

    @torch.no_grad()
    def evaluate(step: int) -> None:
        nonlocal best
        losses = {name: float(loss_of(normalize(projection(vision[rows]), dim=1), rows)) for name, rows in parts.items()}
        run.steps.append(step)
        run.train_loss.append(losses["train"])
        run.validation_loss.append(losses["validation"])
        run.heldout_loss.append(losses["heldout"])
        if losses["validation"] < best[0]:
            run.best_step, run.loss = step, losses["heldout"]
            best = (losses["validation"], {name: p.detach().clone() for name, p in projection.state_dict().items()})

    optimizer = torch.optim.AdamW(projection.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    batches = _batches(train, config, seed)
    points = {round(config.steps * i / config.evaluations) for i in range(config.evaluations + 1)}
    evaluate(0)
    for step in range(1, config.steps + 1):
        rows = next(batches)
        vectors = normalize(projection(vision[rows]), dim=1)
        leaf = vectors.detach().requires_grad_(True)
        loss_of(leaf, rows, backward=True)
        optimizer.zero_grad(set_to_none=True)
        vectors.backward(leaf.grad)
        optimizer.step()
        schedule.step()
        if step in points:
            evaluate(step)
    run.last_loss = run.heldout_loss[-1]
    projection.load_state_dict(best[1])
    with torch.no_grad():
        rows = parts["heldout"]
        vectors = normalize(projection(vision[rows]), dim=1)
        run.recall = recall_at(vectors, text[rows], group_of(rows))
        run.recall_text = recall_at(text[rows], vectors, group_of(rows))
    return run


def _batches(train: Tensor, config: AlignmentConfig, seed: int):  # noqa: ANN202
    """All training rows at each step, or batches without replacement, epoch after epoch."""
    size = config.batch_size
    if size is None:
        size = len(train) if len(train) <= FULL_BATCH_LIMIT else 8192
    if size >= len(train):
        while True:
            yield train
    generator = torch.Generator().manual_seed(seed + 2)
    while True:
        order = torch.randperm(len(train), generator=generator)
        for start in range(0, len(train) - size + 1, size):
            yield train[order[start : start + size].to(train.device)]
