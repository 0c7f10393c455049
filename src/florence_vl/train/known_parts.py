"""Configs of the parts in the paper's runs, so that `florence-vl plan` needs neither network nor weights.

From the parts' published config.json files; a folder or a cached download of the same name takes precedence.
"""

from __future__ import annotations

from typing import Any

_FLORENCE2_LARGE: dict[str, Any] = {
    "model_type": "florence2",
    "vision_config": {
        "embed_dim": [256, 512, 1024, 2048],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "depths": [1, 1, 9, 1],
        "projection_dim": 1024,
    },
    "text_config": {
        "model_type": "bart",
        "vocab_size": 51289,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 1024,
    },
}
_FLORENCE2_BASE: dict[str, Any] = {
    "model_type": "florence2",
    "vision_config": {
        "embed_dim": [128, 256, 512, 1024],
        "num_heads": [4, 8, 16, 32],
        "num_groups": [4, 8, 16, 32],
        "depths": [1, 1, 9, 1],
        "projection_dim": 768,
    },
    "text_config": {
        "model_type": "bart",
        "vocab_size": 51289,
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "max_position_embeddings": 1024,
    },
}
_LLAMA3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
_PHI35_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
    "tie_word_embeddings": False,
    "pad_token_id": 32000,
}
_VICUNA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32064,  # 32000, and an image token that `build_model` adds, rounded up to a multiple of 64
    "tie_word_embeddings": False,
}
_CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
}

KNOWN_PARTS: dict[str, dict[str, Any]] = {
    "microsoft/Florence-2-large": _FLORENCE2_LARGE,
    "microsoft/Florence-2-large-ft": _FLORENCE2_LARGE,
    "florence-community/Florence-2-large": _FLORENCE2_LARGE,
    "florence-community/Florence-2-large-ft": _FLORENCE2_LARGE,
    "microsoft/Florence-2-base": _FLORENCE2_BASE,
    "microsoft/Florence-2-base-ft": _FLORENCE2_BASE,
    "florence-community/Florence-2-base": _FLORENCE2_BASE,
    "florence-community/Florence-2-base-ft": _FLORENCE2_BASE,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA3_8B,
    "microsoft/Phi-3.5-mini-instruct": _PHI35_MINI,
    "lmsys/vicuna-7b-v1.5": _VICUNA_7B,
    "openai/clip-vit-large-patch14-336": _CLIP_L_336,
}
