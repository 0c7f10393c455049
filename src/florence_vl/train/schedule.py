"""Learning-rate schedules as pure functions of the position in the run, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from florence_vl.train.config import ScheduleConfig


def lr_factor(schedule: ScheduleConfig, position: float, total_steps: int, step: int | None = None) -> float:
    """Factor on a group's peak learning rate.

    Args:
        schedule: The schedule.
        position: Number of optimizer steps done; not necessarily an integer, because a time budget moves it by the
            clock.
        total_steps: Steps of the whole run.
        step: Number of optimizer steps done, by which `warmup_steps` are counted; `position` by default.

    Returns:
        Between 0 and 1. The first warm-up step is above 0; `min_lr_ratio` is reached after the last step.
    """
    warmup = (
        schedule.warmup_steps if schedule.warmup_steps is not None else math.ceil(schedule.warmup_ratio * total_steps)
    )
    warmup = min(warmup, total_steps)
    most = 1.0
    if schedule.warmup_steps is not None and step is not None:
        most = (step + 1) / (warmup + 1)
    return min(most, _shape(schedule, position, total_steps, warmup))


def _shape(schedule: ScheduleConfig, position: float, total_steps: int, warmup: int) -> float:
    if position < warmup:
        return min(1.0, (position + 1) / (warmup + 1))
    if schedule.name == "constant":
        return 1.0
    begin = float(warmup)
    if schedule.name == "wsd":
        begin = max(begin, total_steps - math.ceil(schedule.decay_ratio * total_steps))
        if position < begin:
            return 1.0
    done = min(1.0, (position - begin) / max(total_steps - begin, 1e-9))
    falling = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * falling
