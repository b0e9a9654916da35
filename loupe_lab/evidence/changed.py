"""Photographs that are changed in one place, to see on what an answer hangs: grey patches, and other backdrops.

Each change has a control that costs as much and should not matter: a patch of the same size off the object, and the
backdrop of another photograph of the same class.
"""


import numpy as np
import torch
from scipy import ndimage

from loupe_core.samples import Sample

GREY = (124, 116, 104)  # the mean colour of ImageNet


# --- patches, on the model's input ----------------------------------------------------------------------------------

def patch_places(sample: Sample, side: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Upper left corners (x, y) of `count` squares on keypoints of a photograph, and of as many off its box.

    Squares are whole inside the model input, so that all have the same area: one whose keypoint is near the border is
    moved inwards. Keypoints are drawn among the visible ones, places off the box among all in which a square does not
    touch it; again and again where there are fewer.

    Args:
        sample: With geometry, parts and box.
        side: Of a square, px of the model input.

    Returns:
        Two `(count, 2)`; both empty where no keypoint is in view or no square fits beside the box.
    """
    h, w = sample.geometry.input_size
    parts = np.asarray(sample.parts, dtype=float)
    points = sample.geometry.to_input(parts[parts[:, 2] > 0, :2])
    points = points[((points >= 0) & (points < (w, h))).all(1)]
    left, top, right, bottom = box_in_input(sample)
    rows, columns = np.indices((h - side + 1, w - side + 1))
    off = (columns + side <= left) | (columns >= right) | (rows + side <= top) | (rows >= bottom)
    if not len(points) or not off.any():
        return np.empty((0, 2), int), np.empty((0, 2), int)
    on = np.clip(np.floor(points - side / 2 + 0.5), 0, (w - side, h - side)).astype(int)
    beside = np.argwhere(off)[:, ::-1]
    return on[_drawn(len(on), count, rng)], beside[_drawn(len(beside), count, rng)]


def box_in_input(sample: Sample) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a sample's box, px of the model input; it may reach beyond it."""
    x, y, width, height = (float(v) for v in sample.box)
    (x0, y0), (x1, y1) = sample.geometry.to_input([[x, y], [x + width, y + height]])
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def patched(image: torch.Tensor, corners: np.ndarray, side: int) -> torch.Tensor:
    """Copies of an image `(C, H, W)`, normalised, each with one square of the mean colour: `(len(corners), C, H, W)`.

    A fourth channel, the mask of an oracle, stays as it is.
    """
    copies = image[None].repeat(len(corners), 1, 1, 1)
    for copy, (x, y) in zip(copies, corners):
        copy[:3, y : y + side, x : x + side] = 0
    return copies


def _drawn(there: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.permutation(there) for _ in range(-(-count // there))])[:count]


# --- backdrops, on the photograph -----------------------------------------------------------------------------------

def on_backdrop(pixels: np.ndarray, object_: np.ndarray, backdrop: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The object of one photograph on the backdrop of another: RGB uint8 of the first one's size.

    The other photograph is brought to that size; its own object is painted over with the colour of the nearest pixel
    beside it.

    Args:
        pixels, backdrop: `(H, W, 3)` uint8, of any two sizes.
        object_, other: Their objects, `(H, W)` bool.
    """
    height, width = object_.shape
    bare = without(backdrop, other)
    rows, columns = (np.arange(n) * side // n for n, side in zip((height, width), other.shape))
    return np.where(object_[..., None], pixels, bare[np.ix_(rows, columns)])


def without(pixels: np.ndarray, object_: np.ndarray) -> np.ndarray:
    """A photograph without its object: there the colour of the nearest pixel that is not object, a few px away from
    it, since an outline by threshold leaves a rim."""
    around = ndimage.binary_dilation(object_, iterations=3)
    if around.all():
        return np.full_like(pixels, GREY)
    rows, columns = ndimage.distance_transform_edt(around, return_distances=False, return_indices=True)
    return pixels[rows, columns]


def greyed(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A photograph that is grey, `GREY`, where `where`, `(H, W)` bool, is True."""
    return np.where(where[..., None], np.uint8(GREY), pixels)


def partners(labels: np.ndarray, same: bool, rng: np.random.Generator) -> np.ndarray:
    """For each photograph another one, of its own class or of another, `(N,)`; -1 where there is none.

    Args:
        labels: `(N,)`.
    """
    found = np.full(len(labels), -1)
    for i, label in enumerate(labels):
        others = np.flatnonzero((labels == label) == same)
        others = others[others != i]
        if len(others):
            found[i] = rng.choice(others)
    return found
