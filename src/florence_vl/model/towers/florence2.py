"""The paper's tower: Florence-2 without its decoder, with several prompts per image (paper sections 2 and 3.2).

DaViT runs once per image; all prompts pass through the BART encoder as one batch.
Shape letters: B images, P prompts, M pairs of image and prompt, T tokens of a prompt, N image tokens, S = N + T, D
channels, G channel groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Florence2Config, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bart.modeling_bart import BartAttention, BartEncoder, BartEncoderLayer
from transformers.models.florence2.modeling_florence2 import (
    Florence2DropPath,
    Florence2MultiModalProjector,
    Florence2VisionBackbone,
    Florence2VisionBlock,
    Florence2VisionChannelAttention,
    Florence2VisionMLP,
    Florence2VisionWindowAttention,
)
from transformers.utils import logging

from florence_vl.model.geometry import DAVIT, convolved_size, davit_convolutions
from florence_vl.model.towers import TOWERS, VisionTower, check_pixels
from florence_vl.model.towers.positions import EncoderPositions, Grid2D

logger = logging.get_logger(__name__)

CACHED = 1 << 20
"""Elements of an intermediate tensor that a CPU core's caches hold."""

_RESIZE = "Resize the image (processor size=...), or set positions='resampled' in the model's config"


class DaViTBlock(GradientCheckpointingLayer, Florence2VisionBlock):
    """transformers' DaViT block with gradient checkpointing, which upstream's lacks."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return Florence2VisionBlock.forward(self, hidden_states)


class DaViTChannelAttention(Florence2VisionChannelAttention):
    """transformers' channel-group attention, as plain matrix products.

    Its "heads" have one channel per image position (36,864 at stage 1 for 768 px). No fused attention kernel supports
    that, and none is needed, because the attention matrix is tiny (32 x 32 in every released size).
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, tokens, channels = hidden_states.shape
        qkv_BN3GC = self.qkv(hidden_states).view(batch, tokens, 3, self.groups, channels // self.groups)
        query_BGNC, key_BGNC, value_BGNC = qkv_BN3GC.permute(2, 0, 3, 1, 4).unbind(0)
        scores_BGCC = (query_BGNC * tokens**-0.5).transpose(-1, -2) @ key_BGNC
        weights_BGCC = scores_BGCC.softmax(dim=-1)
        out_BGNC = value_BGNC @ weights_BGCC.transpose(-1, -2)
        return self.proj(out_BGNC.transpose(1, 2).reshape(batch, tokens, channels))


class DaViTWindowAttention(Florence2VisionWindowAttention):
    """transformers' window attention; on a CPU a few rows of windows at a time, see `_in_parts`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, _, width, channels = hidden_states.shape
        rows = max(1, CACHED // (batch * self.window_size * width * 3 * channels)) * self.window_size
        return _in_parts(self, super().forward, hidden_states, rows)


class DaViTMLP(Florence2VisionMLP):
    """transformers' MLP; on a CPU a few positions at a time, see `_in_parts`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Four times as wide inside, as in every released size; vLLM's layers tell neither sizes nor weights.
        positions = max(1, CACHED // (hidden_states.shape[0] * 4 * hidden_states.shape[-1]))
        return _in_parts(self, super().forward, hidden_states, positions)


_DAVIT: dict[type, type] = {
    Florence2VisionBlock: DaViTBlock,
    Florence2VisionChannelAttention: DaViTChannelAttention,
    Florence2VisionWindowAttention: DaViTWindowAttention,
    Florence2VisionMLP: DaViTMLP,
}


def _in_parts(module: nn.Module, forward: Callable[[Tensor], Tensor], hidden_states: Tensor, length: int) -> Tensor:
    """`forward` over parts of `length` along dimension 1, where no gradient is needed on a CPU.

    The wide tensors inside (75 MiB at stage 1 for 768 px) then stay in the caches instead of being allocated anew.
    """
    whole = hidden_states.device.type != "cpu" or hidden_states.shape[1] <= length or torch.compiler.is_compiling()
    if whole or (torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, *module.parameters()))):
        return forward(hidden_states)
    return torch.cat([forward(part) for part in hidden_states.split(length, dim=1)], dim=1)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution that keeps its input's memory layout, channels last, on a CPU.

    With weights in the default layout oneDNN returns channels first. The convolution then takes 10 to 20 times as long,
    and the sums and norms after it read memory with large strides.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if input.device.type == "cpu":
            weight = weight.squeeze(1).unsqueeze(-1).permute(0, 3, 1, 2)  # a view with the strides of channels last
        return self._conv_forward(input, weight, self.bias)


class DropPath(nn.Dropout):
    """transformers' DropPath (drops a residual branch of whole images) as a subclass of `nn.Dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        kept = torch.empty(input.shape[0], *[1] * (input.ndim - 1), device=input.device, dtype=input.dtype)
        return input * kept.bernoulli_(1 - self.p) / (1 - self.p)


class _Switched:
    """Makes BART's functional dropouts read their rate from an `nn.Dropout`.

    Tools that disable dropout modules then reach them, and a frozen layer that recomputes activations has no dropout.
    Mixed into a BART module after construction, when `dropout` and `activation_dropout` are plain numbers.
    """

    @property
    def dropout(self) -> float:
        return self._rate("dropout")

    @property
    def activation_dropout(self) -> float:
        return self._rate("activation_dropout")

    def _rate(self, name: str) -> float:
        module: nn.Dropout = self.dropouts[name]  # type: ignore[attr-defined]
        return module.p if module.training else 0.0


class SwitchedEncoder(_Switched, BartEncoder):
    """transformers' BART encoder; see `_Switched`."""


class SwitchedEncoderLayer(_Switched, BartEncoderLayer):
    """transformers' BART encoder layer; see `_Switched`."""


class SwitchedAttention(_Switched, BartAttention):
    """transformers' BART attention; see `_Switched`."""


_SWITCHED: dict[type, type] = {
    BartEncoder: SwitchedEncoder,
    BartEncoderLayer: SwitchedEncoderLayer,
    BartAttention: SwitchedAttention,
}


def _switch_dropout(encoder: BartEncoder) -> None:
    for module in list(encoder.modules()):
        if type(module) in _SWITCHED:
            rates = {k: v for k in ("dropout", "activation_dropout") if (v := module.__dict__.pop(k, None)) is not None}
            module.dropouts = nn.ModuleDict({name: nn.Dropout(rate) for name, rate in rates.items()})
            module.__class__ = _SWITCHED[type(module)]


@TOWERS.register("florence2")
class Florence2Tower(VisionTower):
    """DaViT, its projection and the BART encoder of a Florence-2.

    Args:
        config: Names the features, and contains the Florence-2 config and the prompts' token ids.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        florence2: Florence2Config = config.vision_config
        self.config = config
        self.davit = Florence2VisionBackbone._from_config(florence2.vision_config, dtype=torch.get_default_dtype())
        for module in self.davit.modules():  # same parameters and names, other forward
            if type(module) is nn.Conv2d and module.groups > 1:
                module.__class__ = DepthwiseConv
            module.__class__ = _DAVIT.get(type(module), type(module))
            for name, child in list(module.named_children()):
                if isinstance(child, Florence2DropPath):
                    setattr(module, name, DropPath(child.drop_prob))
        self.image_projector = Florence2MultiModalProjector(florence2)
        self.image_projector.image_position_embed.__class__ = Grid2D
        self.set_positions(config.positions)
        self.encoder = None
        if config.prompt_names:
            self.encoder = BartEncoder._from_config(florence2.text_config, dtype=torch.get_default_dtype())
            self.encoder.embed_positions.__class__ = EncoderPositions
            _switch_dropout(self.encoder)
        self.prompt_ids: Tensor
        self.prompt_mask: Tensor
        self.register_buffer("prompt_ids", torch.empty(0), persistent=False)
        self.register_buffer("prompt_mask", torch.empty(0), persistent=False)
        self.reset_buffers()

    @property
    def vision_model(self) -> nn.Module:
        return self.davit

    def recording(self, hidden_states: bool = False, attentions: bool = False) -> Any:
        if attentions:
            raise ValueError("DaViT's attentions (windows and channel groups) are not available; remove the keyword")
        return super().recording(hidden_states)

    @property
    def feature_dims(self) -> dict[str, int]:
        dim = self.config.vision_config.vision_config.projection_dim
        return dict.fromkeys(self.config.features, dim)

    def reset_buffers(self) -> None:
        """Fill the prompt buffers and DaViT's temporal embedding from the config.

        Called at construction, and again after `from_pretrained` has built the model without storage.
        """
        self._set_prompts([self.config.prompt_token_ids[name] for name in self.config.prompt_names])

    def _set_prompts(self, ids: list[list[int]]) -> None:
        length = max(self.config.prompt_length or 0, *map(len, ids), 0)
        pad = self.config.vision_config.text_config.pad_token_id
        device = self.prompt_ids.device
        self.prompt_ids = torch.tensor([i + [pad] * (length - len(i)) for i in ids], dtype=torch.long, device=device)
        mask = [[1] * len(i) + [0] * (length - len(i)) for i in ids]
        self.prompt_mask = torch.tensor(mask, dtype=torch.bool, device=device)
        self.masks_padding = self.config.prompt_padding == "masked" and any(len(i) < length for i in ids)

    def set_positions(self, positions: str) -> None:
        """Choose the position numbering at sizes other than the trained one; see `FlorenceVLConfig.positions`.

        Raises:
            ValueError: Neither `absolute` nor `resampled`, or the trained grid is larger than the tables.
        """
        before, self.config.positions = self.config.positions, positions
        try:
            self.config.check()
        except ValueError:
            self.config.positions = before
            raise
        self.trained_grid = self.config.trained_grid
        self.image_projector.image_position_embed.trained = self.trained_grid

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of DaViT's last feature map for an image of this size in pixels."""
        return convolved_size(height, width, davit_convolutions(self.config.vision_config.vision_config))

    def num_tokens(self, height: int, width: int) -> int:
        rows, columns = self.grid_size(height, width)
        if min(rows, columns) < 1:
            stride = math.prod(self.config.vision_config.vision_config.patch_stride)
            raise ValueError(f"an image of {height}x{width} pixels is too small: the minimum is {stride} per side")
        if self.trained_grid is None:
            self._check_absolute(height, width)
        self._check_encoder(height, width)
        return rows * columns + (self.config.mean_token == "all")

    def _check_absolute(self, height: int, width: int) -> None:
        rows, columns = self.grid_size(height, width)
        florence2 = self.config.vision_config
        limit = florence2.vision_config.max_position_embeddings
        stride = math.prod(florence2.vision_config.patch_stride)
        if max(rows, columns) > limit:
            raise ValueError(
                f"an image of {height}x{width} pixels gives {rows}x{columns} positions, but this Florence-2 has "
                f"{limit} per axis: at most {limit * stride} pixels per side. {_RESIZE}"
            )
        trained = self.config.position_grid
        if trained is not None and (rows, columns) != trained and not torch.compiler.is_compiling():
            logger.warning_once(
                f"images of {height}x{width} pixels give {rows}x{columns} positions, but the position tables were "
                f"trained for {trained[0]}x{trained[1]}: prompt features degrade. Set "
                "positions='resampled' in the model's config"
            )

    def _check_encoder(self, height: int, width: int) -> None:
        if self.encoder is None:
            return
        rows, columns = self.trained_grid or self.grid_size(height, width)
        inside = rows * columns + (self.config.mean_token != "grid_before_encoder")
        limit = self.config.vision_config.text_config.max_position_embeddings
        if inside + self.prompt_ids.shape[1] > limit:
            fixes = "Shorten the prompts" if self.trained_grid else f"{_RESIZE}, or shorten the prompts"
            raise ValueError(
                f"an image of {height}x{width} pixels takes {inside} positions and the longest prompt "
                f"{self.prompt_ids.shape[1]}, but the encoder of this Florence-2 has {limit} positions. {fixes}; "
                "features=['davit'] needs no encoder"
            )

    def forward(self, pixel_values: Tensor, feature_mask: Tensor | None = None) -> dict[str, Tensor]:
        check_pixels(pixel_values)
        height, width = pixel_values.shape[-2:]
        num_tokens = self.num_tokens(height, width)
        image_BND = self._image_tokens(pixel_values)
        features = {DAVIT: image_BND[:, -num_tokens:]}
        if self.encoder is not None:
            grid, pairs = self.grid_size(height, width), None
            if feature_mask is not None and not self.training:  # data-dependent skipping would desynchronize FSDP
                columns = [self.config.features.index(name) for name in self.config.prompt_names]
                pairs = feature_mask[:, columns].to(image_BND.device, torch.bool)
            prompted_BPND = self.encode_prompts(image_BND, grid, pairs)[:, :, -num_tokens:]
            features.update(zip(self.config.prompt_names, prompted_BPND.unbind(1), strict=True))
        return {name: features[name] for name in self.config.features}

    def _image_tokens(self, pixel_values: Tensor) -> Tensor:
        """DaViT's projected tokens, as the encoder receives them: (B, 3, H, W) -> (B, N, D)."""
        image_BND = self.image_projector(self.davit(self.with_input_gradients(pixel_values)).last_hidden_state)
        return image_BND[:, 1:] if self.config.mean_token == "grid_before_encoder" else image_BND

    def prompt_features(self, pixel_values: Tensor, prompts: list[list[int]]) -> list[Tensor]:
        """Features (B, N, D) of prompts that are not the model's own, given as token ids of its Florence-2.

        Raises:
            ValueError: The prompts and the image take more positions than the encoder has, or an id is not in its
                vocabulary.
        """
        height, width = pixel_values.shape[-2:]
        vocab_size = self.config.vision_config.text_config.vocab_size
        if not all(0 <= token < vocab_size for ids in prompts for token in ids):
            raise ValueError(
                f"a prompt has token ids outside [0, {vocab_size}), the vocabulary of this Florence-2: tokenize it "
                "with that Florence-2's own tokenizer"
            )
        try:
            self._set_prompts(prompts)
            num_tokens = self.num_tokens(height, width)
            image_BND = self._image_tokens(pixel_values)
            return list(self.encode_prompts(image_BND, self.grid_size(height, width))[:, :, -num_tokens:].unbind(1))
        finally:
            self.reset_buffers()

    def encode_prompts(self, image_BND: Tensor, grid: tuple[int, int], pairs: Tensor | None = None) -> Tensor:
        """The encoder's outputs at the image positions, for all prompts: (B, N, D) -> (B, P, N, D).

        Args:
            image_BND: DaViT's projected tokens, after the mean token unless the config drops it.
            grid: Rows and columns of the tokens after the mean token.
            pairs: (B, P) bool, the pairs of image and prompt to compute; the others are zero. None computes all.
        """
        assert self.encoder is not None
        batch, num_image, width = image_BND.shape
        prompts = self.prompt_ids.shape[0]
        if pairs is None:
            images_M = torch.arange(batch, device=image_BND.device).repeat_interleave(prompts)
            prompts_M = torch.arange(prompts, device=image_BND.device).repeat(batch)
        else:
            images_M, prompts_M = pairs.nonzero(as_tuple=True)
            if not len(images_M):
                return image_BND.new_zeros(batch, prompts, num_image, width)
        text_PTD = self.encoder.embed_tokens(self.prompt_ids).to(image_BND.dtype)
        inputs_MSD = torch.cat([image_BND[images_M], text_PTD[prompts_M]], dim=1)
        positions_SD = self.encoder.embed_positions(
            grid=grid,
            trained=self.trained_grid,
            num_prefix=num_image - grid[0] * grid[1],
            num_prompt=text_PTD.shape[1],
        )
        mask_MS = None
        if self.masks_padding:
            mask_MS = nn.functional.pad(self.prompt_mask, (num_image, 0), value=True)[prompts_M]
        inputs_MSD = inputs_MSD + positions_SD.to(inputs_MSD.device)
        states_MSD = self.encoder(inputs_embeds=inputs_MSD, attention_mask=mask_MS).last_hidden_state
        states_MND = states_MSD[:, :num_image]
        if len(images_M) == batch * prompts:
            return states_MND.unflatten(0, (batch, prompts))
        out_BPND = states_MND.new_zeros(batch, prompts, num_image, width)
        out_BPND[images_M, prompts_M] = states_MND
        return out_BPND
