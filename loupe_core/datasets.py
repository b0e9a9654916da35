"""Photographs with labels: the CUB-200-2011 layout, and folders of own photographs.

One `Sample` holds an image with all that is known of it, and the geometry that leads back to the photograph.
"""

import os
import re
import zlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from loupe_core.errors import LoupeError
from loupe_core.files.download import find_cub
from loupe_core.files.images import open_image
from loupe_core.files.lists import check_rows, list_folders, list_images, read_names, read_table
from loupe_core.files.pixel_cache import PixelCache
from loupe_core.geometry import Geometry

PART_COUNT = 15  # of CUB, each with x, y and visibility
SPLITS = ("train", "val", "test")
_CLIMBS = re.compile(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)|\0")  # out of the folder, on Windows too
Transform = Callable[[Image.Image], tuple[Tensor, Geometry | None]]


@dataclass
class Sample:
    """One photograph. Parts and box are in pixels of the upright photograph, as `open_image` returns it.

    CUB's annotations refer to stored pixels. Its photographs carry no EXIF rotation, so these are the same.
    """

    image: Tensor | Image.Image  # (3, H, W) from the transform; the photograph itself without one
    label: int
    parts: Tensor | None  # (15, 3): x, y, visible (1 or 0; x = y = 0 where not visible)
    box: Tensor | None  # (4,): x, y, width, height
    geometry: Geometry | None  # None without a transform, or when the transform keeps no record
    path: str
    image_id: int


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples -> one batch: image (B, 3, H, W), label (B,), parts (B, 15, 3) or None, box (B, 4) or None,
    geometry (list), path (list), image_id (B,).

    Raises:
        LoupeError: the samples hold photographs instead of tensors.
    """
    if not torch.is_tensor(samples[0].image):
        raise LoupeError("collate: found photographs, expected tensors: give the set a transform, see transforms_for")
    columns = {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(Sample)}
    return {name: values if name in ("geometry", "path") else None if values[0] is None
            else default_collate(values)  # in a worker, straight into shared memory
            for name, values in columns.items()}


def labels_of(dataset: Dataset) -> np.ndarray:
    """The labels of a data set, (N,) int64, without opening an image.

    Of a set with `labels` or `targets` (torchvision's), and of a Subset (random_split gives these) or a ConcatDataset
    of such sets.

    Raises:
        LoupeError: There are none, or as many as images; or one is no whole number of 0 or more.
    """
    if isinstance(dataset, Subset) and not hasattr(dataset, "labels"):
        return labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([labels_of(part) for part in dataset.datasets])
    kind = type(dataset).__name__
    found = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if found is None or not hasattr(dataset, "__len__"):
        raise LoupeError(f"data set {kind}: found no labels; expected a length and an attribute `labels` or `targets`, "
                         "a whole number for each image, or a Subset or ConcatDataset of such sets")
    labels = np.asarray(found)
    if labels.shape != (len(dataset),) or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise LoupeError(f"data set {kind}: found labels of shape {labels.shape} and type {labels.dtype} for "
                         f"{len(dataset)} images; expected a whole number of 0 or more for each")
    return labels.astype(np.int64)


class AsSamples(Dataset):
    """A data set of (image, label) pairs, such as torchvision's, as one of `Sample`; one of `Sample` stays as it is.

    The image is what the set's transform gives: a tensor `(3, H, W)`, or (tensor, `Geometry`). `image_id` is the
    position in the set, counted from 0.

    Raises:
        LoupeError: An item is neither a `Sample` nor such a pair.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Sample:
        item = self.dataset[i]
        if isinstance(item, Sample):
            return item
        image, label = item if _is_pair(item) else (None, None)
        image, geometry = image if _is_pair(image) else (image, None)
        if not torch.is_tensor(image):
            found = [type(part).__name__ for part in item] if isinstance(item, tuple) else type(item).__name__
            raise LoupeError(f"data set {type(self.dataset).__name__}, item {i}: found {found}, expected a Sample, or "
                             "(tensor, label): give the set a transform, see transforms_for")
        return Sample(image, int(label), None, None, geometry, path="", image_id=i)


def _is_pair(item: object) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


class _Photographs(Dataset):
    """What both kinds of set have in common: a subclass finds all photographs, `_select` takes those of one split."""

    class_names: list[str]
    labels: np.ndarray  # (N,) int64
    paths: list[str]
    image_ids: np.ndarray  # (N,) int64
    parts: np.ndarray | None = None  # (N, 15, 3) float32
    boxes: np.ndarray | None = None  # (N, 4) float32

    def __init__(self, split: str, seed: int, transform: Transform | None, cache: bool, **fractions: float) -> None:
        if split not in SPLITS:
            raise LoupeError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
        if not 0 <= seed < 2**32:
            raise LoupeError(f"seed: found {seed}, expected a whole number from 0 to 2**32 - 1")
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise LoupeError(f"{name}: found {value}, expected a fraction in [0, 1), such as 0.1")
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
        index = np.flatnonzero((self._splits == split) & (self._labels >= 0))
        if len(index) == 0:
            raise LoupeError(f"{self.root}: found no {split} images; check split, val_fraction and classes")
        self.labels, self.image_ids = self._labels[index], self._image_ids[index]
        self.paths = [self._paths[k] for k in index]
        self.boxes = None if self._boxes is None else self._boxes[index]
        self.parts = None if self._parts is None else self._parts[index]

    def with_split(self, split: str, transform: Transform | None = None) -> "CUB200 | PhotoFolder":
        """Another split of this set, as its constructor would give it; nothing is read or cut again."""
        other = copy(self)
        _Photographs.__init__(other, split, 0, transform, self._cache is not None)
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
        root: the folder that holds images.txt, or its parent.
        split: "train", "val" or "test".
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
            raise LoupeError(f"{root}: found no images.txt here or in CUB_200_2011/, expected the layout of "
                             "CUB-200-2011; check the path, or fetch it with download_cub")
        class_ids, class_names = read_names(base / "classes.txt")
        image_ids, files = read_names(base / "images.txt")
        inside = np.array([not _CLIMBS.search(file) for file in files])
        check_rows(base / "images.txt", inside, "a path inside of images/")
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

        cut = _cut(np.where(official, labels, -1), class_names, val_fraction, seed, "val")
        self._splits = np.where(cut, "val", np.where(official, "train", "test"))
        self._choose(labels, class_names, class_ids, classes)
        self._image_ids, self._boxes, self._parts = image_ids, boxes, parts
        self._paths = [os.path.join(base, "images", file) for file in files]  # pathlib takes 0.2 s for CUB
        self._select(split)

    def segmentation(self, i: int) -> np.ndarray | None:
        """(H, W) bool, True on the bird: segmentations/<class>/<name>.png above 127. None where absent.

        CUB's own segmentations hold the fraction of annotators who marked a pixel, so True is their majority.
        """
        file = Path(self.paths[i]).relative_to(self.root / "images").with_suffix(".png")
        path = self.root / "segmentations" / file
        return np.asarray(open_image(path).convert("L")) > 127 if path.exists() else None


class PhotoFolder(_Photographs):
    """Own photographs, one folder for each class: `root/<class>/*.jpg`, or `root/train/<class>/*.jpg` and so on.

    Where `root` is divided into the folders train, val and test, these are the splits (without val, it is cut
    from train). Else "test" is cut from all and "val" from the rest, class by class, by `seed`. Images are
    found at any depth below a class; names that begin with a dot are passed over. Parts and boxes are None;
    image ids count the files from 1.

    Args:
        test_fraction: fraction of each class that goes to "test", in [0, 1); not used where `root` is divided.
        root, split, val_fraction, seed, transform, classes, cache: as in `CUB200`.

    Raises:
        LoupeError: no such folder, no class in it, a class without (training) images, or an argument out of
            range.
    """

    def __init__(self, root: str | Path, split: str = "train", val_fraction: float = 0.1, test_fraction: float = 0.2,
                 seed: int = 0, transform: Transform | None = None, classes: Sequence[str] | None = None,
                 cache: bool = False) -> None:
        super().__init__(split, seed, transform, cache, val_fraction=val_fraction, test_fraction=test_fraction)
        self.root = root = Path(root)
        folders = list_folders(root)
        # a class may be called "train": the root is divided when it holds little else
        divided = "train" in folders and ("test" in folders or set(folders) <= set(SPLITS))
        class_names = list_folders(root / "train") if divided else folders
        files, labels, origin = [], [], []
        for part in [split for split in SPLITS if split in folders] if divided else ["."]:
            for name in list_folders(root / part):
                found = list_images(root / part / name)
                if name not in class_names or (not found and part in ("train", ".")):
                    raise LoupeError(f"{root / part / name}: found a class without training images, "
                                     "expected at least one; add some, or leave the class out with `classes`")
                files += found
                labels += [class_names.index(name)] * len(found)
                origin += [part] * len(found)
        labels, origin = np.array(labels, dtype=np.int64), np.array(origin)
        test = origin == "test" if divided else _cut(labels, class_names, test_fraction, seed, "test")
        val = origin == "val"
        if not val.any():
            val = _cut(np.where(test, -1, labels), class_names, val_fraction, seed, "val")
        self._splits = np.where(test, "test", np.where(val, "val", "train"))
        self._choose(labels, class_names, class_names, classes)
        self._image_ids, self._boxes, self._parts = np.arange(1, len(files) + 1), None, None
        self._paths = [str(file) for file in files]
        self._select(split)


def open_set(root: str | Path, split: str = "train", **options: Any) -> CUB200 | PhotoFolder:
    """The data set in a folder: `CUB200` where it has the lists of CUB's layout, else `PhotoFolder`."""
    listed = find_cub(root) or (Path(root) / "classes.txt").is_file()
    return (CUB200 if listed else PhotoFolder)(root, split, **options)


def _cut(labels: np.ndarray, class_names: list[str], fraction: float, seed: int, purpose: str) -> np.ndarray:
    """Chooses a fraction of each class's images: bool (N,). Images with label -1 are never chosen."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        count = 0 if fraction == 0 else min(max(1, round(fraction * len(members))), len(members) - 1)
        # the legacy generator's stream is frozen, so a seed means the same cut under every NumPy
        random = np.random.RandomState([seed, zlib.crc32(f"{purpose} {name}".encode())])
        chosen[random.permutation(members)[: max(count, 0)]] = True
    return chosen
