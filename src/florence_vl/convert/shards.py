"""Read checkpoints tensor by tensor and write safetensors shards as a stream, so memory holds one tensor at a time.

`safetensors.torch.save_file` needs every tensor of a file in memory at once. The writer here knows all shapes
beforehand: it writes the header first and each tensor at its offset, so a 9 B model converts on a laptop.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from florence_vl.files import read_json, refuse_pointer

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# transformers' order of preference
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
GIB = 1024**3


@dataclass(frozen=True)
class TensorInfo:
    """Header information of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def nbytes(self) -> int:
        return num_bytes(self.shape, self.dtype)


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor of this shape and dtype."""
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


class Checkpoint:
    """The tensors of a folder (safetensors or pickled, one file or sharded), read one at a time.

    All headers are read and checked when it is opened; values only in `read`. One shard is open at a time.

    Args:
        folder: Contains `model.safetensors`, `pytorch_model.bin`, or one of their indices.
        file: Read this one file of the folder instead.

    Attributes:
        tensors: Name -> `TensorInfo`, in the order of the files.
        metadata: `__metadata__` of the files, merged.
        notes: Irregularities that are not errors.

    Raises:
        FileNotFoundError: The folder, its weights or a shard in the index is missing.
        ValueError: A file is truncated or damaged, contains code, a tensor is in two shards, or the index and the
            shards differ.
    """

    def __init__(self, folder: str | os.PathLike[str], file: str | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder")
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self.notes: list[str] = []
        self._open_name: str | None = None
        self._open_file: Any = None
        name = file or next((name for name in WEIGHT_FILES if (self.folder / name).is_file()), None)
        if name is None:
            present = sorted(p.name for p in self.folder.iterdir()) or ["nothing"]
            raise FileNotFoundError(
                f"{self.folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}, found {few(present)}"
            )
        if name.endswith(".index.json"):
            self._add_index(name)
        else:
            self._add_file(name)

    def _add_index(self, index_name: str) -> None:
        weight_map = read_json(self.folder / index_name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.folder / index_name}: no `weight_map`; download the file again")
        files = list(dict.fromkeys(weight_map.values()))
        outside = [name for name in files if Path(name).name != name]
        if outside:
            raise ValueError(f"{self.folder / index_name}: names files outside its folder: {few(outside)}")
        missing = [name for name in files if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: {len(missing)} of {len(files)} shards missing: {few(missing)}; download them"
            )
        for name in files:
            self._add_file(name)
        for name, file in weight_map.items():
            found = self.tensors.get(name)
            if found is None:
                raise ValueError(f"{self.folder / index_name}: {name!r} should be in {file}, but no shard has it")
            if found.file != file:
                raise ValueError(f"{self.folder / index_name}: {name!r} should be in {file}, but is in {found.file}")
        unlisted = [name for name in self.tensors if name not in weight_map]
        if unlisted:
            self.notes.append(f"{len(unlisted)} tensors are in the shards but not in {index_name}: {few(unlisted)}")

    def _add_file(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        infos: dict[str, TensorInfo] = {}
        if file.endswith(".safetensors"):
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  (no dict: it can't be iterated)
                view = handle.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise ValueError(f"{path}: {name!r} has the type {view.get_dtype()}; known: {', '.join(DTYPES)}")
                infos[name] = TensorInfo(tuple(view.get_shape()), dtype, file)
            self.metadata.update(handle.metadata() or {})
        else:
            for name, tensor in self._open(file).items():
                infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, file)
        twice = [name for name in infos if name in self.tensors]
        if twice:
            raise ValueError(f"{few(twice)} in two shards: {self.tensors[twice[0]].file} and {file}; keep one")
        self.tensors.update(infos)

    def _open(self, file: str) -> Any:
        if self._open_name == file:
            return self._open_file
        self.close()
        path = self.folder / file
        refuse_pointer(path)
        if file.endswith(".safetensors"):
            try:
                self._open_file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path}: truncated or damaged ({error}); it has {path.stat().st_size} bytes, download it again"
                ) from error
        else:
            self._open_file = _load_pickled(path)
        self._open_name = file
        return self._open_file

    def read(self, name: str) -> torch.Tensor:
        """Values of a tensor, on the CPU, in the stored dtype."""
        info = self.tensors[name]
        handle = self._open(info.file)
        if info.file.endswith(".safetensors"):
            return handle.get_tensor(name)
        return handle[name]

    def close(self) -> None:
        """Close the open shard."""
        self._open_name = self._open_file = None

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype of most bytes (float32 if there is none)."""
        sizes: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] += info.nbytes
        return sizes.most_common(1)[0][0] if sizes else torch.float32


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Load a pickled state dict with only tensors, memory-mapped if the file's format allows it."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # torch < 1.6 wrote a format that cannot be mapped
            if "mmap can only be used with files saved with" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: refused, the pickle contains more than tensors (code could run): {reason}. "
            "Ask its owner for safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path}: truncated or damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            f"it has {path.stat().st_size} bytes, download it again"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: a flat dict of tensors is expected, found {type(state).__name__} with other content")
    return dict(state)


@dataclass(frozen=True)
class Output:
    """A tensor to write: its header and a function that returns its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return num_bytes(self.shape, self.dtype)


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of the same shape and dtype have the same bits (0.0 differs from -0.0, NaN equals itself)."""
    flat_a, flat_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(flat_a, flat_b)


def parse_size(text: str | int) -> int:
    """Bytes from "5GB", "512MB", "2GiB" or a number.

    Raises:
        ValueError: The text is not a size, or not above zero.
    """
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
        if match is None:
            raise ValueError(f"{text!r} is not a size; write for example 5GB, 512MB or 2GiB")
        base = 1024 if match[3] else 1000
        text = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if text <= 0:
        raise ValueError(f"a size above zero is expected, got {text}")
    return text


def split_shards(outputs: Sequence[Output], max_bytes: int) -> list[list[Output]]:
    """Divide the outputs, in order, into shards of at most `max_bytes` (a larger tensor gets its own)."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


Progress = Callable[[int], None]  # called with the number of bytes written since the last call


def write_safetensors(
    path: Path,
    outputs: Sequence[Output],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write one safetensors file, one tensor in memory at a time.

    Larger elements get the lower offsets, so each tensor is aligned to its element size as the format requires; values
    are written in the given order, each at its offset.

    Raises:
        ValueError: A loaded tensor differs from its `Output`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets: dict[str, int] = {}
    end = 0
    for output in sorted(outputs, key=lambda o: -o.dtype.itemsize):
        offsets[output.name] = end
        header[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [end, end + output.nbytes],
        }
        end += output.nbytes
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    start = 8 + len(blob)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(blob)))
        file.write(blob)
        file.truncate(start + end)
        for output in outputs:
            tensor = output.load()
            if tuple(tensor.shape) != output.shape or tensor.dtype != output.dtype:
                raise ValueError(
                    f"{output.name}: expected {output.dtype} {output.shape}, read {tensor.dtype} {tuple(tensor.shape)}"
                )
            file.seek(start + offsets[output.name])
            if tensor.numel():
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
            if progress is not None:
                progress(output.nbytes)
        file.flush()
        os.fsync(file.fileno())


def write_shards(
    folder: Path, outputs: Sequence[Output], max_bytes: int, progress: Progress | None = None
) -> list[str]:
    """Write the outputs as `model.safetensors`, or as shards with their index; returns the file names."""
    shards = split_shards(outputs, max_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], progress=progress)
        return ["model.safetensors"]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {}
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, progress=progress)
        weight_map.update({output.name: name for output in shard})
    total = sum(output.nbytes for output in outputs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    return names


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_disk_space(folder: Path, needed: int) -> None:
    """Check the free space of the disk under `folder` (or its nearest existing parent).

    Raises:
        ValueError: Less than `needed` bytes plus 1 % are free.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed * 1.01:
        raise ValueError(
            f"{folder}: too little disk space: {needed / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free under {place}"
        )


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list, and the number of others."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
