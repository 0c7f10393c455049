"""`build_model`: assemble a pretrained vision model and a pretrained LLM, with an untrained projector."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from florence_vl.model.build_config import BuildConfig
from florence_vl.model.chat_template import CHAT_TEMPLATES, ChatTemplate, choose_template
from florence_vl.model.configuration import (
    BACKBONE_LAYERS,
    DBFUSION_FEATURES,
    FLORENCE2_PROMPT_IDS,
    FLORENCE2_PROMPTS,
    FlorenceVLConfig,
)
from florence_vl.model.fusion import FUSIONS, build_fusion
from florence_vl.model.geometry import DAVIT, convolved_size, davit_convolutions
from florence_vl.model.image_processing import FlorenceVLImageProcessor
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.packaged import resolve
from florence_vl.model.parts import (
    image_size,
    load_llm,
    load_tower_weights,
    prompt_tokenizer,
    read_config,
    read_preprocessing,
    vision_part,
)
from florence_vl.model.processing import FlorenceVLProcessor, pad_left
from florence_vl.model.resolution import check_context
from florence_vl.model.tiles import RowEnd
from florence_vl.model.views import FeatureFill
from florence_vl.registry import did_you_mean

# Tokens that LLMs reserve and do not use: one can be the image placeholder without enlarging the vocabulary.
RESERVED_IMAGE_TOKENS: tuple[str, ...] = (
    "<image>",
    "<|image|>",
    "<|image_pad|>",
    "<image_soft_token>",
    "<|reserved_special_token_0|>",
    "<|placeholder1|>",
    "<|extra_0|>",
    "<gh_stars>",
    "<unused0>",
    "[control_8]",
)
PAD_TOKENS: tuple[str, ...] = ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
VOCABULARY_MULTIPLE = 64


def build_model(
    vision: str | Path | BuildConfig,
    llm: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
    weights: bool = True,
    **options: Any,
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """Assemble pretrained parts into one model, which is saved and loaded without them; the projector is untrained.

    Args:
        vision: Folder, hub id or packaged name of the vision model; or a whole `BuildConfig`.
        llm: Folder, hub id, `.gguf` file or packaged name of the LLM.
        dtype: Of all weights; `auto` is the LLM's own.
        seed: Of the projector's initial weights.
        weights: False reads no weights: the model is on the meta device and has shapes only; the processor is whole.
        **options: Fields of `BuildConfig`, which documents them.

    Returns:
        The model in eval mode, and its processor.

    Raises:
        ValueError: A folder does not contain a model of that kind, a name is unknown, or the parts do not fit.
        FileNotFoundError: A local path does not exist.

    Example:
        >>> model, processor = build_model("mini", "smollm2", features=["davit", "caption"], fusion="token")
    """
    build = _build_config(vision, llm, options)
    _ = FUSIONS[build.fusion]  # reports mistyped names before anything is loaded
    if build.chat_template is not None:
        _ = CHAT_TEMPLATES[build.chat_template]
    vision, llm = resolve(build.vision, "vision"), resolve(build.llm, "llms")
    vision_config = read_config(vision, "vision")
    fields = config_fields(build, vision_config, read_preprocessing(vision).size, lambda: prompt_tokenizer(vision))
    tokenizer, language_model = load_llm(llm, dtype, weights)
    weights_dtype = language_model.dtype
    template = CHAT_TEMPLATES[build.chat_template or choose_template(tokenizer)]
    image_token = _prepare_vocabulary(tokenizer, language_model, build.image_token, template)
    config = FlorenceVLConfig(
        text_config=language_model.config, image_token_id=tokenizer.convert_tokens_to_ids(image_token), **fields
    )
    config.dtype = weights_dtype

    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    if weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _fill(model, language_model, vision)
    model.eval()
    if weights:
        _check_head(model, language_model)

    template_options = build.chat_template_options or {}
    processor = FlorenceVLProcessor(
        image_processor=_image_processor(vision, config, build.image_size),
        tokenizer=tokenizer,
        image_token=image_token,
        chat_template=template.build(tokenizer, image_token=image_token, **template_options),
    ).fit(config)
    check_context(model, processor)
    end_ids = template.end_ids(tokenizer, template_options.get("end", "eos"))
    model.generation_config = _generation_config(language_model, tokenizer, end_ids)
    model.suppress_image_token()
    return model, processor


def _fill(model: FlorenceVLForConditionalGeneration, language_model: PreTrainedModel, vision: str) -> None:
    """Give a model on the meta device the weights of its parts, and the projector new ones."""
    config, weights_dtype = model.config, language_model.dtype
    model.model.vision_tower = type(model.model.vision_tower)(config)
    model.model.fusion = build_fusion(config.fusion, model.model.fusion.feature_dims, **config.fusion_options)
    if config.views is not None:
        model.model.feature_fill = FeatureFill(model.model.vision_tower.feature_dims)
    if config.tiles is not None:
        model.model.row_end = RowEnd(config.text_config.hidden_size)
    model.model.multi_modal_projector.to_empty(device="cpu")
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, nn.Linear):  # LLaVA's projector: torch's own initialization of a linear layer
            module.reset_parameters()
    load_tower_weights(model.model.vision_tower, vision)
    model.model.vision_tower.to(weights_dtype)
    for module in model.model.part_modules("projector"):
        module.to(weights_dtype)
    model.model.language_model = language_model.base_model
    model.lm_head.weight = language_model.get_output_embeddings().weight


def _build_config(vision: Any, llm: Any, options: dict[str, Any]) -> BuildConfig:
    if isinstance(vision, BuildConfig):
        if llm is not None or options:
            raise ValueError("give a BuildConfig alone, or vision, llm and options")
        return vision
    if llm is None:
        raise ValueError("build_model needs an llm: a folder, a hub id, a .gguf file or a packaged name")
    known = {field.name for field in dataclasses.fields(BuildConfig)}
    for name in options:
        if name not in known:
            raise ValueError(f"build_model has no option {name!r}. {did_you_mean(name, known)}")
    return BuildConfig(str(vision), str(llm), **options)


def config_fields(
    build: BuildConfig,
    vision_config: PreTrainedConfig,
    own_size: int | None = None,
    tokenizer: Callable[[], Callable[[str], list[int]] | None] = lambda: None,
) -> dict[str, Any]:
    """The fields of `FlorenceVLConfig` that follow from a `BuildConfig`, except those that depend on the LLM.

    Args:
        build: The options.
        vision_config: Config of the vision model.
        own_size: Pixels per side in the vision model's own preprocessing; if unknown, `build.image_size` is used.
        tokenizer: Returns the function from a prompt to its ids, or None to use the ids of the released weights.

    Raises:
        ValueError: Options do not fit the vision model, or features are unknown.
    """
    if vision_config.model_type == "florence_vl":
        raise ValueError(
            f"{build.vision} is a whole Florence-VL, not a vision model. Extract its tower: "
            f"florence-vl convert {build.vision} NEW --to vision-tower"
        )
    same = ("mean_token", "fusion", "gate", "merge", "tiles", "views", "projector_depth")
    fields: dict[str, Any] = {name: getattr(build, name) for name in same}
    if vision_config.model_type != "florence2":
        if build.prompts or build.prompt_padding != "masked" or build.prompt_length is not None:
            raise ValueError(f"prompts are for a Florence-2; {build.vision} is a {vision_config.model_type}")
        layers = dict(build.feature_layers or BACKBONE_LAYERS)
        fields |= {"tower": "backbone", "feature_layers": layers, "features": list(build.features or layers)}
        return fields | {"vision_config": vision_part(vision_config)}
    if build.feature_layers is not None:
        raise ValueError("feature_layers is for a vision backbone; the features of a Florence-2 are davit and prompts")
    fields |= {name: getattr(build, name) for name in ("prompt_padding", "prompt_length", "positions")}
    trained_size = own_size or build.image_size
    if trained_size is not None:
        convolutions = davit_convolutions(vision_config.vision_config)
        fields["position_grid"] = convolved_size(trained_size, trained_size, convolutions)
    if build.features and (unused := [name for name in build.prompts or {} if name not in build.features]):
        raise ValueError(f"the prompts {unused} are not among the features {build.features}: name them there too")
    fields |= florence2_features(vision_config, build.features, build.prompts or {}, tokenizer())
    return fields | {"vision_config": vision_config}


def _prepare_vocabulary(tokenizer: Any, llm: PreTrainedModel, image_token: str | None, template: ChatTemplate) -> str:
    """Choose the image token and a padding token; enlarge the vocabulary only if no reserved token is left."""
    vocabulary = tokenizer.get_vocab()
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    used |= {template.bos, template.end, *template.control_tokens}
    if image_token is None:
        free = (token for token in RESERVED_IMAGE_TOKENS if token in vocabulary and token not in used)
        image_token = next(free, "<image>")
    if image_token in used:
        raise ValueError(
            f"image_token {image_token!r} has another use: it begins, ends or pads texts, or the chat template "
            f"{template.name!r} writes it. Name an unused token, or none to have one chosen"
        )
    if tokenizer.pad_token is None:
        taken = {image_token, tokenizer.eos_token}
        fitting = (token for token in PAD_TOKENS if token in vocabulary and token not in taken)
        tokenizer.pad_token = next(fitting, tokenizer.eos_token)
    pad_left(tokenizer)
    # Added (again) as a token that does not strip its neighbors: Phi-3.5's reserved tokens strip the newline after
    # them.
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    rows = llm.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE)
    return image_token


def florence2_features(
    config: PreTrainedConfig,
    features: Sequence[str] | None,
    prompts: Mapping[str, str],
    tokenize: Callable[[str], list[int]] | None,
) -> dict[str, Any]:
    """The config fields `features`, `prompts` and `prompt_token_ids`.

    Args:
        config: Config of a Florence-2.
        features: Names in order; if None, the paper's and all `prompts`.
        prompts: More prompts by feature name, or other wordings.
        tokenize: See `prompt_tokenizer`.

    Raises:
        ValueError: A feature is unknown, or prompts need a tokenizer that is missing.
    """
    texts = FLORENCE2_PROMPTS | dict(prompts)
    names = list(features or dict.fromkeys([*DBFUSION_FEATURES, *prompts]))
    for name in names:
        if name not in texts and name != DAVIT:
            raise ValueError(
                f"unknown feature {name!r}. {did_you_mean(name, [DAVIT, *texts])} Define a custom prompt with "
                f"prompts={{{name!r}: 'its text'}}"
            )
    texts = {name: texts[name] for name in names if name in texts}
    if tokenize is not None:
        ids = {name: tokenize(text) for name, text in texts.items()}
    else:
        own = [name for name in texts if texts[name] != FLORENCE2_PROMPTS.get(name)]
        if own or (texts and config.text_config.vocab_size < 50265):  # not BART's vocabulary, whose ids are known
            raise ValueError(f"this Florence-2 has no tokenizer, which the prompts {own or list(texts)} need")
        ids = {name: list(FLORENCE2_PROMPT_IDS[name]) for name in texts}
    return {"features": names, "prompts": texts, "prompt_token_ids": ids}


@torch.no_grad()
def _check_head(model: FlorenceVLForConditionalGeneration, llm: PreTrainedModel) -> None:
    """Reject LLMs whose head is more than a linear layer (soft-capping, logit scaling), as results would differ."""
    ids = torch.arange(1, 9).unsqueeze(0) % llm.config.vocab_size
    ids = torch.where(ids == model.config.image_token_id, 0, ids)
    ours, theirs = model(input_ids=ids).logits.float(), llm(input_ids=ids).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"the logits of this {llm.config.model_type} are not its linear head's (largest difference "
            f"{(ours - theirs).abs().max():.2g}): its model class scales or caps them, which Florence-VL does not do"
        )


def _image_processor(vision: str, config: FlorenceVLConfig, size: int | None) -> FlorenceVLImageProcessor:
    own = read_preprocessing(vision)
    side = size or image_size(vision, config.vision_config)
    settings = {key: list(value) for key, value in (("image_mean", own.mean), ("image_std", own.std)) if value}
    return FlorenceVLImageProcessor(size={"height": side, "width": side}, **settings)


def _generation_config(llm: PreTrainedModel, tokenizer: Any, end_ids: list[int]) -> GenerationConfig:
    config = llm.generation_config or GenerationConfig()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = {*ends, tokenizer.eos_token_id, *end_ids}
    config.eos_token_id = sorted(stop for stop in stops if stop is not None)
    config.pad_token_id = tokenizer.pad_token_id
    return config
