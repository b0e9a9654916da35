"""The loss: every term against numpy."""

import numpy as np
import pytest
import torch

from loupe_core.errors import LoupeError
from loupe_core.loss import LossTerms, LoupeLoss


def batch(B=4, K=5, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, K, generator=rng, dtype=dtype)
    labels = torch.randint(K, (B,), generator=rng)
    mask = torch.rand(B, 1, 3, 6, generator=rng, dtype=dtype)
    return logits, labels, mask


def cross_entropy(logits, labels, smoothing=0.0) -> float:
    z = logits.numpy()
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    B, K = z.shape
    target = np.full((B, K), smoothing / K)
    target[np.arange(B), labels.numpy()] += 1 - smoothing
    return -(target * log_p).sum(1).mean()


SPARSITY = {
    ("l1", "mean"): lambda m: np.mean([np.abs(image).mean() for image in m]),
    ("l1", "sum"): lambda m: np.mean([np.abs(image).sum() for image in m]),
    ("l2", "mean"): lambda m: np.mean([(image**2).mean() for image in m]),
    ("l2", "sum"): lambda m: np.mean([(image**2).sum() for image in m]),
}


@pytest.mark.parametrize("norm, reduction", SPARSITY)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_terms_are_the_formulas_and_add_up(norm, reduction, smoothing):
    logits, labels, mask = batch()
    terms = LoupeLoss(0.3, norm, reduction, label_smoothing=smoothing)(logits, labels, mask)
    assert isinstance(terms, LossTerms) and terms._fields == ("total", "classification", "sparsity")
    assert terms.classification.item() == pytest.approx(cross_entropy(logits, labels, smoothing), rel=1e-12)
    assert terms.sparsity.item() == pytest.approx(SPARSITY[norm, reduction](mask.numpy()), rel=1e-12)
    assert terms.total.item() == pytest.approx(terms.classification.item() + 0.3 * terms.sparsity.item(), rel=1e-12)


def test_the_default_is_the_papers_l1_mean_at_005():
    logits, labels, mask = batch()
    terms = LoupeLoss()(logits, labels, mask)
    assert terms.total.item() == pytest.approx(cross_entropy(logits, labels) + 0.05 * mask.numpy().mean(), rel=1e-12)


def test_several_masks_are_averaged_so_a_repeated_mask_changes_nothing():
    logits, labels, mask = batch()
    other = torch.rand(4, 1, 2, 2, dtype=torch.float64)
    loss = LoupeLoss(norm_reduction="sum")
    one, two = loss(logits, labels, mask).sparsity, loss(logits, labels, other).sparsity
    assert torch.equal(loss(logits, labels, [mask, mask]).sparsity, one)
    torch.testing.assert_close(loss(logits, labels, [mask, other]).sparsity, (one + two) / 2)


def test_no_mask_leaves_the_cross_entropy():
    logits, labels, _ = batch()
    terms = LoupeLoss(lam=5.0)(logits, labels, [])
    assert terms.sparsity.item() == 0
    assert torch.equal(terms.total, terms.classification)


def test_the_penalty_of_an_image_does_not_depend_on_the_others_in_its_batch():
    _, _, mask = batch()
    loss = LoupeLoss(norm="l2")
    penalties = loss.penalty(mask)
    assert penalties.shape == (4,)
    assert torch.equal(penalties[2:3], loss.penalty(mask[2:3]))


@pytest.mark.parametrize("epoch, share", [(0, 0.0), (0.5, 0.125), (2, 0.5), (4, 1.0), (9, 1.0), (None, 1.0)])
def test_lambda_grows_linearly_over_the_warmup_and_is_full_in_validation(epoch, share):
    logits, labels, mask = batch()
    loss = LoupeLoss(lam=0.2, warmup_epochs=4)
    terms = loss(logits, labels, mask, epoch=epoch)
    assert loss.lam_at(epoch) == pytest.approx(0.2 * share)
    torch.testing.assert_close(terms.total, terms.classification + 0.2 * share * terms.sparsity)


def test_without_warmup_lambda_is_full_from_the_first_step():
    assert LoupeLoss(lam=0.2).lam_at(0) == 0.2


@pytest.mark.parametrize("norm, slope", [("l1", lambda m: torch.ones_like(m)), ("l2", lambda m: 2 * m)])
def test_the_sparsity_gradient_is_spread_evenly_over_images_and_positions(norm, slope):
    logits, labels, mask = batch()
    mask.requires_grad_()
    LoupeLoss(lam=0.3, norm=norm)(logits, labels, mask).total.backward()
    torch.testing.assert_close(mask.grad, 0.3 * slope(mask.detach()) / mask.numel())


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_agree_with_finite_differences(norm):
    logits, labels, mask = batch()
    loss = LoupeLoss(lam=0.3, norm=norm, norm_reduction="sum", label_smoothing=0.1)
    inputs = (logits.requires_grad_(), mask.requires_grad_())
    assert torch.autograd.gradcheck(lambda z, m: tuple(loss(z, labels, m)), inputs)


def test_a_bf16_mask_is_summed_in_float32():
    logits, labels, _ = batch(dtype=torch.float32)
    mask = torch.full((4, 1, 28, 28), 0.002).to(torch.bfloat16)
    value = mask[0, 0, 0, 0].item()
    sparsity = LoupeLoss(norm_reduction="sum")(logits, labels, mask).sparsity
    assert sparsity.dtype == torch.float32
    assert sparsity.item() == pytest.approx(784 * value, rel=1e-5)  # bf16 itself has steps of 0.4 %


@pytest.mark.parametrize(
    "wrong",
    [
        dict(lam=-0.1),
        dict(lam=float("nan")),
        dict(norm="l3"),
        dict(norm_reduction="max"),
        dict(warmup_epochs=-1),
        dict(label_smoothing=1.0),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(wrong):
    (name,) = wrong
    with pytest.raises(LoupeError, match=f"{name}=") as caught:
        LoupeLoss(**wrong)
    assert "expected" in str(caught.value) and "\n" not in str(caught.value)
