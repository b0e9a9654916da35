"""How long runs take on a card, before one was made there: estimated from counts, see `loupe_lab.evidence.cost`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_lab.evidence.cost import CARDS, Counts, count_step, estimate, known_card
from loupe_lab.paper.arms import AT_384, BACKBONES, Run

TRAIN, VAL, TEST = 5394, 600, 5794  # CUB's photographs, one training photograph in ten for validation


@cache
def counts_of(backbone: str, pixels: int, precision: str) -> Counts:
    """The counts of a step of the paper's recipe and gate; of the other arms they differ by a few per cent."""
    with torch.device("meta"):
        model = LoupeModel((AT_384 if pixels == 384 else BACKBONES)[backbone], pretrained=False)
    return count_step(model, Recipe(), precision)


def at_most(run: Run, card: str) -> float | None:
    """Seconds of a run's training, if it trains for all 50 epochs; None for a card that is not known.

    Args:
        card: A name that holds one of `CARDS`, such as "NVIDIA A100-SXM4-40GB".
    """
    if (known := known_card(card)) is None:
        return None
    if run.change.get("protocol") == "authors":
        precision, images, val = "no", TRAIN + VAL, TEST
    else:
        precision, images, val = "bf16" if "bf16" in known.peaks else "fp16", TRAIN, VAL
    counts = counts_of(run.backbone, run.pixels, "bf16" if precision == "fp16" else precision)  # the same kernels
    return estimate(card, replace(counts, precision=precision), images, Recipe().epochs, val)


def hours(runs: Sequence[Run]) -> str:
    """A line: the hours of the runs on each known card."""
    each = {card: sum(at_most(run, card) for run in runs) / 3600 for card in CARDS}
    return "estimated from counts, if every run trains for all 50 epochs: " + ", ".join(
        f"{card} {value:.1f} h" for card, value in each.items())
