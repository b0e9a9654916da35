"""Solar cells: the label rule, the folds, the measures of where a mask lies, and one training on made-up cells."""

import sys
from functools import partial

import grids_beyond as beyond
import grids_photographs as photographs
import numpy as np
import pytest
import timm
from PIL import Image
from test_devices_grids import QuickRecipe

from loupe_core import LoupeError
from loupe_lab.evidence.results import unpack_right


def test_defective_is_what_the_expert_called_defective_sure_or_not():
    assert beyond.is_defective([0, 1 / 3, 2 / 3, 1]).tolist() == [False, False, True, True]


@pytest.fixture
def cells(monkeypatch):
    """480 made-up cells in 24 blocks of 20: images `(480, 60, 60)`, probabilities and kinds; a dark bar is a defect."""
    rng = np.random.default_rng(0)
    images = rng.integers(120, 200, (480, 60, 60)).astype(np.uint8)
    probability = rng.choice([0, 1 / 3, 2 / 3, 1], 480, p=[0.5, 0.1, 0.1, 0.3])
    images[probability == 1, 20:24] = 20
    kind = np.repeat(["mono", "poly", "mono"], [200, 180, 100])
    monkeypatch.setattr(beyond, "BLOCKS", 24 * (20,))
    monkeypatch.setattr(beyond, "load_cells", lambda: (images, probability, kind))
    return images, probability, kind


@pytest.mark.parametrize("by", ["cell", "block"])
def test_every_cell_is_tested_once_and_never_trains_or_chooses_where_it_is_tested(by, cells):
    fold_of = beyond.folds(*cells[1:], by)
    tested = np.zeros(480, int)
    for fold in range(beyond.FOLDS):
        train, val, test = (beyond.split_of(fold_of, fold)[split] for split in ("train", "val", "test"))
        assert (train.astype(int) + val + test == 1).all()
        assert (beyond.split_of(fold_of, (fold + 1) % beyond.FOLDS)["test"] == val).all()
        tested += test
    assert (tested == 1).all()


def test_a_block_never_straddles_train_validation_and_test(cells):
    fold_of, block = beyond.folds(*cells[1:], "block"), beyond.blocks_of(cells[2])
    for fold in range(beyond.FOLDS):
        sides = [set(block[part]) for part in beyond.split_of(fold_of, fold).values()]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 24
    straddling = beyond.folds(*cells[1:], "cell")
    assert all(len(set(straddling[block == b])) > 1 for b in range(24))  # those folds are there to show what it costs


@pytest.mark.parametrize("by, most", [("cell", 1), ("block", 20)])
def test_folds_have_about_as_many_of_each_kind_and_label(by, most, cells):
    _, probability, kind = cells
    fold_of = beyond.folds(probability, kind, by)
    for of_kind in ("mono", "poly"):
        for of_label in (False, True):
            stratum = (kind == of_kind) & (beyond.is_defective(probability) == of_label)
            counts = np.bincount(fold_of[stratum], minlength=beyond.FOLDS)
            assert counts.max() - counts.min() <= most, counts


@pytest.mark.parametrize("kind", [np.repeat(["mono", "poly"], [200, 260]), np.repeat(["mono", "poly"], [190, 290])])
def test_other_files_than_those_of_the_blocks_are_refused(kind, cells):
    with pytest.raises(LoupeError, match=f"solar: found {len(kind)} cells, expected 480 whose kind changes only"):
        beyond.blocks_of(kind)


def test_within_blocks_counts_no_pair_of_two_blocks():
    rng = np.random.default_rng(0)
    block = np.repeat(range(4), 20)
    labels = np.r_[rng.random(60) < 0.4, np.ones(20, bool)]  # the last block has no sound cell
    scores = block + rng.integers(0, 5, 80)
    pairs = [(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i in range(80) for j in range(80)
             if labels[i] and not labels[j] and block[i] == block[j]]
    assert beyond.within_blocks(scores, labels, block) == pytest.approx(np.mean(pairs))
    assert beyond.within_blocks(block, labels, block) == 0.5 < beyond.auc(block, labels)  # it knows modules alone
    assert np.isnan(beyond.within_blocks(scores[60:], labels[60:], block[60:]))


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
    assert np.abs(beyond.darkness(slope, 14)[:, 2:-2]).max() < 1e-9
    spot = slope.copy()
    spot[40:48, 64:72] -= 0.2
    dark = beyond.darkness(spot, 14)
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
    values = rng.random((16, 16))
    assert beyond.top(values).sum() == 26 and values[beyond.top(values)].min() > np.sort(values.ravel())[-27]


def test_a_mask_made_of_darkness_agrees_with_its_own_cell_alone():
    rng = np.random.default_rng(0)
    grey = rng.random((40, 112, 112))
    masks = np.stack([beyond.darkness(g, 14) for g in grey])
    defective, kind = np.arange(40) % 2 == 0, np.repeat(["mono", "poly"], 20)
    found = beyond.where_it_lies(masks, grey, defective, kind)
    assert found["dark_defective"] == found["dark_sound"] == pytest.approx(1)
    assert abs(found["dark_defective_other"]) < 0.1 and abs(found["dark_sound_other"]) < 0.1


def test_measures_of_a_detector_that_knows_all():
    labels, kind = np.arange(40) % 4 == 0, np.repeat(["mono", "poly"], 20)
    found = beyond.measures(labels.astype(float), labels, np.ones(40, bool), kind, np.arange(40) // 8)
    assert all(found[k] == 1 for k in ("accuracy", "balanced", "auc", "auc_within", "auc_certain", "auc_mono",
                                       "auc_poly", "sensitivity"))
    assert found["calibration_gap"] == 0 and unpack_right(found, 40).all()


def test_neighbours_of_a_repeated_picture_are_found_where_the_folds_divide_them(cells, monkeypatch):
    """Modules of 20 cells that look alike and share their fate: folds by cell leave them on both sides."""
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 255, (24, 1, 30, 30))
    images = (0.9 * looks + 0.1 * rng.integers(0, 255, (24, 20, 30, 30))).reshape(480, 30, 30).astype(np.uint8)
    fate = np.repeat([0.0, 1] * 12, 20)
    monkeypatch.setattr(beyond, "load_cells", lambda: (images, fate, cells[2]))
    by_cell, by_block = (beyond.without_network("neighbours", by, 0)[0] for by in ("cell", "block"))
    assert by_cell["near"] == by_cell["auc"] == 1
    assert by_block["near"] == 0 and by_block["auc"] < 1
    apart = beyond.without_network("neighbours apart", "cell", 0)[0]
    assert apart["near"] == 0 and apart["auc"] < 1
    assert unpack_right(dict(right=apart["tested"]), 480).sum() == apart["cells"] == 96


def test_twins_are_the_test_photographs_that_training_has_seen(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def write(split, name, picture):
        file = tmp_path / "scans" / split / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)

    pictures = rng.integers(0, 255, (12, 60, 60, 3)).astype(np.uint8)
    for i, picture in enumerate(pictures[:10]):
        write("train", f"{'ab'[i % 2]}/{i}.png", picture)
    write("test", "a/copy.png", pictures[0])
    write("test", "a/lighter.png", (0.5 * pictures[1] + 90).astype(np.uint8))  # of the other class
    write("test", "a/new.png", pictures[10])
    write("test", "b/new.png", pictures[11])
    monkeypatch.setenv("LOUPE_PHOTOGRAPHS", str(tmp_path))
    found = beyond.twins("scans")[0]
    assert (found["test_images"], found["twins"], found["same_label"]) == (4, 2, 0.5)
    assert unpack_right(dict(right=found["twin"]), 4).tolist() == [True, True, False, False]


def test_one_row_on_made_up_cells_needs_no_package(cells, monkeypatch):
    monkeypatch.setattr(photographs, "lite0", partial(timm.create_model, "test_efficientnet"))
    monkeypatch.setattr(beyond, "Recipe", QuickRecipe)
    monkeypatch.setattr(beyond, "PIXELS", 64)
    monkeypatch.setattr("loupe_core.start.probe.STRENGTHS", (0.1,))  # of four
    found, trainer = beyond.train_on_cells("block", "residual", 0)
    bare, _ = beyond.train_on_cells("block", "bare", 0)
    assert [k for k in found if k != "masks"] == list(bare)  # one header for all rows
    assert found["tested"] == bare["tested"] and found["cells"] == unpack_right(dict(right=found["tested"]), 480).sum()
    assert bare["drop_top"] == "" and bare["drop_dark"] != ""
    assert all(-1 <= found[c] <= 1 for c in ("auc", "dark_defective", "dark_sound_other", "drop_top", "drop_dark"))
    assert np.shape(found["masks"]["sound"]) == (8, 8)
    labels = beyond.is_defective(cells[1])[unpack_right(dict(right=found["tested"]), 480)]
    for which in ("", "last_"):
        scores = np.frombuffer(bytes.fromhex(found[f"{which}scores"]), ">u2") / 65535
        assert beyond.auc(scores, labels) == pytest.approx(found[f"{which}auc"], abs=1e-3)
        right = unpack_right(dict(right=found[f"{which}right"]), found["cells"])
        assert right.mean() == pytest.approx(found[f"{which}accuracy"], abs=1e-4)
        assert (right != ((scores >= 0.5) == labels)).mean() < 0.05  # a score of 0.49999 is rounded up
    assert trainer.recipe.lam == 0.05 and trainer.model.crop_pct == 1


def test_the_package_as_it_is_installed():
    pytest.importorskip("elpv_dataset")
    images, probability, kind = beyond.load_cells()
    assert images.shape == (2624, 150, 150) and set(kind) == {"mono", "poly"}
    assert np.allclose(np.unique(probability), [0, 1 / 3, 2 / 3, 1])
    block = beyond.blocks_of(kind)
    fold_of = beyond.folds(probability, kind, "block")
    assert all(len(set(fold_of[block == b])) == 1 for b in range(len(beyond.BLOCKS)))
    x = images.reshape(2624, 30, 5, 30, 5).mean((2, 4)).reshape(2624, -1)
    likeness = np.corrcoef(x)

    def within(edges):
        parts = [likeness[a:b, a:b] for a, b in zip(edges, edges[1:])]
        return sum(part.sum() - len(part) for part in parts) / sum(len(part) * (len(part) - 1) for part in parts)

    edges = np.cumsum([0, *beyond.BLOCKS])
    moved = [within(np.r_[0, edges[1:-1] + by, 2624]) for by in (-30, -20, -10, 10, 20, 30)]
    assert within(edges) > max(moved)  # cells of a block look more alike than those of blocks that begin elsewhere


def test_without_the_package_the_grid_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    beyond.load_cells.cache_clear()
    with pytest.raises(SystemExit, match=r"^solar: elpv-dataset is not installed; run: pip install"):
        beyond.load_cells()
