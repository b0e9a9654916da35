"""Many runs: which are left, in what order, by whom; their rows in one file; how long it takes.

Several processes may work on the same runs: each takes what no other has locked. `part` shares them out in advance,
for machines whose disks know no locks.
"""

import csv
import errno
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from loupe_core.errors import LoupeError, one_line
from loupe_lab.evidence.answers import write_table
from loupe_lab.paper.arms import ARMS, AUTHORS, BACKBONES, Run
from loupe_lab.paper.experiment import Setting, leftovers, perform

IN_A_ROW = 3  # so many runs that fail one after the other have something in common
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
AROUND = 1.15  # a run takes so many times its training: evaluation, audit, attack


def read_rows(results: Path) -> list[dict[str, str]]:
    """The rows of a results file, all values as text; none where there is no file.

    Raises:
        LoupeError: A row is not whole, or not of a run that is known here.
    """
    if not results.is_file():
        return []
    try:
        with results.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet's mark at the beginning is no name
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as e:
        raise LoupeError(f"{results}: found no table ({one_line(e)}); expected the rows of `loupe reproduce`: give "
                         "another --results") from e
    for number, row in enumerate(rows, 2):
        if fault := fault_of(row):
            raise LoupeError(f"{results}, line {number}: found {fault}; expected a row of `loupe reproduce`: mend the "
                             "line, or give another --results")
    return rows


def fault_of(row: dict) -> str:
    """What is wrong with a row as it is in a file; empty where nothing is."""
    if None in row or None in row.values():
        return "more or fewer values than the first line has names"
    if lacking := [name for name in (*Run._fields, "accuracy", "images", "right", "seconds", "card")
                   if str(row.get(name, "")) == ""]:
        return f"no {lacking[0]}"
    try:
        run = run_of_row(row)
        if run.backbone not in BACKBONES or run.arm not in (*ARMS, *AUTHORS):
            return f"the run {run.name}, which is not known here"
        float(row["accuracy"]), float(row["seconds"])
        if len(bytes.fromhex(row["right"])) != -(-int(row["images"]) // 8):
            return f"answers that are not those of {row['images']} images"
    except ValueError as e:
        return one_line(e)
    return ""


def run_of_row(row: dict) -> Run:
    """The run that a row is of."""
    return Run(row["backbone"], int(row["pixels"]), row["arm"], int(row["seed"]))


@contextmanager
def locked(file: Path, timeout: float = -1) -> Iterator[None]:
    """Holds a lock. On a disk that knows no locks, as some network disks are, nothing is: `part` keeps processes apart.

    Raises:
        TimeoutError: Another process holds it for longer than `timeout` seconds.
    """
    try:
        # newer ones would write a mark instead, which stays for good where a machine on Colab or a cluster is lost
        lock = FileLock(file, timeout=timeout, fallback_to_soft=False)
    except TypeError:
        lock = FileLock(file, timeout=timeout)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as e:
        if isinstance(e, Timeout) or getattr(e, "errno", None) not in (None, *_NO_LOCKS):
            raise
        yield
        return
    try:
        yield
    finally:
        lock.release()


def collect(out: Path, results: Path, images: int | None = None, write: bool = True) -> dict[Run, dict]:
    """Brings the rows of all finished runs in `out` into the results file, and returns all that stand there.

    Rows of runs whose folders are elsewhere stay as they are.

    Args:
        images: How many test images every row must be of; None: as many as it has. A rehearsal's are fewer than CUB's.
        write: Whether the file is written; else nothing is.

    Raises:
        LoupeError: The results file or a run's row cannot be read, or is of other images; or they have other columns.
    """
    if not write:
        return _collected(out, results, images)
    results.parent.mkdir(parents=True, exist_ok=True)
    with locked(results.with_suffix(".lock")):
        found = _collected(out, results, images)
        if found and read_rows(results) != list(found.values()):
            write_table(results, list(found.values()))
    return found


def _collected(out: Path, results: Path, images: int | None) -> dict[Run, dict]:
    found, files = {run_of_row(row): row for row in read_rows(results)}, {}
    for file in sorted(out.glob("*/row.json")):
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
            fault = fault_of(row)
        except (OSError, ValueError, AttributeError, TypeError) as e:
            fault = one_line(e)
        if fault:
            raise LoupeError(f"{file}: found no row ({fault}); move its folder elsewhere, and the run is made again")
        run = run_of_row(row)
        if (known := found.get(run)) is not None and known.keys() != row.keys():
            raise LoupeError(f"{results}: found other columns than {file} has; expected the same: give another "
                             "--results")
        files[run] = file
        found.setdefault(run, {name: str(value) for name, value in row.items()})
    for run, row in found.items():
        if images is not None and int(row["images"]) != images:
            raise LoupeError(f"{files.get(run, results)}: found a row of {row['images']} test images, as a rehearsal "
                             f"writes them; expected {images}: give another --out or --results")
    order = [*ARMS, *AUTHORS]
    runs = sorted(found, key=lambda run: (run.pixels, list(BACKBONES).index(run.backbone), order.index(run.arm),
                                          run.seed))
    if len({tuple(found[run]) for run in runs}) > 1:
        raise LoupeError(f"{results}: found rows with other columns than those of {out}; expected the same: give "
                         "another --results")
    return {run: found[run] for run in runs}


def reproduce(runs: Sequence[Run], setting: Setting, results: Path, part: tuple[int, int] = (1, 1),
              expected: Callable[[Run], float | None] = lambda run: None,
              tell: Callable[[str], None] = print, card: str = "") -> dict[Run, dict]:
    """Makes the runs that are not in the results file yet, and returns all rows there.

    Args:
        part: (which, of how many), counted from 1: only every so many-th run.
        expected: Seconds of a training before any was measured; None where nothing is known.
        tell: Called with a line on every run, and on the time left.
        card: On which they are made, see `remaining`.

    Raises:
        LoupeError: Some runs could not be made; all others were, unless `IN_A_ROW` failed one after the other.
    """
    which, parts = part
    mine, failed, in_a_row = list(runs)[which - 1 :: parts], [], 0
    for run in mine:
        done = collect(setting.out, results, setting.images)
        if run in done and not leftovers(run, setting):
            continue
        (setting.out / run.name).mkdir(parents=True, exist_ok=True)
        try:
            with locked(setting.out / run.name / "lock", timeout=0):
                if run in done:
                    perform(run, setting)  # it was stopped while it removed its states
                    continue
                tell(f"{run.name}: begins; {remaining(mine, done, expected, card)}")
                began = time.perf_counter()
                row = perform(run, setting)
                tell(f"{run.name}: {row['accuracy']:.2%} of {row['images']} test images, {row['epochs']} epochs, "
                     f"{_duration(time.perf_counter() - began)}")
                in_a_row = 0
        except Timeout:
            tell(f"{run.name}: another process works on it")
        except LoupeError as error:
            failed.append(run.name)
            tell(f"{run.name}: not made: {error}")
            if (in_a_row := in_a_row + 1) == IN_A_ROW:
                raise LoupeError(f"{IN_A_ROW} runs one after the other could not be made, the lines above say why; "
                                 "mend it, and the same command goes on") from error
    done = collect(setting.out, results, setting.images)
    if failed:
        raise LoupeError(f"{len(failed)} of {len(mine)} runs could not be made, the lines above say why: "
                         f"{', '.join(failed[:3])}{', ...' if len(failed) > 3 else ''}; the same command tries them "
                         "again")
    return done


def remaining(runs: Sequence[Run], done: dict[Run, dict], expected: Callable[[Run], float | None],
              card: str = "") -> str:
    """How many of the runs are left, and how long they take, in words.

    A run takes what the finished ones of its backbone and protocol took on average; before there is one, what is
    `expected`.

    Args:
        card: Count finished runs of this card alone, where it is given.
    """
    def kind(run: Run) -> tuple:
        return run.backbone, run.pixels, run.change.get("protocol")

    left, seconds = [run for run in runs if run not in done], []
    for run in left:
        same = [float(row["seconds"]) for other, row in done.items()
                if kind(other) == kind(run) and card in ("", row["card"])]
        found = sum(same) / len(same) if same else expected(run)
        seconds += [] if found is None else [AROUND * found]
    words = f"{len(left)} of {len(runs)} runs left"
    if not seconds:
        return words + (", the first one will tell how long" if left else "")
    if len(seconds) < len(left):
        words += f", {len(seconds)} of them"
    return f"{words}, about {_duration(sum(seconds))}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
