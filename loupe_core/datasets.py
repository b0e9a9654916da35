"""Photographs with labels: the CUB-200-2011 layout, and folders of own photographs.

One `Sample` holds an image with all that is known of it, and the geometry that leads back to the photograph.
"""

import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from multiprocessing import context, reduction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS

from loupe_core.errors import LoupeError
from loupe_core.files.download import find_cub
from loupe_core.files.images import open_image
from loupe_core.geometry import Geometry

PARTS = 15
SPLITS = ("train", "val", "test")
_AGAIN = "unpack the set again"
_CLIMBS = re.compile(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)|\0")  # out of the folder, on Windows too
_LARGEST = 1e30  # of a table's numbers; float32 holds no more than 3.4e38
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


class _PixelFile:
    """Decoded photographs in a temporary file without a name, which all of a DataLoader's processes share.

    Photograph i begins at byte i * SLOT: height and width, then RGB. Places that were never written take no room. The
    pages live in the system's file cache, which gives them up when memory is short, and the file goes with the last
    process that holds it open. Where nothing can be kept (full disk, Windows), photographs are decoded each time.
    """

    LIMIT = 4 * 2**30  # bytes; CUB's 5,994 training photographs take 3.3 GB
    SLOT = 2**26  # bytes, so up to 22 megapixels

    def __init__(self):
        try:
            self.file = tempfile.TemporaryFile(prefix="loupe", buffering=0) if hasattr(os, "pread") else None
        except OSError:
            self.file = None

    def read(self, i: int) -> Image.Image | None:
        if self.file is None:
            return None
        descriptor, start = self.file.fileno(), i * self.SLOT
        head = os.pread(descriptor, 8, start)
        h, w = struct.unpack("II", head) if len(head) == 8 else (0, 0)
        pixels = os.pread(descriptor, h * w * 3, start + 8)
        return Image.frombytes("RGB", (w, h), pixels) if h * w * 3 == len(pixels) > 0 else None

    def write(self, i: int, image: Image.Image) -> None:
        size = image.width * image.height * 3
        if self.file is None or size + 8 > self.SLOT:
            return
        descriptor, start = self.file.fileno(), i * self.SLOT
        try:
            disk = os.fstatvfs(descriptor)
            room = min(self.LIMIT, disk.f_bavail * disk.f_frsize)  # at least half of a free disk is left to others
            if os.fstat(descriptor).st_blocks * 512 + size > room:
                return
            if os.pwrite(descriptor, image.tobytes(), start + 8) == size:
                # the size comes last, so that no other process reads half a photograph
                os.pwrite(descriptor, struct.pack("II", image.height, image.width), start)
        except OSError:
            return

    def __getstate__(self):
        # a worker that is started, not forked, gets the same file; any other copy begins an empty one
        started = self.file is not None and context.get_spawning_popen() is not None
        return {"shared": reduction.DupFd(self.file.fileno()) if started else None}

    def __setstate__(self, state):
        if state["shared"] is None:
            self.__init__()
        else:
            self.file = os.fdopen(state["shared"].detach(), "r+b", buffering=0)


class _Photographs(Dataset):
    """What both kinds of set share: a subclass fills the attributes, one entry a photograph."""

    class_names: list[str]
    labels: np.ndarray  # (N,) int64
    paths: list[str]
    image_ids: np.ndarray  # (N,) int64
    parts: np.ndarray | None = None  # (N, 15, 3) float32
    boxes: np.ndarray | None = None  # (N, 4) float32

    def __init__(self, split: str, seed: int, transform: Transform | None, cache: bool, **fractions: float):
        if split not in SPLITS:
            raise LoupeError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
        if not 0 <= seed < 2**32:
            raise LoupeError(f"seed: found {seed}, expected a whole number from 0 to 2**32 - 1")
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise LoupeError(f"{name}: found {value}, expected a share in [0, 1), such as 0.1")
        self.transform = transform
        self._cache = _PixelFile() if cache else None

    def _choose(self, keep: np.ndarray, labels: np.ndarray, class_names: list[str], class_ids: Sequence,
                classes: Sequence[str | int] | None, split: str) -> np.ndarray:
        """Keeps labels (renumbered 0, 1, ...) and names of the chosen classes; returns the numbers of their images."""
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
        index = np.flatnonzero(keep & (labels >= 0))
        if len(index) == 0:
            raise LoupeError(f"{self.root}: found no {split} images; check split, val_fraction and classes")
        self.class_names, self.labels = class_names, labels[index]
        return index

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
        val_fraction: share of each class's training images that goes to "val", in [0, 1); unless it is 0, at
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
                 transform: Transform | None = None, classes: Sequence[str | int] | None = None, cache: bool = False):
        super().__init__(split, seed, transform, cache, val_fraction=val_fraction)
        self.root = base = find_cub(root)
        if base is None:
            raise LoupeError(f"{root}: found no images.txt here or in CUB_200_2011/, expected the layout of "
                             "CUB-200-2011; check the path, or fetch it with download_cub")
        class_ids, class_names = _read_names(base / "classes.txt")
        image_ids, files = _read_names(base / "images.txt")
        inside = np.array([not _CLIMBS.search(file) for file in files])
        _check_rows(base / "images.txt", inside, "a path inside of images/")
        lookup = {number: label for label, number in enumerate(class_ids)}

        table = _read_table(base / "image_class_labels.txt", 2, image_ids)
        labels = np.array([lookup.get(number, -1) for number in table[:, 1]])
        _check_rows(base / "image_class_labels.txt", labels >= 0, "a class id of classes.txt in column 2")
        table = _read_table(base / "train_test_split.txt", 2, image_ids)
        known = np.isin(table[:, 1], (0, 1))
        _check_rows(base / "train_test_split.txt", known, "0 (test) or 1 (train) in column 2")
        official = table[:, 1] == 1

        boxes = parts = None
        if (base / "bounding_boxes.txt").exists() or (base / "parts").is_dir():
            boxes = _read_table(base / "bounding_boxes.txt", 5, image_ids)[:, 1:].astype(np.float32)
        if (base / "parts").is_dir():
            path = base / "parts" / "part_locs.txt"
            table = _read_table(path, 5, image_ids.repeat(PARTS)).reshape(-1, PARTS, 5)
            known = table[:, :, 1] == np.arange(1, PARTS + 1)
            _check_rows(path, known.ravel(), f"the part ids 1 to {PARTS}, in order, in column 2")
            known = np.isin(table[:, :, 4], (0, 1))
            _check_rows(path, known.ravel(), "0 (hidden) or 1 (visible) in column 5")
            parts = table[:, :, 2:].astype(np.float32)

        cut = _cut(np.where(official, labels, -1), class_names, val_fraction, seed, "val")
        keep = {"train": official & ~cut, "val": cut, "test": ~official}[split]
        index = self._choose(keep, labels, class_names, class_ids, classes, split)
        self.image_ids = image_ids[index]
        self.paths = [os.path.join(base, "images", files[k]) for k in index]  # pathlib takes 0.2 s for CUB
        self.boxes = None if boxes is None else boxes[index]
        self.parts = None if parts is None else parts[index]

    def segmentation(self, i: int) -> np.ndarray | None:
        """(H, W) bool, True on the bird: segmentations/<class>/<name>.png above 127. None where absent.

        CUB's own segmentations hold the share of annotators, so True is their majority.
        """
        file = Path(self.paths[i]).relative_to(self.root / "images").with_suffix(".png")
        path = self.root / "segmentations" / file
        return np.asarray(open_image(path).convert("L")) > 127 if path.exists() else None


class PhotoFolder(_Photographs):
    """Own photographs, one folder a class: `root/<class>/*.jpg`, or `root/train/<class>/*.jpg` and so on.

    Where `root` is divided into the folders train, val and test, these are the splits (without val, it is cut
    from train). Else "test" is cut from all and "val" from the rest, class by class, by `seed`. Images are
    found at any depth below a class; names that begin with a dot are passed over. Parts and boxes are None;
    image ids count the files from 1.

    Args:
        test_fraction: share of each class that goes to "test", in [0, 1); not used where `root` is divided.
        root, split, val_fraction, seed, transform, classes, cache: as in `CUB200`.

    Raises:
        LoupeError: no such folder, no class in it, a class without (training) images, or an argument out of
            range.
    """

    def __init__(self, root: str | Path, split: str = "train", val_fraction: float = 0.1, test_fraction: float = 0.2,
                 seed: int = 0, transform: Transform | None = None, classes: Sequence[str] | None = None,
                 cache: bool = False):
        super().__init__(split, seed, transform, cache, val_fraction=val_fraction, test_fraction=test_fraction)
        self.root = root = Path(root)
        folders = _list_folders(root)
        # a class may be called "train": the root is divided when it holds little else
        divided = "train" in folders and ("test" in folders or set(folders) <= set(SPLITS))
        class_names = _list_folders(root / "train") if divided else folders
        files, labels, origin = [], [], []
        for part in [split for split in SPLITS if split in folders] if divided else ["."]:
            for name in _list_folders(root / part):
                found = _list_images(root / part / name)
                if name not in class_names or (not found and part in ("train", ".")):
                    raise LoupeError(f"{root / part / name}: found a class without training images; remove it")
                files += found
                labels += [class_names.index(name)] * len(found)
                origin += [part] * len(found)
        labels, origin = np.array(labels, dtype=np.int64), np.array(origin)
        test = origin == "test" if divided else _cut(labels, class_names, test_fraction, seed, "test")
        val = origin == "val"
        if not val.any():
            val = _cut(np.where(test, -1, labels), class_names, val_fraction, seed, "val")
        keep = {"train": ~test & ~val, "val": val, "test": test}[split]
        index = self._choose(keep, labels, class_names, class_names, classes, split)
        self.image_ids, self.paths = index + 1, [str(files[k]) for k in index]


def open_set(root: str | Path, split: str = "train", **options: Any) -> CUB200 | PhotoFolder:
    """The data set in a folder: `CUB200` where it has the lists of CUB's layout, else `PhotoFolder`."""
    listed = find_cub(root) or (Path(root) / "classes.txt").is_file()
    return (CUB200 if listed else PhotoFolder)(root, split, **options)


def _cut(labels: np.ndarray, class_names: list[str], fraction: float, seed: int, purpose: str) -> np.ndarray:
    """Choose a share of each class's images: bool (N,). Images with label -1 are left alone."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        count = 0 if fraction == 0 else min(max(1, round(fraction * len(members))), len(members) - 1)
        # the legacy generator's stream is frozen, so a seed means the same cut under every NumPy
        random = np.random.RandomState([seed, zlib.crc32(f"{purpose} {name}".encode())])
        chosen[random.permutation(members)[: max(count, 0)]] = True
    return chosen


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except FileNotFoundError:
        raise LoupeError(f"{path}: found no such file, expected the CUB-200-2011 layout; {_AGAIN}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LoupeError(f"{path}: found unreadable text ({error}), expected UTF-8; {_AGAIN}") from None
    if not lines:
        raise LoupeError(f"{path}: found an empty file, expected one entry a line; {_AGAIN}")
    return lines


def _read_names(path: Path) -> tuple[np.ndarray, list[str]]:
    """A list of "<id> <name>" lines -> ids (N,) int64, names."""
    ids, names = [], []
    for number, line in enumerate(_read_lines(path), 1):
        fields = line.split(maxsplit=1)
        if len(fields) != 2 or not fields[0].isdecimal() or len(fields[0]) > 18:
            raise _line_error(path, number, line, "an id and a name")
        ids.append(int(fields[0]))
        names.append(fields[1].rstrip())
    for what, values in (("id", ids), ("name", names)):
        if len(set(values)) < len(values):
            seen = set()
            number = next(k for k, value in enumerate(values, 1) if value in seen or seen.add(value))
            raise _line_error(path, number, values[number - 1], f"each {what} once")
    return np.array(ids), names


def _read_table(path: Path, columns: int, ids: np.ndarray) -> np.ndarray:
    """A table of numbers whose first column is `ids` -> (len(ids), columns) float64."""
    lines = _read_lines(path)
    try:
        table = np.loadtxt(lines, ndmin=2, comments=None)
    except ValueError:
        table = np.empty((0, 0))
    if table.shape != (len(lines), columns) or not (np.abs(table) < _LARGEST).all():
        bad = (k for k, line in enumerate(lines) if not _is_row(line, columns))
        number = next(bad, 0) + 1
        raise _line_error(path, number, lines[number - 1], f"{columns} numbers")
    for row in np.flatnonzero(table[: len(ids), 0] != ids[: len(lines)])[:1]:
        raise _line_error(path, row + 1, lines[row], f"image id {ids[row]}, in step with images.txt")
    if len(lines) != len(ids):
        expected = f"{len(ids)}, in step with images.txt"
        raise LoupeError(f"{path}: found {len(lines)} lines, expected {expected}; {_AGAIN}")
    return table


def _is_row(line: str, columns: int) -> bool:
    try:
        return sum(abs(float(field)) < _LARGEST for field in line.split()) == columns == len(line.split())
    except ValueError:
        return False


def _check_rows(path: Path, good: np.ndarray, expected: str) -> None:
    if not good.all():
        number = int(np.argmin(good)) + 1
        raise _line_error(path, number, _read_lines(path)[number - 1], expected)


def _line_error(path: Path, number: int, found: str | int, expected: str) -> LoupeError:
    return LoupeError(f"{path}, line {number}: found {str(found)[:60]!r}, expected {expected}; {_AGAIN}")


def _list_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise LoupeError(f"{folder}: found no such folder, expected one folder a class in it; check the path")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not names:
        raise LoupeError(f"{folder}: found no folders in it, expected one folder of photographs a class")
    return names


def _list_images(folder: Path) -> list[Path]:
    images = (path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    return sorted(path for path in images if not any(p[0] == "." for p in path.relative_to(folder).parts))
