"""Every chapter's cells, one after another in one namespace, with an emulated card; see `emulated`.

A chapter that trains leaves its model on the card, and what it then does with it must not mix devices. Numbers are not
compared: the card draws random numbers of its own.
"""

import os
from pathlib import Path

import emulated
import nbformat
import pytest
import torch

CHAPTERS = sorted((Path(__file__).resolve().parents[1] / "book").glob("[0-9]*.ipynb"))
TRAIN = {"02_spatial_vs_channel", "05_training_on_cub", "11_beyond_birds"}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LOUPE_SLOW"), reason="set LOUPE_SLOW=1: every chapter, 20 minutes in all")
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_mixes_no_devices(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.delenv("LOUPE_STRICT")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    namespace, threads = {"__name__": "__main__"}, torch.get_num_threads()
    with emulated.card():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{path.stem}, {cell.id}", "exec"), namespace)
        if path.stem in TRAIN:
            assert namespace["trainer"].accelerator.device.type == "cuda"
    torch.set_num_threads(threads)
