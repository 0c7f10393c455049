"""Towers: features equal stock Florence-2's, names and sizes are known before a forward pass, gradients flow."""

import pytest
import torch
from transformers import AutoModel, Florence2Config, Florence2ForConditionalGeneration

from florence_vl.model.processing import ImageTokenRule
from florence_vl.model.tiny import TINY_BACKBONES, TINY_PROMPT_IDS, tiny_config, tiny_florence2, tiny_model
from florence_vl.model.towers import TOWERS, Florence2Tower, florence2

PROMPTS = ("caption", "ocr", "grounding")


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    fields = tiny_florence2()
    fields.pop("model_type")
    return Florence2ForConditionalGeneration(Florence2Config(**fields)).eval()


def tower_like(stock, **fields):
    tower = Florence2Tower(tiny_config(**fields)).eval()
    tower.davit.load_state_dict(stock.model.vision_tower.state_dict())
    tower.image_projector.load_state_dict(stock.model.multi_modal_projector.state_dict())
    if tower.encoder is not None:
        tower.encoder.load_state_dict(stock.model.language_model.encoder.state_dict())
    return tower


def stock_features(stock, pixels, name):
    """V and V' of one prompt, from transformers' own model and nothing of ours."""
    with torch.no_grad():
        image = stock.get_image_features(pixels).pooler_output
        image = torch.stack(list(image)) if isinstance(image, (list, tuple)) else image
        ids = torch.tensor([TINY_PROMPT_IDS[name]] * len(pixels))
        text = stock.get_input_embeddings()(ids)
        states = stock.model.language_model.encoder(inputs_embeds=torch.cat([image, text], 1)).last_hidden_state
    return image, states[:, : image.shape[1]]


def test_features_equal_stock_florence2_one_prompt_at_a_time(stock):
    pixels = torch.randn(2, 3, 64, 96)
    for policy, start in (("all", 0), ("grid", 1)):
        features = tower_like(stock, mean_token=policy)(pixels)
        assert list(features) == ["davit", *PROMPTS]
        for name in PROMPTS:
            image, prompted = stock_features(stock, pixels, name)
            torch.testing.assert_close(features["davit"], image[:, start:], atol=1e-5, rtol=0)
            torch.testing.assert_close(features[name], prompted[:, start:], atol=1e-5, rtol=0)


def test_padding_policies(stock):
    pixels = torch.randn(1, 3, 64, 64)
    masked = tower_like(stock)(pixels)
    longer = tower_like(stock, prompt_length=9)(pixels)
    attended = tower_like(stock, prompt_padding="attended", prompt_length=9)(pixels)
    for name in PROMPTS:
        torch.testing.assert_close(masked[name], longer[name], atol=1e-6, rtol=0)
        assert (masked[name] - attended[name]).abs().max() > 1e-4
    torch.testing.assert_close(masked["davit"], attended["davit"])


def test_mean_token_before_the_encoder_shifts_positions(stock):
    pixels = torch.randn(1, 3, 64, 64)
    after, before = tower_like(stock)(pixels), tower_like(stock, mean_token="grid_before_encoder")(pixels)
    torch.testing.assert_close(after["davit"], before["davit"])
    assert after["ocr"].shape == before["ocr"].shape == (1, 4, 32)
    assert (after["ocr"] - before["ocr"]).abs().max() > 1e-4


@pytest.mark.parametrize("names", [["ocr"], ["davit"], ["grounding", "davit"], ["ocr", "caption", "davit"]])
def test_any_subset_and_order(stock, names):
    pixels = torch.randn(2, 3, 64, 64)
    whole, part = tower_like(stock)(pixels), tower_like(stock, features=names)
    features = part(pixels)
    assert list(features) == names == list(part.feature_names)
    for name in names:
        torch.testing.assert_close(features[name], whole[name], atol=1e-5, rtol=0)
    assert (part.encoder is None) == (names == ["davit"])


def test_a_prompt_of_the_users_own(stock):
    ids = {**TINY_PROMPT_IDS, "colours": [0, 40, 41, 2]}
    tower = tower_like(stock, features=["davit", "colours"], prompt_token_ids=ids)
    assert tower(torch.randn(1, 3, 64, 64))["colours"].shape == (1, 4, 32)


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (96, 160), (70, 45), (224, 33)])
@pytest.mark.parametrize("policy", ["grid", "all", "grid_before_encoder"])
def test_number_of_tokens_is_known_before(size, policy):
    tower = Florence2Tower(tiny_config(mean_token=policy)).eval()
    with torch.no_grad():
        features = tower(torch.randn(1, 3, *size))
    assert {feature.shape for feature in features.values()} == {(1, tower.num_tokens(*size), 32)}
    assert tower.feature_dims == dict.fromkeys(["davit", *PROMPTS], 32)


def test_released_sizes():
    from florence_vl import FlorenceVLConfig

    for policy, count in (("grid", 576), ("all", 577)):
        with torch.device("meta"):
            tower = Florence2Tower(FlorenceVLConfig(mean_token=policy))
        assert tower.num_tokens(768, 768) == count
    with pytest.raises(ValueError, match="at most 1600 pixels per side"):
        tower.num_tokens(1632, 1632)
    with pytest.raises(ValueError, match="1024 positions"):
        tower.num_tokens(1024, 1024)


def test_bad_pixels():
    tower = Florence2Tower(tiny_config()).eval()
    with pytest.raises(ValueError, match=r"expected \(images, 3, height, width\)"):
        tower(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match=r"shape \(0, 3, 64, 64\)"):
        tower(torch.zeros(0, 3, 64, 64))
    with pytest.raises(ValueError, match="image 1 are not finite"):
        tower(torch.stack([torch.zeros(3, 64, 64), torch.full((3, 64, 64), float("nan"))]))
    with pytest.raises(ValueError, match="10 per axis"):
        tower(torch.zeros(1, 3, 352, 32))


def test_davit_runs_once_and_the_decoder_is_not_there(stock):
    tower = tower_like(stock)
    calls = []
    tower.davit.register_forward_hook(lambda *_: calls.append(1))
    tower(torch.randn(2, 3, 64, 64))
    assert len(calls) == 1
    assert not any("decoder" in name for name, _ in tower.named_parameters())


def test_gradients_reach_the_first_convolution_with_and_without_checkpointing():
    from florence_vl import FlorenceVLForConditionalGeneration

    pixels = torch.randn(1, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        config = tiny_config()
        config.vision_config.vision_config.drop_path_rate = 0.0
        config.vision_config.text_config.dropout = 0.0
        model = FlorenceVLForConditionalGeneration(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tower = model.model.vision_tower
        calls = []
        tower.davit.blocks[2][0].spatial_block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        sum(feature.square().mean() for feature in tower(pixels).values()).backward()
        assert len(calls) == (2 if checkpointing else 1), "a checkpointed block runs again in backward"
        gradients.append(tower.davit.convs[0].conv.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiles_as_one_graph():
    tower = Florence2Tower(tiny_config()).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")(pixels)
        for name, feature in tower(pixels).items():
            torch.testing.assert_close(compiled[name], feature, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(TINY_BACKBONES))
def test_backbone_features_are_its_hidden_states(kind):
    config = tiny_config(tower=kind, feature_layers={"middle": 1, "last": -1}, features=["last", "middle"])
    tower = TOWERS["backbone"](config).eval()
    plain = AutoModel.from_config(config.vision_config).eval()
    plain.load_state_dict(tower.backbone.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = tower(pixels)
        states = plain(pixels, output_hidden_states=True).hidden_states
    assert list(features) == ["last", "middle"]
    for name, layer in (("last", -1), ("middle", 1)):
        assert features[name].shape == (2, tower.num_tokens(64, 64), 32) == (2, 4, 32)
        torch.testing.assert_close(features[name], states[layer][:, -4:])
    everything = TOWERS["backbone"](tiny_config(tower=kind, mean_token="all"))
    assert everything(pixels)["last"].shape[1] == everything.num_tokens(64, 64)


def test_backbone_refusals():
    with pytest.raises(ValueError, match="has 2 layers"):
        TOWERS["backbone"](tiny_config(tower="dinov2", feature_layers={"last": 7}))
    with pytest.raises(ValueError, match="accepts only 64x64"):
        TOWERS["backbone"](tiny_config(tower="backbone")).num_tokens(96, 96)
    assert TOWERS["backbone"](tiny_config(tower="dinov2")).num_tokens(96, 128) == 12


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"image_size": 64, "patch_size": 16}


@pytest.mark.parametrize("mean_token", ["grid", "all"])
@pytest.mark.parametrize(
    ("kind", "others"), [("vit", 1), ("deit", 2), ("ijepa", 0), ("aimv2_vision_model", 0), ("pixtral", 0)]
)
def test_tokens_before_the_grid(kind, others, mean_token):
    vision = {"model_type": kind, **SIZES}
    config = tiny_config(tower="clip_vision_model", vision_config=vision, mean_token=mean_token)
    tower = TOWERS["backbone"](config).eval()
    tokens = 16 + (others if mean_token == "all" else 0)
    assert tower.num_tokens(64, 64) == ImageTokenRule.from_config(config).num_tokens(64, 64) == tokens
    assert tower(torch.zeros(1, 3, 64, 64))["last"].shape == (1, tokens, 32)


@pytest.mark.parametrize("kind", ["vit_mae", "swin", "sam_vision_model"])
def test_backbones_without_a_token_per_patch_are_refused(kind):
    vision = {"model_type": kind, **SIZES}
    if kind == "swin":
        vision = {"model_type": kind, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 64}
    tower = TOWERS["backbone"](tiny_config(tower="clip_vision_model", vision_config=vision)).eval()
    with pytest.raises(ValueError, match=f"of this {kind} has shape .* one token per patch"):
        tower(torch.zeros(1, 3, 64, 64))


def test_convolutional_backbones_are_refused():
    with pytest.raises(ValueError, match="a resnet cannot be a backbone: its config has no hidden_size"):
        TOWERS["backbone"](tiny_config(tower="clip_vision_model", vision_config={"model_type": "resnet"}))


@pytest.mark.parametrize("tower", ["florence2", "clip_vision_model"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_of_a_frozen_tower_learn_under_checkpointing(tower, reentrant):
    peft = pytest.importorskip("peft")
    model, _ = tiny_model(tower=tower)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    adapted.train()
    features = model.model.vision_tower(torch.randn(1, 3, 64, 64))
    sum(feature.sum() for feature in features.values()).backward()
    names = [name for name, _ in model.model.vision_tower.named_parameters() if "lora_B" in name]
    without = {
        name
        for name, parameter in model.model.vision_tower.named_parameters()
        if "lora_B" in name and parameter.grad is None
    }
    layers_behind = {name for name in without if ".layers.1." in name}  # CLIP's last layer: the feature is layer -2
    assert names
    assert without == layers_behind
    assert tower != "florence2" or not without


def test_dropout_can_be_switched_off():
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rates = {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3}
    config = tiny_florence2(vision_config={"drop_path_rate": 0.5}, text_config=rates)
    model, _ = tiny_model(vision_config=config)
    tower = model.model.vision_tower
    calm = tower(pixels)
    tower.train()
    torch.manual_seed(0)
    noisy = tower(pixels)
    assert all(not torch.allclose(calm[name], noisy[name], atol=1e-2) for name in calm)
    for module in tower.modules():  # as trl.trainer.utils.disable_dropout_in_model
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    still = tower(pixels)
    for name in calm:
        torch.testing.assert_close(still[name], calm[name])
    assert not [name for name in tower.state_dict() if "dropout" in name]


def test_rates_of_dropout_are_the_configs():
    rates = {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3}
    model, _ = tiny_model(vision_config=tiny_florence2(text_config=rates))
    encoder = model.train().model.vision_tower.encoder
    layer = encoder.layers[0]
    assert (encoder.dropout, layer.dropout, layer.activation_dropout, layer.self_attn.dropout) == (0.1, 0.1, 0.3, 0.2)


@pytest.mark.parametrize("tower", ["florence2", "clip_vision_model", "siglip_vision_model", "dinov2"])
def test_hidden_states_of_the_vision_model_are_returned(tower):
    model, _ = tiny_model(tower=tower)
    pixels = torch.randn(1, 3, 64, 64)
    plain = model.get_image_features(pixels)
    assert plain.hidden_states is None
    found = model.get_image_features(pixels, output_hidden_states=True)
    expected = model.model.vision_tower.vision_model(pixels, output_hidden_states=True).hidden_states
    assert len(found.hidden_states) == len(expected) > 2
    for ours, theirs in zip(found.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found.pooler_output, plain.pooler_output)
    assert not model.model.vision_tower.vision_model._forward_hooks
    if tower == "florence2":
        with pytest.raises(ValueError, match="attentions"):
            model.get_image_features(pixels, output_attentions=True)
    else:
        model.set_attn_implementation("eager")
        attentions = model.get_image_features(pixels, output_attentions=True).attentions
        assert len(attentions) == 2
        assert attentions[0].ndim == 4


def test_a_frozen_tower_is_deterministic_under_checkpointing():
    rates = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}
    fields = tiny_florence2(vision_config={"drop_path_rate": 0.5}, text_config=rates)
    model, _ = tiny_model(vision_config=fields)
    pixels = torch.randn(1, 3, 64, 64)
    calm = model.get_image_features(pixels).pooler_output
    model.gradient_checkpointing_enable()
    model.set_trainable(tower=False, projector=True, llm=True)
    model.train()
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, calm)


def test_a_tower_says_its_dtype_and_device():
    model, _ = tiny_model()
    tower = model.to(torch.bfloat16).model.vision_tower
    assert (tower.dtype, tower.device.type) == (torch.bfloat16, "cpu")
    assert tower.grid_size(64, 96) == (2, 3)


@pytest.mark.parametrize("size", [(224, 96), (96, 160), (70, 45)])
def test_features_computed_in_parts_equal_stock_florence2(stock, size, monkeypatch):
    tower, pixels = tower_like(stock, mean_token="all"), torch.randn(2, 3, *size)
    lengths = []
    real = florence2._in_parts

    def count(module, forward, hidden_states, length):
        lengths.append((type(module).__name__, hidden_states.shape[1] > length))
        return real(module, forward, hidden_states, length)

    monkeypatch.setattr(florence2, "_in_parts", count)
    monkeypatch.setattr(florence2, "CACHED", 1)
    with torch.no_grad():
        features = tower(pixels)
    assert {name for name, several in lengths if several} == {"DaViTWindowAttention", "DaViTMLP"}
    for name in PROMPTS:
        image, prompted = stock_features(stock, pixels, name)
        torch.testing.assert_close(features["davit"], image, atol=1e-5, rtol=0)
        torch.testing.assert_close(features[name], prompted, atol=1e-5, rtol=0)
    tower(pixels)["davit"].sum().backward()  # with gradients nothing is cut
    assert all(p.grad is not None for p in tower.davit.parameters())


def test_davit_keeps_channels_last_on_a_cpu(stock):
    layouts = []
    tower = tower_like(stock)
    for module in tower.davit.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.register_forward_hook(lambda _module, inputs, output: layouts.append((inputs[0], output)))
    tower(torch.randn(2, 3, 96, 96))
    assert len(layouts) == 4 * sum(tower.config.vision_config.vision_config.depths)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for pair in layouts for t in pair)
