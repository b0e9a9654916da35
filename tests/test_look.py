"""The second look: boxes where a map is high, parts of the photograph itself, and both looks through one model."""

import argparse
import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import write_cub
from PIL import Image

from loupe_core import CUB200, LoupeError, LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.cli import main
from loupe_core.files.images import open_image
from loupe_core.geometry import EvalTransform, Geometry, TrainTransform
from loupe_core.look.boxes import FILE, Rule, boxes_of, shown
from loupe_core.look.command import add_magnify, rule_of, two_looks
from loupe_core.look.cut import Box, around, cut_to
from loupe_core.look.magnifier import Magnifier, combine, fit_weight
from loupe_core.look.sources import SOURCES, source_names, source_of
from loupe_core.look.training import Magnified, covered
from loupe_core.samples import Sample
from loupe_lab.birds.fieldguide import species_of, write_fieldguide
from loupe_lab.evidence.explain import explain

PLAIN = Geometry((120, 200), (96, 96), (96 / 120, 96 / 120), (0.0, 32.0))  # 200 x 120 px: the middle 120 x 120 is seen


def noise(width: int = 200, height: int = 120, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def hill(rows: slice, columns: slice, cells: int = 12, high: float = 1.0) -> np.ndarray:
    map_ = np.random.default_rng(0).random((cells, cells)) * 0.01
    map_[rows, columns] += high
    return map_


@pytest.fixture(scope="module")
def model() -> LoupeModel:
    torch.manual_seed(0)
    return LoupeModel("swin_micro", 4, pretrained=False)


# --- boxes

def test_a_box_is_where_the_map_is_high_in_pixels_of_the_photograph():
    map_ = hill(slice(3, 6), slice(6, 10))  # 12 of 144 cells, each 8 px of the input and 10 px of the photograph
    box, = boxes_of(map_, PLAIN, Rule(share=12 / 144))
    assert box == pytest.approx((40 + 60, 30, 40, 30))
    mirrored, = boxes_of(map_[:, ::-1], replace(PLAIN, flipped=True), Rule(share=12 / 144))
    assert mirrored == pytest.approx(box)


def test_pieces_come_in_the_order_of_what_they_hold_and_no_more_than_asked_for():
    map_ = hill(slice(0, 3), slice(0, 3)) + hill(slice(8, 12), slice(8, 12))
    rule = Rule(share=25 / 144)
    assert [len(boxes_of(map_, PLAIN, replace(rule, boxes=n))) for n in (1, 2, 3)] == [1, 2, 2]
    first, second = boxes_of(map_, PLAIN, replace(rule, boxes=2))
    assert (first.width, second.width) == pytest.approx((40, 30)) and first.y > second.y


@pytest.mark.parametrize("map_", [np.zeros((7, 7)), np.full((7, 7), 0.3), np.full((1, 1), 1.0)])
def test_a_map_that_says_nothing_gives_all_that_was_seen(map_):
    box, = boxes_of(map_, PLAIN, Rule())
    assert box == pytest.approx((40, 0, 120, 120))


def test_what_differs_by_rounding_alone_says_nothing():
    map_ = np.full((7, 7), 0.5, np.float32)
    map_[2, 3] = np.nextafter(map_[2, 3], np.float32(1))
    assert boxes_of(map_, PLAIN, Rule()) == boxes_of(np.zeros((7, 7)), PLAIN, Rule())
    map_[2, 3] = 0.501
    assert boxes_of(map_, PLAIN, Rule()) != boxes_of(np.zeros((7, 7)), PLAIN, Rule())


@pytest.mark.parametrize("map_", [np.zeros((2, 3, 3)), np.zeros((0, 3)), np.full((3, 3), np.nan)])
def test_a_map_that_cannot_be_one_is_refused(map_):
    with pytest.raises(LoupeError, match="second look: found a map of shape"):
        boxes_of(map_, PLAIN, Rule())


def test_a_part_keeps_the_aspect_and_the_least_size_and_stays_inside():
    rng = np.random.default_rng(0)
    for _ in range(200):
        W, H = (int(side) for side in rng.integers(1, 400, 2))
        box = Box(*rng.uniform(-20, 400, 2), *rng.uniform(0, 300, 2))
        part = around(box, (W, H), 0.1, aspect := rng.choice([1.0, 2.0, 0.5]), smallest := 0.3 * min(W, H))
        assert 0 <= part.x and 0 <= part.y and part.x + part.width <= W and part.y + part.height <= H
        assert min(part.width, part.height) >= 1 and all(isinstance(side, int) for side in part)
        if part.width < W and part.height < H:
            assert part.width / part.height == pytest.approx(aspect, abs=2 / part.height)
            assert part.height >= smallest - 1


def test_controls_have_the_size_of_the_box_that_was_found():
    geometry, box = Geometry((300, 500), (96, 96), (1, 1), (0, 0)), Box(20, 30, 60, 40)
    found, centre, one, again, other = (shown(box, geometry, Rule(place=place, seed=seed), 7) for place, seed in (
        ("found", 0), ("centre", 0), ("random", 0), ("random", 0), ("random", 1)))
    assert len({part[2:] for part in (found, centre, one, other)}) == 1 and one == again != other
    assert (centre.x + centre.width / 2, centre.y + centre.height / 2) == pytest.approx((250, 150), abs=1)
    assert shown(box, geometry, Rule(place="random"), 8) != one


@pytest.mark.parametrize("wrong", [dict(share=0), dict(share=float("nan")), dict(share=1.1), dict(smallest=-1),
                                   dict(place="left"), dict(combine="most"), dict(boxes=0), dict(pixels=0),
                                   dict(weight=2), dict(margin=-0.1), dict(share="much"), dict(boxes=1.5),
                                   dict(boxes=None), dict(seed=-1), dict(source=3), dict(source=None), dict(site=[])])
def test_a_rule_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(LoupeError, match=f"second look: {next(iter(wrong))}=.*; expected"):
        Rule(**wrong)


def test_a_rule_is_kept_beside_a_model(tmp_path):
    rule = Rule(source="norm", site="stage3", share=0.1, boxes=2)
    assert Rule.read(tmp_path) is None
    rule.write(tmp_path)
    assert Rule.read(tmp_path) == rule
    for text in ('{"shares": 1}', "[]", "{", '{"share": "much"}', '{"share": 7}', '{"boxes": null}', '{"source": []}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(LoupeError, match="second look|found no rule of a second look"):
            Rule.read(tmp_path)


# --- two looks

def test_the_second_look_is_at_the_photographs_own_pixels(model):
    """A part of a large photograph: shrunk to the first look's input and enlarged again, the noise would be gone."""
    photograph = noise(900, 900)
    magnifier = Magnifier(model, Rule(source="box", margin=0, smallest=0))
    seen = []
    magnifier.closer = lambda image: (seen.append(image), EvalTransform(112, (0.5,) * 3, (0.5,) * 3)(image))[1]
    sample = Sample(photograph, 0, None, torch.tensor([300.0, 400.0, 100.0, 100.0]), None, "", 0)
    magnifier.look([sample])
    assert np.array_equal(np.asarray(seen[0]), np.asarray(photograph)[400:500, 300:400])


def test_both_looks_are_what_the_model_says_to_the_two_inputs(model):
    photographs = [noise(200, 120, 1), noise(80, 300, 2)]
    for name in ("mask", "norm", "centre"):
        magnifier = Magnifier(model, Rule(source=name))
        looks = magnifier.look(photographs)
        transform = transforms_for(model.data_config, train=False)
        with torch.no_grad():
            first = model.eval()(torch.stack([transform(image)[0] for image in photographs]))
            second = model(torch.stack([cut_to(image, of[0], transform)[0] for image, of in zip(photographs,
                                                                                             looks.boxes)]))
        assert torch.allclose(looks.first, first) and torch.allclose(looks.second, second, atol=1e-5)
        assert torch.allclose(looks.logits, (first + second) / 2, atol=1e-5)
        logits, boxes = magnifier(photographs, return_boxes=True)
        assert torch.equal(logits, looks.logits) and boxes == looks.boxes


def test_the_box_follows_the_map(model, monkeypatch):
    def corner(model, images, site=None):
        map_ = torch.zeros(len(images), 14, 14)
        map_[:, :4, :4] = 1
        return map_

    monkeypatch.setitem(SOURCES, "corner", corner)
    (part,), = Magnifier(model, Rule(source="corner", share=0.08)).look([noise(300, 300)]).boxes
    assert part.x < 20 and part.y < 20 and part.width < 150


def test_an_installed_package_offers_sources_by_entry_points(model):
    assert {"mask", "norm", "grad_cam", "mask_and_norm", "saliency"} <= set(source_names())
    assert source_of("mask_low").__module__ == "loupe_lab.evidence.where"
    with pytest.raises(LoupeError, match="source 'moon' is unknown; expected one of mask, norm, .*grad_cam"):
        source_of("moon")


@pytest.mark.parametrize("photograph", [noise(1, 1), noise(5, 3), noise(3, 90), noise(2000, 30),
                                        noise(60, 60).convert("L"), noise(3000, 2000)])
def test_photographs_of_all_kinds_are_looked_at_twice(model, photograph):
    for rule in (Rule(), Rule(boxes=3, smallest=0), Rule(place="random")):
        looks = Magnifier(model, rule).look([photograph])
        assert looks.logits.isfinite().all() and 1 <= len(looks.boxes[0]) <= rule.boxes
        for box in looks.boxes[0]:
            assert box.x + box.width <= photograph.width and box.y + box.height <= photograph.height


def test_a_recorded_box_of_one_pixel_or_outside_of_the_photograph_is_looked_at(model):
    for box in ((30.0, 40.0, 1.0, 1.0), (500.0, 500.0, 10.0, 10.0), (-50.0, 0.0, 0.0, 0.0)):
        sample = Sample(noise(), 0, None, torch.tensor(box), None, "", 0)
        (part,), = Magnifier(model, Rule(source="box")).look([sample]).boxes
        assert part.width == part.height == 36  # the least: 0.3 of 120
    with pytest.raises(LoupeError, match="a photograph by itself: found no box"):
        Magnifier(model, Rule(source="box")).look([noise()])


def test_a_smaller_second_look():
    torch.manual_seed(0)
    model, seen = LoupeModel("resnet18", 3, pretrained=False), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    Magnifier(model, Rule(pixels=96)).look([noise(), noise()])
    assert seen == [(2, 3, 224, 224), (2, 3, 96, 96)]


def test_what_cannot_be_looked_at_is_said(model, make_cub):
    with pytest.raises(LoupeError, match="source 'eye' is unknown; expected one of mask, norm"):
        Magnifier(model, Rule(source="eye"))
    bare = LoupeModel("swin_micro", 4, pretrained=False, site=())
    with pytest.raises(LoupeError, match="found no gate"):
        Magnifier(bare)
    assert Magnifier(bare, Rule(source="norm"))([noise()]).shape == (1, 4)
    three = LoupeModel("swin_micro", 4, pretrained=False, site=("stage1", "stage2"))
    with pytest.raises(LoupeError, match="expected site= one of stage1, stage2"):
        Magnifier(three)
    assert Magnifier(three, Rule(site="stage1"))([noise()]).shape == (1, 4)
    with pytest.raises(LoupeError, match="item 0 holds no photograph, but Tensor"):
        Magnifier(model)([torch.zeros(3, 112, 112)])
    with pytest.raises(LoupeError, match="found a data set TensorDataset"):
        Magnifier(model).evaluate(torch.utils.data.TensorDataset(torch.zeros(2, 3, 9, 9)))


def test_sizes_that_the_backbone_does_not_take_are_refused_at_once():
    vit = LoupeModel("swin_micro", 3, pretrained=False)
    with pytest.raises(LoupeError, match="does not run on an image of 96 x 96 pixels"):
        Magnifier(vit, Rule(pixels=96))
    wide = LoupeModel("resnet18", 3, pretrained=False, img_size=(64, 128))
    assert Magnifier(wide, Rule(pixels=32)).closer.input_size == (32, 64)


def test_no_photograph_is_refused_in_one_line(model):
    with pytest.raises(LoupeError, match="found no photograph"):
        Magnifier(model)([])


def test_a_map_whose_last_cells_reach_beyond_the_input_is_cut_where_the_input_ends():
    """Swin at 112 px has 4 x 4 cells of 32 px in its last stage, which reach 16 px beyond it."""
    torch.manual_seed(0)
    model = LoupeModel("swin_micro", 3, pretrained=False, site="stage4").eval()
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        mask, norm = SOURCES["mask"](model, x), SOURCES["norm"](model, x)
    assert mask.shape == norm.shape == (2, 7, 7) and torch.allclose(mask, explain(model, x, "mask"))
    geometry = transforms_for(model.data_config, train=False)(noise(112, 112))[1]
    looks = Magnifier(model).look([noise(112, 112)])
    x = transforms_for(model.data_config, train=False)(noise(112, 112))[0]
    box, = boxes_of(explain(model, x[None], "mask")[0].numpy(), geometry, Rule())
    assert looks.boxes[0] == [shown(box, geometry, Rule())]


def test_random_places_of_a_set_are_those_of_the_rules_seed(model, make_cub):
    data = CUB200(make_cub(), "test")

    def boxes(seed: int) -> list:
        return Magnifier(model, Rule(source="random", seed=seed)).evaluate(data, 4, progress=False).boxes

    before = torch.get_rng_state()
    assert boxes(1) == boxes(1) != boxes(2) and torch.equal(before, torch.get_rng_state())


def test_looking_leaves_the_model_as_it_was(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Magnifier(model).look([noise()])
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_set_is_evaluated_whatever_its_transform(model, make_cub):
    data = CUB200(make_cub(), "test", transform=transforms_for(model.data_config, train=False))
    looks = Magnifier(model, Rule(source="box")).evaluate(data, batch_size=4, progress=False)
    assert len(looks.boxes) == len(data) == len(looks.logits) and (looks.labels == data.labels).all()
    assert (looks.image_ids == data.image_ids).all() and data.transform is not None
    alone = Magnifier(model, Rule(source="box")).look([replace(data[3], image=data.image(3))])
    assert torch.allclose(looks.logits[3], alone.logits[0], atol=1e-4) and looks.boxes[3] == alone.boxes[0]


def test_logits_are_combined_as_the_rule_says():
    first, second = torch.tensor([[4.0, 0.0], [0.1, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert torch.equal(combine(first, second, Rule(weight=0)), first)
    assert torch.equal(combine(first, second, Rule(weight=1)), second)
    sure = combine(first, second, Rule(combine="confidence"))
    assert (sure.argmax(1) == torch.tensor([0, 1])).all()
    a, b = 4 * torch.randn(200, 5), torch.randn(200, 5)
    labels = a.argmax(1).numpy()
    assert fit_weight(a, b, labels) < 0.2 < 0.8 < fit_weight(b, a, labels)


# --- training

def test_photographs_are_shown_whole_cut_and_covered_as_often_as_asked_for(model, make_cub):
    data = CUB200(make_cub(size=(60, 80)), "train", transform=lambda image: (np.asarray(image), None))
    data.transform.mean = [0.5, 0.5, 0.5]
    shown_, chosen = Magnified(data, model, Rule(source="box", smallest=0, margin=0), 0.5, 0.25, progress=False), []
    torch.manual_seed(0)
    assert all(np.array_equal(shown_[i].image, np.asarray(data.image(i))) for i in range(4)), "first epoch: whole"
    shown_.begin_epoch(0)
    assert all(np.array_equal(shown_[i].image, np.asarray(data.image(i))) for i in range(4))
    shown_.begin_epoch(1)
    for i in range(400):
        pixels, whole = shown_[i % len(shown_)].image, np.asarray(data.image(i % len(shown_)))
        chosen.append("cut" if pixels.shape != whole.shape else "whole" if np.array_equal(pixels, whole) else "covered")
    share = {name: chosen.count(name) / 400 for name in ("cut", "covered", "whole")}
    assert share == pytest.approx(dict(cut=0.5, covered=0.25, whole=0.25), abs=0.08)
    assert shown_.identities() == data.identities() and (shown_.labels == data.labels).all()


def test_a_covered_box_has_the_mean_colour_and_the_rest_stays():
    image = noise(40, 30)
    pixels, before = np.asarray(covered(image, Box(5, 6, 10, 8), [0.5, 0.25, 1.0])), np.asarray(image)
    assert (pixels[6:14, 5:15] == (128, 64, 255)).all()
    outside = np.ones(pixels.shape[:2], bool)
    outside[6:14, 5:15] = False
    assert (pixels[outside] == before[outside]).all()


def training(data, val, out, epochs, resume=False, stop=None):
    torch.manual_seed(0)
    model = LoupeModel("swin_micro", 3, pretrained=False)
    data.transform = TrainTransform(112, model.mean, model.std)
    trainer = Trainer(model, Recipe.small(epochs=epochs, batch_size=8, precision="no"), out, progress=False)
    seen = Magnified(data, model, Rule(), 0.5, 0.2, progress=False)
    trainer.fit(seen, val, resume=resume, on_epoch_end=stop and (lambda row: row["epoch"] == stop))
    return model, seen


def test_a_training_goes_on_with_the_boxes_that_it_would_have_had(make_cub, tmp_path):
    root = make_cub(size=(60, 80))
    data = CUB200(root, "train")
    val = data.with_split("val", EvalTransform(112, (0.5,) * 3, (0.5,) * 3))
    whole, boxes = training(data, val, tmp_path / "a", 3)
    training(data, val, tmp_path / "b", 3, stop=2)
    resumed, again = training(data, val, tmp_path / "b", 3, resume=True)
    assert boxes.found["boxes"] == again.found["boxes"] is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_a_training_goes_on_only_as_it_was_begun(make_cub, tmp_path):
    data = CUB200(make_cub(size=(60, 80)), "train")
    val = data.with_split("val", EvalTransform(112, (0.5,) * 3, (0.5,) * 3))
    training(data, val, tmp_path / "a", 2, stop=1)
    torch.manual_seed(0)
    model = LoupeModel("swin_micro", 3, pretrained=False)
    trainer = Trainer(model, Recipe.small(epochs=2, batch_size=8, precision="no"), tmp_path / "a", progress=False)
    with pytest.raises(LoupeError, match="was begun with a second look, this one has no second look; expected"):
        trainer.fit(data, val, resume=True)
    with pytest.raises(LoupeError, match="begun with a second look, share 0.2, this one has a second look, share 0.4"):
        trainer.fit(Magnified(data, model, Rule(share=0.4), 0.5, 0.2, progress=False), val, resume=True)


def test_recorded_boxes_that_are_not_there_are_missed_before_the_first_epoch(model, make_cub):
    root = make_cub()
    (root / "bounding_boxes.txt").unlink()
    shutil.rmtree(root / "parts")
    data = CUB200(root, "train", transform=TrainTransform(112, model.mean, model.std))
    with pytest.raises(LoupeError, match="found no box"):
        Magnified(data, model, Rule(source="box"))


def test_wrong_probabilities_are_refused(model, make_cub):
    data = CUB200(make_cub(), "train", transform=TrainTransform(112, model.mean, model.std))
    for crop, drop in ((0.7, 0.4), (-0.1, 0.2), (float("nan"), 0)):
        with pytest.raises(LoupeError, match="second look: crop=.*; expected probabilities"):
            Magnified(data, model, crop=crop, drop=drop)


# --- the commands

def test_evaluate_takes_its_first_look_as_its_first_line_does(model, make_cub, monkeypatch):
    """With --whole: at the whole photograph, in borders."""
    whole = transforms_for(model.data_config, train=False, crop_mode="border", crop_pct=1.0)
    data, seen = CUB200(make_cub(size=(60, 100)), "test", transform=whole), []
    looked = Magnifier.evaluate
    monkeypatch.setattr(Magnifier, "evaluate", lambda *a: seen.append(looked(*a)) or seen[0])
    two_looks(model, data, Rule(), "test")
    with torch.no_grad():
        first = model.eval()(torch.stack([data[i].image for i in range(len(data))]))
    assert torch.allclose(seen[0].first, first, atol=1e-4)


def test_train_evaluate_explain_with_a_second_look(tmp_path, capsys):
    birds = write_fieldguide(tmp_path / "birds", species_of(1), train=6, test=2, size=160)
    out = tmp_path / "run"
    assert main(["train", str(birds), "--out", str(out), "--recipe", "small", "--epochs", "2", "--batch-size", "8",
                 "--precision", "no", "--magnify", "--share", "0.3"]) == 0
    assert Rule.read(out / "best") == Rule(share=0.3)
    card = out / "best" / "README.md"
    assert "## A second look\n\nIn training a photograph was shown whole; or, 40% of the time, cut" in card.read_text()
    assert "the highest 30% of the cells of a map (mask)" in card.read_text()
    capsys.readouterr()
    for _ in range(2):  # the second time takes the place of the first
        assert main(["evaluate", str(birds), "--checkpoint", str(out), "--magnify", "--card"]) == 0
    said = capsys.readouterr().out
    line = re.search(r"with a second look by mask, share 0.3: test accuracy [01]\.\d{4} \(\d+ of 8.*", said)[0]
    assert card.read_text().count(f"\n- {line}\n") == 1 == card.read_text().count("\n- test accuracy")
    assert "2.0 passes per photograph" in said
    assert main(["evaluate", str(birds), "--checkpoint", str(out)]) == 0
    assert "second look" not in capsys.readouterr().out
    assert main(["evaluate", str(birds), "--checkpoint", str(out), "--magnify", "--whole", "--closer", "56"]) == 2
    assert "does not run on an image of 56 x 56" in capsys.readouterr().err
    photograph = next((birds / "images").rglob("*.*g"))
    for source in ("norm", "grad_cam", "rollout"):
        assert main(["explain", str(photograph), "--checkpoint", str(out), "--magnify", source, "--boxes", "2",
                     "--out", str(tmp_path / "two.png")]) == 0
        said = capsys.readouterr().out
        assert re.search(rf"second look: \d+ x \d+ px from \(\d+, \d+\) on, by {source}", said)
        assert "both looks:" in said
        with Image.open(tmp_path / "two.png") as picture:
            assert picture.width > 160 * 1.5
    table = tmp_path / "table.csv"
    assert main(["predict", str(birds / "images"), "--checkpoint", str(out), "--magnify", "--boxes", "2", "--out",
                 str(table)]) == 0
    rows, model = list(csv.DictReader(table.open())), LoupeModel.from_pretrained(out / "best")
    photographs = [open_image(birds / "images" / row["file"]) for row in rows]
    looks = Magnifier(model, Rule(share=0.3, boxes=2)).look(photographs)
    for row, boxes, p in zip(rows, looks.boxes, looks.logits.softmax(1)):
        assert [int(row[f"part_{name}"]) for name in Box._fields] == list(boxes[0])
        assert row["class_1"] == model.class_names[p.argmax()] and abs(float(row["probability_1"]) - p.max()) < 1e-3
    assert main(["predict", str(photograph), "--checkpoint", str(out), "--out", str(table)]) == 0
    assert "part_x" not in table.read_text()
    onnx = tmp_path / "birds.onnx"
    assert main(["export", "--checkpoint", str(out), "--out", str(onnx), "--magnify", "--boxes", "2"]) == 0
    told = onnxruntime.InferenceSession(onnx).get_modelmeta().custom_metadata_map
    assert Rule(**json.loads(told["magnify"])) == Rule(share=0.3, boxes=2)  # the training's share
    assert main(["export", "--checkpoint", str(out), "--out", str(onnx), "--magnify", "norm"]) == 2
    assert "a second look by norm needs more than the exported graph gives" in capsys.readouterr().err
    assert main(["evaluate", str(birds), "--checkpoint", str(out), "--share", "0.1"]) == 2
    assert "--share: expected it together with --magnify" in capsys.readouterr().err


def test_options_change_the_kept_rule_one_by_one(tmp_path):
    p = argparse.ArgumentParser()
    add_magnify(p, "look twice")
    Rule(source="norm", site="stage3", share=0.4).write(tmp_path)
    for words, expected in (([], None), (["--magnify"], Rule(source="norm", site="stage3", share=0.4)),
                            (["--magnify", "norm", "--boxes", "2"], Rule("norm", "stage3", 0.4, 2)),
                            (["--magnify", "mask"], Rule(share=0.4)),  # the site was of another source
                            (["--magnify", "mask", "--magnify-site", "stage2", "--closer", "64"],
                             Rule(share=0.4, site="stage2", pixels=64))):
        assert rule_of(p.parse_args(words), tmp_path) == expected
    assert rule_of(p.parse_args(["--magnify"])) == rule_of(p.parse_args(["--magnify"]), tmp_path / "none") == Rule()
    for option in ("--magnify-site", "--closer", "--boxes"):
        with pytest.raises(LoupeError, match=f"{option}: expected it together with --magnify"):
            rule_of(p.parse_args([option, "1"]), tmp_path)


def test_a_model_with_several_gates_is_told_which(tmp_path, capsys):
    three = LoupeModel("swin_micro", 4, pretrained=False, site=("stage1", "stage2"))
    three.save_pretrained(tmp_path / "three")
    noise(60, 60).save(tmp_path / "n.png")
    explain_ = ["explain", str(tmp_path / "n.png"), "--checkpoint", str(tmp_path / "three"), "--out",
                str(tmp_path / "o.png"), "--site", "stage1", "--magnify"]
    assert main(explain_) == 2 and "expected site= one of stage1, stage2" in capsys.readouterr().err
    assert main([*explain_, "--magnify-site", "stage2"]) == 0


def test_a_set_without_boxes_says_so(tmp_path, capsys):
    write_cub(tmp_path / "cub", size=(60, 60))
    (tmp_path / "cub" / "bounding_boxes.txt").unlink()
    shutil.rmtree(tmp_path / "cub" / "parts")
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "cub"), "--out", str(run), "--recipe", "small", "--epochs", "1",
                 "--backbone", "swin_micro", "--precision", "no"]) == 0
    assert main(["evaluate", str(tmp_path / "cub"), "--checkpoint", str(run), "--magnify", "box"]) == 2
    assert "found no box, expected a set with bounding_boxes.txt" in capsys.readouterr().err
