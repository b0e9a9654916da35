"""The grids on real photographs, on stand-ins: every arm trains, sees the split it should, and is what it says."""

import sys
from functools import partial

import grids_photographs as grids
import numpy as np
import pytest
import record_results
import runs
import timm
import torch
from helpers import write_cub, write_folder
from test_devices_grids import QuickRecipe

from loupe_core import transforms_for
from loupe_lab.evidence.results import unpack_right

ROWS = [row for name in ("cub10_lite0", "cub10_gates", "other_photographs", "cub10_vit_s", "cub10_few", "cub10_crops")
        for row in record_results.GRIDS[name][1]]
ARMS = {(row["photographs"], row["backbone"], row["arm"]): row for row in reversed(ROWS)
        if row["photographs"] in ("cub10", "heliconius")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Eleven species and a folder of noise, timm's smallest backbones with random weights, one epoch."""
    folder = tmp_path_factory.mktemp("photographs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOUPE_CUB_ROOT", str(write_cub(folder / "cub", classes=11, per_class=8, size=(40, 52))))
        patch.setenv("LOUPE_PHOTOGRAPHS", str(write_folder(folder / "sets" / "heliconius", per_class=4).parent))
        patch.setattr(runs, "KEPT", folder / "kept")
        patch.setattr(grids, "Recipe", QuickRecipe)
        patch.setattr("loupe_core.start.probe.STRENGTHS", (0.1,))  # of four
        patch.setattr(grids, "lite0", partial(timm.create_model, "test_efficientnet"))
        patch.setitem(grids.BACKBONES, "vit_s", lambda pixels: timm.create_model("test_vit", img_size=pixels))
        yield folder


@pytest.mark.parametrize("key", ARMS, ids=", ".join)
def test_an_arm_trains_and_its_row_says_what_is_asked_of_it(key, tiny):
    row = ARMS[key] | dict(pixels=64, seed=0)
    outcome, trainer = grids.photograph(**row)
    test = 10 * 4 if row["photographs"] == "cub10" else 2 * 4
    assert outcome["test_images"] == test and outcome["epochs"] == 1 and outcome["best_epoch"] in (0, 1)
    for which in ("", "last_"):
        right = unpack_right(dict(right=outcome[f"{which}right"]), test)
        assert right.mean() == pytest.approx(outcome[f"{which}accuracy"], abs=1e-4)
        assert 0 <= outcome[f"{which}train_accuracy"] <= 1
        assert np.isnan(outcome[f"{which}mask_mean"]) == (not trainer.model.gates)
    assert outcome["val_accuracy"] >= outcome["probe"]
    assert trainer.recipe.lam == grids.CHANGES[row["arm"]].get("recipe", {}).get("lam", 0.05)
    assert trainer.recipe.gate_lr_factor == (30 if row["arm"].endswith(", fast") else 1)
    if outcome["best_epoch"] == 1:
        assert outcome["last_right"] == outcome["right"]


@pytest.mark.parametrize("arm", ["bare", "multiply", "oracle box", "oracle crop"])
def test_the_weights_that_are_kept_answer_as_the_row_says(arm, tiny):
    which = dict(photographs="cub10", backbone="lite0", pixels=64, arm=arm, seed=1)
    outcome, trainer = grids.photograph(**which, images="")
    model, test = grids.kept(**which)
    with torch.no_grad():
        predicted = torch.cat([model(test[i].image[None]) for i in range(len(test))]).argmax(1).numpy()
    right = unpack_right(outcome, len(test))
    assert ((predicted == test.labels) != right).mean() <= 0.05  # in fp32 here


def test_weights_of_what_was_not_recorded_here_are_named(tiny):
    with pytest.raises(SystemExit, match="cub10-lite0-64-mix-4.pt: found no weights; record its row on this machine"):
        grids.kept("cub10", "lite0", 64, "mix", 4)


def test_all_arms_of_a_seed_see_the_same_photographs_and_the_official_test_split(tiny):
    def names(split, arm, images="", seed=0):
        return set(grids.sets("cub10", arm, images, seed)(split, lambda image: None).identities())

    train, val, test = (names(split, "bare") for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (30, 10, 40)  # of 4 training photographs per species, one
    assert not (train & val or (train | val) & test)
    for arm in ("multiply", "oracle box", "oracle crop"):
        assert (names("train", arm), names("val", arm), names("test", arm)) == (train, val, test)
        few = names("train", arm, 2)
        assert few == names("train", "bare", 2) and few < train and len(few) == 20
        assert names("val", arm, 2) == val
    assert names("train", "bare", 2, 1) != few and names("val", "bare", "", 1) != val
    assert names("test", "bare", "", 1) == test


def test_few_photographs_are_as_many_of_each_class(tiny):
    labels = grids.sets("cub10", "bare", 2, 5)("train").labels
    assert np.bincount(labels).tolist() == [2] * 10


@pytest.mark.parametrize("arm, mask", [("near one", 0.98), ("residual", 0.5), ("oracle box, 0 outside", None)])
def test_an_arm_begins_as_it_says(arm, mask, tiny):
    split_of = grids.sets("cub10", arm)
    model = grids.build("lite0", 64, arm, 0, split_of("train").class_names)
    data = split_of("test", transforms_for(model.data_config, train=False))
    with torch.no_grad():
        _, found = model.eval()(torch.stack([data[i].image for i in range(4)]), return_mask=True)
    if mask:
        assert found.min() > mask - 0.1 and found.max() < mask + 0.1
    else:
        assert found.min() == 0 and found.max() == 1 and model.gate_parameters() == 0


def test_the_gates_of_an_arm_and_its_seed_begin_alike(tiny):
    names = [f"species {k}" for k in range(10)]
    one, other = (grids.build("lite0", 64, arm, 3, names).gates["stage2"].state_dict() for arm in
                  ("residual", "residual, lambda 5"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("grid, told, line", [
    ("cub10_lite0", {}, "cub10: LOUPE_CUB_ROOT is not set; set LOUPE_CUB_ROOT to the folder CUB_200_2011"),
    ("cub10_lite0", dict(LOUPE_CUB_ROOT="/nowhere"), "cub10: found no folder /nowhere; set LOUPE_CUB_ROOT to the"),
    ("other_photographs", dict(LOUPE_PHOTOGRAPHS="/nowhere"), "heliconius: found no folder /nowhere/heliconius; set "
     "LOUPE_PHOTOGRAPHS to a folder that holds the folder heliconius"),
])
def test_without_photographs_the_recorder_names_the_folder_that_is_missing(grid, told, line, tmp_path, monkeypatch):
    monkeypatch.delenv("LOUPE_CUB_ROOT", raising=False)
    monkeypatch.delenv("LOUPE_PHOTOGRAPHS", raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(record_results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["record_results.py", grid])
    with pytest.raises(SystemExit, match=line):
        record_results.main()
    assert not list(tmp_path.iterdir())


def test_the_first_rows_are_those_that_matter_most():
    first = record_results.GRIDS["cub10_lite0"][1][:35]
    assert {row["arm"] for row in first} == {"bare", "residual", "residual, constant", "near one", "multiply",
                                             "oracle box", "oracle crop"}
    assert {row["arm"] for row in record_results.GRIDS["cub10_gates"][1][:20]} == set(grids.GATES)
    assert [row["seed"] for row in first] == [seed for seed in range(5) for _ in range(7)]
    for name in ("cub10_lite0", "cub10_gates", "other_photographs", "cub10_vit_s", "cub10_few", "cub10_crops"):
        choices = record_results.GRIDS[name][1]
        assert len({tuple(choice.items()) for choice in choices}) == len(choices)
