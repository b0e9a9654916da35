"""The whole experiment in small: CUB's layout and number of classes, images of 64 px, a Swin of some thousand weights.

It shows that every arm trains, is measured and gives its row on this machine, before hours of a card are spent. Its
figures mean nothing.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from loupe_lab.paper.arms import Run
from loupe_lab.paper.experiment import Setting

CLASSES, PIXELS = 200, 64
SEEDS = 2  # the fewest that give an interval
_SWIN = dict(window_size=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
_WIDTHS = dict(base=16, tiny=8)


def write_stand_in(folder: Path, train: int = 2, test: int = 1) -> Path:
    """Writes a set in CUB's layout: on noise, a square of its class's colour, whose box is known. Returns `folder`.

    Args:
        train, test: Images per class.
    """
    draws, rows = np.random.default_rng(0), []
    names = [f"{k:03d}.Colour_{k}" for k in range(1, CLASSES + 1)]
    for k, name in enumerate(tqdm(names, desc="stand-in", leave=False, disable=None), 1):
        (folder / "images" / name).mkdir(parents=True)
        colour = [255 * (k // 6**i % 6) // 5 for i in range(3)]
        for i in range(train + test):
            x, y = (int(v) for v in draws.integers(0, PIXELS // 2, 2))
            pixels = draws.integers(90, 166, (PIXELS, PIXELS, 3)).astype(np.uint8)
            pixels[y : y + PIXELS // 2, x : x + PIXELS // 2] = colour
            file = f"{name}/Colour_{k}_{i}.png"
            Image.fromarray(pixels).save(folder / "images" / file)
            rows.append((file, k, int(i < train), f"{x}.0 {y}.0 {PIXELS / 2} {PIXELS / 2}"))
    for list_, lines in (("classes", (f"{k} {name}" for k, name in enumerate(names, 1))),
                         ("images", (f"{i} {row[0]}" for i, row in enumerate(rows, 1))),
                         ("image_class_labels", (f"{i} {row[1]}" for i, row in enumerate(rows, 1))),
                         ("train_test_split", (f"{i} {row[2]}" for i, row in enumerate(rows, 1))),
                         ("bounding_boxes", (f"{i} {row[3]}" for i, row in enumerate(rows, 1)))):
        (folder / f"{list_}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def small_backbone(run: Run) -> dict:
    """The arguments of `LoupeModel` for the Swin that stands in for a run's."""
    return dict(backbone="swin_tiny_patch4_window7_224", pretrained=False, img_size=PIXELS,
                backbone_kwargs=_SWIN | dict(embed_dim=_WIDTHS[run.backbone.split()[0]]))


@contextmanager
def rehearsed(out: Path, changes: dict | None = None) -> Iterator[Setting]:
    """A setting in which a run takes about a second; its set is gone afterwards, its runs are in `out`.

    Args:
        changes: Of every `Recipe`, as in `Setting`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is slower on several
    gc.freeze()  # each training collects garbage, which takes as long as the training where all libraries are looked at
    try:
        with TemporaryDirectory(prefix="loupe-rehearsal-") as folder:
            recipe = dict(epochs=1, batch_size=50, lr=1e-3) | (changes or {})
            yield Setting(write_stand_in(Path(folder, "CUB_200_2011")), out, dict(progress=False), recipe,
                          small_backbone, audited=50, attacked=10, images=CLASSES)
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
