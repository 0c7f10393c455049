"""What lmms-eval's registry loads from the entry point `lmms_eval.models`.

Apart from the adapter: importing the adapter first would load the entry point while its module is incomplete, and
lmms-eval would skip it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Name and class of the adapter."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("florence_vl", chat_class_path="florence_vl.evaluate.lmms_eval_plugin.FlorenceVLAdapter")


__all__ = ["manifest"]
