"""The untrained mini Florence-2: its shapes, tokenizer, processor and initial weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from florence_vl_mini.pretrain.data import IMAGE_MEAN, IMAGE_STD
from florence_vl_mini.scenes import TASK_PROMPTS, SceneGenerator, assets

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0..4; the first four as in BART


def mini_florence2_config(vocab_size: int, image_token_id: int, image_size: int = 256) -> Any:
    """A `Florence2Config` of about 6 M parameters; 256 px give 8 x 8 + 1 image tokens of width 192."""
    from transformers import Florence2Config

    dims = (32, 64, 128, 256)
    heads = tuple(d // 32 for d in dims)
    return Florence2Config(
        vision_config={
            "model_type": "florence_vision",
            "depths": (1, 1, 3, 1),
            "embed_dim": dims,
            "num_heads": heads,
            "num_groups": heads,
            "window_size": 8,
            "projection_dim": 192,
            "drop_path_rate": 0.0,
            "max_position_embeddings": max(10, math.ceil(image_size / 32)),
        },
        text_config={
            "model_type": "bart",
            "vocab_size": vocab_size,
            "d_model": 192,
            "encoder_layers": 3,
            "decoder_layers": 2,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "encoder_ffn_dim": 768,
            "decoder_ffn_dim": 768,
            "max_position_embeddings": 256,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_bos_token_id": None,
            "forced_eos_token_id": None,
        },
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        image_token_id=image_token_id,
    )


def _corpus(seed: int, scenes: int) -> Iterator[str]:
    for prompt in TASK_PROMPTS.values():
        yield from [prompt] * 50
    for sprite in assets.sprites("train"):
        yield from [sprite.name] * 3
    generator = SceneGenerator(seed, "train", 64, {"objects": 0.5, "lettering": 0.2, "single": 0.3})
    for scene in generator.scenes(scenes):
        yield scene.caption
        yield scene.detailed_caption


def train_tokenizer(seed: int = 0, merges: int = 1024, scenes: int = 2000) -> Any:
    """A byte-level BPE with BART's special tokens, `<loc_0>` to `<loc_999>` and `<image>`.

    Words inside pictures are excluded from the training text on purpose: reading a word requires its letters.

    Args:
        seed: Seed of the scenes whose captions are the training text.
        merges: Upper limit of learned merges.
        scenes: Number of scenes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + 256 + merges,
        min_frequency=3,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(seed, scenes), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_tokens([f"<loc_{i}>" for i in range(1000)])
    return tokenizer


def florence2_processor(tokenizer: Any, image_size: int = 256) -> Any:
    """A `Florence2Processor` with a tokenizer of `train_tokenizer`; requires only Pillow."""
    from transformers import CLIPImageProcessorPil, Florence2Processor

    side = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        resample=3,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    images.image_seq_length = (image_size // 32) ** 2 + 1
    rules = {
        "ocr": {"PATTERN": None, "AREA_THRESHOLD": 0.0},
        "phrase_grounding": {"banned_grounding_tokens": []},
        "pure_text": {},
        "description_with_bboxes": {},
        "description_with_polygons": {},
        "polygons": {},
        "bboxes": {},
        "description_with_bboxes_or_polygons": {},
    }
    return Florence2Processor(images, tokenizer, num_additional_image_tokens=1, post_processor_config=rules)


def build_mini_florence2(
    folder: str | Path, seed: int = 0, image_size: int = 256, tokenizer_scenes: int = 2000
) -> Path:
    """Write an untrained mini Florence-2 (weights, config, tokenizer, processor) that `from_pretrained` loads.

    Args:
        folder: Folder to write; an existing model in it is replaced.
        seed: Seed of weights and tokenizer.
        image_size: Side of the square images in pixels, a multiple of 32.
        tokenizer_scenes: Number of scenes whose captions train the tokenizer.

    Raises:
        ValueError: `image_size` is not a multiple of 32.
    """
    from transformers import Florence2ForConditionalGeneration

    if image_size % 32:
        raise ValueError(f"image_size must be a multiple of 32, found {image_size}")
    folder = Path(folder)
    tokenizer = train_tokenizer(seed, scenes=tokenizer_scenes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Florence2ForConditionalGeneration(
            mini_florence2_config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"), image_size)
        )
        copy_from_encoder(model)
    model.save_pretrained(folder)
    florence2_processor(tokenizer, image_size).save_pretrained(folder)
    return folder


@torch.no_grad()
def copy_from_encoder(model: Any) -> None:
    """Initialize the decoder's last cross-attention as a copy of its input (values and output are the identity).

    The encoder's output is trained to be in the space of the output embeddings (`grid.token_loss`), so the decoder can
    name the content of the image tokens from the beginning and has to learn only where to look.
    """
    attention = model.model.language_model.decoder.layers[-1].encoder_attn
    for linear in (attention.v_proj, attention.out_proj):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)


__all__ = [
    "SPECIAL_TOKENS",
    "build_mini_florence2",
    "copy_from_encoder",
    "florence2_processor",
    "mini_florence2_config",
    "train_tokenizer",
]
