"""Chapter 05 as a reader with a GPU and CUB runs it: Swin-Base at its real size, 224 px, with local stand-ins.

What stands in: two species of drawn birds for CUB's 200, random weights in a file for those from the hub, one epoch for
fifty, and few for the short trainings. Everything else is the full profile's own path.

Of the other chapters whose full profile loads a backbone, the cells that load it, with Swin-Tiny in Swin-Base's place.
"""

import re
from pathlib import Path

import nbformat
import papermill
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

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
    printed = "\n".join(out.get("text") or out.get("data", {}).get("text/plain", "")
                        for cell in done.cells for out in cell.get("outputs", []))
    assert re.search(r"^test +4 +2$", printed, flags=re.M) and "mask (1, 1, 28, 28)" in printed
    assert "86,7" in printed and "kept so far: ['epoch-0001']" in printed and "epochs: [1, 2]" in printed
    assert "largest difference of a weight: 0.0" in printed
    assert (tmp_path / "run" / "loupe" / "best" / "model.safetensors").exists()
    assert (tmp_path / "run" / "bare" / "states" / "epoch-0001").exists()


# chapter -> its cells up to the one that loads the backbone, that cell's words with those in their place, and the model
LOADS = {
    "01_swin_tokenization": ("backbone", {}, "model"),
    "03_l1_vs_l2": ("first", {"train=30, test=20": "train=1, test=1", "32).": "1)."}, "model.backbone"),
    "04_the_loupe": ("birds start", {
        "_224.ms_in22k\", 8": "_224.ms_in22k\", 1", "3 * SEED + 3": "1",
        '("stage1", "stage2", "stage3.inside", "stage3", "stage4")': '("stage2",)'}, "host"),
    "09_dynamics_and_routing": ("birds", {"(model, 24,": "(model, 1,", "range(40)": "range(1)"}, "model.backbone"),
}


def loads_a_backbone(path):
    """Whether a chapter's full profile names a backbone that the hub has."""
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return any(".ms_in22k\"" in source and ("PROFILE" in source or "FULL" in source) for source in code)


def test_each_chapter_that_asks_the_hub_can_take_a_file():
    chapters = {path.stem: path for path in BOOK.glob("[0-9]*.ipynb")}
    asking = {name for name, path in chapters.items() if loads_a_backbone(path)}
    assert asking == {*LOADS, "05_training_on_cub"}
    for name in asking:
        assert "WEIGHTS" in papermill.inspect_notebook(str(chapters[name])), name


@pytest.fixture(scope="module")
def swin_tiny(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "swin_tiny.safetensors"
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=21841)
    save_file({name: tensor.contiguous() for name, tensor in swin.state_dict().items()}, file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADS)
def test_a_chapters_backbone_comes_from_the_file(name, swin_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LOUPE_DATA", str(tmp_path))
    monkeypatch.chdir(BOOK)
    used, changes, model = LOADS[name]
    cells = {cell.id: cell.source for cell in nbformat.read(f"{name}.ipynb", as_version=4).cells}
    namespace = {}
    for cell in ("setup", "parameters", "imports", *used.split()):
        source = cells[cell]
        for there, here in changes.items() if cell == used.split()[-1] else ():
            assert there in source, there
            source = source.replace(there, here)
        source = source.replace("swin_base_patch4_window7_224", "swin_tiny_patch4_window7_224")
        exec(compile(source, f"{name}, {cell}", "exec"), namespace)
        if cell == "parameters":
            namespace |= dict(PROFILE="full", WEIGHTS=str(swin_tiny))
    backbone = eval(model, namespace)
    assert torch.equal(backbone.patch_embed.proj.weight, load_file(swin_tiny)["patch_embed.proj.weight"])
    assert backbone.patch_embed.img_size == (224, 224)
