"""The demo's run: parts, model, pictures, answers before, warm-up, two stages, answers after, report."""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_vl.demo.data import DataPlan, DemoData, make_data
from florence_vl.demo.report import read_jsonl, write_report
from florence_vl.demo.scoring import Question, answer, derangement, scores
from florence_vl.demo.warmup import cache_features, caption_vectors, warm_up
from florence_vl.model.image_processing import open_image
from florence_vl.model.modeling import PARTS
from florence_vl.parts import SMOLLM2, mini_florence2, smollm2

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

Say = Callable[[str], None]

OWNED = "demo-settings.json"  # a folder that holds it is the demo's own and may be written anew
WARM_UP_SHARE, STAGE_1_SHARE, STAGE_2_SHARE = 0.15, 0.40, 0.45  # of the training time
WARM_UP_PICTURES = 2000  # features of that many take a third of its time


@dataclass(frozen=True)
class DemoSettings:
    """What a run does.

    Attributes:
        minutes: Training time, for the warm-up and both stages together.
        steps: Stop each of the three after that many steps, when that is sooner; None for time alone.
        seed: Of pictures, weights and order.
        threads: CPU threads; None for all cores.
        image_size: Side of a picture in pixels.
        scenes: Pictures to train on.
        held_out: Questions that are asked before and after.
        overrides: Changes to both recipes, `key.path=value`.
        smoke: Tiny random parts instead of the real ones: shows in seconds that everything runs.
    """

    minutes: float = 8.0
    steps: int | None = None
    seed: int = 0
    threads: int | None = None
    image_size: int = 128
    scenes: int = 2500
    held_out: int = 90
    overrides: tuple[str, ...] = ()
    smoke: bool = False

    def __post_init__(self) -> None:
        for name in ("minutes", "scenes", "held_out"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @classmethod
    def for_smoke(cls, **changes: Any) -> DemoSettings:
        """Tiny model, 64 px, a few steps."""
        small = {"minutes": 0.3, "steps": 4, "image_size": 64, "scenes": 48, "held_out": 9, "smoke": True}
        return cls(**{**small, **changes})


@dataclass
class Phase:
    """One phase of training, for the report.

    Attributes:
        title: Its name.
        trains: What trains.
        data: What on.
        samples: Samples seen.
        steps: Optimizer steps.
        seconds: Wall time.
        curve: Loss over time: rows of `seconds` and `loss`.
    """

    title: str
    trains: str
    data: str
    samples: int
    steps: int
    seconds: float
    curve: list[dict[str, float]] = field(repr=False)

    def row(self) -> dict[str, Any]:
        """As JSON; first and last loss are means over a tenth of the steps."""
        losses = [point["loss"] for point in self.curve]
        tenth = max(1, len(losses) // 10)
        ends = {"first_loss": sum(losses[:tenth]) / tenth, "last_loss": sum(losses[-tenth:]) / tenth}
        return {**asdict(self), **ends}


def prepare_folder(folder: Path) -> None:
    """Make an empty folder for the run; an earlier demo in it goes.

    Raises:
        NotADirectoryError: It is a file.
        ValueError: It holds something else.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: give a folder")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / OWNED).is_file():
            raise ValueError(f"{folder} holds something that is no demo: choose another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def build_parts(
    settings: DemoSettings,
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor, list[dict[str, Any]], str]:
    """The untrained model with its processor, the rows of the report's table of parts, and a note about the tower.

    Raises:
        FileNotFoundError: A package of a part is missing; the message names the command that installs it.
    """
    if settings.smoke:
        from florence_vl.testing import tiny_model

        model, processor = tiny_model(seed=settings.seed)
        what = {"tower": "tiny random Florence-2", "llm": "tiny random Llama"}
        licenses = {"tower": "", "llm": ""}
        note = "A smoke run: every part is tiny and random, so no answer can be right but by chance."
    else:
        from florence_vl.model.assemble import build_model

        llm, vision = smollm2(), mini_florence2()
        model, processor = build_model(
            vision.path, llm, image_size=settings.image_size, dtype="float32", seed=settings.seed
        )
        kind = "pretrained" if vision.pretrained else "untrained"
        what = {"tower": f"mini Florence-2 ({kind}): DaViT and prompt encoder", "llm": "SmolLM2-135M-Instruct"}
        licenses = {"tower": "Apache-2.0", "llm": SMOLLM2.license}
        note = vision.note
    features = ", ".join(model.config.features or ())
    depth = model.config.projector_depth
    what["projector"] = f"{model.config.fusion} fusion of {features}; {depth} linear layers (untrained)"
    licenses["projector"] = "Apache-2.0"
    rows = [
        {
            "part": title,
            "what": what[part],
            "parameters": sum(parameter.numel() for _, parameter in model.part_parameters(part)),
            "license": licenses[part],
        }
        for part, title in zip(PARTS, ("vision tower", "fusion and projector", "language model"), strict=True)
    ]
    return model, processor, rows, note


def train_stage(
    name: str,
    source: Path,
    data: DemoData,
    folder: Path,
    minutes: float,
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    settings: DemoSettings,
) -> tuple[float, list[dict[str, Any]], str]:
    """Train by `recipes/demo/<name>` with the records, folder and time that the demo gives it.

    Returns:
        Wall time in seconds, the rows of metrics.jsonl, and what the recipe says it trains on.

    Raises:
        KeyboardInterrupt: A signal ended the training.
    """
    from florence_vl.train.loop import train
    from florence_vl.train.recipes import load_recipe

    recipe = load_recipe(f"demo/{name}")
    run = folder / name
    values = recipe.to_dict()
    values["data"]["sources"] = [{"path": str(source), "reader": "llava", "image_root": str(data.images)}]
    values["parts"]["llm"]["last_layers"] = max(1, model.config.get_text_config().num_hidden_layers // 3)
    values["checkpoint"]["export"] = name == "finetune"
    values |= {"output": str(run), "seed": settings.seed, "max_minutes": minutes, "threads": settings.threads}
    if settings.steps is not None:
        values["steps"] = settings.steps
    began = time.monotonic()
    result = train(load_recipe(values, settings.overrides), model, processor)
    if not result.finished:
        raise KeyboardInterrupt
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # 1 GB that nobody goes on from
    return time.monotonic() - began, read_jsonl(run / "metrics.jsonl"), source.stem


def run_demo(folder: Path, settings: DemoSettings | None = None, say: Say = print) -> Path:
    """Run the demo.

    Args:
        folder: Where everything is written; `report.html` and `model/` first of all.
        settings: What is done.
        say: Hears what is being done.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: A package of a part is missing; the message names the command that installs it.
        ValueError: The folder holds something else, or a setting is out of range.
    """
    import torch
    from transformers import set_seed

    settings = settings or DemoSettings()
    began = time.monotonic()
    clock = _clock(say, began)
    with clock("parts"):
        model, processor, parts, tower_note = build_parts(settings)
    prepare_folder(folder)
    (folder / OWNED).write_text(json.dumps(asdict(settings), indent=1))
    threads = settings.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    set_seed(settings.seed)
    with clock(f"{settings.scenes} pictures with captions and questions, {settings.held_out} held-out questions"):
        plan = DataPlan(settings.scenes, settings.held_out, settings.image_size, settings.seed)
        data = make_data(folder / "data", plan)
        _save_pictures(folder, data.held_out)
    questions = data.held_out
    with clock("answers before training"):
        _ask(model, processor, questions, "before", [question.image for question in questions])
    phases = _train(folder, settings, model, processor, data, clock)
    with clock("answers after training"):
        _ask(model, processor, questions, "after", [question.image for question in questions])
        _ask(model, processor, questions, "other picture", derangement(questions, settings.seed))
        _ask(model, processor, questions, "no picture", [None] * len(questions))
    _write_answers(folder, questions)
    shutil.move(folder / "finetune" / "model", folder / "model")
    conditions = ("before", "no picture", "other picture", "after")
    summary = {
        "date": date.today().strftime("%d %B %Y").lstrip("0"),
        "machine": f"CPU, threads: {threads} ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "summary": _summary(model, settings),
        "tower_note": tower_note,
        "score_note": (
            "Share of exact answers after the VQA script's normalisation, with its 95 % Wilson interval. No sprite of "
            "these pictures was in training; things that are to be named were, drawn otherwise. The grey columns say "
            "how far guessing goes: the same model is shown another picture, or none."
        ),
        "scores": {condition: scores(questions, condition) for condition in conditions},
        "seconds": time.monotonic() - began,
        "parts": parts,
        "phases": [phase.row() for phase in phases],
        "commands": (
            f'florence-vl chat --model {folder}/model --image FILE "What is shown in the picture?"\n'
            f"florence-vl demo --minutes 30 --out {folder}-longer\n"
            "florence-vl recipes list"
        ),
        "beside": "model/ (loads with from_pretrained), data/, pretrain/ and finetune/ (recipe, environment and "
        "metrics.jsonl of each stage), warmup.jsonl, answers.jsonl.",
    }
    (folder / "demo.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    report = write_report(folder)
    after, other = summary["scores"]["after"]["all"], summary["scores"]["other picture"]["all"]  # type: ignore[index]
    say(
        f"{100 * after['share']:.0f} % of {after['total']} held-out questions right "
        f"(95 % interval {100 * after['low']:.0f} to {100 * after['high']:.0f}), "
        f"{100 * other['share']:.0f} % with another picture"
    )
    say(f"report     {report}")
    say(f"model      {folder / 'model'}")
    return report


def _train(
    folder: Path, settings: DemoSettings, model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor,
    data: DemoData, clock: Callable[[str], Any],
) -> list[Phase]:  # fmt: skip
    template = processor.chat_template
    total = settings.minutes
    with clock("warm-up: the projector finds the captions' place among the word vectors"):
        began = time.monotonic()
        pairs = data.pairs[:WARM_UP_PICTURES]
        features = cache_features(model, processor, [open_image(path) for path, _ in pairs])
        targets = caption_vectors(model, processor, [caption for _, caption in pairs])
        left = max(1.0, 60 * total * WARM_UP_SHARE - (time.monotonic() - began))
        rows = warm_up(model, features, targets, left, settings.steps, seed=settings.seed)
        (folder / "warmup.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        size = min(256, len(targets))
        phase = Phase("Warm-up", "projector", "captions", size * len(rows), len(rows), time.monotonic() - began, rows)
        del features, targets
        gc.collect()
    phases = [phase]
    stages = (
        ("pretrain", "Stage 1", "tower, projector, last third of the LLM", data.captions, STAGE_1_SHARE),
        ("finetune", "Stage 2", "projector, last third of the LLM", data.questions, STAGE_2_SHARE),
    )
    for name, title, trains, source, share in stages:
        processor.chat_template = template  # stage 1 replaces it with `plain`
        with clock(f"{title.lower()}: {trains} learn"):
            seconds, rows, description = train_stage(
                name, source, data, folder, total * share, model, processor, settings
            )
        curve = [{"seconds": 60 * row["minutes"], "loss": row["loss"]} for row in rows]
        samples, steps = int(rows[-1]["samples"]), int(rows[-1]["step"])
        phases.append(Phase(title, trains, description, samples, steps, seconds, curve))
    return phases


def _summary(model: FlorenceVLForConditionalGeneration, settings: DemoSettings) -> str:
    side = settings.image_size
    tokens = model.num_image_tokens(side, side)
    return (
        "One Florence-2 is asked several questions about a picture; its features (DaViT's, and the encoder's after the "
        "prompts for a caption, for text and for regions) are fused by channel, projected, and stand among the word "
        f"vectors of a language model: {tokens} tokens for {side} x {side} pixels. A contrastive warm-up of the "
        "projector, stage 1 on captions (tower, projector and the last third of the LLM train) and stage 2 on "
        "questions (the tower is frozen) follow the paper in small."
    )


def _ask(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, questions: list[Question],
    condition: str, images: list[Any],
) -> None:  # fmt: skip
    asked = [(question.question, image) for question, image in zip(questions, images, strict=True)]
    for question, text in zip(questions, answer(model, processor, asked), strict=True):
        question.answers[condition] = text


def _save_pictures(folder: Path, questions: list[Question]) -> None:
    (folder / "held-out").mkdir(exist_ok=True)
    for index, question in enumerate(questions):
        question.image.save(folder / "held-out" / f"{index:03}.png")


def _write_answers(folder: Path, questions: list[Question]) -> None:
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for index, question in enumerate(questions):
            row = {
                "image": f"held-out/{index:03}.png",
                "kind": question.kind,
                "question": question.question,
                "expected": question.expected,
                "answers": question.answers,
                "right": {condition: question.right(condition) for condition in question.answers},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _clock(say: Say, began: float) -> Callable[[str], Any]:
    @contextmanager
    def phase(title: str) -> Iterator[None]:
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        say(f"[{minutes:2}:{seconds:02}] {title}")
        yield

    return phase
