"""The grid of second looks, on stand-ins: every kind looks, and its row says what it measured."""

import grids_photographs as photographs
import grids_second_look as grids
import numpy as np
import pytest
import torch
from PIL import Image
from test_record_photographs import tiny  # noqa: F401 (a fixture)

from loupe_core.look.cut import Box
from loupe_core.samples import Sample
from loupe_lab.evidence.results import unpack_right, unpack_shares

WHICH = dict(photographs="cub10", backbone="lite0", pixels=64, seed=0)


@pytest.fixture(scope="module")
def kept(tiny):  # noqa: F811
    """The weights of a gated arm."""
    photographs.photograph(**WHICH, arm="residual, fast", images="")
    grids.opened.cache_clear()
    yield
    grids.opened.cache_clear()


@pytest.mark.parametrize("look", [name for name in grids.LOOKS if name not in ("rollout", "saliency",
                                                                               "norm of stage 3")])
def test_a_second_look_says_what_it_saw(look, kept):
    row, _ = grids.second_look(**WHICH, arm="residual, fast", look=look)
    first, _ = grids.second_look(**WHICH, arm="residual, fast", look="none")
    assert row.keys() == first.keys() and row["setting"] in grids.LOOKS[look][1]
    for name in ("", "second_", "weighted_"):
        right = unpack_right(dict(right=row[f"{name}right"]), row["test_images"])
        assert right.mean() == pytest.approx(row[f"{name}accuracy"], abs=1e-4)
    if look == "none":
        assert row["passes"] == 1 and row["right"] == row["second_right"]
    else:
        assert row["passes"] > 1 and row["milliseconds"] > 0
    if row["iou"] != "":
        assert unpack_shares(row["iou_of"]).mean() == pytest.approx(row["iou"], abs=0.003)
        assert 0 < row["area"] <= 1


def test_boxes_are_the_magnifiers_own(kept):
    model, splits = grids.opened(**WHICH, arm="residual, fast")
    rule = grids.LOOKS["mask"][1]["0.2"]
    logits, boxes = grids.Magnifier(model, rule)(splits["test"].samples, return_boxes=True)
    found = grids.by(model, splits["test"], rule)
    assert found.parts == [of[0] for of in boxes]
    torch.testing.assert_close(grids.combine(splits["test"].first, found.logits, rule), logits, atol=1e-4, rtol=1e-4)


def test_the_recorded_box_lies_on_itself_and_a_part_elsewhere_does_not():
    parts = torch.zeros(15, 3)
    parts[0] = torch.tensor([12.0, 12.0, 1.0])
    samples = [Sample(Image.new("RGB", (100, 50)), 0, parts, torch.tensor([10.0, 10.0, 20.0, 20.0]), None, "", i)
               for i in range(3)]
    same = grids.places(samples, [Box(10, 10, 20, 20)] * 3)
    assert (same["iou"], same["small_iou"], same["keypoints"], same["covered"]) == (1, 1, 1, 1)
    assert same["area"] == pytest.approx(400 / 5000)
    half = grids.places(samples, [Box(20, 10, 20, 20)] * 3)
    assert half["iou"] == pytest.approx(1 / 3, abs=1e-4) and half["covered"] == 0.5 and half["keypoints"] == 0
    np.testing.assert_allclose(unpack_shares(half["iou_of"]), 1 / 3, atol=0.003)


def test_without_boxes_nothing_is_said_of_places():
    sample = Sample(Image.new("RGB", (10, 10)), 0, None, None, None, "", 0)
    assert set(grids.places([sample], [Box(0, 0, 5, 5)]).values()) == {""}


def test_every_kind_with_settings_has_as_many():
    assert {len(settings) for settings, in ([of[1]] for of in grids.LOOKS.values()) if len(settings) > 1} == {3}
