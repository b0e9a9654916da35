"""Chapter 12's runs: cheap changes of the recipe, the remedies of chapter 07 tuned in the same way, and the gates of
multi-scale models one by one."""

import csv
import time
from contextlib import ExitStack
from functools import lru_cache

import numpy as np
import timm
import torch
from runs import ARMS, RESULTS, ROOT, SMALL, Sets, build, fieldguide_sets, images_of, part_ranks, run, trained

from loupe_core import CUB200, LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.start.devices import device_of
from loupe_lab.birds.fieldguide import fieldguide_set
from loupe_lab.evidence.audit import relative_change
from loupe_lab.evidence.masks import mean, replace_mask
from loupe_lab.evidence.results import pack_right


def judged(model: LoupeModel, outcome: dict, sets: Sets, recipe: Recipe) -> tuple[dict, Trainer]:
    """What a row keeps of a trained model: which test images it classified correctly, and its validation loss
    (cross-entropy alone)."""
    val = sets("val", transforms_for(model.data_config, train=False))
    trainer = Trainer(model, recipe, progress=False)
    found = trainer.evaluate(val)
    loss = -np.log(found.probabilities[np.arange(len(found.labels)), found.labels].clip(1e-12)).mean()
    kept = {name: outcome[name] for name in ("accuracy", "mask_mean", "epochs")}
    return kept | dict(val_loss=round(float(loss), 4), val_accuracy=round(found.accuracy, 4),
                       training_seconds=outcome["training_seconds"], right=outcome["right"]), trainer


def train(model: LoupeModel, sets: Sets, recipe: Recipe) -> tuple[dict, Trainer]:
    """A training and its row, see `judged`."""
    began = time.perf_counter()
    outcome, _, _ = run(model, sets, recipe)
    return judged(model, outcome | dict(training_seconds=round(time.perf_counter() - began, 1)), sets, recipe)


# Each change alone; "as it is" is the small profile. For the sizes one set of birds is drawn, at 144 px, and shown at
# three: the photographs have the same detail, and the network sees more or less of it.
CHANGES = {"as it is": {}, "144 shown at 80": dict(shown=80), "144 shown at 112": dict(shown=112),
           "144 shown at 144": dict(shown=144), "label smoothing": dict(recipe=dict(label_smoothing=0.1)),
           "24 epochs": dict(recipe=dict(epochs=24))}


def gap(arm: str, change: str, seed: int) -> tuple[dict, Trainer]:
    """The small profile, bare or with the paper's gate, with one cheap change.

    At another image size the pretrained weights stay; windows grow or shrink with the image, their position tables are
    interpolated (timm's `set_input_size`).
    """
    what = CHANGES[change]
    recipe = Recipe.small(seed=seed, **what.get("recipe", {}))
    if change == "as it is":
        model, outcome, _ = trained(arm, seed)
        return judged(model, outcome, fieldguide_sets(SMALL, seed, 30, 20), recipe)
    torch.manual_seed(seed)
    backbone = timm.create_model("swin_micro", pretrained=True, num_classes=len(SMALL))
    if what.get("shown", 112) != 112:
        backbone.set_input_size((what["shown"], what["shown"]))
    model = LoupeModel(backbone, num_classes=len(SMALL), **ARMS[arm].get("model", {}))
    sets = fieldguide_sets(SMALL, seed, 30, 20)
    if "shown" in what:
        root = fieldguide_set(ROOT / "data", SMALL, train=30, test=20, size=144)
        sets = lambda split, transform: CUB200(root, split, seed=seed, cache=True, transform=transform)  # noqa: E731
    return train(model, sets, recipe)


RATES = ("0.0003", "0.0001", "0.001")
REMEDIES = ("bare", "loupe", "residual", "stage3.inside", "mix")


def best_rate(arm: str) -> float:
    """Of the learning rates that were tried with seed 0, the one with the lowest validation loss; no test image counts.

    Raises:
        SystemExit: not all rates are recorded.
    """
    with (RESULTS / "remedies.csv").open(newline="", encoding="utf-8") as file:
        found = {row["lr"]: float(row["val_loss"]) for row in csv.DictReader(file)
                 if row["arm"] == arm and row["seed"] == "0"}
    if set(found) != set(RATES):
        raise SystemExit(f"remedies: found {len(found)} of {len(RATES)} learning rates of {arm!r} in remedies.csv; "
                         "expected all of them: record the rows of seed 0 first")
    return float(min(found, key=found.get))


def remedies(arm: str, lr: str, seed: int) -> tuple[dict, Trainer]:
    """One training of a remedy at a learning rate, or at the one that the search of seed 0 chose ("chosen")."""
    rate = best_rate(arm) if lr == "chosen" else float(lr)
    recipe = Recipe.small(seed=seed, lr=rate)
    sets = fieldguide_sets(SMALL, seed, 30, 20)
    kept = {Recipe.small().lr: arm, 1e-4: "lion 1e-4" if arm == "loupe" else None}.get(rate)
    if kept:
        model, outcome, _ = trained(kept, seed)
        row, trainer = judged(model, outcome, sets, recipe)
    else:
        row, trainer = train(build(arm, seed), sets, recipe)
    return dict(rate=rate) | row, trainer


@lru_cache(1)
def opened(arm: str, seed: int) -> tuple:
    """A trained model, its test set with images and labels, its logits, and the masks `(N, h, w)` of each gate."""
    model, _, test = trained(arm, seed)
    images, labels = images_of(test)
    with torch.no_grad():
        logits, masks = zip(*[model(batch.to(device_of(model)), return_mask=True) for batch in images.split(100)])
    masks = [masks] if model.one_mask else zip(*masks)
    masks = {name: torch.cat(parts)[:, 0].cpu() for name, parts in zip(model.gates, masks)}
    return model, test, images, labels, torch.cat(logits).cpu(), masks


def scales(arm: str, levelled: str, seed: int) -> tuple[dict, None]:
    """A trained model in which the mask of one gate, of all gates or of none is replaced by its mean in each image.

    moved: `relative_change` of the logits, mean over images. mask_mean, mask_sd and on_bird describe the mask that is
    replaced, where it is one.
    """
    model, test, images, labels, before, masks = opened(arm, seed)
    names = dict(nothing=[], all=list(model.gates)).get(levelled, [levelled])
    with ExitStack() as levelling:
        levelling.enter_context(torch.no_grad())
        for name in names:
            levelling.enter_context(replace_mask(model.gates[name], mean))
        after = before
        if names:
            after = torch.cat([model(batch.to(device_of(model))).cpu() for batch in images.split(100)])
    right = (after.argmax(1) == labels).numpy()
    looks = dict(mask_mean="", mask_sd="", on_bird="")
    if len(names) == 1:
        M = masks[names[0]]
        looks = dict(mask_mean=round(M.mean().item(), 4), mask_sd=round(M.std((1, 2)).mean().item(), 4),
                     on_bird=part_ranks(list(M.numpy()), test)["on_bird"])
    moved = relative_change(after, before).mean().item()
    return dict(accuracy=round(float(right.mean()), 4), moved=round(moved, 4), **looks, right=pack_right(right)), None


GRIDS = {
    "gap": (gap, [dict(arm=arm, change=change, seed=seed) for seed in range(3) for change in CHANGES
                  for arm in ("bare", "loupe") if arm == "bare" or change in ("as it is", "label smoothing")]),
    "remedies": (remedies, [dict(arm=arm, lr=lr, seed=0) for lr in RATES for arm in REMEDIES]
                 + [dict(arm=arm, lr="chosen", seed=seed) for seed in range(1, 3) for arm in REMEDIES]),
    "scales": (scales, [dict(arm=arm, levelled=levelled, seed=seed) for seed in range(3) for arm, levels in (
        ("loupe", ("nothing", "stage2")), ("multi-scale", ("nothing", "stage1", "stage2", "stage3", "all")))
        for levelled in levels]),
}
