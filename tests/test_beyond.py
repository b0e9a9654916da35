"""Solar cells: the label rule, the split, the measures of where a mask lies, and one training on made-up cells."""

import dataclasses
import sys

import grids_beyond as beyond
import numpy as np
import pytest

PROBABILITY = np.tile([0, 1 / 3, 2 / 3, 1, 0, 0, 0, 1], 60)  # (480,)
KIND = np.repeat(["mono", "poly", "mono"], [200, 180, 100])


def test_defective_is_what_the_expert_called_defective_sure_or_not():
    assert beyond.is_defective([0, 1 / 3, 2 / 3, 1]).tolist() == [False, False, True, True]


@pytest.mark.parametrize("seed", range(3))
def test_a_split_by_cell_takes_a_quarter_of_every_kind_and_probability(seed):
    test = beyond.split_cells(PROBABILITY, KIND, "cell", seed)
    for kind in ("mono", "poly"):
        for p in np.unique(PROBABILITY):
            members = (KIND == kind) & (PROBABILITY == p)
            assert abs(test[members].sum() - members.sum() / 4) <= 0.5
    assert (test == beyond.split_cells(PROBABILITY, KIND, "cell", seed)).all()
    assert (test != beyond.split_cells(PROBABILITY, KIND, "cell", seed + 1)).any()


@pytest.mark.parametrize("seed", range(3))
def test_a_split_by_block_keeps_neighbours_together(seed):
    test = beyond.split_cells(PROBABILITY, KIND, "block", seed)
    for start, end in ((0, 200), (200, 380), (380, 480)):  # the runs of one kind
        for first in range(start, end, beyond.BLOCK):
            assert len(set(test[first:min(first + beyond.BLOCK, end)])) == 1
    for kind in ("mono", "poly"):
        share = test[KIND == kind].mean()
        assert 0.25 <= share < 0.25 + beyond.BLOCK / (KIND == kind).sum()


def test_auc_counts_the_pairs_that_are_in_order_and_half_of_those_that_tie():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 80), rng.random(80) < 0.3
    difference = scores[labels][:, None] - scores[~labels]
    assert beyond.auc(scores, labels) == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean())
    assert beyond.auc(np.ones(80), labels) == 0.5


def test_auc_of_one_label_is_nan():
    for labels in ([True] * 3, [False] * 3, []):
        assert np.isnan(beyond.auc(range(len(labels)), labels))


def test_darkness_finds_a_dark_spot_and_not_a_slope():
    slope = np.linspace(0.3, 0.8, 112)[None].repeat(112, 0)
    assert np.abs(beyond.darkness(slope)[:, 2:-2]).max() < 1e-9
    spot = slope.copy()
    spot[40:48, 64:72] -= 0.2
    dark = beyond.darkness(spot)
    assert np.unravel_index(dark.argmax(), dark.shape) == (5, 8)
    assert dark.max() == pytest.approx(0.2 * 24 / 25)  # its own share of the 5 x 5 cells around it


def test_another_cell_is_never_the_same_and_of_the_same_group():
    groups = np.random.default_rng(0).integers(0, 4, 50)
    partner = beyond.another(groups)
    assert (groups[partner] == groups).all() and (partner != np.arange(50)).all()
    assert sorted(partner) == list(range(50))


def test_taking_cells_away_smooths_them_and_leaves_the_rest():
    rng = np.random.default_rng(0)
    grey, cells = rng.random((112, 112)), np.zeros((14, 14), bool)
    cells[4:8, 4:8] = True
    gone = beyond.without(grey, cells)
    assert gone[36:60, 36:60].std() < 0.1 * grey.std()
    assert np.abs(gone - grey)[:, 80:].max() == 0
    assert beyond.top(rng.random((14, 14))).sum() == beyond.TOP


def test_a_mask_made_of_darkness_agrees_with_its_own_cell_alone():
    rng = np.random.default_rng(0)
    grey = rng.random((40, 112, 112))
    masks = np.stack([beyond.darkness(g) for g in grey])
    defective, kind = np.arange(40) % 2 == 0, np.repeat(["mono", "poly"], 20)
    found = beyond.where_it_lies(masks, grey, defective, kind)
    assert found["dark_defective"] == found["dark_sound"] == pytest.approx(1)
    assert abs(found["dark_defective_other"]) < 0.1 and abs(found["dark_sound_other"]) < 0.1


def test_measures_of_a_detector_that_knows_all():
    labels, kind = np.arange(40) % 4 == 0, np.repeat(["mono", "poly"], 20)
    found = beyond.measures(labels.astype(float), labels, np.ones(40, bool), kind)
    assert all(found[k] == 1 for k in ("balanced", "auc", "auc_certain", "auc_mono", "auc_poly", "sensitivity"))
    assert (found["images"], found["defective"], found["calibration_gap"]) == (40, 10, 0)


def test_neighbours_of_a_repeated_picture_are_found_where_the_split_divides_them(monkeypatch):
    """Modules of 30 cells that look alike and share their fate: a split by cells leaves them on both sides."""
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 255, (16, 1, 30, 30))
    images = (0.9 * looks + 0.1 * rng.integers(0, 255, (16, 30, 30, 30))).reshape(480, 30, 30).astype(np.uint8)
    kind, fate = np.repeat(["mono", "poly"], 240), np.repeat([0.0, 1] * 8, 30)
    monkeypatch.setattr(beyond, "load_cells", lambda: (images, fate, kind))
    by_cell, by_block = (beyond.without_network("neighbours", by, seed=0)[0] for by in ("cell", "block"))
    assert by_cell["near"] == by_cell["auc"] == 1
    assert by_block["near"] < 0.6 and by_block["auc"] < 1  # blocks beside one another touch
    apart = beyond.without_network("neighbours apart", "cell", seed=0)[0]
    assert apart["near"] == 0 and apart["auc"] < 1


def test_one_row_on_made_up_cells_needs_no_package(monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(120, 200, (48, 60, 60)).astype(np.uint8)
    probability, kind = np.tile([0, 1, 1 / 3, 1], 12), np.repeat(["mono", "poly"], 24)
    images[probability == 1, 20:24] = 20
    monkeypatch.setattr(beyond, "load_cells", lambda: (images, probability, kind))
    monkeypatch.setattr(beyond, "BLOCK", 4)
    recipe = beyond.recipe_of
    monkeypatch.setattr(beyond, "recipe_of", lambda *a: dataclasses.replace(recipe(*a), epochs=1, precision="no"))
    found, trainer = beyond.solar("loupe", 0)
    bare, _ = beyond.solar("bare", 0)
    assert [k for k in found if k != "masks"] == list(bare)  # one header for all rows
    assert bare["drop_top"] == "" and bare["drop_dark"] != ""
    assert all(-1 <= found[c] <= 1 for c in ("auc", "dark_defective", "dark_sound_other", "drop_top", "drop_dark"))
    assert np.shape(found["masks"]["sound"]) == (14, 14)
    assert trainer.recipe.lam == 0.05 and beyond.recipe_of("lambda 0", 0).lam == 0


def test_the_package_as_it_is_installed():
    pytest.importorskip("elpv_dataset")
    images, probability, kind = beyond.load_cells()
    assert images.shape == (2624, 150, 150) and set(kind) == {"mono", "poly"}
    assert np.allclose(np.unique(probability), [0, 1 / 3, 2 / 3, 1])


def test_without_the_package_the_grid_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    beyond.load_cells.cache_clear()
    with pytest.raises(SystemExit, match=r"^solar: elpv-dataset is not installed; run: pip install"):
        beyond.load_cells()
