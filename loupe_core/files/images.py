"""Photographs from files, whatever their mode, rotation or state."""

import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from loupe_core.errors import LoupeError, one_line

# Of Pillow's readers only these: others hand a file to another program (EPS to Ghostscript), whatever it is called.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
LONGEST = 200  # times the shorter side: 160 MB when the shorter side becomes 448 pixels


def open_image(path: str | Path) -> Image.Image:
    """Read one photograph: upright (EXIF rotation applied), 8 bit RGB; a transparent one lies on white.

    JPEG, PNG, GIF, WebP, TIFF, BMP, PPM and their like, told by their content and not by their name. Grey, CMYK,
    palette and 16 bit images are converted; of an animation, the first frame is read. Images above Pillow's
    `Image.MAX_IMAGE_PIXELS` are refused, as they may be decompression bombs, and so are strips `LONGEST` times as
    long as they are wide, which a transform would blow up.

    Raises:
        LoupeError: the file is missing, empty, truncated, too large, a mere strip or no image.
    """
    if not os.path.isfile(path):  # false for a pipe, a folder, and a name that the system refuses
        raise LoupeError(f"{path}: found no such file, expected a photograph; check the path or unpack the set again")
    if os.path.getsize(path) == 0:
        raise LoupeError(f"{path}: found an empty file (0 bytes), expected a photograph; copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            known = [name for name in FORMATS if name in Image.OPEN]  # a Pillow may be built without some
            with Image.open(path, formats=known) as image:
                if max(image.size) > LONGEST * max(min(image.size), 1):
                    raise ValueError(f"{image.width} x {image.height} pixels, a strip {LONGEST} times as long as wide")
                image.load()
                with suppress(Exception):  # broken EXIF data says nothing about the rotation, and the pixels are sound
                    ImageOps.exif_transpose(image, in_place=True)  # without a copy of a large image
                return _to_rgb(image)
    except UnidentifiedImageError:
        found = "no image format that is read here; expected JPEG, PNG, ..., copy or convert it again"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        found = f"an image above {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller before use"
    except Exception as error:  # a decoder may raise anything on broken bytes
        found = f"a broken or unusual image ({one_line(error)}); copy or convert it again"
    raise LoupeError(f"{path}: found {found}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit grey; Pillow's own conversion would clip it to 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values outside of 16 bit")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.has_transparency_data:
        rgb, (w, h) = Image.new("RGB", image.size), image.size
        for top in range(0, h, 256):  # in strips: all at once, 89 megapixels would take 2 GB
            strip = image.crop((0, top, w, min(top + 256, h))).convert("RGBA")
            white = Image.new("RGBA", strip.size, "white")
            rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
        return rgb
    return image.convert("RGB")
