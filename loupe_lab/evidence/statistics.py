"""Intervals and tests for accuracies that were measured on the same images, with a few seeds."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from loupe_core.errors import LoupeError


class Difference(NamedTuple):
    """A mean difference and the half-width of its confidence interval, both in the units of what was compared."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95, resamples: int = 2000) -> Difference:
    """Mean of a - b over seeds and images, with an interval that holds for new seeds and new images alike.

    The bootstrap resamples seeds and images together ("pigeonhole": Owen 2007). The half-width is its standard error
    times Student's t with S - 1 degrees of freedom, since a few seeds estimate their spread poorly. For many
    comparisons at once take a higher level (1 - 0.05 / comparisons is Bonferroni's).

    Args:
        a, b: `(S, N)`, for each seed and image: right or wrong, or any number. Row s and column i belong together.

    Raises:
        LoupeError: the shapes differ, or there are fewer than two seeds.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or len(a) < 2:
        raise LoupeError(f"paired_difference: found shapes {a.shape} and {b.shape}; expected two of one shape (seeds, "
                         "images), with two seeds or more")
    difference = a - b
    S, N = difference.shape
    rng = np.random.default_rng(0)
    seeds = rng.multinomial(S, np.full(S, 1 / S), resamples) / S
    images = rng.multinomial(N, np.full(N, 1 / N), resamples) / N
    error = np.einsum("rs,sn,rn->r", seeds, difference, images, optimize=True).std(ddof=1)
    return Difference(float(difference.mean()), float(stats.t.ppf((1 + level) / 2, S - 1) * error))


def mcnemar(a: ArrayLike, b: ArrayLike) -> tuple[int, int, float]:
    """McNemar's exact test of two models on the same images.

    Args:
        a, b: `(N,)` bool, which images each classified correctly.

    Returns:
        The number of images that only a classified correctly, the number that only b did, and the two-sided p of a
        split at least as uneven.

    Raises:
        LoupeError: the shapes differ, or are not `(N,)`.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise LoupeError(f"mcnemar: found shapes {a.shape} and {b.shape}; expected two of one shape (images,)")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return only_a, only_b, float(p)


def proportion(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval (low, high) for the fraction `hits / n`."""
    found = stats.binomtest(int(hits), int(n)).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)
