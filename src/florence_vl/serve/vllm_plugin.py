"""Florence-VL under vLLM and SGLang: entry points that both call in every process they start.

vLLM runs the model on its Transformers backend: its own attention and paged cache for the LLM, this package's tower,
fusion and projector, and no model class of ours. SGLang looks the class up on the `transformers` module as well;
that entry point has not been run.
"""

from __future__ import annotations

ARCHITECTURE = "FlorenceVLForConditionalGeneration"
BACKEND = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"


def register() -> None:
    """Entry point of the group `vllm.general_plugins`."""
    from vllm import ModelRegistry

    import florence_vl.model.registration  # noqa: F401  the classes on transformers, in this process

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, BACKEND)


def register_sglang() -> None:
    """Entry point of the group `sglang.srt.plugins`; not run."""
    import florence_vl.model.registration  # noqa: F401
