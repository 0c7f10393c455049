"""Supervised training of a router: its labels are the losses of the correct answer under each view.

One pass of the tower and one of the LLM per view give the labels of a question. The router then learns the increase of
the loss in each view over the full view, from the question and a thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from florence_vl.data.records import BadRecord, Record
from florence_vl.model.pictures import open_image
from florence_vl.model.router import Router, RouterConfig, router_states
from florence_vl.model.tiles import refuse_tiles
from florence_vl.model.views import FULL_VIEW
from florence_vl.train.flops import count_flops

if TYPE_CHECKING:
    from florence_vl.model.configuration import FlorenceVLConfig
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor


@dataclass
class RouterData:
    """Training data of a router.

    Attributes:
        questions_BH: State of each question.
        images_BD: State of each thumbnail.
        losses_BW: Mean loss of the correct answer's tokens (nats) under each view.
        costs: FLOPs of tower and prefill of each view, relative to the full view.
        bad: Unusable records by kind.
    """

    questions_BH: Tensor
    images_BD: Tensor
    losses_BW: Tensor
    costs: dict[str, float]
    bad: dict[str, int]


def view_costs(config: FlorenceVLConfig, processor: FlorenceVLProcessor, text_tokens: int = 32) -> dict[str, float]:
    """FLOPs of tower, projector and prefill of each view of square images, relative to the full view.

    Args:
        config: Config of a model with views.
        processor: The model's processor.
        text_tokens: Number of text tokens in the prompt.

    Raises:
        ValueError: The model has no views.
    """
    if not config.views:
        raise ValueError("a router needs a model with views, and config.views is empty: set views when building it")
    refuse_tiles(config, "a router")
    flops = {}
    for name in (FULL_VIEW, *config.views):
        settings = processor.image_processor.view_settings(name)
        side = settings["size"] or processor.image_processor.size["height"]
        height, width = processor.image_processor.output_size(side, side, view=name)
        # Skipped features cost nothing in the tower; the width of the projector's input does not change.
        fields = {**config.to_dict(), "features": settings["features"], "views": None}
        if len(settings["features"]) == 1 and config.fusion == "gated":
            fields |= {"fusion": "channel", "gate": None}
        tower = count_flops(type(config)(**fields), height, width).tower_per_image
        counted = count_flops(config, height, width)
        tokens = counted.image_tokens + text_tokens
        prefill = counted.llm_per_token * tokens + counted.attention_per_pair * tokens**2
        flops[name] = tower + counted.projector_per_image + prefill
    return {name: value / flops[FULL_VIEW] for name, value in flops.items()}


@torch.no_grad()
def collect(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    records: Iterable[Record],
    thumbnail: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> RouterData:
    """States, and losses under each view, of records with one image and one question.

    Args:
        model: A model with views, in eval mode.
        processor: The model's processor.
        records: The first user turn is the question, the first answer the correct one.
        thumbnail: The view for the router's input; by default the cheapest.
        progress: Called with the number of records done.

    Raises:
        ValueError: The model has no views, or no record is usable.
    """
    costs = view_costs(model.config, processor)
    thumbnail = thumbnail or min(costs, key=costs.__getitem__)
    processor.image_processor.view_settings(thumbnail)  # raises for an unknown name
    questions, images, losses = [], [], []
    bad: dict[str, int] = {}
    for record in records:
        try:
            picture, question, chat = _question(record)
            rows = [_loss(model, processor, chat, name) for name in costs]
        except BadRecord as error:
            bad[error.kind] = bad.get(error.kind, 0) + 1
            continue
        question_1H, image_1D = router_states(model, processor, [picture], [question], thumbnail)
        questions.append(question_1H.float().cpu())
        images.append(image_1D.float().cpu())
        losses.append(torch.tensor([rows]))
        progress(len(losses))
    if not losses:
        raise ValueError(f"no record could be used; bad records by kind: {bad or 'none, the data is empty'}")
    return RouterData(torch.cat(questions), torch.cat(images), torch.cat(losses), costs, bad)


def _question(record: Record) -> tuple[Any, str, list[dict[str, Any]]]:
    record.check()
    roles = [message["role"] for message in record.messages]
    if len(record.images) != 1 or roles[:2] != ["user", "assistant"]:
        raise BadRecord("messages", f"record {record.id!r}: expected one image, a question and its answer")
    try:
        picture = open_image(record.images[0])
    except (OSError, ValueError) as error:
        raise BadRecord("image", str(error)) from error
    question = "\n".join(part["text"] for part in record.messages[0]["content"] if part["type"] == "text")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return picture, question, [{"role": "user", "content": content}, record.messages[1]]


def _loss(model: Any, processor: Any, chat: list[dict[str, Any]], view: str) -> float:
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True, view=view
    )
    mask = inputs.pop("assistant_masks")
    labels = torch.where(torch.as_tensor(mask) == 1, inputs["input_ids"], -100)
    if not (labels[:, 1:] != -100).any():
        raise BadRecord("unsupervised", "the answer has no tokens")
    inputs = {name: value.to(model.device) for name, value in inputs.items() if hasattr(value, "to")}
    return float(model(**inputs, labels=labels.to(model.device)).loss)


def fit_router(
    data: RouterData, thumbnail: str, steps: int = 400, lr: float = 3e-3, hidden: int = 128, seed: int = 0
) -> Router:
    """Regress the increase of the loss in each view (Huber loss, AdamW, full batch).

    Args:
        data: Training data.
        thumbnail: The view for the router's input.
        steps: Number of optimizer steps.
        lr: Learning rate.
        hidden: Width of the hidden layer.
        seed: Seed of the initial weights.
    """
    config = RouterConfig(data.questions_BH.shape[1], data.images_BD.shape[1], data.costs, thumbnail, hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = Router(config)
    full = router.views.index(FULL_VIEW)
    growth_BW = data.losses_BW - data.losses_BW[:, full : full + 1]
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = nn.functional.huber_loss(router(data.questions_BH, data.images_BD), growth_BW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return router.eval()


@torch.no_grad()
def curve(router: Router, data: RouterData, trades: Iterable[float]) -> list[dict[str, Any]]:
    """Results of a router on held-out questions at each trade, and of baselines at the same cost.

    Returns:
        One row per trade: `trade`, `cost` and `loss` of the routed views; `shuffled`, the loss if each question is
        routed by another question (equal for a router that only reweights); `random`, the loss if the same views are
        assigned at random; and the fraction of each view.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    count = len(data.losses_BW)
    costs_W = torch.tensor([data.costs[name] for name in router.views])
    growth_BW = router(data.questions_BH, data.images_BD)
    roll = torch.arange(count).roll(max(1, count // 2))
    shuffled_BW = router(data.questions_BH[roll], data.images_BD)
    for trade in trades:
        chosen = (growth_BW + trade * costs_W).argmin(-1)
        other = (shuffled_BW + trade * costs_W).argmin(-1)
        dealt = chosen[torch.randperm(count, generator=generator)]
        losses = {
            name: float(data.losses_BW.gather(1, views[:, None]).mean())
            for name, views in (("loss", chosen), ("shuffled", other), ("random", dealt))
        }
        shares = {name: float((chosen == index).float().mean()) for index, name in enumerate(router.views)}
        rows.append({"trade": trade, "cost": float(costs_W[chosen].mean()), **losses, "shares": shares})
    return rows
