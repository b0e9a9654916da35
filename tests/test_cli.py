"""The command line from end to end on a handful of drawn birds, and its one line for wrong input."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import drawn_here
from PIL import Image
from safetensors.torch import load_file, save_file

from loupe_core import LoupeModel, Recipe, mask_to_original, open_image, overlay, transforms_for
from loupe_core.cli import main, parser
from loupe_core.datasets import open_set
from loupe_lab.birds.fieldguide import SPECIES, draw, species_of, write_fieldguide
from loupe_lab.commands import METHODS
from loupe_lab.evidence import explain

SMALL = ["--recipe", "small", "--epochs", "1", "--batch-size", "8", "--precision", "no"]


@pytest.fixture(scope="session")
def birds(tmp_path_factory):
    return write_fieldguide(tmp_path_factory.mktemp("data") / "birds", species_of(1), train=6, test=2)


@pytest.fixture(scope="session")
def checkpoint(birds, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert main(["train", str(birds), "--out", str(out), *SMALL]) == 0
    return out / "best"


@pytest.fixture()
def own_birds(birds, tmp_path):
    return shutil.copytree(birds, tmp_path / "own")


def refused(capsys, *argv, says: str):
    """The command exits with 2 and prints one line on stderr that matches `says`."""
    code = main([str(a) for a in argv])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("loupe: ") and re.search(says, line), line


def test_train_evaluate_explain_export(birds, checkpoint, tmp_path, capsys):
    assert main(["evaluate", str(birds), "--checkpoint", str(checkpoint)]) == 0
    assert re.search(r"test accuracy [01]\.\d{4} \(\d+ of 8 images; 95 % interval 0\.\d", capsys.readouterr().out)

    photograph = tmp_path / "wide.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8)).save(photograph)
    assert main(["explain", str(photograph), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "o.png")]) == 0
    out = capsys.readouterr().out
    assert Image.open(tmp_path / "o.png").size == (160, 90 + 18)  # and the colour bar
    assert re.search(r"mask from 0\.\d+ to 0\.\d+ on what the model saw of it; colours from 0 to 1|It is flat", out)
    assert len(re.findall(r"^ *\d+\.\d\d%  ", out, re.M)) == 4 and "crowned" in out

    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "m.onnx")]) == 0
    import onnxruntime
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert [o.name for o in session.get_outputs()] == ["logits", "mask"]


def test_resume_goes_on_with_the_recipe_that_was_begun(birds, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", str(birds), "--out", out, *SMALL, "--lr", "1e-4"]) == 0
    assert main(["train", str(birds), "--out", out, "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["lr"] == 1e-4
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1


def test_a_training_writes_a_card_and_evaluate_adds_to_it(birds, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(birds), "--out", str(out), *SMALL, "--seed", "3"]) == 0
    file = out / "best" / "README.md"
    card = file.read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "license: mit" in head and "library_name: loupe-core" in head
    assert "| seed | 3 |" in body and "| lam | 0.05 |" in body and "images of 4 classes" in body
    assert re.search(r"- validation accuracy .* of 4 images; 95 % interval", body) and "test accuracy" not in body
    assert "second look" not in card and "\n\n\n" not in body
    capsys.readouterr()
    for _ in range(2):  # a second time takes the place of the first
        assert main(["evaluate", str(birds), "--checkpoint", str(out / "best"), "--card"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("test accuracy"))
    assert file.read_text().count(f"- {line}\n") == 1 and "validation accuracy" in file.read_text()
    assert "## Limits" in file.read_text()
    file.write_text("## Metrics")  # and nothing below it
    assert main(["evaluate", str(birds), "--checkpoint", str(out / "best"), "--card"]) == 0
    assert file.read_text() == f"## Metrics\n\n- {line}\n"
    file.write_text("something else")
    refused(capsys, "evaluate", birds, "--checkpoint", out / "best", "--card", says="no line '## Metrics'")
    assert file.read_text() == "something else"


def test_fieldguide_writes_a_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loupe_lab.birds.fieldguide.ProcessPoolExecutor", drawn_here)
    assert main(["fieldguide", str(tmp_path / "b"), "--groups", "1", "--train", "2", "--test", "1"]) == 0
    assert "12 drawn birds of 4 species" in capsys.readouterr().out
    same = write_fieldguide(tmp_path / "same", species_of(1), train=2, test=1)  # the package's defaults, drawn again
    for file in sorted(same.rglob("*.png")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(same)).read_bytes()


def test_own_folder_trains_and_explains(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for k in range(10):
            Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / "own" / name / f"{k}.jpg")
    assert main(["train", str(tmp_path / "own"), "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert "of 2 classes" in capsys.readouterr().out


def test_evaluate_never_sees_an_image_that_another_training_seed_has_trained_on(tmp_path, monkeypatch):
    from loupe_core import cli

    rng, opened = np.random.default_rng(0), {}
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for k in range(10):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "own" / name / f"{k}.png")

    calls = []

    def recording(root, split="train", **options):
        calls.append(split)
        data = open_set(root, split, **options)
        opened[split] = set(data.paths)
        opened["val"] = set(data.with_split("val").paths)
        return data

    monkeypatch.setattr(cli, "open_set", recording)
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "own"), "--out", str(out), *SMALL, "--seed", "3"]) == 0
    assert calls == ["train"]  # once: the other split is cut from it
    assert main(["evaluate", str(tmp_path / "own"), "--checkpoint", str(out / "best")]) == 0
    assert opened["test"] and not opened["test"] & (opened["train"] | opened["val"])


def test_python_m_loupe_core_is_the_same_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loupe_core", "evaluate", str(tmp_path / "none"), "--checkpoint", "x"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("loupe_core", run_name="__main__")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("loupe: ") and said.count("\n") == 1


def test_missing_folder(capsys, tmp_path):
    refused(capsys, "train", tmp_path / "none", "--out", tmp_path, says="none.*no such folder")


def test_missing_metadata_file(capsys, own_birds, tmp_path):
    (own_birds / "train_test_split.txt").unlink()
    refused(capsys, "train", own_birds, "--out", tmp_path / "o", says="train_test_split.txt.*no such file")


def test_short_metadata_file(capsys, own_birds, tmp_path):
    file = own_birds / "image_class_labels.txt"
    file.write_text("\n".join(file.read_text().splitlines()[:-3]) + "\n")
    refused(capsys, "train", own_birds, "--out", tmp_path / "o", says="labels.txt: found 29 lines, expected 32")


def test_label_out_of_range(capsys, own_birds, tmp_path):
    file = own_birds / "image_class_labels.txt"
    file.write_text(file.read_text().replace("\n5 1\n", "\n5 9\n"))
    refused(capsys, "train", own_birds, "--out", tmp_path / "o", says="image_class_labels.txt, line 5: found '5 9'")


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text"])
def test_damaged_image(capsys, own_birds, checkpoint, damage):
    file = sorted((own_birds / "images").rglob("*_0007.png"))[0]
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"truncated": data[:len(data) // 2], "empty": b"", "text": b"not an image"}[damage])
    refused(capsys, "evaluate", own_birds, "--checkpoint", checkpoint, says=file.name)


def test_unknown_backbone(capsys, birds, tmp_path):
    refused(capsys, "train", birds, "--out", tmp_path / "o", "--backbone", "swin_mikro", says="swin_mikro.*swin_micro")


@pytest.mark.parametrize("site", ["stage9", "nonsense", "stage9.inside"])
def test_unknown_site(capsys, birds, tmp_path, site):
    refused(capsys, "train", birds, "--out", tmp_path / "o", "--site", site, says=re.escape(site))


def test_weights_that_cannot_be_fetched(capsys, birds, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    began = time.time()
    refused(capsys, "train", birds, "--out", tmp_path / "o", "--backbone", "resnet18.a1_in1k", says="resnet18")
    assert time.time() - began < 60


def test_checkpoint_of_another_backbone(capsys, birds, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config).replace("swin_micro", "resnet18"))
    refused(capsys, "evaluate", birds, "--checkpoint", other, says="resnet18")


def test_pickle_instead_of_safetensors(capsys, birds, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    refused(capsys, "evaluate", birds, "--checkpoint", other, says="pickle")


@pytest.mark.parametrize("damage", ["truncated", "nan", "no folder"])
def test_damaged_checkpoint(capsys, birds, checkpoint, tmp_path, damage):
    other = tmp_path / "other"
    if damage != "no folder":
        shutil.copytree(checkpoint, other)
        file = other / "model.safetensors"
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:1000])
        else:
            weights = load_file(file)
            next(iter(weights.values())).fill_(float("nan"))
            save_file(weights, file)
    refused(capsys, "evaluate", birds, "--checkpoint", other, says=r"other")


def test_another_data_set_than_trained_on(capsys, checkpoint, tmp_path):
    other = write_fieldguide(tmp_path / "others", species_of(["Corvane"]), train=2, test=1)
    refused(capsys, "evaluate", other, "--checkpoint", checkpoint,
            says="found the class '001.Cone_billed_Corvane', which is none of the 4 classes of the model")


def test_wrong_recipe_value(capsys, birds, tmp_path):
    refused(capsys, "train", birds, "--out", tmp_path, "--optimizer", "sgd", says="optimizer.*'sgd'.*'lion', 'adamw'")


@pytest.mark.parametrize("words, says", [
    (["--recipe", "paper", "--lr-min", "1"], "lr_min=1.0; expected at most lr, which is 1e-05"),
    (["--weight-decay", "-1"], "weight_decay=-1.0; expected a finite number of 0 or more"),
    (["--min-delta", "nan"], "min_delta=nan; expected a finite number of 0 or more"),
    (["--seed", "-1"], "seed=-1; expected a whole number of 0 or more and below 4294967296"),
    (["--epochs", "0"], "epochs=0; expected 1 or more, or head='probe'"),
    (["--val-fraction", "1"], "val_fraction: found 1.0, expected a fraction in [0, 1)"),
    (["--test-fraction", "nan"], "test_fraction: found nan, expected a fraction in [0, 1)"),
    (["--label-smoothing", "1"], "label_smoothing=1.0; expected a finite number of 0 or more and below 1"),
    (["--crop-min", "1.5"], "crop_min=1.5; expected a finite number above 0 and of at most 1"),
    (["--workers", "-2"], "workers=-2; expected a whole number of -1 or more"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'; `loupe train --help`"),
    (["--freeze-batchnorm", "False"], "unrecognized arguments: False"),
    (["--lr", "1e300"], "lr=1e+300; expected a finite number above 0 and of at most 1000000.0"),
    (["--backbone-lr-factor", "1e300"], "backbone_lr_factor=1e+300; expected a finite number of 0 or more and of at"),
    (["--drop-path", "1"], "--drop-path 1.0: expected a rate in [0, 1)"),
    (["--drop-path", "nan"], "--drop-path nan: expected a rate in [0, 1)"),
    (["--bare", "--site", "stage1"], "found --bare and --site, which is of a gate; expected one of them"),
    (["--bare", "--reduction", "4"], "found --bare and --reduction, which is of a gate"),
    (["--reduction", "0"], "reduction=0 given to the Loupe: expected a whole number of 1 or more"),
])
def test_every_number_of_a_training_is_checked_in_one_line(capsys, birds, tmp_path, words, says):
    refused(capsys, "train", birds, "--out", tmp_path / "o", *words, says=re.escape(says))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("words, says", [
    (["evaluate", "{birds}", "--checkpoint", "{checkpoint}", "--batch-size", "0"], "batch_size=0; expected a whole"),
    (["evaluate", "{birds}", "--checkpoint", "{checkpoint}", "--precision", "fp8"], "precision='fp8'; expected one of"),
    (["audit", "{birds}", "--checkpoint", "{checkpoint}", "--images", "0"], "--images 0: expected 1 or more"),
    (["audit", "{birds}", "--checkpoint", "{checkpoint}", "--seed", "-1"], "--seed -1: expected a whole number"),
    (["audit", "{birds}"], "found no --checkpoint; expected: loupe audit FOLDER --checkpoint"),
    (["fieldguide"], "found no --out"),
    (["fieldguide", "--out", "{new}", "--groups", "0"], "groups"),
    (["fieldguide", "--out", "{new}", "--train", "0"], "train"),
    (["fieldguide", "--out", "{new}", "--size", "3"], "size"),
    (["fieldguide", "--out", "{new}", "--weather", "nan"], "weather"),
    (["fieldguide", "--out", "{new}", "--seed", "-1"], "seed"),
])
def test_every_number_of_the_other_commands_is_checked_in_one_line(capsys, birds, checkpoint, tmp_path, words, says):
    places = dict(birds=birds, checkpoint=checkpoint, new=tmp_path / "new")
    refused(capsys, *(word.format(**places) for word in words), says=re.escape(says))
    assert not list(tmp_path.iterdir())


def test_the_recipes_options_come_from_the_recipe():
    train = parser().parse_args(["train", "x", "--freeze-batchnorm", "--backbone-lr", "0.5"])
    assert train.freeze_batchnorm is True and train.backbone_lr_factor == 0.5  # an old spelling, as a prefix
    assert parser().parse_args(["train", "x", "--no-freeze-batchnorm"]).freeze_batchnorm is False
    for f in dataclasses.fields(Recipe):
        words = [] if f.type is bool else [str(f.default)]
        found = getattr(parser().parse_args(["train", "x", "--" + f.name.replace("_", "-"), *words]), f.name)
        assert type(found) is f.type and (f.type is bool or found == f.default)


def test_help_names_the_paper_only_where_it_speaks(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for value in ("lion", "1e-5", "0.02", "0.05", "l1", "stage2", "multiply"):
        assert f"the paper: {value}" in text
    assert text.count("the paper: ") == 8  # and the backbone
    assert "processes that read images; -1: up to 8 with a GPU, none on a CPU; default: -1" in text
    assert "at most so many epochs; 0 with a probe as head; default: paper 50, small 12, finetune 12" in text


def test_old_spellings_still_work(birds, checkpoint, tmp_path, capsys):
    assert main(["audit", str(checkpoint), "--data", str(birds), "--images", "4"]) == 0
    old = capsys.readouterr().out
    assert main(["audit", str(birds), "--checkpoint", str(checkpoint), "--images", "4"]) == 0
    assert capsys.readouterr().out == old and "4 test images of 8" in old
    photograph = next((birds / "images").rglob("*.png"))
    for name, option in (("a.png", "--out"), ("b.png", "--output")):
        assert main(["explain", str(photograph), "--checkpoint", str(checkpoint), option, str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_explain_draws_every_method_for_any_class(birds, checkpoint, tmp_path, capsys):
    assert METHODS == tuple(explain.METHODS)
    photograph = next((birds / "images").rglob("*.png"))
    names = LoupeModel.from_pretrained(checkpoint).class_names

    def drawn(*words) -> bytes:
        command = ["explain", photograph, "--checkpoint", checkpoint, "--out", tmp_path / "o.png", *words]
        assert main([str(word) for word in command]) == 0
        return (tmp_path / "o.png").read_bytes()

    pictures = {method: drawn("--method", method) for method in METHODS}
    assert len(set(pictures.values())) == len(METHODS)
    assert drawn("--method", "grad_cam", "--class", names[2]) == drawn("--method", "grad_cam", "--class", "2")
    assert len({drawn("--method", "grad_cam", "--class", str(k)) for k in range(4)}) > 1
    assert drawn("--method", "grad_cam", "--site", "stage2") != pictures["grad_cam"]
    capsys.readouterr()
    for words, says in ((["--class", "0"], "the mask is the same for every class"),
                        (["--method", "grad_cam", "--class", "4"], "--class 4: unknown .* from 0 to 3, or a name such"),
                        (["--method", "grad_cam", "--class", "robin"], "--class robin: unknown"),
                        (["--site", "stage3"], "found no gate for site='stage3'.* expected site= one of stage2")):
        refused(capsys, "explain", photograph, "--checkpoint", checkpoint, *words, says=says)


def test_explain_draws_a_folder_and_names_what_it_could_not(birds, checkpoint, tmp_path, capsys):
    photographs = sorted((birds / "images").rglob("*.png"))[:2]
    folder = tmp_path / "some photographs"
    (folder / "below").mkdir(parents=True)
    shutil.copy(photographs[0], folder / "one.png")
    shutil.copy(photographs[1], folder / "below" / "two.png")
    command = ["explain", folder, "--checkpoint", checkpoint, "--out", tmp_path / "seen"]
    assert main([str(word) for word in command]) == 0
    assert sorted(p.relative_to(tmp_path / "seen").as_posix() for p in (tmp_path / "seen").rglob("*.png")) == [
        "below/two.png.png", "one.png.png"]
    assert capsys.readouterr().out.count("Mask over a photograph") == 2
    (folder / "broken.jpg").write_bytes(b"no photograph")
    code = main([str(word) for word in command])
    said = capsys.readouterr()
    assert code == 2 and said.out.count("Mask over a photograph") == 2
    assert "broken.jpg" in said.err.splitlines()[0] and "1 of 3 photographs" in said.err.splitlines()[1]
    for words, says in ((["--site", "stage2", "--method", "occlusion"], "--site stage2: occlusion has none"),
                        (["--alpha", "2"], "--alpha 2.0: expected a weight"),
                        (["--out", folder / "one.png"], "one.png: found a file; expected a folder")):
        refused(capsys, "explain", folder, "--checkpoint", checkpoint, *words, says=says)
    (folder / "broken.jpg").unlink()
    for _ in range(2):  # the second time the pictures of the first are no photographs
        assert main(["explain", str(folder), "--checkpoint", str(checkpoint), "--out", str(folder / "seen")]) == 0
    assert len(list((folder / "seen").rglob("*.png"))) == 2
    (tmp_path / "none").mkdir()
    refused(capsys, "explain", tmp_path / "none", "--checkpoint", checkpoint, says="found no photograph")


def test_explain_cuts_what_swin_has_padded(birds, tmp_path):
    """Stage 4 of swin_micro at 112 px has 4 x 4 cells of 32 px: 128 px, so that the last cells reach beyond."""
    torch.manual_seed(0)
    model = LoupeModel("swin_micro", num_classes=4, site="stage4")
    model.save_pretrained(tmp_path / "model")
    photograph = next((birds / "images").rglob("*.png"))
    command = ["explain", photograph, "--checkpoint", tmp_path / "model", "--out", tmp_path / "o.png", "--alpha", "1"]
    assert main([str(word) for word in command]) == 0
    image = open_image(photograph)
    x, geometry = transforms_for(model.data_config, train=False)(image)
    expected = mask_to_original(explain.explain(model, x[None], "mask")[0], geometry)
    assert (np.asarray(Image.open(tmp_path / "o.png"))[:112] == overlay(image, expected, 1, (0, 1))).all()
    uncut = mask_to_original(model.eval()(x[None], return_mask=True)[1][0, 0].detach(), geometry)
    assert np.nanmax(np.abs(uncut - expected)) > 1e-4


def test_without_the_lab_installed_the_core_has_its_own_commands(monkeypatch):
    monkeypatch.setattr("loupe_core.cli.entry_points", lambda group: [])
    commands = parser()._subparsers._group_actions[0].choices
    assert list(commands) == ["train", "evaluate", "export"]


def test_the_core_does_not_import_the_lab():
    code = "import sys, loupe_core.cli; sys.exit(any(name.split('.')[0] == 'loupe_lab' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_explain_needs_a_photograph_a_mask_and_an_image_name(capsys, birds, checkpoint, tmp_path):
    (tmp_path / "p.jpg").write_bytes(b"no photograph")
    def no_picture(photo, output, says):
        refused(capsys, "explain", photo, "--checkpoint", checkpoint, "--output", output, says=says)

    no_picture(tmp_path / "p.jpg", tmp_path / "o.png", says="p.jpg")
    no_picture(tmp_path / "p.jpg", tmp_path / "o.txt", says="o.txt")
    no_picture(next((birds / "images").rglob("*.png")), tmp_path / "no" / "o.png", says="o.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "p.jpg"]


def test_unknown_option_exits_with_two(capsys):
    refused(capsys, "train", "--nonsense", says="the following arguments are required: data|unrecognized")


def test_evaluate_says_what_its_figure_is_worth_and_agrees_with_the_audit(birds, checkpoint, capsys):
    assert main(["evaluate", str(birds), "--checkpoint", str(checkpoint)]) == 0
    told = capsys.readouterr().out
    assert "beside it: chance 0.2500, the largest class alone 0.2500; precision fp32" in told
    right = int(re.search(r"\((\d) of 8 images", told)[1])
    assert main(["audit", str(birds), "--checkpoint", str(checkpoint)]) == 0
    table = capsys.readouterr().out
    assert "precision fp32" in table and "beside these: chance 0.2500" in table
    assert f"{right / 8:.1%}" == re.search(r"^own .* ([\d.]+%)$", table, re.M)[1]
    assert re.search(r"^centre .* [\d.]+%$", table, re.M)


def test_the_folder_of_a_run_means_its_best_model(birds, checkpoint, tmp_path, capsys):
    answers = []
    for place in (checkpoint, checkpoint.parent):
        assert main(["evaluate", str(birds), "--checkpoint", str(place)]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["export", "--checkpoint", str(checkpoint.parent), "--out", str(tmp_path / "m.onnx")]) == 0


def test_a_folder_of_some_classes_is_evaluated_as_a_whole(checkpoint, tmp_path, capsys):
    """Photographs from elsewhere, all for the test: two of the four classes, in folders of their own."""
    names = LoupeModel.from_pretrained(checkpoint).class_names
    for k in (3, 1):
        (tmp_path / "new" / names[k]).mkdir(parents=True)
        for i in range(5):
            drawn = draw(SPECIES[k].attributes, (9, k, i))
            Image.fromarray(drawn.image).save(tmp_path / "new" / names[k] / f"{i}.png")
    assert main(["evaluate", str(tmp_path / "new"), "--split", "all", "--checkpoint", str(checkpoint)]) == 0
    told = capsys.readouterr().out
    assert "of 10 images" in told and "chance 0.2500, the largest class alone 0.5000" in told
    data = open_set(tmp_path / "new", "all")
    data.relabel(names)
    assert data.labels.tolist() == [1] * 5 + [3] * 5 and data.class_names == names
    assert data.with_split("test").labels.tolist() == [1, 3]


def test_all_of_the_set_that_was_trained_on_is_what_was_left_for_the_test(birds, checkpoint, capsys):
    assert main(["evaluate", str(birds), "--split", "all", "--checkpoint", str(checkpoint)]) == 0
    told = capsys.readouterr().out
    assert "left out: 24 photographs that this model was trained on or chosen by" in told and "of 8 images" in told
