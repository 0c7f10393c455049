"""How well a Florence-2 captions, reads and finds objects on held-out scenes, and what each prompt's features tell.

Every figure stands beside chance (the answers of another picture, or guessing) and has a 95 % interval.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import StoppingCriteriaList

from florence_vl.evaluate.metrics.text import edit_distance
from florence_vl.model.loading import choose_device
from florence_vl.model.repetition import RepetitionStop
from florence_vl.statistics import interval, mean_interval
from florence_vl_mini.pretrain.data import normalize
from florence_vl_mini.scenes import Scene, SceneGenerator, assets, draw
from florence_vl_mini.scenes.annotations import Box
from florence_vl_mini.scenes.objects import add_text

BATCH = 32
MAX_NEW_TOKENS = {"<CAPTION>": 40, "<OCR>": 40, "<OD>": 80}
Figure = dict[str, float]


class Florence2Runner:
    """A Florence-2 folder, ready to answer its tasks about batches of pictures.

    Raises:
        FileNotFoundError: No model there.
    """

    def __init__(self, path: str | Path, device: str = "auto") -> None:
        from transformers import Florence2ForConditionalGeneration, Florence2Processor

        if not Path(path).is_dir():
            raise FileNotFoundError(f"no such folder: {path} (a Florence-2 saved by save_pretrained is expected)")
        self.device = choose_device(device)
        self.model = Florence2ForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.to(self.device).eval()
        self.processor = Florence2Processor.from_pretrained(path)

    def inputs(self, images: Sequence[Image.Image], task: str) -> dict[str, Tensor]:
        """Model inputs of one task about several pictures."""
        batch = self.processor(text=[task] * len(images), images=list(images), return_tensors="pt", padding=True)
        return {k: v.to(self.device) for k, v in batch.items()}

    @torch.no_grad()
    def answer(self, images: Sequence[Image.Image], task: str) -> list[str]:
        """Greedy answers, location tokens included, special tokens not."""
        out: list[str] = []
        tokenizer = self.processor.tokenizer
        for start in range(0, len(images), BATCH):
            batch = self.inputs(images[start : start + BATCH], task)
            ids = self.model.generate(
                **batch,
                max_new_tokens=MAX_NEW_TOKENS.get(task, 96),
                do_sample=False,
                num_beams=1,
                stopping_criteria=StoppingCriteriaList([RepetitionStop()]),
            )
            for text in tokenizer.batch_decode(ids, skip_special_tokens=False):
                for token in ("<s>", "</s>", "<pad>"):
                    text = text.replace(token, "")
                out.append(text.strip())
        return out

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[list[str], list[list[float]]]]:
        """Names and boxes (left, top, right, bottom in pixels) that `<OD>` finds in each picture."""
        out = []
        for image, answer in zip(images, self.answer(images, "<OD>"), strict=True):
            parsed = self.processor.post_process_generation(text=answer, task="<OD>", image_size=image.size)["<OD>"]
            out.append((parsed["labels"], parsed["bboxes"]))
        return out

    @torch.no_grad()
    def log_likelihood(self, image: Image.Image, task: str, answers: Sequence[str]) -> Tensor:
        """Sum of the answers' token log-probabilities: (answers,)."""
        batch = self.inputs([image], task)
        tokenizer = self.processor.tokenizer
        rows = tokenizer([f"<s>{a}</s>" for a in answers], add_special_tokens=False)["input_ids"]
        labels = torch.full((len(rows), max(map(len, rows))), -100, device=self.device)
        for i, row in enumerate(rows):
            labels[i, : len(row)] = torch.tensor(row, device=self.device)
        model, text = self.model, self.model.config.text_config
        image_VD = model.get_image_features(batch["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds = embeds.masked_scatter((batch["input_ids"] == model.config.image_token_id)[..., None], image_VD)
        encoded = model.model.language_model.encoder(inputs_embeds=embeds).last_hidden_state.expand(len(rows), -1, -1)
        shifted = F.pad(
            labels[:, :-1].masked_fill(labels[:, :-1] == -100, text.pad_token_id),
            (1, 0),
            value=text.decoder_start_token_id,
        )
        hidden = model.model.language_model.decoder(
            input_ids=shifted, encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return -losses.sum(1)


def with_interval(values: Sequence[float]) -> Figure:
    """Mean of values in [0, 1] with its 95 % interval over pictures: {"mean", "low", "high", "n"}."""
    if not len(values):
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    low, high = mean_interval(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def character_accuracy(given: str, wanted: str) -> float:
    """1 - edit distance / longer length; 1 for two empty texts."""
    longest = max(len(given), len(wanted))
    return 1 - edit_distance(given, wanted) / longest if longest else 1.0


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two (left, top, right, bottom) boxes."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def matches(
    found: Sequence[tuple[str, Sequence[float]]],
    wanted: Sequence[tuple[str, Sequence[float]]],
    labels: bool,
    threshold: float = 0.5,
) -> int:
    """Number of pairs with IoU of at least `threshold` (and the same label), matched greedily by IoU."""
    pairs = sorted(
        (
            (iou(f[1], w[1]), i, j)
            for i, f in enumerate(found)
            for j, w in enumerate(wanted)
            if not labels or f[0] == w[0]
        ),
        reverse=True,
    )
    used_f: set[int] = set()
    used_w: set[int] = set()
    for value, i, j in pairs:
        if value >= threshold and i not in used_f and j not in used_w:
            used_f.add(i)
            used_w.add(j)
    return len(used_f)


def _f1(found: list[Any], wanted: list[Any], labels: bool) -> float:
    """F1 of one picture; 1 where nothing was to find and nothing was found."""
    if not found and not wanted:
        return 1.0
    return 2 * matches(found, wanted, labels) / (len(found) + len(wanted))


def held_out(kind: str, n: int, seed: int, size: int, keep: Callable[[Scene], bool] = lambda _: True) -> list[Scene]:
    """The first `n` scenes of a kind on the test split that `keep` accepts; fewer where they are very rare."""
    generator = SceneGenerator(seed + 1000, "test", size, {kind: 1.0})
    out: list[Scene] = []
    for index in range(200 * n):
        if len(out) == n:
            break
        scene = generator[index]
        if keep(scene):
            out.append(scene)
    return out


def evaluate_florence2(path: str | Path, scenes: int = 300, seed: int = 0, device: str = "auto") -> dict[str, Any]:
    """Captions, reading and detection of a Florence-2 on held-out scenes, and its scores by size.

    Args:
        path: Folder with model and processor.
        scenes: Pictures a task.
        seed: Seed of the pictures.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Returns:
        {"caption": ..., "ocr": ..., "od": ...} and what `evaluate_details` returns: figures with intervals, each with
        its "chance".
    """
    from florence_vl_mini.pretrain.details import evaluate_details

    runner = Florence2Runner(path, device)
    size = runner.processor.image_processor.size["height"]
    known = {s.name for s in assets.sprites("train")}
    rng = Random(seed)

    singles = held_out("single", scenes, seed, size)
    names = sorted({s.regions[0].name for s in singles})
    captions = runner.answer([s.image for s in singles], "<CAPTION>")
    right = [float(c == s.caption) for c, s in zip(captions, singles, strict=True)]
    seen = [s.regions[0].name in known for s in singles]
    ranks: list[float] = []
    for scene in singles:
        wrong = rng.sample([n for n in names if n != scene.regions[0].name], min(19, len(names) - 1))
        scores = runner.log_likelihood(
            scene.image, "<CAPTION>", [assets.with_article(n) for n in (scene.regions[0].name, *wrong)]
        )
        ranks.append(float((scores > scores[0]).sum()))
    most = max(names, key=lambda n: sum(s.regions[0].name == n for s in singles))
    report: dict[str, Any] = {
        "caption": {
            "exact, known concept, unseen image": with_interval([r for r, k in zip(right, seen, strict=True) if k]),
            "exact, new concept": with_interval([r for r, k in zip(right, seen, strict=True) if not k]),
            "retrieval of 20, known concept": with_interval(
                [float(r == 0) for r, k in zip(ranks, seen, strict=True) if k]
            ),
            "retrieval of 20, new concept": with_interval(
                [float(r == 0) for r, k in zip(ranks, seen, strict=True) if not k]
            ),
            "chance": {"exact": sum(s.regions[0].name == most for s in singles) / len(singles), "retrieval": 0.05},
        }
    }

    words = held_out("lettering", scenes, seed, size, lambda s: len(s.texts) == 1 and s.texts[0].text.isalpha())
    read = runner.answer([s.image for s in words], "<OCR>")
    by_length: dict[str, list[float]] = defaultdict(list)
    accuracy, chance, exact = [], [], []
    shuffled = read[1:] + read[:1]
    for scene, given, other in zip(words, read, shuffled, strict=True):
        value = character_accuracy(given, scene.ocr)
        accuracy.append(value)
        chance.append(character_accuracy(other, scene.ocr))
        exact.append(float(given == scene.ocr))
        length = len(scene.ocr)
        by_length["3-4 letters" if length <= 4 else "5-6 letters" if length <= 6 else "7-8 letters"].append(value)
    report["ocr"] = {
        "character accuracy": with_interval(accuracy),
        "exact word": with_interval(exact),
        **{f"character accuracy, {k}": with_interval(v) for k, v in sorted(by_length.items())},
        "chance": {"character accuracy": float(np.mean(chance)), "exact": 0.0},
    }

    pictures = held_out("objects", scenes, seed, size, lambda s: all(r.name in known for r in s.regions))
    found = [list(zip(labels, boxes, strict=True)) for labels, boxes in runner.detect([s.image for s in pictures])]
    wanted = [[(r.name, r.box) for r in s.regions] for s in pictures]
    moved = found[1:] + found[:1]
    report["od"] = {
        "box F1 at IoU 0.5": with_interval([_f1(f, w, False) for f, w in zip(found, wanted, strict=True)]),
        "box and name F1 at IoU 0.5": with_interval([_f1(f, w, True) for f, w in zip(found, wanted, strict=True)]),
        "chance": {
            "box": float(np.mean([_f1(f, w, False) for f, w in zip(moved, wanted, strict=True)])),
            "box and name": float(np.mean([_f1(f, w, True) for f, w in zip(moved, wanted, strict=True)])),
        },
    }
    return report | evaluate_details(runner, scenes, seed)


# --- what the features of each prompt tell
# -----------------------------------------------------------------------------

PROBE_TARGETS = ("text", "object", "position")
PROBE_FEATURES = ("davit", "caption", "ocr", "grounding")
PROBE_WORDS, PROBE_OBJECTS = 16, 80  # of 16 objects any feature tells all


def probe_pictures(n: int, seed: int, size: int) -> tuple[list[Image.Image], dict[str, Tensor]]:
    """Pictures of one of `PROBE_OBJECTS` objects and one of `PROBE_WORDS` words, and labels {target: (n,)}.

    text: which word; object: which name; position: cell of the object's center in a 4 x 4 grid. The three are
        independent.
    """
    rng = Random(f"probe/{seed}")
    pool = sorted({s.name for s in assets.sprites("test") if not s.new_concept})
    names = Random(7).sample(pool, PROBE_OBJECTS)
    by_name = {name: [s for s in assets.sprites("test") if s.name == name] for name in names}
    words = Random(7).sample([w for w in assets.words("test") if 4 <= len(w) <= 6], PROBE_WORDS)
    images: list[Image.Image] = []
    labels: dict[str, list[int]] = defaultdict(list)
    while len(images) < n:
        canvas, _ = draw.background(rng, size)
        name, word = rng.randrange(PROBE_OBJECTS), rng.randrange(PROBE_WORDS)
        sprite = draw.sprite_at(rng, rng.choice(by_name[names[name]]).id, round(size * rng.uniform(0.26, 0.4)))
        spot = draw.place(rng, size, sprite.width, sprite.height, [], gap=0)
        assert spot is not None
        canvas.paste(sprite, spot, sprite)
        box: Box = (float(spot[0]), float(spot[1]), float(spot[0] + sprite.width), float(spot[1] + sprite.height))
        if add_text(rng, canvas, words[word], [box], size, (0.13, 0.2), tilt=0.0) is None:
            continue
        column = min(3, int((box[0] + box[2]) / 2 * 4 / size))
        row = min(3, int((box[1] + box[3]) / 2 * 4 / size))
        images.append(canvas)
        for target, value in zip(PROBE_TARGETS, (word, name, row * 4 + column), strict=True):
            labels[target].append(value)
    return images, {k: torch.tensor(v) for k, v in labels.items()}


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 1e-2) -> float:
    """Accuracy of multinomial logistic regression on standardized features, fitted by L-BFGS in float64.

    Args:
        train: (N, D).
        train_labels: (N,).
        test: (M, D).
        test_labels: (M,).
        decay: L2 penalty, times half the squared norm of the weights.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - mean).double() / std for x in (train, test))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = torch.zeros(train.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, train_labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(((test @ weight + bias).argmax(1) == test_labels).double().mean())


def load_tower(path: str | Path, features: Sequence[str] = PROBE_FEATURES) -> Any:
    """The project's own vision tower with the weights of a Florence-2 folder, frozen."""
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    from florence_vl.model.configuration import FLORENCE2_PROMPTS, FlorenceVLConfig
    from florence_vl.model.towers.florence2 import Florence2Tower

    source = Florence2ForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    tokenizer = Florence2Processor.from_pretrained(path).tokenizer
    prompts = {name: FLORENCE2_PROMPTS[name] for name in features if name != "davit"}
    config = FlorenceVLConfig(
        vision_config=source.config,
        text_config={"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
                     "intermediate_size": 16, "vocab_size": 16},  # unused: the tower alone is built
        features=tuple(features),
        prompts=prompts,
        prompt_token_ids={n: tokenizer(t)["input_ids"] for n, t in prompts.items()},
        image_token_id=3,
    )  # fmt: skip
    tower = Florence2Tower(config)
    tower.davit.load_state_dict(source.model.vision_tower.state_dict())
    tower.image_projector.load_state_dict(source.model.multi_modal_projector.state_dict())
    if tower.encoder is not None:
        tower.encoder.load_state_dict(source.model.language_model.encoder.state_dict())
    return tower.eval().requires_grad_(False)


def probe_prompts(
    path: str | Path, pictures: int = 1600, seeds: Sequence[int] = (0, 1, 2), device: str = "auto"
) -> dict[str, Any]:
    """Table of linear-probe accuracies: features of each prompt against text, object and position.

    Features are the tower's grid tokens averaged over the picture. Each seed draws new pictures; three quarters of them
    train the probe.

    Returns:
        {"chance": {target: accuracy of the commonest class}, feature: {target: {"mean", "half", "runs"}}}.
    """

    device = choose_device(device)
    tower = load_tower(path).to(device)
    size = 32 * math.isqrt(_grid_positions(path))
    scores: dict[str, dict[str, list[float]]] = {f: {t: [] for t in PROBE_TARGETS} for f in PROBE_FEATURES}
    chance: dict[str, list[float]] = {t: [] for t in PROBE_TARGETS}
    cut = pictures * 3 // 4
    for seed in seeds:
        images, labels = probe_pictures(pictures, seed, size)
        pooled: dict[str, list[Tensor]] = defaultdict(list)
        for start in range(0, pictures, BATCH):
            pixels = torch.stack(
                [torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) for i in images[start : start + BATCH]]
            )
            with torch.no_grad():
                for name, tokens in tower(normalize(pixels.to(device))).items():
                    pooled[name].append(tokens.mean(1).cpu())
        for target, values in labels.items():
            counts = values[cut:].bincount()
            chance[target].append(float(counts.max() / counts.sum()))
            for name, parts in pooled.items():
                data = torch.cat(parts)
                scores[name][target].append(linear_probe(data[:cut], values[:cut], data[cut:], values[cut:]))
    table: dict[str, Any] = {"chance": {t: sum(v) / len(v) for t, v in chance.items()}}
    for name, row in scores.items():
        table[name] = {}
        for target, runs in row.items():
            result = interval(runs)
            table[name][target] = {"mean": result.mean, "half": result.half, "runs": result.runs}
    return table


def _grid_positions(path: str | Path) -> int:
    from transformers import Florence2Processor

    return Florence2Processor.from_pretrained(path).num_image_tokens - 1


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = ["| task | measure | score | 95 % interval | n | chance |", "|---|---|---|---|---|---|"]
    for task in (task for task in report if task != "probe"):
        chance = report[task]["chance"]
        for measure, figure in report[task].items():
            if measure == "chance":
                continue
            key = max((k for k in chance if measure.startswith(k) or k in measure), key=len, default=None)
            guess = f"{chance[key]:.3f}" if key else ""
            lines.append(
                f"| {task} | {measure} | {figure['mean']:.3f} | {figure['low']:.3f} to {figure['high']:.3f} | "
                f"{figure['n']} | {guess} |"
            )
    if "probe" in report:
        probe = report["probe"]
        lines += ["", "| features | " + " | ".join(PROBE_TARGETS) + " |", "|---" * (len(PROBE_TARGETS) + 1) + "|"]
        lines.append("| chance | " + " | ".join(f"{probe['chance'][t]:.3f}" for t in PROBE_TARGETS) + " |")
        for name in PROBE_FEATURES:
            cells = [
                f"{probe[name][t]['mean']:.3f}"
                + (f" ± {probe[name][t]['half']:.3f}" if probe[name][t]["half"] is not None else "")
                for t in PROBE_TARGETS
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


__all__ = ["Florence2Runner", "evaluate_florence2", "linear_probe", "probe_prompts", "to_markdown"]
