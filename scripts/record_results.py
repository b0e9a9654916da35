"""Run a declared grid of trainings and record one row a run: ``python scripts/record_results.py small_profile``.

The grids stand in scripts/grids_*.py; ``make results`` runs them all, ``make results GRID=reach`` one. A grid that was
stopped goes on where it stopped: rows that stand in data/results/<grid>.csv are not run again. Every row carries its
provenance: commit, versions, processor, precision, threads, seed and seconds.
"""

import argparse
import csv
import importlib
import json
import math
import os
import time
from pathlib import Path

from runs import RESULTS, ROOT, provenance

# name -> (function of the choices, which returns what came out and the Trainer or None; the choices of every row)
GRIDS = {}
for _file in sorted(Path(__file__).parent.glob("grids_*.py")):
    GRIDS |= importlib.import_module(_file.stem).GRIDS


def keep_masks(grid: str, choice: dict, masks: dict) -> None:
    """Adds a run's masks, by image id, to data/results/<grid>_masks.json, in place of those it had."""
    file = RESULTS / f"{grid}_masks.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows = [row for row in rows if any(row[k] != v for k, v in choice.items())] + [{**choice, "masks": masks}]
    beside = file.with_suffix(".unfinished")
    beside.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(beside, file)


def run_row(grid: str, choice: dict) -> dict:
    """One row of a grid, run now: its choices, what came out, and its provenance."""
    began = time.perf_counter()
    outcome, trainer = GRIDS[grid][0](**choice)
    masks = outcome.pop("masks", None)
    if masks:
        keep_masks(grid, choice, masks)
    where = {} if trainer is None and "commit" in outcome else provenance(trainer)
    return {**choice, **outcome, "seconds": math.ceil(10 * (time.perf_counter() - began)) / 10, **where}


def record(grid: str, file: Path | None = None) -> Path:
    """Runs the rows of `grid` that its file does not hold yet; returns the file."""
    file = file or RESULTS / f"{grid}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    choices = GRIDS[grid][1]
    there = list(csv.DictReader(file.open())) if file.exists() else []
    rows = {i: row for i, choice in enumerate(choices) for row in there
            if all(row[k] == str(v) for k, v in choice.items())}
    for i, choice in enumerate(choices):
        if i in rows:
            continue
        rows[i] = run_row(grid, choice)
        print(rows[i], flush=True)
        beside = file.with_suffix(".unfinished")
        with beside.open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[i].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[k] for k in sorted(rows))
        os.replace(beside, file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grids", nargs="*", help=f"without a name, all: {', '.join(GRIDS)}")
    names = parser.parse_args().grids or list(GRIDS)
    if unknown := set(names) - set(GRIDS):
        parser.error(f"no grid {sorted(unknown)[0]!r}; expected some of {', '.join(GRIDS)}")
    for name in names:
        print(record(name).relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
