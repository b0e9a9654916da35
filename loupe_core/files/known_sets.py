"""Sets that others publish: a folder of one is known by the set's own files, and cut by its own lists.

Where torchvision has a class for a set, the folder is the one that the class reads, and labels, names and order of the
classes are the same.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from loupe_core.errors import LoupeError, one_line
from loupe_core.files import set_lists
from loupe_core.files.download import find_cub
from loupe_core.files.folders import Photographs
from loupe_core.files.lists import climbs, on_disk
from loupe_core.files.set_lists import SPECIES, TEST_2021, TRAIN_2021, Lists, Missing

_UUID = re.compile(r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12} ")
_AGAIN = "unpack the set again"


class KnownSet(NamedTuple):
    """A published set: where it is described and fetched, how its folder is known and read, how large it is."""

    name: str
    page: str
    is_here: Callable[[Path], bool]
    read: Callable[[Path], Lists]
    sizes: tuple[int, int, int] | None  # classes, training and test photographs where it is complete
    folders: tuple[str, ...] = ()  # where torchvision or the archive puts it, below the folder that the user names
    groups: str = ""  # what names of classes without photographs are; where this is empty, they are a fault


def known_set(root: str | Path) -> tuple[KnownSet, Path] | None:
    """The published set in a folder, and the set's own folder: `root`, or the one below it that torchvision or the
    archive makes. None where there is none, or only CUB-200-2011.

    Raises:
        LoupeError: There are several below `root`.
    """
    found: dict[Path, KnownSet] = {}
    for known in KNOWN_SETS:
        for base in (Path(root), *(Path(root, folder) for folder in known.folders)):
            if known.is_here(base):
                found.setdefault(base, known)
    names = {base: known.name for base, known in found.items()}
    if found and (cub := find_cub(root)) is not None:
        names.setdefault(cub, "CUB-200-2011")
    if len(names) > 1:
        listed = ", ".join(f"{name} in {base}" for base, name in names.items())
        raise LoupeError(f"{root}: found several sets ({listed}), expected one: name its own folder")
    return next(((known, base) for base, known in found.items()), None)


def published(root: str | Path) -> Photographs | None:
    """The published set in a folder by its own lists, or None where there is none.

    Splits are "train", which takes in an official validation list where there is one, and "test". Classes are in the
    set's own order; names are paths below the set's folder.

    Raises:
        LoupeError: A file is missing; a line of a list is not understood, or names a photograph twice or a place
            outside of the set; or a class has no training or no test photographs.
    """
    if (found := known_set(root)) is None:
        return None
    known, base = found
    try:
        names, rows = known.read(base)
    except LoupeError:
        raise
    except Missing as gone:
        raise LoupeError(f"{base}: found {known.name} without {gone}, expected it there: {_AGAIN}, or fetch what is "
                         f"missing ({known.page})") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # a table of other columns or types
        raise LoupeError(f"{base}: found lists of {known.name} that cannot be understood ({one_line(error)}), expected "
                         f"those that were published; {_AGAIN}") from error
    files = [row.file for row in rows]
    if outside := next(filter(climbs, files), None):
        raise LoupeError(f"{base}: found {outside[:60]!r} in the lists of {known.name}, expected a path inside of the "
                         f"folder; {_AGAIN}")
    if len(set(files)) < len(files):
        twice = Counter(files).most_common(1)[0][0]
        raise LoupeError(f"{base}: found {twice[:60]!r} twice in the lists of {known.name}, expected each photograph "
                         f"once; {_AGAIN}")
    counts = {split: np.bincount([row.label for row in rows if row.split == split], minlength=len(names))
              for split in ("train", "test")}
    used = np.flatnonzero(counts["train"] + counts["test"]) if known.groups else np.arange(len(names))
    for split, words in (("train", "training"), ("test", "test")):
        if empty := [names[k] for k in used if not counts[split][k]]:
            raise LoupeError(f"{base}: found no {words} photographs of {empty[0]!r} in the lists of {known.name}, "
                             f"expected some of each class; {_AGAIN}")
    layout, sizes = f"{known.name} by its own lists", (len(used), *(int(counts[s].sum()) for s in ("train", "test")))
    if known.sizes and sizes != known.sizes:
        layout += " (published with {1:,} training and {2:,} test photographs of {0:,} classes)".format(*known.sizes)
    return Photographs(
        layout, [names[k] for k in used], [on_disk(str(base), file) for file in files],
        [normalize("NFC", file) for file in files], [row.split for row in rows],
        np.searchsorted(used, [row.label for row in rows]).tolist(),
        Counter({known.groups: len(names) - len(used)} if known.groups and len(names) > len(used) else {}))


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda base: any((base / name).exists() for name in names)


def _is_cars(base: Path) -> bool:
    return _has("devkit/cars_meta.mat", "devkit/cars_train_annos.mat")(base) or all(
        (base / folder).is_dir() for folder in ("cars_train", "cars_test"))


def _is_dogs(base: Path) -> bool:
    lists = _has("train_list.mat", "test_list.mat", "lists/train_list.mat", "lists/test_list.mat")
    return lists(base) or any(re.match(r"n\d{8}-", folder.name) for images in ("Images", "images")
                              for folder in (base / images).glob("n*"))


def _is_nabirds(base: Path) -> bool:
    try:
        with open(base / "images.txt", encoding="utf-8-sig") as lines:
            return bool(_UUID.match(lines.readline()))
    except (OSError, UnicodeDecodeError):
        return False


def _is_inaturalist_2021(base: Path, mini: bool) -> bool:
    """By the names of the classes' folders. The small training set holds photographs of the large one."""
    train = [folder for folder in TRAIN_2021 if _holds_species(base / folder)]
    if len(train) > 1:
        raise LoupeError(f"{base}: found {train[0]}/ and {train[1]}/, of which one holds photographs of the other; "
                         "expected one of them: move the other elsewhere")
    if not train:
        return not mini and any(_holds_species(base / folder) for folder in TEST_2021)
    return train[0].endswith("mini") == mini


def _holds_species(folder: Path) -> bool:
    """Whether one of the first names in a folder is that of a class; there are ten thousand of them."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as inside:
        return any(SPECIES.fullmatch(entry.name) for _, entry in zip(range(20), inside))


def _inaturalist(year: str, sizes: tuple[int, int, int] | None) -> KnownSet:
    return KnownSet(f"iNaturalist {year}", f"https://github.com/visipedia/inat_comp/tree/master/{year}",
                    _has(f"train{year}.json", f"val{year}.json"), partial(set_lists.read_inaturalist, year=year), sizes)


_2021 = "https://github.com/visipedia/inat_comp/tree/master/2021"
KNOWN_SETS = (
    KnownSet("Stanford Cars", "https://ai.stanford.edu/~jkrause/cars/car_dataset.html", _is_cars, set_lists.read_cars,
             (196, 8_144, 8_041), ("stanford_cars",)),
    KnownSet("FGVC-Aircraft", "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
             _has("variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"), set_lists.read_aircraft,
             (100, 6_667, 3_333), ("data", "fgvc-aircraft-2013b/data")),
    KnownSet("Stanford Dogs", "http://vision.stanford.edu/aditya86/ImageNetDogs/", _is_dogs, set_lists.read_dogs,
             (120, 12_000, 8_580)),
    KnownSet("NABirds", "https://dl.allaboutbirds.org/nabirds", _is_nabirds, set_lists.read_nabirds,
             (555, 23_929, 24_633), ("nabirds",), groups="names in classes.txt without photographs"),
    KnownSet("Oxford-IIIT Pet", "https://www.robots.ox.ac.uk/~vgg/data/pets/",
             _has("annotations/trainval.txt", "annotations/test.txt"), set_lists.read_pets, (37, 3_680, 3_669),
             ("oxford-iiit-pet",)),
    KnownSet("Flowers-102", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", _has("setid.mat", "imagelabels.mat"),
             set_lists.read_flowers, (102, 2_040, 6_149), ("flowers-102",)),
    _inaturalist("2017", (5_089, 579_184, 95_986)),
    _inaturalist("2018", (8_142, 437_513, 24_426)),
    _inaturalist("2019", None),  # 268,243 photographs of 1,010 classes in both lists; the page names no more
    KnownSet("iNaturalist 2021", _2021, partial(_is_inaturalist_2021, mini=False), set_lists.read_inaturalist_2021,
             (10_000, 2_686_843, 100_000)),
    KnownSet("iNaturalist 2021 mini", _2021, partial(_is_inaturalist_2021, mini=True), set_lists.read_inaturalist_2021,
             (10_000, 500_000, 100_000)),
)
