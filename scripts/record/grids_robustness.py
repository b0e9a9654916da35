"""Chapter 10's runs: attacks within a budget, checks of these attacks, and other scenes around the bird."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from runs import SMALL, provenance, trained

from loupe_core import CUB200, LoupeModel
from loupe_lab.birds.fieldguide import SPECIES, draw
from loupe_lab.evidence.audit import relative_change
from loupe_lab.evidence.results import pack_right
from loupe_lab.evidence.robustness import as_pixels, attack, composed, empty_scene, input_gradients, logits_of

BUDGETS = (0.5, 1, 2)  # in 1/255
# Arm -> seeds, counted from 0, of each grid.
SEEDS = {
    "robustness": {"bare": 5, "loupe": 5, "constant": 5, "lambda 5": 3, "residual": 3},
    "context": {"bare": 5, "loupe": 5, "constant": 5, "lambda 5": 5, "lambda 0": 4, "residual": 3, "stage3": 3},
    "robustness_checks": {"bare": 3, "loupe": 3},
}
SIDE = 20  # px, of the squares that cover a part of the image


@lru_cache(maxsize=2)
def birds(every: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Every n-th (`every`) test image: the model input as pixels `(N, 3, H, W)`, labels `(N,)`, where the bird lies in
    the input `(N, H, W)` bool, and paths."""
    model, _, test = trained("bare", 0)
    seen = range(0, len(test), every)
    samples = [test[i] for i in seen]
    pixels = as_pixels(model, torch.stack([sample.image for sample in samples]))
    bird = torch.stack([as_input(model, test, test.segmentation(i)[..., None].repeat(3, -1) * np.uint8(255))[0] > 0.5
                        for i in seen])
    return pixels, torch.tensor([sample.label for sample in samples]), bird, [test.paths[i] for i in seen]


def as_input(model: LoupeModel, test: CUB200, picture: np.ndarray) -> torch.Tensor:
    """A picture `(H, W, 3)` uint8, resized and cropped as the test images are: `(3, h, w)` in [0, 1]."""
    return as_pixels(model, test.transform(Image.fromarray(picture))[0])


def centred_change(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`relative_change` of the logits `(B, K)` after the mean over the classes is subtracted from both: `(B,)`.

    A number added to all logits changes no prediction and does not count here; in `relative_change` it does.
    """
    return relative_change(*(z - z.mean(1, keepdim=True) for z in (logits, reference)))


def patch(bird: np.ndarray, side: int, on: bool = True, seed: int = 0) -> np.ndarray:
    """The square of `side` px that holds most of the bird, or (`on` False) least of it: `(H, W)` bool.

    Args:
        bird: `(H, W)` bool, the segmentation.
        seed: chooses among squares that hold the same amount.
    """
    seen = np.pad(np.cumsum(np.cumsum(bird, 0), 1), ((1, 0), (1, 0)))
    share = seen[side:, side:] - seen[:-side, side:] - seen[side:, :-side] + seen[:-side, :-side]
    places = np.argwhere(share == (share.max() if on else share.min()))
    top, left = places[np.random.default_rng(seed).integers(len(places))]
    square = np.zeros(bird.shape, bool)
    square[top : top + side, left : left + side] = True
    return square


def robustness(arm: str, seed: int) -> tuple[dict, None]:
    """Which of 100 test images a model classifies correctly, as they are (`right`) and attacked, see `pack_right`.

    fgsm_b, noise_b: correct without and with the attack at budget b. pgd_b: correct under FGSM and PGD-10 at b and at
    all smaller budgets. bird_1, background_1: correct where FGSM may change only the bird, or all but the bird, at
    1/255. margin, slope, radius: the margin, the sum of `input_gradients` per 1/255, and the first over the second, in
    1/255; medians over the correctly classified images. slope_on_bird: fraction of the gradients that lies on the bird;
    bird_area: fraction of the pixels that are bird; means over the images.
    """
    model = trained(arm, seed)[0].requires_grad_(False)
    pixels, labels, bird, _ = birds(4)

    def still_right(which, budget, kind, **options):
        """Of the images `which` (bool), those still classified correctly; only they are attacked."""
        left = which.clone()
        if which.any():
            attacked = attack(model, pixels[which], labels[which], budget, kind, **options)
            left[which] = logits_of(model, attacked).argmax(1) == labels[which]
        return left

    clean = logits_of(model, pixels).argmax(1) == labels
    out, left = dict(images=len(labels), right=pack_right(clean)), clean
    for b in BUDGETS:
        fgsm = still_right(clean, b, "fgsm")
        left = still_right(left & fgsm, b, "pgd")
        out |= {f"fgsm_{b}": pack_right(fgsm), f"pgd_{b}": pack_right(left),
                f"noise_{b}": pack_right(still_right(clean, b, "noise"))}
    for name, where in (("bird_1", bird), ("background_1", ~bird)):
        out[name] = pack_right(still_right(clean, 1, "fgsm", within=where[clean]))
    margins, maps = input_gradients(model, pixels, labels)
    total = maps.sum((1, 2))
    share = (maps * bird).sum((1, 2)) / total
    medians = dict(margin=margins[clean], slope=total[clean] / 255, radius=255 * (margins / total)[clean])
    out |= {name: round(v.median().item(), 4) for name, v in medians.items()}
    out |= dict(slope_on_bird=round(share.mean().item(), 4), bird_area=round(bird.float().mean().item(), 4))
    return out | provenance(), None


@lru_cache(maxsize=2)
def examples(arm: str, seed: int, budget: float) -> torch.Tensor:
    """The 40 test images of `robustness_checks` after PGD-10 on this model."""
    model = trained(arm, seed)[0].requires_grad_(False)
    pixels, labels, *_ = birds(10)
    return attack(model, pixels, labels, budget)


def robustness_checks(arm: str, seed: int) -> tuple[dict, None]:
    """Is the attack strong enough? Which of 40 test images are classified correctly without (`right`) and with each
    attack on its own, see `pack_right`; only images that are correct without it are attacked.

    pgd_1, pgd_10, pgd_40: so many steps at 0.5/255 on the cross-entropy; ratio_10: 10 steps on the ratio loss, which
    does not depend on the logits' scale; big_8: 10 steps at 8/255; white_1: 10 steps at 1/255; bare_to, loupe_to: the
    same at 1/255, computed on a bare model and on a Loupe of another seed.
    """
    model = trained(arm, seed)[0].requires_grad_(False)
    pixels, labels, *_ = birds(10)
    clean = logits_of(model, pixels).argmax(1) == labels
    out = dict(images=len(labels), right=pack_right(clean))

    def right(attacked):
        left = clean.clone()
        left[clean] = logits_of(model, attacked).argmax(1) == labels[clean]
        return pack_right(left)

    x, y = pixels[clean], labels[clean]
    for steps in (1, 10, 40):
        out[f"pgd_{steps}"] = right(attack(model, x, y, 0.5, steps=steps))
    out["ratio_10"] = right(attack(model, x, y, 0.5, loss="ratio"))
    out["big_8"] = right(attack(model, x, y, 8))
    other = seed - 1 if seed else 1
    out["white_1"] = right(attack(model, x, y, 1))
    for source in ("bare", "loupe"):
        out[f"{source}_to"] = right(examples(source, other, 1)[clean])
    return out | provenance(), None


@lru_cache(maxsize=1)
def scenes() -> dict[str, torch.Tensor]:
    """What is put around the test birds or in their place: each `(200, 3, h, w)` in [0, 1], see `context`."""
    model, _, test = trained("bare", 0)
    _, labels, _, paths = birds(2)
    made = {name: [] for name in ("scene", "empty", "swap", "same", "neighbour")}
    for path, label in zip(paths, labels.tolist()):
        species, k = SMALL[label], int(path.rsplit("_", 1)[1].split(".")[0])
        number = SPECIES.index(species)
        seed = (0, number, k)  # write_fieldguide's
        large = dict(weather=1.0, area=(0.5, 0.6))
        drawn = dict(
            scene=draw(species.attributes, seed, scene_seed=(10, number, k), weather=1.0).image,
            empty=empty_scene(seed), swap=empty_scene((11, number, k)),
            same=draw(species.attributes, (12, number, k), **large).image,
            neighbour=draw(SMALL[neighbour(label)].attributes, (12, number, k), **large).image)
        for name, picture in drawn.items():
            made[name].append(as_input(model, test, picture))
    return {name: torch.stack(pictures) for name, pictures in made.items()}


def neighbour(label: int) -> int:
    """The label of the next species of the same group, which differs in one part."""
    group = [i for i, species in enumerate(SMALL) if species.group == SMALL[label].group]
    return group[(group.index(label) + 1) % len(group)]


def context(arm: str, seed: int) -> tuple[dict, None]:
    """200 test birds in other surroundings: which are classified correctly (see `pack_right`), X_changed: the fraction
    whose predicted class changes, X_moved: the `centred_change` of the logits, mean over images.

    scene: the same bird drawn in another scene, with its light, haze and twigs; swap: the bird's pixels in another
    scene; same, neighbour: the bird's pixels in front of a large bird of the same species or of one that differs in one
    part, the same drawing in all else; bird: the bird's pixels in front of the mean colour; silhouette: the mean colour
    in place of the bird; empty: the bird's own scene without it; on, off: the mean colour in a square of 20 px, on the
    bird and off it; noise_bird, noise_background: 16/255 with random signs on the bird, or on all else. to_neighbour,
    from_clean: the fraction of predictions that are the neighbour's species, with it behind the bird and without.
    """
    model = trained(arm, seed)[0]
    pixels, labels, bird, _ = birds(2)
    around, grey = scenes(), torch.tensor(model.mean)[:, None, None]
    squares = {on: torch.stack([torch.from_numpy(patch(b, SIDE, on, i)) for i, b in enumerate(bird.numpy())])
               for on in (True, False)}

    def noise(where):
        return attack(model, pixels, labels, 16, "noise", within=where)

    conditions: dict[str, Callable[[], torch.Tensor]] = dict(
        scene=lambda: around["scene"], swap=lambda: composed(pixels, bird, around["swap"]),
        same=lambda: composed(pixels, bird, around["same"]),
        neighbour=lambda: composed(pixels, bird, around["neighbour"]),
        bird=lambda: composed(pixels, bird, grey), silhouette=lambda: composed(pixels, ~bird, grey),
        empty=lambda: around["empty"], on=lambda: composed(pixels, ~squares[True], grey),
        off=lambda: composed(pixels, ~squares[False], grey), noise_bird=lambda: noise(bird),
        noise_background=lambda: noise(~bird))
    before = logits_of(model, pixels)
    clean = before.argmax(1)
    out = dict(images=len(labels), right=pack_right(clean == labels))
    others = torch.tensor([neighbour(label) for label in labels.tolist()])
    for name, make in conditions.items():
        after = logits_of(model, make())
        predicted = after.argmax(1)
        out |= {name: pack_right(predicted == labels),
                f"{name}_changed": round((predicted != clean).float().mean().item(), 4),
                f"{name}_moved": round(centred_change(after, before).mean().item(), 4)}
        if name == "neighbour":
            out |= dict(to_neighbour=round((predicted == others).float().mean().item(), 4),
                        from_clean=round((clean == others).float().mean().item(), 4))
    return out | provenance(), None


def choices(grid: str) -> list[dict]:
    """The rows of a grid."""
    return [dict(arm=arm, seed=seed) for seed in range(5) for arm, seeds in SEEDS[grid].items() if seed < seeds]


GRIDS = {function.__name__: (function, choices(function.__name__))
         for function in (robustness, context, robustness_checks)}
