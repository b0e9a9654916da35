"""Recorded results: the rows in ``data/results`` that long runs have left, and the interval that goes with a mean."""

import csv
import json
import os
from pathlib import Path

import numpy as np
from scipy import stats

from loupe_core.errors import LoupeError


def read_results(name: str) -> list[dict]:
    """Rows of ``data/results/<name>.csv``, all text, or of ``<name>.json``, which holds arrays as well.

    They are looked for in the folder LOUPE_RESULTS, else here and in the folders above.

    Raises:
        LoupeError: there is no such file.
    """
    chosen = os.environ.get("LOUPE_RESULTS")
    here = Path.cwd()
    folders = [Path(chosen)] if chosen else [folder / "data" / "results" for folder in (here, *here.parents)]
    for folder in folders:
        if (folder / f"{name}.csv").is_file():
            with (folder / f"{name}.csv").open(newline="") as file:
                return list(csv.DictReader(file))
        if (folder / f"{name}.json").is_file():
            return json.loads((folder / f"{name}.json").read_text())
    raise LoupeError(f"no recorded results '{name}.csv' or '.json' in {folders[0]}; expected a checkout of the book: "
                     "start there, or set LOUPE_RESULTS to its folder data/results")


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """Mean of a few runs and the half-width of its confidence interval (Student's t), say over seeds.

    Raises:
        LoupeError: fewer than two values, which have no spread.
    """
    values = [float(v) for v in values]
    if len(values) < 2:
        raise LoupeError(f"interval: found {len(values)} value(s); expected two or more to tell a spread")
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return sum(values) / len(values), float(half)


def answers(right) -> str:
    """Which test images a run got right, (N,) bool in the data set's order, as text that fits a cell: 8 images a byte,
    in hexadecimal. `right_of` reads it."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def right_of(row: dict, images: int) -> np.ndarray:
    """(images,) bool: which test images the run of this row got right (column `right`)."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8), count=images).astype(bool)
