"""Plans between the authors' Florence-VL layout and this package's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence_vl.convert import florence2, florence_vl
from florence_vl.convert.florence2_plans import (
    DECODER,
    build_config,
    decoder_tensors,
    expected_shapes,
    keep_small_files,
    restore,
)
from florence_vl.convert.layouts import Source, read_config
from florence_vl.convert.plan import DROPPED_FILE, LAYOUT_FILE, ORIGINAL_FOLDER, Columns, Move, Op, Plan, Rows, Zeros
from florence_vl.convert.processors import ReleasedProcessor, enlarged_rows, image_settings, load_tokenizer
from florence_vl.convert.shards import Checkpoint, few, write_json
from florence_vl.files import read_json

FIRST_LINEAR = "model.multi_modal_projector.layers.0.weight"


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


@dataclass(frozen=True)
class KeptOriginal:
    """The `original/` folder of a conversion.

    Attributes:
        folder: The folder.
        facts: Its layout.json.
        features: Features of the converted model, in order.
        fits: Whether its config.json and tokenizer are those of the model to write.
    """

    folder: Path
    facts: dict[str, Any]
    features: list[str]
    fits: bool


def plan_to_original(source: Source, decoder: Source | None, tokenizer_folder: Path | None = None) -> Plan:
    """Convert this package's Florence-VL to the authors' layout.

    Further contents of their layout (the decoder, copies of the embedding, config.json and tokenizer) come from the
    `original/` folder of the source's conversion or of `decoder`. Files of an `original/` of another LLM or vocabulary
    are not used, only its decoder.

    Args:
        source: A Florence-VL of this package.
        decoder: A Florence-2, or a converted Florence-VL with `original/`, that provides the decoder.
        tokenizer_folder: Folder of the tokenizer, if not in the source.

    Raises:
        ValueError: Tensors are missing or unknown, their layout cannot represent the model, or there is no decoder.
    """
    from florence_vl.model.configuration import FlorenceVLConfig
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

    if decoder is not None and decoder.layout.name == "florence-vl-original":
        raise ValueError(
            f"--decoder needs a Florence-2 or a converted Florence-VL; {decoder.folder} is {decoder.layout.title}"
        )
    checkpoint = source.checkpoint
    ours = FlorenceVLConfig.from_dict(dict(source.config))
    images = image_settings(checkpoint.folder)
    florence_vl.check_expressible(ours, images, florence_vl.open_gates(checkpoint))
    plan = Plan("the authors' Florence-VL layout", str(checkpoint.folder), "florence-vl")
    expected = expected_shapes(FlorenceVLForConditionalGeneration, ours)
    if "lm_head.weight" in checkpoint and "lm_head.weight" not in expected:
        florence_vl.drop_tied_head(plan, checkpoint, florence_vl.TEXT_EMBEDDING)
    own_moves = [Move(name, name, checkpoint) for name in checkpoint.tensors if name not in plan.dropped]
    Plan("Florence-VL", str(checkpoint.folder), "florence-vl", own_moves).check(expected)

    own = _kept_original(source, source, ours, images)
    given = _kept_original(decoder, source, ours, images) if decoder is not None else None
    files = next((kept for kept in (own, given) if kept and kept.fits and tokenizer_folder is None), None)
    rows = files.facts["vocab_size"] if files is not None else ours.text_config.vocab_size
    provider = own if decoder is None else given
    whole = provider if provider is not None and provider.fits and provider.facts.get("complete") else None
    order = _authors_order(own or given)
    for move in own_moves:
        found = florence_vl.ours_to_original(move.source)
        if found is None:
            continue
        target, op = found
        if move.source == florence_vl.EMBEDDING:
            target = whole.facts.get("embedding", target) if whole is not None else target
        elif move.source in (florence_vl.TEXT_EMBEDDING, "lm_head.weight") and rows != ours.text_config.vocab_size:
            op = Rows(rows)
        elif move.source == FIRST_LINEAR and order != ours.features:
            op = Columns(tuple(ours.features.index(name) for name in order))
            plan.notes.append(f"the projector's inputs were reordered from {few(ours.features)} to {few(order)}")
        plan.moves.append(Move(target, move.source, checkpoint, op))
    for name in checkpoint.tensors:
        if name.startswith(florence_vl.FUSION):
            plan.drop(name, "part of gates that are 1")
    plan.account(checkpoint)
    by_target = {move.target: move for move in plan.moves}
    if whole is not None:
        restore(plan, whole.folder, whole.facts, by_target)
    elif provider is not None and (provider.folder / DROPPED_FILE).is_file():
        _add_foreign_decoder(plan, Checkpoint(provider.folder, DROPPED_FILE), ours, by_target)
    elif decoder is not None and decoder.layout.name in ("florence2", "florence2-microsoft"):
        _add_foreign_decoder(plan, decoder.checkpoint, ours, by_target)
    else:
        layers = ours.vision_config.text_config.decoder_layers
        raise ValueError(
            f"the authors' layout contains Florence-2's whole decoder ({layers} layers, embeddings and head), which "
            f"{(decoder or source).folder} does not have: it was trained here, or converted with --drop-decoder. Pass "
            "--decoder with a Florence-2 of the same size, or with the folder that florence-vl convert wrote"
        )
    if files is not None:
        plan.files.append(keep_small_files(files.folder, skip=(LAYOUT_FILE,)))
        if files is not own:
            plan.notes.append(f"config.json and tokenizer are from {files.folder}")
    else:
        model_type, _ = florence_vl.ARCHITECTURES[ours.text_config.model_type]
        tokenizer = load_tokenizer(tokenizer_folder or checkpoint.folder, model_type)
        plan.files.append(_synthesized_files(checkpoint, ours, rows, tokenizer, images))
        plan.notes.append("config.json was derived from this model's config, as no original one of it was kept")
    return plan


def _kept_original(conversion: Source, model: Source, ours: Any, images: Mapping[str, Any]) -> KeptOriginal | None:
    folder = conversion.folder / ORIGINAL_FOLDER
    facts = read_json(folder / LAYOUT_FILE) if (folder / LAYOUT_FILE).is_file() else {}
    if facts.get("layout") != "florence-vl-original":
        return None
    features = list(conversion.config.get("features") or florence_vl.FEATURES)
    fits = _same_text(read_config(folder), ours, images) and _same_rows(facts["vocab_size"], model.folder, ours)
    return KeptOriginal(folder, facts, features, fits)


def _same_text(config: dict[str, Any], ours: Any, images: Mapping[str, Any]) -> bool:
    """Whether the authors' config.json describes this model; the vocabulary's size is not compared."""
    model_type = ours.text_config.model_type
    if florence_vl.MODEL_TYPES.get(str(config.get("model_type"))) != model_type:
        return False
    fields, _ = florence_vl.text_config(config, model_type, "float32")
    theirs = build_config(type(ours.text_config), **{k: v for k, v in fields.items() if k != "model_type"})
    other = ("vocab_size", "dtype", "architectures", "transformers_version", "_name_or_path")
    texts = [{k: v for k, v in text.to_dict().items() if k not in other} for text in (theirs, ours.text_config)]
    pads = [found.get("image_aspect_ratio") == "pad" for found in (config, images or config)]
    projector = f"mlp{ours.projector_depth}x_gelu"
    return texts[0] == texts[1] and pads[0] == pads[1] and config.get("mm_projector_type", projector) == projector


def _same_rows(rows: int, folder: Path, ours: Any) -> bool:
    """Whether the vocabulary has `rows` rows, apart from those that the conversion added for the image token."""
    image = ours.image_token_id
    if image < rows:
        return bool(ours.text_config.vocab_size == rows)
    path = folder / "tokenizer.json"
    later = path.is_file() and any(token["id"] > image for token in read_json(path).get("added_tokens", []))
    return bool(ours.text_config.vocab_size == enlarged_rows(image)) and not later


def _authors_order(kept: KeptOriginal | None) -> list[str]:
    """Features in the order of the authors' code: that of a converted model (V is first), otherwise the default."""
    theirs = list(florence_vl.FEATURES)
    found = kept.features if kept is not None else theirs
    return found if found[:1] == theirs[:1] and sorted(found) == sorted(theirs) else theirs


def _add_foreign_decoder(plan: Plan, decoder: Checkpoint, ours: Any, by_target: Mapping[str, Move]) -> None:
    """Plan another model's decoder, with this tower's embedding."""
    from transformers import Florence2ForConditionalGeneration

    found = decoder_tensors(plan, decoder, ours.vision_config.text_config.d_model)
    expected = expected_shapes(Florence2ForConditionalGeneration, ours.vision_config)
    expected = {n: s for n, s in expected.items() if n.startswith(DECODER) and n not in florence2.EMBEDDING_COPIES}
    moves = [Move(native, name, decoder) for native, name in found.items()]
    Plan("decoder for this tower", str(decoder.folder), "florence2", moves).check(expected)
    prefix = florence_vl.ORIGINAL_TOWER
    plan.moves += [Move(f"{prefix}{florence2.native_to_microsoft(n)}", name, decoder) for n, name in found.items()]
    shared = by_target[f"{prefix}language_model.model.shared.weight"]
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    ops: dict[str, Op] = dict.fromkeys(copies, shared.op)
    ops["final_logits_bias"] = Zeros((1, shared.checkpoint.tensors[shared.source].shape[0]))
    for name, op in ops.items():
        plan.moves.append(Move(f"{prefix}language_model.{name}", shared.source, shared.checkpoint, op))


def _synthesized_files(checkpoint: Checkpoint, ours: Any, rows: int, tokenizer: Any, images: Mapping[str, Any]) -> Any:
    def write(folder: Path) -> None:
        padding = "pad" if images.get("image_aspect_ratio", "pad") == "pad" else "square"
        dtype = str(checkpoint.main_dtype).removeprefix("torch.")
        limit = min(int(tokenizer.model_max_length), 2048)
        write_json(folder / "config.json", florence_vl.original_config(ours, rows, dtype, limit, padding))
        tokenizer.save_pretrained(folder)

    return write
