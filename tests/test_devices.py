"""With an emulated card: instruments, grids and commands work where the model is, and hand back what is on the CPU.

Each would raise where it mixed devices, see `emulated`. On the CPU the same call gives the same numbers.
"""

import csv
import dataclasses
import importlib
import inspect
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import record_results
import runs
import timm
import torch
from emulated import is_on_card
from helpers import write_cub

import loupe_core.start.devices as devices
from loupe_core import LoupeModel, Recipe, transforms_for
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import fieldguide_set
from loupe_lab.evidence import answers, audit, explain, robustness, routing, scorecard
from loupe_lab.pages import explorer

ROOT = Path(__file__).resolve().parents[1]
GRIDS = [importlib.import_module(file.stem) for file in sorted((ROOT / "scripts" / "record").glob("grids_*.py"))]


# --- instruments ------------------------------------------------------------------------------------------------


def options_of(method: str) -> dict:
    return {"integrated_gradients": dict(steps=3), "occlusion": dict(window=56, stride=56)}.get(method, {})


def routed(model, kind, images):
    with routing.intervene(model, kind):
        return torch.autograd.grad(model(images).sum(), model.backbone.head.fc.weight)[0].cpu()


INSTRUMENTS = {
    "answers": lambda model, x, y: answers.answers(model, list(x)),
    **{f"explain {method}": lambda model, x, y, method=method: explain.explain(model, x, method, **options_of(method))
       for method in explain.METHODS},
    "explain, of given classes": lambda model, x, y: explain.explain(model, x, "grad_cam", y),
    "audit": lambda model, x, y: audit.gate_effect(model, x, y, only=[*audit.ROWS, "centre", "mean, eps 0"]),
    "audit in words": lambda model, x, y: [words(audit.gate_effect(model, x, y)) for words in (
        audit.table, audit.conclusion)],
    "faithful": lambda model, x, y: scorecard.insertion_deletion(model, x, np.arange(len(x) * 16).reshape(-1, 4, 4), y),
    "faithful, from the mean": lambda model, x, y: scorecard.insertion_deletion(
        model, x, explain.explain(model, x, "mask"), baseline="mean", steps=3),
    "on_grid": lambda model, x, y: scorecard.on_grid(explain.explain(model, x, "mask"), 4),
    "randomisation": lambda model, x, y: scorecard.randomisation(model, x, "mask"),
    "randomisation, of given classes": lambda model, x, y: scorecard.randomisation(model, x, "grad_cam", y),
    **{f"attack {kind}": lambda model, x, y, kind=kind: robustness.attack(
        model, robustness.as_pixels(model, x), y, 1, kind, 2, within=robustness.as_pixels(model, x)[:, 0] > 0.5)
       for kind in ("fgsm", "noise")},
    "attack on the ratio": lambda model, x, y: robustness.attack(
        model, robustness.as_pixels(model, x), y, 1, "fgsm", loss="ratio"),
    "as_images": lambda model, x, y: robustness.as_images(model, robustness.as_pixels(model, x)).cpu(),
    "logits_of": lambda model, x, y: robustness.logits_of(model, robustness.as_pixels(model, x)),
    "input_gradients": lambda model, x, y: robustness.input_gradients(model, robustness.as_pixels(model, x), y),
    "gradient_terms": lambda model, x, y: routing.gradient_terms(model, x, y),
    "shares": lambda model, x, y: routing.shares(routing.gradient_terms(model, x, y)),
    **{f"intervene {kind}": lambda model, x, y, kind=kind: routed(model, kind, x.to(devices.device_of(model)))
       for kind in routing.INTERVENTIONS},
    "likeliest": lambda model, x, y: explorer.likeliest(model, x),
    "the explorer": lambda model, x, y: [explorer.ask(model, BIRDS, "mask"),
                                         explorer.HeatmapExplorer(BIRDS, {"mask": explorer.ask(model, BIRDS)}).html()],
}
BIRDS = explorer.field_birds(transforms_for(LoupeModel.from_pretrained(FIELDGUIDE).data_config, train=False), 2)


@pytest.fixture(scope="module")
def seen():
    transform = transforms_for(LoupeModel.from_pretrained(FIELDGUIDE).data_config, train=False)
    return torch.stack([transform(bird.image)[0] for bird in explorer.field_birds(transform, 2)]), torch.tensor([3, 40])


def leaves(value):
    """Tensors, arrays, numbers and texts in a result, in order."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in leaves(part)]
    return [] if value is None else [value]


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_an_instrument_works_where_the_model_is_and_answers_on_the_cpu(name, seen, card):
    model = LoupeModel.from_pretrained(FIELDGUIDE)
    images, labels = seen
    torch.manual_seed(0)
    plain = leaves(INSTRUMENTS[name](model, images, labels))
    model.to(card)
    torch.manual_seed(0)
    for x, y in ((images, labels), (images.to(card), labels.to(card))):
        found = leaves(INSTRUMENTS[name](model, x, y))
        assert all(is_on_card(p) for p in model.parameters())  # it stays where it was
        assert len(found) == len(plain)
        for a, b in zip(found, plain):
            if isinstance(a, str):
                assert a == b
                continue
            if isinstance(a, torch.Tensor) and name != "attack noise":
                assert a.device.type == "cpu" and not a.requires_grad
            if name != "attack noise":  # the card draws numbers of its own
                np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=1e-5)


def test_pgd_begins_at_random_and_stays_within_its_budget_on_the_card(seen, card):
    model = LoupeModel.from_pretrained(FIELDGUIDE).to(card)
    pixels = robustness.as_pixels(model, seen[0])
    found = [robustness.attack(model, pixels, seen[1], 1, "pgd", 3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].device.type == "cpu" and (found[0] - pixels).abs().max() <= 1.001 / 255


def test_no_instrument_is_left_out():
    """What takes a model, in the room of evidence and in the explorer, is used above, or in the grids and commands."""
    here = Path(__file__).read_text()
    elsewhere = {"count_passes", "next_norm", "put_after"}  # a hook; used by gate_effect; in the grid `attention`
    for module in (answers, audit, explain, robustness, routing, scorecard, explorer):
        for name, value in vars(module).items():
            own = inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
            if own and "model" in inspect.signature(value).parameters and name not in elsewhere:
                assert f"{module.__name__.rpartition('.')[2]}.{name}(" in here, name


# --- grids ------------------------------------------------------------------------------------------------------

# Rows of each grid that take its different ways; all grids of data/results must be here.
ROWS = {
    "ablations": [dict(arm=arm, seed=0) for arm in ("loupe", "multi-scale", "shuffled", "cbam")],
    "agreement": [dict(arm="loupe", seed=0, other=1)],
    "attention": [dict(part="crown", arm=arm, seed=0) for arm in ("loupe", "cbam")],
    "context": [dict(arm="loupe", seed=0)],
    "dynamics": [dict(arm="loupe", seed=0, step=1)],
    "finetune": [dict(arm="backbone 1e-4", backbone="swin_micro", photographs="cub10", seed=0)],
    "gap": [dict(arm="loupe", change="as it is", seed=0), dict(arm="bare", change="144 shown at 80", seed=0)],
    "lambda": [dict(norm="l1", lam=0.05, site="stage2", form="multiply", gate="convolution", seed=0)],
    "photographs": [dict(arm="loupe", seed=0)],
    "reach": [dict(state="start", arm="swin_micro", site="stage2", form="multiply", mask="iid", seed=0),
              dict(state="trained", arm="loupe", site="stage2", form="multiply", mask="its own", seed=0)],
    "remedies": [dict(arm="residual", lr="0.0003", seed=0)],
    "robustness": [dict(arm="loupe", seed=0)],
    "robustness_checks": [dict(arm="loupe", seed=0)],
    "routing": [dict(kind=kind, seed=0) for kind in ("none", "shuffled")],
    "scales": [dict(arm="multi-scale", levelled="stage2", seed=0)],
    "scorecard": [dict(arm="loupe", method=method, seed=0) for method in ("mask", "borrowed")],
    "scorecard_photographs": [dict(method="mask", seed=0)],
    "sites": [dict(norm="l1", lam=0.05, site="stage2", form="multiply", gate="self-attention", seed=0)],
    "small_profile": [dict(arm="bare", seed=0)],
    "solar": [dict(arm=arm, seed=0) for arm in ("loupe", "bare")],
    "solar_splits": [dict(rule="darkness", by="block", seed=0)],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The grids on few birds, one epoch, and a folder of their own; what they kept in memory is forgotten."""
    folder = tmp_path_factory.mktemp("grids")
    photographs = write_cub(folder / "cub", classes=10, per_class=4, size=(48, 48), segmentations=True)
    rng = np.random.default_rng(0)
    cells = rng.integers(120, 200, (48, 60, 60)).astype(np.uint8)
    small = Recipe.small.__func__

    def few(root, species, *, train, test, **settings):
        return fieldguide_set(root, species, train=3, test=2, **settings)

    def short(cls, **changes):
        return small(cls, **changes | dict(epochs=1, workers=0, batch_size=24, head="probe"))

    caches = [value for module in GRIDS for value in vars(module).values() if hasattr(value, "cache_clear")]
    with pytest.MonkeyPatch.context() as patch:
        for module in (runs, *GRIDS):
            if hasattr(module, "fieldguide_set"):
                patch.setattr(module, "fieldguide_set", few)
            if hasattr(module, "lite0"):
                patch.setattr(module, "lite0", partial(
                    timm.create_model, "tf_efficientnet_lite0", pretrained_cfg_overlay=dict(input_size=(3, 96, 96))))
        patch.setattr(runs, "KEPT", folder / "kept")
        patch.setattr(runs, "ROOT", folder)
        patch.setattr(GRID("gap"), "ROOT", folder)
        patch.setattr(Recipe, "small", classmethod(short))
        patch.setattr(GRID("first"), "Recipe", QuickRecipe)
        patch.setattr(GRID("start"), "_FIRST", GRID("start")._FIRST | dict(epochs=1, workers=0))
        patch.setattr(GRID("start"), "MOST", 12)
        patch.setattr(GRID("dynamics"), "BIRDS", 20)
        patch.setattr(GRID("beyond"), "load_cells", lambda: (cells, np.tile([0, 1, 1 / 3, 1], 12), np.repeat(
            ["mono", "poly"], 24)))
        patch.setattr(GRID("beyond"), "BLOCK", 4)
        patch.setattr(record_results, "keep_masks", lambda *args: None)
        patch.setenv("LOUPE_CUB_ROOT", str(photographs))
        for cache in caches:
            cache.cache_clear()
        yield folder
    for cache in caches:
        cache.cache_clear()


def GRID(name):
    return importlib.import_module(f"grids_{name}")


class QuickRecipe(Recipe):
    """The recipe that a grid writes out, with one epoch."""

    def __init__(self, **choices):
        super().__init__(**choices | dict(epochs=1, workers=0))


@pytest.mark.parametrize("grid", record_results.GRIDS)
def test_a_row_of_a_grid_is_measured_on_the_card(grid, tiny, card):
    file = ROOT / "data" / "results" / f"{grid}.csv"
    columns = next(csv.reader(file.open(encoding="utf-8")))
    for choice in ROWS[grid]:
        row = record_results.run_row(grid, choice)
        assert set(columns) <= set(row), set(columns) - set(row)
        assert not any(isinstance(value, torch.Tensor) for value in row.values())
