"""The processes of a run and their communication."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from florence_vl.model.loading import choose_device


@dataclass
class World:
    """The processes of a run.

    Attributes:
        device: Device of this process.
        rank: Rank of this process.
        size: Number of processes.
        local_rank: Rank of this process on its node.
        local_size: Number of processes on this node.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    owns_group: bool = field(default=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def gather(self, values: list[float]) -> Tensor:
        """All processes' values as a (size, len(values)) float64 table on the CPU."""
        row = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return row.unsqueeze(0)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row)
        return torch.stack(rows)

    def gather_objects(self, item: Any) -> list[Any]:
        """All processes' objects, in the order of ranks."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def decide(self, question: Callable[[], Any]) -> Any:
        """Run a function on the first process and return its result, or raise its error, on every process.

        Used where processes may see different states, such as files while another process is still renaming them, and
        for work that one process does for all. An error that cannot be sent becomes a FileNotFoundError, ValueError or
        RuntimeError with its message on the others.
        """
        if self.size == 1:
            return question()
        told: list[Any] = [None, None]  # answer, error
        raised: Exception | None = None
        if self.is_main:
            try:
                told = [question(), None]
            except Exception as error:
                raised, told = error, [None, _sendable(error)]
        dist.broadcast_object_list(told, device=torch.device("cpu"))
        failed = raised or told[1]
        if failed is not None:
            raise failed
        return told[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if this run created it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _sendable(error: Exception) -> Exception:
    """The error if it can be pickled, otherwise one of the closest built-in type."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        kind = next((k for k in (FileNotFoundError, ValueError) if isinstance(error, k)), RuntimeError)
        return kind(str(error))
    return error


def init_world(device: str = "auto", timeout_minutes: float = 30) -> World:
    """Join the process group that torchrun (or any launcher that sets RANK, WORLD_SIZE, ...) describes.

    Raises:
        ValueError: The device is not available, or there are more processes than devices on this node.
    """
    kind = torch.device(choose_device(device))
    if "RANK" not in os.environ and not dist.is_initialized():
        if kind.type == "cuda":
            kind = torch.device("cuda", torch.cuda.current_device())
        return World(kind)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    backend = "gloo"
    if kind.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{local_size} processes on this node but {torch.cuda.device_count()} GPUs: set --nproc-per-node"
            )
        kind = torch.device("cuda", local_rank)
        torch.cuda.set_device(kind)
        backend = "cpu:gloo,cuda:nccl"
    elif kind.type == "mps":
        raise ValueError("several processes cannot run on mps; use device=cpu")
    owns = not dist.is_initialized()
    if owns:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return World(kind, dist.get_rank(), dist.get_world_size(), local_rank, local_size, owns)
