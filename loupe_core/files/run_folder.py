"""What a training keeps in its folder, and how it goes on from there."""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME

from loupe_core.errors import LoupeError, one_line
from loupe_core.files.atomic import refusals, remove, replaced, write_whole

CHECKSUMS = "checksums.json"


@dataclass
class Progress:
    """Where a training stands after its last complete epoch: what a state keeps beside weights and optimizer."""

    history: list[dict] = field(default_factory=list)  # one row per epoch
    start: dict | None = None  # the linear probe's row, of epoch 0: its validation
    best: dict | None = None  # the best row, which may be that
    best_loss: float = math.inf  # on validation
    best_weights: dict[str, torch.Tensor] | None = None
    stale: int = 0  # epochs since one was better, where the loss chooses, by `min_delta`

    def add(self, row: dict, model: torch.nn.Module, recipe: Any) -> bool:
        """Takes a complete epoch in; whether it is the best so far."""
        self.history.append(row)
        return self.compare(row, model, recipe)

    def compare(self, row: dict, model: torch.nn.Module, recipe: Any) -> bool:
        """Whether a row is the best so far by the `Recipe`, as all are without a validation split; then its weights are
        kept.
        """
        if "val_loss" not in row:
            better = moved = True
        elif recipe.choose == "loss":
            better, moved = (row["val_loss"] < self.best_loss - least for least in (0, recipe.min_delta))
        else:
            better = moved = self.best is None or max((self.best, row), key=_accuracy) is row
        self.stale = 0 if moved else self.stale + 1
        if better:
            self.best, self.best_loss = row, row.get("val_loss", math.inf)
            if "val_loss" in row or recipe.ema:
                self.best_weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        return better


def _accuracy(row: dict) -> tuple[float, float]:
    """What is higher in a better row, where accuracy chooses: of the same accuracy, the lower loss."""
    return row["val_accuracy"], -row["val_loss"]


class RunFolder:
    """`best/` (`from_pretrained` reads it), `states/` (the two newest complete epochs, with checksums of their files),
    `log.jsonl`, `recipe.json`, and `run.json` with the model's configuration and the images of training and validation.

    Each is whole, or as it was before, whenever the process ends. Of several processes the main one writes; Accelerate
    lets the others add their part of a state.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator

    def states(self) -> list[Path]:
        """The folders of complete epochs, oldest first."""
        return sorted((self.path / "states").glob("epoch-*"))

    def kept(self) -> str:
        """For the end of a line that tells of a stop: what is kept; empty where nothing is."""
        states = self.states()
        return f"; {int(states[-1].name[6:])} complete epochs are kept in {self.path}: resume" if states else ""

    def begin(self, recipe: dict, run: dict, overwrite: bool) -> None:
        """Begins a new run.

        Args:
            recipe, run: For `recipe.json` and `run.json`.
            overwrite: Begin in the place of an earlier run.

        Raises:
            LoupeError: The folder holds a run, or a folder of another's with a name that a run needs; or it cannot be
                made.
        """
        for name, ours in (("best", "config.json"), ("states", "epoch-*")):
            folder = self.path / name
            # os.path: a name that the system refuses is told below
            if os.path.isdir(folder) and any(folder.iterdir()) and not any(folder.glob(ours)):
                raise LoupeError(f"{folder}: found a folder that no training wrote, where one would keep its own; give "
                                 "another --out")
        there = [name for name in ("states", "best", "recipe.json") if os.path.exists(self.path / name)]
        if there and not overwrite:
            done = "nothing kept yet: it was stopped, or runs now" if there == ["recipe.json"] else there[0]
            if (log := self.path / "log.jsonl").is_file():
                done = f"{len(log.read_bytes().splitlines())} epochs"
            raise LoupeError(f"{self.path}: found a training here already ({done}); expected an empty or a new folder: "
                             "go on with --resume, begin again in its place with --overwrite, or give another --out")
        self.accelerator.wait_for_everyone()  # or a slower process would find what the main one now writes
        if self.accelerator.is_main_process:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                remove(self.path / "states")
                write_whole(self.path / "recipe.json", json.dumps(recipe, indent=1) + "\n")
                write_whole(self.path / "run.json", json.dumps(run, indent=1) + "\n")
            except OSError as e:
                raise LoupeError(f"{self.path}: this folder cannot be made or written to ({e.strerror or e}); give "
                                 "another --out") from e

    def check(self, run: dict, there: object, recipe: object) -> None:
        """Compares a run that is to go on with the one that was begun here.

        Args:
            run: As for `begin`.
            there, recipe: The recipe that was begun with, and that of now, dataclasses.

        Raises:
            LoupeError: The model, the images, how they are shown, or the recipe differ; the line says in what.
        """
        for name, value in vars(recipe).items():
            if name not in ("workers", "compile") and getattr(there, name) != value:
                raise LoupeError(f"resume: {self.path / 'recipe.json'} has {name}={getattr(there, name)!r}, the recipe "
                                 f"now has {value!r}; expected the same: resume with the old value or use a new folder")
        try:
            begun = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return  # begun before these were kept
        except (OSError, ValueError) as e:
            raise LoupeError(f"{self.path / 'run.json'}: cannot be read ({one_line(e)}); expected what a training "
                             "wrote: use a new folder") from e
        now = json.loads(json.dumps(run))  # tuples become lists
        for name, value in now["model"].items():
            if value != begun["model"].get(name):
                raise LoupeError(f"resume: {self.path} was begun with "
                                 f"{_difference(name, begun['model'].get(name), value)}; expected the same model: give "
                                 "the old options, or use a new folder")
        before, after = begun.get("shown") or {}, now.get("shown") or {}
        if before != after:
            told = ["a second look" + "".join(f", {name} {value}" for name, value in each.items() if name in before
                                              and name in after and before[name] != after[name])
                    if each else "no second look" for each in (before, after)]
            raise LoupeError(f"resume: {self.path} was begun with {told[0]}, this one has {told[1]}; expected the "
                             "same: give --magnify and its options as then, or use a new folder")
        for part in ("train", "val"):
            before, after = set(begun[part]), set(now[part])
            if before != after:
                example = sorted(before ^ after)[0]
                raise LoupeError(f"resume: {self.path} was begun with other {part} images: {len(after - before)} are "
                                 f"new, {len(before - after)} are gone ({example}, ...); expected the same: bring them "
                                 "back, or use a new folder")

    def load(self) -> dict:
        """Loads the newest state into what Accelerate has prepared; returns what `keep` was given with it.

        Raises:
            LoupeError: The state cannot be read.
        """
        newest = self.states()[-1]
        if damaged := damaged_file(newest):
            raise self.unreadable(damaged)
        try:
            # not register_for_checkpointing, which would unpickle, and so execute, whatever lies in the folder
            own = torch.load(newest / "trainer.pt", map_location="cpu", weights_only=True)
            scaler = self.accelerator.scaler
            if not (newest / SCALER_NAME).is_file():  # begun in another precision than fp16, which begins its scale
                self.accelerator.scaler = None
            try:
                self.accelerator.load_state(str(newest))
            finally:
                self.accelerator.scaler = scaler
            return own
        except Exception as e:  # whatever a reader of broken bytes may raise
            raise self.unreadable(e) from e

    def unreadable(self, error: Exception | str) -> LoupeError:
        """What to raise where the newest state does not hold what it should."""
        states = self.states()
        found = error if isinstance(error, str) else f"{type(error).__name__}: {one_line(error)}"
        then = "resume from the one before" if len(states) > 1 else "begin again in another folder: it is the only one"
        return LoupeError(f"{states[-1]}: this state cannot be read ({found}); move its folder elsewhere and {then}")

    def keep(self, model: torch.nn.Module, own: dict, epoch: int, better: bool, whole: bool = True) -> None:
        """Writes log, best model (where it is `better`) and state (where it is `whole`).

        Args:
            own: What Accelerate's state does not hold; with `history`, the rows of the log.
            epoch: Counted from 1.

        Raises:
            LoupeError: The disk is full, or refuses in another way; what was there before is intact.
        """
        unfinished, states = self.path / "unfinished-state", self.path / "states"
        main = self.accelerator.is_main_process
        try:
            with refusals(self.path):
                if main:
                    if better:
                        self.keep_best(model)
                    write_whole(self.path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in own["history"]))
                    remove(unfinished)  # of a process that was killed while it wrote
                self.accelerator.wait_for_everyone()
                if not whole:
                    return
                self.accelerator.save_state(str(unfinished))
                if main:
                    torch.save(own, unfinished / "trainer.pt")
                self.accelerator.wait_for_everyone()  # every process writes its part of the state
                if main:
                    write_checksums(unfinished)
                    states.mkdir(exist_ok=True)
                    os.replace(unfinished, states / f"epoch-{epoch:04d}")
                    for old in self.states()[:-2]:
                        remove(old)
                self.accelerator.wait_for_everyone()
        except OSError as e:
            with suppress(OSError):
                remove(unfinished)
            raise LoupeError(f"{self.path}: epoch {epoch} could not be written ({e.strerror or e}); the states before "
                             "it are intact: free some space and resume") from e

    def keep_best(self, model: torch.nn.Module) -> None:
        """Writes `best/`."""
        with replaced(self.path / "best") as folder:
            model.save_pretrained(folder)


def other_machine(before: dict, now: dict) -> str:
    """In words, how a run goes on otherwise than it was begun.

    Args:
        before, now: `steps` of an epoch, and `precision`.
    """
    changes = []
    if before["steps"] != now["steps"]:
        changes.append(f"{now['steps']} steps per epoch, as more or fewer processes share it (it was begun with "
                       f"{before['steps']}; the learning rate goes on at its epoch's place)")
    if before["precision"] != now["precision"]:
        changes.append(f"precision {now['precision']} (it was begun with {before['precision']})")
    return "this run goes on with " + " and ".join(changes) + ": it ends elsewhere than an uninterrupted one"


def check_processes(accelerator: Accelerator) -> None:
    """Raises LoupeError where several processes were started, as by torchrun, and Accelerate does not join them, which
    it does on a processor only when it is told to: each would train alone, into the folder of the others.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdigit() and int(started) > 1 == accelerator.num_processes:
        raise LoupeError(f"training: found {started} processes that Accelerate does not join on {accelerator.device}; "
                         "set ACCELERATE_USE_CPU=true, or start one process")


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json` into a folder: file -> SHA-256 of what it holds. It takes about 0.7 s per GB."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    write_whole(folder / CHECKSUMS, json.dumps(sums, indent=1) + "\n")


def damaged_file(folder: Path) -> str | None:
    """What is wrong with the first file that is not as `write_checksums` saw it; None where nothing is known."""
    if not (folder / CHECKSUMS).is_file():
        return None
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, checksum in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _checksum(folder / name) != checksum:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError, TypeError) as e:
        return f"{CHECKSUMS}: {one_line(e)}"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(name: str, before: object, after: object) -> str:
    if name == "class_names" and before and after:
        k = next((k for k, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), min(len(before), len(after)))
        before, after = (names[k] if k < len(names) else "none" for names in (before, after))
        name = f"class {k}"
    return f"{name} {before!r}, this one has {after!r}"


def best_of(checkpoint: str) -> str:
    """A checkpoint's name as it is given; for the folder of a run, its `best/`."""
    folder = Path(checkpoint)
    inner = not (folder / "config.json").is_file() and (folder / "best" / "config.json").is_file()
    return str(folder / "best") if inner else checkpoint


def run_of(checkpoint: str | Path) -> dict:
    """What a training kept beside its checkpoint: `model`, its configuration; `cut`, the seed and the fractions of its
    splits; `train` and `val`, the identities of its images. Empty where it kept none.

    Args:
        checkpoint: A run's `best/`, or the run's folder.
    """
    for folder in (Path(checkpoint), Path(checkpoint).parent):
        try:
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(run, dict):
            return run
    return {}


def trained_on(checkpoint: str | Path, *parts: str) -> set[str]:
    """The identities of the images that a training kept beside its checkpoint; empty where it kept none.

    Args:
        checkpoint: A run's `best/`, or the run's folder.
        parts: "train", "val".
    """
    run = run_of(checkpoint)
    return {str(identity) for part in parts for identity in run.get(part, [])}
