"""Chapter 10's runs: attacks within a budget, checks of these attacks, and other scenes around the bird."""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from runs import SMALL, provenance, trained

from loupe_lab.birds.fieldguide import SPECIES, draw
from loupe_lab.evidence.results import answers
from loupe_lab.evidence.robustness import answers_to, as_pixels, attacked, composed, empty_scene, slopes

BUDGETS = (0.5, 1, 2)  # in 1/255
# Arm -> seeds, counted from 0, of each grid.
SEEDS = {
    "robustness": {"bare": 5, "loupe": 5, "constant": 5, "lambda 5": 3, "residual": 3},
    "context": {"bare": 5, "loupe": 5, "constant": 5, "lambda 5": 5, "lambda 0": 4, "residual": 3, "stage3": 3},
    "robustness_checks": {"bare": 3, "loupe": 3},
}
SIDE = 20  # px, of the squares that hide a part of the image


@lru_cache(maxsize=2)
def birds(every: int):
    """Each `every`-th test image: its model input as pixels, the label, the bird's pixels in the input."""
    model, _, test = trained("bare", 0)
    seen = range(0, len(test), every)
    samples = [test[i] for i in seen]
    pixels = as_pixels(model, torch.stack([sample.image for sample in samples]))
    bird = torch.stack([as_input(model, test, test.segmentation(i)[..., None].repeat(3, -1) * np.uint8(255))[0] > 0.5
                        for i in seen])
    return pixels, torch.tensor([sample.label for sample in samples]), bird, [test.paths[i] for i in seen]


def as_input(model, test, picture: np.ndarray) -> torch.Tensor:
    """A picture (H, W, 3) uint8, resized and cropped as the test images are: (3, h, w) in [0, 1]."""
    return as_pixels(model, test.transform(Image.fromarray(picture))[0])


def movement(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """How far the logits (B, K) moved, relative to their length, (B,). A number added to all of them is no movement."""
    before, after = (logits - logits.mean(1, keepdim=True) for logits in (before, after))
    return (after - before).norm(dim=1) / before.norm(dim=1)


def patch(bird: np.ndarray, side: int, on: bool = True, seed: int = 0) -> np.ndarray:
    """A square of `side` px with as much of the bird in it as there can be, or (`on` False) as little: (H, W) bool.

    Args:
        bird: (H, W) bool, the segmentation.
        seed: chooses where several squares are as good.
    """
    seen = np.pad(np.cumsum(np.cumsum(bird, 0), 1), ((1, 0), (1, 0)))
    share = seen[side:, side:] - seen[:-side, side:] - seen[side:, :-side] + seen[:-side, :-side]
    places = np.argwhere(share == (share.max() if on else share.min()))
    top, left = places[np.random.default_rng(seed).integers(len(places))]
    square = np.zeros(bird.shape, bool)
    square[top : top + side, left : left + side] = True
    return square


def hexed(mask) -> str:
    return answers(torch.as_tensor(mask).numpy())


def robustness(arm: str, seed: int) -> tuple[dict, None]:
    """Which of 100 test images a model names right, clean and under attack; hexadecimal, see `results.answers`.

    fgsm_b, noise_b: right without the attack and under it. pgd_b: right under FGSM and PGD-10 at b and at all smaller
    budgets. bird_1, background_1: right where FGSM may change the bird alone, or all but the bird, at 1/255.
    margin, slope, radius: medians over the images named right, in logits, logits a 1/255, and 1/255 (see `slopes`);
    slope_on_bird: the mean share of the slope that lies on the bird; bird_area: the bird's mean share of the pixels.
    """
    model = trained(arm, seed)[0].requires_grad_(False)
    pixels, labels, bird, _ = birds(4)

    def stands(which, budget, kind, **options):
        """Of the images `which` (bool), those still named right; an attack is made on no others."""
        left = which.clone()
        if which.any():
            moved = attacked(model, pixels[which], labels[which], budget, kind, **options)
            left[which] = answers_to(model, moved).argmax(1) == labels[which]
        return left

    clean = answers_to(model, pixels).argmax(1) == labels
    out, left = dict(images=len(labels), right=hexed(clean)), clean
    for b in BUDGETS:
        fgsm = stands(clean, b, "fgsm")
        left = stands(left & fgsm, b, "pgd")
        out |= {f"fgsm_{b}": hexed(fgsm), f"pgd_{b}": hexed(left), f"noise_{b}": hexed(stands(clean, b, "noise"))}
    for name, where in (("bird_1", bird), ("background_1", ~bird)):
        out[name] = hexed(stands(clean, 1, "fgsm", within=where[clean]))
    margins, maps = slopes(model, pixels, labels)
    steep = maps.sum((1, 2))
    share = (maps * bird).sum((1, 2)) / steep
    medians = dict(margin=margins[clean], slope=steep[clean] / 255, radius=255 * (margins / steep)[clean])
    out |= {name: round(v.median().item(), 4) for name, v in medians.items()}
    out |= dict(slope_on_bird=round(share.mean().item(), 4), bird_area=round(bird.float().mean().item(), 4))
    return out | provenance(), None


@lru_cache(maxsize=2)
def examples(arm: str, seed: int, budget: float) -> torch.Tensor:
    model = trained(arm, seed)[0].requires_grad_(False)
    pixels, labels, *_ = birds(10)
    return attacked(model, pixels, labels, budget)


def robustness_checks(arm: str, seed: int) -> tuple[dict, None]:
    """Is the attack a good one? On 40 test images; each attack on its own, on all images that are right without it.

    pgd_steps: at 0.5/255, cross-entropy; ratio_10: the same with the loss that knows no scale; pgd_8: 10 steps at
    8/255; bare_to, loupe_to: under examples that were made on a bare model and on a Loupe of another seed, at 1/255.
    """
    model = trained(arm, seed)[0].requires_grad_(False)
    pixels, labels, *_ = birds(10)
    clean = answers_to(model, pixels).argmax(1) == labels
    out = dict(images=len(labels), right=hexed(clean))

    def right(moved):
        left = clean.clone()
        left[clean] = answers_to(model, moved).argmax(1) == labels[clean]
        return hexed(left)

    x, y = pixels[clean], labels[clean]
    for steps in (1, 10, 40):
        out[f"pgd_{steps}"] = right(attacked(model, x, y, 0.5, steps=steps))
    out["ratio_10"] = right(attacked(model, x, y, 0.5, loss="ratio"))
    out["big_8"] = right(attacked(model, x, y, 8))
    other = seed - 1 if seed else 1
    out["white_1"] = right(attacked(model, x, y, 1))
    for source in ("bare", "loupe"):
        out[f"{source}_to"] = right(examples(source, other, 1)[clean])
    return out | provenance(), None


@lru_cache(maxsize=1)
def scenes() -> dict[str, torch.Tensor]:
    """What is put around or beside the test birds: each (200, 3, h, w) in [0, 1], see `context`."""
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
    """The next species of the same group, which differs in one part."""
    group = [i for i, species in enumerate(SMALL) if species.group == SMALL[label].group]
    return group[(group.index(label) + 1) % len(group)]


def context(arm: str, seed: int) -> tuple[dict, None]:
    """200 test birds in other surroundings: which are named right, how many answers change, how far the logits move.

    scene: the same bird drawn in another scene, with its light, haze and twigs; swap: its pixels as they are, another
    scene around them; same, neighbour: around them, a large bird of the same species or of one that differs in one
    part, the same drawing but for that; bird: around them, the mean colour; silhouette: the mean colour in place of
    the bird; empty: the bird's own scene without it; on, off: the mean colour in a square of 20 px, on the bird and
    off it; noise_bird, noise_background: signs of 16/255 thrown on each pixel of the bird, or of all else.
    to_neighbour, from_clean: share of answers that are the neighbour's species, with it behind the bird and without.
    """
    model = trained(arm, seed)[0]
    pixels, labels, bird, _ = birds(2)
    around, grey = scenes(), torch.tensor(model.mean)[:, None, None]
    squares = {on: torch.stack([torch.from_numpy(patch(b, SIDE, on, i)) for i, b in enumerate(bird.numpy())])
               for on in (True, False)}

    def noise(where):
        return attacked(model, pixels, labels, 16, "noise", within=where)

    conditions = dict(
        scene=lambda: around["scene"], swap=lambda: composed(pixels, bird, around["swap"]),
        same=lambda: composed(pixels, bird, around["same"]),
        neighbour=lambda: composed(pixels, bird, around["neighbour"]),
        bird=lambda: composed(pixels, bird, grey), silhouette=lambda: composed(pixels, ~bird, grey),
        empty=lambda: around["empty"], on=lambda: composed(pixels, ~squares[True], grey),
        off=lambda: composed(pixels, ~squares[False], grey), noise_bird=lambda: noise(bird),
        noise_background=lambda: noise(~bird))
    before = answers_to(model, pixels)
    clean = before.argmax(1)
    out = dict(images=len(labels), right=hexed(clean == labels))
    others = torch.tensor([neighbour(label) for label in labels.tolist()])
    for name, make in conditions.items():
        after = answers_to(model, make())
        named = after.argmax(1)
        out |= {name: hexed(named == labels), f"{name}_changed": round((named != clean).float().mean().item(), 4),
                f"{name}_moved": round(movement(before, after).mean().item(), 4)}
        if name == "neighbour":
            out |= dict(to_neighbour=round((named == others).float().mean().item(), 4),
                        from_clean=round((clean == others).float().mean().item(), 4))
    return out | provenance(), None


def choices(grid: str) -> list[dict]:
    return [dict(arm=arm, seed=seed) for seed in range(5) for arm, seeds in SEEDS[grid].items() if seed < seeds]


GRIDS = {function.__name__: (function, choices(function.__name__))
         for function in (robustness, context, robustness_checks)}
