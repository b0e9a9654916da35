"""Masks and crops that are given the answer lie where it is, after every crop and mirror."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader

from loupe_core import CUB200, LoupeError, LoupeModel, PhotoFolder, Recipe, Trainer, transforms_for
from loupe_core.geometry import EvalTransform, TrainTransform
from loupe_core.look.cut import Cut, Told
from loupe_core.samples import Sample, collate
from loupe_lab.evidence import oracle

MEAN, STD, SIDE = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 96
SHARP = partial(oracle.in_box, soft=0)
TRANSFORMS = {"train": TrainTransform(SIDE, MEAN, STD, scale=(0.3, 1.0)), "test": EvalTransform(SIDE, MEAN, STD)}


def shown(image: torch.Tensor) -> np.ndarray:
    """A transform's tensor -> the picture it shows, `(H, W, 3)` in [0, 1]."""
    return (image[:3].permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)).numpy()


def photograph(box=(60, 45, 70, 50), size=(210, 150), parts=None) -> Sample:
    """A black photograph whose box is white."""
    image = Image.new("RGB", size)
    x, y, w, h = box
    ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill="white")
    return Sample(image, 0, parts, torch.tensor(box, dtype=torch.float32), None, "a.jpg", 1)


# --- masks ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_mask_of_a_box_covers_the_white_cells_and_no_others(name):
    torch.manual_seed(0)
    seen, rng = [], np.random.default_rng(0)
    for _ in range(40):
        w, h = rng.integers(20, 90, 2)
        sample = oracle.Painted(TRANSFORMS[name], SHARP)(
            photograph((int(rng.integers(0, 120)), int(rng.integers(0, 60)), int(w), int(h))))
        white, mask = torch.from_numpy(shown(sample.image)).mean(2), sample.image[3]
        for cells in (12, 24):  # those of a gate
            there, told = (adaptive_avg_pool2d(x[None], cells)[0] for x in (white, mask))
            assert (there - told).abs().max() < 0.15  # resampling blurs an edge over a pixel or two
            sure = (there < 0.01) | (there > 0.99)
            assert torch.equal(told[sure].round(), there[sure].round()) and sure.float().mean() > 0.7
        seen.append((sample.geometry.flipped, sample.geometry.offset != (0, 0), float(mask.mean()) > 0))
    flipped, moved, some = (set(column) for column in zip(*seen))
    assert True in some and True in moved and flipped == ({True, False} if name == "train" else {False})


def test_the_photograph_itself_and_its_augmentation_are_those_without_a_mask():
    sample = photograph()
    for transform in TRANSFORMS.values():
        torch.manual_seed(3)
        plain, geometry = transform(sample.image)
        torch.manual_seed(3)
        told = oracle.Painted(transform, oracle.in_box, 0.3)(sample)
        assert torch.equal(told.image[:3], plain) and told.geometry == geometry
        assert told.label == 0 and told.image_id == 1 and told.path == "a.jpg"


def test_a_soft_edge_falls_outside_of_the_box_only():
    sample = photograph((60, 40, 80, 45))  # side 60: an edge of 6 px
    x, y = np.arange(210) + 0.5, np.arange(150) + 0.5
    found = oracle.in_box(sample, x, y)
    assert (found[40:85, 60:140] == 1).all() and found[62, 140] == pytest.approx(1 - 0.5 / 6)
    assert (np.diff(found[62, 139:150]) <= 0).all() and (found[62, 146:] == 0).all() and (found[:34] == 0).all()


@pytest.mark.parametrize("outside", [0.0, 0.3])
def test_outside_of_the_answer_the_mask_has_the_value_that_was_asked_for(outside):
    mask = oracle.Painted(TRANSFORMS["test"], SHARP, outside)(photograph()).image[3]
    np.testing.assert_allclose(mask.unique(), [outside, 1])


def test_the_mask_of_parts_peaks_on_those_that_are_seen_after_crops_and_mirrors():
    parts = torch.zeros(15, 3)
    parts[2], parts[7] = torch.tensor([80.0, 60.0, 1.0]), torch.tensor([120.0, 80.0, 1.0])
    sample = photograph(parts=parts)
    torch.manual_seed(1)
    for _ in range(20):
        told = oracle.Painted(TRANSFORMS["train"], oracle.on_parts)(sample)
        mask = told.image[3].numpy()
        for x, y in told.geometry.to_input(parts[[2, 7], :2].numpy()):
            if 1 <= x < SIDE - 1 and 1 <= y < SIDE - 1:
                assert mask[int(y), int(x)] > 0.9
        x, y = told.geometry.to_input([0.0, 0.0])  # the hidden ones are noted there
        if 0 <= x < SIDE and 0 <= y < SIDE:
            assert mask[int(y), int(x)] < 0.01
    assert oracle.on_parts(replace(sample, parts=torch.zeros(15, 3)), np.arange(9.0), np.arange(9.0)).max() == 0


def test_the_placebo_is_as_large_as_a_box_and_the_same_for_every_photograph():
    transform = EvalTransform(SIDE, MEAN, STD, crop_pct=1.0)
    one, other = (oracle.Painted(transform, oracle.in_centre, 0.3)(photograph(box, (150, 150))).image[3]
                  for box in ((0, 0, 20, 20), (60, 45, 70, 50)))
    assert torch.equal(one, other) and (one == 1).float().mean() == pytest.approx(0.36, abs=0.03)
    torch.testing.assert_close(one, one.flip(0, 1))


def test_a_photograph_without_the_annotation_is_refused():
    at = np.arange(4.0)
    with pytest.raises(LoupeError, match=r"a.jpg: found no parts, expected a set with the folder parts/"):
        oracle.on_parts(photograph(), at, at)
    with pytest.raises(LoupeError, match=r"a.jpg: found no box, expected a set with bounding_boxes.txt"):
        oracle.in_box(replace(photograph(), box=None), at, at)
    sheared = TrainTransform(SIDE, MEAN, STD, randaugment="rand-m9-mstd0.5")
    with pytest.raises(LoupeError, match="oracle: the transform keeps no geometry"):
        oracle.Painted(sheared, oracle.in_box)(photograph())


# --- in a model and a training --------------------------------------------------------------------------------------

@pytest.fixture
def told_model():
    torch.manual_seed(0)
    return oracle.tell(LoupeModel("swin_micro", num_classes=3, pretrained=False, img_size=64))


def test_the_gate_multiplies_by_the_mask_of_each_image(told_model, make_cub):
    data = CUB200(make_cub(classes=3, per_class=4), "train", val_fraction=0)
    transform = transforms_for(told_model.data_config, train=True, scale=(0.6, 1.0))
    batch = next(iter(DataLoader(Told(data, oracle.Painted(transform, oracle.in_box, 0.3)), batch_size=6,
                                 collate_fn=collate)))
    before, after = [], []
    gate = told_model.gates["stage2"]
    gate.register_forward_hook(lambda module, inputs, out: before.append(inputs[0]) or after.append(out[0]))
    with torch.no_grad():
        _, mask = told_model.eval()(batch["image"], return_mask=True)
    h, w = mask.shape[2:]
    cells = batch["image"][:, 3:].unflatten(2, (h, 64 // h)).unflatten(4, (w, 64 // w)).mean((3, 5))
    torch.testing.assert_close(mask, cells)
    torch.testing.assert_close(after[0], before[0] * mask)
    assert mask.std((1, 2, 3)).min() > 0.05 and (mask[0] - mask[1]).abs().max() > 0.05
    assert told_model.gate_parameters() == 0


def test_images_without_a_mask_are_refused(told_model):
    with pytest.raises(LoupeError, match="oracle: found images of 3 channels, expected 4: those of the photograph and"):
        told_model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("how", ["mask", "crop"])
def test_a_trainer_takes_such_a_set_and_gives_the_probe_the_plain_images(how, told_model, make_cub):
    model = told_model if how == "mask" else LoupeModel("swin_micro", 3, pretrained=False, site=(), img_size=64)
    made = Cut if how == "crop" else partial(oracle.Painted, region=oracle.in_box)
    plain = transforms_for(model.data_config, train=False)
    train = CUB200(make_cub(classes=3, per_class=8), "train", val_fraction=0.5)
    val = Told(train.with_split("val"), made(plain))
    train = Told(train, made(transforms_for(model.data_config, train=True)))
    asked = []
    recipe = Recipe.finetune(epochs=1, batch_size=4, layer_decay=1.0)
    trainer = Trainer(model, recipe, progress=False)
    loader = trainer.loader
    trainer.loader = lambda data, **options: (asked.append(data.transform.transform), loader(data, **options))[1]
    history = trainer.fit(train, val)
    assert len(history) == 1 and trainer.start["val_accuracy"] >= 0 and np.isfinite(history[0]["loss"])
    assert sum(transform is plain for transform in asked) == 3  # the probe's two, and validation
    assert isinstance(train.transform.transform, TrainTransform) and train.identities() == train.dataset.identities()
    assert len(trainer.evaluate(val).labels) == len(val) == len(val.labels)


# --- crops ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("box", [(60, 45, 70, 50), (0, 0, 30, 80), (150, 100, 60, 50), (5, 5, 200, 140)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_crop_shows_the_box_and_its_geometry_says_where(box, name):
    torch.manual_seed(0)
    sample = photograph(box)
    for _ in range(10):
        cut = Cut(TRANSFORMS[name])(sample)
        assert cut.geometry.original_size == (150, 210) and torch.equal(cut.box, sample.box)
        x, y = ((np.arange(SIDE) + 0.5)[:, None] * (1, 0), (np.arange(SIDE) + 0.5)[:, None] * (0, 1))
        x, y = cut.geometry.to_original(x)[:, 0], cut.geometry.to_original(y)[:, 1]
        expected = SHARP(sample, x, y)
        white = shown(cut.image).mean(2)
        far = np.abs(np.stack(np.gradient(expected))).max(0) == 0  # no edge beside it
        assert np.abs(white - expected)[far].max() < 0.25 and far.mean() > 0.7
        assert np.abs(white - expected)[far].mean() < 0.02
        assert name == "train" or expected.mean() > 0.2  # of the whole photograph, the least box is 0.08
        x0, y0, x1, y1 = cut.geometry.visible_box()
        assert 0 <= x0 < x1 <= 210 and 0 <= y0 < y1 <= 150


def test_a_crop_keeps_the_whole_box_in_the_test_and_the_photographs_proportions():
    sample = photograph((60, 45, 70, 30), size=(400, 300))
    cut = Cut(EvalTransform(SIDE, MEAN, STD))(sample)  # whose crop keeps 0.875
    x0, y0, x1, y1 = cut.geometry.visible_box()
    assert x0 <= 60 and x1 >= 130 and y0 <= 45 and y1 >= 75
    assert cut.geometry.scale[0] == pytest.approx(cut.geometry.scale[1], rel=0.03)


# --- wings ----------------------------------------------------------------------------------------------------------

def pinned(ground=(150, 220, 60)) -> tuple[Image.Image, np.ndarray]:
    """A drawn specimen: two wings with light bands, lines, a label, a colour chart, and a ruler and a ball at the
    border; and where its wings are."""
    image, wings = Image.new("RGB", (224, 224), ground), Image.new("1", (224, 224))
    draw, truth = ImageDraw.Draw(image), ImageDraw.Draw(wings)
    draw.line((112, 0, 112, 223), fill=(60, 60, 60))
    draw.rectangle((0, 205, 120, 223), fill=(40, 40, 40))
    draw.ellipse((190, 180, 240, 240), fill=(20, 20, 20))
    draw.rectangle((150, 120, 185, 150), fill=(30, 30, 30))
    draw.rectangle((20, 170, 60, 180), fill=(250, 250, 250))
    for box in ((20, 20, 100, 70), (30, 90, 90, 140)):
        draw.ellipse(box, fill=(40, 30, 30))
        truth.ellipse(box, fill=1)
    draw.line((70, 24, 80, 64), fill=(240, 240, 200), width=6)  # open to the edge
    return image, np.asarray(wings)


@pytest.mark.parametrize("ground", [(150, 220, 60), (185, 185, 190), (245, 235, 245)])
def test_wings_are_found_by_threshold_and_ruler_ball_and_chart_are_not(ground):
    image, truth = pinned(ground)
    found = oracle.wings(np.asarray(image))
    assert (found & truth).sum() / (found | truth).sum() > 0.9
    sample = Sample(image, 0, None, None, None, "b.jpg", 1)
    x, y, w, h = oracle.wings_box(sample)
    assert abs(x - 20) < 4 and abs(y - 20) < 4 and abs(x + w - 100) < 4 and abs(y + h - 140) < 4
    told = oracle.Painted(EvalTransform(SIDE, MEAN, STD, crop_pct=1.0), oracle.on_wings)(sample)
    there = adaptive_avg_pool2d(torch.from_numpy(truth.astype(np.float32))[None], SIDE)
    assert (told.image[3] - there).abs().mean() < 0.02


def test_the_wings_of_genuine_specimens_are_darker_than_their_backdrop_and_of_a_wings_size():
    root = os.environ.get("LOUPE_PHOTOGRAPHS")
    if not root or not (Path(root) / "heliconius").is_dir():
        pytest.skip("LOUPE_PHOTOGRAPHS is not set to a folder that holds heliconius")
    data = PhotoFolder(Path(root) / "heliconius", "test")
    pictures = [np.asarray(data.image(i)) for i in range(0, len(data), 20)]
    found = [oracle.wings(pixels) for pixels in pictures]
    assert all(pixels[wings].mean() < pixels[~wings].mean() for pixels, wings in zip(pictures, found))
    shares = [wings.mean() for wings in found]
    assert 0.03 < min(shares) and max(shares) < 0.6 and 0.1 < np.median(shares) < 0.3


def test_a_picture_without_wings_is_left_whole():
    sample = Sample(Image.new("RGB", (224, 200), "grey"), 0, None, None, None, "b.jpg", 1)
    assert oracle.wings_box(sample) == (0, 0, 224, 200)
    assert oracle.on_wings(sample, np.arange(4.0), np.arange(4.0)).max() == 0
