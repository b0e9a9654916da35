"""Chapter 13's runs on real photographs: where maps are high, and on what answers hang.

Networks are those whose weights the grids of grids_photographs.py have kept, each on all test photographs of its set. A
row has a value for each photograph (`pack_shares`, `pack_right`), so that arms and maps can be compared over seeds and
photographs at once.
"""

from functools import lru_cache

import numpy as np
import torch
from grids_photographs import PIXELS, build, kept, sets
from grids_scorecard import inside
from PIL import Image
from torch.utils.data import Dataset

from loupe_core import Loupe, LoupeModel
from loupe_core.look.cut import Told
from loupe_lab.evidence.changed import greyed, on_backdrop, partners, patch_places, patched
from loupe_lab.evidence.explain import explain, features_at
from loupe_lab.evidence.oracle import wings
from loupe_lab.evidence.pointing import POINTING, feature_norm, pointing
from loupe_lab.evidence.results import pack_right, pack_shares
from loupe_lab.evidence.scorecard import Scene, centre_prior, null_maps, on_grid, on_object

RECORDING = {"pointing", "patches", "backdrops"}  # grids whose rows are not all there yet
SITE = "stage2"
STEPS = 10  # of integrated gradients
PATCHES = 3  # on keypoints, and as many off the bird, a photograph; each a seventh of the input's side
BATCH = 50


@lru_cache(maxsize=1)
def network(photographs: str, backbone: str, pixels: int, arm: str, seed: int) -> tuple[LoupeModel, list[Scene]]:
    """A recorded network, and the test photographs of its set as it sees them.

    A scene's object is the box in cub10, and what `wings` finds in heliconius.
    """
    model, test = kept(photographs, backbone, pixels, arm, seed)
    return model, scenes_of(test)


def gate_moved(model: LoupeModel, backbone: str, pixels: int, arm: str, seed: int) -> float | str:
    """How far a training moved the weights of the gates, relative to where they began; "" without any.

    0 where the best epoch was none, so that the mask is that of an untrained gate.
    """
    start, end = (m.gates.state_dict() for m in (build(backbone, pixels, arm, seed, model.class_names), model))
    if not start:
        return ""
    first, last = (torch.cat([value.flatten().float() for value in weights.values()]) for weights in (start, end))
    return round(float((last - first).norm() / first.norm()), 4)


def scenes_of(test: Dataset) -> list[Scene]:
    """The scenes of a set: objects by box, or by threshold where there are none."""
    data = test.dataset if isinstance(test, Told) else test
    scenes = []
    for i in range(len(test)):
        sample = test[i]
        scenes.append(Scene(sample, wings(np.asarray(data.image(i))) if sample.box is None else inside(sample)))
    return scenes


def images_of(scenes: list[Scene]) -> torch.Tensor:
    """`(N, channels, H, W)`."""
    return torch.stack([scene.sample.image for scene in scenes])


def maps_of(model: LoupeModel, scenes: list[Scene], kind: str, seed: int) -> np.ndarray:
    """Maps of one kind, `(N, n, n)`, on the grid of the site's own cells, not negative.

    Methods of `explain` ask for the predicted class, signed maps count by their absolute values. features: the length
    of the features at the site; untrained: the mask of a fresh gate on these features; another, noise: null maps of the
    mask; centre, constant: the same for all photographs; outline: the object itself.
    """
    images = images_of(scenes)
    shape = features_at(model, images[:1], SITE).shape
    N, n = len(scenes), shape[-1]
    if kind in ("another", "noise"):
        return null_maps(maps_of(model, scenes, "mask", seed), kind, np.random.default_rng(seed))
    if kind in ("centre", "constant"):
        return np.tile(centre_prior(n, n) if kind == "centre" else np.ones((n, n)), (N, 1, 1))
    if kind == "outline":
        return on_grid(torch.stack([torch.from_numpy(on_object(s.object, s.sample.geometry, images.shape[-2:]) * 1.0)
                                    for s in scenes]), n)
    torch.manual_seed(1000 + seed)
    fresh = Loupe(shape[1])
    options = dict(steps=STEPS) if kind == "integrated_gradients" else {}

    def part(x):
        if kind in ("features", "untrained"):
            features = features_at(model, x, SITE)
            with torch.no_grad():
                return feature_norm(features) if kind == "features" else fresh(features)[:, 0]
        return explain(model, x, kind, **options).abs()

    return on_grid(torch.cat([part(x) for x in images.split(BATCH)]), n)


def localised(photographs: str, backbone: str, pixels: int, arm: str, seed: int, map: str) -> tuple[dict, None]:
    """The scores of `pointing` of one map of one network: the mean of each, and all values, `each_`.

    map_sd: deviation of a map over its cells, mean over the photographs. gate_moved: see the function.
    """
    model, scenes = network(photographs, backbone, pixels, arm, seed)
    about = dict(images=len(scenes), gate_moved=gate_moved(model, backbone, pixels, arm, seed))
    maps = maps_of(model, scenes, map, seed)
    found = pointing(maps, scenes)
    means = {name: "" if np.isnan(v).all() else round(float(np.nanmean(v)), 4) for name, v in found.items()}
    each = {f"each_{name}": pack_shares(found[name]) for name in POINTING}
    return about | dict(map_sd=round(float(maps.std((1, 2)).mean()), 5)) | means | each, None


def patches(photographs: str, backbone: str, pixels: int, arm: str, seed: int) -> tuple[dict, None]:
    """What grey squares cost on keypoints and off the bird; the same squares for all networks of a size.

    clear, on, off: the probability of the true class without a square, and with one, mean over squares; each_: for
    each photograph, nan where no square fits beside the box. right_: the same of being right.
    """
    model, scenes = network(photographs, backbone, pixels, arm, seed)
    side, names = pixels // 7, ("clear", "on", "off")
    found = {f"{kind}{name}": np.full(len(scenes), np.nan) for name in names for kind in ("", "right_")}
    for i, scene in enumerate(scenes):
        sample = scene.sample
        places = patch_places(sample, side, PATCHES, np.random.default_rng([1, i]))
        if not len(places[0]):
            continue
        with torch.inference_mode():
            logits = model(torch.cat([sample.image[None], *(patched(sample.image, at, side) for at in places)]))
        probabilities, right = logits.softmax(1)[:, sample.label], (logits.argmax(1) == sample.label).float()
        for name, where in zip(names, (slice(0, 1), slice(1, 1 + PATCHES), slice(1 + PATCHES, None))):
            found[name][i], found[f"right_{name}"][i] = probabilities[where].mean(), right[where].mean()
    row = dict(images=len(scenes), with_room=int(np.isfinite(found["clear"]).sum()),
               gate_moved=gate_moved(model, backbone, pixels, arm, seed))
    row |= {name: round(float(np.nanmean(v)), 4) for name, v in found.items()}
    return row | {f"each_{name}": pack_shares(v) for name, v in found.items()}, None


SETTINGS = ("plain", "same", "other", "grey", "no wings")


@lru_cache(maxsize=1)
def cut_out(photographs: str) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, np.ndarray]]:
    """The test photographs of a set, RGB uint8; their wings; and for each which other one lends it a backdrop."""
    test = sets(photographs, "bare")("test")
    pixels = [np.asarray(test.image(i)) for i in range(len(test))]
    lenders = {name: partners(np.asarray(test.labels), name == "same", np.random.default_rng(2))
               for name in ("same", "other")}
    return pixels, [wings(image) for image in pixels], lenders


def before(photographs: str, setting: str, i: int) -> Image.Image:
    """A test photograph in one of `SETTINGS`.

    same, other: the wings on the backdrop of another photograph, of the same class or of another; grey: on grey; no
    wings: the wings grey.
    """
    pixels, cut, lenders = cut_out(photographs)
    image, on = pixels[i], cut[i]
    if setting in lenders:
        k = lenders[setting][i]
        image = on_backdrop(image, on, pixels[k], cut[k])
    elif setting != "plain":
        image = greyed(image, ~on if setting == "grey" else on)
    return Image.fromarray(image)


def backdrops(photographs: str, backbone: str, pixels: int, arm: str, seed: int) -> tuple[dict, None]:
    """The accuracy of a network on wings before other backdrops, see `before`; right_: which photographs it classified
    correctly, `pack_right`."""
    model, test = kept(photographs, backbone, pixels, arm, seed)
    labels = np.asarray(test.labels)
    row = dict(images=len(labels), gate_moved=gate_moved(model, backbone, pixels, arm, seed))
    for name in SETTINGS:
        images = torch.stack([test.transform(before(photographs, name, i))[0] for i in range(len(labels))])
        with torch.inference_mode():
            right = torch.cat([model(x).argmax(1) for x in images.split(BATCH)]).numpy() == labels
        row |= {name: round(float(right.mean()), 4), f"right_{name}": pack_right(right)}
    return row, None


# arm -> its maps. The masks that have learned are those of the fast gates; one that has not stands beside them.
BOTH = ("mask", "another")
GATES = dict.fromkeys(("residual, fast", "near one, fast", "multiply, fast"), BOTH)
WINGS = dict.fromkeys(("residual, fast", "multiply, fast", "residual, lambda 0, fast"), BOTH)
MAPS = {"bare": ("features", "untrained", "grad_cam"),
        "residual, fast": (*BOTH, "noise", "features", "untrained", "grad_cam")}
NOT_LEARNED = {"residual": (*BOTH, "features", "untrained")}
WITH_LAMBDA = {f"residual, lambda {lam}, fast": BOTH for lam in ("0", "0.5", "5")}
GRADIENTS = dict.fromkeys(("bare", "residual, fast"), ("integrated_gradients",))  # a minute and more a row
ONCE = {"bare": ("constant", "centre", "outline")}  # the same for all arms and seeds
ON_TOKENS = {"bare": ("rollout", "features"), **dict.fromkeys(("multiply, fast", "residual, fast"), (
    *BOTH, "rollout", "grad_cam"))}


def rows(photographs: str, seeds: int, arms: dict[str, tuple[str, ...]], backbone: str = "lite0") -> list[dict]:
    """The choices of `localised`, seed by seed, as the trainings are."""
    return [dict(choice, map=map_) for choice in networks(photographs, seeds, tuple(arms), backbone)
            for map_ in arms[choice["arm"]]]


def networks(photographs: str, seeds: int, arms: tuple[str, ...], backbone: str = "lite0") -> list[dict]:
    """The choices of `patches` and `backdrops`, seed by seed."""
    return [dict(photographs=photographs, backbone=backbone, pixels=PIXELS[backbone], arm=arm, seed=seed)
            for seed in range(seeds) for arm in arms]


GRIDS = {
    "pointing": (localised, [
        *rows("cub10", 1, ONCE), *rows("cub10", 5, NOT_LEARNED), *rows("cub10", 5, GATES | MAPS),
        *rows("cub10", 5, GRADIENTS), *rows("cub10", 5, WITH_LAMBDA), *rows("cub10", 3, ON_TOKENS, "vit_s"),
        *rows("heliconius", 1, ONCE), *rows("heliconius", 3, WINGS | MAPS)]),
    "patches": (patches, [*networks("cub10", 5, ("bare", "oracle box", "residual, fast")),
                          *networks("cub10", 1, ("residual",))]),
    "backdrops": (backdrops, networks("heliconius", 3, ("bare", *WINGS))),
}
