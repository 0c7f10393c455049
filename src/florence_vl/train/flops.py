"""FLOPs and saved activations of a training step, counted on a model without weights.

The tower is run on the meta device and counted per operation, so any tower is counted exactly. The LLM's cost is linear
in its tokens except for attention, which grows with the sum of the samples' squared lengths: in packed rows, the square
of each sample's length counts, not that of the row. A multiply-add is 2 FLOPs; attention is counted completely, not
halved for causality, as usual for MFU (Chowdhery et al., PaLM, appendix B); recomputation is not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from florence_vl.model.configuration import FlorenceVLConfig
from florence_vl.model.modeling import PARTS, FlorenceVLForConditionalGeneration
from florence_vl.train.config import LLMPartConfig, PartsConfig
from florence_vl.train.optimizer import apply_parts
from florence_vl.train.parallel import blocks

# Peak dense bf16 TFLOP/s and memory in GiB, from the vendors' data sheets (without sparsity).
DEVICES: dict[str, tuple[float, float]] = {
    "h100-80gb": (989.0, 79.6),
    "h100-pcie": (756.0, 79.6),
    "h200-141gb": (989.0, 140.4),
    "b200-180gb": (2250.0, 178.4),
    "a100-80gb": (312.0, 79.2),
    "a100-40gb": (312.0, 39.4),
    "l40s-48gb": (362.0, 44.5),
    "rtx-4090-24gb": (165.0, 23.6),
    "mi300x-192gb": (1307.0, 191.5),
}
_CUDA_NAMES = (
    ("H100 PCIe", "h100-pcie"),
    ("H100", "h100-80gb"),
    ("H200", "h200-141gb"),
    ("B200", "b200-180gb"),
    ("A100-SXM4-40GB", "a100-40gb"),
    ("A100", "a100-80gb"),
    ("L40S", "l40s-48gb"),
    ("4090", "rtx-4090-24gb"),
    ("MI300X", "mi300x-192gb"),
)


def peak_tflops(device: torch.device) -> float | None:
    """Peak bf16 TFLOP/s of a known device; None for any other."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((DEVICES[key][0] for text, key in _CUDA_NAMES if text in name), None)


def build_shell(config: FlorenceVLConfig) -> FlorenceVLForConditionalGeneration:
    """The model on the meta device: shapes without weights."""
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(copy.deepcopy(config))
    tower: Any = model.model.vision_tower
    if hasattr(tower, "masks_padding"):
        tower.masks_padding = False  # kernels depend on a mask's values, which meta tensors do not have
    return model


@dataclass(frozen=True)
class Multipliers:
    """Multiples of the forward pass's FLOPs in a training step: 1 for the forward pass, +1 for each of two gradients.

    Attributes:
        tower: The tower: 3 if trained, 1 if frozen.
        projector: Fusion and projector.
        llm: The LLM's linear layers: 3 if trained, 2 if frozen but passed by gradients, 1 otherwise.
        attention: The LLM's attention, whose products have no weights: 3 if gradients pass.
        head: The language modeling head.
    """

    tower: float
    projector: float
    llm: float
    attention: float
    head: float

    @classmethod
    def of(cls, parts: PartsConfig, num_layers: int) -> Multipliers:
        """Multipliers for a recipe's parts; for the last n layers or LoRA the LLM's is a mean over layers."""
        below = parts.tower.train or parts.projector.train
        llm: LLMPartConfig = parts.llm
        passed = 2.0 if below else 1.0
        if llm.last_layers is not None:
            share = llm.last_layers / num_layers
            linear = 3.0 * share + passed * (1 - share)
            attention = 3.0 if below else 3.0 * share + (1 - share)
            head = 3.0
        elif llm.lora is not None:
            linear, attention, head = 2.0, 3.0, 2.0
        elif llm.train:
            linear = attention = head = 3.0
        else:
            linear, attention, head = (2.0, 3.0, 2.0) if below else (1.0, 1.0, 1.0)
        projector = 3.0 if parts.projector.train else (2.0 if parts.tower.train else 1.0)
        return cls(3.0 if parts.tower.train else 1.0, projector, linear, attention, head)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one forward pass.

    Attributes:
        tower_per_image: DaViT, its projection and the encoder with all prompts (or the backbone), per image with all
            its tiles.
        projector_per_image: Fusion and projector, per image.
        llm_per_token: Linear layers of the LLM.
        attention_per_pair: Scores and weighted sums of all layers for one pair of tokens of a sample.
        head_per_token: Head at one supervised position.
        image_tokens: Tokens per image in the LLM.
        num_layers: Blocks of the LLM.
    """

    tower_per_image: float
    projector_per_image: float
    llm_per_token: float
    attention_per_pair: float
    head_per_token: float
    image_tokens: int
    num_layers: int

    def step(
        self, multipliers: Multipliers, images: float, tokens: float, pairs: float, supervised: float
    ) -> dict[str, float]:
        """FLOPs of a training step by part.

        Args:
            multipliers: Multipliers of the trained parts.
            images: Number of images.
            tokens: Tokens in the LLM, including image tokens.
            pairs: Sum of the samples' squared lengths.
            supervised: Supervised tokens.
        """
        return {
            "tower": multipliers.tower * self.tower_per_image * images,
            "projector": multipliers.projector * self.projector_per_image * images,
            "llm": multipliers.llm * self.llm_per_token * tokens,
            "attention": multipliers.attention * self.attention_per_pair * pairs,
            "head": multipliers.head * self.head_per_token * supervised,
        }


def count_flops(config: FlorenceVLConfig, height: int, width: int) -> ModelFlops:
    """Count the FLOPs of a model from its config.

    Args:
        config: Config of the model.
        height: Height of the images, px.
        width: Width of the images, px.

    Raises:
        ValueError: The tower does not support this image size.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = build_shell(config)
    image_tokens = model.num_image_tokens(height, width)
    _set_attention(model, "eager")
    pixels = torch.empty(1, 3, height, width, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        features = model.model.tower_features(pixels)
    tower = counter.get_total_flops()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.model.project_features(features, (height, width), model.model.no_question(1))
    text = config.get_text_config()
    llm = model.model.language_model
    linear = sum(2 * m.in_features * m.out_features for m in llm.modules() if isinstance(m, nn.Linear))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelFlops(
        tower_per_image=float(tower),
        projector_per_image=float(counter.get_total_flops()),
        llm_per_token=float(linear),
        attention_per_pair=4.0 * text.num_hidden_layers * text.num_attention_heads * head_dim,
        head_per_token=2.0 * text.hidden_size * text.vocab_size,
        image_tokens=image_tokens,
        num_layers=text.num_hidden_layers,
    )


def _set_attention(model: nn.Module, name: str) -> None:
    """Use one attention function in every part, without checking whether each supports it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = name


class _FusedAttention(torch.autograd.Function):
    """Stands for any fused attention kernel: saves query, key, value, output and one number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        statistics = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, statistics)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _planned_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    output = _FusedAttention.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


_PLANNED = "florence_vl_plan"


@dataclass
class SavedActivations:
    """Bytes that a part's forward pass saves for its backward pass.

    Attributes:
        total: Without recomputation.
        block_inputs: Inputs of the blocks: all that is saved of them with full recomputation.
        largest_block: Activations of one block, which recomputation temporarily restores.
        outside: Activations outside the blocks, which are always saved.
    """

    total: int = 0
    block_inputs: int = 0
    largest_block: int = 0
    outside: int = 0

    def held(self, mode: str) -> int:
        """Bytes between forward and backward pass, under `none`, `full` or `selective` recomputation.

        Selective keeps matrix products and drops what is cheap; it is taken as half of what blocks keep otherwise.
        """
        if mode == "none":
            return self.total
        inside = self.total - self.outside
        kept = self.block_inputs if mode == "full" else max(self.block_inputs, inside // 2)
        return min(self.total, self.outside + kept)

    def brought_back(self, mode: str) -> int:
        """Bytes beside `held` in the backward pass of the largest block."""
        return min(self.total, self.held(mode) + self.largest_block) - self.held(mode)


@contextmanager
def _watch_saved(parts_blocks: list[nn.Module], model: nn.Module, result: SavedActivations) -> Iterator[None]:
    """Sum up what autograd saves by block: each storage once, without weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    weights |= {b.untyped_storage()._cdata for b in model.buffers()}
    seen: dict[int, Any] = {}
    inside: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = storage  # kept alive, because the address of a freed storage would be reused
            size = storage.nbytes()
            result.total += size
            if inside:
                inside[-1] += size
            else:
                result.outside += size
        return tensor

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
        result.block_inputs += tensors[0].untyped_storage().nbytes() if tensors else 0
        inside.append(0)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        result.largest_block = max(result.largest_block, inside.pop())

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in parts_blocks]
    handles += [block.register_forward_hook(leave) for block in parts_blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()


class ActivationMeter:
    """Measures what tower, projector and LLM save for the backward pass of a micro-batch, on a model without weights.

    Args:
        config: Config of the model.
        parts: What is trained: frozen parts without gradients save nothing.
        dtype: Data type of the computation.
    """

    def __init__(self, config: FlorenceVLConfig, parts: PartsConfig, dtype: torch.dtype) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_PLANNED, _planned_attention)
        self.parts, self.dtype = parts, dtype
        self.width = config.get_text_config().hidden_size
        self.model = build_shell(config)
        apply_parts(self.model, parts)  # LoRA adapters too: each saves its input, which its frozen base layer does not
        self.model.to(dtype)
        _set_attention(self.model, _PLANNED)

    def measure(self, images: int, height: int, width: int, tokens: int) -> dict[str, SavedActivations]:
        """Measure one micro-batch.

        Args:
            images: Number of images.
            height: Height of the images, px.
            width: Width of the images, px.
            tokens: Its tokens in the LLM, over all rows.
        """
        parts, base = self.parts, self.model.model
        found: dict[str, SavedActivations] = {part: SavedActivations() for part in PARTS}
        options: dict[str, Any] = {"dtype": self.dtype, "device": "meta"}
        if images:
            pixels = torch.empty(images, 3, height, width, **options)
            tower = base.vision_tower
            with torch.set_grad_enabled(parts.tower.train), _watch_saved(blocks(tower), self.model, found["tower"]):
                features = base.tower_features(pixels)
            with _watch_saved([], self.model, found["projector"]):
                base.project_features(features, (height, width), base.no_question(images))
        embeds = torch.empty(1, tokens, self.width, **options)
        whole_llm = parts.llm.train and parts.llm.last_layers is None and parts.llm.lora is None
        embeds.requires_grad_(parts.tower.train or parts.projector.train or whole_llm)
        positions = torch.arange(tokens, device="meta").unsqueeze(0)
        with _watch_saved(blocks(base.language_model), self.model, found["llm"]):
            base.language_model(inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False)
        return found
