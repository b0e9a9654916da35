"""Train the Loupe that the package ships, on all 48 field-guide species: `python scripts/record/train_shipped.py`.

Chapter 06 and the published page use it. It is the paper's gate: after stage 2, "multiply", lambda 0.05.
"""

import time

import torch
from runs import RESULTS, ROOT, fieldguide_sets, provenance, run, write_rows
from safetensors.torch import load_file, save_file

from loupe_core import LoupeModel, Recipe
from loupe_core.files.checkpoint import WEIGHTS_NAME
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import SPECIES

CARD = """# A Loupe for field-guide birds

`LoupeModel.from_pretrained(FIELDGUIDE)`: `swin_micro` with the paper's gate after stage 2 (M multiplies the features,
lambda 0.05), fine-tuned on all 48 species of `loupe_lab.birds.fieldguide`, 60 drawn images each,
`Recipe.small(epochs=15)`, seed 0. Test accuracy {accuracy:.3f} on {images} drawn images; one run. It has seen drawn
birds only: on a photograph its prediction means nothing. Weights in half precision. Licence: MIT. Made by
`python scripts/record/train_shipped.py`.
"""


def main() -> None:
    """Trains the model, and writes it, its card and data/results/shipped_model.csv."""
    began = time.perf_counter()
    torch.manual_seed(0)
    names = [f"{i + 1:03d}.{species.name}" for i, species in enumerate(SPECIES)]
    model = LoupeModel("swin_micro", num_classes=len(names), class_names=names)
    outcome, trainer, test = run(model, fieldguide_sets(SPECIES, 0, 60, 20), Recipe.small(epochs=15))
    model.save_pretrained(FIELDGUIDE)
    halves = {name: tensor.half() for name, tensor in load_file(FIELDGUIDE / WEIGHTS_NAME).items()}
    save_file(halves, FIELDGUIDE / WEIGHTS_NAME, metadata={"format": "pt"})
    (FIELDGUIDE / WEIGHTS_NAME).chmod(0o644)
    trainer.model = LoupeModel.from_pretrained(FIELDGUIDE)  # what ships is what counts
    result = trainer.evaluate(test)
    (FIELDGUIDE / "README.md").write_text(CARD.format(accuracy=result.accuracy, images=len(test)), encoding="utf-8")
    row = outcome | dict(accuracy=round(result.accuracy, 4), mask_mean=round(result.mask_mean, 4))
    row |= dict(seconds=round(time.perf_counter() - began, 1)) | provenance(trainer)
    write_rows(RESULTS / "shipped_model.csv", [row])
    print(f"{FIELDGUIDE.relative_to(ROOT)}: {row}")


if __name__ == "__main__":
    main()
