"""Files and folders that are whole, or as they were before, whenever the process ends."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or a folder to; it takes the place of `path` when the block ends.

    Where the block raises, what it wrote is removed and `path` is as before. A process that is killed in the block may
    leave `unfinished-<name>` behind; the next one replaces it.

    Raises:
        OSError: as the file system has it.
    """
    path = Path(path)
    beside = path.with_name(f"unfinished-{path.name}")
    remove(beside)
    try:
        yield beside
        if beside.is_dir():
            remove(path)
        os.replace(beside, path)
    except BaseException:  # Ctrl-C too
        remove(beside)
        raise


def write_whole(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8, or leaves the old file as it was.

    Raises:
        OSError: as the file system has it.
    """
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there; at no moment half of a folder lies under its own name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    old = path.with_name(f".removed-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    shutil.rmtree(old)
