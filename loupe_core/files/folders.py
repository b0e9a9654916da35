"""What lies in a folder of photographs: which folders are splits, which are classes, and what was passed over."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from loupe_core.errors import LoupeError
from loupe_core.files.images import FORMATS

SPLIT_NAMES = {
    "train": ("train", "training", "training_set", "train_set"),
    "val": ("val", "valid", "validation", "dev", "eval", "val_set", "validation_set"),
    "test": ("test", "testing", "testing_set", "test_set"),
}
# Made by systems and archivers, not by the person whose photographs these are; compared in lower case.
SYSTEM = {"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle", "thumbs.db",
          "desktop.ini"}


@dataclass
class Photographs:
    """What `survey` found: `names`, `splits` and `labels` have one entry per photograph, in order.

    names: "<class>/<path below it>" with slashes, letters composed (NFC), the same on every system; splits: "train",
    "val", "test", or "" in a folder that is not divided; labels: into `class_names`.
    """

    layout: str  # in words
    class_names: list[str]
    paths: list[Path] | list[str]
    names: list[str]
    splits: list[str]
    labels: list[int]
    passed_over: Counter  # what was passed over, such as the ending of names -> number of files


def survey(root: Path) -> Photographs:
    """Looks through a folder in one of two layouts: `<class>/...`, or `<train, val or test>/<class>/...`.

    The folders of splits go by their usual names in any case (`SPLIT_NAMES`), unless they hold photographs themselves:
    a class may be called "train". Folders without photographs are no classes. Links are followed, but no loops. What
    systems and archivers leave, and names that begin with a dot, do not count.

    Raises:
        LoupeError: No such folder, no photographs in it, a single class made of folders, a split twice, other folders
            beside train, or a class without training photographs.
    """
    if not root.is_dir():
        raise LoupeError(f"{root}: found no such folder, expected one folder for each class in it; check the path")
    children = {child.name: child for child in sorted(root.iterdir()) if child.is_dir() and not _is_system(child.name)}
    if not children:
        raise LoupeError(f"{root}: found no folders in it, expected one folder of photographs for each class")
    parts = _splits_among(root, children)
    passed_over: Counter = Counter()
    found = Photographs("", [], [], [], [], [], passed_over)
    classes: dict[str, dict[str, list[tuple[str, Path]]]] = {}  # split -> class -> (name below it, path)
    for split, folder in (parts or {"": root}).items():
        classes[split] = {}
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not _is_system(child.name):
                inside = list(photographs_below(child, passed_over))
                if inside:  # there may be two folders whose names differ in composition alone
                    classes[split].setdefault(unicodedata.normalize("NFC", child.name), []).extend(inside)
    first = classes.get("train", classes.get("", {}))
    found.class_names = sorted(first)
    _check_classes(root, parts, classes, found.class_names)
    for split, by_name in classes.items():
        for name in sorted(by_name):
            for below, path in sorted(by_name[name]):
                found.paths.append(path)
                found.names.append(f"{name}/{below}")
                found.splits.append(split)
                found.labels.append(found.class_names.index(name))
    found.layout = ", ".join(f"{folder.name}/ is {split}" for split, folder in parts.items()) \
        if parts else "one folder for each class"
    return found


def list_images(folder: Path) -> list[Path]:
    """Photographs at any depth below a folder, in order; what `survey` passes over is passed over here too."""
    return [path for _, path in sorted(photographs_below(folder, Counter()))]


def photographs_below(folder: Path, passed_over: Counter) -> Iterator[tuple[str, Path]]:
    """(name below `folder`, path) of each photograph at any depth; other files are counted in `passed_over`."""
    return ((below, path) for below, path in _walk(folder) if _is_image(path, passed_over))


def size_of(path: str) -> int:
    """Bytes of a file; -1 where there is none, which is told when it is opened."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def same_content(paths: Sequence[str], splits: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of two files of the same content in different splits.

    Only files of the same size are opened, and read as a whole only where their ends are the same: of a million
    photographs nearly each has another's size.
    """
    by_size: dict[int, list[int]] = {}
    for i, path in enumerate(paths):
        by_size.setdefault(size_of(path), []).append(i)
    pairs = []
    for size, members in by_size.items():
        if size < 1 or len({splits[i] for i in members}) < 2:
            continue
        ends = {i: _end(paths[i]) for i in members}
        times, by_content = Counter(ends.values()), {}
        for i in (i for i in members if times[ends[i]] > 1):
            with suppress(OSError):  # a file that cannot be read is told when it is opened
                first = by_content.setdefault(hashlib.blake2b(Path(paths[i]).read_bytes()).digest(), i)
                if splits[first] != splits[i]:
                    pairs.append((first, i))
    return pairs


def _end(path: str) -> bytes | None:
    """The last bytes of a file, which differ where compressed photographs do; None where it cannot be read."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - 1024, 0))
        return file.read()
    return None


def _splits_among(root: Path, children: dict[str, Path]) -> dict[str, Path]:
    """split -> its folder; {} where the folder is not divided."""
    parts: dict[str, Path] = {}
    for name, child in children.items():
        split = next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)
        if split is None or not _holds_folders_alone(child):
            continue
        if split in parts:
            raise LoupeError(f"{root}: found {parts[split].name}/ and {name}/, both names of the split {split}; "
                             "expected one of them: move the other's photographs into it")
        parts[split] = child
    if parts and "train" not in parts:
        listed = ", ".join(f"{folder.name}/" for folder in parts.values())
        raise LoupeError(f"{root}: found {listed} and no train/; expected train/ as well, or one folder for each class")
    others = [name for name in children if children[name] not in parts.values()]
    if parts and others:
        raise LoupeError(f"{root}: found {others[0]!r} beside {parts['train'].name}/; expected only the folders of "
                         "train, val and test: move it elsewhere")
    return parts


def _check_classes(root: Path, parts: dict[str, Path], classes: dict, names: list[str]) -> None:
    if not names:
        raise LoupeError(f"{root}: found no photographs in its folders, expected one folder of them for each class")
    inner = parts.get("train", root) / names[0]
    if len(names) == 1 and _holds_folders_alone(inner):
        raise LoupeError(f"{root}: found one class only, {names[0]!r}, with folders in it; expected one folder for "
                         f"each class: is it one folder further down, {inner}?")
    for split, by_name in classes.items():
        if extra := sorted(set(by_name) - set(names)):
            raise LoupeError(f"{parts[split] / extra[0]}: found a class without training photographs, expected some in "
                             f"{parts['train'] / extra[0]}")


def _holds_folders_alone(folder: Path) -> bool:
    """Whether a folder holds folders, and no photograph of its own."""
    inside = [child for child in folder.iterdir() if not _is_system(child.name)] if folder.is_dir() else []
    return any(child.is_dir() for child in inside) and not any(_is_image(child, Counter()) for child in inside)


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name below `folder`, path) of every file. Links are followed, but no folder is entered twice."""
    seen: set[str] = set()
    for base, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_system(name))
        for name in files:
            if not _is_system(name):
                path = Path(base, name)
                yield unicodedata.normalize("NFC", path.relative_to(folder).as_posix()), path


def _is_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def _is_image(path: Path, passed_over: Counter) -> bool:
    """Whether `open_image` reads files of this ending; others are counted."""
    ending = path.suffix.lower()
    if Image.registered_extensions().get(ending) in FORMATS:
        return not path.is_dir()
    if not path.is_dir():
        passed_over[ending or "no ending"] += 1
    return False
