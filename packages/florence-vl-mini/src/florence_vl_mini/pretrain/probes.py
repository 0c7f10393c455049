"""Linear probes of each prompt's features for text, object and position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from florence_vl.analyze.encoders.tower import load_florence2
from florence_vl.model.loading import choose_device
from florence_vl.statistics import interval
from florence_vl_mini.pretrain.runner import BATCH
from florence_vl_mini.scenes import assets, draw
from florence_vl_mini.scenes.annotations import Box
from florence_vl_mini.scenes.objects import add_text

PROBE_TARGETS = ("text", "object", "position")
PROBE_FEATURES = ("davit", "caption", "ocr", "grounding")
PROBE_WORDS, PROBE_OBJECTS = 16, 80  # with 16 objects all features reach the maximum


def probe_pictures(n: int, seed: int, size: int) -> tuple[list[Image.Image], dict[str, Tensor]]:
    """Pictures of one of `PROBE_OBJECTS` objects and one of `PROBE_WORDS` words, and labels {target: (n,)}.

    text: which word; object: which name; position: cell of the object's center in a 4 x 4 grid. The three are
        independent.
    """
    rng = Random(f"probe/{seed}")
    pool = sorted({s.name for s in assets.sprites("test") if not s.new_concept})
    names = Random(7).sample(pool, PROBE_OBJECTS)
    by_name = {name: [s for s in assets.sprites("test") if s.name == name] for name in names}
    words = Random(7).sample([w for w in assets.words("test") if 4 <= len(w) <= 6], PROBE_WORDS)
    images: list[Image.Image] = []
    labels: dict[str, list[int]] = defaultdict(list)
    while len(images) < n:
        canvas, _ = draw.background(rng, size)
        name, word = rng.randrange(PROBE_OBJECTS), rng.randrange(PROBE_WORDS)
        sprite = draw.sprite_at(rng, rng.choice(by_name[names[name]]).id, round(size * rng.uniform(0.26, 0.4)))
        spot = draw.place(rng, size, sprite.width, sprite.height, [], gap=0)
        assert spot is not None
        canvas.paste(sprite, spot, sprite)
        box: Box = (float(spot[0]), float(spot[1]), float(spot[0] + sprite.width), float(spot[1] + sprite.height))
        if add_text(rng, canvas, words[word], [box], size, (0.13, 0.2), tilt=0.0) is None:
            continue
        column = min(3, int((box[0] + box[2]) / 2 * 4 / size))
        row = min(3, int((box[1] + box[3]) / 2 * 4 / size))
        images.append(canvas)
        for target, value in zip(PROBE_TARGETS, (word, name, row * 4 + column), strict=True):
            labels[target].append(value)
    return images, {k: torch.tensor(v) for k, v in labels.items()}


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 1e-2) -> float:
    """Accuracy of multinomial logistic regression on standardized features, fitted by L-BFGS in float64.

    Args:
        train: (N, D).
        train_labels: (N,).
        test: (M, D).
        test_labels: (M,).
        decay: L2 penalty, times half the squared norm of the weights.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - mean).double() / std for x in (train, test))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = torch.zeros(train.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, train_labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(((test @ weight + bias).argmax(1) == test_labels).double().mean())


def probe_prompts(
    path: str | Path, pictures: int = 1600, seeds: Sequence[int] = (0, 1, 2), device: str = "auto"
) -> dict[str, Any]:
    """Table of linear-probe accuracies: features of each prompt against text, object and position.

    Features are the tower's grid tokens averaged over the picture. Each seed draws new pictures; three quarters of them
    train the probe.

    Returns:
        {"chance": {target: accuracy of the most common class}, feature: {target: {"mean", "half", "runs"}}}.
    """
    encoder = load_florence2("florence2", path, PROBE_FEATURES).to(choose_device(device))
    scores: dict[str, dict[str, list[float]]] = {f: {t: [] for t in PROBE_TARGETS} for f in PROBE_FEATURES}
    chance: dict[str, list[float]] = {t: [] for t in PROBE_TARGETS}
    cut = pictures * 3 // 4
    for seed in seeds:
        images, labels = probe_pictures(pictures, seed, encoder.preprocess.width)
        pooled: dict[str, list[Tensor]] = defaultdict(list)
        for start in range(0, pictures, BATCH):
            for name, tokens in encoder(images[start : start + BATCH]).items():
                pooled[name].append(tokens.mean(1).cpu())
        for target, values in labels.items():
            counts = values[cut:].bincount()
            chance[target].append(float(counts.max() / counts.sum()))
            for name, parts in pooled.items():
                data = torch.cat(parts)
                scores[name][target].append(linear_probe(data[:cut], values[:cut], data[cut:], values[cut:]))
    table: dict[str, Any] = {"chance": {t: sum(v) / len(v) for t, v in chance.items()}}
    for name, row in scores.items():
        table[name] = {}
        for target, runs in row.items():
            result = interval(runs)
            table[name][target] = {"mean": result.mean, "half": result.half, "runs": result.runs}
    return table
