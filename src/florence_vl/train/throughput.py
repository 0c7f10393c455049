"""What a recipe's settings cost beside its useful FLOPs: recomputation, masked attention, exchange between devices.

An estimate to choose settings by: arithmetic and exchange overlap perfectly, compilation and padding count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from florence_vl.train.config import Recipe
from florence_vl.train.flops import ModelFlops, Multipliers

DEVICES_PER_NODE = 8
GB_PER_S_IN_NODE = 300.0  # a device, each way, of NVLink 4's 450 GB/s
GB_PER_S_BETWEEN_NODES = 40.0  # a device, each way, of one 400 Gbit/s adapter


@dataclass(frozen=True)
class Throughput:
    """Estimated speed of a recipe.

    Attributes:
        recomputed: FLOPs per sample that recomputation repeats.
        masked: FLOPs per sample of attention between samples of a packed row, which the mask throws away.
        compute_seconds: Arithmetic of a step on each device.
        exchange_seconds: Gathering of weights and reduction of gradients of a step on each device.
        samples_per_s: Over all devices; the slower of the two counts.
    """

    recomputed: float
    masked: float
    compute_seconds: float
    exchange_seconds: float
    samples_per_s: float


def estimate_throughput(
    recipe: Recipe,
    flops: ModelFlops,
    multipliers: Multipliers,
    useful: float,
    images: float,
    tokens: float,
    parameters: tuple[int, int],
    devices: int,
    shards: int,
    flops_per_s: float,
) -> Throughput:
    """Estimate a recipe's speed.

    Args:
        recipe: The recipe.
        flops: Of a forward pass.
        multipliers: What trains.
        useful: FLOPs of a sample's training step.
        images: Images per average sample.
        tokens: Tokens per average sample.
        parameters: Of the model: all, and those that train.
        devices: Number of devices.
        shards: Number of devices that share one copy of the model.
        flops_per_s: That a device reaches.
    """
    modes, packing = recipe.activation_checkpointing, recipe.data.packing
    recomputed = 0.0
    if modes.llm == "full":
        recomputed += flops.llm_per_token * tokens + flops.attention_per_pair * tokens**2
    if modes.tower == "full" and recipe.parts.tower.train:
        recomputed += flops.tower_per_image * images
    masked, per_row = 0.0, 1.0
    if packing.mode == "packed":
        per_row = packing.tokens_per_row / tokens
        if not _knows_bounds(recipe):
            others = packing.tokens_per_row * tokens - tokens**2
            masked = multipliers.attention * flops.attention_per_pair * max(0.0, others)
    samples = recipe.batch_size * per_row
    compute = samples / devices * (useful + recomputed + masked) / flops_per_s
    exchange = _exchange_seconds(recipe, parameters, devices, shards)
    return Throughput(recomputed, masked, compute, exchange, samples / max(compute, exchange))


def _knows_bounds(recipe: Recipe) -> bool:
    """Whether the LLM's attention leaves out what the mask of packed rows forbids."""
    chosen = recipe.model.attn_implementation
    name = chosen.get("text_config") if isinstance(chosen, dict) else chosen
    return name is not None and any(kind in name for kind in ("flash", "flex", "varlen"))


def _exchange_seconds(recipe: Recipe, parameters: tuple[int, int], devices: int, shards: int) -> float:
    """Ring collectives: weights twice and gradients once for each micro-batch where sharded, replicas once a step.

    A ring over whole nodes uses all their adapters; each ring of replicas uses one.
    """
    if devices == 1:
        return 0.0
    everything, trainable = parameters
    micro_batches = max(1.0, recipe.batch_size / recipe.micro_batch_size / devices)
    weight_bytes = 4 if recipe.precision == "fp32" else 2
    wide = min(GB_PER_S_IN_NODE, DEVICES_PER_NODE * GB_PER_S_BETWEEN_NODES)
    if shards == 1:
        return _seconds(2 * 4 * trainable, devices, wide if devices > DEVICES_PER_NODE else GB_PER_S_IN_NODE)
    speed = GB_PER_S_IN_NODE if shards <= DEVICES_PER_NODE else wide
    sharded = micro_batches * _seconds(2 * weight_bytes * everything + 4 * trainable, shards, speed)
    # on other wires than the shards', so at the same time
    return max(sharded, _seconds(2 * 4 * trainable / shards, devices // shards, GB_PER_S_BETWEEN_NODES))


def _seconds(size: float, members: int, speed: float) -> float:
    """Time of a ring for `size` bytes at `speed` GB/s."""
    return size * (members - 1) / members / (speed * 1e9)
