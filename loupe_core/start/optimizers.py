"""A recipe's optimizer and schedule: which parameters learn at which rate, in which step."""

from __future__ import annotations

import math
import warnings

import torch
from timm.optim import param_groups_layer_decay
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from loupe_core.errors import LoupeError
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_core.sites import classifiers
from loupe_core.start.lion import Lion


def parts_of(model: LoupeModel) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The backbone's own parameters, and those of gate and classifier."""
    backbone, fresh = [], []
    classifier = {id(p) for module in classifiers(model.backbone) for p in module.parameters()}
    for name, p in model.named_parameters():
        (backbone if name.startswith("backbone.") and id(p) not in classifier else fresh).append(p)
    return backbone, fresh


def optimizer_of(model: LoupeModel, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer: groups of the backbone's own parameters (none where it is frozen), then the gates, where
    they have a rate of their own, then the classifier (and gates), whose rate the log shows.

    With `layer_decay` the backbone's groups are timm's, which spare biases and norms the weight decay.

    Raises:
        LoupeError: `layer_decay` for a backbone that does not say how its layers follow one another.
    """
    r, (backbone, fresh) = recipe, parts_of(model)
    groups = [dict(params=fresh, lr=r.lr)]
    if r.gate_lr_factor != 1 and model.sites:
        gates, own = list(model.gates.parameters()), {id(p) for p in model.gates.parameters()}
        groups = [dict(params=gates, lr=r.lr * r.gate_lr_factor),
                  dict(params=[p for p in fresh if id(p) not in own], lr=r.lr)]
    if r.backbone_lr_factor > 0 and r.layer_decay < 1:
        if not hasattr(model.backbone, "group_matcher"):
            raise LoupeError(f"layer_decay={r.layer_decay}: {type(model.backbone).__name__} does not say how its layers"
                             " follow one another; expected a backbone from timm: set layer_decay to 1")
        own = {id(p) for p in backbone}
        for group in reversed(param_groups_layer_decay(model.backbone, r.weight_decay, layer_decay=r.layer_decay)):
            params = [p for p in group["params"] if id(p) in own]
            if params:
                lr = r.lr * r.backbone_lr_factor * group["lr_scale"]
                groups.insert(0, dict(params=params, lr=lr, weight_decay=group["weight_decay"]))
    elif r.backbone_lr_factor > 0:
        groups.insert(0, dict(params=backbone, lr=r.lr * r.backbone_lr_factor))
    options = dict(lr=r.lr, weight_decay=r.weight_decay)
    if r.optimizer == "lion":
        return Lion(groups, **options)
    # one kernel for many parameters; on a processor torch's default, whose numbers are those of before
    on_card = all(p.is_cuda for p in (*backbone, *fresh))
    return torch.optim.AdamW(groups, **options, **dict(fused=True) if on_card else {})


class Cosine(CosineAnnealingLR):
    """torch's cosine for the last group of parameters; the other groups keep their factor to it, down to `lr_min`."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, lr_min: float) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        self.factors = [rate / rates[-1] for rate in rates]
        super().__init__(optimizer, T_max=max(steps, 1), eta_min=lr_min)

    def get_lr(self) -> list[float]:
        """The rate of each group at this step."""
        return [factor * super(Cosine, self).get_lr()[-1] for factor in self.factors]


def schedule_of(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The recipe's cosine over all its epochs, after a linear warm-up where it has one.

    With `anneal` "epoch" the rate is that of the epoch's beginning throughout, and there is no warm-up.

    Args:
        steps: Of the optimizer, per epoch.
    """
    if recipe.anneal == "epoch":
        low, angle = recipe.lr_min / recipe.lr, math.pi / recipe.epochs
        return LambdaLR(optimizer, lambda k: low + (1 - low) * (1 + math.cos(angle * (k // steps))) / 2)
    warmup = round(min(recipe.lr_warmup_epochs, recipe.epochs / 2) * steps)
    if warmup == 0:
        return Cosine(optimizer, recipe.epochs * steps, recipe.lr_min)
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    fall = Cosine(optimizer, recipe.epochs * steps - warmup, recipe.lr_min)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def schedule_after(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, epochs: int) -> LRScheduler:
    """`schedule_of` at the end of its first `epochs` epochs: for a run whose epochs had another number of steps."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    schedule = schedule_of(optimizer, recipe, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: the optimizer itself has taken no step yet
        for _ in range(epochs * steps):
            schedule.step()
    return schedule
