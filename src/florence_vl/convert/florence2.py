"""The three naming schemes of Florence-2: Microsoft's remote code, transformers' classes, and this package's tower.

Microsoft's scheme is called `microsoft`, transformers' `native`. Sources: the released `modeling_florence2.py` (MIT) as
described in its public copies, and `transformers.models.florence2`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from florence_vl.convert.shards import Checkpoint, TensorInfo, bits_equal, few

# (Microsoft, native); {0} and {1} are numbers, {p} is "weight" or "bias".
_BLOCK = ("vision_tower.blocks.{0}.{1}.", "model.vision_tower.blocks.{0}.{1}.")
_KEYS: list[tuple[str, str]] = [
    ("vision_tower.convs.{0}.proj.{p}", "model.vision_tower.convs.{0}.conv.{p}"),
    ("vision_tower.convs.{0}.norm.{p}", "model.vision_tower.convs.{0}.norm.{p}"),
    *(
        (f"{_BLOCK[0]}{kind}_block.{theirs}.{{p}}", f"{_BLOCK[1]}{kind}_block.{ours}.{{p}}")
        for kind, attention in (("spatial", "window_attn"), ("channel", "channel_attn"))
        for theirs, ours in (
            ("conv1.fn.dw", "conv1"),
            (f"{attention}.norm", "norm1"),
            (f"{attention}.fn.qkv", f"{attention}.qkv"),
            (f"{attention}.fn.proj", f"{attention}.proj"),
            ("conv2.fn.dw", "conv2"),
            ("ffn.norm", "norm2"),
            ("ffn.fn.net.fc1", "ffn.fc1"),
            ("ffn.fn.net.fc2", "ffn.fc2"),
        )
    ),
    ("image_projection", "model.multi_modal_projector.image_projection.weight"),
    ("image_proj_norm.{p}", "model.multi_modal_projector.image_proj_norm.{p}"),
    ("image_pos_embed.row_embeddings.weight", "model.multi_modal_projector.image_position_embed.row_embeddings.weight"),
    (
        "image_pos_embed.column_embeddings.weight",
        "model.multi_modal_projector.image_position_embed.column_embeddings.weight",
    ),
    (
        "visual_temporal_embed.pos_idx_to_embed",
        "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed",
    ),
    ("language_model.lm_head.weight", "lm_head.weight"),
]
_PREFIXES: list[tuple[str, str]] = [("language_model.model.", "model.language_model.")]
# (native, tower of this model)
_TOWER_PREFIXES: list[tuple[str, str]] = [
    ("model.vision_tower.", "davit."),
    ("model.multi_modal_projector.", "image_projector."),
    ("model.language_model.encoder.", "encoder."),
]

TRANSPOSED = "image_projection"  # Microsoft multiplies by it (in, out); a Linear stores (out, in)
SHARED = "model.language_model.shared.weight"
EMBEDDING_COPIES = (  # of one table, native names, in order of preference
    SHARED,
    "model.language_model.encoder.embed_tokens.weight",
    "model.language_model.decoder.embed_tokens.weight",
    "lm_head.weight",
)
# Microsoft tensors without a counterpart in transformers' classes.
MICROSOFT_ONLY: dict[str, str] = {
    "language_model.final_logits_bias": "a buffer of the decoder's logits that transformers' Florence-2 does not have",
    "vision_tower.norms.weight": "DaViT's classification norm, not used",
    "vision_tower.norms.bias": "DaViT's classification norm, not used",
    "vision_tower.head.weight": "DaViT's classification head, not used",
    "vision_tower.head.bias": "DaViT's classification head, not used",
}


def _compile(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for source, target in pairs:
        pattern = re.escape(source)
        for field, form in (("0", r"\d+"), ("1", r"\d+"), ("p", "weight|bias")):
            group = f"g{field}"
            pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{group}>{form})")
            target = target.replace(f"{{{field}}}", rf"\g<{group}>")
        rules.append((re.compile(pattern), target))
    return rules


_TO_NATIVE = _compile(_KEYS)
_TO_MICROSOFT = _compile((ours, theirs) for theirs, ours in _KEYS)


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in rules:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(target)
    return None


def _swap_prefix(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def microsoft_to_native(name: str) -> str | None:
    """transformers' name of one of Microsoft's tensors; None if there is none."""
    return _rename(name, _TO_NATIVE) or _swap_prefix(name, _PREFIXES)


def native_to_microsoft(name: str) -> str | None:
    """Microsoft's name of one of transformers' Florence-2 tensors; None if there is none."""
    return _rename(name, _TO_MICROSOFT) or _swap_prefix(name, [(new, old) for old, new in _PREFIXES])


def native_to_tower(name: str) -> str | None:
    """Name below `model.vision_tower.` in this model; None for the decoder, its head and copies of the embedding."""
    return _swap_prefix(name, _TOWER_PREFIXES)


def tower_to_native(name: str) -> str | None:
    """transformers' name of a tensor of this model's tower (given without `model.vision_tower.`)."""
    return _swap_prefix(name, [(new, old) for old, new in _TOWER_PREFIXES])


def microsoft_prefix(names: Iterable[str]) -> str | None:
    """Prefix of Microsoft's names in a larger checkpoint ("" for a bare Florence-2), or None."""
    for name in names:
        if name == TRANSPOSED or name.endswith("." + TRANSPOSED):
            return name[: -len(TRANSPOSED)]
    return None


def native_config(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """`Florence2Config` fields from Microsoft's config.json; checked against the tensors' shapes.

    Args:
        config: Microsoft's config.json (`vision_config` with `dim_embed`); transformers' own is returned unchanged.
        tensors: Microsoft's names (no prefix) -> info.

    Raises:
        ValueError: The config has a setting that transformers' Florence-2 does not support.
    """
    vision = dict(config.get("vision_config") or {})
    if "embed_dim" in vision:  # transformers' own
        return {key: config[key] for key in ("vision_config", "text_config", "image_token_id") if key in config}
    source = list(vision.get("image_feature_source", ["spatial_avg_pool", "temporal_avg_pool"]))
    if source != ["spatial_avg_pool", "temporal_avg_pool"]:
        raise ValueError(
            f"image_feature_source is {source}; transformers' Florence-2 has only ['spatial_avg_pool', "
            "'temporal_avg_pool'], so this tower cannot be converted"
        )
    temporal = vision.get("visual_temporal_embedding") or {}
    position = vision.get("image_pos_embed") or {}
    for what, found, known in (
        ("visual_temporal_embedding", temporal.get("type", "COSINE"), "COSINE"),
        ("image_pos_embed", position.get("type", "learned_abs_2d"), "learned_abs_2d"),
    ):
        if found != known:
            raise ValueError(f"vision_config.{what}.type is {found!r}; only {known!r} can be converted")
    shapes = config_from_shapes(tensors, heads_known=True)
    ours = {
        "embed_dim": vision.get("dim_embed"),
        "max_temporal_embeddings": temporal.get("max_temporal_embeddings"),
        "max_position_embeddings": position.get("max_pos_embeddings"),
        "projection_dim": vision.get("projection_dim", config.get("projection_dim")),
    }
    same = (
        "depths patch_size patch_stride patch_padding patch_prenorm num_heads num_groups window_size drop_path_rate "
        "mlp_ratio qkv_bias"
    )
    ours.update({key: vision.get(key) for key in same.split()})
    vision_config = {**shapes["vision_config"], **{k: v for k, v in ours.items() if v is not None}}
    text = {k: v for k, v in dict(config.get("text_config") or {}).items() if k not in _NOT_BART}
    text_config = {**shapes["text_config"], **text, "model_type": "bart"}
    for key, value in shapes["text_config"].items():
        if key in text and key in _SHAPED and text[key] != value:
            raise ValueError(f"config.json says text_config.{key} = {text[key]}, but the weights have {value}")
    return {"vision_config": vision_config, "text_config": text_config}


_SHAPED = ("d_model", "encoder_layers", "encoder_ffn_dim", "vocab_size", "max_position_embeddings")
_NOT_BART = (
    "model_type",
    "auto_map",
    "architectures",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "_attn_implementation_autoset",
    "tie_word_embeddings",
    # generation settings, which transformers keeps in generation_config.json
    "num_beams",
    "early_stopping",
    "no_repeat_ngram_size",
    "max_length",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def config_from_shapes(tensors: Mapping[str, TensorInfo], heads_known: bool = False) -> dict[str, Any]:
    """`Florence2Config` fields read from the shapes of Microsoft's tensors (names without prefix).

    Shapes do not determine the number of heads: it is width / 32 in every DaViT and width / 64 in every BART that was
    released as Florence-2 (base and large). Strides, paddings and the window (12) are also those of both.

    Args:
        tensors: Microsoft's name -> info.
        heads_known: Whether heads and window come from a config, so that other widths are allowed here.

    Raises:
        ValueError: A tensor that determines a size is missing, or a width is not a multiple of the head size.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"not a Florence-2: {name!r} is missing from its weights")
        return tensors[name].shape

    def count(pattern: str) -> int:
        found = [int(m[1]) for m in (re.match(pattern, name) for name in tensors) if m]
        return max(found) + 1 if found else 0

    stages = count(r"vision_tower\.convs\.(\d+)\.")
    convs = [shape(f"vision_tower.convs.{s}.proj.weight") for s in range(stages)]
    widths = [conv[0] for conv in convs]
    embedding = embedding_name(tensors)
    vocab_size, width = shape(embedding)
    if not heads_known:
        odd = [w for w in widths if w % 32] + ([width] if width % 64 else [])
        if odd:
            raise ValueError(
                f"the tower's widths {odd} are not those of a released Florence-2, so the number of heads is unknown; "
                "pass --tower FOLDER with its config.json"
            )
    fc1 = "vision_tower.blocks.0.0.spatial_block.ffn.fn.net.fc1.weight"
    vision_config = {
        "embed_dim": widths,
        "depths": [count(rf"vision_tower\.blocks\.{s}\.(\d+)\.") for s in range(stages)],
        "num_heads": [max(w // 32, 1) for w in widths],
        "num_groups": [max(w // 32, 1) for w in widths],
        "patch_size": [conv[-1] for conv in convs],
        "patch_prenorm": [s > 0 for s in range(stages)],
        "in_channels": convs[0][1],
        "mlp_ratio": shape(fc1)[0] / widths[0],
        "qkv_bias": "vision_tower.blocks.0.0.spatial_block.window_attn.fn.qkv.bias" in tensors,
        "projection_dim": shape(TRANSPOSED)[1],
        "max_position_embeddings": shape("image_pos_embed.row_embeddings.weight")[0],
        "max_temporal_embeddings": shape("visual_temporal_embed.pos_idx_to_embed")[0],
    }
    encoder = "language_model.model.encoder."
    text_config = {
        "model_type": "bart",
        "vocab_size": vocab_size,
        "d_model": width,
        "encoder_layers": count(re.escape(encoder) + r"layers\.(\d+)\."),
        "encoder_ffn_dim": shape(f"{encoder}layers.0.fc1.weight")[0],
        "encoder_attention_heads": max(width // 64, 1),
        "decoder_layers": count(r"language_model\.model\.decoder\.layers\.(\d+)\."),
        "max_position_embeddings": shape(f"{encoder}embed_positions.weight")[0] - 2,
        "scale_embedding": False,
        "activation_function": "gelu",
    }
    if text_config["decoder_layers"]:
        text_config["decoder_ffn_dim"] = shape("language_model.model.decoder.layers.0.fc1.weight")[0]
        text_config["decoder_attention_heads"] = text_config["encoder_attention_heads"]
    else:  # a tower without its decoder; BART's config still needs the fields
        text_config["decoder_layers"] = text_config["encoder_layers"]
        text_config["decoder_ffn_dim"] = text_config["encoder_ffn_dim"]
        text_config["decoder_attention_heads"] = text_config["encoder_attention_heads"]
    return {"vision_config": vision_config, "text_config": text_config}


def embedding_name(tensors: Mapping[str, TensorInfo]) -> str:
    """Microsoft's name of the preferred copy of the word embedding among these.

    Raises:
        ValueError: There is no copy.
    """
    names = [native_to_microsoft(name) or name for name in EMBEDDING_COPIES]
    for name in names:
        if name in tensors:
            return name
    raise ValueError(f"no word embedding of Florence-2: one of {', '.join(names)} is expected")


def microsoft_config(config: Mapping[str, Any], vocab_size: int, dtype: str) -> dict[str, Any]:
    """Microsoft's config.json for a tower without one: the inverse of `native_config`."""
    vision = dict(config["vision_config"])
    text = {k: v for k, v in dict(config["text_config"]).items() if k not in _NOT_BART}
    keep = "drop_path_rate patch_size patch_stride patch_padding patch_prenorm num_heads num_groups depths window_size"
    projection_dim = vision["projection_dim"]
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "model_type": "florence2",
        "is_encoder_decoder": True,
        "projection_dim": projection_dim,
        "vocab_size": vocab_size,
        "bos_token_id": text.get("bos_token_id", 0),
        "eos_token_id": text.get("eos_token_id", 2),
        "pad_token_id": text.get("pad_token_id", 1),
        "torch_dtype": dtype,
        "text_config": {**text, "vocab_size": vocab_size, "model_type": "florence2_language"},
        "vision_config": {
            "model_type": "davit",
            **{key: vision[key] for key in keep.split()},
            "dim_embed": vision["embed_dim"],
            "projection_dim": projection_dim,
            "enable_checkpoint": False,
            "visual_temporal_embedding": {
                "type": "COSINE",
                "max_temporal_embeddings": vision["max_temporal_embeddings"],
            },
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": vision["max_position_embeddings"]},
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        },
    }


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding once `<image>` is added: the next multiple of 64, as in the published native weights."""
    return math.ceil((vocab_size + 1) / 64) * 64


def embedding_report(
    checkpoint: Checkpoint, names: Iterable[str], kept: str
) -> tuple[dict[str, str], list[str], list[str]]:
    """Compare the copies of an embedding with the kept one.

    Returns:
        Reasons by dropped name; names of exact copies; notes about copies that differ.
    """
    reasons: dict[str, str] = {}
    exact: list[str] = []
    notes: list[str] = []
    for name in names:
        if name == kept or name not in checkpoint:
            continue
        main, other = checkpoint.read(kept), checkpoint.read(name)
        if main.shape == other.shape and main.dtype == other.dtype and bits_equal(main, other):
            reasons[name] = f"an exact copy of {kept}"
            exact.append(name)
        elif main.shape != other.shape:
            raise ValueError(f"{name} has the shape {tuple(other.shape)}, {kept} has {tuple(main.shape)}")
        else:
            rows, largest = _row_difference(main, other)
            reasons[name] = f"differs from {kept}, which is used (ties were restored after loading upstream)"
            notes.append(f"{name} differs from {kept} in {few([str(r) for r in rows])} rows by up to {largest:.3g}")
    return reasons, exact, notes


def _row_difference(main: Any, other: Any, step: int = 8192) -> tuple[list[int], float]:
    rows: list[int] = []
    largest = 0.0
    for start in range(0, main.shape[0], step):
        gap = (main[start : start + step].double() - other[start : start + step].double()).abs().amax(1)
        rows += (gap.nonzero()[:, 0] + start).tolist()
        largest = max(largest, float(gap.max()))
    return rows, largest
