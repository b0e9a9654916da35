"""Counts of a training step, held against real tensors, and the estimate that is made of them."""

from collections import Counter

import pytest
import torch
from test_trainer import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from loupe_core import LoupeError, LoupeLoss, Recipe
from loupe_core.start.optimizers import optimizer_of
from loupe_lab.evidence.cost import (
    CARDS,
    Assumptions,
    Card,
    Counting,
    Counts,
    count_step,
    estimate,
    known_card,
    launches_of,
    parts_of_step,
)

aten = torch.ops.aten


def counted(function):
    counts = Counts(1)
    with Counting(counts, "forward"):
        function()
    return counts


def test_views_and_empty_memory_launch_nothing():
    x = torch.ones(4, 6)
    silent = counted(lambda: [x.view(2, 12), x.t(), x[1:], x.expand(2, 4, 6), x.detach(), torch.empty_like(x),
                              x.permute(1, 0), x.unbind(0), x.unsqueeze(0), x.new_empty(3), x.diagonal()])
    assert not silent.launches and silent.dispatched["forward"] >= 11 and not silent.each
    loud = counted(lambda: [x + x, x.mul_(2), x.t().contiguous(), x @ x.t(), torch.zeros(3), x.bernoulli_(0.5)])
    assert loud.launches["forward"] == 6
    assert ("forward", 2 * 4 * 6 * 4, 4 * (24 + 24 + 16)) in loud.each  # the product: its flops, and its bytes in fp32


@pytest.mark.parametrize("sizes, depth_one, depth_three", [
    ([1] * 110, 1, 3), ([1] * 111, 2, 3), ([65536 * 320], 1, 1), ([65536 * 320 + 1], 2, 2), ([1] * 300, 3, 7)])
def test_an_operation_on_lists_is_counted_in_blocks(sizes, depth_one, depth_three):
    lists = [torch.empty(n, device="meta") for n in sizes]
    assert launches_of(aten._foreach_mul_.Scalar, (lists, 2.0)) == depth_one
    assert launches_of(aten._foreach_add.List, (lists, lists)) == depth_three  # two read, one written


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_fake_tensors_launch_what_real_ones_do(optimizer):
    model, recipe = tiny_model(), Recipe(optimizer=optimizer, batch_size=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fake = count_step(model, recipe, foreach=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and type(p) is torch.nn.Parameter for p in model.parameters())
    images, real = torch.randn(3, 3, 112, 112), Counts(3)
    model.train()
    with FlopCounterMode(display=False) as flops, Counting(real, "forward"):
        logits, mask = model(images, return_mask=True)
        loss = LoupeLoss(recipe.lam)(logits, torch.tensor([0, 1, 2]), mask).total
    with Counting(real, "backward"):
        (loss / 1).backward()
    learner = optimizer_of(model, recipe)
    learner.step()
    with Counting(real, "optimizer"):
        learner.step()
    for phase in ("forward", "backward", "optimizer"):
        assert fake.launches[phase] == real.launches[phase] > 50, phase
        assert fake.traffic[phase] == real.traffic[phase] > 1e6, phase
    assert fake.flops["forward"] == flops.get_total_flops() > 1e6


def test_lion_in_few_kernels_and_mixed_precision_are_counted():
    model = tiny_model()
    plain, few, mixed = count_step(model, foreach=False), count_step(model), count_step(model, precision="bf16")
    learning = sum(1 for _ in model.parameters())
    assert plain.launches["optimizer"] == 8 * learning and few.launches["optimizer"] < 30
    assert few.launches["forward"] == plain.launches["forward"] < mixed.launches["forward"]
    assert few.flops == plain.flops == mixed.flops and few.traffic["forward"] > mixed.traffic["forward"]
    assert count_step(model, Recipe(batch_size=32)).flops["forward"] == 2 * few.flops["forward"]
    assert count_step(model, Recipe(batch_size=32)).launches == few.launches


def test_an_estimate_is_of_the_slower_of_processor_and_card():
    given = Assumptions(launch=1e-3, view=1e-4, utilisation=0.5, plain=1.0, reached=0.5, wait=0.0)
    card = Card("A100", dict(bf16=100.0, no=10.0), 10.0, "")
    counts = Counts(4, "bf16", launches=Counter(forward=2, backward=3), dispatched=Counter(forward=12, backward=3),
                    each=[("forward", 100, 1), ("backward", 0, 10)])
    host, device = parts_of_step(counts, card, given)
    assert (host, device) == (pytest.approx(5e-3 + 10e-4), pytest.approx(100 / 50 + 10 / 5))
    assert parts_of_step(counts, card, given, ("forward",), 4) == (pytest.approx(2e-3 + 1e-3), pytest.approx(8.0))
    slow = Assumptions(launch=100.0, view=0.0, wait=0.2)
    # 3 steps, and 2 batches of 16 forward
    assert estimate("a100", counts, 9, 2, 17, slow) == pytest.approx(2 * (3 * 500 + 2 * 200) / 0.8)
    assert estimate("A100", counts, 9, 2, 0, slow) == pytest.approx(2 * 3 * 500 / 0.8)


def test_cards_are_known_by_their_full_names():
    for name, short in (("NVIDIA A100-SXM4-40GB", "A100"), ("Tesla T4", "T4"), ("NVIDIA H100 80GB HBM3", "H100")):
        assert known_card(name) is CARDS[short]
    assert known_card("NVIDIA GeForce RTX 4090") is None
    with pytest.raises(LoupeError, match="card 'x86_64': expected one of T4, A100, H100"):
        estimate("x86_64", Counts(1), 1, 1)
    with pytest.raises(LoupeError, match="T4 does not compute in bf16; expected one of fp16, no"):
        estimate("T4", Counts(1, "bf16"), 1, 1)
