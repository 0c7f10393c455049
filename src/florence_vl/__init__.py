"""Florence-VL: vision-language models on one generative vision encoder, Florence-2, with depth-breadth fusion.

Importing this package registers its classes with transformers' Auto classes, so a saved Florence-VL loads with
`AutoModelForImageTextToText.from_pretrained(folder)`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from florence_vl.model import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLModel
    from florence_vl.model.assemble import build_model
    from florence_vl.model.processing import FlorenceVLImageProcessor, FlorenceVLProcessor

__version__ = "0.1.0"

_EXPORTS = {
    "FlorenceVLConfig": "florence_vl.model.configuration",
    "FlorenceVLModel": "florence_vl.model.modeling",
    "FlorenceVLForConditionalGeneration": "florence_vl.model.modeling",
    "FlorenceVLProcessor": "florence_vl.model.processing",
    "FlorenceVLImageProcessor": "florence_vl.model.image_processing",
    "build_model": "florence_vl.model.assemble",
}
__all__ = [
    "FlorenceVLConfig",
    "FlorenceVLForConditionalGeneration",
    "FlorenceVLImageProcessor",
    "FlorenceVLModel",
    "FlorenceVLProcessor",
    "__version__",
    "build_model",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'florence_vl' has no attribute {name!r}")


def _is_console_script() -> bool:
    # `florence-vl --help` needs the command table only and must not wait five seconds for torch. Commands that need
    # the model import it themselves. ("-m": while `python -m florence_vl.cli.main` is being located.)
    return Path(sys.argv[0]).stem == "florence-vl" or sys.argv[0] == "-m" if sys.argv else False


if not _is_console_script():
    import florence_vl.model  # noqa: F401  registers the Auto classes
