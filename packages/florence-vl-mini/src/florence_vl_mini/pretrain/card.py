"""The model card of a mini Florence-2: training data, training, and scores next to chance level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from florence_vl_mini.card import DATA, HEAD
from florence_vl_mini.pretrain.evaluate import to_markdown
from florence_vl_mini.pretrain.probes import PROBE_FEATURES

CARD = (
    HEAD.format(library="transformers", tags="florence-2, davit, synthetic")
    + """# Mini Florence-2

A Florence-2 with {parameters:.1f} M parameters in transformers' classes, pretrained from scratch on synthetic pictures
for florence-vl's offline use. It has the structure of Florence-2, and its prompts are worded as in Florence-2. It was
trained on a few hundred kinds of objects in pictures of {size} px. It does not replace Florence-2, and it does not
understand photographs.

```python
from transformers import Florence2ForConditionalGeneration, Florence2Processor
import florence_vl_mini

path = florence_vl_mini.florence2_path()
model = Florence2ForConditionalGeneration.from_pretrained(path)
processor = Florence2Processor.from_pretrained(path)
```

"""
    + DATA
    + """Scores are on split `test`: other pictures of known concepts, new concepts, and words that are in no training
picture.

## Training

{steps:,} steps of {images} images with {tasks} tasks each: {seen:,} pictures, each seen once. {optimizer}, learning
rate {rate:g}, weight decay {decay:g}, {precision}, exponential moving average of the weights ({ema:g}). In addition to
the seq2seq loss, an auxiliary loss predicts the content of each cell of the image grid from the image tokens
(`florence_vl_mini.pretrain.grid`, weight {grid:g}). Box corners are on a grid of {bins}. {note}

## Scores

{scores}

Intervals are 95 % intervals: over pictures (bootstrap) for tasks, over seeds (t) for the probe. The probe is a logistic
regression on the mean of the tower's grid tokens. It predicts which of 16 words, which of 80 objects, and which of 16
positions of the object the picture shows. Pictures are from split `test`.

{verdicts}
"""
)


def facts(run: str | Path) -> dict[str, Any]:
    """Steps and settings of a run, from its checkpoint.

    Raises:
        FileNotFoundError: `run` contains no checkpoint.
    """
    import torch

    run = Path(run).expanduser()
    if not (run / "checkpoint.pt").exists():
        raise FileNotFoundError(f"no checkpoint in {run}: train first")
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    return {"step": state["step"], "config": state["config"]}


def verdicts(report: dict[str, Any]) -> list[str]:
    """One line per claim: is the whole interval above chance, and does each prompt lead on its own target."""
    lines = []
    for task, measure, key in (
        ("caption", "retrieval of 20, known concept", "retrieval"),
        ("caption", "retrieval of 20, new concept", "retrieval"),
        ("ocr", "character accuracy", "character accuracy"),
        ("od", "box F1 at IoU 0.5", "box"),
        ("od", "box and name F1 at IoU 0.5", "box and name"),
    ):
        figure, chance = report[task][measure], report[task]["chance"][key]
        word = "above chance" if figure["low"] > chance else "**not** above chance"
        lines.append(f"{measure}: {word} ({figure['mean']:.3f} against {chance:.3f})")
    for target, own in (("text", "ocr"), ("object", "caption"), ("position", "grounding")):
        if "probe" not in report:
            break
        rows = {f: report["probe"][f][target] for f in PROBE_FEATURES if f != "davit"}
        best = max(rows, key=lambda f: rows[f]["mean"])
        gap = rows[own]["mean"] - max(row["mean"] for f, row in rows.items() if f != own)
        if best == own:
            clear = gap > max(row["half"] or 0.0 for row in rows.values())
            lines.append(f"{target}: the `{own}` features lead by {gap:.3f}{'' if clear else ' (within the interval)'}")
        else:
            lines.append(f"{target}: **not** the `{own}` but the `{best}` features lead, by {-gap:.3f}")
    return lines


def model_card(report: dict[str, Any], run: dict[str, Any], parameters: float, note: str = "") -> str:
    """The card as Markdown.

    Args:
        report: Result of `evaluate_florence2`, with "probe".
        run: Result of `facts`.
        parameters: Parameters of the model, in millions.
        note: Hardware and other remarks about the run.
    """
    config = run["config"]
    return CARD.format(
        parameters=parameters,
        size=config["image_size"],
        steps=run["step"],
        images=config["images_per_step"],
        tasks=config["tasks_per_image"],
        seen=run["step"] * config["images_per_step"],
        optimizer={"adamw": "AdamW", "muon": "Muon (linear layers) and AdamW (others)"}[config["optimizer"]],
        rate=config["learning_rate"],
        decay=config["weight_decay"],
        precision=config["precision"],
        ema=config["ema_decay"],
        grid=config["grid_weight"],
        bins=config["location_bins"],
        note=note,
        scores=to_markdown(report),
        verdicts="\n".join(f"- {line}" for line in verdicts(report)),
    )


__all__ = ["facts", "model_card", "verdicts"]
