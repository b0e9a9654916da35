"""The lists of a data set in CUB's layout; a wrong line is named."""

import os
import re
from pathlib import Path
from unicodedata import normalize

import numpy as np

from loupe_core.errors import LoupeError

_AGAIN = "unpack the set again"
_CLIMBS = re.compile(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)|\0")  # out of the folder, on Windows too
_LARGEST = 1e30  # of a table's numbers; float32 holds no more than 3.4e38


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without blanks at its end. Raises LoupeError where there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except FileNotFoundError:
        raise LoupeError(f"{path}: found no such file, expected the CUB-200-2011 layout; {_AGAIN}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LoupeError(f"{path}: found unreadable text ({error}), expected UTF-8; {_AGAIN}") from None
    if not lines:
        raise LoupeError(f"{path}: found an empty file, expected one entry a line; {_AGAIN}")
    return lines


def read_names(path: Path) -> tuple[np.ndarray, list[str]]:
    """A list of "<id> <name>" lines -> ids (N,) int64, names."""
    ids, names = [], []
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split(maxsplit=1)
        if len(fields) != 2 or not fields[0].isdecimal() or len(fields[0]) > 18:
            raise line_error(path, number, line, "an id and a name")
        ids.append(int(fields[0]))
        names.append(fields[1].rstrip())
    for what, values in (("id", ids), ("name", names)):
        if len(set(values)) < len(values):
            seen = set()
            number = next(k for k, value in enumerate(values, 1) if value in seen or seen.add(value))
            raise line_error(path, number, values[number - 1], f"each {what} once")
    return np.array(ids), names


def climbs(name: str) -> bool:
    """Whether a listed name leads out of the folder that it belongs to."""
    return _CLIMBS.search(name) is not None


def read_files(path: Path) -> tuple[np.ndarray, list[str]]:
    """As `read_names`, of files, each of which stays inside of the folder images/."""
    ids, files = read_names(path)
    check_rows(path, np.array([not climbs(file) for file in files]), "a path inside of images/")
    return ids, files


def on_disk(folder: str, name: str) -> str:
    """The path of a listed file, whose letters a copy may have composed (NFC) or taken apart (NFD, as macOS does)."""
    path = os.path.join(folder, name)
    if name.isascii() or os.path.exists(path):
        return path
    forms = (os.path.join(folder, normalize(form, name)) for form in ("NFC", "NFD"))
    return next(filter(os.path.exists, forms), path)


def read_table(path: Path, columns: int, ids: np.ndarray) -> np.ndarray:
    """A table of numbers whose first column is `ids` -> (len(ids), columns) float64."""
    lines = read_lines(path)
    try:
        table = np.loadtxt(lines, ndmin=2, comments=None)
    except ValueError:
        table = np.empty((0, 0))
    if table.shape != (len(lines), columns) or not (np.abs(table) < _LARGEST).all():
        bad = (k for k, line in enumerate(lines) if not _is_row(line, columns))
        number = next(bad, 0) + 1
        raise line_error(path, number, lines[number - 1], f"{columns} numbers")
    for row in np.flatnonzero(table[: len(ids), 0] != ids[: len(lines)])[:1]:
        raise line_error(path, row + 1, lines[row], f"image id {ids[row]}, in step with images.txt")
    if len(lines) != len(ids):
        expected = f"{len(ids)}, in step with images.txt"
        raise LoupeError(f"{path}: found {len(lines)} lines, expected {expected}; {_AGAIN}")
    return table


def _is_row(line: str, columns: int) -> bool:
    try:
        return sum(abs(float(field)) < _LARGEST for field in line.split()) == columns == len(line.split())
    except ValueError:
        return False


def check_rows(path: Path, good: np.ndarray, expected: str) -> None:
    """Raises LoupeError for the first line that is not `good` (one bool per line of the file)."""
    if not good.all():
        number = int(np.argmin(good)) + 1
        raise line_error(path, number, read_lines(path)[number - 1], expected)


def line_error(path: Path, number: int, found: str | int, expected: str) -> LoupeError:
    """What is wrong with a line, counted from 1."""
    return LoupeError(f"{path}, line {number}: found {str(found)[:60]!r}, expected {expected}; {_AGAIN}")
