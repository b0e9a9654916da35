"""Chapter 08's runs: one change at a time."""

import numpy as np
import torch
from runs import NO_RANKS, images_of, masks_of, part_ranks, trained

from loupe_core import LoupeModel
from loupe_core.start.devices import device_of


def closed_blocks(model: LoupeModel, images: torch.Tensor) -> float:
    """Fraction of the 2 x 2 blocks after stage 2 whose variance is below the eps of the LayerNorm that merges them.

    Args:
        images: `(N, 3, H, W)`, normalised.
    """
    norm, shares = model.backbone.layers[2].downsample.norm, []
    handle = norm.register_forward_hook(
        lambda norm, inputs, out: shares.append((inputs[0].var(-1, correction=0) < norm.eps).float().mean()))
    with torch.no_grad():
        for batch in images.split(100):
            model(batch.to(device_of(model)))
    handle.remove()
    return round(float(torch.stack(shares).mean()), 4)


def ablations(arm: str, seed: int) -> tuple[dict, None]:
    """Accuracy of a training, which test images it classified correctly, and statistics of its mask.

    mask_sd: deviation within an image, mean over images; mask_low: fraction of cells below 0.01; mask_zero: fraction
    that is exactly 0; closed_blocks: see the function.
    """
    model, outcome, test = trained(arm, seed)
    looks = dict(mask_sd="", mask_low="", mask_zero="") | NO_RANKS
    closed = dict(closed_blocks=closed_blocks(model, images_of(test)[0]))
    if len(model.gates) == 1:
        masks = np.stack(masks_of(model, test))
        looks = dict(mask_sd=round(float(masks.std((1, 2)).mean()), 4), mask_low=round(float((masks < 0.01).mean()), 4),
                     mask_zero=round(float((masks == 0).mean()), 6)) | part_ranks(masks, test)
    return outcome | looks | closed, None


# Five seeds for the arms that the chapters' claims are about, three for the rest. The other arms are in the grids
# `lambda` and `sites`.
SEEDS = dict.fromkeys(("bare", "loupe", "lambda 0", "lambda 5", "constant"), 5) | dict.fromkeys(
    ("stage3", "multi-scale", "shuffled", "random", "centre", "cbam", "residual", "l2", "sum", "stage3.inside",
     "reduction 4", "reduction 8"), 3)
CHOICES = [dict(arm=arm, seed=seed) for seed in range(5) for arm in SEEDS if seed < SEEDS[arm]]
GRIDS = {"ablations": (ablations, CHOICES)}
