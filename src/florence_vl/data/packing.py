"""Mixtures to batches: the rows of planned windows are encoded by workers and collated.

The stream of a mixture is divided into windows that end with their epoch. The rows of a window depend only on the seed
and the window. Each optimizer step takes the next rows, so after the last step of an epoch each record was drawn as
often as its weight specifies; the micro-batches of a step are assigned to the processes in turn. The rows of a step are
therefore a pure function of (seed, step), whatever the number of processes. Resuming needs only the step: in padded
mode it determines the window; in packed mode the rows of the preceding windows are counted again from the texts,
without reading images, unless a `state()` contains the position.

Planning (lengths, from text and image sizes) and encoding (decoded images) have separate worker pools, so no worker
holds a whole window's images. Any process may need the rows of any window, so each process needs the plan of the whole
stream: by default it computes its own, and `share` provides it otherwise.
"""

from __future__ import annotations

import atexit
import itertools
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from florence_vl.data.encode import RecordEncoder, Sample
from florence_vl.data.layout import BatchLayout, RowCollator
from florence_vl.data.mixture import Mixture
from florence_vl.data.planner import WindowPlan, WindowPlanner, bad_entry, count_steps
from florence_vl.data.records import BadRecord
from florence_vl.data.report import BadEntry, DataReport, rank_file
from florence_vl.data.sampler import check_rank
from florence_vl.data.trees import WHOLE, Tree, join_samples, shares_pictures, split_turns

T = TypeVar("T")

ORDER = 2
"""Version of the order of records, part of the data state: a run cannot resume with a different order."""


@dataclass
class MicroBatch:
    """A micro-batch in preparation: planned in the main process, encoded by a worker.

    Attributes:
        step: Its optimizer step.
        last_of_step: Whether this process has no other micro-batch in the step.
        groups: Trees of every row or padded batch, see `WindowPlan`.
        records: Records of the windows that begin with it.
        bad: Bad records of these windows, and of the micro-batch once it is encoded.
        cursor: Window and row behind its step.
        tensors: The collated batch, once encoded.
        ids: Source and id of its samples, once encoded.
        tokens: Tokens of its samples, once encoded.
        error: Error that ended planning or encoding; raised in the main process when the micro-batch is used, without a
            worker's traceback.
    """

    step: int
    last_of_step: bool
    groups: list[list[Tree]] = field(default_factory=list)
    records: int = 0
    bad: list[BadEntry] = field(default_factory=list)
    cursor: tuple[int, int] = (0, 0)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ids: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    error: Exception | None = None


class MicroBatchEncoder(Dataset[MicroBatch]):
    """Encodes the records of a planned micro-batch and collates them, in workers.

    Args:
        mixture: Provides the records by position.
        encoder: Converts a record to a sample.
        layout: Determines how samples are collated.
    """

    def __init__(self, mixture: Mixture, encoder: RecordEncoder, layout: BatchLayout) -> None:
        self.mixture, self.encoder = mixture, encoder
        self.collate = RowCollator(encoder, layout)

    def __getitem__(self, batch: MicroBatch) -> MicroBatch:
        if batch.error is None:
            try:
                rows = [[self._encode(tree, batch.bad) for tree in group] for group in batch.groups]
                image = self.encoder.processor.image_token_id
                joined = [[join_samples(samples, image) for samples in row if samples] for row in rows]
                batch.tensors = self.collate(joined)
            except (ValueError, OSError) as error:
                batch.error = error
            else:
                batch.ids = [(sample.source, sample.id) for row in rows for samples in row for sample in samples]
                batch.tokens = sum(len(sample) for row in joined for sample in row)
        return batch

    def _encode(self, tree: Tree, bad: list[BadEntry]) -> list[Sample]:
        """The samples of a tree's pairs; only the first has the pictures."""
        samples: list[Sample] = []
        for position, pairs in itertools.groupby(tree, key=lambda pair: pair.position):
            try:
                record = self.mixture[position]
                for _, turn in pairs:
                    part = record if turn == WHOLE else split_turns(record)[turn]
                    samples.append(self.encoder.outline(part) if samples else self.encoder(part, position))
            except BadRecord as error:
                bad.append(bad_entry(self.mixture, position, error))
        return samples


def ignore_stop_signals(_worker: int) -> None:
    """Ignore stop signals in workers: a signal to the process group (time limit, Ctrl-C) must not end them."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _load(dataset: Dataset[T], indices: Iterator[Any], workers: int, prefetch: int) -> Iterator[T]:
    """`dataset[i]` for endless indices, in order, prefetched by workers (0: in this process)."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=ignore_stop_signals if workers else None,
        generator=torch.Generator(),  # the loader's own seed must not change the random state of training
    )
    return iter(loader)


# From a function that starts the planning to the plans that this process gets.
Share = Callable[[Callable[[], Iterator[WindowPlan]]], Iterator[WindowPlan]]


def _make_own(make: Callable[[], Iterator[WindowPlan]]) -> Iterator[WindowPlan]:
    return make()


def stop_workers(iterator: Iterator[Any] | None) -> None:
    """End an iterator over a `DataLoader`, or a generator around one: now, not when garbage is collected."""
    stop = getattr(iterator, "_shutdown_workers", None) or getattr(iterator, "close", None)
    if stop is not None:
        stop()


class RankBatches(Iterator[dict[str, torch.Tensor]]):
    """Common parts of `Batches` and `florence_vl.data.stream.StreamBatches`: the report, and the state at a step.

    Args:
        layout: The layout.
        rank: Rank of this process.
        world_size: Number of data-parallel processes.
        fingerprint: What identifies the data and its order.
        step: Number of optimizer steps done.
        state: Data state of that step, if known; it must be of the same data.
    """

    def __init__(
        self,
        layout: BatchLayout,
        rank: int,
        world_size: int,
        fingerprint: dict[str, Any],
        step: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.batches_per_rank = layout.batches_per_step // world_size
        self.ids: list[tuple[str, str]] = []
        self._rank, self._world_size, self._step, self._fingerprint = rank, world_size, step, fingerprint
        size, counts = None if step else 0, []
        if state is not None:
            check_fingerprint(state["fingerprint"], fingerprint)
            own = state["reports"].get(str(rank), {})
            size = own.get("size")
            if state["world_size"] == world_size:
                counts = [own] if own else []
            elif rank == 0:
                counts = list(state["reports"].values())
        path = rank_file(layout.bad_records_file, rank)
        self._report = DataReport(layout.max_bad_share, layout.min_records, path, counts, size)
        # At its exit Python ends workers by SIGTERM, which they ignore, and waits for them.
        atexit.register(_close, weakref.ref(self))

    def _count(
        self, ids: list[tuple[str, str]], records: int, bad: Sequence[BadEntry], tokens: int, input_ids: torch.Tensor
    ) -> None:
        self.ids = ids
        self._report.add(records=records, bad=bad, samples=len(ids), tokens=tokens, slots=input_ids.numel())

    def report(self) -> DataReport:
        """Bad records by kind and source, and the fill ratio of the rows, of this rank since the run's start."""
        return self._report

    def state(self) -> dict[str, Any]:
        """Position of the data after the last complete step, as plain types for a checkpoint."""
        return {
            "step": self._step,
            "world_size": self._world_size,
            "fingerprint": self._fingerprint,
            "reports": {str(self._rank): self._report.counts()},
        }


def _close(reference: weakref.ref[Any]) -> None:
    if (batches := reference()) is not None:
        batches.close()


class Batches(RankBatches):
    """Endless iterator over one rank's micro-batches, created by `build_batches`.

    Pass each item as `model(**batch)`. A step consists of `batches_per_rank` items.
    """

    def __init__(
        self,
        planner: WindowPlanner,
        rank: int,
        world_size: int,
        start_step: int,
        num_workers: int,
        state: Mapping[str, Any] | None,
        pin_memory: bool,
        share: Share = _make_own,
    ) -> None:
        if state is not None and state["step"] != start_step:
            raise ValueError(f"the data state is of step {state['step']}, the run resumes at step {start_step}")
        layout = planner.layout
        super().__init__(layout, rank, world_size, _fingerprint(planner), start_step, state)
        self._planner, self._layout, self._share = planner, layout, share
        self._start_step = start_step
        self._cursor: tuple[int, int] | None = None  # window and row, if known
        if layout.mode == "padded":
            window = planner.window(start_step)
            self._cursor = (window.number, (start_step - window.number) * layout.groups_per_step)
        elif state is not None:
            self._cursor = (int(state["cursor"][0]), int(state["cursor"][1]))
        self._num_workers = num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._plans: Iterator[WindowPlan] | None = None
        self._encoded: Iterator[MicroBatch] | None = None  # workers start with the first batch

    def _read_state(self, state: Mapping[str, Any] | None) -> tuple[tuple[int, int] | None, Mapping[str, Any] | None]:
        """Window and row at the start step, and the counts of this rank's report, if known."""
        cursor, counts = None, None
        if state is not None:
            if state["step"] != self._start_step:
                raise ValueError(
                    f"the data state is of step {state['step']}, the run resumes at step {self._start_step}"
                )
            check_fingerprint(state["fingerprint"], self._fingerprint)
            cursor = (int(state["cursor"][0]), int(state["cursor"][1]))
            if state["world_size"] == self._world_size:
                counts = state["reports"].get(str(self._rank))
        if self._layout.mode == "padded":
            window = self._planner.window(self._start_step)
            cursor = (window.number, (self._start_step - window.number) * self._layout.groups_per_step)
        return cursor, counts

    def _groups(self, cursor: tuple[int, int], begun: list[WindowPlan]) -> Iterator[tuple[list[Tree], tuple[int, int]]]:
        """All groups from a window and row on, each with the window and row behind it; adds to `begun` new windows."""
        first, skip = cursor
        plan_workers = min(self._num_workers, max(1, self._num_workers // 4))
        self._plans = self._share(lambda: _load(self._planner, self._planner.numbers(first), plan_workers, prefetch=4))
        empty = 0
        for plan in self._plans:
            if plan.error is not None:
                raise plan.error
            if not skip:
                begun.append(plan)
            for row in range(skip, len(plan.groups)):
                yield plan.groups[row], (plan.window.number, row + 1)
            skip = 0
            empty = 0 if plan.groups else empty + plan.window.end - plan.window.first
            if empty >= _MAX_BAD_IN_A_ROW:
                raise ValueError(f"{empty} records in a row are bad; the last: {plan.bad[-1]}")

    def _planned(self) -> Iterator[MicroBatch]:
        """Planned micro-batches from the start step on; the last one carries the error that ended planning."""
        layout = self._layout
        begun: list[WindowPlan] = []
        groups = self._groups(self._cursor or (0, 0), begun)
        try:
            if self._cursor is None:
                for _ in range(self._start_step * layout.groups_per_step):
                    next(groups)
                begun.clear()
            for step in itertools.count(self._start_step):
                taken = list(itertools.islice(groups, layout.groups_per_step))
                size = layout.groups_per_batch
                # micro-batch b of a step belongs to rank b % world_size, so its content is the same for any world size
                own = range(self._rank, layout.batches_per_step, self._world_size)
                for b in own:
                    batch = MicroBatch(step, last_of_step=b == own[-1], cursor=taken[-1][1])
                    batch.groups = [trees for trees, _ in taken[b * size : (b + 1) * size]]
                    for plan in begun:  # each rank counts its share
                        batch.records += len(range(plan.window.first + self._rank, plan.window.end, self._world_size))
                        batch.bad.extend(plan.bad[self._rank :: self._world_size])
                    begun.clear()
                    yield batch
        except (ValueError, OSError) as error:
            yield MicroBatch(-1, last_of_step=False, error=error)

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro-batch.

        Raises:
            ValueError: Too many records are bad, see `BatchLayout.max_bad_share`.
        """
        if self._encoded is None:
            planner = self._planner
            encoder = MicroBatchEncoder(planner.mixture, planner.encoder, planner.layout)
            self._encoded = _load(encoder, self._planned(), self._num_workers, PREFETCH)
        batch = next(self._encoded)
        if batch.error is not None:
            self.close()
            raise batch.error
        self._count(batch.ids, batch.records, batch.bad, batch.tokens, batch.tensors["input_ids"])
        if batch.last_of_step:
            self._step, self._cursor = batch.step + 1, batch.cursor
        if self._pin_memory:
            return {name: value.pin_memory() for name, value in batch.tensors.items()}
        return batch.tensors

    def state(self) -> dict[str, Any]:
        """Position of the data after the last complete step, as plain types for a checkpoint.

        The step alone is sufficient to resume; with the position of packed rows no text has to be measured again.
        """
        return super().state() | {"cursor": list(self._cursor or (0, 0))}

    def close(self) -> None:
        """Stop the workers; the iterator is then exhausted."""
        stop_workers(self._encoded)
        stop_workers(self._plans)
        self._encoded = self._plans = iter(())


PREFETCH = 2
"""Micro-batches that each worker keeps ready."""

_MAX_BAD_IN_A_ROW = 25_000
"""The run ends if this number of consecutive records gives no row."""


def build_batches(
    mixture: Mixture,
    encoder: RecordEncoder,
    packing: BatchLayout,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
    state: Mapping[str, Any] | None = None,
    pin_memory: bool = False,
    share: Share = _make_own,
) -> Batches:
    """The training data of one rank, from any step on.

    Args:
        mixture: Source of the records.
        encoder: Converts a record to a sample; its `max_length` and `on_long` determine the treatment of long ones.
        packing: Rows, batches, limits. `packing.batches_per_step` must be a multiple of `world_size`; a rank has
            `packing.batches_per_step // world_size` accumulation steps.
        seed: Seed of the order of rows inside windows (the mixture has its own).
        rank: Rank of this process.
        world_size: Number of data-parallel processes. The rows of a step are the same for every world size.
        start_step: First optimizer step.
        num_workers: Worker processes that decode and encode; in addition, a quarter of this number measures texts. 0
            uses this process.
        state: Result of `state()` at `start_step` (of this rank, or merged over ranks); makes the start immediate.
        pin_memory: Page-locked batches, for a CUDA device.
        share: Called with a function that starts the planning; returns the plans of all windows from the start step's
            on. Processes that share one planning pass it on; by default each process plans for itself.

    Returns:
        An endless iterator of dicts of tensors, with `report()`, `state()`, `ids` (source and id of the samples of the
        last batch), `batches_per_rank` and `close()`.

    Raises:
        ValueError: The sizes do not divide, the rank is invalid, or `state` belongs to other data.
    """
    check_sizes(encoder, packing, rank, world_size, start_step)
    return Batches(
        WindowPlanner(mixture, encoder, packing, seed),
        rank,
        world_size,
        start_step,
        num_workers,
        state,
        pin_memory,
        share,
    )


def check_sizes(encoder: RecordEncoder, packing: BatchLayout, rank: int, world_size: int, start_step: int) -> None:
    """Check that processes can share a step evenly and that samples fit into a row.

    Raises:
        ValueError: They cannot, or do not.
    """
    check_rank(rank, world_size)
    if packing.batches_per_step % world_size:
        raise ValueError(
            f"global_batch_size {packing.global_batch_size} makes {packing.batches_per_step} batches of "
            f"{packing.batch_size}; {world_size} processes cannot share them evenly"
        )
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    longest = encoder.max_length
    if packing.mode == "packed" and longest is not None and longest > packing.tokens_per_row:
        raise ValueError(
            f"max_length {longest} exceeds packing.tokens_per_row {packing.tokens_per_row}: a sample must fit a row"
        )
    if packing.trees and not shares_pictures(encoder):
        raise ValueError(
            "packing.trees needs pictures whose tokens are the same for every question; with a fusion that depends on "
            "the question, drawn views or distillation they are not. Leave packing.trees out"
        )


_ONLY_IF_USED = ("views", "packing.trees")
"""Keys that a fingerprint has only if the setting is used."""


def check_fingerprint(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that a data state belongs to this data.

    Keys that it does not have are not compared: it is of an earlier version.

    Raises:
        ValueError: It differs; the message names what differs.
    """
    if "order" in expected and found.get("order") != expected["order"]:
        raise ValueError(
            f"cannot resume at the same data: the checkpoint's run draws records in order {found.get('order', 1)}, "
            f"this version in order {expected['order']} (since then an epoch is exactly one pass). Finish the run with "
            "the version that began it, or start a new run from the checkpoint's weights"
        )
    for key in {**expected, **found}:
        if (key in found or key in _ONLY_IF_USED) and found.get(key) != expected.get(key):
            raise ValueError(
                f"cannot resume at the same data: {key} was {found.get(key)} at the checkpoint and is "
                f"{expected.get(key)} now; restore it, or start a new run from the checkpoint's weights"
            )


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of all ranks at the same step, for resuming with a different world size.

    Raises:
        ValueError: The states are of different steps or data.
    """
    if not states:
        raise ValueError("no states to merge")
    steps = {state["step"] for state in states}
    if len(steps) > 1:
        raise ValueError(f"the ranks' data states are of different steps: {sorted(steps)}")
    merged = dict(states[0])
    for state in states:
        check_fingerprint(state["fingerprint"], merged["fingerprint"])
    for part in ("reports", "streams"):  # by rank; only `data.stream` has streams
        if part in merged:
            merged[part] = {key: value for state in states for key, value in state[part].items()}
    return merged


def layout_fingerprint(layout: BatchLayout, encoder: RecordEncoder) -> dict[str, Any]:
    """What determines the rows of given records, as JSON values by name."""
    keep = ["mode", "tokens_per_row", "max_images_per_row", "global_batch_size", "window", "group_by_length"]
    if layout.mode == "padded":
        keep.append("batch_size")
    print_: dict[str, Any] = {f"packing.{key}": getattr(layout, key) for key in keep}
    if layout.trees:
        print_["packing.trees"] = "split turns" if layout.split_turns else "records"
    if encoder.views is not None:
        print_["views"] = [dict(encoder.views.weights), encoder.views.feature_dropout]
    return print_


def _fingerprint(planner: WindowPlanner) -> dict[str, Any]:
    mixture = planner.mixture
    print_ = {"order": ORDER, **layout_fingerprint(planner.layout, planner.encoder)}
    print_["seed"] = planner.seed
    print_["mixture seed"] = mixture.seed
    print_["shuffle"] = mixture.shuffle
    print_["sources"] = [
        [source.name, size, draws]
        for source, size, draws in zip(mixture.sources, mixture.sizes, mixture.draws, strict=True)
    ]
    return print_


__all__ = [
    "BatchLayout",
    "Batches",
    "Share",
    "WindowPlan",
    "WindowPlanner",
    "build_batches",
    "count_steps",
    "merge_states",
    "stop_workers",
]
