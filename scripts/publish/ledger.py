"""The ledger: every claim, its verdict on each ground, and the numbers from which the verdicts follow.

Nobody writes a verdict. data/ledger.yml names, for each claim and ground, where numbers stand (a results file, or what
a cell of a chapter printed) and the conditions under which the claim holds or does not; the head of that file explains
them. `judged` is the one rule.

    python scripts/publish/ledger.py    # print the counts, and every claim with its numbers

scripts/publish/ledger_page.py makes the page of it.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from printed import Missing, output

from loupe_core.errors import LoupeError
from loupe_lab.evidence.results import interval, read_results, unpack_right
from loupe_lab.evidence.statistics import ANYWHERE, paired_difference, proportion
from loupe_lab.paper import table
from loupe_lab.paper.experiment import share_of_tenth

ROOT = Path(__file__).resolve().parents[2]
GROUNDS = {"arithmetic": "by arithmetic", "drawn": "drawn birds", "photographs": "real photographs",
           "cub": "CUB at full size"}
VERDICTS = ("holds", "does not hold", "not decided", "not run")
DRAWN = 400  # test images of a recorded training on drawn birds, whose rows do not say it
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class LedgerError(Exception):
    """Evidence is missing, or meets the conditions of two verdicts; the message is one line."""


class Number(NamedTuple):
    """A number with its interval (nan without one) and its text on the page."""

    text: str
    mean: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")


class Judged(NamedTuple):
    """A verdict, "" where the claim has nothing on this ground and is judged by arithmetic; and labelled numbers."""

    verdict: str
    numbers: list[tuple[str, Number]]


def ledger() -> dict:
    """`commands`: name -> command for a GPU with CUB; `claims`: the entries, in the order of the page."""
    return yaml.safe_load((ROOT / "data" / "ledger.yml").read_text(encoding="utf-8"))


# --- where numbers come from: each returns None while too few runs are recorded ------------------------------------

def select(grid: str | list[str], where: dict) -> dict[str, dict]:
    """The rows of results files whose columns have these values, by seed; a file that is not there has none.

    Raises:
        LedgerError: several have the same seed.
    """
    rows = []
    for name in [grid] if isinstance(grid, str) else grid:
        with suppress(LoupeError):
            rows += read_results(name)
    chosen = [row for row in rows if all(str(row[k]) == str(v) for k, v in where.items())]
    found = {str(row.get("seed", i)): row for i, row in enumerate(chosen)}
    if len(found) < len(chosen):
        raise LedgerError(f"data/results/{grid}: {len(chosen)} rows have {where}; expected one for each seed")
    return found


def difference(grid: str | list[str], a: dict, b: dict, column: str = "right", of: str = "birds",
               scale: float = 100, unit: str = " points", digits: int = 1, seeds: int = 2,
               compared: int = 1) -> Number | None:
    """a minus b over the seeds of both: of answers for the same images, or of a column with one number per run.

    Args:
        column: Of answers, or of numbers; "x - y" is a column minus another.
        seeds: With fewer there is no number.
        compared: Of a family of so many comparisons: the interval is that of Bonferroni.
    """
    one, other = select(grid, a), select(grid, b)
    shared = sorted(one.keys() & other.keys())
    if len(shared) < max(seeds, 2):
        return None
    level = 1 - 0.05 / compared
    if "right" in column:
        images = int(one[shared[0]].get("test_images", DRAWN))
        sides = [np.stack([unpack_right({"right": rows[s][column]}, images) for s in shared]) for rows in (one, other)]
        found = paired_difference(*sides, level)
        n = f"{len(shared)} seeds x {images} {of}"
    else:
        found = interval([value(one[s], column) - value(other[s], column) for s in shared], level)
        n = f"{len(shared)} seeds"
    n += f"; one of {compared}" if compared > 1 else ""
    mean, low, high = scale * found.mean, scale * found.low, scale * found.high
    return Number(f"{mean:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f}; {n})", mean, low, high,
                  getattr(found, "p", float("nan")))


def value(row: dict, column: str) -> float:
    """A row's number in a column, or in "one - another"."""
    first, *others = column.split(" - ")
    return float(row[first]) - sum(float(row[name]) for name in others)


def mean(grid: str | list[str], where: dict, column: str, scale: float = 1, unit: str = "", digits: int = 2,
         within: tuple[float, float] = ANYWHERE, seeds: int = 2) -> Number | None:
    """A column's mean over seeds, with its interval.

    Args:
        within: The least and the largest possible value, scaled: [0, 100] for a share in per cent.
        seeds: With fewer there is no number.
    """
    values = [scale * value(row, column) for row in select(grid, where).values()]
    if len(values) < max(seeds, 2):
        return None
    found = interval(values, within=within)
    text = f"{found.mean:.{digits}f}{unit} ({found.low:.{digits}f} to {found.high:.{digits}f}; {len(values)} seeds)"
    return Number(text, found.mean, found.low, found.high)


def cell(chapter: str, id: str, find: str) -> Number | None:
    """The match of `find`, a regular expression, in a cell's printed output: its first group, or all of it.

    The first number in it is the number that conditions speak of. "± half" after it gives its interval, or "low to
    high" anywhere after it, or "(low-high)", if the number lies between the two; a text may also begin with the
    interval alone. None where the match says that something is "not recorded yet".

    Raises:
        LedgerError: no match.
    """
    found = printed(chapter, id, find)
    words = " ".join((found[1] if found.re.groups else found[0]).split())
    words = re.sub(r"([(\[]) +", r"\1", words).strip(" ;,.:")  # as it stands in a column of its own
    return None if "not recorded yet" in words else interval_in(words)


def share(chapter: str, id: str, find: str, swap: bool = False) -> Number:
    """Counts in a cell's printed output: "hits ... of n", the two groups of `find`, as a share with its interval.

    Args:
        swap: n stands first.
    """
    hits, n = map(int, printed(chapter, id, find).groups()[::-1 if swap else 1])
    low, high = proportion(hits, n)
    return Number(f"{hits} of {n} ({100 * low:.0f} to {100 * high:.0f} %)", hits / n, low, high)


def tenth(grid: str, where: dict) -> Number:
    """The share of a mask's sum in its highest tenth of cells, mean over recorded masks, with its interval."""
    of_run, = (row for row in read_results(grid) if all(row[k] == v for k, v in where.items()))
    found = interval([share_of_tenth(np.array(mask)) for mask in of_run["masks"].values()], within=(0, 1))
    return Number(f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f}; {len(of_run['masks'])} birds)", found.mean,
                  found.low, found.high)


def ratio(of: dict, to: dict, unit: str = " times") -> Number:
    """One printed number over another."""
    quotient = cell(**of).mean / cell(**to).mean
    return Number(f"{quotient:.2f}{unit}", quotient)


def printed(chapter: str, id: str, find: str) -> re.Match:
    try:
        found = re.search(find, output(chapter, id))
    except Missing as problem:
        raise LedgerError(f"a claim {problem}") from problem
    if not found:
        raise LedgerError(f"book/{chapter}.ipynb, cell '{id}': {find!r} is not in its output")
    return found


def interval_in(words: str) -> Number:
    """The first number of a text with its interval; see `cell`."""
    number = re.search(r"[+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?", words)
    if not number:
        return Number(words)
    mean, rest = float(number[0].replace(",", "")), words[number.end():]
    if half := re.match(r" (?:±|\+-) ([\d.]*\d)", rest):
        return Number(words, mean, mean - float(half[1]), mean + float(half[1]))
    ends = (re.search(r"([+-]?\d[\d.]*) +to +([+-]?\d[\d.]*\d|[+-]?\d)", rest)
            or re.match(r" \((\d[\d.]*)-(\d[\d.]*)\)", rest))
    if ends and float(ends[1]) <= mean <= float(ends[2]):
        return Number(words, mean, float(ends[1]), float(ends[2]))
    if alone := re.match(r"([+-]?\d[\d.]*) +to +([+-]?\d[\d.]*\d|[+-]?\d)", words):
        low, high = map(float, alone.groups())
        return Number(words, (low + high) / 2, low, high)
    return Number(words, mean)


def cub_difference(rows: list[dict], **options: str) -> Number | None:
    return cub_number("difference", table.difference(rows, **options), options)


def cub_mean(rows: list[dict], **options: str) -> Number | None:
    return cub_number("within" if "minus" in options else "mean", table.mean(rows, **options), options)


def cub_number(kind: str, found: tuple | None, options: dict) -> Number | None:
    """What `loupe_lab.paper.table` found, in points or per cent."""
    if found is None:
        return None
    number, seeds, images = found
    low, middle, high = (100 * end for end in (number.low, number.mean, number.high))
    sign, unit = ("", " %") if kind == "mean" else ("+", " points")
    of = f"{seeds} seeds" + (f" x {images} photographs" if images else "")
    text = f"{of_what(kind, **options)}: {middle:{sign}.2f}{unit} ({low:{sign}.2f} to {high:{sign}.2f}; {of})"
    return Number(text, middle, low, high, getattr(number, "p", float("nan")))


def of_what(kind: str, column: str = "", backbone: str = "", **options: str) -> str:
    """In words, what a number from CUB is of."""
    column, minus = (name.replace("_", " ") for name in (column, options.get("minus", "")))
    if kind == "difference":
        what = f"{options['a']} minus {options['b']}" + (", under attack" if "attacked" in column else "")
    else:
        what = f"{options['arm']}, {column}" + (f" minus {minus}" if minus else "")
    return what + (f", {backbone}" if backbone else "")


MEASURES: dict[str, Callable[..., Number | None]] = dict(difference=difference, mean=mean, cell=cell, share=share,
                                                         ratio=ratio, tenth=tenth)
ON_CUB = dict(difference=cub_difference, mean=cub_mean, within=cub_mean)


# --- the rule -------------------------------------------------------------------------------------------------------

def judged(claim: dict, ground: str, rows: list[dict] | None = None) -> Judged:
    """A claim's verdict on a ground. All conditions `holds` of all its items are met: "holds". All conditions `fails`
    of one item are met: "does not hold". Neither: "not decided". No item with conditions, or too few runs of one: "not
    run".

    Args:
        rows: Of data/results/cub.csv; None reads them.

    Raises:
        LedgerError: a number is missing, or both verdicts would stand.
    """
    numbers, met, failed, complete = [], [], [], True
    for item in claim.get(ground, []):
        measures = ON_CUB if ground == "cub" else MEASURES
        (kind, options), = ((k, v) for k, v in item.items() if k in measures)
        arguments = ((table.recorded() if rows is None else rows),) if ground == "cub" else ()
        number = measures[kind](*arguments, **options)
        ruled = "holds" in item or "fails" in item
        if number is None:
            complete &= not ruled
            continue
        numbers.append((item.get("of", ""), number))
        if ruled:
            met.append("holds" in item and all(meets(number, condition) for condition in item["holds"]))
            failed.append("fails" in item and all(meets(number, condition) for condition in item["fails"]))
    if not met or not complete:
        return Judged("" if claim["ground"] == "arithmetic" and ground != "arithmetic" else "not run", numbers)
    if all(met) and any(failed):
        raise LedgerError(f"ledger, {claim['id']}: on the ground '{ground}' both verdicts would stand; expected "
                          "conditions that exclude each other")
    return Judged("holds" if all(met) else "does not hold" if any(failed) else "not decided", numbers)


def meets(number: Number, condition: str) -> bool:
    """Whether a number meets "low > 0" or the like; "printed" is met by what was found in a cell's output."""
    if condition == "printed":
        return True
    name, sign, bound = condition.split()
    return COMPARE[sign](getattr(number, name), float(bound))


def overall(claim: dict) -> str:
    """The claim's verdict: that of its own ground, and no other."""
    return judged(claim, claim["ground"]).verdict


# --- in words ------------------------------------------------------------------------------------------------------

def counts(claims: list[dict]) -> str:
    """How many have which verdict, by ground."""
    found = []
    for ground, name in GROUNDS.items():
        count = Counter(verdict for claim in claims if (verdict := judged(claim, ground).verdict)
                        and (ground == "arithmetic") == (claim["ground"] == "arithmetic"))
        words = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])
        found.append(f"{name[:1].upper()}{name[1:]}: {words}.")
    return " ".join(found)


def chapters(claim: dict) -> list[str]:
    """Those that its numbers come from, and the one that it names."""
    found = {options["chapter"] for ground in GROUNDS for item in claim.get(ground, []) for key, options in item.items()
             if key in ("cell", "share")}
    return sorted(found | {claim["chapter"]})


def labelled(numbers: list[tuple[str, Number]]) -> list[str]:
    """Each number in words, with what it is of."""
    return [f"{of}: {number.text}" if of else number.text for of, number in numbers]


def sentence(numbers: list[tuple[str, Number]]) -> str:
    """The numbers in one sentence."""
    text = "; ".join(labelled(numbers))
    return text[:1].upper() + text[1:] + "."


def main() -> None:
    claims = ledger()["claims"]
    for claim in claims:
        print(f"{overall(claim):<14} {claim['id']} ({GROUNDS[claim['ground']]})")
        for ground, name in GROUNDS.items():
            verdict, numbers = judged(claim, ground)
            if numbers or ground == claim["ground"]:
                print(f"{'':<15}{name}: {verdict}")
            for of, number in numbers:
                print(f"{'':<17}{of}: {number.text}")
    print(counts(claims))


if __name__ == "__main__":
    main()
