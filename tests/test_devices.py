"""With an emulated card: instruments, grids and commands work where the model is, and hand back what is on the CPU.

Each would raise where it mixed devices, see `emulated`. On the CPU the same call gives the same numbers.
"""

import dataclasses
import inspect
from pathlib import Path

import emulated
import numpy as np
import pytest
import torch
from accelerate import PartialState
from emulated import is_on_card

import loupe_core.start.devices as devices
from loupe_core import LoupeModel, transforms_for
from loupe_core.cli import main
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import species_of, write_fieldguide
from loupe_lab.evidence import answers, audit, explain, robustness, routing, scorecard
from loupe_lab.pages import explorer

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
    "features_at": lambda model, x, y: explain.features_at(model, x),
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


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    return write_fieldguide(tmp_path_factory.mktemp("data") / "birds", species_of(1), train=3, test=2)


def where_it_ran(monkeypatch) -> list[str]:
    """The devices on which a model runs from now on."""
    seen, forward = [], LoupeModel.forward

    def noted(self, x, *args, **kwargs):
        seen.append(x.device.type)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(LoupeModel, "forward", noted)
    return seen


COMMANDS = {
    "explain": ["explain", "{photo}", "--out", "{out}/o.png"],
    **{f"explain {method}": ["explain", "{photo}", "--out", "{out}/o.png", "--method", method]
       for method in ("grad_cam", "rollout")},
    "predict": ["predict", "{birds}/images", "--out", "{out}/p.csv"],
    "audit": ["audit", "{birds}", "--images", "4"],
    "evaluate": ["evaluate", "{birds}"],
    "evaluate --report": ["evaluate", "{birds}", "--report", "{out}/report"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_on_the_card_and_says_what_it_says_without(name, birds, tmp_path, monkeypatch, capsys):
    photo = sorted(birds.glob("images/*/*.*"))[0]
    words = [word.format(photo=photo, birds=birds, out=tmp_path) for word in COMMANDS[name]]
    ran = where_it_ran(monkeypatch)
    assert main([*words, "--checkpoint", str(FIELDGUIDE)]) == 0
    plain = capsys.readouterr().out
    assert set(ran) == {"cpu"}
    ran.clear()
    with emulated.card():
        assert main([*words, "--checkpoint", str(FIELDGUIDE)]) == 0
        assert set(ran) == {"cuda"}
        assert capsys.readouterr().out == plain
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
        PartialState._reset_state()
        ran.clear()
        assert main([*words, "--checkpoint", str(FIELDGUIDE)]) == 0
        assert set(ran) == {"cpu"}


def test_train_on_the_card_and_go_on_without_it(birds, tmp_path, monkeypatch):
    words = ["train", str(birds), "--out", str(tmp_path / "run"), "--recipe", "small", "--batch-size", "8",
             "--workers", "0", "--precision", "no"]
    with emulated.card():
        ran = where_it_ran(monkeypatch)
        assert main([*words, "--epochs", "1"]) == 0
        assert set(ran) == {"cuda"}
    assert main([*words, "--epochs", "1", "--resume"]) == 0
    assert main(["evaluate", str(birds), "--checkpoint", str(tmp_path / "run")]) == 0


def test_export_needs_no_card_and_does_not_mind_one(tmp_path, card):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    small = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    model = LoupeModel("swin_micro", 5, pretrained=False, backbone_kwargs=small).eval()
    model.save_pretrained(tmp_path / "own")
    assert main(["export", "--checkpoint", str(tmp_path / "own"), "--out", str(tmp_path / "own.onnx")]) == 0
    x = torch.rand(2, 3, 112, 112)
    logits, _ = onnxruntime.InferenceSession(tmp_path / "own.onnx").run(None, {"image": x.numpy()})
    np.testing.assert_allclose(logits, model.to(card)(x.to(card)).detach().cpu().numpy(), atol=1e-4)
