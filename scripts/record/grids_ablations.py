"""Chapter 08's runs: one thing changed at a time."""

import numpy as np
import torch
from runs import NO_RANKS, images_of, masks_of, part_ranks, trained


def closed_blocks(model, images: torch.Tensor) -> float:
    """Share of 2 x 2 blocks that reach the merging after stage 2 with a variance below its LayerNorm's eps."""
    norm, shares = model.backbone.layers[2].downsample.norm, []
    handle = norm.register_forward_hook(
        lambda norm, inputs, out: shares.append((inputs[0].var(-1, correction=0) < norm.eps).float().mean()))
    with torch.no_grad():
        for batch in images.split(100):
            model(batch)
    handle.remove()
    return round(float(torch.stack(shares).mean()), 4)


def ablations(arm: str, seed: int) -> tuple[dict, None]:
    """Accuracy of a training, which test images it got right, and what its mask looks like.

    mask_sd: deviation within an image; mask_low: share of cells below 0.01; mask_zero: share that is exactly 0;
    closed_blocks: see there.
    """
    model, outcome, test = trained(arm, seed)
    looks = dict(mask_sd="", mask_low="", mask_zero="") | NO_RANKS
    closed = dict(closed_blocks=closed_blocks(model, images_of(test)[0]))
    if len(model.gates) == 1:
        masks = np.stack(masks_of(model, test))
        looks = dict(mask_sd=round(float(masks.std((1, 2)).mean()), 4), mask_low=round(float((masks < 0.01).mean()), 4),
                     mask_zero=round(float((masks == 0).mean()), 6)) | part_ranks(masks, test)
    return outcome | looks | closed, None


# Five seeds for what the chapters claim something about, three for the rest. The arms that are not here stand in the
# grids `lambda` and `sites`.
SEEDS = dict.fromkeys(("bare", "loupe", "lambda 0", "lambda 5", "constant"), 5) | dict.fromkeys(
    ("stage3", "multi-scale", "shuffled", "random", "centre", "cbam", "residual", "l2", "sum", "stage3.inside",
     "reduction 4", "reduction 8"), 3)
CHOICES = [dict(arm=arm, seed=seed) for seed in range(5) for arm in SEEDS if seed < SEEDS[arm]]
GRIDS = {"ablations": (ablations, CHOICES)}
