"""Chapter 11's runs: solar cells instead of birds (the extra `solar`), and where the mask lies on them."""

import functools
import sys
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from runs import run
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.stats import mannwhitneyu, rankdata, spearmanr
from torch.utils.data import Dataset

from loupe_core import LoupeModel, Recipe, Trainer
from loupe_core.samples import Sample
from loupe_core.start.devices import device_of
from loupe_lab.evidence.masks import border_ring

TOP = 20  # cells that are smoothed away: about a tenth
BLOCK = 60  # cells that follow one another in the files and stay together; 44 modules gave 60 cells each, on average


def is_defective(probability: ArrayLike) -> np.ndarray:
    """The binary label, `(N,)` bool: True from 1/2 on, so for "defective, not sure" (2/3), and not for "functional, not
    sure" (1/3)."""
    return np.asarray(probability) >= 0.5


def split_cells(probability: ArrayLike, kind: ArrayLike, by: str = "cell", seed: int = 0) -> np.ndarray:
    """Which cells are for the test: `(N,)` bool, about a quarter.

    Args:
        probability: `(N,)`, of a defect.
        kind: `(N,)`, "mono" or "poly".
        by: "cell" draws single cells, a quarter of each combination of probability and kind, so that cells of one
            module are on both sides; "block" draws runs of BLOCK cells of one kind that follow one another in the
            files, where a module's cells are together.
    """
    probability, kind = np.asarray(probability), np.asarray(kind)
    rng, test = np.random.RandomState(seed), np.zeros(len(kind), bool)
    if by == "cell":
        groups = np.unique(np.stack([np.round(3 * probability).astype(int), kind == "poly"], 1), axis=0,
                           return_inverse=True)[1].ravel()
        for group in range(groups.max() + 1):
            members = np.flatnonzero(groups == group)
            test[rng.permutation(members)[: round(len(members) / 4)]] = True
        return test
    starts = np.flatnonzero(np.r_[True, kind[1:] != kind[:-1]])
    run_start = starts[np.searchsorted(starts, np.arange(len(kind)), side="right") - 1]
    block = np.unique(np.stack([run_start, (np.arange(len(kind)) - run_start) // BLOCK]), axis=1,
                      return_inverse=True)[1].ravel()
    for name in ("mono", "poly"):  # whole blocks until a quarter of the kind's cells is reached
        count = 0
        for b in rng.permutation(np.unique(block[kind == name])):
            if count < 0.25 * (kind == name).sum():
                test |= block == b
                count += (block == b).sum()
    return test


class Cells(Dataset):
    """Grey images `(N, H, W)` uint8 with labels and ids `(N,)`, as a data set of `Sample`."""

    def __init__(self, images: np.ndarray, labels: ArrayLike, transform: Callable, ids: np.ndarray) -> None:
        self.images, self.labels, self.transform, self.image_ids = images, np.asarray(labels, int), transform, ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample:
        image, geometry = self.transform(Image.fromarray(self.images[i]).convert("RGB"))
        return Sample(image, int(self.labels[i]), None, None, geometry, "", int(self.image_ids[i]))


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the probability that a defective cell scores above a sound one, ties counting half.

    nan where all cells have the same label.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, bool)
    if labels.all() or not labels.any():
        return float("nan")
    U = mannwhitneyu(scores[labels], scores[~labels], method="asymptotic").statistic
    return float(U / (labels.sum() * (~labels).sum()))


def darkness(grey: ArrayLike, cells: int = 14, surround: int = 5) -> np.ndarray:
    """How much darker each cell is than the mean of the surround x surround cells around it, itself included.

    `(H, W)` in [0, 1] -> `(cells, cells)`.
    """
    side = np.asarray(grey).shape[0] // cells
    mean = np.asarray(grey, float).reshape(cells, side, cells, side).mean((1, 3))
    return uniform_filter(mean, surround, mode="nearest") - mean


def another(groups: ArrayLike, seed: int = 0) -> np.ndarray:
    """For each image the index of another one of its group, `(N,)`: a cycle in random order within each group."""
    groups, partner = np.asarray(groups), np.arange(len(groups))
    rng = np.random.RandomState(seed)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        partner[members] = np.roll(members, 1)
    return partner


def without(grey: ArrayLike, cells: np.ndarray) -> np.ndarray:
    """The image `(H, W)` with the cells `(h, w)` bool smoothed: fine detail there, cracks too, is gone."""
    grey = np.asarray(grey, float)
    side = grey.shape[0] // cells.shape[0]
    hole = gaussian_filter(np.kron(cells, np.ones((side, side))), 1.5)  # soft edges, so as not to draw new ones
    return hole * gaussian_filter(grey, 12, mode="nearest") + (1 - hole) * grey


def top(values: ArrayLike, count: int = TOP) -> np.ndarray:
    """The `count` highest cells: `(h, w)` -> `(h, w)` bool."""
    values = np.asarray(values)
    return (rankdata(values, "ordinal") > values.size - count).reshape(values.shape)


def share_of_border(mask: np.ndarray) -> float:
    """Mean of the mask in the outermost ring of cells over its mean in all cells: 1 where the mask is constant."""
    return float(mask[border_ring(*mask.shape)].mean() / mask.mean())


def where_it_lies(masks: np.ndarray, grey: Iterable, defective: np.ndarray, kind: np.ndarray) -> dict:
    """How the masks `(N, h, w)` correlate with dark places of their images `(N, H, W)`, away from the border.

    dark_defective, dark_sound: Spearman's correlation of mask and `darkness`, mean over the images with that label (0
    where the mask is constant); *_other: with the darkness of another solar cell of the same label and kind, which has
    what such cells have in common, busbars and borders.
    """
    dark = np.stack([darkness(g, masks.shape[-1]) for g in grey])
    partner = another(2 * defective + (kind == "poly"))
    inner = (slice(1, -1), slice(1, -1))

    def agreement(pairs):
        found = [spearmanr(masks[i][inner].ravel(), dark[j][inner].ravel()).statistic if masks[i][inner].std() > 1e-7
                 else 0.0 for i, j in pairs]
        return np.array(found)

    own, other = agreement(enumerate(range(len(masks)))), agreement(enumerate(partner))
    means = {}
    for name, chosen in (("defective", defective), ("sound", ~defective)):
        means[f"dark_{name}"], means[f"dark_{name}_other"] = own[chosen].mean(), other[chosen].mean()
    return means


def when_it_goes(model: LoupeModel, grey: np.ndarray, masks: np.ndarray | None, kind: np.ndarray) -> dict:
    """By how much the probability of "defective" falls, mean over the images, when TOP cells of the grid are smoothed.

    drop_top: the mask's highest; drop_other: those of another image's mask; drop_random: random ones; drop_dark: the
    darkest, to see that the test can find something.

    Args:
        grey: `(N, H, W)` in [0, 1], images of defective cells.
        masks: `(N, 14, 14)`, or None without a gate.
    """
    rng, dark = np.random.RandomState(0), [darkness(g, 14) for g in grey]
    partner = another(kind == "poly")
    choices = dict(random=[top(rng.rand(14, 14)) for _ in grey], dark=[top(d) for d in dark])
    if masks is not None:
        choices |= dict(top=[top(m) for m in masks], other=[top(masks[j]) for j in partner])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    device = device_of(model)

    def probability(images):
        x = torch.stack([torch.tensor(g, dtype=torch.float32).expand(3, -1, -1) for g in images])
        with torch.no_grad():
            found = [model(b.to(device)).float().softmax(1)[:, 1].cpu() for b in ((x - mean) / std).split(64)]
        return torch.cat(found).numpy()

    full = probability(grey)
    drops = {f"drop_{k}": float((full - probability([without(g, c) for g, c in zip(grey, cells)])).mean())
             for k, cells in choices.items()}
    return drops


def measures(scores: np.ndarray, labels: np.ndarray, certain: np.ndarray, kind: np.ndarray) -> dict:
    """What a detector is judged by, on the test cells: `balanced` accuracy at 1/2; `auc` over all, over those that the
    expert was sure of, and over each kind; `sensitivity` at a specificity of 95 %; `calibration_gap`, the distance of
    the mean probability from the fraction of defective cells, mean over ten bins of equal width, each weighted by its
    number of cells. All arguments `(N,)`: probabilities, and bool but for `kind`."""
    said = scores >= 0.5
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = [abs(scores[bins == b].mean() - labels[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    mono = kind == "mono"
    return dict(images=len(labels), defective=int(labels.sum()),
                balanced=(said[labels].mean() + (~said[~labels]).mean()) / 2, auc=auc(scores, labels),
                auc_certain=auc(scores[certain], labels[certain]), auc_mono=auc(scores[mono], labels[mono]),
                auc_poly=auc(scores[~mono], labels[~mono]),
                sensitivity=(scores[labels] > np.quantile(scores[~labels], 0.95)).mean(), calibration_gap=sum(gaps))


# Columns that only a model with a gate fills.
OF_THE_MASK = dict.fromkeys("""mask_sd border dark_defective dark_defective_other dark_sound dark_sound_other drop_top
drop_other""".split(), "")


def rounded(outcome: dict, columns: dict = OF_THE_MASK) -> dict:
    """The outcome with floats rounded to four digits; `columns` that were not measured stay empty."""
    return columns | {k: round(float(v), 4) if isinstance(v, (float, np.floating)) else v for k, v in outcome.items()}


def build(arm: str, seed: int) -> LoupeModel:
    """A model of two classes, before its training."""
    torch.manual_seed(seed)
    return LoupeModel("swin_micro", num_classes=2, site=() if arm == "bare" else "stage2",
                      data_config=dict(crop_pct=1.0))  # the cell fills the picture


def recipe_of(arm: str, seed: int) -> Recipe:
    """The recipe of an arm."""
    return Recipe.small(seed=seed, lam=0.0 if arm == "lambda 0" else 0.05, epochs=3, crop_min=0.8)


def train_on_cells(cells: tuple[np.ndarray, np.ndarray, np.ndarray], model: LoupeModel, recipe: Recipe,
                   by: str) -> tuple[dict, Trainer]:
    """One training and all that is measured of it. The split is the same for all seeds.

    Args:
        cells: images `(N, H, W)` uint8, defect probabilities `(N,)`, kinds `(N,)` "mono" or "poly".
        by: of `split_cells`.
    """
    images, probability, kind = cells
    labels, test = is_defective(probability), split_cells(probability, kind, by)
    spare = np.zeros(len(test), bool)  # a tenth of the training cells, for validation
    spare[np.random.RandomState(1).permutation(np.flatnonzero(~test))[: round(0.1 * (~test).sum())]] = True
    members = dict(train=~test & ~spare, val=spare, test=test)

    def sets(split, transform):
        index = np.flatnonzero(members[split])
        return Cells(images[index], labels[index], transform, index + 1)

    outcome, trainer, tested = run(model, sets, recipe)
    model.float().eval()
    x = torch.stack([tested[i].image for i in range(len(tested))])
    with torch.no_grad():
        seen = [model(batch.to(device_of(model)), return_mask=True) for batch in x.split(64)]
    scores = torch.cat([logits.cpu() for logits, _ in seen]).softmax(1)[:, 1].double().numpy()
    labels, kind, certain = labels[test], kind[test], np.isin(probability[test], (0, 1))
    outcome |= measures(scores, labels, certain, kind)
    grey, masks = (x[:, 0] * model.std[0] + model.mean[0]).numpy(), None
    if model.gates:
        masks = torch.cat([mask[:, 0].cpu() for _, mask in seen]).numpy()
        outcome |= dict(mask_sd=masks.std((1, 2)).mean(), border=np.mean([share_of_border(m) for m in masks]))
        outcome |= where_it_lies(masks, grey, labels, kind)
        outcome["masks"] = {name: np.round(masks[chosen].mean(0), 5).astype(float).round(5).tolist()
                            for name, chosen in (("defective", labels), ("sound", ~labels))}
    gone = masks if masks is None else masks[labels]
    return rounded(outcome | when_it_goes(model, grey[labels], gone, kind[labels])), trainer


def without_network(rule: str, by: str, seed: int) -> tuple[dict, None]:
    """How well a rule without a network detects defects, on the split that `by` and the seed give.

    "darkness": the highest `darkness` in the image. "neighbours": the fraction of defective ones among the 5 training
    cells whose pictures correlate most with its own; "neighbours apart" leaves out those fewer than BLOCK files away.
    near: the fraction of test cells whose most similar training cell is fewer than BLOCK files away.
    """
    images, probability, kind = load_cells()
    N, side = len(images), images.shape[1] // 30
    test, labels = split_cells(probability, kind, by, seed), is_defective(probability)
    here, there, near = np.flatnonzero(test), np.flatnonzero(~test), ""
    if rule == "darkness":
        scores = np.array([darkness(image / 255, 15).max() for image in images[test]])
        scores = rankdata(scores) / len(scores)
    else:
        x = images.reshape(N, 30, side, 30, side).mean((2, 4)).reshape(N, -1)
        x = x - x.mean(1, keepdims=True)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        similarity = x[test] @ x[there].T  # (test cells, training cells)
        if rule == "neighbours apart":
            similarity[np.abs(here[:, None] - there) < BLOCK] = -2
        nearest = there[np.argsort(-similarity, axis=1)[:, :5]]
        scores, near = labels[nearest].mean(1), (np.abs(nearest[:, 0] - here) < BLOCK).mean()
    found = measures(scores, labels[test], np.isin(probability[test], (0, 1)), kind[test])
    names = ("images", "defective", "auc", "auc_certain", "auc_mono", "auc_poly")
    return rounded({name: found[name] for name in names} | dict(near=near), {}), None


def halved(images: np.ndarray) -> np.ndarray:
    """Means over 2 x 2 pixels: `(N, H, W)` -> `(N, H / 2, W / 2)` uint8."""
    N, H, W = images.shape
    return images.reshape(N, H // 2, 2, W // 2, 2).mean((2, 4)).round().astype(np.uint8)


@functools.cache
def load_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ELPV data set at half its size: images `(2624, 150, 150)` uint8, defect probabilities and kinds `(2624,)`."""
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError:
        sys.exit("solar: elpv-dataset is not installed; run: pip install 'loupe-core[solar]'")
    images, probability, kind = load_dataset()
    return halved(images), probability, kind


def solar(arm: str, seed: int) -> tuple[dict, Trainer]:
    """One training on the split by blocks, where fewer test cells share their module with training cells."""
    return train_on_cells(load_cells(), build(arm, seed), recipe_of(arm, seed), "block")


GRIDS = {
    "solar_splits": (without_network, [dict(rule=rule, by=by, seed=seed) for rule, by in (
        ("neighbours", "cell"), ("neighbours", "block"), ("neighbours apart", "cell"), ("darkness", "block"))
        for seed in range(10)]),
    "solar": (solar, [dict(arm=arm, seed=seed) for seed in range(3) for arm in ("bare", "loupe", "lambda 0")]),
}
