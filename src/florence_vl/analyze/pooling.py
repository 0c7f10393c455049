"""Mean-pooled features of images, computed once and stored in a `FeatureStore`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from florence_vl.analyze.encoders.base import VisionEncoder
from florence_vl.model.features import FeatureStore, content_key

if TYPE_CHECKING:
    from florence_vl.data.records import ImageSource


def image_key(source: ImageSource) -> bytes:
    """Key of an image: a hash of the file's bytes, or of the pixels of a PIL image.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        image = source.convert("RGB")
        return content_key(f"{image.size}".encode() + image.tobytes())
    if isinstance(source, bytes):
        return content_key(source)
    if isinstance(source, str) and source.startswith("data:"):
        return content_key(source.encode())
    if isinstance(source, (str, Path)):
        return content_key(Path(source).read_bytes())
    return content_key(source.read())


@dataclass
class PoolingReport:
    """Report of pooling.

    Args:
        keys: Key of each input; None if the image is unreadable.
        problems: First lines of the errors of unreadable images, with counts.
        computed: Number of inputs that went through the encoder.
        seconds: Wall time for these.
    """

    keys: list[bytes | None]
    problems: Counter[str] = field(default_factory=Counter)
    computed: int = 0
    seconds: float = 0.0


def pool_images(
    encoder: VisionEncoder,
    images: Sequence[ImageSource],
    store: FeatureStore | None = None,
    *,
    batch_size: int = 16,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    keys: Sequence[bytes | None] | None = None,
) -> tuple[FeatureStore, PoolingReport]:
    """Mean-pool every feature of every image over its tokens, computing only those missing in the store.

    Decoding and preprocessing run in threads in parallel with the encoder.

    Args:
        encoder: The encoder.
        images: Image sources; unreadable ones are counted, not raised.
        store: Store of the result; the encoder's own store by default.
        batch_size: Images per forward pass.
        workers: Number of decoding threads.
        progress: Called with (done, total) after each batch.
        keys: `image_key` of each image, if already known.

    Returns:
        The store and the report; `report.keys` are the keys of its rows.
    """
    from florence_vl.model.pictures import open_image

    store = store or FeatureStore(encoder.identity)
    names = list(encoder.feature_dims)
    report = PoolingReport(list(keys) if keys is not None else image_keys(images, Counter()))
    todo: dict[bytes, int] = {}
    for index, key in enumerate(report.keys):
        if key is not None and key not in todo and not store.has(key, names):
            todo[key] = index
    if not todo:
        return store, report

    def prepare(index: int) -> Tensor:
        return encoder.preprocess(open_image(images[index]))

    start = time.perf_counter()
    batch_keys: list[bytes] = []
    batch: list[Tensor] = []
    done = 0

    def run() -> None:
        nonlocal done
        if batch:
            features = encoder.encode_batch(torch.stack(batch))
            store.add(batch_keys, {name: x_BND.float().mean(dim=1) for name, x_BND in features.items()})
            done += len(batch)
            batch_keys.clear()
            batch.clear()
            if progress:
                progress(done, len(todo))

    bad: dict[bytes, str] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for key, future in ahead(pool, prepare, todo.items(), window=2 * batch_size):
            try:
                batch.append(future.result())
            except (ValueError, OSError) as error:
                bad[key] = str(error).splitlines()[0]
                continue
            batch_keys.append(key)
            if len(batch) == batch_size:
                run()
        run()
    store.flush()
    report.computed, report.seconds = done, time.perf_counter() - start
    for index, key in enumerate(report.keys):
        if key in bad:
            report.keys[index] = None
            report.problems[bad[key]] += 1
    return store, report


def image_keys(images: Sequence[ImageSource], problems: Counter[str]) -> list[bytes | None]:
    """`image_key` of every image; None, and counted in `problems`, if a file is unreadable."""
    keys: list[bytes | None] = []
    for source in images:
        try:
            keys.append(image_key(source))
        except OSError as error:
            keys.append(None)
            problems[f"{type(error).__name__}: {error}"] += 1
    return keys


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Tensor], items: Any, window: int
) -> Iterator[tuple[bytes, Future[Tensor]]]:
    """Submit at most `window` items before their results are consumed, in order, so that memory is limited."""
    waiting: list[tuple[bytes, Future[Tensor]]] = []
    for key, index in items:
        waiting.append((key, pool.submit(work, index)))
        if len(waiting) >= window:
            yield waiting.pop(0)
    yield from waiting
