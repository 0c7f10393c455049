"""Files of a checkpoint: reading `.metadata` without running code, and detecting damage."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

TRAINER_FILE = "trainer.json"
_DCP = "torch.distributed.checkpoint"
# The classes that torch.distributed.checkpoint writes into `.metadata` for tensors.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            if module.startswith("pathlib"):  # paths of the writing machine, maybe of another system
                return PurePath
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint and was not run")


def read_metadata(folder: Path) -> Metadata:
    """Read the `.metadata` of a checkpoint: a pickle, of which only DCP's own plain classes are accepted.

    Raises:
        ValueError: The file is truncated, not that of a checkpoint, or names code or files outside the folder.
    """
    try:
        metadata = _MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except OSError:
        raise ValueError(f"{folder / '.metadata'} can't be read") from None
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{folder / '.metadata'} can't be read: {error or type(error).__name__}") from None
    try:
        others = [k for k, v in metadata.state_dict_metadata.items() if not isinstance(v, TensorStorageMetadata)]
        names = {info.relative_path for info in metadata.storage_data.values()}
    except (AttributeError, TypeError):
        raise ValueError(f"{folder / '.metadata'} is not that of a checkpoint") from None
    if others:  # DCP would unpickle these
        raise ValueError(f"{folder / '.metadata'} lists entries that are not tensors, which are not read: {others[:3]}")
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{folder / '.metadata'} names files outside the folder: {outside[:3]}")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


class SafeReader(dcp.FileSystemReader):
    """DCP's reader with `read_metadata` of this module."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `read_metadata`."""
        metadata = read_metadata(Path(self.path))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Step, data position and counters of a checkpoint.

    Raises:
        ValueError: trainer.json is missing or damaged.
    """
    path = checkpoint / TRAINER_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} can't be read") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{path} is not that of a checkpoint: it has no `step`")
    return state


def find_damage(checkpoint: Path) -> str | None:
    """Description of the damage of a checkpoint's files; None if all are complete.

    A file is complete if it has the length in `.metadata`; its content is not read.
    """
    try:
        read_trainer_state(checkpoint)
        metadata = read_metadata(checkpoint)
    except ValueError as error:
        return str(error)
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) < end:
            return f"{path} has {size} bytes of {end}"
    return None
