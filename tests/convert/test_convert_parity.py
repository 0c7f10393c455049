"""Converted checkpoints compute the same as the released code (an independent reimplementation, random weights)."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import florence_vl
from florence_vl.convert import convert
from florence_vl.convert.processors import ReleasedProcessor, seams, with_lead
from florence_vl.model.configuration import FLORENCE2_PROMPT_IDS, FLORENCE2_PROMPTS
from florence_vl.model.processing import ImageTokenRule

sys.path.insert(0, str(Path(__file__).parent))
import convert_upstream as upstream

MEAN_TOKENS = ("grid", "all", "grid_before_encoder")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (upstream, converted model, processor, folder)."""
    made = {}

    def get(kind, adds_bos=False):
        if (kind, adds_bos) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}{adds_bos}")
            _, theirs = upstream.make_released(folder / "released", kind, adds_bos)
            convert(folder / "released", folder / "converted")
            ours = florence_vl.FlorenceVLForConditionalGeneration.from_pretrained(folder / "converted").eval()
            processor = florence_vl.FlorenceVLProcessor.from_pretrained(folder / "converted")
            made[kind, adds_bos] = theirs, ours, processor, folder / "converted"
        return made[kind, adds_bos]

    return get


def switched(model, mean_token, padding):
    model.config.mean_token, model.config.prompt_padding = mean_token, padding
    model.model.vision_tower.reset_buffers()
    return model


def pixels(count=2, height=64, width=64):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("mean_token", MEAN_TOKENS)
@pytest.mark.parametrize("padding", ["attended", "masked"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64)])
@torch.no_grad()
def test_tower_features_and_projected_tokens(models, mean_token, padding, height, width):
    theirs, ours, _, _ = models("llama")
    switched(ours, mean_token, padding)
    images = pixels(2, height, width)
    expected = theirs.features(images, mean_token, padding == "attended")
    found = ours.model.vision_tower(images)
    assert list(found) == ["davit", "caption", "ocr", "grounding"]
    for feature, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(feature, wanted, atol=TOLERANCE, rtol=0)
    tokens = ours.get_image_features(images).pooler_output
    wanted = theirs.projected(images, mean_token, padding == "attended")
    torch.testing.assert_close(tokens, wanted, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_readings_differ_visibly(models):
    """Each switch moves the tokens a hundred times the tolerance, so the tests above distinguish the variants."""
    theirs, _, _, _ = models("llama")
    outputs = {
        (mean, attend): theirs.projected(pixels(1), mean, attend)[0, -4:] for mean in MEAN_TOKENS for attend in (0, 1)
    }
    assert (outputs["grid", 1] - outputs["grid", 0]).abs().max() > 100 * TOLERANCE
    assert (outputs["grid", 1] - outputs["grid_before_encoder", 1]).abs().max() > 100 * TOLERANCE
    assert theirs.projected(pixels(1), "all", True).shape[1] == 5


def test_parity_switches_are_set(models):
    for kind in ("llama", "phi3"):
        _, ours, _, folder = models(kind)
        config = json.loads((folder / "config.json").read_text())
        assert (config["prompt_padding"], config["prompt_length"], config["mean_token"]) == ("attended", 14, "grid")
        assert ours.model.vision_tower.prompt_ids.tolist() == upstream.PROMPT_ROWS


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize(("adds_bos", "mean_token"), [*((False, mean) for mean in MEAN_TOKENS), (True, "grid")])
@pytest.mark.parametrize("padding", ["attended", "masked"])
@torch.no_grad()
def test_prompt_ids_and_logits(models, kind, adds_bos, mean_token, padding):
    """From a question and an image to logits: template, BOS and newline habits, splice, LLM."""
    theirs, ours, processor, _ = models(kind, adds_bos)
    switched(ours, mean_token, padding)
    question = "What is in the image?"
    prompt = {"llama": upstream.llama3_prompt, "phi3": upstream.phi3_prompt}[kind](question)
    their_ids = upstream.tokenizer_image_token(prompt, processor.tokenizer)

    count = ours.num_image_tokens(64, 64)
    rule = ImageTokenRule.from_config(ours.config)
    assert rule.num_tokens(64, 64) == count == (5 if mean_token == "all" else 4)
    fitted = florence_vl.FlorenceVLProcessor(
        florence_vl.FlorenceVLImageProcessor(size={"height": 64, "width": 64}),
        processor.tokenizer,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        image_token_rule=rule,
    )
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    batch = fitted.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    expanded = [i for token in their_ids for i in ([ours.config.image_token_id] * count if token < 0 else [token])]
    assert batch["input_ids"][0].tolist() == expanded

    logits = ours(**batch).logits[0]
    wanted = theirs.logits(their_ids, batch["pixel_values"], mean_token, padding == "attended")
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits, wanted, atol=TOLERANCE * max(1.0, float(wanted.abs().max())), rtol=0)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_newline_and_begin_tokens_follow_the_tokenizer(models, adds_bos):
    """Llama-3: without automatic BOS the newline is lost; with it there are two begin tokens and the newline stays."""
    _, _, processor, _ = models("llama", adds_bos)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}], tokenize=False
    )
    assert text.count("<|begin_of_text|>") == (2 if adds_bos else 1)
    assert (f"{processor.image_token}\nQ" in text) is adds_bos


@pytest.mark.parametrize(("kind", "stops"), [("llama", {"<|eot_id|>"}), ("phi3", {"<|end|>", "<|endoftext|>"})])
def test_generation_stops_and_card(models, kind, stops):
    _, ours, processor, folder = models(kind)
    ends = ours.generation_config.eos_token_id
    assert stops <= set(processor.tokenizer.convert_ids_to_tokens(ends))
    assert ours.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    card = (folder / "README.md").read_text()
    assert f"license: {'llama3.1' if kind == 'llama' else 'mit'}" in card
    assert "Florence-2: MIT" in card
    assert "final_logits_bias" in card
    token = processor.image_token.replace("|", r"\|")
    assert f"| `image_token` | `{token}` |" in card


@pytest.mark.parametrize(("kind", "newline"), [("llama", "Ċ"), ("phi3", "<0x0A>")])
def test_a_caption_that_ends_with_a_newline_stops_there(models, kind, newline):
    """`plain`, as in the released first stage: the newline is the only end that the model has seen."""
    _, _, processor, _ = models(kind)
    released = ReleasedProcessor(processor.tokenizer, {}, template="plain")
    assert released.template_options == {"end": "newline"}
    assert processor.tokenizer.convert_tokens_to_ids(newline) in released.stop_ids()


def test_image_placeholder_keeps_the_newline(models):
    """Phi's reserved tokens swallow the white space behind them; the image's must not."""
    _, _, processor, _ = models("phi3")
    ids = processor.tokenizer(f"{processor.image_token}\nQ", add_special_tokens=False).input_ids
    newline = processor.tokenizer.convert_tokens_to_ids("<0x0A>")
    assert newline in ids
    assert processor.image_token == "<|placeholder1|>"


def make_sentencepiece(folder, specials, adds_bos):
    """A slow Llama tokenizer's files as transformers 4.43 wrote them: SentencePiece model, no tokenizer.json."""
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    text = ["What is in the image ?", "You are a helpful AI assistant .", "A chat between USER and ASSISTANT :"] * 40
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = spm.SentencePieceProcessor(model_proto=model.getvalue())
    size = pieces.get_piece_size()
    flags = {"lstrip": False, "normalized": False, "single_word": False, "special": True}
    decoder = {str(i): {"content": t, "rstrip": False, **flags} for i, t in enumerate(["<unk>", "<s>", "</s>"])}
    for i, token in enumerate(specials):
        decoder[str(size + i)] = {"content": token, "rstrip": token != "<|endoftext|>", **flags}
    end = specials[0] if specials else "</s>"
    names = {"bos_token": "<s>", "eos_token": end, "unk_token": "<unk>", "pad_token": end if specials else "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    if specials:
        (folder / "added_tokens.json").write_text(json.dumps({t: size + i for i, t in enumerate(specials)}))
    return (
        pieces,
        {**{t: size + i for i, t in enumerate(specials)}, "<s>": 1, "</s>": 2, "<unk>": 0},
        size + len(specials),
    )


def slow_llama_ids(pieces, specials, text, adds_bos):
    """transformers 4.43's slow LlamaTokenizer with `legacy=False`, from its description.

    A space before the text; control tokens split it and swallow the white space behind them; what lies between goes
    through SentencePiece without its own leading space.
    """
    ids = [1] if adds_bos else []
    parts = re.split("(" + "|".join(map(re.escape, specials)) + ")", "▁" + text)
    marker = pieces.encode("<", out_type=int)  # what SentencePiece puts in front of an anchor
    for i, part in enumerate(parts):
        if i % 2:
            ids.append(specials[part])
            continue
        if i and parts[i - 1].startswith("<|") and parts[i - 1] != "<|endoftext|>":
            part = part.lstrip()
        if part:
            ids += pieces.encode("<" + part, out_type=int)[len(marker) :]
    return ids


PHI3_SPECIALS = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"]


@pytest.mark.parametrize(("kind", "specials"), [("phi3", PHI3_SPECIALS), ("llama", [])])
def test_slow_sentencepiece_tokens_are_repeated(tmp_path, kind, specials):
    """Phi-3.5 and Vicuna were tokenized slowly, pieces apart: a space before each piece, also behind the image."""
    adds_bos = kind == "llama"
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    pieces, table, size = make_sentencepiece(tokenizer, specials, adds_bos)
    config = {"model_type": "llava_phi" if kind == "phi3" else "llava_llama", "image_aspect_ratio": "pad"}
    released = ReleasedProcessor.open(tokenizer, config)
    token = released.choose_image_token(size)
    assert not released.notes
    question = "What is  in it?\nSay"
    if kind == "phi3":
        prompt = upstream.phi3_prompt(question)
    else:
        system = upstream.llama3_prompt("").split("<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]
        prompt = f"{system} USER: <image>\n{question} ASSISTANT:"
    before, after = (slow_llama_ids(pieces, table, text, adds_bos) for text in prompt.split("<image>"))
    wanted = [*before, token.id, *(after[1:] if before[0] == 1 else after)]
    assert released.released_ids(question) == wanted
    assert released.our_ids(question) == wanted
    assert seams(released._chat_template) == (" ", " ")
    assert with_lead(released._build(after_image=" "), " ") == released._chat_template
    space = pieces.piece_to_id("▁")
    assert wanted[wanted.index(token.id) + 1 :][:2] == [space, pieces.piece_to_id("<0x0A>")]


def test_prompt_rows_are_the_released_ones():
    padded = [list(FLORENCE2_PROMPT_IDS[n]) for n in ("caption", "ocr", "grounding")]
    assert [row + [1] * (14 - len(row)) for row in padded] == upstream.PROMPT_ROWS


def bart_tokenizer():
    """BART's own tokenizer if a cache has it; the vocabulary is in no package."""
    from transformers import AutoTokenizer

    for name in ("microsoft/Florence-2-large-ft", "florence-community/Florence-2-large-ft", "facebook/bart-large"):
        try:
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            continue
    return None


@pytest.mark.parametrize("name", list(FLORENCE2_PROMPTS))
def test_prompts_tokenize_to_the_known_ids(name):
    tokenizer = bart_tokenizer()
    if tokenizer is None:
        pytest.skip("no BART vocabulary on this machine")
    assert tokenizer(FLORENCE2_PROMPTS[name])["input_ids"] == list(FLORENCE2_PROMPT_IDS[name])


def test_generate_from_the_saved_folder(models):
    _, ours, processor, folder = models("llama")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder)
    loaded = AutoProcessor.from_pretrained(folder)
    assert loaded.num_image_tokens() == 576
    assert loaded.image_processor.image_aspect_ratio == "pad"
    assert type(model) is type(ours)
    assert loaded.chat_template == processor.chat_template
    ids = torch.tensor([loaded.tokenizer("Hello").input_ids])
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] <= ids.shape[1] + 3
