"""Streaming at cluster scale: WebDataset shards through megatron-energon, with the same encoding and packing.

Indexed data (`florence_vl.data.packing`) is the default: the step alone determines its position. A stream reads shards
sequentially, which suits object stores and hundreds of millions of samples. Its position is a saved state of every
rank, so it resumes exactly only with the same number of processes and workers.

Needs the extra `[stream]`; imported only when used.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import Batch as EnergonBatch
from megatron.energon import (
    Cooker,
    CrudeSample,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    reraise_exception,
    stateless,
)
from megatron.energon import Sample as EnergonSample
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
from megatron.energon.state import FlexState
from megatron.energon.task_encoder.cooking import basic_sample_keys

from florence_vl.data.encode import RecordEncoder, Sample
from florence_vl.data.layout import BatchLayout, RowCollator, arrange, check_fits, measure
from florence_vl.data.packing import RankBatches, check_sizes, ignore_stop_signals, layout_fingerprint, stop_workers
from florence_vl.data.readers import Filter, files
from florence_vl.data.readers.base import Caption, as_prompts
from florence_vl.data.readers.webdataset import Members
from florence_vl.data.records import BadRecord, Record, bad_record_on_error
from florence_vl.data.report import BadEntry


@edataclass
class StreamSample(EnergonSample):
    """A sample in preparation: first the record, then its size, then encoded; or the reason why it is bad.

    Args:
        record: The record; None if it is bad.
        tokens: Its length, once measured.
        images: Number of its images, once measured.
        sample: The encoded sample.
        bad: Why it is skipped, or the error that ends the run: it is raised in the main process, without a worker's
            traceback.
    """

    record: Record | None = None
    tokens: int = 0
    images: int = 0
    sample: Sample | None = None
    bad: BadEntry | Exception | None = None


@edataclass
class StreamRow(EnergonSample):
    """A packed row, or a padded batch.

    Args:
        members: Its samples, including bad ones.
    """

    members: list[StreamSample]


@edataclass
class StreamBatch(EnergonBatch):
    """A collated batch with what the report needs.

    Args:
        tensors: Inputs of the model.
        ids: Source and id of every sample.
        bad: Skipped records, and errors that end the run.
        tokens: Tokens without padding.
    """

    tensors: dict[str, torch.Tensor]
    ids: list[tuple[str, str]]
    bad: list[BadEntry | Exception]
    tokens: int


class RecordTaskEncoder(TaskEncoder):
    """energon's hooks, implemented with this package's encoder and layout.

    Args:
        encoder: Converts a record to a sample.
        packing: The layout.
        name: Source name of the records.
        caption: Converts captions to messages, for shards without conversations.
        filters: Samples to keep by values of the JSON member.
    """

    decoder = None  # keep members as bytes

    def __init__(
        self, encoder: RecordEncoder, packing: BatchLayout, name: str, caption: Caption, filters: Sequence[Filter] = ()
    ) -> None:
        self.encoder, self.packing, self.name = encoder, packing, name
        self.caption, self.filters = caption, tuple(filters)
        self.collate = RowCollator(encoder, packing)
        self.cookers = [Cooker(self.cook)]

    @stateless
    def cook(self, crude: CrudeSample) -> StreamSample:
        """Create a record from the members of a shard's sample."""
        base, key = basic_sample_keys(crude), crude["__key__"]
        try:
            with bad_record_on_error(f"{self.name}/{key}"):
                record = self._record(key, crude)
        except BadRecord as error:
            return StreamSample(**base, bad=self._bad(key, error))
        if record is None:
            raise SkipSample
        return StreamSample(**base, record=record)

    def _record(self, key: str, crude: Mapping[str, Any]) -> Record | None:
        """The record of a sample; None if the filters drop it."""
        members = {f"{key}.{name}": data for name, data in crude.items() if isinstance(data, bytes)}
        sample = Members(self.name, key, members, members.__getitem__)
        row = sample.row()
        if self.filters and (row is None or not all(keep(row) for keep in self.filters)):
            return None
        return sample.record(row or {}, self.caption, self.name, zlib.crc32(key.encode())).check()

    def _bad(self, key: str, error: BadRecord) -> BadEntry:
        return BadEntry(error.kind, self.name, -1, -1, f"{key}: {error}")

    @stateless
    def preencode_sample(self, sample: StreamSample) -> StreamSample:
        """Measure without reading images."""
        if sample.record is not None:
            try:
                sample.tokens, sample.images = measure(self.encoder, sample.record, _position(sample))
                check_fits(self.encoder, self.packing, sample.record, sample.tokens, sample.images)
            except BadRecord as error:
                sample.record, sample.bad = None, self._bad(sample.__key__, error)
            except (ValueError, OSError) as error:
                sample.record, sample.bad = None, error
        return sample

    def select_samples_to_pack(self, samples: list[StreamSample]) -> list[list[StreamSample]]:
        """Lay out a window; bad samples are added to its first row, so that they are counted."""
        good = [sample for sample in samples if sample.bad is None]
        seed = zlib.crc32("\n".join(sample.__key__ for sample in samples).encode())
        layout = arrange([s.tokens for s in good], [s.images for s in good], self.packing, seed)
        rows = [[good[i] for i in group] for group in layout] or [[]]
        rows[0].extend(sample for sample in samples if sample.bad is not None)
        return rows

    @stateless
    def postencode_sample(self, sample: StreamSample) -> StreamSample:
        """Decode the images and encode."""
        if sample.record is None:
            return sample
        fields = {name: getattr(sample, name) for name in ("__key__", "__restore_key__", "__subflavors__")}
        try:
            return StreamSample(**fields, sample=self.encoder(sample.record, _position(sample)))
        except BadRecord as error:
            return StreamSample(**fields, bad=self._bad(sample.__key__, error))

    @stateless
    def pack_selected_samples(self, samples: list[StreamSample]) -> StreamRow:
        """Samples of one row."""
        return StreamRow(__key__=",".join(s.__key__ for s in samples), __restore_key__=(), members=samples)

    @stateless
    def batch(self, rows: list[StreamRow]) -> StreamBatch:
        """Collate rows."""
        encoded = [[m.sample for m in row.members if m.sample is not None] for row in rows]
        flat = [sample for row in encoded for sample in row]
        return StreamBatch(
            __key__=[row.__key__ for row in rows],
            __restore_key__=(),
            tensors=self.collate(encoded),
            ids=[(sample.source, sample.id) for sample in flat],
            bad=[m.bad for row in rows for m in row.members if m.bad is not None],
            tokens=sum(map(len, flat)),
        )


def _position(sample: StreamSample) -> int:
    """Substitute for the position of a sample in a stream, which determines its view; the same in every pass."""
    return zlib.crc32(sample.__key__.encode())


def prepare_shards(path: str | Path, workers: int = 4) -> int:
    """Write the `.nv-meta` folder that energon needs to a folder of shards (once).

    Args:
        path: Folder of `.tar` shards (WebDataset: `.json`, `.txt` and image members of one key belong together).
        workers: Processes that index the shards.

    Returns:
        Number of samples.

    Raises:
        FileNotFoundError: There are no shards.
        ValueError: A shard is damaged.
    """
    folder = Path(files.local(path))
    shards = [str(Path(shard).relative_to(folder)) for shard in files.find_files(folder, (".tar",))]
    BaseWebdatasetFactory.prepare_dataset(
        folder, shards, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=workers
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    info = json.loads((folder / ".nv-meta" / ".info.json").read_text())
    return int(sum(info["shard_counts"].values()))


def _pack(value: Any) -> Any:
    """Convert energon's state to plain types (dicts, lists, numbers, text), so that checkpoints contain no pickle."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _pack(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"state": [type(value).__module__, type(value).__qualname__], "fields": fields}
    if isinstance(value, dict):
        kind = "flex" if isinstance(value, FlexState) else "dict"
        return {kind: [[_pack(key), _pack(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "tuple": [_pack(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"energon's state holds a {type(value).__name__}, which cannot be saved")


def _unpack(value: Any) -> Any:
    """The inverse of `_pack`."""
    if not isinstance(value, dict):
        return value
    if "state" in value:
        return _state_class(*value["state"])(**{name: _unpack(item) for name, item in value["fields"].items()})
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    ((kind, items),) = value.items()
    if kind in ("flex", "dict"):
        content = {_unpack(key): _unpack(item) for key, item in items}
        return FlexState(content) if kind == "flex" else content
    return [_unpack(item) for item in items] if kind == "list" else tuple(_unpack(item) for item in items)


def _state_class(module: str, name: str) -> type:
    """A dataclass of energon by name; no other class is built from a checkpoint."""
    found = None
    if module.split(".")[:2] == ["megatron", "energon"]:
        found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"the data state holds a {module}.{name}, which this megatron-energon does not know")
    return found


class StreamBatches(RankBatches):
    """Endless iterator over one rank's micro-batches of a stream, created by `build_stream`. Used like `Batches`."""

    def __init__(
        self,
        loader: Any,
        packing: BatchLayout,
        fingerprint: dict[str, Any],
        rank: int,
        world_size: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        if state is not None:
            for key in ("world size", "workers"):
                found = state["fingerprint"].get(key)
                if found not in (None, fingerprint[key]):
                    raise ValueError(
                        "a stream resumes only with the number of processes and workers with which it was saved: "
                        f"{key} was {found} at the checkpoint and is {fingerprint[key]} now; restore it, or start a "
                        "new run from the checkpoint's weights"
                    )
        super().__init__(packing, rank, world_size, fingerprint, 0 if state is None else int(state["step"]), state)
        self._loader, self._taken = loader, 0
        if state is not None:
            if str(rank) not in state["streams"]:
                raise ValueError(f"the data state has no stream of rank {rank}: found {sorted(state['streams'])}")
            loader.restore_state_rank(_unpack(state["streams"][str(rank)]))
        self._iterator: Iterator[StreamBatch] = iter(loader)

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro-batch.

        Raises:
            ValueError: Too many records are bad, see `BatchLayout.max_bad_share`.
        """
        batch = next(self._iterator)
        bad: list[BadEntry] = []
        for entry in batch.bad:
            if isinstance(entry, Exception):
                raise entry
            bad.append(entry)
        self._count(batch.ids, len(batch.ids) + len(bad), bad, batch.tokens, batch.tensors["input_ids"])
        self._taken += 1
        if self._taken == self.batches_per_rank:
            self._step, self._taken = self._step + 1, 0
        return batch.tensors

    def state(self) -> dict[str, Any]:
        """Position of this rank's stream between two steps, as plain types for a checkpoint.

        Raises:
            ValueError: Called in the middle of a step.
        """
        if self._taken:
            raise ValueError(f"{self._taken} batches of a step of {self.batches_per_rank} are taken: finish the step")
        return super().state() | {"streams": {str(self._rank): _pack(self._loader.save_state_rank())}}

    def close(self) -> None:
        """Stop the workers."""
        stop_workers(getattr(self._loader, "_iterator", None))
        self._iterator = iter(())
        self._loader = None


def _start_worker(start: Callable[[int], None], worker: int) -> None:
    ignore_stop_signals(worker)
    start(worker)


def build_stream(
    path: str | Path,
    encoder: RecordEncoder,
    packing: BatchLayout,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    state: Mapping[str, Any] | None = None,
    shuffle_buffer: int = 1000,
    name: str | None = None,
    caption: str | None = None,
    prompts: str | Sequence[str] | None = None,
    strip_prefixes: Sequence[str] = (),
    filters: Sequence[Filter] = (),
) -> StreamBatches:
    """The training data of one rank, streamed from shards.

    Args:
        path: A folder indexed by `prepare_shards` (or `energon prepare`), or a `.yaml` metadataset of energon that
            blends several by weight; local or a URL that energon reads.
        encoder: Converts a record to a sample.
        packing: The layout; `packing.window` samples are laid out together.
        seed: Seed of the shuffle of shards and samples.
        rank: Rank of this process.
        world_size: Number of data-parallel processes.
        num_workers: Worker processes of this rank.
        state: Result of `state()`, for this rank or merged: resumes exactly, with the same processes and workers.
        shuffle_buffer: Samples in the shuffle buffer of a worker; 0 reads in order.
        name: Source name of the records; the folder's by default.
        caption: As in the reader "webdataset", also for the next three.
        prompts: See `caption`.
        strip_prefixes: See `caption`.
        filters: See `caption`.

    Raises:
        FileNotFoundError: The path does not exist, or is not prepared.
        ValueError: The sizes do not divide, or the state belongs to other data.
    """
    check_sizes(encoder, packing, rank, world_size, 0)
    folder = files.local(path)
    if not files.is_url(folder) and not folder.endswith((".yaml", ".yml")) and not Path(folder, ".nv-meta").is_dir():
        raise FileNotFoundError(f"{folder} is not prepared for streaming; once: florence-vl data prepare {folder}")
    source = name or Path(folder.rstrip("/")).stem
    task = RecordTaskEncoder(
        encoder, packing, source, Caption(caption or "txt", as_prompts(prompts), tuple(strip_prefixes)), filters
    )
    workers = WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,  # bad records are none of energon's errors
    )
    dataset = get_train_dataset(
        folder,
        worker_config=workers,
        # a padded group is a batch already
        batch_size=packing.batch_size if packing.mode == "packed" else 1,
        packing_buffer_size=packing.window,
        shuffle_buffer_size=shuffle_buffer or None,
        max_samples_per_sequence=100,
        task_encoder=task,
    )
    fingerprint = {
        "stream": str(path),
        "world size": world_size,
        "workers": num_workers,
        "seed": seed,
        "shuffle buffer": shuffle_buffer,
        **layout_fingerprint(packing, encoder),
        "packing.batch_size": packing.batch_size,
        "caption": task.caption.column,
        "prompts": list(task.caption.prompts),
        "strip_prefixes": list(task.caption.strip_prefixes),
        "filters": [keep.key() for keep in filters],
    }
    # in this process, garbage collection is left to the training loop
    collect = {} if num_workers else {"gc_collect_every_n_steps": 0}
    loader = get_savable_loader(dataset, watchdog_timeout_seconds=None, **collect)
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
    return StreamBatches(loader, packing, fingerprint, rank, world_size, state)
