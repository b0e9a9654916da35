"""What the paper's summary asks or advises and no other grid trains: how the gate starts, no weight decay, a lambda
that warms up, a centre prior added to the mask; and for its open question 3 gradients and features, with one gate and
with three.

All arms of a seed see the same images in the same order, with the same crops, so they are compared pair by pair. "bare"
and others are trained here again because the rows of other grids, for seeds above 0, had other orders (data/README.md).
"""

import time

import numpy as np
import runs
import torch
from filelock import FileLock
from grids_dynamics import describe
from runs import NO_RANKS, SMALL, fieldguide_sets, images_of, masks_of, part_ranks, provenance
from torch import nn
from torch.utils.data import Dataset, Subset

from loupe_core import LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.files.atomic import replaced
from loupe_core.start.devices import device_of
from loupe_lab.evidence.baselines import CentredLoupe
from loupe_lab.evidence.results import pack_right
from loupe_lab.paper.arms import ARMS

# An arm changes the model, the recipe, the `bias` before the sigmoid, or adds the prior (`centred`).
CHANGES: dict[str, dict] = {
    **{arm: ARMS[arm] for arm in ("bare", "loupe", "lambda 0")},
    "no decay": dict(recipe=dict(weight_decay=0.0)),
    "start near 1": dict(bias=4.0),  # M is 0.98
    "warm-up 5": dict(recipe=dict(warmup_epochs=5)),
    "centre prior added": dict(centred=True),
    "multi-scale": ARMS["multi-scale"],
}
MOMENTS = (1, 6, 12)  # epochs after which features are compared
EARLY = 3  # first epochs of which `jump_early` and `rough_early` speak


def begun(arm: str, seed: int) -> LoupeModel:
    """The model of an arm before its training; the gates of a seed have the same random weights in all arms."""
    change = CHANGES[arm]
    torch.manual_seed(seed)
    model = LoupeModel("swin_micro", len(SMALL), **change.get("model", {}))
    for gate in model.gates.values():
        if "bias" in change:
            nn.init.constant_(gate.loupe.conv1x1.bias, change["bias"])
        if "centred" in change:
            learned = gate.loupe.state_dict()
            gate.loupe = CentredLoupe(gate.site.channels)
            gate.loupe.load_state_dict(learned)
    return model


def stages(model: LoupeModel) -> list[list[nn.Parameter]]:
    """The backbone's weights by stage, the patches' with the first."""
    backbone = model.backbone
    return [[p for part in ([backbone.patch_embed] if k == 0 else []) + [layer] for p in part.parameters()]
            for k, layer in enumerate(backbone.layers)]


def grams(model: LoupeModel, images: torch.Tensor) -> list[torch.Tensor]:
    """`(N, N)` for each stage: products of the images' features, as what comes next reads them.

    That is behind the stage's gate, where it has one, and behind the LayerNorm and the merging that follow: what they
    take out again is no difference.
    """
    readers = [*(layer.downsample for layer in model.backbone.layers[1:]), model.backbone.norm]
    seen = []
    handles = [reader.register_forward_hook(lambda module, inputs, out: seen.append(out.flatten(1).float().cpu()))
               for reader in readers]
    with torch.no_grad():
        model(images.to(device_of(model)))
    for handle in handles:
        handle.remove()
    return [(x - x.mean(0)) @ (x - x.mean(0)).T for x in seen]


def likeness(K: torch.Tensor, L: torch.Tensor) -> float:
    """Centred kernel alignment of two Gram matrices `(N, N)` of the same images (Kornblith et al. 2019), with the
    unbiased estimate of Song et al. (2012), which is 0 on average for features that have nothing in common."""
    def shared(K: torch.Tensor, L: torch.Tensor) -> float:
        n = len(K)
        K, L = (M.double() - torch.diag(M.double().diagonal()) for M in (K, L))
        cross = (K.sum(0) * L.sum(0)).sum()
        return float(((K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3)))
    return shared(K, L) / (shared(K, K) * shared(L, L)) ** 0.5


def rises(losses: list[float]) -> np.ndarray:
    """The loss of each step over the median of the nine before it, from the tenth step on."""
    return np.array([losses[i] / np.median(losses[i - 9:i]) for i in range(9, len(losses))])


class Watched(Trainer):
    """A training that keeps each step's classification loss and the length of each stage's gradient, and the `grams`
    of some images after the epochs in `MOMENTS`. It draws no random numbers: without it the training is the same."""

    def __init__(self, model: LoupeModel, recipe: Recipe, images: torch.Tensor) -> None:
        super().__init__(model, recipe, progress=False)
        self.images = images
        self.losses: list[float] = []
        self.lengths: list[list[float]] = []
        self.moments: dict[int, dict] = {}
        self.loss.register_forward_hook(lambda loss, inputs, terms: self.losses.append(terms.classification.item()))

    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's, which tells the lengths before each step."""
        made, parts = super().optimizer(), stages(self.model)
        made.register_step_pre_hook(lambda *_: self.lengths.append(
            [float(torch.stack([p.grad.norm() for p in part if p.grad is not None]).norm()) for part in parts]))
        return made

    def end_epoch(self, row: dict) -> None:
        """For `fit(on_epoch_end=...)`."""
        if row["epoch"] in MOMENTS:
            steps = len(self.losses) // row["epoch"]
            lengths = np.mean(self.lengths[-steps:], 0).tolist()
            self.moments[row["epoch"]] = dict(grams=grams(self.model, self.images), lengths=lengths)


def taught(arm: str, seed: int) -> dict:
    """A training: `outcome`, see `questions`, and `moments`, see `Watched`; kept in data/runs for both grids."""
    kept = runs.KEPT / "questions" / f"{arm}-{seed}.pt".replace(" ", "-")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if kept.exists():
            return torch.load(kept, weights_only=True)
        began = time.perf_counter()
        model, recipe = begun(arm, seed), Recipe.small(seed=seed, **CHANGES[arm].get("recipe", {}))
        sets, plain = fieldguide_sets(SMALL, seed, 30, 20), transforms_for(model.data_config, train=False)
        test = sets("test", plain)
        trainer = Watched(model, recipe, images_of(Subset(test, range(0, len(test), 4)))[0])
        train = sets("train", transforms_for(model.data_config, **recipe.train_transform_options()))
        trainer.fit(train, sets("val", plain), on_epoch_end=trainer.end_epoch)
        found = dict(outcome=judged(trainer, sets("train", plain), test), moments=trainer.moments)
        found["outcome"] |= dict(training_seconds=round(time.perf_counter() - began, 1), **provenance(trainer))
        with replaced(kept) as unfinished:
            torch.save(found, unfinished)
    return found


def judged(trainer: Watched, train: Dataset, test: Dataset) -> dict:
    """The columns of `questions` for a training that has ended."""
    model, told = trainer.model, trainer.evaluate(test)
    early = rises(trainer.losses[:EARLY * len(trainer.losses) // len(trainer.history)])
    found = dict(accuracy=told.accuracy, train_accuracy=trainer.evaluate(train).accuracy, mask_mean=told.mask_mean,
                 jump_early=max(early, default=np.nan), jump=max(rises(trainer.losses), default=np.nan),
                 rough_early=np.log(early).std() if len(early) else np.nan)
    looks = dict(mask_sd="", ring="") | NO_RANKS
    if len(model.gates) == 1:
        masks = np.stack(masks_of(model.eval(), test))
        about = describe(masks)
        looks = dict(mask_sd=round(float(about["sd"]), 4), ring=round(float(about["ring"]), 4),
                     **part_ranks(masks, test))
    return {name: round(float(value), 4) for name, value in found.items()} | looks | dict(
        epochs=len(trainer.history), right=pack_right(told.predictions == told.labels))


def questions(arm: str, seed: int) -> tuple[dict, None]:
    """A training of the small profile.

    accuracy, right and mask_mean on the test split; train_accuracy on the training images as the test shows them.
    jump_early and jump: largest of `rises` in the first three epochs, and in all; rough_early: the deviation of their
    logarithm in the first three. mask_sd: deviation within an image; ring: mean of the outer ring of cells over the
    mean of the rest; the others are `part_ranks`.
    """
    return dict(taught(arm, seed)["outcome"]), None


def flow(arm: str, seed: int, epoch: int) -> tuple[dict, None]:
    """Gradients and features of a training at one epoch, stage by stage.

    grad1 to grad4: length of the gradient of a stage's weights, mean over the epoch's steps. bare1 to bare4:
    `likeness` of the features to those of the training without a gate, same seed and epoch, on every fourth test bird.
    other1 to other4, the control: to those of the training without a gate with the next seed.
    """
    found = taught(arm, seed)
    here = found["moments"][epoch]
    row = {f"grad{k}": round(length, 5) for k, length in enumerate(here["lengths"], 1)}
    for name, other in (("bare", seed), ("other", (seed + 1) % SEEDS)):
        there = taught("bare", other)["moments"][epoch]["grams"]
        row |= {f"{name}{k}": "" if (arm, seed) == ("bare", other) else round(likeness(K, L), 4)
                for k, (K, L) in enumerate(zip(here["grams"], there), 1)}
    return row | {k: v for k, v in found["outcome"].items() if k in provenance()}, None


SEEDS = 3
GRIDS = {
    "questions": (questions, [dict(arm=arm, seed=seed) for seed in range(SEEDS) for arm in CHANGES]),
    "flow": (flow, [dict(arm=arm, seed=seed, epoch=epoch) for seed in range(SEEDS)
                    for arm in ("bare", "loupe", "multi-scale") for epoch in MOMENTS]),
}
