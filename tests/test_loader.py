"""The loader: the file of decoded pixels, the fast transform, and the benchmark against ImageFolder and timm."""

import copy
import json
import os
import random

import numpy as np
import pytest
import torch
from helpers import ran_here
from PIL import Image
from timm.data import auto_augment
from torch.utils.data import DataLoader

from benchmarks import loader
from benchmarks.common import ratio
from benchmarks.memory import peak_memory
from loupe_core import PhotoFolder, TrainTransform, collate
from loupe_core.augment import _QUICK
from loupe_core.files.pixel_cache import PixelCache

CONFIG = dict(mean=loader.MEAN, std=loader.STD)


@pytest.fixture
def photographs(tmp_path):
    loader.make_photographs(tmp_path, 8)
    return tmp_path


def open_all(folder, **options):
    return PhotoFolder(folder, val_fraction=0, test_fraction=0, cache=True, **options)


def pixels(dataset):
    return [np.asarray(dataset.image(i)) for i in range(len(dataset))]


def bytes_kept(dataset):
    return os.fstat(dataset._cache.file.fileno()).st_blocks * 512


# ---- the file of decoded pixels


@pytest.mark.parametrize("start", ["fork", "forkserver"])  # and spawned ones: test_accidents.py, in a training
def test_workers_share_one_file_however_they_are_started(photographs, start):
    dataset = open_all(photographs, transform=TrainTransform(16, **CONFIG))
    for _ in DataLoader(dataset, 2, collate_fn=collate, num_workers=2, multiprocessing_context=start):
        pass
    kept = [dataset._cache.read(i) for i in range(len(dataset))]
    plain = PhotoFolder(photographs, val_fraction=0, test_fraction=0)
    assert all(np.array_equal(image, plain.image(i)) for i, image in enumerate(kept))
    assert bytes_kept(dataset) <= sum(image.width * image.height * 3 + 8192 for image in kept)


def test_no_more_is_kept_than_the_limit_and_the_rest_is_decoded(photographs, monkeypatch):
    expected = pixels(open_all(photographs))
    monkeypatch.setattr(PixelCache, "LIMIT", 3 * 600_000)
    dataset = open_all(photographs)
    for _ in range(2):
        assert all(map(np.array_equal, pixels(dataset), expected))
    kept = [dataset._cache.read(i) is not None for i in range(len(dataset))]
    assert 1 <= sum(kept) <= 4 and bytes_kept(dataset) <= PixelCache.LIMIT


def test_a_photograph_larger_than_its_place_is_decoded(photographs, monkeypatch):
    monkeypatch.setattr(PixelCache, "SLOT", 2**12)
    dataset = open_all(photographs)
    assert all(map(np.array_equal, pixels(dataset), pixels(dataset))) and bytes_kept(dataset) == 0


def test_a_disk_that_fills_up_costs_nothing_but_time(photographs, monkeypatch):
    expected = pixels(open_all(photographs))
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, start: write(file, data[: len(data) // 2], start))
    dataset = open_all(photographs)
    for _ in range(2):
        assert all(map(np.array_equal, pixels(dataset), expected))

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("pwrite", "fstatvfs"):
        monkeypatch.setattr(os, name, full)
        dataset = open_all(photographs)
        assert all(map(np.array_equal, pixels(dataset), expected)) and bytes_kept(dataset) == 0


def test_without_a_place_for_the_file_photographs_are_decoded(photographs, monkeypatch):
    expected = pixels(open_all(photographs))
    monkeypatch.setattr("tempfile.tempdir", str(photographs / "nowhere"))
    assert all(map(np.array_equal, pixels(open_all(photographs)), expected))


def test_a_copy_of_a_set_keeps_its_own_pixels(photographs):
    dataset = open_all(photographs)
    expected = pixels(dataset)
    other = copy.deepcopy(dataset)
    assert bytes_kept(other) == 0 and all(map(np.array_equal, pixels(other), expected))
    assert bytes_kept(other) == bytes_kept(dataset) > 0


# ---- the fast transform


@pytest.mark.parametrize("size", [224, 448])
def test_the_fast_pixels_are_those_of_timms_own_pipeline(photographs, size):
    paths = sorted(map(str, photographs.glob("*/*")))
    plain = loader.differences(paths * 4, size, None)
    assert plain["largest"] <= 24 and plain["mean_of_the_worst"] <= 0.3 and plain["share_above_2"] <= 1e-3
    full = loader.differences(paths * 4, size, loader.RANDAUGMENT)
    assert full["mean"] <= 0.3 and full["mean_of_the_worst"] <= 1 and full["share_above_2"] <= 3e-3


def test_fast_takes_the_same_draws_and_tells_the_same_geometry():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    for randaugment in (None, loader.RANDAUGMENT):
        found = []
        for fast in (False, True):
            torch.manual_seed(1)
            np.random.seed(1)
            random.seed(1)
            transform = TrainTransform(32, randaugment=randaugment, fast=fast, **CONFIG)
            geometries = [transform(image)[1] for _ in range(20)]
            found.append((geometries, torch.rand(()).item(), np.random.random(), random.random()))
        assert found[0] == found[1]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "lanczos"])
def test_fast_holds_for_other_interpolations(interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    found = []
    for fast in (False, True):
        torch.manual_seed(0)
        transform = TrainTransform(32, interpolation=interpolation, fast=fast, scale=(0.5, 1.0), **CONFIG)
        found.append(torch.stack([transform(image)[0] for _ in range(8)]))
    levels = (found[0] - found[1]).abs().mul(255 * torch.tensor(loader.STD)[:, None, None])
    assert levels.max() < 8.5 and levels.mean() < 0.3


@pytest.mark.parametrize("function", [auto_augment.shear_x, auto_augment.shear_y, auto_augment.translate_x_rel,
                                      auto_augment.translate_y_rel])
@pytest.mark.parametrize("amount", [-2.0, -0.3, -0.011, 0.0, 0.2, 0.45, 2.0])
def test_a_quick_slide_is_pillows_within_a_level(function, amount):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 71, 3), dtype=np.uint8))
    options = dict(fillcolor=(124, 116, 104), resample=Image.Resampling.BICUBIC)
    ours, theirs = (np.asarray(f(image, amount, **options)).astype(int) for f in (_QUICK[function], function))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.01


@pytest.mark.parametrize("size", [(71, 90), (3, 3), (2, 9), (9, 1)])
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_quick_sharpness_is_pillows(size, factor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours, theirs = (np.asarray(f(image, factor)) for f in (_QUICK[auto_augment.sharpness], auto_augment.sharpness))
    assert np.array_equal(ours, theirs)


# ---- the benchmark


def test_a_ratio_is_that_of_the_medians_with_its_spread():
    assert ratio([4.0, 2.0, 3.0], [1.0, 1.0, 2.0]) == dict(ratio=3.0, least=1.5, largest=4.0)


def test_peak_memory_is_that_of_the_function_alone():
    filler = np.ones(2**27)  # 1 GiB here says nothing about a process that is started from here
    small, large = peak_memory(np.ones, 8), peak_memory(np.ones, 2**25)
    assert 200 * 2**20 < large - small < 300 * 2**20 and small < filler.nbytes


@pytest.mark.slow
def test_the_benchmark_runs_and_says_where_its_figures_come_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loader, "peak_memory", ran_here)
    loader.main(["--quick"], tmp_path)
    table = json.loads((tmp_path / "bench_loader.json").read_text())
    assert [(row["augment"], row["workers"]) for row in table["speed"]] == [
        ("RandAugment", 0), ("RandAugment", 2), ("crop, mirror", 0), ("crop, mirror", 2)]
    assert all(row["warm_least"] <= row["warm_ratio"] <= row["warm_largest"] for row in table["speed"])
    assert [row["images"] for row in table["wait"]] == ["float32", "8 bit"] * 2
    assert all(0 <= row["waited"] < 1 for row in table["wait"])
    assert table["cache"]["bytes_an_image"] <= 3 * table["cache"]["pixels_an_image"] + 8192
    assert table["provenance"]["processor"] and table["provenance"]["versions"]["pillow"]
    assert "warm_ratio" in capsys.readouterr().out
