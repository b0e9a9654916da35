"""The device, the precision and the processes of a training: Accelerate's, set up by a recipe."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration

from loupe_core.errors import LoupeError
from loupe_core.recipe import Recipe, pick_precision


def accelerator_of(recipe: Recipe, out_dir: Path | None = None, tracker: str | None = None) -> Accelerator:
    """An Accelerator in the recipe's precision, which "auto" lets the device choose.

    Args:
        out_dir: Where a tracker writes; None: here.
        tracker: Of Accelerate's.

    Raises:
        LoupeError: The tracker is not installed.
    """
    # Accelerate keeps one precision per process; two trainings in a notebook may well differ in it.
    AcceleratorState._reset_state()
    precision = recipe.precision
    if precision == "auto":
        precision = pick_precision(Accelerator().device)
        AcceleratorState._reset_state()
    trackers = [t.value for t in get_available_trackers()]
    if tracker is not None and tracker not in trackers:
        there = ", ".join(trackers) or "none is"
        raise LoupeError(f"tracker: found {tracker!r}, expected one that is installed: {there}")
    return Accelerator(
        mixed_precision=precision,
        log_with=tracker,
        gradient_accumulation_steps=recipe.accumulate,
        project_dir=str(out_dir or "."),
        # the sampler adds the epoch to it: far apart, so that no two seeds share an order
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=100_003 * recipe.seed,
                                                  non_blocking=torch.cuda.is_available()),
        dynamo_backend="no",  # `compiled` does what a launcher asks for, and leaves the state's names as they are
    )
