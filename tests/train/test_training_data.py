"""From files to losses: the recipe's data section, chat template, packing, resume, export, with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from florence_vl.data.encode import RecordEncoder
from florence_vl.model.tiny import tiny_model, tiny_recipe
from florence_vl.train import load_recipe, train
from florence_vl.train.config import SourceConfig
from florence_vl.train.data import TrainingData, open_source
from florence_vl.train.metrics import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve LLaVA records, every third one without an image, and one whose image is missing."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for index in range(12):
        answer = " ".join(["red", "green", "blue"][: 1 + index % 3]) + f" number {index}"
        record: dict[str, Any] = {"id": f"r{index}"}
        question = f"What is it, {index}?"
        if index % 3:
            Image.new("RGB", (40 + index, 30), (20 * index, 99, 10)).save(folder / f"{index}.png")
            record["image"] = f"{index}.png"
            question = f"<image>\n{question}"
        record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record)
    records.append({**records[1], "id": "lost", "image": "missing.png"})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def recipe(data: Path, output: Path, packed: bool, **changes: Any) -> dict[str, Any]:
    packing = {"mode": "packed", "tokens_per_row": 160, "window": 8} if packed else {"mode": "padded", "window": 8}
    sources = {
        "sources": [{"path": str(data / "data.json"), "name": "colours"}],
        "max_length": 160,
        "max_bad_share": 0.5,
        "packing": packing,
    }
    return tiny_recipe(output, **{"data": sources} | changes)


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_on_files_resumes_exactly(
    data: Path, tmp_path: Path, packed: bool, train_tiny: Callable[..., list[float]]
) -> None:
    def losses(output: Path, **how: Any) -> list[float]:
        # seven steps are an epoch of padded ones: the bad image is drawn
        return train_tiny(recipe(data, output, packed) | {"steps": 7}, **how)

    whole = losses(tmp_path / "whole")
    assert len(losses(tmp_path / "cut", stop_at=3)) == 3
    assert losses(tmp_path / "cut", resume="auto") == whole
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["samples"] >= 7
    if packed:
        assert rows[-1]["samples"] > 8  # more than one sample in a row
    bad = [json.loads(line) for line in (tmp_path / "whole" / "bad_records.jsonl").read_text().splitlines()]
    assert {entry["kind"] for entry in bad} <= {"image"}


def test_epochs_become_steps_and_the_template_is_saved(data: Path, tmp_path: Path) -> None:
    model, processor = tiny_model()
    values = recipe(data, tmp_path / "run", packed=False)
    values |= {"steps": None, "epochs": 1, "checkpoint": {"every_steps": None, "export": True}}
    values["data"]["template"] = "plain"
    loaded = load_recipe(values)
    source = TrainingData(loaded, processor)
    assert source.steps(1) == 7  # 13 records, 2 a step
    assert source.steps(2) == 13
    result = train(loaded, model=model, processor=processor)
    assert result.steps == 7
    assert result.exported is not None
    from florence_vl import FlorenceVLProcessor

    assert FlorenceVLProcessor.from_pretrained(result.exported).chat_template == processor.chat_template


def test_held_out_loss_is_a_mean_over_supervised_tokens(data: Path, tmp_path: Path) -> None:
    from florence_vl.train.evaluation import HeldOut
    from florence_vl.train.parallel import LossModule, World

    model, processor = tiny_model()
    held_out = {"every_steps": 2, "samples": 5, "sources": [{"path": str(data / "data.json")}]}
    values = recipe(data, tmp_path, packed=False, evaluate=held_out, steps=3)
    values["logging"] |= {"profile_steps": [2, 9]}  # the run ends before
    train(values, model=model, processor=processor)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert ["eval/loss" in row for row in rows] == [False, True, True]
    loaded = load_recipe(values)
    assert loaded.evaluate is not None
    world = World(torch.device("cpu"))
    mean = HeldOut(loaded, loaded.evaluate, processor, world).loss(LossModule(model, (64, 64)))
    assert mean == pytest.approx(rows[-1]["eval/loss"], rel=1e-5)
    encoder, reader = RecordEncoder(processor, max_length=160), open_source(loaded.evaluate.sources[0])
    losses, tokens = 0.0, 0
    model.eval()
    for index in range(5):  # one by one, through the public forward pass
        sample = encoder(reader[index])
        count = int((sample.labels[1:] != -100).sum())
        with torch.no_grad():
            one = model(sample.input_ids[None], pixel_values=sample.pixel_values, labels=sample.labels[None])
        losses, tokens = losses + float(one.loss) * count, tokens + count
    assert mean == pytest.approx(losses / tokens, rel=1e-4)
    assert (tmp_path / "profile" / "rank-0.json").stat().st_size > 1000
    lost = json.loads((data / "data.json").read_text())[-1:]
    (data / "lost.json").write_text(json.dumps(lost))
    loaded.evaluate.sources[0].path = str(data / "lost.json")
    with pytest.raises(ValueError, match=r"none of the first 1 records can be used; the last: .*missing\.png"):
        HeldOut(loaded, loaded.evaluate, processor, world)


def test_other_rows_than_those_of_the_checkpoint_leave_the_description_of_the_run(data: Path, tmp_path: Path) -> None:
    train({**recipe(data, tmp_path / "run", packed=True), "steps": 1}, *tiny_model())
    described = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match=r"packing.mode was packed at the checkpoint and is padded now"):
        train(recipe(data, tmp_path / "run", packed=False), *tiny_model(), resume="auto")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == described


def test_sources_are_limited_and_named(data: Path) -> None:
    reader = open_source(SourceConfig(path=str(data / "data.json"), limit=5))
    assert len(reader) == 5
    with pytest.raises(IndexError):
        reader[5]
    with pytest.raises(ValueError, match="`dataset` or `reader`"):
        open_source(SourceConfig(path=str(data / "data.json"), dataset="llava-558k", reader="llava"))


def test_a_recipe_without_data_or_model_says_what_to_set(tmp_path: Path) -> None:
    model, processor = tiny_model()
    bare = {"steps": 1, "output": str(tmp_path / "x"), "precision": "fp32", "device": "cpu"}
    with pytest.raises(ValueError, match=r"data.sources"):
        train(bare, model=model, processor=processor)
    with pytest.raises(ValueError, match=r"model.path .* or model.build"):
        train(bare)


@pytest.mark.parametrize("options", [{}, {"merge": 2}, {"fusion": "gated"}])
def test_warm_up_places_the_projector_once(data: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    # nine records name an image, one of which is missing
    warm = {"warm_up": {"pairs": 9, "steps": 30, "batch_size": 6, "lr": 3e-3}, "parts": {"projector": {"lr": 0.0}}}
    model, processor = tiny_model(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = recipe(data, tmp_path / "run", packed=False, **warm)
    settings["parts"] = {part: {"train": part == "projector"} for part in ("tower", "llm", "projector")}
    settings["steps"] = 1
    train(settings, model, processor)
    rows = [json.loads(line) for line in (tmp_path / "run/warm_up.jsonl").read_text().splitlines()]
    assert len(rows) == 30
    assert rows[-1]["loss"] < rows[0]["loss"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("multi_modal_projector" in name for name in changed)
    assert all("multi_modal_projector" in name or "model.fusion" in name for name in changed)
    (tmp_path / "run/warm_up.jsonl").unlink()
    train({**settings, "steps": 2}, *tiny_model(**options), resume="auto")
    assert not (tmp_path / "run/warm_up.jsonl").exists()


def test_warm_up_without_captions_is_refused(data: Path, tmp_path: Path) -> None:
    lost = recipe(data, tmp_path / "lost", packed=False, warm_up={"pairs": 4})
    records = json.loads((data / "data.json").read_text())
    (tmp_path / "lost.json").write_text(json.dumps([{**record, "image": "missing.png"} for record in records[1:3]]))
    lost["data"] = {**lost["data"], "sources": [{"path": str(tmp_path / "lost.json")}]}
    with pytest.raises(ValueError, match="0 of 2 images can be opened"):
        train(lost, *tiny_model())
    (tmp_path / "text.json").write_text(
        json.dumps(
            [{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
        )
    )
    settings = recipe(data, tmp_path / "run", packed=False, warm_up={})
    settings["data"] = {**settings["data"], "sources": [{"path": str(tmp_path / "text.json")}]}
    with pytest.raises(ValueError, match="of 1 records 0 show one image"):
        train(settings, *tiny_model())
    with pytest.raises(ValueError, match=r"`warm_up.pairs` must be 2 or more, found 1"):
        load_recipe({**settings, "warm_up": {"pairs": 1}}).check()
    with pytest.raises(ValueError, match=r"`warm_up.pairs: 0` needs `warm_up.regions`"):
        load_recipe({**settings, "warm_up": {"pairs": 0}}).check()


def test_turns_are_truncated_to_a_packed_row(tmp_path: Path) -> None:
    turns = [{"from": who, "value": "red"} for _ in range(40) for who in ("human", "gpt")]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    values = recipe(tmp_path, tmp_path / "run", packed=True)
    values["data"] |= {"max_length": None, "max_bad_share": 0.0}
    batches = TrainingData(load_recipe(values), tiny_model()[1]).batches(0, 0, 1, None)
    assert 80 < next(batches)["input_ids"].numel() <= 160 * values["micro_batch_size"]
    assert batches.report().num_bad == 0  # type: ignore[union-attr]


def test_the_command_that_writes_missing_data_is_named(tmp_path: Path) -> None:
    pytest.importorskip("florence_vl_mini")
    source = SourceConfig(str(tmp_path / "captions/data.jsonl"), name="captions")
    with pytest.raises(FileNotFoundError, match=r"florence-vl mini data --set captions --out .*/captions"):
        open_source(source)
    with pytest.raises(FileNotFoundError) as error:
        open_source(SourceConfig(str(tmp_path / "other/data.jsonl"), name="other"))
    assert "mini data" not in str(error.value)
