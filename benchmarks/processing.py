"""Image processing against transformers' LLaVA processor, and the cost of encoding a record.

Prints medians over interleaved runs on one thread, so that the ratios hold on a busy machine too.
"""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import side_by_side
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from florence_vl.data.encode import RecordEncoder
from florence_vl.data.records import Record
from florence_vl.model.image_processing import FlorenceVLImageProcessor
from florence_vl.model.pictures import open_image
from florence_vl.model.tiny import tiny_processor

SIZES = {"800x600": (800, 600), "600x800": (600, 800), "4000x3000": (4000, 3000), "8000x200": (8000, 200)}


def picture(width: int, height: int) -> Image.Image:
    """A smooth random picture: a small noise image, enlarged."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def peak_mib(function: Callable[[], Any]) -> float:
    """Peak of NumPy's and Python's allocations, MiB (Pillow's own buffers are not counted)."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    ours = FlorenceVLImageProcessor()
    llava = LlavaImageProcessorPil(
        do_pad=True,
        size={"height": 768, "width": 768},
        do_center_crop=False,
        image_mean=list(ours.image_mean),
        image_std=list(ours.image_std),
    )
    print("pad + resize to 768 + normalise, PIL image to tensor, one thread")
    print(
        f"{'image':>10} {'LLaVA ms':>9} {'ours ms':>8} {'ratio':>6} {'LLaVA MiB':>10} {'ours MiB':>9} {'max diff':>9}"
    )
    for name, size in SIZES.items():
        image = picture(*size)
        run = {
            "llava": lambda image=image: llava(image, return_tensors="pt")["pixel_values"],
            "ours": lambda image=image: ours(image, return_tensors="pt")["pixel_values"],
        }
        diff = float((run["llava"]() - run["ours"]()).abs().max())
        took = side_by_side(run, rounds=5)
        memory = {key: peak_mib(function) for key, function in run.items()}
        print(
            f"{name:>10} {took['llava'] * 1e3:9.1f} {took['ours'] * 1e3:8.1f} {took['llava'] / took['ours']:6.2f} "
            f"{memory['llava']:10.1f} {memory['ours']:9.1f} {diff:9.1e}"
        )

    buffer = io.BytesIO()
    picture(800, 600).save(buffer, "JPEG", quality=85)
    processor = tiny_processor(image_size=768)
    encode = RecordEncoder(processor)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image in detail."}]}
    answer = {"role": "assistant", "content": "The image shows a house and a car on a street. " * 10}
    record = Record("1", "benchmark", [user, answer], [buffer.getvalue()])
    decoded = open_image(record.images[0])
    took = side_by_side(
        {
            "decode the JPEG": lambda: open_image(record.images[0]),
            "tokenize and label": lambda: encode.tokenize(record),
            "process the image": lambda: ours(decoded, return_tensors="pt"),
            "encode the record": lambda: encode(record),
        },
        rounds=20,
    )
    print(f"\none record, 800x600 JPEG, {encode.length(record)} tokens")
    for name, seconds in took.items():
        print(f"{name:>20} {seconds * 1e3:7.2f} ms")


if __name__ == "__main__":
    main()
