"""Plans between Microsoft's and transformers' Florence-2, and from a Florence-VL's tower to a plain Florence-2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence_vl.convert import florence2, florence_vl
from florence_vl.convert.layouts import Source
from florence_vl.convert.plan import DROPPED_FILE, ORIGINAL_FOLDER, Copy, Move, Op, Plan, Rows, Transpose, Zeros
from florence_vl.convert.shards import Checkpoint, read_json, write_json

DECODER = ("model.language_model.decoder.",)
NO_DECODER_NOTE = (
    "the decoder is omitted: the tower is complete, but transformers initializes the decoder randomly when "
    "Florence2ForConditionalGeneration loads the folder. Pass --decoder FLORENCE2 to add one"
)
GENERATION_FIELDS = (
    "num_beams",
    "early_stopping",
    "no_repeat_ngram_size",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md")


def expected_shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `model_class.from_pretrained` expects, without tied copies. Allocates no storage."""
    import torch

    with torch.device("meta"):
        model = model_class(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def build_config(config_class: Any, **fields: Any) -> Any:
    """A config of transformers.

    Raises:
        ValueError: The config class rejects a field; the message names it.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class(**fields)
    except (StrictDataclassError, TypeError, KeyError) as error:
        raise ValueError(f"config.json is not a valid {config_class.__name__}: {error}") from error


def keep_small_files(source: Path, skip: tuple[str, ...] = ()) -> Any:
    """A function that copies the source's configs and tokenizer byte by byte."""

    def write(folder: Path) -> None:
        for pattern in SMALL_FILES:
            for path in source.glob(pattern):
                if path.is_file() and not path.name.endswith(".index.json") and path.name not in skip:
                    shutil.copyfile(path, folder / path.name)

    return write


def plan_native(checkpoint: Checkpoint, config: Mapping[str, Any], layout: str) -> Plan:
    """Convert Microsoft's or transformers' Florence-2 to a folder for `Florence2ForConditionalGeneration`.

    transformers' class needs an embedding row for its image placeholder, which Microsoft's does not have: the embedding
    is padded to the next multiple of 64 with mean rows, as in the published native weights.

    Raises:
        ValueError: Tensors are unknown, or shapes contradict config.json.
    """
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    microsoft = layout == "florence2-microsoft"
    plan = Plan("transformers Florence-2", str(checkpoint.folder), layout)
    if microsoft:
        fields = florence2.native_config(config, checkpoint.tensors)
        vocab_size = fields["text_config"]["vocab_size"]
        fields["image_token_id"] = vocab_size
        fields["text_config"]["vocab_size"] = rows = florence2.padded_vocab_size(vocab_size)
        _add_florence2(plan, checkpoint, "", rows)
        if not any(move.target.startswith(DECODER) for move in plan.moves):
            plan.notes.append(NO_DECODER_NOTE)
        plan.settings = {"image_token_id": vocab_size, "embedding_rows": f"{vocab_size} -> {rows} (mean rows)"}
        plan.keep_folder = keep_small_files(checkpoint.folder)
    else:
        fields = {k: config[k] for k in ("vision_config", "text_config", "image_token_id") if k in config}
        kept = next((n for n in florence2.EMBEDDING_COPIES if n in checkpoint), florence2.SHARED)
        reasons, exact, notes = florence2.embedding_report(checkpoint, florence2.EMBEDDING_COPIES, kept)
        plan.notes += notes
        for name in checkpoint.tensors:
            if name in reasons:
                plan.drop(name, reasons[name], checkpoint, copy_of=kept if name in exact else None)
            else:
                plan.moves.append(Move(florence2.SHARED if name == kept else name, name, checkpoint))
    native = build_config(Florence2Config, **fields)
    native.architectures = ["Florence2ForConditionalGeneration"]
    native.dtype = checkpoint.main_dtype
    plan.account(checkpoint)
    plan.check(expected_shapes(Florence2ForConditionalGeneration, native), optional=DECODER)
    plan.files += [native.save_pretrained, _florence2_files(checkpoint.folder, config, native)]
    return plan


def _add_florence2(plan: Plan, checkpoint: Checkpoint, prefix: str, rows: int) -> None:
    """Plan Microsoft's tensors (with `prefix`) under transformers' names."""
    infos = florence_vl.tower_infos(checkpoint, prefix)
    kept = florence2.embedding_name(infos)
    names = [florence2.native_to_microsoft(n) or n for n in florence2.EMBEDDING_COPIES]
    reasons, exact, notes = florence2.embedding_report(checkpoint, [prefix + n for n in names], prefix + kept)
    plan.notes += notes
    plan.layout_facts.update(embedding=prefix + kept, vocab_size=infos[kept].shape[0])
    for name, info in infos.items():
        source = prefix + name
        native = florence2.microsoft_to_native(name)
        if name == kept:
            grown: Op = Copy() if info.shape[0] == rows else Rows(rows)
            plan.moves.append(Move(florence2.SHARED, source, checkpoint, grown))
        elif source in reasons:
            plan.drop(source, reasons[source], checkpoint, copy_of=prefix + kept if source in exact else None)
        elif name in florence2.MICROSOFT_ONLY:
            plan.drop(source, florence2.MICROSOFT_ONLY[name], checkpoint)
        elif native is not None:
            op = Transpose() if name == florence2.TRANSPOSED else Copy()
            plan.moves.append(Move(native, source, checkpoint, op))


def _florence2_files(folder: Path, config: Mapping[str, Any], native: Any) -> Any:
    """A function that writes generation settings, tokenizer and processor for transformers' Florence-2."""

    def write(target: Path) -> None:
        from transformers import GenerationConfig

        text = dict(config.get("text_config") or {})
        path = folder / "generation_config.json"
        fields = read_json(path) if path.is_file() else {k: text[k] for k in GENERATION_FIELDS if k in text}
        bart = native.text_config
        defaults = {k: getattr(bart, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        defaults["decoder_start_token_id"] = bart.decoder_start_token_id
        fields = {k: v for k, v in fields.items() if k not in ("transformers_version", "_from_model_config")}
        GenerationConfig(**{**defaults, **fields}).save_pretrained(target)
        write_florence2_processor(folder, target, native.image_token_id)

    return write


def write_florence2_processor(folder: Path, target: Path, image_token_id: int) -> bool:
    """Write transformers' `Florence2Processor` from a folder's BART tokenizer; False if it has none.

    Raises:
        ValueError: The id of `<image>` would differ from its row in the embedding.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return False
    from transformers import AutoTokenizer, BartConfig, CLIPImageProcessorPil, Florence2Processor

    tokenizer = AutoTokenizer.from_pretrained(folder, config=BartConfig(), trust_remote_code=False)
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    found = tokenizer.convert_tokens_to_ids("<image>")
    if found != image_token_id:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, so <image> would be id {found}, but the "
            f"embedding has {image_token_id} rows; tokenizer and weights are not from the same Florence-2"
        )
    tokenizer.image_token = "<image>"
    tokenizer.image_token_id = found
    images = {"size": {"height": 768, "width": 768}, "do_center_crop": False, "resample": 3}
    path = folder / "preprocessor_config.json"
    if path.is_file():
        known = (
            "size",
            "resample",
            "image_mean",
            "image_std",
            "do_resize",
            "do_normalize",
            "do_rescale",
            "do_center_crop",
        )
        images |= {k: v for k, v in read_json(path).items() if k in known}
    else:
        images |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    image_processor = CLIPImageProcessorPil(**images)
    image_processor.image_seq_length = 577
    Florence2Processor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(target)
    return True


def plan_microsoft(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Plan:
    """transformers' Florence-2 to Microsoft's layout.

    A folder converted by this package gets its original config and tokenizer back; its tensors are restored bit for
    bit.

    Raises:
        ValueError: Tensors have no name in that layout.
    """
    plan = Plan("Microsoft Florence-2", str(checkpoint.folder), "florence2")
    original = checkpoint.folder / ORIGINAL_FOLDER
    facts = read_json(original / "layout.json") if (original / "layout.json").is_file() else {}
    text = dict(config["text_config"])
    image_token_id = config.get("image_token_id", 51289)
    rows = facts.get("vocab_size", min(image_token_id, text["vocab_size"]))
    kept = next((n for n in florence2.EMBEDDING_COPIES if n in checkpoint), florence2.SHARED)
    embedding = facts.get("embedding", "language_model.model.shared.weight")
    for name in checkpoint.tensors:
        if name == kept:
            plan.moves.append(Move(embedding, name, checkpoint, Rows(rows)))
        elif name in florence2.EMBEDDING_COPIES:
            plan.drop(name, f"a copy of {kept}", copy_of=kept)
        elif (target := florence2.native_to_microsoft(name)) is not None:
            op = Transpose() if target == florence2.TRANSPOSED else Copy()
            plan.moves.append(Move(target, name, checkpoint, op))
    plan.account(checkpoint)
    by_target = {move.target: move for move in plan.moves}
    restore(plan, original, facts, by_target)
    if not facts:
        bias = Zeros((1, rows))
        plan.moves.append(Move("language_model.final_logits_bias", kept, checkpoint, bias))
        dtype = str(checkpoint.main_dtype).removeprefix("torch.")
        written = florence2.microsoft_config(config, rows, dtype)
        plan.files.append(lambda folder: write_json(folder / "config.json", written))
        plan.files.append(keep_small_files(checkpoint.folder, skip=("config.json", "conversion.json", "README.md")))
    else:
        plan.files.append(keep_small_files(original, skip=("layout.json",)))
    return plan


def restore(plan: Plan, original: Path, facts: Mapping[str, Any], by_target: Mapping[str, Move]) -> None:
    """Add the side file's tensors and the exact copies that a conversion omitted."""
    if (original / DROPPED_FILE).is_file():
        side = Checkpoint(original, DROPPED_FILE)
        plan.moves += [Move(name, name, side) for name in side.tensors if name not in by_target]
    for name, kept in facts.get("copies", {}).items():
        move = by_target[kept]
        plan.moves.append(Move(name, move.source, move.checkpoint, move.op))


def plan_vision_tower(source: Source, tower_fields: Mapping[str, Any], decoder: Source | None) -> Plan:
    """The tower of a Florence-VL as a plain transformers Florence-2.

    Args:
        source: A Florence-VL in this package's or the authors' layout.
        tower_fields: `Florence2Config` fields of its tower.
        decoder: A Florence-2 whose decoder is used; None uses the checkpoint's own, if it has one.

    Raises:
        ValueError: The widths of decoder and tower differ.
    """
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    checkpoint, layout = source.checkpoint, source.layout.name
    plan = Plan("transformers Florence-2", str(checkpoint.folder), layout)
    fields = json.loads(json.dumps({k: tower_fields[k] for k in ("vision_config", "text_config")}))
    fields["text_config"].pop("dtype", None)
    infos = checkpoint.tensors
    if layout == "florence-vl-original":
        prefix = florence_vl.ORIGINAL_TOWER
        vocab_size = infos[prefix + florence2.embedding_name(florence_vl.tower_infos(checkpoint, prefix))].shape[0]
        rows = florence2.padded_vocab_size(vocab_size)
        _add_florence2(plan, checkpoint, prefix, rows)
        plan.moves = [m for m in plan.moves if decoder is None or not m.target.startswith(DECODER)]
        plan.dropped, plan.copies, plan.side, plan.layout_facts = {}, {}, [], {}
    else:
        vocab_size = infos[florence_vl.EMBEDDING].shape[0] if florence_vl.EMBEDDING in infos else 0
        if not vocab_size:
            raise ValueError(
                f"{checkpoint.folder}: its tower has no encoder (features without prompts); nothing to extract"
            )
        image_token_id = tower_fields.get("image_token_id")
        padded = image_token_id is not None and image_token_id < vocab_size
        rows = vocab_size if padded else florence2.padded_vocab_size(vocab_size)
        vocab_size = int(image_token_id or 0) if padded else vocab_size
        for name in infos:
            if name == florence_vl.EMBEDDING:
                plan.moves.append(Move(florence2.SHARED, name, checkpoint, Rows(rows)))
            elif name.startswith(florence_vl.TOWER):
                native = florence2.tower_to_native(name[len(florence_vl.TOWER) :])
                if native is not None:
                    plan.moves.append(Move(native, name, checkpoint))
        side = checkpoint.folder / ORIGINAL_FOLDER / DROPPED_FILE
        if decoder is None and side.is_file():
            _add_decoder(plan, Checkpoint(side.parent, DROPPED_FILE), "florence-vl-original", fields["text_config"], {})
    if decoder is not None:
        _add_decoder(plan, decoder.checkpoint, decoder.layout.name, fields["text_config"], decoder.config)
    if not any(move.target.startswith(DECODER) for move in plan.moves):
        plan.notes.append(NO_DECODER_NOTE)
    fields["text_config"]["vocab_size"] = rows
    native = build_config(Florence2Config, **fields, image_token_id=vocab_size)
    native.architectures = ["Florence2ForConditionalGeneration"]
    native.dtype = checkpoint.main_dtype
    plan.check(expected_shapes(Florence2ForConditionalGeneration, native), optional=DECODER)
    plan.files.append(native.save_pretrained)
    with_tokenizer = decoder.folder if decoder is not None else checkpoint.folder / "vision_tower"

    def write_processor(folder: Path) -> None:
        if not write_florence2_processor(with_tokenizer, folder, vocab_size):
            plan.notes.append("no Florence-2 tokenizer was available, so no processor was written")

    plan.files.append(write_processor)
    return plan


def _add_decoder(plan: Plan, decoder: Checkpoint, layout: str, text: dict[str, Any], config: Mapping[str, Any]) -> None:
    found = 0
    for name in decoder.tensors:
        if layout == "florence2":
            native: str | None = name
        elif layout == "florence2-microsoft":
            native = florence2.microsoft_to_native(name)
        else:
            at = name.removeprefix(florence_vl.ORIGINAL_TOWER)
            native = florence2.microsoft_to_native(at) if at != name else None
        if native is not None and native.startswith(DECODER) and native not in florence2.EMBEDDING_COPIES:
            plan.moves.append(Move(native, name, decoder))
            found += 1
    if not found:
        raise ValueError(f"{decoder.folder} contains no decoder of a Florence-2")
    theirs = dict(config.get("text_config") or {})
    width = theirs.get("d_model", text["d_model"])
    if width != text["d_model"]:
        raise ValueError(
            f"the decoder of {decoder.folder} has width {width}, this tower {text['d_model']}: another size"
        )
    for key in ("decoder_layers", "decoder_ffn_dim", "decoder_attention_heads"):
        if key in theirs:
            text[key] = theirs[key]
