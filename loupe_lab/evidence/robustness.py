"""How far a decision moves when the bird does not: small perturbations made to deceive, and other scenes around it.

Images are pixel values here, `(B, 3, H, W)` in [0, 1]; `as_pixels` and `as_images` lead from a model's normalised
images and back. Budgets are L-infinity, in steps of an 8-bit pixel: 1 is 1/255.

Sources: FGSM, Goodfellow et al. 2015; PGD, Madry et al. 2018 (both from captum.robust); the ratio loss is the DLR loss
of Croce and Hein 2020.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from captum.robust import FGSM, PGD

from loupe_core.errors import LoupeError
from loupe_core.sites import eval_mode
from loupe_lab.birds.fieldguide import SPECIES, draw

KINDS = ("fgsm", "pgd", "noise")
BATCH = 50  # images at once


def as_pixels(model, images: torch.Tensor) -> torch.Tensor:
    """Images normalised for `model` -> pixel values in [0, 1]."""
    mean, std = (torch.tensor(v).to(images)[:, None, None] for v in (model.mean, model.std))
    return (images * std + mean).clamp(0, 1)


def as_images(model, pixels: torch.Tensor) -> torch.Tensor:
    """Pixel values in [0, 1] -> images as `model` takes them."""
    mean, std = (torch.tensor(v).to(pixels)[:, None, None] for v in (model.mean, model.std))
    return (pixels - mean) / std


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The true class's logit minus the best other one, (B,): negative where the answer is wrong."""
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return logits.gather(1, labels[:, None])[:, 0] - others


def _ratio(logits, labels):
    """DLR: the negative margin, divided by the distance from the highest logit to the third. No scale is left in it."""
    best = logits.topk(3).values
    return -margin(logits, labels) / (best[:, 0] - best[:, 2] + 1e-12)


LOSSES = {"cross-entropy": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), "ratio": _ratio}


def attacked(model, pixels: torch.Tensor, labels: torch.Tensor, budget: float, kind: str = "pgd", steps: int = 10,
             loss: str = "cross-entropy", within: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """The images after an attack that knows the model: `(B, 3, H, W)`, within the budget and within [0, 1].

    The model runs in eval mode; afterwards its modes are what they were. The same seed gives the same result.

    Args:
        model: a `LoupeModel`.
        pixels: `(B, 3, H, W)` in [0, 1].
        labels: `(B,)`, the true classes.
        budget: the most that a pixel may change, in 1/255.
        kind: "fgsm" (one step along the gradient's sign), "pgd" (steps of 2.5 budget / steps from a random point),
            or "noise" (the sign of each pixel's change is thrown; no model is asked).
        steps: of "pgd".
        loss: what is driven up: "cross-entropy", or "ratio", which does not depend on the logits' scale.
        within: `(B, H, W)` bool, the pixels that may change; None means all.
        seed: of the random points and signs.

    Raises:
        LoupeError: an argument is unknown or out of range; the pixels are not in [0, 1].
    """
    if kind not in KINDS or loss not in LOSSES:
        raise LoupeError(f"attacked: found kind={kind!r}, loss={loss!r}; expected a kind of {', '.join(KINDS)} and a "
                         f"loss of {', '.join(LOSSES)}")
    if budget < 0 or steps < 1:
        raise LoupeError(f"attacked: found budget={budget}, steps={steps}; expected a budget of 0 or more, in 1/255, "
                         "and one step or more")
    if pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
        raise LoupeError(f"attacked: found pixels {tuple(pixels.shape)} and labels {tuple(labels.shape)}; expected "
                         "(B, 3, H, W) and (B,)")
    if len(pixels) and not 0 <= pixels.min() <= pixels.max() <= 1:
        raise LoupeError(f"attacked: found pixels from {pixels.min():.2f} to {pixels.max():.2f}; expected values in "
                         "[0, 1]: undo the normalisation with as_pixels")
    radius = budget / 255

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
        warnings.filterwarnings("ignore", "Input Tensor")  # captum tells that it asks for a gradient
        torch.manual_seed(seed)
        for i in range(0, len(pixels), BATCH):
            x, y = pixels[i : i + BATCH].detach().clone(), labels[i : i + BATCH]
            allowed = torch.ones_like(x)
            if within is not None:
                allowed = allowed * within[i : i + BATCH, None]
            moved = once(x.clone(), y, allowed).detach()
            found.append((x + (moved - x).clamp(-radius, radius)).clamp(0, 1))
    return torch.cat(found) if found else pixels.clone()


def answers_to(model, pixels: torch.Tensor) -> torch.Tensor:
    """Logits `(B, K)` for pixel values, in the model's present mode and without gradient."""
    with torch.no_grad():
        return torch.cat([model(as_images(model, part)) for part in pixels.split(BATCH)])


def slopes(model, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the answer stands from another one, and how steep the way there is, pixel by pixel.

    A change of every pixel by d lowers the margin by d times the sum of the slopes, to first order, and by no more. So
    255 * margin / slopes.sum() estimates the budget at which an answer falls; a factor on the logits cancels in it.

    Returns:
        The margin (B,), and the gradient's absolute value summed over the colours, (B, H, W), both in logits.
    """
    margins, maps = [], []
    with torch.inference_mode(False), torch.enable_grad():
        for part, true in zip(pixels.split(BATCH), labels.split(BATCH)):
            x = part.detach().clone().requires_grad_()
            found = margin(model(as_images(model, x)), true)
            maps.append(torch.autograd.grad(found.sum(), x)[0].abs().sum(1))
            margins.append(found.detach())
    return torch.cat(margins), torch.cat(maps)


def composed(pixels: torch.Tensor, bird: torch.Tensor, scene: torch.Tensor) -> torch.Tensor:
    """The birds of `pixels` (B, 3, H, W), where `bird` (B, H, W) is true, before `scene`: pixels or one colour."""
    return torch.where(bird[:, None], pixels, scene)


def empty_scene(seed, size: int = 112, weather: float = 1.0) -> np.ndarray:
    """A scene of the field guide that nobody sits in, (size, size, 3) uint8: its bird is smaller than two pixels."""
    area = 1 / size**2
    return draw(SPECIES[0].attributes, seed, size, weather=weather, area=(area, area)).image
