"""Labels of photographs in a CSV file, where folders do not tell them."""

import csv
import os
import unicodedata
from collections import Counter
from pathlib import Path

from loupe_core.errors import LoupeError, one_line
from loupe_core.files.folders import SPLIT_NAMES, Photographs, photographs_below

LABEL_COLUMNS = {
    "file": ("file", "filename", "file_name", "path", "image", "image_id", "photo"),
    "label": ("label", "class", "species", "category", "target"),
    "split": ("split", "set", "subset"),
}


def listed(root: Path, table: Path) -> Photographs:
    """Photographs below `root` with the labels of a CSV file: a row of column names, then one row per photograph.

    Columns: the file's name below `root` (its ending may be missing), the label, and, if there is one, the split; they
    go by their usual names (`LABEL_COLUMNS`), separated by comma, semicolon or tab. Photographs that no row names are
    passed over.

    Raises:
        LoupeError: A column or every row is missing; a row names no photograph, one a second time, or no known split;
            or a class has no training photographs.
    """
    if not root.is_dir():
        raise LoupeError(f"{root}: found no such folder, expected photographs in it; check the path")
    try:
        text = table.read_text(encoding="utf-8-sig")
        lines = list(csv.reader(text.splitlines(), csv.Sniffer().sniff(text.split("\n")[0], ",;\t")))
    except (OSError, ValueError, csv.Error) as error:
        raise LoupeError(f"{table}: cannot be read ({one_line(error)}); expected a CSV file in UTF-8 with the columns "
                         "file and label") from error
    head = [name.strip().lower() for name in lines[0]]
    at = {what: next((head.index(name) for name in names if name in head), None)
          for what, names in LABEL_COLUMNS.items()}
    if missing := [what for what in ("file", "label") if at[what] is None]:
        raise LoupeError(f"{table}, line 1: found the columns {', '.join(head)}; expected one for the {missing[0]}, "
                         f"such as {', '.join(LABEL_COLUMNS[missing[0]][:4])}")
    passed_over: Counter = Counter()
    there = dict(photographs_below(root, passed_over))
    without_ending: dict[str, list[str]] = {}
    for below in there:
        without_ending.setdefault(os.path.splitext(below)[0], []).append(below)
    rows: dict[str, tuple[str, str]] = {}  # name below root -> label, split
    for number, line in enumerate(lines[1:], 2):
        if not any(field.strip() for field in line):
            continue
        name, label, split = (unicodedata.normalize("NFC", line[k].strip()) if k is not None and k < len(line) else ""
                              for k in (at["file"], at["label"], at["split"]))
        name = name.replace("\\", "/").removeprefix("./")
        below = name if name in there else (without_ending.get(name, []) + [""])[0]
        known = next((key for key, names in SPLIT_NAMES.items() if split.lower() in names), "")
        for wrong, found, expected in (
                (not below, name, f"a photograph below {root}"), (below in rows, name, "each photograph once"),
                (not label, "", "a label"), (at["split"] is not None and not known, split, "train, val or test")):
            if wrong:
                raise LoupeError(f"{table}, line {number}: found {found[:80]!r}, expected {expected}")
        rows[below] = label, known
    found = Photographs(f"labels of {table.name}", sorted({label for label, _ in rows.values()}), [], [], [], [],
                        passed_over)
    for below in sorted(rows):
        label, split = rows[below]
        found.paths.append(there[below])
        found.names.append(below)
        found.splits.append(split)
        found.labels.append(found.class_names.index(label))
    if not rows:
        raise LoupeError(f"{table}: found no row below the names of its columns, expected one for each photograph")
    trained = {label for label, split in zip(found.labels, found.splits) if split in ("", "train")}
    if untrained := [name for k, name in enumerate(found.class_names) if k not in trained]:
        raise LoupeError(f"{table}: found the class {untrained[0]!r} without training photographs, expected some")
    if unlisted := len(there) - len(rows):
        passed_over[f"photographs that are not in {table.name}"] = unlisted
    return found
