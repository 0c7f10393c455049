"""Plans rows: windows of records are measured from their texts, gathered into message trees and laid out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.utils.data import Dataset

from florence_vl.data.encode import RecordEncoder
from florence_vl.data.layout import BatchLayout, Window, arrange, check_fits, deal_steps, measure
from florence_vl.data.mixture import Mixture
from florence_vl.data.records import BadRecord
from florence_vl.data.report import BadEntry
from florence_vl.data.sampler import mix
from florence_vl.data.trees import WHOLE, Leaf, Pair, Tree, grow_trees, measure_leaf, split_turns, tree_tokens


@dataclass
class WindowPlan:
    """Rows (or padded batches) of a window.

    Attributes:
        window: The window.
        groups: Trees of every row or padded batch, in the order of use; a sample by itself is a tree of one pair.
        bad: Records that cannot become a sample, as far as their text tells.
        error: What ended the measuring; the run ends with it when the window's turn comes.
    """

    window: Window
    groups: list[list[Tree]] = field(default_factory=list)
    bad: list[BadEntry] = field(default_factory=list)
    error: Exception | None = None


class WindowPlanner(Dataset[WindowPlan]):
    """`planner[number]` measures the records of a window and lays them out; a pure function of mixture and number.

    Args:
        mixture: Provides the records by position.
        encoder: Its `outline` counts tokens without decoding images.
        layout: Rows, batches and limits.
        seed: Seed of the order of a window's rows.
    """

    def __init__(self, mixture: Mixture, encoder: RecordEncoder, layout: BatchLayout, seed: int = 0) -> None:
        self.mixture, self.encoder, self.layout, self.seed = mixture, encoder, layout, seed

    def window(self, number: int) -> Window:
        """See `BatchLayout.window_at`."""
        return self.layout.window_at(number, len(self.mixture))

    def numbers(self, first: int) -> Iterator[int]:
        """Numbers of all windows from `first` on, endlessly."""
        while True:
            window = self.window(first)
            yield window.number
            first = window.following

    def __getitem__(self, number: int) -> WindowPlan:
        plan = WindowPlan(window := self.window(number))
        pairs: list[Pair] = []
        leaves: list[Leaf] = []
        for position in range(window.first, window.end):
            try:
                found, bad = self.measure(position)
            except (ValueError, OSError) as error:
                plan.error = error
                return plan
            if bad is not None:
                plan.bad.append(bad_entry(self.mixture, position, bad))
            pairs += [Pair(position, leaf.turn) for leaf in found]
            leaves += found
        trees = grow_trees(leaves, self.layout.tokens_per_row)
        lengths = [tree_tokens([leaves[i] for i in tree]) for tree in trees]
        seed = mix(self.seed, window.number, 3)
        if self.layout.mode == "packed":
            groups = arrange(lengths, [leaves[tree[0]].images for tree in trees], self.layout, seed)
        else:
            places = [pair.position - window.first for pair in pairs]
            groups = deal_steps(places, lengths, window.end - window.first, self.layout, seed)
        plan.groups = [[[pairs[i] for i in trees[tree]] for tree in group] for group in groups]
        return plan

    def measure(self, position: int) -> tuple[list[Leaf], BadRecord | None]:
        """Sizes of the pairs of the record at a position, and why the first one that can't be used is left out.

        Raises:
            ValueError: A pair is too long, and the encoder's policy for these is "error".
        """
        leaves: list[Leaf] = []
        bad: BadRecord | None = None
        try:
            record = self.mixture[position]
            parts = list(enumerate(split_turns(record))) if self.layout.split_turns else [(WHOLE, record)]
        except BadRecord as error:
            return leaves, error
        for turn, part in parts:
            try:
                if self.layout.trees:
                    leaf = measure_leaf(self.encoder, part, turn)
                else:
                    leaf = Leaf(*measure(self.encoder, part, position))
                check_fits(self.encoder, self.layout, part, leaf.tokens, leaf.images)
            except BadRecord as error:
                bad = bad or error
            else:
                leaves.append(leaf)
        return leaves, bad


def bad_entry(mixture: Mixture, position: int, error: BadRecord) -> BadEntry:
    """The report entry of a bad record at a position of the mixture."""
    source, index = mixture.locate(position)
    return BadEntry(error.kind, mixture.sources[source].name, index, position, str(error))


def count_steps(
    mixture: Mixture,
    encoder: RecordEncoder,
    packing: BatchLayout,
    epochs: float = 1.0,
    seed: int = 0,
    limit: int = 200_000,
) -> int:
    """Number of optimizer steps in `epochs` epochs; the last step is filled up with records of the next epoch.

    Args:
        mixture: See `build_batches`, also for the next two.
        encoder: Measures the samples.
        packing: The layout.
        epochs: Passes over the mixture.
        seed: As in `build_batches`.
        limit: Packed rows are counted by measuring texts, without decoding images. If the stream has more records than
            this, evenly spaced windows are measured and the number of rows is extrapolated.
    """
    records = math.ceil(len(mixture) * epochs)
    if packing.mode == "padded":
        return max(1, -(-records // packing.global_batch_size))
    planner = RememberingPlanner(mixture, encoder, packing, seed)
    windows = list(itertools.takewhile(lambda n: planner.window(n).first < records, planner.numbers(0)))
    step = max(1, -(-records // limit))
    rows = seen = 0.0
    for number in windows[::step]:
        plan = planner[number]
        if plan.error is not None:
            raise plan.error
        part = min(1.0, (records - plan.window.first) / (plan.window.end - plan.window.first))
        rows += part * len(plan.groups)
        seen += part * (plan.window.end - plan.window.first)
    return max(1, math.ceil(round(rows * records / seen, 6) / packing.global_batch_size))


class RememberingPlanner(WindowPlanner):
    """A planner that measures each record once, for several epochs."""

    def __init__(self, mixture: Mixture, encoder: RecordEncoder, layout: BatchLayout, seed: int = 0) -> None:
        super().__init__(mixture, encoder, layout, seed)
        self._sizes: dict[tuple[int, int], tuple[list[Leaf], BadRecord | None]] = {}

    def measure(self, position: int) -> tuple[list[Leaf], BadRecord | None]:
        key = self.mixture.locate(position)
        if self.encoder.views is not None:  # a position determines the view, so the size of a record changes
            return super().measure(position)
        if key not in self._sizes:
            self._sizes[key] = super().measure(position)
        return self._sizes[key]
