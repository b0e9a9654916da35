"""Chapter 11's runs: solar cells instead of birds (the extra `solar`), and where the mask lies on them; brain scans.

Every cell is tested once, by one of five folds, so that the folds' test sets have no cell in common. Cells of one block
are in one fold; only to measure what that matters, folds are drawn by single cells as well.
"""

import functools
import sys
from collections.abc import Callable, Iterable

import grids_photographs as photographs
import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.stats import rankdata, spearmanr
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch.utils.data import Dataset

from loupe_core import LoupeError, LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.samples import Sample
from loupe_core.start.devices import device_of
from loupe_lab.evidence.masks import border_ring
from loupe_lab.evidence.results import pack_right
from loupe_lab.evidence.statistics import auc

RECORDING = {"solar_lite0"}  # grids whose rows are not all there yet

FOLDS = 5
PIXELS, EPOCHS = 128, 5  # a side, and as many as take three minutes on an idle core

# The set does not say which of the 44 modules a cell comes from. These are lengths of runs of files, in their order,
# that are taken for modules. What speaks for them: the kind of cell changes nine times, after 60, 300, 180, 360, 714,
# 530, 72, 180 and 48 files; so all runs of a kind but two are made of modules of 60 cells, or one of 72, one of 48.
# 714 = 11 x 60 + 54 and 530 = 8 x 60 + 50 give the number of modules of each kind that the set's authors report, 18
# and 26. By their pictures the module of 50 is most likely the fourth of its run (or the third: ten cells). That of 54
# is one of five, which stay together.
BLOCKS = (60, *5 * (60,), *3 * (60,), *6 * (60,), 60, 5 * 60 - 6, *6 * (60,), *3 * (60,), 50, *5 * (60,), 72,
          *3 * (60,), 48, *3 * (60,))


def is_defective(probability: ArrayLike) -> np.ndarray:
    """The binary label, `(N,)` bool: True from 1/2 on, so for "defective, not sure" (2/3), and not for "functional, not
    sure" (1/3)."""
    return np.asarray(probability) >= 0.5


def blocks_of(kind: ArrayLike) -> np.ndarray:
    """The block of each cell, `(N,)` int, from the kinds of cell in the order of the files.

    Raises:
        LoupeError: these are not the files that BLOCKS is about.
    """
    block, kind = np.repeat(np.arange(len(BLOCKS)), BLOCKS), np.asarray(kind)
    same = len(block) == len(kind) and all(len(set(kind[block == b])) == 1 for b in range(len(BLOCKS)))
    if not same:
        raise LoupeError(f"solar: found {len(kind)} cells, expected {len(block)} whose kind changes only between the "
                         "blocks of BLOCKS; take elpv-dataset 1.0.0, or see which files follow one another")
    return block


def folds(probability: ArrayLike, kind: ArrayLike, by: str) -> np.ndarray:
    """The fold that tests a cell, `(N,)` int below FOLDS. Folds have about as many of each kind and label.

    Args:
        probability: `(N,)`, of a defect.
        kind: `(N,)`, "mono" or "poly".
        by: "block" keeps blocks together; "cell" deals single cells, so that a block is in all folds.
    """
    stratum = 2 * is_defective(probability) + (np.asarray(kind) == "poly")
    chooser = StratifiedGroupKFold if by == "block" else StratifiedKFold
    found = np.empty(len(stratum), int)
    chosen = chooser(FOLDS, shuffle=True, random_state=0)
    for fold, (_, test) in enumerate(chosen.split(stratum, stratum, blocks_of(kind) if by == "block" else None)):
        found[test] = fold
    return found


def split_of(fold_of: np.ndarray, fold: int) -> dict[str, np.ndarray]:
    """"test", a fold; "val", the next one, which chooses the epoch; "train", the other three: each `(N,)` bool."""
    test, val = fold_of == fold, fold_of == (fold + 1) % FOLDS
    return dict(test=test, val=val, train=~test & ~val)


class Cells(Dataset):
    """Grey images `(N, H, W)` uint8 with labels and ids `(N,)`, as a data set of `Sample`."""

    def __init__(self, images: np.ndarray, labels: ArrayLike, transform: Callable, ids: np.ndarray) -> None:
        self.images, self.labels, self.transform, self.image_ids = images, np.asarray(labels, int), transform, ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample:
        image, geometry = self.transform(Image.fromarray(self.images[i]).convert("RGB"))
        return Sample(image, int(self.labels[i]), None, None, geometry, "", int(self.image_ids[i]))


def within_blocks(scores: ArrayLike, labels: ArrayLike, block: ArrayLike) -> float:
    """`auc` over those pairs of a defective and a sound cell that are of one block: what a score knows of cells, beside
    what it knows of their modules. nan without such pairs."""
    scores, labels, block = np.asarray(scores), np.asarray(labels, bool), np.asarray(block)
    found = [(auc(scores[b], labels[b]), labels[b].sum() * (~labels[b]).sum())
             for b in (block == name for name in np.unique(block)) if 0 < labels[b].sum() < b.sum()]
    if not found:
        return float("nan")
    areas, pairs = zip(*found)
    return float(np.average(areas, weights=pairs))


def darkness(grey: ArrayLike, cells: int, surround: int = 5) -> np.ndarray:
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


def top(values: ArrayLike) -> np.ndarray:
    """The highest tenth of the cells: `(h, w)` -> `(h, w)` bool."""
    values = np.asarray(values)
    return (rankdata(values, "ordinal") > values.size - round(values.size / 10)).reshape(values.shape)


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


def when_it_goes(model: LoupeModel, grey: np.ndarray, masks: np.ndarray | None, kind: np.ndarray,
                 cells: int) -> dict:
    """By how much the probability of "defective" falls, mean over the images, when a tenth of the grid is smoothed.

    drop_top: the mask's highest; drop_other: those of another image's mask; drop_random: random ones; drop_dark: the
    darkest, to see that the test can find something.

    Args:
        grey: `(N, H, W)` in [0, 1], images of defective cells.
        masks: `(N, cells, cells)`, or None without a gate.
    """
    rng, dark = np.random.RandomState(0), [darkness(g, cells) for g in grey]
    partner = another(kind == "poly")
    choices = dict(random=[top(rng.rand(cells, cells)) for _ in grey], dark=[top(d) for d in dark])
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
    return {f"drop_{k}": float((full - probability([without(g, c) for g, c in zip(grey, chosen)])).mean())
            for k, chosen in choices.items()}


def measures(scores: np.ndarray, labels: np.ndarray, certain: np.ndarray, kind: np.ndarray,
             block: np.ndarray) -> dict:
    """What a detector is judged by, on the test cells: accuracy and `balanced` accuracy at 1/2; `auc` over all, over
    those that the expert was sure of, over each kind, and `within_blocks`; `sensitivity` at a specificity of 95 %;
    `calibration_gap`, the distance of the mean probability from the fraction of defective cells, mean over ten bins of
    equal width, each weighted by its number of cells. right and scores hold every cell: see `pack_right`, and
    probabilities in 1/65535 as hexadecimal text, four digits a cell. All arguments `(N,)`: probabilities, bool, bool,
    "mono" or "poly", and int."""
    said = scores >= 0.5
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = [abs(scores[bins == b].mean() - labels[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    mono = kind == "mono"
    return dict(accuracy=(said == labels).mean(), balanced=(said[labels].mean() + (~said[~labels]).mean()) / 2,
                auc=auc(scores, labels), auc_within=within_blocks(scores, labels, block),
                auc_certain=auc(scores[certain], labels[certain]), auc_mono=auc(scores[mono], labels[mono]),
                auc_poly=auc(scores[~mono], labels[~mono]),
                sensitivity=(scores[labels] > np.quantile(scores[~labels], 0.95)).mean(), calibration_gap=sum(gaps),
                right=pack_right(said == labels),
                scores=(65535 * scores).round().astype(">u2").tobytes().hex())


# Columns that only a model with a gate fills.
OF_THE_MASK = dict.fromkeys("""mask_sd border dark_defective dark_defective_other dark_sound dark_sound_other drop_top
drop_other""".split(), "")


def rounded(outcome: dict, columns: dict = OF_THE_MASK) -> dict:
    """The outcome with floats rounded to four digits; `columns` that were not measured stay empty."""
    return columns | {k: round(float(v), 4) if isinstance(v, (float, np.floating)) else v for k, v in outcome.items()}


def train_on_cells(by: str, arm: str, fold: int) -> tuple[dict, Trainer]:
    """One training and all that is measured of it.

    `split_of` says which cells train. `arm` is one of `grids_photographs.CHANGES`; the fold's number is the seed too.

    Returns:
        The row, and the trainer: cells and defective, the numbers of test cells; tested, which they are among all
        (`pack_right`); `measures` and mask_mean of the chosen epoch, and with `last_` of the last one; with
        last_train_accuracy, on the training cells as the test shows them. val_accuracy, probe and best_epoch are as
        for `grids_photographs.photograph`. What follows of masks is of the last epoch, which a probe never is.
    """
    images, probability, kind = load_cells()
    labels, certain, block = is_defective(probability), np.isin(probability, (0, 1)), blocks_of(kind)
    chosen = split_of(folds(probability, kind, by), fold)
    test = chosen["test"]

    def part(split, transform):
        return Cells(images[chosen[split]], labels[chosen[split]], transform, np.flatnonzero(chosen[split]) + 1)

    model = photographs.build("lite0", PIXELS, arm, fold, ["sound", "defective"])
    model.crop_pct = 1.0  # the cell fills the picture
    recipe = Recipe.finetune(epochs=EPOCHS, patience=EPOCHS, seed=fold, crop_min=0.8,
                             **photographs.CHANGES[arm].get("recipe", {}))
    plain, trainer, last = transforms_for(model.data_config, train=False), Trainer(model, recipe, progress=False), {}
    train = part("train", transforms_for(model.data_config, **recipe.train_transform_options()))
    trainer.fit(train, part("val", plain), on_epoch_end=lambda row: last.update(photographs.weights_of(model)))
    outcome = dict(cells=int(test.sum()), defective=int(labels[test].sum()), tested=pack_right(test),
                   val_accuracy=trainer.best["val_accuracy"], probe=trainer.start["val_accuracy"],
                   best_epoch=trainer.best["epoch"])
    tested = part("test", plain)
    for weights, which in ((photographs.weights_of(model), ""), (last, "last_")):
        model.load_state_dict(weights)
        told = trainer.evaluate(tested)
        found = measures(told.probabilities[:, 1].astype(float), labels[test], certain[test], kind[test], block[test])
        outcome |= {which + name: value for name, value in (found | dict(mask_mean=told.mask_mean)).items()}
    outcome["last_train_accuracy"] = trainer.evaluate(part("train", plain)).accuracy
    return rounded(outcome | of_the_mask(model, tested, labels[test], kind[test])), trainer


def of_the_mask(model: LoupeModel, tested: Cells, labels: np.ndarray, kind: np.ndarray) -> dict:
    """Where the mask lies (`where_it_lies`, `share_of_border`, mask_sd within an image) and what hangs on it
    (`when_it_goes`); masks: its means over defective and over sound cells, `(h, w)`."""
    model.float().eval()
    x = torch.stack([tested[i].image for i in range(len(tested))])
    grey, masks, outcome, cells = (x[:, 0] * model.std[0] + model.mean[0]).numpy(), None, {}, PIXELS // 8
    if model.gates:
        with torch.no_grad():
            masks = torch.cat([model(batch.to(device_of(model)), return_mask=True)[1][:, 0].cpu()
                               for batch in x.split(64)]).numpy()
        outcome = dict(mask_sd=masks.std((1, 2)).mean(), border=np.mean([share_of_border(m) for m in masks]))
        outcome |= where_it_lies(masks, grey, labels, kind)
        outcome["masks"] = {name: masks[chosen].mean(0).astype(float).round(4).tolist()
                            for name, chosen in (("defective", labels), ("sound", ~labels))}
    return outcome | when_it_goes(model, grey[labels], None if masks is None else masks[labels], kind[labels], cells)


def without_network(rule: str, by: str, fold: int) -> tuple[dict, None]:
    """How well a rule without a network detects defects in a fold of `by`, from the cells that train a network there.

    "darkness": the highest `darkness` in the image, as a rank. "neighbours": the fraction of defective ones among the 5
    training cells whose pictures correlate most with its own; "neighbours apart" leaves out those of its own block.
    near: the fraction of test cells whose most similar training cell is of their own block.
    """
    images, probability, kind = load_cells()
    N, side = len(images), images.shape[1] // 30
    labels, block, near = is_defective(probability), blocks_of(kind), ""
    chosen = split_of(folds(probability, kind, by), fold)
    test, here, there = chosen["test"], np.flatnonzero(chosen["test"]), np.flatnonzero(chosen["train"])
    if rule == "darkness":
        scores = np.array([darkness(image / 255, 15).max() for image in images[test]])
        scores = rankdata(scores) / len(scores)
    else:
        x = standardised(images.reshape(N, 30, side, 30, side).mean((2, 4)))
        similarity = x[test] @ x[there].T  # (test cells, training cells)
        if rule == "neighbours apart":
            similarity[block[here][:, None] == block[there]] = -2
        nearest = there[np.argsort(-similarity, axis=1)[:, :5]]
        scores, near = labels[nearest].mean(1), (block[nearest[:, 0]] == block[here]).mean()
    found = measures(scores, labels[test], np.isin(probability[test], (0, 1)), kind[test], block[test])
    names = ("auc", "auc_within", "auc_certain", "auc_mono", "auc_poly", "scores")
    counts = dict(cells=len(here), defective=int(labels[test].sum()), tested=pack_right(test))
    return rounded(counts | {name: found[name] for name in names} | dict(near=near), {}), None


def standardised(images: np.ndarray) -> np.ndarray:
    """`(N, h, w)` -> `(N, h * w)`, whose scalar products are correlations."""
    x = images.reshape(len(images), -1)
    x = x - x.mean(1, keepdims=True)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def twins(folder: str) -> tuple[dict, None]:
    """Which test photographs of a folder in LOUPE_PHOTOGRAPHS are in its training split as well.

    A twin is a test photograph that correlates above 0.99 with one of training (validation is cut from it), both at
    30 x 30 pixels. twin says which ones (`pack_right`), same_label is the fraction of twins whose counterpart has their
    label. nearest and nearest_apart: accuracy of taking the label of the photograph that correlates most, on all test
    photographs and on those that are no twins.
    """
    split_of = photographs.sets(folder, "bare")
    parts = {split: split_of(split) for split in ("train", "val", "test")}

    def small(part):
        grey = (part.image(i).convert("L").resize((30, 30), Image.Resampling.BOX) for i in range(len(part)))
        return standardised(np.stack([np.asarray(image, float) for image in grey]))

    likeness = small(parts["test"]) @ np.concatenate([small(parts["train"]), small(parts["val"])]).T
    twin = likeness.max(1) > 0.99
    there = np.concatenate([parts["train"].labels, parts["val"].labels])
    right = there[likeness.argmax(1)] == parts["test"].labels
    return rounded(dict(test_images=len(twin), twins=int(twin.sum()), twin=pack_right(twin),
                        same_label=right[twin].mean() if twin.any() else "", nearest=right.mean(),
                        nearest_apart=right[~twin].mean()), {}), None


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


ARMS = ("bare", "residual", "residual, constant")
GRIDS = {
    "brain_twins": (twins, [dict(folder="brain_mri")]),
    "solar_folds": (without_network, [dict(rule=rule, by=by, fold=fold) for rule, by in (
        ("neighbours", "cell"), ("neighbours apart", "cell"), ("neighbours", "block"), ("darkness", "block"))
        for fold in range(FOLDS)]),
    "solar_lite0": (train_on_cells, [dict(by="block", arm=arm, fold=fold) for fold in range(FOLDS) for arm in ARMS]),
}
