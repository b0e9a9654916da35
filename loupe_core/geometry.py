"""Photograph to model input, with the way back.

Points are (x, y) in continuous pixel coordinates: (0, 0) is the outer corner of the top left pixel, whose
centre is (0.5, 0.5). Sizes are (H, W). A photograph's own coordinates are those of the upright picture, after
any EXIF rotation, as `open_image` returns it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from loupe_core.augment import randaugment_of
from loupe_core.errors import LoupeError

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Geometry:
    """How a photograph became a model input: scale, then crop, then mirror.

    x_input = x * sx - ox, and W_input - x_input where flipped; the same for y, which is never flipped.
    """

    original_size: tuple[int, int]  # (H, W) of the upright photograph, px
    input_size: tuple[int, int]  # (H, W) of the model input, px
    scale: tuple[float, float]  # (sy, sx), input px per photograph px
    offset: tuple[float, float]  # (oy, ox), top left corner of the crop in the scaled photograph, px
    flipped: bool = False  # mirrored left to right

    def to_input(self, points: Any) -> np.ndarray:
        """Points (..., 2) of the photograph -> the same points in the model input, float64."""
        return self._flip(_as_points(points) * self.scale[::-1] - self.offset[::-1])

    def to_original(self, points: Any) -> np.ndarray:
        """Points (..., 2) of the model input -> the same points in the photograph, float64."""
        points = self._flip(_as_points(points))
        return (points + self.offset[::-1]) / self.scale[::-1]

    def visible_box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the photograph: the window that the model sees."""
        h, w = self.input_size
        corners = self.to_original([[0, 0], [w, h]])
        (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
        # rounding may leave the window's edge 1e-14 px outside the photograph
        height, width = self.original_size
        return max(float(x0), 0.0), max(float(y0), 0.0), min(float(x1), width), min(float(y1), height)

    def _flip(self, points: np.ndarray) -> np.ndarray:
        return points * (-1, 1) + (self.input_size[1], 0) if self.flipped else points


class EvalTransform:
    """Resize the shorter side to floor(size / crop_pct), crop the centre, normalise: timm's evaluation. Or, with
    `crop_mode` "border", resize the longer side and fill up with the mean colour, so that nothing is cut away.

    The pixels are timm's own; what is added is the `Geometry`.
    Call: RGB PIL image -> (tensor (C, H, W), Geometry).

    Args:
        input_size: (H, W) in px, or one number for a square.
        mean, std: per channel, for pixel values in [0, 1]: three values, or one for grey images (C = 1).
        crop_pct: fraction of the resized shorter side that is kept, in (0, 1].
        interpolation: one of `INTERPOLATIONS`.
        crop_mode: timm's "center", "squash" (both sides to their own size) or "border".

    Attributes: `raw`: give uint8, not normalised (False).

    Raises:
        LoupeError: a setting that is out of range, by name.
    """

    raw = False

    def __init__(self, input_size: int | tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...],
                 crop_pct: float = 0.875, interpolation: str = "bicubic", crop_mode: str = "center") -> None:
        self.input_size = _check_size(input_size)
        _check_interpolation(interpolation)
        self.mean, self.std, self.grey = list(mean), list(std), _is_grey(mean)
        if not 0 < crop_pct <= 1:
            raise LoupeError(f"crop_pct: found {crop_pct}, expected a fraction in (0, 1], such as 0.875")
        if crop_mode not in CROP_MODES:
            raise LoupeError(f"crop_mode: found {crop_mode!r}, expected one of {', '.join(CROP_MODES)}")
        pipeline = create_transform(self.input_size, is_training=False, interpolation=interpolation, mean=mean, std=std,
                                    crop_pct=crop_pct, crop_mode=crop_mode)
        self.resize, *self.crop, self.to_tensor, self.normalise = pipeline.transforms

    def __call__(self, image: Image.Image) -> tuple[Tensor, Geometry]:
        resized = self.resize(image.convert("L") if self.grey and image.mode == "RGB" else image)
        x = resized
        for step in self.crop:
            x = step(x)
        x = F.pil_to_tensor(x).contiguous() if self.raw else self.normalise(self.to_tensor(x))
        h, w = self.input_size
        # the two sides are rounded to whole pixels on their own, so their scales differ a little
        scale = (resized.height / image.height, resized.width / image.width)
        # torchvision's centre crop: whole pixels, halves rounded to even; where pixels are filled in, rounded down
        offset = tuple(float(round(more / 2) if more >= 0 else -(-more // 2))
                       for more in (resized.height - h, resized.width - w))
        return x, Geometry((image.height, image.width), self.input_size, scale, offset)


class TrainTransform:
    """Random resized crop, width / height from 3/4 to 4/3; mirror, one time in two; timm's RandAugment where asked.

    Call: RGB PIL image -> (tensor (C, H, W), Geometry). The geometry is None with RandAugment, which shears
    and rotates without leaving a record. Crop and mirror draw from torch's global generator, RandAugment from
    `random` and NumPy's global generator. DataLoader workers seed all three from torch's seed; without
    workers, seed all three yourself.

    Args:
        input_size, mean, std, interpolation: as in `EvalTransform`.
        scale: least and largest fraction of the photograph's area in the crop.
        randaugment: timm's description, such as "rand-m9-mstd0.5" (the paper's), or None.
        fast: resize with torch's 8 bit kernels, shear and shift with 4 taps a pixel, and smooth in whole numbers, in
            place of Pillow: the same random draws and geometry in about half the time. Pixels differ from Pillow's by
            at most 24 of 255 levels and 0.3 in an image's mean. Where RandAugment then equalises or cuts at a
            threshold, a few pixels differ by more, and an image's mean by up to 1. For bilinear and bicubic; the
            others stay with Pillow.

    Attributes: `raw`, as in `EvalTransform`.

    Raises:
        LoupeError: a setting that is out of range, by name.
    """

    raw = False

    def __init__(self, input_size: int | tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...],
                 interpolation: str = "bicubic", scale: tuple[float, float] = (0.08, 1.0),
                 randaugment: str | None = None, fast: bool = False) -> None:
        self.input_size = _check_size(input_size)
        self.interpolation = _check_interpolation(interpolation)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise LoupeError(f"scale: found {scale}, expected two fractions of the area with 0 < least <= largest <= 1")
        self.mean, self.std, self.scale, self.grey = list(mean), list(std), scale, _is_grey(mean)
        self.fast = fast and interpolation in ("bilinear", "bicubic")
        self.randaugment = None
        if randaugment is not None:
            fill = tuple(min(255, round(255 * value)) for value in (tuple(mean) * 3)[:3])  # what a shear leaves empty
            self.randaugment = randaugment_of(randaugment, min(self.input_size), fill, interpolation, fast)

    def __call__(self, image: Image.Image) -> tuple[Tensor, Geometry | None]:
        h, w = self.input_size
        if self.grey and image.mode == "RGB":
            image = image.convert("L").convert("RGB")  # three equal channels, of which one is left at the end
        top, left, height, width = RandomResizedCrop.get_params(image, list(self.scale), [3 / 4, 4 / 3])
        if self.fast:
            x = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
            x = x[None].permute(0, 3, 1, 2)  # channels last in memory, which the 8 bit kernel takes as it is
            x = interpolate(x, (h, w), mode=self.interpolation.value, antialias=True)[0]
        else:
            x = F.resized_crop(image, top, left, height, width, [h, w], self.interpolation)
        flipped = torch.rand(()).item() < 0.5
        if flipped:
            x = F.hflip(x)
        if self.randaugment is not None:
            geometry = None
            x = self.randaugment(Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) if self.fast else x)
        else:
            sy, sx = h / height, w / width
            geometry = Geometry((image.height, image.width), (h, w), (sy, sx), (top * sy, left * sx), flipped)
        if self.fast or self.raw:
            x = (x if torch.is_tensor(x) else F.pil_to_tensor(x))[: len(self.mean)]
            if self.raw:
                return x.contiguous(), geometry
            # one pass from 8 bit, channels last, to floats, channels first; to_tensor takes two
            x = x.to(torch.get_default_dtype(), memory_format=torch.contiguous_format)
            mean, std = (255 * torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
            return x.sub_(mean).div_(std), geometry
        return F.normalize(F.to_tensor(x)[: len(self.mean)], self.mean, self.std, inplace=True), geometry


def transforms_for(data_config: dict[str, Any], train: bool, **overrides: Any) -> EvalTransform | TrainTransform:
    """The transform that a model's `data_config` asks for: input_size, mean, std, interpolation, crop_pct.

    `overrides` replace or add arguments of `TrainTransform` (train=True) or `EvalTransform` (train=False).
    """
    settings = {name: data_config[name] for name in ("mean", "std", "interpolation")}
    settings["input_size"] = tuple(data_config["input_size"][-2:])
    if train:
        return TrainTransform(**settings | overrides)
    return EvalTransform(**settings | dict(crop_pct=data_config["crop_pct"]) | overrides)


def _as_points(points: Any) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.shape[-1:] != (2,):
        raise LoupeError(f"points: found an array of shape {points.shape}, expected (..., 2) with x, y last")
    return points


def _check_size(input_size: Any) -> tuple[int, int]:
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise LoupeError(f"input_size: found {input_size}, expected (H, W) in whole pixels, such as (224, 224)")
    return int(size[0]), int(size[1])


def _is_grey(mean: Any) -> bool:
    if len(mean) not in (1, 3):
        raise LoupeError(f"mean: found {len(mean)} values, but photographs have three channels, or one as grey images; "
                         "expected tensors from a data set of your own for a model of other channels")
    return len(mean) == 1


def _check_interpolation(interpolation: str) -> InterpolationMode:
    if interpolation not in INTERPOLATIONS:
        raise LoupeError(f"interpolation: found {interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
    return str_to_interp_mode(interpolation)
