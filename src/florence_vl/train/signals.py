"""Signals that request a run to save and stop."""

from __future__ import annotations

import signal
from typing import Any


class StopSignals:
    """SIGTERM, SIGUSR1 (sent by Slurm before the time limit) and Ctrl-C request a save and stop.

    Only Ctrl-C after another signal ends the run at once: schedulers send SIGTERM while a run is still saving.
    """

    def __init__(self) -> None:
        self.received = 0
        self.names = [n for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n)]
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            for name in self.names:
                number = getattr(signal, name)
                self.previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread, whose program handles signals
            self.previous.clear()
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
