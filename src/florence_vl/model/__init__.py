"""The model: configuration -> towers -> fusion -> projector -> modeling; processing; assemble; convert.

Importing this package registers Florence-VL with transformers' Auto classes.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from florence_vl.model.configuration import FlorenceVLConfig
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration, FlorenceVLModel


def _register() -> None:
    AutoConfig.register("florence_vl", FlorenceVLConfig, exist_ok=True)
    AutoModel.register(FlorenceVLConfig, FlorenceVLModel, exist_ok=True)
    AutoModelForImageTextToText.register(FlorenceVLConfig, FlorenceVLForConditionalGeneration, exist_ok=True)
    for cls in (FlorenceVLConfig, FlorenceVLModel, FlorenceVLForConditionalGeneration):
        if not hasattr(transformers, cls.__name__):  # vLLM and `transformers serve` look classes up there
            setattr(transformers, cls.__name__, cls)


_register()

__all__ = ["FlorenceVLConfig", "FlorenceVLForConditionalGeneration", "FlorenceVLModel"]
