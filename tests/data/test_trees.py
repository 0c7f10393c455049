"""Message trees: pairs that share a picture, equality with separate samples, and the guarantees of packing."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter

import pytest
import torch
from PIL import Image

from florence_vl.data.collate import PackedCollator
from florence_vl.data.encode import IGNORE, RecordEncoder
from florence_vl.data.mixture import Mixture, MixtureSource
from florence_vl.data.packing import BatchLayout, build_batches, count_steps, merge_states
from florence_vl.data.records import ImageRef, Record
from florence_vl.data.trees import (
    Leaf,
    compare_layouts,
    grow_trees,
    join_samples,
    keep_pictures_together,
    measure_leaf,
    picture_key,
    split_turns,
    tree_tokens,
    trunk_length,
)
from florence_vl.model.tiny import TINY_LLMS, tiny_model, tiny_processor


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), (number, 40, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def turn(question, answer, images=0):
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


class Album:
    """A reader: the questions of a picture are records of `turns` turns each; every seventh record has no picture.

    Args:
        pictures: Number of pictures.
        questions: Records of each picture.
        turns: Turns of a record.
        broken: Pictures that can't be decoded.
    """

    def __init__(self, pictures=8, questions=5, turns=1, broken=()):
        self.pictures, self.questions, self.turns, self.broken = pictures, questions, turns, broken

    def __len__(self):
        return self.pictures * self.questions

    def __getitem__(self, index):
        picture = index % self.pictures
        shown = 0 if index % 7 == 6 else 1
        messages = []
        for number in range(self.turns):
            answer = "car house dog " * (1 + (index + number) % 4) + str(index)
            messages += turn(f"Q{index}.{number}?", answer, shown * (number == 0))
        image = b"not an image" if picture in self.broken else png(picture)
        return Record(str(index), "album", messages, [image] * shown)


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


@pytest.fixture(scope="module")
def encoder(parts):
    return RecordEncoder(parts[1], max_length=200, on_long="drop")


TREES = BatchLayout(tokens_per_row=200, max_images_per_row=3, batch_size=2, global_batch_size=4, window=32, trees=True)
SPLIT = BatchLayout(**{**vars(TREES), "split_turns": True})


def mixture_of(**options):
    sources = [MixtureSource("a", Album(**options)), MixtureSource("b", Album(3, 4, **options), 2.0)]
    return Mixture(sources, seed=5)


def take(batches, steps):
    return [(next(batches), list(batches.ids)) for _ in range(steps * batches.batches_per_rank)]


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_turns_about_a_picture_become_records_with_it():
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    record = Record("7", "set", [system, *turn("What?", "A cat.", 2), *turn("Where?", "Here.")], [b"a", b"b"])
    first, second = split_turns(record)
    assert first.messages == [system, *turn("What?", "A cat.", 2)]
    assert second.messages == [system, *turn("Where?", "Here.", 2)]
    assert (second.id, second.source, second.images) == ("7", "set", [b"a", b"b"])
    late = [*turn("What?", "A cat.", 1), *turn("And this?", "A dog.", 1)]
    behind = [{"role": "user", "content": [{"type": "text", "text": "In"}, {"type": "image"}]}, turn("", "A cat.")[1]]
    for messages, images in [
        (turn("What?", "A cat.", 1), 1),
        ([*turn("Hello", "Hi"), *turn("Bye", "Bye")], 0),
        (late, 2),
        ([*behind, *turn("Where?", "Here.")], 1),
        ([*turn("What?", "A cat.", 1), turn("Where?", "")[0]], 1),
    ]:
        whole = Record("8", "set", messages, [b"a"] * images)
        assert split_turns(whole) == [whole]


def test_pictures_are_told_apart_by_place_and_content():
    def key(*images):
        return picture_key(Record("1", "set", [], list(images)))

    assert key("a.png") == key("a.png") != key("b.png")
    assert key(b"1", "a.png") == key(b"1", "a.png") != key("a.png", b"1")
    assert key(ImageRef("x.tar", 0, 9, name="a.png")) != key(ImageRef("y.tar", 0, 9, name="a.png"))
    assert key() is None
    assert key(Image.new("RGB", (1, 1))) is None


def test_leaves_of_a_picture_grow_into_trees_within_the_budget():
    found = [(9, b"a"), (6, b"b"), (8, None), (7, b"a"), (9, b"a"), (5, b"a"), (8, None)]
    leaves = [Leaf(tokens, 1, 0, 4, picture) for tokens, picture in found]
    trees = grow_trees(leaves, 15)
    assert trees == [[0, 3], [1], [2], [4, 5], [6]]
    assert [tree_tokens([leaves[i] for i in tree]) for tree in trees] == [12, 6, 8, 10, 8]


def test_records_of_a_picture_follow_each_other_and_each_is_drawn_once_a_pass():
    reader = Album(pictures=30)
    together = keep_pictures_together(reader)
    mixture = Mixture([MixtureSource("a", reader, together=together)], seed=2)
    passes = [[mixture.locate(position)[1] for position in range(start, start + 150)] for start in (0, 150, 300, 0)]
    for order in passes:
        assert sorted(order) == list(range(150))
        pictures = [index % 30 for index in order if index % 7 != 6]
        alone = sum(index % 7 == 6 for index in order)
        pictured = [index % 30 if index % 7 != 6 else -index for index in order]
        assert len(list(itertools.groupby(pictured))) == len(set(pictures)) + alone
    assert passes[0] == passes[3]
    assert passes[0] != passes[1] != passes[2]
    assert keep_pictures_together(Album(pictures=5, questions=1)) is None


def test_what_is_learned_before_or_right_behind_a_picture_is_not_shared(encoder, parts):
    image = parts[1].image_token_id
    sample = encoder.outline(Album()[0])
    trunk = trunk_length(sample, image)
    assert sample.input_ids[trunk - 1] == image
    assert image not in sample.input_ids[trunk:]
    two = Record("2", "set", [*turn("What?", "A cat.", 1), *turn("And this?", "A dog.", 1)], [b"a", b"b"])
    assert trunk_length(encoder.outline(two), image) == 0
    sample.labels[trunk] = 9  # as in LLaVA's pretraining, where the caption directly follows the picture
    assert trunk_length(sample, image) == 0
    assert trunk_length(encoder.outline(Album()[6]), image) == 0
    assert measure_leaf(encoder, Album()[6]).picture is None


def test_a_row_holds_each_pair_as_if_it_stood_alone(encoder, parts):
    image = parts[1].image_token_id
    records = [Album()[index] for index in (0, 8, 16)]
    samples = [encoder(record) for record in records]
    tree = join_samples(samples, image)
    trunk = trunk_length(samples[0], image)
    assert len(tree) == sum(map(len, samples)) - 2 * trunk
    assert tree.num_images == 1
    assert tree.num_supervised == sum(sample.num_supervised for sample in samples)
    other = encoder(Album()[1])
    batch = PackedCollator(0)([[other, tree]])
    assert (batch["branch_ids"][0, : len(other) + trunk] == 0).all()
    for number, sample in enumerate(samples, start=1):
        columns = [*range(len(other), len(other) + trunk), *(batch["branch_ids"][0] == number).nonzero()[:, 0].tolist()]
        assert torch.equal(batch["input_ids"][0, columns], sample.input_ids)
        assert torch.equal(batch["labels"][0, columns], sample.labels)
        assert torch.equal(batch["position_ids"][0, columns], torch.arange(len(sample)))
    assert "branch_ids" not in PackedCollator(0)([[other, samples[0]]])


@pytest.mark.parametrize(("layout", "pairs", "epochs", "world"), [(TREES, 1, 2, 1), (TREES, 1, 1, 2), (SPLIT, 3, 1, 2)])
def test_an_epoch_draws_each_record_as_often_as_its_weight_says(encoder, layout, pairs, epochs, world):
    mixture = mixture_of(turns=3)
    steps = count_steps(mixture, encoder, layout, epochs)
    ranks = [build_batches(mixture, encoder, layout, rank=rank, world_size=world) for rank in range(world)]
    drawn = [Counter(pair for rank in ranks for _, ids in take(rank, 1) for pair in ids) for _ in range(steps)]
    counts, last = sum(drawn, Counter()), drawn[-1]
    for source, index, passes in [("a", i, 1) for i in range(40)] + [("b", i, 2) for i in range(12)]:
        whole = index % 7 == 6  # without a picture a record is never split
        expected = epochs * passes * (1 if whole else pairs)
        found = counts[source, str(index)]
        assert expected <= found <= expected + last[source, str(index)]


def test_pictures_are_computed_once_a_tree(encoder):
    mixture = mixture_of(turns=3)
    images = []  # per sample
    for options in ({"trees": False}, {}, {"split_turns": True}):
        layout = BatchLayout(**{**vars(TREES), "tokens_per_row": 600, **options})
        batches = build_batches(mixture, encoder, layout)
        total = 0
        for batch, _ in take(batches, 6):
            shown = len(batch.get("pixel_values", ()))
            assert shown <= (batch["position_ids"] == 0).sum()
            assert shown <= layout.batch_size * layout.max_images_per_row
            total += shown
            assert batch["input_ids"].shape[1] <= layout.tokens_per_row
        images.append(total / batches.report().samples)
    assert images[0] > 0.7  # of seven samples one has no picture
    assert images[1] < 0.7 * images[0]
    assert images[2] < 0.6 * images[1]


@pytest.mark.parametrize("layout", [TREES, SPLIT], ids=["records", "turns"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_step_gives_the_same_bits(encoder, layout, workers):
    def build(**options):
        return build_batches(mixture_of(turns=2), encoder, layout, num_workers=workers, **options)

    whole = build()
    expected, states = [], []
    for _ in range(6):
        states.append(json.loads(json.dumps(whole.state())))
        expected.append(take(whole, 1))
    whole.close()
    for start, state in itertools.product((0, 3, 5) if workers == 0 else (3,), (True, False)):
        batches = build(start_step=start, state=states[start] if state else None)
        for step in range(start, 6):
            for (batch, ids), (wanted, wanted_ids) in zip(take(batches, 1), expected[step], strict=True):
                assert ids == wanted_ids
                assert equal(batch, wanted)
        batches.close()
    plain = BatchLayout(**{**vars(layout), "trees": False, "split_turns": False})
    with pytest.raises(ValueError, match=r"packing\.trees was .* at the checkpoint and is None now"):
        build_batches(mixture_of(turns=2), encoder, plain, start_step=3, state=states[3])


def test_a_step_holds_the_same_pairs_for_every_world_size(encoder):
    def steps(size, first, count, state=None):
        ranks = [
            build_batches(mixture_of(turns=2), encoder, SPLIT, 0, rank, size, first, state=state)
            for rank in range(size)
        ]
        found = [[batch for rank in ranks for batch, _ in take(rank, 1)] for _ in range(count)]
        return found, merge_states([rank.state() for rank in ranks])

    expected, _ = steps(1, 0, 4)
    found, state = steps(2, 0, 2)
    found += steps(2, 2, 1, state)[0] + steps(1, 3, 1)[0]
    for step, wanted in zip(found, expected, strict=True):
        assert all(equal(batch, other) for batch, other in zip(step, wanted, strict=True))


def test_a_broken_picture_costs_each_of_its_records_once(encoder):
    layout = BatchLayout(**{**vars(SPLIT), "max_bad_share": 1.0, "window": 40})
    mixture = Mixture([MixtureSource("a", Album(turns=3, broken=(2,)))])
    batches = build_batches(mixture, encoder, layout)
    steps = count_steps(mixture, encoder, layout)
    drawn = Counter(number for _, ids in take(batches, steps) for _, number in ids)
    pictured = [i for i in range(40) if i % 8 == 2 and i % 7 != 6]
    assert not set(map(str, pictured)) & set(drawn)
    assert batches.report().bad["image", "a"] >= len(pictured)
    found = Counter(batches.report().bad)
    assert set(found) == {("image", "a")}


def test_a_pair_that_is_too_long_leaves_the_others_of_its_record(parts):
    class One:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            messages = [*turn("Q0?", "car", 1), *turn("Q1?", "street " * 300), *turn("Q2?", "dog")]
            return Record("0", "one", messages, [png(1)])

    encoder = RecordEncoder(parts[1], max_length=100, on_long="drop")
    layout = BatchLayout(**{**vars(SPLIT), "max_bad_share": 1.0})
    batches = build_batches(Mixture([MixtureSource("one", One())]), encoder, layout)
    batch, ids = take(batches, 1)[0]
    assert ids == [("one", "0")] * 4  # two rows of two pairs
    assert batch["branch_ids"].max() == 2
    assert set(batches.report().bad) == {("too_long", "one")}
    assert batches.report().num_bad == batches.report().records


@pytest.mark.parametrize("llm", TINY_LLMS)
def test_loss_and_gradients_are_those_of_separate_samples(llm):
    """Of a step of two micro-batches, for every parameter of tower, projector and LLM."""
    model, processor = tiny_model(llm)
    encoder = RecordEncoder(processor, max_length=160)
    layout = BatchLayout(tokens_per_row=160, batch_size=1, global_batch_size=2, window=40, trees=True)
    batches = build_batches(Mixture([MixtureSource("a", Album(questions=6))], seed=1), encoder, layout)
    step = take(batches, 1)
    assert any("branch_ids" in batch for batch, _ in step)
    samples = [encoder(Album(questions=6)[int(number)]) for _, ids in step for _, number in ids]
    items = sum(sample.num_supervised for sample in samples)
    assert items == sum(int((batch["labels"] != IGNORE).sum()) for batch, _ in step)
    found = []
    alone = [
        {"input_ids": s.input_ids[None], "labels": s.labels[None], "pixel_values": s.pixel_values} for s in samples
    ]
    for attention, inputs in (("sdpa_varlen", [batch for batch, _ in step]), ("sdpa", alone)):
        model.set_attn_implementation({"text_config": attention})
        model.zero_grad()
        losses = [model(**one, num_items_in_batch=items).loss for one in inputs]
        total = torch.stack(losses).sum()
        total.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((total.detach(), gradients))
    (loss, trees), (expected, separate) = found
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert trees.keys() == separate.keys()
    for name in trees:
        torch.testing.assert_close(trees[name], separate[name], rtol=1e-4, atol=1e-6, msg=name)


def test_what_trees_would_save_is_counted(encoder, parts):
    image = parts[1].image_token_id
    reader = Album(pictures=4, questions=3, turns=2)
    found = compare_layouts(reader, encoder, len(reader), len(reader), 10**6)
    records = [reader[index] for index in range(12)]
    turns = [part for record in records for part in split_turns(record)]
    trees = {}
    for name, parts_ in (("records", records), ("turns", turns)):
        samples = [encoder(part) for part in parts_]
        assert found[name] == (sum(map(len, samples)), sum(sample.num_images for sample in samples))
        by_picture = {}
        for record, sample in zip(parts_, samples, strict=True):
            by_picture.setdefault(picture_key(record) or len(by_picture), []).append(sample)
        trees[name] = [join_samples(group, image) for group in by_picture.values()]
        shown = sum(sample.num_images for sample in trees[name])
        assert found[f"{name} as trees"] == (sum(map(len, trees[name])), shown)
    assert found["records"][1] == 11
    assert found["records as trees"][1] == found["turns as trees"][1] == 4
    apart = compare_layouts(reader, encoder, len(reader), 1, 10**6)
    assert apart["records as trees"] == apart["records"] == found["records"]


def test_trees_are_refused_where_pictures_depend_on_the_question(parts):
    with pytest.raises(ValueError, match=r"packing\.trees needs packed rows"):
        BatchLayout(mode="padded", trees=True)
    with pytest.raises(ValueError, match=r"packing\.split_turns needs packing\.trees"):
        BatchLayout(split_turns=True)
    processor = tiny_processor()
    processor.question_context = True
    with pytest.raises(ValueError, match="pictures whose tokens are the same for every question"):
        build_batches(mixture_of(), RecordEncoder(processor, max_length=200), TREES)
