"""What the benchmarks share: cases that take turns, ratios of medians, a table, JSON with provenance."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from loupe_core.files.atomic import write_whole
from loupe_lab.evidence.results import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results"
CODE = ("loupe_core", "loupe_lab", "benchmarks")  # the folders whose changes matter for the figures


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in every round. Cases take turns, forwards and backwards, so that drift falls on all."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name in list(cases)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median of `a` over median of `b`, with the least and largest ratio of a single round."""
    single = [x / y for x, y in zip(a, b)]
    found = dict(ratio=statistics.median(a) / statistics.median(b), least=min(single), largest=max(single))
    return {name: round(value, 4) for name, value in found.items()}


def processor() -> str:
    """The processor's name, as far as the system knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def provenance() -> dict:
    """Where figures come from: commit, processor and card, cores, threads, load of the last minute, versions."""
    packages = ("torch", "torchvision", "timm", "pillow", "numpy")
    return dict(commit=commit(ROOT, CODE), processor=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                card=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
                load=round(os.getloadavg()[0], 2), python=platform.python_version(), system=platform.system(),
                versions={name: version(name) for name in packages})


def command(name: str, about: str, measure: Callable[[bool], dict], argv: list[str] | None = None,
            folder: Path | None = None) -> dict:
    """What `python -m benchmarks.NAME [--quick]` does: measures, prints and writes a table, and returns it.

    Args:
        name: of the benchmark; the file is bench_<name>.json.
        about: the module's docstring.
        measure: whether the run is to be quick -> the table: figures, and lists of rows under their names.
        argv: words of the command line; None takes the process's own.
        folder: where to write; None means data/results, and nothing at all for a quick run.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the least of everything: to see that it runs")
    quick = parser.parse_args(argv).quick
    table = measure(quick)
    for key, value in table.items():
        print(f"{key}\n{show(value)}\n" if isinstance(value, list) else f"{key}: {value}")
    if folder or not quick:
        print(f"written to {write(name, table, folder or RESULTS)}")
    return table


def write(name: str, table: dict, folder: Path) -> Path:
    """Writes `table` with its provenance to bench_<name>.json in `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"bench_{name}.json"
    write_whole(file, json.dumps({**table, "provenance": provenance()}, indent=1) + "\n")
    return file


def show(rows: list[dict]) -> str:
    """Rows with the same keys -> a table with aligned columns; numbers to the right, with four digits."""
    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    cells = [list(rows[0])] + [[text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = [isinstance(value, (int, float)) for value in rows[0].values()]
    return "\n".join("  ".join(cell.rjust(width) if number else cell.ljust(width)
                               for cell, width, number in zip(line, widths, right)).rstrip() for line in cells)
