"""Stable Diffusion as an encoder: UNet activations of a slightly noised image (DIFT; also used by Cambrian-1).

The paper does not name the layer of Stable Diffusion. Defaults are DIFT's (arXiv 2306.03881): timestep 261, the second
up block, empty prompt. Features: `mid` and `upK` (outputs of the UNet's middle and up blocks). The noise is the same
for every picture, so that features do not depend on the batch. Needs the extra `analyze` (diffusers).
Shape letters: B images, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from florence_vl.analyze.encoders.base import Preprocess, VisionEncoder, missing
from florence_vl.analyze.encoders.registry import ENCODERS
from florence_vl.analyze.encoders.tower import local_weights
from florence_vl.registry import did_you_mean

HALF = (0.5, 0.5, 0.5)


class StableDiffusionEncoder(VisionEncoder):
    """Activations of a latent-diffusion UNet.

    Args:
        name: Registered name.
        unet: `UNet2DConditionModel`.
        vae: `AutoencoderKL`; its mode is used, not a sample.
        noise_scheduler: Determines the noise level of `timestep`.
        prompt_embeds: (1, L, D) states of the empty prompt.
        preprocess: Preprocessing of images.
        features: `mid` and `upK` names, in order.
        timestep: Noise level.
        seed: Seed of the single noise sample.

    Raises:
        ValueError: A feature does not exist, or the UNet cannot halve the size often enough.
    """

    install = 'pip install "florence-vl[analyze]"'

    def __init__(
        self,
        name: str,
        unet: Any,
        vae: Any,
        noise_scheduler: Any,
        prompt_embeds: Tensor,
        preprocess: Preprocess,
        features: Sequence[str],
        timestep: int = 261,
        seed: int = 0,
    ) -> None:
        blocks = len(unet.up_blocks)
        known = ["mid", *(f"up{i}" for i in range(blocks))]
        for feature in features:
            if feature not in known:
                raise ValueError(f"{name} has no feature {feature!r}. {did_you_mean(feature, known)}")
        module = nn.ModuleDict({"unet": unet, "vae": vae})
        module.register_buffer("prompt_embeds", prompt_embeds)
        super().__init__(name, module, preprocess, features, {"timestep": timestep, "seed": seed, "prompt": ""})
        self.unet, self.vae, self.noise_scheduler = unet, vae, noise_scheduler
        self.latent_stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.timestep, self.seed = timestep, seed
        self.grids()

    def _block(self, feature: str) -> nn.Module:
        return self.unet.mid_block if feature == "mid" else self.unet.up_blocks[int(feature.removeprefix("up"))]

    @property
    def feature_dims(self) -> dict[str, int]:
        channels = list(self.unet.config.block_out_channels)
        dims = {"mid": channels[-1], **{f"up{i}": c for i, c in enumerate(reversed(channels))}}
        return {name: dims[name] for name in self.features}

    def grid(self) -> tuple[int, int]:
        return self.grids()[self.features[-1]]

    def grids(self) -> dict[str, tuple[int, int]]:
        halvings = len(self.unet.config.block_out_channels) - 1
        unit = self.latent_stride * 2**halvings
        height, width = self.preprocess.height, self.preprocess.width
        if height % unit or width % unit:
            raise ValueError(f"{self.name}: input of {height}x{width} px; both sides must be multiples of {unit} px")
        result = {}
        for name in self.features:
            doublings = 0 if name == "mid" else min(int(name.removeprefix("up")) + 1, halvings)
            result[name] = (height // unit * 2**doublings, width // unit * 2**doublings)
        return result

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        latents = self.vae.encode(pixel_values).latent_dist.mode() * self.vae.config.scaling_factor
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((1, *latents.shape[1:]), generator=generator).to(latents)
        steps = torch.tensor([self.timestep], device=latents.device)
        noisy = self.noise_scheduler.add_noise(latents, noise.expand_as(latents), steps)
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
                kept[name] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self._block(name).register_forward_hook(keep(name)) for name in self.features]
        try:
            prompt = self.module.get_buffer("prompt_embeds").to(latents.dtype).expand(len(latents), -1, -1)
            self.unet(noisy, self.timestep, encoder_hidden_states=prompt)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: kept[name].flatten(2).transpose(1, 2) for name in self.features}


def load_stable_diffusion(
    name: str,
    weights: str | Path,
    features: Sequence[str] = (),
    size: int | None = None,
    fit: str | None = None,
    default_size: int = 768,
) -> StableDiffusionEncoder:
    """Load UNet, autoencoder, noise schedule and text encoder of a diffusers folder.

    Raises:
        MissingWeights: diffusers or the weights are missing.
        ValueError: The feature is unknown, or the size is not supported.
    """
    if find_spec("diffusers") is None:
        raise missing(name, "diffusers is not installed", StableDiffusionEncoder.install)
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    with local_weights(name, weights):
        options = {"local_files_only": True}
        unet = UNet2DConditionModel.from_pretrained(weights, subfolder="unet", **options)
        vae = AutoencoderKL.from_pretrained(weights, subfolder="vae", **options)
        schedule = DDPMScheduler.from_pretrained(weights, subfolder="scheduler", **options)
        tokenizer = CLIPTokenizer.from_pretrained(weights, subfolder="tokenizer", **options)
        text = CLIPTextModel.from_pretrained(weights, subfolder="text_encoder", dtype=torch.float32, **options).eval()
    empty = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.inference_mode():
        prompt_embeds = text(empty.input_ids).last_hidden_state.clone()
    side = size or default_size
    preprocess = Preprocess(side, side, HALF, HALF, fit or "squash")
    return StableDiffusionEncoder(
        name, unet.float(), vae.float(), schedule, prompt_embeds, preprocess, tuple(features) or ("up1",)
    )


@ENCODERS.register("stable_diffusion_2_1")
def stable_diffusion_2_1(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> VisionEncoder:
    """Stable Diffusion 2.1 at 768 px."""
    hub_name = "stabilityai/stable-diffusion-2-1"
    return load_stable_diffusion("stable_diffusion_2_1", weights or hub_name, features, size, fit)


@ENCODERS.register("stable_diffusion_1_5")
def stable_diffusion_1_5(
    weights: str | None = None, features: Sequence[str] = (), size: int | None = None, fit: str | None = None
) -> VisionEncoder:
    """Stable Diffusion 1.5 at 512 px."""
    hub_name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return load_stable_diffusion("stable_diffusion_1_5", weights or hub_name, features, size, fit, default_size=512)
