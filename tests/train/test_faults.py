"""External faults: bad data, damaged or malicious checkpoints, a full disk, a second run, unusual recipes."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from PIL import Image

from florence_vl.model.tiny import tiny_model, tiny_recipe
from florence_vl.train import TrainingError, load_recipe, train
from florence_vl.train import fingerprint as fingerprints
from florence_vl.train.checkpoint import list_checkpoints
from florence_vl.train.checkpoint_files import find_damage
from florence_vl.train.config import SourceConfig
from florence_vl.train.export import export_run
from florence_vl.train.fingerprint import check_fingerprint, fingerprint
from florence_vl.train.guards import blame
from florence_vl.train.lock import RunLock
from florence_vl.train.metrics import MetricsFile, read_metrics

SAVES = {"every_steps": 2, "keep_last": 3, "asynchronous": False, "export": False}


def _records(folder: Path, present: int, count: int = 8) -> Path:
    """LLaVA records, the first of which have their picture."""
    rows = []
    for number in range(count):
        if number < present:
            Image.new("RGB", (40, 30), (30 * number, 99, 10)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"red number {number}"}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def _train(records: Path, output: Path, **changes: Any) -> Any:
    model, processor = tiny_model()
    base = {"steps": 2, "data": {"sources": [{"path": str(records), "image_root": str(records.parent)}]}}
    base["checkpoint"] = {"every_steps": None, "export": False}
    return train(tiny_recipe(output, **base | changes), model, processor)


def test_a_run_without_a_readable_record_stops_before_its_first_step(tmp_path: Path) -> None:
    records = _records(tmp_path, present=0)
    with pytest.raises((TrainingError, ValueError), match=r"records.* bad") as caught:
        _train(records, tmp_path / "run")
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "image" in text
    assert not list_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_half_the_pictures_missing_is_said_loudly_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = _records(tmp_path, present=4)
    result = _train(records, tmp_path / "run", logging={"progress": "plain"}, batch_size=8, micro_batch_size=8)
    assert "WARNING: " in capsys.readouterr().err
    assert sum(result.bad_records.values()) > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bad_records"] == result.bad_records


def test_batches_without_targets_are_an_error(tiny_run: ModuleType, tmp_path: Path) -> None:
    class Unsupervised(tiny_run.SyntheticBatches):  # type: ignore[name-defined, misc]
        def __next__(self) -> dict[str, Any]:
            batch = super().__next__()
            return batch | {"labels": torch.full_like(batch["labels"], -100)}

    with pytest.raises(TrainingError, match="step 1 has nothing to learn"):
        train(
            tiny_run.recipe(tmp_path),
            model=tiny_run.tiny(),
            batches=lambda step, rank, size, state: Unsupervised(step, rank, size),
        )


@pytest.fixture(scope="module")
def finished(tiny_run: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    tiny_run.run(folder / "run", steps=4, checkpoint=SAVES)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run with the checkpoints of steps 2 and 4."""
    import shutil

    return shutil.copytree(finished, tmp_path / "run")


def _damage(kind: str, checkpoint: Path) -> str:
    """Damage a checkpoint; the name of the file."""
    name = {"trainer": "trainer.json", "metadata": ".metadata", "unlinked": ".metadata"}.get(kind, "__0_0.distcp")
    path = checkpoint / name
    if kind in ("unlinked", "missing"):
        path.unlink()
    else:
        os.truncate(path, 0 if kind == "empty" else path.stat().st_size // 3)
    return name


@pytest.mark.parametrize("kind", ["truncated", "empty", "missing", "trainer", "metadata", "unlinked"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_taken(
    tiny_run: ModuleType, run: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny_run.losses(run)
    newest = run / "checkpoints" / "step-00000004"
    name = _damage(kind, newest)
    with pytest.raises(ValueError, match=rf"damaged: .*{name}.*--resume .*step-00000002"):
        tiny_run.run(run, steps=4, resume=str(newest), checkpoint=SAVES)
    assert tiny_run.run(run, steps=4, resume="auto", checkpoint=SAVES) == whole
    assert name in caplog.text
    assert "step-00000002" in caplog.text
    assert find_damage(newest) is None  # written anew


def test_when_every_checkpoint_is_damaged_the_run_says_so(tiny_run: ModuleType, run: Path) -> None:
    for _, path in list_checkpoints(run):
        _damage("truncated", path)
    with pytest.raises(ValueError, match=r"no checkpoint of .* is complete"):
        tiny_run.run(run, steps=4, resume="auto", checkpoint=SAVES)


def test_a_failed_resume_leaves_the_description_of_the_run(tiny_run: ModuleType, run: Path) -> None:
    described = (run / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match="does not fit this model"):
        tiny_run.run(run, steps=4, resume="auto", parts={"llm": {"lora": {"rank": 4}}}, checkpoint=SAVES)
    assert (run / "recipe.yaml").read_text() == described
    assert export_run(run)[1] == 4


class _Evil:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("way", ["code", "bytes", "outside"])
def test_hostile_metadata_is_refused_and_not_run(tiny_run: ModuleType, run: Path, tmp_path: Path, way: str) -> None:
    flag = tmp_path / "ran"
    for _, path in list_checkpoints(run):
        metadata: Any = dcp.FileSystemReader(path).read_metadata()
        if way == "code":
            metadata.planner_data = _Evil(flag)
        elif way == "bytes":  # torch.distributed.checkpoint would unpickle the content
            first = next(iter(metadata.state_dict_metadata))
            metadata.state_dict_metadata[first] = dcp.metadata.BytesStorageMetadata()
        else:
            for info in metadata.storage_data.values():
                info.relative_path = "../../../elsewhere"
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"mkdir|not tensors|outside the folder"):
        tiny_run.run(run, steps=6, resume="auto", checkpoint=SAVES)
    with pytest.raises(ValueError, match=r"mkdir|not tensors|outside the folder"):
        export_run(run, tmp_path / "out")
    assert not flag.exists()


def _hold(folder: str, held: Any) -> None:
    lock = RunLock(Path(folder))
    held.set()
    signal.pause()
    lock.release()


def test_a_second_run_in_a_folder_is_refused_until_its_owner_is_dead(tiny_run: ModuleType, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "run"), held))
    process.start()
    assert held.wait(120)
    with pytest.raises(ValueError, match=rf"being trained by process {process.pid} on .*output="):
        tiny_run.run(tmp_path / "run", steps=1)
    process.kill()
    process.join()
    assert (tmp_path / "run" / ".lock").exists()  # left behind, and locks nothing
    assert len(tiny_run.run(tmp_path / "run", steps=1)) == 1
    assert not (tmp_path / "run" / ".lock").exists()


def test_metrics_wait_for_room_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1})
    real = metrics._file

    class Full:
        """Takes half of what it is given, as a full disk does, then nothing."""

        def __init__(self) -> None:
            self.left = 8

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            done, self.left = real.write(data[: self.left]), 0
            return done

    metrics._file = Full()  # type: ignore[assignment]
    metrics.write({"step": 2})
    metrics.write({"step": 3})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    metrics._file = real
    metrics.write({"step": 4})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert caplog.text.count("can't be written") == 1


def test_the_last_checkpoint_makes_room_for_itself(
    tiny_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = dcp.FileSystemWriter.write_data

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if len(list_checkpoints(tmp_path)) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    tiny_run.run(tmp_path, steps=5, checkpoint=SAVES)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]


def test_sources_of_many_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    files = [tmp_path / name for name in ("a.tar", "b.tar", "deep/c.tar")]
    for file in files:
        file.write_bytes(b"0" * 100)
    sources = [SourceConfig(path=str(tmp_path / "**" / "*.tar"))]
    whole = fingerprint(sources)
    assert len(whole) == 1
    monkeypatch.setattr(fingerprints, "WHOLE", 100)
    monkeypatch.setattr(fingerprints, "_PIECE", 1)
    monkeypatch.setattr(fingerprints, "_PIECES", 2)  # the first and the last byte
    sampled = fingerprint(sources)
    check_fingerprint(whole, sampled)  # of an earlier version that read everything
    files[1].write_bytes(b"1" * 100)
    assert fingerprint(sources) == sampled
    for number, data in ((2, b"0" * 99 + b"1"), (1, b"1" * 101)):
        before = files[number].read_bytes()
        files[number].write_bytes(data)
        with pytest.raises(ValueError, match=r"\*\*/\*\.tar changed since the checkpoint"):
            check_fingerprint(sampled, fingerprint(sources))
        files[number].write_bytes(before)
    files[0].write_bytes(b"0" * 101)
    alone = fingerprint([SourceConfig(path=str(files[0]))])
    assert alone == {str(files[0]): hashlib.sha256(b"101\n00").hexdigest()}  # as in earlier versions


def test_edited_data_is_noticed_on_resume(tmp_path: Path) -> None:
    records = _records(tmp_path, present=8)
    _train(records, tmp_path / "run")
    records.write_text(records.read_text().replace("red number 3", "red number 4"))
    model, processor = tiny_model()
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", ["steps=4"])
    with pytest.raises(ValueError, match=r"data\.json changed since the checkpoint"):
        train(recipe, model, processor, resume="auto")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.max_length=100", "data.max_length was 2048 at the checkpoint and is 100 now"),
        ("data.on_long=error", "data.on_long was truncate_turns at the checkpoint and is error now"),
        ("data.template=chatml", "data.template was None at the checkpoint and is chatml now"),
        ("data.sources.0.image_root=.", r"data.sources.0.image_root was .* at the checkpoint and is \. now"),
        (
            "data.sources.0.options.allow_outside=true",
            r"data.sources.0.options was {} at the checkpoint and is {'allow",
        ),
        ("data.shuffle=false", "shuffle was True at the checkpoint and is False now"),
        ("model.image_size=128", "model.image_size was None at the checkpoint and is 128 now"),
    ],
)
def test_changed_encoding_is_noticed_on_resume(tmp_path: Path, setting: str, words: str) -> None:
    _train(_records(tmp_path, present=8), tmp_path / "run")
    model, processor = tiny_model()
    with pytest.raises(ValueError, match=f"cannot resume at the same data: {words}"):
        train(load_recipe(tmp_path / "run" / "recipe.yaml", ["steps=4", setting]), model, processor, resume="auto")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", ["steps=4", "data.max_bad_share=0.5"])
    assert train(recipe, model, processor, resume="auto").steps == 4


def test_a_lost_peer_is_not_blamed_on_the_own_batch() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:2222")
    assert "another process" in str(blame(lost))
    assert blame(ValueError("3 image placeholder tokens, 2 images")) is None


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:2222", "another process of the run"),
        ("DataLoader worker (pid(s) 4711) exited unexpectedly", "a data worker was lost .*4711.*data.workers"),
    ],
)
def test_what_is_lost_while_data_is_awaited_is_told_as_the_cause(
    tiny_run: ModuleType, tmp_path: Path, message: str, cause: str
) -> None:
    class Lost(tiny_run.SyntheticBatches):  # type: ignore[name-defined, misc]
        def __next__(self) -> dict[str, Any]:
            raise RuntimeError(message)

    with pytest.raises(TrainingError, match=cause):
        train(
            tiny_run.recipe(tmp_path),
            model=tiny_run.tiny(),
            batches=lambda step, rank, size, state: Lost(step, rank, size),
        )
    assert not (tmp_path / "failures").exists()


def test_attention_without_a_backward_pass_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    values = tiny_recipe(tmp_path / "run", model={"path": "nowhere", "attn_implementation": "flex_attention"})
    with pytest.raises(ValueError, match="flex_attention has no backward pass on a CPU"):
        train(values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", "`optimizer.lr` must be above 0, found -1"),
        ("optimizer.lr=.nan", "`optimizer.lr` must be a finite number"),
        ("optimizer.lr=.inf", "`optimizer.lr` must be a finite number"),
        ("parts.llm.lr=-1e-5", "`parts.llm.lr` must be above 0"),
        ("optimizer.betas=[0.9, 1.5]", r"`optimizer.betas.1` must be 0 or more and below 1"),
        ("optimizer.weight_decay=-.1", "`optimizer.weight_decay` must be 0 or more"),
        ("data.max_bad_share=7", "`data.max_bad_share` must be between 0 and 1"),
    ],
)
def test_impossible_numbers_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe({"steps": 1}, [override])


def test_recipes_that_grow_beyond_memory_are_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (tmp_path / "bomb.yaml").write_text(bomb)
    with pytest.raises(ValueError, match="aliases counted each time"):
        load_recipe(tmp_path / "bomb.yaml")
    (tmp_path / "circle.yaml").write_text("a: &a [*a]\n")
    with pytest.raises(ValueError, match="inside its own anchor"):
        load_recipe(tmp_path / "circle.yaml")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_recipe(tmp_path / "deep.yaml")
    (tmp_path / "e0.yaml").write_text("steps: 1\n")
    for number in range(1, 30):
        (tmp_path / f"e{number}.yaml").write_text(f"extends: [./e{number - 1}.yaml, ./e{number - 1}.yaml]\n")
    with pytest.raises(ValueError, match="reads more than 64 files"):
        load_recipe(tmp_path / "e29.yaml")


def test_variables_are_used_but_not_written_down(
    tiny_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    values = tiny_run.recipe(tmp_path / "run", steps=2)
    values["logging"] = {"progress": "none", "project": "p-${HF_TOKEN}"}
    recipe = load_recipe(values)
    assert recipe.logging.project == "p-hf_secret"
    train(
        recipe,
        model=tiny_run.tiny(),
        batches=lambda step, rank, size, state: tiny_run.SyntheticBatches(step, rank, size),
    )
    saved = (tmp_path / "run" / "recipe.yaml").read_text()
    assert yaml.safe_load(saved)["logging"]["project"] == "p-${HF_TOKEN}"
    assert "hf_secret" not in saved
    monkeypatch.delenv("HF_TOKEN")
    assert export_run(tmp_path / "run")[1] == 2
