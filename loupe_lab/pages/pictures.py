"""A map over its photograph as one picture, with a colour bar; in strips, as a large photograph would fill the memory.

Limits: a mask lies in [0, 1] and is drawn on that scale, so that a flat one looks flat. Other maps have no scale of
their own; theirs is that of the picture, and the colour bar says its numbers.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from loupe_core.geometry import Geometry
from loupe_core.heatmap import STRIP, mask_to_original, overlay
from loupe_core.look.cut import Box

MOST = 1000  # rows or columns of a heatmap that is put into words


def sampled(map_: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The heatmap of a map over the model input, at every k-th row and column of the photograph: at most `MOST`."""
    height, width = geometry.original_size
    step = -(-max(height, width) // MOST)
    return mask_to_original(map_, geometry, *(range((side - 1) % step // 2, side, step) for side in (height, width)))


def drawn(photograph: Image.Image, map_: np.ndarray, geometry: Geometry, limits: tuple[float, float],
          alpha: float = 0.5) -> Image.Image:
    """The photograph, coloured by a map over the model input as in `overlay`, with a colour bar below it.

    Args:
        limits: values of the first and the last colour.
    """
    width, height = photograph.size
    bar = colour_bar(width, max(height // 20, 18), limits)
    picture = Image.new("RGB", (width, height + bar.height), "white")
    for top in range(0, height, STRIP):
        rows = range(top, min(top + STRIP, height))
        part = photograph.crop((0, top, width, rows.stop))
        coloured = overlay(part, mask_to_original(map_, geometry, rows), alpha, limits)
        picture.paste(Image.fromarray(coloured), (0, top))
    picture.paste(bar, (0, height))
    return picture


def colour_bar(width: int, height: int, limits: tuple[float, float]) -> Image.Image:
    """A strip of the colours with the numbers of the first and the last beside it, as far as there is room."""
    low, high = (f"{value:.3g}" for value in limits)
    font = ImageFont.load_default(size=0.7 * height)
    room = [round(font.getlength(text)) + height // 2 for text in (low, high)]
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    if width < sum(room) + 2 * height:  # no room for the numbers
        room = [0, 0]
    else:
        pen.text((height // 4, height / 2), low, "black", font, anchor="lm")
        pen.text((width - height // 4, height / 2), high, "black", font, anchor="rm")
    colours = colormaps["viridis"](np.linspace(0, 1, width - sum(room)))[None, :, :3]
    strip = (255 * colours).round().astype(np.uint8).repeat(max(height - height // 2, 1), axis=0)
    picture.paste(Image.fromarray(strip), (room[0], height // 4))
    return picture


def beside_parts(picture: Image.Image, photograph: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A picture of a photograph with boxes on it, and beside it the parts in them, enlarged to its height."""
    height, line = photograph.height, max(photograph.height // 100, 2)
    parts = [photograph.crop((b.x, b.y, b.x + b.width, b.y + b.height)) for b in boxes]
    parts = [part.resize((max(round(part.width * height / part.height), 1), height)) for part in parts]
    whole = Image.new("RGB", (picture.width + sum(part.width + line for part in parts), picture.height), "white")
    whole.paste(picture)
    left = picture.width
    for box, part in zip(boxes, parts):
        ImageDraw.Draw(whole).rectangle((box.x, box.y, box.x + box.width - 1, box.y + box.height - 1), None, "white",
                                        line)
        whole.paste(part, (left + line, 0))
        left += part.width + line
    return whole
