"""The gate: mask, forms and gradients, against formulas written out again here."""

import pytest
import torch
from torch.nn import functional as F

from loupe_core.errors import LoupeError
from loupe_core.gate import FORMS, Gate, Loupe


def features(B=2, C=12, H=5, W=7, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(loupe: Loupe, x: torch.Tensor) -> torch.Tensor:
    """The mask by sums over shifted copies of the image instead of convolutions."""
    B, C, H, W = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    hidden = loupe.conv3x3.bias.view(1, -1, 1, 1).expand(B, -1, H, W)
    for dy in range(3):
        for dx in range(3):
            shifted = padded[:, :, dy : dy + H, dx : dx + W]
            hidden = hidden + torch.einsum("oc,bchw->bohw", loupe.conv3x3.weight[:, :, dy, dx], shifted)
    hidden = hidden.clamp(min=0)
    z = torch.einsum("o,bohw->bhw", loupe.conv1x1.weight[0, :, 0, 0], hidden) + loupe.conv1x1.bias
    return (1 / (1 + (-z).exp()))[:, None]


MEMORY = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a view of NHWC": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "a view of tokens": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:]),
    "every second column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.mark.parametrize("memory", MEMORY)
def test_the_mask_is_the_formula_in_any_memory_format(memory):
    torch.manual_seed(0)
    loupe = Loupe(12, reduction=3)
    x = MEMORY[memory](features())
    mask = loupe(x)
    assert mask.shape == (2, 1, 5, 7)
    torch.testing.assert_close(mask, written_out(loupe, x))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_the_mask_stays_between_0_and_1(scale):
    torch.manual_seed(0)
    mask = Loupe(12, reduction=3)(scale * features())
    assert mask.min() >= 0 and mask.max() <= 1
    assert mask.isfinite().all()


@pytest.mark.parametrize("channels, reduction, hidden", [(256, 16, 16), (256, 4, 64), (20, 16, 1), (8, 16, 1)])
def test_the_hidden_layer_has_a_fraction_of_the_channels_and_at_least_one(channels, reduction, hidden):
    loupe = Loupe(channels, reduction)
    assert loupe.conv3x3.out_channels == loupe.conv1x1.in_channels == hidden
    assert sum(p.numel() for p in loupe.parameters()) == 9 * channels * hidden + hidden + hidden + 1


def gate_with_values(form: str, dtype=torch.float32, C=12) -> Gate:
    """A gate away from its start, so that its form shows."""
    torch.manual_seed(1)
    gate = Gate(C, reduction=3, form=form).to(dtype)
    for p in gate.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gate


def gated_by_hand(gate: Gate, x: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    if gate.form == "multiply":
        return x * M
    if gate.form == "mix":
        return x * M + gate.background[None, :, None, None] * (1 - M)
    return x + (2 * M - 1) * x


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_its_formula(form):
    gate, x = gate_with_values(form), features()
    gated, mask = gate(x)
    assert mask.std() > 0.01  # not the trivial mask
    torch.testing.assert_close(mask, written_out(gate.loupe, x))
    torch.testing.assert_close(gated, gated_by_hand(gate, x, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_exactly_the_identity_at_the_start(dtype):
    gate, x = Gate(12, reduction=3, form="residual").to(dtype), features().to(dtype)
    gated, mask = gate(x)
    assert torch.equal(gated, x)
    assert torch.equal(mask, torch.full_like(mask, 0.5))


def test_residual_lets_the_features_gradient_into_the_mask_in_the_first_step():
    gate, x, G = Gate(12, reduction=3, form="residual"), features(), features(seed=1)
    gated, _ = gate(x)
    (gated * G).sum().backward()
    # gated = 2 M F and dM/dz = 1/4 at M = 1/2; z is the 1x1 convolution's output
    dz = 0.25 * 2 * (x * G).sum(1, keepdim=True)
    hidden = F.conv2d(x, gate.loupe.conv3x3.weight, gate.loupe.conv3x3.bias, padding=1).relu()
    torch.testing.assert_close(gate.loupe.conv1x1.bias.grad, dz.sum().view(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        gate.loupe.conv1x1.weight.grad[0, :, 0, 0], (dz * hidden).sum((0, 2, 3)), rtol=1e-4, atol=1e-4
    )
    assert not gate.loupe.conv3x3.weight.grad.any()  # as documented: it learns from the second step on


def test_mix_starts_as_multiply_and_learns_its_background_from_what_the_mask_closes():
    torch.manual_seed(0)
    mix = Gate(12, reduction=3, form="mix")
    multiply = Gate(12, reduction=3, form="multiply")
    multiply.loupe.load_state_dict(mix.loupe.state_dict())
    x, G = features(), features(seed=1)
    gated, mask = mix(x)
    assert torch.equal(gated, multiply(x)[0])
    (gated * G).sum().backward()
    torch.testing.assert_close(mix.background.grad, ((1 - mask) * G).sum((0, 2, 3)))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_agree_with_finite_differences(form):
    gate = gate_with_values(form, torch.double, C=4)
    x = features(1, 4, 3, 3, dtype=torch.double).requires_grad_()
    weights = dict(gate.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(gate, dict(zip(weights, values)), x)

    assert torch.autograd.gradcheck(run, (x, *(w.detach().requires_grad_() for w in weights.values())))


def test_the_features_gradient_is_the_direct_term_plus_the_path_through_the_mask():
    gate, x, G = gate_with_values("multiply"), features().requires_grad_(), features(seed=1)
    gated, mask = gate(x)
    (gated * G).sum().backward()
    with torch.no_grad():
        M, W3, w1 = mask, gate.loupe.conv3x3.weight, gate.loupe.conv1x1.weight
        direct = M * G
        dz = M * (1 - M) * (x * G).sum(1, keepdim=True)
        open_units = F.conv2d(x, W3, gate.loupe.conv3x3.bias, padding=1) > 0
        path = F.conv_transpose2d(dz * w1[0].view(1, -1, 1, 1) * open_units, W3, padding=1)
    torch.testing.assert_close(x.grad, direct + path, rtol=1e-4, atol=1e-5)
    assert path.abs().max() > 0.1 * direct.abs().max()  # so a detached mask would be noticed


def test_a_hook_on_the_loupe_puts_another_mask_in_its_place():
    gate, x = gate_with_values("multiply"), features()
    handle = gate.loupe.register_forward_hook(lambda module, inputs, mask: torch.full_like(mask, 0.25))
    gated, mask = gate(x)
    assert torch.equal(gated, 0.25 * x) and (mask == 0.25).all()
    handle.remove()
    assert not torch.equal(gate(x)[0], gated)


@pytest.mark.parametrize(
    "build, found",
    [
        (lambda: Gate(8, form="add"), "form='add'"),
        (lambda: Loupe(8, reduction=0), "reduction=0"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(build, found):
    with pytest.raises(LoupeError) as caught:
        build()
    message = str(caught.value)
    assert found in message and "expected" in message and "\n" not in message


@pytest.mark.parametrize("dtype, least", [(torch.float16, -17.33), (torch.bfloat16, -88.0), (torch.float32, -88.0)])
def test_an_exact_zero_is_a_matter_of_precision(dtype, least):
    loupe = Loupe(4).to(dtype)
    with torch.no_grad():
        loupe.conv1x1.weight.zero_()
        for above, bias in ((True, least + 0.3), (False, min(least - 0.3, 2 * least if least < -80 else 0))):
            loupe.conv1x1.bias.fill_(bias)
            assert bool((loupe(torch.ones(1, 4, 2, 2, dtype=dtype)) > 0).all()) is above, bias
