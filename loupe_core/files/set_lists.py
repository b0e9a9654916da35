"""The lists of published sets, each in the format that it comes in.

A reader is given the set's folder. It returns the names of all classes, in the set's own order, and a `Row` for each
photograph that a list names; it opens no photograph. It raises `Missing` where a file or folder is not there, and
LoupeError where a file or a line of it is not understood.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, SupportsInt

from torchvision.datasets import Flowers102

from loupe_core.errors import LoupeError, one_line
from loupe_core.files.folders import photographs_below
from loupe_core.files.lists import line_error, read_lines

SPECIES = re.compile(r"\d{5}(_[^_]+){7}")  # 00000_Animalia_..., a class of iNaturalist 2021
TRAIN_2021 = ("2021_train", "2021_train_mini", "train", "train_mini")  # as torchvision names them, and the archives
TEST_2021 = ("2021_valid", "val")
_AGAIN = "unpack the set again"


class Row(NamedTuple):
    """A photograph that a list names."""

    split: str  # "train" or "test"
    label: int  # counted from 0
    file: str  # below the set's folder, with slashes


Lists = tuple[list[str], list[Row]]  # the classes' names, the photographs


class Missing(Exception):
    """A file or folder of a set that is not there; its text is the name."""


def read_cars(base: Path) -> Lists:
    """Stanford Cars (Krause et al. 2013), as torchvision's `StanfordCars` has it."""
    names = [str(name) for name in _mat(_need(base, "devkit/cars_meta.mat"), "class_names")[0]]
    rows = []
    for split, *files in (("train", "devkit/cars_train_annos.mat"),
                          ("test", "cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")):
        folder = _need(base, f"cars_{split}/").name
        path = _need(base, *files)
        rows += (Row(split, _label(path, k, note["class"], len(names)), f"{folder}/{note['fname']}")
                 for k, note in enumerate(_mat(path, "annotations")[0], 1))
    return names, rows


def read_aircraft(base: Path) -> Lists:
    """FGVC-Aircraft (Maji et al. 2013) by variants, as torchvision's `FGVCAircraft` has it."""
    _need(base, "images/")
    names = [line.strip() for line in read_lines(_need(base, "variants.txt"))]
    label = {name: k for k, name in enumerate(names)}
    rows = []
    for split, file in (("train", "images_variant_trainval.txt"), ("test", "images_variant_test.txt")):
        path = _need(base, file)
        for number, line in enumerate(read_lines(path), 1):
            image, _, name = line.strip().partition(" ")
            if name not in label:
                raise line_error(path, number, line, "a photograph's number and a name of variants.txt")
            rows.append(Row(split, label[name], f"images/{image}.jpg"))
    return names, rows


def read_dogs(base: Path) -> Lists:
    """Stanford Dogs (Khosla et al. 2011). A class is named as its folder, "n02085620-Chihuahua"."""
    images = _need(base, "Images/", "images/").name
    names: dict[int, str] = {}
    rows = []
    for split in ("train", "test"):
        path = _need(base, f"lists/{split}_list.mat", f"{split}_list.mat")
        files, labels = _mat(path, "file_list", "labels")
        if len(files) != len(labels):
            raise LoupeError(f"{path}: found {len(files)} files and {len(labels)} labels, expected as many; {_AGAIN}")
        for k, (file, number) in enumerate(zip(files, labels), 1):
            label, folder = _label(path, k, number, 120), str(file).partition("/")[0]
            if names.setdefault(label, folder) != folder:
                raise LoupeError(f"{path}, entry {k}: found {str(file)[:60]!r} with the label of {names[label]}, "
                                 f"expected one folder for each class; {_AGAIN}")
            rows.append(Row(split, label, f"{images}/{file}"))
    return _in_order(names), rows


def read_nabirds(base: Path) -> Lists:
    """NABirds (Van Horn et al. 2015). Its lists look as CUB's do, but ids of images are UUIDs, ids of classes have
    gaps, and classes.txt names groups of species as well, which no photograph is labelled with."""
    _need(base, "images/")
    files = dict(_pairs(_need(base, "images.txt")))
    names = dict(_pairs(_need(base, "classes.txt")))
    ids = sorted(names, key=lambda number: (len(number), number))
    columns = []
    for file, known, expected in (("image_class_labels.txt", {number: k for k, number in enumerate(ids)}, "a class id"),
                                  ("train_test_split.txt", {"0": "test", "1": "train"}, "0 (test) or 1 (train)")):
        path, column = _need(base, file), {}
        for number, (image, value) in enumerate(_pairs(path), 1):
            if image not in files or value not in known:
                raise line_error(path, number, f"{image} {value}", f"an image id of images.txt and {expected}")
            column[image] = known[value]
        if lost := next((image for image in files if image not in column), None):
            raise LoupeError(f"{path}: found no line for {lost}, expected one for each image of images.txt; {_AGAIN}")
        columns.append(column)
    used = Counter(names[ids[k]] for k in set(columns[0].values()))
    rows = [Row(columns[1][image], columns[0][image], f"images/{file}") for image, file in files.items()]
    return [f"{names[k]} ({k})" if used[names[k]] > 1 else names[k] for k in ids], rows


def read_pets(base: Path) -> Lists:
    """Oxford-IIIT Pet (Parkhi et al. 2012) by breeds, as torchvision's `OxfordIIITPet` has it."""
    _need(base, "images/")
    names: dict[int, str] = {}
    rows = []
    for split, file in (("train", "annotations/trainval.txt"), ("test", "annotations/test.txt")):
        path = _need(base, file)
        for number, line in enumerate(read_lines(path), 1):
            fields = line.split()
            if len(fields) != 4 or not fields[1].isdecimal():
                raise line_error(path, number, line, "a photograph's name and three numbers")
            label = _label(path, number, fields[1], 37)
            name = " ".join(word.title() for word in fields[0].rpartition("_")[0].split("_"))
            if names.setdefault(label, name) != name:
                raise line_error(path, number, line, f"a photograph of {names[label]}")
            rows.append(Row(split, label, f"images/{fields[0]}.jpg"))
    return _in_order(names), rows


def read_flowers(base: Path) -> Lists:
    """Flowers-102 (Nilsback and Zisserman 2008), with the names of torchvision's `Flowers102`."""
    _need(base, "jpg/")
    path, lists = _need(base, "imagelabels.mat"), _need(base, "setid.mat")
    labels, rows = _mat(path, "labels")[0], []
    for split, images in zip(("train", "train", "test"), _mat(lists, "trnid", "valid", "tstid")):
        for k, image in enumerate(images, 1):
            at = _label(lists, k, image, len(labels))
            rows.append(Row(split, _label(path, at + 1, labels[at], 102), f"jpg/image_{at + 1:05d}.jpg"))
    return list(Flowers102.classes), rows


def read_inaturalist_2021(base: Path) -> Lists:
    """iNaturalist 2021 (Van Horn et al. 2021) by its folders, as torchvision's `INaturalist` has them. The validation
    photographs are the test: labels of the competition's own test photographs are not published."""
    train, test = (_need(base, *(f"{name}/" for name in folders)).name for folders in (TRAIN_2021, TEST_2021))
    names = sorted(name for name in os.listdir(base / train) if SPECIES.fullmatch(name))
    label = {name: k for k, name in enumerate(names)}
    rows = []
    for split, folder in (("train", train), ("test", test)):
        for name in sorted(name for name in os.listdir(base / folder) if SPECIES.fullmatch(name)):
            if name not in label:
                raise LoupeError(f"{base / folder / name}: found a class without training photographs, expected some "
                                 f"in {base / train / name}")
            rows += (Row(split, label[name], f"{folder}/{name}/{below}")
                     for below, _ in sorted(photographs_below(base / folder / name, Counter())))
    return names, rows


def read_inaturalist(base: Path, year: str) -> Lists:
    """iNaturalist 2017, 2018 or 2019: one folder of photographs, and the split in the competition's JSON files.

    A class is named as its folder, "Aves/Turdus merula" or "Plantae/7477", and numbered as in torchvision.
    """
    photographs = _need(base, f"train_val{year}/", "train_val_images/", f"{year}/").name
    files = []
    for split, part in (("train", "train"), ("test", "val")):
        path = _need(base, f"{part}{year}.json")
        try:
            images = json.loads(path.read_bytes())["images"]
            files += ((split, image["file_name"].partition("/")[2]) for image in images)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoupeError(f"{path}: cannot be read ({one_line(error)}), expected the competition's JSON file; fetch "
                             "it again") from error
    names = sorted({file.rpartition("/")[0] for _, file in files}, key=_numbered)
    label = {name: k for k, name in enumerate(names)}
    return names, [Row(split, label[file.rpartition("/")[0]], f"{photographs}/{file}") for split, file in files]


def _numbered(name: str) -> tuple[int, str]:
    """2018 and 2019 name the folders by numbers, which count across the groups that they lie in."""
    folder = name.rpartition("/")[2]
    return (int(folder) if folder.isdecimal() else 0, name)


def _need(base: Path, *names: str) -> Path:
    """The first of several places of a file, or of a folder where the name ends in a slash, that is there."""
    for name in names:
        path = base / name
        if path.is_dir() if name.endswith("/") else path.is_file():
            return path
    raise Missing(names[0])


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The first word of each line, and the rest."""
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split(maxsplit=1)
        if len(fields) != 2:
            raise line_error(path, number, line, "an id and a value")
        yield fields[0], fields[1].rstrip()


def _label(path: Path, entry: int, number: SupportsInt, most: int) -> int:
    """A number that is counted from 1, as one that is counted from 0."""
    if not 1 <= int(number) <= most:
        raise LoupeError(f"{path}, entry {entry}: found {int(number)}, expected a number from 1 to {most}; {_AGAIN}")
    return int(number) - 1


def _in_order(names: dict[int, str]) -> list[str]:
    return [names.get(k, f"class {k + 1}") for k in range(max(names, default=-1) + 1)]


# What a process of its own does: SciPy's reader is compiled, and a damaged file can end the process that it runs in.
_READ_MAT = """
import json, sys
from scipy.io import loadmat
path, *keys = sys.argv[1:]
found, arrays = loadmat(path, squeeze_me=True, variable_names=keys), []
for key in keys:
    rows = found[key].tolist()  # of an array without axes, the value itself
    rows = rows if isinstance(rows, list) else [rows]
    names = found[key].dtype.names
    arrays.append([dict(zip(names, row)) for row in rows] if names else rows)
json.dump(arrays, sys.stdout, default=lambda value: value.tolist())
"""


def _mat(path: Path, *keys: str) -> list[list]:
    """Arrays of a MATLAB file, each a list: of numbers, of texts, or of dictionaries where it has columns."""
    read = subprocess.run([sys.executable, "-c", _READ_MAT, str(path), *keys], capture_output=True, text=True)
    if read.returncode:
        said = (read.stderr.strip().splitlines() or [f"its reader ended with signal {-read.returncode}"])[-1]
        raise LoupeError(f"{path}: cannot be read ({said[:200]}), expected a MATLAB file that holds {', '.join(keys)}; "
                         f"{_AGAIN}")
    return json.loads(read.stdout)
