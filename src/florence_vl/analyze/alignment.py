"""Alignment loss: how well a trained projection aligns an encoder's features with an LLM's (paper section 4).

From the paper: features are mean-pooled over tokens and L2-normalized over channels; only the projection is trained,
with cross-entropy of the vision-text similarity matrix and the identity as target, in the vision-to-text direction.
Not given in the paper, with the default here: projection (linear), temperature (1), batch (all pairs up to 20,000),
optimizer (Adam, 3e-3, 300 steps, cosine to 0), held-out pairs (the paper shows only the training loss).

Interpretation: with unit vectors and temperature 1 the loss of N pairs cannot fall below log(1 + (N - 1) e^-2). Text
features of an LLM point in similar directions, which raises this bound: `best_loss` computes the bound for given texts.
More channels overfit: compare held-out losses at equal width.
Shape letters: N pairs, V vision channels, T text channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from florence_vl.registry import did_you_mean
from florence_vl.train.contrastive import Groups, contrastive_loss

FULL_BATCH_LIMIT = 20_000
CHUNK = 65_536  # rows of a table that are processed at a time
PROJECTIONS = ("linear", "mlp")
DUPLICATES = ("share", "first")
WIDTH_CONTROLS = ("pca", "random")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of one alignment measurement.

    Args:
        projection: `linear`, or `mlp` (linear, GELU, linear; hidden width T). Features are pooled before the
            projection: for `linear` that equals projecting every token and pooling after; for `mlp` it does not.
        steps: Optimizer steps.
        batch_size: Pairs per batch; None uses all training pairs up to 20,000 and 8,192 beyond.
        learning_rate: Adam's learning rate at the start of a cosine decay to 0.
        weight_decay: Decoupled weight decay.
        temperature: Divides the similarities.
        symmetric: Add the text-to-vision direction (mean of both), as CLIP does.
        standardize: Shift and scale each vision channel by the training pairs' mean and standard deviation. A linear
            projection can express the same, so this only conditions the optimization.
        center: Subtract the training pairs' mean text feature before normalizing. Off by default, as in the paper.
        heldout: Fraction of held-out pairs; half of them selects the step, the other half is reported.
        max_heldout: Maximum number of pairs in each half.
        duplicates: Pairs with the same caption or the same image break identity targets. `share` spreads the target
            over all of them; `first` keeps one pair of each caption and of each image.
        evaluations: Number of points of the curve.
        dtype: Type of the matrix products of optimizer steps, `float32` or `bfloat16` (by autocast). Held-out losses
            are computed in float32 in any case.

    Raises:
        ValueError: A setting is out of range.
    """

    projection: str = "linear"
    steps: int = 300
    batch_size: int | None = None
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    temperature: float = 1.0
    symmetric: bool = False
    standardize: bool = True
    center: bool = False
    heldout: float = 0.2
    max_heldout: int = 2500
    duplicates: str = "share"
    evaluations: int = 25
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise ValueError(f"unknown projection {self.projection!r}. {did_you_mean(self.projection, PROJECTIONS)}")
        if self.duplicates not in DUPLICATES:
            raise ValueError(f"unknown duplicates {self.duplicates!r}. {did_you_mean(self.duplicates, DUPLICATES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}. {did_you_mean(self.dtype, DTYPES)}")
        for name in ("steps", "learning_rate", "temperature", "max_heldout", "evaluations"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; a contrastive batch needs at least 2 pairs")
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}; it must be a fraction between 0 and 1")


@dataclass
class AlignmentRun:
    """One projection trained with one seed.

    Args:
        seed: Seed of the split, the initialization and the batches.
        steps: Step of each point of the curves.
        train_loss: Loss on the same number of training pairs as held-out pairs (so that both have the same log N).
        heldout_loss: Loss on the reported held-out pairs.
        validation_loss: Loss on the held-out pairs that select the step.
        best_step: Step with the lowest validation loss.
        loss: Held-out loss at that step.
        last_loss: Held-out loss at the last step.
        floor: Lowest loss that any vision features can reach on the held-out texts (`best_loss`).
        heldout_pairs: Number of held-out pairs N; chance level is log N.
        train_pairs: Number of training pairs.
        recall: R@K from vision to text at that step, by K. Any image with the same caption is correct.
        recall_text: R@K from text to vision.
        parameters: Number of trained parameters.
        width: Input channels V of the projection.
    """

    seed: int
    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    heldout_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    best_step: int = 0
    loss: float = math.nan
    last_loss: float = math.nan
    floor: float = math.nan
    heldout_pairs: int = 0
    train_pairs: int = 0
    recall: dict[int, float] = field(default_factory=dict)
    recall_text: dict[int, float] = field(default_factory=dict)
    parameters: int = 0
    width: int = 0

    @property
    def chance(self) -> float:
        """Chance level of the loss: log N."""
        return math.log(self.heldout_pairs)

    @property
    def aligned(self) -> float:
        """Position of the loss between chance (0) and the lowest value for any vision features (1)."""
        return (self.chance - self.loss) / (self.chance - self.floor)


@dataclass(frozen=True)
class Split:
    """Rows of the pairs for training, selecting the step, and reporting."""

    train: Tensor
    validation: Tensor
    heldout: Tensor


def split_pairs(groups: Groups, config: AlignmentConfig, seed: int) -> Split:
    """Split pairs so that splits share no caption and no image; both held-out halves have the same size for every seed.

    Raises:
        ValueError: There are too few pairs for two held-out halves of at least 2, and the same number for training.
    """
    rows = groups.first() if config.duplicates == "first" else torch.arange(len(groups))
    components = groups.components()[rows]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(components.max()) + 1 if len(rows) else 0, generator=generator)
    half = min(config.max_heldout, round(len(rows) * config.heldout / 2))
    position = order.argsort()[components] if len(rows) else components
    if len(rows):  # a component that would fill a held-out half alone stays in training
        sizes = components.bincount(minlength=len(order))
        position = position + len(order) * (sizes[components] > max(1, half // 4))
    rows = rows[position.argsort(stable=True)]
    position = position.sort(stable=True).values

    def after(row: int) -> int:
        """First row of the next component; the rest of a divided component is not used by either side."""
        while 0 < row < len(rows) and position[row] == position[row - 1]:
            row += 1
        return row

    start = after(half)
    split = Split(rows[after(start + half) :], rows[:half], rows[start : start + half])
    if min(len(split.train), len(split.validation), len(split.heldout)) < 2:
        raise ValueError(
            f"{len(groups)} pairs ({len(rows)} used) are too few: {len(split.train)} to train on, "
            f"{len(split.validation)} and {len(split.heldout)} held out; each needs 2 or more. Give more pairs, or a "
            "larger --heldout"
        )
    return split


def build_projection(kind: str, in_dim: int, out_dim: int, seed: int) -> nn.Module:
    """The trained projection, initialized from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(in_dim, out_dim)
        return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


@torch.no_grad()
def best_loss(
    text_ND: Tensor,
    targets_NN: Tensor | None = None,
    temperature: float = 1.0,
    symmetric: bool = False,
    iterations: int = 60,
    chunk: int = 2048,
) -> float:
    """The lowest image-to-text loss that unit vision vectors can have on given texts.

    The loss of each vector is a separate problem on the sphere: it moves towards its text and away from other likely
    texts, with steps that are halved if they do not reduce the loss.

    Args:
        text_ND: (N, D) unit vectors.
        targets_NN: As in `contrastive_loss`.
        temperature: Divides the similarities.
        symmetric: The loss is the mean of both directions, for the vectors that are best for the first.
        iterations: Number of steps.
        chunk: Rows per block.
    """
    aims_ND = text_ND if targets_NN is None else torch.sparse.mm(targets_NN, text_ND)
    vision_ND = torch.empty_like(text_ND)
    mean_D = text_ND.mean(0)
    for start in range(0, len(text_ND), chunk):
        aims = aims_ND[start : start + chunk]

        def losses(vectors: Tensor, aims: Tensor = aims) -> tuple[Tensor, Tensor]:
            logits = vectors @ text_ND.T / temperature
            towards = normalize(aims - logits.softmax(1) @ text_ND, dim=1)
            return logits.logsumexp(1) - (vectors * aims).sum(1) / temperature, towards

        vectors = normalize(aims - mean_D, dim=1)
        values, towards = losses(vectors)
        sizes = torch.ones_like(values)
        for _ in range(iterations):
            tried = normalize(vectors + sizes[:, None] * towards, dim=1)
            new_values, new_towards = losses(tried)
            better = new_values < values
            vectors = torch.where(better[:, None], tried, vectors)
            towards = torch.where(better[:, None], new_towards, towards)
            values = torch.where(better, new_values, values)
            sizes = torch.where(better, sizes, sizes / 2)
        vision_ND[start : start + chunk] = vectors
    return float(contrastive_loss(vision_ND, text_ND, targets_NN, temperature, symmetric))


@torch.no_grad()
def recall_at(
    queries_ND: Tensor, targets_ND: Tensor, groups: Groups | None, ks: Sequence[int] = (1, 5, 10), chunk: int = 2048
) -> dict[int, float]:
    """Fraction of queries with a correct target among the K nearest. Ties count against the query.

    Args:
        queries_ND: (N, D) unit vectors.
        targets_ND: (N, D) unit vectors.
        groups: Duplicates, each of which is correct; None for the pair itself only.
        ks: The values of K.
        chunk: Rows per block.
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
    """Reduce features to an equal width by a fixed map, before the trained projection.

    Args:
        vision_NV: (N, V) pooled features.
        train: Rows on which the map may be fitted.
        width: Number of output channels.
        control: `pca` (principal components of the training pairs) or `random` (orthonormal directions).
        seed: Seed of the random directions.

    Returns:
        (N, width).

    Raises:
        ValueError: The control is unknown, or the features or the training pairs have fewer channels.
    """
    if control not in WIDTH_CONTROLS:
        raise ValueError(f"unknown width control {control!r}. {did_you_mean(control, WIDTH_CONTROLS)}")
    limit = min(vision_NV.shape[1], len(train)) if control == "pca" else vision_NV.shape[1]
    if not 1 <= width <= limit:
        raise ValueError(
            f"equal width {width} is not possible for {vision_NV.shape[1]} channels and {len(train)} training "
            f"pairs: at most {limit} by {control}"
        )
    mean, _ = moments(vision_NV, train)
    if control == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(vision_NV.shape[1], width, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(noise).Q.to(vision_NV)
    else:
        covariance = torch.zeros(vision_NV.shape[1], vision_NV.shape[1], dtype=torch.float64)
        for part in train.split(CHUNK):
            centered = vision_NV[part] - mean
            covariance += (centered.T @ centered).double()
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :width].to(vision_NV)
    return torch.cat([(part - mean) @ basis for part in vision_NV.split(CHUNK)])


def moments(table_ND: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over some rows, without a copy of them."""
    total = torch.zeros(table_ND.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in rows.split(CHUNK):
        total += table_ND[part].double().sum(0)
    mean = total / len(rows)
    for part in rows.split(CHUNK):
        squares += (table_ND[part].double() - mean).square().sum(0)
    return mean.float(), (squares / len(rows)).sqrt().float()


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
    """Train one projection and evaluate it on held-out pairs.

    Args:
        vision_NV: (N, V) pooled vision features.
        text_NT: (N, T) pooled text features of the same pairs.
        config: Settings; the defaults of `AlignmentConfig` if None.
        groups: Duplicates; None if all captions and images differ.
        seed: Seed of split, initialization and batches. Encoders with the same seed have the same split.
        width: Channels after `reduce_width`; None keeps the features.
        width_control: See `reduce_width`.
        device: Device for the computation.

    Returns:
        Curves and held-out results.

    Raises:
        ValueError: The numbers of pairs differ, values are not finite, or there are too few pairs.
    """
    config = config or AlignmentConfig()
    if len(vision_NV) != len(text_NT):
        raise ValueError(f"{len(vision_NV)} vision features but {len(text_NT)} text features; they must be pairs")
    for kind, table in (("vision", vision_NV), ("text", text_NT)):
        bad = sum(int((~torch.isfinite(part)).any(1).sum()) for part in table.split(CHUNK))
        if bad:
            raise ValueError(f"{bad} {kind} features contain NaN or infinity")
    ids = groups or Groups(torch.arange(len(vision_NV)), torch.arange(len(vision_NV)))
    share = groups is not None and config.duplicates == "share"
    split = split_pairs(ids, config, seed)
    if width is not None:
        vision_NV = reduce_width(vision_NV.float(), split.train, width, width_control, seed)
    device = torch.device(device)
    shift, scale = moments(vision_NV, split.train) if config.standardize else (torch.zeros(1), torch.ones(1))
    scale = scale.clamp_min(1e-6)
    center = moments(text_NT, split.train)[0] if config.center else torch.zeros(1)

    def load(rows: Tensor) -> Batch:
        vision = ((vision_NV[rows].float() - shift) / scale).to(device)
        text = normalize(text_NT[rows].float() - center, dim=1).to(device)
        targets = ids[rows].targets() if share else None
        return Batch(vision, text, None if targets is None else targets.to(device))

    probe_generator = torch.Generator().manual_seed(seed + 1)
    probe = split.train[torch.randperm(len(split.train), generator=probe_generator)[: len(split.heldout)]]
    parts = {"train": load(probe), "validation": load(split.validation), "heldout": load(split.heldout)}
    projection = build_projection(config.projection, vision_NV.shape[1], text_NT.shape[1], seed).to(device)

    def loss_of(vectors: Tensor, batch: Batch, backward: bool = False) -> Tensor:
        return contrastive_loss(
            vectors, batch.text, batch.targets, config.temperature, config.symmetric, backward=backward
        )

    run = AlignmentRun(
        seed=seed,
        heldout_pairs=len(split.heldout),
        train_pairs=len(split.train),
        parameters=sum(p.numel() for p in projection.parameters()),
        width=vision_NV.shape[1],
        floor=best_loss(parts["heldout"].text, parts["heldout"].targets, config.temperature, config.symmetric),
    )
    best: tuple[float, dict[str, Tensor]] = (math.inf, {})

    @torch.no_grad()
    def evaluate(step: int) -> None:
        nonlocal best
        losses = {name: float(loss_of(normalize(projection(b.vision), dim=1), b)) for name, b in parts.items()}
        run.steps.append(step)
        run.train_loss.append(losses["train"])
        run.validation_loss.append(losses["validation"])
        run.heldout_loss.append(losses["heldout"])
        if losses["validation"] < best[0]:
            run.best_step, run.loss = step, losses["heldout"]
            best = (losses["validation"], {name: p.detach().clone() for name, p in projection.state_dict().items()})

    optimizer = torch.optim.AdamW(projection.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    batches = _batches(split.train, load, config, seed)
    points = {round(config.steps * i / config.evaluations) for i in range(config.evaluations + 1)}
    evaluate(0)
    for step in range(1, config.steps + 1):
        batch = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            vectors = normalize(projection(batch.vision).float(), dim=1)
            leaf = vectors.detach().requires_grad_(True)
            loss_of(leaf, batch, backward=True)
        optimizer.zero_grad(set_to_none=True)
        vectors.backward(leaf.grad)
        optimizer.step()
        schedule.step()
        if step in points:
            evaluate(step)
    run.last_loss = run.heldout_loss[-1]
    projection.load_state_dict(best[1])
    with torch.no_grad():
        heldout = parts["heldout"]
        vectors = normalize(projection(heldout.vision), dim=1)
        same = ids[split.heldout].to(device) if share else None
        run.recall = recall_at(vectors, heldout.text, same)
        run.recall_text = recall_at(heldout.text, vectors, same)
    return run


@dataclass(frozen=True)
class Batch:
    """Inputs of one step: (N, V), (N, T) unit vectors, and the targets if they are not the identity."""

    vision: Tensor
    text: Tensor
    targets: Tensor | None


def _batches(train: Tensor, load: Callable[[Tensor], Batch], config: AlignmentConfig, seed: int) -> Iterator[Batch]:
    """All training pairs at each step, or batches without replacement, epoch after epoch."""
    size = config.batch_size
    if size is None:
        size = len(train) if len(train) <= FULL_BATCH_LIMIT else 8192
    if size >= len(train):
        whole = load(train)
        while True:
            yield whole
    generator = torch.Generator().manual_seed(seed + 2)
    while True:
        order = torch.randperm(len(train), generator=generator)
        for start in range(0, len(train) - size + 1, size):
            yield load(train[order[start : start + size]])
