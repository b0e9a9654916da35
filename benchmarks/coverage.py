"""How often an interval of a paired difference holds the true one: several methods, on designs like the recorded ones.

    python -m benchmarks.coverage [--quick]

Right and wrong answers come from a latent model (probit) with terms of seeds, images and the rest for each of two arms;
its parameters are estimated from the answers of two recorded arms. The accuracies are set, so the true difference is
known. The same variances are simulated without the model too, as normal values. Columns:

    design, values   which two arms, or what is altered; answers or normal values
    seeds, images    of one experiment
    method           see METHODS; "here" is `paired_difference`
    coverage, half   how many of the intervals hold the true difference; their mean half-width
    runs             experiments

Writes data/results/coverage.csv, with where it comes from.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from benchmarks.common import CODE, RESULTS, ROOT, show
from loupe_core.files.atomic import write_whole
from loupe_lab.evidence.results import commit, read_results, unpack_right
from loupe_lab.evidence.statistics import Components, Crossed, components, crossed, standard_error

CELLS = 2_000_000  # simulated at once, so that memory stays small
CHANCE = 0.05  # of 20 species


class Latent(NamedTuple):
    """Two arms whose answers are right where accuracy + seed + image + rest, normal terms, is above zero.

    Image and rest have variance 1 together.
    """

    accuracy: tuple[float, float]  # over all images and seeds
    image: tuple[float, float]  # the images' share of the variance
    alike: float  # correlation of the two arms' image terms
    paired: float  # correlation of the two arms' rest, for the same seed
    seed: tuple[float, float] = (0.0, 0.0)  # standard deviation of the seeds' term
    collapse: str = ""  # of the first arm: "one" seed of each experiment answers by chance, or "third", each of three

    @property
    def truth(self) -> float:
        return self.accuracy[0] - self.accuracy[1]


class Normal(NamedTuple):
    """A normal difference of two arms."""

    truth: float
    parts: Components


# ---- designs, from what is recorded


def answers(grid: str, **where: str) -> np.ndarray:
    """What an arm answered: `(S, 400)` bool, seeds in their order."""
    rows = {row["seed"]: row for row in read_results(grid) if all(row[k] == v for k, v in where.items())}
    return np.stack([unpack_right(rows[seed], 400) for seed in sorted(rows)])


def tetrachoric(a: float, b: float, both: float) -> float:
    """Correlation of two normal variables that are positive in fractions a and b of all cases, together in `both`."""
    at = stats.norm.ppf([a, b])
    return optimize.brentq(lambda r: stats.multivariate_normal.cdf(at, cov=[[1, r], [r, 1]]) - both, -0.99, 0.99999)


def latent(a: np.ndarray, b: np.ndarray) -> Latent:
    """The model's parameters for two arms, from their answers `(S, N)` with the same seeds."""
    def together(x: np.ndarray, y: np.ndarray, same: bool) -> float:
        found = x.astype(float) @ y.T.astype(float) / x.shape[1]
        return tetrachoric(x.mean(), y.mean(), found[np.eye(len(x), dtype=bool) == same].mean())

    image = together(a, a, False), together(b, b, False)
    other, same = together(a, b, False), together(a, b, True)
    seeds = []
    for x in (a, b):
        spread = max(components(x, np.zeros_like(x)).seed, 0) ** 0.5
        seeds.append(spread / stats.norm.pdf(stats.norm.ppf(x.mean())))
    rest = ((1 - image[0]) * (1 - image[1])) ** 0.5
    return Latent((float(a.mean()), float(b.mean())), image, min(other / (image[0] * image[1]) ** 0.5, 1.0),
                  float(np.clip((same - other) / rest, 0, 1)), tuple(map(float, seeds)))


def designs() -> dict[str, Latent | Normal]:
    """Pairs of recorded arms; and the first of them with something altered."""
    arms = {arm: answers("ablations", arm=arm) for arm in ("bare", "loupe", "constant", "lambda 5", "sum")}
    bare = arms.pop("bare")
    pairs = {f"{'gate' if arm == 'loupe' else arm} - bare": (of, bare[: len(of)]) for arm, of in arms.items()}
    pairs["larger - as it is"] = tuple(answers("gap", arm="bare", change=change)
                                       for change in ("144 shown at 112", "as it is"))
    pairs["mix - bare"] = tuple(answers("remedies", arm=arm, lr="chosen") for arm in ("mix", "bare"))
    found: dict[str, Latent | Normal] = {name: latent(*pair) for name, pair in pairs.items()}
    gate, larger = found["gate - bare"], found["larger - as it is"]
    photographs = {arm: float(np.mean([float(row["accuracy"]) for row in read_results("photographs")
                                       if row["arm"] == arm]))
                   for arm in ("loupe", "bare")}
    found |= {
        "photographs": gate._replace(accuracy=(photographs["loupe"], photographs["bare"])),
        "equal arms": gate._replace(accuracy=(gate.accuracy[1],) * 2),
        "no seed variance": gate._replace(seed=(0.0, 0.0)),
        "seeds differ": gate._replace(seed=(0.1, 0.1)),
        "ceiling": gate._replace(accuracy=(0.975, 0.970)),
        "ceiling, unlike arms": larger._replace(accuracy=(0.985, 0.970)),
        "ceiling, nearly all right": gate._replace(accuracy=(0.994, 0.990)),
        "one seed collapsed": gate._replace(collapse="one"),
        "a third of seeds collapse": gate._replace(collapse="third"),
    }
    for name, pair in pairs.items():
        a, b = (side.astype(float) for side in pair)
        found[f"{name}, normal"] = Normal(float((a - b).mean()), components(a, b))
    return found


CEILINGS = ("constant - bare", "ceiling", "ceiling, unlike arms", "ceiling, nearly all right")
COLLAPSE = ("one seed collapsed", "a third of seeds collapse")


# ---- simulated experiments


def truth(design: Latent | Normal, seeds: int) -> float:
    """The true difference; with a collapsing arm it depends on how many seeds collapse."""
    if not getattr(design, "collapse", ""):
        return design.truth
    part = 1 / seeds if design.collapse == "one" else 1 / 3
    return design.truth - part * (design.accuracy[0] - CHANCE)


def simulate(design: Latent | Normal, seeds: int, images: int, runs: int, rng: np.random.Generator) -> Crossed:
    """`runs` experiments' analysis of variance."""
    if isinstance(design, Normal):
        return normal(design, seeds, images, runs, rng)
    parts, at_once = [], max(CELLS // (seeds * images), 1)
    for begin in range(0, runs, at_once):
        a, b = draw(design, seeds, images, min(at_once, runs - begin), rng)
        parts.append(crossed(a.astype(np.float32) - b))
    return Crossed(*map(np.concatenate, zip(*parts)))


def draw(design: Latent, seeds: int, images: int, runs: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Answers of the two arms, each `(runs, S, N)` bool."""
    def two(correlation: float, *shape: int) -> list[np.ndarray]:
        one, other = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        return [one, np.float32(correlation) * one + np.float32((1 - correlation**2) ** 0.5) * other]

    image, rest = two(design.alike, runs, 1, images), two(design.paired, runs, seeds, images)
    sides = []
    for k in range(2):
        at = stats.norm.ppf(design.accuracy[k]) * (1 + design.seed[k] ** 2) ** 0.5
        at = at + design.seed[k] * rng.standard_normal((runs, seeds, 1))
        if design.collapse and k == 0:
            hit = np.arange(seeds)[:, None] == 0 if design.collapse == "one" else rng.random((runs, seeds, 1)) < 1 / 3
            at = np.where(hit, stats.norm.ppf(CHANCE), at)
        share = np.float32(design.image[k])
        sides.append(at.astype(np.float32) + share**0.5 * image[k] + (1 - share) ** 0.5 * rest[k] > 0)
    return sides


def normal(design: Normal, S: int, N: int, runs: int, rng: np.random.Generator) -> Crossed:
    """Mean and mean squares of normal values; they are independent, and the latter are chi-squared."""
    seed, image, rest = (max(part, 0.0) for part in design.parts)
    expected = N * seed + rest, S * image + rest, rest
    mean = design.truth + ((expected[0] + S * image) / (S * N)) ** 0.5 * rng.standard_normal(runs)
    squares = [e * rng.chisquare(df, runs) / df for e, df in zip(expected, degrees(S, N))]
    return Crossed(mean, *squares, np.full(runs, N))


# ---- methods: half-widths at 95 %


def degrees(S: int, N: int) -> tuple[int, int, int]:
    return S - 1, N - 1, (S - 1) * (N - 1)


def t(df: np.ndarray | float) -> np.ndarray:
    return stats.t.ppf(0.975, df)


def bootstrap(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """Pigeonhole bootstrap (Owen 2007), seeds and images drawn together; its standard error in closed form, times t."""
    variance = sum(df * ms / size for df, ms, size in zip(
        degrees(S, N), (f.seed, f.image, f.rest), (S**2 * N, S * N**2, S**2 * N**2)))
    return t(S - 1) * np.sqrt(variance)


def seeds_only(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """Student's t of one mean per seed: for new seeds on the same images."""
    return t(S - 1) * np.sqrt(f.seed / (S * N))


def satterthwaite(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """MS_seed + MS_image - MS_rest with Satterthwaite's (1946) degrees of freedom."""
    return by_satterthwaite(((1, f.seed), (1, f.image), (-1, f.rest)), S, N)


def by_satterthwaite(terms: tuple, S: int, N: int) -> np.ndarray:
    variance = np.maximum(sum(sign * ms for sign, ms in terms), 0)
    below = sum(ms**2 / df for (_, ms), df in zip(terms, degrees(S, N)))
    df = variance**2 / np.where(below > 0, below, 1)
    return t(np.clip(df, 1, None)) * np.sqrt(variance / (S * N))


def parts_left_out(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """The same, where a component that is estimated below zero is left out of the model, as REML does."""
    image = np.maximum(f.image - f.rest, 0)
    pooled = f.seed < f.rest
    of_seeds, df = np.where(pooled, f.rest, f.seed), np.where(pooled, (S - 1) * N, S - 1)
    below = of_seeds**2 / df + np.where(image > 0, f.image**2 / (N - 1) + f.rest**2 / ((S - 1) * (N - 1)), 0)
    variance = of_seeds + image
    df = np.maximum(variance**2 / np.where(below > 0, below, 1), 1)
    return t(df) * np.sqrt(variance / (S * N))


def hillis(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """Hillis (2007), for readers and cases: MS_seed + max(MS_image - MS_rest, 0), df (S - 1) (variance / MS_seed)^2."""
    variance = f.seed + np.maximum(f.image - f.rest, 0)
    share = np.maximum(f.seed / np.where(variance > 0, variance, 1), 1e-4)
    return t((S - 1) / share**2) * np.sqrt(variance / (S * N))


def cochran_cox(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """The same variance; the t of each part, weighted by it (Cochran and Cox 1957)."""
    image = np.maximum(f.image - f.rest, 0)
    variance = f.seed + image
    critical = (t(S - 1) * f.seed + t(N - 1) * image) / np.where(variance > 0, variance, 1)
    return critical * np.sqrt(variance / (S * N))


def draws(S: int, N: int, count: int = 500) -> tuple[np.ndarray, ...]:
    """Normal and chi-squared draws over their degrees of freedom, which all experiments share."""
    rng = np.random.default_rng(1)
    return rng.standard_normal(count), *(rng.chisquare(df, count) / df for df in degrees(S, N))


def parametric(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """Parametric bootstrap of the t ratio, from the estimated components, none below zero."""
    z, *chi = draws(S, N)
    rest = f.rest[:, None]
    seed, image = np.maximum(f.seed[:, None], rest), np.maximum(f.image[:, None], rest)
    variance = seed * chi[0] + np.maximum(image * chi[1] - rest * chi[2], 0)
    error = np.sqrt(np.maximum(variance, 1e-12))
    ratio = np.abs(z) * np.sqrt(seed + image - rest) / error
    return np.quantile(ratio, 0.95, axis=1) * np.sqrt((f.seed + np.maximum(f.image - f.rest, 0)) / (S * N))


def generalised(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """Generalised pivot (Weerahandi 1993): each mean square over a chi-squared draw."""
    z, *chi = draws(S, N)
    parts = [ms[:, None] / c for ms, c in zip((f.seed, f.image, f.rest), chi)]
    variance = parts[0] + np.maximum(parts[1] - parts[2], 0)
    return np.quantile(np.abs(z) * np.sqrt(variance / (S * N)), 0.95, axis=1)


def here(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """What `paired_difference` does."""
    error, df = standard_error(f, S, N, answers)
    return t(df) * error


def no_narrower(f: Crossed, S: int, N: int, answers: bool) -> np.ndarray:
    """`here`, but never narrower than for new images under the same seeds, as it is where seeds agree by luck."""
    image = f.image + (S / (N - 1) * np.maximum(1 - f.differ / 10, 0) if answers else 0)
    return np.maximum(here(f, S, N, answers), t(N - 1) * np.sqrt(np.maximum(image, f.rest) / (S * N)))


METHODS: dict[str, Callable[[Crossed, int, int, bool], np.ndarray]] = {
    "bootstrap times t": bootstrap, "seeds only": seeds_only, "Satterthwaite": satterthwaite,
    "parts below zero left out": parts_left_out, "Hillis": hillis, "Cochran-Cox": cochran_cox,
    "parametric bootstrap": parametric, "generalised": generalised,
    "here": here, "here, no narrower than images": no_narrower,
}


def coverage(name: str, design: Latent | Normal, seeds: int, images: int, runs: int,
             methods: tuple[str, ...] = tuple(METHODS)) -> Iterator[dict]:
    """Rows of one design, one a method. The draws depend on the design's name and size alone."""
    rng = np.random.default_rng(zlib.crc32(f"{name}/{seeds}/{images}".encode()))
    found, true = simulate(design, seeds, images, runs, rng), truth(design, seeds)
    answers = isinstance(design, Latent)
    for method in methods:
        half = METHODS[method](found, seeds, images, answers)
        held = np.abs(found.mean - true) <= half + 1e-9
        yield dict(design=name, values="answers" if answers else "normal", seeds=seeds, images=images,
                   truth=round(true, 4), method=method, coverage=round(float(held.mean()), 4),
                   half=round(float(half.mean()), 5), runs=runs)


def main(argv: list[str] | None = None, folder: Path | None = None) -> list[dict]:
    """Simulates all designs, shows what `here` covers, and writes the table.

    Args:
        argv: words of the command line; None takes the process's own.
        folder: where to write; None means data/results, and nothing at all for a quick run.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the least of everything: to see that it runs")
    quick = parser.parse_args(argv).quick
    rows = []
    where = dict(commit=commit(ROOT, CODE), numpy=version("numpy"), scipy=version("scipy"), machine=platform.machine())
    for name, design in designs().items():
        for seeds, images in [(3, 81)] if quick else product((2, 3, 5, 10), (81, 243, 400, 5794)):
            runs = 50 if quick else 20_000 if isinstance(design, Normal) else 1500 if images > 1000 else 4000
            began = time.perf_counter()
            found = list(coverage(name, design, seeds, images, runs, tuple(METHODS) if seeds > 2 else ("here",)))
            seconds = round(time.perf_counter() - began, 2)
            rows += [{**row, "seconds": seconds, **where} for row in found]
        shown = [{k: row[k] for k in ("design", "seeds", "images", "coverage", "half")} for row in rows
                 if row["method"] == "here" and row["design"] == name]
        print(show(shown) + "\n", flush=True)
    if folder or not quick:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file = (folder or RESULTS) / "coverage.csv"
        write_whole(file, text.getvalue())
        print(f"written to {file}")
    return rows


if __name__ == "__main__":
    main()
