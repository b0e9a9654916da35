"""Where maps of photographs are high: on the object and near its keypoints, one value per photograph.

The numbers are those of `scorecard.localisation`, each beside what chance gives, or such that chance gives a half. All
are per photograph, so that maps can be compared over seeds and photographs at once (`statistics.paired_difference`).
"""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike

from loupe_core.heatmap import mask_to_original, peaks
from loupe_lab.evidence.scorecard import REACH, Scene, on_object, peak_on
from loupe_lab.evidence.statistics import auc

POINTING = ("peak", "share", "rank", "near")


def pointing(maps: ArrayLike, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Scores of maps, `(N,)` each, in [0, 1].

    - peak: whether the map peaks on the object, for ties the fraction of them that does (`peak_on`).
    - share: the fraction of the map's sum that lies on the object. A constant map has the object's share of the area
      that the model saw.
    - rank: that a cell on the object stands higher than one that is not, drawn at random, ties half: the area under
      the ROC curve of the cells. A constant map has 0.5 exactly.
    - near: whether the map peaks near a visible keypoint, within a tenth of the box's longer side, as the detectors of
      keypoints are scored (PCK at 0.1, Yang and Ramanan 2013); for ties as `peak`.

    nan where there is nothing to measure: a map of zeros, no keypoint in view, an object that covers no cell's centre
    or all.

    Args:
        maps: `(N, h, w)` over the model inputs, not negative.
        scenes: N of them.
    """
    rows = [_pointing(np.asarray(map_, dtype=float), scene) for map_, scene in zip(maps, scenes, strict=True)]
    return {name: np.array([row[name] for row in rows], dtype=float) for name in POINTING}


def feature_norm(features: torch.Tensor) -> torch.Tensor:
    """The length of the features in each cell: `(B, C, h, w)` -> `(B, h, w)`. A map that needs no gate."""
    return features.float().norm(dim=1)


def _pointing(map_, scene) -> dict[str, float]:
    on = on_object(scene.object, scene.sample.geometry, map_.shape).astype(bool)
    return dict(peak=peak_on(map_, scene.sample.geometry, scene.object), share=_share(map_, scene), rank=auc(map_, on),
                near=_near(map_, scene))


def _share(map_, scene) -> float:
    heatmap = mask_to_original(map_, scene.sample.geometry)
    total = np.nansum(heatmap)
    return float(np.nansum(heatmap[np.asarray(scene.object, dtype=bool)]) / total) if total > 0 else math.nan


def _near(map_, scene) -> float:
    sample = scene.sample
    if sample.parts is None or sample.box is None:
        return math.nan
    parts, (x0, y0, x1, y1) = np.asarray(sample.parts, dtype=float), sample.geometry.visible_box()
    x, y, visible = parts.T
    shown = parts[(visible > 0) & (x0 < x) & (x < x1) & (y0 < y) & (y < y1), :2]
    if not len(shown):
        return math.nan
    away = np.linalg.norm(peaks(map_, sample.geometry)[:, None] - shown, axis=-1).min(1)
    return float((away <= REACH * float(max(sample.box[2:]))).mean())
