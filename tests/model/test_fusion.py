"""Every registered fusion fulfills its contract, and the paper's three follow their definitions."""

import pytest
import torch

from florence_vl.model.fusion import FUSIONS, build_fusion
from florence_vl.model.projector import Projector

DIMS = {"davit": 8, "caption": 8, "ocr": 8}


def features(batch=2, tokens=5, dims=DIMS):
    return {name: torch.randn(batch, tokens, dim) for name, dim in dims.items()}


@pytest.mark.parametrize("name", FUSIONS.names())
def test_contract(name):
    fusion = build_fusion(name, DIMS)
    given = features()
    fused = fusion(given)
    assert fused.shape == (2, fusion.num_tokens(5), fusion.out_dim)
    torch.testing.assert_close(fused, fusion(dict(reversed(given.items()))), msg="order comes from the config")
    torch.testing.assert_close(fused, fusion(given, context=torch.randn(2, 16)))
    with pytest.raises(ValueError, match=r"features \['ocr'\] are missing"):
        fusion({k: v for k, v in given.items() if k != "ocr"})


def test_the_papers_three():
    given = features()
    stacked = torch.stack(list(given.values()))
    torch.testing.assert_close(build_fusion("channel", DIMS)(given)[..., 8:16], given["caption"])
    torch.testing.assert_close(build_fusion("token", DIMS)(given)[:, 10:], given["ocr"])
    torch.testing.assert_close(build_fusion("average", DIMS)(given), stacked.mean(0))
    assert build_fusion("token", DIMS).num_tokens(576) == 1728, "table 1"


def test_widths_and_names():
    assert build_fusion("channel", {"a": 4, "b": 6}).out_dim == 10
    for name in ("token", "average"):
        with pytest.raises(ValueError, match="one width"):
            build_fusion(name, {"a": 4, "b": 6})
    with pytest.raises(ValueError, match="Did you mean 'average'"):
        build_fusion("averge", DIMS)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_projector(depth):
    projector = Projector(12, 20, depth)
    x = torch.randn(2, 5, 12)
    expected = torch.nn.functional.linear(x, projector.layers[0].weight, projector.layers[0].bias)
    for layer in projector.layers[1:]:
        expected = layer(torch.nn.functional.gelu(expected))
    assert len(projector.layers) == depth
    torch.testing.assert_close(projector(x), expected)
