"""What befalls a run: full disks, odd names, readers that go away, a silent hub, photographs that are not there."""

import ast
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FORKS, drawn_here
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from test_kill import digest
from test_trainer import RECIPE, TRAIN, VAL, Patches, tiny_model

from loupe_core import CUB200, LoupeError, LoupeModel, PhotoFolder, Recipe, Trainer, open_set, transforms_for
from loupe_core.cli import main, parser
from loupe_core.files import hub
from loupe_core.files.atomic import write_whole
from loupe_core.files.checks import check_photographs
from loupe_core.files.console import exit_code
from loupe_core.files.run_folder import damaged_file, trained_on
from loupe_core.geometry import INTERPOLATIONS
from loupe_core.samples import AsSamples
from loupe_core.start.batches import lone_norm, training_batches
from loupe_lab.birds import fieldguide

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--recipe", "small", "--epochs", "1", "--batch-size", "8", "--precision", "no", "--backbone", "swin_micro"]
CONFIG = dict(input_size=(3, 48, 48), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, interpolation="bicubic")


def noise(file: Path, seed: int = 0) -> Path:
    """A photograph of 20 x 24 pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file


@pytest.fixture
def birds(tmp_path):
    """A folder of 2 classes of 12 photographs."""
    for k in range(24):
        noise(tmp_path / "birds" / ("robin", "wren")[k % 2] / f"{k}.png", k)
    return tmp_path / "birds"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "best"
    torch.manual_seed(0)
    LoupeModel("swin_micro", num_classes=2, class_names=["robin", "wren"]).save_pretrained(folder)
    return folder


def command(capsys, *words) -> tuple[int, str, str]:
    """The exit code of `loupe words`, and what it said on stdout and stderr."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *words, says: str) -> None:
    """The command ends with 2, and with one line on stderr that matches."""
    code, _, err = command(capsys, *words)
    assert code == 2 and re.fullmatch(rf"loupe: .*(?:{says}).*\n", err), (code, err)


def in_child(function, *arguments):
    """What a function returns in a process of its own, whose limits and streams it may change."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_call, args=(theirs, function, *arguments))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def _call(connection, function, *arguments) -> None:
    torch.set_num_threads(1)
    connection.send(function(*arguments))


# ---- workers, however they are started


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_transform_reaches_a_worker_and_works_there(interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    config = CONFIG | dict(interpolation=interpolation)
    for options in (dict(train=False), dict(train=True), dict(train=True, fast=True),
                    *(dict(train=True, randaugment="rand-m9-mstd0.5", fast=fast) for fast in (False, True))):
        transform = pickle.loads(pickle.dumps(transforms_for(config, **options)))
        for _ in range(12):  # RandAugment draws 2 of 15 operations; Pillow cannot shear with every kernel
            assert transform(image)[0].shape == (3, 48, 48)


@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_a_training_runs_with_workers_however_they_are_started(birds, start):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(start, force=True)
    try:
        torch.manual_seed(0)
        model = LoupeModel("resnet10t", num_classes=2, pretrained=False, data_config=dict(input_size=(3, 48, 48)))
        recipe = Recipe(**RECIPE | dict(epochs=1, workers=1, augment="randaugment"))
        train = open_set(birds, cache=True, transform=transforms_for(CONFIG, **recipe.train_transform_options()))
        # a spawned process imports torch first: there one is enough
        val = None if start == "spawn" else open_set(birds, "val", transform=transforms_for(CONFIG, train=False))
        assert np.isfinite(Trainer(model, recipe, progress=False).fit(train, val)[0]["loss"])
        for i in range(len(train)):  # a worker's pixels, in the one file that all share
            assert np.array_equal(train._cache.read(i), PhotoFolder(birds).image(i))
    finally:
        multiprocessing.set_start_method(before, force=True)


# ---- a batch of one image


def with_norm_after_pooling() -> LoupeModel:
    torch.manual_seed(0)
    return LoupeModel("mobilenetv4_conv_small_035", num_classes=4, pretrained=False)


def one_epoch(**changes) -> Trainer:
    return Trainer(with_norm_after_pooling(), Recipe(**RECIPE | dict(epochs=2, batch_size=4) | changes), progress=False)


def order(trainer, data, epoch) -> list[list[int]]:
    """The images of each batch in an epoch."""
    loader = trainer.accelerator.prepare(trainer.loader(data, train=True))
    loader.set_epoch(epoch)
    batches = [batch["image_id"].tolist() for batch in loader]
    assert len(loader) == len(batches)
    return batches


def test_a_single_image_at_the_end_joins_the_batch_before_it_where_a_norm_needs_two():
    data = Patches(9)
    joined = order(one_epoch(), data, 3)
    assert [len(batch) for batch in joined] == [4, 5]
    plain = order(Trainer(tiny_model(), Recipe(**RECIPE | dict(batch_size=4)), progress=False), data, 3)
    assert [len(batch) for batch in plain] == [4, 4, 1]  # this one has no such norm
    assert sum(joined, []) == sum(plain, []) and sorted(sum(joined, [])) == list(range(9))
    assert order(one_epoch(), data, 4) != joined
    rows = one_epoch().fit(data)
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_batches_are_torchs_own_wherever_nothing_fails():
    model, recipe = with_norm_after_pooling(), Recipe(**RECIPE | dict(batch_size=4))
    own = dict(batch_size=4, shuffle=True)
    for n in (8, 10, 11):
        assert training_batches(model, AsSamples(Patches(n)), recipe) == own
    assert training_batches(model, AsSamples(Patches(9)), recipe, processes=2) == own  # Accelerate fills the last
    frozen = Recipe(**RECIPE | dict(batch_size=4, freeze_batchnorm=True))
    assert training_batches(model, AsSamples(Patches(9)), frozen) == own
    assert training_batches(tiny_model(), AsSamples(Patches(9)), recipe) == own
    # BatchNorm before the pooling has many values of one image
    assert lone_norm(LoupeModel("resnet10t", num_classes=4, pretrained=False), TRAIN.images[0]) is None


def test_looking_for_such_a_norm_leaves_the_model_as_it_was():
    model = with_norm_after_pooling().train()
    before, modes = digest(model), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert lone_norm(model, TRAIN.images[0]) == "backbone.norm_head"
    assert digest(model) == before and [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_a_joined_run_that_is_resumed_ends_as_an_uninterrupted_one(tmp_path):
    def run(folder, **options):
        trainer = Trainer(with_norm_after_pooling(), Recipe(**RECIPE | dict(epochs=2, batch_size=4)), folder,
                          progress=False)
        trainer.fit(Patches(9), **options)
        return digest(trainer.model)

    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", on_epoch_end=lambda row: True)
    assert run(tmp_path / "stopped", resume=True) == whole


@pytest.mark.parametrize("n, size, says", [(9, 1, "found batch_size=1, but"), (1, 8, "found one training image, but")])
def test_single_images_alone_are_refused_in_one_line_where_a_norm_needs_two(n, size, says):
    with pytest.raises(LoupeError, match=f"{says} backbone.norm_head of mobilenetv4.*expected batch_size 2 or more"):
        one_epoch(batch_size=size).fit(Patches(n))


# ---- names


def test_no_text_file_is_opened_without_an_encoding():
    """Else it is the system's: cp1252 on Windows."""
    found = []
    for folder in ("loupe_core", "loupe_lab", "scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _opens_text(node):
                    found.append(f"{path.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)}")
    assert not found


def _opens_text(call: ast.Call) -> bool:
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if name not in ("open", "read_text", "write_text", "fdopen") or owner in ("os", "Image", "tarfile"):
        return False
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    binary = any(re.fullmatch("[rwax+]*b[rwax+]*", mode) for mode in modes)
    return not binary and all(keyword.arg != "encoding" for keyword in call.keywords)


def test_the_search_for_text_files_finds_them():
    assert _opens_text(ast.parse("open(x)").body[0].value) and _opens_text(ast.parse("p.read_text()").body[0].value)
    assert not _opens_text(ast.parse("p.open('rb')").body[0].value)


class Console(io.TextIOWrapper):
    """One that refuses each letter that it lacks, as Windows' and LANG=C's do."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    def said(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def odd_birds(tmp_path):
    """Photographs whose names no console shows: bytes that are no UTF-8, Chinese, a line break."""
    folder = tmp_path / os.fsdecode(b"f\xfcr mich")
    classes = [os.fsdecode(b"rotkehl\xe9"), "知更鳥", "two\nlines"]
    try:
        for k in range(24):
            noise(folder / classes[k % 3] / ("\n".join("ab") + os.fsdecode(b"\xff") + f"鳥{k}.png"), k)
    except (OSError, UnicodeError):
        pytest.skip("the file system refuses such names")
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_show_a_name_stops_no_command(odd_birds, tmp_path, monkeypatch, encoding):
    def said(*words) -> tuple[int, str, str]:
        out, err = Console(encoding), Console(encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            return main([str(word) for word in words]), out.said(), err.said()

    run = tmp_path / "run"
    code, out, err = said("train", odd_birds, "--out", run, *SMALL, "--check")
    assert code == 0 and "Traceback" not in err and ascii("知更鳥").strip("'") in out
    code, out, err = said("evaluate", odd_birds, "--checkpoint", run / "best", "--card", "--report", run / "report")
    assert code == 0 and "test accuracy" in out and "left out" not in out, err
    code, _, err = said("predict", odd_birds, "--checkpoint", run / "best", "--out", run / "predictions.csv")
    assert code == 0 and "Traceback" not in err, err
    code, out, err = said("explain", odd_birds, "--checkpoint", run / "best", "--out", tmp_path / "seen")
    assert code == 0 and len(list((tmp_path / "seen").rglob("*.png"))) == 24, err
    assert [line for line in out.splitlines() if line.startswith("lines")] == []  # no name breaks its line
    for file in run.rglob("*"):  # every text is UTF-8, and what it holds can be read again
        if file.suffix in (".json", ".jsonl", ".md", ".csv", ".html"):
            file.read_text(encoding="utf-8", errors="strict")
    assert trained_on(run / "best", "train", "val") >= set(PhotoFolder(odd_birds).identities())
    next(odd_birds.rglob("*.png")).write_bytes(b"no photograph")
    code, _, err = said("train", odd_birds, "--out", tmp_path / "other", *SMALL, "--check")
    lines = [line for line in err.splitlines() if line.startswith("loupe: ")]
    assert code == 2 and len(lines) == 2 and "no image format" in lines[0] and "1 of 24" in lines[1]


def test_a_text_with_a_name_of_any_bytes_is_written_in_utf8(tmp_path):
    write_whole(tmp_path / "x.csv", "name\n" + os.fsdecode(b"\xff") + "ä\n")
    assert (tmp_path / "x.csv").read_text(encoding="utf-8") == "name\n\\udcffä\n"


def test_names_taken_apart_by_a_copy_are_the_same_names(birds, make_cub, tmp_path):
    """As macOS writes them: e and an accent in place of one letter."""
    apart = unicodedata.normalize("NFD", "é")
    for root, letter in ((tmp_path / "here", "é"), (tmp_path / "copy", apart)):
        for k in range(10):
            noise(root / f"r{letter}" / f"{letter}{k}.png", k)
            noise(root / "wren" / f"{k}.png", k + 10)
    here, copy = PhotoFolder(tmp_path / "here", "test"), PhotoFolder(tmp_path / "copy", "test")
    assert here.identities() == copy.identities() and here.class_names == copy.class_names
    # both forms of one name in one folder: one class, and nothing is lost
    noise(tmp_path / "copy" / "ré" / "more.png")
    both = PhotoFolder(tmp_path / "copy")
    assert both.class_names == copy.class_names and len(both.all_paths) == 21

    cub = make_cub(classes=2)
    listed = (cub / "images.txt").read_text(encoding="utf-8").replace("Bird_1_", "Oiseau_é_")
    (cub / "images.txt").write_text(listed, encoding="utf-8")
    for file in (cub / "images").rglob("Bird_1_*"):
        file.rename(file.with_name(file.name.replace("Bird_1_", f"Oiseau_{apart}_")))
    data = CUB200(cub)
    check_photographs(cub, data.all_paths)
    assert any("é" in name for name in data.names) and data.image(0).size == (48, 36)
    (cub / "images.txt").write_text(unicodedata.normalize("NFD", listed), encoding="utf-8")
    assert CUB200(cub).identities() == data.identities()


def test_an_error_of_a_name_with_a_line_break_is_one_line():
    error = LoupeError("a\nb: found nothing")
    assert str(error) == "a?b: found nothing"
    below = LoupeError(f"Caught LoupeError in DataLoader worker process 0.\nTraceback ...\n"
                       f"loupe_core.errors.LoupeError: {error}\n")
    assert str(below) == str(error) and str(pickle.loads(pickle.dumps(below))) == str(error)


def test_the_error_of_a_worker_is_its_line_alone(birds):
    next(birds.rglob("*.png")).write_bytes(b"no photograph")
    data = PhotoFolder(birds, test_fraction=0, val_fraction=0, transform=transforms_for(CONFIG, train=False))
    model = LoupeModel("resnet10t", num_classes=2, pretrained=False)
    with pytest.raises(LoupeError, match=r"^\S+png: found no image format[^\n]*$"):
        Trainer(model, Recipe(**RECIPE | dict(workers=1)), progress=False).evaluate(data)


# ---- what the system refuses


def test_a_place_that_cannot_be_written_is_told_in_one_line(birds, checkpoint, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    photograph, long = next(birds.rglob("*.png")), tmp_path / ("x" * 300)
    trained = ["--checkpoint", checkpoint]
    for out in (file, file / "below", long):
        _, _, err = command(capsys, "train", birds, "--out", out, *SMALL)
        assert re.search(r"^loupe: .*(file|below|x): .*cannot be made or written to", err.splitlines()[-1]), err
        assert "Traceback" not in err
    refused(capsys, "fieldguide", "--out", file / "below", "--groups", "1", says="the system refused .*(exists|dir)")
    refused(capsys, "fieldguide", "--out", long, "--groups", "1", says="name too long")
    refused(capsys, "explain", photograph, *trained, "--out", file / "below.png", says="could not be written")
    refused(capsys, "explain", birds, *trained, "--out", file / "below", says="could not be written")
    refused(capsys, "export", *trained, "--out", file / "below.onnx", says="no folder")
    refused(capsys, "train", long, "--out", tmp_path / "o", says="no such folder|name too long")
    assert file.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["birds", "file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_told_in_one_line(birds, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    for out in (tmp_path / "closed", tmp_path / "closed" / "run"):
        _, _, err = command(capsys, "train", birds, "--out", out, *SMALL)
        assert "cannot be made or written to (Permission denied)" in err.splitlines()[-1]


def test_a_card_that_cannot_be_written_at_the_end_is_told_in_one_line(birds, tmp_path, capsys, monkeypatch):
    real = Trainer.fit

    def fit(self, *sets, **options):
        rows = real(self, *sets, **options)
        (self.out_dir / "best" / "README.md").unlink()
        (self.out_dir / "best" / "README.md").mkdir()  # no file can take its place
        return rows

    monkeypatch.setattr(Trainer, "fit", fit)
    code, _, err = command(capsys, "train", birds, "--out", tmp_path / "run", *SMALL)
    assert code == 2 and re.search(r"^loupe: .*best/README.md: the system refused .*\)$", err.splitlines()[-1]), err
    assert sorted(p.name for p in (tmp_path / "run" / "best").iterdir()) == [
        "README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("fault", [TypeError("a fault"), OSError("a library's own, without the system's number")])
def test_faults_of_the_program_keep_their_traceback(fault):
    def run():
        raise fault

    with pytest.raises(type(fault)):
        exit_code(run)


# ---- a disk that is full: no file may grow beyond a limit, so writes fail as on one


def limited(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def train_until_full(folder: str, share: float) -> str:
    """Trains; after the first epoch no file may be larger than `share` of the weights. Returns the error."""
    trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(epochs=2)), folder, progress=False)

    def after(row):
        limited(int(share * os.path.getsize(f"{folder}/best/model.safetensors")))

    try:
        trainer.fit(TRAIN, VAL, on_epoch_end=after)
    except LoupeError as error:
        return str(error)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
@pytest.mark.parametrize("share, reason", [
    (0.5, "File too large"),  # at the weights: safetensors
    (1.5, "not all of it could be written; is the disk full?"),  # at the optimizer, twice as large: torch
])
def test_a_disk_that_fills_up_in_training_costs_one_line_and_one_epoch(tmp_path, share, reason):
    said = in_child(train_until_full, str(tmp_path), share)
    assert said == (f"{tmp_path}: epoch 2 could not be written ({reason}); the states before it are intact: free some "
                    "space and resume")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best", "log.jsonl", "recipe.json", "run.json", "states"}
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["epoch-0001"]
    assert set(load_file(tmp_path / "best" / "model.safetensors")) == set(tiny_model().state_dict())
    trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(epochs=2)), tmp_path, progress=False)
    assert [row["epoch"] for row in trainer.fit(TRAIN, VAL, resume=True)] == [1, 2]


def write_all(folder: str, photograph: str, checkpoint: str) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of commands that have no room for what they write."""
    sys.path.insert(0, str(ROOT / "scripts" / "record"))
    from runs import write_rows

    limited(300)
    fieldguide.ProcessPoolExecutor = drawn_here
    ended = {}
    for name, words in dict(
            fieldguide=["--out", f"{folder}/birds", "--groups", "1", "--train", "1", "--test", "0"],
            png=[photograph, "--checkpoint", checkpoint, "--out", f"{folder}/o.png"],
            jpeg=[photograph, "--checkpoint", checkpoint, "--out", f"{folder}/o.jpg"]).items():
        sys.stderr, sys.stdout = io.StringIO(), io.StringIO()
        ended[name] = main([name if name == "fieldguide" else "explain", *words]), sys.stderr.getvalue()
    sys.stdout = io.StringIO()
    rows = [dict(number=k, text="x" * 100) for k in range(50)]
    ended["rows"] = exit_code(lambda: write_rows(Path(folder) / "rows.csv", rows)), sys.stderr.getvalue()
    return ended


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
def test_what_has_no_room_is_as_it_was_before(birds, checkpoint, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    for name in ("o.png", "o.jpg", "rows.csv"):
        (folder / name).write_text("before")
    before = contents(folder)
    ended = in_child(write_all, str(folder), str(next(birds.rglob("*.png"))), str(checkpoint))
    for name, (code, err) in ended.items():
        last = err.splitlines()[-1]
        assert code == 2 and "File too large" in last and str(folder) in last, (name, err)
        assert "Traceback" not in err
    assert contents(folder) == before


# ---- states that have changed since they were written


def test_a_damaged_state_is_named_and_the_one_before_goes_on(tmp_path):
    def resumed() -> Trainer:
        trainer = Trainer(tiny_model(), Recipe(**RECIPE | dict(epochs=2)), tmp_path / "run", progress=False)
        trainer.fit(TRAIN, VAL, resume=True)
        return trainer

    whole = digest(resumed().model)
    newest = tmp_path / "run" / "states" / "epoch-0002"
    listed = json.loads((newest / "checksums.json").read_text())
    assert set(listed) == {path.name for path in newest.iterdir()} - {"checksums.json"} and len(listed) >= 4
    for file in sorted(listed):
        data = (newest / file).read_bytes()
        places = np.random.default_rng(0).integers(len(data) // 2, len(data), 64)  # where the numbers are
        changed = np.frombuffer(data, np.uint8).copy()
        changed[places] ^= 1
        (newest / file).write_bytes(changed.tobytes())
        assert damaged_file(newest) == f"{file} has changed since it was written"
        (newest / file).write_bytes(data)
    assert damaged_file(newest) is None
    (newest / "optimizer.bin").unlink()
    with pytest.raises(LoupeError, match=r"epoch-0002: this state cannot be read \(optimizer.bin is missing\); move "
                                         "its folder elsewhere and resume from the one before$"):
        resumed()
    newest.rename(tmp_path / "damaged")
    assert digest(resumed().model) == whole


# ---- a reader that goes away


def test_a_command_whose_reader_has_gone_ends_in_silence():
    """As after `| head -1`: once when its output is written at the end, once in the middle, once with stderr too."""
    closed, out = os.pipe()
    os.close(closed)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run([sys.executable, "-m", "loupe_core"], stdout=out, stderr=subprocess.PIPE, cwd=ROOT,
                           env=environment)
    os.close(out)
    assert (ended.returncode, ended.stderr) == (141, b"")
    for streams in ((1,), (1, 2)):
        assert in_child(says_much, streams) == 141


def says_much(streams: tuple[int, ...]) -> int:
    closed, out = os.pipe()
    os.close(closed)
    for stream in streams:
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))

    def run():
        for k in range(10_000):
            print("a line of a command that says much", k)
        raise AssertionError("not reached")

    return exit_code(run)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_without_room_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert exit_code(lambda: print("an answer")) == 2
    assert capsys.readouterr().err == "loupe: the output could not be written (No space left on device)\n"


def test_a_broken_pipe_of_something_else_is_told(capsys):
    def run():
        raise BrokenPipeError(32, "Broken pipe")

    assert exit_code(run) == 2 and "(Broken pipe)" in capsys.readouterr().err


# ---- a hub that does not answer


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A hub that refuses connections, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_set_here", False)


def test_a_hub_that_does_not_answer_is_told_within_seconds(silent_hub, birds, tmp_path, capsys):
    began = time.monotonic()
    words = [*SMALL[:-1], "resnet18.a1_in1k"]
    code, _, err = command(capsys, "train", birds, "--out", tmp_path / "o", *words)
    assert code == 2 and "resnet18.a1_in1k" in err.splitlines()[-1] and "Retry" not in err
    refused(capsys, "evaluate", birds, "--checkpoint", "someone/no-such-model", says="someone/no-such-model")
    assert time.monotonic() - began < 10  # it was 70 s


def test_what_the_hub_gave_before_is_used_where_it_does_not_answer(silent_hub, birds, checkpoint, tmp_path, capsys):
    kept = tmp_path / "cache" / "models--someone--birds"
    shutil.copytree(checkpoint, kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    code, out, err = command(capsys, "evaluate", birds, "--checkpoint", "someone/birds")
    assert code == 0 and "test accuracy" in out, err


def test_the_hub_is_asked_only_where_something_comes_from_it(silent_hub, checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_answers", lambda: asked.append(1) or True)
    for name in ("swin_micro", str(checkpoint), checkpoint, "no_such_model", "test_vit"):
        hub.hub_or_cache(name)
    assert len(asked) == 1  # timm's test_vit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the user has set it
    hub.hub_or_cache("someone/birds")
    assert len(asked) == 1


# ---- photographs that are not there, or cannot be read


def test_missing_photographs_are_counted_at_the_start(make_cub, checkpoint, tmp_path, capsys):
    cub = make_cub(classes=2)
    files = sorted((cub / "images").rglob("*.png"))
    for file in files[5:]:
        file.unlink()
    lost = ", ".join(str(file.relative_to(cub)) for file in files[5:8])
    says = rf"15 of 20 listed photographs are missing \({re.escape(lost)}, ...\).*unpack or copy the set again"
    refused(capsys, "train", cub, "--out", tmp_path / "o", *SMALL, says=says)
    (tmp_path / "config").mkdir()
    torch.manual_seed(0)
    LoupeModel("swin_micro", num_classes=2).save_pretrained(tmp_path / "m")
    refused(capsys, "evaluate", cub, "--checkpoint", tmp_path / "m", says="8 of 10 listed photographs are missing")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("count", [24, 340])  # so many that processes share them
def test_check_names_every_photograph_that_cannot_be_read(birds, tmp_path, capsys, count):
    files = sorted(birds.rglob("*.png"))
    for k in range(count - len(files)):
        shutil.copy(files[0], birds / "robin" / f"copy{k}.png")
    files[0].write_bytes(b"no photograph")
    files[5].write_bytes(files[5].read_bytes()[:100])
    files[9].write_bytes(b"")
    code, _, err = command(capsys, "train", birds, "--out", tmp_path / "run", *SMALL, "--check")
    lines = [line for line in err.splitlines() if line.startswith("loupe: ")]
    assert code == 2 and len(lines) == 4 and f"3 of {count} photographs cannot be read, the lines above" in lines[3]
    for file, says in zip((files[0], files[5], files[9]), ("no image format", "broken or unusual", "an empty file")):
        assert any(str(file) in line and says in line for line in lines), (file, lines)
    assert not (tmp_path / "run").exists()


# ---- words


def test_the_version_and_the_help_are_there_without_a_command(capsys):
    from loupe_core import __version__

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code and capsys.readouterr().out == f"loupe {__version__}\n"
    code, out, err = command(capsys)
    assert code == 0 and not err and out == parser().format_help() and "fieldguide" in out


@pytest.mark.parametrize("words, says", [
    (["train", "x", "--nonsense"], "unrecognized arguments: --nonsense; `loupe train --help` lists what is expected"),
    (["fieldguide", "a", "b"], "unrecognized arguments: b; `loupe fieldguide --help`"),
    (["--nonsense"], "unrecognized arguments: --nonsense; `loupe --help`"),
    (["train", "x", "--out", ""], "argument --out: found an empty name, expected that of a file or folder"),
    (["train", ""], "argument data: found an empty name"),
    (["explain", "x.png", "--checkpoint", "c", "--out", ""], "argument --out/--output: found an empty name"),
    (["fieldguide", "a", "--out", "b"], "found two folders, a and --out b; expected one, --out"),
    (["audit", "a", "--data", "b", "--checkpoint", "c"], "found two folders, a and --data b; expected one"),
])
def test_words_that_would_be_passed_over_are_refused(capsys, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *words, says=re.escape(says))
    assert not list(tmp_path.iterdir())
