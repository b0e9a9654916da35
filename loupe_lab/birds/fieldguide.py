"""Drawn birds: a data set that is generated instead of downloaded, with every label and part known.

CUB-200-2011 cannot be shipped, and it does not record which part distinguishes a species from similar ones. This set
does. Each species is a set of attributes (`ATTRIBUTES`). The 48 species of the book (`SPECIES`) form twelve groups of
four whose members differ in exactly one recorded part. Pose, scale, light, background, twigs and the size of every
part vary from image to image and carry no information about the class. The background contains berries, leaves and
stripes in the colours and patterns of the parts, so that colour alone does not identify a species.

`draw` makes one image with its geometry; `write_fieldguide` writes a whole set in the layout of CUB-200-2011
(Wah et al. 2011), which `loupe_core.CUB200` reads. The same seed gives the same images in any process.
"""

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from loupe_core.errors import LoupeError
from loupe_core.files.atomic import replaced
from loupe_lab.birds.painter import PARTS, Drawing, paint

# attribute -> its values. `PART_OF` has the CUB part on which it is seen.
ATTRIBUTES = {
    "crown": ("black", "crimson", "yellow", "blue", "white", "chestnut"),
    "bill": ("cone", "needle", "hooked", "sickle"),
    "wing": ("plain", "one bar", "two bars", "patch"),
    "breast": ("plain", "streaked", "spotted", "banded"),
    "throat": ("pale", "black", "rufous", "yellow"),
    "eye": ("plain", "ring", "stripe", "brow"),
    "tail": ("plain", "tipped", "barred", "edged"),
    "belly": ("white", "buff", "yellow", "grey"),
    "back": ("olive", "brown", "slate", "rufous", "teal"),
}
PART_OF = {
    "crown": "crown", "bill": "beak", "wing": "wing", "breast": "breast", "throat": "throat",
    "eye": "eye", "tail": "tail", "belly": "belly", "back": "back",
}


@dataclass(frozen=True)
class Species:
    """One species: its name, its group, the attribute in which the members of the group differ, and all attributes."""

    name: str
    group: str
    differs_in: str
    attributes: dict[str, str]


_LOOKS = {"crown": "crowned", "bill": "billed", "wing": "winged", "breast": "breasted", "throat": "throated",
          "eye": "eyed", "tail": "tailed", "belly": "bellied"}

# group -> (attribute in which its four members differ, their values of the other attributes, in order)
_GROUPS = {
    "Marrel": ("crown", "needle, two bars, plain, pale, plain, plain, white, olive"),
    "Tindle": ("crown", "cone, plain, streaked, black, ring, tipped, buff, slate"),
    "Corvane": ("bill", "black, one bar, spotted, pale, brow, barred, white, brown"),
    "Pellith": ("bill", "chestnut, patch, plain, yellow, plain, edged, grey, teal"),
    "Ossary": ("wing", "yellow, cone, plain, pale, stripe, plain, grey, slate"),
    "Quillon": ("wing", "crimson, sickle, banded, pale, plain, tipped, white, rufous"),
    "Brindle": ("breast", "blue, cone, one bar, pale, plain, plain, white, rufous"),
    "Saffet": ("breast", "white, hooked, two bars, black, plain, edged, yellow, olive"),
    "Gorget": ("throat", "black, needle, plain, plain, ring, barred, white, teal"),
    "Lorimer": ("eye", "yellow, needle, patch, streaked, pale, tipped, white, brown"),
    "Vaneta": ("tail", "crimson, cone, one bar, plain, black, brow, buff, olive"),
    "Dunnel": ("belly", "blue, hooked, plain, banded, pale, stripe, barred, slate"),
}


def _make_species() -> tuple[Species, ...]:
    species = []
    for group, (differs_in, shared) in _GROUPS.items():
        others = [a for a in ATTRIBUTES if a != differs_in]
        base = dict(zip(others, shared.split(", "), strict=True))
        for value in ATTRIBUTES[differs_in][:4]:
            attributes = {a: value if a == differs_in else base[a] for a in ATTRIBUTES}
            name = f"{value} {_LOOKS[differs_in]}".capitalize().replace(" ", "_") + f"_{group}"
            species.append(Species(name, group, differs_in, attributes))
    return tuple(species)


SPECIES = _make_species()


def species_of(groups: int | list[str] | tuple[str, ...] = 5) -> tuple[Species, ...]:
    """The species of as many groups, 1 to 12, or of the groups with these names.

    Raises:
        LoupeError: another number, no name, or an unknown one.
    """
    if type(groups) is int and 1 <= groups <= len(_GROUPS):
        # every second group first, so that few groups already differ in many different parts
        groups = [*list(_GROUPS)[::2], *list(_GROUPS)[1::2]][:groups]
    if not isinstance(groups, (list, tuple)) or not groups:
        raise LoupeError(f"species_of: found groups={groups!r}, expected a whole number from 1 to {len(_GROUPS)}, or a "
                         "list of names of groups")
    unknown = [g for g in groups if g not in _GROUPS]
    if unknown:
        raise LoupeError(f"no group named '{unknown[0]}' in the field guide; expected some of {', '.join(_GROUPS)}")
    return tuple(s for s in SPECIES if s.group in groups)


def draw(attributes: dict[str, str], seed: int | Sequence[int], size: int = 112,
         scene_seed: int | Sequence[int] | None = None, twigs: bool = True, area: tuple[float, float] = (0.15, 0.60),
         weather: float = 0.0) -> Drawing:
    """Draws one bird.

    Args:
        attributes: a value for each key of `ATTRIBUTES`.
        seed: determines everything random.
        size: side of the square image in pixels.
        scene_seed: determines background, light and twigs; None: `seed` does. The same `seed` with another
            `scene_seed` gives the same bird in front of another background.
        twigs: whether twigs may pass in front of the bird.
        area: range of the area of the bird's box, as a fraction of the image's area.
        weather: in [0, 1]: 0 for clear light, 1 for the most haze, blur, noise and twigs.

    Returns:
        Drawing: image `(size, size, 3)` uint8; segmentation `(size, size)` bool; parts `(15, 3)` x, y, visible
        and box `(4,)` x, y, width, height in pixels.

    Raises:
        LoupeError: an attribute is missing or has a value that `ATTRIBUTES` does not list; `size` or `area` is out of
            range.
    """
    for name, values in ATTRIBUTES.items():
        if attributes.get(name) not in values:
            raise LoupeError(f"attribute {name}={attributes.get(name)!r}; expected one of {', '.join(values)}")
    if size < 16:
        raise LoupeError(f"size={size!r} given to draw; expected 16 pixels or more")
    if not 0 < area[0] <= area[1] <= 1:
        raise LoupeError(f"area={area!r} given to draw; expected two fractions with 0 < smallest <= largest <= 1")
    seed = np.atleast_1d(seed).tolist()
    bird = np.random.default_rng([*seed, 1])
    scene = np.random.default_rng([*(seed if scene_seed is None else np.atleast_1d(scene_seed).tolist()), 2])
    return paint(attributes, bird, scene, size, twigs, area, weather)


def _draw_job(job: tuple[int, tuple[int, ...]], size: int, weather: float) -> Drawing:
    species_index, seed = job
    return draw(SPECIES[species_index].attributes, seed, size, weather=weather)


def _check(species: Sequence[Species], weather: float, **numbers: int) -> None:
    """Raises a LoupeError where a setting has another type or is out of its range."""
    unknown = [s for s in species if s not in SPECIES]
    if unknown or not species:
        found = repr(unknown[0]) if unknown else "none"
        raise LoupeError(f"fieldguide: found {found} in species, expected one or more of SPECIES (see species_of)")
    for name, value in numbers.items():
        least = {"train": 1, "size": 16}.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise LoupeError(f"fieldguide: found {name}={value!r}, expected a whole number, {least} or more")
    if not isinstance(weather, (int, float)) or isinstance(weather, bool) or not 0 <= weather <= 1:  # nan is not
        raise LoupeError(f"fieldguide: found weather={weather!r}, expected a number from 0 to 1")


def _describe(species: Sequence[Species], train: int, test: int, size: int, seed: int, weather: float) -> str:
    """The settings of a set, as the text of its attributes.json; a set is known by this text."""
    return json.dumps(dict(
        generator="loupe_core.fieldguide", version=1, seed=seed, size=size, weather=weather, train=train, test=test,
        species=[asdict(s) for s in species], attributes=ATTRIBUTES, part_of=PART_OF,
    ), indent=1)


def fieldguide_set(folder: str | Path, species: Sequence[Species] = SPECIES, *, train: int = 30, test: int = 20,
                   size: int = 112) -> Path:
    """The set with these settings in its own folder below `folder`, drawn at the first call.

    Arguments, errors and the returned path are those of `write_fieldguide`; other settings get another folder.
    """
    _check(species, 1.0, train=train, test=test, size=size)
    key = zlib.crc32(_describe(species, train, test, size, seed=0, weather=1.0).encode())
    root = Path(folder) / f"fieldguide-{len(species)}x{train + test}-{key:08x}"
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(root.name + ".lock")):  # several processes may ask at once
        return write_fieldguide(root, species, train=train, test=test, size=size)


def write_fieldguide(root: str | Path, species: Sequence[Species] = SPECIES, *, train: int = 30, test: int = 20,
                     size: int = 112, seed: int = 0, weather: float = 1.0, workers: int = 0) -> Path:
    """Writes a set of drawn birds in CUB-200-2011's layout, with segmentations and `attributes.json`.

    The set is built beside `root` and moved there when it is complete.

    Args:
        root: folder to make; it must not exist, unless it already holds this very set (then nothing is done).
        species: the species to draw, one class each.
        train: images per species in the train split, 1 or more.
        test: images per species in the test split, 0 or more.
        size: side of the images in pixels, 16 or more.
        seed: 0 or more; the same seed gives the same images.
        weather: in [0, 1], see `draw`. The backbone was pretrained at 0.
        workers: number of processes that draw; 0 draws in this one.

    Returns:
        Path of the folder.

    Raises:
        LoupeError: a setting is out of its range, or `root` exists and holds something else.
    """
    _check(species, weather, train=train, test=test, size=size, seed=seed, workers=workers)
    root, text = Path(root), _describe(species, train, test, size, seed, weather)
    if _holds(root, text):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with replaced(root) as building:
        _draw_into(building, species, train, test, size, seed, weather, workers)
        (building / "attributes.json").write_text(text, encoding="utf-8")
        _holds(root, text)  # drawing takes a while: do not replace what was written there in the meantime
    return root


def _holds(root: Path, text: str) -> bool:
    """Whether `root` exists and is the set with this description; a LoupeError if it is something else."""
    if not root.exists():
        return False
    if (root / "attributes.json").is_file() and (root / "attributes.json").read_text(encoding="utf-8") == text:
        return True
    raise LoupeError(f"{root} exists and holds something else; expected no such folder, or this very set of birds: "
                     "give another folder")


def _draw_into(building: Path, species: Sequence[Species], train: int, test: int, size: int, seed: int, weather: float,
               workers: int) -> None:
    """Makes the folder `building` and writes images, segmentations and tables into it."""
    folders = [f"{i + 1:03d}.{s.name}" for i, s in enumerate(species)]
    for folder in folders:
        (building / "images" / folder).mkdir(parents=True)
        (building / "segmentations" / folder).mkdir(parents=True)
    (building / "parts").mkdir()

    jobs, rows = [], []
    for c, s in enumerate(species):
        number = SPECIES.index(s)
        for k in range(train + test):
            jobs.append((number, (seed, number, k)))
            rows.append((c, f"{folders[c]}/{s.name}_{k:04d}", int(k < train)))
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes", "part_locs")}
    with ProcessPoolExecutor(max(workers, 1), get_context("spawn")) as pool:  # a fork of a threaded process may hang
        mapper = partial(pool.map, chunksize=16) if workers else map
        drawings = mapper(partial(_draw_job, size=size, weather=weather), jobs)
        for i, (drawing, (c, stem, is_train)) in enumerate(zip(drawings, rows), 1):
            # PNG: lossless, so the pixels are the same everywhere; JPEG would blur a bill of six pixels
            Image.fromarray(drawing.image).save(building / "images" / f"{stem}.png", compress_level=1)
            segmentation = Image.fromarray(drawing.segmentation.astype(np.uint8) * 255)
            segmentation.save(building / "segmentations" / f"{stem}.png", compress_level=1)
            tables["images"].append(f"{i} {stem}.png")
            tables["image_class_labels"].append(f"{i} {c + 1}")
            tables["train_test_split"].append(f"{i} {is_train}")
            tables["bounding_boxes"].append(f"{i} " + " ".join(f"{v:.1f}" for v in drawing.box))
            tables["part_locs"] += [f"{i} {p} {x:.1f} {y:.1f} {int(v)}"
                                    for p, (x, y, v) in enumerate(drawing.parts, 1)]
    tables["classes"] = [f"{c + 1} {folder}" for c, folder in enumerate(folders)]
    tables["parts"] = [f"{p} {name}" for p, name in enumerate(PARTS, 1)]
    for name, lines in tables.items():
        folder = building / "parts" if name in ("parts", "part_locs") else building
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
