"""The linear probe: a classifier on frozen features, fitted in seconds; the line that a longer training must beat."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from loupe_core.errors import LoupeError
from loupe_core.model import LoupeModel
from loupe_core.sites import classifiers, eval_mode
from loupe_core.start.devices import device_of

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of scikit-learn's C, on features of variance 1; the least is the most cautious


def frozen_features(model: LoupeModel, loader: DataLoader, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What the classifier of `model` reads, in eval mode: features `(N, D)`, float64, and labels `(N,)`.

    Raises:
        LoupeError: The backbone has several classifiers, or one that is no linear layer.
    """
    classifier = _linear(model)
    features, labels, device = [], [], device_of(model)
    handle = classifier.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].cpu().double()))
    try:
        with eval_mode(model), torch.inference_mode():
            for batch in tqdm(loader, desc="features", disable=None if progress else True):
                model(batch["image"].to(device))
                labels.append(batch["label"])
    finally:
        handle.remove()
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def fit_probe(model: LoupeModel, train: DataLoader, val: DataLoader | None = None, progress: bool = False) -> float:
    """Fits the classifier of `model`, in place, to its frozen features by logistic regression.

    The strength of the penalty is the one of `STRENGTHS` with the lowest loss on `val` (without it, the strongest).

    Args:
        train, val: Loaders of batches as `collate` makes them, with the transform of evaluation.
        progress: Show a bar for each pass over the images.

    Returns:
        The penalty's C.

    Raises:
        LoupeError: As in `frozen_features`; or `train` has one class only.
    """
    x, y = frozen_features(model, train, progress)
    if len(set(y.tolist())) < 2:
        raise LoupeError(f"linear probe: found training images of {len(set(y.tolist()))} class, expected two or more")
    scale = StandardScaler().fit(x)
    held_out = None if val is None else frozen_features(model, val, progress)
    found = []
    for strength in STRENGTHS if held_out else STRENGTHS[:1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one that stops early is penalised more
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(scale.transform(x), y)
        weight, bias = _as_linear(fitted, scale, model.num_classes)
        loss = 0.0 if held_out is None else _loss(held_out[0] @ weight.T + bias, held_out[1])
        found.append((loss, strength, weight, bias))
    _, strength, weight, bias = min(found, key=lambda one: one[:2])
    classifier = _linear(model)
    with torch.no_grad():
        classifier.weight.copy_(torch.from_numpy(weight))
        classifier.bias.copy_(torch.from_numpy(bias))
    return strength


def _linear(model: LoupeModel) -> nn.Linear:
    found = classifiers(model.backbone)
    if len(found) != 1 or not isinstance(found[0], nn.Linear) or found[0].bias is None:
        kinds = ", ".join(type(module).__name__ for module in found)
        raise LoupeError(f"linear probe: found the classifier {kinds} in {model.backbone_name}; expected one linear "
                         "layer with a bias: use a recipe with head 'new'")
    return found[0]


def _as_linear(fitted: LogisticRegression, scale: StandardScaler, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight `(K, D)` and bias `(K,)` on features that are not scaled; a class without images is never chosen."""
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:  # scikit-learn keeps one row, the difference of the two
        coefficients, intercept = (np.concatenate([-rows, rows]) / 2 for rows in (coefficients, intercept))
    weight, bias = np.zeros((num_classes, coefficients.shape[1])), np.full(num_classes, -1e4)
    weight[fitted.classes_] = coefficients / scale.scale_
    bias[fitted.classes_] = intercept - weight[fitted.classes_] @ scale.mean_
    return weight, bias


def _loss(logits: np.ndarray, labels: np.ndarray) -> float:
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    return float(log_loss(labels, probabilities, labels=np.arange(logits.shape[1])))
