"""Drawn birds: reproducible, correctly labelled, and no easier than they should be."""

import itertools
import json
import sys

import numpy as np
import pytest
from PIL import Image

from loupe_core import CUB200, LoupeError
from loupe_lab.birds.fieldguide import (
    ATTRIBUTES,
    PART_OF,
    SPECIES,
    draw,
    fieldguide_set,
    species_of,
    write_fieldguide,
)
from loupe_lab.birds.painter import LAYERS, PAINT, PARTS, Bird


def test_there_are_at_least_forty_species_and_no_two_alike():
    assert len(SPECIES) >= 40
    assert len({tuple(s.attributes.items()) for s in SPECIES}) == len(SPECIES) == len({s.name for s in SPECIES})


def test_members_of_a_group_differ_in_exactly_the_recorded_attribute():
    for _, members in itertools.groupby(SPECIES, key=lambda s: s.group):
        for a, b in itertools.combinations(members, 2):
            assert [k for k in ATTRIBUTES if a.attributes[k] != b.attributes[k]] == [a.differs_in] == [b.differs_in]


def test_species_of_different_groups_differ_in_two_attributes_or_more():
    for a, b in itertools.combinations(SPECIES, 2):
        if a.group != b.group:
            assert sum(a.attributes[k] != b.attributes[k] for k in ATTRIBUTES) >= 2


def test_the_groups_ask_for_crown_bill_wing_and_breast_among_others():
    assert {"crown", "bill", "wing", "breast"} <= {s.differs_in for s in species_of(5)}
    assert set(PART_OF.values()) - {"wing", "eye"} <= set(PARTS)


@pytest.mark.parametrize("size", [112, 224])
def test_parts_lie_on_the_bird_and_the_box_holds_it(size):
    for k in range(12):
        bird = draw(SPECIES[4 * k % 48].attributes, k, size, twigs=False)
        assert bird.image.shape == (size, size, 3) and bird.image.dtype == np.uint8
        ys, xs = np.nonzero(bird.segmentation)
        x, y, w, h = bird.box
        assert x - 1 <= xs.min() and xs.max() <= x + w + 1 and y - 1 <= ys.min() and ys.max() <= y + h + 1
        for name, (px, py, visible) in zip(PARTS, bird.parts):
            near = bird.segmentation[max(int(py) - 2, 0):int(py) + 3, max(int(px) - 2, 0):int(px) + 3]
            assert not visible or near.any(), f"{name} of bird {k} is off the bird"


def test_one_eye_and_one_wing_are_hidden_as_in_a_side_view():
    bird = draw(SPECIES[0].attributes, 0, twigs=False)
    seen = dict(zip(PARTS, bird.parts[:, 2]))
    assert seen["left eye"] + seen["right eye"] == 1 and seen["left wing"] + seen["right wing"] == 1


def test_the_box_covers_the_asked_share_of_the_frame():
    shares = [np.prod(draw(SPECIES[k % 48].attributes, k).box[2:]) / 112**2 for k in range(60)]
    assert 0.14 <= min(shares) and max(shares) <= 0.61 and np.ptp(shares) > 0.25


def test_the_crown_has_the_colour_that_the_attribute_says():
    """The mean colour round the crown's point is nearest to its own paint among the six, whatever the light."""
    names, right = ATTRIBUTES["crown"], 0
    paints = np.array([PAINT[name] for name in names], float)
    for k in range(60):
        attributes = SPECIES[0].attributes | {"crown": names[k % 6]}
        bird = draw(attributes, k, 224, twigs=False, area=(0.4, 0.6))
        x, y = bird.parts[PARTS.index("crown"), :2].astype(int)
        colour = bird.image[y - 2:y + 3, x - 2:x + 3].mean((0, 1))
        right += int(np.linalg.norm(paints - colour, axis=1).argmin() == k % 6)
    assert right >= 54


def test_the_same_bird_can_stand_before_another_background():
    a = draw(SPECIES[9].attributes, 4, scene_seed=1, twigs=False)
    b = draw(SPECIES[9].attributes, 4, scene_seed=2, twigs=False)
    np.testing.assert_array_equal(a.segmentation, b.segmentation)
    np.testing.assert_array_equal(a.parts, b.parts)
    off = ~a.segmentation
    assert np.abs(a.image[off].astype(int) - b.image[off]).mean() > 10


def test_a_layer_of_a_bird_depends_on_its_attributes_alone():
    def layers(attributes):
        bird = Bird(attributes, np.random.default_rng(3))
        return {name: [(kind, np.asarray(points).tolist(), *rest) for kind, points, *rest in shapes]
                for name, shapes in bird.layers.items()}

    plain = layers(SPECIES[0].attributes)
    assert list(plain) == list(LAYERS)
    for attribute, values in ATTRIBUTES.items():
        for value in set(values) - {SPECIES[0].attributes[attribute]}:
            other = layers(SPECIES[0].attributes | {attribute: value})
            changed = {name for name in LAYERS if other[name] != plain[name]}
            assert changed == {name for name, depends in LAYERS.items() if attribute in depends}


def test_backgrounds_hold_the_colours_of_parts():
    """A crimson pixel is no proof of a crimson crown: over many birds, as many lie beside the bird as on a crown."""
    outside = 0
    for k in range(40):
        bird = draw(SPECIES[0].attributes, k)  # a black crown
        red = (bird.image[..., 0] > 130) & (bird.image[..., 1] < 70) & (bird.image[..., 2] < 80)
        outside += int((red & ~bird.segmentation).sum() > 5)
    assert outside >= 5


def test_the_written_set_is_read_as_cub(tmp_path):
    root = write_fieldguide(tmp_path / "birds", species_of(2), train=4, test=2, seed=1)
    train, val, test = (CUB200(root, split, val_fraction=0.25) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (24, 8, 16) and len(train.class_names) == 8
    assert train.class_names[1] == f"002.{species_of(2)[1].name}"
    assert train.parts.shape == (24, 15, 3) and train.boxes.shape == (24, 4)
    image, bird = test.image(3), test.segmentation(3)
    assert image.size == (112, 112) and bird.shape == (112, 112) and 0.05 < bird.mean() < 0.6
    assert json.loads((root / "attributes.json").read_text())["species"][0]["differs_in"] == "crown"


def test_other_processes_draw_the_same_pixels(tmp_path):
    one = write_fieldguide(tmp_path / "one", species_of(1), train=2, test=1)
    two = write_fieldguide(tmp_path / "two", species_of(1), train=2, test=1, workers=2)
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_an_existing_set_is_kept_and_a_different_one_refused(tmp_path):
    root = write_fieldguide(tmp_path / "birds", species_of(1), train=1, test=1)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.png")}
    write_fieldguide(root, species_of(1), train=1, test=1)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*.png")}
    with pytest.raises(LoupeError, match="holds something else.*: give another folder$"):
        write_fieldguide(root, species_of(1), train=2, test=1)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*.png")}


def test_a_folder_that_appears_during_drawing_is_not_replaced(tmp_path, monkeypatch):
    def save(self, file, **kwargs):
        (tmp_path / "birds").mkdir(exist_ok=True)
        (tmp_path / "birds" / "notes.txt").write_text("mine")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(LoupeError, match="holds something else"):
        write_fieldguide(tmp_path / "birds", species_of(1), train=1, test=0)
    assert (tmp_path / "birds" / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["birds"]


def test_an_interrupted_set_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    calls = itertools.count()
    real = Image.Image.save

    def failing(self, *args, **kwargs):
        if next(calls) == 3:
            raise OSError("No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(OSError):
        write_fieldguide(tmp_path / "birds", species_of(1), train=2, test=1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(CUB200(write_fieldguide(tmp_path / "birds", species_of(1), train=2, test=1), "test")) == 4


@pytest.mark.parametrize("wrong", [dict(crown="pink"), dict(bill=None)])
def test_unknown_attributes_are_named(wrong):
    with pytest.raises(LoupeError, match=f"attribute {next(iter(wrong))}="):
        draw(SPECIES[0].attributes | wrong, 0)


@pytest.mark.parametrize("wrong", [dict(size=0), dict(area=(0.6, 0.3)), dict(area=(0, 0.3)), dict(area=(0.5, 1.2))])
def test_a_size_or_area_out_of_range_is_named(wrong):
    with pytest.raises(LoupeError, match=f"{next(iter(wrong))}=.* given to draw; expected"):
        draw(SPECIES[0].attributes, 0, **wrong)


@pytest.mark.parametrize("name, values", {
    "train": (0, -1, True, 2.0, "2", None), "test": (-1, False, 1.5), "size": (15, 32.0, float("nan")),
    "seed": (-1, 0.0, None), "workers": (-1, 1.0), "weather": (-0.1, 1.1, float("nan"), float("inf"), True, "1", None),
}.items())
def test_a_setting_out_of_its_range_is_named_in_one_line_and_nothing_is_written(tmp_path, name, values):
    for value in values:
        writers = [write_fieldguide] + [fieldguide_set] * (name in ("train", "test", "size"))
        for write in writers:
            with pytest.raises(LoupeError, match=f"^fieldguide: found {name}={value!r}, expected ") as caught:
                write(tmp_path / "birds", species_of(1), **{name: value})
            assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("species, found", [((), "none"), (["Marrel"], "'Marrel'")])
def test_a_set_needs_species(tmp_path, species, found):
    for write in (write_fieldguide, fieldguide_set):
        with pytest.raises(LoupeError, match=f"^fieldguide: found {found} in species, expected one or more of SPECIES"):
            write(tmp_path / "birds", species)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_settings_give_a_set(tmp_path):
    root = write_fieldguide(tmp_path / "birds", SPECIES[:1], train=1, test=0, size=16, seed=0, weather=0)
    assert [Image.open(path).size for path in root.glob("images/*/*.png")] == [(16, 16)]


def test_unknown_groups_are_named():
    with pytest.raises(LoupeError, match="no group named 'Dodo'"):
        species_of(["Marrel", "Dodo"])


@pytest.mark.parametrize("wrong", [0, 13, -1, True, 2.0, "Marrel", [], None])
def test_a_number_of_groups_out_of_range_is_named(wrong):
    with pytest.raises(LoupeError, match=r"^species_of: found groups=.*, expected a whole number from 1 to 12, or"):
        species_of(wrong)


def test_any_number_of_groups_from_one_to_twelve_gives_four_species_each():
    assert [len(species_of(k)) for k in range(1, 13)] == [4 * k for k in range(1, 13)]
    assert species_of(12) == SPECIES and {s.group for s in species_of(["Dunnel", "Marrel"])} == {"Dunnel", "Marrel"}


def test_drawing_takes_a_few_thousand_calls():
    """A bird takes some 4,000 calls of functions; a step for every pixel would take ten times as many.

    Calls are counted, not seconds: on one processor a bird took a quarter of a blur, on another almost half.
    """
    def calls(k: int) -> int:
        events = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            draw(SPECIES[k].attributes, k)
        finally:
            sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in events)

    assert max(map(calls, range(0, 40, 8))) < 6000
