"""Intervals and tests for accuracies that were measured on the same images, with a few seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from loupe_core.errors import LoupeError

ANYWHERE = (-math.inf, math.inf)


class _Pair(NamedTuple):
    mean: float
    half: float


class Interval(_Pair):
    """A mean and the half-width of its confidence interval, in the units of what was measured; it unpacks into the two.

    The ends, `low` and `high`, stay within what is possible: one of them may be nearer to the mean than `half`, which
    is the distance of the farther one.

    Args:
        within: The least and the largest mean that is possible.
    """

    within = ANYWHERE

    def __new__(cls, mean: float, half: float, within: tuple[float, float] = ANYWHERE) -> "Interval":
        made = super().__new__(cls, mean, min(half, max(mean - within[0], within[1] - mean)))
        made.within = within
        return made

    @property
    def low(self) -> float:
        return max(self.mean - self.half, self.within[0])

    @property
    def high(self) -> float:
        return min(self.mean + self.half, self.within[1])


class Difference(Interval):
    """A mean difference with its interval; `p`, two-sided, and `df`, of the Student's t that both come from."""

    p = math.nan
    df = math.nan


class Components(NamedTuple):
    """Variances of the difference of two arms' answers: between seeds, between images, and of the rest.

    The estimates are unbiased, so that of a part that is not there is below zero half of the time.
    """

    seed: float
    image: float
    rest: float


class Crossed(NamedTuple):
    """Analysis of variance of seeds and images, with one value in each cell. Arrays, where there were many designs."""

    mean: np.ndarray
    seed: np.ndarray  # the three mean squares
    image: np.ndarray
    rest: np.ndarray
    differ: np.ndarray  # of images, how many have a value other than the mean, rounded: for like arms, other than zero


def crossed(values: ArrayLike) -> Crossed:
    """Mean and mean squares of a design with a value for each seed and image.

    Args:
        values: `(..., S, N)`, S >= 2 seeds and N >= 2 images.
    """
    d = np.asarray(values, dtype=float)
    S, N = d.shape[-2:]
    mean, seeds, images = d.mean((-2, -1)), d.mean(-1), d.mean(-2)
    centre = mean[..., None]
    rest = d - seeds[..., None] - (images - centre)[..., None, :]
    return Crossed(mean, N * ((seeds - centre) ** 2).sum(-1) / (S - 1), S * ((images - centre) ** 2).sum(-1) / (N - 1),
                   (rest**2).sum((-2, -1)) / ((S - 1) * (N - 1)), (d != np.rint(mean)[..., None, None]).any(-2).sum(-1))


def standard_error(found: Crossed, seeds: int, images: int, answers: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of the mean of a crossed design for new seeds and new images, and its degrees of freedom.

    With MS for mean squares, the variance of the mean is (MS_seed + MS_image - MS_rest) / (S N). It is what readers and
    cases need in radiology (Hillis 2007), with the same rule for a part of the images that is estimated below zero: it
    is left out. Three things differ, each since coverage asked for it (`python -m benchmarks.coverage`):

    - Degrees of freedom: S - 1 over the seeds' share of the variance. To first order that gives Student's t the value
      of Cochran and Cox (1957), who weight the t of each part by its variance. Satterthwaite's (1946) formula, which
      takes the square of the share, covers 92 % with three seeds, if the parts of seeds and images are both there.
    - Few seeds may agree by luck: MS_seed is taken as no less than the rest alone would give in 19 of 20 cases. Where
      it is less than the rest, the interval is narrower than one for the same seeds and new images would be. One that
      never is covers 98 to 99 % with three seeds that differ by no more than chance.
    - Arms that are both good differ on few images, and may differ on none by luck. With fewer than ten images of that
      kind, half an image is added for each arm, as Agresti and Min (2005) add it to a table of pairs: with none of
      them in full, with nine a tenth of it.

    Args:
        found: Of `crossed`.
        answers: Whether the values are differences of answers.
    """
    S, N = seeds, images
    image = found.image + (S / (N - 1) * np.maximum(1 - found.differ / 10, 0) if answers else 0)
    seed = np.maximum(found.seed, stats.f.ppf(0.05, S - 1, (S - 1) * (N - 1)) * found.rest)
    variance = seed + np.maximum(image - found.rest, 0)
    share = np.clip(seed / np.where(variance > 0, variance, 1), (S - 1) / max(N - 1, S - 1), 1)
    return np.sqrt(variance / (S * N)), (S - 1) / share


def _same_shape(a: ArrayLike, b: ArrayLike, who: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or min(a.shape) < 2:
        raise LoupeError(f"{who}: found shapes {a.shape} and {b.shape}; expected two of one shape (seeds, images), "
                         "with two or more of each")
    return a, b


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Difference:
    """Mean of a - b over seeds and images, with an interval that holds for new seeds and new images alike.

    Seeds and images are crossed random effects, see `standard_error`. Where all values are 0 or 1, they are answers.
    What it covers with 3, 5 and 10 seeds is in data/results/coverage.csv: 93 to 97 % where it says 95, and more where
    the arms differ on a few images only. With two seeds it covers 90 %. No interval can tell of what no seed has
    shown: if a third of all trainings of an arm collapse, three seeds show none of it in 30 % of all cases.

    Args:
        a, b: `(S, N)`, for each seed and image: right or wrong, or any number. Row s and column i belong together.

    Returns:
        The ends of the interval of answers stay within [-1, 1]. No narrower bound is certain, since the accuracies of
        the two arms are estimates as well.

    Raises:
        LoupeError: the shapes differ, or there are fewer than two seeds or images.
    """
    a, b = _same_shape(a, b, "paired_difference")
    answers = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    found = crossed(a - b)
    error, df = map(float, standard_error(found, *a.shape, answers))
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    made = Difference(float(found.mean), half, (-1, 1) if answers else ANYWHERE)
    made.df = df
    made.p = float(2 * stats.t.sf(abs(made.mean) / error, df)) if error else float(made.mean == 0)
    return made


def components(a: ArrayLike, b: ArrayLike) -> Components:
    """Variances of a - b, by the method of moments: of seeds, images, and the rest.

    Args:
        a, b: As in `paired_difference`.

    Raises:
        LoupeError: As `paired_difference`.
    """
    a, b = _same_shape(a, b, "components")
    S, N = a.shape
    found = crossed(a - b)
    return Components(*(float(v) for v in ((found.seed - found.rest) / N, (found.image - found.rest) / S, found.rest)))


def smallest_difference(parts: Components, seeds: int, images: int, power: float = 0.5, level: float = 0.95) -> float:
    """The mean difference that `paired_difference` would tell from zero in a fraction `power` of such experiments.

    Args:
        parts: Of `components`, from a pilot; one below zero counts as zero.
        seeds, images: Of the planned experiment.

    Raises:
        LoupeError: `power` is not between 1 - level, what a difference of zero has, and 1.
    """
    if not 1 - level < power < 1:
        raise LoupeError(f"smallest_difference: found power {power}; expected a number between {1 - level:.3g} and 1")
    seed, image, rest = (max(part, 0.0) for part in parts)
    of_seeds = images * seed + rest
    variance = of_seeds + seeds * image
    if variance == 0:
        return 0.0
    df = min((seeds - 1) * variance / of_seeds if of_seeds else math.inf, max(images - 1, seeds - 1))
    spread = np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, df) / df)  # what the estimated error may be
    bound = stats.t.ppf((1 + level) / 2, df) * spread
    seen = lambda ratio: (stats.norm.sf(bound - ratio) + stats.norm.sf(bound + ratio)).mean()  # noqa: E731
    ratio = optimize.brentq(lambda ratio: seen(ratio) - power, 0, bound.max() + 10)
    return float(ratio * math.sqrt(variance / (seeds * images)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of tests, each corrected for the others by Holm's steps (1979), in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    found = np.empty(len(p))
    found[order] = np.minimum(steps, 1)
    return found.tolist()


def paired_family(pairs: Mapping[str, tuple[ArrayLike, ArrayLike]], level: float = 0.95) -> dict[str, Difference]:
    """`paired_difference` of several pairs that are read together, such as many arms against one.

    Args:
        pairs: name -> (a, b).
        level: With this probability all the intervals hold at once (Bonferroni).

    Returns:
        `p` is Holm's, which decides a little more often than the intervals do.

    Raises:
        LoupeError: As `paired_difference`.
    """
    found = {name: paired_difference(a, b, 1 - (1 - level) / len(pairs)) for name, (a, b) in pairs.items()}
    for difference, p in zip(found.values(), holm([difference.p for difference in found.values()])):
        difference.p = p
    return found


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


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the probability that one of the labelled scores is above one of the others, drawn at
    random, ties counting half. nan where all have the same label.

    Args:
        scores, labels: of the same shape; `labels` is True or 1 for those that should be high.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, bool)
    if labels.all() or not labels.any():
        return math.nan
    above = stats.mannwhitneyu(scores[labels], scores[~labels], method="asymptotic").statistic
    return float(above / (labels.sum() * (~labels).sum()))
