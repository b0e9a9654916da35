"""The second look, with controls of equal cost: what a second pass is worth, and where it should look.

Each row takes the kept weights of a training of grids_photographs.py, or of one on drawn birds (`runs.trained`), which
sees drawings of 112 px and here looks at larger ones. A kind of second look that has
a setting, such as the size of its part, has three, and each training chooses one on its own validation photographs, by
the cross-entropy of both looks together: the same budget of search for each kind. The test photographs are looked at
with the chosen one alone. Both looks have the same weight; what a weight fitted to the validation photographs gives
stands beside it.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from grids_photographs import PIXELS, kept, sets
from PIL import Image
from runs import SMALL, trained
from timm.models import SwinTransformer
from torch.nn.functional import cross_entropy

from loupe_core import LoupeModel, transforms_for
from loupe_core.geometry import Geometry
from loupe_core.look.boxes import Rule, boxes_of, shown
from loupe_core.look.cut import Box, box_of
from loupe_core.look.magnifier import Magnifier, combine, fit_weight
from loupe_core.look.sources import mask_of, source_of
from loupe_core.samples import Sample
from loupe_core.sites import eval_mode
from loupe_lab.birds.fieldguide import draw
from loupe_lab.evidence.results import pack_right, pack_shares

BATCH = 8  # what a processor keeps close at hand: larger ones take twice as long
SHARES = (0.1, 0.2, 0.4)  # of the cells
SCALES = (1.25, 2 ** 0.5, 1.75)  # of the input's side; the second has the cost of two looks
SIDES = (0.5, 0.7, 0.85)  # of a crop, as a fraction of the shorter side
# Drawn birds by the area of their box, as a fraction of the picture; the network has learned from the second kind.
DRAWN = {"small drawn birds": (0.03, 0.06), "drawn birds": (0.15, 0.60)}
DRAWN_SIDE, DRAWN_EACH = 224, {"val": 3, "test": 15}  # pixels; birds per species


@dataclass
class Split:
    """Photographs, and what a first look found: logits `(N, K)`. maps: source and site -> `(N, h, w)`, and the
    processor's seconds that it took."""

    samples: list[Sample]
    labels: torch.Tensor
    x: torch.Tensor
    geometries: list[Geometry]
    first: torch.Tensor
    seconds: float
    maps: dict[tuple, tuple[np.ndarray, float]] = field(default_factory=dict)


@dataclass
class Second:
    """What a second look says: logits `(N, K)`; its passes per photograph, of the first look's size; its parts, one a
    photograph, where it has one; and whether the first look counts too."""

    logits: torch.Tensor
    passes: float
    parts: list[Box] | None = None
    with_first: bool = True


def by(model: LoupeModel, split: Split, rule: Rule) -> Second:
    """At the boxes of a rule, as `Magnifier` finds them; a map is made once for all settings."""
    magnifier = Magnifier(model, rule)
    if rule.source == "box":
        boxes = [[box_of(sample)] for sample in split.samples]
    else:
        boxes = [boxes_of(map_, geometry, rule)
                 for map_, geometry in zip(maps_of(model, split, rule)[0], split.geometries)]
    parts = [[shown(box, geometry, rule, sample.image_id) for box in of]
             for of, geometry, sample in zip(boxes, split.geometries, split.samples)]
    logits = torch.cat([magnifier.second(split.samples[i : i + BATCH], parts[i : i + BATCH])
                        for i in range(0, len(parts), BATCH)])
    passes = sum(map(len, parts)) / len(parts)
    return Second(logits, passes, [of[0] for of in parts] if rule.boxes == 1 else None)


def maps_of(model: LoupeModel, split: Split, rule: Rule) -> tuple[np.ndarray, float]:
    key = rule.source, rule.site
    if key not in split.maps:
        began, found = time.process_time(), []
        for x in split.x.split(BATCH):
            with eval_mode(model), torch.no_grad():
                found.append(source_of(rule.source)(model, x, rule.site).float().cpu())
        split.maps[key] = torch.cat(found).numpy(), time.process_time() - began
    return split.maps[key]


def mirrored(model: LoupeModel, split: Split, setting: None) -> Second:
    """At the same input, left and right exchanged."""
    return Second(logits_of(model, split.x.flip(-1)), 1)


def enlarged(model: LoupeModel, split: Split, scale: float) -> Second:
    """At the whole photograph again, in a larger input: with the scale of 1.41 it costs two passes."""
    step = 28 if isinstance(model.backbone, SwinTransformer) else 16  # 28: whole windows of 7 patches of 4 pixels
    side, wide = round(scale * model.img_size[0] / step) * step, model
    if isinstance(model.backbone, SwinTransformer):
        wide = deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm warns that the windows of the last stages are cut to their size
            wide.backbone.set_input_size(img_size=(side, side), window_size=(7, 7))
    transform = transforms_for(model.data_config | dict(input_size=(side, side)), train=False)
    return Second(passes_of(wide, split, lambda sample: transform(sample.image)[0]), (side / model.img_size[0]) ** 2)


def five_crops(model: LoupeModel, split: Split, side: float) -> Second:
    """At the four corners and the middle, squares of a fraction of the shorter side, from the photograph itself."""
    spots = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))
    return Second(torch.stack([crops(model, split, side, lambda sample, at=at: at) for at in spots]).mean(0), 5)


def two_crops(model: LoupeModel, split: Split, side: float) -> Second:
    """At two random squares, in place of the whole photograph; places drawn by the photograph's number."""
    logits = [crops(model, split, side, lambda sample, k=k: np.random.default_rng([k, sample.image_id]).random(2))
              for k in range(2)]
    return Second(torch.stack(logits).mean(0), 1, with_first=False)


def crops(model: LoupeModel, split: Split, side: float, place: Callable) -> torch.Tensor:
    transform = transforms_for(model.data_config | dict(crop_pct=1.0), train=False)

    def part(sample: Sample) -> torch.Tensor:
        image, (across, down) = sample.image, place(sample)
        length = max(round(side * min(image.size)), 1)
        x, y = round(across * (image.width - length)), round(down * (image.height - length))
        return transform(image.crop((x, y, x + length, y + length)))[0]

    return passes_of(model, split, part)


def passes_of(model: LoupeModel, split: Split, input_of: Callable[[Sample], torch.Tensor]) -> torch.Tensor:
    return logits_of(model, torch.stack([input_of(sample) for sample in split.samples]))


def logits_of(model: LoupeModel, x: torch.Tensor) -> torch.Tensor:
    with eval_mode(model), torch.no_grad():
        return torch.cat([model(some).float() for some in x.split(BATCH)])


def with_mask(model: LoupeModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the mask of the one gate, in one pass."""
    logits, maps = [], []
    for some in x.split(BATCH):
        with eval_mode(model), torch.no_grad():
            of, masks = model(some, return_mask=True)
            logits.append(of.float())
            maps.append(mask_of(model, masks, tuple(some.shape[-2:])))
    return torch.cat(logits), torch.cat(maps)


def shares(**options: str) -> dict[str, Rule]:
    return {f"{share:g}": Rule(share=share, **options) for share in SHARES}


# kind -> (how, its settings by name)
LOOKS: dict[str, tuple[Callable, dict]] = {
    **{name: (by, shares(source=name)) for name in ("mask", "norm", "grad_cam", "rollout", "saliency", "mask_and_norm",
                                                    "mask_low", "centre")},
    "norm of stage 3": (by, shares(source="norm", site="stage3")),
    "mask, two boxes": (by, shares(boxes=2)),
    "mask, its size at random": (by, shares(place="random")),
    "norm, its size at random": (by, shares(source="norm", place="random")),
    "box": (by, {f"{margin:g}": Rule(source="box", margin=margin) for margin in (0.0, 0.1, 0.25)}),
    "mirror": (mirrored, {"": None}),
    "larger": (enlarged, {f"{scale:.2f}": scale for scale in SCALES}),
    "two random crops": (two_crops, {f"{side:g}": side for side in SIDES}),
    "five crops": (five_crops, {f"{side:g}": side for side in SIDES}),
    "none": (None, {"": None}),
}


@lru_cache
def drawn(name: str, split: str) -> list[Sample]:
    """Drawn birds of the small profile's species, in pictures of four times the pixels that the network sees."""
    count = DRAWN_EACH[split]
    birds = [(label, draw(species.attributes, (15, int(split == "test"), label, k), DRAWN_SIDE, area=DRAWN[name],
                          weather=1.0)) for label, species in enumerate(SMALL) for k in range(count)]
    return [Sample(Image.fromarray(bird.image), label, torch.tensor(bird.parts), torch.tensor(bird.box), None, "", i)
            for i, (label, bird) in enumerate(birds)]


@lru_cache(maxsize=1)  # the rows of a training follow one another
def opened(photographs: str, backbone: str, pixels: int, arm: str, seed: int) -> tuple[LoupeModel, dict[str, Split]]:
    """A recorded training's model, and its first look at the validation and the test photographs."""
    if photographs in DRAWN:
        model, split_of = trained(arm, seed)[0].cpu(), lambda split: drawn(photographs, split)
    else:
        model, split_of = kept(photographs, backbone, pixels, arm, seed)[0], sets(photographs, arm, seed=seed)
    model = model.to(memory_format=torch.channels_last)  # half the time of a CPU, the same numbers but for rounding
    transform, found = transforms_for(model.data_config, train=False), {}
    for name in ("val", "test"):
        samples = [split_of(name)[i] for i in range(len(split_of(name)))]
        began = time.process_time()
        images, geometries = zip(*(transform(sample.image) for sample in samples))
        x = torch.stack(images)
        if model.gates:  # the mask comes with the first look: it costs nothing more
            first, masks = with_mask(model, x)
            maps = {("mask", None): (masks.numpy(), 0.0)}
        else:
            first, maps = logits_of(model, x), {}
        found[name] = Split(samples, torch.tensor([sample.label for sample in samples]), x, list(geometries), first,
                            time.process_time() - began, maps)
    return model, found


def second_look(photographs: str, backbone: str, pixels: int, arm: str, look: str, seed: int) -> tuple[dict, None]:
    """One second look with the weights of one recorded training.

    Args:
        photographs, backbone, pixels, arm, seed: Of the training, see `grids_photographs.photograph`; or a key of
            `DRAWN`, with swin_micro.
        look: A key of `LOOKS`; "none" is the first look alone.

    Returns:
        The row. setting: the chosen one. On the test split: accuracy and right of both looks together; second_accuracy
        and second_right of the second alone; weighted_accuracy, weighted_right with the weight of the second look that
        validation photographs gave, which is `weight`. val_loss: cross-entropy there. passes: per photograph, of the
        first look's size. milliseconds: of the processor, per test photograph, for both looks and the map, with decoded
        photographs. Where the look has one part a photograph and the set has boxes, means over test photographs: iou of
        part and recorded box, small_iou and large_iou over the third with the smallest and the largest birds, and for
        each photograph `iou_of` (`pack_shares`); keypoints, the fraction of visible ones inside; covered, the fraction
        of the recorded box; area, of the photograph.
    """
    model, splits = opened(photographs, backbone, pixels, arm, seed)
    val, test = splits["val"], splits["test"]
    how, settings = LOOKS[look]

    def together(split: Split, found: Second, weight: float = 0.5) -> torch.Tensor:
        return combine(split.first, found.logits, Rule(weight=weight)) if found.with_first else found.logits

    def tried(split: Split, setting: str) -> Second:
        return how(model, split, settings[setting]) if how else Second(split.first, 0)

    seen = {setting: tried(val, setting) for setting in settings}
    losses = {setting: float(cross_entropy(together(val, found), val.labels)) for setting, found in seen.items()}
    setting = min(losses, key=losses.get)
    rule, spent = settings[setting], 0.0
    if isinstance(rule, Rule) and rule.source != "box":  # the map may have been made for an earlier row
        spent = maps_of(model, test, rule)[1]
    began = time.process_time()
    found = tried(test, setting)
    spent += time.process_time() - began
    both, weight = together(test, found), 0.0
    if how and found.with_first:
        weight = fit_weight(val.first, seen[setting].logits, val.labels.numpy())
    answers = {"": both, "second_": found.logits,
               "weighted_": together(test, found, weight) if how and found.with_first else both}
    outcome = dict(setting=setting)
    for name, logits in answers.items():
        right = (logits.argmax(1) == test.labels).numpy()
        outcome |= {f"{name}accuracy": round(float(right.mean()), 4), f"{name}right": pack_right(right)}
    alone = 0.0 if not found.with_first else test.seconds
    return outcome | dict(val_loss=round(losses[setting], 4), weight=round(weight, 3),
                          passes=round(2 if not found.with_first else 1 + found.passes, 2),
                          milliseconds=round(1000 * (alone + spent) / len(test.samples), 1),
                          test_images=len(test.samples), **places(test.samples, found.parts)), None


PLACES = ("iou", "small_iou", "large_iou", "keypoints", "covered", "area")


def places(samples: Sequence[Sample], parts: Sequence[Box] | None) -> dict:
    """Where parts lie, see `second_look`; empty where there is nothing to compare."""
    if parts is None or any(sample.box is None for sample in samples):
        return dict.fromkeys((*PLACES, "iou_of"), "")
    iou, covered, inside, area, birds = [], [], [], [], []
    for sample, part in zip(samples, parts):
        x, y, width, height = sample.box.tolist()
        across = max(min(part.x + part.width, x + width) - max(part.x, x), 0)
        down = max(min(part.y + part.height, y + height) - max(part.y, y), 0)
        bird, shared = width * height, across * down
        whole = sample.image.width * sample.image.height
        iou.append(shared / (bird + part.width * part.height - shared))
        covered.append(shared / bird)
        area.append(part.width * part.height / whole)
        birds.append(bird / whole)
        points = sample.parts[sample.parts[:, 2] > 0] if sample.parts is not None else []
        if len(points):
            inside.append(float(((points[:, 0] >= part.x) & (points[:, 0] <= part.x + part.width)
                                 & (points[:, 1] >= part.y) & (points[:, 1] <= part.y + part.height)).float().mean()))
    iou, order, third = np.array(iou), np.argsort(birds), len(birds) // 3
    values = (iou, iou[order[:third]], iou[order[-third:]], inside, covered, area)
    return {name: round(float(np.mean(of)), 4) for name, of in zip(PLACES, values)} | dict(iou_of=pack_shares(iou))


def looks(arm: str, names: Sequence[str], seeds: int, photographs: str = "cub10", backbone: str = "lite0",
          pixels: int | None = None) -> list[dict]:
    return [dict(photographs=photographs, backbone=backbone, pixels=pixels or PIXELS[backbone], arm=arm, look=look,
                 seed=seed) for seed in range(seeds) for look in names]


FIRST = ["none", "mask", "mask, its size at random", "mirror", "larger"]
NORM = ["norm", "norm, its size at random"]
CONTROLS = ["mirror", "larger", "two random crops", "centre"]  # of equal cost
REMEDIES = ["mask_low", "norm of stage 3", "mask_and_norm", "grad_cam", "mask, two boxes"]
GRIDS = {
    "second_look": (second_look, [
        *looks("residual, fast", [*FIRST, "box"], 5),
        *looks("bare", ["none", *NORM, "mirror", "larger", "box"], 5),
        *(row for arm in ("multiply, fast", "near one, fast") for row in looks(arm, FIRST, 5)),
        *looks("residual, fast", ["norm", "centre", "two random crops"], 5),
        *(row for arm in ("residual, lambda 0, fast", "residual, lambda 0.5, fast", "residual, lambda 5, fast",
                          "residual") for row in looks(arm, FIRST[:3], 5)),
    ]),
    "second_look_remedies": (second_look, [
        *looks("residual, fast", [*REMEDIES, "saliency", "five crops"], 5),
        *looks("residual, lambda 0.5, fast", ["mask_and_norm", "mask_low"], 5),
    ]),
    "second_look_crops": (second_look, [
        *looks("residual, on its crops, fast", ["none", "mask", "mask, its size at random", "mirror"], 5),
        *(row for arm in ("bare, on its crops", "bare, on random crops")
          for row in looks(arm, ["none", *NORM, "mirror"], 5))]),
    "second_look_others": (second_look, [
        *looks("residual, fast", [*FIRST[:4], "norm", "rollout", "box"], 3, backbone="vit_s"),
        *looks("bare", ["none", "norm", "rollout", "saliency", "mirror", "box"], 3, backbone="vit_s"),
        *(row for name, pixels, seeds in (("heliconius", None, 3), ("flowers17", 160, 5)) for row in [
            *looks("residual, fast", [*FIRST, "norm", "centre", "two random crops"], seeds, name, pixels=pixels),
            *looks("bare", ["none", *NORM, *CONTROLS], seeds, name, pixels=pixels)]),
    ]),
    "second_look_drawn": (second_look, [row for name in DRAWN for row in [
        *looks("loupe", [*FIRST, *NORM, "grad_cam", "centre", "two random crops", "box"], 5, name, "swin_micro", 112),
        *looks("bare", ["none", *NORM, "mirror", "larger", "box"], 5, name, "swin_micro", 112)]]),
}
