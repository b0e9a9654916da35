"""Draws one bird on a twig, in the style of a plate in a field guide, and records the position of every part.

The bird has coordinates of its own: x forward, y down, total length about 1; a pose maps them to pixels. Shapes are
smooth closed curves, drawn with Pillow at three times the size and averaged down, then multiplied by shading and
feather texture. `fieldguide` defines which colours and patterns a species has.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# CUB-200-2011's parts, in its order (parts/parts.txt)
PARTS = ("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape",
         "right eye", "right leg", "right wing", "tail", "throat")

PAINT = {
    "black": (38, 35, 36), "crimson": (186, 36, 44), "yellow": (236, 197, 56), "blue": (54, 102, 184),
    "white": (240, 237, 228), "chestnut": (134, 68, 34), "pale": (224, 214, 194), "rufous": (190, 98, 46),
    "buff": (222, 184, 134), "grey": (152, 154, 156), "olive": (116, 116, 62), "brown": (118, 90, 66),
    "slate": (88, 98, 112), "teal": (56, 118, 116),
}
_GROUND = ((196, 208, 190), (214, 206, 184), (176, 196, 208), (150, 170, 128), (206, 196, 200), (120, 140, 110),
           (186, 170, 140), (226, 220, 206))


@dataclass
class Drawing:
    """image `(H, W, 3)` uint8, segmentation `(H, W)` bool, parts `(15, 3)` x, y, visible, box `(4,)` x, y, w, h; px."""

    image: np.ndarray
    segmentation: np.ndarray
    parts: np.ndarray
    box: np.ndarray


# Closed Catmull-Rom curve: the weights of four neighbouring control points at 6 steps along a segment.
_T = np.arange(6)[:, None] / 6
_CATMULL_ROM = np.hstack([-_T + 2 * _T**2 - _T**3, 2 - 5 * _T**2 + 3 * _T**3,
                      _T + 4 * _T**2 - 3 * _T**3, _T**3 - _T**2]) / 2


def _smooth(points) -> np.ndarray:
    """Smooth closed curve through `points` (n, 2), six vertices per segment."""
    p = np.asarray(points, float)
    around = np.stack([np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)], 1)  # (n, 4, 2)
    return np.einsum("tk,nkd->ntd", _CATMULL_ROM, around).reshape(-1, 2)


def _ellipse(x, y, rx, ry=None, start=0.0, stop=2 * np.pi, n=20) -> np.ndarray:
    a = np.linspace(start, stop, n)
    return np.stack([x + rx * np.cos(a), y + (ry or rx) * np.sin(a)], 1)


def _rotation(angle) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _tint(colour, amount) -> tuple[int, int, int]:
    """A lighter (amount > 0) or darker (< 0) colour."""
    c = np.asarray(colour, float)
    c = c + (255 - c) * amount if amount > 0 else c * (1 + amount)
    return tuple(int(v) for v in c.clip(0, 255))


_BODY = [(-0.36, -0.04), (-0.18, -0.125), (0.04, -0.170), (0.20, -0.20), (0.36, -0.14), (0.355, -0.01),
         (0.27, 0.105), (0.08, 0.170), (-0.12, 0.140), (-0.30, 0.060)]
_UNDERSIDE = [(0.36, -0.13), (0.357, -0.01), (0.27, 0.107), (0.08, 0.172), (-0.12, 0.142), (-0.31, 0.056),
              (-0.20, 0.030), (-0.02, 0.060), (0.15, 0.010), (0.24, -0.080)]
_WING = [(0.215, -0.065), (0.12, -0.135), (-0.10, -0.115), (-0.30, -0.050), (-0.46, 0.020), (-0.24, 0.055),
         (-0.02, 0.080), (0.15, 0.045)]
_BILLS = {  # in the head's frame, base at x = 0.1
    "cone": [(0.075, -0.056), (0.150, -0.034), (0.215, 0.026), (0.150, 0.058), (0.075, 0.066)],
    "needle": [(0.095, -0.018), (0.230, -0.012), (0.385, 0.000), (0.230, 0.016), (0.095, 0.026)],
    "hooked": [(0.080, -0.044), (0.190, -0.050), (0.270, -0.012), (0.272, 0.085), (0.222, 0.026), (0.080, 0.042)],
    "sickle": [(0.090, -0.024), (0.210, -0.018), (0.315, 0.060), (0.335, 0.165), (0.265, 0.078), (0.180, 0.028),
               (0.090, 0.032)],
}

# Layers in the order of drawing -> the attributes that a layer depends on.
LAYERS = {
    "tail": ("tail", "back"), "torso": ("belly", "back"), "breast": ("breast",), "face": ("back",),
    "throat": ("throat",), "crown": ("crown",), "eye": ("eye",), "bill": ("bill",), "wing": ("wing", "back"),
}


class Bird:
    """One bird in its own coordinates, as shapes: ("fill" or "line", points (n, 2), RGB colour, width of the line).

    layers: name in `LAYERS` -> its shapes. points: part -> (x, y). foot: (x, y) of the foot on the twig.
    The same `rng` gives the same pose and sizes, so layers can be exchanged between birds of one pose.
    """

    def __init__(self, attributes: dict[str, str], rng: np.random.Generator) -> None:
        self.layers, self.points = {}, {}
        self.attributes, self.rng = attributes, rng
        jitter = rng.normal(0, 1, 8)
        self.body_turn = _rotation(np.deg2rad(-22 + 13 * jitter[0]))  # negative: head up
        self.plump = np.array([1.0, 1 + 0.09 * jitter[1]])
        self.head_turn = _rotation(np.deg2rad(9 * jitter[2] - 4))
        self.head_size = 1.08 + 0.05 * jitter[3]
        self.look_back = -1.0 if rng.random() < 0.12 else 1.0
        self.head_at = self._body([(0.285, -0.205 - 0.02 * abs(jitter[4]))])[0]
        self.tail_turn = 0.16 * jitter[5]
        self.tail_length = 0.32 + 0.03 * jitter[6]
        self.back = PAINT[attributes["back"]]
        self.belly = PAINT[attributes["belly"]]
        self.legs = ((96, 70, 56), (60, 56, 58), (170, 112, 84))[rng.integers(3)]
        for name in LAYERS:
            self._layer = self.layers[name] = []
            getattr(self, f"_{name}")()
        self._part_points()

    @property
    def shapes(self) -> list[tuple]:
        """All shapes, in the order of drawing."""
        return [shape for layer in self.layers.values() for shape in layer]

    def _body(self, points):
        return (np.asarray(points, float) * self.plump) @ self.body_turn.T

    def _on_head(self, points):
        p = np.asarray(points, float) * (self.look_back, 1.0)
        return self.head_at + self.head_size * p @ self.head_turn.T

    def fill(self, points: np.ndarray, colour: tuple[int, int, int]) -> None:
        self._layer.append(("fill", points, colour, 0.0))

    def line(self, points: np.ndarray, colour: tuple[int, int, int], width: float) -> None:
        self._layer.append(("line", points, colour, width))

    def _tail(self):
        c, s, length = np.cos(self.tail_turn), np.sin(self.tail_turn), self.tail_length

        def at(points):  # u along the tail, v across
            p = np.asarray(points, float)
            x, y = -p[:, 0] * length, p[:, 1]
            return self._body(np.stack([-0.31 + c * x - s * y, 0.005 + s * x + c * y], 1))

        dark, pattern = _tint(self.back, -0.35), self.attributes["tail"]
        self.fill(at([(0, -0.045), (0.5, -0.055), (1, -0.072), (1.04, 0), (1, 0.066), (0.5, 0.05), (0, 0.04)]), dark)
        for v in (-0.025, 0.0, 0.025):
            self.line(at([(0.1, v), (0.95, 1.6 * v)]), _tint(dark, -0.3), 0.006)
        light = (238, 232, 216)
        if pattern == "tipped":
            self.fill(at([(0.72, -0.062), (1, -0.072), (1.04, 0), (1, 0.066), (0.72, 0.056)]), light)
        elif pattern == "barred":
            for u in (0.28, 0.54, 0.80):
                self.fill(at([(u, -0.058), (u + 0.12, -0.064), (u + 0.12, 0.058), (u, 0.052)]), light)
        elif pattern == "edged":
            self.fill(at([(0.15, 0.016), (1, 0.026), (1, 0.067), (0.15, 0.045)]), light)
            self.fill(at([(0.15, -0.048), (1, -0.073), (1, -0.050), (0.15, -0.034)]), light)
        self.points["tail"] = at([(0.6, 0)])[0]

    def _torso(self):
        for i, x in enumerate((-0.02, 0.06)):  # far leg, near leg
            top, foot = self._body([(x, 0.14)])[0], self._body([(x + 0.03, 0.14)])[0] + (0.01, 0.155)
            colour = _tint(self.legs, -0.3 if i == 0 else 0.0)
            self.line(np.array([top, foot]), colour, 0.024)
            for dx in (-0.045, 0.04, 0.06):
                self.line(np.array([foot, foot + (dx, 0.02)]), colour, 0.018)
            self.points["far leg" if i == 0 else "near leg"] = (top + foot) / 2
        self.foot = foot
        outline = self._body(_smooth(_BODY))
        self.fill(outline, self.back)
        self.fill(self._body(_smooth(_UNDERSIDE)), self.belly)
        self.fill(self._body(_smooth([(-0.31, 0.056), (-0.18, 0.115), (-0.16, 0.075), (-0.27, 0.03)])),
                  _tint(self.belly, 0.35))

    def _breast(self):
        pattern, dark = self.attributes["breast"], (62, 48, 42)
        if pattern == "banded":
            self.fill(self._body(_smooth([(0.365, -0.050), (0.350, 0.035), (0.28, 0.045), (0.20, 0.010), (0.19, -0.055),
                                          (0.28, -0.020)])), dark)
        elif pattern in ("streaked", "spotted"):
            rows = [(0.315, -0.055), (0.335, 0.000), (0.280, -0.010), (0.225, 0.000), (0.300, 0.045), (0.245, 0.055),
                    (0.185, 0.055), (0.235, 0.100), (0.170, 0.105), (0.115, 0.080), (0.105, 0.130), (0.050, 0.100),
                    (0.035, 0.145), (-0.02, 0.115)]
            for x, y in np.asarray(rows) + self.rng.normal(0, 0.006, (len(rows), 2)):
                if pattern == "spotted":
                    self.fill(self._body(_ellipse(x, y, 0.019, 0.019, n=9)), dark)
                else:
                    self.line(self._body([(x + 0.032, y - 0.022), (x - 0.032, y + 0.022)]), dark, 0.017)

    def _face(self):
        self.fill(self._on_head(_ellipse(0, 0, 0.122, 0.108)), _tint(self.back, 0.22))

    def _throat(self):
        self.fill(self._on_head(_smooth([(0.108, 0.030), (0.045, 0.040), (-0.005, 0.075), (0.010, 0.140),
                                         (0.075, 0.135), (0.112, 0.080)])), PAINT[self.attributes["throat"]])

    def _crown(self):
        arc = _ellipse(0, 0, 0.126, 0.112, np.deg2rad(186), np.deg2rad(350), 16)
        edge = [(0.085, -0.040), (0.0, -0.044), (-0.085, -0.022)]
        self.fill(self._on_head(np.vstack([arc, edge])), PAINT[self.attributes["crown"]])

    def _eye(self):
        mark, head = self.attributes["eye"], self._on_head
        if mark == "stripe":
            self.fill(head(_smooth([(0.118, -0.004), (0.05, -0.030), (-0.075, -0.012), (-0.105, 0.022), (-0.02, 0.022),
                                    (0.06, 0.012)])), (30, 27, 28))
        elif mark == "brow":
            self.fill(head(_smooth([(0.112, -0.040), (0.03, -0.056), (-0.115, -0.026), (-0.02, -0.030),
                                    (0.07, -0.024)])), (244, 240, 228))
        elif mark == "ring":
            self.fill(head(_ellipse(0.048, -0.012, 0.040)), (246, 242, 230))
        self.fill(head(_ellipse(0.048, -0.012, 0.021, n=12)), (20, 17, 18))
        self.fill(head(_ellipse(0.054, -0.018, 0.007, n=6)), (250, 250, 250))

    def _bill(self):
        bill, head, horn = _BILLS[self.attributes["bill"]], self._on_head, (64, 58, 58)
        self.fill(head(_smooth(bill) if len(bill) > 5 else bill), horn)
        self.line(head([bill[0], np.add(bill[1], (0, 0.006))]), _tint(horn, 0.35), 0.008)

    def _wing(self):
        body, base = self._body, _tint(self.back, -0.14)
        dark = _tint(base, -0.42)
        self.fill(body(_smooth(_WING)), base)
        self.fill(body(_smooth([(-0.02, -0.085), (-0.20, -0.085), (-0.46, 0.018), (-0.24, 0.052), (-0.03, 0.070)])),
                  dark)
        for k in range(6):  # flight feathers
            y = -0.07 + 0.024 * k
            self.line(body([(-0.03 - 0.01 * k, y + 0.01), (-0.40 + 0.018 * k, 0.004 + 0.008 * k)]),
                      _tint(dark, 0.22), 0.006)
        for x in (0.13, 0.05):  # rows of coverts
            self.line(body([(x + 0.03, -0.11), (x, -0.03), (x - 0.01, 0.05)]), _tint(base, -0.25), 0.007)
        light, kind = (244, 240, 230), self.attributes["wing"]
        bars = {"plain": (), "one bar": (0.005,), "two bars": (0.075, -0.045), "patch": ()}[kind]
        for x in bars:
            self.fill(body(_smooth([(x + 0.030, -0.125), (x + 0.010, -0.03), (x - 0.010, 0.066), (x - 0.048, 0.066),
                                    (x - 0.030, -0.03), (x - 0.012, -0.122)])), light)
        if kind == "patch":
            self.fill(body(_smooth([(-0.06, -0.010), (-0.14, -0.035), (-0.26, -0.010), (-0.22, 0.046),
                                    (-0.08, 0.060)])), light)
        self.line(body(_smooth(_WING)[-22:]), _tint(self.back, -0.55), 0.007)

    def _part_points(self):
        for name, at in dict(back=(0.00, -0.150), belly=(0.06, 0.125), breast=(0.285, 0.025),
                             wing=(-0.06, -0.015)).items():
            self.points["near wing" if name == "wing" else name] = self._body([at])[0]
        beak = np.mean(_BILLS[self.attributes["bill"]], 0)
        for name, at in {"beak": beak, "near eye": (0.048, -0.012), "crown": (-0.005, -0.080),
                         "forehead": (0.085, -0.055), "throat": (0.055, 0.085), "nape": (-0.105, 0.030)}.items():
            self.points[name] = self._on_head([at])[0]


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """A blurred gradient of two colours, `size` px square, with berries, leaves and stripes in the colours of birds."""
    near, far = (np.array(_GROUND[i], float) for i in rng.integers(len(_GROUND), size=2))
    wash = near + (far - near) * np.linspace(0, 1, 8)[:, None, None]
    wash = wash + rng.normal(0, 14, (8, 8, 1)) + rng.normal(0, 4, (8, 8, 3))  # mostly lighter and darker, little hue
    canvas = Image.fromarray(wash.clip(0, 255).astype(np.uint8)).resize((2 * size, 2 * size), Image.BICUBIC)
    pen, colours = ImageDraw.Draw(canvas), list(PAINT.values())
    for _ in range(rng.integers(7, 14)):
        x, y = rng.uniform(0, 2 * size, 2)
        r, turn = size * rng.uniform(0.05, 0.16), rng.uniform(0, 2 * np.pi)
        colour = _tint(colours[rng.integers(len(colours))], rng.uniform(-0.25, 0.25))
        spin = _rotation(-turn) * r
        kind = rng.integers(4)
        if kind == 0:  # berries
            for dx, dy in rng.uniform(-1, 1, (3, 2)) * r:
                pen.ellipse((x + dx - r / 3, y + dy - r / 3, x + dx + r / 3, y + dy + r / 3), colour)
            continue
        leaf = _smooth([(-1.6, 0), (-0.4, -0.55), (1.6, 0), (-0.4, 0.55)]) @ spin + (x, y)
        pen.polygon(leaf.ravel().tolist(), colour)
        light = (240, 236, 224) if rng.random() < 0.5 else _tint(colour, -0.5)
        if kind == 2:  # bars, as on a wing or a tail
            for u in (-0.5, 0.0, 0.5):
                bar = np.array([(u, -0.45), (u, 0.45)]) @ spin + (x, y)
                pen.line(bar.ravel().tolist(), light, max(int(r / 5), 2))
        elif kind == 3:  # spots, as on a breast
            for dx, dy in rng.uniform(-0.4, 0.4, (6, 2)) @ spin + (x, y):
                pen.ellipse((dx - r / 9, dy - r / 9, dx + r / 9, dy + r / 9), light)
    return canvas.filter(ImageFilter.BoxBlur(size * rng.uniform(0.003, 0.02))).reduce(2)


def twig(pen: ImageDraw.ImageDraw, rng: np.random.Generator, start: np.ndarray, stop: np.ndarray, width: float,
         leaves: int) -> None:
    """Draws one branch, `width` px wide, from `start` to `stop` (x, y) in px, lit from above, with leaves along it."""
    start, stop = np.asarray(start, float), np.asarray(stop, float)
    wood = _tint((112, 88, 66), rng.uniform(-0.3, 0.3))
    bend = rng.normal(0, 0.03, 2) * np.abs(stop - start).max()
    path = np.array([start, start + (stop - start) * 0.35 + bend, start + (stop - start) * 0.7 - bend / 2, stop])
    for light, shift, fraction in ((-0.3, 0, 1.0), (0.0, -0.12, 0.7), (0.25, -0.28, 0.25)):
        line = (path + (0, shift * width)).ravel().tolist()
        pen.line(line, (*_tint(wood, light), 255), max(int(fraction * width), 1), joint="curve")
    for _ in range(leaves):
        at = path[1] + (path[2] - path[1]) * rng.uniform(-1, 2)
        turn, r = rng.uniform(0, 2 * np.pi), width * rng.uniform(1.3, 2.4)
        leaf = (_smooth([(0, 0), (1, -0.5), (2.4, 0), (1, 0.5)]) * r) @ _rotation(-turn) + at
        green = _tint((96, 122, 66), rng.uniform(-0.3, 0.3))
        pen.polygon(leaf.ravel().tolist(), (*green, 255))
        pen.line([*at, *leaf[12]], (*_tint(green, 0.3), 255), max(int(width / 8), 1))


def perch(rng: np.random.Generator, size: int, foot: np.ndarray, scale: float) -> Image.Image:
    """A background, `size` px square, with the twig below a bird: `foot` (x, y) in px, `scale` px per bird length."""
    scene = background(rng, size).convert("RGBA")
    foot = foot + (0, 0.028 * scale)
    slope = rng.uniform(-0.12, 0.12)
    reach = 1.3 * size * np.array((1.0, slope))
    twig(ImageDraw.Draw(scene), rng, foot - reach, foot + reach, 0.055 * scale, 2)
    return scene.convert("RGB")


def volume(alpha: Image.Image, rng: np.random.Generator, reach: float) -> np.ndarray:
    """Shading of a rounded body, factors `(h, w, 1)` around 1, from its outline `alpha` blurred over `reach` px."""
    soft = np.asarray(alpha.filter(ImageFilter.BoxBlur(reach)).filter(ImageFilter.BoxBlur(reach)), np.float32) / 255
    dy, dx = np.gradient(soft)
    lamp = rng.uniform(-0.8, 0.8)
    facing = (dy + lamp * dx) * reach * 2.2
    return (0.80 + 0.24 * soft + 0.55 * facing)[..., None]


def feathers(rng: np.random.Generator, shape: tuple[int, int], turn: float, fine: float) -> np.ndarray:
    """Streaks `fine` px wide along the body, at angle `turn` in radians: factors `(h, w, 1)` around 1."""
    side = int(1.5 * max(shape)) + 4
    noise = rng.normal(128, 34, (max(int(side / fine), 4), max(int(side / (4 * fine)), 3)))
    tile = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((side, side), Image.BILINEAR)
    tile = tile.rotate(-np.rad2deg(turn), Image.BILINEAR)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    tile = np.asarray(tile, np.float32)[top:top + shape[0], left:left + shape[1]]
    return (1 + (tile - 128) / 128 * 0.42)[..., None]


def _weather(picture: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Adds haze, blur and sensor noise, each of a random amount from none to `strength` times its maximum."""
    size = len(picture)
    haze, blur, grain = strength * rng.uniform(0, 1, 3) * (0.7, 0.014 * size, 16)
    picture = picture * (1 - haze) + haze * np.array((196, 202, 206), np.float32) * rng.uniform(0.7, 1.1)
    soft = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(float(blur)))
    return np.asarray(soft, np.float32) + rng.normal(0, grain, (size, size, 1))


def paint(attributes: dict[str, str], bird_rng: np.random.Generator, scene_rng: np.random.Generator, size: int,
          twigs: bool, area: tuple[float, float], weather: float) -> Drawing:
    """Draws the bird with these attributes; called by `fieldguide.draw`, which checks and documents the arguments."""
    bird = Bird(attributes, bird_rng)
    mirror = -1.0 if bird_rng.random() < 0.5 else 1.0
    squeeze = np.array([mirror * bird_rng.uniform(0.88, 1.0), 1.0])  # seen a little from the front or behind
    shapes = [(kind, p * squeeze, colour, w) for kind, p, colour, w in bird.shapes]
    corners = np.vstack([p for _, p, _, _ in shapes])
    low, high = corners.min(0), corners.max(0)
    fraction = bird_rng.uniform(*area)
    scale = float(size * min(np.sqrt(fraction / np.prod(high - low)), 0.97 / (high - low).max()))
    room = size - scale * (high - low)
    corner = room * (0.5 + 0.5 * np.clip(bird_rng.normal(0, 0.5, 2), -1, 1))  # top left of the bird's box

    # the bird alone, three times as large, with a margin for the blur
    ss, pad = 3, 3
    origin = np.floor(corner) - pad
    w, h = (np.ceil(scale * (high - low)) + 2 * pad + 1).astype(int)
    canvas = Image.new("RGBA", (ss * w, ss * h))
    pen = ImageDraw.Draw(canvas)

    def pixels(points):
        return (np.asarray(points) - low) * scale + corner

    for kind, p, colour, width in shapes:
        flat = ((pixels(p) - origin) * ss).ravel().tolist()
        if kind == "fill":
            pen.polygon(flat, (*colour, 255))
        else:
            pen.line(flat, (*colour, 255), max(round(width * scale * ss), 1))
    layer = canvas.reduce(ss)  # averaged with transparent black pixels, so its colours are multiplied by alpha
    alpha = layer.getchannel("A")
    turn = np.arctan2(bird.body_turn[1, 0], bird.body_turn[0, 0]) * mirror
    rgb = np.asarray(layer, np.float32)[..., :3]
    rgb = rgb * volume(alpha, scene_rng, 0.055 * scale) * feathers(bird_rng, (h, w), turn, max(0.011 * scale, 1.0))

    picture = np.array(perch(scene_rng, size, pixels(bird.foot * squeeze), scale), np.float32)

    # paste: the part of the bird's layer that lies inside the frame
    x0, y0 = origin.astype(int)
    ys, xs = slice(max(y0, 0), min(y0 + h, size)), slice(max(x0, 0), min(x0 + w, size))
    cut = (slice(ys.start - y0, ys.stop - y0), slice(xs.start - x0, xs.stop - x0))
    cover = np.zeros((size, size), np.float32)
    cover[ys, xs] = np.asarray(alpha, np.float32)[cut] / 255
    picture *= 1 - cover[..., None]
    picture[ys, xs] += rgb[cut]

    front = Image.new("RGBA", (2 * size, 2 * size))
    for _ in range(scene_rng.integers(0, 3 + round(2 * weather)) if twigs else 0):
        pen = ImageDraw.Draw(front)
        start = (scene_rng.uniform(0, 2 * size), 2.1 * size * scene_rng.integers(0, 2) - 0.05 * size)
        stop = (scene_rng.uniform(-0.1, 2.1) * size, scene_rng.uniform(0, 2) * size)
        twig(pen, scene_rng, start, stop, size * scene_rng.uniform(0.018, 0.045), scene_rng.integers(1, 4))
    front = np.asarray(front.reduce(2), np.float32)
    hidden = front[..., 3:] / 255
    picture = picture * (1 - hidden) + front[..., :3]

    light = scene_rng.uniform(0.80, 1.14) * (1 + scene_rng.normal(0, 0.025, 3))  # brightness and colour cast
    picture = picture * light + scene_rng.normal(0, 2.2, (size, size, 1))
    if weather:
        picture = _weather(picture, scene_rng, weather)
    segmentation = cover * (1 - hidden[..., 0]) > 0.5
    return Drawing(picture.clip(0, 255).astype(np.uint8), segmentation,
                   _parts(bird, pixels, squeeze, mirror * bird.look_back, mirror, hidden[..., 0]),
                   _box(pixels(low), pixels(high), size))


def _parts(bird, pixels, squeeze, head_side, body_side, hidden) -> np.ndarray:
    """(15, 3) x, y, visible, in px; 0, 0, 0 for a part that is not visible, as in CUB. A bird seen from its right side
    shows its right eye and wing."""
    size = len(hidden)
    names = dict(bird.points)
    names["right eye" if head_side > 0 else "left eye"] = names.pop("near eye")
    names["right wing" if body_side > 0 else "left wing"] = names.pop("near wing")
    names["right leg" if body_side > 0 else "left leg"] = names.pop("near leg")
    names["left leg" if body_side > 0 else "right leg"] = names.pop("far leg")
    parts = np.zeros((len(PARTS), 3))
    for i, part in enumerate(PARTS):
        if part in names:
            x, y = pixels(names[part] * squeeze)
            if 0 <= x < size and 0 <= y < size and hidden[int(y), int(x)] < 0.5:
                parts[i] = x, y, 1
    return parts


def _box(low, high, size) -> np.ndarray:
    low, high = np.clip(low, 0, size), np.clip(high, 0, size)
    return np.array([*low, *(high - low)])
