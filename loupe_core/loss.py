"""Cross-entropy, plus lambda times the norm of the mask.

Source: "The Loupe", section III: L = L_CE + lambda * ||M||_1, lambda = 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from loupe_core.errors import LoupeError

NORMS = ("l1", "l2")
NORM_REDUCTIONS = ("mean", "sum")


class LossTerms(NamedTuple):
    """The loss, and the terms it is made of; scalar tensors. total = classification + lam(epoch) * sparsity."""

    total: torch.Tensor
    classification: torch.Tensor
    sparsity: torch.Tensor


class LoupeLoss(nn.Module):
    """Classification and sparsity in one loss; returns `LossTerms(total, classification, sparsity)`.

    Args:
        lam: The paper's lambda, the weight of the sparsity term.
        norm: "l1": `|M|`; "l2": M squared, so ||M||_2^2 without the root. (The root of a mean has a slope that depends
            on all positions and is undefined at M = 0; the square penalises each position by itself, as l1 does.)
        norm_reduction: "mean" over the mask's positions, as in the authors' code, or "sum" over them, as the formula is
            printed. Both are then averaged over the batch. With 28 x 28 positions a sum weighs 784 times a mean.
        warmup_epochs: The weight grows linearly from 0 to `lam` over so many epochs; 0 applies `lam` from the start.
        label_smoothing, class_weights: Passed to the cross-entropy; `(K,)` or None.

    Shape:
        logits `(B, K)`, labels `(B,)` or mixtures of them `(B, K)`, masks: `(B, 1, H, W)`, or a list of such masks. The
        penalties of a list are averaged, so that `lam` means the same for one site and for several. An empty list (no
        gate) has penalty 0.

    Raises:
        LoupeError: An argument is out of its range.
    """

    def __init__(self, lam: float = 0.05, norm: str = "l1", norm_reduction: str = "mean", warmup_epochs: float = 0,
                 label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None) -> None:
        super().__init__()
        if not (math.isfinite(lam) and lam >= 0):
            raise LoupeError(f"lam={lam!r} given to LoupeLoss: expected a finite number of 0 or more")
        if norm not in NORMS:
            raise LoupeError(f"norm={norm!r} given to LoupeLoss: expected one of {', '.join(NORMS)}")
        if norm_reduction not in NORM_REDUCTIONS:
            raise LoupeError(f"norm_reduction={norm_reduction!r} given to LoupeLoss: expected one of "
                             f"{', '.join(NORM_REDUCTIONS)}")
        if not (math.isfinite(warmup_epochs) and warmup_epochs >= 0):
            raise LoupeError(f"warmup_epochs={warmup_epochs!r} given to LoupeLoss: expected 0 or more epochs")
        if not 0 <= label_smoothing < 1:
            raise LoupeError(f"label_smoothing={label_smoothing!r} given to LoupeLoss: expected 0 <= value < 1")
        self.lam = lam
        self.norm = norm
        self.norm_reduction = norm_reduction
        self.warmup_epochs = warmup_epochs
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def lam_at(self, epoch: float | None) -> float:
        """Weight of the sparsity term at `epoch`, counted from 0; 1.5 is half way through the second epoch.

        None (validation and test, where losses of different epochs are compared) means the full weight.
        """
        if epoch is None or self.warmup_epochs == 0:
            return self.lam
        return self.lam * min(1.0, epoch / self.warmup_epochs)

    def penalty(self, mask: torch.Tensor) -> torch.Tensor:
        """Norm of a mask `(B, 1, H, W)` for each image, without the weight: `(B,)`."""
        mask = mask.float() if mask.dtype in (torch.float16, torch.bfloat16) else mask  # 16-bit sums lose small masks
        values = mask.abs() if self.norm == "l1" else mask.square()
        return values.flatten(1).mean(1) if self.norm_reduction == "mean" else values.flatten(1).sum(1)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor | Sequence[torch.Tensor],
                epoch: float | None = None) -> LossTerms:
        masks = [masks] if isinstance(masks, torch.Tensor) else list(masks)
        penalties = [self.penalty(mask).mean() for mask in masks]
        return self.combine(logits, labels, torch.stack(penalties).mean() if penalties else None, epoch)

    def combine(self, logits: torch.Tensor, labels: torch.Tensor, sparsity: torch.Tensor | None,
                epoch: float | None = None) -> LossTerms:
        """The loss where the mean penalty, a scalar, is known already; None where there is no gate."""
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        classification = F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing)
        sparsity = torch.zeros_like(classification) if sparsity is None else sparsity
        return LossTerms(classification + self.lam_at(epoch) * sparsity, classification, sparsity)


def per_image(masks: torch.Tensor | Sequence[torch.Tensor], measure: Callable[[torch.Tensor], torch.Tensor],
              logits: torch.Tensor, without: float) -> torch.Tensor:
    """Mean over sites of `measure` (a mask -> `(B,)`), or `without` where there is no gate: `(B,)` float."""
    values = [measure(m).float() for m in ([masks] if isinstance(masks, torch.Tensor) else masks)]
    return torch.stack(values).mean(0) if values else torch.full_like(logits[:, 0], without, dtype=torch.float)


def mask_mean_of(masks: torch.Tensor | Sequence[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """Mean over images, positions and sites: a scalar; nan where there is no gate."""
    return per_image(masks, lambda m: m.detach().float().mean((1, 2, 3)), logits.detach(), math.nan).mean()
