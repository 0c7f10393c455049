"""Tiny random weights for every encoder of the registry, and small pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def tiny_backbone(folder: Path, kind: str) -> Path:
    """A vision model, or a two-tower model around one, of 32 px and patches of 8 px."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        SiglipConfig,
        SiglipModel,
    )

    text = {**VIT, "vocab_size": 64, "max_position_embeddings": 16}
    vision = {**VIT, "image_size": 32, "patch_size": 8}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    else:
        model = Dinov2Model(Dinov2Config(**vision))
    model.save_pretrained(folder)
    return folder


def tiny_florence2_folder(folder: Path) -> Path:
    """A Florence-2 in transformers' layout with a vocabulary as large as BART's, so that the known prompt ids apply."""
    import json

    from transformers import Florence2Config, Florence2ForConditionalGeneration

    from florence_vl.model.tiny import tiny_florence2

    config = Florence2Config(**{k: v for k, v in tiny_florence2().items() if k != "model_type"})
    config.text_config.vocab_size = 50300
    config.image_token_id = 50299
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 64, "width": 64}}))
    return folder


def tiny_stable_diffusion(folder: Path) -> Path:
    """A latent-diffusion folder in diffusers' layout: 3 UNet levels, latents at half the picture's side."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    tokenizer = CLIPTokenizer(vocab=words, merges=[], model_max_length=8)
    text = CLIPTextModel(CLIPTextConfig(**VIT, vocab_size=8, max_position_embeddings=8, bos_token_id=0, eos_token_id=1))
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    tokenizer.save_pretrained(folder / "tokenizer")
    text.save_pretrained(folder / "text_encoder")
    return folder


def tiny_efficientnet(folder: Path) -> Path:
    """Random weights of EfficientNet-Lite0 (its size is fixed: 4.7 M)."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    folder.mkdir(parents=True)
    torch.save(package.EfficientNet.from_name("efficientnet-lite0").state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


# Prefix of a registered name -> (maker of tiny weights, input size, two features it must have)
TINY: dict[str, tuple[Callable[[Path], Path], int, tuple[str, ...]]] = {
    "backbone": (lambda f: tiny_backbone(f, "dinov2"), 32, ("layer1", "last")),
    "clip": (lambda f: tiny_backbone(f, "clip"), 32, ("layer2", "last")),
    "dinov2": (lambda f: tiny_backbone(f, "dinov2"), 48, ("layer0", "layer3")),
    "siglip": (lambda f: tiny_backbone(f, "siglip"), 32, ("layer2", "last")),
    "efficientnet": (tiny_efficientnet, 64, ("block10", "last")),
    "florence2": (tiny_florence2_folder, 64, ("davit", "ocr")),
    "stable_diffusion": (tiny_stable_diffusion, 32, ("mid", "up1")),
}


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Callable[[str], tuple[Path, int, tuple[str, ...]]]:
    """Name of an encoder -> (tiny random weights, input size, features), made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> tuple[Path, int, tuple[str, ...]]:
        prefix = next(p for p in TINY if name.startswith(p))
        make, size, features = TINY[prefix]
        if prefix not in made:
            torch.manual_seed(0)
            made[prefix] = make(tmp_path_factory.mktemp(prefix) / "weights")
        return made[prefix], size, features

    return get


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Three noisy pictures of different shapes."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((40, 30), (32, 32), (25, 60))
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())
        for width, height in sizes
    ]


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("FLORENCE_VL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
