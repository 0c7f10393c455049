"""The data sets of the mini recipes and figures, by name: `sets.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import yaml

from florence_vl.registry import did_you_mean
from florence_vl_mini.datasets.writers import write
from florence_vl_mini.scenes import SceneGenerator


@dataclass(frozen=True)
class SceneSet:
    """A data set of composed scenes that recipes and figures refer to by name.

    Attributes:
        tasks: Tasks of `Scene.record`, in turn.
        samples: Number of records.
        seed: Seed of the scenes.
        split: `train`, `val` or `test`.
        mix: Weight of each kind of scene; the suite's by default.
    """

    tasks: tuple[str, ...]
    samples: int
    seed: int
    split: str
    mix: Mapping[str, float] | None = None

    def write(self, out: Path, overwrite: bool = False) -> Path:
        """Write the set with `write`, in LLaVA's layout at 256 px."""
        scenes = SceneGenerator(self.seed, self.split, 256, self.mix)
        return write(out, scenes, self.samples, "llava", self.tasks, overwrite)


@lru_cache
def scene_sets() -> dict[str, SceneSet]:
    """The named sets, `sets.yaml`."""
    text = files("florence_vl_mini.datasets").joinpath("sets.yaml").read_text(encoding="utf-8")
    return {
        name: SceneSet(**{**fields, "tasks": tuple(fields["tasks"])}) for name, fields in yaml.safe_load(text).items()
    }


def scene_set(name: str, samples: int | None = None) -> SceneSet:
    """A named set.

    Args:
        name: Its name in `sets.yaml`.
        samples: Number of records, if it differs from the set's.

    Raises:
        ValueError: No such set; the message lists similar names.
    """
    if name not in scene_sets():
        raise ValueError(f"no set {name!r}. {did_you_mean(name, scene_sets())}")
    found = scene_sets()[name]
    return replace(found, samples=samples) if samples else found


def commands() -> dict[str, tuple[str, ...]]:
    """The `florence-vl` command that writes each set; append `--out FOLDER`.

    The entry point of the group `florence_vl.datasets`.
    """
    return {name: ("mini", "data", "--set", name) for name in scene_sets()}
