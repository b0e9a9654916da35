"""How well a mask or another heatmap points at what is known: scores that chance cannot fool."""

import math

import numpy as np

from loupe_core.datasets import Sample


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
    rows, columns = np.indices(mask.shape)
    centres = (np.stack([columns, rows], -1) + 0.5) * cell_size[::-1]
    px = geometry.to_original(centres).astype(int)
    return among_all, rank_at(mask, (row, column), np.asarray(segmentation)[px[..., 1], px[..., 0]])
