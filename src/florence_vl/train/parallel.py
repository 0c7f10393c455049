"""One code path from one process to many: DDP, FSDP2, HSDP, activation checkpointing, compile.

The model code does not depend on this module; everything is applied to the model here. The order is activation
checkpointing, then compile, then sharding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from florence_vl.data.layout import FULL_PREFIX
from florence_vl.model.frozen import eval_mode
from florence_vl.model.towers import BackboneTower
from florence_vl.registry import did_you_mean
from florence_vl.train.casts import keep_casts
from florence_vl.train.config import ActivationCheckpointingConfig, CompileConfig, ParallelConfig, Precision, Recipe
from florence_vl.train.first_rank import FirstRankWeights
from florence_vl.train.step import TowerCalls, tower_calls
from florence_vl.train.world import World

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration


IMAGE_INPUTS = ("pixel_values", "image_sizes", "question_ids", "question_mask", "feature_mask")
"""Image inputs of a batch, by the model's arguments."""


def resolve_strategy(config: ParallelConfig, world: World) -> str:
    """Resolve `auto`: sharding where the model may not fit a device, whole copies on CPUs, where they are faster.

    Raises:
        ValueError: The strategy does not fit the number of processes.
    """
    if config.strategy == "auto":
        if world.size == 1:
            return "none"
        return "ddp" if world.device.type == "cpu" else "fsdp"
    if config.strategy == "none" and world.size > 1:
        raise ValueError(f"parallel.strategy is none but {world.size} processes run: use ddp, fsdp, hsdp or auto")
    if config.strategy in ("ddp", "hsdp") and world.size == 1:
        raise ValueError(f"parallel.strategy is {config.strategy} but one process runs: start it with torchrun")
    if config.strategy == "fsdp" and world.size == 1 and not (dist.is_available() and dist.is_initialized()):
        raise ValueError("parallel.strategy is fsdp but there is no process group: start it with torchrun")
    return config.strategy


def shard_groups(config: ParallelConfig, strategy: str, world: World) -> tuple[int, int]:
    """Number of copies of the model, and of processes that share one, for a resolved strategy.

    Raises:
        ValueError: The processes of an `hsdp` run do not form two whole groups.
    """
    if strategy != "hsdp":
        return (1, world.size) if strategy == "fsdp" else (world.size, 1)
    size = config.shard_size or world.local_size
    if world.size % size or size == world.size:
        raise ValueError(
            f"parallel.strategy hsdp shards inside groups of {size} and replicates between them: {world.size} "
            "processes do not form two whole groups. Set parallel.shard_size, or use fsdp"
        )
    return world.size // size, size


class LossModule(nn.Module):
    """The model as a function from a batch to its summed, globally normalized loss: the unit that is parallelized.

    With several processes, each makes the same number of passes through the tower as the process with the most image
    sizes, at least one: missing passes use a dummy image, times zero. Every process then takes part in every
    collective, and every trainable parameter gets a gradient. Otherwise a process without images would hang.

    Args:
        model: The model.
        image_size: Height and width of the dummy image in pixels.
        always_images: Run the dummy image; needed only with several processes.
        autocast: Compute type, if weights are kept in fp32 and nothing else casts them.
        pixel_dtype: Type to which pixels are cast, if weights are cast but inputs are not (FSDP2).
        distill: Weight of the divergence from the model's own answers with all features, which are the second half of
            batches (`florence_vl.data.layout.FULL_PREFIX`); 0 for batches without it.
    """

    def __init__(
        self,
        model: FlorenceVLForConditionalGeneration,
        image_size: tuple[int, int],
        always_images: bool = False,
        autocast: torch.dtype | None = None,
        pixel_dtype: torch.dtype = torch.float32,
        distill: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.image_size, self.always_images = image_size, always_images
        self.autocast, self.pixel_dtype, self.distill = autocast, pixel_dtype, distill

    def forward(self, batch: Mapping[str, Any], num_items: int, calls: TowerCalls = (0, 0)) -> Tensor:
        """Loss of a batch.

        Args:
            batch: Batch of a collator: `input_ids`, `labels`, ...; passed to the model.
            num_items: Divisor of the summed loss, a plain number.
            calls: Minimum number of passes through the tower, of the batch and of its second half.

        Returns:
            Scalar.
        """
        inputs = {key: value for key, value in batch.items() if value is not None}
        full = {key: inputs.pop(key) for key in list(inputs) if key.startswith(FULL_PREFIX)}
        context = torch.autocast(inputs["input_ids"].device.type, self.autocast) if self.autocast else nullcontext()
        with context:
            if not self.distill or not torch.is_grad_enabled():
                return self.model.supervised_loss(self._states(inputs, calls[0]), inputs["labels"], num_items)
            with torch.no_grad(), eval_mode(self.model):  # the teacher has no dropout
                full = {key.removeprefix(FULL_PREFIX): value for key, value in full.items()}
                teacher_KX, _ = self.model.supervised_logits(self._states(full, calls[1]), full["labels"])
            torch.clear_autocast_cache()  # of weights cast without gradient, which the student would use
            logits_KX, targets_K = self.model.supervised_logits(self._states(inputs, calls[0]), inputs["labels"])
            loss = nn.functional.cross_entropy(logits_KX, targets_K, reduction="sum")
            student_KX, teacher_KX = logits_KX.log_softmax(-1), teacher_KX.log_softmax(-1)
            divergence = nn.functional.kl_div(student_KX, teacher_KX, reduction="sum", log_target=True)
            return (loss + self.distill * divergence) / num_items

    def _states(self, inputs: Mapping[str, Any], calls: int) -> Tensor:
        """The LLM's last hidden states."""
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.pixel_dtype)
        if self.always_images:
            self._encode_images(inputs, calls)
        return self.model.model(**inputs, use_cache=False, return_dict=True).last_hidden_state

    def _encode_images(self, inputs: dict[str, Any], calls: int) -> None:
        """Replace pixels by image tokens, with the same number of passes through the tower on all processes.

        The order of forward and backward passes must be the same on all processes, because the weights of each block
        are gathered by a collective: word embeddings of the questions, tower, word embeddings of the text, LLM.
        """
        base, device = self.model.model, inputs["input_ids"].device
        of_images = {name: inputs.pop(name) for name in IMAGE_INPUTS if name in inputs}
        width, names = base.config.text_config.hidden_size, base.config.features
        # Trainable replacements of features must take part in every loss.
        masks = base.feature_fill is not None
        image, made = None, 0
        if of_images:
            count = len(of_images["pixel_values"])
            if masks and "feature_mask" not in of_images:
                of_images["feature_mask"] = torch.ones(count, len(names), dtype=torch.long, device=device)
            image, made = base.get_image_features(**of_images, return_dict=True), tower_calls(of_images)[0]
        elif base.fusion.uses_context:
            nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
            base.mean_embedding(nothing, nothing)
        zero = torch.zeros((), device=device)
        for _ in range(made, max(calls, 1)):
            pixels = torch.zeros(1, 3, *self.image_size, device=device, dtype=self.pixel_dtype)
            context = torch.zeros(1, width, device=device, dtype=self.pixel_dtype)
            mask = torch.ones(1, len(names), dtype=torch.long, device=device) if masks else None
            zero = zero + 0.0 * base.encode_images(pixels, context, mask)[0].float().sum()
        if image is None:
            embeds_BLH = self.model.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = embeds_BLH + zero.to(embeds_BLH.dtype)
            return
        if made < calls:
            first, *others = image.pooler_output
            image.pooler_output = [first + zero.to(first.dtype), *others]
        inputs["mm_encoder_outputs"] = {"image": image}


def blocks(module: nn.Module) -> list[nn.Module]:
    """Outermost transformer blocks of a part: the units for checkpointing, compilation and sharding.

    These are transformers' `GradientCheckpointingLayer`s (DaViT and BART blocks, any LLM's layers, CLIP's ...).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []

    def visit(node: nn.Module) -> None:
        for child in node.children():
            if isinstance(child, GradientCheckpointingLayer):
                found.append(child)
            else:
                visit(child)

    visit(module)
    return found


def part_blocks(model: FlorenceVLForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """Blocks of the tower and of the LLM."""
    return {"tower": blocks(model.model.vision_tower), "llm": blocks(model.model.language_model)}


# Selective activation checkpointing keeps results of these operations; cheap operations are recomputed.
def _matrix_products() -> set[Any]:
    names = (
        "aten.mm.default",
        "aten.addmm.default",
        "aten.bmm.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "flash_attn._flash_attn_forward.default",  # these two exist once flash-attn is imported
        "flash_attn._flash_attn_varlen_forward.default",
    )
    found = set()
    for name in names:
        space, packet, overload = name.split(".")
        operations = getattr(torch.ops, space)
        if hasattr(operations, packet):
            found.add(getattr(getattr(operations, packet), overload))
    return found


def apply_activation_checkpointing(
    model: FlorenceVLForConditionalGeneration, config: ActivationCheckpointingConfig
) -> None:
    """Recompute activations by block in the backward pass: `full`, or `selective`: all except matrix products.

    Raises:
        ValueError: A part has no blocks to recompute.
    """
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    saved = _matrix_products()

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    for part, found in part_blocks(model).items():
        mode = getattr(config, part)
        if mode == "none":
            continue
        if not found:
            raise ValueError(f"activation_checkpointing.{part}: this {part} has no blocks to recompute")
        function: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)
        if mode == "selective":
            function = functools.partial(
                function, context_fn=functools.partial(create_selective_checkpoint_contexts, policy)
            )
        for block in found:
            block.gradient_checkpointing = True  # type: ignore[assignment]
            block._gradient_checkpointing_func = function  # type: ignore[assignment]


def apply_compile(model: FlorenceVLForConditionalGeneration, config: CompileConfig) -> None:
    """Apply torch.compile to every block of a part in place; blocks of the same kind share one compilation.

    Raises:
        ValueError: The backend is unknown.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if (config.tower or config.llm) and config.backend not in known:
        raise ValueError(f"unknown compile.backend {config.backend!r}. {did_you_mean(config.backend, known)}")
    for part, found in part_blocks(model).items():
        if getattr(config, part):
            for block in found:
                block.compile(backend=config.backend)


@dataclass
class Parallelized:
    """A model ready to train.

    Attributes:
        module: Called with (batch, num_items).
        model: The model inside.
        strategy: `none`, `ddp`, `fsdp` or `hsdp`.
        grad_scale: Factor of the loss that compensates the averaging of gradients over processes.
    """

    module: nn.Module
    model: FlorenceVLForConditionalGeneration
    strategy: str
    grad_scale: float

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Context of a forward and backward pass of one micro-batch.

        DDP exchanges gradients in the last micro-batch of the step. A sharded model reduce-scatters them in each, so
        that a process never holds the whole gradient (4 bytes per parameter) between micro-batches; replicas across
        groups (hsdp) are reduced in the last one.
        """
        context: AbstractContextManager[Any] = nullcontext()
        if self.strategy == "ddp" and not last:
            context = self.module.no_sync()  # type: ignore[operator]
        elif self.strategy == "hsdp":
            self.module.set_requires_all_reduce(last)  # type: ignore[operator]
        with context:
            yield


def parallelize(
    model: FlorenceVLForConditionalGeneration,
    world: World,
    recipe: Recipe,
    image_size: tuple[int, int],
    weights_on_first: bool = False,
) -> Parallelized:
    """Apply all of this to a model whose parts are already frozen; its weights move to the device.

    Args:
        model: The model.
        world: The processes.
        recipe: Strategy, precision, checkpointing, compilation and distillation.
        image_size: Height and width of a dummy image in pixels.
        weights_on_first: Whether the model is from `load_on_first_rank`; it must then be sharded.

    Raises:
        ValueError: Strategy and processes contradict each other.
    """
    precision, strategy = recipe.precision, resolve_strategy(recipe.parallel, world)
    if precision == "bf16_pure":
        _cast_weights(model, torch.bfloat16)
    apply_activation_checkpointing(model, recipe.activation_checkpointing)
    apply_compile(model, recipe.compile)
    sharded = strategy in ("fsdp", "hsdp")
    autocast = torch.bfloat16 if precision == "bf16" and not sharded else None
    casts = precision == "bf16_pure" or (precision == "bf16" and sharded)
    pixel_dtype = torch.bfloat16 if casts else torch.float32
    module: nn.Module = LossModule(model, image_size, world.size > 1, autocast, pixel_dtype, recipe.distill)
    if sharded:
        _shard(module, model, world, recipe.parallel, precision, strategy, weights_on_first)
    else:
        assert not weights_on_first
        model.to(world.device)
        if autocast is not None and not (recipe.compile.tower or recipe.compile.llm):
            keep_casts(model, autocast)
        if strategy == "ddp":
            module = nn.parallel.DistributedDataParallel(
                module,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # A backbone's layers behind its last feature have no gradient.
                find_unused_parameters=recipe.parts.tower.train and isinstance(model.model.vision_tower, BackboneTower),
            )
    return Parallelized(module, model, strategy, float(world.size))


def _cast_weights(model: FlorenceVLForConditionalGeneration, dtype: torch.dtype) -> None:
    """Cast a model as `from_pretrained` loads it: the buffers of the LLM, its rotary frequencies, stay fp32."""
    exact = [(module, dict(module._buffers)) for module in model.model.language_model.modules()]
    model.to(dtype)
    for module, buffers in exact:
        module._buffers.update(buffers)


def _cast_outputs_of_buffers(tower: nn.Module, dtype: torch.dtype) -> None:
    """Buffers (Florence-2's temporal embedding) stay fp32 under FSDP2's policy; cast their outputs."""

    def cast(_module: nn.Module, _args: Any, output: Any) -> Any:
        return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output

    for module in tower.modules():
        if any(b is not None and b.is_floating_point() for b in module._buffers.values()):
            module.register_forward_hook(cast)


def _shard(
    module: nn.Module,
    model: FlorenceVLForConditionalGeneration,
    world: World,
    parallel: ParallelConfig,
    precision: Precision,
    strategy: str,
    weights_on_first: bool,
) -> None:
    """`fully_shard` every block, the head, the token embeddings, and the rest as the root unit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device_type = world.device.type
    if strategy == "hsdp":
        mesh = init_device_mesh(
            device_type, shard_groups(parallel, strategy, world), mesh_dim_names=("replicate", "shard")
        )
    else:
        mesh = init_device_mesh(device_type, (world.size,), mesh_dim_names=("shard",))
    options: dict[str, Any] = {"mesh": mesh}
    if precision != "fp32":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        _cast_outputs_of_buffers(model.model.vision_tower, torch.bfloat16)
    weights = FirstRankWeights(module, world) if weights_on_first else None
    # Units move to the device one by one as they are sharded, so the whole model never has to fit on it.
    units = [block for found in part_blocks(model).values() for block in found]
    embeddings = model.get_input_embeddings()
    if model.lm_head.weight is not embeddings.weight:
        units += [model.lm_head, embeddings]
    for unit in [*units, module]:
        if weights is not None:
            weights.receive(unit)
        if unit is module and "mp_policy" in options:
            # The root's inputs are a batch and a divisor: cast to bf16, 335 supervised tokens would become 336.
            options["mp_policy"] = replace(options["mp_policy"], cast_forward_inputs=False)
        fully_shard(unit, **options)
