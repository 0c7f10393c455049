"""Plans between the authors' Florence-VL layout and this package's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence_vl.convert import florence2, florence_vl
from florence_vl.convert.florence2_plans import DECODER, build_config, expected_shapes, keep_small_files, restore
from florence_vl.convert.layouts import Source
from florence_vl.convert.plan import DROPPED_FILE, ORIGINAL_FOLDER, Move, Plan, Rows, Zeros
from florence_vl.convert.processors import ReleasedProcessor
from florence_vl.convert.shards import Checkpoint, few, read_json, write_json


@dataclass(frozen=True)
class TowerSource:
    """A separate Florence-2 folder of a Florence-VL: its config, and its weights if it has them."""

    folder: Path
    config: dict[str, Any]
    checkpoint: Checkpoint | None
    prefix: str = ""


def open_tower(folder: Path) -> TowerSource:
    """Read a separate tower folder (the authors' `vision_tower/` or tower repositories, Microsoft's names).

    Raises:
        FileNotFoundError: The folder does not exist, or contains neither config.json nor weights.
        ValueError: Its weights are not a Florence-2 under Microsoft's names.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such tower folder")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    try:
        checkpoint = Checkpoint(folder)
    except FileNotFoundError:
        if not config or any(folder.glob("*.index.json")):
            raise
        return TowerSource(folder, config, None)
    prefix = florence2.microsoft_prefix(checkpoint.tensors)
    if prefix is None:
        raise ValueError(
            f"{folder}: not a Florence-2 in Microsoft's layout (tensors {few(list(checkpoint.tensors), 3)}); "
            "--tower needs the authors' vision tower folder"
        )
    return TowerSource(folder, config, checkpoint, prefix)


def plan_from_original(
    checkpoint: Checkpoint, config: Mapping[str, Any], tower: TowerSource | None, processor: ReleasedProcessor
) -> Plan:
    """Convert a released Florence-VL to this package's layout.

    Args:
        checkpoint: The authors' main checkpoint.
        config: Its config.json.
        tower: A separate tower folder: its config determines the tower's sizes; its weights are used only if the main
            checkpoint has no tower.
        processor: Tokenizer, image settings and template.

    Raises:
        ValueError: A tensor is unknown or has a wrong shape, there is no tower, or configs contradict each other.
    """
    from florence_vl.model.configuration import FlorenceVLConfig
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

    plan = Plan("Florence-VL", str(checkpoint.folder), "florence-vl-original", notes=list(checkpoint.notes))
    text_type = florence_vl.text_model_type(config, checkpoint.tensors)
    inside = any(name.startswith(florence_vl.ORIGINAL_TOWER) for name in checkpoint.tensors)
    source, prefix = (checkpoint, florence_vl.ORIGINAL_TOWER) if inside else _outside(checkpoint, tower)
    infos = florence_vl.tower_infos(source, prefix)
    tower_config = tower.config if tower is not None else {}
    fields = florence2.native_config(tower_config, infos) if tower_config else florence2.config_from_shapes(infos)
    if not tower_config:
        plan.notes.append(
            "the tower's sizes were read from its weights (heads: width / 32 in DaViT, width / 64 in BART, window 12, "
            "as in every released Florence-2)"
        )
    florence_vl.add_tower(plan, source, prefix)
    if tower is not None and tower.checkpoint is not None and source is not tower.checkpoint:
        plan.notes.append(f"the tower inside the checkpoint is used; the weights in {tower.folder} are not")

    dtype = str(checkpoint.main_dtype).removeprefix("torch.")
    text, rest = florence_vl.text_config(config, text_type, dtype)
    if "model.embed_tokens.weight" not in checkpoint:
        raise ValueError(f"{checkpoint.folder}: it contains no LLM (model.embed_tokens.weight is missing)")
    rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    if rows != text.get("vocab_size", rows):
        raise ValueError(f"config.json says vocab_size {text['vocab_size']}, but the embedding has {rows} rows")
    choice = processor.choose_image_token(rows)
    plan.notes += processor.notes
    if choice.rows != rows:
        plan.notes.append(
            f"the vocabulary has no unused token for images: {choice.token!r} was added; embedding and head were "
            f"padded from {rows} to {choice.rows} rows with mean rows (which never have the largest logit)"
        )
    text["vocab_size"] = choice.rows
    florence_vl.add_llm_and_projector(plan, checkpoint, config, choice.rows)
    settings = {**florence_vl.PARITY_SETTINGS}
    ours = build_config(
        FlorenceVLConfig,
        vision_config={"model_type": "florence2", **fields, "image_token_id": fields["text_config"]["vocab_size"]},
        text_config=text,
        features=list(florence_vl.FEATURES),
        fusion="channel",
        projector_depth=florence_vl.projector_depth(config, checkpoint.tensors),
        image_token_id=choice.id,
        **settings,
    )
    ours.architectures = ["FlorenceVLForConditionalGeneration"]
    ours.dtype = checkpoint.main_dtype
    plan.settings = {**settings, **processor.settings(), "image_token": choice.token}
    plan.layout_facts.update(vocab_size=rows, not_ours=rest)
    plan.account(checkpoint)
    if source is not checkpoint:
        plan.account(source)
    plan.check(expected_shapes(FlorenceVLForConditionalGeneration, ours))
    plan.files += [ours.save_pretrained, lambda folder: processor.save(folder, ours)]
    plan.keep_folder = keep_small_files(checkpoint.folder)
    return plan


def _outside(checkpoint: Checkpoint, tower: TowerSource | None) -> tuple[Checkpoint, str]:
    if tower is None or tower.checkpoint is None:
        raise ValueError(
            f"{checkpoint.folder} contains no vision tower ({florence_vl.ORIGINAL_TOWER}*) and no vision_tower/ "
            "folder with weights; pass --tower FOLDER (the authors' vision tower)"
        )
    return tower.checkpoint, tower.prefix


def plan_to_original(source: Source, decoder: Source | None, tokenizer_folder: Path | None = None) -> Plan:
    """Convert this package's Florence-VL to the authors' layout.

    Further contents of their layout (the decoder, copies of the embedding, config.json and tokenizer) come from the
    `original/` folder of the source's conversion, otherwise from `decoder`.

    Args:
        source: A Florence-VL of this package.
        decoder: A Florence-2, or a converted Florence-VL with `original/`, that provides the decoder.
        tokenizer_folder: Folder of the tokenizer, if not in the source.

    Raises:
        ValueError: Their layout cannot represent the model, or there is no decoder.
    """
    from florence_vl.model.configuration import FlorenceVLConfig

    checkpoint = source.checkpoint
    ours = FlorenceVLConfig.from_dict(dict(source.config))
    florence_vl.check_expressible(ours, _image_settings(checkpoint.folder), florence_vl.open_gates(checkpoint))
    plan = Plan("the authors' Florence-VL layout", str(checkpoint.folder), "florence-vl")
    facts, original = _original_facts(source, decoder)
    rows = facts.get("vocab_size", ours.text_config.vocab_size)
    for name in checkpoint.tensors:
        found = florence_vl.ours_to_original(name)
        if found is None:
            continue
        target, op = found
        if name == florence_vl.EMBEDDING:
            target = facts.get("embedding", target)
        elif name in (florence_vl.TEXT_EMBEDDING, "lm_head.weight") and rows != ours.text_config.vocab_size:
            op = Rows(rows)
        plan.moves.append(Move(target, name, checkpoint, op))
    for name in checkpoint.tensors:
        if name.startswith(florence_vl.FUSION):
            plan.drop(name, "part of gates that are 1")
    plan.account(checkpoint)
    by_target = {move.target: move for move in plan.moves}
    if original is not None and facts.get("complete"):
        restore(plan, original, facts, by_target)
    elif decoder is not None and decoder.layout.name in ("florence2", "florence2-microsoft"):
        _add_foreign_decoder(plan, decoder.checkpoint, decoder.layout.name, by_target)
    else:
        layers = ours.vision_config.text_config.decoder_layers
        raise ValueError(
            f"the authors' layout contains Florence-2's whole decoder ({layers} layers, embeddings and head), which "
            f"{checkpoint.folder} does not have: it was trained here, or converted with --drop-decoder. Pass --decoder "
            "with a Florence-2 of the same size, or with the folder that florence-vl convert wrote"
        )
    if original is not None:
        plan.files.append(keep_small_files(original, skip=("layout.json",)))
        if original.parent != checkpoint.folder:
            plan.notes.append(f"config.json and tokenizer are from {original}")
    else:
        plan.files.append(_synthesized_files(checkpoint, ours, rows, tokenizer_folder or checkpoint.folder))
        plan.notes.append("config.json was derived from this model's config, as no original one was kept")
    return plan


def _original_facts(source: Source, decoder: Source | None) -> tuple[dict[str, Any], Path | None]:
    folders = [source.folder]
    if decoder is not None and decoder.layout.name == "florence-vl":
        folders.insert(0, decoder.folder)
    for folder in folders:
        original = folder / ORIGINAL_FOLDER
        if (original / "layout.json").is_file():
            facts = read_json(original / "layout.json")
            if facts.get("layout") == "florence-vl-original" and (
                facts.get("complete") or (original / DROPPED_FILE).is_file()
            ):
                return facts, original
    return {}, None


def _add_foreign_decoder(plan: Plan, decoder: Checkpoint, layout: str, by_target: Mapping[str, Move]) -> None:
    found = 0
    for name in decoder.tensors:
        native = name if layout == "florence2" else florence2.microsoft_to_native(name)
        if native is None or not native.startswith(DECODER) or native in florence2.EMBEDDING_COPIES:
            continue
        microsoft = florence2.native_to_microsoft(native)
        assert microsoft is not None
        plan.moves.append(Move(florence_vl.ORIGINAL_TOWER + microsoft, name, decoder))
        found += 1
    if not found:
        raise ValueError(f"{decoder.folder} contains no decoder of a Florence-2")
    shared = by_target[florence_vl.ORIGINAL_TOWER + "language_model.model.shared.weight"]
    vocab_size, width = shared.checkpoint.tensors[shared.source].shape
    for move in plan.moves:
        shape = move.checkpoint.tensors[move.source].shape
        if move.checkpoint is decoder and move.target.endswith("layernorm_embedding.weight") and shape != (width,):
            raise ValueError(f"the decoder of {decoder.folder} has width {shape[0]}, this tower {width}: another size")
    prefix = florence_vl.ORIGINAL_TOWER + "language_model."
    plan.moves.append(Move(prefix + "final_logits_bias", shared.source, shared.checkpoint, Zeros((1, vocab_size))))
    for copy in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
        plan.moves.append(Move(prefix + copy, shared.source, shared.checkpoint, shared.op))


def _image_settings(folder: Path) -> dict[str, Any]:
    """Settings of a saved image processor; empty where there is none."""
    for candidate in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if candidate.is_file():
            found = read_json(candidate)
            return dict(found.get("image_processor", found))
    return {}


def _synthesized_files(checkpoint: Checkpoint, ours: Any, rows: int, tokenizer_folder: Path) -> Any:
    def write(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        found = _image_settings(checkpoint.folder)
        padding = "pad" if found.get("image_aspect_ratio", "pad") == "pad" else "square"
        dtype = str(checkpoint.main_dtype).removeprefix("torch.")
        limit = min(int(tokenizer.model_max_length), 2048)
        write_json(folder / "config.json", florence_vl.original_config(ours, rows, dtype, limit, padding))
        tokenizer.save_pretrained(folder)

    return write
