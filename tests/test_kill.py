"""Trainings that are killed at random moments, also in the middle of a write, and gone on with: nothing is lost.

A child process trains the toy model of test_trainer.py and is killed with SIGKILL, either some time after its first
step or at one of the operations on files that it makes. Others go on with the same folder until the run is complete.
LOUPE_KILLS sets how many are killed (20); LOUPE_KILL_SEED the seed of the moments (0).
"""

import hashlib
import json
import os
import random
import signal
import sys
import time

import nbformat
import papermill
import pytest
import torch
from helpers import FORKS
from nbclient.exceptions import DeadKernelError
from test_trainer import RECIPE, TRAIN, VAL, tiny_model

from loupe_core import Recipe, Trainer
from loupe_core.cli import main
from loupe_core.files.run_folder import RunFolder
from loupe_core.files.signals import Stopped
from loupe_lab.birds.fieldguide import species_of, write_fieldguide

KILLS, SEED = int(os.environ.get("LOUPE_KILLS", 20)), int(os.environ.get("LOUPE_KILL_SEED", 0))
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def child(folder: str, die_at: int | None, connection) -> None:
    """Trains in `folder`, or goes on there; ends itself at its `die_at`-th operation on a file of it."""
    torch.set_num_threads(1)
    seen = [0]

    def count(event, args):
        if event in FILE_EVENTS and any(str(a).startswith(folder) for a in args[:2]):
            seen[0] += 1
            if seen[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    trainer = Trainer(tiny_model(), Recipe(**RECIPE), folder, progress=False)
    real = trainer._train_epoch
    trainer._train_epoch = lambda *args: (connection.send("begun"), real(*args))[1]
    trainer.fit(TRAIN, VAL, resume=True)
    connection.send((digest(trainer.model), seen[0]))


def digest(model) -> str:
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(v.numpy().tobytes() for _, v in state)).hexdigest()


def train(folder, die_at=None, after=None) -> tuple:
    """The exit code of a child, and what it sent last. `after`: seconds from its first step to SIGKILL."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=child, args=(str(folder), die_at, theirs))
    process.start()
    theirs.close()
    last = None
    try:
        if after is not None and ours.poll(60):
            last = ours.recv()  # "begun", or the result where nothing was left to train
            time.sleep(after)
            process.kill()
        while True:
            last = ours.recv()
    except EOFError:
        process.join()
    return process.exitcode, last


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its digest, its operations on files, its seconds from the first step on, its folder."""
    folder = tmp_path_factory.mktemp("whole")
    code, (of_weights, operations) = train(folder)
    assert code == 0
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return of_weights, operations, sum(row["seconds"] for row in log), folder


def best_of(folder) -> bytes:
    return (folder / "best" / "model.safetensors").read_bytes()


def rows_of(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_killed_at_any_moment_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, whole):
    of_weights, operations, seconds, folder = whole
    draws = random.Random(SEED)
    killed = done = 0
    while killed < KILLS:
        out = tmp_path / f"run{done}"
        code = last = None
        while code != 0:  # each process of this run is killed too, until all kills are used up or one comes through
            moment = {}
            if killed < KILLS:
                moment = draws.choice([dict(die_at=draws.randrange(1, operations)),
                                       dict(after=draws.uniform(0, 1.3 * seconds))])
            code, last = train(out, **moment)
            assert code in (0, -signal.SIGKILL), (moment, code)
            killed += code != 0
        assert last[0] == of_weights, moment
        assert rows_of(out) == rows_of(folder)
        assert sorted(p.name for p in out.iterdir() if not p.name.startswith(("unfinished-", ".removed-"))) == [
            "best", "log.jsonl", "recipe.json", "run.json", "states"]
        assert best_of(out) == best_of(folder)
        done += 1
    print(f"{killed} kills in {done} runs, seed {SEED}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_write_waits_until_the_state_is_whole(tmp_path, monkeypatch, number, whole):
    before = signal.getsignal(number)
    real = RunFolder.keep

    def signalled(self, model, own, epoch, *rest):
        if epoch == 2:
            os.kill(os.getpid(), number)
        real(self, model, own, epoch, *rest)

    monkeypatch.setattr(RunFolder, "keep", signalled)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the children
    trainer = Trainer(tiny_model(), Recipe(**RECIPE), tmp_path, progress=False)
    with pytest.raises(Stopped, match=f"stopped by {number.name} after 2 epochs; 2 complete epochs are kept") as caught:
        trainer.fit(TRAIN, VAL)
    assert caught.value.signal == number and signal.getsignal(number) is before
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["epoch-0001", "epoch-0002"]
    monkeypatch.undo()
    trainer.fit(TRAIN, VAL, resume=True)  # the same Trainer may go on
    torch.set_num_threads(threads)
    assert digest(trainer.model) == whole[0]


def command(folder: str, connection) -> None:
    """`loupe train` in a process of its own; sends "begun" when the first epoch is kept, and then its exit code."""
    torch.set_num_threads(1)
    real = Trainer._end_epoch

    def told(self, *args):
        real(self, *args)
        connection.send("begun")

    Trainer._end_epoch = told
    sys.stderr = open(folder + "/errors", "w")
    code = main(["train", folder + "/birds", "--out", folder + "/run", "--epochs", "500", "--patience", "500"])
    sys.stderr.close()
    connection.send(code)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_line_stops_in_one_line_and_keeps_what_it_has(tmp_path, number):
    write_fieldguide(tmp_path / "birds", species_of(1), train=3, test=1, size=112)
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=command, args=(str(tmp_path), theirs))
    process.start()
    assert ours.poll(120) and ours.recv() == "begun"
    os.kill(process.pid, number)
    while (last := ours.recv()) == "begun":
        pass
    process.join()
    assert last == 128 + number
    last_line = (tmp_path / "errors").read_text().strip().splitlines()[-1]
    assert last_line.startswith(f"loupe: training: stopped by {number.name} after ") and "resume" in last_line
    assert list((tmp_path / "run" / "states").iterdir())


def test_a_notebook_whose_kernel_dies_goes_on_when_papermill_runs_it_again(tmp_path, whole):
    source = f"""
import os, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_kill import digest
from test_trainer import RECIPE, TRAIN, VAL, Recipe, Trainer, tiny_model

torch.set_num_threads(1)
trainer = Trainer(tiny_model(), Recipe(**RECIPE), OUT, progress=False)
real = trainer._train_epoch

def mortal(epoch, *rest):
    if epoch == DIES_IN:
        os.kill(os.getpid(), 9)
    print("trains epoch", epoch + 1)
    return real(epoch, *rest)

trainer._train_epoch = mortal
trainer.fit(TRAIN, VAL, resume=True)
print(digest(trainer.model))
"""
    cells = [nbformat.v4.new_code_cell('OUT, DIES_IN = "", -1', metadata=dict(tags=["parameters"])),
             nbformat.v4.new_code_cell(source)]
    kernel = dict(kernelspec=dict(name="python3", language="python", display_name="Python 3"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "page.ipynb")

    def run(**parameters) -> str:
        done = papermill.execute_notebook(tmp_path / "page.ipynb", tmp_path / "done.ipynb", progress_bar=False,
                                          parameters=dict(OUT=str(tmp_path / "run")) | parameters)
        return "".join(output.text for output in done.cells[-1].outputs)

    with pytest.raises(DeadKernelError):
        run(DIES_IN=2)
    assert run() == f"trains epoch 3\ntrains epoch 4\n{whole[0]}\n"
