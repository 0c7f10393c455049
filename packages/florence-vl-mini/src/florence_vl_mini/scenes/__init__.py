"""Pictures composed of real sprites and fonts, with all annotations: `SceneGenerator(seed, split)[i] -> Scene`."""

from florence_vl_mini.scenes.annotations import GROUPS, RECORD_TASKS, TASK_PROMPTS, Question, Region, Scene, Text
from florence_vl_mini.scenes.generator import DEFAULT_MIX, KINDS, SceneGenerator

__all__ = [
    "DEFAULT_MIX",
    "GROUPS",
    "KINDS",
    "RECORD_TASKS",
    "TASK_PROMPTS",
    "Question",
    "Region",
    "Scene",
    "SceneGenerator",
    "Text",
]
