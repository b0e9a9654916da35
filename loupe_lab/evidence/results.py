"""Recorded results: the rows that long runs have written to `data/results`, their commit, and intervals of means."""

import csv
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from loupe_core.errors import LoupeError
from loupe_lab.evidence.statistics import ANYWHERE, Interval, paired_difference

UNKNOWN = 255  # the byte of nan in packed numbers


def read_results(name: str) -> list[dict]:
    """Rows of `data/results/<name>.csv`, all values as text, or else of `<name>.json`, which may hold arrays.

    The folder is LOUPE_RESULTS where that is set, else the nearest `data/results` with such a file, from the working
    directory upwards.

    Raises:
        LoupeError: there is no such file.
    """
    chosen = os.environ.get("LOUPE_RESULTS")
    here = Path.cwd()
    folders = [Path(chosen)] if chosen else [folder / "data" / "results" for folder in (here, *here.parents)]
    for folder in folders:
        if (folder / f"{name}.csv").is_file():
            with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        if (folder / f"{name}.json").is_file():
            return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    raise LoupeError(f"no recorded results '{name}.csv' or '.json' in {folders[0]}; expected a checkout of the book: "
                     "start there, or set LOUPE_RESULTS to its folder data/results")


def commit(root: Path, folders: Iterable[str]) -> str:
    """Short hash of the commit that is checked out in `root`, with "-dirty" where files in these folders of it differ
    from the commit or are new; "none" without git or outside of a repository."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        found, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", *folders)
    except FileNotFoundError:  # no git on this machine
        return "none"
    return found + ("-dirty" if changed else "") if found else "none"


def interval(values: Iterable[float], level: float = 0.95, within: tuple[float, float] = ANYWHERE) -> Interval:
    """Mean of a few runs, such as one per seed, and the half-width of its confidence interval (Student's t).

    Args:
        within: The least and the largest possible value, such as (0, 1) for accuracies; the ends, `low` and `high` of
            what is returned, stay there.

    Raises:
        LoupeError: there are fewer than two values.
    """
    values = [float(v) for v in values]
    if len(values) < 2:
        raise LoupeError(f"interval: found {len(values)} value(s); expected two or more to tell a spread")
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return Interval(sum(values) / len(values), float(half), within)


def pack_right(right: ArrayLike) -> str:
    """Which test images a run classified correctly, `(N,)` bool in the data set's order, as hexadecimal text: 8 images
    per byte. `unpack_right` reads it."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def pack_shares(values: ArrayLike) -> str:
    """Numbers in [0, 1], such as one per test image, `(N,)`, nan among them, as hexadecimal text: a byte each, so that
    they are kept to 0.002. `unpack_shares` reads it."""
    values = np.asarray(values, dtype=float)
    if (np.abs(values - 0.5) > 0.5 + 1e-9).any():  # a share of all may be 1e-16 above 1
        raise LoupeError(f"pack_shares: found values from {np.nanmin(values):.3g} to {np.nanmax(values):.3g}; expected "
                         "some in [0, 1]")
    return np.where(np.isnan(values), UNKNOWN, np.rint(values * (UNKNOWN - 1))).astype(np.uint8).tobytes().hex()


def unpack_shares(text: str) -> np.ndarray:
    """The numbers of a column that `pack_shares` wrote: `(N,)`."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.where(packed == UNKNOWN, np.nan, packed / (UNKNOWN - 1))


def unpack_right(row: dict, images: int) -> np.ndarray:
    """The column `right` of a row, which `pack_right` wrote: `(images,)` bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8), count=images).astype(bool)


class Comparison(NamedTuple):
    """Difference of two arms' accuracies in points of a hundred, with the ends of its interval and its p alone."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    new_images: bool  # whether it holds for other test images too, or for other seeds on the same ones only


def compare_runs(ours: Iterable[dict], theirs: Iterable[dict], images: int, level: float = 0.95) -> Comparison | None:
    """Accuracy of one arm's recorded rows minus another's, over the seeds that both have; None with fewer than two.

    Where each row keeps which of the test images it classified correctly (its column `right`), seeds and images are
    paired (`paired_difference`); else the seeds alone are (Student's t).

    Args:
        images: Number of test images.
    """
    a, b = ({int(row["seed"]): row for row in rows} for rows in (ours, theirs))
    pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    if len(pairs) < 2:
        return None
    kept = all(row.get("right") for pair in pairs for row in pair)
    if kept:
        one, other = (np.array([unpack_right(row, images) for row in rows]) for rows in zip(*pairs))
        found = paired_difference(one, other, level)
        p = found.p
    else:
        each = [float(row["accuracy"]) - float(other["accuracy"]) for row, other in pairs]
        found, p = interval(each, level, within=(-1, 1)), float(stats.ttest_1samp(each, 0).pvalue)
    return Comparison(100 * found.mean, 100 * found.low, 100 * found.high, p, len(pairs), kept)
