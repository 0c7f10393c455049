"""PCA pictures: threshold, sign, colors, and the mapping back to the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from florence_vl.analyze.encoders import Preprocess
from florence_vl.analyze.pca import PCAConfig, map_image, otsu, overlay, pca_maps, principal_components, sheet

ROWS, COLUMNS = 12, 16


def scene(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a disc of three sectors before a plain ground, and where the disc is."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    inside = ((y - 5.5) ** 2 + (x - 7.5) ** 2 < 16).flatten()
    sector = ((x.flatten() > 7).long() + (y.flatten() > 5).long()) * inside
    directions = torch.linalg.qr(torch.randn(32, 6, generator=generator)).Q.T
    tokens = torch.where(inside[:, None], 8 * directions[0], -8 * directions[0]) + 2 * directions[1:4][sector]
    return tokens + 0.1 * torch.randn(len(tokens), 32, generator=generator), inside


@pytest.mark.parametrize("sign", [1, -1])
def test_the_background_is_cut_whatever_the_sign(sign):
    tokens, inside = scene()
    (pca,) = pca_maps([sign * tokens], [(ROWS, COLUMNS)])
    assert np.array_equal(pca.foreground.flatten(), inside.numpy())
    assert pca.rgb.min() >= 0
    assert pca.rgb.max() <= 1
    assert pca.first[pca.foreground].min() > pca.threshold > pca.first[~pca.foreground].max()
    flipped = pca_maps([tokens], [(ROWS, COLUMNS)], PCAConfig(flip=True))[0]
    assert np.array_equal(flipped.foreground.flatten(), ~inside.numpy())


@pytest.mark.parametrize(("rows", "columns"), [(slice(0, 2), slice(3, 13)), (slice(7, 12), slice(9, 16))])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_subject_at_an_edge_or_in_a_corner_is_not_the_background(rows, columns, sign):
    inside = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    inside[rows, columns] = True
    noise = torch.randn(ROWS * COLUMNS, 32, generator=torch.Generator().manual_seed(0))
    tokens = noise + 20 * sign * inside.flatten()[:, None]
    (pca,) = pca_maps([tokens], [(ROWS, COLUMNS)])
    assert np.array_equal(pca.foreground, inside.numpy())


def test_colors_tell_the_parts_of_the_foreground_apart():
    tokens, _ = scene()
    (pca,) = pca_maps([tokens], [(ROWS, COLUMNS)])
    y, x = np.mgrid[:ROWS, :COLUMNS]
    sector = (x > 7).astype(int) + (y > 5)
    means = [pca.rgb[pca.foreground & (sector == s)].mean(0) for s in range(3)]
    spread = max(pca.rgb[pca.foreground & (sector == s)].std(0).max() for s in range(3) if s != 1)
    nearest = min(np.abs(means[i] - means[j]).max() for i in range(3) for j in range(i))
    assert nearest > 2 * spread
    kept = pca_maps([tokens], [(ROWS, COLUMNS)], PCAConfig(background=False))[0]
    assert kept.foreground.all()


def test_a_joint_fit_gives_the_same_thing_the_same_color():
    tokens, _ = scene()
    both = pca_maps([tokens, tokens], [(ROWS, COLUMNS)] * 2)
    np.testing.assert_allclose(both[0].rgb, both[1].rgb)
    other = pca_maps([tokens, tokens + 3 * torch.randn(32)], [(ROWS, COLUMNS)] * 2)
    own = pca_maps([tokens, tokens + 3 * torch.randn(32)], [(ROWS, COLUMNS)] * 2, PCAConfig(joint=False))
    alone = pca_maps([tokens], [(ROWS, COLUMNS)])[0]
    np.testing.assert_allclose(own[0].rgb, alone.rgb)
    assert not np.allclose(other[0].rgb, alone.rgb)


def test_components_are_those_of_the_svd():
    tokens = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    mean, directions, explained = principal_components(tokens)
    _, s, vh = torch.linalg.svd((tokens - tokens.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(mean, tokens.double().mean(0))
    torch.testing.assert_close((directions * vh[:3].T).sum(0).abs(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(explained, (s**2 / (s**2).sum())[:3])
    with pytest.raises(ValueError, match="as many tokens"):
        principal_components(tokens[:2])


def test_otsu_finds_the_gap():
    values = torch.cat([torch.full((30,), 0.1), torch.full((70,), 0.8)])
    assert 0.1 < otsu(values) < 0.8
    assert otsu(values) == pytest.approx(0.45, abs=0.05)


def test_bad_input():
    tokens, _ = scene()
    with pytest.raises(ValueError, match="grid of 3x3"):
        pca_maps([tokens], [(3, 3)])
    with pytest.raises(ValueError, match="no features"):
        pca_maps([], [])
    with pytest.raises(ValueError, match="scaled to"):
        PCAConfig(threshold=3.0)


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_the_map_lies_over_what_it_shows(fit):
    """A map that is the picture itself, seen by the encoder, comes back onto the picture."""
    preprocess = Preprocess(40, 40, (0, 0, 0), (1, 1, 1), fit)
    image = Image.new("RGB", (120, 60), (0, 0, 255))
    image.paste((255, 0, 0), (60, 0, 120, 60))  # the right half is red
    pixels = preprocess(image).permute(1, 2, 0).numpy()
    (pca,) = pca_maps([scene()[0]], [(ROWS, COLUMNS)])
    pca.rgb, pca.foreground = pixels.copy(), np.ones((40, 40), dtype=bool)
    back = np.asarray(map_image(pca, image.size, preprocess)).astype(int)
    middle = back[10:50, 34:86]  # crop sees the middle square only
    left, right = middle[:, :20], middle[:, -20:]
    assert (left[..., 2] > 200).all()
    assert (left[..., 0] < 60).all()
    assert (right[..., 0] > 200).all()
    assert (right[..., 2] < 60).all()
    assert (back[:, :20].min() == 255) == (fit == "crop")
    assert overlay(image, pca, preprocess).size == image.size


def test_sheet_has_a_column_for_each_feature():
    (pca,) = pca_maps([scene()[0]], [(ROWS, COLUMNS)])
    image = Image.new("RGB", (64, 48), (200, 100, 0))
    figure = sheet(image, {"a:x": (pca, Preprocess(32, 32)), "b:y": (pca, Preprocess(32, 32))})
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["image", "a:\nx", "b:\ny"]
