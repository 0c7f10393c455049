"""Registers Florence-VL with transformers' Auto classes and tables, and registers `sdpa_varlen`, on import.

Imported by `florence_vl.import_hook`; no other module needs to import it.
"""

from __future__ import annotations

import sys

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto import modeling_auto

from florence_vl.model.configuration import FlorenceVLConfig
from florence_vl.model.image_processing import FlorenceVLImageProcessor
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration, FlorenceVLModel
from florence_vl.model.processing import FlorenceVLProcessor
from florence_vl.model.varlen_attention import register_attention


def _register() -> None:
    AutoConfig.register("florence_vl", FlorenceVLConfig, exist_ok=True)
    AutoModel.register(FlorenceVLConfig, FlorenceVLModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(FlorenceVLConfig, FlorenceVLForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        FlorenceVLConfig, image_processor_classes={"pil": FlorenceVLImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(FlorenceVLConfig, FlorenceVLProcessor, exist_ok=True)
    # Pipelines and `transformers serve` look models up in these tables of names.
    modeling_auto.MODEL_MAPPING_NAMES["florence_vl"] = FlorenceVLModel.__name__
    for names in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        names["florence_vl"] = FlorenceVLForConditionalGeneration.__name__
    # TRL, vLLM and SGLang read a class from the module. Importing transformers.processing_utils adds a second module
    # object to sys.modules, so both have to be updated: the one imported first and the current one.
    for module in (transformers, sys.modules["transformers"]):
        for cls in (FlorenceVLConfig, FlorenceVLModel, FlorenceVLForConditionalGeneration, FlorenceVLProcessor):
            setattr(module, cls.__name__, cls)


_register()
register_attention()
