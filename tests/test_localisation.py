"""Instruments for photographs: where maps are high, patches, backdrops; on cases whose answer is known."""

import math

import grids_localisation as grids
import numpy as np
import pytest
import record_results
import torch
from grids_photographs import build, kept_file, sets, weights_of
from test_record_photographs import tiny  # noqa: F401, a fixture

from loupe_core import Geometry, LoupeError, LoupeModel, Sample
from loupe_lab.evidence.changed import GREY, greyed, on_backdrop, partners, patch_places, patched, without
from loupe_lab.evidence.explain import features_at
from loupe_lab.evidence.pointing import POINTING, feature_norm, pointing
from loupe_lab.evidence.results import pack_shares, unpack_shares
from loupe_lab.evidence.scorecard import Scene

MIRRORED = Geometry((60, 80), (48, 48), (0.8, 0.8), (0.0, 8.0), flipped=True)  # x_input = 48 - (0.8 x - 8)


def scene(box=(20.0, 10.0, 30.0, 20.0), points=((30.0, 20.0),), geometry=MIRRORED):
    parts = torch.zeros(15, 3)
    for k, (x, y) in enumerate(points):
        parts[k] = torch.tensor([x, y, 1.0])
    sample = Sample(torch.ones(3, 48, 48), 0, parts, torch.tensor(box), geometry, "", 0)
    x, y, w, h = box
    rows, columns = np.indices(geometry.original_size) + 0.5
    return Scene(sample, (rows > y) & (rows < y + h) & (columns > x) & (columns < x + w))


# --- where maps are high ---------------------------------------------------------------------------------------------

def test_a_map_that_is_the_box_has_all_of_its_sum_there_and_all_of_its_cells_above_the_others():
    one = scene()
    cells = np.zeros((48, 48))
    cells[8:24, 16:40] = 1  # y 10 to 30 and x 20 to 50 of the photograph, mirrored
    found = pointing(cells[None], [one])
    assert found["peak"] == found["rank"] == 1
    assert found["share"] == pytest.approx(1, abs=0.05)  # interpolation softens the edge
    opposite = pointing(1 - cells[None], [one])
    assert opposite["peak"] == opposite["rank"] == 0 and opposite["share"] < 0.05


def test_a_constant_map_scores_exactly_chance():
    one = scene()
    found = pointing(np.full((1, 24, 24), 0.3), [one])
    seen = one.sample.geometry.visible_box()
    assert found["rank"] == 0.5
    assert found["share"] == pytest.approx(30 * 20 / ((seen[2] - seen[0]) * (seen[3] - seen[1])))
    assert found["peak"] == pytest.approx(12 * 8 / 24**2)  # cells of 2.5 px: 12 x 8 centres lie in the box
    assert 0 < found["near"] < found["peak"]


def test_noise_scores_chance_on_average():
    one, rng = scene(), np.random.default_rng(0)
    found = pointing(rng.random((600, 24, 24)), [one] * 600)
    even = pointing(np.ones((1, 24, 24)), [one])
    for name in POINTING:
        assert found[name].mean() == pytest.approx(even[name].item(), abs=4 * found[name].std() / 600**0.5 + 1e-3)


def test_a_rank_is_the_share_of_pairs_of_cells_that_are_in_order():
    one, map_ = scene(), np.random.default_rng(1).integers(0, 6, (12, 12)).astype(float)
    on = np.zeros((12, 12), bool)
    on[2:6, 4:10] = True
    pairs = [(a > b) + 0.5 * (a == b) for a in map_[on] for b in map_[~on]]
    assert pointing(map_[None], [one])["rank"] == pytest.approx(np.mean(pairs))


def test_a_peak_is_near_a_keypoint_within_a_tenth_of_the_longer_side():
    for away, hit in ((2.9, 1), (3.1, 0)):  # the box is 30 px long
        one, cells = scene(points=((30.0 + away, 20.0), (79.0, 5.0))), np.zeros((48, 48))
        x, y = one.sample.geometry.to_input([30.0, 20.0])
        cells[int(y), int(x)] = 1
        centre = one.sample.geometry.to_original([int(x) + 0.5, int(y) + 0.5])
        one.sample.parts[0, :2] = torch.tensor([centre[0] + away, centre[1]])
        assert pointing(cells[None], [one])["near"] == hit


def test_what_cannot_be_measured_is_not_a_number():
    none = scene(points=())
    assert math.isnan(pointing(np.ones((1, 8, 8)), [none])["near"].item())
    assert math.isnan(pointing(np.zeros((1, 8, 8)), [none])["share"].item())
    whole = scene(box=(0.0, 0.0, 80.0, 60.0))
    assert math.isnan(pointing(np.random.default_rng(0).random((1, 8, 8)), [whole])["rank"].item())
    with pytest.raises(ValueError):
        pointing(np.ones((2, 8, 8)), [none])


def test_shares_are_kept_to_a_255th_and_unknown_ones_stay_so():
    values = np.array([0, 1, 0.5, math.nan, 0.123, 1 + 1e-15])
    again = unpack_shares(pack_shares(values))
    assert np.isnan(again[3]) and np.nanmax(np.abs(again - values)) <= 0.5 / 254 + 1e-12
    assert again[0] == 0 and again[1] == 1 and again[2] == 0.5
    with pytest.raises(LoupeError, match="found values from -0.1 to 0.5"):
        pack_shares([0.5, -0.1])


@pytest.mark.parametrize("form", ["multiply", "residual"])
def test_the_features_at_a_site_are_those_that_come_to_the_gate(form):
    torch.manual_seed(0)
    gated = LoupeModel("swin_micro", 3, form=form)
    torch.nn.init.normal_(gated.gates["stage2"].loupe.conv1x1.bias)
    images = torch.randn(2, 3, 112, 112)
    features = features_at(gated, images)
    with torch.no_grad():
        mask = gated.eval()(images, return_mask=True)[1]
        assert torch.allclose(gated.gates["stage2"].loupe(features), mask, atol=1e-6)
    bare = LoupeModel("swin_micro", 3, site=())
    bare.backbone.load_state_dict(gated.backbone.state_dict())
    assert torch.allclose(features_at(bare, images), features, atol=1e-5)
    assert torch.allclose(feature_norm(features), (features**2).sum(1).sqrt())
    assert not any(module._forward_hooks for module in bare.modules())


# --- patches ---------------------------------------------------------------------------------------------------------

def test_patches_have_one_area_lie_on_keypoints_and_never_touch_the_box_beside_it():
    rng = np.random.default_rng(0)
    for _ in range(200):
        corner, size = rng.uniform((0, 0), (50, 40)), rng.uniform(5, 40, 2)
        points = corner + rng.random((4, 2)) * size
        one, side = scene((*corner, *size), points), int(rng.integers(3, 12))
        on, off = patch_places(one.sample, side, 5, rng)
        assert len(on) == len(off) and len(on) in (0, 5)
        at = one.sample.geometry.to_input(points)
        for x, y in on:
            assert 0 <= x <= 48 - side and 0 <= y <= 48 - side
            assert (((at >= (x, y)) & (at <= (x + side, y + side))).all(1)).any()
        box = np.zeros((60, 80), bool)
        box[one.object] = True
        for x, y in off:
            assert 0 <= x <= 48 - side and 0 <= y <= 48 - side
            corners = one.sample.geometry.to_original([[x, y], [x + side, y + side]])
            (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
            left, top, width, height = one.sample.box.tolist()
            assert x1 <= left + 1e-4 or x0 >= left + width - 1e-4 or y1 <= top + 1e-4 or y0 >= top + height - 1e-4
        changed = [(copy != one.sample.image).any(0) for copy in patched(one.sample.image, [*on, *off], side)]
        assert {int(where.sum()) for where in changed} <= {side**2}


def test_without_room_or_keypoints_there_are_no_patches():
    rng = np.random.default_rng(0)
    for one in (scene(box=(0.0, 0.0, 80.0, 60.0)), scene(points=()), scene(points=((1.0, 1.0),))):  # cropped away
        assert [len(places) for places in patch_places(one.sample, 6, 3, rng)] == [0, 0]


def test_a_patch_leaves_the_mask_of_an_oracle_as_it_is():
    image = torch.ones(4, 10, 10)
    copies = patched(image, np.array([[2, 3]]), 4)
    assert copies[0, 3].sum() == 100 and (copies[0, :3] == 0).sum() == 3 * 16 and image.min() == 1
    assert (copies[0, :3, 3:7, 2:6] == 0).all()


# --- backdrops -------------------------------------------------------------------------------------------------------

def some_photographs():
    """Two photographs of two sizes: one with a red object on noise, one with a green one on a blue backdrop."""
    rng = np.random.default_rng(0)
    one, on = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), np.zeros((40, 50), bool)
    on[10:30, 15:35] = True
    one[on] = (255, 0, 0)
    two, other = np.full((60, 66, 3), (0, 0, 200), np.uint8), np.zeros((60, 66), bool)
    other[5:50, 5:60] = True
    two[other] = (0, 255, 0)
    return one, on, two, other


def test_a_swapped_backdrop_keeps_the_objects_pixels_and_shows_nothing_of_the_other_object():
    one, on, two, other = some_photographs()
    swapped = on_backdrop(one, on, two, other)
    assert swapped.shape == one.shape and swapped.dtype == np.uint8
    assert np.array_equal(swapped[on], one[on])
    assert (swapped[~on] == (0, 0, 200)).all()
    assert (without(two, other) == (0, 0, 200)).all()
    assert (without(two, np.ones_like(other)) == GREY).all()


def test_greyed_pixels_are_grey_and_the_others_as_they_were():
    one, on, _, _ = some_photographs()
    assert (greyed(one, ~on)[~on] == GREY).all() and np.array_equal(greyed(one, ~on)[on], one[on])


def test_a_backdrop_comes_from_another_photograph_of_the_same_class_or_of_another():
    labels, rng = np.array([0, 0, 0, 1, 1, 2]), np.random.default_rng(0)
    same, other = (partners(labels, kind, rng) for kind in (True, False))
    assert same[5] == -1 and (labels[same[:5]] == labels[:5]).all() and (same[:5] != np.arange(5)).all()
    assert (labels[other] != labels).all()


# --- the grids, on stand-ins -----------------------------------------------------------------------------------------

@pytest.fixture()
def keep(tiny):  # noqa: F811
    """(photographs, backbone, arm, seed) -> leaves the weights of an untrained network of 64 px where a recording
    would."""
    def leave(photographs, backbone, arm, seed=0):
        which = photographs, backbone, 64, arm, seed
        model = build(*which[1:], sets(photographs, arm, seed=seed)("test").class_names)
        kept_file(*which).parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights_of(model), kept_file(*which))
        return dict(zip(("photographs", "backbone", "pixels", "arm", "seed"), which))

    for cache in (grids.network, grids.cut_out):
        cache.cache_clear()
    yield leave
    for cache in (grids.network, grids.cut_out):
        cache.cache_clear()


@pytest.mark.parametrize("arm", ["bare", "residual, fast", "near one, fast", "oracle box"])
def test_every_map_of_an_arm_is_scored_on_all_test_photographs(arm, keep):
    which, maps = keep("cub10", "lite0", arm), {}
    kinds = [row["map"] for row in grids.GRIDS["pointing"][1] if row["photographs"] == "cub10" and row["backbone"] ==
             "lite0" and row["arm"] == arm and not row["seed"]]
    for kind in kinds or ["mask"]:
        outcome, _ = grids.localised(**which, map=kind)
        each = {name: unpack_shares(outcome[f"each_{name}"]) for name in POINTING}
        assert {len(values) for values in each.values()} == {40} == {outcome["images"]}
        assert all(np.nanmean(values) == pytest.approx(outcome[name], abs=2e-3) for name, values in each.items())
        maps[kind] = outcome
    assert {outcome["gate_moved"] for outcome in maps.values()} == {"" if arm in ("bare", "oracle box") else 0.0}
    if arm == "bare":
        assert maps["constant"]["rank"] == 0.5 and maps["constant"]["map_sd"] == 0
        assert maps["outline"]["rank"] > 0.95 > maps["centre"]["rank"]
    if arm == "residual, fast":  # at the start its mask is 0.5 everywhere
        assert maps["mask"]["rank"] == 0.5 and maps["mask"]["map_sd"] == 0 < maps["untrained"]["map_sd"]
    if arm == "oracle box":
        assert maps["mask"]["rank"] > 0.95


def test_maps_of_a_transformer_are_scored_as_well(keep):
    which = keep("cub10", "vit_s", "multiply, fast")
    for map_ in ("mask", "rollout", "features"):
        assert grids.localised(**which, map=map_)[0]["images"] == 40


def test_patches_are_the_same_for_all_networks_and_unknown_where_no_square_fits(keep):
    outcome, _ = grids.patches(**keep("cub10", "lite0", "oracle box, 0 outside"))
    bare, _ = grids.patches(**keep("cub10", "lite0", "bare"))
    assert 0 < outcome["with_room"] == bare["with_room"] <= 40
    for row in (outcome, bare):
        assert unpack_shares(row["each_on"]).shape == (40,)
        assert np.isfinite(unpack_shares(row["each_off"])).sum() == row["with_room"]
    assert np.array_equal(*(np.isnan(unpack_shares(row["each_on"])) for row in (outcome, bare)))
    assert grids.patches(**keep("cub10", "lite0", "bare"))[0] == bare


def test_an_accuracy_on_other_backdrops_has_an_answer_for_each_photograph(keep):
    outcome, _ = grids.backdrops(**keep("heliconius", "lite0", "residual, fast"))
    assert outcome["images"] == 8 and outcome["gate_moved"] == 0
    assert all(0 <= outcome[name] <= 1 and len(outcome[f"right_{name}"]) == 2 for name in grids.SETTINGS)


def test_the_rows_name_recorded_trainings_whose_weights_are_kept():
    trained = {tuple(row[k] for k in ("photographs", "backbone", "pixels", "arm", "seed"))
               for name in ("cub10_lite0", "cub10_gates", "cub10_vit_s", "other_photographs")
               for row in record_results.GRIDS[name][1]}
    for grid in ("pointing", "patches", "backdrops"):
        choices = grids.GRIDS[grid][1]
        assert len({tuple(choice.items()) for choice in choices}) == len(choices)
        assert {tuple(c[k] for k in ("photographs", "backbone", "pixels", "arm", "seed")) for c in choices} <= trained


@pytest.mark.parametrize("grid", ["pointing", "patches", "backdrops"])
def test_a_network_that_was_not_recorded_here_ends_the_program_in_one_line(grid):
    with pytest.raises(SystemExit, match="-99.pt: found no weights; record its row on this machine"):
        grids.GRIDS[grid][0](**(grids.GRIDS[grid][1][0] | dict(seed=99)))
