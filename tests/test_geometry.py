import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from loupe_core.errors import LoupeError
from loupe_core.geometry import EvalTransform, Geometry, TrainTransform, transforms_for

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
side = st.integers(1, 4000)
positive = st.floats(0.02, 50)
geometries = st.builds(
    Geometry,
    original_size=st.tuples(side, side),
    input_size=st.tuples(side, side),
    scale=st.tuples(positive, positive),
    offset=st.tuples(st.floats(-3000, 3000), st.floats(-3000, 3000)),
    flipped=st.booleans(),
)
points = st.lists(st.tuples(st.floats(-5000, 5000), st.floats(-5000, 5000)), min_size=0, max_size=5)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PLAIN = {
    "mean": (0.0,),
    "std": (1.0,),
    "interpolation": "bilinear",
}  # leaves floating-point pixels as they are


def assert_pixels_come_from_where_the_geometry_says(transform, width, height, seed=0):
    """Pictures whose pixels hold their own x, and their own y: a resized pixel tells where it comes from."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    found = []
    for coordinate in (x, y):
        torch.manual_seed(seed)
        tensor, geometry = transform(Image.fromarray(coordinate))  # mode F: no rounding to levels
        found.append(tensor[0].numpy())
    h, w = geometry.input_size
    y, x = np.mgrid[:h, :w] + 0.5
    expected = geometry.to_original(np.stack([x, y], axis=-1))
    # the filter is cut off at the edge of the window: its reach is a pixel of the coarser picture
    x0, y0, x1, y1 = geometry.visible_box()
    reach = 1 + 1 / np.array(geometry.scale[::-1])
    inner = ((expected > (x0, y0) + reach) & (expected < (x1, y1) - reach)).all(axis=-1)
    assert inner.mean() > 0.5
    # enlarging is exact on a ramp; shrinking samples its triangle filter at whole pixels, which is not
    tolerance = 1e-3 if min(geometry.scale) >= 1 else 0.1
    assert np.abs(np.stack(found, axis=-1) - expected)[inner].max() < tolerance
    return geometry


@given(geometries, points)
def test_to_original_undoes_to_input(geometry, pts):
    pts = np.reshape(pts, (-1, 2))
    assert np.allclose(geometry.to_original(geometry.to_input(pts)), pts, rtol=0, atol=1e-6)


@given(geometries, points)
def test_to_input_undoes_to_original(geometry, pts):
    pts = np.reshape(pts, (-1, 2))
    assert np.allclose(geometry.to_input(geometry.to_original(pts)), pts, rtol=0, atol=1e-6)


@given(geometries, st.floats(-5000, 5000), st.floats(-5000, 5000))
def test_to_input_scales_then_crops_then_mirrors_x_alone(geometry, x, y):
    (sy, sx), (oy, ox) = geometry.scale, geometry.offset
    expected_x = geometry.input_size[1] - (x * sx - ox) if geometry.flipped else x * sx - ox
    assert np.allclose(geometry.to_input([[x, y]]), [[expected_x, y * sy - oy]], rtol=1e-12, atol=1e-9)


@given(side, side, st.integers(1, 300), st.integers(1, 300), st.floats(0.3, 1))
def test_visible_box_lies_in_the_photograph_and_fills_the_input(height, width, h, w, crop_pct):
    scale = max(h / height, w / width) / crop_pct
    offset = ((height * scale - h) / 2, (width * scale - w) / 2)
    geometry = Geometry((height, width), (h, w), (scale, scale), offset)
    x0, y0, x1, y1 = geometry.visible_box()
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert np.allclose(geometry.to_input([[x0, y0], [x1, y1]]), [[0, 0], [w, h]], atol=1e-6)


def test_visible_box_of_a_mirrored_crop_is_that_of_the_crop():
    plain = Geometry((100, 200), (50, 60), (1.0, 1.0), (10.0, 20.0))
    mirrored = Geometry((100, 200), (50, 60), (1.0, 1.0), (10.0, 20.0), flipped=True)
    assert plain.visible_box() == mirrored.visible_box() == (20, 10, 80, 60)


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (500, 333), (333, 500), (112, 112), (3, 2), (1, 1), (7, 300), (225, 224)]
)
@pytest.mark.parametrize("settings", [(224, 0.875, "bilinear"), (112, 0.9, "bicubic"), (64, 1.0, "bicubic")])
def test_eval_pixels_are_those_of_timm(size, settings):
    input_size, crop_pct, interpolation = settings
    image = noise(*size)
    timm = create_transform(
        input_size, is_training=False, crop_pct=crop_pct, interpolation=interpolation, mean=MEAN, std=STD
    )
    ours, _ = EvalTransform((input_size, input_size), MEAN, STD, crop_pct, interpolation)(image)
    assert torch.equal(ours, timm(image))


def test_eval_pixels_are_those_of_timm_for_an_oblong_input():
    image = noise(200, 150)
    timm = create_transform(
        (3, 96, 128), is_training=False, crop_pct=0.9, interpolation="bicubic", mean=MEAN, std=STD
    )
    assert torch.equal(EvalTransform((96, 128), MEAN, STD, 0.9, "bicubic")(image)[0], timm(image))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (501, 334), (60, 47), (41, 52)])
@pytest.mark.parametrize("input_size", [(224, 224), (96, 128), (50, 50)])
def test_eval_pixels_come_from_where_the_geometry_says(size, input_size):
    assert_pixels_come_from_where_the_geometry_says(EvalTransform(input_size, crop_pct=0.875, **PLAIN), *size)


def test_train_pixels_come_from_where_the_geometry_says_flipped_or_not():
    transform = TrainTransform((112, 112), scale=(0.2, 1.0), **PLAIN)
    flips = set()
    for seed, size in itertools.product(range(10), [(500, 375), (60, 47)]):
        flips.add(assert_pixels_come_from_where_the_geometry_says(transform, *size, seed).flipped)
    assert flips == {True, False}


def test_the_authors_crop_of_500x375_sees_a_window_of_328x328_px():
    _, geometry = EvalTransform((224, 224), MEAN, STD, 0.875, "bilinear")(noise(500, 375))
    x0, y0, x1, y1 = geometry.visible_box()
    # 224 / 0.875 = 256: the photograph becomes floor(256 * 500 / 375) x 256 px, of which 224 x 224 are kept
    assert x1 - x0 == pytest.approx(224 * 500 / 341, abs=1e-9)
    assert y1 - y0 == pytest.approx(224 * 375 / 256, abs=1e-9)
    assert (int(x1 - x0), int(y1 - y0)) == (328, 328)


def test_stretching_the_crop_over_500x375_displaces_an_overlay_by_up_to_86_px():
    _, geometry = EvalTransform((224, 224), MEAN, STD, 0.875, "bilinear")(noise(500, 375))
    edges = np.array([[0.0, 112.0], [224.0, 112.0], [112.0, 0.0], [112.0, 224.0]])
    stretched = edges * (
        500 / 224,
        375 / 224,
    )  # the authors' overlay: the crop's pixels over the whole photograph
    displaced = np.abs(stretched - geometry.to_original(edges)).max(axis=0)
    # by hand: of 341 px, 58 are cut on the left and 59 on the right; of 256 px, 16 above and 16 below
    assert displaced[0] == pytest.approx(59 * 500 / 341, abs=1e-9)
    assert displaced[1] == pytest.approx(16 * 375 / 256, abs=1e-9)
    assert int(displaced.max()) == 86


def test_train_crops_keep_to_the_asked_share_of_the_area():
    transform = TrainTransform((32, 32), MEAN, STD, scale=(0.25, 0.5))
    torch.manual_seed(0)
    for _ in range(50):
        x0, y0, x1, y1 = transform(noise(120, 90))[1].visible_box()
        share = (x1 - x0) * (y1 - y0) / (120 * 90)
        assert 0.24 < share < 0.51  # sides are rounded to whole pixels


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("randaugment", [None, "rand-m9-mstd0.5"])
def test_the_same_seeds_give_the_same_training_images(randaugment):
    transform = TrainTransform((32, 32), MEAN, STD, randaugment=randaugment)
    runs = []
    for seed in (1, 1, 2):
        seed_all(seed)
        runs.append(torch.stack([transform(noise(50, 40))[0] for _ in range(4)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_randaugment_changes_pixels_and_has_no_geometry():
    plain = TrainTransform((32, 32), MEAN, STD, "bilinear")
    augmented = TrainTransform((32, 32), MEAN, STD, "bilinear", randaugment="rand-m9-mstd0.5")
    changed = 0
    for seed in range(10):
        seed_all(seed)
        before, geometry = plain(noise(50, 40))
        seed_all(seed)
        after, none = augmented(noise(50, 40))
        assert geometry is not None and none is None
        changed += not torch.equal(before, after)
    assert changed >= 5


def test_training_pixels_are_normalised_per_channel():
    white = Image.new("RGB", (20, 20), (255, 255, 255))
    tensor, _ = TrainTransform((8, 8), MEAN, STD)(white)
    expected = [(1 - mean) / std for mean, std in zip(MEAN, STD)]
    assert torch.allclose(tensor, torch.tensor(expected)[:, None, None].expand(3, 8, 8), atol=1e-6)


def test_transforms_for_takes_the_models_settings_and_the_overrides():
    config = {
        "input_size": (3, 96, 96),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": 0.8,
    }
    tensor, geometry = transforms_for(config, train=False)(noise(200, 200))
    assert tensor.shape == (3, 96, 96)
    assert geometry.scale[0] == pytest.approx(math.floor(96 / 0.8) / 200)
    _, geometry = transforms_for(config, train=False, crop_pct=1.0)(noise(200, 200))
    assert geometry.scale[0] == pytest.approx(96 / 200)
    train = transforms_for(config, train=True, scale=(1.0, 1.0))
    assert isinstance(train, TrainTransform) and train(noise(50, 50))[1].scale == (96 / 50, 96 / 50)


CALLS = {
    "crop_pct": lambda: EvalTransform(224, MEAN, STD, 1.1),
    "input_size": lambda: EvalTransform((3, 224, 224), MEAN, STD),
    "interpolation": lambda: TrainTransform(224, MEAN, STD, "bicubicc"),
    "scale": lambda: TrainTransform(224, MEAN, STD, scale=(0.5, 0.1)),
    "randaugment": lambda: TrainTransform(224, MEAN, STD, randaugment="strong"),
    "points": lambda: Geometry((2, 2), (2, 2), (1, 1), (0, 0)).to_input([1, 2, 3]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_setting_is_told_by_name_in_one_line(name):
    with pytest.raises(LoupeError) as caught:
        CALLS[name]()
    assert str(caught.value).startswith(f"{name}: found ")
    assert "expected" in str(caught.value) and "\n" not in str(caught.value)


def test_every_interpolation_is_accepted_by_both_transforms():
    from loupe_core.geometry import INTERPOLATIONS

    for name, kind in itertools.product(INTERPOLATIONS, (EvalTransform, TrainTransform)):
        assert kind((8, 8), MEAN, STD, interpolation=name)(noise(12, 10))[0].shape == (3, 8, 8)
