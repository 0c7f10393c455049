"""Load a saved Florence-VL with its processor, with errors that say what is wrong with the folder."""

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
    """A device that is here: the named one, or for `auto` CUDA before MPS before the CPU.

    Args:
        name: `auto`, `cpu`, `mps`, `cuda` or `cuda:INDEX`.

    Raises:
        ValueError: The name is unknown, or torch has no such device here.
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
        raise ValueError(f"torch sees no device {name!r} here. `florence-vl doctor` lists what there is")
    return name


def check_folder(model: str | os.PathLike[str]) -> Path | str:
    """The folder of a saved Florence-VL (`mini` is the embedded one), or the name of one on the Hugging Face Hub.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The folder holds something else.
    """
    path = locate(resolve(str(model), "models"), "model")
    if isinstance(path, str):
        return path  # owner/name on the Hub
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: give the folder that holds config.json and the weights")
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
        raise ValueError(f"{path} holds a model of type {kind!r}, not 'florence_vl'. `florence-vl build` assembles one")
    return path


def load_model(
    model: str | os.PathLike[str], device: str = "auto", dtype: str = "auto", **options: Any
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """A saved model in eval mode, and its processor.

    Args:
        model: Folder, name on the Hub, or `mini` for the embedded one.
        device: See `choose_device`.
        dtype: `auto` keeps the saved one, on the CPU float32, so that answers do not depend on the processor; or
            `float32`, `bfloat16`, `float16`.
        **options: Further keywords of `from_pretrained`, e.g. `attn_implementation`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The folder holds no Florence-VL or a damaged one, or there is no such device or dtype here.
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
    processor.context_length = loaded.config.context_length  # not in the files that earlier versions saved
    return loaded.to(place).eval(), processor
