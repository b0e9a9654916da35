"""What several test files use."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

FORKS = multiprocessing.get_context("forkserver")  # its processes share what the first of them has imported
FORKS.set_forkserver_preload(["loupe_core.cli", "papermill", "pytest"])


def write_cub(
    folder: Path,
    classes: int = 3,
    per_class: int = 10,
    size: tuple[int, int] = (36, 48),
    images: bool = True,
    segmentations: bool = False,
) -> Path:
    """Write a set in the CUB-200-2011 layout, images with an odd id for training. Returns its folder.

    Image k (from 1) is noise of seed k, (H, W) = size, stored without loss. Its box is (k % 7, 5, 20, 10),
    its part p lies at (p, k % 9) and is hidden where p + k is a multiple of 4. Segmentations are white in the
    box.
    """
    names = [f"{c:03d}.Bird_{c}" for c in range(1, classes + 1)]
    rows = [
        (c, f"{name}/{name[4:]}_{k:04d}.png") for c, name in enumerate(names, 1) for k in range(per_class)
    ]
    (folder / "parts").mkdir(parents=True)

    def write(name: str, lines) -> None:
        (folder / name).write_text("".join(f"{line}\n" for line in lines))

    ids = range(1, len(rows) + 1)
    write("classes.txt", (f"{c} {name}" for c, name in enumerate(names, 1)))
    write("images.txt", (f"{k} {path}" for k, (_, path) in zip(ids, rows)))
    write("image_class_labels.txt", (f"{k} {c}" for k, (c, _) in zip(ids, rows)))
    write("train_test_split.txt", (f"{k} {k % 2}" for k in ids))
    write("bounding_boxes.txt", (f"{k} {k % 7}.0 5.0 20.0 10.0" for k in ids))
    parts = ((k, p, (p + k) % 4 != 0) for k in ids for p in range(1, 16))
    write("parts/part_locs.txt", (f"{k} {p} {p * v}.0 {k % 9 * v}.0 {int(v)}" for k, p, v in parts))
    for k, (_, path) in zip(ids, rows if images else []):
        file = folder / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        if segmentations:
            mask = np.zeros(size, np.uint8)
            mask[5:15, k % 7 : k % 7 + 20] = 255
            file = folder / "segmentations" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)
    return folder


def write_folder(folder: Path, classes: int = 2, per_class: int = 4, size: tuple[int, int] = (48, 48)) -> Path:
    """Write a set of noise, `folder/<train or test>/<class>/<k>.png`, as many of both. Returns the folder."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c in range(classes):
            (folder / split / f"class_{c}").mkdir(parents=True)
            for k in range(per_class):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class_{c}" / f"{k}.png")
    return folder


def ran_here(function, *arguments) -> int:
    """In place of a benchmark's `peak_memory`: runs what it would, in this process. A fresh one imports torch first."""
    function, arguments = pickle.loads(pickle.dumps((function, arguments)))  # a fresh one is sent them
    function(*arguments)
    return 1


def drawn_here(workers: int, context) -> ThreadPoolExecutor:
    """In place of a ProcessPoolExecutor that draws birds: each of its processes would import torch first."""
    return ThreadPoolExecutor(1)
