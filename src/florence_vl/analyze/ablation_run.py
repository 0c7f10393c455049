"""Runs the commands of an ablation table in parallel, with progress and remaining time."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from florence_vl.analyze.ablation import STAGES, AblationConfig, Step, read_marker
from florence_vl.files import write_text

STOPPED = 75  # exit code of `florence-vl train` that was stopped by a signal with everything saved
POLL_SECONDS = 0.2


class Stopped(Exception):
    """A training command was stopped by a signal; the same command resumes later."""


def machine_class() -> str:
    """The type of machine, without its name: GPU, or processor, cores and its fastest instructions for bfloat16."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    fastest = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in facts.get("flags", "").split()][:1]
    return ", ".join([name, f"{os.cpu_count()} cores", *fastest])


def unfinished(steps: Sequence[Step]) -> list[Step]:
    """Steps to run: rows that are not done, and what they need: data, and finished stages whose model is gone."""
    todo = {step.folder for step in steps if step.kind != "data" and not step.done}
    while True:
        needed = {folder for step in steps if step.folder in todo for folder in step.needs}
        wanted = [step for step in steps if step.folder in needed]
        gone = {s.folder for s in wanted if not (s.done if s.kind == "data" else (s.folder / "model").is_dir())}
        if gone <= todo:
            return [step for step in steps if step.folder in todo]
        todo |= gone


def remaining(steps: Sequence[Step], jobs: int) -> tuple[list[Step], float | None]:
    """The remaining steps and their approximate time in seconds; None until a step of each kind was timed."""
    times: dict[str, list[float]] = defaultdict(list)
    todo = unfinished(steps)
    for step in steps:
        if step.done and (found := read_marker(step.marker)) is not None:
            times[step.kind].append(found["seconds"])
    kinds = [step.kind for step in todo if step.kind != "data"]
    if not all(times[kind] for kind in kinds):
        return todo, None
    return todo, sum(sum(times[kind]) / len(times[kind]) for kind in kinds) / min(jobs, max(1, len(kinds)))


def describe_remaining(steps: Sequence[Step], jobs: int) -> str:
    """One line: finished steps, remaining steps and time."""
    todo, seconds = remaining(steps, jobs)
    left = "time left unknown until a row is done" if seconds is None else f"about {_duration(seconds)} left"
    return f"{len(steps) - len(todo)} of {len(steps)} steps done" + (f", {left}" if todo else "")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class _Running:
    """A running command with its log."""

    def __init__(self, step: Step, config: AblationConfig) -> None:
        self.step, self.began = step, time.monotonic()
        step.folder.mkdir(parents=True, exist_ok=True)
        launcher = config.launcher if step.kind in STAGES else AblationConfig.launcher
        words = [sys.executable if word == "python" else word for word in (*launcher, *step.command)]
        self.log = step.folder.parent / f"{step.kind}.log"
        command = shlex.join(["florence-vl", *step.command])
        self.about = {"identity": step.identity, "command": command, "dtype": step.dtype}
        if step.kind != "data":
            write_text(step.begun_marker, json.dumps(self.about, indent=1) + "\n")
        environment = dict(os.environ)
        if config.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // config.jobs))
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def ended(self) -> bool:
        """Whether it has ended; its processor time is then known."""
        before = _children_seconds()
        if self.process.poll() is None:
            return False
        self.cpu_seconds = _children_seconds() - before
        return True

    def finish(self, about: dict[str, Any]) -> None:
        """Check its exit code and mark it done.

        Raises:
            Stopped: It was stopped by a signal.
            RuntimeError: It failed; the message names its log.
        """
        step, code = self.step, self.process.returncode
        if code in (STOPPED, -signal.SIGTERM, -signal.SIGINT):
            raise Stopped(f"{step.title} was stopped; start the same command again")
        if code != 0:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(
                f"{step.kind} of {step.variant} failed with exit code {code}: {' '.join(last)} ({self.log})"
            )
        if step.kind == "data":
            return
        if step.kind in STAGES:  # the model is written, and checkpoints of many runs would fill the disk
            shutil.rmtree(step.folder / "checkpoints", ignore_errors=True)
        times = {"seconds": round(time.monotonic() - self.began, 1), "cpu_seconds": round(self.cpu_seconds, 1)}
        write_text(step.marker, json.dumps(self.about | times | about, indent=1) + "\n")
        step.begun_marker.unlink()


def _children_seconds() -> float:
    """Processor time of all child processes that have been waited for."""
    times = os.times()
    return times.children_user + times.children_system


def execute(steps: Sequence[Step], config: AblationConfig, log: Callable[[str], None]) -> None:
    """Run unfinished steps, `config.jobs` commands in parallel.

    If one fails or is stopped, no further one starts and the running ones are stopped; they resume later.

    Raises:
        Stopped: A command was stopped by a signal.
        RuntimeError: A command failed; the message names its log.
    """
    from florence_vl.train.setup import describe_environment

    environment = describe_environment()
    about = {"machine": machine_class(), "git": environment["git"], "versions": environment["versions"]}
    waiting = unfinished(steps)
    if waiting:
        log(describe_remaining(steps, config.jobs))
    left = {step.folder for step in waiting}
    running: list[_Running] = []

    def stop(*_: object) -> None:
        raise Stopped("stopped by a signal; start the same command again")

    previous = None
    with contextlib.suppress(ValueError):  # not the main thread, whose program handles signals
        previous = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            for step in list(waiting):
                alone = step.kind == "data" or config.jobs == 1
                room = not running if alone else len(running) < config.jobs
                if room and not left.intersection(step.needs):
                    waiting.remove(step)
                    running.append(_Running(step, config))
                    log(f"started {step.title}")
            ended = [run for run in running if run.ended()]
            for run in ended:
                running.remove(run)
                run.finish(about)
                left.discard(run.step.folder)
                log(f"finished {run.step.title}: {describe_remaining(steps, config.jobs)}")
            if not ended:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise Stopped("stopped by Ctrl-C; start the same command again") from None
    finally:
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
