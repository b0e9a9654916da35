"""What a training keeps in its folder, and how it goes on from there."""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from loupe_core.errors import LoupeError, one_line
from loupe_core.files.atomic import remove, replaced, write_whole


class RunFolder:
    """`best/` (`from_pretrained` reads it), `states/` (the two newest complete epochs), `log.jsonl` and `recipe.json`.

    Each is whole, or as it was before, whenever the process ends. Of several processes the main one writes; Accelerate
    lets the others add their part of a state.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator

    def states(self) -> list[Path]:
        """The folders of complete epochs, oldest first."""
        return sorted((self.path / "states").glob("epoch-*"))

    def begin(self, recipe: dict) -> None:
        """Begins a new run, in the place of the states of an earlier one."""
        if self.accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            remove(self.path / "states")
            write_whole(self.path / "recipe.json", json.dumps(recipe, indent=1) + "\n")

    def load(self) -> dict:
        """Loads the newest state into what Accelerate has prepared; returns what `keep` was given with it.

        Raises:
            LoupeError: The state cannot be read.
        """
        newest = self.states()[-1]
        try:
            # not register_for_checkpointing, which would unpickle, and so execute, whatever lies in the folder
            own = torch.load(newest / "trainer.pt", map_location="cpu", weights_only=True)
            self.accelerator.load_state(str(newest))
            return own
        except Exception as e:  # whatever a reader of broken bytes may raise
            raise LoupeError(f"{newest}: this state cannot be read ({type(e).__name__}: {one_line(e)}); move its "
                             "folder elsewhere and resume from the one before") from e

    def keep(self, model: torch.nn.Module, own: dict, epoch: int, better: bool) -> None:
        """Writes log, best model (where it is `better`) and state.

        Args:
            own: What Accelerate's state does not hold; with `history`, the rows of the log.
            epoch: Counted from 1.

        Raises:
            LoupeError: The disk is full, or refuses in another way; what was there before is intact.
        """
        unfinished, states = self.path / "unfinished-state", self.path / "states"
        main = self.accelerator.is_main_process
        try:
            if main:
                if better:
                    self.keep_best(model)
                write_whole(self.path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in own["history"]))
                remove(unfinished)  # of a process that was killed while it wrote
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(unfinished))
            if main:
                torch.save(own, unfinished / "trainer.pt")
            self.accelerator.wait_for_everyone()  # every process writes its part of the state
            if main:
                states.mkdir(exist_ok=True)
                os.replace(unfinished, states / f"epoch-{epoch:04d}")
                for old in self.states()[:-2]:
                    shutil.rmtree(old)
            self.accelerator.wait_for_everyone()
        except OSError as e:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise LoupeError(f"{self.path}: epoch {epoch} could not be written ({e.strerror or e}); the states before "
                             "it are intact: free some space and resume") from e

    def keep_best(self, model: torch.nn.Module) -> None:
        """Writes `best/`."""
        with replaced(self.path / "best") as folder:
            model.save_pretrained(folder)
