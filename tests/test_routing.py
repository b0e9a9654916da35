"""Interventions leave the forward pass alone and change the gradient as their formulas say; the terms add up."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from loupe_core import LoupeError, LoupeModel
from loupe_lab.evidence.routing import INTERVENTIONS, backward_mask, gradient_terms, intervene, shares


def small(form="multiply", **kwargs) -> LoupeModel:
    torch.manual_seed(0)
    return LoupeModel("swin_micro", num_classes=5, pretrained=False, form=form, **kwargs).eval()


def batch(n=3):
    draws = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 112, 112, generator=draws), torch.arange(n)


def at_gate(model, lam=0.05):
    """Features, mask, what goes on, and autograd's gradients at all three and at the gate's first weights."""
    seen = {}

    def look(gate, inputs, output):
        seen.update(F=inputs[0], M=output[1], refined=output[0])

    gate = model.gates["stage2"]
    handle = gate.register_forward_hook(look)  # behind the intervention's hook, which was registered before
    images, labels = batch()
    logits, mask = model(images, return_mask=True)
    handle.remove()
    task = cross_entropy(logits, labels, reduction="sum")
    total = task + lam * mask.mean((1, 2, 3)).sum()
    weight = gate.loupe.conv1x1.weight
    G, = torch.autograd.grad(task, seen["refined"], retain_graph=True)
    dF, = torch.autograd.grad(total, seen["F"], retain_graph=True)
    dW = torch.autograd.grad(total, weight)[0] if weight.requires_grad else None
    return logits.detach(), seen["F"].detach(), mask.detach(), G, dF, dW


def by_hand(model, features, G, lam=0.05):
    """What comes through the mask into F, from the loss and the penalty, and into the 1x1 convolution's weights."""
    loupe, x = model.gates["stage2"].loupe, features.clone().requires_grad_()
    mask = loupe(x)
    pull = (features * G).sum(1, keepdim=True) + lam / mask[0].numel()
    return torch.autograd.grad(mask, (x, loupe.conv1x1.weight), pull)


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_the_forward_pass_is_the_same_bit_for_bit_and_the_gradient_is_the_formula(kind):
    model = small()
    plain, features, M, *_ = at_gate(model)
    via_mask, weights = by_hand(model, features, at_gate(model)[3])
    with intervene(model, kind, seed=7):
        logits, F_, mask, G, dF, dW = at_gate(model)
    assert torch.equal(logits, plain) and torch.equal(mask, M) and torch.equal(F_, features)
    if kind == "shuffled":
        order = torch.rand(len(M), 1, M[0].numel(), generator=torch.Generator().manual_seed(7)).argsort(2)
        R = torch.stack([m.flatten()[o[0]].view(m.shape) for m, o in zip(M, order)])
    elif kind == "even":
        R = torch.stack([torch.full_like(m, float(m.mean())) for m in M])
    elif kind == "blocks":
        R = M.clone()
        for i in range(0, M.shape[2], 2):
            for j in range(0, M.shape[3], 2):
                R[..., i:i + 2, j:j + 2] = M[..., i:i + 2, j:j + 2].mean((2, 3), keepdim=True)
    else:
        R = M
    wanted = R * G + (0 if kind == "detached" else via_mask)
    torch.testing.assert_close(dF, wanted, atol=1e-7, rtol=1e-4)
    if kind == "frozen":
        assert dW is None
    else:
        torch.testing.assert_close(dW, weights, atol=1e-6, rtol=1e-4)


def test_an_intervention_ends_with_its_block():
    model = small()
    before = at_gate(model)[4]
    for kind in INTERVENTIONS:
        with intervene(model, kind):
            changed = at_gate(model)[4]
        assert torch.equal(changed, before) == (kind in ("none", "frozen"))
        assert torch.equal(at_gate(model)[4], before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_backward_mask_keeps_what_it_should():
    M = torch.rand(4, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    shuffled = backward_mask(M, "shuffled", torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.flatten(1).sort(1).values, M.flatten(1).sort(1).values)
    assert not torch.equal(shuffled, M)
    assert backward_mask(M, "blocks").shape == M.shape  # an odd grid
    assert float(backward_mask(M, "blocks")[0, 0, 4, 6]) == pytest.approx(float(M[0, 0, 4, 6]))


@pytest.mark.parametrize("form", ["multiply", "residual"])
def test_the_terms_add_up_to_autograds_gradient(form):
    model = small(form)
    torch.nn.init.normal_(model.gates["stage2"].loupe.conv1x1.weight)  # the residual form's is zero at the start
    *_, G, dF, _ = at_gate(model, lam=0.5)
    terms = gradient_terms(model, *batch(), lam=0.5)
    torch.testing.assert_close(terms.whole, dF, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(terms.direct, (2 if form == "residual" else 1) * terms.mask * G, atol=1e-6, rtol=1e-4)
    assert all(part.norm() > 0 for part in terms[:3])
    assert not model.gates["stage2"]._forward_hooks


def test_shares_of_terms_that_are_known():
    a = torch.zeros(1, 2, 1, 2)
    a[0, 0] = torch.tensor([[3.0, 0.0]])
    b = torch.zeros(1, 2, 1, 2)
    b[0, 1] = torch.tensor([[4.0, 0.0]])  # at right angles to a, at the same place
    found = shares(type(gradient_terms(small(), *batch()))(a, b, torch.zeros_like(a), torch.ones(1, 1, 1, 2)))
    assert found == pytest.approx(dict(direct=0.6, via_mask=0.8, penalty=0.0, cosine=0.0, agree=1.0))


def test_what_cannot_be_done_is_refused_in_one_line():
    for model, kind, found in ((small("mix"), "even", "mix"), (small(site=()), "even", "no gate"),
                               (small(), "odd", "found kind='odd'; expected one of none, frozen")):
        with pytest.raises(LoupeError, match=found), intervene(model, kind):
            pass
    for model in (small("mix"), small(site=["stage1", "stage2"])):
        with pytest.raises(LoupeError, match="expected one gate, of form multiply or residual"):
            gradient_terms(model, *batch())
