"""Data loading: opening a large record file, encoded samples per second and worker, and fill of packed rows.

    python benchmarks/data.py open [--records 1000000] [--no-json-load]
    python benchmarks/data.py encode [--records 200] [--pixels 768] [--workers 0 1 2]
    python benchmarks/data.py pack [--samples 20000] [--budgets 4096 8192]

`open` writes a made LLaVA file (JSON list and JSON lines) to a temporary folder and opens it in fresh processes against
`json.load`: time, and growth of private resident memory. `encode` makes JPEGs of 640x480 px (COCO's usual size) and
compares the encoder with what no loader can avoid (decoding and resizing by PIL). `pack` draws lengths like LLaVA-1.5's
665K mix.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Composition of LLaVA-1.5's instruction mix, thousands of samples: "Improved Baselines with Visual Instruction Tuning"
# (arXiv 2310.03744), appendix, table of the data mixture. The text lengths (tokens of a whole conversation: median and
# sigma of a log-normal) are assumptions from the form of each set, not measurements: short answers are grouped into one
# conversation an image (VQAv2, GQA, OCR-VQA, VG), ShareGPT holds long text-only chats and is cut at 2,048.
LLAVA_665K: dict[str, tuple[float, float, float, bool]] = {
    "LLaVA": (158, 260, 0.5, True),
    "ShareGPT": (40, 1100, 0.8, False),
    "VQAv2": (83, 130, 0.5, True),
    "GQA": (72, 160, 0.5, True),
    "OKVQA": (9, 40, 0.3, True),
    "OCR-VQA": (80, 110, 0.3, True),
    "A-OKVQA": (66, 80, 0.3, True),
    "TextCaps": (22, 45, 0.3, True),
    "RefCOCO": (48, 150, 0.6, True),
    "VG": (86, 300, 0.5, True),
}
IMAGE_TOKENS = 576


def resident() -> int:
    """Private resident bytes of this process (mapped files, which processes share, are not counted)."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a call in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def write_records(folder: Path, count: int) -> tuple[Path, Path]:
    """A JSON list and JSON lines of LLaVA records of about 500 bytes (1,000 conversations, distinct names)."""
    rng = random.Random(0)
    words = ["a", "red", "car", "stands", "near", "the", "old", "house", "with", "people", "and", "dogs", "on", "grass"]
    texts = []
    for _ in range(1000):
        turns = []
        for _ in range(2):
            turns.append({"from": "human", "value": " ".join(rng.choices(words, k=10)) + "?"})
            turns.append({"from": "gpt", "value": " ".join(rng.choices(words, k=25)) + "."})
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        texts.append(json.dumps(turns))
    array, lines = folder / "rows.json", folder / "rows.jsonl"
    with array.open("w") as one, lines.open("w") as two:
        one.write("[")
        for start in range(0, count, 10_000):
            rows = [
                f'{{"id": "{n}", "image": "{n:09d}.jpg", "conversations": {texts[n % 1000]}}}'
                for n in range(start, min(start + 10_000, count))
            ]
            one.write((",\n" if start else "") + ",\n".join(rows))
            two.write("\n".join(rows) + "\n")
        one.write("]")
    return array, lines


def open_json(path: str) -> tuple[float, float, int, float]:
    """(seconds, CPU seconds, bytes grown, 0: records are in memory) by `json.load`."""
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    with open(path) as file:
        rows = json.load(file)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert rows
    return seconds, cpu, resident() - before, 0.0


def open_indexed(path: str, reads: int) -> tuple[float, float, int, float]:
    """(seconds, CPU seconds, bytes grown after the reads, CPU seconds per shuffled record) of the reader."""
    from florence_vl.data.mixture import Mixture, MixtureSource
    from florence_vl.data.readers import open_reader

    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    reader = open_reader(path, "llava")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    mixture = Mixture([MixtureSource("a", reader)])
    begin = time.process_time()
    for position in range(reads):
        mixture[position]
    return seconds, cpu, resident() - before, (time.process_time() - begin) / reads


def bench_open(records: int, with_json_load: bool) -> None:
    """Print the table of openings."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLORENCE_VL_CACHE"] = f"{folder}/cache"
        array, lines = write_records(Path(folder), records)
        print(f"{records:,} records, {array.stat().st_size / 1e9:.2f} GB")
        rows = []
        if with_json_load:
            rows.append(("json.load", *in_fresh_process(open_json, str(array))))
        for name, path in (("list", array), ("lines", lines)):
            rows.append((f"{name}, first time", *in_fresh_process(open_indexed, str(path), 2000)))
            rows.append((f"{name}, indexed", *in_fresh_process(open_indexed, str(path), 2000)))
        base = rows[0]
        for name, seconds, cpu, grown, read in rows:
            ratio = f"  {base[2] / cpu:8.1f}x faster (CPU)" if with_json_load else ""
            memory = f"{grown / 1e6:9.1f} MB"
            print(f"{name:18} {seconds:8.3f} s  {cpu:8.3f} s CPU  {memory}  {read * 1e6:5.0f} us a record{ratio}")


class JpegRecords:
    """Records with one JPEG each, made once and held as bytes."""

    def __init__(self, count: int) -> None:
        from PIL import Image

        rng = np.random.default_rng(0)
        self.pictures = []
        for _ in range(16):
            coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((640, 480))
            buffer = io.BytesIO()
            coarse.save(buffer, "JPEG", quality=90)
            self.pictures.append(buffer.getvalue())
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        from florence_vl.data.records import Record

        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image in detail."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a red car next to a small house. " * 20}]},
        ]
        return Record(str(index), "made", messages, [self.pictures[index % len(self.pictures)]])


def bench_encode(records: int, pixels: int, workers: list[int]) -> None:
    """Print records a CPU second of the encoder's parts, and records a second of the whole stream by workers."""
    import torch
    from PIL import Image

    from florence_vl.data.encode import RecordEncoder
    from florence_vl.data.mixture import Mixture, MixtureSource
    from florence_vl.data.packing import BatchLayout, build_batches
    from florence_vl.model.tiny import tiny_processor

    torch.set_num_threads(1)
    encoder = RecordEncoder(tiny_processor(image_size=pixels))
    made = JpegRecords(records)
    sample = [made[i] for i in range(min(records, 32))]

    def bare() -> None:
        for record in sample:
            image = Image.open(io.BytesIO(record.images[0])).convert("RGB").resize((pixels, pixels), Image.BICUBIC)
            np.asarray(image, dtype=np.float32)

    parts: dict[str, Callable[[], object]] = {
        "PIL decode and resize alone": bare,
        "encode (text, image, labels)": lambda: [encoder(record) for record in sample],
        "plan (text only)": lambda: [encoder.tokenize(record) for record in sample],
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(5):  # CPU seconds, interleaved: other load on the machine does not count
        for name, run in parts.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    base = statistics.median(times["PIL decode and resize alone"])
    for name, values in times.items():
        seconds = statistics.median(values)
        print(f"{name:30} {len(sample) / seconds:9.1f} records a CPU second  {base / seconds:6.2f} of PIL alone")
    first = None
    for number in workers:
        config = BatchLayout(tokens_per_row=4096, global_batch_size=1, window=64)
        batches = build_batches(Mixture([MixtureSource("made", made)]), encoder, config, num_workers=number)
        next(batches)
        start, count = time.perf_counter(), 0
        while count < records:
            next(batches)
            count += len(batches.ids)
        rate = count / (time.perf_counter() - start)
        batches.close()
        first = first or rate
        print(f"stream, {number} workers {'':12} {rate:9.1f} records/s  {rate / first:6.2f} of {workers[0]} workers")
    print(f"cores: {os.cpu_count()}, load: {os.getloadavg()[0]:.1f}")


def llava_665k_lengths(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, images) of samples drawn like LLaVA-1.5's 665K mix, see `LLAVA_665K`; text is cut at 2,048 tokens."""
    rng = np.random.default_rng(seed)
    names = list(LLAVA_665K)
    shares = np.array([LLAVA_665K[name][0] for name in names])
    chosen = rng.choice(len(names), size=samples, p=shares / shares.sum())
    median = np.array([LLAVA_665K[name][1] for name in names])[chosen]
    sigma = np.array([LLAVA_665K[name][2] for name in names])[chosen]
    images = np.array([int(LLAVA_665K[name][3]) for name in names])[chosen]
    text = np.minimum(np.exp(np.log(median) + sigma * rng.standard_normal(samples)), 2048).astype(int)
    return text + IMAGE_TOKENS * images, images


def bench_pack(samples: int, budgets: list[int]) -> None:
    """Print how full batches are by layout, and what that means against plain padding."""
    from florence_vl.data.layout import pack_first_fit

    lengths, images = llava_665k_lengths(samples)
    print(f"{samples} samples, mean {lengths.mean():.0f} tokens, median {np.median(lengths):.0f}, max {lengths.max()}")

    def padded(size: int, window: int | None) -> float:
        slots = 0
        order = lengths.copy()
        for start in range(0, samples, window or samples):
            part = order[start : start + window] if window else order
            part = np.sort(part) if window else part
            slots += sum(part[i : i + size].max() * len(part[i : i + size]) for i in range(0, len(part), size))
        return float(lengths.sum() / slots)

    base = padded(16, None)
    rows = [("padded, 16 a batch, any order", base, 0.0)]
    rows.append(("padded, 16 a batch, grouped in windows of 256", padded(16, 256), 0.0))
    for budget in budgets:
        for window in (64, 256, 1024):
            start, used = time.perf_counter(), 0
            for begin in range(0, samples, window):
                part = slice(begin, begin + window)
                used += len(pack_first_fit(lengths[part].tolist(), images[part].tolist(), budget, 16))
            seconds = (time.perf_counter() - start) / samples
            rows.append((f"packed, {budget} a row, window {window}", float(lengths.sum() / used / budget), seconds))
    for name, efficiency, seconds in rows:
        cost = f"  {seconds * 1e6:5.1f} us a sample" if seconds else ""
        print(f"{name:46} {efficiency:6.1%} full  {efficiency / base:5.2f}x of padded{cost}")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("open")
    one.add_argument("--records", type=int, default=1_000_000)
    one.add_argument("--no-json-load", action="store_true")
    two = parts.add_parser("encode")
    two.add_argument("--records", type=int, default=200)
    two.add_argument("--pixels", type=int, default=768)
    two.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    three = parts.add_parser("pack")
    three.add_argument("--samples", type=int, default=20_000)
    three.add_argument("--budgets", type=int, nargs="+", default=[4096, 8192])
    options = parser.parse_args()
    if options.part == "open":
        bench_open(options.records, not options.no_json_load)
    elif options.part == "encode":
        bench_encode(options.records, options.pixels, options.workers)
    else:
        bench_pack(options.samples, options.budgets)


if __name__ == "__main__":
    main()
