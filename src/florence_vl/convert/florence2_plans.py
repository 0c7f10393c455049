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
from florence_vl.convert.processors import image_settings
from florence_vl.convert.shards import Checkpoint, few, write_json
from florence_vl.files import read_json

DECODER = ("model.language_model.decoder.",)
NO_DECODER_NOTE = (
    "the decoder is omitted: the tower is complete, but Florence2ForConditionalGeneration initializes the decoder "
    "randomly when it loads the folder. --to vision-tower adds one with --decoder FLORENCE2"
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
        plan.settings = {"image_token_id": vocab_size, "embedding_rows": f"{vocab_size} -> {rows} (mean rows)"}
        plan.keep_folder = keep_small_files(checkpoint.folder)
    else:
        known = ("vision_config", "text_config", "image_token_id", "tie_word_embeddings")
        fields = {key: config[key] for key in known if key in config}
    native = build_config(Florence2Config, **fields)
    native.architectures = ["Florence2ForConditionalGeneration"]
    native.dtype = checkpoint.main_dtype
    expected = expected_shapes(Florence2ForConditionalGeneration, native)
    if not microsoft:
        _add_native(plan, checkpoint, expected)
    if not any(move.target.startswith(DECODER) for move in plan.moves):
        plan.notes.append(NO_DECODER_NOTE)
    plan.account(checkpoint)
    plan.check(expected, optional=DECODER)
    plan.files += [native.save_pretrained, _florence2_files(checkpoint.folder, config, native)]
    return plan


def _add_native(plan: Plan, checkpoint: Checkpoint, expected: Mapping[str, Any]) -> None:
    """Plan transformers' own tensors; copies that the config ties must be equal, the others are kept."""
    tied = [name for name in florence2.EMBEDDING_COPIES if name in checkpoint and name not in expected]
    kept = florence2.SHARED if florence2.SHARED in checkpoint or not tied else tied[0]
    reasons, _, notes = florence2.embedding_report(checkpoint, tied, kept)
    if notes:
        raise ValueError(
            f"{checkpoint.folder}: config.json ties these tensors, but {few(notes)}. Set tie_word_embeddings to false "
            "in config.json (for the head), or in its text_config (for encoder and decoder)"
        )
    for name in checkpoint.tensors:
        if name in reasons:
            plan.drop(name, reasons[name], copy_of=kept)
        else:
            plan.moves.append(Move(florence2.SHARED if name == kept else name, name, checkpoint))


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
        write_florence2_processor(folder, target, native.image_token_id, image_settings(folder))

    return write


def write_florence2_processor(
    folder: Path | None, target: Path, image_token_id: int, images: Mapping[str, Any]
) -> bool:
    """Write transformers' `Florence2Processor` from a folder's BART tokenizer.

    Args:
        folder: Folder of the tokenizer.
        target: Folder to write.
        image_token_id: Id of `<image>`.
        images: From `image_settings`; if empty, those of the released Florence-2.

    Returns:
        Whether there is a tokenizer. Without one, only the image processor is written, if `images` is not empty.

    Raises:
        ValueError: The id of `<image>` would differ from its row in the embedding.
    """
    from transformers import AutoTokenizer, BartConfig, CLIPImageProcessorPil, Florence2Processor

    settings = {"size": {"height": 768, "width": 768}, "do_center_crop": False, "resample": 3}
    settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    known = (*settings, "do_resize", "do_normalize", "do_rescale")
    image_processor = CLIPImageProcessorPil(**{**settings, **{k: v for k, v in images.items() if k in known}})
    image_processor.image_seq_length = 577
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        if images:
            image_processor.save_pretrained(target)
        return False
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
    Florence2Processor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(target)
    return True


def plan_microsoft(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Plan:
    """transformers' Florence-2 to Microsoft's layout.

    A folder converted by this package gets its original config and tokenizer back; its tensors are restored bit for
    bit.

    Raises:
        ValueError: Tensors are missing or unknown, copies of the embedding differ, or the vocabulary was enlarged.
    """
    plan = Plan("Microsoft Florence-2", str(checkpoint.folder), "florence2")
    native = plan_native(checkpoint, config, "florence2")
    plan.notes += native.notes
    original = checkpoint.folder / ORIGINAL_FOLDER
    facts = read_json(original / "layout.json") if (original / "layout.json").is_file() else {}
    text = dict(config["text_config"])
    image_token_id = config.get("image_token_id", 51289)
    rows = facts.get("vocab_size", min(image_token_id, text["vocab_size"]))
    if text["vocab_size"] > florence2.padded_vocab_size(rows):
        raise ValueError(
            f"{checkpoint.folder}: its embedding has {text['vocab_size']} rows, but Microsoft's layout only the {rows} "
            "before <image>: the tokens after it would be lost"
        )
    kept = next(move.source for move in native.moves if move.target == florence2.SHARED)
    reasons, _, notes = florence2.embedding_report(checkpoint, florence2.EMBEDDING_COPIES, kept)
    if notes:
        raise ValueError(f"{checkpoint.folder}: Microsoft's code ties these tensors, but {few(notes)}")
    embedding = facts.get("embedding", "language_model.model.shared.weight")
    for name in checkpoint.tensors:
        if name == kept:
            plan.moves.append(Move(embedding, name, checkpoint, Rows(rows)))
        elif name in reasons:
            plan.drop(name, reasons[name], copy_of=kept)
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


def plan_vision_tower(
    source: Source, tower_fields: Mapping[str, Any], decoder: Source | None, tower_folder: Path
) -> Plan:
    """The tower of a Florence-VL as a plain transformers Florence-2.

    Args:
        source: A Florence-VL in this package's or the authors' layout.
        tower_fields: `Florence2Config` fields of its tower.
        decoder: A Florence-2 whose decoder and tokenizer are used; None uses the checkpoint's own, if it has them.
        tower_folder: Folder of the tower's image settings and, in the authors' layout, of its tokenizer.

    Raises:
        ValueError: The widths of decoder and tower differ.
    """
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    checkpoint, layout = source.checkpoint, source.layout.name
    plan = Plan("transformers Florence-2", str(checkpoint.folder), layout)
    fields = json.loads(json.dumps({k: tower_fields[k] for k in ("vision_config", "text_config")}))
    for key in ("dtype", "tie_word_embeddings"):  # the tower has one embedding
        fields["text_config"].pop(key, None)
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
            own = Checkpoint(side.parent, DROPPED_FILE)
            found = decoder_tensors(plan, own, fields["text_config"]["d_model"])
            plan.moves += [Move(native, name, own) for native, name in found.items()]
    if decoder is not None:
        theirs = dict(decoder.config.get("text_config") or {})
        sizes = ("decoder_layers", "decoder_ffn_dim", "decoder_attention_heads")
        fields["text_config"] |= {key: theirs[key] for key in sizes if key in theirs}
        found = decoder_tensors(plan, decoder.checkpoint, fields["text_config"]["d_model"])
        plan.moves += [Move(native, name, decoder.checkpoint) for native, name in found.items()]
    if not any(move.target.startswith(DECODER) for move in plan.moves):
        plan.notes.append(NO_DECODER_NOTE)
    fields["text_config"]["vocab_size"] = rows
    native = build_config(Florence2Config, **fields, image_token_id=vocab_size)
    native.architectures = ["Florence2ForConditionalGeneration"]
    native.dtype = checkpoint.main_dtype
    plan.check(expected_shapes(Florence2ForConditionalGeneration, native), optional=DECODER)
    plan.files.append(native.save_pretrained)
    with_tokenizer = tower_folder if layout == "florence-vl-original" else None  # ours has the LLM's tokenizer
    images = image_settings(tower_folder)
    if decoder is not None:
        with_tokenizer, images = decoder.folder, images or image_settings(decoder.folder)

    def write_processor(folder: Path) -> None:
        if not write_florence2_processor(with_tokenizer, folder, vocab_size, images):
            what = "only the image processor" if images else "no processor"
            plan.notes.append(f"no Florence-2 tokenizer was available, so {what} was written")

    plan.files.append(write_processor)
    return plan


def decoder_tensors(plan: Plan, decoder: Checkpoint, width: int) -> dict[str, str]:
    """The decoder of a Florence-2 in any layout, without the word embedding: transformers' name -> its name.

    Args:
        plan: Receives notes about an embedding and a head that differ.
        decoder: A Florence-2, or the side file of a conversion.
        width: Width of the tower's encoder.

    Raises:
        ValueError: There is no decoder, or it has another width.
    """
    names: dict[str, str] = {}
    for name in decoder.tensors:
        microsoft = name.removeprefix(florence_vl.ORIGINAL_TOWER)
        native = name if florence2.native_to_microsoft(name) else florence2.microsoft_to_native(microsoft)
        if native is not None:
            names[native] = name
    copies = [names[name] for name in florence2.EMBEDDING_COPIES if name in names]
    if copies and names.get(florence2.SHARED) == copies[0]:
        notes = florence2.embedding_report(decoder, copies, copies[0])[2]
        plan.notes += [f"{decoder.folder}: {note}; the tower's own embedding is used" for note in notes]
    found = {n: name for n, name in names.items() if n.startswith(DECODER) and n not in florence2.EMBEDDING_COPIES}
    if not found:
        raise ValueError(f"{decoder.folder} contains no decoder of a Florence-2")
    norm = found.get(f"{DECODER[0]}layernorm_embedding.weight")
    if norm is not None and (theirs := decoder.tensors[norm].shape[0]) != width:
        raise ValueError(f"the decoder of {decoder.folder} has width {theirs}, this tower {width}: another size")
    return found
