"""The paper's experiment as a command: its plan, a run that is stopped anywhere, its rows, its table, its verdicts.

The whole grid runs in small, see `loupe_lab.paper.rehearsal`.
"""

import csv
import errno
import json
import multiprocessing
import os
import signal
import sys
import time

import ledger
import nbformat
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from helpers import FORKS
from nbclient import NotebookClient
from test_kill import FILE_EVENTS

from loupe_core import CUB200, LoupeError, LoupeModel, Recipe, transforms_for
from loupe_core.cli import main
from loupe_core.files.run_folder import RunFolder
from loupe_lab.evidence.answers import write_table
from loupe_lab.evidence.results import pack_right, unpack_right
from loupe_lab.paper import experiment, grid
from loupe_lab.paper.arms import ARMS, AT_384, AUTHORS, BACKBONES, PAPERS, TABLES, Run, plan
from loupe_lab.paper.experiment import COLUMNS, Setting, peaks_in_box, perform, prepared
from loupe_lab.paper.hours import at_most, hours
from loupe_lab.paper.machine import facts
from loupe_lab.paper.rehearsal import CLASSES, PIXELS, rehearsed, small_backbone
from loupe_lab.paper.table import NOT_RUN, PUBLISHED, cub_table, difference, optimism, table

FINISHED = dict(accuracy=0.5, images=4, right=pack_right([1, 1, 1, 1]), seconds=100.0, epochs=1, card="a card")
CLAIMS = ledger.ledger()["claims"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The setting of a rehearsal, for single runs."""
    with rehearsed(tmp_path_factory.mktemp("runs")) as setting:
        yield setting


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of a rehearsal of everything, and its seconds."""
    out, began = tmp_path_factory.mktemp("paper"), time.perf_counter()
    threads = torch.get_num_threads()
    assert main(["reproduce", "--rehearse", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return grid.read_rows(out / "rehearsal" / "cub.csv"), time.perf_counter() - began, out


# ---- the plan


def test_the_tables_are_complete_and_every_name_is_one_of_timms():
    assert [len(plan(name)) for name in TABLES] == [24, 30, 51] and len(plan("all")) == 105
    assert len(set(plan("all"))) == 105 == len({run.name for run in plan("all")})
    for name in (*BACKBONES.values(), *AT_384.values()):
        assert name in timm.list_pretrained(), name
    # what the authors call, without a tag
    assert timm.get_pretrained_cfg("swin_base_patch4_window7_224").tag == BACKBONES[PAPERS].split(".")[1]
    assert timm.get_pretrained_cfg("swin_tiny_patch4_window7_224").tag == BACKBONES["tiny 1k"].split(".")[1]


def test_a_plan_goes_seed_by_seed_and_can_be_narrowed():
    runs = plan("core")
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert plan(arms=["residual"]) == [Run(PAPERS, 224, "residual", seed) for seed in range(3)]
    assert len(plan(arms=["bare", "loupe"], backbones=["tiny 22k"], seeds=2)) == 4
    assert {run.backbone for run in plan("all", pixels=384)} == set(AT_384)
    assert plan(arms=["sum"])  # one that is in no table


@pytest.mark.parametrize("options, says", [
    (dict(table="nothing"), "--table 'nothing': unknown; expected some of: core"),
    (dict(arms=["lamda 0"]), "--arm 'lamda 0': unknown; expected some of: bare, loupe"),
    (dict(backbones=["huge"]), "--backbone 'huge': unknown"),
    (dict(pixels=448), "--pixels 448: expected 224 or 384"),
    (dict(backbones=["tiny 1k"], pixels=384), "--pixels 384: found no run; there are weights for"),
    (dict(seeds=0), "--seeds 0: expected 1 or more"),
])
def test_a_wrong_choice_is_told_in_one_line(options, says):
    with pytest.raises(LoupeError, match=says):
        plan(**options)


def test_a_rehearsal_stays_out_of_the_results(capsys, tmp_path):
    assert main(["reproduce", "--rehearse", "--results", str(tmp_path / "cub.csv")]) == 2
    assert "the figures of a rehearsal mean nothing" in capsys.readouterr().err


def test_several_processes_of_one_training_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["reproduce", "--plan"]) == 2
    assert "found 4 processes of one training; expected one" in capsys.readouterr().err


def test_hours_grow_with_the_model_and_shrink_with_the_card():
    def of(card, backbone=PAPERS, arm="loupe"):
        return at_most(Run(backbone, 224, arm, 0), card)

    a100 = "NVIDIA A100-SXM4-40GB"
    assert of("Tesla T4") > 2 * of(a100) > 0 and of(a100) > of(a100, "tiny 1k")
    assert of(a100, arm="authors loupe") > 2 * of(a100), "fp32"
    assert of("GeForce 256") is None and of("x86_64") is None
    assert sum(at_most(run, a100) for run in plan("core")) < 6 * 3600, "an estimate: the goal of the core table"
    said = hours(plan("core")[:2])
    assert f"T4 {2 * of('Tesla T4') / 3600:.1f} h" in said and "estimated from counts" in said


# ---- what a run is


@pytest.mark.parametrize("arm", [*ARMS, *AUTHORS])
def test_an_arm_differs_from_the_papers_gate_in_what_its_name_says(arm, small):
    run = Run(PAPERS, 224, arm, 1)
    model, recipe, sets = prepared(run, Setting(small.data, small.out, backbone=small.backbone))
    paper = Recipe(seed=1)
    changed = {name for name, value in vars(recipe).items() if value != getattr(paper, name)}
    assert changed == set(run.change.get("recipe", {})), changed
    assert model.sites == tuple(np.atleast_1d(run.change.get("model", {}).get("site", "stage2")))
    assert len(model.class_names) == CLASSES
    if arm in AUTHORS:
        assert len(sets("train")) == 2 * CLASSES and sets("val").names == sets("test").names
        assert (model.interpolation, model.crop_pct) == ("bilinear", 0.875)
        assert sets("train").transform(sets("train").image(0))[0].shape == (3, PIXELS, PIXELS)
        assert recipe.precision == "no" and recipe.weight_decay == 0 and recipe.anneal == "epoch"
    else:
        assert len(sets("train")) == len(sets("val")) == CLASSES
        assert not set(sets("val").names) & set(sets("train").names) | set(sets("val").names) & set(sets("test").names)
        assert model.interpolation == "bicubic"


def test_the_authors_code_has_a_gate_of_the_width_that_research_counted():
    with torch.device("meta"):
        model = LoupeModel("swin_base_patch4_window7_224", pretrained=False, **AUTHORS["authors loupe"]["model"])
    assert model.gate_parameters() == 147_585


def test_a_row_says_what_an_evaluation_says_and_every_answer_is_kept(small):
    run = Run(PAPERS, 224, "loupe", 0)
    row = perform(run, small)
    folder = small.out / run.name
    assert set(COLUMNS) < set(row) and row["images"] == CLASSES
    right = unpack_right(row, CLASSES)
    with (folder / "answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert [a["label"] == a["prediction"] for a in answers] == right.tolist()
    assert row["accuracy"] == pytest.approx(right.mean())
    assert row["audited"] == 50 and row["attacked"] == 10
    assert row["own_accuracy"] == pytest.approx(right[np.unique(np.linspace(0, CLASSES - 1, 50).astype(int))].mean())
    assert row["card"] and row["torch"] == torch.__version__ and row["commit"] and row["precision"]
    assert not (folder / "states").exists() and (folder / "best" / "model.safetensors").is_file()
    assert perform(run, small) == row  # it is read


def test_images_are_held_once_and_a_mask_without_places_has_a_tenth_in_a_tenth(small):
    config = dict(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
    test = CUB200(small.data, "test", transform=transforms_for(config, train=False))
    x, labels, samples = experiment.spread(test, 7)
    assert [sample.image.data_ptr() for sample in samples] == [part.data_ptr() for part in x]
    assert torch.equal(x[3], test[int(np.linspace(0, CLASSES - 1, 7)[3])].image)
    assert labels.tolist() == [s.label for s in samples]
    for size in (7, 14, 28):
        assert experiment.share_of_tenth(np.full((size, size), 0.003, np.float32)) == pytest.approx(0.1)
    assert experiment.share_of_tenth(np.zeros((7, 7))) == 0.1 and experiment.share_of_tenth(np.eye(10)) == 1


def test_where_masks_lie_is_a_fraction_of_ties_and_not_the_place_between_them(small):
    config = dict(input_size=(3, PIXELS, PIXELS), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    sample = CUB200(small.data, "test", transform=transforms_for(config | dict(crop_pct=1.0), train=False))[0]
    flat, corner = np.zeros((4, 4)), np.zeros((4, 4))
    corner[0, 0] = 1
    inside = peaks_in_box(flat, sample)
    x, y, w, h = sample.box.tolist()
    cells = [(j + 0.5, i + 0.5) for i in range(4) for j in range(4)]
    wanted = np.mean([x <= 16 * a <= x + w and y <= 16 * b <= y + h for a, b in cells])
    assert inside == pytest.approx(wanted) and 0 < inside < 1
    assert peaks_in_box(corner, sample) == float(x <= 8 <= x + w and y <= 8 <= y + h)


def test_the_test_split_chooses_in_the_authors_protocol_alone(small, monkeypatch):
    """The answers are those of the epoch with the best test accuracy, although a later one has the lower loss."""
    setting = Setting(small.data, small.out / "authors", dict(progress=False), dict(epochs=4, batch_size=50, lr=3e-3),
                      small.backbone, audited=20)
    run = Run(PAPERS, 224, "authors loupe", 0)
    row = perform(run, setting)
    log = [json.loads(line) for line in (setting.out / run.name / "log.jsonl").read_text().splitlines()]
    accuracies = [epoch["val_accuracy"] for epoch in log]
    assert row["accuracy"] == pytest.approx(max(accuracies), abs=1e-5) == pytest.approx(row["val_accuracy"], abs=1e-5)
    assert row["best_epoch"] == 1 + int(np.argmax(accuracies))
    assert row["last_accuracy"] == pytest.approx(accuracies[-1], abs=1e-5)
    assert [epoch["lr"] for epoch in log] == pytest.approx(
        [1e-7 + (3e-3 - 1e-7) * (1 + np.cos(np.pi * e / 4)) / 2 for e in range(4)])
    assert not (setting.out / run.name / experiment.BY_TEST).exists()


# ---- a run that is stopped


def process(data, out, arm, die_at, connection) -> None:
    """Makes one run of three epochs in a process of its own, which ends itself at an operation on a file of the run."""
    torch.set_num_threads(1)
    seen = [0]

    def count(event, args):
        if event in FILE_EVENTS and any(str(a).startswith(str(out)) for a in args[:2]):
            seen[0] += 1
            if seen[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    setting = Setting(data, out, dict(progress=False), dict(epochs=3, batch_size=50, lr=1e-3), small_backbone,
                      audited=20, attacked=10)
    row = perform(Run(PAPERS, 224, arm, 0), setting)
    connection.send(({k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "commit")}, seen[0]))


def made(data, out, arm, die_at=None) -> tuple[dict, int] | None:
    """The row of a process, and its operations on files; None where it was killed."""
    ours, theirs = FORKS.Pipe(duplex=False)
    child = FORKS.Process(target=process, args=(data, out, arm, die_at, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        child.join()


@pytest.mark.parametrize("arm", ["loupe", "authors bare"])
def test_a_run_that_is_killed_gives_the_row_of_an_uninterrupted_one(small, tmp_path, arm):
    wanted, operations = made(small.data, tmp_path / "whole", arm)
    for share in (0.3, 0.55, 0.8, 0.99):
        assert made(small.data, tmp_path / f"{share}", arm, int(share * operations)) is None
        assert made(small.data, tmp_path / f"{share}", arm)[0] == wanted, share


def test_the_authors_epoch_is_found_wherever_a_run_was_stopped(small, tmp_path, monkeypatch):
    """Killed when the state of the best epoch is there and nothing after it; gone on with elsewhere."""
    run, real, made_on = Run(PAPERS, 224, "authors loupe", 0), RunFolder.keep, dict(facts(Accelerator()), commit="one")
    monkeypatch.setattr(experiment, "facts", lambda accelerator: made_on)

    def perform_in(out, **options):
        return perform(run, Setting(small.data, out, dict(progress=False, **options),
                                    dict(epochs=3, batch_size=50, lr=3e-3), small.backbone, audited=20))

    def same(row):
        return {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "commit")}

    wanted = perform_in(tmp_path / "whole")
    best = wanted["best_epoch"]

    def stops(folder, model, own, epoch, better, kept=True):
        real(folder, model, own, epoch, better, kept)
        if epoch == best:
            raise KeyboardInterrupt

    for every in (1, 3):
        made_on["commit"] = "one"
        monkeypatch.setattr(RunFolder, "keep", stops)
        with pytest.raises(KeyboardInterrupt):
            perform_in(tmp_path / str(every), save_every=every)
        monkeypatch.setattr(RunFolder, "keep", real)
        kept = tmp_path / str(every) / run.name / experiment.BY_TEST
        records = torch.load(kept, weights_only=True)
        # on a card an epoch that is repeated has other numbers: what it had before does not count
        torch.save(records + [dict(records[-1], epoch=best + 1, accuracy=0.999)] * (best < 3), kept)
        made_on["commit"] = "two"
        row = perform_in(tmp_path / str(every), save_every=every)
        assert same(row) == same(wanted) and row["commit"] == "one; two" and wanted["commit"] == "one", every


def test_the_rows_of_others_stay_and_each_run_is_made_once(small, tmp_path, monkeypatch):
    calls = []

    def fake(run, setting):
        calls.append(run)
        row = {name: "" for name in COLUMNS} | dict(zip(Run._fields, run)) | dict(
            accuracy=0.5, images=4, right=pack_right([1, 0, 1, 0]), seconds=100.0, epochs=1, card="card")
        (setting.out / run.name / "row.json").write_text(json.dumps(row))
        return row

    monkeypatch.setattr(grid, "perform", fake)
    runs, told = plan(arms=["bare", "loupe"], seeds=2), []
    setting = Setting(small.data, tmp_path / "a")
    grid.reproduce(runs, setting, tmp_path / "cub.csv", part=(2, 2), tell=told.append)
    assert calls == runs[1::2] and "2 of 2 runs left, the first one will tell how long" in told[0]
    assert "1 of 2 runs left, about 2 min" in told[2]
    other = Setting(small.data, tmp_path / "b")  # another machine, which has the file only
    rows = grid.reproduce(runs, other, tmp_path / "cub.csv", tell=told.append)
    assert sorted(calls) == sorted(runs) and list(rows) == sorted(runs, key=lambda r: (r.arm, r.seed))
    assert grid.reproduce(runs, other, tmp_path / "cub.csv") == rows and len(calls) == 4
    assert len(grid.read_rows(tmp_path / "cub.csv")) == 4


def test_a_run_that_fails_is_told_and_the_others_are_made(small, tmp_path, monkeypatch):
    real, told = experiment.perform, []

    def fails_once(run, setting):
        if run.arm == "loupe":
            raise LoupeError("training: the loss is nan")
        return real(run, setting)

    monkeypatch.setattr(grid, "perform", fails_once)
    setting = Setting(small.data, tmp_path, small.options, small.changes, small.backbone, 20, 10)
    with pytest.raises(LoupeError, match="1 of 2 runs could not be made, .*loupe_0; the same command tries them again"):
        grid.reproduce(plan(arms=["bare", "loupe"], seeds=1), setting, tmp_path / "cub.csv", tell=told.append)
    assert any("not made: training: the loss is nan" in line for line in told)
    assert [row["arm"] for row in grid.read_rows(tmp_path / "cub.csv")] == ["bare"]


def test_the_experiment_stops_where_nothing_works_and_takes_no_smaller_set(small, tmp_path, monkeypatch, capsys):
    tried = []

    def fails(run, setting):
        tried.append(run)
        raise LoupeError("the hub does not answer")

    monkeypatch.setattr(grid, "perform", fails)
    with pytest.raises(LoupeError, match="3 runs one after the other could not be made"):
        grid.reproduce(plan(), Setting(small.data, tmp_path), tmp_path / "cub.csv", tell=print)
    assert len(tried) == 3
    assert main(["reproduce", str(small.data), "--out", str(tmp_path)]) == 2
    assert "found 200 classes, 400 training and 200 test photographs; expected CUB-200-2011's 200, 5994 and 5794" in (
        capsys.readouterr().err)


def test_a_run_on_which_another_process_works_is_passed_over(small, tmp_path):
    from filelock import FileLock

    run, told = Run(PAPERS, 224, "bare", 0), []
    (tmp_path / run.name).mkdir()
    with FileLock(tmp_path / run.name / "lock"):
        context = multiprocessing.get_context("forkserver")
        with context.Pool(1) as pool:  # a lock does not hold off its own process
            told = pool.apply(lines_of, (run, small.data, tmp_path))
    assert told == ["base-22k-1k_224_bare_0: another process works on it"]


@pytest.mark.parametrize("error", [OSError(errno.ENOTSUP, "none"), NotImplementedError(),
                                   OSError(errno.EACCES, "no")])
def test_a_disk_without_locks_stops_nothing(error, tmp_path, monkeypatch):
    def refuses(self, *args, **options):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuses)
    if getattr(error, "errno", None) == errno.EACCES:  # the system's own refusal, which is told
        with pytest.raises(PermissionError), grid.locked(tmp_path / "lock"):
            pass
        return
    done = []
    with grid.locked(tmp_path / "lock", timeout=0):
        done.append(1)
    assert done


def lines_of(run, data, out) -> list[str]:
    told = []
    grid.reproduce([run], Setting(data, out), out / "cub.csv", tell=told.append)
    return told


def test_other_columns_and_a_broken_row_are_told(small, tmp_path):
    run = Run(PAPERS, 224, "bare", 0)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "row.json").write_text("{")
    with pytest.raises(LoupeError, match="found no row .*; move its folder elsewhere"):
        grid.collect(tmp_path, tmp_path / "cub.csv")
    row = {name: "" for name in COLUMNS} | dict(zip(Run._fields, run)) | FINISHED
    (tmp_path / run.name / "row.json").write_text(json.dumps(row))
    write_table(tmp_path / "cub.csv", [row | dict(arm="loupe", more=1)])
    with pytest.raises(LoupeError, match="other columns"):
        grid.collect(tmp_path, tmp_path / "cub.csv")


# ---- what may lie there


@pytest.mark.parametrize("spoil, says", [
    (lambda text: text[:-150], "line 3: found more or fewer values than"),  # a copy that broke off
    (lambda text: text[:-7], "line 3: found no card"),
    (lambda text: text.replace("loupe", "luope"), "line 3: found the run .*luope_0, which is not known here"),
    (lambda text: text.replace(",", ";"), "line 2: found no backbone"),
    (lambda text: text.replace("f0", "f", 1), "line 2: found"),
    (lambda text: text.encode("utf-16"), "found no table"),
])
def test_a_results_file_that_is_not_whole_is_told_by_its_line(tmp_path, spoil, says):
    file = tmp_path / "cub.csv"
    columns = {name: "" for name in COLUMNS} | FINISHED
    del columns["card"]
    columns |= dict(padding=100 * "x", card="a card")  # at the end, to be cut off
    write_table(file, [columns | dict(zip(Run._fields, Run(PAPERS, 224, arm, 0))) for arm in ("bare", "loupe")])
    whole = file.read_text()
    for kept in (whole, "\ufeff" + whole, whole.replace("\n", "\r\n")):  # as spreadsheets and Windows write it
        file.write_bytes(kept.encode())
        assert len(grid.collect(tmp_path, file)) == 2
    spoilt = spoil(whole)
    file.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
    with pytest.raises(LoupeError, match=says):
        grid.collect(tmp_path, file)


def test_rows_of_a_rehearsal_never_reach_the_book(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "data" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    out = str(whole[2] / "rehearsal")
    for options in (["--show"], ["--plan"], ["--show", "--results", f"{out}/cub.csv"]):
        assert main(["reproduce", "--out", out, *options]) == 2
        assert "a row of 200 test images, as a rehearsal writes them; expected 5794" in capsys.readouterr().err
    assert not list((tmp_path / "data" / "results").iterdir())
    write_table(tmp_path / "data" / "results" / "cub.csv", whole[0])  # by hand
    with pytest.raises(LoupeError, match="found a row of 200 test images, as a rehearsal writes them"):
        cub_table()


def test_a_look_at_the_table_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for options in (["--show"], ["--plan", "--arm", "bare"]):
        assert main(["reproduce", *options]) == 0
    assert not list(tmp_path.iterdir())


def test_what_a_finished_run_left_behind_is_removed(tmp_path, monkeypatch):
    """A kill between a row and the end of its states' removal, which are some gigabytes."""
    run, told = Run(PAPERS, 224, "bare", 0), []
    folder = tmp_path / run.name
    for name in ("states/epoch-0001", ".removed-states/epoch-0000", "best"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"123")
    (folder / "row.json").write_text(json.dumps({n: "" for n in COLUMNS} | dict(zip(Run._fields, run)) | FINISHED))
    assert grid.reproduce([run], Setting(tmp_path, tmp_path), tmp_path / "cub.csv", tell=told.append) and not told
    assert {path.name for path in folder.iterdir()} == {"row.json", "lock", "best"}


def test_on_a_disk_without_locks_a_machine_that_is_lost_leaves_no_mark(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    for _ in range(2):
        with grid.locked(tmp_path / "lock", timeout=0), grid.locked(tmp_path / "lock", timeout=0):
            pass


@pytest.mark.parametrize("options, says", [
    (["--precision", "fp61"], "precision='fp61'"), (["--workers", "-5"], "workers=-5"),
    (["--save-every", "0"], "--save-every 0: expected 1 or more"), (["--seeds", "0"], "--seeds 0: expected 1 or more"),
    (["--table", "nothing"], "--table 'nothing': unknown"),
])
@pytest.mark.parametrize("rehearse", [[], ["--rehearse"]])
def test_a_wrong_option_is_told_before_anything_is_fetched(tmp_path, options, says, rehearse, capsys):
    assert main(["reproduce", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *options, *rehearse]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_copy_that_is_there_already_is_used(monkeypatch, small, capsys):
    monkeypatch.setenv("LOUPE_CUB_ROOT", str(small.data))
    assert main(["reproduce"]) == 2
    assert f"{small.data}: found 200 classes, 400 training" in capsys.readouterr().err


def test_a_rehearsal_takes_the_options_of_the_machine(tmp_path, capsys):
    assert plan(arms=["bare", "bare"], backbones=[PAPERS, PAPERS], seeds=1) == plan(arms=["bare"], seeds=1)
    words = ["reproduce", "--rehearse", "--out", str(tmp_path), "--arm", "bare", "--seeds", "1"]
    assert main([*words, "--precision", "no", "--workers", "1", "--save-every", "3"]) == 0
    folder = tmp_path / "rehearsal" / "base-22k-1k_224_bare_0"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["precision"], recipe["workers"]) == ("no", 1)
    assert main(["reproduce", "--rehearse", "--out", str(tmp_path), "--table", "weights", "--plan"]) == 0
    assert "12 of 12 runs left" in capsys.readouterr().out


# ---- the whole grid in small


def test_the_whole_grid_runs_in_small(whole):
    rows, seconds, out = whole
    print(f"{len(rows)} runs in {seconds:.0f} s")
    wanted = {run for run in plan("all", seeds=2)}
    assert {grid.run_of_row(row) for row in rows} == wanted
    for row in rows:
        assert row["images"] == str(CLASSES) and len(unpack_right(row, CLASSES)) == CLASSES
        assert (row["mask_mean"] == "") == ("bare" in row["arm"]) == (row["own_accuracy"] == "")
        assert (row["last_accuracy"] == "") == (row["arm"] not in AUTHORS)
        assert (row["right_attacked"] == "") == (row["arm"] not in ("bare", "loupe"))
    assert not list((out / "rehearsal").rglob("states"))


def test_its_table_has_every_arm_and_the_verdicts_follow(whole, monkeypatch):
    rows, *_ = whole
    text = table(rows)
    assert all(f"  {arm} " in text for arm in {row["arm"] for row in rows})
    assert all(figures in text for figures in PUBLISHED.values()) and "88.06" not in table(rows, published=False)
    assert set(optimism(rows)) == set(AUTHORS) and all(value >= 0 for value in optimism(rows).values())
    ruled = [claim for claim in CLAIMS if "cub" in claim]
    for claim in ruled:
        verdict, numbers = ledger.judged(claim, "cub", rows)
        assert verdict in ("holds", "does not hold", "not decided") and numbers, claim["id"]
    monkeypatch.setattr(ledger.table, "recorded", lambda: rows)
    without = sum(claim["ground"] != "arithmetic" and "cub" not in claim for claim in CLAIMS)
    assert f"{without} not run." in ledger.counts(CLAIMS).split("CUB at full size: ")[1]


def test_rows_that_were_not_made_alike_are_told_and_time_is_that_of_the_same_card():
    rows = [row | dict(precision="bf16", commit="c", torch="t", timm="t", seconds="100") for row in made_up(0.9, 0.9)]
    assert "not all made alike" not in table(rows)
    rows[0] |= dict(precision="fp16", card="another")
    assert "not all made alike: card a card, another; precision bf16, fp16" in table(rows)
    runs, done = plan(arms=["loupe", "authors loupe"], seeds=6), {grid.run_of_row(row): row for row in rows}
    rows[0]["seconds"] = "1000"
    left = grid.remaining(runs, done, lambda run: None, "a card")
    assert left == "7 of 12 runs left, 1 of them, about 2 min", left  # none of the authors' protocol was timed
    at_384 = [row | dict(pixels="384", right=pack_right(np.zeros(5794)), accuracy="0") for row in rows]
    claim = next(claim for claim in CLAIMS if claim["id"] == "gain-base-v1")
    assert ledger.judged(claim, "cub", rows) == ledger.judged(claim, "cub", rows + at_384)


def test_without_a_run_the_table_says_so(tmp_path, capsys, monkeypatch):
    assert main(["reproduce", "--show", "--out", str(tmp_path), "--results", str(tmp_path / "cub.csv")]) == 0
    assert capsys.readouterr().out.startswith("no run is finished yet")
    monkeypatch.setattr("loupe_lab.paper.table.recorded", lambda: [])
    assert cub_table() == NOT_RUN and "not run here" in NOT_RUN


def test_what_was_run_is_listed_and_shown(whole, capsys):
    out = str(whole[2])
    assert main(["reproduce", "--rehearse", "--plan", "--out", out]) == 0
    listed = capsys.readouterr().out
    assert listed.count("  done\n") == len(whole[0]) and "0 of 58 runs left" in listed
    assert main(["reproduce", "--rehearse", "--show", "--out", out]) == 0
    assert "58 runs on " in capsys.readouterr().out


# ---- the verdicts on CUB


def made_up(a: float, b: float, spread: float = 0.002, images: int = 5794) -> list[dict]:
    """Rows of two arms, whose seeds classify these fractions of the images correctly."""
    draws, rows = np.random.default_rng(0), []
    for arm, rate in (("loupe", a), ("bare", b)):
        for seed in range(5):
            right = np.arange(images) < images * (rate + draws.normal(0, spread))
            rows.append({name: "1" for name in COLUMNS} | dict(
                backbone=PAPERS, pixels="224", arm=arm, seed=str(seed), images=str(images), card="a card",
                accuracy=str(right.mean()), right=pack_right(right), attacked=str(images),
                right_attacked=pack_right(right)))
    return rows


@pytest.mark.parametrize("gain, verdict", [(0.030, "holds"), (0.001, "does not hold"), (-0.03, "does not hold")])
def test_the_papers_gain_is_judged_by_its_interval(gain, verdict):
    claim = next(claim for claim in CLAIMS if claim["id"] == "gain-base-v1")
    rows = made_up(0.85 + gain, 0.85)
    found, ((_, number),) = ledger.judged(claim, "cub", rows)
    assert found == verdict and "5 seeds x 5794 photographs" in number.text
    assert f"{100 * difference(rows, 'loupe', 'bare')[0].mean:+.2f} points" in number.text
    assert ledger.judged(claim, "cub", []) == ("not run", []) == ledger.judged(claim, "cub", rows[:1] + rows[5:6])


def test_most_claims_have_a_rule_for_the_day_that_the_runs_are_there():
    assert sum("cub" in claim for claim in CLAIMS) >= 14


# ---- on Colab


def test_the_notebook_for_colab_runs_and_goes_on(tmp_path):
    """In small, with two arms; the second time it finds all done."""
    notebook = nbformat.read(ledger.ROOT / "scripts" / "colab" / "reproduce.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 5 and all(not cell.outputs for cell in code)
    code[1].source += f"\nARM, SEEDS, REHEARSE, OUT = ['bare', 'loupe'], 1, True, {str(tmp_path)!r}"
    for left in (2, 0):
        NotebookClient(notebook, timeout=300, resources=dict(metadata=dict(path=ledger.ROOT))).execute()
        said = ["".join(out.get("text", "") for out in cell.outputs) for cell in code]
        assert f"{left} of 2 runs left" in said[2] and "exit code: 0" in said[3]
        assert "2 runs on" in said[4] and (tmp_path / "rehearsal" / "cub.csv").is_file()
        assert not list(tmp_path.rglob("*.safetensors")), "no weights on the Drive"
