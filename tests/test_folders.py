"""Real folders: layouts, links, what systems leave, and a cut that stays where it is."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from loupe_core import LoupeError, LoupeModel, PhotoFolder
from loupe_core.cli import main
from loupe_core.files.folders import SPLIT_NAMES, list_images, same_content
from loupe_core.files.run_folder import RunFolder


def write(root, *paths):
    """Every path becomes a 4 x 4 image."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path, format="PNG")
    return root


def several(*folders, count=5):
    return [f"{folder}/{k}.png" for folder in folders for k in range(count)]


NAMES = [(train, val) for train in SPLIT_NAMES["train"] for val in SPLIT_NAMES["val"]]


@pytest.mark.parametrize("train, val", NAMES + [("Train", "Valid"), ("TRAINING", "Dev")])
def test_splits_go_by_their_usual_names_in_any_case(tmp_path, train, val):
    write(tmp_path, *several(f"{train}/a", f"{train}/b"), *several(f"{val}/a", f"{val}/b", count=1))
    data = PhotoFolder(tmp_path)
    assert data.class_names == ["a", "b"] and len(data) == 10 and len(data.with_split("val")) == 2
    assert f"{train}/ is train" in data.describe() and f"{val}/ is val" in data.describe()


@pytest.mark.parametrize("test", SPLIT_NAMES["test"])
def test_a_test_folder_goes_by_its_usual_names(tmp_path, test):
    write(tmp_path, *several("train/a", "train/b"), *several(f"{test}/a", count=2))
    assert PhotoFolder(tmp_path, "test").names == ["a/0.png", "a/1.png"]


@pytest.mark.parametrize("paths, says", [
    (several("train/a", "train/b", "unlabelled/x"), "'unlabelled' beside train/; expected only .* move it elsewhere"),
    (several("train/a", "train/b", "val/a", "valid/a"), "val/ and valid/, both names of the split val"),
    (several("test/a", "test/b"), "found test/ and no train/"),
    (several("photos/robin", "photos/wren"), "only, .photos., with folders in it; .* one folder further down"),
    (several("train/a", "train/b", "test/c"), "test/c: found a class without training photographs"),
])
def test_a_layout_that_would_teach_the_wrong_thing_is_refused_in_one_line(tmp_path, paths, says):
    write(tmp_path, *paths)
    with pytest.raises(LoupeError, match=says) as caught:
        PhotoFolder(tmp_path)
    assert "\n" not in str(caught.value) and "remove" not in str(caught.value) and "delete" not in str(caught.value)


def test_classes_may_be_called_as_splits_are(tmp_path):
    write(tmp_path, *several("bus", "train", "test"))
    assert PhotoFolder(tmp_path).class_names == ["bus", "test", "train"]


def test_what_systems_leave_is_no_class_and_no_photograph(tmp_path):
    write(tmp_path, *several("robin", "wren"), "__MACOSX/robin/0.png", "$RECYCLE.BIN/1.png", "robin/@eaDir/0.png/x.jpg",
          "robin/.thumbs/2.png", "System Volume Information/3.png")
    (tmp_path / "empty").mkdir()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "robin" / name).write_bytes(b"x")
    data = PhotoFolder(tmp_path)
    assert data.class_names == ["robin", "wren"]
    assert data.describe().count("passed over") == 0
    assert sum(len(data.with_split(split)) for split in ("train", "val", "test")) == 10


def test_what_the_reader_opens_is_listed_and_the_rest_is_counted(tmp_path):
    names = ["1.gif", "2.JFIF", "3.jp2", "4.avif", "5.webp", "6.apng", "7.JPE", "8.tiff"]
    write(tmp_path, *(f"a/{name}" for name in names), *several("b"))
    for name in ("x.heic", "y.HEIC", "notes.txt", "README"):
        (tmp_path / "a" / name).write_bytes(b"x")
    data = PhotoFolder(tmp_path, test_fraction=0, val_fraction=0)
    assert [name for name in data.names if name[0] == "a"] == [f"a/{name}" for name in names]
    assert data.describe().endswith("passed over: 2 .heic, 1 .txt, 1 no ending")
    assert all(data.image(i).size == (4, 4) for i in range(len(data)))


def test_links_are_followed_and_loops_are_not(tmp_path):
    write(tmp_path / "else", *several("more", count=3))
    root = write(tmp_path / "root", *several("robin", "wren"))
    os.symlink(tmp_path / "else" / "more", root / "robin" / "more")
    os.symlink(root / "robin", root / "robin" / "loop")
    os.symlink(root / "wren", root / "crow")  # a class that is a link
    data = PhotoFolder(root, test_fraction=0, val_fraction=0)
    assert data.class_names == ["crow", "robin", "wren"]
    assert np.bincount(data.labels).tolist() == [5, 8, 5]
    assert len(list_images(root / "robin")) == 8


@pytest.mark.parametrize("seed", range(3))
def test_another_photograph_moves_at_most_one_of_its_class(tmp_path, seed):
    write(tmp_path, *several("a", "b", "c", count=20))
    place = {}
    for _ in range(2):
        for split in ("train", "val", "test"):
            for name in PhotoFolder(tmp_path, split, seed=seed).names:
                place.setdefault(name, []).append(split)
        write(tmp_path, "b/another.png")
    moved = [name for name, places in place.items() if len(set(places)) > 1]
    assert len(moved) <= 2 and all(name.startswith("b/") for name in moved)  # one into test, one into val
    assert len(place["b/another.png"]) == 1 and len(place) == 61


def test_the_cut_does_not_depend_on_where_the_folder_is_or_how_its_names_are_composed(tmp_path):
    composed, taken_apart = "a/\u00fc{}.png", "a/u\u0308{}.png"
    one = write(tmp_path / "one", *(composed.format(k) for k in range(12)), *several("b"))
    two = write(tmp_path / "two", *(taken_apart.format(k) for k in range(12)), *several("b"))
    for split in ("train", "val", "test"):
        assert PhotoFolder(one, split).names == PhotoFolder(two, split).names


def test_cub_is_found_two_folders_down(make_cub, tmp_path):
    folder = make_cub(segmentations=True)
    (tmp_path / "data" / "sets").mkdir(parents=True)
    folder.rename(tmp_path / "data" / "sets" / "CUB_200_2011")
    from loupe_core import CUB200, open_set

    for root in (tmp_path / "data", tmp_path / "data" / "sets"):
        data = open_set(root)
        assert isinstance(data, CUB200) and len(data.class_names) == 3


def test_a_training_says_how_it_understood_the_folder(tmp_path, capsys):
    write(tmp_path / "birds", *several("robin", "wren", count=10))
    assert main(["train", str(tmp_path / "birds"), "--recipe", "small", "--epochs", "1", "--out", str(tmp_path / "o"),
                 "--precision", "no"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    expected = "one folder for each class; 14 training, 2 validation and 4 test photographs of 2 classes (robin, wren)"
    assert expected in first


# --- what a run remembers --------------------------------------------------------------------------------------------


@pytest.fixture
def noise(tmp_path):
    """A folder of 2 classes of 12 photographs that all differ."""
    rng = np.random.default_rng(0)
    for name in ("robin", "wren"):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for k in range(12):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(tmp_path / "birds" / name / f"{k}.png")
    return tmp_path / "birds"


SMALL = ["--recipe", "small", "--epochs", "1", "--batch-size", "8", "--precision", "no"]


def run(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err.strip().splitlines()[-1] if said.err.strip() else ""


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_to_be_overwritten(noise, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(capsys, "train", noise, "--out", out, *SMALL)[0] == 0
    best = (out / "best" / "model.safetensors").read_bytes()
    code, _, line = run(capsys, "train", noise, "--out", out, *SMALL, "--seed", "1")
    assert code == 2 and "found a training here already (1 epochs)" in line and "--resume" in line
    assert (out / "best" / "model.safetensors").read_bytes() == best and (out / "states" / "epoch-0001").is_dir()
    with pytest.raises(LoupeError, match=r"is the folder of a training; expected the model in it, .*best$"):
        LoupeModel.from_pretrained(out)
    assert run(capsys, "train", noise, "--out", out, *SMALL, "--seed", "1", "--overwrite")[0] == 0
    assert (out / "best" / "model.safetensors").read_bytes() != best


@pytest.mark.parametrize("name", ["best", "states"])
def test_a_class_that_is_called_like_a_part_of_a_run_is_never_written_over(noise, tmp_path, capsys, name):
    (noise / "wren").rename(noise / name)
    before = sorted(noise.rglob("*"))
    for words in ([], ["--overwrite"], ["--resume"]):
        code, _, line = run(capsys, "train", noise, "--out", noise, *SMALL, *words)
        assert code == 2 and f"{noise / name}: found a folder that no training wrote" in line
        assert "--overwrite" not in line and sorted(noise.rglob("*")) == before


def test_all_processes_look_for_an_earlier_run_before_the_main_one_begins(tmp_path):
    class Processes:
        is_main_process, waited = True, False

        def wait_for_everyone(self):
            assert not (tmp_path / "recipe.json").exists()
            self.waited = True

    processes = Processes()
    RunFolder(tmp_path, processes).begin({}, {}, overwrite=False)
    assert processes.waited and (tmp_path / "recipe.json").exists()


def test_a_training_that_broke_off_before_its_first_model_is_told_as_such(noise, tmp_path, capsys):
    out = tmp_path / "run"
    for file in noise.rglob("*.png"):
        file.write_bytes(b"no image")
    assert run(capsys, "train", noise, "--out", out, *SMALL)[0] == 2 and not (out / "best").exists()
    code, _, line = run(capsys, "train", noise, "--out", out, *SMALL)
    assert code == 2 and "found a training here already (nothing kept yet: " in line and "--overwrite" in line
    code, _, line = run(capsys, "evaluate", noise, "--checkpoint", out)
    assert code == 2 and "holds a training that has kept no model yet" in line


@pytest.mark.parametrize("change, says", [
    (["--form", "residual"], "begun with form 'multiply', this one has 'residual'; expected the same model"),
    (["--site", "stage3"], "begun with site 'stage2', this one has 'stage3'"),
    (["--reduction", "4"], "begun with reduction 16, this one has 4"),
    (["--bare"], r"begun with site 'stage2', this one has \[\]"),
    ("rename", "begun with class 1 'wren', this one has 'zebra finch'"),
    ("add", r"begun with other train images: \d+ are new, \d+ are gone \(robin/\d+.png, \d+ bytes, ...\); expected"),
    ("edit", "begun with other train images: 1 are new, 1 are gone"),
])
def test_a_run_goes_on_with_its_own_model_and_images_only(noise, tmp_path, capsys, change, says):
    out = tmp_path / "run"
    assert run(capsys, "train", noise, "--out", out, *SMALL)[0] == 0
    trained = next(name for name in PhotoFolder(noise).names)
    if change == "rename":
        (noise / "wren").rename(noise / "zebra finch")
    if change == "add":
        for k in range(30, 40):
            (noise / "robin" / f"{k}.png").write_bytes((noise / "robin" / "0.png").read_bytes() + bytes(k))
    if change == "edit":
        with open(noise / trained, "ab") as file:
            file.write(b"x")
    words = change if isinstance(change, list) else []
    state = sorted(path.name for path in out.rglob("*"))
    code, _, line = run(capsys, "train", noise, "--out", out, "--resume", *words)
    assert code == 2 and "\n" not in line
    assert re.search(says, line), line
    assert sorted(path.name for path in out.rglob("*")) == state


def test_evaluate_and_audit_leave_out_what_the_model_was_trained_on(noise, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(capsys, "train", noise, "--out", out, *SMALL)[0] == 0
    before = {split: set(PhotoFolder(noise, split).names) for split in ("train", "val", "test")}
    _, said, _ = run(capsys, "evaluate", noise, "--checkpoint", out / "best")
    assert f" of {len(before['test'])} images" in said and "left out" not in said
    for name in before["test"]:  # taken out, so that others take their places
        (noise / name).unlink()
    now = PhotoFolder(noise, "test").names
    seen = set(now) & (before["train"] | before["val"])
    assert len(seen) == len(now) > 2
    for k in range(30, 60):  # and new ones, of which some are for the test
        (noise / "robin" / f"{k}.png").write_bytes((noise / "robin" / now[0].split("/")[1]).read_bytes() + bytes(k))
    now = PhotoFolder(noise, "test").names
    seen = set(now) & (before["train"] | before["val"])
    assert 0 < len(seen) < len(now)
    for command in ("evaluate", "audit"):
        code, said, _ = run(capsys, command, noise, "--checkpoint", out / "best")
        assert code == 0 and f"left out: {len(seen)} test photographs that this model was trained on" in said
        assert f" of {len(now) - len(seen)}" in said


def test_a_set_with_a_cache_shows_the_right_photographs_after_some_are_left_out(noise):
    data = PhotoFolder(noise, cache=True)
    before = {name: np.asarray(data.image(i)) for i, name in enumerate(data.names)}
    gone = data.leave_out(set(data.identities()[::3]))
    assert len(gone) == -(-len(before) // 3) and not set(gone) & set(data.names)
    assert all(np.array_equal(data.image(i), before[name]) for i, name in enumerate(data.names))


def test_a_single_class_is_nothing_to_train_on(tmp_path, capsys):
    write(tmp_path / "birds", *several("robin", count=9))
    code, _, line = run(capsys, "train", tmp_path / "birds", "--out", tmp_path / "run", *SMALL)
    assert code == 2 and "found one class only, 'robin'; expected two or more" in line


def test_photographs_that_lie_in_two_splits_are_named(noise, tmp_path, capsys):
    test, train = PhotoFolder(noise, "test").names[0], PhotoFolder(noise).names[0]
    (noise / test).write_bytes((noise / train).read_bytes())
    _, said, _ = run(capsys, "train", noise, "--out", tmp_path / "run", *SMALL)
    assert f"1 pairs of photographs with the same content lie in two splits: train {train} = test {test}" in said


def test_photographs_of_one_size_and_one_end_are_compared_as_a_whole(tmp_path, monkeypatch):
    """Their ends are read first; the whole of a file is read only where these are the same."""
    (tmp_path / "a").mkdir()
    contents = dict(one=b"x" * 3000, two=b"y" + b"x" * 2999, same=b"x" * 3000, other=b"x" * 2999 + b"y")
    for name, content in contents.items():
        (tmp_path / "a" / name).write_bytes(content)
    paths, read = [str(tmp_path / "a" / name) for name in contents], []
    whole = type(tmp_path).read_bytes
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: read.append(path.name) or whole(path))
    assert same_content(paths, ["train", "test", "test", "test"]) == [(0, 2)]
    assert read == ["one", "two", "same"]
