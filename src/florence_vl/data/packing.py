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
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from florence_vl.data.encode import RecordEncoder
from florence_vl.data.layout import MODES, BatchLayout, RowCollator, arrange, check_fits, measure, pack_first_fit
from florence_vl.data.mixture import Mixture
from florence_vl.data.records import BadRecord
from florence_vl.data.report import BadEntry, DataReport, rank_file
from florence_vl.data.sampler import check_rank, mix


@dataclass
class WindowPlan:
    """Rows (or padded batches) of one window.

    Args:
        window: Number of the window in the mixture's stream.
        groups: Positions in the mixture, a list for every row or padded batch, in the order of use.
        records: Records looked at.
        bad: Records that cannot become a sample, as far as their text tells.
    """

    window: int
    groups: list[list[int]]
    records: int
    bad: list[BadEntry] = field(default_factory=list)


@dataclass
class _Failure:
    """A user's error from a worker: raised in the main process as it is, without the worker's traceback."""

    error: Exception


class _Careful(Dataset):
    """A data set whose user errors come back as values."""

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, _Failure):
            return index
        try:
            return self.inner[index]
        except (ValueError, OSError) as error:
            return _Failure(error)


class WindowPlanner(Dataset):
    """`planner[w]` measures the records of window w and lays them out; a pure function of (mixture, w).

    Args:
        mixture: Gives the records by position.
        encoder: `RecordEncoder`; its `tokenize` counts without decoding images.
        config: The layout.
        seed: Shuffles the order of a window's rows.
    """

    def __init__(self, mixture: Mixture, encoder: RecordEncoder, config: BatchLayout, seed: int = 0) -> None:
        self.mixture, self.encoder, self.config, self.seed = mixture, encoder, config, seed

    def __getitem__(self, window: int) -> WindowPlan:
        config = self.config
        first = window * config.window
        positions, lengths, images, bad = [], [], [], []
        for position in range(first, first + config.window):
            try:
                record = self.mixture[position]
                tokens, count = measure(self.encoder, record)
                check_fits(self.encoder, config, record, tokens, count)
            except BadRecord as error:
                bad.append(bad_entry(self.mixture, position, error))
                continue
            positions.append(position)
            lengths.append(tokens)
            images.append(count)
        groups = arrange(lengths, images, config, mix(self.seed, window, 3))
        return WindowPlan(window, [[positions[i] for i in group] for group in groups], config.window, bad)


def bad_entry(mixture: Mixture, position: int, error: BadRecord) -> BadEntry:
    """The report's line for a bad record at a position of the mixture."""
    source, index = mixture.locate(position)
    return BadEntry(error.kind, mixture.sources[source].name, index, position, str(error))


@dataclass
class _Request:
    """One micro-batch to encode: its groups of positions, and where the lanes stand after its step."""

    step: int
    last_of_step: bool
    groups: list[list[int]]
    records: int = 0
    bad: list[BadEntry] = field(default_factory=list)
    cursors: dict[int, tuple[int, int]] | None = None


@dataclass
class _Answer:
    request: _Request
    batch: dict[str, torch.Tensor]
    bad: list[BadEntry]
    ids: list[tuple[str, str]]
    tokens: int


class _BatchEncoder(Dataset):
    """Encodes the records of a request and collates them; runs in workers."""

    def __init__(self, mixture: Mixture, encoder: RecordEncoder, config: BatchLayout) -> None:
        self.mixture, self.encoder = mixture, encoder
        self.collate = RowCollator(encoder, config)

    def __getitem__(self, request: _Request) -> _Answer:
        bad: list[BadEntry] = []
        rows = []
        for group in request.groups:
            row = []
            for position in group:
                try:
                    row.append(self.encoder(self.mixture[position]))
                except BadRecord as error:
                    bad.append(bad_entry(self.mixture, position, error))
            rows.append(row)
        samples = [sample for row in rows for sample in row]
        tokens = sum(len(sample) for sample in samples)
        return _Answer(request, self.collate(rows), bad, [(s.source, s.id) for s in samples], tokens)


class Batches(Iterator[dict[str, torch.Tensor]]):
    """Endless iterator over one rank's micro-batches; made by `build_batches`.

    Each item goes straight into `model(**batch)`. A step is `batches_per_rank` items.
    """

    def __init__(
        self,
        planner: WindowPlanner,
        batch_encoder: _BatchEncoder,
        rank: int,
        world_size: int,
        start_step: int,
        num_workers: int,
        state: Mapping[str, Any] | None,
        pin_memory: bool,
    ) -> None:
        config = planner.config
        self._config, self._rank, self._world_size = config, rank, world_size
        self.batches_per_rank = config.batches_per_step // world_size
        per_batch = config.lanes_per_batch
        # micro-batch b of a step belongs to rank b % world_size, so its content is the same for any world size
        self._lanes = [
            [b * per_batch + i for i in range(per_batch)] for b in range(rank, config.batches_per_step, world_size)
        ]
        self._planner = planner
        self._start_step = start_step
        self._fingerprint = _fingerprint(planner)
        cursors, counts = self._read_state(state, start_step)
        path = rank_file(config.bad_records_file, rank)
        self._report = DataReport(config.max_bad_share, config.min_records, path, counts)
        self._step = start_step
        self._cursors = cursors
        self.ids: list[tuple[str, str]] = []
        self._num_workers = num_workers
        plan_workers = 0 if num_workers == 0 else max(1, num_workers // 4)
        self._plan_workers = plan_workers
        self._loader: DataLoader | None = DataLoader(
            _Careful(batch_encoder),
            batch_size=None,
            sampler=_Requests(self),
            collate_fn=_identity,
            num_workers=num_workers,
            pin_memory=False,
            prefetch_factor=2 if num_workers else None,
            generator=torch.Generator(),  # the loader's own seed must not move the training's random state
        )
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._iterator: Iterator[Any] | None = None  # workers start with the first batch
        self._plans: Iterator[Any] | None = None

    def _read_state(
        self, state: Mapping[str, Any] | None, start_step: int
    ) -> tuple[dict[int, tuple[int, int]] | None, Mapping[str, Any] | None]:
        if state is None:
            return None, None
        if state["step"] != start_step:
            raise ValueError(f"the data state is of step {state['step']}, the run resumes at step {start_step}")
        check_fingerprint(state["fingerprint"], self._fingerprint)
        cursors = {int(lane): (int(m), int(row)) for lane, (m, row) in state["cursors"].items()}
        own = [lane for lanes in self._lanes for lane in lanes]
        known = all(lane in cursors for lane in own)
        reports = state["reports"] if state["world_size"] == self._world_size else {}
        counts = reports.get(str(self._rank))
        return ({lane: cursors[lane] for lane in own} if known else None), counts

    def _requests(self) -> Iterator[_Request]:
        """Micro-batch requests from the start step on (runs in this process)."""
        own = [lane for lanes in self._lanes for lane in lanes]
        total = self._config.lanes
        cursors = dict(self._cursors) if self._cursors is not None else dict.fromkeys(own, (0, 0))
        replay = 0 if self._cursors is not None else self._start_step
        first_round = min(m for m, _ in cursors.values())
        start = dict(cursors)
        windows = (m * total + lane for m in itertools.count(first_round) for lane in own if m >= start[lane][0])
        plans = self._plans = iter(
            DataLoader(
                _Careful(self._planner),
                batch_size=None,
                sampler=_Windows(windows),
                collate_fn=_identity,
                num_workers=self._plan_workers,
                prefetch_factor=4 if self._plan_workers else None,
                generator=torch.Generator(),
            )
        )
        waiting: dict[int, deque[WindowPlan]] = {lane: deque() for lane in own}
        current: dict[int, WindowPlan | None] = dict.fromkeys(own)

        def next_group(lane: int, request: _Request | None) -> list[int]:
            m, row = cursors[lane]
            for _ in range(_MAX_EMPTY_WINDOWS):
                plan = current[lane]
                if plan is None:
                    while not waiting[lane]:
                        fresh = next(plans)
                        if isinstance(fresh, _Failure):
                            raise fresh.error
                        waiting[fresh.window % total].append(fresh)
                    plan = current[lane] = waiting[lane].popleft()
                    if request is not None and row == 0:
                        request.records += plan.records
                        request.bad.extend(plan.bad)
                if row < len(plan.groups):
                    cursors[lane] = (m, row + 1)
                    return plan.groups[row]
                m, row, current[lane] = m + 1, 0, None
            assert plan is not None
            raise ValueError(
                f"{_MAX_EMPTY_WINDOWS * self._config.window} records in a row are bad; the last: {plan.bad[-1]}"
            )

        for _ in range(replay):
            for lane in own:
                next_group(lane, None)
        for step in itertools.count(self._start_step):
            for index, lanes in enumerate(self._lanes):
                request = _Request(step, index == len(self._lanes) - 1, [])
                for lane in lanes:
                    request.groups.append(next_group(lane, request))
                if request.last_of_step:
                    request.cursors = dict(cursors)
                yield request

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro-batch.

        Raises:
            ValueError: Too many records are bad, see `BatchLayout.max_bad_share`.
        """
        if self._iterator is None:
            assert self._loader is not None
            self._iterator = iter(self._loader)
        answer = next(self._iterator)
        if isinstance(answer, _Failure):
            self.close()
            raise answer.error
        request = answer.request
        self.ids = answer.ids
        self._report.add(
            records=request.records,
            bad=request.bad + answer.bad,
            rows=len(request.groups),
            batch=answer.batch,
            tokens=answer.tokens,
            samples=len(answer.ids),
        )
        if request.last_of_step:
            self._step, self._cursors = request.step + 1, request.cursors
        batch = answer.batch
        if self._pin_memory:
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return batch

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
        for iterator in (self._iterator, self._plans):
            shut_down = getattr(iterator, "_shutdown_workers", None)
            if shut_down is not None:  # now, not when garbage is collected, in whatever thread
                shut_down()
        self._iterator = self._plans = iter(())
        self._loader = None


_MAX_EMPTY_WINDOWS = 100


class _Requests:
    """Sampler of the encoding loader: the requests themselves are the indices."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[_Request | _Failure]:
        try:
            yield from self.batches._requests()
        except (ValueError, OSError) as error:
            yield _Failure(error)  # raised when its turn comes, after the batches before it


class _Windows:
    def __init__(self, windows: Iterator[int]) -> None:
        self.windows = windows

    def __iter__(self) -> Iterator[int]:
        return self.windows


def _identity(item: Any) -> Any:
    return item


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
        _BatchEncoder(mixture, encoder, packing),
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
    config, mixture = planner.config, planner.mixture
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
