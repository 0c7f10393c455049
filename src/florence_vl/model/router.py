"""A router that chooses the view of an image from the question and a thumbnail, before tokenization.

For each view it predicts the increase of the loss of the correct answer over the full view. It chooses the view with
the smallest sum of predicted increase and `trade` times the view's cost, so one router covers the cost-accuracy curve.

Shape letters: B images, H width of the LLM, D channels of the first feature, W views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from florence_vl.files import read_json, write_text
from florence_vl.model.resolution import set_resolution
from florence_vl.model.views import FULL_VIEW, feature_mask

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

AUTO_VIEW = "auto"
TRADE = 0.1  # nats; a full view costs one

ROUTER_FILE = "router.safetensors"
ROUTER_CONFIG = "router.json"
OTHER_ROUTERS = "router-*.safetensors"


@dataclass(frozen=True)
class RouterConfig:
    """Choices of a router.

    Attributes:
        question_dim: Width H of the question.
        image_dim: Channels D of the image feature.
        costs: Cost of each view, relative to the full view (1.0).
        thumbnail: The view whose first feature is the router's input.
        hidden: Width of the hidden layer.
    """

    question_dim: int
    image_dim: int
    costs: dict[str, float]
    thumbnail: str
    hidden: int = 128


class Router(nn.Module):
    """An MLP from [question ; mean of the thumbnail's first feature] to the increase of the loss in each view.

    Args:
        config: The choices; the full view is one of `costs`.

    Raises:
        ValueError: The full view or the thumbnail's view has no cost.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        for name in (FULL_VIEW, config.thumbnail):
            if name not in config.costs:
                raise ValueError(f"the router's costs lack the view {name!r}; they have {', '.join(config.costs)}")
        self.config = config
        self.views = tuple(config.costs)
        self.layers = nn.Sequential(
            nn.Linear(config.question_dim + config.image_dim, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, len(self.views)),
        )
        costs = torch.tensor([config.costs[name] for name in self.views])
        self.costs: Tensor
        self.register_buffer("costs", costs, persistent=False)

    def forward(self, question_BH: Tensor, image_BD: Tensor) -> Tensor:
        """Predicted increase of the loss over the full view, (B, W); 0 for the full view."""
        states = [nn.functional.layer_norm(x.float(), x.shape[-1:]) for x in (question_BH, image_BD)]
        growth_BW = self.layers(torch.cat(states, -1))
        full = self.views.index(FULL_VIEW)
        return growth_BW - growth_BW[:, full : full + 1]

    def choose(self, question_BH: Tensor, image_BD: Tensor, trade: float) -> list[str]:
        """Choose the view of each image.

        Args:
            question_BH: See `question_context`.
            image_BD: Mean of the thumbnail's first feature.
            trade: Loss (nats) that the cost of one full view is worth; 0 minimizes the predicted loss.

        Raises:
            ValueError: `trade` is negative.
        """
        _check_trade(trade)
        growth_BW = self(question_BH, image_BD) + trade * self.costs
        return [self.views[index] for index in growth_BW.argmin(-1).tolist()]

    @classmethod
    def load(cls, folder: Path) -> Router:
        """Load the router that chooses with `auto`, the first that `save_routers` wrote.

        Raises:
            FileNotFoundError: The folder contains no router.
            ValueError: The files are inconsistent.
        """
        return load_routers(folder)[0]


def _check_trade(trade: float) -> None:
    if not trade >= 0:
        raise ValueError(f"trade must be 0 or more, found {trade}")


def save_routers(folder: Path, routers: Sequence[Router]) -> None:
    """Write a router to a model's folder: `router.safetensors` and `router.json`.

    Args:
        folder: Of the model; routers that are there are replaced.
        routers: The first is used by `auto`. The others, of the same config but other seeds, show its spread; they are
            written to `router-1.safetensors` and so on.
    """
    import json

    from safetensors.torch import save

    from florence_vl.files import atomic_file

    for old in folder.glob(OTHER_ROUTERS):
        old.unlink()
    for number, router in enumerate(routers):
        with atomic_file(folder / (f"router-{number}.safetensors" if number else ROUTER_FILE)) as path:
            path.write_bytes(save(router.layers.state_dict()))
    write_text(folder / ROUTER_CONFIG, json.dumps(asdict(routers[0].config), indent=2) + "\n")


def copy_routers(source: Path, target: Path) -> None:
    """Copy the routers of a model's folder to another folder, if there are any."""
    if (source / ROUTER_CONFIG).is_file():
        save_routers(target, load_routers(source))


def load_routers(folder: Path) -> list[Router]:
    """Load all routers written by `save_routers`.

    Raises:
        FileNotFoundError: The folder contains no router.
        ValueError: The files are inconsistent.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / ROUTER_CONFIG).is_file():
        raise FileNotFoundError(f"no router in {folder} ({ROUTER_CONFIG}): `florence-vl train-router` trains one")
    values = read_json(folder / ROUTER_CONFIG)
    try:
        config = RouterConfig(**values)
    except TypeError as error:
        raise ValueError(f"{folder / ROUTER_CONFIG} is not of a router: {error}") from None
    routers = []
    for path in (folder / ROUTER_FILE, *sorted(folder.glob(OTHER_ROUTERS))):
        router = Router(config)
        try:
            router.layers.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} does not fit {ROUTER_CONFIG}: {error}") from None
        routers.append(router.eval())
    return routers


@torch.no_grad()
def router_states(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    images: Sequence[Any],
    questions: Sequence[str],
    thumbnail: str,
) -> tuple[Tensor, Tensor]:
    """Inputs of a router for each image and its question.

    Args:
        model: A model with views.
        processor: Its processor.
        images: One image per question.
        questions: The text of the user turn with the image.
        thumbnail: The view that the router uses.

    Returns:
        The questions, (B, H), and the means of the first feature, (B, D).
    """
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    inputs = processor.question_inputs(chats)
    device = model.device
    ids, mask = (torch.tensor(inputs[name], device=device) for name in ("question_ids", "question_mask"))
    question_BH = model.model.mean_embedding(ids, mask)
    # Thumbnails are squares, whatever the images' own aspect ratio.
    square = processor.image_processor.one_size
    pixels = processor.image_processor(list(images), view=thumbnail, return_tensors="pt", **square)["pixel_values"]
    first = model.config.features[0]
    only = torch.tensor([feature_mask(model.config.features, [first])] * len(images), device=device)
    features = model.model.vision_tower(pixels.to(device, model.dtype), only)
    return question_BH, features[first].mean(1)


def route(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    router: Router,
    images: Sequence[Any],
    questions: Sequence[str],
    trade: float,
) -> list[str]:
    """Choose the view of each image for its question; see `Router.choose` and `router_states`.

    Raises:
        ValueError: The views of the router and the model differ.
    """
    check_views_of(router, model)
    return router.choose(*router_states(model, processor, images, questions, router.config.thumbnail), trade)


def check_views_of(router: Router, model: FlorenceVLForConditionalGeneration) -> None:
    """Refuse a router that was trained with another model.

    Raises:
        ValueError: The router's views are not the model's.
    """
    known: Mapping[str, Any] = model.config.views or {}
    unknown = [name for name in router.views if name != FULL_VIEW and name not in known]
    if unknown:
        raise ValueError(
            f"the router chooses among {', '.join(router.views)}, but this model's views are "
            f"{', '.join([FULL_VIEW, *known])}: use the router that was trained with this model"
        )


@dataclass(frozen=True)
class Routing:
    """What chooses the view of each image while a model answers: the view `auto`.

    Attributes:
        router: Of the model.
        trade: See `Router.choose`.
    """

    router: Router
    trade: float = TRADE

    def __post_init__(self) -> None:
        _check_trade(self.trade)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its choices from those of another one, as JSON values."""
        from florence_vl.model.features import state_hash

        return {"view": AUTO_VIEW, "trade": self.trade, "router": state_hash(self.router)}

    def views(
        self,
        model: FlorenceVLForConditionalGeneration,
        processor: FlorenceVLProcessor,
        images: Sequence[Any],
        questions: Sequence[str],
    ) -> list[str]:
        """The view of each picture for its question; see `route`."""
        return route(model, processor, self.router, images, questions, self.trade)


def set_view(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    folder: Path | str,
    view: str | None = None,
    trade: float | None = None,
    **resolution: Any,
) -> Routing | None:
    """`set_resolution`, where the view may also be `auto`: the router beside the model then chooses it for each image.

    Args:
        model: See `set_resolution`.
        processor: See `set_resolution`.
        folder: Of the model.
        view: A view's name, or `auto`.
        trade: For `auto`, see `Router.choose`.
        **resolution: Other keywords of `set_resolution`.

    Returns:
        What chooses the views with `auto`, else None.

    Raises:
        FileNotFoundError: There is no router.
        ValueError: The router is of another model, or `trade` is negative or without `auto`; or as `set_resolution`.
    """
    if view != AUTO_VIEW and trade is not None:
        raise ValueError(f"a trade is for the view {AUTO_VIEW!r}, found the view {view!r}")
    if view == AUTO_VIEW:
        router = Router.load(Path(folder)).to(model.device)
        check_views_of(router, model)
        if resolution:
            set_resolution(model, processor, **resolution)
        return Routing(router, TRADE if trade is None else trade)
    set_resolution(model, processor, view=view, **resolution)
    return None
