"""Load a saved Florence-VL and its processor, with errors that explain what is wrong with a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.files import locate
from florence_vl.model.packaged import resolve
from florence_vl.registry import did_you_mean

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")


def choose_device(name: str = "auto") -> str:
    """An available device: the named one; for `auto` CUDA, otherwise MPS, otherwise the CPU.

    Args:
        name: `auto`, `cpu`, `mps`, `cuda` or `cuda:INDEX`.

    Raises:
        ValueError: The name is unknown, or torch has no such device on this machine.
    """
    import torch

    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"unknown device {name!r}. {did_you_mean(kind, DEVICES)}")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, there in present.items() if there)
    index = name.partition(":")[2]
    if not present[kind] or (index and (not index.isdigit() or int(index) >= torch.cuda.device_count())):
        raise ValueError(f"torch finds no device {name!r} on this machine. `florence-vl doctor` lists the devices")
    return name


def check_folder(model: str | os.PathLike[str]) -> Path | str:
    """The folder of a saved Florence-VL (`mini` is the packaged one), or an id on the Hugging Face Hub.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The folder does not contain a Florence-VL.
    """
    path = locate(resolve(str(model), "models"), "model")
    if isinstance(path, str):
        return path  # owner/name on the Hub
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: give the folder that contains config.json and the weights")
    config = path / "config.json"
    if not config.is_file():
        nested = sorted(child.parent.name for child in path.glob("*/config.json"))
        inside = f" Its sub-folders {', '.join(nested)} are models." if nested else ""
        raise ValueError(f"{path} is not a model: it has no config.json.{inside}")
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a JSON object: {error}") from None
    if kind != "florence_vl":
        raise ValueError(f"{path} is a {kind!r}, not a 'florence_vl'. Create one with `florence-vl build`")
    return path


def load_model(
    model: str | os.PathLike[str], device: str = "auto", dtype: str = "auto", **options: Any
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """Load a saved model in eval mode, and its processor.

    Args:
        model: Folder, id on the Hub, or `mini` for the packaged one.
        device: See `choose_device`.
        dtype: `auto` keeps the saved data type, but uses float32 on the CPU, so that answers do not depend on the
            processor; or `float32`, `bfloat16`, `float16`.
        **options: Further keyword arguments of `from_pretrained`, e.g. `attn_implementation`.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The folder contains no Florence-VL or a damaged one, or the device or dtype is unavailable.
    """
    folder = check_folder(model)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}. {did_you_mean(dtype, DTYPES)}")
    place = choose_device(device)

    import torch

    from florence_vl.model.contract import load_whole
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

    wanted = dtype if dtype != "auto" else ("float32" if place == "cpu" else "auto")
    torch_dtype = wanted if wanted == "auto" else getattr(torch, wanted)
    processor = FlorenceVLProcessor.from_pretrained(folder)
    loaded = load_whole(FlorenceVLForConditionalGeneration, folder, dtype=torch_dtype, **options)
    processor.context_length = loaded.config.context_length  # missing in files saved by earlier versions
    return loaded.to(place).eval(), processor
