"""The trainer: what it computes, what it keeps, and how it stops. All on a toy set and a Swin of 60,000 weights."""

import errno
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from loupe_core import LoupeError, LoupeModel, Recipe, Sample, Trainer
from loupe_core.recipe import pick_precision
from loupe_core.start.optimizers import Cosine


class Patches:
    """Grey noise with a square somewhere; the label is its colour: red, green, blue or white."""

    def __init__(self, n: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 4, n)
        self.images = torch.from_numpy(rng.normal(0, 0.3, (n, 3, 112, 112)).astype(np.float32))
        for image, label in zip(self.images, self.labels):
            y, x = rng.integers(0, 56, 2)
            image[slice(None) if label == 3 else int(label), y:y + 56, x:x + 56] += 2.0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Sample(self.images[i], int(self.labels[i]), None, None, None, str(i), i)


def tiny_model(**kwargs) -> LoupeModel:
    torch.manual_seed(0)
    backbone = timm.create_model("swin_micro", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=4,
                                 drop_path_rate=0.2)
    return LoupeModel(backbone, num_classes=4, pretrained=False, **kwargs)


RECIPE = dict(optimizer="adamw", lr=2e-3, epochs=4, batch_size=8, precision="no", patience=50)
TRAIN, VAL, TEST = Patches(40), Patches(21, seed=1), Patches(19, seed=2)


def trained(out_dir=None, resume=False, **recipe):
    trainer = Trainer(tiny_model(), Recipe(**(RECIPE | recipe)), out_dir, progress=False)
    trainer.fit(TRAIN, VAL, resume=resume)
    return trainer


def weights(trainer) -> dict:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def test_the_default_recipe_is_the_papers():
    recipe = Recipe()
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.lam) == ("lion", 1e-5, 0.02, 0.05)
    assert (recipe.epochs, recipe.batch_size, recipe.patience, recipe.lr_min) == (50, 16, 5, 1e-7)
    assert (recipe.norm, recipe.norm_reduction, recipe.augment) == ("l1", "mean", "randaugment")


@pytest.mark.parametrize("wrong", [dict(optimizer="sgd"), dict(lr=0.0), dict(epochs=0), dict(precision="fp8"),
                                   dict(augment="cutmix")])
def test_a_wrong_choice_is_named_in_one_line(wrong):
    with pytest.raises(LoupeError, match=f"recipe: {next(iter(wrong))}=") as caught:
        Recipe(**wrong)
    assert "\n" not in str(caught.value)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    with pytest.raises(LoupeError, match="found 2 processes that Accelerate does not join on .*; set ACCELERATE_USE"):
        Trainer(tiny_model(), Recipe(**RECIPE), progress=False)


def test_every_seed_that_a_recipe_takes_can_be_trained_with():
    assert len(trained(epochs=1, seed=2**32 - 1).history) == 1


def test_training_learns_the_colours_and_records_every_term():
    trainer = trained(epochs=10)
    first, last = trainer.history[0], trainer.history[-1]
    assert last["val_accuracy"] > 0.8 > 0.5 > first["accuracy"]
    for row in trainer.history:
        assert row["loss"] == pytest.approx(row["classification"] + 0.05 * row["sparsity"], rel=1e-6)
        assert row["sparsity"] == pytest.approx(row["mask_mean"], rel=1e-5)  # l1, mean: the same number
    assert last["lr"] < first["lr"] == 2e-3


def test_evaluation_equals_a_direct_computation_whatever_the_batches():
    trainer = trained(epochs=1)
    result = trainer.evaluate(TEST)
    model = trainer.model.eval()
    with torch.no_grad():
        logits, mask = model(TEST.images, return_mask=True)
    labels = torch.from_numpy(TEST.labels)
    np.testing.assert_allclose(result.probabilities, logits.softmax(1).numpy(), atol=1e-5)
    assert result.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert result.loss == pytest.approx((F.cross_entropy(logits, labels) + 0.05 * mask.mean()).item(), rel=1e-5)
    assert result.mask_mean == pytest.approx(mask.mean().item(), rel=1e-5)
    assert result.image_ids.tolist() == list(range(19))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    a, b, c = weights(trained()), weights(trained()), weights(trained(seed=1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")
    real = Trainer._train_epoch

    def stopped(self, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, epoch, *rest)

    monkeypatch.setattr(Trainer, "_train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped")
    monkeypatch.undo()
    resumed = trained(tmp_path / "stopped", resume=True)
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    drop = "seconds"
    assert [{k: v for k, v in row.items() if k != drop} for row in resumed.history] == [
        {k: v for k, v in row.items() if k != drop} for row in whole.history]


def test_resuming_with_another_recipe_is_refused_by_name(tmp_path):
    trained(tmp_path, epochs=1)
    with pytest.raises(LoupeError, match="has lr=0.002, the recipe now has 0.001"):
        trained(tmp_path, resume=True, epochs=1, lr=1e-3)


def test_the_folder_holds_log_recipe_best_and_the_two_newest_states(tmp_path):
    trainer = trained(tmp_path)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == trainer.history
    assert json.loads((tmp_path / "recipe.json").read_text()) == asdict(trainer.recipe)
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["epoch-0003", "epoch-0004"]
    assert (tmp_path / "best" / "model.safetensors").is_file()


def test_the_best_folder_is_the_trained_model_again(tmp_path):
    torch.manual_seed(0)
    model = LoupeModel("swin_micro", num_classes=4, pretrained=False, class_names=list("abcd"))
    trainer = Trainer(model, Recipe(**(RECIPE | dict(epochs=1))), tmp_path, progress=False)
    trainer.fit(TRAIN, VAL)
    again = LoupeModel.from_pretrained(tmp_path / "best")
    assert again.class_names == list("abcd")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in trainer.model.state_dict().items())


def test_fit_ends_with_the_epoch_of_lowest_validation_loss():
    trainer = trained(lr=2e-2, epochs=6)
    lowest = min(trainer.history, key=lambda row: row["val_loss"])
    result = trainer.evaluate(VAL)
    assert result.loss == pytest.approx(lowest["val_loss"], rel=1e-5)
    assert result.accuracy == pytest.approx(lowest["val_accuracy"])


def test_fit_again_trains_again():
    trainer = trained(epochs=1)
    first = trainer.history
    again = trainer.fit(TRAIN, VAL)
    assert len(again) == 1 and again[0]["loss"] < first[0]["loss"]  # it starts from the trained weights


def test_training_stops_when_patience_is_used_up():
    trainer = trained(lr=1e-9, lr_min=0.0, epochs=9, patience=2, min_delta=0.5)
    assert len(trainer.history) == 3  # the first epoch counts as better than none, the next two as stale


def test_lambda_warm_up_reaches_the_loss():
    rows = trained(warmup_epochs=2).history
    assert [row["lam"] for row in rows] == pytest.approx([0.0, 0.025, 0.05, 0.05])


def test_a_loss_that_is_not_finite_stops_with_one_line_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    real = Trainer._train_epoch

    def poisoned(self, epoch, model, *rest):
        if epoch == 1:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)
        return real(self, epoch, model, *rest)

    monkeypatch.setattr(Trainer, "_train_epoch", poisoned)
    with pytest.raises(LoupeError, match="loss is nan in epoch 2, step 1; .* up to epoch 1 are kept") as caught:
        trained(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    resumed = trained(tmp_path, resume=True)
    assert len(resumed.history) == 4 and all(math.isfinite(row["loss"]) for row in resumed.history)


def test_a_full_disk_stops_with_one_line_and_leaves_the_states_before(tmp_path, monkeypatch):
    from accelerate import Accelerator

    real = Accelerator.save_state

    def full(self, folder, *rest, **kwargs):
        if (tmp_path / "states" / "epoch-0001").exists():
            (tmp_path / "unfinished-state").mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, folder, *rest, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(LoupeError, match="epoch 2 could not be written .No space left on device"):
        trained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if "unfinished" in p.name) == []
    monkeypatch.undo()
    assert len(trained(tmp_path, resume=True).history) == 4


def test_labels_beyond_the_models_classes_and_empty_sets_are_refused():
    few = tiny_model()
    few.num_classes = 2
    with pytest.raises(LoupeError, match="label 3, the model has classes 0..1"):
        Trainer(few, Recipe(**RECIPE)).fit(TRAIN, VAL)
    with pytest.raises(LoupeError, match="no image"):
        Trainer(tiny_model(), Recipe(**RECIPE)).fit(Patches(0), VAL)


@pytest.mark.parametrize("site", [(), "stage2", ["stage1", "stage3"]])
def test_bare_one_gate_and_several_gates_train_alike(site):
    torch.manual_seed(0)
    trainer = Trainer(tiny_model(site=site), Recipe(**(RECIPE | dict(epochs=1))), progress=False)
    row = trainer.fit(TRAIN, VAL)[0]
    assert math.isfinite(row["loss"]) and math.isnan(row["mask_mean"]) == (site == ())


def test_bf16_training_gives_back_a_plain_fp32_model():
    trainer = trained(epochs=1, precision="bf16")
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    with torch.no_grad():
        assert trainer.model.eval()(TEST.images[:2]).dtype == torch.float32
    assert "forward" not in vars(trainer.model)  # Accelerate's wrapper is gone


def test_the_backbone_can_have_a_gentler_rate():
    trainer = Trainer(tiny_model(), Recipe(lr=1e-3, backbone_lr_factor=0.1), progress=False)
    slow, fast = trainer.optimizer().param_groups
    assert (slow["lr"], fast["lr"]) == pytest.approx((1e-4, 1e-3))
    named = {id(p): n for n, p in trainer.model.named_parameters()}
    assert all(named[id(p)].startswith("backbone.") and "head" not in named[id(p)] for p in slow["params"])
    assert len(slow["params"]) + len(fast["params"]) == len(named)


@pytest.mark.parametrize("factor", [0.0, 30.0])
def test_the_gates_can_have_a_rate_of_their_own(factor):
    trainer = Trainer(tiny_model(), Recipe(lr=1e-3, backbone_lr_factor=0.1, gate_lr_factor=factor), progress=False)
    slow, gates, fast = trainer.optimizer().param_groups
    assert (slow["lr"], gates["lr"], fast["lr"]) == pytest.approx((1e-4, factor * 1e-3, 1e-3))
    assert {id(p) for p in gates["params"]} == {id(p) for p in trainer.model.gates.parameters()}
    assert len(slow["params"]) + len(gates["params"]) + len(fast["params"]) == len(list(trainer.model.parameters()))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit(TRAIN)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("backbone.") for name in moved)
    assert {name for name in moved if name.startswith("gates.")} == ({name for name in before if name[:6] == "gates."}
                                                                     if factor else set())


def test_a_backbone_with_two_heads_trains_both_at_the_full_rate():
    model = LoupeModel("levit_128s", num_classes=4, pretrained=False, site="stage1")
    trainer = Trainer(model, Recipe(lr=1e-3, backbone_lr_factor=0.1), progress=False)
    named = {id(p): n for n, p in model.named_parameters()}
    fresh = {named[id(p)] for p in trainer.optimizer().param_groups[1]["params"]}
    assert {n for n in fresh if n.startswith("backbone.head")} == {n for n in named.values() if ".head" in n} != set()


@pytest.mark.parametrize("bf16, expected", [(True, "bf16"), (False, "fp16")])
def test_precision_follows_the_card(monkeypatch, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert pick_precision(torch.device("cuda")) == expected


@pytest.mark.parametrize("has, expected", [({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "no")])
def test_precision_follows_the_processor(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert pick_precision(torch.device("cpu")) == expected


def test_a_tracker_is_sent_every_epochs_row(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(tiny_model(), Recipe(**(RECIPE | dict(epochs=2))), tmp_path, progress=False,
                      tracker="tensorboard")
    trainer.fit(TRAIN, VAL)
    events = EventAccumulator(str(tmp_path / "loupe")).Reload()
    sent = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name in ("loss", "val_loss", "mask_mean"):
        assert sent[name] == [(row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in trainer.history]
    assert set(sent) >= set(trainer.history[0]) - {"epoch"}


def test_a_tracker_that_is_not_there_is_refused():
    with pytest.raises(LoupeError, match="tracker: found 'pigeon', expected one that is installed"):
        Trainer(tiny_model(), Recipe(**RECIPE), progress=False, tracker="pigeon")


class Pairs(torch.utils.data.Dataset):
    """The same images as (tensor, label), with torchvision's `targets`."""

    def __init__(self, patches: Patches):
        self.images, self.targets = patches.images, patches.labels.tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]


def test_any_data_set_with_labels_trains_and_evaluates_alike(tmp_path):
    from torch.utils.data import ConcatDataset, Subset, random_split
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import functional

    def end(train):
        trainer = Trainer(tiny_model(), Recipe(**(RECIPE | dict(epochs=1))), progress=False)
        trainer.fit(train)
        return trainer

    expected = weights(end(TRAIN))
    halves = ConcatDataset([Subset(TRAIN, range(20)), Subset(Pairs(TRAIN), torch.arange(20, 40))])
    for same in (Pairs(TRAIN), Subset(TRAIN, range(40)), halves):
        found = weights(end(same))
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    first, second = random_split(Pairs(TRAIN), [30, 10], torch.Generator().manual_seed(0))
    result = end(first).evaluate(second)
    assert result.labels.tolist() == [TRAIN.labels[i] for i in second.indices]
    assert result.image_ids.tolist() == list(range(10))  # positions

    for i, (label, image) in enumerate(zip(TEST.labels, TEST.images)):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        functional.to_pil_image(image.clamp(0, 1)).save(tmp_path / str(label) / f"{i}.png")
    folder = ImageFolder(tmp_path, transform=functional.to_tensor)
    assert sorted(end(Subset(folder, range(8))).evaluate(folder).labels) == sorted(TEST.labels)


@pytest.mark.parametrize("data, says", [
    (torch.utils.data.TensorDataset(TRAIN.images), "TensorDataset: found no labels; expected .*`targets`"),
    (torch.utils.data.Subset(torch.utils.data.TensorDataset(TRAIN.images), [0]), "TensorDataset: found no labels"),
    (type("Odd", (Patches,), dict(labels=property(lambda self: [0.5] * 4, lambda self, value: None)))(4), "float64"),
    (type("Short", (Pairs,), dict(__len__=lambda self: 3))(TRAIN), r"labels of shape \(40,\) .* for 3 images"),
    (type("Photos", (Pairs,), dict(__getitem__=lambda self, i: ("photo", 1)))(TRAIN), r"item \d+: found .*str', 'int'"),
    (type("Dicts", (Pairs,), dict(__getitem__=lambda self, i: dict(image=0)))(TRAIN), r"item \d+: found dict"),
])
def test_a_data_set_that_cannot_be_used_is_told_in_one_line(data, says):
    with pytest.raises(LoupeError, match=says) as caught:
        Trainer(tiny_model(), Recipe(**RECIPE), progress=False).fit(data)
    assert "\n" not in str(caught.value)


def test_a_backbone_factor_of_zero_freezes_the_backbone_and_nothing_else():
    torch.manual_seed(0)
    for backbone in ("swin_micro", "test_resnet"):  # the second has BatchNorm
        model = LoupeModel(backbone, num_classes=4, pretrained=False)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        trainer = Trainer(model, Recipe(**(RECIPE | dict(epochs=2, backbone_lr_factor=0))), progress=False)
        trainer.fit(TRAIN, VAL)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {k for k in before if k.startswith("gates.") or ".head." in k or ".fc." in k}
        assert all(p.requires_grad for p in model.parameters())  # as they were


def test_the_lowest_rate_scales_with_its_group():
    trainer = Trainer(tiny_model(), Recipe(**(RECIPE | dict(epochs=2, lr_min=1e-4, backbone_lr_factor=0.1))),
                      progress=False)
    rates = []
    real = trainer.optimizer

    def watched():
        made = real()
        made.register_step_post_hook(lambda optimizer, *_: rates.append([g["lr"] for g in optimizer.param_groups]))
        return made

    trainer.optimizer = watched
    trainer.fit(TRAIN)
    backbone, fresh = np.array(rates).T
    np.testing.assert_allclose(backbone, 0.1 * fresh, rtol=1e-12)
    steps = np.arange(10)
    np.testing.assert_allclose(fresh, 1e-4 + (2e-3 - 1e-4) * (1 + np.cos(np.pi * steps / 10)) / 2, rtol=1e-9)


def test_with_one_factor_the_rates_are_torchs_own_to_the_last_bit():
    def rates(schedule, optimizer):
        found = []
        for _ in range(50):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4) for _ in range(2))
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=50, eta_min=1e-6)
    assert rates(Cosine(ours, 50, 1e-6), ours) == rates(torchs, theirs)


def test_on_epoch_end_sees_every_row_and_can_end_the_training(tmp_path):
    seen = []

    def second(row):
        seen.append(row)
        assert (tmp_path / "states" / f"epoch-{row['epoch']:04d}").is_dir()  # it is kept already
        return row["epoch"] == 2

    def before(row):
        assert not (tmp_path / "states" / f"epoch-{row['epoch']:04d}").exists()
        earlier.append(row)

    earlier, trainer = [], Trainer(tiny_model(), Recipe(**RECIPE), tmp_path, progress=False)
    trainer.before_keeping = before
    assert trainer.fit(TRAIN, VAL, on_epoch_end=second) == seen == trainer.history == earlier and len(seen) == 2
    assert len(trainer.fit(TRAIN, VAL, resume=True)) == 4


def test_a_recipe_of_before_the_factor_had_its_name_is_read(tmp_path):
    old = asdict(Recipe(lr=1e-4))
    old["backbone_lr"] = old.pop("backbone_lr_factor") / 2
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    assert Recipe.read(tmp_path / "recipe.json", seed=3) == Recipe(lr=1e-4, backbone_lr_factor=0.5, seed=3)


def test_a_state_that_lacks_something_is_told_in_one_line(tmp_path):
    trained(tmp_path, epochs=2)
    file = tmp_path / "states" / "epoch-0002" / "trainer.pt"
    file.with_name("checksums.json").unlink()  # as of another version, whose own bytes are sound
    own = torch.load(file, weights_only=True)
    for changed in ({k: v for k, v in own.items() if k != "schedule"}, own | dict(unknown=1)):
        torch.save(changed, file)
        with pytest.raises(LoupeError, match="epoch-0002: this state cannot be read .* from the one before") as e:
            trained(tmp_path, resume=True, epochs=2)
        assert "\n" not in str(e.value)


def test_a_changed_value_is_named_and_not_the_file_that_it_changes(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(Recipe())))
    with pytest.raises(LoupeError, match="^recipe: epochs=0; expected"):
        Recipe.read(tmp_path / "recipe.json", epochs=0)
    for huge in (dict(lr=10**400), dict(epochs=10**400)):
        with pytest.raises(LoupeError, match="^recipe: "):
            Recipe(**huge)


def test_sets_with_parts_and_without_share_a_batch():
    from loupe_core import collate

    one, other = TRAIN[0], TRAIN[1]
    for pair in ([one, other], [other, one]):
        pair[0].parts, pair[1].parts = torch.zeros(15, 3), None
        assert collate(pair)["parts"] is None


def test_a_model_evaluates_without_a_training_set():
    result = Trainer(tiny_model(), Recipe(**RECIPE)).evaluate(TEST)
    assert result.labels.tolist() == TEST.labels.tolist()
