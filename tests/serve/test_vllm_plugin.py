"""The contract with vLLM and SGLang, without either: entry points load, classes are found, token counts agree."""

import re
import subprocess
import sys
import types
from importlib.metadata import entry_points

import pytest
import torch
from PIL import Image

from florence_vl.model.tiny import tiny_model
from florence_vl.serve import vllm_plugin


def test_entry_points_lead_to_functions():
    found = {
        (group, point.name): point.load()
        for group in ("vllm.general_plugins", "sglang.srt.plugins")
        for point in entry_points(group=group)
        if point.name == "florence_vl"
    }
    assert found == {
        ("vllm.general_plugins", "florence_vl"): vllm_plugin.register,
        ("sglang.srt.plugins", "florence_vl"): vllm_plugin.register_sglang,
    }


def test_the_architecture_is_registered_on_the_transformers_backend_once(monkeypatch):
    registered = {}
    registry = types.SimpleNamespace(
        get_supported_archs=registered.keys, register_model=lambda name, path: registered.setdefault(name, path)
    )
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    vllm_plugin.register()
    vllm_plugin.register()
    assert registered == {vllm_plugin.ARCHITECTURE: vllm_plugin.BACKEND}


@pytest.mark.parametrize("llm", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_the_plan_of_tensor_parallelism_covers_the_llm(llm):
    """vLLM matches these names from the beginning, and replicates a linear layer that has no style that it knows."""
    model, _ = tiny_model(llm)
    plan = {re.compile(name): style for name, style in model.model.tp_plan.items()}
    known = {"colwise", "rowwise", "colwise_gather_output", "rowwise_split_input"}
    styles = {
        name: next((style for pattern, style in plan.items() if pattern.match(name)), None)
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    llm_layers = {name: style for name, style in styles.items() if name.startswith("language_model.")}
    assert llm_layers
    assert set(llm_layers.values()) <= known
    assert {style for name, style in styles.items() if name not in llm_layers} == {None}  # tower and projector


class OtherLinear(torch.nn.Module):
    """What vLLM puts in the place of a linear layer: no sizes, and on CPUs an empty weight beside the packed one."""

    def __init__(self, linear):
        super().__init__()
        self.packed, self.bias = linear.weight, linear.bias
        self.weight = torch.nn.Parameter(torch.empty(0))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed, self.bias)


@torch.inference_mode()
def test_the_model_takes_other_linear_layers():
    model, _ = tiny_model()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = model.get_image_features(pixels).pooler_output
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, OtherLinear(child))
    after = model.get_image_features(pixels).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_class_is_found_on_transformers_in_a_fresh_process():
    code = (
        "from florence_vl.serve.vllm_plugin import register_sglang\n"
        "register_sglang()\n"
        "import transformers\n"
        "assert transformers.FlorenceVLForConditionalGeneration.__module__ == 'florence_vl.model.modeling'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("fields", [{}, {"fusion": "token"}, {"merge": 2}, {"mean_token": "all"}])
def test_tokens_are_counted_as_the_model_makes_them(fields):
    model, processor = tiny_model(**fields)
    counted = processor._get_num_multimodal_tokens([(10, 20), (300, 64)])["num_image_tokens"]
    pictures = [Image.new("RGB", (20, 10)), Image.new("RGB", (64, 300))]
    inputs = processor(images=pictures, text=[processor.image_token] * 2, return_tensors="pt", padding=True)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == list(counted)
    made = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert [len(tokens) for tokens in made] == list(counted)
    assert all(isinstance(tokens, torch.Tensor) for tokens in made)
