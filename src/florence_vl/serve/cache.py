"""The engine's caches: keys and values of running rows and of prefixes, and image features.

Shape letters: B rows, A attention heads of keys and values, L columns, D width of a head.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

Segment = list[tuple[Tensor, Tensor]]  # keys and values of every layer, each (A, L, D)
CHUNK = 64  # number of columns by which a batch grows


class RowLayer(DynamicLayer):
    """Keys and values of one layer, (B, A, capacity, D), written in place instead of concatenated at each step.

    All columns are kept, even in layers with a sliding window: the mask limits what they attend to, and any prefix of a
    row can be reused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False
        self.length = 0
        self.rows = 0

    def get_seq_length(self) -> int:
        return self.length

    def reserve(self, rows: int, columns: int, like: tuple[Tensor, Tensor]) -> None:
        """Allocate `columns`, initialized to zero, because even masked values must be finite.

        Args:
            rows: Rows of the batch.
            columns: Minimum number of columns.
            like: Keys and values (..., A, any, D) with the widths, dtype and device.
        """
        if self.is_initialized and columns <= self.keys.shape[-2]:
            return
        capacity = -(-columns // CHUNK) * CHUNK + CHUNK
        old = (self.keys, self.values)
        new = [x.new_zeros(rows, x.shape[-3], capacity, x.shape[-1]) for x in like]
        if self.is_initialized:
            for target, source in zip(new, old, strict=True):
                target[:, :, : self.length] = source[:rows, :, : self.length]
        self.keys, self.values = new
        self.rows = rows
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, A, new, D) after the last column; returns all columns."""
        end = self.length + key_states.shape[-2]
        self.reserve(key_states.shape[0], end, (key_states, value_states))
        self.keys[: self.rows, :, self.length : end] = key_states
        self.values[: self.rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[: self.rows, :, :end], self.values[: self.rows, :, :end]


@dataclass
class RowBatch:
    """Rows that pass through the LLM together; row i owns the columns `spans[i]` of every layer.

    Attributes:
        layers: One per layer of the LLM.
        spans: First and one past the last column of each row.
    """

    layers: list[RowLayer]
    spans: list[tuple[int, int]]

    @classmethod
    def of_prefixes(cls, prefixes: Sequence[Sequence[Segment]], num_layers: int) -> RowBatch:
        """Rows that begin with cached keys and values, aligned on the right."""
        lengths = [sum(segment[0][0].shape[-2] for segment in parts) for parts in prefixes]
        longest = max(lengths)
        batch = cls([RowLayer() for _ in range(num_layers)], [(longest - n, longest) for n in lengths])
        if not longest:
            return batch
        like = next(parts[0] for parts in prefixes if parts)
        for index, layer in enumerate(batch.layers):
            layer.reserve(len(prefixes), longest, like[index])
            layer.length = longest
            for row, parts in enumerate(prefixes):
                column = longest - lengths[row]
                for keys, values in (segment[index] for segment in parts):
                    end = column + keys.shape[-2]
                    layer.keys[row, :, column:end], layer.values[row, :, column:end] = keys, values
                    column = end
        return batch

    @classmethod
    def gather(cls, sources: Sequence[tuple[RowBatch, int]]) -> RowBatch:
        """One batch of rows from other batches, aligned on the right."""
        spans = [batch.spans[row] for batch, row in sources]
        longest = max(end - start for start, end in spans)
        new = cls(
            [RowLayer() for _ in sources[0][0].layers], [(longest - (end - start), longest) for start, end in spans]
        )
        for index, layer in enumerate(new.layers):
            first = sources[0][0].layers[index]
            layer.reserve(len(sources), longest, (first.keys, first.values))
            layer.length = longest
            for row, ((batch, old), (start, end)) in enumerate(zip(sources, spans, strict=True)):
                column, source = new.spans[row][0], batch.layers[index]
                layer.keys[row, :, column:longest] = source.keys[old, :, start:end]
                layer.values[row, :, column:longest] = source.values[old, :, start:end]
        return new

    @property
    def length(self) -> int:
        """Number of used columns."""
        return self.layers[0].length

    def cache(self) -> Cache:
        """The layers as a transformers cache."""
        return Cache(layers=list(self.layers))

    def rewind(self, length: int) -> None:
        """Drop the columns from `length` on, after a failed step."""
        for layer in self.layers:
            layer.length = length

    def remove(self, row: int) -> None:
        """Remove a row; the last one moves to its position."""
        last = len(self.spans) - 1
        for layer in self.layers:
            if row != last:
                layer.keys[row, :, : layer.length] = layer.keys[last, :, : layer.length]
                layer.values[row, :, : layer.length] = layer.values[last, :, : layer.length]
            layer.rows = last
        self.spans[row] = self.spans[last]
        self.spans.pop()

    def segment(self, row: int, start: int, end: int) -> Segment:
        """A copy of the keys and values of a row's tokens [start, end)."""
        first = self.spans[row][0]
        window = slice(first + start, first + end)
        return [(layer.keys[row, :, window].clone(), layer.values[row, :, window].clone()) for layer in self.layers]


class ByteLRU:
    """Tensors by key, with a limit in bytes and eviction of the least recently used.

    Args:
        limit: Bytes; 0 disables the cache.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._items: OrderedDict[Hashable, Tensor] = OrderedDict()

    def peek(self, key: Hashable) -> Tensor | None:
        """As `get`, for other threads: it does not count as a use."""
        return self._items.get(key)

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Hashable) -> Tensor | None:
        found = self._items.get(key)
        if found is not None:
            self._items.move_to_end(key)
        return found

    def put(self, key: Hashable, value: Tensor) -> None:
        if key in self._items or value.nbytes > self.limit:
            return
        self._items[key] = value
        self.bytes += value.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._items.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._items.clear()
        self.bytes = 0


@dataclass(eq=False)
class _Node:
    tokens: list[Hashable]
    segment: Segment
    parent: _Node | None
    children: dict[Hashable, _Node] = field(default_factory=dict)
    used: int = 0

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.segment)


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


class PrefixCache:
    """Keys and values of prefixes in a radix tree: shared prefixes are stored once.

    A token is an id or, at an image's placeholders, the image's key, so different images never share what follows them.

    Args:
        limit: Bytes; the least recently used leaves are evicted first. 0 disables the cache.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._roots: dict[Hashable, _Node] = {}
        self._clock = itertools.count(1)

    def match(self, tokens: Sequence[Hashable], root: Hashable = None) -> tuple[int, list[Segment]]:
        """Find the longest cached prefix.

        Args:
            tokens: Tokens of a row.
            root: Name of the weights, e.g. of an adapter; prefixes of different weights are never shared.

        Returns:
            Its length, and its keys and values in pieces (views, which must be copied).
        """
        node, done = self._root(root), 0
        parts: list[Segment] = []
        now = next(self._clock)
        while done < len(tokens) and (child := node.children.get(tokens[done])) is not None:
            child.used = now
            shared = common_length(child.tokens, tokens[done : done + len(child.tokens)])
            whole = shared == len(child.tokens)
            parts.append(child.segment if whole else [(k[:, :shared], v[:, :shared]) for k, v in child.segment])
            done += shared
            if not whole:
                break
            node = child
        return done, parts

    def insert(self, tokens: Sequence[Hashable], fetch: Callable[[int, int], Segment], root: Hashable = None) -> None:
        """Store the prefix of a row.

        Args:
            tokens: Its tokens.
            fetch: Copies keys and values of tokens [start, end); called only for new ones.
            root: As in `match`.
        """
        if not self.limit:
            return
        node, done = self._root(root), 0
        now = next(self._clock)
        while done < len(tokens) and (child := node.children.get(tokens[done])) is not None:
            shared = common_length(child.tokens, tokens[done : done + len(child.tokens)])
            if shared < len(child.tokens):
                if done + shared == len(tokens):
                    child.used = now
                    return
                child = self._split(child, shared)
            child.used = now
            done += shared
            node = child
        if done == len(tokens):
            return
        leaf = _Node(list(tokens[done:]), fetch(done, len(tokens)), node, used=now)
        node.children[leaf.tokens[0]] = leaf
        self.bytes += leaf.nbytes
        self._evict()

    def clear(self) -> None:
        """Remove all entries."""
        self._roots.clear()
        self.bytes = 0

    def _root(self, name: Hashable) -> _Node:
        return self._roots.setdefault(name, _Node([], [], None))

    def _split(self, node: _Node, at: int) -> _Node:
        assert node.parent is not None
        before = node.nbytes
        upper = _Node(node.tokens[:at], [(k[:, :at].clone(), v[:, :at].clone()) for k, v in node.segment], node.parent)
        node.parent.children[upper.tokens[0]] = upper
        node.tokens = node.tokens[at:]
        node.segment = [(k[:, at:].clone(), v[:, at:].clone()) for k, v in node.segment]
        node.parent, upper.used = upper, node.used
        upper.children[node.tokens[0]] = node
        self.bytes += upper.nbytes + node.nbytes - before
        return upper

    def _evict(self) -> None:
        while self.bytes > self.limit:
            leaf = min((node for node in self._nodes() if not node.children), key=lambda node: node.used)
            assert leaf.parent is not None
            del leaf.parent.children[leaf.tokens[0]]
            self.bytes -= leaf.nbytes

    def _nodes(self) -> Iterator[_Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()
