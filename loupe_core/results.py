"""Recorded results: the rows in ``data/results`` that long runs have left for the chapters to show."""

import csv
import os
from pathlib import Path

from loupe_core.errors import LoupeError


def read_results(name: str) -> list[dict[str, str]]:
    """Rows of ``data/results/<name>.csv``, looked for in the folder LOUPE_RESULTS, else here and in the folders above.

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
    raise LoupeError(f"no recorded results '{name}.csv' in {folders[0]}; expected a checkout of the book: start "
                     "there, or set LOUPE_RESULTS to its folder data/results")
