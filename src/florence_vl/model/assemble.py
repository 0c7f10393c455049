"""`build_model`: a pretrained vision model and a pretrained LLM become one Florence-VL with an untrained projector."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Florence2ForConditionalGeneration,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from florence_vl.model.chat_template import CHAT_TEMPLATES, choose_template
from florence_vl.model.configuration import (
    BACKBONE_LAYERS,
    DBFUSION_FEATURES,
    FLORENCE2_PROMPT_IDS,
    FLORENCE2_PROMPTS,
    FlorenceVLConfig,
    convolved_size,
    davit_convolutions,
)
from florence_vl.model.fusion import FUSIONS, build_fusion
from florence_vl.model.image_processing import FlorenceVLImageProcessor
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
from florence_vl.model.processing import FlorenceVLProcessor, ImageTokenRule
from florence_vl.model.views import FeatureFill
from florence_vl.registry import did_you_mean

# Tokens that LLMs reserve and never use: one of them can be the image placeholder, with no new row in the vocabulary.
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
    vision: str | Path,
    llm: str | Path,
    *,
    features: Sequence[str] | None = None,
    prompts: Mapping[str, str] | None = None,
    feature_layers: Mapping[str, int] | None = None,
    fusion: str = "channel",
    gate: Mapping[str, Any] | None = None,
    projector_depth: int = 3,
    mean_token: str = "grid",
    prompt_padding: str = "masked",
    prompt_length: int | None = None,
    positions: str = "resampled",
    merge: int = 1,
    views: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    image_token: str | None = None,
    chat_template: str | None = None,
    chat_template_options: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """Assemble pretrained parts into one model that saves and loads by itself.

    Args:
        vision: Folder or hub id of a Florence-2 in transformers' layout (`florence-vl convert` makes one of
            Microsoft's), or of any vision backbone (CLIP, SigLIP, DINOv2): the tower follows from its config.
        llm: Folder or hub id of any decoder LLM, or a `.gguf` file (dequantised).
        features: Names of the fused features in order; by default `davit caption ocr grounding`, or all
            `feature_layers` of a backbone.
        prompts: More prompts by feature name, or other wordings; tokenized with the Florence-2's own tokenizer.
        feature_layers: For a backbone: feature name -> index into its hidden states. Default `{"last": -2}`, which is
            LLaVA-1.5's choice.
        fusion: `channel`, `token`, `average` or `gated`.
        gate: Options of `gated` fusion; see `FlorenceVLConfig`.
        projector_depth: Linear layers of the projector, 1 to 4.
        mean_token: `grid`, `all` or `grid_before_encoder`; see `FlorenceVLConfig`.
        prompt_padding: `masked` or `attended`.
        prompt_length: Pad prompts to that many tokens.
        positions: `resampled` or `absolute`; see `FlorenceVLConfig`. At the vision model's own size they are the same.
        merge: 1, or 2 to join squares of 2x2 tokens; see `FlorenceVLConfig`.
        views: Named pairs of size and features; see `FlorenceVLConfig`.
        image_size: Pixels a side; by default what the vision model's own preprocessing says.
        image_token: Token of the LLM's vocabulary that stands for images; by default a reserved one, else a new one.
        chat_template: Name of a chat template; by default the one that fits the tokenizer.
        chat_template_options: Options of the template; see `florence_vl.model.chat_template`.
        dtype: Of all weights; `auto` is the LLM's own.
        seed: Of the projector's initial weights.

    Returns:
        The model in eval mode, and its processor.

    Raises:
        ValueError: A folder holds no model of that kind, a name is unknown, or the parts don't fit.
        FileNotFoundError: A local path that doesn't exist.
    """
    _ = FUSIONS[fusion]  # mistyped names are refused before anything is loaded
    if chat_template is not None:
        _ = CHAT_TEMPLATES[chat_template]
    vision_config = read_config(vision, "vision")
    tokenizer, language_model = _load_llm(llm, dtype)
    weights_dtype = language_model.dtype
    image_token = _prepare_vocabulary(tokenizer, language_model, image_token)
    fields: dict[str, Any] = {
        "mean_token": mean_token,
        "fusion": fusion,
        "gate": gate,
        "merge": merge,
        "views": views,
        "projector_depth": projector_depth,
    }
    if vision_config.model_type == "florence2":
        if feature_layers is not None:
            raise ValueError("feature_layers is for a vision backbone; a Florence-2's features are davit and prompts")
        fields |= {"prompt_padding": prompt_padding, "prompt_length": prompt_length, "positions": positions}
        own_size = _preprocessor_settings(vision).get("pixels")
        if own_size is not None:
            fields["position_grid"] = convolved_size(
                own_size, own_size, davit_convolutions(vision_config.vision_config)
            )
        fields |= florence2_features(vision, vision_config, features, prompts or {})
    else:
        if prompts or prompt_padding != "masked" or prompt_length is not None:
            raise ValueError(f"prompts are for a Florence-2; {vision} is a {vision_config.model_type}")
        vision_config = getattr(vision_config, "vision_config", vision_config)
        layers = dict(feature_layers or BACKBONE_LAYERS)
        fields |= {"tower": "backbone", "feature_layers": layers, "features": list(features or layers)}
    config = FlorenceVLConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        **fields,
    )
    config.dtype = weights_dtype

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = FlorenceVLForConditionalGeneration(config)
    model.model.vision_tower = type(model.model.vision_tower)(config)
    model.model.fusion = build_fusion(config.fusion, model.model.fusion.feature_dims, **config.fusion_options)
    if config.views is not None:
        model.model.feature_fill = FeatureFill(model.model.vision_tower.feature_dims)
    model.model.multi_modal_projector.to_empty(device="cpu")
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, nn.Linear):  # LLaVA's projector: torch's own initialisation of a linear layer
            module.reset_parameters()
    torch.random.set_rng_state(state)
    _load_tower(model, vision)
    model.model.vision_tower.to(weights_dtype)
    for module in model.model.part_modules("projector"):
        module.to(weights_dtype)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.eval()
    _check_head(model, language_model)

    template = CHAT_TEMPLATES[chat_template or choose_template(tokenizer)]
    processor = FlorenceVLProcessor(
        image_processor=_image_processor(vision, config, image_size),
        tokenizer=tokenizer,
        image_token=image_token,
        image_token_rule=ImageTokenRule.from_config(config),
        question_context=model.model.fusion.uses_context,
        chat_template=template.build(tokenizer, image_token=image_token, **(chat_template_options or {})),
    )
    size = processor.image_processor.size
    tokens = model.num_image_tokens(size.height, size.width)  # refuses a size that the tower can't take
    context = getattr(config.text_config, "max_position_embeddings", None)
    if context is not None and tokens >= context:
        raise ValueError(
            f"an image of {size.height}x{size.width} pixels takes {tokens} tokens, but the context of {llm} has "
            f"{context}: choose a smaller image_size, or another fusion"
        )
    model.generation_config = _generation_config(language_model, tokenizer, template.end_text(tokenizer))
    model.suppress_image_token()
    return model, processor


def read_config(path: str | Path, kind: str) -> PreTrainedConfig:
    """Config of a model's folder or hub id; `kind` ("vision", "LLM") is for the error texts.

    Raises:
        ValueError: A folder without config.json, or a Florence-2 in Microsoft's layout.
        FileNotFoundError: No such folder, and the hub gave none.
    """
    folder = Path(path).expanduser()
    file = folder / "config.json"
    if not file.is_file():
        if folder.exists():
            raise ValueError(f"{folder} is no {kind} model: it has no config.json")
        if str(path).startswith((".", "/", "~")):
            raise FileNotFoundError(f"no {kind} model at {folder}: the folder does not exist")
    elif "auto_map" in (raw := json.loads(file.read_text())) and raw.get("model_type") == "florence2":
        raise ValueError(
            f"{folder} is a Florence-2 in Microsoft's remote-code layout. Convert it first: "
            f"florence-vl convert {folder} {folder}-converted"
        )
    try:
        return AutoConfig.from_pretrained(folder if file.is_file() else str(path))
    except OSError as error:
        raise FileNotFoundError(f"no {kind} model {str(path)!r}: no such folder here, and the hub gave none") from error


def _load_llm(path: str | Path, dtype: str | torch.dtype) -> tuple[Any, PreTrainedModel]:
    file = Path(path).expanduser()
    options: dict[str, Any] = {"dtype": dtype}
    if file.suffix == ".gguf":
        if not file.is_file():
            raise FileNotFoundError(f"no LLM at {file}")
        from transformers import GgufConfig

        source = str(file.parent)
        # Without dequantize=True the model counts as quantised and can neither be trained nor saved.
        options |= {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
        options["dtype"] = torch.float32 if dtype == "auto" else dtype
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    else:
        config = read_config(path, "LLM")
        if config.is_encoder_decoder or getattr(config, "model_type", "") == "florence_vl":
            raise ValueError(f"{path} is a {config.model_type}, no decoder LLM")
        source = str(file) if file.exists() else str(path)
        tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the head of {path} is {head}; Florence-VL needs a linear layer without bias")
    return tokenizer, model


def _prepare_vocabulary(tokenizer: Any, llm: PreTrainedModel, image_token: str | None) -> str:
    """Choose the image token and a padding token; grow the vocabulary only when no reserved token is left."""
    vocabulary = tokenizer.get_vocab()
    if image_token is None:
        image_token = next((token for token in RESERVED_IMAGE_TOKENS if token in vocabulary), "<image>")
    if tokenizer.pad_token is None:
        taken = {image_token, tokenizer.eos_token}
        fitting = (token for token in PAD_TOKENS if token in vocabulary and token not in taken)
        tokenizer.pad_token = next(fitting, tokenizer.eos_token)
    # Added (again) as a token that leaves its neighbours alone: Phi-3.5's reserved ones swallow the newline after them.
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    rows = llm.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE)
    return image_token


def florence2_features(
    vision: str | Path, config: PreTrainedConfig, features: Sequence[str] | None, prompts: Mapping[str, str]
) -> dict[str, Any]:
    """The config fields `features`, `prompts` and `prompt_token_ids`, tokenized with the Florence-2's own tokenizer.

    Raises:
        ValueError: An unknown feature, or prompts that need a tokenizer which the folder lacks.
    """
    texts = FLORENCE2_PROMPTS | dict(prompts)
    names = list(features or [*DBFUSION_FEATURES, *prompts])
    for name in names:
        if name not in texts and name != DBFUSION_FEATURES[0]:
            known = [DBFUSION_FEATURES[0], *texts]
            raise ValueError(
                f"unknown feature {name!r}. {did_you_mean(name, known)} A prompt of your own is "
                f"prompts={{{name!r}: 'its text'}}"
            )
    texts = {name: texts[name] for name in names if name in texts}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(vision))
    except (OSError, ValueError) as error:
        own = [name for name in texts if texts[name] != FLORENCE2_PROMPTS.get(name)]
        if own or config.text_config.vocab_size < 50265:  # not BART's vocabulary, whose ids are known
            raise ValueError(f"{vision} has no tokenizer, which the prompts {own or list(texts)} need") from error
        ids = {name: list(FLORENCE2_PROMPT_IDS[name]) for name in texts}
    else:
        ids = {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
    return {"features": names, "prompts": texts, "prompt_token_ids": ids}


def _load_tower(model: FlorenceVLForConditionalGeneration, vision: str | Path) -> None:
    tower: Any = model.model.vision_tower
    if model.config.tower == "florence2":
        source = Florence2ForConditionalGeneration.from_pretrained(str(vision), dtype=torch.float32)
        tower.davit.load_state_dict(source.model.vision_tower.state_dict())
        tower.image_projector.load_state_dict(source.model.multi_modal_projector.state_dict())
        if tower.encoder is not None:
            tower.encoder.load_state_dict(source.model.language_model.encoder.state_dict())
    else:
        source = AutoModel.from_pretrained(str(vision), dtype=torch.float32)
        source = getattr(source, "vision_model", source)
        result = tower.backbone.load_state_dict(source.state_dict(), strict=False)
        if result.missing_keys:
            tower_vision = getattr(tower.backbone, "vision_model", tower.backbone)
            tower_vision.load_state_dict(source.state_dict())


@torch.no_grad()
def _check_head(model: FlorenceVLForConditionalGeneration, llm: PreTrainedModel) -> None:
    """Refuse LLMs whose head is more than a linear layer (soft-capping, logit scaling): ours would differ silently."""
    ids = torch.arange(1, 9).unsqueeze(0) % llm.config.vocab_size
    ids = torch.where(ids == model.config.image_token_id, 0, ids)
    ours, theirs = model(input_ids=ids).logits.float(), llm(input_ids=ids).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"the logits of this {llm.config.model_type} are not its linear head's (largest difference "
            f"{(ours - theirs).abs().max():.2g}): its model class scales or caps them, which Florence-VL does not do"
        )


def _image_processor(vision: str | Path, config: FlorenceVLConfig, image_size: int | None) -> FlorenceVLImageProcessor:
    settings = _preprocessor_settings(vision)
    own_size = settings.pop("pixels", None) or getattr(config.vision_config, "image_size", None) or 768
    size = image_size or own_size
    if config.tower == "florence2":
        stride = math.prod(config.vision_config.vision_config.patch_stride)
    else:
        stride = config.vision_config.patch_size
    stride *= config.merge
    settings |= {"stride": stride, "views": config.views, "features": config.features}
    return FlorenceVLImageProcessor(size={"height": size, "width": size}, **settings)


def _preprocessor_settings(vision: str | Path) -> dict[str, Any]:
    """Mean, standard deviation and pixels of the vision model's own preprocessing, where it says them."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        raw, _ = ImageProcessingMixin.get_image_processor_dict(str(vision))
    except OSError:
        return {}
    settings = {key: raw[key] for key in ("image_mean", "image_std") if raw.get(key)}
    size = raw.get("crop_size") if raw.get("do_center_crop") else raw.get("size")
    if isinstance(size, int):
        settings["pixels"] = size
    elif isinstance(size, dict):
        settings["pixels"] = size.get("height") or size.get("shortest_edge")
    return settings


def _generation_config(llm: PreTrainedModel, tokenizer: Any, end_token: str) -> GenerationConfig:
    config = llm.generation_config or GenerationConfig()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = {*ends, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_token)}
    config.eos_token_id = sorted(stop for stop in stops if stop is not None)
    config.pad_token_id = tokenizer.pad_token_id
    return config
