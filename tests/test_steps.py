"""The training step as a card wants it, held against the plain one: the same numbers, fewer launches and no waiting."""

import lion_pytorch
import pytest
import torch

from loupe_core.start.lion import Lion


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in [(7, 5), (3,), (2, 3, 4), (1,)]]


def groups_of(params):
    return [dict(params=params[:2], lr=3e-3), dict(params=params[2:], lr=1e-3, weight_decay=0.0)]


def steps(optimizer, params, first=0, last=5):
    """Steps with gradients that a number fixes; the second parameter has none in the first two, the last never."""
    for k in range(first, last):
        generator = torch.Generator().manual_seed(k)
        for i, p in enumerate(params):
            p.grad = None if i == 3 or i == 1 and k < 2 else torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("foreach", [True, False, None])
def test_lion_takes_lion_pytorchs_steps_bit_for_bit(foreach):
    ours, theirs = parameters(), parameters()
    optimizer = Lion(groups_of(ours), lr=1e-3, weight_decay=0.3, foreach=foreach)
    plain = lion_pytorch.Lion(groups_of(theirs), lr=1e-3, weight_decay=0.3)
    steps(optimizer, ours)
    steps(plain, theirs)
    assert all(map(torch.equal, ours, theirs)) and not torch.equal(ours[0], parameters()[0])
    a, b = optimizer.state_dict(), plain.state_dict()
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys() == {0, 1, 2}
    assert all(torch.equal(a["state"][k]["exp_avg"], b["state"][k]["exp_avg"]) for k in a["state"])


@pytest.mark.parametrize("before, after", [(lion_pytorch.Lion, Lion), (Lion, lion_pytorch.Lion)])
def test_a_state_of_either_lion_goes_on_in_the_other(before, after):
    options, whole = dict(lr=1e-3, weight_decay=0.3), parameters()
    steps(lion_pytorch.Lion(groups_of(whole), **options), whole)
    parted = parameters()
    first = before(groups_of(parted), **options)
    steps(first, parted, 0, 3)
    then = after(groups_of(parted), **options)
    then.load_state_dict(first.state_dict())
    steps(then, parted, 3, 5)
    assert all(map(torch.equal, whole, parted))


def test_lion_takes_other_types_and_sparse_gradients():
    half = [p.detach().double().requires_grad_() if i % 2 else p for i, p in enumerate(parameters())]
    other = [p.detach().clone().requires_grad_() for p in half]
    for params, optimizer in ((half, Lion(half, lr=1e-2, foreach=True)), (other, lion_pytorch.Lion(other, lr=1e-2))):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    assert all(map(torch.equal, half, other))
    tables = [torch.nn.Embedding(4, 2, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    for table, kind in zip(tables, (Lion, lion_pytorch.Lion)):
        table(torch.tensor([1, 2])).sum().backward()
        kind(table.parameters(), lr=1e-2, **dict(foreach=True) if kind is Lion else {}).step()
    assert torch.equal(tables[0].weight, tables[1].weight)


def test_hooks_of_a_step_are_called_once():
    lion_pytorch.Lion(parameters())  # which makes its own class's step one with hooks
    params, called = parameters(), []
    optimizer = Lion(params)
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    steps(optimizer, params, 0, 1)
    assert called == [1] and optimizer.step(lambda: 7) == 7
