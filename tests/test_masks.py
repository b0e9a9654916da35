"""Arithmetic on masks and maps: against loops, SciPy and NumPy, and the random orders that recorded results rest on."""

import grids_beyond
import grids_dynamics
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, pearsonr, spearmanr

from loupe_core.gate import Gate
from loupe_lab.evidence.audit import shuffled
from loupe_lab.evidence.baselines import control
from loupe_lab.evidence.masks import (
    blocks,
    border_ring,
    centre_gaussian,
    correlation,
    mean,
    rank_correlation,
    replace_mask,
    shuffle_cells,
    within,
)
from loupe_lab.evidence.routing import backward_mask
from loupe_lab.evidence.scorecard import centre_prior


def some_mask(B=4, h=5, w=6):
    return torch.rand(B, 1, h, w, generator=torch.Generator().manual_seed(0))


def test_mean_blocks_and_within_equal_loops_also_at_odd_edges():
    mask, M = some_mask(h=5, w=7), some_mask(h=5, w=7).double().numpy()
    for b in range(4):
        average = M[b, 0].mean()
        for y in range(5):
            for x in range(7):
                square = M[b, 0, y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2]
                assert mean(mask)[b, 0, y, x].item() == pytest.approx(average, rel=1e-5)
                assert blocks(mask)[b, 0, y, x].item() == pytest.approx(square.mean(), rel=1e-5)
                ratio = M[b, 0, y, x] * average / square.mean()
                assert within(mask)[b, 0, y, x].item() == pytest.approx(ratio, rel=1e-5)


def test_the_blocks_of_within_have_one_mean_and_a_block_of_zeros_gets_it():
    mask = some_mask()
    torch.testing.assert_close(blocks(within(mask)), mean(mask))
    mask[0, 0, :2, :2] = 0
    torch.testing.assert_close(within(mask)[0, 0, :2, :2], mask[0].mean().expand(2, 2))
    assert within(torch.zeros(1, 1, 4, 4)).eq(0).all() and within(mask.where(mask > 0.7, 0.0)).isfinite().all()


@pytest.mark.parametrize("one_order", [True, False])
def test_shuffled_cells_are_those_that_the_order_names(one_order):
    mask = some_mask()
    order = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(b)) for b in range(4)])
    found = shuffle_cells(mask, order[0] if one_order else order)
    assert found.shape == mask.shape
    for b in range(4):
        for i in range(30):
            source = int(order[0 if one_order else b, i])
            assert found[b, 0, i // 6, i % 6] == mask[b, 0, source // 6, source % 6]


# The formulas as they were when data/results was recorded: the same seeds must still give the same cells.

@pytest.mark.parametrize("seed", range(3))
def test_the_audits_shuffle_draws_as_it_did(seed):
    mask, draws, shuffle = some_mask(), torch.Generator().manual_seed(seed), shuffled(seed)
    for part in mask.split(3):  # the generator goes on from batch to batch
        places = torch.stack([torch.randperm(part[0].numel(), generator=draws) for _ in part])
        assert torch.equal(shuffle(part), part.flatten(1).gather(1, places).view_as(part))


@pytest.mark.parametrize("h, w", [(14, 14), (5, 6), (3, 4)])
def test_the_interventions_shuffle_draws_as_it_did(h, w):
    mask = some_mask(h=h, w=w)
    old, new = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(3):
        order = torch.rand(4, 1, h * w, generator=old).argsort(2)
        wanted = mask.flatten(2).gather(2, order).view_as(mask)
        assert torch.equal(backward_mask(mask, "shuffled", new), wanted)


def test_the_controls_shuffle_draws_as_it_did_and_passes_the_same_gradient():
    torch.manual_seed(3)
    gate, x = control("shuffled", 32), torch.randn(5, 32, 6, 7)
    for training in (True, False):
        gate.train(training)
        torch.manual_seed(1)
        draws = None if training else torch.Generator().manual_seed(gate.seed)
        wanted = gate.loupe(x).flatten(2)[..., torch.randperm(42, generator=draws)].unflatten(2, (6, 7))
        torch.manual_seed(1)
        found = gate(x)
        assert torch.equal(found, wanted)
        weight, pull = gate.loupe.conv1x1.weight, torch.randn(found.shape)
        one, other = (torch.autograd.grad(mask, weight, pull)[0] for mask in (found, wanted))
        assert torch.equal(one, other)


def test_a_replaced_mask_is_used_until_the_block_ends_also_by_an_error():
    torch.manual_seed(0)
    gate, x = Gate(16), torch.randn(2, 16, 4, 4)
    plain = gate(x)[1]
    with pytest.raises(RuntimeError, match="on the way"), replace_mask(gate, lambda mask: 1 - mask):
        features, mask = gate(x)
        assert torch.equal(mask, 1 - plain) and torch.equal(features, (1 - plain) * x)
        raise RuntimeError("on the way")
    assert torch.equal(gate(x)[1], plain)


@pytest.mark.parametrize("h, w", [(14, 14), (9, 5), (1, 2)])
def test_the_centre_gaussian_has_deviations_of_a_quarter_side_and_its_bits_are_as_they_were(h, w):
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    normal = multivariate_normal([0, 0], np.diag([0.25, 0.25]))  # deviations of 1/2, where half a side is 1
    np.testing.assert_allclose(centre_gaussian(h, w), normal.pdf(np.stack([y, x], -1)).reshape(h, w) * np.pi / 2)
    y, x = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)
    assert np.array_equal(centre_prior(h, w), np.exp(-2 * (x**2 + y**2)))
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    assert torch.equal(centre_gaussian(h, w, torch), torch.exp(-2 * (x**2 + y**2)))


def test_the_border_ring_is_where_a_coordinate_is_the_first_or_the_last():
    for h, w in ((14, 14), (4, 7), (2, 3), (1, 1)):
        wanted = [[y in (0, h - 1) or x in (0, w - 1) for x in range(w)] for y in range(h)]
        assert border_ring(h, w).tolist() == wanted
    assert border_ring(14, 14).sum() == 52


def test_what_the_grids_say_of_a_border_follows_from_sums():
    masks = np.random.default_rng(0).random((5, 6, 8))
    inside = masks[:, 1:-1, 1:-1]
    border = (masks.sum((1, 2)) - inside.sum((1, 2))) / (48 - 24)
    assert grids_beyond.share_of_border(masks[2]) == pytest.approx(border[2] / masks[2].mean())
    assert grids_beyond.share_of_border(np.full((4, 4), 0.3)) == pytest.approx(1)
    assert grids_dynamics.describe(masks)["ring"] == pytest.approx(np.mean(border / inside.mean((1, 2))))


@pytest.mark.parametrize("ours, scipys", [(correlation, pearsonr), (rank_correlation, spearmanr)])
def test_correlations_are_scipys_and_a_constant_map_has_none(ours, scipys):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, (6, 5, 7)) / 8, rng.random((6, 5, 7))  # the first with ties
    wanted = [scipys(x.ravel(), y.ravel()).statistic for x, y in zip(a, b)]
    np.testing.assert_allclose(ours(a, b), wanted, rtol=1e-12)
    np.testing.assert_allclose(ours(torch.tensor(a, dtype=torch.float32), b), wanted, rtol=1e-5)
    a[2], b[4] = 0.5, 0.0
    assert np.isnan(ours(a, b)).tolist() == [False, False, True, False, True, False]
    assert grids_dynamics.alike(a, b) == pytest.approx(np.nanmean(rank_correlation(a, b)))
    assert np.isnan(grids_dynamics.alike(a[2:3], b[2:3]))
