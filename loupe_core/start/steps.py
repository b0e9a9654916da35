"""A step of a training, and what an epoch's steps add up to, which is read from a card seldom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from tqdm import tqdm

from loupe_core.errors import LoupeError, one_line
from loupe_core.loss import LossTerms, LoupeLoss, mask_mean_of
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe

READ_EVERY = 25  # steps; each reading makes the processor wait for the card, and then the card for the processor


class Tally:
    """Sums over an epoch's images: loss, classification, sparsity, mean of M, right answers, images.

    Args:
        device: Of the tensors. On a processor every step is read, which costs nothing there; elsewhere one in
            `READ_EVERY` reads all steps since, and nothing else waits for the device.
        epoch: Counted from 0, for the error.
        kept: Its last words: what of the training is kept.
        every: Steps between two readings, instead.

    Attributes: `sums`, in double precision and in the order of the steps, so that they do not depend on `every`;
    `right` and `count`. They hold what was read so far.
    """

    def __init__(self, device: torch.device, epoch: int, kept: str = "", every: int | None = None) -> None:
        self.every = every or (1 if device.type == "cpu" else READ_EVERY)
        self.epoch, self.kept = epoch, kept
        self.sums, self.right, self.count, self.read = [0.0] * 4, 0, 0, 0
        self._waiting: list[tuple[torch.Tensor, int]] = []

    def check(self, total: torch.Tensor) -> None:
        """To be called before the gradients of a step, where each is read, so that a bad one changes no weight.

        Raises:
            LoupeError: The loss of this step is not finite.
        """
        if self.every == 1 and not torch.isfinite(total):
            raise self._not_finite(self.read + 1, total.item())

    def add(self, terms: LossTerms, masks: torch.Tensor | list[torch.Tensor], logits: torch.Tensor,
            labels: torch.Tensor) -> None:
        """Adds a step. Raises LoupeError where it is the turn to read, and the loss of a step since was not finite."""
        right = (logits.detach().argmax(1) == labels).sum()
        values = [*(t.detach() for t in terms), mask_mean_of(masks, logits), right]
        self._waiting.append((torch.stack([value.float() for value in values]), len(logits)))
        if len(self._waiting) == self.every:
            self.flush()

    def flush(self) -> None:
        """Reads what was not read yet. Raises LoupeError where the loss of one of these steps was not finite."""
        if not self._waiting:
            return
        values, counts = zip(*self._waiting)
        self._waiting = []
        for (*row, right), n in zip(torch.stack(values).tolist(), counts):
            if not math.isfinite(row[0]):
                raise self._not_finite(self.read + 1, row[0])
            self.sums = [total + n * value for total, value in zip(self.sums, row)]
            self.right, self.count, self.read = self.right + int(right), self.count + n, self.read + 1

    def _not_finite(self, step: int, loss: float) -> LoupeError:
        return LoupeError(f"training: the loss is {loss} in epoch {self.epoch + 1}, step {step}; expected a finite "
                          f"number: lower lr, or set precision to 'no'{self.kept}")


@dataclass
class Step:
    """A step of a training: forward, loss, backward, and where the batches of a step are complete, the optimizer.

    Attributes: plain, the model itself; model, as Accelerate has prepared it; run, as it is called, which may be
    compiled; optimizer, as prepared; still, parameters that do not learn in this epoch.
    """

    accelerator: Accelerator
    plain: LoupeModel
    model: nn.Module
    run: nn.Module
    loss: LoupeLoss
    optimizer: AcceleratedOptimizer
    recipe: Recipe
    still: list[nn.Parameter]

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, epoch: float, tally: Tally) -> tuple:
        """Takes the step.

        Args:
            images, labels: As for `LoupeLoss`, on the device.
            epoch: With the fraction that is done of it, for the loss.
            tally: Is asked to check the loss.

        Returns:
            `LossTerms`, mask or masks, logits.

        Raises:
            LoupeError: The loss is not finite; or the batch does not fit the device's memory, and the line says how
                much of it does.
        """
        try:
            return self._take(images, labels, epoch, tally)
        except torch.OutOfMemoryError as error:
            found = one_line(error)
        # only here, where the error and all that it held is gone
        raise self._too_large(images, labels, found)

    def _take(self, images: torch.Tensor, labels: torch.Tensor, epoch: float, tally: Tally) -> tuple:
        if self.recipe.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with self.accelerator.accumulate(self.model):
            logits, masks = self.run(images, return_mask=True)
            terms = self.loss(logits, labels, masks, epoch=epoch)
            tally.check(terms.total)
            self.accelerator.backward(terms.total)
            if self.accelerator.sync_gradients:
                for p in self.still:
                    p.grad = None  # what has no gradient stays, without weight decay too
                if self.recipe.clip_grad:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return terms, masks, logits

    def _too_large(self, images: torch.Tensor, labels: torch.Tensor, found: str) -> LoupeError:
        size, several = len(images), self.accelerator.num_processes > 1  # one process alone cannot try
        fits = size // 2
        while fits and not (several or self._fits(images[:fits], labels[:fits])):
            fits //= 2
        found = f"training: a batch of {size} images does not fit the memory of {images.device} ({found})"
        if not fits:
            return LoupeError(f"{found}, nor does a single one; expected a smaller backbone or img_size")
        accumulate = self.recipe.accumulate * -(-size // fits)
        said = "may fit" if several else "do, as a trial shows"
        return LoupeError(f"{found}; {fits} {said}: set batch_size to {fits}, and accumulate to {accumulate} for as "
                          "many images in a step")

    def _fits(self, images: torch.Tensor, labels: torch.Tensor) -> bool:
        """Tries a forward and a backward pass, with as much memory taken as the optimizer's state will take."""
        self.optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.empty_cache()
        copies = 2 if self.recipe.optimizer == "adamw" else 1
        try:
            taken = [torch.empty_like(p) for group in self.optimizer.param_groups for p in group["params"]
                     for _ in range(copies if p not in self.optimizer.state else 0)]
            logits, masks = self.plain(images, return_mask=True)
            self.loss(logits, labels, masks).total.backward()
            del taken
        except torch.OutOfMemoryError:
            return False
        return True


def advance(bar: tqdm, epochs: int, wait: Callable[[], None]) -> None:
    """Moves a bar by a step, and says once, by the ten steps after the first, how long the training will take.

    Args:
        wait: Waits for the device, before the clock is read.
    """
    bar.update()
    if bar.disable or (done := bar.n - bar.initial) not in (1, 11):
        return
    wait()
    if done == 1:
        bar.first_step = time.perf_counter()  # the first step takes longer than the others
        return
    minutes = (time.perf_counter() - bar.first_step) / 10 * (bar.total - bar.n) / 60
    bar.write(f"about {minutes:.1f} minutes more for {epochs} epochs, fewer where it stops early")
