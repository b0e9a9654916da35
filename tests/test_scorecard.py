"""The scorecard: against formulas written out again, by hand, against chance, and back through the geometry."""

import math

import numpy as np
import pytest
import torch
from grids_scorecard import scenes_of, score
from scipy.ndimage import gaussian_filter
from scipy.stats import percentileofscore
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from loupe_core import CUB200, EvalTransform, Geometry, LoupeError, LoupeModel, Sample, transforms_for
from loupe_lab.birds.fieldguide import species_of, write_fieldguide
from loupe_lab.birds.painter import PARTS
from loupe_lab.evidence.explain import explain
from loupe_lab.evidence.masks import rank_correlation
from loupe_lab.evidence.scorecard import (
    LAYERS,
    LOCALISATION,
    NULLS,
    Scene,
    centre_prior,
    highest,
    insertion_deletion,
    localisation,
    null_maps,
    on_grid,
    peak_on,
    randomisation,
    rank_at,
    rank_of_part,
)


def sample(x, y, visible=1, geometry=None):
    parts = torch.zeros(15, 3)
    parts[3] = torch.tensor([x, y, visible])
    return Sample(None, 0, parts, None, geometry or Geometry((8, 8), (8, 8), (1.0, 1.0), (0.0, 0.0)), "", 0)


def test_a_rank_is_the_share_of_cells_below_and_half_of_the_ties():
    mask = np.array([[0.1, 0.5], [0.5, 0.9]])
    assert rank_at(mask, (1, 1)) == 1.0 and rank_at(mask, (0, 0)) == 0.0
    assert rank_at(mask, (0, 1)) == (1 + 0.5) / 3
    assert rank_at(np.ones((3, 3)), (1, 1)) == 0.5  # a mask that says nothing gets what chance gets


def test_a_rank_equals_scipys_and_ignores_a_monotone_change():
    rng = np.random.default_rng(0)
    mask = rng.random((14, 14))
    others = np.delete(mask.flatten(), 3 * 14 + 7)
    assert math.isclose(rank_at(mask, (3, 7)), percentileofscore(others, mask[3, 7], "mean") / 100)
    assert rank_at(np.exp(5 * mask), (3, 7)) == rank_at(mask, (3, 7))


def test_noise_ranks_at_a_half():
    rng = np.random.default_rng(1)
    ranks = [rank_at(rng.random((14, 14)), tuple(rng.integers(14, size=2))) for _ in range(2000)]
    assert abs(np.mean(ranks) - 0.5) < 4 * np.sqrt(1 / 12 / 2000)


def test_a_part_is_ranked_in_its_own_cell_among_all_and_among_the_birds():
    mask = np.arange(16.0).reshape(4, 4)  # cells of 2 px
    bird = np.zeros((8, 8), bool)
    bird[4:, 4:] = True  # cells (2, 2), (2, 3), (3, 2), (3, 3): values 10, 11, 14, 15
    among_all, among_bird = rank_of_part(mask, sample(6.5, 5.0), 3, bird)  # cell (2, 3): 11
    assert among_all == 11 / 15 and among_bird == 1 / 3


def test_a_flipped_crop_leads_to_the_right_cell():
    geometry = Geometry((16, 16), (8, 8), (1.0, 1.0), (4.0, 2.0), flipped=True)  # x_input = 8 - (x - 2)
    mask = np.zeros((4, 4))
    mask[1, 0] = 1.0  # px 2..4 down, 0..2 across in the input: y 6..8, x 8..10 in the photograph
    assert rank_of_part(mask, sample(9.0, 7.0, geometry=geometry), 3)[0] == 1.0


def test_a_part_that_is_hidden_or_cut_off_has_no_rank():
    cut = Geometry((16, 16), (8, 8), (1.0, 1.0), (4.0, 4.0))
    for one in (sample(4, 4, visible=0), sample(1, 8, geometry=cut), sample(8, 13, geometry=cut)):
        assert all(map(math.isnan, rank_of_part(np.ones((4, 4)), one, 3, np.ones((16, 16), bool))))


# --- localisation ------------------------------------------------------------------------------------------------

PLAIN = Geometry((8, 8), (8, 8), (1.0, 1.0), (0.0, 0.0))


def scene(bird, points=(), telling=(), geometry=PLAIN, side=10.0):
    parts = torch.zeros(15, 3)
    for k, (x, y) in enumerate(points):
        parts[k] = torch.tensor([x, y, 1.0])
    return Scene(Sample(None, 0, parts, torch.tensor([0.0, 0.0, side, side]), geometry, "", 0), bird, telling)


def some_bird():
    bird = np.zeros((8, 8), bool)
    bird[2:5, 3:7] = True
    return bird


def test_the_highest_pixels_are_those_that_a_sorted_list_begins_with():
    map_ = np.random.default_rng(0).permutation(100).reshape(10, 10)
    assert np.array_equal(highest(map_, 0.23), map_ >= 77)
    seen = np.where(map_ < 50, np.nan, map_)
    assert np.array_equal(highest(seen, 0.2), map_ >= 90)


def test_pixels_that_tie_get_what_lots_would_give_them_on_average():
    map_ = np.array([[3.0, 2.0, 2.0], [2.0, 1.0, 0.0]])
    rng, lots = np.random.default_rng(0), np.zeros(6)
    for _ in range(4000):
        order = sorted(range(6), key=lambda k: (-map_.flat[k], rng.random()))
        lots[order[:3]] += 1 / 4000
    assert np.allclose(highest(map_, 0.5).flat, lots, atol=0.04)
    assert highest(map_, 0.5).sum() == pytest.approx(3)


def test_a_map_that_is_the_segmentation_scores_1():
    bird = some_bird()
    one = localisation(bird[None].astype(float), [scene(bird, [(4.5, 3.5)], telling=(0,))])
    assert one["pointing"] == one["energy"] == one["iou"] == 1
    assert one["energy_parts"] == pytest.approx(5 / 12)  # of its 12 pixels 5 lie within 1 px of the part
    assert one["keypoints"] == pytest.approx(6.4 / 12)  # the bird's 12 pixels tie for a tenth of 64
    assert one["telling"] == pytest.approx(5 / 12) and one["ring"] == 0  # all 12 tie for the peak
    assert localisation(1.0 - bird[None], [scene(bird)])["energy"] == 0


def test_an_even_map_gets_what_a_guess_gets():
    bird = some_bird()
    a = bird.mean()
    even = localisation(np.full((1, 4, 4), 0.3), [scene(bird, [(1.5, 1.5), (6.5, 2.5)], telling=(1,), side=20.0)])
    assert even["energy"] == pytest.approx(a) and even["iou"] == pytest.approx(a / (2 - a))
    assert even["keypoints"] == pytest.approx(0.1) and even["rank"] == 0.5
    assert even["ring"] == pytest.approx(12 / 16)
    rng = np.random.default_rng(0)
    noise = localisation(rng.random((2000, 8, 8)), [scene(bird, [(1.5, 1.5)])] * 2000)
    assert noise["pointing"].mean() == pytest.approx(a, abs=4 * np.sqrt(a * (1 - a) / 2000))
    assert noise["energy"].mean() == pytest.approx(a, abs=0.01)
    assert noise["keypoints"].mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 2000))


def test_a_peak_that_ties_hits_as_often_as_breaking_the_tie_at_random_does():
    bird, rng = np.zeros((8, 8), bool), np.random.default_rng(0)
    bird[3:5, 3:5] = True  # the middle, where the mean of the cells that tie would lie
    one = scene(bird, [(4.5, 4.5)], telling=(0,))
    even = localisation(np.ones((1, 4, 4)), [one])
    assert even["pointing"] == 1 / 16
    corners = np.zeros((1, 8, 8))
    corners[0, [0, 0, -1, -1], [0, -1, 0, -1]] = 1
    assert localisation(corners, [one])["pointing"] == localisation(corners, [one])["telling"] == 0
    map_ = rng.integers(0, 3, (8, 8)).astype(float)
    broken = [(map_ + 1e-3 * rng.random(map_.shape)).argmax() for _ in range(4000)]
    assert peak_on(map_, PLAIN, bird) == pytest.approx(np.mean([bird.flat[k] for k in broken]), abs=0.03)


def test_scores_equal_their_formulas_written_out_in_a_mirrored_crop():
    # the input is the window rows 2..10, columns 4..12 of a photograph of 16 x 16, mirrored; one cell a pixel
    geometry = Geometry((16, 16), (8, 8), (1.0, 1.0), (2.0, 4.0), flipped=True)
    rng = np.random.default_rng(3)
    map_, bird, near = rng.random((8, 8)), rng.random((16, 16)) < 0.4, 2.0
    points = [(5.5, 3.5), (10.2, 8.9), (1.0, 1.0)]  # the last was cropped away
    found = localisation(map_[None], [scene(bird, points, (1,), geometry, side=20.0)])
    seen = {(r, c): map_[r - 2, 7 - (c - 4)] for r in range(2, 10) for c in range(4, 12)}
    total = sum(seen.values())
    assert found["energy"] == pytest.approx(sum(v for p, v in seen.items() if bird[p]) / total)
    assert found["pointing"] == bird[max(seen, key=seen.get)]
    order = sorted(seen, key=seen.get, reverse=True)
    on = {p for p in seen if bird[p]}
    top = set(order[: len(on)])
    assert found["iou"] == pytest.approx(len(top & on) / len(top | on))
    close = {(r, c) for r, c in seen if any(np.hypot(c + 0.5 - x, r + 0.5 - y) <= near for x, y in points[:2])}
    assert found["energy_parts"] == pytest.approx(sum(seen[p] for p in close) / total)
    weights = dict.fromkeys(order[:6], 1.0) | {order[6]: 0.4}  # a tenth of 64 pixels
    assert found["keypoints"] == pytest.approx(np.mean([weights.get((int(y), int(x)), 0) for x, y in points[:2]]))
    r, c = order[0]
    assert found["telling"] == (np.hypot(c + 0.5 - 10.2, r + 0.5 - 8.9) <= near)


def test_what_cannot_be_told_is_nan_and_wrong_maps_are_refused():
    bird = some_bird()
    found = localisation(np.zeros((1, 4, 4)), [scene(bird)])
    assert all(np.isnan(found[name]) for name in ("energy", "keypoints", "energy_parts", "telling", "rank", "ring"))
    assert np.isnan(localisation(np.ones((1, 4, 4)), [scene(bird, [(1, 1)], telling=(5,))])["telling"])
    for wrong in (np.ones((4, 4)), np.ones((2, 4, 4)), -np.ones((1, 4, 4))):
        with pytest.raises(LoupeError, match="expected .N, h, w. for N scenes, not negative"):
            localisation(wrong, [scene(bird)])


# --- nulls -------------------------------------------------------------------------------------------------------

def blobs(n, seed=0):
    return gaussian_filter(np.random.default_rng(seed).random((n, 14, 14)), (0, 1.5, 1.5), mode="wrap") ** 4


@pytest.mark.parametrize("kind", NULLS)
def test_null_maps_have_the_same_values_and_the_same_blur_elsewhere(kind):
    maps, rng = blobs(60), np.random.default_rng(1)
    nulls = null_maps(maps, kind, rng)
    assert np.allclose(np.sort(nulls, None), np.sort(maps, None))
    assert np.abs(np.nanmean(rank_correlation(maps, nulls))) < 0.1
    assert not any(np.allclose(a, b) for a, b in zip(maps, nulls))

    def beside(m):  # correlation of neighbours on the torus
        return np.mean([np.corrcoef(one.ravel(), np.roll(one, 1, 0).ravel())[0, 1] for one in m])

    assert beside(nulls) == pytest.approx(beside(maps), abs=0.08) and beside(maps) > 0.5
    if kind != "another":
        assert np.allclose(np.sort(nulls.reshape(60, -1)), np.sort(maps.reshape(60, -1)))


def test_a_null_of_another_image_keeps_the_bias_to_the_centre_and_the_others_do_not():
    maps = blobs(40) * centre_prior()
    middle = np.zeros((14, 14), bool)
    middle[4:10, 4:10] = True
    share = {kind: null_maps(maps, kind, np.random.default_rng(0))[:, middle].sum() / maps.sum() for kind in NULLS}
    assert share["another"] == pytest.approx(maps[:, middle].sum() / maps.sum())
    assert share["moved"] < 0.6 * share["another"] and share["noise"] < 0.6 * share["another"]


def test_an_unknown_null_and_a_single_map_are_refused():
    for maps, kind in ((blobs(2), "none"), (blobs(1), "another")):
        with pytest.raises(LoupeError, match="expected one of another, moved, noise"):
            null_maps(maps, kind, np.random.default_rng(0))


def test_maps_come_to_one_grid():
    fine = torch.arange(16.0).view(1, 4, 4)
    assert np.allclose(on_grid(fine, 2), [[[2.5, 4.5], [10.5, 12.5]]])
    assert np.allclose(on_grid(torch.full((1, 2, 2), 3.0), 4), 3.0)
    assert np.array_equal(on_grid(fine, 4), fine.numpy())


# --- insertion, deletion and randomisation -----------------------------------------------------------------------

class Toy(nn.Module):
    """Two classes; the second's logit is what the weights (h, w) see in the red of each cell of 2 x 2 pixels."""

    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32))

    def forward(self, x):
        seen = (nn.functional.avg_pool2d(x[:, :1], 2)[:, 0] * self.weights).sum((1, 2))
        return torch.stack([torch.zeros_like(seen), seen], 1)


def test_insertion_and_deletion_equal_sums_done_by_hand():
    weights = np.array([[3.0, 1.0], [0.5, 2.0]])
    found = insertion_deletion(Toy(weights), torch.ones(1, 3, 4, 4), weights[None], 1, steps=4, baseline="mean")

    def area(sums):
        p = [1 / (1 + np.exp(-s)) for s in sums]
        return (p[0] / 2 + sum(p[1:-1]) + p[-1] / 2) / 4

    assert found["insertion"] == pytest.approx(area([0, 3, 5, 6, 6.5]), abs=1e-6)
    assert found["deletion"] == pytest.approx(area([6.5, 3.5, 1.5, 0.5, 0]), abs=1e-6)


@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_the_true_order_beats_chance_and_chance_beats_the_reverse(baseline):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(7, 7))
    images = torch.randn(24, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    empty = gaussian_blur(images, 5, 1.0) if baseline == "blur" else 0 * images
    maps = weights * nn.functional.avg_pool2d((images - empty)[:, :1], 2)[:, 0].numpy()
    model = Toy(weights)
    orders = dict(true=maps, even=np.ones_like(maps), reverse=-maps)
    found = {name: insertion_deletion(model, images, order, 1, steps=7, baseline=baseline)
             for name, order in orders.items()}
    mean = {name: (f["insertion"].mean(), f["deletion"].mean()) for name, f in found.items()}
    assert mean["true"][0] > mean["even"][0] > mean["reverse"][0]
    assert mean["true"][1] < mean["even"][1] < mean["reverse"][1]


def test_a_wrong_baseline_or_number_of_maps_is_refused():
    for maps, baseline in ((np.ones((1, 2, 2)), "black"), (np.ones((2, 2, 2)), "blur")):
        with pytest.raises(LoupeError, match="expected 'blur' or 'mean'"):
            insertion_deletion(Toy(np.ones((2, 2))), torch.ones(1, 3, 4, 4), maps, baseline=baseline)


def small_swin():
    torch.manual_seed(0)
    small = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2))
    return LoupeModel("swin_micro", num_classes=5, pretrained=False, backbone_kwargs=small).eval()


def test_the_mask_does_not_notice_what_comes_after_it_and_grad_cam_does():
    model, images = small_swin(), torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mask = randomisation(model, images, "mask")
    assert np.allclose(mask["head"], 1) and np.allclose(mask["last_stage"], 1) and np.mean(mask["all"]) < 0.9
    assert list(mask) == [*LAYERS, "another"]
    assert np.mean(randomisation(model, images, "grad_cam")["head"]) < 0.9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(LoupeError, match="found 'backbone.hat'"):
        randomisation(model, images, layers=dict(hat="backbone.hat"))


def test_a_score_has_every_column_and_nan_where_none_was_asked_for(tmp_path):
    root = write_fieldguide(tmp_path / "birds", species_of(["Marrel"]), train=2, test=2)
    model = small_swin()
    test = CUB200(root, "test", transform=transforms_for(model.data_config, train=False))
    scenes = scenes_of(test, range(0, 8, 2))
    assert [scene.telling for scene in scenes] == [(PARTS.index("crown"),)] * 4
    found = score(model, scenes, "mask", draws=1, curves=2, steps=2, randomised=2)
    wanted = [f"{name}{null}" for name in LOCALISATION for null in ("", *(f"_{null}" for null in NULLS))]
    wanted += [f"{name}_blur{null}" for name in ("insertion", "deletion") for null in ("", "_another")]
    wanted += [f"like_{name}" for name in (*LAYERS, "another")]
    assert set(found) == set(wanted) and all(v.shape == (4,) for v in found.values())
    assert np.isfinite(found["insertion_blur"]).tolist() == [True, False, False, True]
    outline, centre = (score(model, scenes, name, nulls=()) for name in ("outline", "centre"))
    assert (outline["iou"] > 0.6).all() and (outline["iou"] > centre["iou"]).all()
    given = score(model, scenes, explain(model, torch.stack([s.sample.image for s in scenes]), "mask"), nulls=())
    assert np.allclose(given["energy"], found["energy"])


def test_without_a_segmentation_the_box_is_the_object(make_cub):
    dataset = CUB200(make_cub(), "test", transform=EvalTransform(32, (0.5,) * 3, (0.5,) * 3))
    scene = scenes_of(dataset, [1])[0]
    x, y, w, h = (int(v) for v in dataset.boxes[1])
    box = np.zeros((36, 48), bool)
    box[y : y + h, x : x + w] = True
    assert np.array_equal(scene.object, box) and scene.telling == ()
