"""Training on streamed shards: selected by the recipe, exact resume, errors if a resume is impossible."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from florence_vl.model.tiny import tiny_model, tiny_recipe
from florence_vl.train import load_recipe, train
from florence_vl.train.data import TrainingData
from florence_vl.train.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prepared shards of ten samples; every fourth answer is marked as odd."""
    pytest.importorskip("megatron.energon", reason="needs the extra [stream]")
    from florence_vl.data.stream import prepare_shards

    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for number in range(10):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (60 * shard, 20 * number, 9)).save(buffer, "PNG")
                answer = " ".join(["red", "green", "blue"][: 1 + number % 3]) + f" number {shard} {number}"
                turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
                row = {"id": f"{shard}-{number}", "conversations": turns, "odd": number % 4 == 3}
                for suffix, content in (("png", buffer.getvalue()), ("json", json.dumps(row).encode())):
                    info = tarfile.TarInfo(f"{shard}_{number:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    assert prepare_shards(folder, workers=1) == 30
    return folder


def recipe(shards: Path | str, output: Path, packed: bool = True, **changes: Any) -> dict[str, Any]:
    packing = {"mode": "packed", "tokens_per_row": 160, "window": 6} if packed else {"mode": "padded", "window": 6}
    data = {"stream": {"path": str(shards), "shuffle_buffer": 4}, "max_length": 160, "packing": packing}
    return tiny_recipe(output, **{"steps": 5, "data": data} | changes)


@pytest.mark.parametrize(
    ("packed", "workers"),
    [(True, 0), (False, 0), pytest.param(True, 1, marks=pytest.mark.slow)],
    ids=["packed", "padded", "packed, a worker"],
)
def test_a_streamed_run_resumes_exactly(
    shards: Path, tmp_path: Path, packed: bool, workers: int, train_tiny: Callable[..., list[float]]
) -> None:
    override = [f"data.workers={workers}"]

    def values(name: str) -> dict[str, Any]:
        return load_recipe(recipe(shards, tmp_path / name, packed), override).to_dict()

    whole = train_tiny(values("whole"))
    assert len(whole) == 5
    assert len(train_tiny(values("cut"), stop_at=3)) == 3
    assert train_tiny(values("cut"), resume="auto") == whole
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["samples"] > 10 if packed else rows[-1]["samples"] == 10


def test_filters_and_names_reach_the_stream(shards: Path, tmp_path: Path) -> None:
    _, processor = tiny_model()
    values = recipe(shards, tmp_path)
    values["data"]["stream"] |= {"name": "mine", "filters": [{"column": "odd", "test": "==", "value": True}]}
    stream = TrainingData(load_recipe(values), processor).batches(0, 0, 1, None)
    seen = set()
    for _ in range(8):
        next(stream)
        seen.update(stream.ids)
    stream.close()
    assert {source for source, _ in seen} == {"mine"}
    assert {int(name.split("-")[1]) % 4 for _, name in seen} == {3}


def test_another_number_of_processes_or_workers_or_other_data_is_refused(
    shards: Path, tmp_path: Path, train_tiny: Callable[..., list[float]]
) -> None:
    values = recipe(shards, tmp_path / "run", steps=2)
    train_tiny(values)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    _, processor = tiny_model()
    data = TrainingData(load_recipe(values), processor)
    with pytest.raises(ValueError, match=r"number of processes and workers.*world size was 1 at the checkpoint"):
        data.batches(2, 0, 2, trainer["data"][0])
    with pytest.raises(ValueError, match="step 2 contains no data state"):
        data.batches(2, 0, 1, None)
    with pytest.raises(ValueError, match="workers was 0 at the checkpoint and is 1 now"):
        train_tiny(load_recipe(values, ["steps=3", "data.workers=1"]).to_dict(), resume="auto")
    with pytest.raises(ValueError, match="shuffle buffer was 4"):
        train_tiny(load_recipe(values, ["steps=3", "data.stream.shuffle_buffer=5"]).to_dict(), resume="auto")


def test_two_processes_stream_and_resume(
    shards: Path, tiny_run: ModuleType, tmp_path: Path, train_tiny: Callable[..., list[float]]
) -> None:
    changes = {key: value for key, value in recipe(shards, tmp_path).items() if key not in ("output", "name")}
    changes |= {"steps": 3, "parallel": {"strategy": "ddp"}, "tiny_data": True, "checkpoint": {"every_steps": 2}}
    changes["checkpoint"]["export"] = False
    cases = [
        {**changes, "output": str(tmp_path / "whole")},
        {**changes, "output": str(tmp_path / "cut"), "steps": 2, "schedule": {"name": "constant"}},
        {**changes, "output": str(tmp_path / "cut"), "resume": "auto", "schedule": {"name": "constant"}},
    ]
    cases[0]["schedule"] = {"name": "constant"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tiny_run.__file__), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(tiny_run.losses(tmp_path / "whole")) == 3
    assert tiny_run.losses(tmp_path / "cut") == pytest.approx(tiny_run.losses(tmp_path / "whole"), abs=1e-6)
    alone = {**recipe(shards, tmp_path / "cut"), "schedule": {"name": "constant"}}
    with pytest.raises(ValueError, match="world size was 2 at the checkpoint and is 1 now"):
        train_tiny(alone, resume="auto")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[{path: a.json}]", "only one of `data.sources` and `data.stream`"),
        ("data.weighting=proportions", "`data.weighting` is for `data.sources`"),
        ("data.shuffle=false", "`data.shuffle: false` is for `data.sources`"),
        ("data.stream.shuffle_buffer=-1", "must be 0 or more, found -1"),
        ("data.stream.shufle_buffer=1", "unknown key `data.stream.shufle_buffer`. Did you mean 'shuffle_buffer'"),
    ],
)
def test_what_a_stream_cannot_go_with_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe("shards", tmp_path), [override])
    with pytest.raises(ValueError, match="give `steps`"):
        load_recipe(recipe("shards", tmp_path, steps=None, epochs=1))


def test_without_energon_the_extra_is_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megatron.energon", None)
    values = recipe("shards", tmp_path, model={"path": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"pip install 'florence-vl\[stream\]'"):
        train(values)


def test_unprepared_shards_say_what_to_run(
    shards: Path, tmp_path: Path, train_tiny: Callable[..., list[float]]
) -> None:
    with pytest.raises(FileNotFoundError, match="florence-vl data prepare"):
        train_tiny(recipe(tmp_path, tmp_path / "run"))
    _, processor = tiny_model()
    with pytest.raises(ValueError, match="florence-vl data inspect"):
        _ = TrainingData(load_recipe(recipe(shards, tmp_path)), processor).mixture
