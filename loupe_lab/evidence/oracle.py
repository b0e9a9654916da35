"""Masks and crops that are given the answer: a positive control, which shows whether a gate could have helped.

Where an image's object lies is told by its annotations. It becomes the mask of a gate, `tell` and `Painted`, or the
photograph is cut to it before anything else, `Cut`. `Told` gives both a data set's whole samples.
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
from torch.utils.data import Dataset

from loupe_core.datasets import Transform
from loupe_core.errors import LoupeError
from loupe_core.geometry import Geometry
from loupe_core.model import LoupeModel
from loupe_core.samples import Sample

# Where the answer is: (sample with its photograph, x (W,), y (H,) in the photograph's pixels) -> (H, W) in [0, 1]
Region = Callable[[Sample, np.ndarray, np.ndarray], np.ndarray]
# (sample with its photograph) -> x, y, width, height of the answer, in its pixels
Box = Callable[[Sample], tuple[float, float, float, float]]


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


def box_of(sample: Sample) -> tuple[float, float, float, float]:
    """`Box`: the sample's own. Raises LoupeError where it has none."""
    if sample.box is None:
        raise LoupeError(f"{sample.path}: found no box, expected a set with bounding_boxes.txt of CUB-200-2011")
    return tuple(sample.box.tolist())


def wings_box(sample: Sample) -> tuple[float, float, float, float]:
    """`Box`: the least one around what `wings` finds; the whole photograph where that is nothing."""
    found = wings(np.asarray(sample.image))
    if not found.any():
        return 0.0, 0.0, float(sample.image.width), float(sample.image.height)
    down, across = (slices for slices in ndimage.find_objects(found.astype(int))[0])
    return float(across.start), float(down.start), float(across.stop - across.start), float(down.stop - down.start)


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


@dataclass(frozen=True)
class Cut:
    """For `Told`: the photograph is cut to a square around its box, with a margin, and then transformed.

    The square is as wide as the box's longer side and a `margin` of it on both sides. At a border of the photograph it
    is moved inwards; it is cut short where the photograph is smaller. Sample and geometry stay those of the photograph.
    """

    transform: Transform
    box: Box = box_of
    margin: float = 0.1

    def __call__(self, sample: Sample) -> Sample:
        x, y, width, height = self.box(sample)
        (W, H), side = sample.image.size, (1 + 2 * self.margin) * max(width, height)
        (left, across), (top, down) = (_within(first + length / 2, side, whole) for first, length, whole in
                                       ((x, width, W), (y, height, H)))
        image, geometry = self.transform(sample.image.crop((left, top, left + across, top + down)))
        if geometry is not None:
            (sy, sx), (oy, ox) = geometry.scale, geometry.offset
            geometry = replace(geometry, original_size=(H, W), offset=(oy + top * sy, ox + left * sx))
        return replace(sample, image=image, geometry=geometry)


def _within(centre: float, side: float, whole: int) -> tuple[int, int]:
    """First pixel and length of a stretch of a photograph's side that is `whole` pixels long."""
    length = max(min(round(side), whole), 1)
    return min(max(round(centre - length / 2), 0), whole - length), length


class Told(Dataset):
    """A data set of photographs, in which each sample as a whole goes through a transform, `Painted` or `Cut`.

    Args:
        dataset: Of `Sample`, with photographs: a `CUB200` or `PhotoFolder` without a transform.
        transform: sample with its photograph -> sample with a tensor.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Sample], Sample]) -> None:
        self.dataset, self.transform = dataset, transform
        self.labels, self.class_names, self.image_ids, self.cut = (
            getattr(dataset, name) for name in ("labels", "class_names", "image_ids", "cut"))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Sample:
        return self.transform(self.dataset[i])

    def identities(self) -> list[str]:
        """Those of its photographs."""
        return self.dataset.identities()


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
