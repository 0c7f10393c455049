"""One process loads the weights and the others receive their shards, so host memory holds only one whole model.

Used for sharded runs. The first process loads the recipe's model; the others build the same one on torch's meta device,
where it needs no memory. `parallelize` then proceeds unit by unit (a block, the head, the rest): a unit is broadcast,
every process keeps its shard, and the whole unit is freed. Buffers are sent too, including those that are in no state
dict: prompt ids and rotary frequencies. (`set_model_state_dict` with `broadcast_from_rank0` fills all parameters of a
sharded model on the meta device, but leaves these buffers unset.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from florence_vl.train.config import Recipe
from florence_vl.train.model import load_model

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.train.world import World


def load_on_first_rank(recipe: Recipe, world: World) -> tuple[FlorenceVLForConditionalGeneration, Any]:
    """The recipe's model and processor: with weights on the first process, on the meta device on all others.

    Every process calls it. `FirstRankWeights` fills the others.

    Raises:
        ValueError: As in `load_model`, on every process.
        FileNotFoundError: As in `load_model`, on every process.
    """
    loaded: list[FlorenceVLForConditionalGeneration] = []

    def load() -> tuple[Any, Any]:
        model, processor = load_model(recipe)
        loaded.append(model)
        return model.config, processor

    config, processor = world.decide(load)
    if loaded:
        return loaded[0], processor
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    return model.eval(), processor


@dataclass(frozen=True)
class _Slot:
    """Location of a tensor in a module.

    Attributes:
        owner: Path of the module.
        name: Name of the tensor in it.
        kind: `parameter`, `buffer`, or `attribute`: a plain tensor attribute, as in some rotary embeddings.
        shape: Shape of the tensor.
        dtype: Data type of the tensor.
        tied_to: Number of the first slot with the same tensor; its own number if there is none.
    """

    owner: str
    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tied_to: int

    @property
    def where(self) -> str:
        return f"{self.owner}.{self.name}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, str, Tensor]]:
    """Owner, name, kind and tensor of all tensors of a model; tied tensors appear at each of their locations."""
    for owner, module in model.named_modules():
        for kind, table in (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        ):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    yield owner, name, kind, value


def _slots(model: nn.Module) -> list[_Slot]:
    found: list[_Slot] = []
    first: dict[int, int] = {}
    for owner, name, kind, value in _tensors(model):
        tied_to = first.setdefault(id(value), len(found))
        found.append(_Slot(owner, name, kind, tuple(value.shape), value.dtype, tied_to))
    return found


class FirstRankWeights:
    """Sends the first process's tensors to the others, unit by unit. Every process creates one and calls it
    identically.

    Args:
        model: Complete on the first process; the same model without weights on the others. Frozen parts, adapters and
            dtype must be set already.
        world: The processes.

    Raises:
        RuntimeError: The processes built different models.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world
        self.slots: list[_Slot] = world.decide(lambda: _slots(model))
        self._received: set[int] = set()
        if not world.is_main:
            self._compare()
            for slot in self.slots:  # ties first, before any code checks whether the head is tied
                if slot.kind == "parameter":
                    self._put(slot, self._get(self.slots[slot.tied_to]))

    def receive(self, unit: nn.Module) -> None:
        """Fill the tensors of a unit that no earlier unit filled. Every process calls it, in the same order."""
        inside = {id(module) for module in unit.modules()}
        for slot in self.slots:
            if slot.tied_to in self._received or id(self.model.get_submodule(slot.owner)) not in inside:
                continue
            self._received.add(slot.tied_to)
            source = self.slots[slot.tied_to]
            if self.world.is_main:
                self._send(source)
            else:
                self._take(source)

    def _send(self, slot: _Slot) -> None:
        tensor = self._get(slot).detach().to(self.world.device).contiguous()
        if tensor.numel():
            dist.broadcast(_bytes(tensor), src=0)

    def _take(self, slot: _Slot) -> None:
        tensor = torch.empty(slot.shape, dtype=slot.dtype, device=self.world.device)
        if tensor.numel():
            dist.broadcast(_bytes(tensor), src=0)
        if slot.kind == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=self._get(slot).requires_grad)
        for other in self.slots:
            if other.tied_to == slot.tied_to:
                self._put(other, tensor)

    def _get(self, slot: _Slot) -> Tensor:
        return getattr(self.model.get_submodule(slot.owner), slot.name)

    def _put(self, slot: _Slot, tensor: Tensor) -> None:
        module = self.model.get_submodule(slot.owner)
        if slot.kind == "parameter":
            module._parameters[slot.name] = tensor  # type: ignore[assignment]
        elif slot.kind == "buffer":
            module._buffers[slot.name] = tensor
        else:
            setattr(module, slot.name, tensor)

    def _compare(self) -> None:
        """Copy plain attributes that only the first process has; everything else must exist on both."""
        expected = {(s.where, s.kind): s.shape for s in self.slots}
        found = {(s.where, s.kind): s.shape for s in _slots(self.model)}
        for key in expected.keys() | found.keys():
            if key[1] == "attribute" and key in expected:
                continue
            if expected.get(key) != found.get(key):
                raise RuntimeError(
                    f"rank {self.world.rank} built another model than the first process: {key[1]} {key[0]} is "
                    f"{found.get(key)} here and {expected.get(key)} there"
                )


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, which every backend supports."""
    return tensor.view(-1).view(torch.uint8)
