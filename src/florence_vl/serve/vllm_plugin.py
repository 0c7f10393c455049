"""Florence-VL in vLLM and SGLang: entry points that both call in every process.

vLLM runs the model on its Transformers backend: vLLM's attention and paged cache for the LLM, and this package's tower,
fusion and projector, without a separate model class. SGLang also looks the class up on the `transformers` module; that
entry point has not been tested.
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
    """Entry point of the group `sglang.srt.plugins`; not tested."""
    import florence_vl.model.registration  # noqa: F401
