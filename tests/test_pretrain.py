"""The shipped weights of swin_micro, and the command that makes them."""

import json

import numpy as np
import pretrain
import pytest
import record_results
import timm
import torch
from helpers import drawn_here
from pretrain import draw_set, main, other_species, questions, random_attributes, zoom
from safetensors.torch import load_file

from loupe_core import LoupeError, LoupeModel
from loupe_core.weights.swin_micro import WEIGHTS
from loupe_lab.birds.fieldguide import ATTRIBUTES, SPECIES, draw


def test_swin_micro_has_the_documented_shapes():
    model = timm.create_model("swin_micro", num_classes=7)
    n = sum(p.numel() for p in model.parameters())
    assert 1.3e6 < n < 1.6e6
    stages = model.forward_intermediates(torch.zeros(1, 3, 112, 112), intermediates_only=True)
    assert [tuple(s.shape[1:]) for s in stages] == [(32, 28, 28), (64, 14, 14), (128, 7, 7), (256, 4, 4)]


def made(labels):
    """Skips where weights are still being made, which the grid that compares them says: RECORDING."""
    if not WEIGHTS[labels].exists() and "pretraining" in record_results.RECORDING:
        pytest.skip(f"the weights for {labels} are being made: scripts/record/pretrain.py --labels {labels}")


@pytest.mark.parametrize("labels", WEIGHTS)
def test_the_weights_are_small_finite_and_without_a_head(labels):
    made(labels)
    assert WEIGHTS[labels].stat().st_size <= 4e6
    weights = load_file(WEIGHTS[labels])
    assert not any(name.startswith("head.fc") for name in weights)
    assert all(v.isfinite().all() for v in weights.values())


def log_of(labels):
    """The rows that a shipped pretraining wrote: its settings, then one row per epoch."""
    return [json.loads(line) for line in WEIGHTS[labels].with_suffix(".jsonl").read_text().splitlines()]


def test_both_pretrainings_had_the_same_budget():
    made("species")
    one, other = log_of("attributes"), log_of("species")
    assert other[0]["labels"] == "species" and other[0]["species"] >= 200
    settings = ("birds", "epochs", "batch_size", "lr", "matrix_lr", "weight_decay", "seed", "parameters")
    assert [one[0][k] for k in settings] == [other[0][k] for k in settings]
    assert len(one) == len(other) == other[0]["epochs"] + 1
    assert other[0]["steps"] == one[0]["epochs"] * (one[0]["birds"] // one[0]["batch_size"])


def test_every_attribute_was_learned_above_85_percent_within_90_cpu_minutes():
    rows = log_of("attributes")
    assert len(rows) == rows[0]["epochs"] + 1 and rows[0]["birds"] >= 10_000
    assert min(rows[-1][a] for a in ATTRIBUTES) > 0.85
    assert rows[-1]["cpu_seconds"] / 60 <= 90


@pytest.mark.parametrize("name, labels", [("swin_micro", "attributes"), ("swin_micro.attributes", "attributes"),
                                          ("swin_micro.species", "species")])
def test_pretrained_true_loads_the_file_for_any_number_of_classes(name, labels, monkeypatch):
    made(labels)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = load_file(WEIGHTS[labels])
    for num_classes in (0, 5):
        state = timm.create_model(name, pretrained=True, num_classes=num_classes).state_dict()
        assert all(torch.equal(state[k], v.float()) for k, v in weights.items())
    state = LoupeModel(name, num_classes=5).backbone.state_dict()
    assert all(torch.equal(state[k], v.float()) for k, v in weights.items())


def test_the_weights_read_a_crown_that_random_weights_do_not():
    """A least-squares probe on frozen features of book species, which pretraining never drew; chance is 0.25."""
    crowned = [s for s in SPECIES if s.differs_in == "crown"][:4]
    birds = torch.from_numpy(np.stack([draw(crowned[k % 4].attributes, (99, k)).image for k in range(240)]))
    x, answer = birds.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.arange(240) % 4
    accuracy = {}
    for pretrained in (True, False):
        torch.manual_seed(0)
        model = timm.create_model("swin_micro", pretrained=pretrained, num_classes=0).eval()
        with torch.no_grad():
            f = torch.cat([model(x), torch.ones(240, 1)], 1).double()
        train, test = slice(0, 160), slice(160, 240)
        ridge = f[train].T @ f[train] + 1e-1 * torch.eye(f.shape[1])
        w = torch.linalg.solve(ridge, f[train].T @ torch.eye(4).double()[answer[train]])
        accuracy[pretrained] = ((f[test] @ w).argmax(1) == answer[test]).double().mean().item()
    assert accuracy[True] > 0.85 and accuracy[False] < 0.7


def test_pretraining_never_draws_a_book_species():
    rng = np.random.default_rng(0)
    book = [s.attributes for s in SPECIES]
    assert not any(random_attributes(rng) in book for _ in range(2000))
    others = other_species(500)
    assert not any(attributes in book for attributes in others)
    assert len({tuple(attributes.items()) for attributes in others}) == 500 and other_species(20) == others[:20]


def test_with_species_as_labels_birds_of_one_label_share_all_attributes(monkeypatch):
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", drawn_here)
    asked, others = questions("species", 3), other_species(3)
    images, boxes, labels = draw_set(7, 77, (0.2, 0.6), 1, "species", 3)
    values = draw_set(7, 77, (0.2, 0.6), 1, "attributes", 3)
    assert asked == {"species": 3} and labels.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(images, values[0]) and torch.equal(boxes, values[1])
    found = [{a: ATTRIBUTES[a][k] for a, k in zip(ATTRIBUTES, row)} for row in values[2].tolist()]
    assert found == [others[k] for k in labels.flatten()]


def test_the_augmenting_zoom_keeps_the_whole_bird_in_view():
    torch.manual_seed(0)
    n, side = 200, 112
    low = torch.rand(n, 2) * 50 + 4
    size = torch.rand(n, 2) * (side - 8 - low) * 0.9 + 6
    x = -torch.ones(n, 3, side, side)
    for i in range(n):  # a spot at the box's top left in the first channel, at its bottom right in the second
        for channel, (u, v) in enumerate(((low[i] + 2), (low[i] + size[i] - 2))):
            x[i, channel, int(v) - 2:int(v) + 2, int(u) - 2:int(u) + 2] = 1
    out = zoom(x, torch.cat([low, size], 1))
    assert (out[:, :2].flatten(2).max(2).values > 0).all()
    assert not torch.equal(out[0], x[0])


def test_the_set_is_the_same_for_the_same_seed_whoever_draws_it(monkeypatch):
    a = draw_set(4, 77, (0.2, 0.6), workers=1)
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", drawn_here)
    b = draw_set(4, 77, (0.2, 0.6), workers=1)
    assert all(torch.equal(u, v) for u, v in zip(a, b)) and a[2].shape == (4, len(ATTRIBUTES))


def test_the_command_writes_weights_and_log(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", drawn_here)
    main(["--out", str(tmp_path / "w.safetensors"), "--birds", "64", "--epochs", "1", "--batch-size", "32"])
    rows = [json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert rows[0]["birds"] == 64 and set(ATTRIBUTES) <= set(rows[1])
    assert load_file(tmp_path / "w.safetensors").keys() == load_file(WEIGHTS["attributes"]).keys()
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("labels", WEIGHTS)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(labels, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", drawn_here)
    command = ["--labels", labels, "--birds", "64", "--epochs", "3", "--batch-size", "16"]
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    main([*command, "--out", str(whole)])

    def stop_after(epochs, keep=pretrain._keep):
        def keep_and_stop(out, settings, model, parts, rows):
            keep(out, settings, model, parts, rows)
            if len(rows) == epochs + 1:
                raise KeyboardInterrupt
        return keep_and_stop

    for epochs in (1, 2):
        with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
            stopping.setattr(pretrain, "_keep", stop_after(epochs))
            main([*command, "--out", str(parts)])
    with pytest.raises(LoupeError, match="found a run with settings .*give another --out"):
        main([*command, "--lr", "1e-4", "--out", str(parts)])
    main([*command, "--out", str(parts)])
    assert not list(tmp_path.glob("*.state"))
    one, other = load_file(whole), load_file(parts)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    rows = [[{k: v for k, v in json.loads(line).items() if "seconds" not in k}
             for line in file.with_suffix(".jsonl").read_text().splitlines()] for file in (whole, parts)]
    assert rows[0] == rows[1] and [row.get("epoch") for row in rows[0]] == [None, 1, 2, 3]


def test_a_diverging_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", drawn_here)
    with pytest.raises(LoupeError, match="lower --lr"):
        main(["--out", str(tmp_path / "w.safetensors"), "--birds", "64", "--epochs", "3", "--batch-size", "16",
              "--lr", "1e30"])
    assert not (tmp_path / "w.safetensors").exists()
