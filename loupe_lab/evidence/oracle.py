"""Masks and crops that are given the answer: a positive control, which shows whether a gate could have helped.

Where an image's object lies is told by its annotations. It becomes the mask of a gate, `tell` and `Painted`, or the
photograph is cut to it before anything else, `loupe_core.look.cut.Cut`. `Told` of the same file gives both a data set's
whole samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from loupe_core.datasets import Transform
from loupe_core.errors import LoupeError
from loupe_core.geometry import Geometry
from loupe_core.look.cut import Box, box_of
from loupe_core.model import LoupeModel
from loupe_core.samples import Sample

# Where the answer is: (sample with its photograph, x (W,), y (H,) in the photograph's pixels) -> (H, W) in [0, 1]
Region = Callable[[Sample, np.ndarray, np.ndarray], np.ndarray]


# --- where the answer is --------------------------------------------------------------------------------------------

def in_box(sample: Sample, x: np.ndarray, y: np.ndarray, soft: float = 0.1) -> np.ndarray:
    """`Region`: 1 in the sample's box; outside it falls to 0 within `soft` of the box's side, the root of its area."""
    left, top, width, height = box_of(sample)
    edge = max(soft * (width * height) ** 0.5, 1e-6)

    def along(v: np.ndarray, first: float, length: float) -> np.ndarray:
        return np.clip(1 - np.maximum(first - v, v - first - length) / edge, 0, 1)

    return np.minimum(along(y, top, height)[:, None], along(x, left, width))


def in_centre(sample: Sample, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`Region`: as `in_box`, but of a box that is told nothing: 0.6 of each side, in the middle of the photograph."""
    W, H = sample.image.size
    return in_box(replace(sample, box=torch.tensor([0.2 * W, 0.2 * H, 0.6 * W, 0.6 * H])), x, y)


def on_parts(sample: Sample, x: np.ndarray, y: np.ndarray, spread: float = 0.1) -> np.ndarray:
    """`Region`: the highest of a Gaussian on each visible part; `spread`, its deviation, in sides of the box."""
    _, _, width, height = box_of(sample)
    if sample.parts is None:
        raise LoupeError(f"{sample.path}: found no parts, expected a set with the folder parts/ of CUB-200-2011")
    deviation = spread * (width * height) ** 0.5
    found = np.zeros((len(y), len(x)))
    for part_x, part_y, visible in sample.parts.tolist():
        if visible:
            across, down = (np.exp(-0.5 * ((v - at) / deviation) ** 2) for v, at in ((x, part_x), (y, part_y)))
            np.maximum(found, down[:, None] * across, out=found)
    return found


def on_wings(sample: Sample, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`Region`: what `wings` finds, with an edge of a few pixels."""
    found = ndimage.gaussian_filter(wings(np.asarray(sample.image)).astype(np.float32), 2)
    rows, columns = (np.clip(v.astype(int), 0, side - 1) for v, side in zip((y, x), found.shape))
    return found[np.ix_(rows, columns)]


def wings_box(sample: Sample) -> Box:
    """The least one around what `wings` finds; the whole photograph where that is nothing."""
    found = wings(np.asarray(sample.image))
    if not found.any():
        return Box(0.0, 0.0, float(sample.image.width), float(sample.image.height))
    down, across = (slices for slices in ndimage.find_objects(found.astype(int))[0])
    return Box(float(across.start), float(down.start), float(across.stop - across.start),
               float(down.stop - down.start))


def wings(pixels: np.ndarray) -> np.ndarray:
    """The wings of a pinned butterfly: RGB `(H, W, 3)` uint8 of about 224 px a side -> `(H, W)` bool.

    By threshold: what is much darker than the backdrop, or reddish, without thin lines; of that, the convex hulls of
    the pieces, so that a wing's light bands belong to it. What touches the border (scale ball, ruler) is left out, what
    is small, and what fills a rectangle (label, colour chart).
    """
    light = pixels.mean(2)
    found = (light < 0.7 * np.median(light)) | (pixels[..., 0] > pixels[..., 1].astype(int) + 25)
    names, _ = ndimage.label(ndimage.binary_fill_holes(ndimage.binary_opening(found, iterations=2)))
    outermost = {*names[0], *names[-1], *names[:, 0], *names[:, -1]}
    kept = np.zeros(found.shape, bool)
    for name, where in enumerate(ndimage.find_objects(names), 1):
        piece = names[where] == name
        if name in outermost or piece.sum() < 0.004 * found.size:
            continue
        hull = _hull(piece)
        if hull.mean() < 0.86 or hull.sum() > 0.12 * found.size:  # an ellipse fills 0.79 of its rectangle
            kept[where] |= hull
    return ndimage.binary_dilation(kept)


def _hull(piece: np.ndarray) -> np.ndarray:
    """The convex hull of `(h, w)` bool, which has more than a line."""
    corners = np.argwhere(piece)[:, ::-1]
    corners = corners[ConvexHull(corners).vertices]
    drawn = Image.new("1", piece.shape[::-1])
    ImageDraw.Draw(drawn).polygon([tuple(corner) for corner in corners.tolist()], fill=1, outline=1)
    return np.asarray(drawn)


# --- on its way into the model --------------------------------------------------------------------------------------

def painted(region: Region, sample: Sample, geometry: Geometry) -> np.ndarray:
    """A region as the model sees the photograph, `(H, W)`: the value at the centre of each pixel of the input.

    Args:
        sample: With its photograph, as a data set without a transform gives it.
        geometry: How that photograph became the input.
    """
    h, w = geometry.input_size
    x = geometry.to_original(np.stack([np.arange(w) + 0.5, np.zeros(w)], 1))[:, 0]
    y = geometry.to_original(np.stack([np.zeros(h), np.arange(h) + 0.5], 1))[:, 1]
    return region(sample, x, y)


@dataclass(frozen=True)
class Painted:
    """For `Told`: an image `(3, H, W)` by its transform, and its mask as a fourth channel, for a model of `tell`.

    The mask is 1 where the region is 1, and `outside` where it is 0.

    Raises:
        LoupeError: The transform keeps no record of its geometry.
    """

    transform: Transform
    region: Region
    outside: float = 0.0

    def __call__(self, sample: Sample) -> Sample:
        image, geometry = self.transform(sample.image)
        if geometry is None:
            raise LoupeError("oracle: the transform keeps no geometry, as with RandAugment; expected augment='crop'")
        mask = self.outside + (1 - self.outside) * painted(self.region, sample, geometry)
        channel = torch.from_numpy(mask).to(image.dtype)
        return replace(sample, image=torch.cat([image, channel[None]]), geometry=geometry)


class ToldMask(nn.Module):
    """In place of `gate.loupe`: a mask that came with the images, see `tell`. It has no parameters.

    Shape:
        features `(B, C, h, w)` -> mask `(B, 1, h, w)`: means of the channel over the pixels of a cell.
    """

    told: Tensor | None = None  # (B, 1, H, W), of the images that are on their way through the model

    def forward(self, features: Tensor) -> Tensor:
        return adaptive_avg_pool2d(self.told, features.shape[2:])


def tell(model: LoupeModel) -> LoupeModel:
    """Gives all gates of a model the mask that comes with an image as its fourth channel; returns it, changed in place.

    It then takes images `(B, 4, H, W)` as `Painted` makes them; the backbone sees the first three channels. The gates
    multiply (or mix) as before.
    """
    mask = ToldMask()
    for gate in model.gates.values():
        gate.loupe = mask

    def take(module: nn.Module, inputs: tuple) -> tuple:
        channels = inputs[0].shape[1]
        if channels != model.in_chans + 1:
            raise LoupeError(f"oracle: found images of {channels} channels, expected {model.in_chans + 1}: those of the"
                             " photograph and its mask, see Painted")
        mask.told = inputs[0][:, -1:]
        return (inputs[0][:, :-1], *inputs[1:])

    model.register_forward_pre_hook(take)
    return model
