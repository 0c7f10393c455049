"""Loading is strict: incomplete models are rejected, and the error names the missing parts."""

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from florence_vl import FlorenceVLForConditionalGeneration, FlorenceVLProcessor
from florence_vl.model.loading import load_model
from florence_vl.model.tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def loaders(folder):
    return (
        lambda: load_model(folder, "cpu"),
        lambda: FlorenceVLForConditionalGeneration.from_pretrained(folder),
        lambda: AutoModelForImageTextToText.from_pretrained(folder),
    )


def test_renamed_weights_are_refused(folder):
    rewrite(folder, lambda state: {f"renamed.{name}": value for name, value in state.items()})
    for load in loaders(folder):
        with pytest.raises(ValueError, match=r"245 weights \(.*\) missing; 245 weights \(renamed\..*not part of"):
            load()


def test_one_missing_weight_is_named(folder):
    name = "model.multi_modal_projector.layers.0.weight"
    rewrite(folder, lambda state: {key: value for key, value in state.items() if key != name})
    for load in loaders(folder):
        with pytest.raises(ValueError, match=rf"1 weights \({name}\) missing"):
            load()


def test_one_weight_too_many_is_named(folder):
    rewrite(folder, lambda state: state | {"model.extra": torch.zeros(1)})
    for load in loaders(folder):
        with pytest.raises(ValueError, match=r"1 weights \(model\.extra\) not part of this model"):
            load()


def test_another_shape_is_refused_unless_asked_for(folder):
    name = "model.multi_modal_projector.layers.0.bias"
    rewrite(folder, lambda state: state | {name: torch.zeros(3)})
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
        load_model(folder, "cpu")
    FlorenceVLForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_cut_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(folder, "cpu")


def test_the_model_without_a_head_loads_from_a_whole_checkpoint(folder):
    model = AutoModel.from_pretrained(folder)
    assert type(model).__name__ == "FlorenceVLModel"


def test_the_report_is_still_to_be_had(folder):
    model, report = FlorenceVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert model.config.image_token_id == 3
    assert not report["missing_keys"]


def test_heads_of_siglip_towers_saved_by_earlier_versions_are_left_out(tmp_path):
    model, _ = tiny_model(tower="siglip_vision_model")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state | {"model.vision_tower.backbone.head.probe": torch.zeros(1, 1, 32)})
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"].pop("vision_use_head")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def set_value(key, value):
    def change(text):
        values = json.loads(text)
        if key == "text_config":
            values[key] = value if isinstance(value, str) else {**values[key], **value}
        else:
            values[key] = value
        return json.dumps(values)

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda _: POINTER, r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
        ("tokenizer.json", lambda _: POINTER, r"tokenizer\.json is a Git LFS pointer"),
        ("config.json", lambda _: POINTER, r"config\.json is a Git LFS pointer"),
        ("model.safetensors", None, r"not a whole model, it has no weights"),
        ("processor_config.json", None, r"not a whole model, it has no processor_config\.json"),
        ("tokenizer.json", None, r"not a whole model, it has no tokenizer\.json"),
        ("generation_config.json", lambda _: "{broken", r"generation_config\.json is not a JSON object"),
        ("config.json", lambda _: "[1]", r"config\.json is not a JSON object, but a list"),
        ("config.json", lambda _: '{"a":' * 9000 + "1" + "}" * 9000, r"config\.json is not a JSON object.*nested"),
        (
            "config.json",
            set_value("model_type", "llava_llama"),
            "original layout: convert it with `florence-vl",
        ),
        ("config.json", set_value("text_config", "x"), "cannot be loaded"),
        ("config.json", set_value("text_config", {"hidden_size": -4}), "cannot be loaded"),
        ("config.json", set_value("fusion", ["x"]), "cannot be loaded"),
        ("processor_config.json", set_value("image_token_rule", {"x": 1}), "cannot be loaded"),
        ("processor_config.json", set_value("context_length", "x"), "context_length must be a number"),
        (
            "model.safetensors.index.json",
            lambda _: '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}',
            r"it has no model-00002-of-00002\.safetensors",
        ),
    ],
)
def test_damage_is_a_value_error_that_names_the_file_or_folder(folder, name, change, message):
    path = folder / name
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text() if name.endswith("config.json") else ""))
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder, "cpu")
    assert str(folder) in str(error.value)


def test_other_files_of_the_folder_are_not_read(folder):
    (folder / "notes.json").write_text("[1, 2]")
    (folder / "photo.png").write_text(POINTER)
    (folder / "router.safetensors").write_text(POINTER)
    assert load_model(folder, "cpu")[0].device.type == "cpu"


def test_the_processor_is_of_the_same_revision_as_the_weights(folder, monkeypatch):
    found = {}
    load = FlorenceVLProcessor.from_pretrained

    def record(path, **options):
        found.update(options)
        return load(path, **options)

    monkeypatch.setattr(FlorenceVLProcessor, "from_pretrained", record)
    load_model(folder, "cpu", revision="abc", local_files_only=True, attn_implementation="eager")
    assert found == {"revision": "abc", "local_files_only": True}


@pytest.mark.parametrize(
    "fields",
    [
        {"fusion": "gated"},
        {"mean_token": "all"},
        {"views": {"glance": {"size": 32, "features": ["davit"]}}},
        {"tiles": {"max": 4}},
    ],
)
def test_the_processor_follows_changed_fields(folder, fields):
    model, processor = load_model(folder, "cpu", **fields)
    view = "glance" if "views" in fields else "full"
    image = Image.new("RGB", (150, 90), "red")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(chat, view=view, tokenize=True, return_dict=True, return_tensors="pt")
    assert ("question_ids" in inputs) == (fields.get("fusion") == "gated")
    assert model(**inputs).logits.isfinite().all()


def test_a_shorter_context_of_a_saved_processor_is_kept(folder):
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "context_length": 100}))
    assert load_model(folder, "cpu")[1].context_length == 100
    path.write_text(json.dumps({**json.loads(path.read_text()), "context_length": None}))
    assert load_model(folder, "cpu")[1].context_length == 1024


def test_dtype_and_device_as_torch_has_them(folder):
    model, _ = load_model(folder, torch.device("cpu"), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        load_model(folder, "cpu", torch.int8)


def test_a_position_grid_given_as_a_list_is_that_of_the_images(folder, caplog):
    model, _ = load_model(folder, "cpu", position_grid=[2, 2])
    transformers.logging.enable_propagation()
    try:
        model.get_image_features(torch.zeros(1, 3, 64, 64))
    finally:
        transformers.logging.disable_propagation()
    assert model.config.position_grid == (2, 2)
    assert "trained for" not in caplog.text
