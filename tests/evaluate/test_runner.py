"""The runner: batched and single answers agree, images are encoded once, interrupted runs resume, runs never mix."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from florence_vl.evaluate.answer import Answer, Answerer, batches
from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.local import (
    LocalAnswerer,
    folder_fingerprint,
    load_answerer,
    split_lengths,
)
from florence_vl.evaluate.question import BytesPicture, Question
from florence_vl.evaluate.runner import EvaluationPlan, describe, open_results, plan, run, shard
from florence_vl.evaluate.scoring import score_folder
from florence_vl.evaluate.store import ResultsFolder, append_lines, read_lines
from florence_vl.evaluate.suites import choose
from florence_vl.model.tiny import tiny_model

SMALL = "pope,mme,mmvp,docvqa_val,mmmu_val,cv_bench"


@pytest.fixture(scope="module")
def small_plan(benchmark_folder: Path) -> EvaluationPlan:
    return plan(choose(SMALL), lambda benchmark: benchmark.questions(benchmark_folder))


class Scripted(Answerer):
    """Answers from a function, and remembers what it was asked."""

    def __init__(self, say: Any = lambda q: "yes", name: str = "scripted", fail_after: int | None = None) -> None:
        self.identity = {"model": name}
        self.batch_size = 3
        self.say, self.fail_after = say, fail_after
        self.asked: list[tuple[str, str]] = []

    def answer(self, questions: Sequence[Question], generation: Generation) -> list[Answer]:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += [(q.benchmark, q.id) for q in questions]
        said = [self.say(q) for q in questions]
        return [word if isinstance(word, Answer) else Answer(word) for word in said]

    def close(self) -> None:
        pass


def answers(answerer: LocalAnswerer, questions: Sequence[Question], tokens: int = 10) -> dict[tuple[str, str], Answer]:
    found = answerer.answer_all(questions, Generation(tokens))
    return {(question.benchmark, question.id): answer for question, answer in zip(questions, found, strict=True)}


@pytest.mark.parametrize(("llm", "seed"), [("llama", 0), pytest.param("gemma3_text", 1, marks=pytest.mark.slow)])
def test_batches_answer_as_plain_generate_does(llm: str, seed: int, small_plan: EvaluationPlan) -> None:
    model, processor = tiny_model(llm, seed=seed)
    questions = [q for name in ("pope", "docvqa_val", "mmmu_val") for q in small_plan.questions[name]]
    shared = answers(LocalAnswerer(model, processor, 8), questions, tokens=6)
    unshared = answers(LocalAnswerer(model, processor, 8, share_prefix=False), questions, tokens=6)
    texts = []
    for question in questions:
        chat = [{"role": "user", "content": question.content()}]
        images = iter(question.images)
        for part in chat[0]["content"]:
            if part["type"] == "image":
                part["image"] = next(images).read()
        inputs = processor.apply_chat_template(
            [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs.pop("mm_token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(out, skip_special_tokens=True))
        key = (question.benchmark, question.id)
        assert shared[key].text == unshared[key].text == texts[-1]
    assert len(set(texts)) > 1


def test_answers_stand_in_the_order_of_the_questions() -> None:
    # Ids repeat between benchmarks, batches are ordered by picture and length, and one question is asked twice.
    questions = [Question(str(i % 5), f"b{i // 5}", ("x" * (13 * i % 7),), (P(str(i % 4)),)) for i in range(20)]
    questions.append(questions[3])
    answerer = Scripted(lambda q: f"{q.benchmark}/{q.id}/{q.text}")
    found = answerer.answer_all(questions, Generation())
    assert [answer.text for answer in found] == [f"{q.benchmark}/{q.id}/{q.text}" for q in questions]
    assert answerer.asked != [(q.benchmark, q.id) for q in questions]
    assert sorted(answerer.asked) == sorted((q.benchmark, q.id) for q in questions)
    assert answerer.answer_all([], Generation()) == []
    answerer.batch_size = 0
    with pytest.raises(ValueError, match="at least 1"):
        answerer.answer_all(questions, Generation())


def test_answers_to_all_are_those_to_each_alone(small_plan: EvaluationPlan) -> None:
    model, processor = tiny_model(seed=1)
    for part in (model.model.multi_modal_projector, model.model.language_model.layers):
        for parameter in part.parameters():
            parameter.data *= 5  # small random weights see little: let pictures and words matter
    questions = [q for name in ("pope", "docvqa_val", "mmmu_val", "cv_bench") for q in small_plan.questions[name]]
    together = LocalAnswerer(model, processor, batch_size=4).answer_all(questions, Generation(5))
    alone = LocalAnswerer(model, processor, batch_size=1)
    assert together == [alone.answer([question], Generation(5))[0] for question in questions]
    assert len({answer.text for answer in together}) > 2
    assert [q for batch in batches(questions, 4) for q in batch] != questions


def test_an_image_is_encoded_once(small_plan: EvaluationPlan) -> None:
    model, processor = tiny_model()
    questions = small_plan.questions["docvqa_val"] + small_plan.questions["pope"]
    calls: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda tower, args: calls.append(len(args[0])))
    answerer = LocalAnswerer(model, processor, batch_size=2)
    answers(answerer, questions, tokens=2)
    assert len(questions) == 6
    assert sum(calls) == answerer.encoded_images == 3
    answerer.close()
    answers(answerer, questions[:1], tokens=2)
    assert sum(calls) == 4


def test_the_image_cache_is_bounded(small_plan: EvaluationPlan) -> None:
    model, processor = tiny_model()
    answerer = LocalAnswerer(model, processor, batch_size=1, cached_images=2)
    answers(answerer, small_plan.questions["cv_bench"], tokens=1)
    assert answerer.encoded_images == 3
    assert len(answerer._cache) == 2


def test_running_into_the_limit_is_known(small_plan: EvaluationPlan) -> None:
    model, processor = tiny_model()
    question = small_plan.questions["pope"][0]
    answerer = LocalAnswerer(model, processor)
    (cut,) = answerer.answer([question], Generation(3))
    assert (cut.finished, cut.tokens) == (False, 3)
    ids = processor.tokenizer(cut.text, add_special_tokens=False)["input_ids"]
    (first,) = answerer.answer([question], Generation(1))
    stop = processor.tokenizer(first.text, add_special_tokens=False)["input_ids"][0]
    assert ids[0] == stop
    answerer._stop = [stop]
    (ended,) = answerer.answer([question], Generation(3))
    assert (ended.text, ended.finished, ended.tokens) == ("", True, 0)


def test_sampling_is_repeatable_and_differs_by_seed(small_plan: EvaluationPlan) -> None:
    model, processor = tiny_model()
    batch = small_plan.questions["pope"][:2]
    settings = Generation(3, temperature=1.5)
    first, again, other = (
        [a.text for a in LocalAnswerer(model, processor, seed=seed).answer(batch, settings)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_model_without_chat_template_is_refused() -> None:
    model, processor = tiny_model()
    processor.chat_template = None
    processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LocalAnswerer(model, processor)


def test_the_mode_of_the_model_is_left(small_plan: EvaluationPlan) -> None:
    model, processor = tiny_model()
    model.train()
    LocalAnswerer(model, processor).answer(small_plan.questions["pope"][:1], Generation(1))
    assert model.training


class P:
    """A picture that is only a key."""

    def __init__(self, key: str) -> None:
        self.key = key

    def read(self) -> bytes:
        return b""


@given(pictures=st.lists(st.integers(0, 6), min_size=1, max_size=60), size=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_batches_hold_every_question_once(pictures: list[int], size: int) -> None:
    questions = [Question(str(i), "b", ("x" * (i % 5),), (P(str(key)),)) for i, key in enumerate(pictures)]
    found = batches(questions, size)
    assert sorted(q.id for batch in found for q in batch) == sorted(q.id for q in questions)
    assert all(1 <= len(batch) <= size for batch in found)
    assert len(found) <= 2 * -(-len(questions) // size)


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=24), overhead=st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_splitting_never_costs_more_than_one_batch(lengths: list[int], overhead: int) -> None:
    parts = split_lengths(lengths, overhead)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    cost = sum(len(part) * max(lengths[i] for i in part) + overhead for part in parts)
    assert cost <= len(lengths) * max(lengths) + overhead
    assert cost <= sum(lengths) + overhead * len(lengths)


def test_a_long_row_stands_alone() -> None:
    assert split_lengths([10, 60, 11, 10, 12], overhead=20) == [[0, 3, 2, 4], [1]]
    assert split_lengths([10, 60, 11, 10, 12], overhead=1000) == [[0, 3, 2, 4, 1]]


def test_batches_keep_pictures_together() -> None:
    questions = [Question(str(i), "b", ("x" * (i % 7),), (P(str(i % 4)),)) for i in range(20)]
    found = batches(questions, 5)
    assert [len(batch) for batch in found] == [5] * 4
    assert all(len({q.picture_key for q in batch}) == 1 for batch in found)
    assert {q.id for batch in found for q in batch} == {q.id for q in questions}
    with pytest.raises(ValueError, match="at least 1"):
        batches(questions, 0)


def test_a_killed_run_goes_on_without_asking_twice(small_plan: EvaluationPlan, tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "run")
    first = Scripted(fail_after=6)
    open_results(folder, first, small_plan)
    with pytest.raises(KeyboardInterrupt):
        run(first, small_plan, folder)
    assert len(first.asked) == 6
    with folder.file.open("ab") as out:  # what a kill in the middle of a write leaves
        out.write(b'{"benchmark": "pope", "id": "3", "ans')
    second = Scripted()
    open_results(folder, second, small_plan)
    counted: list[int] = []
    assert run(second, small_plan, folder, counted.append) == {}
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == small_plan.total == sum(counted)
    third = Scripted()
    run(third, small_plan, folder)
    assert third.asked == []
    assert len(read_lines(folder.file)) == small_plan.total
    row = read_lines(folder.file)[0]
    assert {"prompt", "answer", "parsed", "score", "kind", "reference", "finished"} <= set(row)


def test_other_models_protocols_and_data_are_refused(
    small_plan: EvaluationPlan, benchmark_folder: Path, tmp_path: Path
) -> None:
    folder = ResultsFolder(tmp_path / "run")
    open_results(folder, Scripted(), small_plan)
    before = folder.description
    with pytest.raises(ValueError, match="another model: model is 'scripted' there, 'other' now"):
        open_results(folder, Scripted(name="other"), small_plan)
    authors = plan(choose("mmmu_val", "authors"), lambda benchmark: benchmark.questions(benchmark_folder))
    with pytest.raises(ValueError, match=r"'mmmu_val' under another protocol \(current, .*; now authors"):
        open_results(folder, Scripted(), authors)
    (pope,) = choose("pope")
    fewer = plan([pope], lambda benchmark: benchmark.questions(benchmark_folder)[:2])
    with pytest.raises(ValueError, match="another protocol"):
        open_results(folder, Scripted(), fewer)
    pictures = {name: [replace(q, images=[]) for q in asked] for name, asked in small_plan.questions.items()}
    redrawn = plan(list(small_plan.benchmarks.values()), lambda benchmark: pictures[benchmark.name])
    assert redrawn.fingerprints == small_plan.fingerprints
    with pytest.raises(ValueError, match="about other pictures"):
        open_results(folder, Scripted(), redrawn)
    shutil.copytree(benchmark_folder, tmp_path / "data")
    for file in (tmp_path / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(file), file, compression="none", use_dictionary=False)
    resaved = plan([pope], lambda benchmark: benchmark.questions(tmp_path / "data"))
    first = plan([pope], lambda benchmark: benchmark.questions(benchmark_folder))
    assert resaved.fingerprints == first.fingerprints
    assert resaved.pictures != first.pictures, "POPE's keys are names, so files of another size are other pictures"
    assert folder.description == before
    moved = ResultsFolder(tmp_path / "moved")
    for name in ("first", "renamed"):  # the same weights elsewhere
        answerer = Scripted()
        answerer.identity = {"model": name, "fingerprint": "f", "dtype": "float32"}
        open_results(moved, answerer, small_plan)
    answerer.identity = {"model": "renamed", "fingerprint": "f", "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="dtype is 'float32' there, 'bfloat16' now"):
        open_results(moved, answerer, small_plan)
    more = plan(choose("gqa"), lambda benchmark: benchmark.questions(benchmark_folder))
    open_results(folder, Scripted(), more)  # another benchmark of the same model is welcome
    assert set(folder.description["benchmarks"]) == {*small_plan.questions, "gqa"}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    with pytest.raises(ValueError, match="has files but no results"):
        open_results(ResultsFolder(tmp_path / "notes"), Scripted(), small_plan)


def test_a_limit_is_extended_by_the_next_run(benchmark_folder: Path, tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "run")
    chosen = choose("pope")
    first, second = Scripted(), Scripted()
    small = plan(chosen, lambda benchmark: benchmark.questions(benchmark_folder), limit=2)
    open_results(folder, first, small)
    run(first, small, folder)
    whole = plan(chosen, lambda benchmark: benchmark.questions(benchmark_folder))
    open_results(folder, second, whole)
    run(second, whole, folder)
    assert (len(first.asked), len(second.asked)) == (2, 2)
    assert score_folder(folder.path, draws=0).benchmarks["pope"].complete
    # Answers to other questions would count, under the name of the smaller sample.
    with pytest.raises(ValueError, match=r"'pope' for all questions \(seed 0\), .* for a sample of 2 \(seed 0\)"):
        open_results(folder, Scripted(), small)


@pytest.mark.parametrize(
    ("name", "limit", "seed", "fits"),
    [("pope", 2, 1, False), ("pope", 3, 1, False), ("pope", None, 1, True), ("pope", 3, 0, True), ("pope", 1, 0, False),
     ("mmvet", None, 1, False), ("mmvet", None, 0, True)],
)  # fmt: skip
def test_only_a_larger_sample_extends_a_sample(
    name: str, limit: int | None, seed: int, fits: bool, benchmark_folder: Path, tmp_path: Path
) -> None:
    chosen = choose(name, "authors")  # MM-Vet with sampled answers, which the seed changes
    made = [
        plan(chosen, lambda benchmark: benchmark.questions(benchmark_folder), *pair) for pair in ((2, 0), (limit, seed))
    ]
    folder = ResultsFolder(tmp_path / "run")
    open_results(folder, Scripted(), made[0])
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="would be mixed"):
        open_results(folder, Scripted(), made[1])


def test_unanswered_questions_make_a_score_incomplete(small_plan: EvaluationPlan, tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "run")
    lost = {("mme", "count/count/0.png"), ("pope", "0")}
    answerer = Scripted(lambda q: Answer("", error="HTTP 500") if (q.benchmark, q.id) in lost else "yes")
    open_results(folder, answerer, small_plan)
    failed = run(answerer, small_plan, folder)
    assert failed == {"mme": {"count/count/0.png": "HTTP 500"}, "pope": {"0": "HTTP 500"}}
    scores = score_folder(folder.path, draws=0)
    pope, mme = scores.benchmarks["pope"], scores.benchmarks["mme"]
    assert not pope.complete
    assert pope.note.startswith("incomplete: 1 of 4 questions unanswered; not the published benchmark")
    assert mme.scores["perception"] == 0  # the pair that lost a question is omitted, not counted as wrong or correct
    assert mme.scores["cognition"] == 50
    assert scores.benchmarks["mmvp"].complete
    mended = Scripted()
    assert run(mended, small_plan, folder) == {}
    assert set(mended.asked) == lost
    assert score_folder(folder.path, draws=0).benchmarks["pope"].complete


def test_shards_partition_the_pictures(small_plan: EvaluationPlan) -> None:
    parts = [shard(small_plan, rank, 3) for rank in range(3)]
    ids = [{(q.benchmark, q.id) for m in part.questions.values() for q in m} for part in parts]
    assert sum(map(len, ids)) == len(set.union(*ids)) == small_plan.total
    keys = [{q.picture_key for m in part.questions.values() for q in m if q.benchmark == "pope"} for part in parts]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert parts[0].fingerprints == small_plan.fingerprints


def test_ranks_write_files_of_their_own(small_plan: EvaluationPlan, tmp_path: Path) -> None:
    total = 0
    for rank in range(2):
        folder = ResultsFolder(tmp_path / "run", rank)
        open_results(folder, Scripted(), small_plan)
        answerer = Scripted()
        run(answerer, shard(small_plan, rank, 2), folder)
        folder.write_unanswered({"pope": {f"x{rank}": "gone"}})
        total += len(answerer.asked)
    assert total == small_plan.total == folder.count_answers()
    assert (tmp_path / "run" / "answers-1.jsonl").is_file()
    assert folder.unanswered() == {"pope": {"x0": "gone", "x1": "gone"}}
    ResultsFolder(tmp_path / "run", 1).write_unanswered({})
    assert folder.unanswered() == {"pope": {"x0": "gone"}}
    answered = next(key for name, key in folder.answers() if name == "pope")
    ResultsFolder(tmp_path / "run", 5).write_unanswered({"pope": {answered: "gone"}})  # of a run with more processes
    assert folder.unanswered() == {"pope": {"x0": "gone"}}
    assert all(score.complete for score in score_folder(tmp_path / "run", draws=0).benchmarks.values())


def test_a_line_that_another_process_is_writing_is_left_alone(small_plan: EvaluationPlan, tmp_path: Path) -> None:
    folders = [ResultsFolder(tmp_path / "run", rank) for rank in range(2)]
    for folder in folders:
        open_results(folder, Scripted(), small_plan)
    append_lines(folders[0].file, [{"benchmark": "pope", "id": "0"}])
    whole = folders[0].file.read_bytes()
    half = whole + b'{"benchmark": "pope", "id": "1", "ans'
    folders[0].file.write_bytes(half)
    assert list(folders[1].answers()) == [("pope", "0")]
    open_results(folders[1], Scripted(), small_plan)
    assert folders[0].file.read_bytes() == half
    open_results(folders[0], Scripted(), small_plan)  # its own writer, after a kill
    assert folders[0].file.read_bytes() == whole


def test_damaged_files_are_named(tmp_path: Path, small_plan: EvaluationPlan) -> None:
    folder = ResultsFolder(tmp_path / "run")
    open_results(folder, Scripted(), small_plan)
    append_lines(folder.file, [{"benchmark": "pope", "id": "0"}])
    folder.file.write_bytes(b"{not json}\n" + folder.file.read_bytes())
    with pytest.raises(ValueError, match=r"answers.jsonl, line 1 is damaged"):
        folder.answers()
    (tmp_path / "run" / "run.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="was not written by this version"):
        open_results(folder, Scripted(), small_plan)
    with pytest.raises(FileNotFoundError, match="no results"):
        score_folder(tmp_path)


def test_a_fingerprint_covers_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy whose projector is noise, with the same sizes and times, is another model."""
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))
    model, processor = tiny_model()
    processor.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "a")
    before = folder_fingerprint(tmp_path / "a")
    assert before == folder_fingerprint(tmp_path / "a")
    assert (tmp_path / "cache" / "fingerprints.json").is_file()
    weights = tmp_path / "a" / "model.safetensors"
    times = weights.stat()
    assert times.st_size > 1 << 20  # large enough for its digest to be kept
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder_fingerprint(tmp_path / "a") != before
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert folder_fingerprint(tmp_path / "a") == before
    template = tmp_path / "a" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert folder_fingerprint(tmp_path / "a") != before


def test_another_models_answers_are_not_taken(small_plan: EvaluationPlan, tmp_path: Path) -> None:
    model, processor = tiny_model()
    folder = ResultsFolder(tmp_path / "run")
    open_results(folder, LocalAnswerer(model, processor), small_plan)
    open_results(folder, LocalAnswerer(tiny_model()[0], processor), small_plan)
    other = tiny_model()[1]
    other.chat_template += " "
    with pytest.raises(ValueError, match="answers of another model: fingerprint"):
        open_results(folder, LocalAnswerer(model, other), small_plan)
    with torch.no_grad():
        next(model.model.multi_modal_projector.parameters())[0, 0] += 1e-3
    with pytest.raises(ValueError, match="answers of another model: fingerprint"):
        open_results(folder, LocalAnswerer(model, processor), small_plan)


def test_a_part_of_a_benchmark_is_not_the_whole(benchmark_folder: Path, tmp_path: Path) -> None:
    made = plan(choose("pope"), lambda benchmark: benchmark.questions(benchmark_folder))
    folder = ResultsFolder(tmp_path / "run")
    open_results(folder, Scripted(), made)
    run(Scripted(), made, folder)
    score = score_folder(folder.path, draws=0).benchmarks["pope"]
    assert score.note == "not the published benchmark: 4 questions in the data, 9000 are published"
    facts = describe(made)["pope"]
    assert (facts["size"], facts["available"]) == (9000, 4)
    (tmp_path / "data" / "pope").mkdir(parents=True)
    table = (benchmark_folder / "pope.parquet").read_bytes()
    (tmp_path / "data" / "pope" / "test-00001-of-00003.parquet").write_bytes(table)
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 files are there; missing: .*test-00000-of-00003.parquet, .*2-of"
    ):
        choose("pope")[0].questions(tmp_path / "data")


@pytest.mark.parametrize("own", [True, False])
def test_an_unreadable_picture_or_a_long_prompt_loses_one_question(
    own: bool, small_plan: EvaluationPlan, llava_folder: Path
) -> None:
    if own:
        model, processor = tiny_model()
        answerer = LocalAnswerer(model, processor, batch_size=8)
    else:
        answerer = load_answerer(str(llava_folder), batch_size=8)
    good = list(small_plan.questions["pope"][:2])
    broken = replace(good[0], id="broken", images=(BytesPicture(b"\xff\xd8\xff no picture"),))
    limit = answerer.model.config.get_text_config().max_position_embeddings
    long = replace(good[0], id="long", parts=(*good[0].parts, "word " * limit))
    found = answerer.answer([good[0], broken, long, good[1]], Generation(3))
    assert [answer.error is None for answer in found] == [True, False, False, True]
    assert "image 0 of pope question broken" in (found[1].error or "")
    told = rf"prompt has \d+ tokens, images included, which leaves no room in the LLM's context of {limit}"
    assert re.search(told, found[2].error or "")
    assert [found[0], found[3]] == answerer.answer(good, Generation(3))
    assert all(answer.error for answer in answerer.answer([broken, long], Generation(3)))


def test_an_answer_ends_where_the_context_does(small_plan: EvaluationPlan) -> None:
    model, processor = tiny_model()
    question = small_plan.questions["pope"][0]
    free = LocalAnswerer(model, processor).answer([question], Generation(8))[0]
    answerer = LocalAnswerer(model, processor)
    features = answerer.encode([question], answerer._open_pictures([question])[0])
    length = len(answerer.token_ids(question, features))
    model.config.text_config.max_position_embeddings = length + 3
    short = LocalAnswerer(model, processor).answer([question], Generation(8))[0]
    assert free.tokens == 8
    assert (short.tokens, short.finished) == (3, False)
    model.config.text_config.max_position_embeddings = length
    assert f"context of {length}" in (LocalAnswerer(model, processor).answer([question], Generation(8))[0].error or "")


def test_a_gated_fusion_sees_each_question(small_plan: EvaluationPlan) -> None:
    """Tokens of a picture depend on the question, so neither they nor a prompt's beginning are shared."""
    model, processor = tiny_model(fusion="gated", gate={"context": "question"})
    torch.manual_seed(0)
    for parameter in model.model.fusion.parameters():  # equal to channel fusion until trained
        torch.nn.init.normal_(parameter, std=1.0)
    asked = small_plan.questions["pope"][:2]
    questions = [replace(q, id=f"{q.id}/{word}", parts=(*q.parts, word)) for q in asked for word in ("a", "b c d")]
    together = LocalAnswerer(model, processor, batch_size=8)
    alone = LocalAnswerer(model, processor, batch_size=1, share_prefix=False)
    assert answers(together, questions, tokens=6) == answers(alone, questions, tokens=6)
    assert together.encoded_images == len({(q.picture_key, q.text) for q in questions}) > 1
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": _image(questions[0])}, *questions[0].content()[1:]]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == answers(alone, questions[:1], tokens=6)["pope", questions[0].id].text


def _image(question: Question) -> Any:
    from florence_vl.model.pictures import open_image

    return open_image(question.images[0].read())


def test_the_description_says_what_a_score_depends_on(small_plan: EvaluationPlan) -> None:
    facts = describe(small_plan)["mmvp"]
    assert facts["fingerprint"] == small_plan.fingerprints["mmvp"]
    assert facts["generation"] == {"max_new_tokens": 16, "temperature": 0.0}
    assert (facts["questions"], facts["available"], facts["limit"]) == (2, 2, None)
    json.dumps(facts)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, saved: any image-text-to-text model of transformers will do."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from florence_vl.model.tiny import TINY_IMAGE_TOKEN_ID, TINY_VOCAB_SIZE, tiny_tokenizer

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=TINY_VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **sizes)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=TINY_IMAGE_TOKEN_ID)
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tiny_tokenizer(),
        patch_size=16,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template="{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}"
        "{{ p['text'] }}{% endif %}{% endfor %}{% endfor %} Answer:",
    )
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_any_image_text_to_text_model_answers(llava_folder: Path, small_plan: EvaluationPlan) -> None:
    questions = small_plan.questions["pope"] + small_plan.questions["mmmu_val"]
    one, many = (load_answerer(str(llava_folder), batch_size=size) for size in (1, 4))
    alone, together = (answers(answerer, questions, tokens=5) for answerer in (one, many))
    assert alone == together
    assert len({answer.text for answer in alone.values()}) > 1
    assert many.identity["fingerprint"] == one.identity["fingerprint"] == folder_fingerprint(llava_folder)


@pytest.mark.parametrize(("adds", "writes"), [(True, True), (True, False), (False, True)])
def test_another_models_begin_token_is_that_of_its_own_template(
    adds: bool, writes: bool, llava_folder: Path, small_plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids in use are those of transformers' apply_chat_template, whether tokenizer, template or both write it."""
    from tokenizers.processors import TemplateProcessing

    answerer = load_answerer(str(llava_folder))
    processor, model = answerer.processor, answerer.model
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<|begin_of_text|>"
    begin = tokenizer.convert_tokens_to_ids(tokenizer.bos_token)
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, begin)]
        )
    if writes:
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    question = small_plan.questions["pope"][0]
    seen: list[list[int]] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: (seen.append(k["input_ids"][0].tolist()), generate(**k))[1])
    answerer.answer([question], Generation(2))
    picture = Image.open(io.BytesIO(question.images[0].read()))
    content = [{**part, "image": picture} if part["type"] == "image" else part for part in question.content()]
    own = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert seen[0] == list(own["input_ids"][0])
    assert seen[0].count(begin) == 1


def test_another_model_with_missing_weights_is_refused(llava_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llava_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {f"x.{name}": value for name, value in weights.items()}
    save_file(renamed, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a whole image-text-to-text model: .*\d+ weights .* missing"):
        load_answerer(str(tmp_path / "model"))


def test_a_model_that_sees_nothing_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the 'llama' in .* is not a whole image-text-to-text model"):
        load_answerer(str(tmp_path))


VIEWS = {"glance": {"size": 32, "features": ["davit"]}}
TILES = {"max": 4, "global": True, "size": 64}


@pytest.fixture(scope="module")
def views_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    for part in tiny_model(views=VIEWS, positions="resampled", position_grid=[2, 2]):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiles_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    for part in tiny_model(tower="clip_vision_model", tiles=TILES):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "tokens", "setting"),
    [
        (["--image-size", "96"], 9, ("image_size", [96, 96])),
        (["--aspect", "native", "--token-budget", "2"], 2, ("token_budget", 2)),
        (["--view", "glance"], 1, ("view", "glance")),
        (["--tiles", "1"], 4, ("tiles", TILES | {"max": 1})),
    ],
)
def test_a_model_is_evaluated_at_another_resolution(
    benchmark_folder: Path, views_folder: Path, tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], flags: list[str], tokens: int, setting: tuple[str, Any],
) -> None:  # fmt: skip
    from florence_vl.cli.main import main

    folder = tiles_folder if "--tiles" in flags else views_folder

    counts: set[int] = set()
    encode = LocalAnswerer.encode

    def counted(self: LocalAnswerer, *arguments: Any) -> Any:
        found = encode(self, *arguments)
        counts.update(len(tokens_NH) for tokens_NH in found.values())
        return found

    monkeypatch.setattr(LocalAnswerer, "encode", counted)
    command = ["evaluate", "--model", str(folder), "--suite", "pope", "--data", str(benchmark_folder)]
    command += ["--limit", "2", "--draws", "0", "--out", str(tmp_path / "out")]
    assert main([*command, *flags]) == 0
    assert counts == {tokens}
    name, value = setting
    assert ResultsFolder(tmp_path / "out").description["identity"][name] == value
    capsys.readouterr()
    assert main(command) == 2, "answers at two resolutions don't share a folder"
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aspect", "nativ"], "Did you mean 'native'"),
        (["--token-budget", "2"], "a token budget is for the aspect 'native'"),
        (["--view", "glanse"], "Did you mean 'glance'"),
        (["--positions", "absolut"], "Did you mean 'absolute'"),
        (["--tiles", "4"], "this model has no tiles"),
    ],
)
def test_settings_of_the_resolution_are_checked(
    benchmark_folder: Path, views_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    flags: list[str], message: str,
) -> None:  # fmt: skip
    from florence_vl.cli.main import main

    command = ["evaluate", "--model", str(views_folder), "--suite", "pope", "--data", str(benchmark_folder)]
    assert main([*command, "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_resolution_is_for_a_florence_vl_on_this_machine(
    benchmark_folder: Path, llava_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from florence_vl.cli.main import main

    command = ["evaluate", "--suite", "pope", "--data", str(benchmark_folder), "--out", str(tmp_path / "out")]
    for model in (str(llava_folder), "http://localhost:1"):
        assert main([*command, "--model", model, "--image-size", "96"]) == 2
        assert "remove" in capsys.readouterr().err.lower()
