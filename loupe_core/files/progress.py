"""How far something long has come: a bar on a terminal and in a notebook, a line at each tenth in a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many bytes more are there; it shows this on stderr.

    A bar that is drawn over and over would fill a log with itself, and no bar at all, which is tqdm's answer where
    stderr is no terminal, leaves a notebook and a cluster's log silent for the half hour that a gigabyte may take.

    Args:
        what: Its name.
        total: Bytes in all.
        done: Bytes that were there before.
    """
    notebook = type(sys.stderr).__module__.startswith("ipykernel")  # no terminal, but it draws bars
    if notebook or sys.stderr.isatty():
        with tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True) as bar:
            yield bar.update
    else:
        yield _Lines(what, total, done).update


class _Lines:
    """One line on stderr at each tenth that was passed."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.done = what, max(total, 1), done
        self.told = 10 * done // self.total

    def update(self, more: int) -> None:
        self.done += more
        if (tenth := 10 * self.done // self.total) > self.told:
            self.told = tenth
            print(f"{self.what}: {10 * tenth} % ({self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB)",
                  file=sys.stderr, flush=True)
