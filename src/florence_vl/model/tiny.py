"""Tiny random models and processors for tests on a CPU in seconds, without files or network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from florence_vl.model.configuration import FlorenceVLConfig
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

if TYPE_CHECKING:
    from pathlib import Path

    from florence_vl.model.processing import FlorenceVLProcessor

TINY_IMAGE_SIZE = 64  # pixels: a 2x2 grid, so 4 image tokens (5 with the mean token)
TINY_VOCAB_SIZE = 512
TINY_IMAGE_TOKEN_ID = 3

TINY_PROMPT_IDS: dict[str, list[int]] = {"caption": [0, 5, 6, 7, 8, 2], "ocr": [0, 9, 2], "grounding": [0, 10, 11, 2]}

_HEADS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TINY_LLMS: dict[str, dict[str, Any]] = {
    "llama": {**_HEADS, "num_key_value_heads": 2},
    "phi3": {**_HEADS, "num_key_value_heads": 4},
    "qwen3": {**_HEADS, "num_key_value_heads": 2, "head_dim": 12},
    "mistral": {**_HEADS, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": None},
    "gemma3_text": {**_HEADS, "num_key_value_heads": 2, "head_dim": 12},
}

TINY_BACKBONES: dict[str, dict[str, Any]] = {
    name: {**_HEADS, "hidden_size": 32, "image_size": TINY_IMAGE_SIZE, "patch_size": 32}
    for name in ("clip_vision_model", "siglip_vision_model", "dinov2")
}


def tiny_florence2(**overrides: Any) -> dict[str, Any]:
    """Config dict of a Florence-2 with the real structure and small sizes; 64 px give a 2x2 grid."""
    config: dict[str, Any] = {
        "model_type": "florence2",
        "vision_config": {
            "embed_dim": (8, 16, 32, 64),
            "num_heads": (1, 2, 4, 8),
            "num_groups": (1, 2, 4, 8),
            "depths": (1, 1, 2, 1),
            "projection_dim": 32,
            "window_size": 4,
            "max_position_embeddings": 10,
        },
        "text_config": {
            "model_type": "bart",
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "vocab_size": 96,
            "max_position_embeddings": 64,
        },
        "image_token_id": 95,
    }
    for part, values in overrides.items():
        config[part] = {**config[part], **values} if isinstance(values, dict) else values
    return config


def tiny_config(llm: str = "llama", tower: str = "florence2", **overrides: Any) -> FlorenceVLConfig:
    """A `FlorenceVLConfig` with tiny parts.

    Args:
        llm: Model type of the LLM, one of `TINY_LLMS`.
        tower: `florence2`, or a vision model type of `TINY_BACKBONES`, or `backbone` (CLIP).
        **overrides: Fields of `FlorenceVLConfig`.
    """
    text = {
        "model_type": llm,
        "vocab_size": TINY_VOCAB_SIZE,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": llm == "gemma3_text",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **TINY_LLMS[llm],
    }
    fields: dict[str, Any] = {"text_config": text, "image_token_id": TINY_IMAGE_TOKEN_ID}
    if tower == "florence2":
        fields |= {"vision_config": tiny_florence2(), "prompt_token_ids": TINY_PROMPT_IDS}
    else:
        kind = "clip_vision_model" if tower == "backbone" else tower
        fields |= {"tower": "backbone", "vision_config": {"model_type": kind, **TINY_BACKBONES[kind]}}
        fields["feature_layers"] = {"last": -2}
    return FlorenceVLConfig(**(fields | overrides))


def tiny_model(
    llm: str = "llama", tower: str = "florence2", seed: int = 0, **overrides: Any
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """A tiny random model in eval mode, float32, and its processor. The seed determines the weights."""
    config = tiny_config(llm, tower, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FlorenceVLForConditionalGeneration(config).eval()
    return model, tiny_processor(config)


# Control tokens of every template. The first four have the ids of `tiny_config`: pad, bos, eos, image.
TINY_SPECIAL_TOKENS = (
    "<pad>",
    "<s>",
    "<|im_end|>",
    "<image>",
    "<|im_start|>",
    "</s>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
TINY_CORPUS = (
    "A photo of a red car next to a small house, and two people who walk with a dog on the street.",
    "What is shown in the image? Describe it in detail. How many people are there? What colour is it?",
    "The image shows the text of a sign on the left, a green tree behind it and a table in the foreground.",
)


def tiny_tokenizer() -> Any:
    """A fast byte-level BPE with `TINY_VOCAB_SIZE` tokens, trained on three sentences, with every template's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE,
        min_frequency=1,
        special_tokens=list(TINY_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TINY_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(TINY_SPECIAL_TOKENS[3:]),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def tiny_processor(
    config: FlorenceVLConfig | None = None, template: str = "chatml", image_size: int = TINY_IMAGE_SIZE, **options: Any
) -> FlorenceVLProcessor:
    """A processor for `tiny_model`: a small byte-level BPE built in code, 64 px images.

    Args:
        config: The model's, for the number of image tokens; `tiny_config()` by default.
        template: Name in `CHAT_TEMPLATES`.
        image_size: Height and width of processed images, px.
        **options: The chat template's, see `ChatTemplate.build`.
    """
    from florence_vl.model.chat_template import CHAT_TEMPLATES
    from florence_vl.model.image_processing import FlorenceVLImageProcessor
    from florence_vl.model.processing import FlorenceVLProcessor

    config = config or tiny_config()
    tokenizer = tiny_tokenizer()
    if template == "vicuna_v1":
        tokenizer.eos_token = "</s>"
    return FlorenceVLProcessor(
        FlorenceVLImageProcessor(size=image_size),
        tokenizer,
        chat_template=CHAT_TEMPLATES[template].build(tokenizer, "<image>", **options),
        image_token="<image>",
    ).fit(config)


def tiny_recipe(output: str | Path, **changes: Any) -> dict[str, Any]:
    """Values of a recipe of few steps on a CPU that prints nothing.

    Args:
        output: Folder of the run.
        changes: Values besides these or instead of them, by key.
    """
    values = {
        "name": "tiny",
        "output": str(output),
        "steps": 4,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "batch_size": 2,
        "micro_batch_size": 1,
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every_steps": 2, "export": False},
        "logging": {"progress": "none"},
    }
    return values | changes
