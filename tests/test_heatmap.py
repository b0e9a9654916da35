import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loupe_core.datasets import CUB200
from loupe_core.errors import LoupeError
from loupe_core.geometry import EvalTransform, Geometry, TrainTransform
from loupe_core.heatmap import contour_level, is_flat, mask_to_original, overlay, peak, peaks
from loupe_core.look.words import alt_text

HALF = (0.5, 0.5, 0.5)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def eval_geometry(width, height, size=224, crop_pct=0.875):
    return EvalTransform(size, HALF, HALF, crop_pct, "bilinear")(noise(width, height))[1]


def warped(mask, geometry):
    """The heatmap pixel by pixel, from the definition: no matrix, no library."""
    (height, width), (h_in, w_in), (h, w) = geometry.original_size, geometry.input_size, mask.shape
    (sy, sx), (oy, ox) = geometry.scale, geometry.offset
    heatmap = np.full((height, width), np.nan)
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * sy - oy, (j + 0.5) * sx - ox
            if not (0 <= y <= h_in and 0 <= x <= w_in):
                continue
            if geometry.flipped:
                x = w_in - x
            v = min(max(y * h / h_in - 0.5, 0), h - 1)
            u = min(max(x * w / w_in - 0.5, 0), w - 1)
            top, left = min(int(v), max(h - 2, 0)), min(int(u), max(w - 2, 0))
            down, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = v - top, u - left
            upper = (1 - b) * mask[top, left] + b * mask[top, right]
            lower = (1 - b) * mask[down, left] + b * mask[down, right]
            heatmap[i, j] = (1 - a) * upper + a * lower
    return heatmap


GEOMETRIES = {
    "landscape": eval_geometry(60, 41, 32),
    "portrait": eval_geometry(33, 52, 32),
    "enlarged": eval_geometry(20, 15, 56),
    "oblong": EvalTransform((24, 40), HALF, HALF, 0.9, "bicubic")(noise(50, 40))[1],
    "flipped": Geometry((40, 60), (32, 32), (32 / 25, 32 / 30), (7 * 32 / 25, 11 * 32 / 30), flipped=True),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("shape", [(7, 7), (4, 9), (1, 1)])
def test_a_mask_is_warped_back_as_the_definition_says(name, shape):
    mask = np.random.default_rng(1).random(shape)
    assert np.allclose(
        mask_to_original(mask, GEOMETRIES[name]), warped(mask, GEOMETRIES[name]), atol=1e-12, equal_nan=True
    )


@pytest.mark.parametrize("flipped", [False, True])
def test_a_hot_cell_lands_on_the_pixels_it_looked_at(flipped):
    """500x375 at the authors' crop, 28 x 28 cells of 8 px, cell (5, 20): by hand, in whole numbers."""
    plain = eval_geometry(500, 375)
    geometry = Geometry(plain.original_size, plain.input_size, plain.scale, plain.offset, flipped)
    mask = np.zeros((28, 28))
    mask[5, 7 if flipped else 20] = 1
    heatmap = mask_to_original(mask, geometry)
    # the photograph becomes 341 x 256 px, of which 58 are cut on the left and 16 above
    x, y = (58 + 20.5 * 8) * 500 / 341, (16 + 5.5 * 8) * 375 / 256
    row, column = np.unravel_index(np.nanargmax(heatmap), heatmap.shape)
    assert abs(column + 0.5 - x) <= 0.5 and abs(row + 0.5 - y) <= 0.5
    reach_x, reach_y = 8 * 500 / 341, 8 * 375 / 256  # bilinear: zero from the centres of the cells around
    rows, columns = np.nonzero(np.nan_to_num(heatmap))
    assert x - reach_x < columns.min() + 0.5 and columns.max() + 0.5 < x + reach_x
    assert y - reach_y < rows.min() + 0.5 and rows.max() + 0.5 < y + reach_y


def test_nothing_outside_of_the_crop_gets_a_value():
    geometry = eval_geometry(500, 375)
    x0, y0, x1, y1 = geometry.visible_box()
    heatmap = mask_to_original(np.ones((28, 28)), geometry)
    y, x = np.mgrid[:375, :500] + 0.5
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    assert np.isnan(heatmap[~inside]).all()
    assert np.allclose(heatmap[inside], 1, atol=1e-12)


def test_a_photograph_of_the_inputs_size_gets_its_mask_unchanged():
    mask = np.random.default_rng(0).random((24, 24))
    geometry = eval_geometry(24, 24, size=24, crop_pct=1.0)
    assert np.allclose(mask_to_original(mask, geometry), mask, atol=1e-12)


def test_a_training_crop_is_undone_too():
    torch.manual_seed(0)
    transform = TrainTransform(28, HALF, HALF)
    flips = set()
    for _ in range(6):
        _, geometry = transform(noise(40, 30))
        mask = np.random.default_rng(2).random((7, 7))
        assert np.allclose(mask_to_original(mask, geometry), warped(mask, geometry), equal_nan=True)
        flips.add(geometry.flipped)
    assert flips == {True, False}


def test_a_models_mask_may_be_a_tensor_with_gradient_in_half_precision():
    geometry = eval_geometry(40, 30, 28)
    mask = torch.rand(1, 1, 7, 7, dtype=torch.bfloat16).requires_grad_()
    expected = mask_to_original(mask[0, 0].detach().float().numpy(), geometry)
    assert np.array_equal(mask_to_original(mask, geometry), expected, equal_nan=True)


@settings(deadline=None)
@given(
    st.integers(0, 13), st.integers(0, 13), st.sampled_from([(500, 375), (300, 440), (97, 90)]), st.booleans()
)
def test_peak_of_a_mask_is_its_cells_centre_in_the_photograph(row, column, size, flipped):
    plain = eval_geometry(*size)
    geometry = Geometry(plain.original_size, plain.input_size, plain.scale, plain.offset, flipped)
    mask = np.zeros((14, 14))
    mask[row, column] = 1
    x, y = geometry.to_input([peak(mask, geometry)])[0]
    assert (x, y) == (pytest.approx(16 * column + 8), pytest.approx(16 * row + 8))


def test_peak_of_a_heatmap_is_a_pixels_centre_and_of_ties_the_first():
    heatmap = np.full((6, 8), np.nan)
    heatmap[1:5, 2:7] = 0.1
    heatmap[3, 4] = 0.7
    assert peak(heatmap) == (4.5, 3.5)
    heatmap[3, 6] = heatmap[4, 2] = 0.7
    assert peak(heatmap) == (4.5, 3.5)
    assert peaks(heatmap).tolist() == [[4.5, 3.5], [6.5, 3.5], [2.5, 4.5]]


def test_an_even_mask_peaks_wherever_the_model_saw():
    rng = np.random.default_rng(0)
    for _ in range(100):
        width, height = (int(side) for side in rng.integers(60, 200, 2))
        cells = rng.integers(2, 57)
        heatmap = mask_to_original(np.full((cells, cells), rng.random()), eval_geometry(width, height))
        rows, columns = np.nonzero(np.isfinite(heatmap))
        assert np.array_equal(peaks(heatmap), np.stack([columns, rows], 1) + 0.5)


def test_contour_level_is_the_percentile_of_the_seen_pixels():
    heatmap = np.full((20, 20), np.nan)
    heatmap[5:15, 5:15] = np.random.default_rng(0).permutation(100).reshape(10, 10)
    for percentile in (0, 50, 90, 100):
        assert contour_level(heatmap, percentile) == pytest.approx(99 * percentile / 100)


def test_overlay_has_the_photographs_size_and_mixes_colour_into_what_was_seen():
    image = noise(50, 40)
    geometry = eval_geometry(50, 40, 28)
    heatmap = mask_to_original(np.random.default_rng(0).random((7, 7)), geometry)
    picture = overlay(image, heatmap, alpha=0.3)
    assert picture.shape == (40, 50, 3) and picture.dtype == np.uint8
    row, column = np.unravel_index(np.nanargmax(heatmap), heatmap.shape)
    yellow = np.array([0.993248, 0.906157, 0.143936]) * 255  # the last colour of viridis, as published
    expected = 0.7 * np.asarray(image)[row, column] + 0.3 * yellow
    assert np.abs(picture[row, column] - expected).max() <= 1


def test_overlay_leaves_what_was_not_seen_grey_and_dimmed():
    image = noise(50, 40)
    heatmap = mask_to_original(np.random.default_rng(0).random((7, 7)), eval_geometry(50, 40, 28))
    unseen = np.isnan(heatmap)
    outside = overlay(image, heatmap)[unseen].astype(int)
    assert len(outside) > 500
    assert (outside.max(axis=1) == outside.min(axis=1)).all()
    luma = np.asarray(image)[unseen] @ (0.299, 0.587, 0.114)
    assert np.abs(outside[:, 0] - luma / 2).max() <= 1


def test_limits_put_two_overlays_on_one_scale():
    image = np.zeros((1, 2, 3), np.uint8)
    low, high = np.array([[0.0, 0.2]]), np.array([[0.0, 0.8]])
    assert np.array_equal(overlay(image, low), overlay(image, high))  # each on its own scale
    low, high = (overlay(image, heatmap, limits=(0, 0.8)).astype(int) for heatmap in (low, high))
    assert np.array_equal(low[0, 0], high[0, 0]) and low[0, 1].sum() < high[0, 1].sum()


def test_a_constant_heatmap_is_drawn_in_the_first_colour():
    picture = overlay(np.zeros((3, 4, 3), np.uint8), np.full((3, 4), 0.4), alpha=1)
    purple = np.array([0.267004, 0.004874, 0.329415]) * 255  # the first colour of viridis, as published
    assert np.abs(picture - purple).max() <= 1


def test_the_default_colours_grow_lighter_evenly():
    """Perceptually uniform: equal steps of the mask are equal steps of CIE lightness."""
    picture = overlay(np.zeros((1, 101, 3), np.uint8), np.linspace(0, 1, 101)[None], alpha=1)
    rgb = picture[0] / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16
    steps = np.diff(lightness[::10])
    assert steps.min() > 0.75 * steps.mean() and steps.max() < 1.25 * steps.mean()


def corner_heatmap():
    """100 x 80 px, seen from x = 20; the mask is 1 in a 10 x 10 square, 0 elsewhere."""
    heatmap = np.zeros((80, 100))
    heatmap[:, :20] = np.nan
    heatmap[5:15, 80:90] = 1
    return heatmap


def test_alt_text_tells_the_peak_the_share_in_the_box_and_what_was_cropped():
    text = alt_text(corner_heatmap(), box=(60, 10, 40, 20))
    assert text == (
        "Mask over a photograph of 100 by 80 pixels. "
        "Its peak is in the top right, at (80, 6), partly inside the box. "
        "50% of the mask lies in the box, which covers 12% of what the model saw. "
        "20% of the photograph was cropped away, shown in grey."
    )


def test_alt_text_of_a_mask_of_zeros_claims_no_share():
    text = alt_text(np.zeros((10, 10)), box=(0, 0, 4, 4), name="Grad-CAM")
    assert "0% of the Grad-CAM lies in the box, which covers 16% of what the model saw" in text
    assert "It is flat, from 0.000 to 0.000: it does not say where. 0% of" in text and "cropped" not in text


@pytest.mark.parametrize("low, high, flat", [(0.48, 0.507, True), (0.5, 0.5, True), (0.01, 0.02, False),
                                             (0.48, 0.6, False), (-0.02, 0.02, False)])
def test_a_flat_map_has_no_peak(low, high, flat):
    heatmap = np.full((10, 10), low)
    heatmap[2, 8], heatmap[0] = high, np.nan
    assert is_flat(heatmap) == flat
    text = alt_text(heatmap)
    assert ("flat" in text) == flat and ("peak" in text) != flat
    if flat:
        assert f"It is flat, from {low:.3f} to {high:.3f}: it does not say where. 10% of the photograph was" in text


def test_some_rows_and_columns_of_a_heatmap_are_those_of_the_whole():
    geometry = eval_geometry(350, 450)
    mask = np.random.default_rng(0).random((7, 7))
    whole = mask_to_original(mask, geometry)
    np.testing.assert_array_equal(mask_to_original(mask, geometry, range(10, 20)), whole[10:20])
    some = mask_to_original(mask, geometry, range(2, 450, 5), range(2, 350, 5))
    np.testing.assert_array_equal(some, whole[2::5, 2::5])
    box = (100, 150, 125, 200)
    a, b = alt_text(whole, box), alt_text(some, box, size=whole.shape)
    assert a.split(". ")[0] == b.split(". ")[0]
    share = [[int(n) for n in re.findall(r"(\d+)%", text)] for text in (a, b)]
    np.testing.assert_allclose(*share, atol=3)


@pytest.mark.parametrize("size", [(1, 1), (1, 199), (3, 3), (500, 3), (2, 2)])
def test_the_smallest_photographs_have_a_heatmap(size):
    transform = EvalTransform(64, (0.5,) * 3, (0.5,) * 3)
    image = Image.new("RGB", size)
    heatmap = mask_to_original(np.random.default_rng(0).random((4, 4)), transform(image)[1])
    assert heatmap.shape == size[::-1] and np.isfinite(heatmap).any() and alt_text(heatmap)


def test_a_window_between_the_pixels_is_named():
    geometry = Geometry((2, 2), (8, 8), (40.0, 40.0), (36.0, 36.0))  # sees 0.9 to 1.1 of 2 px
    with pytest.raises(LoupeError, match="^geometry: the model saw 0.20 x 0.20 px of a photograph of 2 x 2 px, and so"):
        mask_to_original(np.ones((2, 2)), geometry)


def test_a_photograph_is_coloured_in_strips_as_at_once(monkeypatch):
    image, heatmap = noise(30, 50), np.random.default_rng(0).random((50, 30))
    heatmap[:20] = np.nan
    whole = overlay(image, heatmap)
    monkeypatch.setattr("loupe_core.heatmap.STRIP", 7)
    np.testing.assert_array_equal(overlay(image, heatmap), whole)


FLAT = np.ones((10, 20))
CALLS = {
    "geometry": lambda: mask_to_original(FLAT, None),
    "mask": lambda: mask_to_original(np.ones((2, 5, 5)), eval_geometry(20, 10)),
    "mask ": lambda: peak(np.full((3, 3), np.nan)),
    "percentile": lambda: contour_level(FLAT, 101),
    "image": lambda: overlay(noise(10, 20), FLAT),
    "image ": lambda: overlay(np.ones((10, 20, 3)), FLAT),
    "alpha": lambda: overlay(noise(20, 10), FLAT, alpha=1.5),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_input_is_told_by_name_in_one_line(name):
    with pytest.raises(LoupeError) as caught:
        CALLS[name]()
    assert str(caught.value).startswith(f"{name.strip()}: found ")
    assert "\n" not in str(caught.value)


def test_a_mask_on_the_beak_of_a_real_photograph_lands_on_the_beak(real_cub):
    dataset = CUB200(real_cub, "test", transform=EvalTransform(224, HALF, HALF, 0.875, "bilinear"))
    checked = 0
    for i in range(40):
        sample = dataset[i]
        x, y, visible = sample.parts[1].tolist()
        column, row = (sample.geometry.to_input([[x, y]])[0] // 8).astype(int)
        if not visible or not (0 <= column < 28 and 0 <= row < 28):
            continue
        mask = np.zeros((28, 28))
        mask[row, column] = 1
        found = peak(mask_to_original(mask, sample.geometry))
        cell = 8 / np.array(sample.geometry.scale[::-1])  # of the mask, in px of the photograph
        assert (
            (np.abs(np.array(found) - (x, y)) <= cell / 2 + 0.5).all() or row in (0, 27) or column in (0, 27)
        )
        checked += 1
    assert checked > 15
