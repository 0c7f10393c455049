"""The model: configuration -> towers -> fusion -> projector -> modeling; processing; assemble; convert.

Importing this package registers Florence-VL with transformers' Auto classes, and the attention `sdpa_varlen`.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from florence_vl.model.configuration import FlorenceVLConfig
from florence_vl.model.image_processing import FlorenceVLImageProcessor
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration, FlorenceVLModel
from florence_vl.model.processing import FlorenceVLProcessor
from florence_vl.model.varlen_attention import register_attention


def _register() -> None:
    AutoConfig.register("florence_vl", FlorenceVLConfig, exist_ok=True)
    AutoModel.register(FlorenceVLConfig, FlorenceVLModel, exist_ok=True)
    AutoModelForImageTextToText.register(FlorenceVLConfig, FlorenceVLForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        FlorenceVLConfig, image_processor_classes={"pil": FlorenceVLImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(FlorenceVLConfig, FlorenceVLProcessor, exist_ok=True)
    for cls in (FlorenceVLConfig, FlorenceVLModel, FlorenceVLForConditionalGeneration, FlorenceVLProcessor):
        if not hasattr(transformers, cls.__name__):  # vLLM and `transformers serve` look classes up there
            setattr(transformers, cls.__name__, cls)


_register()
register_attention()

__all__ = [
    "FlorenceVLConfig",
    "FlorenceVLForConditionalGeneration",
    "FlorenceVLImageProcessor",
    "FlorenceVLModel",
    "FlorenceVLProcessor",
]
