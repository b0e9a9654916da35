"""The main evidence: real photographs under real pretrained weights, and a positive control beside every gate.

An oracle arm is given the answer, in training and test: as its mask, through the site and the form of the paper's
gate, or as a crop of the photograph. Where one wins, a gate could have won; where none does, there was nothing to gain.

All arms of a set share recipe, epochs, splits and, seed by seed, the order of the images and their augmentation (but
for the crops, whose photographs are others). A fifth of the training photographs, cut by the seed, chooses the epoch;
the test split is opened once, at the end. A fifth is few, 60 of cub10, and the choice is noisy: so the weights of the
last epoch, which nobody chose, answer then as well.

The classifier begins as a linear probe on the features as the arm gives them, gated ones where there is a gate. So each
arm begins with the best classifier for what it has, and what its gate costs at the start is the difference of its
`probe` to that of the bare arm.
"""

import os
import sys
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
import runs
import torch
from runs import lite0
from torch import nn
from torch.utils.data import Dataset
from vit_s import vit_s

from loupe_core import CUB200, LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.datasets import open_set
from loupe_core.files.atomic import replaced
from loupe_core.look.boxes import Rule
from loupe_core.look.cut import Cut, Told
from loupe_core.look.training import Magnified
from loupe_lab.evidence.baselines import control
from loupe_lab.evidence.oracle import Painted, in_box, in_centre, on_parts, on_wings, tell, wings_box
from loupe_lab.evidence.results import pack_right
from loupe_lab.paper.arms import ARMS

# grids whose rows are not all there yet
RECORDING = {"cub10_few", "other_photographs"}

BACKBONES = {"lite0": lambda pixels: lite0(), "vit_s": vit_s}
PIXELS = {"lite0": 192, "vit_s": 112}  # a side: the largest with which a run on cub10 takes three minutes on one core
EPOCHS = {"": 8, 60: 8, 20: 8, 10: 16, 5: 32}  # by training photographs per class: 64 steps in all, 88 for flowers17
# Of the larger sets a training takes so many photographs per class: about as many in all as of cub10.
FEWER = {"heliconius": 20, "flowers17": 20, "brain_mri": 60}
KEEP = {"cub10": {"lite0": range(5), "vit_s": range(3)}, "heliconius": {"lite0": range(3)},
        "flowers17": {"lite0": range(5)}}  # seeds of kept weights

# An arm changes the model (`model`), its mask (`control`; `bias` of the last convolution; `mask`: region, and value
# outside), the recipe, or the photographs (`cut`; `shown`: the rule by which a training also shows parts of them).
# Those that name no form multiply, as the paper's gate does.
#
# The paper's start, M near 0.5, halves the features, which the kept statistics of Lite0's BatchNorm do not expect: on
# cub10's validation photographs the probe falls from 0.88 to 0.25, with another seed from 0.83 to 0.77. So the gates to
# be compared with controls are those that begin as the identity, "residual" and "near one", and most controls have the
# form "residual"; "multiply" and its constant mask stay, as the paper has them.
CHANGES: dict[str, dict] = {
    "bare": ARMS["bare"],
    "multiply": ARMS["loupe"],
    "near one": dict(bias=4.0),  # M is 0.98 at the start
    "residual": ARMS["residual"],
    "mix": ARMS["mix"],
    "multiply, constant": ARMS["constant"],
    **{f"residual, {kind}": ARMS["residual"] | ARMS[kind] for kind in ("constant", "random", "cbam")},
    **{f"residual, lambda {lam:g}": ARMS["residual"] | dict(recipe=dict(lam=lam)) for lam in (0, 0.5, 5)},
    **{f"multiply, {site}": ARMS[site] for site in ("stage1", "stage3")},
    "oracle box": dict(mask=(in_box, 0.3)),
    "oracle box, 0 outside": dict(mask=(in_box, 0.0)),
    "oracle parts": dict(mask=(on_parts, 0.3)),
    "oracle wings": dict(mask=(on_wings, 0.3)),
    "centre box": dict(mask=(in_centre, 0.3)),  # the oracle's placebo
    "oracle crop": ARMS["bare"] | dict(cut=Cut),
    "oracle crop to the wings": ARMS["bare"] | dict(cut=partial(Cut, box=wings_box)),
    # Trained on crops as well as whole photographs: of the places where the mask is high, and, without a gate, of those
    # where the features are long, and of random ones of the same size.
    "residual, on its crops": ARMS["residual"] | dict(shown=Rule()),
    "bare, on its crops": ARMS["bare"] | dict(shown=Rule(source="norm")),
    "bare, on random crops": ARMS["bare"] | dict(shown=Rule(source="norm", place="random")),
}

# In the 64 steps of these trainings no gate learns at the rate of the other new layers: a residual mask ends within
# 0.005 of the half with which it began. So each gate has a fast twin, at thirty times that rate, whose mask moves; what
# is said of learned gates rests on these.
FAST = dict(gate_lr_factor=30.0)
CHANGES |= {f"{arm}, fast": change | dict(recipe=change.get("recipe", {}) | FAST) for arm, change in CHANGES.items()
            if not arm.startswith(("bare", "oracle", "centre"))}


def photograph(photographs: str, backbone: str, pixels: int, arm: str, images: int | str,
               seed: int) -> tuple[dict, Trainer]:
    """One training.

    Args:
        photographs: "cub10", the first ten species of the folder in LOUPE_CUB_ROOT, or a folder in LOUPE_PHOTOGRAPHS.
        backbone, arm: keys of `BACKBONES` and `CHANGES`.
        pixels: a side of the images.
        images: Training photographs per class, drawn by the seed; "" for all. Validation keeps its own.
        seed: Of the cut between training and validation, the gate, dropout, and the order and crops of the images.

    Returns:
        The row, and the trainer. Of the chosen epoch: accuracy, right (`pack_right`) and mask_mean on the test split;
        train_accuracy, on the training photographs as the test shows them; val_accuracy; best_epoch, 0 for the linear
        probe, whose val_accuracy is `probe`. Of the last one: the first four, as last_accuracy and so on. epochs and
        test_images.
    """
    split_of = sets(photographs, arm, images, seed)
    model = build(backbone, pixels, arm, seed, split_of("train").class_names)
    recipe = Recipe.finetune(epochs=EPOCHS[images], patience=EPOCHS[images], seed=seed,
                             **CHANGES[arm].get("recipe", {}))
    plain = transforms_for(model.data_config, train=False)
    trainer, last = Trainer(model, recipe, progress=False), {}
    train = split_of("train", transforms_for(model.data_config, **recipe.train_transform_options()))
    if "shown" in CHANGES[arm]:
        train = Magnified(train, model, CHANGES[arm]["shown"], progress=False)
    epochs = len(trainer.fit(train, split_of("val", plain), on_epoch_end=lambda row: last.update(weights_of(model))))
    outcome = dict(val_accuracy=round(trainer.best["val_accuracy"], 4), probe=round(trainer.start["val_accuracy"], 4),
                   epochs=epochs, best_epoch=trainer.best["epoch"])
    chosen, seen, test = weights_of(model), split_of("train", plain), split_of("test", plain)
    for weights, which in ((last, "last_"), (chosen, "")):
        model.load_state_dict(weights)
        learned, told = trainer.evaluate(seen), trainer.evaluate(test)
        found = dict(accuracy=told.accuracy, train_accuracy=learned.accuracy, mask_mean=told.mask_mean)
        outcome |= {which + name: round(value, 4) for name, value in found.items()}
        outcome[f"{which}right"] = pack_right(told.predictions == told.labels)
    if images == FEWER.get(photographs, "") and seed in KEEP.get(photographs, {}).get(backbone, ()):
        file = kept_file(photographs, backbone, pixels, arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as unfinished:
            torch.save(chosen, unfinished)
    return outcome | dict(test_images=len(test)), trainer


def weights_of(model: LoupeModel) -> dict[str, torch.Tensor]:
    """A copy of a model's state, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def sets(photographs: str, arm: str, images: int | str = "", seed: int = 0) -> Callable[..., Dataset]:
    """(split, transform=None) -> a split of a set as an arm sees it; without a transform, the photographs themselves.

    For the arguments see `photograph`.
    """
    change, root = CHANGES[arm], folder(photographs)
    classes = CUB200(root).class_names[:10] if photographs == "cub10" else None
    train = open_set(root, "train", val_fraction=0.2, seed=seed, classes=classes, cache=True)
    found = dict(train=train) | {split: train.with_split(split) for split in ("val", "test")}
    if images:
        draws, names = np.random.default_rng(seed), np.array(train.identities())
        drawn = [draws.permutation(names[train.labels == label])[:images] for label in range(len(train.class_names))]
        train.leave_out(set(names) - set(np.concatenate(drawn)))

    def split_of(split: str, transform: Callable | None = None) -> Dataset:
        part = copy(found[split])
        if transform is None or not {"mask", "cut"} & change.keys():
            part.transform = transform
            return part
        return Told(part, Painted(transform, *change["mask"]) if "mask" in change else change["cut"](transform))

    return split_of


def build(backbone: str, pixels: int, arm: str, seed: int, class_names: list[str]) -> LoupeModel:
    """The model of an arm before its training."""
    torch.manual_seed(seed)
    change = CHANGES[arm]
    model = LoupeModel(BACKBONES[backbone](pixels), len(class_names), class_names=class_names, img_size=pixels,
                       **change.get("model", {}))
    for gate in model.gates.values():
        if "control" in change:
            gate.loupe = control(change["control"], gate.site.channels)
        if "bias" in change:
            nn.init.constant_(gate.loupe.conv1x1.bias, change["bias"])
    return tell(model) if "mask" in change else model


def kept_file(photographs: str, backbone: str, pixels: int, arm: str, seed: int) -> Path:
    """Where a recorded training of `KEEP` has left its weights: below data/runs, which git ignores."""
    return runs.KEPT / "photographs" / f"{photographs}-{backbone}-{pixels}-{arm}-{seed}.pt".replace(" ", "-")


def kept(photographs: str, backbone: str, pixels: int, arm: str, seed: int) -> tuple[LoupeModel, Dataset]:
    """The model of a recorded training, in eval mode on the CPU, and the test photographs as it sees them."""
    file = kept_file(photographs, backbone, pixels, arm, seed)
    if not file.exists():
        sys.exit(f"{file}: found no weights; record its row on this machine, or take those of the one that did")
    split_of = sets(photographs, arm, seed=seed)
    model = build(backbone, pixels, arm, seed, split_of("test").class_names)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval(), split_of("test", transforms_for(model.data_config, train=False))


def folder(photographs: str) -> Path:
    """The folder of a set; ends the program with one line where none is told, or it is not there."""
    variable = "LOUPE_CUB_ROOT" if photographs == "cub10" else "LOUPE_PHOTOGRAPHS"
    wanted = "the folder CUB_200_2011" if photographs == "cub10" else f"a folder that holds the folder {photographs}"
    told = os.environ.get(variable)
    root = Path(told or "") / ("" if photographs == "cub10" else photographs)
    if not told or not root.is_dir():
        sys.exit(f"{photographs}: {f'found no folder {root}' if told else f'{variable} is not set'}; set {variable} to "
                 f"{wanted}")
    return root


def rows(photographs: str, arms: list[str], seeds: int, backbone: str = "lite0", pixels: int | None = None,
         images: int | str = "") -> list[dict]:
    """The choices of `photograph`, seed by seed, so that what is there at any time can be compared."""
    return [dict(photographs=photographs, backbone=backbone, pixels=pixels or PIXELS[backbone], arm=arm, images=images,
                 seed=seed) for seed in range(seeds) for arm in arms]


CROPS = ["residual, on its crops, fast", "bare, on its crops", "bare, on random crops"]
GATES = ["residual, fast", "residual, constant, fast", "near one, fast", "multiply, fast"]
# Set -> arms of its own. The pairs that second looks need, bare and residual, are recorded first.
OTHERS = {"heliconius": ["oracle wings", "oracle crop to the wings", "residual, lambda 0, fast"], "flowers17": [],
          "brain_mri": []}
PAIR = ["bare", "residual, fast"]
FIVE = {"flowers17": 5}  # seeds of the pair: on the first three a second look won, and a gain needs five
GRIDS = {
    "cub10_lite0": (photograph, [
        *rows("cub10", ["bare", "residual", "residual, constant", "near one", "multiply", "oracle box", "oracle crop"],
              5),
        *rows("cub10", ["oracle parts", "oracle box, 0 outside", "centre box"], 5)]),
    "cub10_gates": (photograph, [
        *rows("cub10", GATES, 5),
        *rows("cub10", [f"residual, {change}, fast" for change in ("lambda 0", "lambda 0.5", "lambda 5")], 5),
        *rows("cub10", ["residual, random, fast", "residual, cbam, fast", "mix, fast"], 5)]),
    "cub10_vit_s": (photograph, rows("cub10", [
        "bare", "multiply, fast", "residual, fast", "oracle box", "oracle crop", "oracle box, 0 outside",
        "multiply, stage1, fast", "multiply, stage3, fast"], 3, "vit_s")),
    "other_photographs": (photograph, [row for first in (True, False) for name, more in OTHERS.items() for row in rows(
        name, PAIR if first else ["residual, constant, fast", "multiply, fast", *more],
        FIVE.get(name, 3) if first else 3,
        pixels=PIXELS["lite0"] if name == "heliconius" else 160, images=FEWER[name])]),
    "cub10_few": (photograph, [row for images in (5, 10) for row in rows(
        "cub10", ["bare", "residual, fast", "residual, lambda 0, fast"], 5, images=images)]),
    "cub10_crops": (photograph, rows("cub10", CROPS, 5)),
}
