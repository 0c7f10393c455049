"""`florence-vl build`: parts on disk become a self-contained model; usage errors are one line."""

import pytest
import torch

from florence_vl.cli import main
from florence_vl.model.loading import load_model
from florence_vl.model.tiny import tiny_florence2, tiny_model
from florence_vl.serve.session import ChatSession, GenerationOptions

PROMPTS = {"caption": "Describe", "ocr": "Read"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny Florence-2 with a tokenizer and of a tiny Llama."""
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    root = tmp_path_factory.mktemp("parts")
    _, processor = tiny_model()
    tokenizer = processor.tokenizer
    config = tiny_florence2()
    config["text_config"]["vocab_size"] = len(tokenizer) + 1
    config["image_token_id"] = len(tokenizer)
    torch.manual_seed(0)
    Florence2ForConditionalGeneration(Florence2Config(**config)).save_pretrained(root / "vision")
    processor.image_processor.save_pretrained(root / "vision")
    tokenizer.save_pretrained(root / "vision")

    from transformers import LlamaForCausalLM

    text = tiny_model()[0].config.text_config
    LlamaForCausalLM(text).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    return root


def build(parts, out, *arguments):
    return main.main(
        ["build", "--vision", str(parts / "vision"), "--llm", str(parts / "llm"), "--out", str(out), *arguments]
    )


def test_built_model_loads_and_answers(parts, tmp_path, capsys):
    out = tmp_path / "model"
    assert build(parts, out) == 0
    text = capsys.readouterr().out
    assert "davit, caption, ocr, grounding (channel fusion)" in text
    assert "64x64 px, 4 tokens" in text
    model, processor = load_model(out, "cpu")
    assert ChatSession(model, processor, GenerationOptions(max_new_tokens=3)).ask("Hello") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_options_reach_the_model(parts, tmp_path):
    out = tmp_path / "model"
    options = ["--features", "davit,colors", "--prompt", "colors=What colors?", "--fusion", "token"]
    options += ["--projector-depth", "2", "--mean-token", "all", "--dtype", "bfloat16", "--chat-template", "phi3"]
    assert build(parts, out, *options) == 0
    model, processor = load_model(out, "cpu", "bfloat16")
    assert list(model.config.features) == ["davit", "colors"]
    assert model.config.prompts == {"colors": "What colors?"}
    assert (model.config.fusion, model.config.projector_depth) == ("token", 2)
    assert model.num_image_tokens(64, 64) == 10
    assert "<|end|>" in processor.chat_template


def test_same_seed_same_projector(parts, tmp_path):
    weights = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert build(parts, tmp_path / name, "--seed", seed) == 0
        model, _ = load_model(tmp_path / name, "cpu")
        weights.append(model.model.multi_modal_projector.layers[0].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_folder_that_holds_something_is_kept(parts, tmp_path, capsys):
    out = tmp_path / "model"
    assert build(parts, out) == 0
    assert build(parts, out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert build(parts, out, "--overwrite", "--fusion", "average") == 0
    assert load_model(out, "cpu")[0].config.fusion == "average"
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("x")
    assert build(parts, notes, "--overwrite") == 2
    assert "thesis.txt, which florence-vl did not write" in capsys.readouterr().err
    assert build(parts, notes / "thesis.txt") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "davit,capton"], "Did you mean 'caption'"),
        (["--features", " , "], "--features is empty"),
        (["--fusion", "chanel"], "Did you mean 'channel'?"),
        (["--projector-depth", "9"], "projector_depth is 9"),
        (["--chat-template", "lama3"], "Did you mean 'llama3'"),
        (["--prompt", "colors"], "NAME=VALUE"),
        (["--feature-layer", "last=-2"], "feature_layers is for a vision backbone"),
        (["--feature-layer", "last=two"], "'two' is not a layer number"),
        (["--image-size", "9999"], "9999"),
        (["--dtype", "int4"], "unknown dtype 'int4'"),
        (["--vision", "/no/such"], "/no/such"),
        (["--llm", "/no/such"], "/no/such"),
        (["--llm", "/no/such.gguf"], "/no/such.gguf"),
        (["--prompt", "a=b", "--prompt", "a=c"], "names 'a' twice"),
    ],
)
def test_wrong_usage_is_one_line_and_2(parts, tmp_path, capsys, arguments, message):
    assert build(parts, tmp_path / "model", *arguments) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]  # transformers, imported before the command here, may show its progress
    assert error.startswith("florence-vl: error: ")
    assert message in error
    assert "Traceback" not in captured.err
    assert not (tmp_path / "model").exists()


def test_a_folder_without_a_model_is_named(parts, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert build(parts, tmp_path / "out", "--vision", str(empty)) == 2
    assert f"{empty} is not a vision model" in capsys.readouterr().err


def test_any_option_of_a_build_can_be_set(parts, tmp_path, capsys):
    out = tmp_path / "model"
    assert build(parts, out, "--set", "positions=absolute", "--set", "merge=2") == 0
    config = load_model(out, "cpu")[0].config
    assert (config.positions, config.merge) == ("absolute", 2)
    assert build(parts, tmp_path / "tiles", "--set", "tiles={max: 3}") == 0
    assert load_model(tmp_path / "tiles", "cpu")[0].config.tiles == {"max": 3, "global": True, "size": 64}
    assert "4 to 22 tokens" in capsys.readouterr().out
    assert build(parts, tmp_path / "no", "--set", "tiles={max: 9999}") == 2
    assert "choose a smaller size, or fewer tiles" in capsys.readouterr().err
    assert build(parts, tmp_path / "no", "--set", "positons=absolute") == 2
    assert "Did you mean 'positions'" in capsys.readouterr().err
    assert build(parts, tmp_path / "no", "--set", "merge=many") == 2
    assert "merge is 'many'" in capsys.readouterr().err
    assert build(parts, tmp_path / "no", "--mean-token", "none") == 2
    assert "mean_token is 'none'" in capsys.readouterr().err
