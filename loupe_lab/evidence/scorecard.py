"""How well a mask or another heatmap points at what is known, and at what counts: scores that chance cannot fool.

Two kinds. `place` asks where a map is high: on the object, at its parts, at the part that tells its class. `faithful`
and `randomisation` ask whether that is what the model's answer hangs on. A blurry map, or one that merely knows that
birds sit in the middle, scores well in most of them (ROAR and ROAD reward blur: arXiv 2304.13836). So each score comes
with those of null maps (`null_maps`), which have the map's own values in other places; what counts is the difference.
scripts/record/grids_scorecard.py does all of it for the methods of `explain`.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from loupe_core.datasets import Sample
from loupe_core.errors import LoupeError
from loupe_core.geometry import Geometry
from loupe_core.heatmap import mask_to_original, peak
from loupe_lab.evidence.explain import explain

NULLS = ("another", "moved", "noise")
PLACES = ("pointing", "energy", "iou", "keypoints", "energy_parts", "telling", "rank", "rank_on_object", "ring")
CURVES = ("insertion", "deletion")
CELLS = 14  # a side of the grid on which maps are compared: that of the mask after stage 2 of swin_micro, 8 px a cell
REACH = 0.1  # of the longer side of the box: as near to a part counts as at it (PCK at 0.1, Yang and Ramanan 2013)
TOP = 0.1  # of what the model saw: the highest pixels, among which a part is looked for


def rank_at(mask, cell: tuple[int, int], within=None) -> float:
    """Where the value at one cell stands among the values of all cells: 1 the highest, 0.5 what chance gives, 0 the
    lowest. Ties count half. Any monotone change of the mask leaves it as it is.

    Args:
        mask: (H, W) array.
        cell: (row, column).
        within: (H, W) bool, the cells to compare with (the bird's, say); None means all.
    """
    mask = np.asarray(mask, dtype=float)
    others = np.ones(mask.shape, bool) if within is None else np.array(within, bool)
    others[cell] = False
    if not others.any():
        return float("nan")
    values = mask[others]
    return float((values < mask[cell]).mean() + 0.5 * (values == mask[cell]).mean())


def on_object(segmentation, geometry: Geometry, shape: tuple[int, int]) -> np.ndarray:
    """Cells of a map over the model input whose centre lies on the object: `shape` (h, w), of the segmentation's dtype.

    Args:
        segmentation: (height, width) over the photograph.
    """
    rows, columns = np.indices(shape)
    centres = (np.stack([columns, rows], -1) + 0.5) * (np.array(geometry.input_size) / shape)[::-1]
    px = geometry.to_original(centres).astype(int)
    return np.asarray(segmentation)[px[..., 1], px[..., 0]]


def rank_of_part(mask, sample: Sample, part: int, segmentation=None) -> tuple[float, float]:
    """`rank_at` the cell that shows a part: among all cells, and among the cells whose centre lies on the bird.

    Args:
        mask: (H, W) over the model input.
        sample: with its parts and its geometry.
        part: index into the sample's 15 parts, counted from 0.
        segmentation: (height, width) bool over the photograph; without one the second rank is nan.

    Returns:
        Two ranks; nan where the part is not visible in the photograph or lies outside of the model input.
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


@dataclass
class Scene:
    """An image with what is known of it.

    Args:
        sample: with its geometry; its parts and its box, or neither.
        object: (height, width) bool over the photograph, True on the object.
        telling: indices of the parts that tell its class from its neighbours (two where there are two wings), or ().
    """

    sample: Sample
    object: np.ndarray
    telling: tuple[int, ...] = ()


def on_grid(maps: torch.Tensor, cells: int = CELLS) -> np.ndarray:
    """Maps (N, h, w) on cells x cells, float64, so that they can be compared: finer ones averaged in each cell, coarser
    ones read between their cells."""
    maps = torch.as_tensor(maps, dtype=torch.float64)[:, None]
    if maps.shape[-1] >= cells:
        return F.adaptive_avg_pool2d(maps, cells)[:, 0].numpy()
    return F.interpolate(maps, (cells, cells), mode="bilinear")[:, 0].numpy()


def null_maps(maps, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Maps (N, h, w) that know nothing of their image, and match the given ones in all else.

    Args:
        maps: (N, h, w), two or more of them.
        kind: "another": the map of another image of the set, which keeps where such maps are high on average;
            "moved": the same map, turned, mirrored and moved around the borders, which keeps its shapes;
            "noise": the same values and, nearly, the same spectrum with random phases, which keeps area and blur alone.
        rng: that the places are drawn from.

    Raises:
        LoupeError: the kind is unknown, or there is a single map and no other to take.
    """
    maps = np.asarray(maps, dtype=float)
    if kind not in NULLS or len(maps) < 2:
        raise LoupeError(f"null_maps: found kind {kind!r} and {len(maps)} map(s); expected one of {', '.join(NULLS)}, "
                         "and two maps or more")
    if kind == "another":
        return np.roll(maps, rng.integers(1, len(maps)), axis=0)
    return np.stack([(_moved if kind == "moved" else _noise)(map_, rng) for map_ in maps])


def centre_prior(h: int = CELLS, w: int = CELLS) -> np.ndarray:
    """(h, w): a Gaussian in the middle of the image; half of a side is two deviations. The guess to beat."""
    y, x = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)
    return np.exp(-2 * (x**2 + y**2))


def highest(heatmap, area: float) -> np.ndarray:
    """The highest `area` of the seen pixels: (H, W) in [0, 1], 1 in, 0 out. Pixels that tie for the last places share
    them, as if lots were drawn; so an even map is `area` everywhere. NaN, where nothing was seen, is out."""
    heatmap = np.asarray(heatmap, dtype=float)
    seen = np.isfinite(heatmap)
    values = heatmap[seen]
    values = np.round(values / max(np.abs(values).max(), np.finfo(float).tiny), 9)  # interpolation parts ties by 1e-16
    places, result = area * values.size, np.zeros(heatmap.shape)
    last = np.partition(values, -max(math.ceil(places), 1))[-max(math.ceil(places), 1)]
    above, tied = values > last, values == last
    result[seen] = above + tied * np.clip((places - above.sum()) / tied.sum(), 0, 1)
    return result


def place(maps, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Where maps are high, by what is known of their images. In the photograph's pixels; one value an image, in [0, 1].

    - pointing: the peak lies on the object (Zhang et al. 2018).
    - energy: the share of the map's sum that lies on the object.
    - iou: intersection over union of the object and as many of the highest pixels (see `highest`).
    - keypoints: the share of the visible parts that are among the highest tenth of the seen pixels.
    - energy_parts: the share of the sum that lies near a visible part: within a tenth of the box's longer side.
    - telling: the peak lies as near to the telling part.
    - rank, rank_on_object: `rank_of_part` of the telling part among all cells, and among the object's.
    - ring: the share of the sum in the outermost cells of the model input, 52 of 14 x 14.

    nan where it cannot be told: no parts, the telling part hidden or cut off, a map of zeros. What was cropped away
    does not count.

    Args:
        maps: (N, h, w) over the model inputs, not negative: absolute values of signed maps.
        scenes: N of them.

    Raises:
        LoupeError: another number of maps than scenes, or negative values.
    """
    maps = np.asarray(maps, dtype=float)
    if maps.ndim != 3 or len(maps) != len(scenes) or maps.min() < 0:
        raise LoupeError(f"maps: found shape {maps.shape} and least value {maps.min():.3g} for {len(scenes)} scenes; "
                         "expected (N, h, w) for N scenes, not negative (take absolute values of signed maps)")
    rows = [_place(map_, scene) for map_, scene in zip(maps, scenes)]
    return {name: np.array([row[name] for row in rows], dtype=float) for name in PLACES}


@torch.no_grad()
def faithful(model: nn.Module, images: torch.Tensor, maps, target=None, steps: int = 14, baseline: str = "blur",
             seed: int = 0) -> dict[str, np.ndarray]:
    """Does the answer hang on what the map shows? Insertion and deletion (Petsiuk et al. 2018), one value an image.

    Insertion begins with the baseline and puts the image back, cell by cell, the map's highest first; deletion takes
    the cells away in the same order. Each value is the area under the probability of `target`: of insertion a high
    one, of deletion a low one speaks for the map. Cells that tie come in a random order.

    Args:
        images: (N, 3, H, W), normalised. maps: (N, h, w), any sign.
        target: class or classes; None takes the predicted ones.
        steps: into which all cells are divided.
        baseline: "blur", the image blurred by a 14th of its side, or "mean", the mean colour.

    Returns:
        The areas of insertion and of deletion, two arrays (N,).

    Raises:
        LoupeError: the baseline is unknown, or another number of maps than images.
    """
    maps = np.asarray(maps, dtype=float)
    if baseline not in ("blur", "mean") or maps.ndim != 3 or len(maps) != len(images):
        raise LoupeError(f"faithful: found baseline {baseline!r} and maps {maps.shape} for {len(images)} images; "
                         "expected 'blur' or 'mean', and one map (h, w) an image")
    model.eval()
    n, (h, w), side = len(maps), maps.shape[1:], min(images.shape[-2:])
    sigma = side / 14
    empty = gaussian_blur(images, 2 * int(2 * sigma) + 1, sigma) if baseline == "blur" else torch.zeros_like(images)
    lots = np.random.default_rng(seed).permuted(np.tile(np.arange(h * w), (n, 1)), axis=1)
    by_lot = np.argsort(-np.take_along_axis(maps.reshape(n, -1), lots, 1), 1, kind="stable")
    order = torch.as_tensor(np.argsort(np.take_along_axis(lots, by_lot, 1), 1)).view(n, 1, h, w)  # cell -> its turn

    def probabilities(pictures):
        return torch.cat([model(part).softmax(1) for part in pictures.split(64)])

    full = probabilities(images)
    classes = (full.argmax(1) if target is None else torch.as_tensor(target).expand(n))[:, None]
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


def likeness(maps, others) -> np.ndarray:
    """Spearman's rank correlation of each map with its other, (N, h, w) twice -> (N,); nan where a map is even."""
    a, b = (rankdata(np.asarray(m, dtype=float).reshape(len(m), -1), axis=1) for m in (maps, others))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    spread = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), spread, out=np.full(len(a), np.nan), where=spread > 0)


LAYERS = {"head": "backbone.head", "last_stage": "backbone.layers.3", "all": ""}


def randomisation(model: nn.Module, images: torch.Tensor, method: str = "mask", target=None, layers=None, seed: int = 0,
                  **options) -> dict[str, np.ndarray]:
    """Does the map notice when the model forgets (Adebayo et al. 2018)? Its `likeness` to itself, one value an image,
    after layers lost what they had learned, from the top down and each on top of those before.

    A layer forgets by dealing the values of each of its weights to other places, so that their scale stays. Signed maps
    count by their absolute values. The model itself is left alone.

    Args:
        target: class or classes to explain throughout; None takes those predicted before.
        layers: name -> module, of which "" is the whole model; None means `LAYERS`, a Swin's.
        options: for `explain`.

    Returns:
        Likeness (N,) after each of the layers; and under "another" the likeness to the map of another image with all
        layers intact. A map that stays more alike than that still knows its image.

    Raises:
        LoupeError: a layer that the model lacks.
    """
    layers, forgetful = layers or LAYERS, deepcopy(model).eval()
    if lacking := [name for name in layers.values() if name and name not in dict(model.named_modules())]:
        raise LoupeError(f"layers: found {lacking[0]!r}, expected modules of this {type(model).__name__}, such as "
                         f"{[name for name, _ in model.named_modules()][-1]!r}")
    if target is None:
        with torch.no_grad():
            target = forgetful(images).argmax(1)

    def maps_now():
        return on_grid(explain(forgetful, images, method, target, **options).abs())

    before, draws = maps_now(), torch.Generator().manual_seed(seed)
    alike = {}
    for name, module in layers.items():
        with torch.no_grad():
            for weight in forgetful.get_submodule(module).parameters():
                weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=draws)].view_as(weight))
        alike[name] = likeness(before, maps_now())
    return alike | {"another": likeness(before, np.roll(before, len(before) // 2, axis=0))}


def _place(map_, scene) -> dict[str, float]:
    sample, on = scene.sample, np.asarray(scene.object, dtype=bool)
    geometry, nan = sample.geometry, math.nan
    heatmap = mask_to_original(map_, geometry)
    seen, total = np.isfinite(heatmap), np.nansum(heatmap)
    x, y = peak(map_, geometry)
    found = dict.fromkeys(PLACES, nan) | dict(pointing=on[int(y), int(x)])
    ring = np.ones(map_.shape, bool)
    ring[1:-1, 1:-1] = False
    if total > 0:
        found |= dict(energy=np.nansum(heatmap[on]) / total, ring=map_[ring].sum() / map_.sum())
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
        found["telling"] = any(np.hypot(*(parts[k, :2] - (x, y))) <= near for k in telling)
        ranks = [rank_of_part(map_, sample, k, on) for k in telling]
        found["rank"], found["rank_on_object"] = max(ranks, key=lambda rank: np.isfinite(rank[0]))
    return found


def _moved(map_, rng) -> np.ndarray:
    turns = 4 if map_.shape[0] == map_.shape[1] else 2
    map_ = np.rot90(map_, rng.integers(turns) * (4 // turns))
    map_ = map_[:, ::-1] if rng.integers(2) else map_
    return np.roll(map_, tuple(rng.integers(side) for side in map_.shape), axis=(0, 1))


def _noise(map_, rng) -> np.ndarray:
    phases = np.exp(1j * np.angle(np.fft.fft2(rng.normal(size=map_.shape))))
    field = np.fft.ifft2(np.abs(np.fft.fft2(map_ - map_.mean())) * phases).real
    dealt = np.empty(map_.size)
    dealt[field.argsort(axis=None)] = np.sort(map_, axis=None)
    return dealt.reshape(map_.shape)
