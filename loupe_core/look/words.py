"""A heatmap in words, for who cannot see it."""

from typing import Any

import numpy as np

from loupe_core.heatmap import as_array, is_flat, peaks


def alt_text(heatmap: Any, box: Any = None, name: str = "mask", size: tuple[int, int] | None = None) -> str:
    """The heatmap in words: its peak, the fraction of its sum in the box, the fraction of the photograph not seen.

    A heatmap that `is_flat` is said to be so, with its values, and has no peak.

    Next to the fraction in the box stands the box's fraction of the seen pixels, which a constant mask would have.

    Args:
        heatmap: (H, W) of the photograph, NaN where unseen.
        box: (x, y, width, height) in the photograph, or None.
        name: what the heatmap shows.
        size: (H, W) of the photograph, where the heatmap has only some of its rows and columns, evenly spread.
    """
    heatmap = as_array(heatmap)
    height, width = size or heatmap.shape
    text = f"{name[:1].upper()}{name[1:]} over a photograph of {width} by {height} pixels. "
    seen, flat = np.isfinite(heatmap), is_flat(heatmap)
    if flat:
        text += f"It is flat, from {np.nanmin(heatmap):.3f} to {np.nanmax(heatmap):.3f}: it does not say where"
    else:
        points = peaks(heatmap) * (width / heatmap.shape[1], height / heatmap.shape[0])
        x, y = points[0]
        row = ("top", "middle", "bottom")[min(int(3 * y / height), 2)]
        column = ("left", "centre", "right")[min(int(3 * x / width), 2)]
        text += f"Its peak is in the {row} {column}, at ({x:.0f}, {y:.0f})"
    if box is not None:
        left, top, w, h = (float(value) for value in box)
        down, across = ((np.arange(n) + 0.5) * (side / n) for n, side in zip(heatmap.shape, (height, width)))
        inside = ((down >= top) & (down <= top + h))[:, None] & ((across >= left) & (across <= left + w))
        total = np.nansum(heatmap)
        fraction = np.nansum(heatmap[inside]) / total if total > 0 else 0.0
        area = inside[seen].mean()
        if not flat:
            hits = ((points >= (left, top)) & (points <= (left + w, top + h))).all(1)
            text += f", {'inside' if hits.all() else 'partly inside' if hits.any() else 'outside'} the box"
        text += ". "
        text += f"{fraction:.0%} of the {name} lies in the box, which covers {area:.0%} of what the model saw"
    if not seen.all():
        text += f". {1 - seen.mean():.0%} of the photograph was cropped away, shown in grey"
    return text + "."
