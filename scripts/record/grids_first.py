"""The runs of chapters 02 to 05, and those on real photographs."""

import os
import sys
from typing import Any

import numpy as np
import torch
from runs import NO_RANKS, fieldguide_sets, lite0, masks_of, part_ranks, run

from loupe_core import CUB200, LoupeModel, Recipe, Trainer
from loupe_lab.birds.fieldguide import species_of
from loupe_lab.evidence.baselines import baseline, put_after


def small_profile(arm: str, seed: int) -> tuple[dict, Trainer]:
    """Chapter 05's runs from random weights: 20 species of field-guide birds, `Recipe.small`.

    The same trainings from pretrained weights are the arms `bare` and `loupe` of the grid `ablations`.
    """
    species = species_of(5)
    torch.manual_seed(seed)
    model = LoupeModel("swin_micro", num_classes=len(species), pretrained=False,
                       site=() if "bare" in arm else "stage2")
    outcome, trainer, _ = run(model, fieldguide_sets(species, seed, 30, 20), Recipe.small(seed=seed))
    return outcome, trainer


GROUPS = {"crown": ["Marrel", "Tindle"], "bill": ["Corvane", "Pellith"], "wing": ["Ossary", "Quillon"]}


def attention(part: str, arm: str, seed: int) -> tuple[dict, Trainer]:
    """Chapter 02's runs: eight species in two groups that differ in one part only; baselines of the gate's size."""
    species = species_of(GROUPS[part])
    torch.manual_seed(seed)
    model = LoupeModel("swin_micro", num_classes=len(species), site="stage2" if arm == "loupe" else ())
    if arm in ("se", "cbam"):
        size = LoupeModel("swin_micro", num_classes=len(species)).gate_parameters()
        put_after(model, baseline(arm, 64, size))
    outcome, trainer, test = run(model, fieldguide_sets(species, seed, 60, 50), Recipe.small(seed=seed))
    marks = arm in ("loupe", "cbam")
    return outcome | (part_ranks(masks_of(model, test), test) if marks else NO_RANKS), trainer


def small_gate(norm: str, lam: float, site: str, form: str, gate: str, seed: int) -> tuple[dict, Trainer]:
    """The small profile with one change. For the convolution after stage 2 in the form "multiply", the masks of every
    25th test image are kept at seed 0."""
    species = species_of(5)
    torch.manual_seed(seed)
    model = LoupeModel("swin_micro", num_classes=len(species), site=site, form=form)
    where = model.gates[site.replace(".", "_")]
    if gate == "self-attention":
        where.loupe = baseline("self-attention", where.site.channels, model.gate_parameters())
    recipe = Recipe.small(seed=seed, lam=lam, norm=norm)
    outcome, trainer, test = run(model, fieldguide_sets(species, seed, 30, 20), recipe)
    masks = masks_of(model, test)
    if seed == 0 and (site, form, gate) == ("stage2", "multiply", "convolution"):
        outcome["masks"] = {int(test.image_ids[i]): masks[i].round(4).tolist() for i in range(0, len(test), 25)}
    spread = float(np.mean([mask.std() for mask in masks]))
    return outcome | dict(mask_sd=round(spread, 4)) | part_ranks(masks, test), trainer


def changed(**change: Any) -> list[dict]:
    """The choices of `small_gate` for the small profile with `change`, seeds 0 to 2."""
    default = dict(norm="l1", lam=0.05, site="stage2", form="multiply", gate="convolution")
    return [default | change | dict(seed=seed) for seed in range(3)]


def photographs(arm: str, seed: int) -> tuple[dict, Trainer]:
    """Real photographs: the first 10 species of CUB in LOUPE_CUB_ROOT, official split, gate at stride 8 of Lite0.

    With 30 images per species there is no validation split: a fixed number of epochs, and the last one counts.
    """
    root = os.environ.get("LOUPE_CUB_ROOT") or sys.exit("photographs: set LOUPE_CUB_ROOT to a folder CUB_200_2011")
    names = CUB200(root).class_names[:10]
    torch.manual_seed(seed)
    site = () if arm == "bare" else "stage2"
    model = LoupeModel(lite0(), num_classes=10, class_names=names, form="residual", site=site)
    recipe = Recipe(optimizer="adamw", lr=1e-3, backbone_lr_factor=0.1, epochs=12, batch_size=32, augment="crop",
                    crop_min=0.5, label_smoothing=0.1, freeze_batchnorm=True, seed=seed)

    def sets(split, transform):
        if split == "val":
            return None
        return CUB200(root, split, val_fraction=0, classes=names, cache=True, transform=transform)

    outcome, trainer, _ = run(model, sets, recipe)
    return outcome, trainer


GRIDS = {
    "attention": (attention, [dict(part=part, arm=arm, seed=seed) for seed in range(5) for part in GROUPS
                              for arm in ("bare", "se", "cbam", "loupe")]),
    "lambda": (small_gate, [row for lam in (0, 0.01, 0.05, 0.5, 5) for row in changed(lam=lam)]
               + [row for lam in (0.5, 5) for row in changed(lam=lam, norm="l2")]),
    "sites": (small_gate, [row for change in (
        dict(site="stage1"), dict(site="stage3"), dict(site="stage4"), dict(site="stage3.inside"),
        dict(form="mix"), dict(form="residual"), dict(gate="self-attention")) for row in changed(**change)]),
    "photographs": (photographs, [dict(arm=arm, seed=seed) for arm in ("loupe", "bare") for seed in range(3)]),
    "small_profile": (small_profile, [dict(arm=arm, seed=seed) for seed in range(5)
                                      for arm in ("loupe, random weights", "bare, random weights")]),
}
