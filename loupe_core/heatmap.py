"""A mask back on its photograph: the right pixels, and a picture.

A heatmap is an array (H, W) of the photograph's own size, NaN where the model saw nothing.
"""

from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from loupe_core.errors import LoupeError
from loupe_core.geometry import Geometry

STRIP = 256  # rows that are coloured at a time
FLAT = 0.1  # a map whose highest value is less than a tenth above its lowest says little about where


def mask_to_original(mask: Any, geometry: Geometry | None, rows: range | None = None,
                     columns: range | None = None) -> np.ndarray:
    """Undo flip, crop and resize: a mask over the model input -> a heatmap (H, W) of the photograph, float64.

    Bilinear between the centres of the mask's cells (align_corners=False), constant beyond the outer centres.

    Args:
        mask: (H, W) values over the whole model input; leading axes of length 1 are dropped. (Where a Swin padded an
            odd grid, as for a gate after stage 4 at 112 px, the last cells reach beyond the input: take the mask from
            `explain(model, images, "mask")`, which is cut where the input ends.)
        geometry: of the sample.
        rows, columns: only these of the photograph, such as a strip of a large one, or every tenth.

    Raises:
        LoupeError: another shape, no geometry, or one by which the model saw no whole pixel.
    """
    if geometry is None:
        raise LoupeError("geometry: found None (RandAugment keeps none), expected one; use EvalTransform")
    mask = as_array(mask)
    height, width = geometry.original_size
    # neither resize nor crop mixes x and y, so bilinear interpolation is one matrix for each
    centres = np.zeros((max(height, width), 2)) + np.arange(max(height, width))[:, None] + 0.5
    x, y = geometry.to_input(centres).T
    x, y = x[:width], y[:height]
    if not (_inside(x, geometry.input_size[1]).any() and _inside(y, geometry.input_size[0]).any()):
        x0, y0, x1, y1 = geometry.visible_box()
        raise LoupeError(f"geometry: the model saw {x1 - x0:.2f} x {y1 - y0:.2f} px of a photograph of {width} x "
                         f"{height} px, and so the centre of none; expected a larger photograph")
    x, y = (values if only is None else values[only] for values, only in ((x, columns), (y, rows)))
    heatmap = _weights(y, mask.shape[0], geometry.input_size[0]) @ mask
    heatmap = heatmap @ _weights(x, mask.shape[1], geometry.input_size[1]).T
    heatmap[~_inside(y, geometry.input_size[0])] = np.nan
    heatmap[:, ~_inside(x, geometry.input_size[1])] = np.nan
    return heatmap


def peaks(heatmap: Any, geometry: Geometry | None = None) -> np.ndarray:
    """The centres of all cells that tie for the maximum, in the photograph, in reading order: (K, 2) of (x, y).

    A score of the maximum is a mean over them: what breaking the tie at random gives on average. So a constant map hits
    an object as often as its area says.

    Args:
        heatmap: (H, W) of the photograph; or, with a geometry, the mask itself, which gives the exact cells:
            a heatmap is flat from the centre of an outer cell to the edge.

    Raises:
        LoupeError: another shape, or no finite value.
    """
    values = as_array(heatmap)
    highest = np.nanmax(values)
    points = np.argwhere(highest - values <= 1e-9 * abs(highest))[:, ::-1] + 0.5  # interpolation parts ties by 1e-16
    if geometry is None:
        return points
    h, w = values.shape
    return geometry.to_original(points * (geometry.input_size[1] / w, geometry.input_size[0] / h))


def peak(heatmap: Any, geometry: Geometry | None = None) -> tuple[float, float]:
    """(x, y) of the maximum in the photograph, for a mark in a picture: the first of `peaks`, with its arguments."""
    x, y = peaks(heatmap, geometry)[0]
    return float(x), float(y)


def contour_level(heatmap: Any, percentile: float) -> float:
    """The value below which `percentile` percent of the seen pixels lie; LoupeError outside of [0, 100]."""
    if not 0 <= percentile <= 100:
        raise LoupeError(f"percentile: found {percentile}, expected a number in [0, 100]")
    return float(np.nanpercentile(as_array(heatmap), percentile))


def overlay(image: Image.Image | np.ndarray, heatmap: Any, alpha: float = 0.5,
            limits: tuple[float, float] | None = None) -> np.ndarray:
    """Colour the photograph by the heatmap, in viridis, which is perceptually uniform -> uint8 (H, W, 3).

    What the model did not see is grey and dimmed.

    Args:
        image: the photograph, RGB, 8 bit.
        heatmap: (H, W) of the same size, NaN where unseen.
        alpha: weight of the colour in [0, 1].
        limits: values of the first and the last colour; by default the heatmap's own least and largest. Give
            them to compare pictures.

    Raises:
        LoupeError: sizes that differ, or an alpha out of range.
    """
    photograph = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    heatmap = as_array(heatmap, unseen=limits is not None)  # a strip beside the crop
    if photograph.shape != (*heatmap.shape, 3) or photograph.dtype != np.uint8:
        found = f"{photograph.dtype} {photograph.shape} for a heatmap {heatmap.shape}"
        raise LoupeError(f"image: found {found}, expected uint8 (H, W, 3) of one size; see mask_to_original")
    if not 0 <= alpha <= 1:
        raise LoupeError(f"alpha: found {alpha}, expected a weight in [0, 1]")
    low, high = limits or (float(np.nanmin(heatmap)), float(np.nanmax(heatmap)))
    picture = np.empty_like(photograph)
    for top in range(0, len(heatmap), STRIP):  # all at once, 60 megapixels would take 5 GB
        part, values = photograph[top : top + STRIP], heatmap[top : top + STRIP]
        seen = np.isfinite(values)
        scaled = (np.where(seen, values, low) - low) / max(high - low, np.finfo(float).tiny)
        colours = matplotlib.colormaps["viridis"](scaled)[..., :3] * 255
        # half of Rec. 601's luma, in whole numbers, so that explorer.js computes the same
        grey = part.astype(int) @ (299, 587, 114) // 2000
        coloured = np.where(seen[..., None], (1 - alpha) * part + alpha * colours, grey[..., None])
        picture[top : top + STRIP] = coloured.round()
    return picture


def is_flat(heatmap: Any) -> bool:
    """Whether the highest value is less than `FLAT` above the lowest, in its own size: it has no peak to speak of."""
    values = as_array(heatmap)
    return bool(np.nanmax(values) - np.nanmin(values) <= FLAT * np.nanmax(np.abs(values)))


def _weights(positions: np.ndarray, cells: int, size: int) -> np.ndarray:
    """Positions (N,) along a side of `size` px -> the weights (N, cells) of linear interpolation."""
    positions = positions * (cells / size) - 0.5
    return np.stack([np.interp(positions, np.arange(cells), unit) for unit in np.eye(cells)], axis=1)


def _inside(positions: np.ndarray, size: int) -> np.ndarray:
    return (positions >= 0) & (positions <= size)


def as_array(values: Any, unseen: bool = False) -> np.ndarray:
    """A heatmap or one mask as (H, W) float64; one without a finite value is refused, unless `unseen`."""
    if torch.is_tensor(values):
        values = values.detach().cpu().float()
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 2 or values.size != values.shape[-1] * values.shape[-2]:
        raise LoupeError(f"mask: found an array of shape {values.shape}, expected (H, W): one mask at a time")
    if not unseen and not np.isfinite(values).any():
        raise LoupeError("mask: found no finite value, expected some; did the training diverge?")
    return values.reshape(values.shape[-2:])

