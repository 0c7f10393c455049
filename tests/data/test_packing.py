"""Rows: first-fit under two limits, a pure function of (seed, step, lane), exact resume, isolation between samples."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from florence_vl.data.encode import RecordEncoder, Sample
from florence_vl.data.layout import measure, pack_first_fit
from florence_vl.data.mixture import Mixture, MixtureSource
from florence_vl.data.packing import (
    BatchLayout,
    WindowPlanner,
    build_batches,
    check_fingerprint,
    count_steps,
    merge_states,
)
from florence_vl.data.records import Record
from florence_vl.model.tiny import tiny_model


@given(
    samples=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=80),
    budget=st.integers(50, 120),
    max_images=st.integers(4, 8),
    decreasing=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_first_fit_keeps_the_limits_and_every_sample(samples, budget, max_images, decreasing):
    lengths, images = [n for n, _ in samples], [k for _, k in samples]
    rows = pack_first_fit(lengths, images, budget, max_images, decreasing)
    assert sorted(i for row in rows for i in row) == list(range(len(samples)))
    for row in rows:
        assert row == sorted(row)
        assert sum(lengths[i] for i in row) <= budget
        assert sum(images[i] for i in row) <= max_images
    for first, row in enumerate(rows):  # first fit: no later row's longest sample had room in an earlier row
        for later in rows[first + 1 :]:
            sample = min(later, key=lambda i: (lengths[i], images[i]))
            room = budget - sum(lengths[i] for i in row), max_images - sum(images[i] for i in row)
            assert lengths[sample] > room[0] or images[sample] > room[1]


def test_first_fit_on_known_lengths():
    assert pack_first_fit([5, 7, 5, 2, 4, 2], [0] * 6, 10, 9) == [[1, 3], [0, 2], [4, 5]]
    assert pack_first_fit([1, 1, 1], [1, 1, 1], 10, 2) == [[0, 1], [2]]
    with pytest.raises(ValueError, match="sample 1 has 11 tokens and 0 images; a row holds 10 and 2"):
        pack_first_fit([1, 11], [0, 0], 10, 2)


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), color).save(buffer, "PNG")
    return buffer.getvalue()


class Made:
    """A reader of records of varied length with 0, 1 or 2 images; some are bad in the ways given.

    Args:
        size: Number of records.
        bad: Index -> kind of bad record.
        offset: Number of the first record.
        block: Records that should be read together.
    """

    def __init__(self, size: int = 60, bad: dict[int, str] | None = None, offset: int = 0, block: int = 1) -> None:
        self.size, self.bad, self.offset, self.block = size, bad or {}, offset, block

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        number = index + self.offset
        images: list[Any] = [png((number % 256, i, 7)) for i in range(number % 3)]
        words = "car house dog " * (1 + number * 7 % 11)
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": f"Q{number}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"{words}{number}"}]},
        ]
        kind = self.bad.get(index)
        if kind == "image":
            messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": "broken"}]
            images = [b"not an image"]
        elif kind == "unsupervised":
            messages = messages[:1]
        elif kind == "too_long":
            messages[1]["content"][0]["text"] = "street " * 400
        return Record(str(number), "made", messages, images)


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


@pytest.fixture(scope="module")
def encoder(parts):
    return RecordEncoder(parts[1], max_length=200, on_long="drop")


def mixture_of(weighting="repeats", shuffle=True, **options):
    sources = [MixtureSource("a", Made(**options)), MixtureSource("b", Made(31, offset=1000), 2.0)]
    return Mixture(sources, weighting, seed=5, shuffle=shuffle)


PACKED = BatchLayout(tokens_per_row=200, max_images_per_row=3, batch_size=1, global_batch_size=4, window=16)
PADDED = BatchLayout(mode="padded", batch_size=2, global_batch_size=8, window=16)


SMALL_PACKED = {"tokens_per_row": 200, "max_images_per_row": 3, "batch_size": 2, "global_batch_size": 4, "window": 16}
SMALL_PADDED = {"mode": "padded", "batch_size": 2, "global_batch_size": 8, "window": 16}
BAD = {3: "image", 4: "unsupervised", 5: "too_long", 9: "image"}

ORDER_STEPS = 6
# name -> (layout, arguments of `mixture_of`, rank, processes, first step)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int, int]] = {
    "packed": (SMALL_PACKED, {}, 0, 1, 0),
    "packed, rank 1 of 2": (SMALL_PACKED, {}, 1, 2, 0),
    "packed, from step 3": (SMALL_PACKED, {}, 0, 1, 3),
    "packed, fixed length": ({**SMALL_PACKED, "pad_to_max_length": True}, {}, 0, 1, 0),
    "packed, bad records": ({**SMALL_PACKED, "max_bad_share": 0.5}, {"bad": BAD}, 0, 1, 0),
    "packed, proportions": (SMALL_PACKED, {"weighting": "proportions"}, 0, 1, 0),
    "packed, blocks": (SMALL_PACKED, {"block": 8}, 0, 1, 0),
    "padded": (SMALL_PADDED, {}, 0, 1, 0),
    "padded, rank 3 of 4": (SMALL_PADDED, {}, 3, 4, 0),
    "padded, from step 3": (SMALL_PADDED, {}, 0, 1, 3),
    "padded, not grouped": ({**SMALL_PADDED, "group_by_length": False}, {}, 0, 1, 0),
    "padded, not shuffled": ({**SMALL_PADDED, "group_by_length": False}, {"shuffle": False}, 0, 1, 0),
    "padded, bad records": ({**SMALL_PADDED, "max_bad_share": 0.5}, {"bad": BAD}, 0, 1, 0),
}


def digest(batches: Iterable[tuple[dict[str, Any], list[tuple[str, str]]]]) -> str:
    """Of batches and the names of their samples: ids, labels, positions, masks and the images' shapes."""
    state = hashlib.sha256()
    for batch, ids in batches:
        state.update(repr(ids).encode())
        for name in sorted(batch):
            value = batch[name]
            state.update(f"{name} {tuple(value.shape)}".encode())
            if name != "pixel_values":
                state.update(value.numpy().tobytes())
    return state.hexdigest()[:16]


def take(batches, steps):
    """[(batch, ids)] of `steps` steps."""
    return [(next(batches), list(batches.ids)) for _ in range(steps * batches.batches_per_rank)]


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in CASES), ("packed", 2), ("padded", 2)])
def test_the_order_of_the_stream_is_written_down(encoder, name, workers):
    """A change of these digests breaks the resuming of every run."""
    layout, mixed, rank, world, start = CASES[name]
    batches = build_batches(
        mixture_of(**mixed), encoder, BatchLayout(**layout), 3, rank, world, start, num_workers=workers
    )
    found = digest(take(batches, ORDER_STEPS))
    batches.close()
    assert found == json.loads(Path(__file__).with_name("stream_order.json").read_text())[name]


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_packed_rows_hold_the_samples_and_the_limits(encoder):
    mixture = mixture_of()
    batches = build_batches(mixture, encoder, PACKED)
    for batch, ids in take(batches, 5):
        assert batch["input_ids"].shape[1] <= 200
        assert len(ids) >= 1
        images = batch.get("pixel_values")
        assert images is None or len(images) <= 3
        starts = (batch["position_ids"][0] == 0).sum()
        assert len(ids) == starts
        assert (batch["labels"] != -100).any()
        found = {(s, int(i)) for s, i in ids}
        assert len(found) == len(ids)
    report = batches.report()
    assert report.num_bad == 0
    assert 0.8 < report.efficiency <= 1
    assert report.samples == sum(len(ids) for _, ids in take(build_batches(mixture, encoder, PACKED), 5))


def test_measuring_is_the_length_of_the_sample(encoder):
    for index in range(12):
        record = Made()[index]
        sample = encoder(record)
        assert measure(encoder, record) == (len(sample), sample.num_images)


LAYOUTS = {
    "packed": PACKED,
    "padded": PADDED,
    "padded, not grouped": BatchLayout(mode="padded", batch_size=2, global_batch_size=8, group_by_length=False),
    "padded, one window an epoch": BatchLayout(mode="padded", batch_size=2, global_batch_size=6, window=4096),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_draws_each_record_as_often_as_its_weight_says(encoder, layout, epochs, world):
    if layout.batches_per_step % world:
        world = 3
    mixture = mixture_of()  # 60 records once, 31 twice
    steps = count_steps(mixture, encoder, layout, epochs)
    ranks = [build_batches(mixture, encoder, layout, rank=rank, world_size=world) for rank in range(world)]
    drawn = [Counter(pair for rank in ranks for _, ids in take(rank, 1) for pair in ids) for _ in range(steps)]
    wanted = Counter({("a", str(i)): epochs for i in range(60)} | {("b", str(1000 + i)): 2 * epochs for i in range(31)})
    total = sum(drawn, Counter())
    assert not wanted - total
    assert sum((total - wanted).values()) <= sum(drawn[-1].values())  # what fills up the last step
    assert wanted - sum(drawn[:-1], Counter())  # and that step is needed
    assert max(total[pair] - wanted[pair] for pair in total) <= 1


@given(
    epoch=st.integers(1, 400),
    window=st.integers(4, 90),
    size=st.integers(1, 12),
    mode=st.sampled_from(["packed", "padded"]),
)
@settings(max_examples=80, deadline=None)
def test_windows_follow_each_other_and_end_with_the_epoch(epoch, window, size, mode):
    layout = BatchLayout(mode=mode, batch_size=1, global_batch_size=size, window=window)
    at, number = 0, 0
    while at < 4 * epoch:
        found = layout.window_at(number, epoch)
        assert (found.first, found.number) == (at, number)
        assert 0 < found.end - found.first <= max(window, size)
        ends = range(epoch, 5 * epoch, epoch)
        if mode == "packed":
            assert not any(found.first < end < found.end for end in ends)
        else:
            steps = [layout.window_at(step, epoch) for step in range(found.first // size, found.end // size)]
            assert set(steps) == {found}
            assert not any(found.first < end <= found.end - size for end in ends)
        at, number = found.end, found.following


class Drawn:
    """Records whose text has a random number of words; also acts as their encoder."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return Record(str(index), "drawn", [{"role": "user", "content": str(self.lengths[index])}])

    def outline(self, record, position):
        ids = torch.zeros(int(record.messages[0]["content"]), dtype=torch.long)
        return Sample(ids, ids)


def test_the_processes_of_a_step_compute_batches_of_like_length():
    """Share of the computed slots that hold tokens, when every process waits for the longest batch of a round."""
    generator = torch.Generator().manual_seed(0)
    words = torch.distributions.LogNormal(5.0, 0.8)
    torch.manual_seed(0)
    images = 576 * (torch.rand(8192, generator=generator) < 0.94)
    lengths = (words.sample((8192,)).clamp(8, 1400) + images).long().tolist()
    reader = Drawn(lengths)
    mixture = Mixture([MixtureSource("drawn", reader)], seed=1)
    share = {}
    for grouped in (True, False):
        layout = BatchLayout(mode="padded", batch_size=4, global_batch_size=256, window=4096, group_by_length=grouped)
        planner = WindowPlanner(mixture, reader, layout)
        useful = computed = 0
        for window in itertools.islice(planner.numbers(0), 2):
            groups = [[lengths[mixture.locate(p)[1]] for ((p, _),) in group] for group in planner[window].groups]
            assert {len(group) for group in groups} == {4}
            useful += sum(map(sum, groups))
            for step in range(0, len(groups), 64):  # 64 processes, one micro-batch each
                computed += 256 * max(map(max, groups[step : step + 64]))
        share[grouped] = useful / computed
    assert share[True] > 0.85
    assert share[False] < 0.6


@pytest.mark.parametrize("config", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_step_gives_the_same_bits(encoder, config, workers):
    whole = build_batches(mixture_of(), encoder, config)
    expected, states = [], []
    for _ in range(8):
        states.append(json.loads(json.dumps(whole.state())))
        expected.append(take(whole, 1))
    for start in (0, 3, 7) if workers == 0 else (3,):
        for state in (None, states[start]):
            batches = build_batches(mixture_of(), encoder, config, start_step=start, state=state, num_workers=workers)
            for step in range(start, 8):
                for (batch, ids), (wanted, wanted_ids) in zip(take(batches, 1), expected[step], strict=True):
                    assert ids == wanted_ids
                    assert equal(batch, wanted)
            if state is not None:
                assert batches.state() == whole.state()
            batches.close()


@pytest.mark.parametrize("config", [PACKED, PADDED], ids=["packed", "padded"])
@given(world=st.sampled_from([1, 2, 4]), resumed_world=st.sampled_from([1, 2, 4]), start=st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_a_step_holds_the_same_samples_for_every_world_size(encoder, config, world, resumed_world, start):
    def steps(size, first, count, state=None):
        ranks = [build_batches(mixture_of(), encoder, config, 0, r, size, first, state=state) for r in range(size)]
        result = [[ids for rank in ranks for _, ids in take(rank, 1)] for _ in range(count)]
        return [sorted(map(tuple, step)) for step in result], merge_states([rank.state() for rank in ranks])

    expected, _ = steps(1, 0, start + 2)
    before, state = steps(world, 0, start)
    assert before == expected[:start]
    assert steps(resumed_world, start, 2, state)[0] == expected[start:]
    assert steps(resumed_world, start, 2, None)[0] == expected[start:]


def test_bad_records_are_counted_listed_and_skipped(encoder, tmp_path):
    bad = {3: "image", 4: "unsupervised", 5: "too_long", 9: "image"}
    path = tmp_path / "run" / "bad.jsonl"
    config = BatchLayout(
        tokens_per_row=200, global_batch_size=2, window=16, bad_records_file=str(path), max_bad_share=0.5
    )
    mixture = Mixture([MixtureSource("set", Made(48, bad))])
    batches = build_batches(mixture, encoder, config)
    seen = Counter()
    while batches.report().records < 96:
        seen.update(index for _, ids in take(batches, 1) for _, index in ids)
    assert not set(seen) & {str(i) for i in bad}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == batches.report().num_bad
    assert {(line["kind"], line["source"], line["index"]) for line in lines} == {
        (kind, "set", index) for index, kind in bad.items()
    }
    assert "broken" not in lines[0]["message"]
    assert all(line["message"] for line in lines)
    assert set(batches.report().bad_by_name()) == {"set/image", "set/unsupervised", "set/too_long"}
    # deterministic: a second run skips the same and gives the same batches
    other = build_batches(mixture, encoder, config, num_workers=1)
    first = build_batches(mixture, encoder, config)
    assert all(equal(a, b) and x == y for (a, x), (b, y) in zip(take(other, 6), take(first, 6), strict=True))
    other.close()


def test_too_much_bad_data_stops_the_run(encoder, tmp_path):
    bad = dict.fromkeys(range(0, 60, 4), "unsupervised")
    config = BatchLayout(tokens_per_row=200, window=16, max_bad_share=0.1, min_records=40)
    batches = build_batches(Mixture([MixtureSource("set", Made(60, bad))]), encoder, config)
    with pytest.raises(ValueError, match=r"of \d+ records are bad .*allows 10\.0%.*unsupervised in set.*The last"):
        take(batches, 30)
    assert batches.report().records >= 40


def test_a_batch_whose_images_are_all_broken_teaches_nothing_but_comes(encoder):
    config = BatchLayout(tokens_per_row=200, global_batch_size=1, window=4, max_bad_share=1.0)
    for mode in (config, BatchLayout(mode="padded", batch_size=1, global_batch_size=1, window=4, max_bad_share=1.0)):
        mixture = Mixture([MixtureSource("set", Made(4, dict.fromkeys(range(4), "image")))])
        batch = next(build_batches(mixture, encoder, mode))
        assert batch["input_ids"].shape == (1, 1)
        assert (batch["labels"] == -100).all()
        assert "pixel_values" not in batch


def test_endless_bad_windows_end(encoder):
    mixture = Mixture([MixtureSource("set", Made(4, dict.fromkeys(range(4), "unsupervised")))])
    with pytest.raises(ValueError, match=r"\d+ records in a row are bad; the last: "):
        next(build_batches(mixture, encoder, BatchLayout(tokens_per_row=200, window=1, min_records=10**9)))


def test_samples_longer_than_a_row(parts, encoder):
    config = BatchLayout(tokens_per_row=60, global_batch_size=1, window=16, max_bad_share=1.0)
    strict = RecordEncoder(parts[1])
    mixture = mixture_of()
    with pytest.raises(ValueError, match=r"tokens, more than packing\.tokens_per_row=60\. Raise it"):
        take(build_batches(mixture, strict, config), 20)
    dropping = build_batches(mixture, RecordEncoder(parts[1], on_long="drop"), config)
    take(dropping, 5)
    assert {kind for kind, _ in dropping.report().bad} == {"too_long"}
    with pytest.raises(ValueError, match=r"max_length 200 exceeds packing\.tokens_per_row 60"):
        build_batches(mixture, encoder, config)
    images = BatchLayout(tokens_per_row=200, max_images_per_row=1, global_batch_size=1, max_bad_share=1.0, window=16)
    limited = build_batches(mixture, encoder, images)
    assert all("pixel_values" not in b or len(b["pixel_values"]) == 1 for b, _ in take(limited, 5))
    assert limited.report().num_bad > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_user_errors_in_workers_arrive_as_they_are(parts, workers):
    config = BatchLayout(tokens_per_row=60, global_batch_size=1, window=16)
    batches = build_batches(mixture_of(), RecordEncoder(parts[1]), config, num_workers=workers)
    with pytest.raises(
        ValueError, match=r"^record .* more than packing\.tokens_per_row=60\. Raise it, or set on_long to drop$"
    ):
        take(batches, 20)
    batches.close()


def test_length_grouping_pads_less(encoder):
    efficiency = {}
    for group in (True, False):
        config = BatchLayout(mode="padded", batch_size=4, global_batch_size=4, window=64, group_by_length=group)
        batches = build_batches(mixture_of(), encoder, config)
        take(batches, 16)
        efficiency[group] = batches.report().efficiency
    assert efficiency[True] > efficiency[False] + 0.1


def test_fixed_shapes_for_compilers(encoder):
    config = BatchLayout(tokens_per_row=256, global_batch_size=2, batch_size=2, window=16, pad_to_max_length=True)
    assert {tuple(b["input_ids"].shape) for b, _ in take(build_batches(mixture_of(), encoder, config), 4)} == {(2, 256)}


@pytest.mark.parametrize(
    "attention", ["sdpa", "sdpa_varlen", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_other_samples_logits_do_not_move(encoder, attention):
    model, _ = tiny_model()
    model.set_attn_implementation({"text_config": attention})
    config = BatchLayout(tokens_per_row=400, max_images_per_row=6, global_batch_size=1, window=16)
    batch = next(build_batches(mixture_of(), encoder, config))
    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    assert len(starts) >= 4
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        changed = dict(inputs)
        changed["input_ids"] = inputs["input_ids"].clone()
        span = slice(starts[1], starts[2])
        text = changed["input_ids"][0, span] > 20
        changed["input_ids"][0, span][text] = 40
        assert not torch.equal(changed["input_ids"], inputs["input_ids"])
        after = model(**changed, use_cache=False).logits
    assert torch.equal(before[:, : starts[1]], after[:, : starts[1]])
    assert torch.equal(before[:, starts[2] :], after[:, starts[2] :])
    assert not torch.allclose(before[:, span], after[:, span])


def test_estimated_steps(encoder):
    mixture = mixture_of()
    assert count_steps(mixture, encoder, PADDED, epochs=2) == -(-2 * len(mixture) // 8)
    steps = count_steps(mixture, encoder, PACKED, epochs=3)
    batches = build_batches(mixture, encoder, PACKED)
    take(batches, steps)
    assert abs(batches.report().samples / len(mixture) - 3) < 0.35


def test_the_data_does_not_touch_the_random_state(encoder):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    batches = build_batches(mixture_of(), encoder, PACKED, num_workers=1)
    next(batches)
    batches.close()
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "paked"}, "'packed'"),
        ({"window": 0}, "window must be at least 1"),
        ({"batch_size": 3, "global_batch_size": 8}, "must be a multiple"),
        ({"max_bad_share": 2.0}, "between 0 and 1"),
        ({"mode": "padded", "batch_size": 8, "window": 4}, "at least one batch"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchLayout(**options)


def test_wrong_worlds_and_states_are_refused(encoder):
    with pytest.raises(ValueError, match="3 processes cannot share them evenly"):
        build_batches(mixture_of(), encoder, PACKED, world_size=3)
    with pytest.raises(ValueError, match="must not be negative"):
        build_batches(mixture_of(), encoder, PACKED, start_step=-1)
    batches = build_batches(mixture_of(), encoder, PACKED)
    take(batches, 1)
    state = batches.state()
    with pytest.raises(ValueError, match=r"packing\.tokens_per_row was 200 at the checkpoint and is 220 now"):
        build_batches(
            mixture_of(),
            encoder,
            BatchLayout(tokens_per_row=220, max_images_per_row=3, global_batch_size=4, window=16),
            start_step=1,
            state=state,
        )
    with pytest.raises(ValueError, match="of step 1, the run resumes at step 2"):
        build_batches(mixture_of(), encoder, PACKED, start_step=2, state=state)
    old = {**state, "cursors": {}, "fingerprint": {k: v for k, v in state["fingerprint"].items() if k != "order"}}
    with pytest.raises(ValueError, match="draws records in order 1, this version in order 2"):
        build_batches(mixture_of(), encoder, PACKED, start_step=1, state=old)
    with pytest.raises(ValueError, match="sources was"):
        build_batches(mixture_of(size=59), encoder, PACKED, start_step=1, state=state)
    with pytest.raises(ValueError, match="different steps"):
        merge_states([state, {**state, "step": 9}])


def test_every_rank_counts_its_share_of_the_records(encoder):
    bad = dict.fromkeys(range(0, 60, 6), "unsupervised")
    config = BatchLayout(tokens_per_row=200, global_batch_size=3, window=16, max_bad_share=1.0)

    def reports(world):
        mixture = Mixture([MixtureSource("set", Made(60, bad))])
        ranks = [build_batches(mixture, encoder, config, rank=rank, world_size=world) for rank in range(world)]
        return [(take(rank, 8), rank.report())[1] for rank in ranks]

    (whole,) = reports(1)
    shares = reports(3)
    assert sum(report.records for report in shares) == whole.records
    assert sum((report.bad for report in shares), Counter()) == whole.bad
    windows = whole.records // 15
    assert max(report.records for report in shares) - min(report.records for report in shares) <= windows


def test_counts_and_the_list_of_bad_records_go_on_where_the_checkpoint_is(encoder, tmp_path):
    path = tmp_path / "bad.jsonl"
    bad = dict.fromkeys(range(0, 60, 3), "unsupervised")
    config = BatchLayout(
        tokens_per_row=200, global_batch_size=2, window=8, max_bad_share=1.0, bad_records_file=str(path)
    )

    def build(rank=0, world=1, step=0, state=None):
        mixture = Mixture([MixtureSource("set", Made(60, bad))])
        return build_batches(mixture, encoder, config, 0, rank, world, step, state=state)

    whole = build()
    take(whole, 3)
    state = json.loads(json.dumps(whole.state()))
    take(whole, 3)
    expected = path.read_text()
    take(build(step=3, state=state), 3)  # after a kill
    assert path.read_text() == expected
    take(build(), 6)  # without a checkpoint
    assert path.read_text() == expected
    counts = Counter()
    for rank in range(2):
        counts.update(build(rank, 2, 3, state).report().bad)
    assert counts == Counter({("unsupervised", "set"): state["reports"]["0"]["bad"][0][2]})


def test_all_rows_within_the_limit_are_measured(encoder, monkeypatch):
    measured = []

    def get(self, number, original=WindowPlanner.__getitem__):
        measured.append(number)
        return original(self, number)

    monkeypatch.setattr(WindowPlanner, "__getitem__", get)
    mixture = mixture_of()
    for epochs in (0.5, 1.5):
        measured.clear()
        count_steps(mixture, encoder, PACKED, epochs, limit=int(len(mixture) * epochs))
        assert measured == list(range(len(measured)))


def test_a_state_of_an_earlier_version_lacks_keys(encoder):
    batches = build_batches(mixture_of(), encoder, PACKED)
    take(batches, 1)
    state = batches.state()
    with pytest.raises(ValueError, match="shuffle was True at the checkpoint and is False now"):
        build_batches(mixture_of(shuffle=False), encoder, PACKED, start_step=1, state=state)
    del state["fingerprint"]["shuffle"]
    build_batches(mixture_of(), encoder, PACKED, start_step=1, state=state)
    with pytest.raises(ValueError, match="views was None"):
        check_fingerprint({}, {"views": [{"full": 1}, 0.0]})
