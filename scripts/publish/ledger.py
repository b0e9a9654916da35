"""The ledger page, made from data/ledger.yml: every claim, its verdict, and the numbers that support the verdict.

No measured number is typed there. An entry names the source of its numbers, a results file or the output of a cell of a
chapter, and the condition (`if`) that the first of them must meet for the verdict.

    python scripts/publish/ledger.py    # print the counts, and every claim with its evidence
"""

import operator
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import yaml

from loupe_lab.evidence.results import interval, read_results, unpack_right
from loupe_lab.evidence.statistics import ANYWHERE, paired_difference
from loupe_lab.paper import table

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = ("holds", "holds in part", "does not hold", "not decided", "not run here")
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class LedgerError(Exception):
    """An entry's evidence is missing or does not support its verdict; the message is one line."""


class Number(NamedTuple):
    """A number with its interval (nan without one) and its text on the page."""

    text: str
    mean: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")


def ledger() -> dict:
    """`commands`: name -> command for a GPU with CUB; `claims`: the entries, in the order of the page."""
    return yaml.safe_load((ROOT / "data" / "ledger.yml").read_text(encoding="utf-8"))


def select(grid: str, where: dict) -> dict[str, dict]:
    """The rows of a results file whose columns have these values, by seed.

    Raises:
        LedgerError: there is no such row, or several have the same seed.
    """
    rows = [row for row in read_results(grid) if all(str(row[k]) == str(v) for k, v in where.items())]
    found = {str(row.get("seed", i)): row for i, row in enumerate(rows)}
    if not rows or len(found) < len(rows):
        raise LedgerError(f"data/results/{grid}: {len(rows)} rows have {where}; expected one or more, and one for each "
                          "seed")
    return found


def difference(grid: str, a: dict, b: dict, column: str = "right", images: int = 400, of: str = "birds",
               scale: float = 100, unit: str = " points", digits: int = 1) -> Number:
    """a minus b over the seeds of both: of predictions for the same images, or of a column with one number per run.

    Raises:
        LedgerError: as in `select`, or fewer than two seeds are in both.
    """
    one, other = select(grid, a), select(grid, b)
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        raise LedgerError(f"data/results/{grid}: {a} and {b} share {len(seeds)} seeds; expected two or more")
    if column.startswith("right"):
        read = lambda rows: np.stack([unpack_right({"right": rows[s][column]}, images) for s in seeds])  # noqa: E731
        found = paired_difference(read(one), read(other))
        n = f"{len(seeds)} seeds x {images} {of}"
    else:
        found = interval([float(one[s][column]) - float(other[s][column]) for s in seeds])
        n = f"{len(seeds)} seeds"
    mean, low, high = scale * found.mean, scale * found.low, scale * found.high
    return Number(f"{mean:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f}; {n})", mean, low, high)


def mean(grid: str, where: dict, column: str, scale: float = 1, unit: str = "", digits: int = 2,
         within: tuple[float, float] = ANYWHERE) -> Number:
    """A column's mean over seeds, with its interval.

    Args:
        within: The least and the largest possible value, scaled: [0, 100] for a share in per cent.

    Raises:
        LedgerError: as in `select`.
    """
    rows = select(grid, where)
    values = [scale * float(row[column]) for row in rows.values()]
    if len(values) < 2:
        return Number(f"{values[0]:.{digits}f}{unit} (one run)", values[0])
    found = interval(values, within=within)
    text = f"{found.mean:.{digits}f}{unit} ({found.low:.{digits}f} to {found.high:.{digits}f}; {len(values)} seeds)"
    return Number(text, found.mean, found.low, found.high)


def cell(chapter: str, id: str, find: str) -> Number:
    """The match of `find`, a regular expression, in a cell's printed output: its first group, or all of it.

    The first number in it is the number to which `if` refers. "± half" after it gives its interval, or "low to high"
    anywhere after it, or "(low-high)", if the number lies between the two.

    Raises:
        LedgerError: no match.
    """
    notebook = nbformat.read(ROOT / "book" / f"{chapter}.ipynb", as_version=4)
    source = next((c for c in notebook.cells if c.id == id), None)
    text = "".join(out.get("text", "") for out in source.outputs) if source else ""
    found = re.search(find, text)
    if not found:
        raise LedgerError(f"book/{chapter}.ipynb, cell '{id}': {find!r} is not in its output")
    return interval_in(" ".join((found[1] if found.re.groups else found[0]).split()))


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
    return Number(words, mean)


MEASURES = dict(difference=difference, mean=mean, cell=cell)


def evidence(claim: dict) -> list[tuple[str, Number]]:
    """The numbers of a claim, each with a label.

    Raises:
        LedgerError: a number is missing, or the first does not support the verdict.
    """
    numbers = []
    for item in claim.get("evidence", []):
        of = item.get("of", "")
        (kind, options), = ((k, v) for k, v in item.items() if k in MEASURES)
        numbers.append((of, MEASURES[kind](**options)))
    conditions = claim.get("if", [])
    for condition in [conditions] if isinstance(conditions, str) else conditions:
        name, sign, bound = condition.split()
        if not COMPARE[sign](getattr(numbers[0][1], name), float(bound)):
            raise LedgerError(f"ledger, {claim['id']}: '{claim['verdict']}' stands if {condition}, but the number is "
                              f"{numbers[0][1].text}")
    return numbers


def on_cub(claim: dict, rows: list[dict]) -> tuple[str, str]:
    """A claim's verdict on CUB at full size, "" where it has no rule for one, and the number that it follows from.

    Args:
        rows: Of data/results/cub.csv; see the head of data/ledger.yml for the rule.

    Raises:
        LedgerError: the number meets the conditions of both verdicts.
    """
    if (rule := claim.get("cub")) is None:
        return "", ""
    (kind, options), = ((k, v) for k, v in rule.items() if k in ("difference", "mean", "within"))
    found = (table.difference if kind == "difference" else table.mean)(rows, **options)
    if found is None:
        return "not run", ""
    number, seeds, images = found
    values = {name: 100 * getattr(number, name) for name in ("low", "mean", "high")}

    def met(condition: str) -> bool:
        name, sign, bound = condition.split()
        return COMPARE[sign](values[name], float(bound))

    holds, fails = all(map(met, rule["holds"])), any(map(met, rule["fails"]))
    if holds and fails:
        raise LedgerError(f"ledger, {claim['id']}: on CUB both verdicts would stand; expected conditions that exclude "
                          "each other")
    verdict = "holds" if holds else "does not hold" if fails else "not decided"
    sign, unit = ("", " %") if kind == "mean" else ("+", " points")
    of = f"{seeds} seeds" + (f" x {images} photographs" if images else "")
    low, middle, high = (f"{values[name]:{sign}.2f}" for name in ("low", "mean", "high"))
    return verdict, f"{of_what(kind, **options)}: {middle}{unit} ({low} to {high}; {of})"


def of_what(kind: str, column: str = "", backbone: str = "", **options: str) -> str:
    """In words, what the number of a rule for CUB is of."""
    column, minus = (name.replace("_", " ") for name in (column, options.get("minus", "")))
    if kind == "difference":
        what = f"{options['a']} minus {options['b']}" + (", under attack" if "attacked" in column else "")
    else:
        what = f"{options['arm']}, {column}" + (f" minus {minus}" if minus else "")
    return what + (f", {backbone}" if backbone else "")


def page() -> str:
    """The page: counts, one table per topic, and the commands."""
    book, rows = ledger(), table.recorded()
    claims = book["claims"]
    count = Counter(claim["verdict"] for claim in claims)
    lines = [f"**{len(claims)} claims:** " + ", ".join(f"{count[v]} {v}" for v in VERDICTS) + ".", ""]
    full = Counter(verdict for claim in claims if (verdict := on_cub(claim, rows)[0]))
    lines += [f"On CUB at full size, {full.total()} of them: " + ", ".join(
        f"{n} {v}" for v, n in full.items()) + ". That column follows from the rows of `loupe reproduce` by a rule in "
        "data/ledger.yml, which stands with each claim; nobody writes it.", ""]
    for topic in dict.fromkeys(claim["topic"] for claim in claims):
        lines += [f"## {topic}", "", "| claim | verdict, and what shows it | CUB at full size |", "|---|---|---|"]
        for claim in (c for c in claims if c["topic"] == topic):
            shown = "; ".join(f"{of}: {n.text}" if of else n.text for of, n in evidence(claim))
            shown = shown[:1].upper() + shown[1:] if claim["says"].rstrip().endswith(".") else shown
            where = f"[{claim['chapter'].split('_')[0]}]({claim['chapter']})"
            gpu = f" On a GPU: [{claim['gpu']}](commands)." if "gpu" in claim else ""
            verdict, (full_size, number) = claim["verdict"].capitalize(), on_cub(claim, rows)
            cells = (f"{claim['claim']} *{claim['source']}*",
                     f"**{verdict}.** {claim['says']} {shown + '.' if shown else ''} Chapter {where}.{gpu}",
                     f"**{full_size.capitalize()}.** {number}" if full_size else "")
            lines.append("| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in cells) + " |")
        lines.append("")
    lines += ["(commands)=", "## On a GPU, with CUB", ""]
    cards = sorted({row["card"] for row in rows})
    run = f"{len(rows)} runs on {', '.join(cards)} are recorded." if rows else "Not run here."
    lines += [f"{run} Each command goes on where it was stopped, and brings its rows into a table; `loupe reproduce "
              "--rehearse` tries all of them in small within a minute. See [Scaling up](scaling_up).", ""]
    for name, command in book["commands"].items():
        lines += [f"**{name}**: {command['for']}", "", "```sh", *command["run"].strip().splitlines(), "```", ""]
    return "\n".join(lines) + "\n"


def main() -> None:
    for claim in ledger()["claims"]:
        print(f"{claim['verdict']:<15} {claim['id']}")
        for of, number in evidence(claim):
            print(f"{'':<17}{of}: {number.text}")
    print(Counter(claim["verdict"] for claim in ledger()["claims"]))


if __name__ == "__main__":
    main()
