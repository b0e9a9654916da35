"""Chapter 08's runs: one thing changed at a time, five seeds."""

import numpy as np
from runs import ARMS, NO_RANKS, masks_of, part_ranks, trained


def ablations(arm: str, seed: int) -> tuple[dict, None]:
    """Accuracy of a training, which test images it got right, and what its mask looks like.

    mask_sd: deviation within an image; mask_low: share of cells below 0.01; mask_zero: share that is exactly 0.
    """
    model, outcome, test = trained(arm, seed)
    looks = dict(mask_sd="", mask_low="", mask_zero="") | NO_RANKS
    if len(model.gates) == 1:
        masks = np.stack(masks_of(model, test))
        looks = dict(mask_sd=round(float(masks.std((1, 2)).mean()), 4), mask_low=round(float((masks < 0.01).mean()), 4),
                     mask_zero=round(float((masks == 0).mean()), 6)) | part_ranks(masks, test)
    return outcome | looks, None


# Five seeds for what the chapters claim something about, three for what they only show.
CLAIMED = ("bare", "loupe", "lambda 0", "lambda 5", "constant", "multi-scale", "residual", "stage3")
SEEDS = {arm: 5 if arm in CLAIMED else 3 for arm in ARMS if not arm.startswith(("lion", "lite0"))}
CHOICES = [dict(arm=arm, seed=seed) for seed in range(5) for arm in SEEDS if seed < SEEDS[arm]]
GRIDS = {"ablations": (ablations, CHOICES)}
