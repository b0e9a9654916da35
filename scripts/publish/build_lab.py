"""Write the files of the page "Try it": the trained Loupe as ONNX, pictures, and the shapes of which a bird is drawn.

    python scripts/publish/build_lab.py FOLDER

`make book` writes them into the pages' `_static/lab`. Everything is made from the package and nothing is in git.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from loupe_core import LoupeModel
from loupe_core.files.export import export_onnx
from loupe_core.look.boxes import FLAT, Rule
from loupe_core.look.magnifier import Magnifier
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import ATTRIBUTES, PART_OF, SPECIES, Species, draw
from loupe_lab.birds.painter import LAYERS, PAINT, PARTS, Bird, Drawing, feathers, perch, volume
from loupe_lab.pages.explorer import readable

SIZE = 336  # px: three times the model's input, large enough to paint on
WEATHER = 0.5  # see `draw`; the model was trained at 1
SEED = 2011  # of the pictures; no training set of the book has seeds that begin with this number
POSES = ((4, 1), (1, -1), (6, 1))  # of the bird that a reader composes: seed, and 1 to face right or -1 to face left
SCENES = (1, 2, 3)  # seeds of its backgrounds


def hexadecimal(colour: tuple[int, int, int]) -> str:
    return "#" + bytes(colour).hex()


def place(species: Species, drawing: Drawing) -> tuple[float, float] | None:
    """(x, y) in px of the part in which the species differs from its group; None where a twig hides it."""
    part = PART_OF[species.differs_in]
    for name, (x, y, visible) in zip(PARTS, drawing.parts.tolist()):
        if visible and name in (part, f"left {part}", f"right {part}"):
            return round(x, 1), round(y, 1)
    return None


def draw_group(number: int, members: list[Species]) -> list[tuple[Drawing, tuple[float, float]]]:
    """One picture of each member, equal except for the part in which they differ, with the position of that part.

    In the group that differs in the breast, the pose differs too, as streaks and spots use numbers from the same
    generator. The seed is the first one with which that part is visible in all pictures, whatever the model predicts.
    """
    for attempt in itertools.count():
        drawings = [draw(s.attributes, (SEED, number, attempt), SIZE, weather=WEATHER) for s in members]
        places = [place(s, d) for s, d in zip(members, drawings)]
        if all(places):
            return list(zip(drawings, places))


def write_pictures(folder: Path) -> list[dict]:
    """Writes a picture of every species as WebP; returns what the page shows about each."""
    rows = []
    for number, (_, members) in enumerate(itertools.groupby(SPECIES, key=lambda s: s.group)):
        members = list(members)
        for species, (drawing, at) in zip(members, draw_group(number, members)):
            file = f"{species.name.lower()}.webp"
            Image.fromarray(drawing.image).save(folder / file, quality=88)
            rows.append(dict(name=readable(species.name), group=species.group, differs_in=species.differs_in,
                             attributes=species.attributes, picture=file, place=at))
    return rows


def accuracies(model: LoupeModel, folder: Path, rows: list[dict], rule: Rule) -> dict[str, float]:
    """The model's accuracy on the written pictures, for the page: with one look, and with two."""
    looks = Magnifier(model, rule).look([Image.open(folder / row["picture"]).convert("RGB") for row in rows])
    return {name: float((logits.argmax(1) == torch.arange(len(rows))).double().mean())
            for name, logits in dict(right=looks.first, right_twice=looks.logits).items()}


class Pose:
    """A pose in which the page can draw a bird with any attributes: shapes per layer in px, shading, backgrounds."""

    def __init__(self, seed: int, side: int) -> None:
        self.seed, self.side = seed, side
        birds = [self.bird(bill=bill, tail=tail) for bill in ATTRIBUTES["bill"] for tail in ATTRIBUTES["tail"]]
        corners = np.vstack([points for bird in birds for _, points, _, _ in bird.shapes]) * (side, 1)
        low, high = corners.min(0), corners.max(0)
        self.scale = float(SIZE * min(np.sqrt(0.42 / np.prod(high - low)), 0.92 / (high - low).max()))
        self.corner = (SIZE - self.scale * (high + low)) / 2
        self.name = "looking back" if birds[0].look_back < 0 else f"facing {'right' if side > 0 else 'left'}"

    def bird(self, **attributes: str) -> Bird:
        return Bird(SPECIES[0].attributes | attributes, np.random.default_rng(self.seed))

    def pixels(self, points: ArrayLike) -> np.ndarray:
        return np.asarray(points) * (self.side, 1) * self.scale + self.corner

    def layers(self, paths: dict) -> dict:
        """layer -> values of its attributes, joined by commas -> [path, colour, width in px or 0 if filled] per shape.

        `paths` maps a polygon, (x, y, x, y, ...) in tenths of a pixel, to its number; new polygons are added.
        """
        layers = {}
        for name, attributes in LAYERS.items():
            layers[name] = {}
            for values in itertools.product(*(ATTRIBUTES[a] for a in attributes)):
                rows = []
                for _, points, colour, width in self.bird(**dict(zip(attributes, values))).layers[name]:
                    path = tuple(np.rint(10 * self.pixels(points)).astype(int).ravel().tolist())
                    number = paths.setdefault(path, len(paths))
                    rows.append([number, hexadecimal(colour), round(width * self.scale, 2)])
                layers[name][",".join(values)] = rows
        return layers

    def shading(self) -> np.ndarray:
        """Shading and feather texture of the body, (SIZE, SIZE) uint8; 128 leaves a colour unchanged."""
        outline = Image.new("L", (SIZE, SIZE))
        pen, bird = ImageDraw.Draw(outline), self.bird(bill="cone")
        for _, points, _, width in bird.shapes:
            if not width:  # lines are thin, or inside the outline
                pen.polygon(self.pixels(points).ravel().tolist(), 255)
        rng, turn = np.random.default_rng(self.seed), np.arctan2(bird.body_turn[1, 0], bird.body_turn[0, 0]) * self.side
        light = volume(outline, rng, 0.055 * self.scale)
        light = light * feathers(rng, (SIZE, SIZE), turn, max(0.011 * self.scale, 1.0))
        return (128 * light[..., 0]).clip(0, 255).astype(np.uint8)

    def scenes(self) -> list[Image.Image]:
        foot = self.pixels(self.bird().foot)
        return [perch(np.random.default_rng(seed), SIZE, foot, self.scale) for seed in SCENES]


def write_poses(folder: Path) -> dict:
    """Writes shading and backgrounds as WebP; returns poses and paths for the page."""
    paths, rows = {}, []
    for k, pose in enumerate(Pose(*settings) for settings in POSES):
        Image.fromarray(pose.shading()).save(folder / f"shading_{k}.webp", quality=90)
        scenes = []
        for n, scene in enumerate(pose.scenes()):
            scenes.append(f"scene_{k}_{n}.webp")
            scene.save(folder / scenes[-1], quality=88)
        rows.append(dict(name=pose.name, layers=pose.layers(paths), shading=f"shading_{k}.webp", scenes=scenes))
    return dict(size=SIZE, order=LAYERS, poses=rows, paths=[list(path) for path in paths])


def store_halves(path: Path) -> None:
    """Stores every weight of an ONNX file that float16 represents exactly as float16, with a Cast back to float32: the
    same results, and half the size for weights that come from float16."""
    import onnx  # export_onnx has checked that it is installed

    proto = onnx.load(path)
    casts = []
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size <= 64:  # a Cast would take about as many bytes as it saves
            continue
        with np.errstate(over="ignore"):  # too large values become inf, which is not equal
            halves = values.astype(np.float16)
        if np.array_equal(halves.astype(np.float32), values):
            name = tensor.name
            tensor.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]  # ONNX wants nodes in the order of computation
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, path)


def build_lab(folder: Path) -> None:
    """Writes model.onnx, lab.json and the pictures into `folder`, which is made if it does not exist."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = LoupeModel.from_pretrained(FIELDGUIDE)
    export_onnx(model, folder / "model.onnx", dynamic_batch=False)
    store_halves(folder / "model.onnx")
    rows = write_pictures(folder)
    side, rule = model.img_size[0], Rule()  # of which the page's script knows one box where the mask is high
    data = dict(
        model=dict(file="model.onnx", bytes=(folder / "model.onnx").stat().st_size, mean=model.mean, std=model.std,
                   resize=int(side / model.crop_pct), crop=side),
        species=rows,
        look=dict(share=rule.share, margin=rule.margin, smallest=rule.smallest, weight=rule.weight, flat=FLAT),
        **accuracies(model, folder, rows, rule),
        attributes=ATTRIBUTES,
        palette={name: hexadecimal(colour) for name, colour in PAINT.items()},
        viridis=np.rint(255 * matplotlib.colormaps["viridis"](np.arange(256))[:, :3]).astype(int).tolist(),
        kit=write_poses(folder),
    )
    (folder / "lab.json").write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("build_lab: expected the folder to write into: python scripts/publish/build_lab.py FOLDER")
    build_lab(Path(sys.argv[1]))
