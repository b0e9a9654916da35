"""Train the Loupe that travels inside the package, on all 48 field-guide species: ``python scripts/train_shipped.py``.

Chapter 06 and the published page look through it. It is the paper's gate, after stage 2, multiplied, lambda 0.05.
"""

import csv
import json
import time

import torch
from record_results import RESULTS, ROOT, fieldguide_sets, provenance, run
from safetensors.torch import load_file, save_file

from loupe_core import LoupeModel, Recipe
from loupe_core.fieldguide import SPECIES
from loupe_core.model import FIELDGUIDE, WEIGHTS


def main() -> None:
    began = time.perf_counter()
    torch.manual_seed(0)
    names = [f"{i + 1:03d}.{species.name}" for i, species in enumerate(SPECIES)]
    model = LoupeModel("swin_micro", num_classes=len(names), class_names=names)
    outcome, trainer, _ = run(model, fieldguide_sets(SPECIES, 0, 60, 20), Recipe.small(epochs=15))
    model.save_pretrained(FIELDGUIDE)
    # half precision halves the file; the mask and the logits are those of the full one to three digits
    halves = {name: tensor.half() for name, tensor in load_file(FIELDGUIDE / WEIGHTS).items()}
    save_file(halves, FIELDGUIDE / WEIGHTS, metadata={"format": "pt"})
    row = outcome | dict(seconds=round(time.perf_counter() - began, 1)) | provenance(trainer)
    with (RESULTS / "shipped_model.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    print(f"{FIELDGUIDE.relative_to(ROOT)}: {json.dumps(row)}")


if __name__ == "__main__":
    main()
