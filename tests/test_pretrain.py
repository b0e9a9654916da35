"""The shipped weights of swin_micro, and the command that makes them."""

import json

import numpy as np
import pretrain
import pytest
import timm
import torch
from helpers import drawn_here
from pretrain import draw_set, main, random_attributes, zoom
from safetensors.torch import load_file

import loupe_core  # noqa: F401  (registers swin_micro)
from loupe_core.weights.swin_micro import WEIGHTS
from loupe_lab.birds.fieldguide import ATTRIBUTES, SPECIES, draw


def test_swin_micro_has_the_documented_shapes():
    model = timm.create_model("swin_micro", num_classes=7)
    n = sum(p.numel() for p in model.parameters())
    assert 1.3e6 < n < 1.6e6
    stages = model.forward_intermediates(torch.zeros(1, 3, 112, 112), intermediates_only=True)
    assert [tuple(s.shape[1:]) for s in stages] == [(32, 28, 28), (64, 14, 14), (128, 7, 7), (256, 4, 4)]


def test_the_weights_are_small_finite_and_without_a_head():
    assert WEIGHTS["attributes"].stat().st_size <= 4e6
    weights = load_file(WEIGHTS["attributes"])
    assert not any(name.startswith("head.fc") for name in weights)
    assert all(v.isfinite().all() for v in weights.values())


def test_every_attribute_was_learned_above_85_percent_within_90_cpu_minutes():
    rows = [json.loads(line) for line in WEIGHTS["attributes"].with_suffix(".jsonl").read_text().splitlines()]
    assert len(rows) == rows[0]["epochs"] + 1 and rows[0]["birds"] >= 10_000
    assert min(rows[-1][a] for a in ATTRIBUTES) > 0.85
    assert rows[-1]["cpu_seconds"] / 60 <= 90


def test_pretrained_true_loads_the_file_for_any_number_of_classes():
    weights = load_file(WEIGHTS["attributes"])
    for num_classes in (0, 5):
        state = timm.create_model("swin_micro", pretrained=True, num_classes=num_classes).state_dict()
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


def test_a_diverging_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", drawn_here)
    from loupe_core import LoupeError
    with pytest.raises(LoupeError, match="lower --lr"):
        main(["--out", str(tmp_path / "w.safetensors"), "--birds", "64", "--epochs", "3", "--batch-size", "16",
              "--lr", "1e30"])
    assert not (tmp_path / "w.safetensors").exists()
