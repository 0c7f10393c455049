"""What `florence-vl train --dry-run` prints: the first steps of every process, and what would go wrong."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from florence_vl.cli.common import print_table

if TYPE_CHECKING:
    from florence_vl.train.dry_run import DryRun, PlayedStep


def show(found: DryRun, recipe_name: str, device: str) -> None:
    """Print a dry run for people."""
    print(f"{recipe_name}: {found.world_size} process(es), {found.strategy}")
    header = ("step", "process", "micro-batches", "rows", "samples", "images", "tokens", "slots", "supervised")
    cells = [list(map(str, _row(played))) for played in sorted(found.steps, key=lambda one: (one.step, one.rank))]
    print_table("", header, cells)
    for step, group in itertools.groupby(sorted(found.steps, key=lambda one: one.step), key=lambda one: one.step):
        played = list(group)
        tokens = [one.counts.tokens for one in played]
        images = [one.counts.images for one in played]
        busy = sum(tokens) / (len(tokens) * max(*tokens, 1))
        print(
            f"step {step + 1}: {sum(tokens):,} tokens, {sum(images):,} images; the average process has {busy:.0%} of "
            "the tokens of the fullest"
        )
    first = found.steps[0].micro_batches
    print(f"\norder of process 0, step 1 ({len(first)} micro-batch(es)); the others' is the same unless named below")
    for order, same in itertools.groupby(first, key=lambda one: (*one.passes, "", *one.collectives)):
        number = len(list(same))
        passes, exchanged = (order[: order.index("")], order[order.index("") + 1 :])
        print(f"  {number} x  {', '.join(passes)}")
        if exchanged:
            print(f"       {', '.join(exchanged)}")
    if found.bad_records:
        print("\nbad records: " + ", ".join(f"{number} x {name}" for name, number in sorted(found.bad_records.items())))
    print("\nmemory a process at the largest micro-batch")
    for kind, value in found.memory.items():
        print(f"  {kind:<24}{value:>10.2f} GiB")
    print(f"  {'all':<24}{sum(found.memory.values()):>10.2f} GiB of {found.memory_available:.1f} ({device})")
    print(f"/dev/shm of a node: {found.shm:.2f} GiB of {found.shm_available:.1f} (assuming the size on this machine)")


def _row(played: PlayedStep) -> tuple[int, ...]:
    counts, batches = played.counts, played.micro_batches
    rows = sum(one.rows for one in batches)
    sizes = (counts.samples, counts.images, counts.tokens, counts.slots, counts.supervised)
    return (played.step + 1, played.rank, len(batches), rows, *sizes)
