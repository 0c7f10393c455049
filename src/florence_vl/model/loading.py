"""Load a saved Florence-VL and its processor, with errors that explain what is wrong with a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.files import locate, read_json, refuse_pointer
from florence_vl.model.packaged import resolve
from florence_vl.registry import did_you_mean

if TYPE_CHECKING:
    import torch

    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

DTYPES = ("auto", "float32", "bfloat16", "float16")
ORIGINAL_TYPES = ("llava_llama", "llava_phi")
"""Model types of the authors' checkpoints."""

# Files that are read with a model: JSON objects, and those with readers of their own.
_SETTINGS = (
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_TEXT_FILES = ("chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer.model", "vocab.json")
# Keyword arguments of `from_pretrained` that choose the files, so they are the processor's too.
_WHICH_FILES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

DEVICES = ("auto", "cpu", "cuda", "mps")


def choose_device(name: str | torch.device = "auto") -> str:
    """An available device: the named one; for `auto` CUDA, otherwise MPS, otherwise the CPU.

    Args:
        name: `auto`, `cpu`, `mps`, `cuda` or `cuda:INDEX`, or a `torch.device`.

    Raises:
        ValueError: The name is unknown, or torch has no such device on this machine.
    """
    import torch

    name = str(name)
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


def choose_dtype(name: str | torch.dtype, device: str) -> str:
    """The data type to load a model in: the named one; for `auto` float32 on the CPU, otherwise the saved one (`auto`).

    Args:
        name: `auto`, `float32`, `bfloat16` or `float16`, also as a `torch.dtype`.
        device: Result of `choose_device`.

    Raises:
        ValueError: The name is unknown.
    """
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}. {did_you_mean(name, DTYPES)}")
    return "float32" if name == "auto" and device == "cpu" else name


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
    kind = saved_type(path)
    if kind in ORIGINAL_TYPES:
        raise ValueError(f"{path} is a {kind!r}, the original layout: convert it with `florence-vl convert {path} NEW`")
    if kind is None:
        raise ValueError(f"{path} is not a model: its config.json has no model_type")
    if kind != "florence_vl":
        raise ValueError(f"{path} is a {kind!r}, not a 'florence_vl'. Create one with `florence-vl build`")
    _check_files(path)
    return path


def saved_type(folder: Path) -> str | None:
    """`model_type` of the config.json in a folder; None if there is no such file.

    Raises:
        ValueError: The file is not a JSON object.
    """
    config = folder / "config.json"
    return read_json(config).get("model_type") if config.is_file() else None


def _check_files(folder: Path) -> None:
    """Refuse a folder that is not a whole model, with the file that is missing or damaged."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    weights = {name for name in names if name.startswith("model") and name.endswith(".safetensors")}
    for name in sorted(names & {*_SETTINGS, *_TEXT_FILES} | weights):
        refuse_pointer(folder / name)
        if name in _SETTINGS:
            read_json(folder / name)
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    needed = {
        "weights (*.safetensors)": bool(weights),
        "processor_config.json": bool(names & {"processor_config.json", "preprocessor_config.json"}),
        "tokenizer.json": bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json"}),
    } | {str(shard): (folder / str(shard)).is_file() for shard in shards}
    missing = [name for name, there in needed.items() if not there]
    if missing:
        raise ValueError(f"{folder} is not a whole model, it has no {', '.join(missing)}: copy or download it again")


@contextmanager
def _explain(folder: Path | str) -> Iterator[None]:
    """Errors of a folder's content, whatever their type, as a ValueError that names the folder."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        from torch import OutOfMemoryError

        named = isinstance(error, ValueError) and str(folder) in str(error)
        if named or isinstance(folder, str) or isinstance(error, OutOfMemoryError):  # a name on the Hub: the network
            raise
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder} cannot be loaded, its configuration or processor files may be damaged or of another version: "
            f"{reason}"
        ) from error


def load_model(
    model: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """Load a saved model in eval mode, and its processor.

    Args:
        model: Folder, id on the Hub, or `mini` for the packaged one.
        device: See `choose_device`.
        dtype: `auto` keeps the saved data type, but uses float32 on the CPU, so that answers do not depend on the
            processor; or `float32`, `bfloat16`, `float16`.
        **options: Further keyword arguments of `from_pretrained`, e.g. `attn_implementation` or `revision`, and fields
            of the config, e.g. `fusion="gated"`, to which the processor is fitted.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The folder contains no Florence-VL or a damaged one, or the device or dtype is unavailable.
    """
    folder = check_folder(model)
    place = choose_device(device)
    wanted = choose_dtype(dtype, place)

    from florence_vl.model.contract import load_whole
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

    with _explain(folder):
        files = {name: options[name] for name in _WHICH_FILES if name in options}
        processor = FlorenceVLProcessor.from_pretrained(folder, **files)
        loaded = load_whole(FlorenceVLForConditionalGeneration, folder, dtype=wanted, **options)
    return loaded.to(place).eval(), processor.fit(loaded.config)
