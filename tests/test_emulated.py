"""The emulated card raises where CUDA does, and nowhere else: a test that it passes wrongly would be worth nothing."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from emulated import CUDA, is_on_card
from emulated import card as emulated
from lion_pytorch import Lion
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

TWO = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


MIXED = {
    "sum": lambda a, b: a + b,
    "sum, the other way": lambda a, b: b + a,
    "product of matrices": lambda a, b: a @ b,
    "linear layer": lambda a, b: F.linear(a, b),
    "a convolution's weights": lambda a, b: F.conv2d(a[None, None], b[None, None]),
    "concatenation": lambda a, b: torch.cat([a, b]),
    "stack of numbers": lambda a, b: torch.stack([a.sum(), b.sum()]),
    "choice": lambda a, b: torch.where(a > 0, a, b),
    "comparison": lambda a, b: a == b,
    "equal": lambda a, b: torch.equal(a, b),
    "in place": lambda a, b: a.add_(b),
    "in place, the other way": lambda a, b: b.add_(a),
    "a number in place of the CPU's": lambda a, b: b.sum().add_(a.sum()),
    "a number of the card beside the CPU's": lambda a, b: b * a.sum(),
    "gather": lambda a, b: a.gather(1, b.argsort(1)),
    "scatter": lambda a, b: a.scatter(1, b.argsort(1), 0.0),
    "an embedding": lambda a, b: F.embedding(b.argsort(1), a),
    "cross-entropy": lambda a, b: F.cross_entropy(a, b.argmax(1)),
    "indices of the card for the CPU's": lambda a, b: b[a.argmax(1)],
    "a mask of the card for the CPU's": lambda a, b: b[a > 0],
    "values of the CPU at indices": lambda a, b: a.index_put((torch.arange(4),), b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.5),
    "LayerNorm's weights": lambda a, b: F.layer_norm(a, (4,), b[0]),
    "foreach": lambda a, b: torch._foreach_add([a, a], [b, b]),
    "a generator of the CPU": lambda a, b: a.bernoulli_(0.5, generator=torch.Generator()),
    "a generator of the card": lambda a, b: b.bernoulli_(0.5, generator=torch.Generator("cuda")),
    "a generator in a factory": lambda a, b: torch.rand(3, device="cuda", generator=torch.Generator()),
}


@pytest.mark.parametrize("name", MIXED)
def test_two_devices_in_one_operation_raise(name, card):
    MIXED[name](torch.rand(4, 4), torch.rand(4, 4)) if "generator" not in name else None  # on one device it works
    with pytest.raises(RuntimeError, match="Expected|indices should be either on cpu"):
        MIXED[name](torch.rand(4, 4).to(card), torch.rand(4, 4))


ALLOWED = {
    "a number of the CPU": lambda a, b: a * b.sum() + torch.tensor(2.0),
    "a number of the CPU first": lambda a, b: b.sum() - a,
    "a number of the CPU in a choice": lambda a, b: torch.where(a > 0, a, torch.tensor(0.0)),
    "a number of the CPU in place": lambda a, b: a.mul_(b.sum()),
    "indices of the CPU": lambda a, b: a[b.argmax(1)],
    "a mask of the CPU": lambda a, b: a[b > 0.5],
    "a list": lambda a, b: a[[0, 2]],
    "copy": lambda a, b: a.copy_(b),
    "a slice that is written": lambda a, b: a.__setitem__(slice(0, 2), b[:2]) or a,
    "a number that is written": lambda a, b: a.__setitem__(a > 0.5, torch.tensor(1.0)) or a,
    "masked_fill": lambda a, b: a.masked_fill(a > 0.5, torch.tensor(0.0)),
    "full_like": lambda a, b: torch.full_like(a, 1.0) + torch.zeros_like(a) + a.new_zeros(4, 4) + a.new_tensor([1.0]),
    "a view": lambda a, b: a.view(16)[2:].unflatten(0, (2, 7)).transpose(0, 1).contiguous(),
    "dtype": lambda a, b: a.double().to(torch.float16),
    "an iteration": lambda a, b: sum(row for row in a),
    "one hot": lambda a, b: a.argmax(1).float().sort().values.topk(2).values,
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_gives_the_cpus_values_and_stays_on_the_card(name, card):
    torch.manual_seed(0)
    a, b = torch.rand(4, 4), torch.rand(4, 4)
    wanted = ALLOWED[name](a.clone(), b)
    found = ALLOWED[name](a.to(card), b)
    assert found.device == CUDA and found.is_cuda and not found.is_cpu and found.get_device() == 0
    assert torch.equal(found.cpu(), wanted) and wanted.device.type == "cpu"


def test_copy_goes_back_to_the_cpu(card):
    a, b = torch.rand(3).to(card), torch.zeros(3)
    assert torch.equal(b.copy_(a), a.cpu()) and b.device.type == "cpu"
    b[1:] = 2 * a[1:]
    assert b.device.type == "cpu"


@pytest.mark.parametrize("there", [
    lambda x: x.to("cuda"), lambda x: x.to(torch.device("cuda:0")), lambda x: x.to(0), lambda x: x.to(device="cuda"),
    lambda x: x.to("cuda", torch.float64), lambda x: x.to("cuda", non_blocking=True), lambda x: x.cuda(),
    lambda x: x.to(torch.zeros(1, device="cuda")), lambda x: x.to(torch.zeros(1, device="cuda"), copy=True),
    lambda x: torch.as_tensor(x, device="cuda"), lambda x: torch.tensor(x.tolist(), device="cuda"),
    lambda x: torch.as_tensor(x.numpy(), device="cuda")])
def test_ways_to_the_card_copy(there, card):
    x = torch.arange(3.0)
    y = there(x)
    assert y.device == CUDA and x.device.type == "cpu" and y.tolist() == [0, 1, 2]
    y.add_(1)
    assert x.tolist() == [0, 1, 2]


@pytest.mark.parametrize("back", [
    lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.to(torch.zeros(1)), lambda x: x.to("cpu", torch.float64),
    lambda x: torch.as_tensor(x, device="cpu"), lambda x: torch.zeros(3).copy_(x)])
def test_ways_back_copy(back, card):
    x = torch.arange(3.0).to(card)
    y = back(x)
    assert y.device.type == "cpu" and x.device == CUDA and np.asarray(y).tolist() == [0, 1, 2]
    y.add_(1)
    assert x.tolist() == [0, 1, 2]


def test_what_is_there_already_is_not_copied(card):
    x, y = torch.rand(3), torch.rand(3).to(card)
    assert x.cpu() is x and x.to("cpu") is x and y.to(card) is y and y.cuda() is y and y.to(torch.float32) is y
    assert torch.as_tensor(y, device=card) is y and y.to(y) is y and x.to("meta").is_meta


@pytest.mark.parametrize("read", [lambda x: x.numpy(), np.asarray, np.array, lambda x: np.mean([1.0, *np.asarray(x)]),
                                  lambda x: x.detach().numpy(), lambda x: x[0].numpy(), np.abs])
def test_numpy_cannot_read_the_card(read, card):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()"):
        read(torch.rand(3).to(card))


def test_numbers_and_lists_can_be_read(card):
    x = torch.arange(3.0).to(card)
    assert x.tolist() == [0, 1, 2] and x[1].item() == 1 and float(x.sum()) == 3 and bool(x.any()) and len(x) == 3
    assert x.numpy(force=True).tolist() == [0, 1, 2] and f"{x[1]:.1f}" == "1.0"


@pytest.mark.parametrize("make", [
    lambda **k: torch.zeros(3, **k), lambda **k: torch.ones(2, 3, **k), lambda **k: torch.full((3,), 2.0, **k),
    lambda **k: torch.randn(3, **k), lambda **k: torch.rand(3, **k), lambda **k: torch.arange(3, **k),
    lambda **k: torch.linspace(0, 1, 3, **k), lambda **k: torch.randperm(3, **k), lambda **k: torch.eye(3, **k),
    lambda **k: torch.randint(5, (3,), **k), lambda **k: torch.empty(3, **k), lambda **k: torch.tensor([1.0], **k),
    lambda **k: torch.zeros_like(torch.rand(3), **k), lambda **k: torch.rand(3).new_zeros(3, **k),
    lambda **k: torch.rand(3).new_full((3,), 1, **k)])
def test_factories_make_where_they_are_told(make, card):
    assert make(device="cuda").device == CUDA and make(device=torch.zeros(1, device="cuda").device).is_cuda
    assert make().device.type == make(device="cpu").device.type == "cpu" and make(device="meta").is_meta


def test_a_model_can_be_built_on_the_meta_device(card):
    with torch.device("meta"):
        layer = nn.LayerNorm(3)
        assert layer.weight.is_meta and torch.linspace(0, 1, 3).is_meta and torch.zeros(2).device.type == "meta"
    assert layer(torch.zeros(2, 3, device="meta")).is_meta and torch.zeros(2).device.type == "cpu"


def test_a_factory_gives_a_leaf(card):
    x = torch.zeros(3, device="cuda", requires_grad=True)
    (2 * x).sum().backward()
    assert x.is_leaf and x.grad.device == CUDA and x.grad.tolist() == [2, 2, 2]


def test_a_model_moves_with_parameters_and_buffers_which_stay_the_same_objects(card):
    model = net()
    before, values = [*model.parameters(), *model.buffers()], copy.deepcopy(model.state_dict())
    assert model.to("cuda") is model
    after = [*model.parameters(), *model.buffers()]
    assert all(p.device == CUDA for p in after)
    assert all(a is b for a, b in zip(before, list(model.parameters())))
    assert all(torch.equal(values[name], value.cpu()) for name, value in model.state_dict().items())
    assert not any(is_on_card(p) for p in model.cpu().parameters()) and not is_on_card(model[1].running_mean)


def test_forward_and_backward_give_the_cpus_gradients_on_the_card(card):
    x, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    plain, moved = net(), net().to(card)
    F.cross_entropy(plain(x), y).backward()
    F.cross_entropy(moved(x.to(card)), y.to(card)).backward()
    for a, b in zip(plain.parameters(), moved.parameters()):
        assert b.grad.device == CUDA and torch.equal(a.grad, b.grad.cpu())
    assert torch.equal(plain[1].running_mean, moved[1].running_mean.cpu()) and moved[1].running_mean.is_cuda
    with pytest.raises(RuntimeError, match=TWO):
        moved(x)
    with pytest.raises(RuntimeError, match=TWO):
        F.cross_entropy(moved(x.to(card)), y)


def test_a_gradient_comes_back_to_where_its_tensor_is(card):
    x = torch.rand(3, requires_grad=True)
    moved = x.to(card)
    (moved**2).sum().backward()
    assert x.grad.device.type == "cpu" and torch.allclose(x.grad, 2 * x.detach()) and moved.requires_grad
    first, = torch.autograd.grad((x.to(card) ** 3).sum(), x, create_graph=True)
    first.sum().backward()  # of a gradient too
    assert x.grad.device.type == "cpu"


def test_a_wrong_device_in_the_backward_pass_raises(card):
    x = torch.rand(3, device="cuda", requires_grad=True)
    y = 2 * x
    y.register_hook(lambda gradient: gradient * torch.rand(3))
    with pytest.raises(RuntimeError, match=TWO):
        y.sum().backward()


@pytest.mark.parametrize("kind", [Lion, torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_step_on_the_card_as_on_the_cpu(kind, card):
    x, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    found = []
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = kind(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert all(p.device.type == device for p in model.parameters())
        moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim]
        assert all(v.device.type == device for v in moments) and (moments or kind is torch.optim.SGD)
        found.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_is_on_the_card_too(copied, card):
    model = net().to(card)
    other = copied(model)
    assert all(is_on_card(p) for p in [*other.parameters(), *other.buffers()])
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert next(model.parameters()).any()


def test_state_dicts_go_across(card):
    model, other = net().to(card), net()
    with torch.no_grad():
        model[0].weight.zero_()
    other.load_state_dict(model.state_dict())
    assert not other[0].weight.any() and not is_on_card(other[0].weight) and is_on_card(model.state_dict()["0.weight"])


def test_what_was_saved_from_the_card_needs_map_location(tmp_path):
    file = tmp_path / "state.pt"
    with emulated():
        torch.save(dict(weights=net().to("cuda").state_dict(), more=torch.ones(2)), file)
        there = torch.load(file)
        assert there["weights"]["0.weight"].device == CUDA and there["more"].device.type == "cpu"
        assert torch.load(file, map_location="cpu")["weights"]["0.weight"].device.type == "cpu"
        assert torch.load(file, map_location="cuda")["more"].device == CUDA
    with pytest.raises((RuntimeError, AssertionError), match="CUDA|cuda"):
        torch.load(file)
    assert torch.equal(torch.load(file, map_location="cpu")["weights"]["0.weight"], net()[0].weight)


def test_safetensors_read_and_write(tmp_path, card):
    save_file({"x": torch.arange(3.0).to(card)}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [0, 1, 2]
    buffer = io.BytesIO()
    torch.save(torch.rand(2), buffer)  # the CPU's stays the CPU's
    assert torch.load(io.BytesIO(buffer.getvalue())).device.type == "cpu"


def test_the_card_has_random_numbers_of_its_own(card):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(4, device="cuda")
    F.dropout(torch.ones(4, device="cuda"), 0.5)
    torch.randn_like(first)
    assert torch.equal(torch.rand(4), wanted)  # the CPU's did not move
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    state = torch.cuda.get_rng_state()
    again = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), again)
    with torch.random.fork_rng():
        torch.rand(4, device="cuda")
    state = torch.cuda.get_rng_state()
    generator = torch.Generator("cuda").manual_seed(1)
    assert torch.rand(2, device="cuda", generator=generator).is_cuda and generator.device.type == "cuda"
    torch.zeros(4, device="cuda").bernoulli_(0.5, generator=generator)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_freed_tensor_leaves_no_mark(card):
    for _ in range(3000):
        torch.rand(5).to(card)
        assert torch.rand(5).device.type == "cpu"


@pytest.mark.parametrize("bf16, precision", [(True, torch.bfloat16), (False, torch.float16)])
def test_autocast_and_accelerate_take_it_for_a_card(bf16, precision):
    with emulated(bf16) as device:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1 and torch.cuda.get_device_name()
        assert torch.cuda.is_bf16_supported(including_emulation=False) == bf16
        accelerator = Accelerator(mixed_precision="bf16" if bf16 else "fp16")
        assert accelerator.device == device or accelerator.device.type == "cuda"
        model, optimizer = net(), None
        optimizer = Lion(model.parameters(), lr=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        x = torch.randn(6, 3, 8, 8, device="cuda")
        with torch.autocast("cuda", precision):
            assert F.linear(x, x[0, 0]).dtype == precision
        before = next(model.parameters()).detach().clone()
        for _ in range(3):
            loss = F.cross_entropy(model(x), torch.zeros(6, dtype=torch.long, device="cuda"))
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        assert is_on_card(loss) and not torch.equal(next(model.parameters()), before)
        assert (accelerator.scaler is None) == bf16


def test_afterwards_all_is_as_it_was():
    with emulated():
        left = torch.rand(3, device="cuda")
    assert left.device.type == "cpu" and left.numpy().shape == (3,)
    assert torch.Tensor.device is torch._C.TensorBase.device and torch.Tensor.to is torch._C.TensorBase.to
    assert torch.Generator is torch._C.Generator and torch.zeros.__name__ == "zeros" and not torch.cuda.is_available()
    assert Accelerator().device.type == "cpu" and torch.rand(3).numpy().shape == (3,)
    torch.rand(3) + left
    with emulated():
        assert left.is_cuda  # as something that a cache kept would be
