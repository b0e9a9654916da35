"""The training step as a card wants it, held against the plain one: the same numbers, fewer launches and no waiting."""

import math
from functools import partial
from types import SimpleNamespace

import lion_pytorch
import numpy as np
import pytest
import timm
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file
from test_trainer import RECIPE, TEST, TRAIN, VAL, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import loupe_core.trainer as trainer_file
from loupe_core import LoupeError, LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.loss import LossTerms
from loupe_core.start import batches, optimizers
from loupe_core.start.batches import that_fit
from loupe_core.start.lion import Lion
from loupe_core.start.on_card import gives_bytes, in_bytes, is_convolutional, to_floats
from loupe_core.start.steps import Tally


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


# ---- sums that are read seldom, and a loss that is not finite


def terms_of(loss):
    return LossTerms(torch.tensor(loss), torch.tensor(loss / 2), torch.tensor(0.25))


@pytest.mark.parametrize("every", [2, 7, 100])
def test_sums_do_not_depend_on_how_often_they_are_read(every):
    found = []
    for n in (1, every):
        tally, generator = Tally(torch.device("cpu"), 0, every=n), torch.Generator().manual_seed(0)
        for k in range(15):
            logits = torch.randn(8 - k % 3, 5, generator=generator)
            labels = torch.randint(5, (len(logits),), generator=generator)
            mask = torch.rand(len(logits), 1, 3, 3, generator=generator)
            tally.add(terms_of(1 / (k + 1)), mask, logits, labels)
        tally.flush()
        tally.flush()
        found.append((tally.sums, tally.right, tally.count))
    assert found[0] == found[1] and found[0][2] == sum(8 - k % 3 for k in range(15)) and found[0][1] > 0


def test_a_loss_that_is_not_finite_is_told_with_its_step_though_read_later():
    tally, x = Tally(torch.device("cpu"), 2, "; kept", every=5), torch.zeros(2, 3)
    line = r"the loss is nan in epoch 3, step 7; expected a finite number: .*; kept$"
    with pytest.raises(LoupeError, match=line):
        for k in range(20):
            tally.check(torch.tensor(math.nan))  # not looked at, where the device would be waited for
            tally.add(terms_of(math.nan if k == 6 else 1.0), [], x, torch.zeros(2, dtype=torch.long))
    assert k == 9 and tally.count == 12  # the reading at step 10
    with pytest.raises(LoupeError, match="step 1;"):
        Tally(torch.device("cpu"), 0).check(torch.tensor(math.inf))


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_a_training_as_on_a_card_gives_the_rows_of_one_on_a_processor(optimizer, monkeypatch, tmp_path):
    """Sums read every 25 steps, Lion in few kernels: the same numbers, and no step waits for one."""
    rows, synced = [], []
    for as_card in (False, True):
        if as_card:
            monkeypatch.setattr(trainer_file, "Tally", partial(Tally, every=25))
            monkeypatch.setattr(optimizers, "Lion", partial(Lion, foreach=True))
        torch.manual_seed(0)
        trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(optimizer=optimizer, lr=1e-3, epochs=2)), progress=False)
        with CountSyncs() as counter:
            trainer.fit(TRAIN, VAL)
        rows.append(([{k: v for k, v in row.items() if k != "seconds"} for row in trainer.history],
                     [v.clone() for v in trainer.model.state_dict().values()]))
        synced.append(counter.count)
    assert rows[0][0] == rows[1][0] and all(map(torch.equal, rows[0][1], rows[1][1]))
    assert synced[0] - synced[1] == 2 * 5  # one look at the loss in every step


class CountSyncs(TorchDispatchMode):
    """Counts what would wait for a card."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


# ---- what a step of fp16 leaves out


def test_the_schedule_waits_where_the_optimizer_left_a_step_out(monkeypatch):
    seen = []
    real = AcceleratedOptimizer.step_was_skipped
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: len(seen) % 2 == 1))
    trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(epochs=1)), progress=False)
    made = trainer.optimizer

    def optimizer():
        found = made()
        found.register_step_post_hook(lambda opt, *_: seen.append(opt.param_groups[-1]["lr"]))
        return found

    trainer.optimizer = optimizer
    trainer.fit(TRAIN)
    assert real is not None and len(seen) == 5
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[1] > seen[2] > seen[4]


# ---- memory


class Crowded(torch.nn.Module):
    """A classifier that a device of `room` images cannot hold more of."""

    def __init__(self, room):
        super().__init__()
        self.room, self.tried = room, []
        self.conv, self.fc = torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Linear(4, 4)

    def forward(self, x):
        if self.training:
            self.tried.append(len(x))
            if len(x) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...\nmore")
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("room, tried, line", [
    (3, [16, 8, 4, 2], r"a batch of 16 images does not fit the memory of cpu \(CUDA out of memory. Tried .*\); "
                       r"2 do, as a trial shows: set batch_size to 2, and accumulate to 16 for as many images in a "
                       r"step$"),
    (8, [16, 8], r"8 do, as a trial shows: set batch_size to 8, and accumulate to 4 "),
    (0, [16, 8, 4, 2, 1], r"nor does a single one; expected a smaller backbone or img_size$"),
])
def test_a_batch_that_does_not_fit_is_told_with_one_that_does(room, tried, line):
    model = LoupeModel(Crowded(room), num_classes=4, site="conv")
    model.backbone.tried.clear()
    trainer = Trainer(model, Recipe(**RECIPE | dict(epochs=1, batch_size=16, accumulate=2)), progress=False)
    with pytest.raises(LoupeError, match=line) as caught:
        trainer.fit(TRAIN)
    assert model.backbone.tried == tried and "\n" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("workers, batch, room, found", [
    (2, 10, None, (2, 2)), (2, 10, 50, (2, 2)), (2, 10, 49, (2, 1)), (2, 10, 29, (1, 1)), (8, 10, 64, (5, 1)),
    (2, 10, 19, (0, None)), (0, 10, 1000, (0, None)), (0, 10, None, (0, None))])
def test_workers_are_as_many_as_shared_memory_has_room_for(workers, batch, room, found):
    assert that_fit(workers, batch, room) == found


def test_a_training_in_a_container_with_little_shared_memory(monkeypatch, tmp_path, capsys):
    room = 5 * 2**20
    monkeypatch.setattr(batches, "SHARED", str(tmp_path))
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(workers=2)), progress=False)
    loaders = trainer.loader(TRAIN, train=True), trainer.loader(TRAIN)  # 8 and 32 images of 147 KB each
    assert [(loader.num_workers, loader.prefetch_factor) for loader in loaders] == [(2, 1), (0, None)]
    line, = capsys.readouterr().out.splitlines()
    assert line == (f"{tmp_path} has 5 MB free, too few for 2 workers with batches of 5 MB: none instead; a container "
                    "takes more with --shm-size=2g")
    assert sum(len(batch["label"]) for loader in loaders for batch in loader) == 2 * len(TRAIN)


# ---- images of 8 bit, channels last, compiled steps


def photographs(count=6):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(count)]


class Drawn(torch.utils.data.Dataset):
    def __init__(self, transform, labels=(0, 1, 2, 3, 0, 1)):
        self.transform, self.labels, self.images = transform, list(labels), photographs(len(labels))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("options", [
    dict(train=False), dict(train=False, crop_mode="border"), dict(train=False, crop_mode="squash"), dict(train=True),
    dict(train=True, fast=True), dict(train=True, fast=True, randaugment="rand-m9-mstd0.5"),
    dict(train=True, randaugment="rand-m9-mstd0.5")])
def test_images_of_8_bit_become_those_of_the_transform(options, in_chans):
    torch.manual_seed(0)
    model = LoupeModel("resnet18", num_classes=4, pretrained=False, site="stage2", img_size=64,
                       backbone_kwargs=dict(in_chans=in_chans))
    plain = Drawn(transforms_for(model.data_config, **options))
    small = in_bytes(plain, model)
    assert gives_bytes(small) and not gives_bytes(plain)
    found = []
    for dataset in (plain, small):
        set_seed(3)
        found.append([dataset[i][0] for i in range(len(dataset))])
    for (x, geometry), (y, other) in zip(*found):
        assert y.dtype == torch.uint8 and y.is_contiguous() and x.shape == y.shape and geometry == other
        assert (to_floats(y[None], model)[0] - x).abs().max() <= 1e-6
    assert torch.equal(to_floats(found[0][0][0], model), found[0][0][0])  # floats stay


def test_only_sets_whose_pixels_are_known_come_as_8_bit():
    model = tiny_model()
    ours, other = (transforms_for(model.data_config | dict(std=std), train=False)
                   for std in (model.std, (0.4, 0.5, 0.6)))
    plain, foreign = Drawn(ours), Drawn(lambda image: torch.zeros(3, 112, 112))
    subset, joined = torch.utils.data.Subset(plain, [1, 2]), torch.utils.data.ConcatDataset([plain, Drawn(ours)])
    for dataset in (plain, subset, joined):
        small = in_bytes(dataset, model)
        assert gives_bytes(small) and small[0][0][0].dtype == torch.uint8 and len(small) == len(dataset)
        assert dataset[0][0][0].dtype == torch.float32
    for dataset in (foreign, Drawn(other), Drawn(None), torch.utils.data.ConcatDataset([plain, foreign]), TRAIN):
        assert in_bytes(dataset, model) is dataset


@pytest.mark.parametrize("name", ["resnet18", "swin"])
def test_a_training_with_8_bit_images_and_channels_last_ends_near_the_plain_one(name, tmp_path):
    rows = []
    for as_card in (False, True):
        torch.manual_seed(0)
        model = tiny_model() if name == "swin" else LoupeModel("resnet18", num_classes=4, pretrained=False, img_size=64)
        train, val = (Drawn(transforms_for(model.data_config, train=train)) for train in (True, False))
        recipe = Recipe(**RECIPE | dict(epochs=2, batch_size=3, lr=1e-4, workers=0))
        trainer = Trainer(model, recipe, tmp_path / f"{name} {as_card}", progress=False)
        trainer._on_card = as_card
        seen = []
        model.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(
            (inputs[0].dtype, inputs[0].is_contiguous(memory_format=torch.channels_last))))
        trainer.fit(train, val)
        rows.append([row["loss"] for row in trainer.history] + [trainer.evaluate(val).loss])
        assert {dtype for dtype, _ in seen} == {torch.float32}
        assert any(last for _, last in seen) == (as_card and name == "resnet18")
        assert all(p.is_contiguous() for p in model.parameters())
        kept = load_file(tmp_path / f"{name} {as_card}" / "best" / "model.safetensors")
        assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
    assert rows[0] == pytest.approx(rows[1], rel=2e-4)


def test_a_training_with_channels_last_goes_on(tmp_path):
    def begun(folder, epochs_now, resume=False):
        torch.manual_seed(0)
        model = LoupeModel("resnet18", num_classes=4, pretrained=False, img_size=64)
        trainer = Trainer(model, Recipe(**RECIPE | dict(epochs=3, batch_size=3, lr=1e-4)), folder, progress=False)
        trainer._on_card = True
        trainer.fit(Drawn(transforms_for(model.data_config, train=True)), resume=resume,
                    on_epoch_end=lambda row: row["epoch"] == epochs_now)
        return [v.clone() for v in model.state_dict().values()]

    whole = begun(tmp_path / "whole", 3)
    begun(tmp_path / "parted", 1)
    assert all(map(torch.equal, whole, begun(tmp_path / "parted", 3, resume=True)))


def test_what_counts_as_convolutional():
    assert is_convolutional(timm.create_model("resnet18")) and not is_convolutional(tiny_model())


@pytest.mark.parametrize("asked", ["recipe", "launcher"])
def test_a_compiled_training_is_the_plain_one_and_its_names_stay(asked, monkeypatch, tmp_path):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    recipe = RECIPE | dict(epochs=3)
    plain = Trainer(tiny_model(), Recipe(**recipe), tmp_path / "plain", progress=False)
    plain.fit(TRAIN, VAL)
    if asked == "recipe":
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, mode: real(model, backend=backend))
        recipe |= dict(compile="default")
    else:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    trainer = Trainer(tiny_model(), Recipe(**recipe), tmp_path / "compiled", progress=False)
    trainer.fit(TRAIN, VAL)
    assert [row["loss"] for row in trainer.history] == [row["loss"] for row in plain.history]
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()
    assert all(map(torch.equal, trainer.model.state_dict().values(), plain.model.state_dict().values()))
    assert trainer.evaluate(TEST).accuracy == plain.evaluate(TEST).accuracy
    kept = load_file(tmp_path / "compiled" / "best" / "model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in trainer.model.state_dict().items())
    if asked == "recipe":
        assert len(graphs) == 1  # of three epochs


def test_graphs_and_accumulated_gradients_exclude_each_other():
    Recipe(compile="reduce-overhead")
    with pytest.raises(LoupeError, match="reduce-overhead' with accumulate above 1; expected compile 'default'"):
        Recipe(compile="reduce-overhead", accumulate=2)
