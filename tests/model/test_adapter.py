"""A trained model is restored from its base and the adapter; incompatible adapters are rejected."""

import pytest
import torch

from florence_vl.model.adapter import apply_adapter, extract_adapter
from florence_vl.model.tiny import tiny_model


@pytest.fixture
def pair():
    """A base and a model that differs by rank 2 in one matrix, in a norm and in the projector."""
    base, _ = tiny_model(seed=0)
    model, _ = tiny_model(seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        weight = dict(model.part_parameters("llm"))["model.language_model.layers.0.mlp.up_proj.weight"]
        weight.add_(0.1 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1]))
        for _, parameter in model.part_parameters("projector"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.model.language_model.norm.weight.mul_(1.5)
    return model, base


def test_trained_model_comes_back(pair):
    model, base = pair
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    change = model.state_dict()[name] - base.state_dict()[name]
    adapter, lost = extract_adapter(model, base, rank=8)
    assert {key.rpartition(".")[2] for key in adapter} == {"down", "scale", "up", "whole"}
    ranks = adapter[f"{name}.scale"].numel()
    assert adapter[f"{name}.up"].shape == (ranks, change.shape[0] // 2), "two integers per byte"
    apply_adapter(base, adapter)
    for other, value in model.state_dict().items():
        if other != name:
            torch.testing.assert_close(base.state_dict()[other], value, rtol=2e-3, atol=1e-5)
    rest = model.state_dict()[name] - base.state_dict()[name]
    assert lost == pytest.approx(float(rest.square().sum() / change.square().sum()), rel=1e-3)
    assert lost < 2e-3


def test_too_low_a_rank_says_what_is_lost(pair):
    model, base = pair
    assert 0.01 < extract_adapter(model, base, rank=1)[1] < 0.99


def test_changed_tower_is_refused(pair):
    model, base = pair
    with torch.no_grad():
        next(parameter for _, parameter in model.part_parameters("tower")).add_(1)
    with pytest.raises(ValueError, match="weight of the tower"):
        extract_adapter(model, base, rank=2)


def test_weights_beyond_float16_are_refused(pair):
    model, base = pair
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(1e5)
    with pytest.raises(ValueError, match=r"norm\.weight contains numbers beyond the range of float16"):
        extract_adapter(model, base, rank=2)


def test_adapter_of_another_model_is_refused(pair):
    model, base = pair
    adapter, _ = extract_adapter(model, base, rank=2)
    with pytest.raises(ValueError, match="belongs to another"):
        apply_adapter(base, {"model.nowhere.weight.whole": torch.zeros(1)})
    for kind in ("up", "down", "scale"):
        halves = {name: value for name, value in adapter.items() if not name.endswith(kind)}
        with pytest.raises(ValueError, match="without the other factor or the scale"):
            apply_adapter(base, halves)
    wide = {name: torch.zeros(3) if name.endswith("whole") else value for name, value in adapter.items()}
    with pytest.raises(ValueError, match="of shape"):
        apply_adapter(base, wide)
