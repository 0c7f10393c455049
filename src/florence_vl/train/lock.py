"""A lock that allows only one run per folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from florence_vl.train.world import World

try:
    import fcntl
except ImportError:  # Windows has no such locks; there a second run is not detected
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


class RunLock:
    """Holds `RUN/.lock` while a run trains there.

    The operating system keeps the lock for this process alone (a worker that outlives it does not hold it) and releases
    it when the process ends for any reason, so a leftover lock file locks nothing.

    Args:
        run_dir: The run's folder; created if it does not exist.

    Raises:
        ValueError: Another process trains there; the message names it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]  # innermost first
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / LOCK_FILE
        self._file: int | None = None
        if fcntl is None:
            return
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = _describe(os.read(file, 4096))
                os.close(file)
                raise ValueError(
                    f"{run_dir} is being trained by {owner}. Wait for it, stop it, or choose another folder "
                    "(output=...)"
                ) from None
            if _is_same(file, self.path):
                self._file = file
            else:  # the previous owner removed the file between the two calls
                os.close(file)
        os.truncate(self._file, 0)
        os.write(self._file, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())

    def release(self) -> None:
        """Release the lock, and remove the traces of a run that did not begin."""
        if self._file is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for folder in self._made:
                folder.rmdir()


@contextlib.contextmanager
def hold_folder(run_dir: Path, world: World) -> Iterator[None]:
    """Reserve a run's folder for these processes. Every process enters it; the main one holds the lock.

    Raises:
        ValueError: Another run trains there.
    """
    held: list[RunLock] = []
    world.decide(lambda: held.append(RunLock(run_dir)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.fstat(file).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _describe(content: bytes) -> str:
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
