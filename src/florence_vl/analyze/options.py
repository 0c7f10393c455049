"""Likelihoods and answers of a model with fewer features or other image sizes.

An option is a size and a set of features. Features outside the set are replaced by their mean, as in the model's views,
so nothing is trained. For every question and option one forward pass over the correct answer gives its negative
log-likelihood, and whether the model's greedy answer equals it.

Shape letters: Q questions, O options, N image tokens, H width of the LLM, K tokens of the answer, F features.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from florence_vl.evaluate.metrics import METRICS
from florence_vl.evaluate.suites import BENCHMARKS, benchmark_names
from florence_vl.model.geometry import DAVIT
from florence_vl.statistics import Interval, interval

if TYPE_CHECKING:
    from florence_vl.evaluate.question import Question
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

PICTURES_FOR_MEANS = 64  # sufficient for a feature's mean over tokens and pictures


@dataclass(frozen=True)
class Option:
    """A size and a set of features.

    Attributes:
        size: Pixels per side.
        features: Names of the computed features.
        all_features: Whether these are all features of the model.
        view: Name of the model's view with this size and these features, if any.
    """

    size: int
    features: tuple[str, ...]
    all_features: bool = False
    view: str | None = None

    @property
    def name(self) -> str:
        """View, size and features in a few words."""
        look = f"{self.size} px, {'all' if self.all_features else ' + '.join(self.features)}"
        return look if self.view is None else f"{self.view}: {look}"


def make_options(features: Sequence[str], sizes: Sequence[int], subsets: str = "all") -> list[Option]:
    """All options of these sizes; the first one is the largest size with all features.

    Args:
        features: The model's features, in order.
        sizes: Pixels per side.
        subsets: `all` non-empty subsets, `leave-one-out` (all, without each, each alone), or `none` (all features).

    Raises:
        ValueError: There is no size, a duplicate size, or an unknown kind of subsets.
    """
    if not sizes or len(set(sizes)) != len(sizes):
        raise ValueError(f"give sizes in pixels, each once; found {list(sizes)}")
    names = tuple(features)
    chosen: list[tuple[str, ...]]
    if subsets == "all":
        chosen = [part for count in range(len(names), 0, -1) for part in combinations(names, count)]
    elif subsets == "leave-one-out":
        chosen = [names, *(tuple(n for n in names if n != name) for name in names), *((name,) for name in names)]
    elif subsets == "none":
        chosen = [names]
    else:
        raise ValueError(f"unknown kind of subsets {subsets!r}; known: all, leave-one-out, none")
    kept = [part for part in dict.fromkeys(chosen) if part]
    return [Option(size, part, part == names) for size in sorted(sizes, reverse=True) for part in kept]


@dataclass
class Measurement:
    """Results of `measure`.

    Attributes:
        options: The options.
        nll_QO: Negative log-likelihood of the correct answer, nats, summed over its tokens.
        right_QO: Whether the greedy answer equals the correct one token for token.
        groups: Group of each question: its skill if the benchmark has skills, otherwise the benchmark.
        pictures: Picture of each question, because questions about the same picture are not independent.
        flops_O: FLOPs of tower, projector and prefill of the LLM per question.
        tokens_O: Mean number of prompt tokens.
        skipped: Number of skipped questions by reason.
        questions: The measured questions.
    """

    options: list[Option]
    nll_QO: np.ndarray
    right_QO: np.ndarray
    groups: list[str]
    pictures: list[str]
    flops_O: np.ndarray
    tokens_O: np.ndarray
    skipped: Counter[str] = field(default_factory=Counter)
    questions: list[Question] = field(default_factory=list)

    def by_picture(self, values_Q: np.ndarray) -> Interval:
        """Mean of one value per question, with its 95 % interval over pictures."""
        return cluster_mean(values_Q, self.pictures)


def cluster_mean(values_Q: np.ndarray, clusters: Sequence[str]) -> Interval:
    """Mean over questions with a 95 % interval (Student's t) over clusters of dependent questions."""
    _, inverse_Q = np.unique(np.array(clusters), return_inverse=True)
    mean = float(values_Q.mean())
    sums = np.bincount(inverse_Q, weights=values_Q - mean)
    found = interval((mean + sums * len(sums) / len(values_Q)).tolist())
    return Interval(mean, found.half, found.runs)


def answer_of(question: Question) -> str | None:
    """The correct answer as the model should say it, by the benchmark's metric; None if it is not a text."""
    known = question.benchmark in benchmark_names()
    return (BENCHMARKS[question.benchmark].scorer if known else METRICS["exact_match"]).target(question.reference)


@torch.inference_mode()
def measure(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    questions: Sequence[Question],
    options: Sequence[Option],
    progress: Callable[[int, int], None] | None = None,
    shuffle: int | None = None,
) -> Measurement:
    """Measure every question under every option.

    Args:
        model: A model in eval mode; its resolution is changed in place.
        processor: Its processor; likewise.
        questions: Questions without exactly one picture or without a text answer are skipped and counted.
        options: From `make_options` or `florence_vl.analyze.routed.view_options`.
        progress: Called with the number of finished (question, size) pairs and the total.
        shuffle: Seed of a permutation: a gate that depends on the question sees the text of another one.

    Raises:
        ValueError: No question is usable, or the model does not support a size.
    """
    from florence_vl.model.resolution import set_resolution
    from florence_vl.model.tiles import refuse_tiles

    refuse_tiles(model.config, "a comparison of sizes and features")
    skipped: Counter[str] = Counter()
    used: list[tuple[Question, str]] = []
    for question in questions:
        answer = answer_of(question)
        if len(question.images) != 1:
            skipped["not exactly one picture"] += 1
        elif not answer or not answer.strip():
            skipped["no right answer in text"] += 1
        else:
            used.append((question, answer))
    if not used:
        raise ValueError(f"no question has one picture and a right answer: {dict(skipped) or 'the suite is empty'}")
    used.sort(key=lambda pair: pair[0].picture_key)
    order_Q = range(len(used)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(used))
    gated_by = [used[i][0] for i in order_Q]
    shape = (len(used), len(options))
    nll_QO, right_QO = np.zeros(shape), np.zeros(shape, dtype=bool)
    lengths_O, flops_O = np.zeros(len(options)), np.zeros(len(options))
    sizes = list(dict.fromkeys(option.size for option in options))
    original = processor.image_processor.size["height"]
    for number, size in enumerate(sizes):
        if size != original or number:
            set_resolution(model, processor, image_size=size)
        columns = [i for i, option in enumerate(options) if option.size == size]
        fill = feature_means(model, processor, [question for question, _ in used])
        lengths = 0
        scored = _score(model, processor, used, gated_by, options, columns, fill)
        for row, (nll_O, right_O, length) in enumerate(scored):
            nll_QO[row, columns], right_QO[row, columns] = nll_O, right_O
            lengths += length
            if progress is not None:
                progress(number * len(used) + row + 1, len(sizes) * len(used))
        lengths_O[columns] = lengths / len(used)
        for column in columns:
            flops_O[column] = prefill_flops(model, processor, options[column].features, lengths_O[column])
    return Measurement(
        list(options),
        nll_QO,
        right_QO,
        [str(q.reference.get("skill") or q.benchmark) for q, _ in used],
        [q.picture_key for q, _ in used],
        flops_O,
        lengths_O,
        skipped,
        [question for question, _ in used],
    )


def feature_means(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, questions: Sequence[Question]
) -> dict[str, Tensor]:
    """Replacement of a missing feature, (D,): the model's own if it has views, or the mean over these pictures."""
    from florence_vl.model.features import tower_features
    from florence_vl.model.pictures import open_image

    fill = model.model.feature_fill
    if fill is not None:
        return {name: vector.detach() for name, vector in fill.vectors.items()}
    pictures = {question.picture_key: question.images[0] for question in questions}
    chosen = list(pictures.values())[:: max(1, len(pictures) // PICTURES_FOR_MEANS)][:PICTURES_FOR_MEANS]
    found = tower_features(model, processor, (open_image(picture.read()) for picture in chosen))
    return {name: x_IND.float().mean((0, 1)) for name, x_IND in found.items()}


def _score(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    used: Sequence[tuple[Question, str]],
    gated_by: Sequence[Question],
    options: Sequence[Option],
    columns: Sequence[int],
    fill: Mapping[str, Tensor],
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """NLL and correctness of each question and option of one size, (O,), and the number of its prompt tokens."""
    from florence_vl.data.encode import RecordEncoder
    from florence_vl.data.records import Record, text_part
    from florence_vl.model.modeling import FlorenceVLImageFeatures
    from florence_vl.model.pictures import open_image

    encode = RecordEncoder(processor)
    device = model.device
    shown, features, size = "", {}, (0, 0)
    for (question, answer), other in zip(used, gated_by, strict=True):
        picture = question.images[0]
        if question.picture_key != shown:
            name = f"the picture of {question.benchmark} question {question.id}"
            pixels = processor.image_processor([open_image(picture.read(), name=name)], return_tensors="pt")
            pixel_values = pixels["pixel_values"].to(device, model.dtype)
            shown, size = question.picture_key, (pixel_values.shape[-2], pixel_values.shape[-1])
            features = model.model.vision_tower(pixel_values)
        messages = [
            {"role": "user", "content": question.content()},
            {"role": "assistant", "content": [text_part(answer)]},
        ]
        ids_L, labels_L = encode.tokenize(Record(question.id, question.benchmark, messages, [picture.read()]))
        context = None
        if model.model.fusion.uses_context:
            asked = processor.question_inputs([[{"role": "user", "content": other.content()}]])
            context = model.model.question_context(*(torch.tensor(asked[k], device=device) for k in asked))
        filled: dict[str, list[Tensor]] = {name: [] for name in features}
        for column in columns:
            for name, x_1ND in features.items():
                left_out = name not in options[column].features
                filled[name].append(fill[name].to(x_1ND).expand_as(x_1ND[0]) if left_out else x_1ND[0])
        stacked = {name: torch.stack(values) for name, values in filled.items()}
        if context is not None:
            context = context.expand(len(columns), -1)
        tokens_ONH = model.model.project_features(stacked, size, context)
        answered = labels_L[1:] != -100
        targets_K = labels_L[1:][answered].to(device)
        output = model(
            input_ids=ids_L.expand(len(columns), -1).to(device),
            mm_encoder_outputs={"image": FlorenceVLImageFeatures(pooler_output=list(tokens_ONH))},
            logits_to_keep=answered.nonzero()[:, 0].to(device),
            use_cache=False,
        )
        log_probs_OKX = output.logits.float().log_softmax(-1)
        chosen_OK = log_probs_OKX.gather(-1, targets_K.expand(len(columns), -1).unsqueeze(-1))[..., 0]
        right_O = (log_probs_OKX.argmax(-1) == targets_K).all(-1)
        yield -chosen_OK.sum(-1).cpu().numpy(), right_O.cpu().numpy(), len(ids_L) - len(targets_K)


def prefill_flops(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, features: Sequence[str], tokens: float
) -> float:
    """FLOPs of tower, fusion, projector and the LLM's prefill for one question about one picture.

    Args:
        model: The model. Features that are not computed cost nothing, but every prompt needs DaViT.
        processor: Its processor, at the size in question.
        features: Computed features.
        tokens: Prompt tokens, including image tokens.
    """
    from florence_vl.train.flops import count_flops

    size: Any = processor.image_processor.size
    height, width = processor.image_processor.output_size(size["height"], size["width"])
    whole = count_flops(model.config, height, width)
    tower = tower_flops(model, features, height, width)
    return tower + whole.projector_per_image + whole.llm_per_token * tokens + whole.attention_per_pair * tokens**2


def synchronize(model: FlorenceVLForConditionalGeneration) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def tower_flops(model: FlorenceVLForConditionalGeneration, features: Sequence[str], height: int, width: int) -> float:
    """FLOPs of the tower for one image, where only some features are computed; see `prefill_flops`."""
    from florence_vl.train.flops import count_flops

    config = model.config
    if config.tower == "florence2" and set(features) != set(config.features):
        config = copy.deepcopy(config)
        config.views, config.fusion, config.gate = None, "channel", None
        config.features = [name for name in model.config.features if name in features or name == DAVIT]
    return count_flops(config, height, width).tower_per_image
