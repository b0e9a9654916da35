"""The heatmap explorer: pictures, heatmaps and controls in one widget.

In Jupyter and on Colab it is an ipywidget (through anywidget) connected to Python, and can take a reader's photograph.
A published page has no kernel; there the same script runs on the data in the notebook's output, so everything but the
photograph works the same. Needs the package anywidget (`pip install 'loupe-core[chapters]'`).
"""

import base64
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from loupe_core.errors import LoupeError
from loupe_core.files.images import open_image
from loupe_core.geometry import Geometry, transforms_for
from loupe_core.heatmap import peak
from loupe_core.samples import Sample
from loupe_core.sites import eval_mode
from loupe_core.start.devices import device_of
from loupe_lab.birds.fieldguide import PART_OF, SPECIES, draw
from loupe_lab.birds.painter import PARTS
from loupe_lab.evidence.explain import explain

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise LoupeError("the explorer needs the package anywidget; install it: pip install anywidget") from error

CELL = 8  # px of the model's input: a peak within this distance of a part hits it; a cell of swin_micro's stage-2 mask.


@dataclass
class Picture:
    """An image to explore. It is kept as lossy WebP, so that models and the reader see the same pixels.

    image: RGB, 8 bit. geometry: how it becomes the model's input. parts: name -> (x, y) in the image in px, the visible
    ones. truth: its class, if known. telling: the part that distinguishes this class from similar ones, if known.
    """

    name: str
    image: Image.Image
    geometry: Geometry
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)
    truth: str = ""
    telling: str = ""

    def __post_init__(self) -> None:
        file = io.BytesIO()
        self.image.save(file, "webp", quality=82)
        self.file = file.getvalue()
        self.image = Image.open(file).convert("RGB")


@dataclass
class Answer:
    """One source's answer to a picture: a heatmap `(h, w)` over the model's input, and the most likely classes with
    their probabilities, highest first."""

    map: Any
    top: Sequence[tuple[str, float]] = ()


def readable(class_name: str) -> str:
    """`001.Black_crowned_Marrel` -> Black crowned Marrel."""
    return class_name.split(".", 1)[-1].replace("_", " ")


def likeliest(model: torch.nn.Module, images: torch.Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
    """The `k` most likely classes of each image `(B, 3, H, W)`, on any device, with their probabilities, highest first;
    their names are those in `model.class_names`, or "class 0" and so on without it."""
    with eval_mode(model), torch.no_grad():
        probabilities = model(images.to(device_of(model))).softmax(1).cpu()
    names = getattr(model, "class_names", None) or [f"class {i}" for i in range(probabilities.shape[1])]
    best = probabilities.topk(min(k, probabilities.shape[1]))
    return [[(readable(names[i]), float(p)) for p, i in zip(values, numbers.tolist())]
            for values, numbers in zip(best.values, best.indices)]


def ask(model: torch.nn.Module, pictures: Sequence[Picture], method: str = "mask", **options: Any) -> list[Answer]:
    """One source for the explorer: heatmaps by `explain` with this method and options, and the most likely classes.

    Raises:
        LoupeError: as in `explain`.
    """
    transform = transforms_for(model.data_config, train=False)
    images = torch.stack([transform(picture.image)[0] for picture in pictures])
    maps = explain(model, images, method, **options).numpy()
    return [Answer(map_, top) for map_, top in zip(maps, likeliest(model, images))]


def picture_of(sample: Sample, image: Image.Image, class_names: Sequence[str] = (), telling: str = "") -> Picture:
    """The picture of a data set's sample: its image, with class and visible parts."""
    parts = {} if sample.parts is None else _visible(sample.parts)
    truth = readable(class_names[sample.label]) if len(class_names) else ""
    return Picture(truth or Path(sample.path).name, image, sample.geometry, parts, truth, telling)


def field_birds(transform: Callable, count: int = 12, size: int = 336) -> list[Picture]:
    """`count` drawn birds, `size` px wide: one from each group in turn, with seeds that no training set uses.

    `transform`: how an image becomes the model's input (see `transforms_for`).
    """
    birds = []
    for i in range(count):
        species = SPECIES[4 * (i % 12) + (i + i // 12) % 4]
        drawing = draw(species.attributes, (12, i), size=size, weather=1.0)
        image = Image.fromarray(drawing.image)
        name = readable(species.name)
        birds.append(Picture(name, image, transform(image)[1], _visible(drawing.parts), name,
                             PART_OF[species.differs_in]))
    return birds


class HeatmapExplorer(anywidget.AnyWidget):
    """The widget; a cell shows it as its last value.

    Its controls can also be read and set from Python: `picture` and `source` (indices), `view` ("over", "beside",
    "all"), `opacity` in [0, 1], `percentile` of the contour, `contour` and `parts` (bool).

    Args:
        pictures: one or more.
        sources: name -> one `Answer` per picture, or `(answers, note)` with a line that explains the source.
        recompute: picture -> {name of a source: `Answer`}; with it the reader can add a photograph where a kernel
            runs. Needs `transform`.
        transform: how a photograph becomes the model's input, for its geometry (see `transforms_for`).
        **choices: initial values of the controls, such as `source=2, opacity=0.7`.

    Raises:
        LoupeError: no picture or no source; a source without one answer per picture; a map that is not (h, w) or not
            finite; `recompute` without `transform`.
    """

    _esm = Path(__file__).with_name("explorer.js")
    data = traitlets.Dict().tag(sync=True)
    picture = traitlets.Int(0).tag(sync=True)
    source = traitlets.Int(0).tag(sync=True)
    view = traitlets.Enum(["over", "beside", "all"], "over").tag(sync=True)
    opacity = traitlets.Float(0.5, min=0, max=1).tag(sync=True)
    percentile = traitlets.Float(90, min=0, max=100).tag(sync=True)
    contour = traitlets.Bool(True).tag(sync=True)
    parts = traitlets.Bool(False).tag(sync=True)
    uploads = traitlets.Bool(False).tag(sync=True)
    live = traitlets.Bool(True).tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)

    def __init__(self, pictures: Sequence[Picture], sources: dict, recompute: Callable | None = None,
                 transform: Callable | None = None, **choices: Any) -> None:
        if not pictures or not sources:
            raise LoupeError(f"explorer: found {len(pictures)} pictures and {len(sources)} sources, expected one or "
                             "more of each")
        if recompute is not None and transform is None:
            raise LoupeError("explorer: found recompute without transform, expected both, for a photograph's geometry")
        rows, notes = [], []
        for name, source in sources.items():
            answers, note = source if isinstance(source, tuple) else (source, "")
            if len(answers) != len(pictures):
                raise LoupeError(f"source {name!r}: found {len(answers)} answers for {len(pictures)} pictures, "
                                 "expected one for each")
            rows.append([_answer(name, answer, picture) for answer, picture in zip(answers, pictures)])
            notes.append(dict(name=name, note=note))
        self._recompute, self._transform = recompute, transform
        lut = matplotlib.colormaps["viridis"](np.arange(256))[:, :3].ravel().tolist()
        data = dict(pictures=[_picture(p) for p in pictures], sources=notes, answers=rows, lut=lut, cell=CELL)
        super().__init__(data=data, uploads=recompute is not None, **choices)
        self.on_msg(self._receive)

    def add(self, path: str | Path) -> None:
        """Adds the photograph in a file and shows it, as the upload button does.

        Raises:
            LoupeError: it cannot be read, or the explorer was made without `recompute`.
        """
        if self._recompute is None:
            raise LoupeError("explorer: it was made without recompute, so it takes no photograph; expected recompute=")
        image = open_image(path)
        image.thumbnail((640, 640))
        picture = Picture(Path(path).name, image, self._transform(image)[1])
        found = self._recompute(picture)
        names = [source["name"] for source in self.data["sources"]]
        rows = [row + [_answer(name, found[name], picture) if name in found else None]
                for name, row in zip(names, self.data["answers"])]
        if not any(row[-1] for row in rows):
            raise LoupeError(f"explorer: recompute gave {list(found)}, expected some of {names}")
        at = len(self.data["pictures"])
        with self.hold_sync():
            if not rows[self.source][-1]:
                self.source = next(i for i, row in enumerate(rows) if row[-1])
            self.data = self.data | dict(pictures=[*self.data["pictures"], _picture(picture)], answers=rows)
            self.picture, self.message = at, f"{picture.name} was added."

    def _receive(self, widget, content: dict, buffers: list) -> None:
        name = Path(str(content.get("photograph", "photograph"))).name
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / name
                file.write_bytes(buffers[0])
                self.add(file)
        except (LoupeError, OSError, IndexError) as error:
            self.message = f"{name} cannot be used: {str(error).split(': ', 1)[-1]}"

    def html(self) -> str:
        """The explorer as HTML that needs no kernel and no other file."""
        state = {key: getattr(self, key) for key in ("data", "picture", "source", "view", "opacity", "percentile",
                                                     "contour", "parts", "uploads")} | dict(live=False, message="")
        text = json.dumps(state, separators=(",", ":")).replace("<", "\\u003c")
        ident = f"explorer-{zlib.crc32(text.encode()):08x}"
        return (f'<div id="{ident}"><p>The heatmap explorer needs JavaScript.</p></div>'
                f'<script type="application/json" id="{ident}-state">{text}</script>'
                f'<script type="module">{self._esm}\nmount(document.getElementById("{ident}"), '
                f'JSON.parse(document.getElementById("{ident}-state").textContent));</script>')

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return data | {"text/html": self.html(), "text/plain": "<heatmap explorer>"}, metadata


def _visible(parts) -> dict[str, tuple[float, float]]:
    """Parts (15, 3) -> name: (x, y) of the visible ones."""
    return {name: (x, y) for name, (x, y, visible) in zip(PARTS, parts.tolist()) if visible}


def _picture(picture: Picture) -> dict:
    g = picture.geometry
    width, height = picture.image.size
    if g.original_size != (height, width):
        raise LoupeError(f"picture {picture.name!r}: found {width} x {height} px, expected "
                         f"{g.original_size[1]} x {g.original_size[0]}, the size of its geometry")
    source = "data:image/webp;base64," + base64.b64encode(picture.file).decode()
    geometry = dict(original=g.original_size, input=g.input_size, scale=g.scale, offset=g.offset, flipped=g.flipped)
    parts = [[name, round(x, 1), round(y, 1)] for name, (x, y) in picture.parts.items()]
    return dict(name=picture.name, src=source, width=width, height=height, geometry=geometry, parts=parts,
                truth=picture.truth, telling=picture.telling)


def _answer(name: str, answer: Answer, picture: Picture) -> dict:
    map_ = np.asarray(torch.as_tensor(answer.map).detach().cpu(), dtype=np.float64)
    if map_.ndim != 2 or not np.isfinite(map_).all():
        found = f"shape {map_.shape}, {int((~np.isfinite(map_)).sum())} values not finite"
        raise LoupeError(f"source {name!r}: found a map of {found}; expected (h, w), all finite")
    low, high = float(map_.min()), float(map_.max())
    steps = np.rint((map_ - low) / (high - low or 1) * 255).astype(np.uint8)
    x, y = peak(map_, picture.geometry)
    packed = base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode()
    return dict(h=map_.shape[0], w=map_.shape[1], low=low, high=high, bytes=packed,
                peak=[round(x, 2), round(y, 2)], top=[[label, round(float(p), 4)] for label, p in answer.top])

