"""Images per second: `PhotoFolder` and `transforms_for` against torchvision's ImageFolder with timm's transform.

    python -m benchmarks.loader [--quick]

The same photographs, random resized crop, mirror, RandAugment where named, and normalisation; 224 and 448 px; without
workers and with two; one thread each. "cold" empties the cache of decoded pixels before every pass, "warm" reads from
it. Prints the parts of a sample in ms, medians of passes that take turns, the ratio of medians (least and largest of
one round), peak memory, how far pixels differ for the same random draws, and the share of its time that a card would
wait for two workers. Writes data/results/bench_loader.json.

Photographs: some of LOUPE_CUB_ROOT where it is set, else drawn ones, 500 x 375 and about as many bytes as CUB's.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import RandomResizedCrop

from benchmarks.common import command, interleaved, ratio
from benchmarks.memory import peak_memory
from loupe_core import PhotoFolder, collate, open_image, transforms_for
from loupe_core.files.download import find_cub

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDAUGMENT = "rand-m9-mstd0.5"
BATCH = 16


def make_photographs(folder: Path, count: int) -> str:
    """Fills `folder`/birds with `count` photographs; returns where they come from."""
    (folder / "birds").mkdir()
    cub = find_cub(os.environ.get("LOUPE_CUB_ROOT", os.devnull))
    if cub is not None:
        files = sorted((cub / "images").glob("*/*.jpg"))
        for k in range(count):
            (folder / "birds" / f"{k:04}.jpg").symlink_to(files[k * len(files) // count].resolve())
        return "CUB-200-2011"
    rng = np.random.default_rng(0)
    for k in range(count):
        picture = np.full((375, 500, 3), 128.0)
        for size in (4, 16, 64, 250, 500):  # as in nature, about the same contrast at every scale
            noise = rng.normal(0, 14, (size * 3 // 4, size, 3)) + rng.normal(0, 14, (size * 3 // 4, size, 1))
            noise = torch.from_numpy(noise).permute(2, 0, 1)[None]
            noise = torch.nn.functional.interpolate(noise, (375, 500), mode="bicubic")
            picture += noise[0].permute(1, 2, 0).numpy() * (0.5 if size == 500 else 1)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "birds" / f"{k:04}.jpg", quality=90)
    return "drawn"


def their_transform(size: int, randaugment: str | None) -> Callable:
    return create_transform(size, is_training=True, auto_augment=randaugment, color_jitter=None, re_prob=0.0,
                            interpolation="bicubic", mean=MEAN, std=STD)


def our_transform(size: int, randaugment: str | None) -> Callable:
    config = dict(input_size=(3, size, size), mean=MEAN, std=STD, interpolation="bicubic")
    return transforms_for(config, train=True, randaugment=randaugment, fast=True)


def their_loader(folder: Path, size: int, randaugment: str | None, workers: int) -> DataLoader:
    return DataLoader(ImageFolder(folder, their_transform(size, randaugment)), BATCH, shuffle=True, num_workers=workers,
                      persistent_workers=workers > 0)


def our_loader(folder: Path, size: int, randaugment: str | None, workers: int) -> DataLoader:
    photographs = PhotoFolder(folder, val_fraction=0, test_fraction=0, cache=True,
                              transform=our_transform(size, randaugment))
    return DataLoader(photographs, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
                      collate_fn=collate)


def read_all(loader: DataLoader) -> None:
    for _ in loader:
        pass


def passes(make: Callable, folder: Path, size: int, randaugment: str | None, epochs: int) -> None:
    """What `peak_memory` measures: some passes over all photographs in one process."""
    torch.set_num_threads(1)
    loader = make(folder, size, randaugment, 0)
    for _ in range(epochs):
        read_all(loader)


def measure_speed(folder: Path, size: int, randaugment: str | None, workers: int, rounds: int) -> dict:
    count = sum(1 for _ in folder.glob("*/*"))
    theirs, ours = (make(folder, size, randaugment, workers) for make in (their_loader, our_loader))
    read_all(theirs)  # starts the workers
    read_all(ours)

    def cold():  # empties the cache, for the workers too: they share its file
        ours.dataset._cache.file.truncate(0)
        read_all(ours)

    seconds = interleaved(dict(theirs=lambda: read_all(theirs), cold=cold, warm=lambda: read_all(ours)), rounds)
    return dict(augment="RandAugment" if randaugment else "crop, mirror", size=size, workers=workers,
                **{f"{name}_images_s": count / statistics.median(values) for name, values in seconds.items()},
                **{f"{name}_{key}": value for name in ("cold", "warm")
                   for key, value in ratio(seconds["theirs"], seconds[name]).items()})


def measure_parts(folder: Path, size: int) -> dict:
    """Mean ms of processor time per photograph: the steps of theirs, then those of ours."""
    theirs = their_transform(size, RANDAUGMENT).transforms
    ours, quick = our_transform(size, None), our_transform(size, RANDAUGMENT).randaugment
    photographs = PhotoFolder(folder, val_fraction=0, test_fraction=0, cache=True)
    spent: dict[str, float] = {}

    def timed(name, function, *arguments):
        began = time.thread_time()
        out = function(*arguments)
        spent[name] = spent.get(name, 0) + (time.thread_time() - began) * 1000 / len(photographs)
        return out

    for i, path in enumerate(photographs.paths):
        image = timed("decode", lambda path=path: Image.open(path).convert("RGB"))
        small = timed("crop and resize", theirs[0], image)
        draws = random.getstate(), np.random.get_state()
        x = timed("RandAugment", theirs[2], timed("mirror", theirs[1], small))
        timed("normalise", theirs[4], timed("to tensor", theirs[3], x))
        photographs.image(i)
        timed("ours: from the cache", photographs.image, i)
        timed("ours: crop, resize, mirror, to tensor, normalise", ours, image)
        random.setstate(draws[0])
        np.random.set_state(draws[1])
        timed("ours: RandAugment", quick, small)
    return {"size": size} | {name: round(value, 3) for name, value in spent.items()}


def measure_wait(folder: Path, step: float, raw: bool, workers: int, batches: int) -> dict:
    """The share of its time that a card would wait for `batches` batches, photographs in the cache, RandAugment.

    The card is a stand-in: a step keeps this process's core busy for `step` seconds, as launching kernels does. The
    workers have what is left of the cores. One batch is waited for before the clock begins.
    """
    loader = our_loader(folder, 224, RANDAUGMENT, 0)
    read_all(loader)  # fills the cache
    loader.dataset.transform.raw = raw
    order = [i % len(loader.dataset) for i in range(BATCH * (batches + 1))]
    fed = iter(DataLoader(loader.dataset, BATCH, sampler=order, num_workers=workers, collate_fn=collate))
    next(fed)
    waited, began = 0.0, time.perf_counter()
    for _ in range(batches):
        asked = time.perf_counter()
        next(fed)
        waited += time.perf_counter() - asked
        until = time.perf_counter() + step
        while time.perf_counter() < until:
            pass
    return dict(step_ms=1000 * step, asked_images_s=BATCH / step, images="8 bit" if raw else "float32", workers=workers,
                waited=waited / (time.perf_counter() - began))


def differences(paths: list[str], size: int, randaugment: str | None, seed: int = 0) -> dict:
    """|ours - theirs| in 8-bit levels, from files, with the same crop, mirror and RandAugment draws."""
    theirs, ours = their_transform(size, randaugment), our_transform(size, randaugment)
    scale, draw = 255 * torch.tensor(STD)[:, None, None], RandomResizedCrop.get_params
    found = []
    their_draw = RandomResizedCropAndInterpolation.get_params
    try:
        for k, path in enumerate(paths):
            torch.manual_seed(seed + k)
            window = draw(open_image(path), [0.08, 1.0], [3 / 4, 4 / 3])
            RandomResizedCrop.get_params = staticmethod(lambda *_, window=window: window)
            RandomResizedCropAndInterpolation.get_params = staticmethod(lambda *_, window=window: window)
            pair = []
            for transform in (theirs, ours):
                torch.manual_seed(seed + k)
                np.random.seed(seed + k)
                random.seed(seed + k)
                x = transform(open_image(path))
                pair.append(x[0] if isinstance(x, tuple) else x)
            found.append((pair[0] - pair[1]).abs().mul(scale).round())
    finally:
        RandomResizedCrop.get_params = staticmethod(draw)
        RandomResizedCropAndInterpolation.get_params = staticmethod(their_draw)
    means, shares = ([f(x).item() for x in found] for f in (torch.mean, lambda x: (x > 2).float().mean()))
    return dict(augment="RandAugment" if randaugment else "crop, mirror", size=size, images=len(paths),
                largest=int(max(x.max().item() for x in found)), mean=statistics.fmean(means),
                mean_of_the_worst=max(means), share_above_2=statistics.fmean(shares))


def measure(quick: bool) -> dict:
    count, rounds, sizes = (16, 1, (224,)) if quick else (96, 5, (224, 448))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*fork.*")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table: dict = dict(photographs=make_photographs(folder, count), images=count, rounds=rounds, batch=BATCH)
        files = sorted(map(str, folder.glob("*/*")))
        table["file_bytes_an_image"] = round(statistics.fmean(os.path.getsize(file) for file in files))
        table["parts_ms"] = [measure_parts(folder, size) for size in sizes]
        table["speed"] = [measure_speed(folder, size, randaugment, workers, rounds) for size in sizes
                          for randaugment in (RANDAUGMENT, None) for workers in (0, 2)]
        # Swin-Base and Swin-Tiny on an A100, by the counts of benchmarks/launches.py
        table["wait"] = [measure_wait(folder, step, raw, 2, 10 if quick else 200)
                         for step in (0.0315, 0.0158) for raw in (False, True)]
        table["memory"] = [dict(loader=name, size=sizes[-1], passes=epochs, peak_mib=round(
            peak_memory(passes, make, folder, sizes[-1], RANDAUGMENT, epochs) / 2**20))
            for name, make, epochs in (("theirs", their_loader, 1), ("ours", our_loader, 1), ("ours", our_loader, 2))]
        kept = PhotoFolder(folder, val_fraction=0, test_fraction=0, cache=True)
        sizes_px = [kept.image(i).size for i in range(count)]
        table["cache"] = dict(bytes_an_image=round(os.fstat(kept._cache.file.fileno()).st_blocks * 512 / count),
                              pixels_an_image=round(statistics.fmean(w * h for w, h in sizes_px)),
                              limit=kept._cache.LIMIT)
        table["pixels"] = [differences(files, size, randaugment)
                           for size in sizes for randaugment in (None, RANDAUGMENT)]
    return table


main = partial(command, "loader", __doc__, measure)

if __name__ == "__main__":
    main()
