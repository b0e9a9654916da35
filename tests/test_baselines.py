"""Other attention in the Loupe's place: of equal size, at the same site, trained with the rest."""

import math

import pytest
import torch
from timm.layers.cbam import SpatialAttn
from torch import nn

from loupe_core import Loupe, LoupeError, LoupeModel
from loupe_lab.evidence.baselines import CbamMask, SelfAttentionMask, baseline, control, put_after


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("channels, parameters", [(64, 2_313), (256, 36_897)])
@pytest.mark.parametrize("kind", ["se", "cbam", "self-attention"])
def test_a_baseline_is_as_large_as_the_loupe_to_three_percent(kind, channels, parameters):
    assert abs(size(baseline(kind, channels, parameters)) / parameters - 1) < 0.03


def test_an_unknown_baseline_is_refused():
    with pytest.raises(LoupeError, match="baseline 'eca' is unknown; expected one of se, cbam, self-attention"):
        baseline("eca", 64, 2_313)


def test_a_self_attention_mask_equals_its_formula():
    torch.manual_seed(0)
    gate, x = SelfAttentionMask(6, 4), torch.randn(2, 6, 3, 5)
    tokens = gate.norm(x.permute(0, 2, 3, 1).reshape(2, 15, 6))
    q, k, v = (tokens @ gate.qkv.weight.T + gate.qkv.bias).split(4, dim=-1)
    attended = torch.softmax(q @ k.transpose(1, 2) / 2, dim=-1) @ v
    expected = torch.sigmoid(attended @ gate.score.weight.T + gate.score.bias).reshape(2, 1, 3, 5)
    torch.testing.assert_close(gate(x), expected)


@pytest.mark.parametrize("backbone, size", [("swin_micro", 112), ("resnet10t", 64)])
def test_a_baseline_takes_the_loupes_place_and_is_trained(backbone, size):
    torch.manual_seed(0)
    gated = LoupeModel(backbone, 5, pretrained=False, img_size=size)
    channels = gated.gates["stage2"].site.channels
    model = LoupeModel(backbone, 5, pretrained=False, img_size=size, site=()).eval()
    x = torch.randn(2, 3, size, size)
    before, seen = model(x), []
    put_after(model, nn.Conv2d(channels, channels, 1))
    with torch.no_grad():
        model.peer.weight.copy_(torch.eye(channels)[..., None, None])
        model.peer.bias.zero_()
    model.peer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    torch.testing.assert_close(model(x), before)  # the identity changes nothing
    grid = tuple(gated.eval()(x, return_mask=True)[1].shape[2:])
    assert seen == [(2, channels, *grid)]
    model(x).sum().backward()
    assert model.peer.weight.grad.abs().sum() > 0 and any(name.startswith("peer.") for name in model.state_dict())


def drawn(kind, channels=32):
    """A control after the same draws as a Loupe, so that both begin with the same weights."""
    torch.manual_seed(3)
    int(torch.randint(2**31, ()))
    loupe = Loupe(channels)
    torch.manual_seed(3)
    return control(kind, channels), loupe, torch.randn(5, channels, 6, 7)


def test_the_constant_control_is_the_loupes_mean_of_each_image():
    gate, loupe, x = drawn("constant")
    mask, own = gate(x), loupe(x)
    assert mask.shape == own.shape and mask.flatten(1).std(1).max() == 0
    torch.testing.assert_close(mask[:, 0, 2, 3], own.sum((1, 2, 3)) / 42)
    assert mask[:, 0, 0, 0].std() > 0  # it may still tell one image from another


def test_the_shuffled_control_shuffles_anew_in_training_and_in_one_order_at_test():
    gate, loupe, x = drawn("shuffled")
    gate.train()
    first, second, own = gate(x), gate(x), loupe(x)
    for mask in (first, second, gate.eval()(x)):
        assert not torch.equal(mask, own)
        torch.testing.assert_close(mask.flatten(1).sort().values, own.flatten(1).sort().values)
    assert not torch.equal(first, second)
    assert torch.equal(gate(x), gate(x))
    torch.testing.assert_close(gate(x)[1:2], gate(x[1:2]))  # the same order for every image, in every batch
    again, _, _ = drawn("shuffled")
    assert torch.equal(again.eval()(x), gate(x))


def test_the_random_control_is_a_loupe_that_no_training_moves():
    gate, loupe, x = drawn("random")
    torch.testing.assert_close(gate(x), loupe(x))
    x.requires_grad_()
    gate(x).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in gate.parameters())
    assert x.grad.abs().sum() > 0  # the features before it can still learn to change its mask


def test_the_centre_control_is_one_gaussian_for_all_images():
    gate, _, _ = drawn("centre")
    mask = gate(torch.randn(2, 32, 9, 5))
    assert mask.shape == (2, 1, 9, 5) and torch.equal(mask[0], mask[1]) and not mask.requires_grad
    assert mask[0, 0, 4, 2] == 1 == mask.max()
    for row, column, deviations in ((4, 4, 2), (0, 2, 2), (0, 0, 8**0.5)):  # of the middle's distance
        assert mask[0, 0, row, column].item() == pytest.approx(math.exp(-deviations**2 / 2), rel=1e-5)
    torch.testing.assert_close(mask, mask.flip(2, 3))


def test_the_cbam_control_times_the_features_is_timms_own_layer():
    torch.manual_seed(0)
    gate, timms, x = CbamMask(), SpatialAttn(), torch.randn(3, 8, 9, 9)
    timms.load_state_dict(gate.state_dict())
    for mode in (True, False):
        torch.testing.assert_close(gate.train(mode)(x) * x, timms.train(mode)(x))
    assert 0 <= gate(x).min() < gate(x).max() <= 1
    assert isinstance(control("cbam", 32), CbamMask)


def test_controls_hold_as_many_weights_as_the_loupe_but_for_cbam_and_an_unknown_one_is_refused():
    for kind in ("constant", "shuffled", "random", "centre"):
        assert size(control(kind, 64)) == size(Loupe(64))
    assert size(control("cbam", 64)) == 2 * 7 * 7 + 2  # a kernel for mean and maximum, and its BatchNorm
    with pytest.raises(LoupeError, match="control 'eca' is unknown; expected one of constant, shuffled, random"):
        control("eca", 64)


@pytest.mark.parametrize("kind, learns", [("constant", True), ("shuffled", True), ("cbam", True), ("random", False),
                                          ("centre", False)])
def test_a_control_in_the_gate_learns_where_it_should(kind, learns):
    torch.manual_seed(0)
    model = LoupeModel("swin_micro", 5, pretrained=False)
    gate = model.gates["stage2"]
    gate.loupe = control(kind, gate.site.channels)
    x = torch.randn(4, 3, 112, 112)
    logits, mask = model.train()(x, return_mask=True)
    assert mask.shape == (4, 1, 14, 14)
    (logits.square().sum() + mask.mean()).backward()
    moved = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in gate.loupe.parameters()]
    assert any(moved) == learns
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
