"""From a mixture to batches: windows of records are measured, packed into rows, encoded by workers and collated.

The stream of rows is cut into *lanes*: lane v (0 <= v < V) owns the windows v, v + V, v + 2V, ... of the mixture and
gives one row a step. What a window's rows hold depends on the seed and the window alone, so row (step, lane) is a pure
function of the seed, whatever the number of processes; a process of rank r takes its share of the V lanes. Resuming
needs the step alone: the number of rows in the windows before it is found again from the texts, without any image. A
`state()` with cursors saves even that.

Planning (lengths, from text and image sizes) and encoding (decoded images) are two worker pools, so no worker ever
holds a window's pictures.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from florence_vl.data.encode import RecordEncoder, Sample
from florence_vl.data.layout import MODES, BatchLayout, RowCollator, arrange, check_fits, measure, pack_first_fit
from florence_vl.data.mixture import Mixture
from florence_vl.data.records import BadRecord
from florence_vl.data.report import BadEntry, DataReport, rank_file
from florence_vl.data.sampler import check_rank, mix

T = TypeVar("T")


@dataclass
class WindowPlan:
    """Rows (or padded batches) of one window.

    Attributes:
        window: Number of the window in the mixture's stream.
        groups: Positions in the mixture, a list for every row or padded batch, in the order of use.
        records: Number of records of the window.
        bad: Records that cannot become a sample, as far as their text tells.
        error: What ended the measuring; the run ends with it when the window's turn comes.
    """

    window: int
    groups: list[list[int]] = field(default_factory=list)
    records: int = 0
    bad: list[BadEntry] = field(default_factory=list)
    error: Exception | None = None


class WindowPlanner(Dataset[WindowPlan]):
    """`planner[w]` measures the records of window w and lays them out; a pure function of (mixture, w).

    Args:
        mixture: Gives the records by position.
        encoder: Its `tokenize` counts without decoding images.
        layout: Rows, batches and limits.
        seed: Shuffles the order of a window's rows.
    """

    def __init__(self, mixture: Mixture, encoder: RecordEncoder, layout: BatchLayout, seed: int = 0) -> None:
        self.mixture, self.encoder, self.layout, self.seed = mixture, encoder, layout, seed

    def __getitem__(self, window: int) -> WindowPlan:
        layout = self.layout
        first = window * layout.window
        positions, lengths, images, bad = [], [], [], []
        for position in range(first, first + layout.window):
            try:
                record = self.mixture[position]
                tokens, count = measure(self.encoder, record)
                check_fits(self.encoder, layout, record, tokens, count)
            except BadRecord as error:
                bad.append(bad_entry(self.mixture, position, error))
                continue
            except (ValueError, OSError) as error:
                return WindowPlan(window, error=error)
            positions.append(position)
            lengths.append(tokens)
            images.append(count)
        groups = arrange(lengths, images, layout, mix(self.seed, window, 3))
        return WindowPlan(window, [[positions[i] for i in group] for group in groups], layout.window, bad)


def bad_entry(mixture: Mixture, position: int, error: BadRecord) -> BadEntry:
    """The report's line for a bad record at a position of the mixture."""
    source, index = mixture.locate(position)
    return BadEntry(error.kind, mixture.sources[source].name, index, position, str(error))


@dataclass
class MicroBatch:
    """One micro-batch on its way: planned in the main process, encoded by a worker.

    Attributes:
        step: Its optimizer step.
        last_of_step: Whether this process has no other micro-batch in the step.
        groups: Positions in the mixture, a list for every row or padded batch.
        records: Records of the windows that begin with it.
        bad: Bad records of these windows, and of the micro-batch once it is encoded.
        cursors: After the last micro-batch of a step: where each lane stands, (round, row).
        tensors: The collated batch, once encoded.
        ids: Source and id of its samples, once encoded.
        tokens: Tokens of its samples, once encoded.
        error: What ended the planning or the encoding; raised in the main process when its turn comes, without a
            worker's traceback.
    """

    step: int
    last_of_step: bool
    groups: list[list[int]] = field(default_factory=list)
    records: int = 0
    bad: list[BadEntry] = field(default_factory=list)
    cursors: dict[int, tuple[int, int]] | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ids: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    error: Exception | None = None


class MicroBatchEncoder(Dataset[MicroBatch]):
    """Encodes the records of a planned micro-batch and collates them; runs in workers.

    Args:
        mixture: Gives the records by position.
        encoder: Record -> sample.
        layout: Says how samples are collated.
    """

    def __init__(self, mixture: Mixture, encoder: RecordEncoder, layout: BatchLayout) -> None:
        self.mixture, self.encoder = mixture, encoder
        self.collate = RowCollator(encoder, layout)

    def __getitem__(self, batch: MicroBatch) -> MicroBatch:
        if batch.error is None:
            try:
                rows = [self._encode(group, batch.bad) for group in batch.groups]
                batch.tensors = self.collate(rows)
            except (ValueError, OSError) as error:
                batch.error = error
            else:
                samples = [sample for row in rows for sample in row]
                batch.ids = [(sample.source, sample.id) for sample in samples]
                batch.tokens = sum(map(len, samples))
        return batch

    def _encode(self, positions: Sequence[int], bad: list[BadEntry]) -> list[Sample]:
        samples = []
        for position in positions:
            try:
                samples.append(self.encoder(self.mixture[position]))
            except BadRecord as error:
                bad.append(bad_entry(self.mixture, position, error))
        return samples


def _load(dataset: Dataset[T], indices: Iterator[Any], workers: int, prefetch: int) -> Iterator[T]:
    """`dataset[i]` for endless indices, in order, computed ahead by workers (0: in this process)."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        generator=torch.Generator(),  # the loader's own seed must not move the training's random state
    )
    return iter(loader)


class Batches(Iterator[dict[str, torch.Tensor]]):
    """Endless iterator over one rank's micro-batches; made by `build_batches`.

    Each item goes straight into `model(**batch)`. A step is `batches_per_rank` items.
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
    ) -> None:
        layout = planner.layout
        self.batches_per_rank = layout.batches_per_step // world_size
        self.ids: list[tuple[str, str]] = []
        self._planner, self._layout = planner, layout
        self._rank, self._world_size = rank, world_size
        per_batch = layout.lanes_per_batch
        # micro-batch b of a step belongs to rank b % world_size, so its content is the same for any world size
        self._lanes = [
            [b * per_batch + i for i in range(per_batch)] for b in range(rank, layout.batches_per_step, world_size)
        ]
        self._step = self._start_step = start_step
        self._fingerprint = _fingerprint(planner)
        self._cursors, counts = self._read_state(state)
        path = rank_file(layout.bad_records_file, rank)
        self._report = DataReport(layout.max_bad_share, layout.min_records, path, counts)
        self._num_workers = num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._plans: Iterator[WindowPlan] | None = None
        self._encoded: Iterator[MicroBatch] | None = None  # workers start with the first batch

    def _read_state(
        self, state: Mapping[str, Any] | None
    ) -> tuple[dict[int, tuple[int, int]] | None, Mapping[str, Any] | None]:
        """Cursors of this rank's lanes and counts of its report, as far as the state has them."""
        if state is None:
            return None, None
        if state["step"] != self._start_step:
            raise ValueError(f"the data state is of step {state['step']}, the run resumes at step {self._start_step}")
        check_fingerprint(state["fingerprint"], self._fingerprint)
        cursors = {int(lane): (int(m), int(row)) for lane, (m, row) in state["cursors"].items()}
        own = [lane for lanes in self._lanes for lane in lanes]
        known = all(lane in cursors for lane in own)
        reports = state["reports"] if state["world_size"] == self._world_size else {}
        return ({lane: cursors[lane] for lane in own} if known else None), reports.get(str(self._rank))

    def _planned(self) -> Iterator[MicroBatch]:
        """Micro-batches from the start step on, not yet encoded; the last carries the error that ended the planning."""
        own = [lane for lanes in self._lanes for lane in lanes]
        total = self._layout.lanes
        cursors = dict(self._cursors) if self._cursors is not None else dict.fromkeys(own, (0, 0))
        start = dict(cursors)
        first_round = min(m for m, _ in cursors.values())
        windows = (m * total + lane for m in itertools.count(first_round) for lane in own if m >= start[lane][0])
        self._plans = _load(self._planner, windows, min(self._num_workers, max(1, self._num_workers // 4)), prefetch=4)
        waiting: dict[int, deque[WindowPlan]] = {lane: deque() for lane in own}
        current: dict[int, WindowPlan | None] = dict.fromkeys(own)

        def next_group(lane: int, batch: MicroBatch | None) -> list[int]:
            m, row = cursors[lane]
            for _ in range(_MAX_EMPTY_WINDOWS):
                plan = current[lane]
                if plan is None:
                    assert self._plans is not None
                    while not waiting[lane]:
                        fresh = next(self._plans)
                        if fresh.error is not None:
                            raise fresh.error
                        waiting[fresh.window % total].append(fresh)
                    plan = current[lane] = waiting[lane].popleft()
                    if batch is not None and row == 0:
                        batch.records += plan.records
                        batch.bad.extend(plan.bad)
                if row < len(plan.groups):
                    cursors[lane] = (m, row + 1)
                    return plan.groups[row]
                m, row, current[lane] = m + 1, 0, None
            assert plan is not None
            raise ValueError(
                f"{_MAX_EMPTY_WINDOWS * self._layout.window} records in a row are bad; the last: {plan.bad[-1]}"
            )

        try:
            for _ in range(0 if self._cursors is not None else self._start_step):
                for lane in own:
                    next_group(lane, None)
            for step in itertools.count(self._start_step):
                for index, lanes in enumerate(self._lanes):
                    batch = MicroBatch(step, last_of_step=index == len(self._lanes) - 1)
                    batch.groups = [next_group(lane, batch) for lane in lanes]
                    if batch.last_of_step:
                        batch.cursors = dict(cursors)
                    yield batch
        except (ValueError, OSError) as error:
            yield MicroBatch(-1, last_of_step=False, error=error)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro-batch.

        Raises:
            ValueError: Too many records are bad, see `BatchLayout.max_bad_share`.
        """
        if self._encoded is None:
            planner = self._planner
            encoder = MicroBatchEncoder(planner.mixture, planner.encoder, planner.layout)
            self._encoded = _load(encoder, self._planned(), self._num_workers, prefetch=2)
        batch = next(self._encoded)
        if batch.error is not None:
            self.close()
            raise batch.error
        self.ids = batch.ids
        self._report.add(
            records=batch.records,
            bad=batch.bad,
            rows=len(batch.groups),
            batch=batch.tensors,
            tokens=batch.tokens,
            samples=len(batch.ids),
        )
        if batch.last_of_step:
            self._step, self._cursors = batch.step + 1, batch.cursors
        if self._pin_memory:
            return {name: value.pin_memory() for name, value in batch.tensors.items()}
        return batch.tensors

    def report(self) -> DataReport:
        """Bad records by kind and source, and how full the rows are, of this rank since the run's start."""
        return self._report

    def state(self) -> dict[str, Any]:
        """Where the data stands after the last whole step: plain types, for a checkpoint.

        The step alone is enough to resume; with the cursors of all lanes (`merge_states` over ranks) no text is
        measured again.
        """
        return {
            "step": self._step,
            "world_size": self._world_size,
            "fingerprint": self._fingerprint,
            "cursors": {str(lane): list(cursor) for lane, cursor in (self._cursors or {}).items()},
            "reports": {str(self._rank): self._report.counts()},
        }

    def close(self) -> None:
        """Stop the workers; nothing comes after."""
        for iterator in (self._encoded, self._plans):
            shut_down = getattr(iterator, "_shutdown_workers", None)
            if shut_down is not None:  # now, not when garbage is collected, in whatever thread
                shut_down()
        self._encoded = self._plans = iter(())


_MAX_EMPTY_WINDOWS = 100


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
) -> Batches:
    """The training data of one rank, from any step on.

    Args:
        mixture: Where records come from.
        encoder: Record -> sample; its `max_length` and `on_long` say what becomes of long ones.
        packing: Rows, batches, limits. `packing.batches_per_step` must be a multiple of `world_size`; the accumulation
            steps of a rank are `packing.batches_per_step // world_size`.
        seed: Orders the rows inside windows (the mixture has its own).
        rank: This process.
        world_size: Number of data-parallel processes. The rows of a step are the same for every world size.
        start_step: First optimizer step to give.
        num_workers: Worker processes that decode and encode; another quarter of that number measures texts. 0 does all
            in this process.
        state: What `state()` gave at `start_step` (of this rank, or merged over ranks): makes the start immediate.
        pin_memory: Page-locked batches, for a CUDA device.

    Returns:
        An endless iterator of dicts of tensors, with `report()`, `state()`, `ids` (source and id of the samples of the
        last batch), `batches_per_rank` and `close()`.

    Raises:
        ValueError: The sizes do not divide, the rank is impossible, or `state` is of other data.
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
    )


def check_sizes(encoder: RecordEncoder, packing: BatchLayout, rank: int, world_size: int, start_step: int) -> None:
    """Refuse processes that cannot share a step evenly, and samples that cannot fit a row.

    Raises:
        ValueError: Says which.
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


def check_fingerprint(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a data state that belongs to other data.

    Raises:
        ValueError: Names what differs.
    """
    for key in expected:
        if found.get(key) != expected[key]:
            raise ValueError(
                f"cannot resume at the same data: {key} was {found.get(key)} at the checkpoint and is {expected[key]} "
                "now; restore it, or start a new run from the checkpoint's weights"
            )


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of all ranks at the same step, for resuming with another world size.

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
    for part in ("cursors", "reports", "streams"):  # by lane or rank; only `data.stream` has streams
        if part in merged:
            merged[part] = {key: value for state in states for key, value in state[part].items()}
    return merged


def _fingerprint(planner: WindowPlanner) -> dict[str, Any]:
    config, mixture = planner.layout, planner.mixture
    keep = ("mode", "tokens_per_row", "max_images_per_row", "global_batch_size", "window", "group_by_length")
    print_ = {f"packing.{key}": value for key, value in asdict(config).items() if key in keep}
    if config.mode == "padded":
        print_["packing.batch_size"] = config.batch_size
    print_["seed"] = planner.seed
    print_["mixture seed"] = mixture.seed
    print_["sources"] = [
        [source.name, size, draws]
        for source, size, draws in zip(mixture.sources, mixture.sizes, mixture.draws, strict=True)
    ]
    return print_


def estimate_steps(
    mixture: Mixture, encoder: RecordEncoder, packing: BatchLayout, epochs: float = 1.0, seed: int = 0, windows: int = 8
) -> int:
    """Optimizer steps of so many epochs.

    Exact up to bad records in padded mode; in packed mode the number of rows is extrapolated from `windows` windows
    spread over the epoch (their texts are measured, no image is decoded).

    Args:
        mixture: See `build_batches`, as for the next two.
        encoder: Measures.
        packing: The layout.
        epochs: Passes of the mixture.
        seed: As in `build_batches`.
        windows: Windows to measure.
    """
    records = len(mixture) * epochs
    if packing.mode == "padded":
        return max(1, -(-int(records) // packing.global_batch_size))
    planner = WindowPlanner(mixture, encoder, packing, seed)
    total = max(1, -(-len(mixture) // packing.window))
    chosen = sorted({int(i * total / min(windows, total)) for i in range(min(windows, total))})
    rows = sum(len(planner[window].groups) for window in chosen)
    return max(1, round(rows / len(chosen) * records / packing.window / packing.global_batch_size))


__all__ = [
    "MODES",
    "BatchLayout",
    "Batches",
    "WindowPlan",
    "WindowPlanner",
    "arrange",
    "build_batches",
    "estimate_steps",
    "measure",
    "merge_states",
    "pack_first_fit",
]
