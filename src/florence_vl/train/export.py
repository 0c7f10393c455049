"""Export a training checkpoint to a folder that `from_pretrained` loads: gathered, with LoRA merged, atomically."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from florence_vl.files import MARK, atomic_folder, check_destination
from florence_vl.train.checkpoint import find_checkpoint, load_weights
from florence_vl.train.checkpoint_files import read_trainer_state
from florence_vl.train.optimizer import apply_parts
from florence_vl.train.recipes import resolve_recipe

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.train.world import World

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge_lora(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Merge LoRA adapters into the weights they adapt, by name: W + (alpha / r) B A.

    Args:
        state: Full state dict of a model with injected adapters.
        model: The model, which determines each adapter's scale.

    Returns:
        The state dict of the plain model.
    """
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return state
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not adapted:
        return state
    merged = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        owner, found, tail = key.partition(".base_layer.")
        if not found:
            merged[key] = value
            continue
        if tail == "weight" and owner in adapted:
            scale = adapted[owner].scaling["default"]
            up, down = state[f"{owner}.lora_B.default.weight"], state[f"{owner}.lora_A.default.weight"]
            value = (value.float() + scale * (up.float() @ down.float())).to(value.dtype)
        merged[f"{owner}.{tail}"] = value
    return merged


def export_state(
    model: FlorenceVLForConditionalGeneration, processor: Any, folder: Path, world: World, dtype: str | None = None
) -> Path:
    """Write a model during training, gathered from all processes. Every process calls it.

    Args:
        model: The trained model: sharded, with adapters, or plain.
        processor: Saved in the same folder.
        folder: Replaced when the new one is complete.
        world: The processes.
        dtype: `fp32`, `bf16`, `fp16`; None keeps the trained type.

    Returns:
        The folder.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    world.decide(lambda: write_pretrained(model, merge_lora(dict(state), model), processor, folder, dtype))
    return folder


def write_pretrained(
    model: FlorenceVLForConditionalGeneration,
    state: dict[str, Tensor],
    processor: Any,
    folder: Path,
    dtype: str | None,
    overwrite: bool = True,
    in_run: bool = True,
) -> None:
    """`save_pretrained` of a state dict and its processor, written atomically.

    Args:
        model: Determines configuration and class.
        state: Full state dict with merged adapters.
        processor: Saved in the same folder, if given.
        folder: Destination.
        dtype: `fp32`, `bf16`, `fp16`; None keeps the state's.
        overwrite: Replace an existing model.
        in_run: The folder is part of the run's folder, so any model in it may be replaced.

    Raises:
        ValueError: The folder may not be replaced.
    """
    from transformers import GenerationConfig

    if dtype is not None:
        state = {k: v.to(_DTYPES[dtype]) if v.is_floating_point() else v for k, v in state.items()}
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        shell = type(model)(config)
    floating = next(v.dtype for v in state.values() if v.is_floating_point())
    shell.config.dtype = floating
    if getattr(model, "generation_config", None) is not None:
        shell.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    shell.load_state_dict(state, assign=True, strict=False)
    shell.tie_weights()
    # The user named the run's folder, so a model that an earlier version left there may be replaced.
    owned = (lambda old: (old / "config.json").is_file() and not (old / MARK).exists()) if in_run else None
    with atomic_folder(folder, overwrite=overwrite, owned=owned) as partial:
        shell.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)


def export_run(
    run: Path, folder: Path | None = None, dtype: str | None = None, overwrite: bool = False
) -> tuple[Path, int]:
    """Export a run's newest checkpoint, or a given one, in one process without the optimizer.

    Args:
        run: The run's folder, or one of its checkpoints.
        folder: Destination; `RUN/model` by default, which is replaced.
        dtype: `fp32`, `bf16`, `fp16`; None keeps the checkpoint's.
        overwrite: Replace an existing model in `folder`.

    Returns:
        The folder and the checkpoint's step.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint does not fit the run's model, or the dtype is unknown.
    """
    from florence_vl.model.configuration import FlorenceVLConfig
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor
    from florence_vl.registry import did_you_mean

    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}. {did_you_mean(dtype, _DTYPES)}")
    if folder is not None:
        check_destination(folder, overwrite=overwrite)
    if not run.is_dir():
        raise FileNotFoundError(f"no such run: {run}")
    checkpoint = find_checkpoint(run, run)
    assert checkpoint is not None
    run_dir = run.parent.parent if checkpoint == run else run
    described = run_dir / "model_config"
    if not (described / "config.json").is_file():
        raise FileNotFoundError(f"{described}/config.json is missing: the run's folder is incomplete")
    recipe = resolve_recipe(run_dir / "recipe.yaml", need_variables=False).recipe
    model = FlorenceVLForConditionalGeneration(FlorenceVLConfig.from_pretrained(described))
    apply_parts(model, recipe.parts)
    if recipe.precision == "bf16_pure":
        model.to(torch.bfloat16)
    load_weights(model, checkpoint)
    processor = None
    if any((described / name).is_file() for name in ("processor_config.json", "tokenizer.json")):
        processor = FlorenceVLProcessor.from_pretrained(described)
    target = folder or run_dir / "model"
    state = merge_lora(dict(model.state_dict()), model)
    in_run = folder is None
    write_pretrained(model, state, processor, target, dtype, overwrite=overwrite or in_run, in_run=in_run)
    return target, int(read_trainer_state(checkpoint)["step"])
