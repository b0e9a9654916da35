"""Photographs with labels: the CUB-200-2011 layout, and folders of own photographs.

Each photograph comes as a `Sample`.
"""

import os
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from loupe_core.errors import LoupeError, printable
from loupe_core.files.cuts import check_fractions, cut_by_name, cut_by_position
from loupe_core.files.download import find_cub
from loupe_core.files.folders import same_content, size_of, survey
from loupe_core.files.images import open_image
from loupe_core.files.known_sets import known_set, published
from loupe_core.files.labels import listed
from loupe_core.files.lists import check_rows, on_disk, read_files, read_names, read_table
from loupe_core.files.pixel_cache import PixelCache
from loupe_core.geometry import Geometry
from loupe_core.samples import Sample

PART_COUNT = 15  # of CUB, each with x, y and visibility
SPLITS = ("train", "val", "test")
Transform = Callable[[Image.Image], tuple[Tensor, Geometry | None]]


class _Photographs(Dataset):
    """What both kinds of set have in common: a subclass finds all photographs, `_select` takes those of one split."""

    layout: str  # in words
    cut: dict[str, float]  # the seed and the fractions that the splits were cut by
    passed_over: dict[str, int] = {}  # ending -> number of files that no reader here opens
    class_names: list[str]
    labels: np.ndarray  # (N,) int64
    names: list[str]  # "<class>/<file>", the same on every system
    paths: list[str]
    image_ids: np.ndarray  # (N,) int64
    parts: np.ndarray | None = None  # (N, 15, 3) float32
    boxes: np.ndarray | None = None  # (N, 4) float32

    def __init__(self, split: str, seed: int, transform: Transform | None, cache: bool, **fractions: float) -> None:
        if split not in (*SPLITS, "all"):
            raise LoupeError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}, all")
        if not 0 <= seed < 2**32:
            raise LoupeError(f"seed: found {seed}, expected a whole number from 0 to 2**32 - 1")
        check_fractions(fractions)
        self.cut = dict(seed=seed, **fractions)
        self.transform = transform
        self._cache = PixelCache() if cache else None

    def _choose(self, labels: np.ndarray, class_names: list[str], class_ids: Sequence,
                classes: Sequence[str | int] | None) -> None:
        """Keeps names and labels of the chosen classes, renumbered 0, 1, ...; -1 for images of the others."""
        if classes is not None:
            lookup = {key: label for keys in (class_ids, class_names) for label, key in enumerate(keys)}
            chosen: list[int] = []
            for key in classes:
                if key not in lookup or lookup[key] in chosen:
                    found = "a second " if key in lookup else ""
                    known = ", ".join(class_names[:3])
                    raise LoupeError(f"classes: found {found}{key!r}, expected each once, of {known}, ...")
                chosen.append(lookup[key])
            renumber = np.full(len(class_names), -1)
            renumber[chosen] = np.arange(len(chosen))
            labels, class_names = renumber[labels], [class_names[k] for k in chosen]
        self.class_names, self._labels = class_names, labels

    def _select(self, split: str) -> None:
        """Fills the attributes with what belongs to a split, of all that was found."""
        index = np.flatnonzero(((self._splits == split) | (split == "all")) & (self._labels >= 0))
        if len(index) == 0:
            raise LoupeError(f"{self.root}: found no {split} images; check split, val_fraction and classes")
        self.labels, self.image_ids = self._labels[index], self._image_ids[index]
        self.paths, self.names = [self._paths[k] for k in index], [self._names[k] for k in index]
        self.boxes = None if self._boxes is None else self._boxes[index]
        self.parts = None if self._parts is None else self._parts[index]

    def describe(self) -> str:
        """One line: how the folder was understood, how many photographs of how many classes, what was passed over."""
        counts = [int(((self._splits == split) & (self._labels >= 0)).sum()) for split in SPLITS]
        named = ", ".join(self.class_names[:3]) + (", ..." if len(self.class_names) > 3 else "")
        line = (f"{self.root}: {self.layout}; {counts[0]} training, {counts[1]} validation and {counts[2]} test "
                f"photographs of {len(self.class_names)} classes ({named})")
        kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(self.passed_over.items()))
        return printable(line + (f"; passed over: {kinds}" if kinds else ""))

    @property
    def all_paths(self) -> list[str]:
        """The paths of the photographs of all splits."""
        return [path for path, label in zip(self._paths, self._labels) if label >= 0]

    def identities(self) -> list[str]:
        """Name and size of each photograph, "robin/1.jpg, 20480 bytes"; the content decides, not where it lies."""
        return [f"{name}, {size_of(path)} bytes" for name, path in zip(self.names, self.paths)]

    def duplicates(self) -> list[tuple[str, str]]:
        """Pairs of photographs of the same content in two splits, as "train robin/1.jpg"."""
        named = [f"{split} {name}" for split, name in zip(self._splits, self._names)]
        return [(named[i], named[k]) for i, k in same_content(self._paths, self._splits)]

    def leave_out(self, identities: set[str]) -> list[str]:
        """Takes photographs out of this split; returns the names of those that were in it."""
        gone = np.array([identity in identities for identity in self.identities()], dtype=bool)
        names = [name for name, out in zip(self.names, gone) if out]
        keep = np.flatnonzero(~gone)
        self.labels, self.image_ids = self.labels[keep], self.image_ids[keep]
        self.paths, self.names = [self.paths[k] for k in keep], [self.names[k] for k in keep]
        self.boxes = None if self.boxes is None else self.boxes[keep]
        self.parts = None if self.parts is None else self.parts[keep]
        self._cache = None if self._cache is None else PixelCache()  # it knows photographs by their positions
        return names

    def relabel(self, class_names: list[str]) -> None:
        """Numbers the labels as a model does that was trained on these classes; each of the set's own is among them.

        Raises:
            LoupeError: A class of the set is not.
        """
        if unknown := [name for name in self.class_names if name not in class_names]:
            raise LoupeError(f"{self.root}: found the class {unknown[0]!r}, which is none of the {len(class_names)} "
                             f"classes of the model ({', '.join(class_names[:3])}, ...); expected some of them")
        numbers = np.array([class_names.index(name) for name in self.class_names])
        self._labels = np.where(self._labels < 0, -1, numbers[self._labels])
        self.labels, self.class_names = numbers[self.labels], list(class_names)

    def with_split(self, split: str, transform: Transform | None = None) -> "CUB200 | PhotoFolder":
        """Another split of this set, as its constructor would give it; nothing is read or cut again."""
        other = copy(self)
        _Photographs.__init__(other, split, transform=transform, cache=self._cache is not None, **self.cut)
        other._select(split)
        return other

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> Image.Image:
        """Photograph `i`, upright, RGB. Raises LoupeError where it cannot be read."""
        if self._cache is None:
            return open_image(self.paths[i])
        image = self._cache.read(i)
        if image is None:
            image = open_image(self.paths[i])
            self._cache.write(i, image)
        return image

    def __getitem__(self, i: int) -> Sample:
        image, geometry = self.image(i), None
        if self.transform is not None:
            image, geometry = self.transform(image)
        return Sample(image=image, label=int(self.labels[i]),
                      parts=None if self.parts is None else torch.tensor(self.parts[i]),
                      box=None if self.boxes is None else torch.tensor(self.boxes[i]), geometry=geometry,
                      path=self.paths[i], image_id=int(self.image_ids[i]))


class CUB200(_Photographs):
    """CUB-200-2011 (Wah et al., 2011), or any set in its layout.

    The test split is the official one. "val" is cut from the official training images, class by class, by
    `seed`; "train" is the rest. The cut of a class does not depend on which other classes are kept.

    Only the lists are read here; a photograph is opened when it is asked for.

    Attributes: `class_names`, `labels` (N,), `paths`, `image_ids` (N,), `parts` (N, 15, 3) or None where
    there is no folder parts/, `boxes` (N, 4) or None where there is neither parts/ nor bounding_boxes.txt.

    Args:
        root: the folder that holds images.txt, or one up to two folders above it.
        split: "train", "val" or "test"; or "all", where nothing is left out.
        val_fraction: fraction of each class's training images that goes to "val", in [0, 1); unless it is 0, at
            least one image of a class with two or more.
        seed: of the cut between "train" and "val", 0 or more.
        transform: photograph -> (tensor, Geometry); None leaves the photograph as it is.
        classes: names (as in classes.txt) or ids to keep; they become labels 0, 1, ... in this order.
        cache: keep decoded photographs (H * W * 3 bytes each) in a temporary file that all DataLoader workers share:
            up to 4 GiB and half of the free space in `tempfile.gettempdir()`; the others are decoded each time.

    Raises:
        LoupeError: a list that is missing, short or inconsistent (file, line, found, expected), or an
            argument out of range.
    """

    def __init__(self, root: str | Path, split: str = "train", val_fraction: float = 0.1, seed: int = 0,
                 transform: Transform | None = None, classes: Sequence[str | int] | None = None,
                 cache: bool = False) -> None:
        super().__init__(split, seed, transform, cache, val_fraction=val_fraction)
        self.root = base = find_cub(root)
        if base is None:
            raise LoupeError(f"{root}: found no images.txt here or up to two folders down, expected the layout of "
                             "CUB-200-2011; check the path, or fetch it with download_cub")
        class_ids, class_names = read_names(base / "classes.txt")
        image_ids, files = read_files(base / "images.txt")
        lookup = {number: label for label, number in enumerate(class_ids)}

        table = read_table(base / "image_class_labels.txt", 2, image_ids)
        labels = np.array([lookup.get(number, -1) for number in table[:, 1]])
        check_rows(base / "image_class_labels.txt", labels >= 0, "a class id of classes.txt in column 2")
        table = read_table(base / "train_test_split.txt", 2, image_ids)
        known = np.isin(table[:, 1], (0, 1))
        check_rows(base / "train_test_split.txt", known, "0 (test) or 1 (train) in column 2")
        official = table[:, 1] == 1

        boxes = parts = None
        if (base / "bounding_boxes.txt").exists() or (base / "parts").is_dir():
            boxes = read_table(base / "bounding_boxes.txt", 5, image_ids)[:, 1:].astype(np.float32)
        if (base / "parts").is_dir():
            path = base / "parts" / "part_locs.txt"
            table = read_table(path, 5, image_ids.repeat(PART_COUNT)).reshape(-1, PART_COUNT, 5)
            known = table[:, :, 1] == np.arange(1, PART_COUNT + 1)
            check_rows(path, known.ravel(), f"the part ids 1 to {PART_COUNT}, in order, in column 2")
            known = np.isin(table[:, :, 4], (0, 1))
            check_rows(path, known.ravel(), "0 (hidden) or 1 (visible) in column 5")
            parts = table[:, :, 2:].astype(np.float32)

        cut = cut_by_position(np.where(official, labels, -1), class_names, val_fraction, seed, "val")
        self._splits = np.where(cut, "val", np.where(official, "train", "test"))
        self._choose(labels, class_names, class_ids, classes)
        self._image_ids, self._boxes, self._parts = image_ids, boxes, parts
        self.layout, self._names = "lists as in CUB-200-2011", [normalize("NFC", file) for file in files]
        self._paths = [on_disk(os.path.join(base, "images"), file) for file in files]  # pathlib takes 0.2 s for CUB
        self._select(split)

    def segmentation(self, i: int) -> np.ndarray | None:
        """(H, W) bool, True on the bird: segmentations/<class>/<name>.png above 127. None where absent.

        CUB's own segmentations hold the fraction of annotators who marked a pixel, so True is their majority.
        """
        file = Path(self.paths[i]).relative_to(self.root / "images").with_suffix(".png")
        path = self.root / "segmentations" / file
        return np.asarray(open_image(path).convert("L")) > 127 if path.exists() else None


class PhotoFolder(_Photographs):
    """Own photographs, one folder for each class: `root/<class>/*.jpg`, or `root/train/<class>/*.jpg` and so on; or a
    published set by its own lists (`loupe_core.files.known_sets`).

    Where `root` is divided into the folders train, val and test, under one of their usual names, these are the splits
    (without val, it is cut from train). Else "test" is cut from all and "val" from the rest, class by class, by a hash
    of `seed` and each photograph's name: with another photograph in a class, at most one other changes its place. What
    counts as a class and as a photograph: see `loupe_core.files.folders.survey`. `layout` and `passed_over` say what
    was found. Parts and boxes are None; image ids count the files from 1.

    Args:
        test_fraction: fraction of each class that goes to "test", in [0, 1); not used where `root` is divided.
        labels: a CSV file with the photographs' labels, see `loupe_core.files.labels.listed`; None: folders tell.
        root, split, val_fraction, seed, transform, classes, cache: as in `CUB200`.

    Raises:
        LoupeError: no such folder, no class in it, a class without (training) images, or an argument out of
            range.
    """

    def __init__(self, root: str | Path, split: str = "train", val_fraction: float = 0.1, test_fraction: float = 0.2,
                 seed: int = 0, transform: Transform | None = None, classes: Sequence[str] | None = None,
                 cache: bool = False, labels: str | Path | None = None) -> None:
        super().__init__(split, seed, transform, cache, val_fraction=val_fraction, test_fraction=test_fraction)
        self.root = Path(root)
        found = listed(self.root, Path(labels)) if labels else published(self.root) or survey(self.root)
        self.layout, self.passed_over, self._names = found.layout, found.passed_over, found.names
        numbers, splits = np.array(found.labels, dtype=np.int64), np.array(found.splits)
        if not (splits == "val").any():
            rest = splits != "test"
            if not splits[0]:  # not divided
                splits = np.where(cut_by_name(numbers, found.names, test_fraction, seed, "test"), "test", "train")
                rest = splits == "train"
            val = cut_by_name(np.where(rest, numbers, -1), found.names, val_fraction, seed, "val")
            splits = np.where(val, "val", splits)
        self._splits = splits
        self._choose(numbers, found.class_names, found.class_names, classes)
        self._image_ids, self._boxes, self._parts = np.arange(1, len(numbers) + 1), None, None
        self._paths = [str(path) for path in found.paths]
        self._select(split)


def open_set(root: str | Path, split: str = "train", **options: Any) -> CUB200 | PhotoFolder:
    """The data set in a folder: `CUB200` where it has the lists of CUB's layout, else `PhotoFolder`."""
    own = options.get("labels") is not None or known_set(root) is not None
    lists = not own and (find_cub(root) or (Path(root) / "classes.txt").is_file())
    if lists:  # its test split is given, and so are its labels
        check_fractions({name: value for name, value in options.items() if name == "test_fraction"})
        options = {name: value for name, value in options.items() if name not in ("test_fraction", "labels")}
    return (CUB200 if lists else PhotoFolder)(root, split, **options)
