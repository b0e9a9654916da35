"""Chapter 05 as a reader with a GPU and CUB runs it: Swin-Base at its real size, 224 px, with local stand-ins.

What stands in: two species of drawn birds for CUB's 200, random weights in a file for those from the hub, one epoch for
fifty, and few for the short trainings. Everything else is the full profile's own path.
"""

from pathlib import Path

import nbformat
import papermill
import pytest
import timm
from safetensors.torch import save_file

from loupe_lab.birds.fieldguide import SPECIES, write_fieldguide

BOOK = Path(__file__).resolve().parents[1] / "book"

CHANGED = [  # cell, its words, words in their place
    ("disconnect", "epochs=4", "epochs=2"), ("disconnect", "2.5 * len", "1.5 * len"),  # 700 MB are kept each time
    ("sol3", "epochs=3", "epochs=1"), ("sol4", "epochs=4", "epochs=1"),
]


@pytest.mark.slow
def test_chapter_05_runs_in_the_full_profile(tmp_path, monkeypatch):
    weights = tmp_path / "swin_base.safetensors"
    swin = timm.create_model("swin_base_patch4_window7_224", num_classes=21841)
    save_file({name: tensor.contiguous() for name, tensor in swin.state_dict().items()}, weights)
    del swin
    root = write_fieldguide(tmp_path / "CUB_200_2011", SPECIES[:2], train=2, test=2, size=240)
    monkeypatch.setenv("LOUPE_CUB_ROOT", str(root))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.delenv("LOUPE_STRICT")  # random weights name nothing
    page = tmp_path / "05.ipynb"
    notebook = nbformat.read(BOOK / "05_training_on_cub.ipynb", as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    for name, there, here in CHANGED:
        assert there in cells[name].source
        cells[name].source = cells[name].source.replace(there, here)
    nbformat.write(notebook, page)
    changes = {"epochs": 1, "batch_size": 2, "workers": 0}
    parameters = {"PROFILE": "full", "WEIGHTS": str(weights), "CHANGES": changes, "OUT": str(tmp_path / "run")}
    done = papermill.execute_notebook(page, page, parameters, cwd=BOOK, progress_bar=False)
    printed = "".join(out.get("text", "") for cell in done.cells for out in cell.get("outputs", []))
    assert "2 species" in printed and "mask (1, 1, 28, 28)" in printed
    assert "86,7" in printed and "kept so far: ['epoch-0001']" in printed and "epochs: [1, 2]" in printed
    assert "largest difference of a weight: 0.0" in printed
    assert (tmp_path / "run" / "loupe" / "best" / "model.safetensors").exists()
    assert (tmp_path / "run" / "bare" / "states" / "epoch-0001").exists()
