"""Photographs that are missing or cannot be read: all of them are told at once, before a long run begins."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from loupe_core.errors import LoupeError
from loupe_core.files.images import open_image

_BATCH = 16  # photographs that a process reads before it reports


def check_photographs(root: str | Path, paths: Sequence[str], read: bool = False) -> None:
    """Looks whether photographs are there, in 0.03 s for CUB's 11,788; with `read`, also whether each can be decoded.

    Reading takes as long as an epoch's decoding on all processors; a bar on stderr shows where it is, and then come the
    photographs that cannot be read, each in a line.

    Raises:
        LoupeError: Some are missing, or cannot be read: how many of how many.
    """
    gone = [path for path in paths if not os.path.isfile(path)]
    if gone:
        listed = ", ".join(os.path.relpath(path, root) for path in gone[:3]) + (", ..." if len(gone) > 3 else "")
        raise LoupeError(f"{root}: {len(gone)} of {len(paths)} listed photographs are missing ({listed}); expected all "
                         "of them: unpack or copy the set again")
    if not read:
        return
    workers = min(8, os.cpu_count() or 1) if len(paths) > 20 * _BATCH else 0  # a process takes a while to start
    loader = DataLoader(_Faults(paths), _BATCH, collate_fn=list, num_workers=workers)
    faults = []
    with tqdm(total=len(paths), desc="reading photographs", disable=None) as bar:
        for batch in loader:
            faults += filter(None, batch)
            bar.update(len(batch))
    for fault in faults:
        print(f"loupe: {fault}", file=sys.stderr)
    if faults:
        raise LoupeError(f"{root}: {len(faults)} of {len(paths)} photographs cannot be read, the lines above say why; "
                         "mend or replace them, or move them out of the folder")


class _Faults(Dataset):
    """What is wrong with each photograph: a line, or None."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> str | None:
        try:
            open_image(self.paths[i])
        except LoupeError as error:
            return str(error)
        return None
