"""Arithmetic on masks and maps: the parts of a mask, its cells in another order, centre, border, correlations.

A mask is a tensor `(B, 1, h, w)`, as a gate makes it; maps are arrays `(N, h, w)`, one per image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from torch.nn.functional import avg_pool2d

from loupe_core.gate import Gate


def mean(mask: torch.Tensor) -> torch.Tensor:
    """Every cell the mean of the image's mask: `(B, 1, h, w)` -> the same shape."""
    return mask.mean((2, 3), keepdim=True).expand_as(mask)


def blocks(mask: torch.Tensor) -> torch.Tensor:
    """Every cell the mean of its 2 x 2 block, counted from the upper left as patch merging does.

    At a lower or right edge of odd length a block has the two cells, or the one, that are there.
    """
    h, w = mask.shape[2:]
    means = avg_pool2d(mask, 2, ceil_mode=True, count_include_pad=False)
    return means.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :h, :w]


def within(mask: torch.Tensor) -> torch.Tensor:
    """Only the ratios within each 2 x 2 block: M * mean of the image / mean of the block, so that all blocks have the
    same mean.

    Ratios, not differences, since LayerNorm passes on ratios. Values may exceed 1. A block of zeros has no ratios; its
    cells become the image's mean.
    """
    block = blocks(mask)
    return torch.where(block > 0, mask * mean(mask) / block.clamp_min(torch.finfo(mask.dtype).tiny), mean(mask))


def shuffle_cells(mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The cells of `(B, 1, h, w)` in another order: cell i, counted row by row, gets the value of cell `order[i]`.

    Args:
        order: `(B, h * w)`, a permutation per image, or `(h * w,)`, the same one for all.
    """
    cells = mask.flatten(1)  # (B, h * w)
    return cells.gather(1, order.to(mask.device).expand_as(cells)).view_as(mask)


@contextmanager
def replace_mask(gate: Gate, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within `with replace_mask(gate, change):` the gate uses `change(mask)` in place of its mask `(B, 1, h, w)`."""
    handle = gate.loupe.register_forward_hook(lambda module, inputs, mask: change(mask))
    try:
        yield
    finally:
        handle.remove()


def centre_gaussian(h: int, w: int, library: ModuleType = np) -> np.ndarray | torch.Tensor:
    """exp(-2 (x^2 + y^2)), `(h, w)`, with x and y from -1 to 1 between the borders: half a side is two deviations.

    Args:
        library: `numpy`, for an array of float64, or `torch`, for a tensor of torch's default type.
    """
    y, x = library.linspace(-1, 1, h)[:, None], library.linspace(-1, 1, w)
    return library.exp(-2 * (x**2 + y**2))


def border_ring(h: int, w: int) -> np.ndarray:
    """`(h, w)` bool, True in the outermost cells."""
    ring = np.ones((h, w), bool)
    ring[1:-1, 1:-1] = False
    return ring


def correlation(maps: ArrayLike, others: ArrayLike) -> np.ndarray:
    """Pearson's correlation of each map with its other, over the cells: `(N, h, w)` twice -> `(N,)`.

    nan where all cells of one of the two are equal.
    """
    a, b = (m.reshape(len(m), -1) - m.mean((1, 2))[:, None] for m in map(np.asarray, (maps, others)))
    spread = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), spread, out=np.full(len(a), np.nan, spread.dtype), where=spread > 0)


def rank_correlation(maps: ArrayLike, others: ArrayLike) -> np.ndarray:
    """Spearman's correlation, that of the ranks (ties get their mean rank); otherwise as `correlation`."""
    return correlation(*(rankdata(m.reshape(len(m), -1), axis=1).reshape(m.shape) for m in
                         map(np.asarray, (maps, others))))
