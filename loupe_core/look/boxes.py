"""From a map of where to look to the boxes that a second look shows."""

import json
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from scipy import ndimage

from loupe_core.errors import LoupeError
from loupe_core.files.atomic import write_whole
from loupe_core.geometry import Geometry
from loupe_core.look.cut import Box, around

PLACES = ("found", "centre", "random")
COMBINATIONS = ("mean", "confidence")
FILE = "magnify.json"
FLAT = 1e-6  # of the largest value: less is rounding, which differs from machine to machine


@dataclass(frozen=True)
class Rule:
    """How a second look is taken. All of it is chosen before; nothing here is learned but, where asked, `weight`.

    Args:
        source: Where to look: one of `loupe_core.look.sources.source_names`, or "box", the recorded one.
        site: Whose mask or features, where a model has several.
        share: The highest cells, so large a fraction of all of them, make the boxes; in (0, 1].
        boxes: At most so many, each around one connected piece of these cells; the pieces with most of the map first.
        margin: Added on each side of a box, as a fraction of it. The model's own `crop_pct` then takes some of the
            part's border away, as it does from a photograph: at 0.875 a margin of 0.07 is cut off again.
        smallest: Least height of a box, as a fraction of the photograph's shorter side; in [0, 1].
        place: "found"; or a control with boxes of the same size: "centre" of the photograph, or a "random" place.
        combine: "mean" of the logits of both looks, with `weight` on the second; or by "confidence": each look's
            logits weighted by its own highest probability.
        weight: Of the second look, in [0, 1].
        pixels: Shorter side of the second look's input; None: as the first's. For backbones that take other sizes.
        seed: Of random places.

    Raises:
        LoupeError: A value out of range.
    """

    source: str = "mask"
    site: str | None = None
    share: float = 0.2
    boxes: int = 1
    margin: float = 0.1
    smallest: float = 0.3
    place: str = "found"
    combine: str = "mean"
    weight: float = 0.5
    pixels: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = dict(share=(1e-9, 1, "(0, 1]"), margin=(0, 10, "[0, 10]"), smallest=(0, 1, "[0, 1]"),
                      weight=(0, 1, "[0, 1]"))
        for name, (low, high, said) in ranges.items():
            value = getattr(self, name)
            if not (isinstance(value, Real) and low <= value <= high):  # also for nan
                raise LoupeError(f"second look: {name}={value!r}; expected a number in {said}")
        for name, known in (("place", PLACES), ("combine", COMBINATIONS)):
            if getattr(self, name) not in known:
                raise LoupeError(f"second look: {name}={getattr(self, name)!r}; expected one of {', '.join(known)}")
        for name, least in (("boxes", 1), ("pixels", 1), ("seed", 0)):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and value >= least or name == "pixels" and value is None):
                raise LoupeError(f"second look: {name}={value!r}; expected a whole number of {least} or more")
        for name in ("source", "site"):
            value = getattr(self, name)
            if not (isinstance(value, str) or name == "site" and value is None):
                raise LoupeError(f"second look: {name}={value!r}; expected a name")

    def __str__(self) -> str:
        """The source, and what differs from the defaults: mask, share 0.3."""
        changed = [f"{field.name} {getattr(self, field.name)}" for field in fields(self)
                   if field.name != "source" and getattr(self, field.name) != field.default]
        return ", ".join([self.source, *changed])

    def write(self, folder: str | Path) -> None:
        """Keeps it beside a model, as magnify.json."""
        write_whole(Path(folder) / FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> "Rule | None":
        """The one that `write` kept; None where there is none.

        Raises:
            LoupeError: It cannot be read.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            return None
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            unknown = kept.keys() - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"it says {sorted(unknown)[0]!r}, which is no part of one")
            return cls(**kept)
        except (ValueError, TypeError, AttributeError) as error:
            raise LoupeError(f"{file}: found no rule of a second look ({error}); expected what a training with "
                             "--magnify writes") from error


def boxes_of(map_: np.ndarray, geometry: Geometry, rule: Rule) -> list[Box]:
    """The boxes of a map, the one with most of it first.

    Args:
        map_: `(h, w)` over the whole model input, finite.
        geometry: How the photograph became that input.

    Returns:
        1 to `rule.boxes` boxes in the photograph, as `shown` takes them. Cells as high as the last of the share count
        too. A map that is the same everywhere, up to the rounding of 32 bit, says nothing: its box is all that the
        model saw.

    Raises:
        LoupeError: Another shape, or values that are not finite.
    """
    cells = np.asarray(map_, dtype=np.float64)
    if cells.ndim != 2 or not cells.size or not np.isfinite(cells).all():
        raise LoupeError(f"second look: found a map of shape {cells.shape}"
                         + ("" if cells.ndim != 2 or not cells.size else " with values that are not finite")
                         + "; expected (h, w) finite numbers: did the training diverge?")
    largest, cells = np.abs(cells).max(), cells - cells.min()
    if cells.max() <= FLAT * max(largest, 1e-30):
        x0, y0, x1, y1 = geometry.visible_box()
        return [Box(x0, y0, x1 - x0, y1 - y0)]
    count = max(round(rule.share * cells.size), 1)
    level = np.partition(cells, -count, axis=None)[-count]
    pieces, n = ndimage.label((cells >= level) & (cells > 0))
    weights = ndimage.sum_labels(cells, pieces, range(1, n + 1))
    found, (H, W) = ndimage.find_objects(pieces), geometry.input_size
    boxes = []
    for i in np.argsort(-weights, kind="stable")[: rule.boxes]:
        rows, columns = found[i]
        corners = geometry.to_original(np.array([[columns.start, rows.start], [columns.stop, rows.stop]])
                                       * (W / cells.shape[1], H / cells.shape[0]))
        (x0, y0), (x1, y1) = corners.min(0), corners.max(0)  # a mirrored input has them the other way round
        boxes.append(Box(float(x0), float(y0), float(x1 - x0), float(y1 - y0)))
    return boxes


def hill(x: float = 0.5, y: float = 0.5, cells: int = 28) -> np.ndarray:
    """A map `(cells, cells)` that is highest at (x, y), in fractions of the input, and falls to all sides alike."""
    across, down = (np.arange(cells) + 0.5 - cells * middle for middle in (x, y))
    return -(across ** 2 + down[:, None] ** 2) / cells ** 2


def shown(box: Box, geometry: Geometry, rule: Rule, image_id: int = 0) -> Box:
    """What a second look shows for a box: whole pixels of the photograph, in the aspect of the input, see `around`.

    Args:
        image_id: With `rule.seed`, chooses a random place: the same for an image each time.
    """
    (H, W), (h, w) = geometry.original_size, geometry.input_size
    part = around(box, (W, H), rule.margin, w / h, rule.smallest * min(H, W))
    if rule.place == "found":
        return part
    free = np.array([W - part.width, H - part.height])
    where = np.array([0.5, 0.5])
    if rule.place == "random":
        where = np.random.default_rng([rule.seed, image_id]).random(2)
    x, y = np.round(free * where)
    return part._replace(x=int(x), y=int(y))
