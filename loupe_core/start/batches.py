"""The batches of a training: none of a single image where a BatchNorm would have nothing to compare it with; and how
many of them are made ahead."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler

from loupe_core.errors import LoupeError
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_core.samples import AsSamples
from loupe_core.sites import eval_mode
from loupe_core.start.on_card import gives_bytes

SHARED = "/dev/shm"  # of Linux


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


def workers_for(model: LoupeModel, samples: AsSamples, recipe: Recipe, images: int, on_card: bool,
                tell: Callable[[str], None] = print) -> dict[str, Any]:
    """The arguments of a DataLoader that say how many workers it has, and how many batches each makes ahead.

    Workers hand their batches over in shared memory, which has 64 MB in many containers, and die where it is full:
    there are fewer where it is small, and one line says so.

    Args:
        images: Of a batch.
        on_card: Whether the recipe's -1 means workers.
        tell: Takes the line.
    """
    workers = recipe.workers if recipe.workers >= 0 else min(8, os.cpu_count() or 1) if on_card else 0
    room = shutil.disk_usage(SHARED).free if os.path.isdir(SHARED) else None
    batch = images * model.in_chans * math.prod(model.img_size) * (1 if gives_bytes(samples.dataset) else 4)
    fit, ahead = that_fit(workers, batch, room)
    if fit < workers:
        tell(f"{SHARED} has {room / 2**20:.0f} MB free, too few for {workers} workers with batches of "
             f"{batch / 2**20:.0f} MB: {fit or 'none'} instead; a container takes more with --shm-size=2g")
    return dict(num_workers=fit, prefetch_factor=ahead)


def that_fit(workers: int, batch: int, room: int | None) -> tuple[int, int | None]:
    """How many of `workers` have room for their batches, and how many each makes ahead (None without workers).

    Args:
        batch, room: Bytes of a batch, and of what is free; None where that is not known.
    """
    for ahead in (2, 1):  # torch's own, and the least
        if workers and (room is None or (workers * ahead + 1) * batch <= room):  # one more is being read
            return workers, ahead
    fit = min(workers, (room or 0) // max(batch, 1) - 1)
    return (fit, 1) if fit > 0 else (0, None)
