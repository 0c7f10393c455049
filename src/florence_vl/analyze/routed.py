"""What the router of a model with views gives: its choices at several trades, and rivals that must lose to it.

Shape letters: Q questions, O options, W views, H width of the LLM, D channels of the first feature.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from florence_vl.analyze.headroom import Choice, score_choice
from florence_vl.analyze.options import Measurement, Option, synchronize, tower_flops
from florence_vl.model.router import Router, router_states
from florence_vl.model.views import FULL_VIEW

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.evaluate.question import Question
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

TRADES = (0.0, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class RoutedChoice:
    """A way to choose the view of each question.

    Attributes:
        choice: Its scores and FLOPs.
        share_O: How often it takes each option.
        asks_router: Whether the router runs for it.
        seeds: Accuracy with each router.
    """

    choice: Choice
    share_O: np.ndarray
    asks_router: bool
    seeds: tuple[float, ...]


def view_options(model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor) -> list[Option]:
    """The full view and each view of a model as options.

    Raises:
        ValueError: The model has no views.
    """
    if not model.config.views:
        raise ValueError("the model has no views: give --subsets all, leave-one-out or none")
    names = tuple(model.config.features)
    side = processor.image_processor.size["height"]
    options = [Option(side, names, True, FULL_VIEW)]
    for name, view in model.config.views.items():
        chosen = tuple(view["features"])
        options.append(Option(view["size"] or side, chosen, chosen == names, name))
    return options


@torch.inference_mode()
def routed_choices(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    routers: Sequence[Router],
    measured: Measurement,
    trades: Sequence[float] = TRADES,
    seed: int = 0,
    batch_size: int = 16,
) -> list[RoutedChoice]:
    """The routers' choices at each trade, and their rivals: shuffled questions, the image alone, and chance.

    Scores are means over the routers, which differ by their seeds.

    A router that only reweights the views loses nothing when each question is routed by another one's text; one that
    reads the image only loses nothing when all questions look alike to it.

    Args:
        model: With views, in eval mode.
        processor: The model's, at the full view's size.
        routers: Of the model, of one config.
        measured: Of `view_options`.
        trades: See `Router.choose`.
        seed: Of the shuffled questions.
        batch_size: Questions whose thumbnails are encoded at a time.
    """
    config = routers[0].config
    columns = {option.view: index for index, option in enumerate(measured.options)}
    column_W = np.array([columns[name] for name in routers[0].views])
    pictures, texts = _asked(measured.questions)
    states: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        states.append(router_states(model, processor, pictures[part], texts[part], config.thumbnail))
    question_QH, image_QD = (torch.cat([state[i] for state in states]) for i in (0, 1))
    random = np.random.default_rng(seed)
    orders = [torch.from_numpy(random.permutation(len(texts))) for _ in routers]
    questions = {
        "router": [question_QH] * len(routers),
        "shuffled questions": [question_QH[order_Q] for order_Q in orders],
        "image alone": [question_QH.mean(0, keepdim=True).expand_as(question_QH)] * len(routers),
    }
    growth = {
        name: [router(seen_QH, image_QD).cpu() for router, seen_QH in zip(routers, seen, strict=True)]
        for name, seen in questions.items()
    }
    costs_W = routers[0].costs.cpu()
    settings = processor.image_processor.view_settings(config.thumbnail)
    side = settings["size"] or processor.image_processor.size["height"]
    thumbnail = tower_flops(model, [model.config.features[0]], side, side)
    eye, found = np.eye(len(measured.options)), []

    def add(name: str, shares: Sequence[np.ndarray], asks_router: bool) -> None:
        share_QO = np.mean(shares, axis=0)
        choice = score_choice(measured, name, share_QO, thumbnail if asks_router else 0.0)
        seeds = tuple(float((share * measured.right_QO).sum(1).mean()) for share in shares)
        found.append(RoutedChoice(choice, share_QO.mean(0), asks_router, seeds))

    for trade in trades:
        for name, growths in growth.items():
            shares = [eye[column_W[(growth_QW + trade * costs_W).argmin(-1).numpy()]] for growth_QW in growths]
            add(f"{name}, trade {trade:g}", shares, asks_router=True)
            if name == "router":
                own = shares
        add(f"chance, trade {trade:g}", [np.tile(s.mean(0), (len(texts), 1)) for s in own], asks_router=False)
    return found


def _asked(questions: Sequence[Question]) -> tuple[list[Image.Image], list[str]]:
    from florence_vl.model.pictures import open_image

    opened: dict[str, Any] = {}
    for question in questions:
        if question.picture_key not in opened:
            opened[question.picture_key] = open_image(question.images[0].read())
    return [opened[question.picture_key] for question in questions], [question.text for question in questions]


@torch.inference_mode()
def time_router(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, router: Router, rounds: int = 5
) -> float:
    """Median seconds in which the router chooses the view of one small picture.

    Args:
        model: With views, in eval mode.
        processor: The model's.
        router: Of the model.
        rounds: Times that it is measured, after one that is not counted.
    """
    from PIL import Image

    picture, times = Image.new("RGB", (64, 64)), []
    for _ in range(rounds + 1):
        synchronize(model)
        began = time.perf_counter()
        states = router_states(model, processor, [picture], ["What is it?"], router.config.thumbnail)
        router.choose(*states, 0.0)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
