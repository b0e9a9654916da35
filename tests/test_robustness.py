"""Attacks: within their budget, against a model whose best attack is known, against chance; scenes: pixel by pixel."""

import pytest
import torch
from grids_robustness import centred_change, patch
from torch import nn

from loupe_core import LoupeError, LoupeModel
from loupe_lab.birds.fieldguide import SPECIES, draw
from loupe_lab.evidence.audit import relative_change
from loupe_lab.evidence.robustness import (
    ATTACKS,
    LOSSES,
    as_images,
    as_pixels,
    attack,
    composed,
    empty_scene,
    input_gradients,
    logits_of,
    margin,
)


class Linear(nn.Module):
    """Logits that are linear in the pixels: the best attack is known, and FGSM finds it."""

    mean, std = (0.5, 0.4, 0.3), (0.5, 0.2, 0.1)

    def __init__(self, classes=4, side=6, scale=1.0):
        super().__init__()
        self.W = nn.Parameter(scale * torch.randn(classes, 3 * side * side, generator=torch.Generator().manual_seed(0)))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x.flatten(1)) @ self.W.T


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return LoupeModel("swin_micro", num_classes=5, pretrained=False).eval()


@pytest.fixture
def pixels():
    return torch.rand(7, 3, 6, 6, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(7) % 4


def test_pixels_and_images_are_each_others_way_back(pixels):
    model = Linear()
    torch.testing.assert_close(as_pixels(model, as_images(model, pixels)), pixels)
    grey = torch.tensor(model.mean)[None, :, None, None]
    assert torch.equal(as_images(model, grey), torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("budget", (0, 0.5, 16))
def test_an_attack_stays_within_its_budget_the_range_and_the_pixels_allowed(pixels, kind, budget):
    allowed = torch.rand(7, 6, 6) < 0.5
    pixels[0] = 0
    attacked = attack(Linear(), pixels, LABELS, budget, kind, within=allowed)
    assert attacked.shape == pixels.shape and attacked.min() >= 0 and attacked.max() <= 1
    assert (attacked - pixels).abs().max() <= budget / 255 + 1e-6
    assert torch.equal(attacked[~allowed[:, None].expand_as(attacked)], pixels[~allowed[:, None].expand_as(pixels)])
    assert budget == 0 or not torch.equal(attacked, pixels)


@pytest.mark.parametrize("kind", ("fgsm", "pgd"))
def test_on_a_linear_model_of_two_classes_the_attack_is_the_sign_of_the_weights(kind):
    model = Linear(classes=2).eval()
    x, y = torch.full((2, 3, 6, 6), 0.5), torch.tensor([0, 1])
    attacked = attack(model, x, y, 8, kind, steps=20)
    up = (model.W[1] - model.W[0]).sign().view(3, 6, 6).detach() * 8 / 255
    torch.testing.assert_close(attacked, x + torch.stack([up, -up]))


def test_a_factor_on_the_logits_changes_neither_fgsm_nor_the_estimate(pixels):
    small, large = Linear(scale=0.1).eval(), Linear(scale=10.0).eval()
    one, other = (attack(m, pixels, LABELS, 2, "fgsm", loss="ratio") for m in (small, large))
    assert torch.equal(one, other)
    (margin_1, map_1), (margin_2, map_2) = (input_gradients(m, pixels, LABELS) for m in (small, large))
    torch.testing.assert_close(margin_2, 100 * margin_1, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(margin_1 / map_1.sum((1, 2)), margin_2 / map_2.sum((1, 2)), rtol=1e-4, atol=1e-6)


def test_the_ratio_loss_is_croce_and_heins():
    logits, labels = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0]]), torch.tensor([0, 3])
    found = LOSSES["ratio"](logits, labels)  # -(z_y - max of the others) / (highest - third)
    torch.testing.assert_close(found, torch.tensor([-(3 - 2) / (3 - 1), -(0 - 3) / (3 - 1)]))


def test_the_input_gradients_are_those_of_the_margin(pixels):
    model = Linear().eval()
    found, maps = input_gradients(model, pixels, LABELS)
    logits = model(as_images(model, pixels)).detach()
    for i, label in enumerate(LABELS):
        other = max((k for k in range(4) if k != label), key=lambda k: logits[i, k])
        w = (model.W[label] - model.W[other]).view(3, 6, 6) / torch.tensor(model.std)[:, None, None]
        torch.testing.assert_close(maps[i], w.abs().sum(0).detach())
        torch.testing.assert_close(found[i], logits[i, label] - logits[i, other])


def test_pgd_is_stronger_than_fgsm_and_fgsm_than_noise(swin):
    x = torch.rand(12, 3, 112, 112, generator=torch.Generator().manual_seed(2))
    y = logits_of(swin, x).argmax(1)
    left = {kind: margin(logits_of(swin, attack(swin, x, y, 1, kind)), y).mean() for kind in ATTACKS}
    clean = margin(logits_of(swin, x), y).mean()
    assert left["pgd"] < left["fgsm"] < left["noise"] and left["fgsm"] < clean


def test_an_attack_repeats_itself_and_leaves_modes_gradients_and_the_random_state(pixels):
    model = Linear().train()
    model.drop.eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (attack(model, pixels, LABELS, 2, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, attack(model, pixels, LABELS, 2, steps=1, seed=4))
    assert model.training and not model.drop.training and model.W.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong, message", [
    (dict(kind="cw"), "found kind='cw'"),
    (dict(loss="mse"), "loss='mse'"),
    (dict(budget=-1), "found budget=-1"),
    (dict(steps=0), "steps=0"),
    (dict(labels=LABELS[:3]), r"labels \(3,\)"),
])
def test_a_wrong_argument_is_named(pixels, wrong, message):
    with pytest.raises(LoupeError, match=message):
        attack(Linear(), **dict(pixels=pixels, labels=LABELS, budget=1) | wrong)


def test_normalised_images_are_refused(pixels):
    with pytest.raises(LoupeError, match="undo the normalisation"):
        attack(Linear(), 2 * pixels - 1, LABELS, 1)


def test_the_centred_change_ignores_what_softmax_ignores_and_the_plain_one_does_not():
    z = torch.tensor([[1.0, -1.0, 0.0]])
    assert centred_change(z + 7, z).item() < 1e-6 < 1 < relative_change(z + 7, z).item()
    assert centred_change(3 * z, z).item() == pytest.approx(2)
    assert centred_change(-z, z + 5).item() == pytest.approx(2)


def test_a_bird_before_another_scene_keeps_its_pixels():
    pixels, scene = torch.rand(2, 3, 5, 5), torch.rand(2, 3, 5, 5)
    bird = torch.rand(2, 5, 5) < 0.5
    out = composed(pixels, bird, scene).permute(0, 2, 3, 1)
    assert torch.equal(out[bird], pixels.permute(0, 2, 3, 1)[bird])
    assert torch.equal(out[~bird], scene.permute(0, 2, 3, 1)[~bird])


def test_an_empty_scene_is_the_scene_of_that_seed_without_its_bird():
    seed = (0, 5, 1)
    drawing = draw(SPECIES[0].attributes, seed, 112)
    empty = empty_scene(seed, 112, weather=0.0)
    close = (abs(drawing.image.astype(int) - empty) <= 24).all(-1)
    assert close[~drawing.segmentation].mean() > 0.6  # the perch moves with the foot, and the grain is drawn anew
    assert close[drawing.segmentation].mean() < 0.5
    assert draw(SPECIES[0].attributes, seed, 112, area=(1 / 112**2,) * 2).segmentation.sum() <= 4


@pytest.mark.parametrize("on", (True, False))
def test_a_patch_holds_as_much_or_as_little_of_the_bird_as_any(on):
    bird = draw(SPECIES[3].attributes, 4, 48).segmentation
    square = patch(bird, 9, on)
    assert square.sum() == 81
    shares = [bird[i : i + 9, j : j + 9].sum() for i in range(40) for j in range(40)]
    assert bird[square].sum() == (max(shares) if on else min(shares))
