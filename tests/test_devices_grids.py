"""Every grid of data/results runs with an emulated card, on few birds and for one epoch; see `emulated`.

A grid that mixed devices, or put a tensor into its row, would raise. What is kept can be read without a card.
"""

import csv
import importlib
import os
from functools import partial
from pathlib import Path

import emulated
import numpy as np
import pytest
import record_results
import runs
import timm
import torch
from helpers import write_cub, write_folder

from loupe_core import Recipe
from loupe_core.start.devices import device_of
from loupe_lab.birds.fieldguide import fieldguide_set
from loupe_lab.paper.arms import plan
from loupe_lab.paper.experiment import perform
from loupe_lab.paper.rehearsal import rehearsed

ROOT = Path(__file__).resolve().parents[1]
GRIDS = [importlib.import_module(file.stem) for file in sorted((ROOT / "scripts" / "record").glob("grids_*.py"))]

KEPT = dict(photographs="cub10", backbone="lite0", pixels=64, arm="residual, fast", seed=0)
WINGS = KEPT | dict(photographs="heliconius", arm="bare")
# Trainings whose weights a grid reads: rows of grids_photographs.py.
NEEDS = {"pointing": [KEPT], "patches": [KEPT], "backdrops": [WINGS],
         **dict.fromkeys(("second_look", "second_look_remedies", "second_look_crops", "second_look_others"), [KEPT])}
# Rows of each grid that take its different ways; all grids of data/results must be here.
ROWS = {
    "ablations": [dict(arm=arm, seed=0) for arm in ("loupe", "multi-scale", "cbam")],
    "agreement": [dict(arm="loupe", seed=0, other=1)],
    "attention": [dict(part="crown", arm=arm, seed=0) for arm in ("loupe", "cbam")],
    "backdrops": [WINGS],
    "brain_twins": [dict(folder="heliconius")],
    "context": [dict(arm="loupe", seed=0)],
    "cub10_crops": [dict(photographs="cub10", backbone="lite0", pixels=64, arm="bare, on random crops", images="",
                         seed=0)],
    "cub10_few": [dict(photographs="cub10", backbone="lite0", pixels=64, arm="residual, lambda 0.5, fast", images=5,
                       seed=0)],
    "cub10_gates": [dict(photographs="cub10", backbone="lite0", pixels=64, arm=arm, images="", seed=0)
                    for arm in ("residual, fast", "residual, cbam, fast")],
    "cub10_lite0": [dict(photographs="cub10", backbone="lite0", pixels=64, arm=arm, images="", seed=0)
                    for arm in ("near one", "oracle parts", "oracle crop")],
    "cub10_vit_s": [dict(photographs="cub10", backbone="lite0", pixels=64, arm="multiply, stage3, fast", images="",
                         seed=0)],
    "dynamics": [dict(arm="loupe", seed=0, step=1)],
    "flow": [dict(arm=arm, seed=0, epoch=1) for arm in ("bare", "multi-scale")],
    "finetune": [dict(arm="backbone 1e-4", backbone="swin_micro", photographs="cub10", seed=0)],
    "gap": [dict(arm="loupe", change="as it is", seed=0), dict(arm="bare", change="144 shown at 80", seed=0)],
    "lambda": [dict(norm="l1", lam=0.05, site="stage2", form="multiply", gate="convolution", seed=0)],
    "other_photographs": [dict(photographs="heliconius", backbone="lite0", pixels=64, arm=arm, images="", seed=0)
                          for arm in ("oracle wings", "oracle crop to the wings", "bare")],
    "occlusion_sets": [dict(seed=0)],
    "patches": [KEPT],
    "photographs": [dict(arm="loupe", seed=0)],
    "pointing": [KEPT | dict(map=kind) for kind in ("mask", "features", "grad_cam")],
    "pretraining": [dict(labels="attributes", arm=arm, seed=0) for arm in ("bare", "loupe")],
    "pretraining_probes": [dict(labels=labels, attribute="crown") for labels in ("none", "attributes")],
    "questions": [dict(arm=arm, seed=0) for arm in ("bare", "centre prior added")],
    "reach": [dict(state="start", arm="swin_micro", site="stage2", form="multiply", mask="iid", seed=0),
              dict(state="trained", arm="loupe", site="stage2", form="multiply", mask="its own", seed=0)],
    "remedies": [dict(arm="residual", lr="0.0003", seed=0)],
    "robustness": [dict(arm="loupe", seed=0)],
    "robustness_checks": [dict(arm="loupe", seed=0)],
    "routing": [dict(kind=kind, seed=0) for kind in ("none", "shuffled")],
    "scales": [dict(arm="multi-scale", levelled="stage2", seed=0)],
    "scorecard": [dict(arm="loupe", method=method, seed=0) for method in ("mask", "borrowed")],
    "scorecard_photographs": [dict(method="mask", seed=0)],
    "second_look": [KEPT | dict(look=look) for look in ("none", "mask")],
    "second_look_crops": [KEPT | dict(look="mirror")],
    "second_look_others": [KEPT | dict(look="none")],
    "second_look_drawn": [dict(photographs="small drawn birds", backbone="swin_micro", pixels=112, arm="loupe", look=look,
                               seed=0) for look in ("mask", "larger")],
    "second_look_remedies": [KEPT | dict(look="norm of stage 3")],
    "sites": [dict(norm="l1", lam=0.05, site="stage2", form="multiply", gate="self-attention", seed=0)],
    "small_profile": [dict(arm="bare, random weights", seed=0)],
    "solar_folds": [dict(rule="darkness", by="block", fold=0)],
    "solar_lite0": [dict(by="block", arm=arm, fold=0) for arm in ("multiply", "bare")],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The grids on few birds, one epoch, and a folder of their own; what they kept in memory is forgotten."""
    folder = tmp_path_factory.mktemp("grids")
    photographs = write_cub(folder / "cub", classes=10, per_class=4, size=(48, 48), segmentations=True)
    rng = np.random.default_rng(0)
    cells = rng.integers(120, 200, (48, 60, 60)).astype(np.uint8)
    small = Recipe.small.__func__

    def few(root, species, *, train, test, **settings):
        return fieldguide_set(root, species, train=3, test=2, **settings)

    def short(cls, **changes):
        return small(cls, **changes | dict(epochs=1, workers=0, batch_size=24, head="probe", precision="no"))

    caches = [value for module in GRIDS for value in vars(module).values() if hasattr(value, "cache_clear")]
    with pytest.MonkeyPatch.context() as patch:
        for module in (runs, *GRIDS):
            if hasattr(module, "fieldguide_set"):
                patch.setattr(module, "fieldguide_set", few)
            if hasattr(module, "lite0"):
                patch.setattr(module, "lite0", partial(
                    timm.create_model, "tf_efficientnet_lite0", pretrained_cfg_overlay=dict(input_size=(3, 96, 96))))
        patch.setattr("loupe_core.start.probe.STRENGTHS", (0.1,))  # of four; some answers must be right
        patch.setattr(runs, "KEPT", folder / "kept")
        patch.setattr(runs, "ROOT", folder)
        patch.setattr(grids("gap"), "ROOT", folder)
        patch.setattr(Recipe, "small", classmethod(short))
        for name in ("first", "photographs", "beyond"):
            patch.setattr(grids(name), "Recipe", QuickRecipe)
        patch.setattr(grids("start"), "_FIRST", grids("start")._FIRST | dict(epochs=1, workers=0))
        patch.setattr(grids("start"), "MOST", 12)
        patch.setattr(grids("dynamics"), "BIRDS", 20)
        patch.setattr(grids("beyond"), "load_cells", lambda: (cells, np.tile([0, 1, 1 / 3, 1], 12), np.repeat(
            ["mono", "poly"], 24)))
        patch.setattr(grids("beyond"), "BLOCKS", 12 * (4,))
        patch.setattr(grids("beyond"), "PIXELS", 64)
        patch.setattr(grids("scorecard"), "SPECIES", grids("scorecard").SPECIES[:4])
        patch.setattr(grids("pretraining"), "COUNTS", (60, 20))
        patch.setattr(grids("second_look"), "DRAWN_EACH", dict(val=1, test=1))
        patch.setattr(record_results, "keep_masks", lambda *args: None)
        patch.setenv("LOUPE_CUB_ROOT", str(photographs))
        patch.setenv("LOUPE_PHOTOGRAPHS", str(write_folder(folder / "sets" / "heliconius").parent))
        for cache in caches:
            cache.cache_clear()
        yield folder
    for cache in caches:
        cache.cache_clear()


def grids(name):
    return importlib.import_module(f"grids_{name}")


class QuickRecipe(Recipe):
    """The recipe that a grid writes out, with one epoch."""

    def __init__(self, **choices):
        super().__init__(**choices | dict(epochs=1, workers=0, precision="no"))


@pytest.mark.parametrize("grid", record_results.GRIDS)
def test_a_row_of_a_grid_is_measured_on_the_card(grid, tiny, card):
    file = ROOT / "data" / "results" / f"{grid}.csv"
    columns = next(csv.reader(file.open(encoding="utf-8"))) if file.exists() else []
    assert columns or grid in record_results.RECORDING
    for choice in NEEDS.get(grid, []):
        record_results.run_row("other_photographs", choice | dict(images=""))
    for choice in ROWS[grid]:
        row = record_results.run_row(grid, choice)
        assert set(columns) <= set(row), set(columns) - set(row)
        assert row["machine"].endswith(", Emulated Card")
        assert not any(isinstance(value, torch.Tensor) for value in row.values())


def test_a_training_from_the_card_is_read_where_there_is_none(tiny):
    with emulated.card():
        for _ in range(2):  # trained, and read again
            assert device_of(runs.trained("residual", 1)[0]).type == "cuda"
        model, outcome, _ = runs.trained("residual", 1)
        assert outcome["machine"].endswith("Emulated Card")
        kept = runs.KEPT / "residual-1.pt"
        stored = torch.load(kept)
        assert {value.device.type for value in stored["weights"].values()} == {"cpu"}
        torch.save(stored | dict(weights=model.state_dict()), kept)  # as it was kept until November 2026
    assert device_of(runs.trained("residual", 1)[0]).type == "cpu"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    with rehearsed(tmp_path_factory.mktemp("paper")) as setting:
        yield setting


@pytest.mark.parametrize("arm", {run.arm: run for run in plan("all")})
def test_an_arm_of_the_papers_experiment_runs_on_the_card(arm, rehearsal, card):
    if arm not in ("loupe", "authors loupe") and not os.environ.get("LOUPE_SLOW"):
        pytest.skip("set LOUPE_SLOW=1: every arm, two minutes in all")
    row = perform(next(run for run in plan("all") if run.arm == arm), rehearsal)
    assert row["card"] == "Emulated Card" and row["precision"] == ("no" if "authors" in arm else "bf16")
