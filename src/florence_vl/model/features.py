"""Stored features of images: a store on disk with an identity, and towers that read from it.

Layout of a store: `ROOT/<digest of the identity>/identity.json` and append-only `*.safetensors` shards with `keys`
(n, 16) and one (n, ...) table per feature. Shards are written atomically, so the next run uses what an interrupted run
has written, and two processes may write to one store. Tables are memory-mapped: reading rows needs no memory.

Shape letters: I images, N tokens of a feature, D its channels, H width of the LLM.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from florence_vl.files import atomic_file, cache_dir, write_text
from florence_vl.model.geometry import DAVIT
from florence_vl.model.towers import BackboneTower, Florence2Tower, VisionTower

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

FORMAT = 1
SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0  # maximum time between writes, to limit the loss if a run is interrupted


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Digest of an identity, independent of the order of keys."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def state_hash(*modules: nn.Module) -> str:
    """Hash of all weights and buffers of modules: names, shapes, data types and bytes."""
    total = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            total.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def content_key(data: Any) -> bytes:
    """16-byte key of an input's content, given as bytes or a contiguous buffer."""
    return hashlib.blake2b(data, digest_size=16).digest()


class FeatureStore:
    """Tensors by key and feature name, for one identity.

    Args:
        identity: Values that determine the tensors; each identity has its own folder, so they never mix.
        root: Folder of all stores; `cache_dir()/features` by default.
        dtype: Data type on disk; part of the identity.

    Raises:
        ValueError: The folder contains another identity, or a shard is damaged; the message says what to delete.
    """

    def __init__(
        self, identity: Mapping[str, Any], root: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype = dtype
        stored = str(dtype).removeprefix("torch.")
        self.identity = json.loads(json.dumps({"format": FORMAT, "stored": stored, **identity}))
        self.folder = (root or cache_dir() / "features") / identity_digest(self.identity)
        self._keep_identity()
        # names of the features of a shard -> key -> number of the shard and row in it, as one integer
        self._where: dict[tuple[str, ...], dict[bytes, int]] = {}
        self._shards: list[Path] = []
        self._tables: dict[tuple[int, str], Tensor] = {}
        self._flushed = time.monotonic()
        self._pending: list[tuple[bytes, dict[str, Tensor]]] = []
        self._pending_rows: dict[bytes, dict[str, Tensor]] = {}
        self._pending_bytes = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def _keep_identity(self) -> None:
        path = self.folder / "identity.json"
        if not path.exists():
            write_text(path, json.dumps(self.identity, indent=1, sort_keys=True))
            return
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if found != self.identity:
            raise ValueError(f"the identity in {path} does not match the name of its folder; delete {self.folder}")

    def _index(self, path: Path) -> None:
        try:
            with safe_open(str(path), "pt") as shard:
                keys = [bytes(row) for row in shard.get_tensor("keys").numpy()]
                names = [name.removeprefix("feature.") for name in shard.keys() if name.startswith("feature.")]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and its features are computed again") from None
        first = len(self._shards) << 32
        self._shards.append(path)
        self._where.setdefault(tuple(sorted(names)), {}).update((key, first + row) for row, key in enumerate(keys))

    def _find(self, key: bytes, name: str) -> int | None:
        for names, rows in self._where.items():
            if name in names and key in rows:
                return rows[key]
        return None

    def _table(self, shard: int, name: str) -> Tensor:
        if (shard, name) not in self._tables:
            with safe_open(str(self._shards[shard]), "pt") as file:
                self._tables[shard, name] = file.get_tensor(f"feature.{name}")
        return self._tables[shard, name]

    def has(self, key: bytes, names: Sequence[str]) -> bool:
        """Whether all these features of an input are stored."""
        pending = self._pending_rows.get(key, {})
        return all(name in pending or self._find(key, name) is not None for name in names)

    def add(self, keys: Sequence[bytes], tables: Mapping[str, Tensor]) -> None:
        """Add tensors. They are written by `flush`, which is also called every 64 MiB and every minute.

        Args:
            keys: n keys.
            tables: Feature name -> (n, ...).

        Raises:
            ValueError: The disk is full; shards written before are kept.
        """
        if self._pending and set(self._pending[0][1]) != set(tables):
            self.flush()  # all rows of a shard have the same features
        if not self._pending:
            self._flushed = time.monotonic()
        rows = {name: table.detach().to("cpu", self.dtype) for name, table in tables.items()}
        for index, key in enumerate(keys):
            row = {name: table[index] for name, table in rows.items()}
            self._pending.append((key, row))
            self._pending_rows.setdefault(key, {}).update(row)
        self._pending_bytes += sum(table.nbytes for table in rows.values())
        if self._pending_bytes >= SHARD_BYTES or time.monotonic() - self._flushed > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the added tensors as one shard, atomically.

        Raises:
            ValueError: The disk is full; shards written before are kept.
        """
        if not self._pending:
            return
        names = list(self._pending[0][1])
        tables = {f"feature.{n}": _stack([row[n] for _, row in self._pending]) for n in names}
        keys = torch.tensor([list(key) for key, _ in self._pending], dtype=torch.uint8)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        self._pending, self._pending_rows, self._pending_bytes = [], {}, 0
        try:
            with atomic_file(path) as temporary:
                save_file({"keys": keys, **tables}, str(temporary), metadata={"format": str(FORMAT)})
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise ValueError(
                    f"no space left for features in {self.folder}. Shards written before are kept: free some space "
                    "and start the same command again"
                ) from None
            raise
        self._index(path)

    def rows(self, keys: Sequence[bytes], name: str) -> Tensor:
        """The tensors of one feature for these keys, (n, ...), in the stored data type.

        Raises:
            KeyError: A key is not stored.
        """
        found: list[Tensor] = []
        for key in keys:
            pending = self._pending_rows.get(key, {})
            if name in pending:
                found.append(pending[name])
                continue
            place = self._find(key, name)
            if place is None:
                raise KeyError(f"{name} of {key.hex()} is not in {self.folder}")
            found.append(self._table(place >> 32, name)[place & 0xFFFFFFFF])
        return _stack(found) if found else torch.empty(0, dtype=self.dtype)

    def matrix(self, keys: Sequence[bytes], names: Sequence[str]) -> Tensor:
        """Concatenated vectors of the named features: (n, sum of D), for one-dimensional features.

        Raises:
            KeyError: A key is not stored.
        """
        return torch.cat([self.rows(keys, name) for name in names], dim=1) if keys else torch.empty(0, 0)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, also for float16 under CPU autocast, which does not support it."""
    result = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype)
    for row, tensor in zip(result, tensors, strict=True):
        row.copy_(tensor)
    return result


def feature_identity(tower: VisionTower, name: str) -> dict[str, Any]:
    """Everything except the image that determines the values of one feature of a tower.

    It does not depend on the tower's other features, so that models with different features share stores.
    """
    config: Any = tower.config
    identity: dict[str, Any] = {"feature": name, "mean_token": config.mean_token}
    parts: list[nn.Module] = [tower]
    if isinstance(tower, Florence2Tower):
        identity |= {"positions": config.positions, "trained_grid": config.position_grid}
        parts = [tower.davit, tower.image_projector]
        if name != DAVIT:
            assert tower.encoder is not None
            parts.append(tower.encoder)
            identity |= {"feature": "prompt", "prompt": list(config.prompt_token_ids[name])}
            identity["padding"] = tower.prompt_ids.shape[1] if config.prompt_padding == "attended" else None
    elif isinstance(tower, BackboneTower):
        identity |= {"feature": "layer", "layer": config.feature_layers[name]}
    return identity | {"weights": state_hash(*parts), "tower": type(tower).__name__}


class StoredTower:
    """Forward pass of a frozen tower that computes each image once for any number of runs.

    Images are identified by the pixels that the tower receives, so another preprocessing or size is another image.
    Features are stored in float16 and always returned as stored, whether just computed or read.

    Args:
        tower: The tower; its weights must not change afterwards.
        root: Folder of the stores.
    """

    NAME = "tokens"

    def __init__(self, tower: VisionTower, root: Path) -> None:
        self.tower, self.root = tower, root
        self.compute: Callable[[Tensor], dict[str, Tensor]] = tower.forward
        self.computed = 0
        self._stores: dict[tuple[Any, ...], dict[str, FeatureStore]] = {}

    def stores(self, pixel_values: Tensor) -> dict[str, FeatureStore]:
        """A store for each feature, for images of this size and computed in this data type."""
        kind = pixel_values.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pixel_values.dtype
        size = tuple(pixel_values.shape[-2:])
        config: Any = self.tower.config
        key = (dtype, size, config.positions, config.position_grid)
        if key not in self._stores:
            about = {"size": list(size), "dtype": str(dtype).removeprefix("torch.")}
            self._stores[key] = {
                name: FeatureStore({**feature_identity(self.tower, name), **about}, self.root, torch.float16)
                for name in self.tower.feature_names
            }
            for store in self._stores[key].values():
                atexit.register(store.flush)
        return self._stores[key]

    def __call__(self, pixel_values: Tensor, feature_mask: Tensor | None = None) -> dict[str, Tensor]:
        # A mask only allows omitting features; stored features are also used for images without a mask.
        if self.tower.training:  # a frozen one stays in eval mode
            raise ValueError(
                "stored features need a frozen tower, but this one is trained: set parts.tower.train=false, or remove "
                "model.feature_store"
            )
        stores = self.stores(pixel_values)
        keys = [content_key(pixels.detach().cpu().contiguous().view(torch.uint8).numpy()) for pixels in pixel_values]
        todo: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if not all(store.has(key, [self.NAME]) for store in stores.values()):
                todo.setdefault(key, index)
        if todo:
            self.computed += len(todo)
            with torch.no_grad():
                features = self.compute(pixel_values[list(todo.values())])
            for name, store in stores.items():
                store.add(list(todo), {self.NAME: features[name]})
        return {name: store.rows(keys, self.NAME).to(pixel_values) for name, store in stores.items()}


def store_features(model: FlorenceVLForConditionalGeneration, root: str | Path) -> StoredTower:
    """Let a model's frozen tower read its features from stores under `root`, and compute missing ones.

    The model's modules, weights and `state_dict` do not change; only the tower's forward pass is replaced.

    Args:
        model: Changed in place.
        root: Folder of the stores.

    Returns:
        The replacement of the tower; `computed` counts the images that went through the tower itself.
    """
    tower = model.model.vision_tower
    stored = StoredTower(tower, Path(root))
    tower.forward = stored  # type: ignore[method-assign]
    return stored


@torch.inference_mode()
def tower_features(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    images: Iterable[Image.Image],
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The tower's features of images processed to one size: name -> (I, N, D), on the tower's device.

    Images whose size depends on the image are encoded as one square here, so that all have the same number of tokens.

    Args:
        model: The model with the tower.
        processor: Its processor.
        images: Opened one batch at a time, so a generator keeps few images in memory.
        batch_size: Images per forward pass.
        progress: Called with the number of images done.
    """
    square = processor.image_processor.one_size
    place = next(model.model.vision_tower.parameters())
    parts: dict[str, list[Tensor]] = {}
    left, done = iter(images), 0
    while batch := list(itertools.islice(left, batch_size)):
        pixels = processor.image_processor(batch, return_tensors="pt", **square)["pixel_values"]
        for name, value in model.model.vision_tower(pixels.to(place.device, place.dtype)).items():
            parts.setdefault(name, []).append(value)
        done += len(batch)
        if progress is not None:
            progress(done)
    return {name: torch.cat(values).clone() for name, values in parts.items()}


@torch.inference_mode()
def encode_images(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    images: Sequence[Image.Image],
    question_ids: Tensor | None = None,
    question_mask: Tensor | None = None,
    views: list[str] | None = None,
) -> list[Tensor]:
    """Projected tokens of each image, (N, H), for `mm_encoder_outputs`, which avoids running the tower again.

    Args:
        model: A Florence-VL.
        processor: Its processor.
        images: The images.
        question_ids: (I, Q) question of each image, for a fusion with `uses_context`.
        question_mask: (I, Q), 1 for valid positions of `question_ids`.
        views: Name of each image's view; the processor's own by default.
    """
    inputs = processor.image_processor(list(images), view=views, return_tensors="pt")
    pixels = inputs.pop("pixel_values").to(model.device, model.dtype)
    return list(
        model.get_image_features(pixels, question_ids=question_ids, question_mask=question_mask, **inputs).pooler_output
    )


__all__ = [
    "FeatureStore",
    "StoredTower",
    "content_key",
    "encode_images",
    "feature_identity",
    "identity_digest",
    "state_hash",
    "store_features",
    "tower_features",
]
