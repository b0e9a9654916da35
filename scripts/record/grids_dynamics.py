"""Chapter 09's runs: a mask from step 0 on, how alike the masks of two seeds are, and trainings whose gradient takes
another way."""

from contextlib import suppress
from functools import cache, lru_cache

import numpy as np
import torch
from runs import ARMS, SMALL, build, fieldguide_sets, images_of, masks_of, part_ranks, provenance, run, trained
from scipy.stats import rankdata
from torch.utils.data import Subset

from loupe_core import Recipe, Trainer, peak, transforms_for
from loupe_lab.evidence.routing import gradient_terms, intervene, shares
from loupe_lab.evidence.scorecard import on_object

STEPS = 17  # an epoch of the small profile
EARLY = (0, 1, 2, 5, 10)  # steps that are measured within the first epoch
WATCHED = dict.fromkeys(("loupe", "lambda 0", "lambda 5", "residual"), 12)  # arm -> epochs that are watched
BIRDS = 100  # every fourth test image: five of each species


def routing(kind: str, seed: int) -> tuple[dict, Trainer | None]:
    """A training of the paper's gate under an intervention on its gradient: accuracy, and what its mask looks like."""
    if kind == "none":  # the training that the other grids measure as well
        model, outcome, test = trained("loupe", seed)
        outcome = {k: v for k, v in outcome.items() if k != "training_seconds"}
        return outcome | looks(model, test), None
    model = build("loupe", seed)
    with intervene(model, kind, seed):
        outcome, trainer, test = run(model, fieldguide_sets(SMALL, seed, 30, 20), Recipe.small(seed=seed))
    return outcome | provenance(trainer) | looks(model.eval(), test), None


def looks(model, test) -> dict:
    masks = np.stack(masks_of(model, test))
    return dict(mask_sd=round(float(masks.std((1, 2)).mean()), 4), **part_ranks(masks, test))


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two sets of masks (N, h, w) over the cells of an image, mean over images."""
    return correlation(*(rankdata(masks.reshape(len(masks), -1), axis=1).reshape(masks.shape) for masks in (a, b)))


def describe(masks: np.ndarray) -> dict:
    """What masks (N, h, w) look like: mean over them.

    sd: within an image; entropy: of the mask as a distribution over cells, 1 where it is even; low: share of cells
    below 0.01; smooth: correlation of a cell with the next one in its row, 0 for independent cells, without the outer
    ring of cells, where the convolution's zero padding shows; ring: mean of that ring over the mean of the rest.
    """
    p = masks.reshape(len(masks), -1).astype(float)
    p = p / p.sum(1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1) / np.log(p.shape[1])
    inside = masks[:, 1:-1, 1:-1]
    rest = inside.mean((1, 2))
    ring = (masks.sum((1, 2)) - inside.sum((1, 2))) / (masks[0].size - inside[0].size)
    return dict(mean=masks.mean(), sd=masks.std((1, 2)).mean(), entropy=entropy.mean(), low=(masks < 0.01).mean(),
                smooth=correlation(inside[:, :, :-1], inside[:, :, 1:]), ring=np.mean(ring / rest))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's over the cells of an image: mean over the images (N, h, w) whose maps are not even, nan without one."""
    x, y = (part.reshape(len(part), -1) - part.mean((1, 2))[:, None] for part in (a, b))
    product, below = (x * y).sum(1), np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return float(np.mean(product[below > 0] / below[below > 0])) if below.any() else float("nan")


class Enough(Exception):
    """All epochs that are to be watched have been."""


class Watched(Trainer):
    """A Trainer that looks at the model, in the same birds, in the `EARLY` steps and after every epoch, and stops after
    some epochs of its recipe's. It draws no random number of its own, so it trains as any other."""

    def __init__(self, *args, birds, epochs: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.birds, self.watched_epochs, self.moments, self.losses = birds, epochs, {}, []
        self.loss.register_forward_hook(self.step)  # called in training only, before the step's update

    def step(self, module, inputs, terms):
        if len(self.losses) in EARLY:
            self.look()
        self.losses.append(terms.classification.item())

    def _end_epoch(self, model, row):
        super()._end_epoch(model, row)
        self.look()["val_accuracy"] = row["val_accuracy"]
        if row["epoch"] == self.watched_epochs:
            raise Enough

    def look(self) -> dict:
        images, labels = self.birds
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            logits, masks = self.model(images, return_mask=True)
        terms = gradient_terms(self.model, images[::5], labels[::5], self.recipe.lam)
        self.model.train(training)
        found = dict(masks=masks[:, 0].float().numpy(), right=float((logits.argmax(1) == labels).float().mean()),
                     **{f"grad_{name}": value for name, value in shares(terms).items()})
        self.moments[len(self.losses)] = found
        return found


@lru_cache(maxsize=1)
def watched(arm: str, seed: int) -> dict[int, dict]:
    """A training, at each moment. The last mask, to compare with, is that of the same training's best epoch."""
    model = build(arm, seed)
    recipe = Recipe.small(seed=seed, patience=99, **ARMS[arm].get("recipe", {}))
    sets = fieldguide_sets(SMALL, seed, 30, 20)
    train = sets("train", transforms_for(model.data_config, **recipe.train_transform_options()))
    val, test = (sets(split, transforms_for(model.data_config, train=False)) for split in ("val", "test"))
    chosen = range(0, len(test), len(test) // BIRDS)
    birds, surfaces = images_of(Subset(test, chosen)), [(test[i].geometry, test.segmentation(i)) for i in chosen]
    covers = np.stack([on_object(bird, geometry, (14, 14)).astype(float) for geometry, bird in surfaces])
    trainer = Watched(model, train, val, recipe, progress=False, birds=birds, epochs=WATCHED[arm])
    with suppress(Enough):
        trainer.fit()
    last, rows = np.stack(masks_of(trained(arm, seed)[0], Subset(test, chosen))), {}
    for step, found in trainer.moments.items():
        masks = found.pop("masks")
        begun = STEPS * ((step - 1) // STEPS) if step else 0  # the start of the epoch
        row = describe(masks) | found
        trainer.moments[step]["kept"] = masks
        row["stability"] = alike(masks, trainer.moments[begun]["kept"]) if step else np.nan
        row["with_first"] = alike(masks, trainer.moments[0]["kept"])
        row["with_last"] = alike(masks, last)
        row["other_bird"] = alike(masks, np.roll(last, BIRDS // 2, 0))  # the control: the last mask of another bird
        row["on_bird"] = np.mean([bird[int(y), int(x)] for (geometry, bird), mask in zip(surfaces, masks)
                                  for x, y in [peak(mask, geometry)]])
        row["shape"] = correlation(masks, covers)  # with the bird's outline
        row["bird_share"] = covers.mean()  # what a random peak would hit
        losses = trainer.losses[begun:step]
        row["loss"] = np.mean(losses) if losses else np.nan
        # the largest loss of a step over the median of the nine before it, this epoch
        jumps = [trainer.losses[i] / np.median(trainer.losses[i - 9:i]) for i in range(max(begun, 9), step)]
        row["jump"] = max(jumps) if jumps else np.nan
        rows[step] = {k: "" if np.isnan(v) else round(float(v), 5) for k, v in row.items()}
        rows[step].setdefault("val_accuracy", "")
        rows[step] |= provenance(trainer)
    return rows


def dynamics(arm: str, seed: int, step: int) -> tuple[dict, None]:
    """What a training looks like after `step` updates."""
    return watched(arm, seed)[step], None


@cache
def last_masks(arm: str, seed: int) -> np.ndarray:
    model, _, test = trained(arm, seed)
    return np.stack(masks_of(model, test))


def agreement(arm: str, seed: int, other: int) -> tuple[dict, None]:
    """How alike the trained masks of two seeds are: on the same bird, and, as the control, on another species."""
    a, b = last_masks(arm, seed), last_masks(arm, other)
    outcome = dict(same_bird=alike(a, b), other_bird=alike(a, np.roll(b, len(b) // 2, 0)))
    return {k: round(v, 4) for k, v in outcome.items()} | provenance(), None


ALIKE = {"loupe": 5, "lambda 0": 3, "lambda 5": 3, "residual": 3}  # arm -> seeds
ROUTED = {"frozen": 5, "detached": 5, "shuffled": 5, "none": 5, "even": 3, "blocks": 3}  # kind -> seeds
GRIDS = {
    "routing": (routing, [dict(kind=kind, seed=seed) for kind, seeds in ROUTED.items() for seed in range(seeds)]),
    "dynamics": (dynamics, [dict(arm=arm, seed=seed, step=step) for arm, epochs in WATCHED.items() for seed in range(3)
                            for step in (*EARLY, *(STEPS * k for k in range(1, epochs + 1)))]),
    "agreement": (agreement, [dict(arm=arm, seed=seed, other=other) for arm, seeds in ALIKE.items()
                              for other in range(seeds) for seed in range(other)]),
}
