"""One run of the paper's experiment: trained, evaluated once on the test split, measured, and its row kept.

A run has a folder of its own. It goes on there after a stop, at any moment; when its row is written, its states go.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from loupe_core.datasets import CUB200
from loupe_core.errors import LoupeError
from loupe_core.files.atomic import remove, replaced, write_whole
from loupe_core.geometry import transforms_for
from loupe_core.heatmap import peaks
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_core.samples import Sample
from loupe_core.start.devices import device_of
from loupe_core.trainer import Evaluation, Trainer
from loupe_lab.evidence.answers import write_table
from loupe_lab.evidence.audit import gate_effect
from loupe_lab.evidence.baselines import control
from loupe_lab.evidence.masks import centre_gaussian
from loupe_lab.evidence.results import pack_right
from loupe_lab.evidence.robustness import as_pixels, attack, logits_of
from loupe_lab.paper.arms import AT_384, AUTHORS_DATA, BACKBONES, MEASURED, Run
from loupe_lab.paper.hours import TEST, TRAIN, VAL
from loupe_lab.paper.machine import facts

BY_TEST = "best_by_test.pt"  # what the test split answers after the epoch that it has chosen so far
SESSIONS = "sessions.json"  # on what a run was made until now: a stopped one may go on elsewhere
BUDGET, STEPS = 0.5, 10  # of PGD: the most that a value may change, in 1/255, and its steps
COLUMNS = ("backbone", "pixels", "arm", "seed", "accuracy", "last_accuracy", "val_accuracy", "train_accuracy",
           "mask_mean", "epochs", "best_epoch", "images", "right", "mask_zero", "mask_small", "mask_tenth", "audited",
           "own_accuracy", "ones_accuracy", "mean_accuracy", "shuffled_accuracy", "mean_moved", "peak_in_box",
           "centre_in_box", "attacked", "right_attacked", "seconds", "images_per_second")


@dataclass
class Setting:
    """Where and how runs are made.

    Args:
        data: Folder of CUB-200-2011, or of a set in its layout.
        out: Folder for the runs' folders.
        options: Of `Trainer`, such as `save_every`.
        changes: Of every `Recipe`: what belongs to the machine, such as `precision` or `workers`.
        backbone: A `Run`'s backbone and pixels -> the arguments of `LoupeModel` that make it.
        audited, attacked: How many test images are measured, evenly spread.
        keep_weights: Keep `best/` of a finished run. That of an arm with a control opens into the model of `prepared`
            only.
        images: How many test images there are, where rows of others are to be refused.
    """

    data: Path
    out: Path
    options: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)
    backbone: Callable[[Run], dict] = lambda run: dict(
        backbone=(AT_384 if run.pixels == 384 else BACKBONES)[run.backbone])
    audited: int = 1000
    attacked: int = 500
    keep_weights: bool = True
    images: int | None = None


def check_complete(root: Path) -> None:
    """Raises LoupeError where a folder's set is not all of CUB-200-2011, whose name the rows bear."""
    train, test = (CUB200(root, split, val_fraction=0) for split in ("train", "test"))
    found, wanted = (len(train.class_names), len(train), len(test)), (200, TRAIN + VAL, TEST)
    if found != wanted:
        raise LoupeError("{}: found {} classes, {} training and {} test photographs; expected CUB-200-2011's {}, {} "
                         "and {}: give another folder".format(train.root, *found, *wanted))


def row_of(run: Run, out: Path) -> dict | None:
    """The row of a finished run; None where it is not finished.

    Raises:
        LoupeError: The file cannot be read.
    """
    file = out / run.name / "row.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise LoupeError(f"{file}: found no row ({e}); move its folder elsewhere, and the run is made again") from e


def perform(run: Run, setting: Setting) -> dict:
    """Trains, or goes on with a training, measures it and writes its row; a finished run's row is read.

    Raises:
        LoupeError: As in `Trainer.fit`; what is kept so far is told there.
    """
    folder = setting.out / run.name
    if (row := row_of(run, setting.out)) is None:
        row = _row(run, setting, folder)
        write_whole(folder / "row.json", json.dumps(row, indent=1) + "\n")
    for name in ["states", "unfinished-state", BY_TEST, SESSIONS] + ["best"] * (not setting.keep_weights):
        remove(folder / name)
    return row


def leftovers(run: Run, setting: Setting) -> bool:
    """Whether a finished run was stopped while `perform` removed what only an unfinished one needs."""
    folder = setting.out / run.name
    return (folder / "row.json").is_file() and any(
        (folder / name).exists() for name in ("states", ".removed-states", "unfinished-state", BY_TEST, SESSIONS))


def _row(run: Run, setting: Setting, folder: Path) -> dict:
    model, recipe, sets = prepared(run, setting)
    authors = run.change.get("protocol") == "authors"
    trainer = (_Watched if authors else Trainer)(model, recipe, folder, **setting.options)
    made_on = _all_sessions(folder, facts(trainer.accelerator))
    if authors:
        rows, result, chosen = _by_test_accuracy(trainer, sets, folder)
    else:
        rows = trainer.fit(sets("train"), sets("val"), resume=True)
        result, chosen = trainer.evaluate(sets("test")), trainer.best["epoch"]
    test = sets("test")
    write_table(folder / "answers.csv", [
        dict(image=int(image), label=int(label), prediction=int(found), probability=round(float(p[found]), 4))
        for image, label, found, p in zip(result.image_ids, result.labels, result.predictions, result.probabilities)])
    own = next(row for row in rows if row["epoch"] == chosen)
    seconds = sum(row["seconds"] for row in rows)
    measured = dict(accuracy=round(result.accuracy, 5), val_accuracy=round(own["val_accuracy"], 5),
                    train_accuracy=round(rows[-1]["accuracy"], 5),
                    mask_mean=round(result.mask_mean, 5) if model.sites else "", epochs=len(rows), best_epoch=chosen,
                    images=len(result.labels), right=pack_right(result.predictions == result.labels),
                    seconds=round(seconds, 1), images_per_second=round(len(sets("train")) * len(rows) / seconds, 1))
    if run.change.get("protocol") == "authors":
        measured |= dict(last_accuracy=round(rows[-1]["val_accuracy"], 5))
    measured |= masks(model, test, setting.audited) if model.sites else {}
    measured |= attacked(model, test, setting.attacked) if run.arm in MEASURED else {}
    row = dict(zip(Run._fields, run)) | measured
    return {name: row.get(name, "") for name in COLUMNS} | made_on


def _all_sessions(folder: Path, now: dict[str, str]) -> dict[str, str]:
    """The facts of a run's machines: what differed between its sessions is told of each, in order, as "bf16; fp16"."""
    file = folder / SESSIONS
    try:
        sessions = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sessions = []
    if now not in sessions:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(sessions := [*sessions, now], indent=1) + "\n")
    return {name: "; ".join(dict.fromkeys(session.get(name, "") for session in sessions)) for name in now}


def prepared(run: Run, setting: Setting) -> tuple[LoupeModel, Recipe, Callable[[str], CUB200]]:
    """A run's model before its training, its recipe, and its data set's splits by their names.

    In the authors' protocol "train" is all of the training photographs, and "val" is the test split.
    """
    change, authors = run.change, run.change.get("protocol") == "authors"
    recipe = replace(Recipe(seed=run.seed, **change.get("recipe", {})), **setting.changes)
    if authors:
        recipe = replace(recipe, precision="no")
    cut = dict(val_fraction=0.0) if authors else dict(seed=run.seed)
    # decoded once: a card waits for two cores otherwise
    data = CUB200(setting.data, "train", cache=True, **cut)
    torch.manual_seed(run.seed)
    given = dict(num_classes=len(data.class_names), class_names=data.class_names,
                 data_config=AUTHORS_DATA if authors else None)
    model = LoupeModel(**setting.backbone(run), **given, **change.get("model", {}))
    if "control" in change:
        (gate,) = model.gates.values()
        gate.loupe = control(change["control"], gate.site.channels)
    data.transform = transforms_for(model.data_config, **recipe.train_transform_options())
    shown = transforms_for(model.data_config, train=False)
    splits = dict(train=data, val=data.with_split("test" if authors else "val", shown),
                  test=data.with_split("test", shown))
    return model, recipe, splits.__getitem__


class _Watched(Trainer):
    """A trainer that shows every epoch to `look` before it keeps a state of it: an epoch that is kept was looked at."""

    look: Callable[[dict], None]

    def before_keeping(self, row: dict) -> None:
        """Shows the row to `look`."""
        self.look(row)


def _by_test_accuracy(trainer: _Watched, sets: Callable[[str], CUB200],
                      folder: Path) -> tuple[list[dict], Evaluation, int]:
    """The authors' protocol: the rows; what the test split answers after the epoch that it chooses; and that epoch.

    The loss on the test split stops the training; the best accuracy there is reported. The model itself ends with the
    weights of the lowest loss.
    """
    kept = folder / BY_TEST
    # each of a higher accuracy than those before it
    records = torch.load(kept, weights_only=True) if kept.is_file() else []

    def look(row: dict) -> None:
        # after a stop, epochs since the newest state are trained again, on a card with other numbers
        records[:] = [record for record in records if record["epoch"] < row["epoch"]]
        if records and row["val_accuracy"] <= records[-1]["accuracy"]:
            return
        found = asdict(trainer.evaluate(sets("test")))
        records.append(dict(epoch=row["epoch"], **{name: torch.as_tensor(value) if isinstance(value, np.ndarray)
                                                   else value for name, value in found.items()}))
        # what no stop can bring back as the best is not kept
        states = trainer.folder.states() if trainer.folder else []
        safe = [i for i, record in enumerate(records) if states and record["epoch"] <= int(states[-1].name[6:])]
        del records[: safe[-1] if safe else 0]
        with replaced(kept) as beside:
            torch.save(records, beside)

    trainer.look = look
    rows = trainer.fit(sets("train"), sets("val"), resume=True)
    best = records[-1]
    chosen = best.pop("epoch")
    return rows, Evaluation(**{k: v.numpy() if torch.is_tensor(v) else v for k, v in best.items()}), chosen


def spread(data: CUB200, images: int) -> tuple[torch.Tensor, torch.Tensor, list[Sample]]:
    """At most so many images of a set, evenly spread over it, and so over its classes: `(N, 3, H, W)`, labels `(N,)`,
    and the samples without their images, which are held once: a thousand of 384 pixels are 1.8 GB."""
    chosen = np.unique(np.linspace(0, len(data) - 1, images).astype(int))
    x, samples = None, []
    for i, index in enumerate(chosen):
        sample = data[index]
        if x is None:
            x = torch.empty(len(chosen), *sample.image.shape)
        x[i] = sample.image
        samples.append(replace(sample, image=x[i]))
    return x, torch.tensor([sample.label for sample in samples]), samples


def masks(model: LoupeModel, test: CUB200, images: int) -> dict:
    """What the masks are like, where they lie, and what the model makes of others in their place.

    mask_zero, mask_small: fractions of the cells that are exactly 0, and below 0.01; mask_tenth: the share of a mask's
    sum in its highest tenth of cells, mean over the images, 0.1 where all are alike. own, ones, mean, shuffled: the
    accuracy with the mask itself and with others, see `gate_effect`; mean_moved: how far the mean in its place moves
    the logits. peak_in_box, centre_in_box: fractions of the images where the mask's peak, or that of a Gaussian in the
    image's centre, lies in the bird's box. Of several gates, that after stage 2.
    """
    x, labels, samples = spread(test, images)
    site = None if len(model.sites) == 1 else "stage2"
    seen: list[torch.Tensor] = []
    gate = model.gates["stage2" if site else model.sites[0].replace(".", "_")]
    handle = gate.loupe.register_forward_hook(lambda module, inputs, mask: seen.append(mask.detach().float().cpu()))
    try:
        with torch.inference_mode():
            for part in x.split(64):
                model.eval()(part.to(device_of(model)))
    finally:
        handle.remove()
    found = torch.cat(seen)[:, 0].numpy()
    effects = gate_effect(model, x, labels, site=site, only=("own", "ones", "mean", "shuffled"))
    if boxes := samples[0].box is not None:
        centre = centre_gaussian(*found.shape[1:])
        in_boxes = [np.mean([peaks_in_box(map_, s) for map_, s in zip(maps, samples)])
                    for maps in (found, [centre] * len(samples))]
    numbers = dict(mask_zero=np.mean(found == 0), mask_small=np.mean(found < 0.01),
                   mask_tenth=np.mean([share_of_tenth(map_) for map_ in found]), audited=len(samples),
                   **{f"{name}_accuracy": effects[name].right.mean() for name in ("own", "ones", "mean", "shuffled")},
                   mean_moved=effects["mean"].moved.mean(),
                   **(dict(peak_in_box=in_boxes[0], centre_in_box=in_boxes[1]) if boxes else {}))
    return {name: value if isinstance(value, int) else round(float(value), 5) for name, value in numbers.items()}


def share_of_tenth(map_: np.ndarray) -> float:
    """The share of a map's sum that lies in its highest tenth of cells, `(h, w)`; 0.1 where the sum is 0."""
    values = np.sort(map_.astype(float), axis=None)[::-1]
    cells = 0.1 * len(values)
    whole = int(cells)
    top = values[:whole].sum() + (cells - whole) * values[min(whole, len(values) - 1)]
    return float(top / values.sum()) if values.sum() > 0 else 0.1


def peaks_in_box(map_: np.ndarray, sample: Sample) -> float:
    """The fraction of a map's highest cells, one unless some tie, whose centre lies in the sample's box.

    Args:
        map_: `(h, w)` over the model input.
        sample: With box and geometry.
    """
    points = peaks(map_, sample.geometry)
    x, y, w, h = (float(value) for value in sample.box)
    return float(((points >= (x, y)) & (points <= (x + w, y + h))).all(-1).mean())


def attacked(model: LoupeModel, test: CUB200, images: int) -> dict:
    """Which of some test images are still right after PGD; see `BUDGET` and `STEPS`."""
    x, labels, _ = spread(test, images)
    x = as_pixels(model, x)
    found = logits_of(model.eval(), attack(model, x, labels, BUDGET, steps=STEPS)).argmax(1)
    return dict(attacked=len(labels), right_attacked=pack_right((found == labels).numpy()))
