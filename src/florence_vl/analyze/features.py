"""Mean-pooled features, computed once and kept on disk under what decides them: encoder, weights, preprocessing, input.

Layout: `ROOT/<digest of the identity>/identity.json` and append-only `*.safetensors` shards with `keys` (n, 16) and one
(n, D) fp32 table a feature. A shard is written atomically, so an interrupted run resumes with the shards it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from florence_vl.analyze.encoders.base import VisionEncoder, digest
from florence_vl.files import cache_dir

if TYPE_CHECKING:
    from florence_vl.data.records import ImageSource

FORMAT = 1
SHARD_ROWS = 4096
SHARD_SECONDS = 60.0  # slow encoders write sooner, so that little is lost with an interrupted run


def default_root() -> Path:
    """Where pooled features are kept: `cache_dir()/features`."""
    return cache_dir() / "features"


def content_key(data: bytes) -> bytes:
    """16 bytes that stand for an input's content."""
    return hashlib.blake2b(data, digest_size=16).digest()


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


class PooledStore:
    """Pooled vectors by key, for one identity.

    Args:
        identity: What decides the vectors' values; another identity is another folder, so they never mix.
        root: Folder of all stores; `cache_dir()/features` by default.

    Raises:
        ValueError: The folder holds another identity, or a shard is damaged; the message says what to delete.
    """

    def __init__(self, identity: Mapping[str, Any], root: Path | None = None) -> None:
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        self.folder = (root or default_root()) / digest(self.identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_identity()
        # names of the features of a shard -> key -> number of the shard and row in it, as one integer
        self._where: dict[tuple[str, ...], dict[bytes, int]] = {}
        self._shards: list[Path] = []
        self._flushed = time.monotonic()
        self._pending: list[tuple[bytes, dict[str, Tensor]]] = []
        self._pending_keys: dict[bytes, set[str]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def _keep_identity(self) -> None:
        path = self.folder / "identity.json"
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError:
                found = None
            if found != self.identity:
                raise ValueError(
                    f"{path} does not hold the identity that its folder is named after; delete {self.folder}"
                )
            return
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(self.identity, file, indent=1, sort_keys=True)
        os.replace(temporary, path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(str(path), "pt") as shard:
                keys = [bytes(row) for row in shard.get_tensor("keys").numpy()]
                names = [name.removeprefix("feature.") for name in shard.keys() if name.startswith("feature.")]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, its features are then computed again") from None
        first = len(self._shards) << 32
        self._shards.append(path)
        self._where.setdefault(tuple(sorted(names)), {}).update((key, first + row) for row, key in enumerate(keys))

    def _find(self, key: bytes, name: str) -> int | None:
        for names, rows in self._where.items():
            if name in names and key in rows:
                return rows[key]
        return None

    def has(self, key: bytes, names: Sequence[str]) -> bool:
        """Whether all these features of an input are there."""
        pending = self._pending_keys.get(key, set())
        return all(name in pending or self._find(key, name) is not None for name in names)

    def add(self, keys: Sequence[bytes], vectors: Mapping[str, Tensor]) -> None:
        """Keep pooled vectors; they are on disk after `flush`, every `SHARD_ROWS` rows and every `SHARD_SECONDS`.

        Args:
            keys: n keys.
            vectors: Feature name -> (n, D).
        """
        if self._pending and set(self._pending[0][1]) != set(vectors):
            self.flush()  # a shard's rows have the same features
        rows = {name: table.detach().float().cpu() for name, table in vectors.items()}
        for index, key in enumerate(keys):
            self._pending.append((key, {name: table[index] for name, table in rows.items()}))
            self._pending_keys[key] = set(rows)
        if len(self._pending) >= SHARD_ROWS or time.monotonic() - self._flushed > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one shard, atomically."""
        self._flushed = time.monotonic()
        if not self._pending:
            return
        names = list(self._pending[0][1])
        tables = {f"feature.{n}": torch.stack([vectors[n] for _, vectors in self._pending]) for n in names}
        keys = torch.tensor([list(key) for key, _ in self._pending], dtype=torch.uint8)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file({"keys": keys, **tables}, str(temporary), metadata={"format": str(FORMAT)})
        os.replace(temporary, path)
        self._pending, self._pending_keys = [], {}
        self._index(path)

    def matrix(self, keys: Sequence[bytes], names: Sequence[str]) -> Tensor:
        """Rows for these keys with the named features side by side along channels: (n, sum of D), fp32.

        Raises:
            KeyError: A key is not there.
        """
        self.flush()
        shards: dict[Path, dict[str, list[tuple[int, int]]]] = {}
        for name in names:
            for target, key in enumerate(keys):
                found = self._find(key, name)
                if found is None:
                    raise KeyError(f"{name} of {key.hex()} is not in {self.folder}")
                path = self._shards[found >> 32]
                shards.setdefault(path, {}).setdefault(name, []).append((target, found & 0xFFFFFFFF))
        result: Tensor | None = None
        columns: dict[str, slice] = {}
        for path, wanted in shards.items():
            with safe_open(str(path), "pt") as shard:
                if result is None:
                    start = 0
                    for name in names:
                        width = self._width(name)
                        columns[name] = slice(start, start + width)
                        start += width
                    result = torch.empty(len(keys), start)
                for name, pairs in wanted.items():
                    targets, rows = zip(*pairs, strict=True)
                    result[list(targets), columns[name]] = shard.get_tensor(f"feature.{name}")[list(rows)]
        return result if result is not None else torch.empty(0, 0)

    def _width(self, name: str) -> int:
        rows = next(rows for names, rows in self._where.items() if name in names)
        with safe_open(str(self._shards[next(iter(rows.values())) >> 32]), "pt") as shard:
            return shard.get_slice(f"feature.{name}").get_shape()[1]


@dataclass
class PoolingReport:
    """What happened while features were pooled.

    Args:
        keys: Key of each input; None where the image can't be read.
        problems: First line of the error of each unreadable image, counted.
        computed: Inputs that went through the encoder.
        seconds: Wall time of those.
    """

    keys: list[bytes | None]
    problems: Counter[str] = field(default_factory=Counter)
    computed: int = 0
    seconds: float = 0.0


def pool_images(
    encoder: VisionEncoder,
    images: Sequence[ImageSource],
    store: PooledStore | None = None,
    *,
    batch_size: int = 16,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    keys: Sequence[bytes | None] | None = None,
) -> tuple[PooledStore, PoolingReport]:
    """Mean-pool every feature of every image over its tokens, computing only what the cache does not hold.

    Decoding and preprocessing run in threads beside the encoder.

    Args:
        encoder: The encoder.
        images: Image sources; unreadable ones are counted, not raised.
        store: Where to keep the result; the encoder's own store by default.
        batch_size: Images in one forward.
        workers: Decoding threads.
        progress: Called with (done, total) after each batch.
        keys: `image_key` of each image, where they are known already.

    Returns:
        The store and what happened; `report.keys` are the rows to ask the store for.
    """
    from florence_vl.model.image_processing import open_image

    store = store or PooledStore(encoder.identity)
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
    """`image_key` of every image; None, and counted in `problems`, where a file can't be read."""
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
    """Submit at most `window` items before their results are taken, in order: memory is bounded for any number."""
    waiting: list[tuple[bytes, Future[Tensor]]] = []
    for key, index in items:
        waiting.append((key, pool.submit(work, index)))
        if len(waiting) >= window:
            yield waiting.pop(0)
    yield from waiting
