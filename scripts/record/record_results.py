"""Run a grid of trainings and record one row per run: `python scripts/record/record_results.py small_profile`.

The grids are in scripts/record/grids_*.py; `make results` runs them all, `make results GRID=reach` one. A grid that was
stopped continues where it stopped: rows that are in data/results/<grid>.csv are not run again. Every row has its
provenance: commit, versions, kind of processor, precision, threads, seed and seconds.

Several machines can share a grid: `--part 3/16` runs every 16th row, from the third on, and writes them to
data/results/parts. A later call without `--part` reads them and runs what is missing.
"""

import argparse
import csv
import importlib
import json
import math
import time
from pathlib import Path

from runs import RESULTS, ROOT, provenance, write_rows

from loupe_core.files.atomic import write_whole
from loupe_lab.commands import part

# name -> (function of a row's choices, which returns its results and the Trainer or None; the choices of all rows)
GRIDS = {}
RECORDING = set()  # names of grids whose rows are not all there yet: a file of grids may have such a set
for _file in sorted(Path(__file__).parent.glob("grids_*.py")):
    _module = importlib.import_module(_file.stem)
    GRIDS |= _module.GRIDS
    RECORDING |= getattr(_module, "RECORDING", set())


def keep_masks(grid: str, choice: dict, masks: dict) -> None:
    """Writes a run's masks, by image id, to data/results/<grid>_masks.json, in place of an earlier run's."""
    file = RESULTS / f"{grid}_masks.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = [row for row in rows if any(row[k] != v for k, v in choice.items())] + [{**choice, "masks": masks}]
    write_whole(file, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def run_row(grid: str, choice: dict) -> dict:
    """Runs one row of a grid: its choices, its results, seconds and provenance."""
    began = time.perf_counter()
    outcome, trainer = GRIDS[grid][0](**choice)
    masks = outcome.pop("masks", None)
    if masks:
        keep_masks(grid, choice, masks)
    where = {} if trainer is None and "commit" in outcome else provenance(trainer)
    return {**choice, **outcome, "seconds": math.ceil(10 * (time.perf_counter() - began)) / 10, **where}


def record(grid: str, file: Path | None = None, part: tuple[int, int] = (1, 1)) -> Path:
    """Runs the rows of a grid that are not recorded yet, or those of a part of it, and returns the file of the rows.

    Args:
        file: None means data/results/<grid>.csv; parts are beside it, in the folder `parts`.
        part: (which, of how many), counted from 1.
    """
    file = file or RESULTS / f"{grid}.csv"
    which, parts = part
    parts_folder = file.parent / "parts"
    choices = GRIDS[grid][1]
    recorded = [row for of in (file, *sorted(parts_folder.glob(f"{file.stem}-*.csv"))) if of.exists()
                for row in csv.DictReader(of.open(encoding="utf-8"))]
    rows = {i: row for i, choice in enumerate(choices) for row in recorded
            if all(row[k] == str(v) for k, v in choice.items())}
    if parts > 1:
        file = parts_folder / f"{file.stem}-{which}-of-{parts}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = range(which - 1, len(choices), parts)
    missing = [i for i in mine if i not in rows]
    for i in missing:
        rows[i] = run_row(grid, choices[i])
        print(rows[i], flush=True)
        write_rows(file, [rows[k] for k in mine if k in rows])
    if parts == 1 and not missing and parts_folder.exists():
        write_rows(file, [rows[k] for k in mine])
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grids", nargs="*", help=f"without a name, all: {', '.join(GRIDS)}")
    parser.add_argument("--part", type=part, default=(1, 1), help="which/of how many, such as 3/16: rows to run here")
    arguments = parser.parse_args()
    names = arguments.grids or list(GRIDS)
    if unknown := set(names) - set(GRIDS):
        parser.error(f"no grid {sorted(unknown)[0]!r}; expected some of {', '.join(GRIDS)}")
    for name in names:
        print(record(name, part=arguments.part).relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
