"""How labels are weighed by their class, and mixed in a batch: scikit-learn's weights, timm's mixtures."""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup

from loupe_core.recipe import Recipe

Batch = tuple[torch.Tensor, torch.Tensor]


def class_weights_of(recipe: Recipe, labels: np.ndarray, num_classes: int) -> torch.Tensor | None:
    """Weights `(K,)` for the cross-entropy, 1 for a class without images; None where the recipe has none.

    Args:
        labels: Of all training images, `(N,)`.
    """
    if recipe.class_weights == "none":
        return None
    weights, there = torch.ones(num_classes), np.unique(labels)
    weights[there] = torch.tensor(compute_class_weight("balanced", classes=there, y=labels), dtype=torch.float)
    return weights


def mixture_of(recipe: Recipe, num_classes: int) -> Callable[[torch.Tensor, torch.Tensor], Batch]:
    """A function of images `(B, 3, H, W)` and labels `(B,)`: both as they are, or mixed, labels then `(B, K)`.

    It draws from NumPy's global generator. A batch of an odd number stays as it is, since timm mixes in pairs.
    """
    if not (recipe.mixup or recipe.cutmix):
        return lambda images, labels: (images, labels)
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0, num_classes=num_classes)  # the loss smooths labels
    return lambda images, labels: mix(images, labels) if len(images) % 2 == 0 else (images, labels)
