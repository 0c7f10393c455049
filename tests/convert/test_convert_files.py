"""Converting files: every tensor accounted for, bitwise equality, round trips, bad input rejected before writing."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import florence_vl
from florence_vl.convert import convert, florence2, open_source, shards
from florence_vl.convert.conversion import make_plan, resolve
from florence_vl.convert.shards import Checkpoint, Output, bits_equal, parse_size, write_safetensors
from florence_vl.files import read_json

sys.path.insert(0, str(Path(__file__).parent))
import convert_upstream as upstream

SHARED = upstream.TOWER + "language_model.model.shared.weight"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released checkpoint (safetensors, 3 shards, 4 copies of the embedding) and its tensors."""
    folder = tmp_path_factory.mktemp("released") / "llama"
    state, _ = upstream.make_released(folder, "llama", shards=3)
    return folder, state


@pytest.fixture(scope="module")
def ours(released, tmp_path_factory):
    """The folder of its conversion."""
    folder = tmp_path_factory.mktemp("converted") / "ours"
    convert(released[0], folder)
    return folder


@pytest.fixture
def copy(released, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(released[0], tmp_path / "src")
    return tmp_path / "src"


def tensors(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert bits_equal(found[name], value), name


def assert_refused(source, destination, error, match, **options):
    with pytest.raises(error, match=match):
        convert(source, destination, **options)
    assert not destination.exists()
    assert not list(destination.parent.glob(f".{destination.name}*"))


# ------------------------------------------------------------ what is written


def test_every_tensor_is_accounted_for(released, tmp_path):
    folder, state = released
    report = convert(folder, tmp_path / "dst", max_shard_size="4MB")
    dst = tensors(tmp_path / "dst")
    assert report["tensors"] == len(dst)
    assert len(dst) + len(report["dropped"]) == len(state)
    reasons = set(report["dropped"].values())
    assert len(reasons) == 3  # decoder, copies of the embedding, logits bias
    assert json.loads((tmp_path / "dst" / "conversion.json").read_text())["dropped"] == report["dropped"]
    assert bits_equal(dst["model.vision_tower.encoder.embed_tokens.weight"], state[SHARED])
    projection = state[upstream.TOWER + "image_projection"]
    assert bits_equal(dst["model.vision_tower.image_projector.image_projection.weight"], projection.t().contiguous())
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(dst)
    assert len(set(index["weight_map"].values())) > 2
    model = florence_vl.FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / "dst")
    assert set(model.state_dict()) == set(dst)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"shards": 3}),
        ("phi3", {"shards": 1, "copies": 1}),
        ("llama", {"pickled": True, "shards": 2, "copies": 2}),
        ("llama", {"dtype": torch.bfloat16, "copies": 3}),
    ],
)
def test_round_trip_is_bit_identical(tmp_path, kind, options):
    state, _ = upstream.make_released(tmp_path / "src", kind, **options)
    convert(tmp_path / "src", tmp_path / "ours")
    totals, done = [], []

    def start(total):
        totals.append(total)
        return done.append

    report = convert(tmp_path / "ours", tmp_path / "back", to="original", max_shard_size="8MB", on_start=start)
    assert sum(done) == totals[0] == sum(value.nbytes for value in state.values())
    assert_same(tensors(tmp_path / "back"), state)
    assert not report["dropped"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    convert(tmp_path / "back", tmp_path / "again")
    assert_same(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))


def test_copies_that_differ_are_reported_and_restored(copy, released, tmp_path):
    state = dict(released[1])
    name = upstream.TOWER + "language_model.model.encoder.embed_tokens.weight"
    state[name] = state[name].clone()
    state[name][[3, 47066]] += 0.25
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    upstream.write_weights(copy, state, 2, pickled=False)
    report = convert(copy, tmp_path / "dst")
    assert [n for n in report["notes"] if "differs" in n] == [
        f"{name} differs from {SHARED} in 3, 47066 rows by up to 0.25"
    ]
    assert bits_equal(tensors(tmp_path / "dst")["model.vision_tower.encoder.embed_tokens.weight"], state[SHARED])
    convert(tmp_path / "dst", tmp_path / "back", to="original")
    assert_same(tensors(tmp_path / "back"), state)


def test_a_separate_tower_folder(released, tmp_path):
    """Weights outside the main checkpoint, with a separate config and image settings."""
    state, theirs = upstream.make_released(tmp_path / "src", "llama", with_tower=False)
    upstream.make_microsoft(tmp_path / "tower", copies=2)
    settings = {"size": {"height": 64, "width": 64}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(settings))
    assert_refused(tmp_path / "src", tmp_path / "dst", ValueError, "contains no vision tower.*--tower")
    convert(tmp_path / "src", tmp_path / "dst", tower=tmp_path / "tower")
    model = florence_vl.FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / "dst").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = model.get_image_features(images).pooler_output[0]
        torch.testing.assert_close(found, theirs.projected(images, "grid", True)[0], atol=1e-5, rtol=0)
    processor = florence_vl.FlorenceVLProcessor.from_pretrained(tmp_path / "dst")
    found = json.loads(processor.image_processor.to_json_string())
    assert {key: found[key] for key in settings} == settings
    shutil.move(tmp_path / "tower", tmp_path / "src" / "vision_tower")
    convert(tmp_path / "src", tmp_path / "inside")
    assert_same(tensors(tmp_path / "inside"), tensors(tmp_path / "dst"))
    convert(tmp_path / "dst", tmp_path / "back", to="original")
    assert set(tensors(tmp_path / "back")) == {
        n for n in state if "lm_head" not in n.removeprefix(upstream.TOWER) or not n.startswith(upstream.TOWER)
    } - {upstream.TOWER + "language_model.model.decoder.embed_tokens.weight"}


def test_vicuna_grows_by_the_image_token_and_shrinks_back(tmp_path):
    state, _ = upstream.make_released(tmp_path / "src", "llama", tokenizer_kind="vicuna", adds_bos=True)
    report = convert(tmp_path / "src", tmp_path / "ours")
    assert report["settings"]["template"] == "vicuna_v1"
    model = florence_vl.FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    rows = state["lm_head.weight"].shape[0]
    assert model.config.image_token_id == rows
    assert model.config.text_config.vocab_size % 64 == 0
    head = model.lm_head.weight
    torch.testing.assert_close(head[rows:], head[:rows].mean(0).expand(len(head) - rows, -1))
    assert bits_equal(head[:rows], state["lm_head.weight"])
    convert(tmp_path / "ours", tmp_path / "back", to="original")
    assert_same(tensors(tmp_path / "back"), state)
    path = tmp_path / "ours" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": rows + 1, "content": "<new>"})
    path.write_text(json.dumps(tokenizer))  # another token, in a row of the padding
    convert(tmp_path / "ours", tmp_path / "later", to="original")
    assert Checkpoint(tmp_path / "later").tensors["lm_head.weight"].shape[0] == len(head)


def test_a_tuned_model_goes_back_with_a_florence2_decoder(released, tmp_path):
    """Trained here (no `original/`): the decoder comes from a Florence-2, the config from the model's own."""
    convert(released[0], tmp_path / "ours", keep_decoder=False)
    assert not (tmp_path / "ours" / "original" / "dropped_tensors.safetensors").exists()
    assert_refused(tmp_path / "ours", tmp_path / "back", ValueError, "whole decoder.*--decoder", to="original")
    shutil.rmtree(tmp_path / "ours" / "original")
    decoder = upstream.make_microsoft(tmp_path / "florence2", seed=5)
    report = convert(tmp_path / "ours", tmp_path / "back", to="original", decoder=tmp_path / "florence2")
    back = tensors(tmp_path / "back")
    assert set(back) == set(released[1])
    name = "language_model.model.decoder.layers.0.fc1.weight"
    assert bits_equal(back[upstream.TOWER + name], decoder[name])
    for name, value in released[1].items():
        if (
            ".decoder.layers." not in name
            and ".decoder.embed_positions" not in name
            and "decoder.layernorm" not in name
        ):
            assert bits_equal(back[name], value), name
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", released[0]))
    assert {
        k: ours.get(k) for k in theirs if k not in ("transformers_version", "tune_entire_model", "mm_hidden_size")
    } == {k: v for k, v in theirs.items() if k not in ("transformers_version", "tune_entire_model", "mm_hidden_size")}
    assert any("config.json was derived" in note for note in report["notes"])
    convert(tmp_path / "back", tmp_path / "again")  # what was written is a released checkpoint
    assert_same(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))


def test_models_that_the_original_layout_cannot_hold(tmp_path):
    from florence_vl.model.tiny import tiny_model

    model, _ = tiny_model("qwen3", fusion="average")
    model.save_pretrained(tmp_path / "ours")
    assert_refused(tmp_path / "ours", tmp_path / "back", ValueError, "fusion 'average'.*LLM 'qwen3'", to="original")


GRID = {"position_grid": (2, 2)}


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.1.mlp.up_proj.weight",
        "model.multi_modal_projector.layers.1.bias",
        "model.vision_tower.davit.convs.0.conv.weight",
        "lm_head.weight",
    ],
)
def test_an_incomplete_model_does_not_go_back(ours, tmp_path, name):
    shutil.copytree(ours, tmp_path / "ours")
    rewrite(tmp_path / "ours", lambda state: state.pop(name))
    assert_refused(tmp_path / "ours", tmp_path / "back", ValueError, f"1 missing: {re.escape(name)}", to="original")


def test_another_models_conversion_gives_only_its_decoder(ours, tmp_path):
    """A tuned Llama with the folder of a converted Phi-3 as decoder stays a Llama."""
    other, _ = upstream.make_released(tmp_path / "phi3", "phi3", seed=3)
    convert(tmp_path / "phi3", tmp_path / "phi3-ours")
    shutil.copytree(ours, tmp_path / "tuned", ignore=shutil.ignore_patterns("original"))
    report = convert(tmp_path / "tuned", tmp_path / "back", to="original", decoder=tmp_path / "phi3-ours")
    assert any("config.json was derived" in note for note in report["notes"])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llava_llama"
    name = upstream.TOWER + "language_model.model.decoder.layers.0.fc1.weight"
    assert bits_equal(Checkpoint(tmp_path / "back").read(name), other[name])
    convert(tmp_path / "back", tmp_path / "again")
    assert_same(tensors(tmp_path / "again"), tensors(ours))
    for name in ("config.json", "tokenizer.json"):
        read, kept = (json.loads((folder / name).read_text()) for folder in (tmp_path / "again", ours))
        assert read == kept


def test_a_given_decoder_is_used_beside_the_own_original(ours, released, tmp_path):
    decoder = upstream.make_microsoft(tmp_path / "florence2", seed=5)
    convert(ours, tmp_path / "back", to="original", decoder=tmp_path / "florence2")
    back, name = tensors(tmp_path / "back"), "language_model.model.decoder.layers.0.fc1.weight"
    assert bits_equal(back[upstream.TOWER + name], decoder[name])
    assert set(back) == set(released[1])
    assert (tmp_path / "back" / "config.json").read_bytes() == (released[0] / "config.json").read_bytes()
    rewrite(tmp_path / "florence2", lambda state: state.pop(name))
    match = "not a valid decoder for this tower; tensors 1 missing: .*fc1.weight"
    options = {"to": "original", "decoder": tmp_path / "florence2"}
    assert_refused(ours, tmp_path / "again", ValueError, match, **options)


def test_a_vocabulary_that_grew_is_kept(ours, tmp_path):
    """64 tokens more than the conversion, whose `original/` is in the folder: none of their rows is lost."""
    model = florence_vl.FlorenceVLForConditionalGeneration.from_pretrained(ours)
    rows = model.config.text_config.vocab_size
    model.resize_token_embeddings(rows + 64)
    model.save_pretrained(tmp_path / "grown")
    for path in ours.glob("*token*"):
        shutil.copy(path, tmp_path / "grown")
    shutil.copytree(ours / "original", tmp_path / "grown" / "original")
    convert(tmp_path / "grown", tmp_path / "back", to="original")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == rows + 64
    back, grown = tensors(tmp_path / "back"), tensors(tmp_path / "grown")
    assert bits_equal(back["model.embed_tokens.weight"], grown["model.language_model.embed_tokens.weight"])
    assert bits_equal(back["lm_head.weight"], grown["lm_head.weight"])


def test_an_order_that_the_probe_found_is_the_authors(ours, released, tmp_path):
    """Beside `original/` another order of the prompts is how their code reads the same tensors."""
    shutil.copytree(ours, tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    config["features"] = ["davit", "grounding", "ocr", "caption"]
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "ours", tmp_path / "back", to="original")
    assert_same(tensors(tmp_path / "back"), released[1])


@torch.no_grad()
@pytest.mark.parametrize("order", [["ocr", "davit", "caption", "grounding"], ["davit", "grounding", "ocr", "caption"]])
def test_features_of_another_order_compute_the_same_in_their_code(ours, tmp_path, order):
    model = florence_vl.FlorenceVLForConditionalGeneration.from_pretrained(ours, features=order).eval()
    model.save_pretrained(tmp_path / "tuned")
    shutil.copy(ours / "processor_config.json", tmp_path / "tuned")
    for path in ours.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "tuned")
    upstream.make_microsoft(tmp_path / "florence2")
    report = convert(tmp_path / "tuned", tmp_path / "back", to="original", decoder=tmp_path / "florence2")
    assert any("inputs were reordered" in note for note in report["notes"])
    images = torch.randn(1, 3, 64, 64)
    wanted = upstream.Upstream(tensors(tmp_path / "back")).projected(images, "grid", True)[0]
    torch.testing.assert_close(model.get_image_features(images).pooler_output[0], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        ({"fusion": "gated"}, {}, r"gates other than 1 \(model\.fusion\.gate\.weight\)"),
        ({"merge": 2}, {}, "merge 2 "),
        ({"views": {"glance": {"size": 32}}}, {}, "views glance "),
        ({}, {}, r"other prompts for caption, ocr, grounding \(theirs: the released ids"),
        ({"prompt_padding": "attended", "prompt_length": 20}, {}, r"prompt_length 20 \(theirs: 14\)"),
        (GRID, {"image_aspect_ratio": "native"}, "image_aspect_ratio 'native'"),
        (
            {**GRID, "positions": "resampled"},
            {"size": {"height": 96, "width": 96}},
            r"resampled from \(2, 2\) to \(3, 3\)",
        ),
    ],
)
def test_looks_and_gates_that_the_original_layout_cannot_hold(tmp_path, options, images, message):
    from florence_vl.model.tiny import tiny_model

    model, processor = tiny_model(**options)
    if options.get("fusion") == "gated":
        model.model.fusion.gate.weight.data[0, 0] = 0.5
    for name, value in images.items():
        setattr(processor.image_processor, name, value)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert_refused(tmp_path / "ours", tmp_path / "back", ValueError, message, to="original")


def test_gates_of_one_and_positions_at_the_trained_size_go_back(released, tmp_path):
    """They change nothing, so the authors' layout holds the model."""
    from florence_vl.model.loading import load_model

    convert(released[0], tmp_path / "ours")
    model, processor = load_model(tmp_path / "ours", fusion="gated", positions="resampled", position_grid=(2, 2))
    processor.image_processor.size = {"height": 64, "width": 64}
    model.save_pretrained(tmp_path / "gated")
    processor.save_pretrained(tmp_path / "gated")
    shutil.copytree(tmp_path / "ours" / "original", tmp_path / "gated" / "original")
    report = convert(tmp_path / "gated", tmp_path / "back", to="original")
    assert any(name.startswith("model.fusion.") for name in report["dropped"])
    assert_same(tensors(tmp_path / "back"), released[1])


# ------------------------------------------------------------ bad input


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_truncated_shard(copy, tmp_path):
    path = first_shard(copy)
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(copy, tmp_path / "dst", ValueError, f"{path.name}.*truncated or damaged")


def test_missing_shard(copy, tmp_path):
    first_shard(copy).unlink()
    assert_refused(copy, tmp_path / "dst", FileNotFoundError, "1 of 3 shards missing: model-00001")


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    path.write_text(change(path.read_text()))


def test_index_names_a_tensor_twice(copy, tmp_path):
    edit_index(copy, lambda text: text.replace('{"model.embed', '{"lm_head.weight": "x.safetensors", "model.embed'))
    assert_refused(copy, tmp_path / "dst", ValueError, "has the key 'lm_head.weight' twice")


def test_index_names_a_tensor_that_no_shard_has(copy, tmp_path):
    edit_index(copy, lambda text: text.replace('"lm_head.weight"', '"lm_head.wait"'))
    assert_refused(copy, tmp_path / "dst", ValueError, "'lm_head.wait' should be in .* no shard has it")


def test_a_tensor_in_two_shards(copy, tmp_path):
    paths = sorted(copy.glob("model-*.safetensors"))
    extra = load_file(paths[1])
    extra["model.norm.weight"] = torch.zeros(48)
    extra["model.embed_tokens.weight"] = load_file(paths[0])["model.embed_tokens.weight"]
    save_file(extra, paths[1])
    assert_refused(copy, tmp_path / "dst", ValueError, "in two shards")


def test_index_points_outside(copy, tmp_path):
    edit_index(copy, lambda text: text.replace("model-00001", "../model-00001"))
    assert_refused(copy, tmp_path / "dst", ValueError, "outside its folder")


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('evil').touch()",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_with_code_is_refused_and_not_run(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    torch.save({"model.norm.weight": torch.zeros(2), "x": Evil()}, copy / "pytorch_model.bin")
    assert_refused(copy, tmp_path / "dst", ValueError, "refused, the pickle contains more than tensors")
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    assert_refused(copy, tmp_path / "dst", ValueError, "refused, the pickle contains more than tensors")
    assert not (tmp_path / "evil").exists()


def test_truncated_pickle(tmp_path):
    upstream.make_microsoft(tmp_path / "src")
    path = tmp_path / "src" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-5000])
    assert_refused(tmp_path / "src", tmp_path / "dst", ValueError, "truncated or damaged")


def test_another_architecture(copy, tmp_path):
    (tmp_path / "llm").mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, tmp_path / "llm" / "model.safetensors")
    assert_refused(tmp_path / "llm", tmp_path / "dst", ValueError, "none of the known layouts.*bare language model")
    (tmp_path / "llava").mkdir()
    save_file({"model.mm_projector.0.weight": torch.zeros(2, 2)}, tmp_path / "llava" / "model.safetensors")
    assert_refused(tmp_path / "llava", tmp_path / "dst", ValueError, "LLaVA whose tower is not Florence-2")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llava_phi"}))
    assert_refused(copy, tmp_path / "dst", ValueError, "says 'llava_phi', but the LLM's tensors are those of llama")
    (copy / "config.json").write_text(json.dumps({**config, "mm_projector_type": "mlp2x_gelu"}))
    assert_refused(copy, tmp_path / "dst", ValueError, "mm_projector_type is 'mlp2x_gelu', but the weights have 3")


def rewrite(folder, change):
    state = tensors(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    change(state)
    upstream.write_weights(folder, {k: v.contiguous() for k, v in state.items()}, 1, pickled=False)


def test_unknown_missing_and_misshapen_tensors(copy, tmp_path):
    good = tmp_path / "good"
    shutil.copytree(copy, good)
    rewrite(copy, lambda state: state.update({"model.surprise.weight": torch.zeros(3)}))
    assert_refused(copy, tmp_path / "dst", ValueError, "1 tensors are unknown .* model.surprise.weight")
    name = upstream.TOWER + "language_model.model.encoder.layers.1.fc1.weight"
    rewrite(copy, lambda state: [state.pop("model.surprise.weight"), state.pop(name)])
    assert_refused(copy, tmp_path / "dst", ValueError, "1 missing: model.vision_tower.encoder.layers.1.fc1.weight")
    rewrite(copy, lambda state: state.update({name: torch.zeros(96, 63)}))
    assert_refused(copy, tmp_path / "dst", ValueError, r"wrong shape: .*fc1.weight \(96, 63\) instead of \(96, 64\)")


def test_no_tokenizer(copy, tmp_path):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert_refused(copy, tmp_path / "dst", ValueError, "no tokenizer .*--tokenizer")


def test_too_little_disk(released, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage._replace(free=10 * 1024**2))
    assert_refused(released[0], tmp_path / "dst", ValueError, "too little disk space: .* GiB needed, 0.01 GiB free")


def test_destination_is_written_whole_or_not_at_all(released, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    convert(released[0], dst)
    earlier = {path.name: path.stat().st_mtime_ns for path in dst.iterdir()}
    with pytest.raises(ValueError, match="not empty: name another folder, or pass --overwrite"):
        convert(released[0], dst)

    real, calls = shards.write_safetensors, []

    def fails(path, outputs, metadata=None, progress=None):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, outputs, metadata, progress)

    monkeypatch.setattr(shards, "write_safetensors", fails)
    with pytest.raises(OSError, match="No space left"):
        convert(released[0], dst, overwrite=True, max_shard_size="4MB")
    assert {path.name: path.stat().st_mtime_ns for path in dst.iterdir()} == earlier
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]
    monkeypatch.setattr(shards, "write_safetensors", real)
    convert(released[0], dst, overwrite=True)
    assert (dst / "model.safetensors").stat().st_mtime_ns > earlier["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_what_is_not_ours_is_never_deleted(released, tmp_path):
    zoo = tmp_path / "zoo"
    mine, sibling = zoo / "mine", zoo / "sibling"
    shutil.copytree(released[0], mine)
    shutil.copytree(released[0], sibling)
    for destination in (zoo, mine, mine / "inside"):
        with pytest.raises(ValueError, match=r"inside the other|did not write"):
            convert(mine, destination, overwrite=True)
    with pytest.raises(ValueError, match="did not write"):
        convert(mine, sibling, overwrite=True)
    assert sorted(path.name for path in zoo.iterdir()) == ["mine", "sibling"]
    assert (sibling / "config.json").is_file()


def test_options_without_meaning_are_errors(released, tmp_path):
    assert_refused(
        released[0], tmp_path / "dst", ValueError, "unknown target 'orignal'. Did you mean 'original'", to="orignal"
    )
    assert_refused(released[0], tmp_path / "dst", ValueError, "is already .*; nothing to convert", to="original")
    assert_refused(released[0], tmp_path / "dst", ValueError, "--decoder does not apply", decoder=released[0])
    assert_refused(tmp_path / "nowhere", tmp_path / "dst", FileNotFoundError, "there is no such file or folder")


def test_a_config_of_wrong_types(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "two"}))
    assert_refused(copy, tmp_path / "dst", ValueError, "num_hidden_layers")
    rewrite(copy, lambda state: state.pop("model.embed_tokens.weight"))
    assert_refused(copy, tmp_path / "dst", ValueError, "contains no LLM")


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'models/nothing': there is no such file or folder"):
        resolve("models/nothing")


# ------------------------------------------------------------ the real sizes


def florence2_large_shapes(copies):
    """Microsoft's names and shapes of Florence-2-large, from transformers' class without storage."""
    widths, heads = [256, 512, 1024, 2048], [8, 16, 32, 64]
    config = Florence2Config(
        vision_config={"embed_dim": widths, "num_heads": heads, "num_groups": heads, "projection_dim": 1024},
        text_config={"model_type": "bart", "vocab_size": 51289, "d_model": 1024, "max_position_embeddings": 1024},
    )
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(config)
    shapes = {}
    for name, value in model.state_dict().items():
        if name in florence2.EMBEDDING_COPIES[copies:]:
            continue
        microsoft = florence2.native_to_microsoft(name)
        shapes[microsoft] = tuple(value.shape)[:: -1 if microsoft == florence2.TRANSPOSED else 1]
    shapes["language_model.final_logits_bias"] = (1, 51289)
    return shapes


REAL = {
    # 8B SFT: four copies of the embedding, 9.01 B parameters on the hub; 3B with one: 4.62 B
    "llama": (
        4,
        9.008e9,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128257},
    ),
    "phi3": (1, 4.62e9, {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "vocab_size": 32064}),
}


@pytest.mark.parametrize("kind", list(REAL))
def test_the_released_sizes_can_be_planned(tmp_path, kind):
    """Checkpoints of the released sizes (files without content): every tensor finds its place and its shape."""
    copies, total, size = REAL[kind]
    upstream.make_released(tmp_path / "small", kind, copies=1)
    small = json.loads((tmp_path / "small" / "config.json").read_text())
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8 if kind == "llama" else 32}
    config = {**small, **size, **heads, "rope_scaling": None, "torch_dtype": "bfloat16"}
    for path in (tmp_path / "small").glob("*.safetensors*"):
        path.unlink()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "phi3": (Phi3Config, Phi3ForCausalLM)}[kind]
    with torch.device("meta"):
        llm = model_class(config_class(**size, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    shapes = {name: tuple(value.shape) for name, value in llm.state_dict().items()}
    width = size["hidden_size"]
    for i, columns in enumerate([4096, width, width]):
        name = f"model.mm_projector.encoder_mlp.{i}{'.1' if i else ''}"
        shapes |= {f"{name}.weight": (width, columns), f"{name}.bias": (width,)}
    shapes |= {upstream.TOWER + name: shape for name, shape in florence2_large_shapes(copies).items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size_bytes = shards.num_bytes(shape, torch.bfloat16)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    blob = json.dumps(header).encode()
    with open(tmp_path / "small" / "model.safetensors", "wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        file.truncate(8 + len(blob) + end)  # a hole: takes no disk
    assert end / 2 == pytest.approx(total, rel=2e-3)
    plan = make_plan(open_source(tmp_path / "small"), "native")
    tower = sum(o.nbytes for m in plan.moves if (o := m.output()).name.startswith("model.vision_tower."))
    assert tower / 2 == pytest.approx(570.7e6 - 4.2e6, rel=1e-2)
    assert len(plan.moves) + len(plan.dropped) == len(shapes)
    assert not [note for note in plan.notes if "differs" in note]
    settings = plan.settings
    assert settings["template"] == {"llama": "llama3", "phi3": "phi3"}[kind]


# ------------------------------------------------------------ shard machinery


def test_written_files_are_what_safetensors_reads(tmp_path):
    """Mixed types and empty, scalar and unaligned tensors, in an order that would break alignment if kept."""
    values = {
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "double": torch.randn(7).double(),
        "view": torch.randn(4, 6).t(),
    }
    outputs = [Output(n, tuple(v.shape), v.dtype, lambda v=v: v) for n, v in values.items()]
    write_safetensors(tmp_path / "x.safetensors", outputs, {"note": "yes"})
    assert_same(load_file(tmp_path / "x.safetensors"), values)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "yes"}


def test_bits_not_values_decide_equality():
    zero, minus = torch.tensor([0.0]), torch.tensor([-0.0])
    assert torch.equal(zero, minus)
    assert not bits_equal(zero, minus)
    nan = torch.tensor([float("nan")])
    assert bits_equal(nan, nan.clone())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("512 mb", 512 * 10**6), ("7", 7)])
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "5XB", "0GB", -1])
def test_parse_size_refuses(text):
    with pytest.raises(ValueError, match=r"size"):
        parse_size(text)


def test_memory_stays_below_a_shard(tmp_path):
    """Eight 16 MB shards, 128 MB in all: a fresh process grows by less than 1.2 shards and 24 MB while it converts."""
    script = textwrap.dedent(
        f"""
        import sys, types
        from pathlib import Path
        import torch
        # the package without its registration in transformers, whose import takes longer than the test
        root = Path({str(Path(florence_vl.__file__).parent)!r})
        for name in ("florence_vl", "florence_vl.model", "florence_vl.convert"):
            module = sys.modules[name] = types.ModuleType(name)
            module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        from safetensors.torch import save_file
        from florence_vl.convert.plan import Move, Plan, Transpose
        from florence_vl.convert.shards import Checkpoint
        folder = Path({str(tmp_path)!r})
        src = folder / "src"
        src.mkdir()
        weight_map = {{}}
        for i in range(8):
            part = {{f"t{{i}}.{{j}}": torch.full((512, 1024), float(i * 8 + j)) for j in range(8)}}
            save_file(part, src / f"model-{{i}}.safetensors")
            weight_map.update(dict.fromkeys(part, f"model-{{i}}.safetensors"))
            del part
        import json
        (src / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": weight_map}}))

        def peak():
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

        import gc; gc.collect()
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        checkpoint = Checkpoint(src)
        plan = Plan("test", "src", "test")
        plan.moves = [Move(name, name, checkpoint, Transpose()) for name in checkpoint.tensors]
        plan.account(checkpoint)
        plan.write(folder / "dst", 16 * 2**20, keep_dropped=True)
        print("PEAK", peak() - before)
        """
    )
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown = int(done.stdout.split("PEAK ")[1])
    assert grown < (1.2 * 16 + 24) * 2**20
    back = Checkpoint(tmp_path / "dst")
    assert len({info.file for info in back.tensors.values()}) == 8
    assert back.read("t7.7").shape == (1024, 512)
    assert (back.read("t7.7") == 63).all()


def test_pointers_and_deep_json_are_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "config.json").write_text(pointer)
    (tmp_path / "deep.json").write_text('{"a":' * 9000 + "1" + "}" * 9000)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=f"{re.escape(name)} is a Git LFS pointer"):
            Checkpoint(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"config\.json is a Git LFS pointer"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"deep\.json is not a JSON object: it is nested too deeply"):
        read_json(tmp_path / "deep.json")
