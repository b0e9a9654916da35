"""Chapter 09's runs: masks during a training, the agreement of the masks of two seeds, and trainings in which the
gradient at the features is changed."""

from functools import cache, lru_cache

import numpy as np
import torch
from runs import ARMS, SMALL, build, fieldguide_sets, images_of, masks_of, part_ranks, provenance, run, trained
from torch import nn
from torch.utils.data import Dataset, Subset

from loupe_core import LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.loss import LossTerms
from loupe_core.start.devices import device_of
from loupe_lab.evidence.masks import border_ring, correlation, rank_correlation
from loupe_lab.evidence.routing import gradient_terms, intervene, shares
from loupe_lab.evidence.scorecard import on_object, peak_on

STEPS = 17  # per epoch of the small profile
EARLY = (0, 1, 2, 5, 10)  # numbers of updates after which is measured, within the first epoch
WATCHED = dict.fromkeys(("loupe", "lambda 0", "lambda 5", "residual"), 12)  # arm -> epochs that are watched
BIRDS = 100  # every fourth test image: five of each species
COLUMNS = dict(direct="grad_beside", via_mask="grad_through")  # as `dynamics.csv` calls two of the `shares`


def routing(kind: str, seed: int) -> tuple[dict, Trainer | None]:
    """A training of the paper's gate under an intervention, see `intervene`: accuracy, and statistics of its mask."""
    if kind == "none":  # the training that the other grids measure as well
        model, outcome, test = trained("loupe", seed)
        outcome = {k: v for k, v in outcome.items() if k != "training_seconds"}
        return outcome | looks(model, test), None
    model = build("loupe", seed)
    with intervene(model, kind, seed):
        outcome, trainer, test = run(model, fieldguide_sets(SMALL, seed, 30, 20), Recipe.small(seed=seed))
    return outcome | provenance(trainer) | looks(model.eval(), test), None


def looks(model: LoupeModel, test: Dataset) -> dict:
    """mask_sd: the mask's deviation within an image, mean over images; and `part_ranks`."""
    masks = np.stack(masks_of(model, test))
    return dict(mask_sd=round(float(masks.std((1, 2)).mean()), 4), **part_ranks(masks, test))


def mean_known(values: np.ndarray) -> float:
    """Mean of `(N,)` without the nans; nan where there is nothing else."""
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if len(known) else float("nan")


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """`rank_correlation` of two sets of masks `(N, h, w)`, mean over the images whose masks are not constant."""
    return mean_known(rank_correlation(a, b))


def describe(masks: np.ndarray) -> dict:
    """Statistics of masks `(N, h, w)`, means over them.

    mean: of all cells; sd: deviation within an image; entropy: of the mask as a distribution over its cells, over that
    of a constant one; low: fraction of cells below 0.01; smooth: correlation of a cell with the next one in its row, 0
    for independent cells, without the outer ring of cells, where the convolution's zero padding shows; ring: mean of
    that ring over the mean of the rest.
    """
    p = masks.reshape(len(masks), -1).astype(float)
    p = p / p.sum(1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1) / np.log(p.shape[1])
    inside, ring = masks[:, 1:-1, 1:-1], border_ring(*masks.shape[1:])
    return dict(mean=masks.mean(), sd=masks.std((1, 2)).mean(), entropy=entropy.mean(), low=(masks < 0.01).mean(),
                smooth=mean_known(correlation(inside[:, :, :-1], inside[:, :, 1:])),
                ring=np.mean(masks[:, ring].mean(1) / masks[:, ~ring].mean(1)))


class Watch:
    """Measures a model during its training, always on the same birds: in the `EARLY` steps and after every epoch.

    It draws no random numbers, so the training is the same as without it.

    Attributes:
        moments: number of updates -> what was measured then.
        losses: the classification loss of each step.
    """

    def __init__(self, trainer: Trainer, birds: tuple[torch.Tensor, torch.Tensor], epochs: int) -> None:
        self.trainer, self.birds, self.epochs = trainer, birds, epochs
        self.moments: dict[int, dict] = {}
        self.losses: list[float] = []
        trainer.loss.register_forward_hook(self.step)  # called in training only, before the step's update

    def step(self, module: nn.Module, inputs: tuple, terms: LossTerms) -> None:
        """The hook on the loss: measures in the `EARLY` steps, and keeps the classification loss."""
        if len(self.losses) in EARLY:
            self.measure()
        self.losses.append(terms.classification.item())

    def end_epoch(self, row: dict) -> bool:
        """For `Trainer.fit(on_epoch_end=...)`: measures, and ends the training after the last epoch to watch."""
        self.measure()["val_accuracy"] = row["val_accuracy"]
        return row["epoch"] == self.epochs

    def measure(self) -> dict:
        """The masks of the birds, the accuracy on them, and the `shares` of the gradient on every fifth of them."""
        model, (images, labels) = self.trainer.model, self.birds
        training = model.training
        model.eval()
        with torch.no_grad():
            logits, masks = (found.cpu() for found in model(images.to(device_of(model)), return_mask=True))
        terms = gradient_terms(model, images[::5], labels[::5], self.trainer.recipe.lam)
        model.train(training)
        found = dict(masks=masks[:, 0].float().numpy(), right=float((logits.argmax(1) == labels).float().mean()),
                     **{COLUMNS.get(name, f"grad_{name}"): value for name, value in shares(terms).items()})
        self.moments[len(self.losses)] = found
        return found


@lru_cache(maxsize=1)
def watched(arm: str, seed: int) -> dict[int, dict]:
    """The rows of a training, by the number of updates.

    stability, with_first, with_last, other_bird: `alike` the mask at the start of the epoch, at step 0, of the trained
    gate (the same training's best epoch), and of the trained gate on another bird; on_bird: fraction of the birds on
    which the peak lies; shape: correlation with the bird's outline; bird_share: fraction of the image that is bird.
    """
    model = build(arm, seed)
    recipe = Recipe.small(seed=seed, patience=99, **ARMS[arm].get("recipe", {}))
    sets = fieldguide_sets(SMALL, seed, 30, 20)
    train = sets("train", transforms_for(model.data_config, **recipe.train_transform_options()))
    val, test = (sets(split, transforms_for(model.data_config, train=False)) for split in ("val", "test"))
    chosen = range(0, len(test), len(test) // BIRDS)
    birds, surfaces = images_of(Subset(test, chosen)), [(test[i].geometry, test.segmentation(i)) for i in chosen]
    covers = np.stack([on_object(bird, geometry, (14, 14)).astype(float) for geometry, bird in surfaces])
    trainer = Trainer(model, recipe, progress=False)
    watch = Watch(trainer, birds, WATCHED[arm])
    trainer.fit(train, val, on_epoch_end=watch.end_epoch)
    last, rows = np.stack(masks_of(trained(arm, seed)[0], Subset(test, chosen))), {}
    masks_at = {step: found.pop("masks") for step, found in watch.moments.items()}
    for step, found in watch.moments.items():
        masks = masks_at[step]
        begun = STEPS * ((step - 1) // STEPS) if step else 0  # the start of the epoch
        row = describe(masks) | found
        row["stability"] = alike(masks, masks_at[begun]) if step else np.nan
        row["with_first"] = alike(masks, masks_at[0])
        row["with_last"] = alike(masks, last)
        row["other_bird"] = alike(masks, np.roll(last, BIRDS // 2, 0))  # the control: the last mask of another bird
        row["on_bird"] = np.mean([peak_on(mask, geometry, bird) for (geometry, bird), mask in zip(surfaces, masks)])
        row["shape"] = mean_known(correlation(masks, covers))
        row["bird_share"] = covers.mean()  # what a random peak would hit
        losses = watch.losses[begun:step]
        row["loss"] = np.mean(losses) if losses else np.nan
        # the loss of a step over the median of the nine before it: the largest in this epoch
        jumps = [watch.losses[i] / np.median(watch.losses[i - 9:i]) for i in range(max(begun, 9), step)]
        row["jump"] = max(jumps) if jumps else np.nan
        rows[step] = {k: "" if np.isnan(v) else round(float(v), 5) for k, v in row.items()}
        rows[step].setdefault("val_accuracy", "")
        rows[step] |= provenance(trainer)
    return rows


def dynamics(arm: str, seed: int, step: int) -> tuple[dict, None]:
    """A training after `step` updates, see `watched`."""
    return watched(arm, seed)[step], None


@cache
def last_masks(arm: str, seed: int) -> np.ndarray:
    """The trained gate's masks `(N, h, w)` of the test images."""
    model, _, test = trained(arm, seed)
    return np.stack(masks_of(model, test))


def agreement(arm: str, seed: int, other: int) -> tuple[dict, None]:
    """`alike` of the trained masks of two seeds: on the same bird, and, as the control, on one of another species."""
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
