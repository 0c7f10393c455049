"""`build_model`: saved parts become one self-contained model; errors are raised before anything is loaded."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    GPT2Config,
)

import florence_vl
from florence_vl.model.tiny import TINY_BACKBONES, TINY_LLMS, tiny_config, tiny_florence2, tiny_processor


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a Florence-2, two LLMs and a CLIP as their own libraries save them."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = tiny_processor().tokenizer
    fields = tiny_florence2(text_config={"vocab_size": len(tokenizer)}, image_token_id=len(tokenizer) - 1)
    fields.pop("model_type")
    florence2 = Florence2ForConditionalGeneration(Florence2Config(**fields))
    florence2.save_pretrained(folder / "florence2")
    tokenizer.save_pretrained(folder / "florence2")
    (folder / "florence2" / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    )
    for name in TINY_LLMS:
        llm = AutoModelForCausalLM.from_config(tiny_config(name).text_config)
        llm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    clip = CLIPConfig(
        vision_config=TINY_BACKBONES["clip_vision_model"],
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    )
    CLIPModel(clip).save_pretrained(folder / "clip")
    return folder


@pytest.mark.parametrize("llm", list(TINY_LLMS))
def test_built_saved_loaded_and_asked(parts, llm, tmp_path):
    model, processor = florence_vl.build_model(parts / "florence2", parts / llm)
    source = Florence2ForConditionalGeneration.from_pretrained(parts / "florence2")
    language = AutoModelForCausalLM.from_pretrained(parts / llm)
    tower = model.model.vision_tower
    assert torch.equal(tower.davit.convs[0].conv.weight, source.model.vision_tower.convs[0].conv.weight)
    assert torch.equal(tower.encoder.embed_tokens.weight, source.get_input_embeddings().weight)
    assert torch.equal(model.get_input_embeddings().weight, language.get_input_embeddings().weight)
    assert processor.image_processor.size.height == 64
    assert list(processor.image_processor.image_mean) == [0.5] * 3

    model.save_pretrained(tmp_path)
    assert str(parts) not in (tmp_path / "config.json").read_text()
    processor.save_pretrained(tmp_path)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is florence_vl.FlorenceVLProcessor
    question = [{"type": "image", "image": Image.new("RGB", (90, 40), "red")}, {"type": "text", "text": "what is it?"}]
    inputs = again.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    ends = loaded.generation_config.eos_token_id
    assert again.tokenizer.eos_token_id in ends
    assert loaded.generation_config.pad_token_id == again.tokenizer.pad_token_id


def test_prompts_are_tokenized_by_that_florence2(parts):
    own = {"colours": "what colours are it?"}
    model, _ = florence_vl.build_model(
        parts / "florence2", parts / "llama", features=["davit", "colours", "ocr"], prompts=own, fusion="average"
    )
    tokenizer = tiny_processor().tokenizer
    assert model.config.prompt_token_ids["colours"] == tokenizer(own["colours"])["input_ids"]
    assert model.config.prompts["ocr"] == "What is the text in the image?"
    assert list(model.model.vision_tower.feature_names) == ["davit", "colours", "ocr"]


def test_clip_makes_the_llava_baseline(parts):
    model, processor = florence_vl.build_model(parts / "clip", parts / "llama", projector_depth=2)
    clip = CLIPModel.from_pretrained(parts / "clip")
    name = "embeddings.patch_embedding.weight"
    assert torch.equal(model.model.vision_tower.backbone.get_parameter(name), clip.vision_model.get_parameter(name))
    assert model.config.feature_layers == {"last": -2}
    assert processor.num_image_tokens() == model.num_image_tokens(64, 64) == 4


def test_a_token_is_added_only_when_none_is_reserved(parts):
    model, processor = florence_vl.build_model(parts / "florence2", parts / "llama")
    rows = model.get_input_embeddings().num_embeddings
    assert rows == 512, "the tokenizer's own <image> token is used"
    grown, processor = florence_vl.build_model(parts / "florence2", parts / "llama", image_token="<|picture|>")
    assert processor.image_token == "<|picture|>"
    assert grown.config.image_token_id == processor.image_token_id
    assert grown.get_input_embeddings().num_embeddings % 64 == 0
    assert grown.lm_head.out_features == grown.config.text_config.vocab_size


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vision": "nowhere/at/all"}, FileNotFoundError, "no vision model"),
        ({"vision": "."}, ValueError, "no config.json"),
        ({"llm": "missing.gguf"}, FileNotFoundError, "no LLM 'missing.gguf'"),
        ({"features": ["davit", "captoin"]}, ValueError, "Did you mean 'caption'"),
        ({"fusion": "chanel"}, ValueError, "Did you mean 'channel'"),
        ({"chat_template": "lama3"}, ValueError, "Did you mean 'llama3'"),
        ({"image_size": 352, "positions": "absolute"}, ValueError, "at most 320 pixels per side"),
        ({"feature_layers": {"last": -1}}, ValueError, "for a vision backbone"),
        (
            {"features": ["davit", "ocr"], "prompts": {"colors": "What?"}},
            ValueError,
            r"prompts \['colors'\] are not among",
        ),
        ({"image_token": "<|im_end|>"}, ValueError, "has another use"),
        ({"image_token": "<pad>"}, ValueError, "has another use"),
        ({"image_token": "<|im_start|>", "chat_template": "chatml"}, ValueError, "template 'chatml' writes it"),
        ({"merge": 2, "views": {"glance": {"size": 96}}}, ValueError, "view 'glance': .* merge=2 does not divide"),
        ({"views": {"large": {"size": 1280}}}, ValueError, "view 'large': .* context has 1024"),
        ({"views": {"large": {"size": True}}}, ValueError, "must be pixels per side"),
    ],
)
def test_refusals(parts, change, error, message, monkeypatch):
    monkeypatch.chdir(parts)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = {"vision": parts / "florence2", "llm": parts / "llama", **change}
    with pytest.raises(error, match=message):
        florence_vl.build_model(**arguments)


def test_what_is_no_decoder_or_no_converted_florence2(parts, tmp_path):
    with pytest.raises(ValueError, match="not a decoder LLM"):
        florence_vl.build_model(parts / "florence2", parts / "florence2")
    config = json.loads((parts / "florence2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(ValueError, match="florence-vl convert"):
        florence_vl.build_model(tmp_path, parts / "llama")
    with pytest.raises(ValueError, match="prompts are for a Florence-2"):
        florence_vl.build_model(parts / "clip", parts / "llama", prompts={"a": "b"})


def test_a_head_that_is_more_than_linear_is_refused(parts, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(parts / "llama").config
    from transformers import Gemma2Config

    capped = Gemma2Config(
        **{k: getattr(config, k) for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")},
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=12,
        final_logit_softcapping=0.1,
    )
    AutoModelForCausalLM.from_config(capped).save_pretrained(tmp_path)
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scales or caps"):
        florence_vl.build_model(parts / "florence2", tmp_path)


def test_other_words_for_a_prompt(parts):
    model, _ = florence_vl.build_model(
        parts / "florence2", parts / "llama", prompts={"caption": "hello there", "colors": "What?"}
    )
    assert model.config.features == ["davit", "caption", "ocr", "grounding", "colors"]
    assert model.config.prompts["caption"] == "hello there"
    assert model.config.prompt_token_ids["caption"] == tiny_processor().tokenizer("hello there")["input_ids"]


@pytest.fixture
def florence2(parts, tmp_path):
    return shutil.copytree(parts / "florence2", tmp_path / "florence2")


@pytest.mark.parametrize("text", ["{broken", "version https://git-lfs.github.com/spec/v1\noid sha256:0"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("config.json", r"config\.json"),
        ("preprocessor_config.json", r"preprocessor_config\.json"),
        ("tokenizer.json", "tokenizer of .*florence2 is damaged"),
    ],
)
def test_a_damaged_file_of_a_part_is_not_taken_for_a_missing_one(parts, florence2, name, text, reason):
    (florence2 / name).write_text(text)
    with pytest.raises(ValueError, match=reason):
        florence_vl.build_model(florence2, parts / "llama")


def test_a_florence2_without_tokenizer_needs_the_vocabulary_whose_ids_are_known(parts, florence2):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (florence2 / name).unlink()
    with pytest.raises(ValueError, match="this Florence-2 has no tokenizer"):
        florence_vl.build_model(florence2, parts / "llama")


def test_a_florence2_without_decoder_is_enough(parts, florence2):
    whole, _ = florence_vl.build_model(florence2, parts / "llama")
    file = florence2 / "model.safetensors"
    unused = re.compile(r"language_model\.decoder\.|^lm_head\.")
    save_file({n: x for n, x in load_file(file).items() if not unused.search(n)}, file, metadata={"format": "pt"})
    model, _ = florence_vl.build_model(florence2, parts / "llama")
    states = model.model.vision_tower.state_dict()
    assert all(torch.equal(states[name], value) for name, value in whole.model.vision_tower.state_dict().items())


def test_a_whole_florence_vl_is_no_vision_model(parts, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--to vision-tower"):
        florence_vl.build_model(tmp_path, parts / "llama")


def test_a_newline_that_ends_captions_stops_generation(parts):
    options = {"chat_template": "plain", "chat_template_options": {"end": "newline"}}
    model, processor = florence_vl.build_model(parts / "florence2", parts / "llama", **options)
    assert processor.tokenizer.encode("\n")[0] in model.generation_config.eos_token_id


def test_an_llm_whose_table_has_another_name(parts, tmp_path):
    fields = {"vocab_size": 512, "n_embd": 48, "n_layer": 2, "n_head": 4}
    AutoModelForCausalLM.from_config(GPT2Config(**fields)).save_pretrained(tmp_path / "gpt2")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "gpt2")
    model, _ = florence_vl.build_model(parts / "florence2", tmp_path / "gpt2")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
