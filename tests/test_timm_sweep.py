"""The gate on timm's architecture families: some always, all of the recorded sweep with LOUPE_SLOW=1."""

import csv
import os
import sys
from pathlib import Path

import pytest
import torch

from loupe_core.model import LoupeModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.timm_sweep import RESULTS, try_model  # noqa: E402

with RESULTS.open(encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))

# Each stands for a way of laying out features: maps, maps channels last, tokens with and without a class token,
# a module that returns a tuple, a module that feature_info misnames, several resolutions at once.
ALWAYS = {
    "convnext": "NCHW",
    "densenet": "NCHW",
    "efficientnet": "NCHW",
    "hrnet": "NCHW",
    "levit": "NLC",
    "mambaout": "NHWC",
    "pit": "NCHW",
    "resnet": "NCHW",
    "swin_transformer": "NHWC",
    "twins": "NLC",
    "vision_transformer": "NLC",
}


def same(row: dict, found: dict) -> bool:
    return all(str(found[key]) == row[key] for key in ("module", "layout", "stride", "image", "mask", "ok"))


@pytest.mark.parametrize("family", ALWAYS)
def test_the_gate_fits_this_family_as_recorded(family):
    (row,) = [row for row in ROWS if row["family"] == family]
    found = try_model(row["model"])
    assert found["ok"], found["reason"]
    assert found["layout"] == ALWAYS[family]
    assert same(row, found)


def test_the_recorded_sweep_fits_95_percent_of_the_families_and_gives_a_reason_for_each_other():
    assert len({row["family"] for row in ROWS}) == len(ROWS) > 80
    fits = [row["ok"] == "True" for row in ROWS]
    assert sum(fits) >= 0.95 * len(ROWS)
    assert all(fit != bool(row["reason"]) for fit, row in zip(fits, ROWS))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LOUPE_SLOW"), reason="set LOUPE_SLOW=1: some minutes")
def test_the_sweep_comes_out_as_recorded():
    found = {row["family"]: try_model(row["model"]) for row in ROWS}
    assert {row["family"]: found[row["family"]] for row in ROWS if not same(row, found[row["family"]])} == {}


def test_the_sweep_notices_a_gate_that_nothing_reads(monkeypatch):
    real = LoupeModel.forward

    def forward(self, x, return_mask=False):
        logits, mask = real(self, x, return_mask=True)
        return logits.detach() + 0 * sum(p.sum() for p in self.parameters()), mask

    monkeypatch.setattr(LoupeModel, "forward", forward)
    assert "no gradient" in try_model("test_convnext")["reason"]


def test_the_sweep_notices_a_mask_that_lies_elsewhere(monkeypatch):
    real = LoupeModel.forward
    monkeypatch.setattr(
        LoupeModel,
        "forward",
        lambda self, x, **kwargs: real(self, x if self.training else torch.flip(x, (-1,)), **kwargs),
    )
    assert "painting" in try_model("test_convnext")["reason"]
