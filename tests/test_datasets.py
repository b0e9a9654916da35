import pickle
import shutil
import struct
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from loupe_core import CUB200, PhotoFolder, collate, open_image
from loupe_core.errors import LoupeError
from loupe_core.files import cuts
from loupe_core.geometry import EvalTransform, TrainTransform

HALF = (0.5, 0.5, 0.5)


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def ids(dataset):
    return set(dataset.image_ids.tolist())


# ---- splits


def test_test_is_the_official_one_and_train_and_val_share_the_rest(make_cub):
    folder = make_cub(images=False)
    train, val, test = (CUB200(folder, split) for split in ("train", "val", "test"))
    assert ids(test) == {k for k in range(1, 31) if k % 2 == 0}
    assert ids(train) | ids(val) == {k for k in range(1, 31) if k % 2 == 1}
    assert ids(train).isdisjoint(ids(val))


def test_test_never_changes_with_seed_or_val_fraction(make_cub):
    folder = make_cub(images=False)
    for seed, fraction in ((0, 0.0), (1, 0.1), (2, 0.9)):
        assert ids(CUB200(folder, "test", fraction, seed)) == {k for k in range(1, 31) if k % 2 == 0}


def test_val_is_stratified_and_cut_by_seed(make_cub):
    folder = make_cub(images=False, classes=5, per_class=40)
    cuts = [CUB200(folder, "val", 0.2, seed) for seed in (0, 0, 1)]
    for cut in cuts:
        assert np.bincount(cut.labels).tolist() == [4] * 5  # 20 training images a class
    assert ids(cuts[0]) == ids(cuts[1]) != ids(cuts[2])


def test_the_cut_of_a_seed_is_the_same_on_every_machine(make_cub):
    """Recorded once: a changed cut would leak validation images into the training of a resumed run."""
    folder = make_cub(images=False, classes=2, per_class=20)
    assert sorted(ids(CUB200(folder, "val", 0.2, seed=3))) == RECORDED_CUT


RECORDED_CUT = [3, 7, 21, 33]


@given(st.floats(0, 0.99), st.integers(1, 60))
def test_a_cut_takes_the_nearest_share_but_never_a_whole_class(fraction, members):
    labels = np.repeat([0, -1], [members, 7])
    chosen = cuts.cut_by_position(labels, ["a"], fraction, 0, "val")
    assert not chosen[members:].any()
    if fraction == 0 or members == 1:
        assert chosen.sum() == 0
    else:
        assert 1 <= chosen.sum() <= members - 1
        if 1 <= fraction * members <= members - 1:
            assert abs(chosen.sum() - fraction * members) <= 0.5


def test_real_cub_cut_is_stratified(real_cub):
    train, val, test = (CUB200(real_cub, split) for split in ("train", "val", "test"))
    counts = np.bincount(train.labels) + np.bincount(val.labels)
    assert np.bincount(val.labels).tolist() == [round(0.1 * count) for count in counts]
    assert len(ids(train) | ids(val) | ids(test)) == len(train) + len(val) + len(test)


# ---- the CUB layout


def test_root_may_be_the_folder_or_its_parent(make_cub):
    folder = make_cub(images=False)
    assert ids(CUB200(folder)) == ids(CUB200(folder.parent)) == ids(CUB200(str(folder)))


def test_a_sample_holds_what_the_lists_say(make_cub):
    folder = make_cub()
    test = CUB200(folder, "test")
    i = test.image_ids.tolist().index(14)
    sample = test[i]
    assert (sample.image_id, sample.label, sample.geometry) == (14, 1, None)
    assert sample.path == str(folder / "images" / "002.Bird_2" / "Bird_2_0003.png")
    pixels = np.random.default_rng(14).integers(0, 256, (36, 48, 3), dtype=np.uint8)
    assert np.array_equal(sample.image, pixels)
    assert sample.box.tolist() == [0, 5, 20, 10]
    assert sample.parts.shape == (15, 3) and sample.parts.dtype == torch.float32
    assert sample.parts[4].tolist() == [5, 5, 1]  # part 5
    assert sample.parts[9].tolist() == [0, 0, 0]  # part 10 is hidden, as 10 + 14 is a multiple of 4
    assert test.class_names == ["001.Bird_1", "002.Bird_2", "003.Bird_3"]


def test_a_changed_sample_leaves_the_set_as_it_was(make_cub):
    dataset = CUB200(make_cub())
    sample = dataset[0]
    before = sample.parts.clone(), sample.box.clone()
    sample.parts.zero_(), sample.box.zero_()
    assert torch.equal(dataset[0].parts, before[0]) and torch.equal(dataset[0].box, before[1])


def test_classes_are_kept_by_name_or_id_and_renumbered_in_order(make_cub):
    folder = make_cub(images=False)
    by_name = CUB200(folder, "test", classes=["003.Bird_3", "001.Bird_1"])
    by_id = CUB200(folder, "test", classes=[3, 1])
    for kept in (by_name, by_id):
        assert kept.class_names == ["003.Bird_3", "001.Bird_1"]
        expected = {k: 0 if k > 20 else 1 for k in range(2, 31, 2) if not 10 < k <= 20}
        assert dict(zip(kept.image_ids.tolist(), kept.labels.tolist())) == expected


def test_the_cut_of_a_class_does_not_depend_on_the_other_classes(make_cub):
    folder = make_cub(images=False, per_class=20)
    every = CUB200(folder, "val", 0.3)
    alone = CUB200(folder, "val", 0.3, classes=[2])
    assert ids(alone) == {k for k, label in zip(every.image_ids.tolist(), every.labels) if label == 1}


def test_sets_without_parts_or_boxes_give_none(make_cub):
    folder = make_cub()
    shutil.rmtree(folder / "parts")
    assert CUB200(folder)[0].parts is None and CUB200(folder)[0].box is not None
    (folder / "bounding_boxes.txt").unlink()
    dataset = CUB200(folder)
    assert dataset.boxes is None and dataset[0].box is None
    batch = collate([CUB200(folder, transform=EvalTransform(16, HALF, HALF))[i] for i in range(2)])
    assert batch["box"] is None and batch["parts"] is None


def test_segmentation_is_true_on_the_bird_or_none(make_cub):
    folder = make_cub(segmentations=True)
    dataset = CUB200(folder, "test")
    mask = dataset.segmentation(0)  # image 2
    assert mask.shape == (36, 48) and mask.dtype == bool
    assert mask[5:15, 2:22].all() and mask.sum() == 200
    shutil.rmtree(folder / "segmentations")
    assert dataset.segmentation(0) is None


def test_metadata_of_11788_images_loads_in_under_a_second(make_cub):
    folder = make_cub(classes=200, per_class=59, images=False)
    seconds, count = [], 0
    for split in ("train", "val", "test"):
        start = time.process_time()
        dataset = CUB200(folder, split)
        seconds.append(time.process_time() - start)
        count += len(dataset.parts)
    assert count == 11_800 >= 11_788
    assert max(seconds) < 1  # seconds of the processor, as other programs may be running


def keep_lines(path, count):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


# ---- broken lists


def drop(name):
    return lambda folder: (folder / name).unlink()


def shorten(name, count):
    return lambda folder: keep_lines(folder / name, count)


def replace(name, number, line):
    def change(folder):
        lines = (folder / name).read_text().splitlines()
        lines[number - 1] = line
        (folder / name).write_text("\n".join(lines))

    return change


BROKEN = {
    "no classes": (drop("classes.txt"), "classes.txt: found no such file"),
    "no images": (drop("images.txt"), "found no images.txt here or up to two folders down"),
    "no labels": (drop("image_class_labels.txt"), "image_class_labels.txt: found no such file"),
    "no split": (drop("train_test_split.txt"), "train_test_split.txt: found no such file"),
    "no boxes": (drop("bounding_boxes.txt"), "bounding_boxes.txt: found no such file"),
    "no parts": (drop("parts/part_locs.txt"), "part_locs.txt: found no such file"),
    "short labels": (
        shorten("image_class_labels.txt", 29),
        "image_class_labels.txt: found 29 lines, expected 30",
    ),
    "short split": (shorten("train_test_split.txt", 7), "train_test_split.txt: found 7 lines, expected 30"),
    "short boxes": (shorten("bounding_boxes.txt", 1), "bounding_boxes.txt: found 1 lines, expected 30"),
    "short parts": (shorten("parts/part_locs.txt", 449), "part_locs.txt: found 449 lines, expected 450"),
    "short images": (shorten("images.txt", 20), "image_class_labels.txt: found 30 lines, expected 20"),
    "short classes": (
        shorten("classes.txt", 2),
        "image_class_labels.txt, line 21: found '21 3', expected a class id of classes.txt",
    ),
    "empty": (shorten("bounding_boxes.txt", 0), "bounding_boxes.txt: found an empty file"),
    "label": (
        replace("image_class_labels.txt", 5, "5 201"),
        "image_class_labels.txt, line 5: found '5 201', expected a class id of classes.txt",
    ),
    "label 0": (replace("image_class_labels.txt", 1, "1 0"), "line 1: found '1 0', expected a class id"),
    "label fraction": (
        replace("image_class_labels.txt", 1, "1 1.5"),
        "line 1: found '1 1.5', expected a class id",
    ),
    "id in labels": (
        replace("image_class_labels.txt", 4, "40 1"),
        "image_class_labels.txt, line 4: found '40 1', expected image id 4",
    ),
    "id in boxes": (
        replace("bounding_boxes.txt", 9, "8 1 1 1 1"),
        "bounding_boxes.txt, line 9: found '8 1 1 1 1', expected image id 9",
    ),
    "id in parts": (
        replace("parts/part_locs.txt", 31, "4 1 0 0 0"),
        "part_locs.txt, line 31: found '4 1 0 0 0', expected image id 3",
    ),
    "part id": (
        replace("parts/part_locs.txt", 17, "2 16 0 0 0"),
        "part_locs.txt, line 17: found '2 16 0 0 0', expected the part ids 1 to 15",
    ),
    "visibility": (
        replace("parts/part_locs.txt", 2, "1 2 5 5 2"),
        "line 2: found '1 2 5 5 2', expected 0 (hidden)",
    ),
    "split value": (replace("train_test_split.txt", 3, "3 2"), "train_test_split.txt, line 3: found '3 2'"),
    "word": (
        replace("bounding_boxes.txt", 6, "6 1 2 three 4"),
        "line 6: found '6 1 2 three 4', expected 5 numbers",
    ),
    "nan": (
        replace("bounding_boxes.txt", 6, "6 1 2 nan 4"),
        "line 6: found '6 1 2 nan 4', expected 5 numbers",
    ),
    "columns": (
        replace("bounding_boxes.txt", 30, "30 1 2 3"),
        "line 30: found '30 1 2 3', expected 5 numbers",
    ),
    "blank": (
        replace("train_test_split.txt", 8, ""),
        "train_test_split.txt, line 8: found '', expected 2 numbers",
    ),
    "name": (replace("images.txt", 2, "2"), "images.txt, line 2: found '2', expected an id and a name"),
    "id word": (
        replace("classes.txt", 3, "c Bird"),
        "classes.txt, line 3: found 'c Bird', expected an id and a name",
    ),
    "id twice": (replace("images.txt", 2, "1 a.png"), "images.txt, line 2: found '1', expected each id once"),
    "name twice": (
        replace("classes.txt", 2, "2 001.Bird_1"),
        "classes.txt, line 2: found '001.Bird_1', expected",
    ),
    "not text": (
        lambda folder: (folder / "classes.txt").write_bytes(b"1 \xff\xfe"),
        "classes.txt: found unreadable",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_list_is_told_in_one_line_with_file_and_line(make_cub, name):
    change, expected = BROKEN[name]
    folder = make_cub(images=False)
    change(folder)
    with pytest.raises(LoupeError) as caught:
        CUB200(folder)
    assert expected in one_line(caught)
    assert str(folder) in one_line(caught)


WRONG = {
    "no such folder": (dict(root="nowhere"), "nowhere: found no images.txt here or up to two folders down"),
    "split": (dict(split="validation"), "split: found 'validation', expected one of train, val, test"),
    "val_fraction": (dict(val_fraction=1.0), "val_fraction: found 1.0, expected a fraction in [0, 1)"),
    "seed": (dict(seed=-1), "seed: found -1, expected a whole number"),
    "class": (dict(classes=["Dodo"]), "classes: found 'Dodo', expected each once, of 001.Bird_1"),
    "class twice": (dict(classes=["001.Bird_1", 1]), "classes: found a second 1, expected each once"),
    "nothing left": (dict(split="val", val_fraction=0.0), "found no val images"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_told_in_one_line(make_cub, name):
    settings, expected = WRONG[name]
    with pytest.raises(LoupeError) as caught:
        CUB200(**({"root": make_cub(images=False)} | settings))
    assert expected in one_line(caught)


# ---- transforms, batches, cache


def test_a_batch_stacks_what_the_samples_hold(make_cub):
    dataset = CUB200(make_cub(), "test", transform=EvalTransform(16, HALF, HALF))
    samples = [dataset[i] for i in (0, 4, 7)]
    batch = collate(samples)
    assert batch["image"].shape == (3, 3, 16, 16) and batch["parts"].shape == (3, 15, 3)
    assert batch["label"].tolist() == [0, 0, 1] and batch["image_id"].tolist() == [2, 10, 16]
    assert torch.equal(batch["box"][1], samples[1].box)
    assert batch["geometry"][2].original_size == (36, 48)
    assert batch["path"] == [dataset.paths[i] for i in (0, 4, 7)]


def test_collate_asks_for_a_transform(make_cub):
    dataset = CUB200(make_cub())
    with pytest.raises(LoupeError) as caught:
        collate([dataset[0]])
    assert "give the set a transform" in one_line(caught)


def test_worker_processes_give_the_batches_of_the_main_process(make_cub):
    dataset = CUB200(make_cub(), transform=EvalTransform(16, HALF, HALF), cache=True)
    alone, helped = (
        list(DataLoader(dataset, batch_size=5, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    assert len(alone) == len(helped) > 1
    for one, other in zip(alone, helped):
        assert torch.equal(one["image"], other["image"]) and one["geometry"] == other["geometry"]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_a_set_survives_pickling(make_cub, fast, interpolation):
    """As it does on the way to a worker that is started, not forked: Python 3.14's default, and Windows'."""
    dataset = CUB200(make_cub(), transform=TrainTransform(16, HALF, HALF, interpolation, randaugment="rand-m9-mstd0.5",
                                                          fast=fast))
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.paths == dataset.paths and copy[0].image.shape == (3, 16, 16)


def test_the_cache_returns_the_same_pixels_and_reads_a_file_once(make_cub):
    folder = make_cub()
    plain, cached = CUB200(folder), CUB200(folder, cache=True)
    first = [cached.image(i) for i in range(len(cached))]
    assert all(np.array_equal(image, plain.image(i)) for i, image in enumerate(first))
    first[0].paste((0, 0, 0), (0, 0, 48, 36))  # a caller may draw on it
    expected = [np.asarray(plain.image(i)) for i in range(len(plain))]
    shutil.rmtree(folder / "images")
    assert all(np.array_equal(cached.image(i), pixels) for i, pixels in enumerate(expected))


def test_a_missing_photograph_is_told_when_it_is_read(make_cub):
    dataset = CUB200(make_cub(images=False))
    with pytest.raises(LoupeError) as caught:
        dataset[0]
    assert one_line(caught).startswith(f"{dataset.paths[0]}: found no such file")


# ---- folders of own photographs


def write_folder(root, tree):
    """tree: {"a/1.png": ...}: every path becomes a 4 x 4 image."""
    for path in tree:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path, format="PNG")
    return root


def test_a_folder_a_class_is_cut_into_three_stratified_splits(tmp_path):
    write_folder(tmp_path, [f"{name}/{k:02d}.png" for name in ("wren", "dipper") for k in range(20)])
    splits = {split: PhotoFolder(tmp_path, split) for split in ("train", "val", "test")}
    assert splits["train"].class_names == ["dipper", "wren"]
    # 20 % of 20 are for the test, 10 % of the other 16 for val
    expected = {"train": [14, 14], "val": [2, 2], "test": [4, 4]}
    assert {split: np.bincount(found.labels).tolist() for split, found in splits.items()} == expected
    assert len(set().union(*(found.paths for found in splits.values()))) == 40
    assert set(PhotoFolder(tmp_path, "test", seed=1).paths) != set(splits["test"].paths)
    sample = splits["test"][0]
    assert sample.parts is None and sample.box is None and "dipper" in sample.path


def test_a_divided_folder_keeps_its_own_splits(tmp_path):
    train = [f"train/{name}/{k}.png" for name in "ab" for k in range(10)]
    write_folder(tmp_path, train + ["test/a/0.png", "test/b/0.png"])
    assert [path[-12:] for path in PhotoFolder(tmp_path, "test").paths] == ["test/a/0.png", "test/b/0.png"]
    val = PhotoFolder(tmp_path, "val")
    assert np.bincount(val.labels).tolist() == [1, 1] and all("/train/" in path for path in val.paths)
    write_folder(tmp_path, ["val/b/7.png"])
    val = PhotoFolder(tmp_path, "val")
    assert [path[-11:] for path in val.paths] == ["val/b/7.png"] and val.labels.tolist() == [1]
    assert len(PhotoFolder(tmp_path, "train")) == 20


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, [f"{name}/{k}.png" for name in ("bus", "train") for k in range(5)])
    assert PhotoFolder(tmp_path).class_names == ["bus", "train"]


def test_hidden_and_other_files_are_passed_over_and_deep_ones_found(tmp_path):
    good = ["a/1.png", "a/deep/2.JPG", "b/3.jpeg"]
    write_folder(tmp_path, good + ["a/.4.png", "a/.ipynb_checkpoints/5.png", ".git/6.png"])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    found = PhotoFolder(tmp_path, test_fraction=0.0, val_fraction=0.0)
    assert sorted(found.paths) == [str(tmp_path / path) for path in good]


@pytest.mark.parametrize(
    "tree, split, expected",
    [
        ([], "train", "found no folders in it"),
        (["train/a/1.png", "train/c/1.png", "test/b/1.png"], "train", "test/b: found a class without training"),
        (["train/a/1.png", "train/b/1.png"], "test", "found no test images"),
    ],
)
def test_a_folder_that_cannot_serve_is_told_in_one_line(tmp_path, tree, split, expected):
    write_folder(tmp_path, tree)
    with pytest.raises(LoupeError) as caught:
        PhotoFolder(tmp_path, split)
    assert expected in one_line(caught) and str(tmp_path) in one_line(caught)


def test_an_empty_and_a_missing_folder_are_told_in_one_line(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for root, expected in (
        (tmp_path, "found no photographs in its folders"),
        (tmp_path / "c", "c: found no such folder"),
    ):
        with pytest.raises(LoupeError) as caught:
            PhotoFolder(root)
        assert expected in one_line(caught)


# ---- reading photographs


def png_bytes(width, height, bits, rows):
    """A colour PNG by hand: Pillow writes neither 16 bit colour nor false promises."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png


TOP_LEFT_RED = np.full((20, 30, 3), (40, 90, 200), np.uint8)
TOP_LEFT_RED[:10, :15] = (220, 30, 20)


def test_grey_is_repeated_over_three_channels(tmp_path):
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) % 256
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "grey.png")
    image = open_image(tmp_path / "grey.png")
    assert image.mode == "RGB" and (np.asarray(image) == values[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_high_byte(tmp_path, suffix):
    values = (np.arange(600, dtype=np.uint32) * 109).astype(np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    assert (np.asarray(open_image(tmp_path / f"deep.{suffix}")) == (values // 256)[..., None]).all()


def test_16_bit_colour_keeps_its_high_byte(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "deep.png").write_bytes(png_bytes(5, 4, 16, rows))
    assert np.array_equal(open_image(tmp_path / "deep.png"), values // 256)


@pytest.mark.parametrize("name", ["inks.jpg", "inks.tif"])
def test_cmyk_is_read_as_ink_inverted_by_adobe_or_not(tmp_path, name):
    """JPEG stores CMYK inverted, after Adobe; TIFF does not."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 1] = inks[..., 2] = 255  # magenta and yellow: red
    Image.frombytes("CMYK", (16, 16), inks.tobytes()).save(tmp_path / name, quality=100)
    stored = (tmp_path / name).read_bytes()
    assert (b"Adobe" in stored) == name.endswith("jpg")
    assert np.abs(np.asarray(open_image(tmp_path / name)).astype(int) - (255, 0, 0)).max() <= 2


def test_a_transparent_palette_lies_on_white(tmp_path):
    image = Image.frombytes("P", (2, 6), bytes([0, 1] * 6))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "p.png", transparency=0)
    pixels = np.asarray(open_image(tmp_path / "p.png"))
    assert (pixels[:, 0] == 255).all() and (pixels[:, 1] == (200, 100, 50)).all()


def test_half_transparent_colour_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (100, 0, 200, 128)).save(tmp_path / "a.png")
    share = 128 / 255
    expected = np.array([100, 0, 200]) * share + 255 * (1 - share)
    assert np.abs(np.asarray(open_image(tmp_path / "a.png")) - expected).max() <= 1


UPRIGHT = {  # what the tag says of the stored picture, undone with NumPy
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_rotated_photograph_is_set_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(TOP_LEFT_RED).save(tmp_path / "r.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "r.png"), UPRIGHT[orientation](TOP_LEFT_RED))


def test_broken_exif_data_does_not_hide_sound_pixels(tmp_path, recwarn):
    Image.fromarray(TOP_LEFT_RED).save(tmp_path / "e.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert np.array_equal(open_image(tmp_path / "e.png"), TOP_LEFT_RED)
    assert len(recwarn) == 0


def whole_jpeg(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, "JPEG")
    return path.read_bytes()


def float_tiff(path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF")


def bomb(path):
    path.write_bytes(png_bytes(20_000, 20_000, 8, b""))  # promises 1.2 GB of pixels


UNREADABLE = {
    "missing": (lambda path: None, "found no such file"),
    "a folder": (lambda path: path.mkdir(), "found no such file"),
    "empty": (lambda path: path.write_bytes(b""), "found an empty file (0 bytes)"),
    "not an image": (lambda path: path.write_text("<html>404</html>"), "found no image format"),
    "truncated": (lambda path: path.write_bytes(whole_jpeg(path)[:1500]), "found a broken or unusual image"),
    "cut in the header": (lambda path: path.write_bytes(whole_jpeg(path)[:20]), "found"),
    "floating point": (float_tiff, "floating-point pixels"),
    "bomb": (bomb, "found an image above"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_photograph_is_told_in_one_line(tmp_path, name):
    make, expected = UNREADABLE[name]
    path = tmp_path / "photo.jpg"
    make(path)
    with pytest.raises(LoupeError) as caught:
        open_image(path)
    assert one_line(caught).startswith(f"{path}: ") and expected in one_line(caught)


def test_an_image_between_pillows_warning_and_its_error_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    Image.fromarray(TOP_LEFT_RED).save(tmp_path / "large.png")  # 600 pixels: Pillow itself would only warn
    with pytest.raises(LoupeError, match="found an image above 400 pixels"):
        open_image(tmp_path / "large.png")


def test_every_real_photograph_is_read_and_holds_its_annotations(real_cub):
    dataset = CUB200(real_cub, "test", classes=[2, 5])
    for i in range(len(dataset)):
        sample = dataset[i]
        width, height = sample.image.size
        x, y, w, h = sample.box.tolist()
        assert sample.image.mode == "RGB" and 0 <= x < x + w <= width + 1 and 0 <= y < y + h <= height + 1
        seen = sample.parts[sample.parts[:, 2] == 1]
        assert (seen[:, 0] <= width).all() and (seen[:, 1] <= height).all()


@pytest.mark.parametrize("kind", ["cub", "folder"])
def test_another_split_of_a_set_is_what_its_constructor_gives_and_reads_nothing(kind, make_cub, tmp_path, monkeypatch):
    if kind == "cub":
        make = partial(CUB200, make_cub(), val_fraction=0.3, seed=5, classes=["003.Bird_3", "001.Bird_1"])
    else:
        for name in ("a", "b"):
            (tmp_path / "own" / name).mkdir(parents=True)
            for k in range(12):
                (tmp_path / "own" / name / f"{k}.png").write_bytes(b"")
        make = partial(PhotoFolder, tmp_path / "own", val_fraction=0.3, seed=5)
    direct = {split: make(split) for split in ("train", "val", "test")}
    monkeypatch.setattr(Path, "read_text", None)
    monkeypatch.setattr(Path, "iterdir", None)
    for split, expected in direct.items():
        found = direct["test"].with_split(split, transform=len)
        assert found.paths == expected.paths and found.class_names == expected.class_names
        assert found.transform is len and expected.transform is None
        for name in ("labels", "image_ids", "parts", "boxes"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    with pytest.raises(LoupeError, match="split: found 'some', expected one of train, val, test, all"):
        direct["train"].with_split("some")
