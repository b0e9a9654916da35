"""How a prediction changes although the bird stays the same: adversarial attacks, and other scenes around the bird.

Images are pixel values here, `(B, 3, H, W)` in [0, 1]; `as_pixels` and `as_images` convert a model's normalised images
and back. They may be on any device; the model works where it is, and hands back what is on the CPU. Budgets bound the
change of every value (L-infinity), in steps of an 8-bit pixel: 1 is 1/255.

Sources: FGSM, Goodfellow et al. 2015; PGD, Madry et al. 2018 (both from captum.robust); the ratio loss is the DLR loss
of Croce and Hein 2020.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from captum.robust import FGSM, PGD
from torch import nn

from loupe_core.errors import LoupeError
from loupe_core.sites import eval_mode
from loupe_core.start.devices import device_of
from loupe_lab.birds.fieldguide import SPECIES, draw

ATTACKS = ("fgsm", "pgd", "noise")
BATCH = 50  # images at once


def as_pixels(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images `(B, 3, H, W)` or `(3, H, W)`, normalised with `model.mean` and `model.std` -> pixel values in [0, 1]."""
    mean, std = (torch.tensor(v).to(images)[:, None, None] for v in (model.mean, model.std))
    return (images * std + mean).clamp(0, 1)


def as_images(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The way back: pixel values in [0, 1] -> images normalised as `model` takes them."""
    mean, std = (torch.tensor(v).to(pixels)[:, None, None] for v in (model.mean, model.std))
    return (pixels - mean) / std


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The true class's logit minus the highest other one: `(B, K)` and `(B,)` -> `(B,)`, negative where the prediction
    is wrong."""
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return logits.gather(1, labels[:, None])[:, 0] - others


def _ratio(logits, labels):
    """DLR: minus the margin, over the distance from the highest logit to the third. A factor on the logits cancels."""
    best = logits.topk(3).values
    return -margin(logits, labels) / (best[:, 0] - best[:, 2] + 1e-12)


LOSSES = {"cross-entropy": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), "ratio": _ratio}


def attack(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, budget: float, kind: str = "pgd",
           steps: int = 10, loss: str = "cross-entropy", within: torch.Tensor | None = None,
           seed: int = 0) -> torch.Tensor:
    """The images after an attack that knows the model: `(B, 3, H, W)`, within the budget and within [0, 1].

    The model runs in eval mode; afterwards its modes are what they were. The same seed gives the same result.

    Args:
        model: a `LoupeModel`.
        pixels: `(B, 3, H, W)` in [0, 1].
        labels: `(B,)`, the true classes.
        budget: the most that a value may change, in 1/255.
        kind: "fgsm" (one step along the gradient's sign), "pgd" (steps of 2.5 budget / steps from a random point),
            or "noise" (the budget with a random sign per value; it does not use the model).
        steps: of "pgd".
        loss: what is increased: "cross-entropy", or "ratio" (three classes or more), which does not depend on the
            logits' scale.
        within: `(B, H, W)` bool, the pixels that may change; None means all.
        seed: of the random points and signs.

    Raises:
        LoupeError: an argument is unknown or out of range; the pixels are not in [0, 1].
    """
    if kind not in ATTACKS or loss not in LOSSES:
        raise LoupeError(f"attack: found kind={kind!r}, loss={loss!r}; expected a kind of {', '.join(ATTACKS)} and a "
                         f"loss of {', '.join(LOSSES)}")
    if budget < 0 or steps < 1:
        raise LoupeError(f"attack: found budget={budget}, steps={steps}; expected a budget of 0 or more, in 1/255, "
                         "and one step or more")
    if pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
        raise LoupeError(f"attack: found pixels {tuple(pixels.shape)} and labels {tuple(labels.shape)}; expected "
                         "(B, 3, H, W) and (B,)")
    if len(pixels) and not 0 <= pixels.min() <= pixels.max() <= 1:
        raise LoupeError(f"attack: found pixels from {pixels.min():.2f} to {pixels.max():.2f}; expected values in "
                         "[0, 1]: undo the normalisation with as_pixels")
    radius, device = budget / 255, device_of(model)

    def forward(x):
        return model(as_images(model, x))

    def total(logits, target):  # captum wants one number in a vector
        return LOSSES[loss](logits, target).sum()[None]

    fgsm, pgd = FGSM(forward, total, 0, 1), PGD(forward, total, 0, 1)
    fgsm.zero_thresh = pgd.fgsm.zero_thresh = 0  # a small gradient has a sign too

    def once(x, y, allowed):
        if kind == "noise":
            return x + radius * allowed * torch.randint_like(x, 2).mul(2).sub(1)
        if kind == "fgsm":
            return fgsm.perturb(x, radius, y, mask=allowed)
        return pgd.perturb(x, radius, 2.5 * radius / steps, steps, y, random_start=True, mask=allowed)

    found = []
    with (eval_mode(model), torch.random.fork_rng(), warnings.catch_warnings(), torch.inference_mode(False),
          torch.enable_grad()):
        warnings.filterwarnings("ignore", "Input Tensor")  # captum warns that it switches on the input's gradient
        torch.manual_seed(seed)
        for i in range(0, len(pixels), BATCH):
            x, y = pixels[i : i + BATCH].detach().to(device, copy=True), labels[i : i + BATCH].to(device)
            allowed = torch.ones_like(x)
            if within is not None:
                allowed = allowed * within[i : i + BATCH, None].to(device)
            changed = once(x.clone(), y, allowed).detach()
            found.append((x + (changed - x).clamp(-radius, radius)).clamp(0, 1).cpu())
    return torch.cat(found) if found else pixels.cpu().clone()


def logits_of(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Logits `(B, K)` for pixel values, without gradient, in the mode (train or eval) that the model is in."""
    device = device_of(model)
    with torch.no_grad():
        return torch.cat([model(as_images(model, part.to(device))).cpu() for part in pixels.split(BATCH)])


def input_gradients(model: nn.Module, pixels: torch.Tensor,
                    labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The margin, and how fast it changes with each pixel, in the mode (train or eval) that the model is in.

    To first order, changes of all values by at most d lower the margin by at most d times the sum of the gradients'
    absolute values. So 255 * margin / gradients.sum() estimates the budget at which a prediction flips; a factor on
    the logits cancels in it.

    Returns:
        The margin `(B,)`, in logits, and the gradient's absolute value summed over the colours, `(B, H, W)`, in logits
        per unit of pixel value.
    """
    margins, maps, device = [], [], device_of(model)
    with torch.inference_mode(False), torch.enable_grad():
        for part, true in zip(pixels.split(BATCH), labels.split(BATCH)):
            x = part.detach().to(device, copy=True).requires_grad_()
            found = margin(model(as_images(model, x)), true.to(device))
            maps.append(torch.autograd.grad(found.sum(), x)[0].abs().sum(1).cpu())
            margins.append(found.detach().cpu())
    return torch.cat(margins), torch.cat(maps)


def composed(pixels: torch.Tensor, bird: torch.Tensor, scene: torch.Tensor) -> torch.Tensor:
    """The birds of `pixels` `(B, 3, H, W)`, where `bird` `(B, H, W)` is True, in front of `scene`: pixels, or a colour
    `(3, 1, 1)`."""
    return torch.where(bird[:, None], pixels, scene)


def empty_scene(seed: int | Sequence[int], size: int = 112, weather: float = 1.0) -> np.ndarray:
    """A scene of the field guide, `(size, size, 3)` uint8, whose bird is drawn in a box of one pixel."""
    area = 1 / size**2
    return draw(SPECIES[0].attributes, seed, size, weather=weather, area=(area, area)).image
