"""Captioning, reading and detection of a Florence-2 on held-out scenes, and probes of each prompt's features.

Every figure has a 95 % interval and a chance level (the answers of another picture, or guessing).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from florence_vl_mini.pretrain.details import evaluate_details
from florence_vl_mini.pretrain.probes import PROBE_FEATURES, PROBE_TARGETS
from florence_vl_mini.pretrain.runner import (
    Florence2Runner,
    box_f1,
    character_accuracy,
    held_out,
    with_interval,
)
from florence_vl_mini.scenes import assets


def evaluate_florence2(path: str | Path, scenes: int = 300, seed: int = 0, device: str = "auto") -> dict[str, Any]:
    """Captions, reading and detection of a Florence-2 on held-out scenes, and its scores by size.

    Args:
        path: Folder with model and processor.
        scenes: Pictures per task.
        seed: Seed of the pictures.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Returns:
        {"caption": ..., "ocr": ..., "od": ...} and the result of `evaluate_details`: figures with intervals and their
        "chance".
    """
    runner = Florence2Runner(path, device)
    size = runner.processor.image_processor.size["height"]
    known = {s.name for s in assets.sprites("train")}
    rng = Random(seed)

    singles = held_out("single", scenes, seed, size)
    names = sorted({s.regions[0].name for s in singles})
    captions = runner.answer([s.image for s in singles], "<CAPTION>")
    right = [float(c == s.caption) for c, s in zip(captions, singles, strict=True)]
    seen = [s.regions[0].name in known for s in singles]
    ranks: list[float] = []
    for scene in singles:
        wrong = rng.sample([n for n in names if n != scene.regions[0].name], min(19, len(names) - 1))
        scores = runner.log_likelihood(
            scene.image, "<CAPTION>", [assets.with_article(n) for n in (scene.regions[0].name, *wrong)]
        )
        ranks.append(float((scores > scores[0]).sum()))
    most = max(names, key=lambda n: sum(s.regions[0].name == n for s in singles))
    report: dict[str, Any] = {
        "caption": {
            "exact, known concept, unseen image": with_interval([r for r, k in zip(right, seen, strict=True) if k]),
            "exact, new concept": with_interval([r for r, k in zip(right, seen, strict=True) if not k]),
            "retrieval of 20, known concept": with_interval(
                [float(r == 0) for r, k in zip(ranks, seen, strict=True) if k]
            ),
            "retrieval of 20, new concept": with_interval(
                [float(r == 0) for r, k in zip(ranks, seen, strict=True) if not k]
            ),
            "chance": {"exact": sum(s.regions[0].name == most for s in singles) / len(singles), "retrieval": 0.05},
        }
    }

    words = held_out("lettering", scenes, seed, size, lambda s: len(s.texts) == 1 and s.texts[0].text.isalpha())
    read = runner.answer([s.image for s in words], "<OCR>")
    by_length: dict[str, list[float]] = defaultdict(list)
    accuracy, chance, exact = [], [], []
    shuffled = read[1:] + read[:1]
    for scene, given, other in zip(words, read, shuffled, strict=True):
        value = character_accuracy(given, scene.ocr)
        accuracy.append(value)
        chance.append(character_accuracy(other, scene.ocr))
        exact.append(float(given == scene.ocr))
        length = len(scene.ocr)
        by_length["3-4 letters" if length <= 4 else "5-6 letters" if length <= 6 else "7-8 letters"].append(value)
    report["ocr"] = {
        "character accuracy": with_interval(accuracy),
        "exact word": with_interval(exact),
        **{f"character accuracy, {k}": with_interval(v) for k, v in sorted(by_length.items())},
        "chance": {"character accuracy": float(np.mean(chance)), "exact": 0.0},
    }

    pictures = held_out("objects", scenes, seed, size, lambda s: all(r.name in known for r in s.regions))
    found = [list(zip(labels, boxes, strict=True)) for labels, boxes in runner.detect([s.image for s in pictures])]
    wanted = [[(r.name, r.box) for r in s.regions] for s in pictures]
    moved = found[1:] + found[:1]
    report["od"] = {
        "box F1 at IoU 0.5": with_interval([box_f1(f, w, False) for f, w in zip(found, wanted, strict=True)]),
        "box and name F1 at IoU 0.5": with_interval([box_f1(f, w, True) for f, w in zip(found, wanted, strict=True)]),
        "chance": {
            "box": float(np.mean([box_f1(f, w, False) for f, w in zip(moved, wanted, strict=True)])),
            "box and name": float(np.mean([box_f1(f, w, True) for f, w in zip(moved, wanted, strict=True)])),
        },
    }
    return report | evaluate_details(runner, scenes, seed)


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    lines = ["| task | measure | score | 95 % interval | n | chance |", "|---|---|---|---|---|---|"]
    for task in (task for task in report if task != "probe"):
        chance = report[task]["chance"]
        for measure, figure in report[task].items():
            if measure == "chance":
                continue
            key = max((k for k in chance if measure.startswith(k) or k in measure), key=len, default=None)
            guess = f"{chance[key]:.3f}" if key else ""
            lines.append(
                f"| {task} | {measure} | {figure['mean']:.3f} | {figure['low']:.3f} to {figure['high']:.3f} | "
                f"{figure['n']} | {guess} |"
            )
    if "probe" in report:
        probe = report["probe"]
        lines += ["", "| features | " + " | ".join(PROBE_TARGETS) + " |", "|---" * (len(PROBE_TARGETS) + 1) + "|"]
        lines.append("| chance | " + " | ".join(f"{probe['chance'][t]:.3f}" for t in PROBE_TARGETS) + " |")
        for name in PROBE_FEATURES:
            cells = [
                f"{probe[name][t]['mean']:.3f}"
                + (f" ± {probe[name][t]['half']:.3f}" if probe[name][t]["half"] is not None else "")
                for t in PROBE_TARGETS
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
