"""Ranks: by hand, against chance, and back through the geometry."""

import math

import numpy as np
import torch
from scipy.stats import percentileofscore

from loupe_core import Geometry, Sample
from loupe_core.scorecard import rank_at, rank_of_part


def sample(x, y, visible=1, geometry=None):
    parts = torch.zeros(15, 3)
    parts[3] = torch.tensor([x, y, visible])
    return Sample(None, 0, parts, None, geometry or Geometry((8, 8), (8, 8), (1.0, 1.0), (0.0, 0.0)), "", 0)


def test_a_rank_is_the_share_of_cells_below_and_half_of_the_ties():
    mask = np.array([[0.1, 0.5], [0.5, 0.9]])
    assert rank_at(mask, (1, 1)) == 1.0 and rank_at(mask, (0, 0)) == 0.0
    assert rank_at(mask, (0, 1)) == (1 + 0.5) / 3
    assert rank_at(np.ones((3, 3)), (1, 1)) == 0.5  # a mask that says nothing gets what chance gets


def test_a_rank_equals_scipys_and_ignores_a_monotone_change():
    rng = np.random.default_rng(0)
    mask = rng.random((14, 14))
    others = np.delete(mask.flatten(), 3 * 14 + 7)
    assert math.isclose(rank_at(mask, (3, 7)), percentileofscore(others, mask[3, 7], "mean") / 100)
    assert rank_at(np.exp(5 * mask), (3, 7)) == rank_at(mask, (3, 7))


def test_noise_ranks_at_a_half():
    rng = np.random.default_rng(1)
    ranks = [rank_at(rng.random((14, 14)), tuple(rng.integers(14, size=2))) for _ in range(2000)]
    assert abs(np.mean(ranks) - 0.5) < 4 * np.sqrt(1 / 12 / 2000)


def test_a_part_is_ranked_in_its_own_cell_among_all_and_among_the_birds():
    mask = np.arange(16.0).reshape(4, 4)  # cells of 2 px
    bird = np.zeros((8, 8), bool)
    bird[4:, 4:] = True  # cells (2, 2), (2, 3), (3, 2), (3, 3): values 10, 11, 14, 15
    among_all, among_bird = rank_of_part(mask, sample(6.5, 5.0), 3, bird)  # cell (2, 3): 11
    assert among_all == 11 / 15 and among_bird == 1 / 3


def test_a_flipped_crop_leads_to_the_right_cell():
    geometry = Geometry((16, 16), (8, 8), (1.0, 1.0), (4.0, 2.0), flipped=True)  # x_input = 8 - (x - 2)
    mask = np.zeros((4, 4))
    mask[1, 0] = 1.0  # px 2..4 down, 0..2 across in the input: y 6..8, x 8..10 in the photograph
    assert rank_of_part(mask, sample(9.0, 7.0, geometry=geometry), 3)[0] == 1.0


def test_a_part_that_is_hidden_or_cut_off_has_no_rank():
    cut = Geometry((16, 16), (8, 8), (1.0, 1.0), (4.0, 4.0))
    for one in (sample(4, 4, visible=0), sample(1, 8, geometry=cut), sample(8, 13, geometry=cut)):
        assert all(map(math.isnan, rank_of_part(np.ones((4, 4)), one, 3, np.ones((16, 16), bool))))
