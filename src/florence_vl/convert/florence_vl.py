"""The authors' layout of Florence-VL (`llava_llama`, `llava_phi`) and this package's: names, configs, both ways.

Source: the module tree and config.json of the released checkpoints (github.com/JiuhaiChen/Florence-VL and the
`jiuhai/florence-vl-*` repositories), which contain a Florence-2 under Microsoft's names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from florence_vl.convert import florence2
from florence_vl.convert.plan import Copy, Move, Op, Plan, Rows, Transpose
from florence_vl.convert.shards import Checkpoint, TensorInfo, few
from florence_vl.model.geometry import convolved_size, davit_convolutions

TOWER = "model.vision_tower."
FUSION = "model.fusion."
EMBEDDING = TOWER + "encoder.embed_tokens.weight"
ORIGINAL_TOWER = "model.vision_tower.vision_tower."
TEXT_EMBEDDING = "model.language_model.embed_tokens.weight"
MODEL_TYPES = {"llava_llama": "llama", "llava_phi": "phi3"}
ARCHITECTURES = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "phi3": ("llava_phi", "LlavaPhiForCausalLM")}
TOWER_REPOSITORIES = {"llama": "jiuhai/florence-llama-vision-tower", "phi3": "jiuhai/florence-phi-vision-tower"}
FEATURES = ("davit", "caption", "ocr", "grounding")

# Probable settings of the released weights. `convert --probe` measures the alternatives.
PARITY_SETTINGS: dict[str, Any] = {"prompt_padding": "attended", "prompt_length": 14, "mean_token": "grid"}

_LLM_PREFIXES = [
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
]
_PROJECTOR = re.compile(r"model\.mm_projector\.encoder_mlp\.(?:0|([1-9]\d*)\.1)\.(weight|bias)")
_OUR_PROJECTOR = re.compile(r"model\.multi_modal_projector\.layers\.(\d+)\.(weight|bias)")
_PROJECTOR_TYPE = re.compile(r"mlp(\d+)x_gelu")
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def original_to_ours(name: str) -> tuple[str, Op] | None:
    """This package's name of one of the authors' tensors; the decoder's are `florence2.` + transformers' name.

    None for tensors without such a name (unused buffers).
    """
    if name.startswith(ORIGINAL_TOWER):
        microsoft = name[len(ORIGINAL_TOWER) :]
        native = florence2.microsoft_to_native(microsoft)
        if native is None:
            return None
        if native == florence2.SHARED:
            return EMBEDDING, Copy()
        tower = None if native in florence2.EMBEDDING_COPIES else florence2.native_to_tower(native)
        if tower is None:
            return "florence2." + native, Copy()
        return TOWER + tower, Transpose() if microsoft == florence2.TRANSPOSED else Copy()
    match = _PROJECTOR.fullmatch(name)
    if match:
        return f"model.multi_modal_projector.layers.{match[1] or 0}.{match[2]}", Copy()
    for old, new in _LLM_PREFIXES:
        if name.startswith(old) and not _ROTARY.fullmatch(name):
            return new + name[len(old) :], Copy()
    return None


def ours_to_original(name: str) -> tuple[str, Op] | None:
    """The authors' name of one of this package's tensors; None if their layout has none."""
    if name == EMBEDDING:
        return ORIGINAL_TOWER + "language_model.model.shared.weight", Copy()
    if name.startswith(TOWER):
        native = florence2.tower_to_native(name[len(TOWER) :])
        microsoft = native and florence2.native_to_microsoft(native)
        if not microsoft:
            return None
        return ORIGINAL_TOWER + microsoft, Transpose() if microsoft == florence2.TRANSPOSED else Copy()
    match = _OUR_PROJECTOR.fullmatch(name)
    if match:
        index = int(match[1])
        return f"model.mm_projector.encoder_mlp.{index}{'.1' if index else ''}.{match[2]}", Copy()
    for old, new in _LLM_PREFIXES:
        if name.startswith(new):
            return old + name[len(new) :], Copy()
    return None


def text_model_type(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """`llama` or `phi3`, from config.json and checked against the tensors (never from a folder's name).

    Raises:
        ValueError: The config names another LLM, or contradicts the tensors.
    """
    by_tensors = "phi3" if any(n.endswith(".self_attn.qkv_proj.weight") for n in tensors) else "llama"
    said = config.get("model_type")
    by_config = MODEL_TYPES.get(str(said))
    if by_config is None:
        raise ValueError(f"config.json: model_type is {said!r}; known Florence-VL types: {', '.join(MODEL_TYPES)}")
    if by_config != by_tensors:
        raise ValueError(f"config.json says {said!r}, but the LLM's tensors are those of {by_tensors}")
    return by_config


def text_config(config: Mapping[str, Any], model_type: str, dtype: str) -> tuple[dict[str, Any], list[str]]:
    """The LLM's part of the authors' config.json, and the fields that are not the LLM's."""
    from transformers import CONFIG_MAPPING

    known = {f.name for f in dataclasses.fields(CONFIG_MAPPING[model_type])}
    known |= {"rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"}
    known -= {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
    fields = {key: value for key, value in config.items() if key in known}
    rest = [key for key in config if key not in known]
    return {**fields, "model_type": model_type, "dtype": dtype}, rest


def projector_depth(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int:
    """Number of linear layers, from the tensors, checked against `mm_projector_type`.

    Raises:
        ValueError: They differ, or a layer is missing.
    """
    found = sorted({int(m[1] or 0) for m in map(_PROJECTOR.fullmatch, tensors) if m})
    depth = len(found)
    if found != list(range(depth)):
        raise ValueError(f"the projector has the layers {found}: some in between are missing")
    said = config.get("mm_projector_type")
    match = _PROJECTOR_TYPE.fullmatch(str(said))
    if said is not None and (match is None or int(match[1]) != depth):
        raise ValueError(f"mm_projector_type is {said!r}, but the weights have {depth} linear layers")
    return depth


def tower_infos(checkpoint: Checkpoint, prefix: str) -> dict[str, TensorInfo]:
    """The Florence-2 inside a checkpoint under Microsoft's names, without the prefix."""
    return {name[len(prefix) :]: info for name, info in checkpoint.tensors.items() if name.startswith(prefix)}


def add_tower(plan: Plan, checkpoint: Checkpoint, prefix: str, full_prefix: str = ORIGINAL_TOWER) -> None:
    """Plan the tower: DaViT, projection, encoder and the preferred copy of the embedding; the rest is dropped.

    Args:
        plan: Receives the moves, the dropped tensors and notes about copies that differ.
        checkpoint: A checkpoint with the Florence-2.
        prefix: Prefix of Microsoft's names in it.
        full_prefix: Prefix in the authors' main checkpoint, for the names of side tensors.
    """
    infos = tower_infos(checkpoint, prefix)
    kept = florence2.embedding_name(infos)
    copies = [florence2.native_to_microsoft(n) or n for n in florence2.EMBEDDING_COPIES]
    reasons, exact, notes = florence2.embedding_report(checkpoint, [prefix + n for n in copies], prefix + kept)
    plan.notes += notes
    plan.layout_facts["embedding"] = full_prefix + kept
    for name in infos:
        source = prefix + name
        if name == kept:
            plan.moves.append(Move(EMBEDDING, source, checkpoint))
        elif source in reasons:
            _drop(plan, checkpoint, source, full_prefix + name, reasons[source], prefix + kept, source in exact)
        elif name in florence2.MICROSOFT_ONLY:
            _drop(plan, checkpoint, source, full_prefix + name, florence2.MICROSOFT_ONLY[name])
        else:
            found = original_to_ours(ORIGINAL_TOWER + name)
            if found is not None and found[0].startswith("florence2."):
                _drop(plan, checkpoint, source, full_prefix + name, "Florence-2's decoder, not used in Florence-VL")
            elif found is not None:
                plan.moves.append(Move(found[0], source, checkpoint, found[1]))


def _drop(
    plan: Plan, checkpoint: Checkpoint, source: str, full: str, reason: str, kept: str = "", exact: bool = False
) -> None:
    plan.drop(source, reason, copy_of=kept if exact else None)
    if exact:
        plan.copies[full] = plan.layout_facts["embedding"]
        if source != full:
            del plan.copies[source]
    else:
        plan.side.append(Move(full, source, checkpoint))


def add_llm_and_projector(plan: Plan, checkpoint: Checkpoint, config: Mapping[str, Any], vocab_size: int) -> None:
    """Plan the LLM and the projector of the authors' checkpoint.

    Args:
        plan: Receives the moves and dropped tensors.
        checkpoint: The authors' main checkpoint.
        config: Its config.json.
        vocab_size: Number of rows of the LLM's new embedding (more than before if `<image>` needed a new id).
    """
    tied = bool(config.get("tie_word_embeddings", False))
    for name, info in checkpoint.tensors.items():
        if name.startswith(ORIGINAL_TOWER):
            continue
        if _ROTARY.fullmatch(name):
            plan.drop(name, "a buffer of rotary frequencies that the LLM computes itself", checkpoint)
            continue
        found = original_to_ours(name)
        if found is None:
            continue
        target, op = found
        if name == "lm_head.weight" and tied:
            drop_tied_head(plan, checkpoint, "model.embed_tokens.weight")
            continue
        if target in (TEXT_EMBEDDING, "lm_head.weight") and info.shape[0] != vocab_size:
            op = Rows(vocab_size)
        plan.moves.append(Move(target, name, checkpoint, op))


def drop_tied_head(plan: Plan, checkpoint: Checkpoint, embedding: str) -> None:
    """Omit the LLM's head, which must be a copy of the embedding.

    Raises:
        ValueError: They differ.
    """
    reasons, exact, notes = florence2.embedding_report(checkpoint, ["lm_head.weight"], embedding)
    if not exact:
        raise ValueError(
            f"config.json ties lm_head to the embedding, but they differ in the weights: {few(notes)}. "
            "Set tie_word_embeddings to false in config.json"
        )
    plan.drop("lm_head.weight", reasons["lm_head.weight"], copy_of=embedding)


def original_config(
    config: Any, decoder_vocab_size: int, dtype: str, tokenizer_max_length: int, padding: str
) -> dict[str, Any]:
    """config.json in the authors' layout for a model trained with this package.

    Args:
        config: A `FlorenceVLConfig`.
        decoder_vocab_size: Rows of the LLM's embedding.
        dtype: Data type of the weights, e.g. "bfloat16".
        tokenizer_max_length: `tokenizer_model_max_length`.
        padding: Aspect-ratio setting of the processor: `pad` or `square`.
    """
    text = config.text_config.to_dict()
    rope = dict(text.pop("rope_parameters", None) or {})
    theta = rope.pop("rope_theta", None)
    for key in ("dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path"):
        text.pop(key, None)
    model_type, architecture = ARCHITECTURES[config.text_config.model_type]
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        rope = {"type": "longrope", "long_factor": rope["long_factor"], "short_factor": rope["short_factor"]}
    return {
        **text,
        "model_type": model_type,
        "architectures": [architecture],
        "torch_dtype": dtype,
        "vocab_size": decoder_vocab_size,
        **({"rope_theta": theta} if theta is not None else {}),
        "rope_scaling": None if kind == "default" else rope,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": padding,
        "mm_hidden_size": config.vision_config.vision_config.projection_dim,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": f"mlp{config.projector_depth}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": TOWER_REPOSITORIES[config.text_config.model_type],
        "tokenizer_model_max_length": tokenizer_max_length,
        "tokenizer_padding_side": "right",
        "tune_entire_model": True,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "vision_tower_lr": None,
    }


def open_gates(checkpoint: Checkpoint) -> list[str]:
    """Tensors of `gated` fusion that make a gate differ from 1; without any, the fusion is `channel`."""
    makes_gates = re.compile(re.escape(FUSION) + r"(gate\.(weight|bias)|token_gate\.weight|constant)")
    names = [name for name in checkpoint.tensors if makes_gates.fullmatch(name)]
    return [name for name in names if bool(checkpoint.read(name).any())]


def check_expressible(config: Any, images: Mapping[str, Any], gates: Sequence[str] = ()) -> None:
    """Check that the authors' layout can represent a model.

    Args:
        config: A `FlorenceVLConfig`.
        images: Settings of its image processor; may be empty.
        gates: From `open_gates`.

    Raises:
        ValueError: Tower, fusion, features, prompts, LLM, views or image sizes differ from theirs; the message names
            all differences.
    """
    from florence_vl.model.configuration import FLORENCE2_PROMPT_IDS

    wrong = []
    if config.tower != "florence2":
        wrong.append(f"tower {config.tower!r} (theirs: 'florence2')")
    if config.fusion == "gated":
        if gates:
            wrong.append(f"gates other than 1 ({few(list(gates))})")
    elif config.fusion != "channel":
        wrong.append(f"fusion {config.fusion!r} (theirs: 'channel')")
    if sorted(config.features) != sorted(FEATURES):  # in any order: `to original` reorders the projector's inputs
        wrong.append(f"features {list(config.features)} (theirs: {list(FEATURES)})")
    prompts = [name for name in FEATURES[1:] if name in config.features]
    other = [name for name in prompts if tuple(config.prompt_token_ids.get(name, ())) != FLORENCE2_PROMPT_IDS[name]]
    if other:
        wrong.append(f"other prompts for {few(other)} (theirs: the released ids, which are in their code)")
    length = PARITY_SETTINGS["prompt_length"]
    if config.prompt_padding == "attended" and config.prompt_length not in (None, length):
        wrong.append(f"prompt_length {config.prompt_length} (theirs: {length})")
    if config.text_config.model_type not in ARCHITECTURES:
        wrong.append(f"LLM {config.text_config.model_type!r} (theirs: {', '.join(ARCHITECTURES)})")
    if config.projector_hidden_act != "gelu":
        wrong.append(f"projector activation {config.projector_hidden_act!r} (theirs: 'gelu')")
    if config.merge != 1:
        wrong.append(f"merge {config.merge} (theirs: 1)")
    if config.tiles is not None:
        wrong.append(f"tiles, up to {config.tiles['max']} (theirs: none)")
    if config.views is not None:
        wrong.append(f"views {', '.join(config.views) or 'without names'} (theirs: none)")
    if images.get("image_aspect_ratio") == "native":
        wrong.append("image_aspect_ratio 'native' (theirs: 'pad' and 'square')")
    if config.tower == "florence2" and config.trained_grid is not None and images.get("size"):
        height, width = images["size"]["height"], images["size"]["width"]
        grid = convolved_size(height, width, davit_convolutions(config.vision_config.vision_config))
        if grid != config.trained_grid:  # at the trained size resampled positions are the tables themselves
            wrong.append(
                f"positions resampled from {config.trained_grid} to {grid} for images of {height}x{width} px (theirs: "
                "the trained size)"
            )
    if wrong:
        raise ValueError(f"the authors' layout cannot represent this model: {'; '.join(wrong)}")
