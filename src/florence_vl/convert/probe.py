"""`convert --probe`: find the variant of the released code that fits the real weights best.

Each variant ("reading") sets the switches that tensor shapes do not determine (mean token, prompt padding, order of the
prompts, newline and begin tokens of the template); reference answers are scored under each by teacher forcing.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from florence_vl.convert.plan import REPORT_FILE
from florence_vl.convert.processors import seams, with_lead
from florence_vl.convert.shards import write_json
from florence_vl.files import read_json
from florence_vl.model.geometry import DAVIT

MEAN_TOKENS = ("grid", "all", "grid_before_encoder")
PROMPT_PADDINGS = ("attended", "masked")
FIELDS = ("image", "question", "answer", "ended")


@dataclass(frozen=True)
class Reference:
    """An answer of the released model, or a caption to which it should assign a high likelihood.

    Attributes:
        image: Image file.
        answer: Text of the answer.
        question: The question; "" for a caption with the `plain` template.
        ended: Whether the end token is part of the answer; False if it was truncated.
    """

    image: Path
    answer: str
    question: str = ""
    ended: bool = True


@dataclass(frozen=True)
class Reading:
    """One setting of the open switches; `features` in the order of their channels."""

    mean_token: str
    prompt_padding: str
    template: str
    options: tuple[tuple[str, Any], ...]
    features: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """The settings as in `conversion.json`."""
        switches = {"mean_token": self.mean_token, "prompt_padding": self.prompt_padding}
        return {**switches, "template": self.template, **dict(self.options), "features": list(self.features)}


@dataclass
class Score:
    """Score of a variant.

    Attributes:
        reading: The switches.
        nll: Mean negative log-likelihood per answer token, nats.
        agreement: Fraction of answer tokens that are the most likely ones: 1 for greedy answers of this variant.
        by_reference: `nll` of each reference.
    """

    reading: Reading
    nll: float
    agreement: float
    by_reference: list[float] = field(repr=False)

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(min(self.nll, 700))


@dataclass
class Probe:
    """Scores of all variants, best first, and the certainty of the choice.

    Attributes:
        scores: Variants that reproduce all answers greedily first (the strongest evidence), then by `nll`.
        ties: Other variants as good as the best: they also reproduce all answers, or, if the best does not, their mean
            difference from it is within two standard errors over the references.
    """

    scores: list[Score]
    ties: list[Score]

    @property
    def best(self) -> Score:
        """The best variant."""
        return self.scores[0]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        rows = [
            {**s.reading.settings(), "nll": s.nll, "perplexity": s.perplexity, "agreement": s.agreement}
            for s in self.scores
        ]
        return {"readings": rows, "ties_with_best": [s.reading.settings() for s in self.ties]}


def read_references(path: Path) -> list[Reference]:
    """References from JSON lines of `{"image", "question", "answer", "ended"}`; image files relative to `path`.

    Raises:
        FileNotFoundError: The file or an image does not exist.
        ValueError: A line has another form; the message gives its number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the file of references does not exist")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not {"image", "answer"} <= set(row) <= set(FIELDS):
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{path}:{number}: expected the fields image, answer and optionally question and ended; found {keys}"
            )
        image = path.parent / str(row["image"])
        if not image.is_file():
            raise FileNotFoundError(f"{path}:{number}: image {image} does not exist")
        if not str(row["answer"]).strip():
            raise ValueError(f"{path}:{number}: the answer is empty")
        if not isinstance(row.get("ended", True), bool):
            raise ValueError(f"{path}:{number}: ended is {row['ended']!r}; expected true or false")
        found.append(Reference(image, str(row["answer"]), str(row.get("question", "")), row.get("ended", True)))
    if not found:
        raise ValueError(f"{path} has no references")
    return found


def readings(template: str, features: Sequence[str]) -> Iterator[Reading]:
    """All variants for a chat template and features, with every order of the prompted features."""
    from florence_vl.model.chat_template import CHAT_TEMPLATES

    allowed = CHAT_TEMPLATES[template].allows
    names = [name for name in ("newline_after_image", "double_bos") if name in allowed]
    for mean_token, padding in itertools.product(MEAN_TOKENS, PROMPT_PADDINGS):
        for values in itertools.product((False, True), repeat=len(names)):
            for order in orders(features):
                yield Reading(mean_token, padding, template, tuple(zip(names, values, strict=True)), order)


def orders(features: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every order of the prompted features with DaViT's at its position; the given order first."""
    for order in itertools.permutations(name for name in features if name != DAVIT):
        names = iter(order)
        yield tuple(name if name == DAVIT else next(names) for name in features)


def set_reading(model: Any, processor: Any, reading: Reading) -> Any:
    """Set a model's switches in place; returns a processor for them."""
    from florence_vl.model.chat_template import CHAT_TEMPLATES
    from florence_vl.model.fusion import build_fusion
    from florence_vl.model.processing import FlorenceVLProcessor

    config = model.config
    config.mean_token, config.prompt_padding = reading.mean_token, reading.prompt_padding
    config.features = list(reading.features)
    model.model.vision_tower.reset_buffers()
    model.model.fusion = build_fusion(config.fusion, model.model.vision_tower.feature_dims)
    options = dict(reading.options)
    if reading.template == "plain":
        options["end"] = "newline"
    lead, after_image = seams(str(processor.chat_template))
    built = CHAT_TEMPLATES[reading.template].build(
        processor.tokenizer, image_token=processor.image_token + after_image, **options
    )
    return FlorenceVLProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=with_lead(built, lead),
        image_token=processor.image_token,
        context_length=processor.context_length,
    ).fit(config)


def template_of(folder: Path, processor: Any) -> str:
    """Name of the chat template in a folder's conversion."""
    from florence_vl.model.chat_template import choose_template

    path = folder / REPORT_FILE
    named = read_json(path).get("settings", {}).get("template") if path.is_file() else None
    return named or choose_template(processor.tokenizer)


@torch.inference_mode()
def probe(model: Any, processor: Any, references: Sequence[Reference], template: str) -> Probe:
    """Score every variant. DaViT and encoder run once per mean token and padding; the LLM once per variant.

    The model's switches are then those of the best variant.

    Args:
        model: A converted Florence-VL, in eval mode.
        processor: Its processor.
        references: Answers of the released model (best: greedy), or captions.
        template: Name of the chat template.

    Raises:
        ValueError: The tower is not Florence-2, the fusion has weights, or an image is unreadable.
    """
    if model.config.tower != "florence2":
        raise ValueError(f"the switches are those of a Florence-2 tower; this model's is {model.config.tower!r}")
    if any(True for _ in model.model.fusion.parameters()):
        raise ValueError(f"the released models fuse without weights; this model's fusion is {model.config.fusion!r}")
    encoded: dict[Any, list[dict[str, torch.Tensor]]] = {}  # by template options and tokens per image
    features: tuple[Any, list[dict[str, torch.Tensor]]] = (None, [])  # before fusion, for the last tower setting
    scores = []
    for reading in readings(template, model.config.features):
        if dict(reading.options).get("double_bos") and processor.tokenizer.bos_token is None:
            continue
        fitted = set_reading(model, processor, reading)
        key = (reading.options, fitted.num_image_tokens())
        if key not in encoded:
            encoded[key] = [_encode(fitted, reference) for reference in references]
        setting = (reading.mean_token, reading.prompt_padding)
        if features[0] != setting:
            pixels = [batch["pixel_values"].to(model.device) for batch in encoded[key]]
            features = (setting, [model.get_image_features(p, output_features=True).features for p in pixels])
        results = [
            _score(model, batch, found, reference.ended)
            for batch, found, reference in zip(encoded[key], features[1], references, strict=True)
        ]
        tokens = sum(count for _, _, count in results)
        scores.append(
            Score(
                reading,
                sum(nll for nll, _, _ in results) / tokens,
                sum(hits for _, hits, _ in results) / tokens,
                [nll / count for nll, _, count in results],
            )
        )
    scores.sort(key=lambda score: (score.agreement < 1, score.nll))
    best, others = scores[0], scores[1:]
    set_reading(model, processor, best.reading)
    exact = best.agreement == 1
    return Probe(scores, [s for s in others if (s.agreement == 1 if exact else _tied(best, s))])


def _encode(processor: Any, reference: Reference) -> dict[str, torch.Tensor]:
    user: list[dict[str, Any]] = [{"type": "image", "image": str(reference.image)}]
    if reference.question:
        user.append({"type": "text", "text": reference.question})
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": reference.answer}]},
    ]
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"return_tensors": "pt"},
    )


def _score(
    model: Any, batch: dict[str, torch.Tensor], features: dict[str, torch.Tensor], ended: bool
) -> tuple[float, float, int]:
    ids = batch["input_ids"].to(model.device)
    answer = torch.as_tensor(batch["assistant_masks"]).to(model.device).bool().view_as(ids)
    if not ended:
        answer[0, answer[0].nonzero()[-1]] = False
    tokens = model.model.multi_modal_projector(model.model.fusion(features))
    image = BaseModelOutputWithPooling(pooler_output=list(tokens))
    logits = model(input_ids=ids, mm_encoder_outputs={"image": image}).logits[:, :-1][answer[:, 1:]].float()
    targets = ids[:, 1:][answer[:, 1:]]
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return float(nll), float((logits.argmax(-1) == targets).sum()), int(targets.numel())


def _tied(best: Score, other: Score) -> bool:
    gaps = torch.tensor(other.by_reference, dtype=torch.float64) - torch.tensor(best.by_reference, dtype=torch.float64)
    if len(gaps) < 2:
        return bool(gaps.abs().max() < 1e-6)
    return bool(gaps.mean() <= 2 * gaps.std() / len(gaps) ** 0.5 + 1e-9)


def apply_reading(folder: Path, model: Any, processor: Any, reading: Reading) -> None:
    """Write a variant's switches into a converted folder: config, processor, chat template and report."""
    fitted = set_reading(model, processor, reading)
    model.config.save_pretrained(folder)
    fitted.save_pretrained(folder)
    path = folder / REPORT_FILE
    report = read_json(path) if path.is_file() else {}
    report["settings"] = {**report.get("settings", {}), **reading.settings(), "settled_by": "probe"}
    write_json(path, report)
