"""`FlorenceVLModel` and `FlorenceVLForConditionalGeneration`: tower -> fusion -> projector -> any decoder LLM.

Follows transformers' conventions for composite vision-language models, so its trainers, quantizers, PEFT, `generate`
and serving work unmodified. Shape letters: B rows, L tokens of a row, I images of the batch, N tokens of an image,
H width of the LLM, K supervised positions, X vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.models.florence2.modeling_florence2 import Florence2VisionPositionalEmbeddingCosine1D
from transformers.utils import can_return_tuple, torch_compilable_check
from transformers.utils.generic import is_flash_attention_requested

from florence_vl.model.configuration import FlorenceVLConfig
from florence_vl.model.contract import check_loading
from florence_vl.model.frozen import keep_frozen_in_eval
from florence_vl.model.fusion import build_fusion, merge_tokens
from florence_vl.model.fusion.gated import GatedFusion, ZeroLinear
from florence_vl.model.head import LanguageHead, summed_loss
from florence_vl.model.projector import Projector
from florence_vl.model.tiles import Canvas, RowEnd
from florence_vl.model.towers import TOWERS, Florence2Tower
from florence_vl.model.varlen_attention import SDPA_VARLEN, flash_bounds, tree_mask
from florence_vl.model.views import FeatureFill

Part = Literal["tower", "projector", "llm"]
PARTS: tuple[Part, ...] = ("tower", "projector", "llm")


@dataclass
class FlorenceVLImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    Attributes:
        pooler_output: (I, N, H), the tokens for each image's placeholders; a list of (N, H) if image sizes differ.
        features: The tower's features before fusion, name -> (I, N, D); only with `output_features=True`. With tiles
            one row for each view of an image, see `florence_vl.model.tiles`.
    """

    features: dict[str, Tensor] | None = None


@dataclass
class FlorenceVLModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the model without head; `image_hidden_states` are the projected image tokens, (all image tokens, H)."""

    image_hidden_states: Tensor | None = None


@dataclass
class FlorenceVLCausalLMOutputWithPast(ModelOutput):
    """Output of the model with its head.

    Attributes:
        loss: Scalar, if `labels` are given.
        logits: (B, L or the positions of `logits_to_keep`, X); `None` with labels and `skip_logits`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


def group_by_size(pixel_values: Tensor, image_sizes: Tensor | None) -> list[tuple[tuple[int, int], list[int]]]:
    """Group images by size: [((height, width), indices)], sizes in the order of their first image.

    Raises:
        ValueError: There is not exactly one size per image, or a size is larger than `pixel_values`.
    """
    count, limit = pixel_values.shape[0], tuple(pixel_values.shape[-2:])
    if image_sizes is None:
        return [(limit, list(range(count)))]  # type: ignore[list-item]
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(image_sizes.tolist()):
        if not (0 < height <= limit[0] and 0 < width <= limit[1]):
            raise ValueError(f"image_sizes[{index}] is {height}x{width}, but pixel_values has {limit[0]}x{limit[1]}")
        groups.setdefault((height, width), []).append(index)
    if sum(map(len, groups.values())) != count:
        raise ValueError(f"image_sizes has {len(image_sizes)} rows, but pixel_values has {count} images")
    return list(groups.items())


class FlorenceVLPreTrainedModel(PreTrainedModel):
    """Weights, checkpointing and attention conventions of both classes."""

    config_class = FlorenceVLConfig
    config: FlorenceVLConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DaViTBlock", "SwitchedEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Parameters added by fusion="gated" or views=... are initialized so that they have no effect; tiles=... adds one.
    _keys_to_ignore_on_load_missing = [r"\.fusion\.", r"\.feature_fill\.", r"\.row_end\."]
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.backbone\.(vision_model\.)?head\."]  # SigLIP's, saved earlier

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """As in transformers, but also reaches the configs nested in the vision config (5.19 does not)."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        vision = self.config.vision_config
        vision._attn_implementation = vision._attn_implementation  # the setter passes it on to nested configs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """`from_pretrained` of transformers, but incomplete checkpoints are errors.

        Raises:
            ValueError: Weights are missing, unexpected, or of another shape (unless `ignore_mismatched_sizes`).
        """
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        check_loading(
            report,
            pretrained_model_name_or_path,
            ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False),
            ignore_unexpected=getattr(model, "hf_quantizer", None) is not None,  # constants of a quantizer
        )
        if isinstance(model, FlorenceVLForConditionalGeneration):
            model.suppress_image_token()
        return (model, report) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (ZeroLinear, FeatureFill, RowEnd)):
            module.reset_parameters()
            return
        super()._init_weights(module)
        if isinstance(module, GatedFusion):
            module.reset_constants()
        elif isinstance(module, Florence2Tower):
            module.reset_buffers()
        elif isinstance(module, Florence2VisionPositionalEmbeddingCosine1D):
            table = torch.empty_like(module.pos_idx_to_embed)
            table[:, 0::2], table[:, 1::2] = module.get_sinusoid_embeddings(module.max_seq_len, module.embed_dim)
            with torch.no_grad():
                module.pos_idx_to_embed.copy_(table)


class FlorenceVLModel(FlorenceVLPreTrainedModel):
    """Florence-VL without a language modelling head.

    Args:
        config: Its `vision_config` and `text_config` determine tower and LLM.
    """

    _keys_to_ignore_on_load_unexpected = [
        *FlorenceVLPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^lm_head\.",
    ]

    def __init__(self, config: FlorenceVLConfig) -> None:
        config.check()  # fields given to `from_pretrained` are set after the config was checked
        super().__init__(config)
        self.vision_tower = TOWERS[config.tower](config)
        self.feature_fill = FeatureFill(self.vision_tower.feature_dims) if config.views is not None else None
        dims = {name: dim * config.merge**2 for name, dim in self.vision_tower.feature_dims.items()}
        self.fusion = build_fusion(config.fusion, dims, **config.fusion_options)
        if config.tiles is not None and self.fusion.num_tokens(6) % 6:
            raise ValueError(f"tiles need a fusion that keeps the grid, which fusion {config.fusion!r} does not")
        width = config.text_config.hidden_size
        self.multi_modal_projector = Projector(
            self.fusion.out_dim, width, config.projector_depth, config.projector_hidden_act
        )
        self.row_end = RowEnd(width) if config.tiles is not None else None
        self.language_model = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Number of tokens in the LLM's sequence for an image of this size in pixels."""
        canvas = Canvas.of(self.config.tiles, height, width)
        _, columns = self._grid(canvas)
        one = self.vision_tower.num_tokens(canvas.height, canvas.width) // self.config.merge**2
        return canvas.num_tokens(self.fusion.num_tokens(one), columns)

    def _grid(self, canvas: Canvas) -> tuple[int, int]:
        """Rows and columns of the tokens of one view, after merging."""
        rows, columns = self.vision_tower.grid_size(canvas.height, canvas.width)
        merge = self.config.merge
        if rows % merge or columns % merge:
            raise ValueError(
                f"an image of {canvas.height}x{canvas.width} pixels gives {rows}x{columns} positions, which "
                f"merge={merge} does not divide: choose a size with an even number of positions on both sides"
            )
        return rows // merge, columns // merge

    def tower_features(self, pixel_values: Tensor, feature_mask: Tensor | None = None) -> dict[str, Tensor]:
        """The tower's features of images of one size, by name: (I, N, D), with tiles (I V, N, D).

        Args:
            pixel_values: (I, 3, height, width).
            feature_mask: (I, F), see `VisionTower.forward`.
        """
        canvas = Canvas.of(self.config.tiles, *pixel_values.shape[-2:])
        if feature_mask is not None:
            feature_mask = feature_mask.repeat_interleave(canvas.views, 0)
        return self.vision_tower(canvas.cut(pixel_values), feature_mask)

    def encode_images(
        self, pixel_values: Tensor, context: Tensor | None = None, feature_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tower, merge, fusion and projector for images of one size.

        Args:
            pixel_values: (I, 3, height, width).
            context: (I, H), see `question_context`.
            feature_mask: (I, F), see `get_image_features`.

        Returns:
            The projected tokens, (I, N, H), and the tower's features by name.
        """
        if feature_mask is not None and self.feature_fill is None:
            raise ValueError("feature_mask needs a model with views, and config.views is None")
        # In training nothing is skipped, also of a frozen tower: with FSDP all processes must make the same calls.
        features = self.tower_features(pixel_values, None if self.training else feature_mask)
        height, width = pixel_values.shape[-2:]
        if feature_mask is not None and self.feature_fill is not None:
            views = Canvas.of(self.config.tiles, height, width).views
            features = self.feature_fill(features, feature_mask.repeat_interleave(views, 0))
        return self.project_features(features, (height, width), context), features

    def project_features(
        self, features: Mapping[str, Tensor], size: tuple[int, int], context: Tensor | None = None
    ) -> Tensor:
        """Merge, fusion and projector: the tower's features by name, (I, N, D) each -> (I, N', H).

        Args:
            features: As `tower_features` returns them; a replaced feature must keep its shape.
            size: Height and width of the images in pixels.
            context: (I, H), see `question_context`.
        """
        canvas = Canvas.of(self.config.tiles, *size)
        if context is not None:
            context = context.repeat_interleave(canvas.views, 0)
        tokens = self.multi_modal_projector(self.fusion(self.merge_features(features, size), context))
        return tokens if self.row_end is None else self.row_end(tokens, canvas, self._grid(canvas))

    def merge_features(self, features: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """What the fusion receives: features with squares of tokens merged, (I, N, D) -> (I, N / merge^2, D merge^2).

        Args:
            features: As `tower_features` returns them.
            size: Height and width of the images in pixels.
        """
        merge = self.config.merge
        rows, columns = self._grid(Canvas.of(self.config.tiles, *size))
        return {name: merge_tokens(x, (rows * merge, columns * merge), merge) for name, x in features.items()}

    def no_question(self, images: int) -> Tensor | None:
        """The context of images without text, (I, H); None if the fusion does not depend on the question."""
        if not self.fusion.uses_context:
            return None
        table: Any = self.get_input_embeddings().weight
        return table.new_zeros(images, self.config.text_config.hidden_size)

    def part_modules(self, part: Part) -> list[nn.Module]:
        """Modules of a part: `tower`, `projector` (with the fusion) or `llm`."""
        modules: dict[str, list[nn.Module | None]] = {
            "tower": [self.vision_tower],
            "projector": [self.feature_fill, self.fusion, self.multi_modal_projector, self.row_end],
            "llm": [self.language_model],
        }
        if part not in modules:
            raise ValueError(f"unknown part {part!r}: the parts are {', '.join(PARTS)}")
        return [module for module in modules[part] if module is not None]

    def train(self, mode: bool = True) -> FlorenceVLModel:
        """`nn.Module.train`, but frozen modules stay in eval mode; see `florence_vl.model.frozen`."""
        super().train(mode)
        if mode:
            keep_frozen_in_eval(self)
        return self

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        feature_mask: Tensor | None = None,
        output_features: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> FlorenceVLImageFeatures:
        """Encode images once, for any number of calls of `forward(mm_encoder_outputs={"image": ...})`.

        Args:
            pixel_values: (I, 3, height, width), normalized by the processor. Images of different sizes are in the top
                left corner of a common height and width.
            image_sizes: (I, 2), height and width of each image in pixels; None if all fill `pixel_values`. Images of
                the same size share a pass through the tower.
            question_ids: (I, Q) token ids of the user turn with each image, for a fusion with `uses_context`; ignored
                by others.
            question_mask: (I, Q), 1 for valid positions of `question_ids`.
            feature_mask: (I, F), 0 for features (in the order of `config.features`) outside the view: they are not
                computed in eval mode and replaced by their mean.
            output_features: Also return the tower's features by name.
            output_hidden_states: Also return the hidden states of DaViT, or of the backbone.
            output_attentions: Also return the attentions of a backbone whose attention is `eager`.
            **kwargs: Common keyword arguments of transformers; they do not change the result.

        Returns:
            `last_hidden_state` is (I, N, H), or None if image sizes differ.

        Raises:
            ValueError: `pixel_values` is not (I, 3, height, width) or too large for the tower, or `image_sizes` do not
                fit it.
        """
        pixel_values = pixel_values.to(self.dtype)
        groups = group_by_size(pixel_values, image_sizes)
        context_IH = self.question_context(question_ids, question_mask)
        if len(groups) == 1:
            (height, width), _ = groups[0]
            with self.vision_tower.recording(output_hidden_states, output_attentions) as recorded:
                tokens_INH, features = self.encode_images(pixel_values[..., :height, :width], context_IH, feature_mask)
            return FlorenceVLImageFeatures(
                last_hidden_state=tokens_INH,
                pooler_output=tokens_INH,
                features=features if output_features else None,
                **recorded,
            )
        if output_features or output_hidden_states or output_attentions:
            raise ValueError(
                f"features, hidden states and attentions need images of one size, found {len(groups)}: encode the "
                "images of each size separately"
            )
        tokens: list[Tensor] = [pixel_values] * len(pixel_values)
        for (height, width), images in groups:
            context_GH = None if context_IH is None else context_IH[images]
            mask_GF = None if feature_mask is None else feature_mask[images]
            tokens_GNH, _ = self.encode_images(pixel_values[images][..., :height, :width], context_GH, mask_GF)
            for image, tokens_NH in zip(images, tokens_GNH, strict=True):
                tokens[image] = tokens_NH
        return FlorenceVLImageFeatures(pooler_output=tokens)

    def question_context(self, question_ids: Tensor | None, question_mask: Tensor | None) -> Tensor | None:
        """The fusion's representation of the question: the mean of the LLM's input embeddings, detached.

        Args:
            question_ids: (I, Q).
            question_mask: (I, Q); if None, all of `question_ids` are valid.

        Returns:
            (I, H), zero if there is no text; None if the fusion does not depend on the question.
        """
        if not self.fusion.uses_context or question_ids is None:
            return None
        return self.mean_embedding(question_ids, question_mask)

    def mean_embedding(self, question_ids: Tensor, question_mask: Tensor | None = None) -> Tensor:
        """Mean of the LLM's input embeddings of each text, detached: (I, Q), (I, Q) -> (I, H), zero without text."""
        if question_mask is None:
            question_mask = torch.ones_like(question_ids)
        embeddings_IQH = self.get_input_embeddings()(question_ids).detach()
        weights_IQ1 = question_mask.unsqueeze(-1).to(embeddings_IQH.dtype)
        return (embeddings_IQH * weights_IQ1).sum(1) / weights_IQ1.sum(1).clamp(min=1)

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor
    ) -> torch.BoolTensor:
        """Mask of the image placeholders, (B, L, 1).

        Raises:
            ValueError: The numbers of placeholders and image tokens differ; the message gives both.
        """
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask_BL = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask_BL = input_ids == self.config.image_token_id
        count = mask_BL.sum()
        torch_compilable_check(
            count == image_features.shape[0],
            lambda: (
                f"the text has {int(count)} image placeholder tokens, but the images give {image_features.shape[0]}. "
                "Pass text and images through the processor together, with one <image> per image"
            ),
        )
        return mask_BL.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_sizes: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        feature_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, FlorenceVLImageFeatures] | None = None,
        branch_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> FlorenceVLModelOutputWithPast:
        """Run tower, fusion, projector and LLM.

        Args:
            input_ids: (B, L) with one placeholder id for each image token.
            pixel_values: (I, 3, height, width): all images of the batch in reading order.
            attention_mask: (B, L); `None` with restarting `position_ids` for packed rows.
            position_ids: (B, L).
            past_key_values: Key-value cache.
            inputs_embeds: (B, L, H) instead of `input_ids`.
            image_sizes: (I, 2) pixels; see `get_image_features`, also for the next three.
            question_ids: (I, Q).
            question_mask: (I, Q).
            feature_mask: (I, F).
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`.
            branch_ids: (B, L), for packed rows with message trees; see `florence_vl.model.varlen_attention`.
            **kwargs: Passed to the LLM.

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds` is given, both kinds of image input are
                given, the number of placeholders does not fit the images, or the LLM's attention does not support
                trees.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("pass pixel_values or mm_encoder_outputs, not both")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            image = self.get_image_features(
                pixel_values, image_sizes, question_ids, question_mask, feature_mask, return_dict=True
            )
        image_tokens = None
        if image is not None:
            tokens = image.pooler_output
            image_tokens = tokens.flatten(0, 1) if isinstance(tokens, Tensor) else torch.cat(list(tokens))
            image_tokens = image_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            mask_BL1 = self.get_placeholder_mask(input_ids, inputs_embeds, image_tokens)
            inputs_embeds = inputs_embeds.masked_scatter(mask_BL1, image_tokens)
        packed = past_key_values is None and attention_mask is None and position_ids is not None
        if branch_ids is not None and not packed:
            raise ValueError("branch_ids are for packed rows: with position_ids, without attention_mask and cache")
        if packed:
            assert position_ids is not None
            # with a cache transformers drops the block mask, and samples would attend to each other
            if kwargs.setdefault("use_cache", False):
                torch_compilable_check(
                    (position_ids[..., 1:] > position_ids[..., :-1]).all(),
                    "use_cache=True is not for packed rows, whose position_ids restart: give use_cache=False",
                )
            if branch_ids is not None:
                config = self.language_model.config
                attention_mask = tree_mask(config, inputs_embeds, position_ids, branch_ids)
                if config._attn_implementation == SDPA_VARLEN:
                    kwargs["branch_ids"] = branch_ids
            elif is_flash_attention_requested(self.language_model.config) and "cu_seq_lens_q" not in kwargs:
                kwargs.update(flash_bounds(position_ids.expand(inputs_embeds.shape[0], -1)))
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return FlorenceVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_tokens,
        )


class FlorenceVLForConditionalGeneration(FlorenceVLPreTrainedModel, GenerationMixin):
    """Florence-VL with its language modeling head: trains, generates, saves and loads like any transformers model."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: FlorenceVLConfig) -> None:
        super().__init__(config)
        self.model = FlorenceVLModel(config)
        self.lm_head: nn.Module = LanguageHead(config.text_config.hidden_size, config.text_config.vocab_size)
        table = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is table)  # GPT-2 calls it `wte`
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        self.suppress_image_token()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if type(new_embeddings) is nn.Linear and new_embeddings.bias is None:  # after resize_token_embeddings
            new_embeddings.__class__ = LanguageHead
        self.lm_head = new_embeddings

    def _expand_inputs_for_generation(
        self, *args: Any, mm_encoder_outputs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # transformers writes the repeated tokens into the outputs that it is given, which belong to the caller
        if mm_encoder_outputs is not None:
            kwargs["mm_encoder_outputs"] = {name: copy.copy(output) for name, output in mm_encoder_outputs.items()}
        return super()._expand_inputs_for_generation(*args, **kwargs)

    def suppress_image_token(self, settings: GenerationConfig | None = None) -> None:
        """Prevent `generate` from choosing an image placeholder, in the model's own settings by default."""
        settings = settings or self.generation_config
        suppressed = settings.suppress_tokens or []
        if self.config.image_token_id not in suppressed:
            settings.suppress_tokens = [*suppressed, self.config.image_token_id]

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        settings, others = super()._prepare_generation_config(*args, **kwargs)
        self.suppress_image_token(settings)  # the caller's own `suppress_tokens` would replace the model's
        return settings, others

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> FlorenceVLImageFeatures:
        """See `FlorenceVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Number of tokens in the LLM's sequence for an image of this size in pixels."""
        return self.model.num_image_tokens(height, width)

    def part_parameters(self, part: Part) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of a part, each once; an untied head belongs to `llm`.

        Raises:
            ValueError: The part is unknown.
        """
        modules = [*self.model.part_modules(part), *([self.lm_head] if part == "llm" else [])]
        wanted = {id(p) for module in modules for p in module.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in wanted:
                yield name, parameter

    def set_trainable(self, tower: bool, projector: bool, llm: bool) -> None:
        """Freeze and unfreeze parts: in stage 1 of the paper all are trained, in stage 2 the tower is frozen.

        A frozen part gets no gradients and stays in eval mode even after `train()`.
        """
        for part, trainable in zip(PARTS, (tower, projector, llm), strict=True):
            for _, parameter in self.part_parameters(part):
                parameter.requires_grad_(trainable)
        self.train(self.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        image_sizes: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        feature_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, FlorenceVLImageFeatures] | None = None,
        **kwargs: Any,
    ) -> FlorenceVLCausalLMOutputWithPast:
        """`FlorenceVLModel.forward`, then the head, and the loss if labels are given.

        Args:
            input_ids: (B, L) with one placeholder id for each image token.
            pixel_values: (I, 3, height, width): all images of the batch in reading order.
            attention_mask: (B, L).
            position_ids: (B, L).
            past_key_values: Key-value cache.
            inputs_embeds: (B, L, H) instead of `input_ids`.
            labels: (B, L) token ids, -100 for unsupervised positions; shifted internally. Image placeholders are never
                supervised.
            num_items_in_batch: What the summed loss is divided by (supervised tokens over all ranks and accumulation
                steps); by default the number in this batch.
            logits_to_keep: Number of last positions, or positions, to return logits for; 0 means all.
            skip_logits: With labels, run the head at the K supervised positions only, chunk by chunk, and return no
                logits: less memory in training.
            image_sizes: (I, 2) pixels; see `FlorenceVLModel.get_image_features`, also for the next three.
            question_ids: (I, Q).
            question_mask: (I, Q).
            feature_mask: (I, F).
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`.
            **kwargs: Passed to `FlorenceVLModel.forward` (`branch_ids`) and to the LLM, except `shift_labels`: (B, L)
                labels that are already shifted, as in context parallelism, instead of or in addition to `labels`. It is
                not in the signature, because transformers' Trainer would then expect it in every evaluation batch.

        Returns:
            Loss, logits, cache, hidden states, attentions and projected image tokens, as requested. A `loss_function`
            set on the model replaces `supervised_loss`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        supervised = labels is not None or shift_labels is not None
        if supervised:
            kwargs.setdefault("use_cache", False)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            question_ids=question_ids,
            question_mask=question_mask,
            feature_mask=feature_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        states_BLH = outputs.last_hidden_state
        loss = logits = None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if not (supervised and skip_logits):
            logits = self.lm_head(states_BLH[:, keep])
        if supervised:
            whole = logits if isinstance(logits_to_keep, int) and logits_to_keep == 0 else None
            targets_BL = self._targets(labels, shift_labels)
            if hasattr(self, "_loss_function"):
                loss = self.loss_function(
                    logits=self.lm_head(states_BLH) if whole is None else whole,
                    labels=labels,
                    shift_labels=targets_BL,
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                )
            else:
                loss = self._next_token_loss(states_BLH, whole, targets_BL, num_items_in_batch)
        return FlorenceVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def supervised_loss(self, states_BLH: Tensor, labels_BL: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        """Cross-entropy of the next token, with the head run at supervised positions only.

        Args:
            states_BLH: The LLM's last hidden states.
            labels_BL: Token ids, -100 for unsupervised positions. Image placeholders are never supervised.
            num_items: Divisor of the summed loss; by default the number K of supervised positions.

        Returns:
            Scalar float32; zero (with a graph) if nothing is supervised.
        """
        return self._next_token_loss(states_BLH, None, self._targets(labels_BL, None), num_items)

    def supervised_logits(self, states_BLH: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (K, X) at the supervised positions, in float32, and their targets (K,)."""
        targets_BL = self._targets(labels_BL, None).to(states_BLH.device)
        supervised_BL = targets_BL != -100
        return self.lm_head(states_BLH[supervised_BL]).float(), targets_BL[supervised_BL]

    def _targets(self, labels_BL: Tensor | None, shifted_BL: Tensor | None) -> Tensor:
        """The token after each position, (B, L); -100 for unsupervised positions and image placeholders."""
        if shifted_BL is None:
            assert labels_BL is not None
            shifted_BL = nn.functional.pad(labels_BL[:, 1:], (0, 1), value=-100)
        return shifted_BL.masked_fill(shifted_BL == self.config.image_token_id, -100)

    def _next_token_loss(
        self, states_BLH: Tensor, logits_BLX: Tensor | None, targets_BL: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        targets_BL = targets_BL.to(states_BLH.device)
        supervised_BL = targets_BL != -100
        targets_K = targets_BL[supervised_BL]
        if logits_BLX is None:
            total = summed_loss(self.lm_head, states_BLH[supervised_BL], targets_K)
        else:
            total = nn.functional.cross_entropy(logits_BLX[supervised_BL].float(), targets_K, reduction="sum")
        if num_items is None:
            num_items = supervised_BL.sum().clamp(min=1)
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


__all__ = [
    "PARTS",
    "FlorenceVLForConditionalGeneration",
    "FlorenceVLImageFeatures",
    "FlorenceVLModel",
    "FlorenceVLPreTrainedModel",
]
