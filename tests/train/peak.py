"""Measures the peak of what tensors hold, where no device counts it: every storage from first use to end."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Bytes of all storages that live inside the context.

    Attributes:
        now: Bytes now.
        peak: Most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def count(self, value: Any) -> None:
        """Count all tensors in a tree."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                self._add(local.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._set, key, None)
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int | None) -> None:
        self.now += (size or 0) - self._sizes.pop(key, 0)
        if size is not None:
            self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count(result)
        return result

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Sees storages that are resized in place, as FSDP2 frees what it gathered."""
        real = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = real(storage, size)
            self._add(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = real  # type: ignore[method-assign]
