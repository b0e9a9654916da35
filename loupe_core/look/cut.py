"""Photographs cut to a box before they become an input, and data sets whose whole samples go through a transform."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from loupe_core.datasets import Transform
from loupe_core.errors import LoupeError
from loupe_core.samples import Sample


class Box(NamedTuple):
    """A rectangle of a photograph, in its pixels."""

    x: float
    y: float
    width: float
    height: float


def box_of(sample: Sample) -> Box:
    """The sample's own box. Raises LoupeError where it has none."""
    if sample.box is None:
        raise LoupeError(f"{sample.path or 'a photograph by itself'}: found no box, expected a set with "
                         "bounding_boxes.txt of CUB-200-2011")
    return Box(*sample.box.tolist())


def around(box: Box, size: tuple[int, int], margin: float = 0.1, aspect: float = 1.0, smallest: float = 0.0) -> Box:
    """The stretch of a photograph to show for a box: the least rectangle of an aspect that holds it, with a margin.

    At a border of the photograph it is moved inwards; it is cut short where the photograph is smaller.

    Args:
        size: (W, H) of the photograph, px.
        margin: On each side, as a fraction of the rectangle's own.
        aspect: Width over height, such as the model input's.
        smallest: Least height of the rectangle and least width over `aspect`, px.

    Returns:
        Whole pixels, at least one a side.
    """
    height = max((1 + 2 * margin) * max(box.height, box.width / aspect), smallest)
    (x, width), (y, height) = (_within(first + length / 2, side, whole) for first, length, side, whole in
                               ((box.x, box.width, height * aspect, size[0]), (box.y, box.height, height, size[1])))
    return Box(x, y, width, height)


def _within(centre: float, side: float, whole: int) -> tuple[int, int]:
    """First pixel and length of a stretch of a photograph's side that is `whole` pixels long."""
    length = max(min(round(side), whole), 1)
    return min(max(round(centre - length / 2), 0), whole - length), length


def cut_to(image: Image.Image, shown: Box, transform: Transform) -> tuple:
    """A photograph cut to a rectangle of whole pixels, then transformed: the input, and its `Geometry`, if the
    transform keeps one, which leads back to the whole photograph."""
    part, geometry = transform(image.crop((shown.x, shown.y, shown.x + shown.width, shown.y + shown.height)))
    if geometry is not None:
        (sy, sx), (oy, ox) = geometry.scale, geometry.offset
        geometry = replace(geometry, original_size=(image.height, image.width),
                           offset=(oy + shown.y * sy, ox + shown.x * sx))
    return part, geometry


@dataclass(frozen=True)
class Cut:
    """For `Told`: the photograph is cut to a square around its box, with a margin, and then transformed.

    The square is as wide as the box's longer side and a `margin` of it on both sides, see `around`. Sample and geometry
    stay those of the photograph.

    Args:
        box: (sample with its photograph) -> `Box`.
    """

    transform: Transform
    box: Callable[[Sample], Box] = box_of
    margin: float = 0.1

    def __call__(self, sample: Sample) -> Sample:
        shown = around(Box(*self.box(sample)), sample.image.size, self.margin)
        image, geometry = cut_to(sample.image, shown, self.transform)
        return replace(sample, image=image, geometry=geometry)


class Told(Dataset):
    """A data set of photographs, in which each sample as a whole goes through a transform, such as `Cut`.

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
