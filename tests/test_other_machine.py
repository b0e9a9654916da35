"""A run that goes on elsewhere: with workers, in another precision, on another number of processes, on a slow disk."""

import gc
import json
import multiprocessing
import os
import shutil
import sys
import weakref
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import FORKS
from PIL import Image
from test_trainer import RECIPE, TEST, TRAIN, VAL, tiny_model, weights

from loupe_core import LoupeError, LoupeModel, PhotoFolder, Recipe, Trainer, transforms_for
from loupe_core.cli import main
from loupe_core.files.run_folder import RunFolder, other_machine

CONFIG = dict(input_size=(3, 48, 48), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=1.0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of twelve noisy photographs."""
    folder, draws = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 160)):
        (folder / name).mkdir()
        for i in range(12):
            pixels = draws.integers(0, 90, (64, 64, 3)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def with_workers(photographs, out, until=None, workers=2) -> Trainer:
    """Three epochs of a small network on photographs that workers read and change at random; stopped after `until`."""
    torch.manual_seed(0)
    model = LoupeModel("resnet10t", num_classes=2, pretrained=False, data_config=CONFIG)
    recipe = Recipe(**RECIPE | dict(epochs=3, workers=workers, augment="randaugment"))
    train = PhotoFolder(photographs, transform=transforms_for(CONFIG, **recipe.train_transform_options()))
    trainer = Trainer(model, recipe, out, progress=False)
    trainer.fit(train, train.with_split("val", transforms_for(CONFIG, train=False)), resume=True,
                on_epoch_end=lambda row: row["epoch"] == until)
    return trainer


def test_a_run_with_workers_that_is_resumed_ends_as_an_uninterrupted_one(photographs, tmp_path):
    whole = weights(with_workers(photographs, tmp_path / "whole"))
    with_workers(photographs, tmp_path / "stopped", until=1)
    resumed = weights(with_workers(photographs, tmp_path / "stopped"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert multiprocessing.active_children() == []


def test_nothing_of_a_training_or_an_evaluation_stays(photographs, monkeypatch):
    alive = []
    real = Trainer.optimizer
    monkeypatch.setattr(Trainer, "optimizer",
                        lambda self: (made := real(self), alive.append(weakref.ref(made)))[0])
    gc.disable()  # what stays until some later collection would fill a card
    try:
        trainer = with_workers(photographs, None)
        assert alive[0]() is None
    finally:
        gc.enable()
    assert all(p.grad is None for p in trainer.model.parameters())
    data = PhotoFolder(photographs, transform=transforms_for(CONFIG, train=False))
    for _ in range(2):
        trainer.evaluate(data)
        assert multiprocessing.active_children() == [] and trainer.accelerator._dataloaders == []


def test_an_evaluation_between_epochs_changes_nothing():
    plain, seen = Trainer(tiny_model(), Recipe(**RECIPE), progress=False), []
    plain.fit(TRAIN, VAL)
    looking = Trainer(tiny_model(), Recipe(**RECIPE), progress=False)
    looking.fit(TRAIN, VAL, on_epoch_end=lambda row: seen.append(looking.evaluate(TEST).accuracy))
    assert len(seen) == RECIPE["epochs"]
    a, b = weights(plain), weights(looking)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_no_seed_has_the_order_of_another():
    def orders(seed):
        trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(seed=seed)), progress=False)
        loader = trainer.accelerator.prepare(trainer.loader(TRAIN, train=True))
        for epoch in range(6):
            loader.set_epoch(epoch)
            yield tuple(int(i) for batch in loader for i in batch["image_id"])

    found = [order for seed in range(4) for order in orders(seed)]
    assert len(set(found)) == 24
    # seed 0 has the orders that it had when the results of before December 2026 were recorded
    for epoch, order in enumerate(islice(found, 6)):
        assert list(order) == torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()


def scaled(out, scaler: bool, **options) -> Trainer:
    """A trainer with a gradient scaler, as in fp16, or without."""
    trainer = Trainer(tiny_model(), Recipe(**RECIPE), out, progress=False, **options)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaler else None
    return trainer


@pytest.mark.parametrize("before", [False, True])
def test_a_run_goes_on_with_a_scaler_that_it_was_begun_without_and_the_other_way_round(before, tmp_path):
    scaled(tmp_path, before).fit(TRAIN, VAL, on_epoch_end=lambda row: row["epoch"] == 2)
    newest = sorted((tmp_path / "states").iterdir())[-1]
    assert (newest / "scaler.pt").is_file() == before
    then = scaled(tmp_path, not before)
    assert len(then.fit(TRAIN, VAL, resume=True)) == RECIPE["epochs"]
    assert (sorted((tmp_path / "states").iterdir())[-1] / "scaler.pt").is_file() != before


def test_another_precision_and_other_steps_are_told(tmp_path, capsys):
    a, b = dict(steps=10, precision="bf16"), dict(steps=5, precision="fp16")
    assert "5 steps per epoch" in other_machine(a, b) and "precision fp16" in other_machine(a, b)
    recipe = Recipe(**RECIPE | dict(precision="auto"))
    for precision in ("no", "bf16"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loupe_core.start.machine.pick_precision", lambda device, found=precision: found)
            trainer = Trainer(tiny_model(), recipe, tmp_path, progress=False)
            trainer.fit(TRAIN, VAL, resume=True, on_epoch_end=lambda row: row["epoch"] in (2, 4))
    assert capsys.readouterr().err == ("resume: this run goes on with precision bf16 (it was begun with no): it ends "
                                       "elsewhere than an uninterrupted one\n")


def rank(number: int, processes: int, folder: str, until: int) -> None:
    """One of several processes of a training that is stopped after epoch `until`; `errors` is what they tell."""
    torch.set_num_threads(1)
    sys.stderr = open(f"{folder}-errors", "a", encoding="utf-8")
    if processes > 1:
        os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(processes),
                           LOCAL_WORLD_SIZE=str(processes), ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT="0")
        dist.init_process_group("gloo", init_method=f"file://{folder}-{until}-{processes}", rank=number,
                                world_size=processes)
    trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(epochs=6)), folder, progress=False)
    assert trainer.accelerator.num_processes == processes
    trainer.fit(TRAIN, VAL, resume=True, on_epoch_end=lambda row: row["epoch"] == until)
    sys.stderr.flush()
    if processes > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_with_another_number_of_processes_the_rate_goes_on_at_its_epochs_place(first, then, tmp_path):
    out = tmp_path / "run"
    for processes, until in ((first, 3), (then, 6)):
        mp.start_processes(rank, (processes, str(out), until), processes, start_method=FORKS.get_start_method())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    alone = Trainer(tiny_model(), Recipe(**RECIPE | dict(epochs=6)), progress=False)
    assert [row["lr"] for row in rows] == pytest.approx([row["lr"] for row in alone.fit(TRAIN, VAL)], rel=1e-6)
    told = (tmp_path / "run-errors").read_text()
    assert told.count(f"goes on with {dict([(1, 5), (2, 3)])[then]} steps per epoch") == 1  # one process tells for all


def test_states_are_kept_every_few_epochs_and_at_the_end(tmp_path):
    def run(out, until=None, **options):
        trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(epochs=5)), out, progress=False, **options)
        trainer.fit(TRAIN, VAL, resume=True, on_epoch_end=lambda row: row["epoch"] == until)
        return trainer

    names = lambda out: sorted(p.name for p in (out / "states").iterdir())  # noqa: E731
    whole = run(tmp_path / "whole", save_every=3)
    assert names(tmp_path / "whole") == ["epoch-0003", "epoch-0005"]
    run(tmp_path / "stopped", until=4, save_every=3)
    assert names(tmp_path / "stopped") == ["epoch-0003"]
    assert RunFolder(tmp_path / "stopped", None).kept().startswith("; 3 complete epochs are kept")
    again = run(tmp_path / "stopped", save_every=3)
    a, b = weights(whole), weights(again)
    assert all(torch.equal(a[k], b[k]) for k in a) and len(again.history) == 5
    with pytest.raises(LoupeError, match="save_every=0; expected 1 or more"):
        Trainer(tiny_model(), Recipe(**RECIPE), save_every=0)


def test_a_state_is_emptied_before_it_is_removed(tmp_path, monkeypatch):
    """A disk that keeps what was removed then keeps nothing of it."""
    sizes, real = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, *rest, **options: (
        sizes.extend(f.stat().st_size for f in path.rglob("*") if f.is_file()), real(path, *rest, **options)))
    Trainer(tiny_model(), Recipe(**RECIPE), tmp_path, progress=False).fit(TRAIN, VAL)
    assert len(sizes) > 8 and set(sizes) == {0}


def test_one_of_several_processes_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main([]) == 0 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert main([]) == 0 and capsys.readouterr().out.startswith("usage: loupe")


def test_the_rate_of_an_epoch_is_that_of_its_beginning():
    rates = []
    trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(anneal="epoch", lr_min=1e-4)), progress=False)
    trainer.fit(TRAIN, VAL, on_epoch_end=lambda row: rates.append(row["lr"]))
    wanted = [1e-4 + (2e-3 - 1e-4) * (1 + np.cos(np.pi * e / 4)) / 2 for e in range(4)]
    assert rates == pytest.approx(wanted)
