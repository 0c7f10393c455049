"""Streaming through megatron-energon: the same encoding and rows, exact resume, bad samples counted."""

from __future__ import annotations

import atexit
import io
import json
import os
import signal
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image

pytest.importorskip("megatron.energon", reason="needs the extra [stream]")

from florence_vl.data.encode import RecordEncoder
from florence_vl.data.layout import BatchLayout
from florence_vl.data.packing import merge_states
from florence_vl.data.readers import Filter
from florence_vl.data.stream import build_stream, prepare_shards
from florence_vl.model.tiny import tiny_processor

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")
PACKED = BatchLayout(tokens_per_row=200, max_images_per_row=4, global_batch_size=2, window=8, max_bad_share=0.5)
PADDED = BatchLayout(mode="padded", batch_size=2, global_batch_size=4, window=8, max_bad_share=0.5)


@pytest.fixture(scope="module")
def encoder():
    return RecordEncoder(tiny_processor(), max_length=200, on_long="drop")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards of twelve samples; number 5 of each has a broken image, number 7 nothing to learn."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for number in range(12):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (shard, number, 0)).save(buffer, "PNG")
                image = buffer.getvalue() if number != 5 else b"broken"
                turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "car " * (1 + number)}]
                row = {
                    "id": f"{shard}-{number}",
                    "conversations": turns[:1] if number == 7 else turns,
                    "even": number % 2 == 0,
                }
                for suffix, data in (("png", image), ("json", json.dumps(row).encode())):
                    info = tarfile.TarInfo(f"{shard}_{number:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    assert prepare_shards(folder, workers=1) == 48
    return folder


def take(batches, steps):
    return [(next(batches), list(batches.ids)) for _ in range(steps * batches.batches_per_rank)]


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("config", [PACKED, PADDED], ids=["packed", "padded"])
def test_the_stream_gives_every_good_sample(encoder, shards, config):
    stream = build_stream(shards, encoder, config, shuffle_buffer=4)
    seen: Counter[str] = Counter()
    for batch, ids in take(stream, 20):
        seen.update(name for _, name in ids)
        if config.mode == "packed":
            assert batch["input_ids"].shape[1] <= 200
            assert len(ids) == int((batch["position_ids"] == 0).sum())
        else:
            assert len(batch["input_ids"]) == len(ids) <= 2
    good = {f"{shard}-{number}" for shard in range(4) for number in range(12) if number not in (5, 7)}
    assert set(seen) == good
    report = stream.report()
    assert set(report.bad) == {("image", shards.name), ("unsupervised", shards.name)}
    assert report.num_bad / report.records == pytest.approx(2 / 12, abs=0.06)


@pytest.mark.parametrize(
    ("config", "workers"),
    [(PACKED, 0), (PADDED, 0), pytest.param(PACKED, 2, marks=pytest.mark.slow)],
    ids=["packed-0", "padded-0", "packed-2"],
)
def test_a_stream_resumes_exactly(encoder, shards, config, workers):
    whole = build_stream(shards, encoder, config, num_workers=workers, shuffle_buffer=4)
    take(whole, 2)
    state = json.loads(json.dumps(merge_states([whole.state()])))
    expected = take(whole, 2)
    whole.close()
    resumed = build_stream(shards, encoder, config, num_workers=workers, shuffle_buffer=4, state=state)
    for (batch, ids), (wanted, wanted_ids) in zip(take(resumed, 2), expected, strict=True):
        assert ids == wanted_ids
        assert equal(batch, wanted)
    assert resumed.state()["step"] == 4
    resumed.close()


def test_ranks_share_the_shards(encoder, shards):
    seen = []
    for rank in range(2):
        stream = build_stream(shards, encoder, PACKED, rank=rank, world_size=2, shuffle_buffer=4)
        assert stream.batches_per_rank == 1
        seen.append({name for _, ids in take(stream, 14) for _, name in ids})
    assert len(seen[0] & seen[1]) == 0
    assert len(seen[0] | seen[1]) == 40


def test_filters_and_captions_reach_the_stream(encoder, shards):
    stream = build_stream(shards, encoder, PACKED, filters=[Filter("even", "==", True)], shuffle_buffer=0)
    assert all(int(name.split("-")[1]) % 2 == 0 for _, ids in take(stream, 10) for _, name in ids)


def test_wrong_streams_are_refused(encoder, shards, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not prepared for streaming"):
        build_stream(tmp_path, encoder, PACKED)
    with pytest.raises(FileNotFoundError, match=r"no file ending in \.tar"):
        prepare_shards(tmp_path)
    stream = build_stream(shards, encoder, PACKED)
    take(stream, 1)
    state = stream.state()
    with pytest.raises(ValueError, match="workers was 0 at the checkpoint and is 1 now"):
        build_stream(shards, encoder, PACKED, num_workers=1, state=state)
    next(stream)
    with pytest.raises(ValueError, match="finish the step"):
        stream.state()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_too_long_ends_the_run_if_the_encoder_says_so(shards, workers):
    encoder = RecordEncoder(tiny_processor(), max_length=20, on_long="error")
    stream = build_stream(shards, encoder, PADDED, num_workers=workers)
    with pytest.raises(ValueError, match=r"^record .* more than max_length=20. Shorten it, or set on_long"):
        take(stream, 20)
    stream.close()


def test_workers_outlive_signals_and_end_with_the_stream(encoder, shards, monkeypatch):
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    stream = build_stream(shards, encoder, PADDED, num_workers=1)
    take(stream, 1)
    workers = stream._loader._iterator._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    take(stream, 6)  # more than was prefetched
    for function, *arguments in at_exit:
        function(*arguments)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompts": "Say it."}, "prompts was"), ({"caption": "even"}, "caption was txt at the checkpoint and is even")],
)
def test_other_captions_are_refused_on_resume(encoder, shards, change, message):
    stream = build_stream(shards, encoder, PADDED)
    take(stream, 1)
    with pytest.raises(ValueError, match=message):
        build_stream(shards, encoder, PADDED, state=stream.state(), **change)
