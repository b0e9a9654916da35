"""The batches of a training: none of a single image where a BatchNorm would have nothing to compare it with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler

from loupe_core.errors import LoupeError
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_core.samples import AsSamples
from loupe_core.sites import eval_mode


class JoinedBatches(BatchSampler):
    """torch's batches; a single image that is left over at the end joins the batch before it."""

    def __iter__(self) -> Iterator[list[int]]:
        waiting: list[int] = []
        for batch in super().__iter__():
            if waiting and len(batch) > 1:
                yield waiting
                waiting = []
            waiting = waiting + batch
        yield waiting

    def __len__(self) -> int:
        return super().__len__() - (len(self.sampler) % self.batch_size == 1)


def training_batches(model: LoupeModel, samples: AsSamples, recipe: Recipe, processes: int = 1) -> dict[str, Any]:
    """The arguments of a DataLoader that make its batches: shuffled, of the recipe's size.

    `JoinedBatches` where the last one would hold a single image that `model` cannot learn from; of several processes'
    batches, Accelerate fills the last.

    Raises:
        LoupeError: Every batch would hold a single image, and the model cannot learn from one.
    """
    plain = dict(batch_size=recipe.batch_size, shuffle=True)
    alone = recipe.batch_size == 1 or len(samples) == 1
    if not alone and (processes > 1 or len(samples) % recipe.batch_size != 1):
        return plain
    if recipe.freeze_batchnorm or recipe.backbone_lr_factor == 0 or not (name := lone_norm(model, samples[0].image)):
        return plain
    if alone:
        found = f"batch_size={recipe.batch_size}" if len(samples) > 1 else "one training image"
        raise LoupeError(f"training: found {found}, but {name} of {model.backbone_name} is a BatchNorm after pooling, "
                         "which needs two images in a batch; expected batch_size 2 or more, or freeze_batchnorm")
    return dict(batch_sampler=JoinedBatches(RandomSampler(samples), recipe.batch_size, drop_last=False))


def lone_norm(model: LoupeModel, image: torch.Tensor) -> str | None:
    """The name of a BatchNorm that meets one value per channel of an image `(3, H, W)`, and fails in training; or None.

    The model is in eval mode for it, so nothing of it changes.
    """
    names, found = {module: name for name, module in model.named_modules()}, []

    def look(module: nn.Module, inputs: tuple) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            found.append(names[module])

    norms = [module for module in names if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [module.register_forward_pre_hook(look) for module in norms]
    like = next(model.parameters())
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, *image.shape, dtype=like.dtype, device=like.device))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
