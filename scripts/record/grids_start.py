"""The search for the recipe of `Recipe.finetune`: which first rates suit a few hundred photographs.

Training images alone are cut into those that are learned from and those that count; no test image is opened.
"""

import os
import sys
from pathlib import Path

import torch
from runs import lite0
from vit_s import vit_s

from loupe_core import LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.datasets import open_set

BACKBONES = {"lite0": (lite0, 160), "vit_s": (lambda: vit_s(112), 112), "swin_micro": (lambda: "swin_micro", 112)}
SETS = ("cub10", "flowers17", "heliconius", "brain_mri")
MOST = 160  # images to learn from, and as many that count

_FIRST = dict(optimizer="adamw", lr=1e-3, lr_min=1e-6, backbone_lr_factor=0.1, layer_decay=0.75, lr_warmup_epochs=1.0,
              weight_decay=0.05, epochs=8, patience=8, batch_size=32, augment="crop", crop_min=0.5, head="probe",
              freeze_batchnorm=True, choose="accuracy")
CANDIDATES = {
    "backbone 1e-4": {},
    "backbone 3e-5": dict(backbone_lr_factor=0.03),
}


def finetune(arm: str, backbone: str, photographs: str, seed: int) -> tuple[dict, Trainer]:
    """One candidate: accuracy on what counts, of the linear probe, of the best and of the last epoch."""
    make, side = BACKBONES[backbone]
    data = open_set(_root(photographs), "train", val_fraction=0.4, seed=seed, cache=True)
    torch.manual_seed(seed)
    model = LoupeModel(make(), len(data.class_names), site="stage2", form="residual", img_size=side)
    recipe = Recipe(**_FIRST | CANDIDATES[arm] | dict(seed=seed))
    data.transform = transforms_for(model.data_config, **recipe.train_transform_options())
    val = data.with_split("val", transforms_for(model.data_config, train=False))
    for part in (data, val):
        names = part.identities()
        chosen = {names[k * len(names) // MOST] for k in range(MOST)}
        part.leave_out(set(names) - chosen)
    trainer = Trainer(model, recipe, progress=False)
    rows = trainer.fit(data, val)
    found = [round(row["val_accuracy"], 4) for row in rows]
    start = "" if trainer.start is None else round(trainer.start["val_accuracy"], 4)
    return dict(images=len(data), counted=len(val), probe=start, best=max([start or 0, *found]), last=found[-1],
                best_epoch=trainer.best["epoch"], epochs=" ".join(map(str, found))), trainer


def _root(photographs: str) -> Path:
    if photographs == "cub10":
        return Path(os.environ.get("LOUPE_CUB_ROOT") or sys.exit("finetune: set LOUPE_CUB_ROOT to CUB_200_2011"))
    root = os.environ.get("LOUPE_PHOTOGRAPHS") or sys.exit("finetune: set LOUPE_PHOTOGRAPHS to the folder of the sets")
    return Path(root) / photographs


GRIDS = {"finetune": (finetune, [dict(arm=arm, backbone=backbone, photographs=photographs, seed=0)
                                 for arm in CANDIDATES for backbone in BACKBONES for photographs in SETS])}
