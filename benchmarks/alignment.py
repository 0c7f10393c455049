"""Cost ratios of the alignment analysis: all feature subsets against one, and caching against the encoder's forward.

    python benchmarks/alignment.py [--encoder SPEC] [--images 400] [--llm smollm2]

Pictures are composed scenes of florence-vl-mini with their captions. Both sides of a ratio run alternately, so that a
busy machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from florence_vl.analyze.alignment import AlignmentConfig, train_alignment
from florence_vl.analyze.compare import feature_subsets
from florence_vl.analyze.encoders import load_encoder
from florence_vl.analyze.pooling import pool_images
from florence_vl.analyze.text import TextEncoder, pool_texts
from florence_vl.model.features import FeatureStore
from florence_vl.model.packaged import resolve
from florence_vl.train.contrastive import Groups
from florence_vl_mini.scenes import SceneGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="florence2_mini", help="a spec with four features or more")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--llm", default="smollm2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16, help="images in one forward")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(options.encoder).to(device)
    scenes = list(SceneGenerator(0, "test").scenes(options.images))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        files = []
        for index, scene in enumerate(scenes):
            files.append(root / f"{index}.jpg")
            scene.image.save(files[-1], quality=90)
        caching(encoder, files, root, options.batch_size, options.rounds)
        subsets(encoder, files, [s.detailed_caption for s in scenes], root, options, device)


def caching(encoder, files: list[Path], root: Path, batch_size: int, rounds: int) -> None:
    """Images per second: decode, preprocess, forward, pool and write, against the bare forward on ready tensors."""
    size = encoder.preprocess
    batch = torch.randn(batch_size, 3, size.height, size.width)
    encoder.encode_batch(batch)
    ratios, work, speeds = [], [], []
    per_round = len(files) // rounds
    for index in range(rounds):
        part = files[index * per_round : (index + 1) * per_round]
        times = [forward_seconds(encoder, batch)]
        cpu = time.process_time()
        _, report = pool_images(
            encoder, part, FeatureStore(encoder.identity, root / f"round-{index}"), batch_size=batch_size
        )
        cpu = time.process_time() - cpu
        times.append(forward_seconds(encoder, batch))
        forward, forward_cpu = (statistics.mean(values) for values in zip(*times, strict=True))
        own = batch_size / forward
        work.append(forward_cpu * report.computed / batch_size / cpu)
        ratios.append(report.computed / report.seconds / own)
        speeds.append(own)
    print(f"caching: {statistics.median(work):.0%} of the processor's work is the encoder's forward")
    print(
        f"caching reaches {statistics.median(ratios):.0%} of the encoder's own forward "
        f"({statistics.median(speeds):.1f} images/s, {len(files)} images, {rounds} rounds: "
        f"{', '.join(f'{r:.0%}' for r in ratios)})"
    )


def forward_seconds(encoder, batch: torch.Tensor, repeats: int = 4) -> tuple[float, float]:
    """Seconds of one forward of a batch: on the clock, and of the processor."""
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        features = encoder.encode_batch(batch)
    if batch.device != encoder.device:
        next(iter(features.values())).sum().item()  # waits for the device
    return (time.perf_counter() - start) / repeats, (time.process_time() - cpu) / repeats


def subsets(encoder, files: list[Path], captions: list[str], root: Path, options, device: str) -> None:
    """Time of all 15 subsets of four features against one subset, with the encoder's pass and without it."""
    llm = TextEncoder.load(resolve(options.llm, "llms"))
    text = pool_texts(llm, captions, FeatureStore(llm.identity, root / "text"))
    start = time.perf_counter()
    store, report = pool_images(encoder, files, FeatureStore(encoder.identity, root / "all"))
    encoding = time.perf_counter() - start
    names = list(encoder.feature_dims)[:4]
    groups = Groups.of(captions, [key for key in report.keys if key is not None])
    config = AlignmentConfig(steps=options.steps, evaluations=2)
    seconds = {}
    for label, chosen in feature_subsets(names, "all").items():
        start = time.perf_counter()
        train_alignment(store.matrix(report.keys, chosen), text, config, groups=groups, device=device)
        seconds[label] = time.perf_counter() - start
    everything, one, count = sum(seconds.values()), seconds["all"], len(seconds)
    once, apart = (encoding + everything) / (encoding + one), (count * encoding + everything) / (encoding + one)
    print(
        f"{count} subsets of {names} from one pass of the encoder take {once:.2f} times as long as one; with a pass "
        f"each it would be {apart:.1f} times; projections alone {everything / one:.1f} times "
        f"({options.steps} steps, {len(files)} pairs, {device}; pass {encoding:.0f} s)"
    )


if __name__ == "__main__":
    main()
