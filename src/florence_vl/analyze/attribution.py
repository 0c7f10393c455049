"""Contribution of each named feature to the image tokens and answers of a Florence-VL.

Two measures for one image and question. *Norm*: the norm of a feature's part in the projector's first layer per token;
for channel fusion this is the feature's block of columns times the feature. *Leave-one-out*: the decrease of the
answer's likelihood when a feature is replaced. Shape letters: N image tokens, D channels, H LLM width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from florence_vl.registry import did_you_mean

if TYPE_CHECKING:
    from florence_vl.data.records import ImageSource
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

REPLACEMENTS = ("zero", "mean")


@dataclass
class FeatureShare:
    """Contribution of one feature.

    Args:
        name: Its name.
        norm: Mean over image tokens of the norm of its part in the projector's first layer.
        share: That norm divided by the sum over features, in [0, 1].
        map_HW: (rows, columns) share of this feature at each position.
        drop: Log-likelihood of the answer with all features minus without this one, nats; positive: it helped.
        drop_alone: Log-likelihood with all features minus with only this one.
    """

    name: str
    norm: float
    share: float
    map_HW: np.ndarray
    drop: float
    drop_alone: float


@dataclass
class WordShare:
    """What each feature does for one word of the answer.

    Args:
        text: The word.
        log_likelihood: Of its tokens with all features, nats.
        drops: Feature -> log-likelihood of the word minus that without the feature, nats; positive: it helped.
    """

    text: str
    log_likelihood: float
    drops: dict[str, float]


@dataclass
class Attribution:
    """Contributions for one image and question.

    Args:
        question: The question.
        answer: The scored answer.
        generated: Whether the model generated the answer (greedily).
        log_likelihood: Log-likelihood of the answer with all features, nats, summed over its tokens.
        tokens: Number of those tokens, including the end of turn.
        replacement: Replacement of a removed feature.
        features: One entry per feature.
        without_image: Log-likelihood with all features minus with none.
        words: One entry a word of the answer; the end of turn belongs to none.
    """

    question: str
    answer: str
    generated: bool
    log_likelihood: float
    tokens: int
    replacement: str
    features: list[FeatureShare] = field(default_factory=list)
    without_image: float = math.nan
    words: list[WordShare] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, without the maps."""
        rows = [
            {"name": f.name, "norm": f.norm, "share": f.share, "drop": f.drop, "drop_alone": f.drop_alone}
            for f in self.features
        ]
        own = {k: v for k, v in vars(self).items() if k not in ("features", "words")}
        return {**own, "features": rows, "words": [vars(word) for word in self.words]}


@torch.inference_mode()
def first_layer_norms(model: FlorenceVLForConditionalGeneration, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norm of each feature's part in the projector's first layer at every position: name -> (N,).

    The paper's fusions and the layer are linear, so the layer's output is its bias plus one part per feature: the
    output for the fusion with all other features set to zero. For token fusion, the part at a position is that of the
    feature's own token.

    Args:
        model: The model.
        features: Name -> (1, N, D), from `FlorenceVLModel.merge_features`.

    Raises:
        ValueError: The fusion is not linear, so there are no such parts.
    """
    inner = model.model
    layer: Any = inner.multi_modal_projector.layers[0]
    zeros = {name: torch.zeros_like(x) for name, x in features.items()}

    def part(chosen: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.linear(inner.fusion({**zeros, **chosen}), layer.weight)

    parts = {name: part({name: x}) for name, x in features.items()}
    whole = part(features)
    if not torch.allclose(
        sum(parts.values(), torch.zeros_like(whole)), whole, rtol=1e-2, atol=1e-3 * float(whole.abs().max())
    ):
        raise ValueError(
            f"fusion {inner.config.fusion!r} is not linear; features have no separate parts in its projector"
        )
    norms: dict[str, Tensor] = {}
    for name, x_1ND in features.items():
        norm_N = parts[name][0].norm(dim=-1)
        tokens = x_1ND.shape[1]
        norms[name] = norm_N.view(-1, tokens).amax(0) if norm_N.numel() != tokens else norm_N
    return norms


def attribute(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    image: ImageSource,
    question: str,
    answer: str | None = None,
    *,
    replacement: str = "mean",
    max_new_tokens: int = 64,
) -> Attribution:
    """Contribution of every feature for one image and question.

    Args:
        model: A Florence-VL with two features or more.
        processor: Its processor.
        image: The image.
        question: The user's text.
        answer: The answer to score; the model's own greedy answer if None.
        replacement: Replacement of a removed feature: `mean`, its mean over the image's tokens (keeps the norm that the
            projector was trained with), or `zero`.
        max_new_tokens: Maximum tokens of the model's own answer.

    Returns:
        The contributions.

    Raises:
        ValueError: The model has one feature only, the replacement is unknown, or the answer is empty.
    """
    from florence_vl.data.encode import RecordEncoder
    from florence_vl.data.records import Record, image_part, text_part
    from florence_vl.model.modeling import FlorenceVLImageFeatures
    from florence_vl.model.pictures import open_image
    from florence_vl.model.tiles import refuse_tiles

    refuse_tiles(model.config, "attribution")
    if replacement not in REPLACEMENTS:
        raise ValueError(f"unknown replacement {replacement!r}. {did_you_mean(replacement, REPLACEMENTS)}")
    inner = model.model
    if len(inner.vision_tower.feature_names) < 2:
        raise ValueError(
            f"this model has one feature ({inner.vision_tower.feature_names[0]}); attribution compares two or more"
        )
    picture = open_image(image)
    generated = answer is None
    if answer is None:
        answer = _generate(model, processor, picture, question, max_new_tokens)
    if not answer.strip():
        raise ValueError("the answer is empty" + (": the model generated no text; give --answer" if generated else ""))
    messages = [
        {"role": "user", "content": [image_part(), text_part(question)]},
        {"role": "assistant", "content": [text_part(answer)]},
    ]
    sample = RecordEncoder(processor)(Record("attribution", "attribution", messages, [picture]))
    assert sample.pixel_values is not None  # the record has an image
    device = model.device
    ids_1L, labels_1L = (torch.as_tensor(x).unsqueeze(0).to(device) for x in (sample.input_ids, sample.labels))
    count = int((labels_1L[:, 1:] != -100).sum())

    with torch.inference_mode():
        height, width = sample.pixel_values.shape[-2:]
        size = (height, width)
        features = inner.vision_tower(sample.pixel_values.to(device, model.dtype))
        norms = first_layer_norms(model, inner.merge_features(features, size))
        blanks = {
            name: torch.zeros_like(x) if replacement == "zero" else x.mean(1, keepdim=True).expand_as(x)
            for name, x in features.items()
        }

        def score_tokens(kept: Sequence[str]) -> Tensor:
            used = {name: (features if name in kept else blanks)[name] for name in features}
            tokens_INH = inner.project_features(used, size)
            encoded = FlorenceVLImageFeatures(last_hidden_state=tokens_INH, pooler_output=list(tokens_INH))
            logits_1LX = model(input_ids=ids_1L, mm_encoder_outputs={"image": encoded}).logits[:, :-1]
            learned_L = labels_1L[0, 1:] != -100
            logprobs_CX = logits_1LX[0, learned_L].float().log_softmax(-1)
            return logprobs_CX.gather(-1, ids_1L[0, 1:][learned_L, None])[:, 0]

        def score(kept: Sequence[str]) -> float:
            return float(score_tokens(kept).sum())

        names = list(features)
        whole_C = score_tokens(names)
        whole = float(whole_C.sum())
        without = {name: score_tokens([other for other in names if other != name]) for name in names}
        total = torch.stack(list(norms.values())).sum(0).clamp_min(1e-12)
        rows, columns = (length // inner.config.merge for length in inner.vision_tower.grid_size(*size))
        result = Attribution(question, answer, generated, whole, count, replacement, without_image=whole - score([]))
        for name in names:
            share_N = (norms[name] / total)[-rows * columns :]
            result.features.append(
                FeatureShare(
                    name=name,
                    norm=float(norms[name].mean()),
                    share=float(norms[name].sum() / total.sum()),
                    map_HW=share_N.view(rows, columns).float().cpu().numpy(),
                    drop=whole - float(without[name].sum()),
                    drop_alone=whole - score([name]),
                )
            )
        said = ids_1L[0, 1:][labels_1L[0, 1:] != -100].tolist()
        for text, start, end in _words(processor, said):
            part = slice(start, end)
            drops = {name: float((whole_C[part] - without[name][part]).sum()) for name in names}
            result.words.append(WordShare(text, float(whole_C[part].sum()), drops))
    return result


def _words(processor: FlorenceVLProcessor, ids: list[int]) -> list[tuple[str, int, int]]:
    """Words of an answer's tokens, and the tokens [start, end) of each; a token belongs to the word it begins in."""
    words: list[tuple[str, int, int]] = []
    before, start = "", 0
    for end in range(1, len(ids) + 1):
        text = processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        new = text[len(before) :]
        if not new or text.endswith("\ufffd"):  # a control token, or half a character
            continue
        if not words or new[0].isspace():
            words.append((new, start, end))
        else:
            words[-1] = (words[-1][0] + new, words[-1][1], end)
        before, start = text, end
    return [(text.strip(), start, end) for text, start, end in words if text.strip()]


def _generate(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    picture: Image.Image,
    question: str,
    max_new_tokens: int,
) -> str:
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def attribution_figure(image: Image.Image, attribution: Attribution) -> Any:
    """The picture, a heat map of each feature's share over it, and both measures as bars.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.figure import Figure

    from florence_vl.analyze.plots import COLORS

    shown = image.copy()
    shown.thumbnail((384, 384))
    gray = np.asarray(shown.convert("L").convert("RGB"))
    count = len(attribution.features)
    figure = Figure(figsize=(2.3 * (count + 1), 5.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    upper, lower = halves
    axes = upper.subplots(1, count + 1)
    for ax in axes:
        ax.set_axis_off()
    axes[0].imshow(shown)
    axes[0].set_title("image", fontsize=8)
    low = min(float(f.map_HW.min()) for f in attribution.features)
    top = max(float(f.map_HW.max()) for f in attribution.features)
    extent = (0, shown.width, shown.height, 0)
    drawn = None
    for ax, feature in zip(axes[1:], attribution.features, strict=True):
        ax.imshow(gray, extent=extent)
        drawn = ax.imshow(
            feature.map_HW, extent=extent, cmap="inferno", alpha=0.65, vmin=low, vmax=top, interpolation="bilinear"
        )
        ax.set_title(f"{feature.name}: {feature.share:.0%}", fontsize=8)
    bar = upper.colorbar(drawn, ax=list(axes), shrink=0.7)
    bar.set_label("share of the projector's first layer", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    left, right = lower.subplots(1, 2)
    names = [f.name for f in attribution.features]
    for ax, values, title in (
        (left, [f.norm for f in attribution.features], "norm through the projector's first layer"),
        (right, [f.drop for f in attribution.features], "log-likelihood of the answer lost without it (nats)"),
    ):
        ax.barh(names[::-1], values[::-1], color=[COLORS[i % len(COLORS)] for i in range(count)][::-1])
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set_title(title, fontsize=8)
        ax.tick_params(labelsize=7)
    figure.suptitle(f"{_short(attribution.question)}  →  {_short(attribution.answer)}", fontsize=9)
    return figure


def _short(text: str, length: int = 70) -> str:
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("$", r"\$")
    return plain if len(plain) <= length else plain[: length - 1] + "…"
