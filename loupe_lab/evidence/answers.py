"""What a model answers to each photograph, and what its mask does there: the rows of a table."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from loupe_core.files.atomic import write_whole
from loupe_core.geometry import Geometry
from loupe_core.heatmap import is_flat, peak
from loupe_core.model import LoupeModel
from loupe_core.sites import eval_mode
from loupe_lab.evidence.explain import explain

BATCH = 32  # photographs in memory at a time
MASK_COLUMNS = ("mask_mean", "mask_min", "mask_max", "mask_top_tenth", "peak_x", "peak_y")


def answers(model: LoupeModel, images: Sequence[torch.Tensor],
            site: str | None = None) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Class probabilities `(K,)` and mask `(h, w)` of each image `(C, H, W)`, in fp32; no mask without a gate.

    Args:
        images: one batch.
        site: whose gate, where the model has several.

    Raises:
        LoupeError: several gates and no `site`, or not this one.
    """
    x = torch.stack(list(images)).to(next(model.parameters()))
    with eval_mode(model), torch.inference_mode():
        probabilities = model(x).softmax(1).cpu().numpy()
    masks = explain(model, x, "mask", site=site).cpu().numpy() if model.sites else [None] * len(x)
    return list(zip(probabilities, masks))


def mask_columns(mask: np.ndarray | None, geometry: Geometry) -> dict[str, float | str]:
    """A mask `(h, w)` in numbers; empty without one.

    Its mean, least and largest value; the share of its sum in its highest tenth of cells, 0.1 for a constant mask; and
    its peak in pixels of the photograph, unless it `is_flat`.
    """
    if mask is None:
        return dict.fromkeys(MASK_COLUMNS, "")
    cells = np.sort(mask.ravel())[::-1].astype(float)
    tenth = cells.size / 10  # a part of a cell too, so that a constant mask has 0.1 exactly
    share = (cells[: int(tenth)].sum() + cells[int(tenth)] * (tenth % 1)) / max(cells.sum(), 1e-12)
    x, y = ("", "") if is_flat(mask) else (round(value, 1) for value in peak(mask, geometry))
    numbers = (cells.mean(), cells[-1], cells[0], share)
    return dict(zip(MASK_COLUMNS, (*(round(float(value), 4) for value in numbers), x, y)))


def write_table(file: str | Path, rows: Sequence[dict]) -> None:
    """Writes rows with the same keys as a CSV file in UTF-8, whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(file, text.getvalue())
