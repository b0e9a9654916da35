"""Chapter 13's runs: where masks and other maps are high, and whether predictions depend on what they show."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from grids_first import photographs
from PIL import Image
from runs import telling_parts, trained

from loupe_core import CUB200, LoupeModel, Trainer, transforms_for
from loupe_core.model import FIELDGUIDE
from loupe_core.samples import Sample
from loupe_core.start.devices import device_of
from loupe_lab.birds.fieldguide import SPECIES, draw
from loupe_lab.evidence.explain import explain
from loupe_lab.evidence.results import interval, pack_right
from loupe_lab.evidence.scorecard import (
    CURVES,
    LAYERS,
    LOCALISATION,
    NULLS,
    Scene,
    centre_prior,
    insertion_deletion,
    localisation,
    null_maps,
    on_grid,
    on_object,
    randomisation,
    rank_of_part,
)

LITE0 = dict(head="backbone.classifier", last_stage="backbone.blocks.6", all="")
OPTIONS = {"integrated_gradients": dict(steps=20)}


COLUMNS = [*LOCALISATION, *(f"{name}_{null}" for null in NULLS for name in LOCALISATION),
           *(f"{name}_{base}{null}" for null in ("", "_another") for base in ("blur", "mean") for name in CURVES),
           *(f"like_{name}" for name in (*LAYERS, "another"))]


def scenes_of(dataset: CUB200, indices: Iterable[int]) -> list[Scene]:
    """Scenes of a data set with a transform. The object is the segmentation where there is one, else the box."""
    scenes = []
    for i in indices:
        sample, bird = dataset[i], dataset.segmentation(i)
        telling = telling_parts(dataset.class_names[sample.label])
        scenes.append(Scene(sample, inside(sample) if bird is None else bird, telling))
    return scenes


def inside(sample: Sample) -> np.ndarray:
    """`(H, W)` bool over the photograph, True in the box."""
    x, y, w, h = (float(v) for v in sample.box)
    rows, columns = (np.arange(side) + 0.5 for side in sample.geometry.original_size)
    return ((rows > y) & (rows < y + h))[:, None] & ((columns > x) & (columns < x + w))


def score(model: LoupeModel, scenes: list[Scene], method: str | torch.Tensor = "mask", *,
          nulls: Sequence[str] = NULLS, draws: int = 3, curves: int = 0, baselines: Sequence[str] = ("blur",),
          steps: int = 7, randomised: int = 0, layers: Mapping[str, str] | None = None, seed: int = 0,
          **options: Any) -> dict[str, np.ndarray]:
    """The whole scorecard of one method: arrays `(N,)`, nan where a score was not asked for or has nothing to measure.

    Signed maps count by their absolute values. The predicted class is explained.

    Args:
        method: of `explain`; or "centre", `centre_prior`; or "outline", the object itself on the grid; or maps
            `(N, h, w)`.
        nulls: kinds of `null_maps`.
        draws: number of null maps of each kind for `localisation`; their scores are averaged.
        curves: number of scenes for `insertion_deletion`, evenly chosen; of the nulls only the first is scored, once.
        baselines, steps: of `insertion_deletion`.
        randomised: number of scenes for `randomisation`, for a method of `explain`.
        layers: of `randomisation`.
        seed: of all random numbers.
        options: for `explain`.

    Returns:
        Under the names in `LOCALISATION`; insertion_blur, deletion_blur and so on; each also as <name>_<null>; and
        like_<layer>, see `randomisation`.
    """
    rng, N = np.random.default_rng(seed), len(scenes)
    images = torch.stack([scene.sample.image for scene in scenes])
    with torch.no_grad():
        target = torch.cat([model.eval()(images[i : i + 64].to(device_of(model))).argmax(1).cpu()
                            for i in range(0, N, 64)])
    if isinstance(method, str) and method == "centre":
        maps = np.tile(centre_prior(), (N, 1, 1))
    elif isinstance(method, str) and method == "outline":
        maps = on_grid(torch.stack([torch.from_numpy(on_object(scene.object, scene.sample.geometry,
                                                               scene.sample.geometry.input_size).astype(float))
                                    for scene in scenes]))
    elif isinstance(method, str):
        parts = [explain(model, images[i : i + 50], method, target[i : i + 50], **options) for i in range(0, N, 50)]
        maps = on_grid(torch.cat(parts).abs())
    else:
        maps = on_grid(torch.as_tensor(method).abs())
    result = localisation(maps, scenes)
    for null in nulls:
        drawn = [localisation(null_maps(maps, null, rng), scenes) for _ in range(draws)]
        result |= {f"{name}_{null}": np.mean([d[name] for d in drawn], axis=0) for name in LOCALISATION}

    def widen(values, at):
        wide = np.full(N, np.nan)
        wide[at] = values
        return wide

    if curves:
        at = np.linspace(0, N - 1, min(curves, N)).round().astype(int)
        sets = {"": maps[at]} | {f"_{null}": null_maps(maps[at], null, rng) for null in nulls[:1]}
        for suffix, those in sets.items():
            for baseline in baselines:
                found = insertion_deletion(model, images[at], those, target[at], steps, baseline, seed=seed)
                result |= {f"{name}_{baseline}{suffix}": widen(found[name], at) for name in CURVES}
    if randomised:
        at = np.linspace(0, N - 1, min(randomised, N)).round().astype(int)
        found = randomisation(model, images[at], method, target[at], layers, seed, **options)
        result |= {f"like_{name}": widen(values, at) for name, values in found.items()}
    return result


def columns(values: dict) -> dict:
    """The mean of each score over the images; `hits` and `hits_telling`: which images have their peak on the object and
    at the telling part, ties broken at random, see `pack_right`."""
    def hits(v):
        return pack_right(np.random.default_rng(0).random(len(v)) < v)

    def mean(v):
        return "" if np.isnan(v).all() else round(float(np.nanmean(v)), 4)

    row = {name: mean(values.get(name, np.array(np.nan))) for name in COLUMNS}
    return row | dict(hits=hits(values["pointing"]), hits_telling=hits(values["telling"]))


def scorecard(arm: str, method: str, seed: int) -> tuple[dict, None]:
    """The scorecard of a method in a trained network of the small profile: 100 test birds, five of each species; 30 of
    them for insertion and deletion, 12 for the randomisation of layers.

    The method "borrowed" is the mask of another network for the same picture: the paper's gate, trained with the next
    seed.
    """
    model, outcome, test = trained(arm, seed)
    scenes = scenes_of(test, range(0, len(test), 4))
    own = method not in ("centre", "outline", "borrowed")  # nulls and randomisation mean nothing for these
    twice = arm == "loupe" and method in ("mask", "centre", "borrowed")  # to see whether the baseline matters
    maps = method
    if method == "borrowed":
        lender, _, _ = trained("loupe", (seed + 1) % 5)
        maps = explain(lender, torch.stack([scene.sample.image for scene in scenes]), "mask")
    values = score(model, scenes, maps, nulls=NULLS if own else (), draws=2, curves=30,
                   baselines=("blur", "mean") if twice else ("blur",), randomised=12 if own else 0, seed=seed,
                   **OPTIONS.get(method, {}))
    return dict(accuracy=outcome["accuracy"], images=len(scenes)) | columns(values), None


@lru_cache(maxsize=1)
def photographs_net(seed: int) -> tuple[dict, Trainer]:
    """The training of the paper's gate on real photographs, once for all methods."""
    return photographs("loupe", seed)


def scorecard_photographs(method: str, seed: int) -> tuple[dict, Trainer]:
    """The scorecard on real photographs (see `photographs`): every third test photograph, the box as the object."""
    outcome, trainer = photographs_net(seed)
    model = trainer.model.cpu().float()
    test = CUB200(os.environ["LOUPE_CUB_ROOT"], "test", val_fraction=0, classes=model.class_names,
                  transform=transforms_for(model.data_config, train=False))
    scenes = scenes_of(test, range(0, len(test), 3))
    guess = method in ("centre", "outline")
    values = score(model, scenes, method, nulls=() if guess else NULLS, draws=1, curves=20, baselines=("blur",),
                   randomised=0 if guess else 12, layers=LITE0, seed=seed, **OPTIONS.get(method, {}))
    return dict(accuracy=outcome["accuracy"], images=len(scenes)) | columns(values), trainer


def occlusion_sets(seed: int) -> tuple[dict, None]:
    """Chapter 06's comparison of the mask with occlusion on other sets of birds, one of each species: the rank of the
    telling part among the bird's own cells, means; and the difference, with an interval for other birds."""
    model, samples, birds = LoupeModel.from_pretrained(FIELDGUIDE), [], []
    transform = transforms_for(model.data_config, train=False)
    for label, species in enumerate(SPECIES):
        bird = draw(species.attributes, (9, seed, label), weather=1.0)
        image, geometry = transform(Image.fromarray(bird.image))
        samples.append(Sample(image, label, torch.tensor(bird.parts), torch.tensor(bird.box), geometry, "", 0))
        birds.append(bird)
    images = torch.stack([sample.image for sample in samples])
    ranks = {}
    for method in ("mask", "occlusion"):
        ranks[method] = np.array([max((rank_of_part(map_, sample, k, bird.segmentation) for k in telling_parts(
            f"0.{SPECIES[sample.label].name}")), key=lambda rank: np.isfinite(rank[0]))[1]
            for map_, sample, bird in zip(on_grid(explain(model, images, method)), samples, birds)])
    apart = ranks["mask"] - ranks["occlusion"]
    apart = interval(apart[np.isfinite(apart)])
    numbers = {name: np.nanmean(values) for name, values in ranks.items()} | dict(
        difference=apart.mean, low=apart.low, high=apart.high)
    return {name: round(float(value), 4) for name, value in numbers.items()}, None


RECORDING = {"occlusion_sets"}  # grids whose rows are not all there yet
METHODS = ("mask", "grad_cam", "integrated_gradients", "rollout", "centre", "outline")
MASKS = ("lambda 0", "lambda 5", "residual", "stage3", "cbam", "random")  # arms of which only the mask is scored
CHOICES = [dict(arm=arm, method=method, seed=seed) for seed in range(5) for arm, methods in (
    ("loupe", (*METHODS, "borrowed")), ("bare", ("rollout", "borrowed")), *((arm, ("mask",)) for arm in MASKS))
    for method in methods]
# How many seeds are recorded: of the paper's gate and the bare network, of the other masks, of integrated gradients.
SEEDS = dict(main=5, masks=3, gradients=3)


def kind(row: dict) -> str:
    """The key in `SEEDS` of a row."""
    return "gradients" if row["method"] == "integrated_gradients" else "masks" if row["arm"] in MASKS else "main"


RECORDED = [row for row in CHOICES if row["seed"] < SEEDS[kind(row)]]
PHOTOGRAPHS = [dict(method=method, seed=0) for method in METHODS if method != "rollout"]
GRIDS = {"scorecard": (scorecard, RECORDED), "scorecard_photographs": (scorecard_photographs, PHOTOGRAPHS),
         "occlusion_sets": (occlusion_sets, [dict(seed=seed) for seed in range(5)])}
