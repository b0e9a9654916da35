"""timm's RandAugment, with quicker kernels for what takes longest in it."""

from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.transforms import str_to_pil_interp

from loupe_core.errors import LoupeError


def randaugment_of(description: str, side: int, fill: tuple[int, ...], interpolation: str, fast: bool) -> RandAugment:
    """timm's RandAugment: RGB PIL image -> another one, drawn from `random` and NumPy's global generator.

    Args:
        description: timm's, such as "rand-m9-mstd0.5".
        side: Shorter side of the images, px; they are shifted by at most 45 % of it.
        fill: RGB colour of what a shear leaves empty.
        interpolation: As for `TrainTransform`.
        fast: Use the quicker kernels where they exist (bicubic only); the draws stay the same.

    Raises:
        LoupeError: timm cannot read the description.
    """
    # Pillow resizes with more kernels than it shears and rotates with
    shears = interpolation if interpolation in ("nearest", "bilinear") else "bicubic"
    settings = dict(translate_const=int(side * 0.45), img_mean=fill, interpolation=str_to_pil_interp(shears))
    try:
        randaugment = rand_augment_transform(description, settings)
    except (AssertionError, ValueError):
        expected = "timm's description, such as 'rand-m9-mstd0.5'"
        raise LoupeError(f"randaugment: found {description!r}, expected {expected}") from None
    if fast and interpolation == "bicubic":
        for op in randaugment.ops:
            op.aug_fn = _QUICK.get(op.aug_fn, op.aug_fn)
    return randaugment


def _slide(image: Image.Image, shift: np.ndarray, fillcolor: tuple[int, int, int]) -> Image.Image:
    """Each row moved to the left by its own number of pixels, `shift` (H,): Pillow's bicubic transform, quicker.

    A shear and a shift along a row need 4 of the 16 pixels that Pillow weighs, and one set of weights per row. Values
    differ by at most 1 level, where Pillow's doubles and these floats round to either side.
    """
    w, h = image.size
    packed = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)  # one number per pixel: one gather for all channels
    whole = np.floor(shift)
    d = torch.from_numpy((shift - whole).astype(np.float32))[:, None]
    columns = (np.arange(-1, w + 2, dtype=np.int32) + whole.astype(np.int32)[:, None]).clip(0, w - 1)
    columns += np.arange(0, h * w, w, dtype=np.int32)[:, None]
    near = torch.from_numpy(packed.take(columns).view(np.uint8)).float()  # (H, 4 * (w + 3))
    x = near[:, : 4 * w] * (d * (-1 + d * (2 - d)))
    for k, weight in enumerate((1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1)), 1):
        x += near[:, 4 * k : 4 * (k + w)] * weight
    out = x.clamp_(0, 255).numpy().astype(np.uint8).view(np.uint32)  # which torch is slower in
    into = np.floor(shift + 0.5).astype(np.int32)[:, None]  # a centre falls into the pixel so many to the right
    column = np.arange(w, dtype=np.int32)
    np.copyto(out, np.frombuffer(bytes((*fillcolor, 255)), np.uint32), where=(column < -into) | (column >= w - into))
    return Image.frombytes("RGB", (w, h), out.data, "raw", "RGBX")


def _shear_x(image, factor, fillcolor, **_):
    return _slide(image, factor * (np.arange(image.height) + 0.5), fillcolor)


def _translate_x(image, fraction, fillcolor, **_):
    return _slide(image, np.full(image.height, fraction * image.width), fillcolor)


def _along_columns(function, image, amount, **options):
    turn = Image.Transpose.TRANSPOSE
    return function(image.transpose(turn), amount, **options).transpose(turn)


def _sharpness(image, factor, **_):
    """Pillow's own values, from whole numbers: its smoothing gives a pixel the weight 5 / 13, each neighbour 1 / 13."""
    pixels = np.asarray(image)
    smooth = pixels.copy()  # the border stays as it is
    for top in range(1, image.height - 1, 32):  # so many rows stay in the processor's cache
        x = pixels[top - 1 : min(top + 33, image.height)].astype(np.uint16)
        total = x[:-2] + x[1:-1]
        total += x[2:]
        total = total[:, :-2] + total[:, 1:-1] + total[:, 2:] + 4 * x[1:-1, 1:-1]
        smooth[top : top + len(total), 1:-1] = (total + 6) // 13
    return Image.blend(Image.fromarray(smooth), image, factor)


# timm's functions -> quicker ones; timm draws their arguments as before
_QUICK = {
    auto_augment.sharpness: _sharpness,
    auto_augment.shear_x: _shear_x,
    auto_augment.shear_y: partial(_along_columns, _shear_x),
    auto_augment.translate_x_rel: _translate_x,
    auto_augment.translate_y_rel: partial(_along_columns, _translate_x),
}
