"""Photographs from files, whatever their mode, rotation or state."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from loupe_core.errors import LoupeError


def open_image(path: str | Path) -> Image.Image:
    """Read one photograph: upright (EXIF rotation applied), 8 bit RGB; a transparent one lies on white.

    Grey, CMYK, palette and 16 bit images are converted; of an animation, the first frame is read. Images
    above Pillow's `Image.MAX_IMAGE_PIXELS` are refused, as they may be decompression bombs.

    Raises:
        LoupeError: the file is missing, empty, truncated, too large or no image.
    """
    path = Path(path)
    if not path.is_file():
        raise LoupeError(f"{path}: found no such file, expected a photograph; check the path or unpack the set again")
    if path.stat().st_size == 0:
        raise LoupeError(f"{path}: found an empty file (0 bytes), expected a photograph; copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(_upright(image))
    except UnidentifiedImageError:
        found = "no image format that Pillow knows; expected JPEG, PNG, ..., copy or convert it again"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        found = f"an image above {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller before use"
    except Exception as error:  # a decoder may raise anything on broken bytes
        reason = " ".join(str(error).split())
        found = f"a broken or unusual image ({reason}); copy or convert it again"
    raise LoupeError(f"{path}: found {found}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data says nothing about the rotation, and the pixels are sound
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit grey; Pillow's own conversion would clip it to 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values outside of 16 bit")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
