"""Write what the page "Try it" needs: the trained Loupe as ONNX, pictures, and the pieces of a bird to draw.

    python scripts/publish/build_lab.py FOLDER

`make book` calls it with the pages' `_static/lab`. Everything is made from the package; nothing of it is in git.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from loupe_core import LoupeModel, transforms_for
from loupe_core.files.export import export_onnx
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import ATTRIBUTES, PART_OF, SPECIES, Species, draw
from loupe_lab.birds.painter import LAYERS, PAINT, PARTS, Bird, Drawing, feathers, perch, volume
from loupe_lab.pages.explorer import readable

SIZE = 336  # px; three times what the model sees, so that a brush has room
WEATHER = 0.5  # between a plate and a wet morning; the training had all of it
SEED = 2011  # of the pictures: no set that a network of this book learns from begins its seeds with this number
POSES = ((4, 1), (1, -1), (6, 1))  # of a bird to draw: seed, and 1 to face right or -1 for left
SCENES = (1, 2, 3)  # seeds of the backgrounds to draw it before


def hexadecimal(colour: tuple[int, int, int]) -> str:
    return "#" + bytes(colour).hex()


def place(species: Species, drawing: Drawing) -> tuple[float, float] | None:
    """(x, y), px, of the part that tells the species from its neighbours; None where a twig hides it."""
    part = PART_OF[species.differs_in]
    for name, (x, y, visible) in zip(PARTS, drawing.parts.tolist()):
        if visible and name in (part, f"left {part}", f"right {part}"):
            return round(x, 1), round(y, 1)
    return None


def draw_group(number: int, members: list[Species]) -> list[tuple[Drawing, tuple[float, float]]]:
    """One picture of each member, alike but for the part that tells them apart, with that part's place.

    Where that is the breast, the pose differs too: streaks and spots take numbers from the generator that poses a bird.
    It is the first seed with which that part is seen in all of them; what the model says of them plays no role.
    """
    for attempt in itertools.count():
        drawings = [draw(s.attributes, (SEED, number, attempt), SIZE, weather=WEATHER) for s in members]
        places = [place(s, d) for s, d in zip(members, drawings)]
        if all(places):
            return list(zip(drawings, places))


def write_pictures(folder: Path) -> list[dict]:
    """A picture of every species as WebP; returns what the page says about each."""
    rows = []
    for number, (_, members) in enumerate(itertools.groupby(SPECIES, key=lambda s: s.group)):
        members = list(members)
        for species, (drawing, at) in zip(members, draw_group(number, members)):
            file = f"{species.name.lower()}.webp"
            Image.fromarray(drawing.image).save(folder / file, quality=88)
            rows.append(dict(name=readable(species.name), group=species.group, differs_in=species.differs_in,
                             attributes=species.attributes, picture=file, place=at))
    return rows


def share_right(model: LoupeModel, folder: Path, rows: list[dict]) -> float:
    """Share of the written pictures whose species the model names, as the page shows it: measured, not chosen."""
    transform = transforms_for(model.data_config, train=False)
    images = torch.stack([transform(Image.open(folder / row["picture"]).convert("RGB"))[0] for row in rows])
    with torch.no_grad():
        return float((model(images).argmax(1) == torch.arange(len(rows))).double().mean())


class Pose:
    """A pose in which the page can draw a bird of any attributes: shapes by layer in px, shading, backgrounds."""

    def __init__(self, seed: int, side: int) -> None:
        self.seed, self.side = seed, side
        birds = [self.bird(bill=bill, tail=tail) for bill in ATTRIBUTES["bill"] for tail in ATTRIBUTES["tail"]]
        corners = np.vstack([points for bird in birds for _, points, _, _ in bird.shapes]) * (side, 1)
        low, high = corners.min(0), corners.max(0)
        self.scale = float(SIZE * min(np.sqrt(0.42 / np.prod(high - low)), 0.92 / (high - low).max()))
        self.corner = (SIZE - self.scale * (high + low)) / 2
        self.name = "looking back" if birds[0].look_back < 0 else f"facing {'right' if side > 0 else 'left'}"

    def bird(self, **attributes) -> Bird:
        return Bird(SPECIES[0].attributes | attributes, np.random.default_rng(self.seed))

    def pixels(self, points) -> np.ndarray:
        return np.asarray(points) * (self.side, 1) * self.scale + self.corner

    def layers(self, paths: dict) -> dict:
        """layer -> values of its attributes, joined by commas -> [path, colour, width] of each shape; width 0: filled.

        `paths` maps a polygon, (x, y, x, y, ...) in tenths of a pixel, to its number; new ones are added.
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
        """Light on the body and the grain of its feathers, (SIZE, SIZE) uint8; 128 leaves a colour as it is."""
        outline = Image.new("L", (SIZE, SIZE))
        pen, bird = ImageDraw.Draw(outline), self.bird(bill="cone")
        for _, points, _, width in bird.shapes:
            if not width:  # the lines are thin, or within
                pen.polygon(self.pixels(points).ravel().tolist(), 255)
        rng, turn = np.random.default_rng(self.seed), np.arctan2(bird.body_turn[1, 0], bird.body_turn[0, 0]) * self.side
        light = volume(outline, rng, 0.055 * self.scale)
        light = light * feathers(rng, (SIZE, SIZE), turn, max(0.011 * self.scale, 1.0))
        return (128 * light[..., 0]).clip(0, 255).astype(np.uint8)

    def scenes(self) -> list[Image.Image]:
        foot = self.pixels(self.bird().foot)
        return [perch(np.random.default_rng(seed), SIZE, foot, self.scale) for seed in SCENES]


def write_poses(folder: Path) -> dict:
    """Shading and backgrounds as WebP; returns poses and paths for the page."""
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
    """Stores every weight of an ONNX file that float16 holds exactly in float16, and casts it back to float32 as the
    model is loaded: the same results from a smaller file, half the size where the weights came from halves."""
    import onnx  # after export_onnx has said it where it is missing

    proto = onnx.load(path)
    casts = []
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size <= 64:  # a Cast takes about as many bytes as it would save there
            continue
        with np.errstate(over="ignore"):  # what is too large for a half becomes inf, and differs
            halves = values.astype(np.float16)
        if np.array_equal(halves.astype(np.float32), values):
            name = tensor.name
            tensor.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]  # a value is computed before it is used
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, path)


def build_lab(folder: Path) -> None:
    """Writes model.onnx, lab.json and the pictures into `folder`, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = LoupeModel.from_pretrained(FIELDGUIDE)
    export_onnx(model, folder / "model.onnx", dynamic_batch=False)
    store_halves(folder / "model.onnx")
    rows = write_pictures(folder)
    side = model.img_size[0]
    data = dict(
        model=dict(file="model.onnx", bytes=(folder / "model.onnx").stat().st_size, mean=model.mean, std=model.std,
                   resize=int(side / model.crop_pct), crop=side),
        species=rows,
        right=share_right(model, folder, rows),
        attributes=ATTRIBUTES,
        palette={name: hexadecimal(colour) for name, colour in PAINT.items()},
        viridis=np.rint(255 * matplotlib.colormaps["viridis"](np.arange(256))[:, :3]).astype(int).tolist(),
        kit=write_poses(folder),
    )
    (folder / "lab.json").write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("build_lab: expected one argument, the folder to write into: python scripts/publish/build_lab.py FOLDER")
    build_lab(Path(sys.argv[1]))
