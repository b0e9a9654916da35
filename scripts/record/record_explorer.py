"""Record masks and predictions of other models for chapter 06's explorer: `python scripts/record/record_explorer.py`.

Each is trained as the Loupe that the package ships (scripts/record/train_shipped.py) with one change, and tested on the
same images. Its mask and its likeliest species for each bird go into data/results/explorer.json, with the run's
provenance. Runs that are there already are not repeated.
"""

import json
import time

import torch
from runs import RESULTS, fieldguide_sets, provenance, run

from loupe_core import LoupeModel, Recipe, transforms_for
from loupe_core.files.atomic import write_whole
from loupe_lab.birds.fieldguide import SPECIES
from loupe_lab.evidence.explain import explain
from loupe_lab.pages.explorer import field_birds, likeliest

FILE = RESULTS / "explorer.json"
PAPER = dict(site="stage2", form="multiply", lam=0.05)
ARMS = [PAPER | change for change in (dict(lam=0), dict(lam=5), dict(site="stage3"), dict(form="residual"))]


def train(arm: dict) -> dict:
    """The record of one training: the arm, accuracy, provenance, and per bird of the explorer its mask and species."""
    began = time.perf_counter()
    torch.manual_seed(0)
    names = [species.name for species in SPECIES]
    model = LoupeModel("swin_micro", num_classes=len(names), class_names=names, site=arm["site"], form=arm["form"])
    outcome, trainer, test = run(model, fieldguide_sets(SPECIES, 0, 60, 20), Recipe.small(epochs=15, lam=arm["lam"]))
    model.cpu()
    transform = transforms_for(model.data_config, train=False)
    images = torch.stack([transform(bird.image)[0] for bird in field_birds(transform)])
    masks = [[[round(value, 4) for value in row] for row in mask] for mask in explain(model, images, "mask").tolist()]
    top = [[(name, round(p, 4)) for name, p in species] for species in likeliest(model, images)]
    seconds = round(time.perf_counter() - began, 1)
    return arm | outcome | dict(images=len(test), seconds=seconds) | provenance(trainer) | dict(masks=masks, top=top)


def main() -> None:
    """Trains the arms that are not recorded yet."""
    rows = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []
    for arm in ARMS:
        if any(all(row[key] == value for key, value in arm.items()) for row in rows):
            continue
        rows.append(train(arm))
        print({key: value for key, value in rows[-1].items() if key not in ("masks", "top")}, flush=True)
        write_whole(FILE, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
