"""The paper's table from the rows of `loupe reproduce`: accuracies, and differences to the bare backbone."""

from collections.abc import Sequence

import numpy as np

from loupe_core.errors import LoupeError
from loupe_lab.evidence.results import interval, read_results, unpack_right
from loupe_lab.evidence.statistics import Difference, paired_difference
from loupe_lab.paper.arms import AUTHORS, PAPERS, PAPERS_TINY

RESULTS = "cub"  # data/results/cub.csv
# (backbone, arm) -> per cent on the test split, as the paper's two versions give it
PUBLISHED = {(PAPERS, "bare"): "85.40, 88.36", (PAPERS, "loupe"): "88.06, 91.72", (PAPERS_TINY, "bare"): "-, 85.14",
             (PAPERS_TINY, "loupe"): "-, 88.61", (PAPERS, "multi-scale"): "85.71, -", (PAPERS, "lambda 5"): "87.85, -"}
NOT_RUN = "CUB at full size: not run here; `make paper` runs it on a card, and this cell then shows it"


def recorded() -> list[dict]:
    """The rows of data/results/cub.csv; none where it was not run."""
    try:
        return read_results(RESULTS)
    except LoupeError:
        return []


def cub_table(arms: Sequence[str] | None = None) -> str:
    """`table` of what is recorded, or a line that nothing is."""
    rows = recorded()
    return table(rows, arms) if rows else NOT_RUN


def arm_rows(rows: Sequence[dict], arm: str, backbone: str = PAPERS, pixels: int = 224) -> dict[str, dict]:
    """The rows of an arm, by seed."""
    return {row["seed"]: row for row in rows
            if (row["arm"], row["backbone"], row["pixels"]) == (arm, backbone, str(pixels))}


def difference(rows: Sequence[dict], a: str, b: str, backbone: str = PAPERS, column: str = "right",
               pixels: int = 224) -> tuple[Difference, int, int] | None:
    """Arm a minus arm b over the seeds that both have; None with fewer than two.

    Args:
        column: "right" or "right_attacked", answers to the same images; or a column with one number per run.

    Returns:
        The difference as a fraction or in the column's unit, the number of seeds, and that of the images, which is 0
        for a column with one number per run.
    """
    one, other = arm_rows(rows, a, backbone, pixels), arm_rows(rows, b, backbone, pixels)
    seeds = sorted(s for s in one.keys() & other.keys() if one[s][column] != "" and other[s][column] != "")
    if len(seeds) < 2:
        return None
    if column.startswith("right"):
        n = int(one[seeds[0]]["images" if column == "right" else "attacked"])
        sides = [[unpack_right(dict(right=side[s][column]), n) for s in seeds] for side in (one, other)]
        return paired_difference(*map(np.stack, sides)), len(seeds), n
    mean, half = interval([float(one[s][column]) - float(other[s][column]) for s in seeds])
    return Difference(mean, half), len(seeds), 0


def mean(rows: Sequence[dict], arm: str, column: str, backbone: str = PAPERS,
         minus: str | None = None) -> tuple[Difference, int, int] | None:
    """An arm's mean of a column over its seeds, or of a column minus another; None with fewer than two seeds.

    Returns:
        As `difference`.
    """
    of_arm = arm_rows(rows, arm, backbone).values()
    values = [float(row[column]) - float(row[minus] if minus else 0) for row in of_arm if row[column] != ""]
    return (Difference(*interval(values)), len(values), 0) if len(values) > 1 else None


def optimism(rows: Sequence[dict], backbone: str = PAPERS) -> dict[str, float]:
    """By how much the authors' protocol is too good, per arm: the test accuracy of the epoch that the test split chose
    minus that of the last epoch, mean over the seeds."""
    found = {}
    for arm in AUTHORS:
        of_arm = arm_rows(rows, arm, backbone).values()
        values = [float(row["accuracy"]) - float(row["last_accuracy"]) for row in of_arm]
        found |= {arm: sum(values) / len(values)} if values else {}
    return found


def table(rows: Sequence[dict], arms: Sequence[str] | None = None, published: bool = True) -> str:
    """Lines of text: for each backbone and arm the mean accuracy over the seeds with its interval, the difference to
    the bare backbone with that of `paired_difference`, and the published figures of both versions.

    Args:
        rows: Of `recorded`, or of a rehearsal.
        arms: None means all that are there.
        published: With the paper's own figures.
    """
    if not rows:
        return "no run is finished yet"
    cards = ", ".join(sorted({row["card"] for row in rows}))
    lines = [f"{len(rows)} runs on {cards}; intervals at 95 %",
             "backbone     px   arm            seeds  accuracy, %             minus bare, points        "
             + ("paper (v1, v2)" if published else "")]
    for backbone, pixels, arm in dict.fromkeys((row["backbone"], row["pixels"], row["arm"]) for row in rows):
        if arms is not None and arm not in arms:
            continue
        of_arm = arm_rows(rows, arm, backbone, int(pixels))
        values = [100 * float(row["accuracy"]) for row in of_arm.values()]
        mean, half = interval(values) if len(values) > 1 else (values[0], None)
        accuracy = f"{mean:.2f}"
        if half is not None:
            accuracy += f" ({max(mean - half, 0):.2f} to {min(mean + half, 100):.2f})"
        base = "authors bare" if arm in AUTHORS else "bare"
        found = None if arm == base else difference(rows, arm, base, backbone, pixels=int(pixels))
        gain = "" if found is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(
            *(100 * value for value in (found[0].mean, found[0].low, found[0].high)))
        beside = PUBLISHED.get((backbone, arm), "") if published and pixels == "224" else ""
        lines.append(f"{backbone:<11}  {pixels:<3}  {arm:<13}  {len(values):>5}  {accuracy:<22}  {gain:<24}  "
                     f"{beside}".rstrip())
    for arm, value in optimism(rows).items():
        if arms is None or arm in arms:
            lines.append(f"{arm}: the epoch that the test split chose is {100 * value:+.2f} points above the last one")
    return "\n".join(lines)
