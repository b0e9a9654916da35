"""Intervals cover as often as they say, and tests agree with formulas written another way."""

import math

import numpy as np
import pytest

from loupe_core import LoupeError
from loupe_lab.evidence.results import pack_right, unpack_right
from loupe_lab.evidence.statistics import mcnemar, paired_difference, proportion


@pytest.mark.parametrize("between_seeds", [0.0, 0.3])
def test_a_paired_difference_covers_the_truth_for_new_seeds_and_images(between_seeds):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        images, seeds = rng.normal(0, 0.5, 80), rng.normal(0, between_seeds, (5, 1))
        a = 0.1 + images + seeds + rng.normal(0, 0.5, (5, 80))
        found = paired_difference(a, np.zeros_like(a), resamples=300)
        covered += found.low <= 0.1 <= found.high
    assert covered / 200 >= 0.93


def test_a_paired_difference_is_narrower_where_both_err_on_the_same_images():
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.1
    a, b = np.tile(~hard, (3, 1)), np.tile(~hard, (3, 1))
    other = np.stack([~rng.permutation(hard) for _ in range(3)])
    assert paired_difference(a, b).half == 0 < paired_difference(a, other).half
    assert paired_difference(a, b, level=0.99).half >= paired_difference(a, b).half


@pytest.mark.parametrize("a, b", [(np.ones((1, 4)), np.ones((1, 4))), (np.ones((2, 4)), np.ones((2, 5))), ([1], [0])])
def test_a_paired_difference_names_the_shapes_that_do_not_fit(a, b):
    with pytest.raises(LoupeError, match="expected two of one shape"):
        paired_difference(a, b)


def test_mcnemar_counts_and_gives_the_binomial_tails():
    a = np.array([1] * 9 + [0] * 2 + [1] * 20, bool)
    b = np.array([0] * 9 + [1] * 2 + [1] * 20, bool)
    p = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert mcnemar(a, b) == (9, 2, pytest.approx(p))
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_wilsons_interval_is_the_root_of_its_equation():
    low, high = proportion(90, 100)
    for bound in (low, high):
        assert abs(0.9 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 100), rel=1e-5)


def test_which_images_are_right_survives_the_trip_through_a_cell():
    right = np.random.default_rng(0).random(43) < 0.5
    assert (unpack_right({"right": pack_right(right)}, 43) == right).all()
    assert pack_right([True] + 7 * [False] + [True, True]) == "80c0"
