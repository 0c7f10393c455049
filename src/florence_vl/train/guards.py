"""Checks that stop or warn early: non-finite numbers, unusual first losses, spikes, wrong labels."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from florence_vl.files import atomic_file

if TYPE_CHECKING:
    from florence_vl.data.report import DataReport
    from florence_vl.train.config import SourceConfig


class TrainingError(RuntimeError):
    """The run stopped because of a failure; the message gives the reason and where to look."""


_LOST_WORKER = re.compile(r"DataLoader worker.*(killed|exited)|shared memory|Bus error", re.IGNORECASE)
_LOST_PEER = re.compile(r"gloo|nccl|ProcessGroup|peer|Broken pipe|Socket", re.IGNORECASE)


def blame(error: Exception) -> str | None:
    """Message for an error that another process or a lost data worker caused; None for any other error.

    If another process is lost, this process's collectives fail. Its batch is then not the cause.
    """
    text = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    if _LOST_WORKER.search(str(error)):
        return (
            f"a data worker was lost ({text}). Usually memory or /dev/shm is exhausted: lower data.workers, or give "
            "the container more (florence-vl train --dry-run prints what the workers need)"
        )
    if not isinstance(error, torch.distributed.DistError) and not _LOST_PEER.search(text):
        return None
    return (
        f"another process of the run failed or was lost ({text}); its own message gives the reason. "
        "Resume with --resume auto when the cause is removed"
    )


def dump_batch(
    run_dir: Path, step: int, rank: int, micro_batches: list[dict[str, Any]], notes: Mapping[str, Any]
) -> Path | str:
    """Save one step's batches for debugging; `torch.load(path, weights_only=True)` reads them.

    Returns:
        The file, or why it could not be written.
    """
    path = run_dir / "failures" / f"step-{step}-rank-{rank}.pt"
    plain = [
        {key: value.cpu() if isinstance(value, torch.Tensor) else _plain(value) for key, value in batch.items()}
        for batch in micro_batches
    ]
    try:
        with atomic_file(path) as temporary:
            torch.save({"step": step, "rank": rank, "notes": dict(notes), "micro_batches": plain}, temporary)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        return f"no file: {path} can't be written ({error})"
    return path


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)


def check_finite(loss: float, grad_norm: float, grad_norms: Mapping[str, float]) -> str | None:
    """Description of what is not finite; None if everything is."""
    found = [f"loss is {loss}"] if not math.isfinite(loss) else []
    found += [f"the gradient norm of {part} is {norm}" for part, norm in grad_norms.items() if not math.isfinite(norm)]
    if not found and not math.isfinite(grad_norm):
        found.append(f"the gradient norm is {grad_norm}")
    return " and ".join(found) or None


def describe_bad(report: DataReport) -> str:
    """Bad records by kind and source, as a line; empty if there are none."""
    if not report.num_bad:
        return ""
    drawn = report.num_bad + report.samples
    return f"{report.num_bad} of {drawn} records are bad ({report.num_bad / drawn:.1%}): {report.most_common}"


def nothing_to_learn(step: int, report: DataReport | None, sources: Sequence[SourceConfig]) -> str:
    """Error message for a step without supervised tokens, with advice."""
    text = f"step {step} has nothing to learn: none of its tokens is supervised"
    if report is not None and report.num_bad:
        text += f". {describe_bad(report)}. The last: {report.last_message}. All are listed in {report.path}"
    if sources:
        roots = [f"{source.path} with image_root {source.image_root}" for source in sources]
        text += f". Check data.sources ({'; '.join(roots)}): florence-vl data inspect shows a source's records"
    return text


def _is_much(report: DataReport, allowed: float) -> bool:
    """Whether too many drawn records are bad; `report.records` also counts records that were only measured so far."""
    return report.num_bad > allowed * (report.num_bad + report.samples)


class BadRecordNotices:
    """Warns if a run skips much of its data: first above `data.max_bad_share`, then each time the fraction doubles.

    Args:
        allowed: Fraction of bad records without a warning.
    """

    def __init__(self, allowed: float) -> None:
        self.allowed, self._next = allowed, 1

    def update(self, report: DataReport | None) -> str | None:
        """A warning, if one is due."""
        if report is None or report.num_bad < self._next or not _is_much(report, self.allowed):
            return None
        self._next = 2 * report.num_bad
        return f"WARNING: {describe_bad(report)}. They are skipped, and listed in {report.path}"


FIRST_LOSS_FACTOR = 1.2  # times log(vocabulary)


def first_loss_warning(loss: float, vocab_size: int) -> str | None:
    """A warning if the first loss is worse than chance, so that labels, template or weights are wrong.

    A uniform guess costs log(vocabulary); a pretrained LLM stays below that even on images that it cannot read yet.
    """
    limit = FIRST_LOSS_FACTOR * math.log(vocab_size)
    if loss <= limit:
        return None
    return (
        f"the first loss is {loss:.2f}, above {FIRST_LOSS_FACTOR:g} x log(vocabulary {vocab_size}) = {limit:.2f}: "
        "worse than chance. Check chat template and labels (florence-vl data inspect), and that the LLM's weights "
        "were loaded"
    )


@dataclass
class SpikeDetector:
    """Moving average of the gradient norm, to detect spikes.

    Attributes:
        factor: A norm above this multiple of the average is a spike.
        decay: Decay of the moving average.
        warmup: Number of steps before spikes are reported.
    """

    factor: float = 5.0
    decay: float = 0.98
    warmup: int = 20
    average: float = 0.0
    count: int = 0
    spikes: int = 0

    def update(self, norm: float) -> str | None:
        """Add a step's norm; returns a report if it is a spike (which changes the average only up to the limit)."""
        mean = self.average / (1 - self.decay**self.count) if self.count else norm
        spike = self.count >= self.warmup and norm > self.factor * mean
        taken = min(norm, self.factor * mean) if self.count >= self.warmup else norm
        self.average = self.decay * self.average + (1 - self.decay) * taken
        self.count += 1
        if not spike:
            return None
        self.spikes += 1
        return f"gradient norm {norm:.3g} is {norm / max(mean, 1e-30):.1f} times its moving average {mean:.3g}"

    def state_dict(self) -> dict[str, float]:
        """Numbers for resuming."""
        return {"average": self.average, "count": self.count, "spikes": self.spikes}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the numbers of `state_dict`."""
        self.average, self.count, self.spikes = state["average"], int(state["count"]), int(state["spikes"])


def describe_sample(batch: Mapping[str, Any], tokenizer: Any, image_token_id: int | None = None) -> str:
    """The first row of a batch as text, with supervised tokens in [[double brackets]] and image tokens counted.

    Args:
        batch: `input_ids` and `labels`, (B, L); for packed rows the first sample is shown.
        tokenizer: Anything with `decode(ids)`.
        image_token_id: Placeholder id; runs of it are shown as one.
    """
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    positions = batch.get("position_ids")
    end = len(ids)
    if positions is not None:
        starts = [i for i, p in enumerate(positions[0].tolist()) if p == 0 and i > 0]
        end = starts[0] if starts else end
    elif batch.get("attention_mask") is not None:
        mask = batch["attention_mask"][0].tolist()
        kept = [index for index, is_token in enumerate(mask) if is_token]
        ids, labels, end = [ids[i] for i in kept], [labels[i] for i in kept], len(kept)
    pieces: list[str] = []
    run: list[int] = []
    kind = ""

    def flush() -> None:
        if not run:
            return
        if kind == "image":
            pieces.append(f"<{len(run)} image tokens>")
        else:
            text = tokenizer.decode(run)
            pieces.append(f"[[{text}]]" if kind == "supervised" else text)
        run.clear()

    for token, label in zip(ids[:end], labels[:end], strict=True):
        now = "supervised" if label != -100 else "image" if token == image_token_id else "context"
        if now != kind:
            flush()
            kind = now
        run.append(token)
    flush()
    return "".join(pieces)
