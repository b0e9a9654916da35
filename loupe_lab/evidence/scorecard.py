"""Scores of a mask or another heatmap, each with null maps to compare it with.

Two kinds. `localisation` asks where a map is high: on the object, at its parts, at the part that tells its class.
`insertion_deletion` and `randomisation` ask whether the model's prediction depends on what the map shows. A blurry map,
or one that merely knows that birds sit in the middle, scores well in most of them (ROAR and ROAD reward blur: arXiv
2304.13836). So each score comes with those of null maps (`null_maps`), which have the map's own values in other places;
what counts is the difference. scripts/record/grids_scorecard.py does all of it for the methods of `explain`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from loupe_core.errors import LoupeError
from loupe_core.geometry import Geometry
from loupe_core.heatmap import mask_to_original, peaks
from loupe_core.samples import Sample
from loupe_core.start.devices import device_of
from loupe_lab.evidence.explain import explain
from loupe_lab.evidence.masks import border_ring, centre_gaussian, rank_correlation

NULLS = ("another", "moved", "noise")
LOCALISATION = ("pointing", "energy", "iou", "keypoints", "energy_parts", "telling", "rank", "rank_on_object", "ring")
CURVES = ("insertion", "deletion")
CELLS = 14  # per side of the grid on which maps are compared: as in the mask after stage 2 of swin_micro, 8 px each
REACH = 0.1  # of the box's longer side: so near to a part counts as on it (PCK at 0.1, Yang and Ramanan 2013)
TOP = 0.1  # of the pixels that the model saw: a part should be among the highest


def rank_at(mask: ArrayLike, cell: tuple[int, int], within: ArrayLike | None = None) -> float:
    """The fraction of the other cells whose value is below the one at `cell`; ties count half.

    1 is the highest, 0 the lowest, 0.5 what chance gives. A strictly increasing function of the mask has the same
    ranks. nan where there is no other cell.

    Args:
        mask: `(H, W)`.
        cell: (row, column).
        within: `(H, W)` bool, the cells to compare with (the bird's, say); None means all.
    """
    mask = np.asarray(mask, dtype=float)
    others = np.ones(mask.shape, bool) if within is None else np.array(within, bool)
    others[cell] = False
    if not others.any():
        return float("nan")
    values = mask[others]
    return float((values < mask[cell]).mean() + 0.5 * (values == mask[cell]).mean())


def on_object(segmentation: ArrayLike, geometry: Geometry, shape: tuple[int, int]) -> np.ndarray:
    """The segmentation's value at the centre of each cell of a map over the model input: `(h, w)`, its dtype.

    Args:
        segmentation: `(height, width)` over the photograph, True on the object.
        geometry: of the model input.
        shape: (h, w), of the map.
    """
    rows, columns = np.indices(shape)
    centres = (np.stack([columns, rows], -1) + 0.5) * (np.array(geometry.input_size) / shape)[::-1]
    px = geometry.to_original(centres).astype(int)
    return np.asarray(segmentation)[px[..., 1], px[..., 0]]


def rank_of_part(mask: ArrayLike, sample: Sample, part: int,
                 segmentation: ArrayLike | None = None) -> tuple[float, float]:
    """`rank_at` the cell that shows a part: among all cells, and among the cells whose centre lies on the bird.

    Args:
        mask: `(H, W)` over the model input.
        sample: with its parts and its geometry.
        part: index into the sample's 15 parts, counted from 0.
        segmentation: `(height, width)` bool over the photograph; without one the second rank is nan.

    Returns:
        The two ranks; nan where the part is not visible in the photograph or lies outside of the model input.
    """
    mask, geometry = np.asarray(mask, dtype=float), sample.geometry
    cell_size = np.array(geometry.input_size) / mask.shape  # (h, w), px of the model input
    x, y, visible = np.asarray(sample.parts[part])
    column, row = (geometry.to_input([x, y]) // cell_size[::-1]).astype(int)
    if not visible or not (0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]):
        return math.nan, math.nan
    among_all = rank_at(mask, (row, column))
    if segmentation is None:
        return among_all, math.nan
    return among_all, rank_at(mask, (row, column), on_object(segmentation, geometry, mask.shape))


def peak_on(mask: ArrayLike, geometry: Geometry, on: ArrayLike) -> float:
    """Whether a mask peaks on an object: 0 or 1, or, where cells tie for the maximum, the fraction of them that is on
    it.

    That is what breaking the tie at random gives on average, without a draw that differs from run to run. A constant
    mask gets the object's share of the area. The mean of the cells that tie, a point in the middle of the photograph
    where all do, would hit most objects.

    Args:
        mask: `(H, W)` over the model input.
        on: `(height, width)` over the photograph, True on the object.
    """
    columns, rows = peaks(mask, geometry).astype(int).T
    return float(np.asarray(on)[rows, columns].mean())


@dataclass
class Scene:
    """An image and what is known about it.

    Args:
        sample: with its geometry, and with parts and box for the scores that need them.
        object: `(height, width)` bool over the photograph, True on the object.
        telling: indices of the parts that tell its class from its neighbours (two where there are two wings), or ().
    """

    sample: Sample
    object: np.ndarray
    telling: tuple[int, ...] = ()


def on_grid(maps: torch.Tensor, cells: int = CELLS) -> np.ndarray:
    """Maps `(N, h, w)` on one grid, `(N, cells, cells)` float64: finer ones averaged in each cell, coarser ones
    interpolated (bilinear)."""
    maps = torch.as_tensor(maps).to("cpu", torch.float64)[:, None]
    if maps.shape[-1] >= cells:
        return F.adaptive_avg_pool2d(maps, cells)[:, 0].numpy()
    return F.interpolate(maps, (cells, cells), mode="bilinear")[:, 0].numpy()


def null_maps(maps: ArrayLike, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Maps `(N, h, w)` that know nothing of their image, and share other properties with the given ones.

    Args:
        maps: `(N, h, w)`, two or more of them.
        kind: "another": the map of another image of the set, which keeps where such maps are high on average;
            "moved": the same map, turned, mirrored and shifted around the borders, which keeps its shapes;
            "noise": the same values and, nearly, the same spectrum with random phases, which keeps area and blur alone.
        rng: source of the random numbers.

    Raises:
        LoupeError: the kind is unknown, or there is a single map and no other to take.
    """
    maps = np.asarray(maps, dtype=float)
    if kind not in NULLS or len(maps) < 2:
        raise LoupeError(f"null_maps: found kind {kind!r} and {len(maps)} map(s); expected one of {', '.join(NULLS)}, "
                         "and two maps or more")
    if kind == "another":
        return np.roll(maps, rng.integers(1, len(maps)), axis=0)
    return np.stack([(_shifted if kind == "moved" else _noise)(map_, rng) for map_ in maps])


def centre_prior(h: int = CELLS, w: int = CELLS) -> np.ndarray:
    """`(h, w)`: a map that is the same for every image, `centre_gaussian`. A score should beat its score."""
    return centre_gaussian(h, w)


def highest(heatmap: ArrayLike, area: float) -> np.ndarray:
    """The highest pixels of a heatmap, a fraction `area` of those that are not NaN: `(H, W)`, 1 in, 0 out.

    Pixels that tie for the last places share them: each gets the probability that a random choice would take it. So
    a constant map becomes `area` everywhere.
    """
    heatmap = np.asarray(heatmap, dtype=float)
    seen = np.isfinite(heatmap)
    values = heatmap[seen]
    values = np.round(values / max(np.abs(values).max(), np.finfo(float).tiny), 9)  # interpolation parts ties by 1e-16
    places, result = area * values.size, np.zeros(heatmap.shape)
    last = np.partition(values, -max(math.ceil(places), 1))[-max(math.ceil(places), 1)]
    above, tied = values > last, values == last
    result[seen] = above + tied * np.clip((places - above.sum()) / tied.sum(), 0, 1)
    return result


def localisation(maps: ArrayLike, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Where maps are high, in the photograph's pixels: for each score an array `(N,)` with values in [0, 1].

    - pointing: 1 where the peak lies on the object, else 0 (Zhang et al. 2018); between them for ties, `peak_on`.
    - energy: the fraction of the map's sum that lies on the object.
    - iou: intersection over union of the object and the same number of highest pixels (see `highest`).
    - keypoints: the fraction of the visible parts that are among the highest tenth of the seen pixels.
    - energy_parts: the fraction of the sum that lies near a visible part: within a tenth of the box's longer side.
    - telling: 1 where the peak lies that near to a part that tells the class, else 0; for ties as pointing.
    - rank, rank_on_object: `rank_of_part` of the telling part among all cells, and among the object's.
    - ring: the fraction of the sum in the outermost cells of the model input, 52 of 14 x 14.

    nan where there is nothing to measure: no parts, the telling part hidden or cut off, a map of zeros. What was
    cropped away does not count.

    Args:
        maps: `(N, h, w)` over the model inputs, not negative: absolute values of signed maps.
        scenes: N of them.

    Raises:
        LoupeError: the number of maps is not that of the scenes, or a value is negative.
    """
    maps = np.asarray(maps, dtype=float)
    if maps.ndim != 3 or len(maps) != len(scenes) or maps.min() < 0:
        raise LoupeError(f"maps: found shape {maps.shape} and least value {maps.min():.3g} for {len(scenes)} scenes; "
                         "expected (N, h, w) for N scenes, not negative (take absolute values of signed maps)")
    rows = [_localisation(map_, scene) for map_, scene in zip(maps, scenes)]
    return {name: np.array([row[name] for row in rows], dtype=float) for name in LOCALISATION}


@torch.no_grad()
def insertion_deletion(model: nn.Module, images: torch.Tensor, maps: ArrayLike,
                       target: int | Sequence[int] | torch.Tensor | None = None, steps: int = 14,
                       baseline: str = "blur", seed: int = 0) -> dict[str, np.ndarray]:
    """Does the prediction depend on what the map shows? Insertion and deletion (Petsiuk et al. 2018), per image.

    Insertion begins with the baseline and puts the image back, cell by cell, the map's highest first; deletion takes
    the cells away in the same order. Each value is the area under the probability of `target`: a high one of insertion,
    and a low one of deletion, speak for the map. Cells that tie come in a random order. Leaves the model in eval mode,
    and where it is.

    Args:
        images: `(N, 3, H, W)`, normalised, on any device.
        maps: `(N, h, w)`, any sign.
        target: class or classes; None takes the predicted ones.
        steps: number of steps in which all cells are put back or taken away.
        baseline: "blur", the image under a Gaussian blur (deviation: a 14th of the shorter side), or "mean", the mean
            colour.
        seed: of the order of cells that tie.

    Returns:
        The areas, `(N,)` each, under the names "insertion" and "deletion".

    Raises:
        LoupeError: the baseline is unknown, or the number of maps is not that of the images.
    """
    maps = np.asarray(maps, dtype=float)
    if baseline not in ("blur", "mean") or maps.ndim != 3 or len(maps) != len(images):
        raise LoupeError(f"insertion_deletion: found baseline {baseline!r} and maps {maps.shape} for {len(images)} "
                         "images; expected 'blur' or 'mean', and one map (h, w) per image")
    model.eval()
    images, device = images.cpu(), device_of(model)
    n, (h, w), side = len(maps), maps.shape[1:], min(images.shape[-2:])
    sigma = side / 14
    empty = gaussian_blur(images, 2 * int(2 * sigma) + 1, sigma) if baseline == "blur" else torch.zeros_like(images)
    cells = np.random.default_rng(seed).permuted(np.tile(np.arange(h * w), (n, 1)), axis=1)
    highest_first = np.argsort(-np.take_along_axis(maps.reshape(n, -1), cells, 1), 1, kind="stable")
    order = np.argsort(np.take_along_axis(cells, highest_first, 1), 1)  # cell -> its turn
    order = torch.as_tensor(order).view(n, 1, h, w)

    def probabilities(pictures):
        return torch.cat([model(part.to(device)).softmax(1).cpu() for part in pictures.split(64)])

    full = probabilities(images)
    classes = (full.argmax(1) if target is None else torch.as_tensor(target).cpu().expand(n))[:, None]
    ends = [found.gather(1, classes)[:, 0] for found in (probabilities(empty), full)]
    curves = {"insertion": [ends[0]], "deletion": [ends[1]]}
    for count in np.linspace(0, h * w, steps + 1).round()[1:-1]:
        turned = F.interpolate((order < count).float(), images.shape[-2:], mode="nearest").bool()
        for name, inside, outside in (("insertion", images, empty), ("deletion", empty, images)):
            curves[name].append(probabilities(torch.where(turned, inside, outside)).gather(1, classes)[:, 0])
    curves["insertion"].append(ends[1])
    curves["deletion"].append(ends[0])
    return {name: torch.trapezoid(torch.stack(curve), dim=0).div(steps).double().numpy()
            for name, curve in curves.items()}


LAYERS = {"head": "backbone.head", "last_stage": "backbone.layers.3", "all": ""}


def randomisation(model: nn.Module, images: torch.Tensor, method: str = "mask",
                  target: int | Sequence[int] | torch.Tensor | None = None, layers: Mapping[str, str] | None = None,
                  seed: int = 0, **options: Any) -> dict[str, np.ndarray]:
    """Does the map change when the model loses what it has learned (Adebayo et al. 2018)?

    Layers are randomised one after another, from the classifier down, each in addition to those before: the values of
    each of their parameter tensors are shuffled, so that the scale stays. Signed maps count by their absolute values.
    The model itself is not changed: the test works on a copy, on the model's device.

    Args:
        images: `(N, 3, H, W)`, normalised, on any device.
        method: of `explain`.
        target: class or classes to explain throughout; None takes those predicted before.
        layers: name -> dotted name of a module, "" for the whole model; None means `LAYERS`, a Swin's.
        seed: of the shuffled weights.
        options: for `explain`.

    Returns:
        For each of the layers the `rank_correlation` `(N,)` of the map with the map before; and, as "another", that
        of the map before with another image's. A map that stays above that still depends on its image.

    Raises:
        LoupeError: the model lacks one of the layers.
    """
    layers, forgetful = layers or LAYERS, deepcopy(model).eval()
    if lacking := [name for name in layers.values() if name and name not in dict(model.named_modules())]:
        raise LoupeError(f"layers: found {lacking[0]!r}; expected modules of this {type(model).__name__}, such as "
                         f"{[name for name, _ in model.named_modules()][-1]!r}")
    if target is None:
        with torch.no_grad():
            target = forgetful(images.to(device_of(model))).argmax(1)

    def maps_now():
        return on_grid(explain(forgetful, images, method, target, **options).abs())

    before, draws = maps_now(), torch.Generator().manual_seed(seed)
    found = {}
    for name, module in layers.items():
        with torch.no_grad():
            for weight in forgetful.get_submodule(module).parameters():
                weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=draws)].view_as(weight))
        found[name] = rank_correlation(before, maps_now())
    return found | {"another": rank_correlation(before, np.roll(before, len(before) // 2, axis=0))}


def _localisation(map_, scene) -> dict[str, float]:
    sample, on = scene.sample, np.asarray(scene.object, dtype=bool)
    geometry, nan = sample.geometry, math.nan
    heatmap = mask_to_original(map_, geometry)
    seen, total = np.isfinite(heatmap), np.nansum(heatmap)
    found = dict.fromkeys(LOCALISATION, nan) | dict(pointing=peak_on(map_, geometry, on))
    if total > 0:
        ring = map_[border_ring(*map_.shape)].sum() / map_.sum()
        found |= dict(energy=np.nansum(heatmap[on]) / total, ring=ring)
    object_, chosen = on & seen, highest(heatmap, (on & seen).sum() / seen.sum())
    both = chosen[object_].sum()
    found["iou"] = both / (chosen.sum() + object_.sum() - both) if object_.any() else nan
    if sample.parts is None or sample.box is None:
        return found
    parts = np.asarray(sample.parts, dtype=float)
    near = REACH * float(max(sample.box[2:]))
    x0, y0, x1, y1 = geometry.visible_box()
    shown = (parts[:, 2] > 0) & (x0 < parts[:, 0]) & (parts[:, 0] < x1) & (y0 < parts[:, 1]) & (parts[:, 1] < y1)
    if shown.any():
        points = parts[shown, :2]
        columns, rows = points.astype(int).T
        found["keypoints"] = highest(heatmap, TOP)[rows, columns].mean()
        if total > 0:
            rows, columns = (np.arange(side) + 0.5 for side in heatmap.shape)
            close = np.zeros(heatmap.shape, bool)
            for px, py in points:
                close |= (rows[:, None] - py) ** 2 + (columns - px) ** 2 <= near**2
            found["energy_parts"] = np.nansum(heatmap[close]) / total
    telling = [k for k in scene.telling if shown[k]]
    if telling:
        away = np.linalg.norm(peaks(map_, geometry)[:, None] - parts[telling, :2], axis=-1)  # (ties, parts)
        found["telling"] = (away.min(1) <= near).mean()
        ranks = [rank_of_part(map_, sample, k, on) for k in telling]
        found["rank"], found["rank_on_object"] = max(ranks, key=lambda rank: np.isfinite(rank[0]))
    return found


def _shifted(map_, rng) -> np.ndarray:
    turns = 4 if map_.shape[0] == map_.shape[1] else 2
    map_ = np.rot90(map_, rng.integers(turns) * (4 // turns))
    map_ = map_[:, ::-1] if rng.integers(2) else map_
    return np.roll(map_, tuple(rng.integers(side) for side in map_.shape), axis=(0, 1))


def _noise(map_, rng) -> np.ndarray:
    phases = np.exp(1j * np.angle(np.fft.fft2(rng.normal(size=map_.shape))))
    field = np.fft.ifft2(np.abs(np.fft.fft2(map_ - map_.mean())) * phases).real
    result = np.empty(map_.size)
    result[field.argsort(axis=None)] = np.sort(map_, axis=None)
    return result.reshape(map_.shape)
