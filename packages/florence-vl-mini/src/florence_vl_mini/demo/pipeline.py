"""The demo's run: included model, new task, answers before, fine-tuning, answers after, report."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.model.loading import load_model
from florence_vl.model.modeling import PARTS
from florence_vl_mini.demo.data import DemoData, Example, make_data
from florence_vl_mini.demo.report import duration, percent, read_jsonl, write_report
from florence_vl_mini.demo.scoring import VALID, WHOLE, ask, derangement, judge, scores, suite_sample, suite_scores

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

Say = Callable[[str], None]

RECIPE = "demo/finetune"
OWNED = "demo-settings.json"  # a folder that contains it and no foreign file was written by the demo: replaceable
_RUN = "finetune"
_WRITTEN = (OWNED, "data", _RUN, "model", "held-out", "answers.jsonl", "demo.json", "report.html")


@dataclass(frozen=True)
class DemoSettings:
    """Settings of a run.

    Attributes:
        minutes: Training time in minutes.
        steps: Maximum number of steps; None for no limit other than time.
        seed: Seed of pictures and order.
        threads: CPU threads; None for all cores.
        pictures: Number of training pictures.
        held_out: Number of pictures for the questions before and after training.
        suite_questions: Questions per group of the mini suite, before and after training.
        model: `mini`, the included model, or the folder of a saved Florence-VL.
        overrides: Recipe overrides, `key.path=value`.
        smoke: Use a tiny random model: tests the pipeline in seconds.
    """

    minutes: float = 5.0
    steps: int | None = None
    seed: int = 0
    threads: int | None = None
    pictures: int = 1500
    held_out: int = 60
    suite_questions: int = 24
    model: str = "mini"
    overrides: tuple[str, ...] = ()
    smoke: bool = False

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; it must be above 0")
        least = {"steps": 1, "threads": 1, "pictures": 1, "held_out": 2, "suite_questions": 1}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ValueError(f"{name} is {value}; it must be at least {number}")
        if self.smoke and self.model != "mini":
            raise ValueError(f"smoke uses its own tiny model: remove either smoke or model ({self.model})")

    @classmethod
    def for_smoke(cls, **changes: Any) -> DemoSettings:
        """Settings with a tiny model, few pictures and few steps."""
        small = {"minutes": 0.3, "steps": 4, "pictures": 48, "held_out": 8, "suite_questions": 2, "smoke": True}
        return cls(**{**small, **changes})


def prepare_folder(folder: Path) -> Path:
    """Create an empty folder for the run; an earlier demo in it is deleted.

    Returns:
        The folder with links resolved.

    Raises:
        ValueError: It is a file, or contains files that a demo did not write.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: choose another one with --out")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in found if OWNED not in found or name not in _WRITTEN]
    if foreign:
        raise ValueError(f"{folder} contains {foreign[0]}, which a demo did not write: choose another --out")
    if found:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def start_model(
    settings: DemoSettings, folder: Path
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor, str]:
    """The start model, its processor, and a sentence about it.

    Raises:
        FileNotFoundError: The model or a required package is missing; the message names the remedy.
        ValueError: It is not a Florence-VL, or it is in the run's folder, which is emptied.
    """
    if settings.smoke:
        from florence_vl.model.tiny import tiny_model

        note = "A smoke run: the model is tiny and random, so correct answers occur only by chance."
        return *tiny_model(seed=settings.seed), note
    if settings.model == "mini":
        note = (
            "The start is the mini Florence-VL of florence-vl-mini: a pretrained mini Florence-2 and "
            "SmolLM2-135M-Instruct, trained in two stages (Apache-2.0)."
        )
    else:
        if Path(settings.model).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--model {settings.model} is in {folder}, which the run empties: choose another --out")
        note = f"The start is {settings.model}."
    return *load_model(settings.model, "cpu", "float32"), note


def fine_tune(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    data: DemoData,
    folder: Path,
    settings: DemoSettings,
) -> dict[str, Any]:
    """Train with `recipes/demo/finetune.yaml` into `folder/finetune` and `folder/model`.

    Returns:
        `samples`, `steps`, `seconds`, `first_loss` and `last_loss` (means over a tenth of the steps), and `curve`, rows
        of `seconds` and `loss`.

    Raises:
        KeyboardInterrupt: A signal ended the training.
    """
    from florence_vl.train.loop import train
    from florence_vl.train.recipes import load_recipe

    run = folder / _RUN
    values = load_recipe(RECIPE).to_dict()
    values["data"]["sources"] = [{"path": str(data.train), "reader": "llava", "image_root": str(data.images)}]
    values["parts"]["llm"]["last_layers"] = max(1, model.config.get_text_config().num_hidden_layers // 3)
    values |= {
        "output": str(run),
        "seed": settings.seed,
        "max_minutes": settings.minutes,
        "threads": settings.threads,
        "steps": settings.steps or values["steps"],
    }
    began = time.monotonic()
    if not train(load_recipe(values, settings.overrides), model, processor).finished:
        raise KeyboardInterrupt
    seconds = time.monotonic() - began
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # 1 GB that is not needed later
    shutil.move(run / "model", folder / "model")
    rows = read_jsonl(run / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    tenth = max(1, len(losses) // 10)
    return {
        "samples": int(rows[-1]["samples"]),
        "steps": int(rows[-1]["step"]),
        "seconds": seconds,
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "curve": [{"seconds": 60 * row["minutes"], "loss": row["loss"]} for row in rows],
    }


def run_demo(folder: Path, settings: DemoSettings | None = None, say: Say = print) -> Path:
    """Run the demo.

    Args:
        folder: Output folder, with `report.html` and `model/`.
        settings: Settings of the run.
        say: Receives progress messages and finally the result in one sentence.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: A package or the model is missing; the message names the remedy.
        ValueError: The folder contains other files, or the model cannot be used.
    """
    import torch
    from transformers import set_seed

    from florence_vl.train.recipes import load_recipe

    settings = settings or DemoSettings()
    load_recipe(RECIPE, settings.overrides)  # reports errors in the overrides before minutes of work
    began = time.monotonic()

    def clock(title: str) -> None:
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        say(f"[{minutes:2}:{seconds:02}] {title}")

    clock("the model to start from")
    model, processor, note = start_model(settings, folder)
    folder = prepare_folder(folder)
    (folder / OWNED).write_text(json.dumps(asdict(settings), indent=1))
    threads = settings.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    set_seed(settings.seed)

    clock(f"a new task: {settings.pictures} pictures with their JSON, {settings.held_out} held-out pictures")
    side = min(processor.image_processor.size["height"], processor.image_processor.size["width"])
    data = make_data(folder / "data", settings.pictures, settings.held_out, side, settings.seed)
    examples = data.held_out
    images = [example.image for example in examples]
    expected = [example.expected for example in examples]
    answers: dict[str, list[str]] = {}

    clock(f"before: {len(examples)} answers")
    answers["before"] = ask(model, processor, images)
    sample, guesses = suite_sample(settings.suite_questions)
    clock(f"before: {guesses['all']['total']:.0f} questions of the mini suite")
    suite = {"guess": guesses, "before": suite_scores(model, processor, sample)}

    clock(f"fine-tuning: {settings.minutes:g} minutes at most")
    training = fine_tune(model, processor, data, folder, settings)

    clock(f"after: {len(examples)} answers")
    answers["after"] = ask(model, processor, images)
    clock("after: the same with another picture, and with none")
    answers["other picture"] = ask(model, processor, derangement(examples, settings.seed))
    answers["no picture"] = ask(model, processor, [None]) * len(examples)  # one prompt, one greedy answer
    clock(f"after: {guesses['all']['total']:.0f} questions of the mini suite")
    suite["after"] = suite_scores(model, processor, sample)

    clock("report")
    _write_answers(folder, examples, answers)
    answers["guess"] = [json.dumps(data.commonest)] * len(examples)
    summary = {
        "date": date.today().strftime("%d %B %Y").lstrip("0"),
        "machine": f"CPU, threads: {threads} ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "note": note,
        "image": {"side": side, "tokens": model.num_image_tokens(side, side)},
        "scores": {condition: scores(texts, expected) for condition, texts in answers.items()},
        "suite": suite,
        "seconds": time.monotonic() - began,
        "parts": _parts(model),
        "training": training,
        "folder": str(folder),
    }
    (folder / "demo.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    report = write_report(folder)
    say(f"report     {report}")
    say(f"model      {folder / 'model'}")
    say(result_sentence(summary))
    return report


def result_sentence(summary: dict[str, Any]) -> str:
    """The result of a run, from its `demo.json`."""
    found, suite = summary["scores"], summary["suite"]
    before, after, other = (found[condition] for condition in ("before", "after", "other picture"))
    return (
        f"Fine-tuned for {duration(summary['training']['seconds'])}, the model answers in valid JSON for "
        f"{percent(after[VALID])} of {after[VALID]['total']} held-out pictures ({percent(before[VALID])} before) and "
        f"has all four values right for {percent(after[WHOLE])} (95 % interval {100 * after[WHOLE]['low']:.0f} to "
        f"{100 * after[WHOLE]['high']:.0f}; {percent(before[WHOLE])} before, {percent(other[WHOLE])} when it is shown "
        f"another picture); of {suite['after']['all']['total']} questions of the mini suite it gets "
        f"{percent(suite['after']['all'])} right ({percent(suite['before']['all'])} before)."
    )


def _parts(model: FlorenceVLForConditionalGeneration) -> list[dict[str, Any]]:
    config, text = model.config, model.config.get_text_config()
    what = {
        "tower": f"{config.vision_config.model_type}: {', '.join(config.features or ())}",
        "projector": f"{config.fusion} fusion, {config.projector_depth} linear layers",
        "llm": f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}",
    }
    rows = []
    for part, title in zip(PARTS, ("vision tower", "fusion and projector", "language model"), strict=True):
        parameters = [parameter for _, parameter in model.part_parameters(part)]
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in parameters)
        rows.append({"part": title, "what": what[part], "parameters": total, "trained": trained})
    return rows


def _write_answers(folder: Path, examples: list[Example], answers: dict[str, list[str]]) -> None:
    (folder / "held-out").mkdir()
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for index, example in enumerate(examples):
            name = f"held-out/{index:03}.jpg"
            (folder / name).write_bytes(example.image)
            said = {condition: texts[index] for condition, texts in answers.items()}
            right = {condition: judge(text, example.expected) for condition, text in said.items()}
            row = {"image": name, "expected": example.expected, "answers": said, "right": right}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
