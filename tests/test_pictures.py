"""A map over its photograph as the commands draw it."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from loupe_core.geometry import EvalTransform
from loupe_core.heatmap import mask_to_original, overlay
from loupe_lab.pages.pictures import colour_bar, drawn, sampled

TRANSFORM = EvalTransform(64, (0.5,) * 3, (0.5,) * 3)


def photograph(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(300, 700), (40, 31), (1, 1), (5, 90)])
def test_strips_make_the_overlay_of_the_whole(size):
    image = photograph(*size)
    geometry, mask = TRANSFORM(image)[1], np.random.default_rng(1).random((7, 7))
    picture = np.asarray(drawn(image, mask, geometry, (0, 1)))
    np.testing.assert_array_equal(picture[: size[1]], overlay(image, mask_to_original(mask, geometry), limits=(0, 1)))
    assert picture.shape == (size[1] + max(size[1] // 20, 18), size[0], 3)


def test_a_flat_mask_looks_flat_and_the_bar_shows_the_scale():
    image = Image.new("RGB", (200, 200), "white")
    geometry = TRANSFORM(image)[1]
    mask = np.linspace(0.48, 0.507, 49).reshape(7, 7)
    picture = np.asarray(drawn(image, mask, geometry, (0, 1), alpha=1.0))[:200].astype(int)
    seen = picture[30:170, 30:170].reshape(-1, 3)
    assert np.ptp(seen, axis=0).max() < 10
    own = np.asarray(drawn(image, mask, geometry, (0.48, 0.507), alpha=1.0))[30:170, 30:170].reshape(-1, 3)
    assert np.ptp(own.astype(int), axis=0).max() > 100
    bar = np.asarray(colour_bar(200, 20, (0, 1)))[10].astype(int)
    colours = [tuple(c) for c in bar]
    assert (68, 1, 84) in colours and (253, 231, 37) in colours[colours.index((68, 1, 84)):]  # viridis's ends, in order
    assert np.asarray(colour_bar(200, 20, (0, 1))).min() == 0  # the numbers, in black
    assert colour_bar(12, 20, (0, 1)).size == (12, 20)  # no room for them


def test_words_come_from_a_thousand_rows_and_columns_at_most():
    image = photograph(2300, 40)
    geometry, mask = TRANSFORM(image)[1], np.random.default_rng(1).random((7, 7))
    some = sampled(mask, geometry)
    assert max(some.shape) <= 1000
    np.testing.assert_array_equal(some, mask_to_original(mask, geometry)[::3, ::3])


def test_a_large_photograph_takes_its_own_size_and_a_few_strips(tmp_path):
    """24 megapixels are 72 MB; the picture is as much again, and nothing else is of that size."""
    code = """
import resource, sys
import numpy as np
from PIL import Image
from loupe_core.geometry import Geometry
from loupe_core.look.words import alt_text
from loupe_lab.pages.pictures import drawn, sampled
side = int(sys.argv[1])
image = Image.new("RGB", (6 * side, 4 * side))
geometry = Geometry((4 * side, 6 * side), (64, 64), (64 / 4 / side, 64 / 4 / side), (0.0, 16.0))
mask = np.random.default_rng(0).random((7, 7))
alt_text(sampled(mask, geometry), size=geometry.original_size)
drawn(image, mask, geometry, (0, 1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    small, large = (int(subprocess.run([sys.executable, "-c", code, side], capture_output=True, text=True,
                                       check=True).stdout) for side in ("100", "1000"))
    assert large - small < 2 * 72e3 + 200e3, (small, large)  # KiB; at once, the colours alone took 770 MB
