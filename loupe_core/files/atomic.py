"""Files and folders that are whole, or as they were before, whenever the process ends."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# of torch.save and of safetensors, where a file cannot be written
_REFUSED = re.compile(r"inline_container|PytorchStreamWriter|Error while serializing: I/?O ?error", re.IGNORECASE)


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or a folder to; it takes the place of `path` when the block ends.

    Where the block raises, what it wrote is removed and `path` is as before. A process that is killed in the block may
    leave `unfinished-<name>` behind; the next one replaces it.

    Raises:
        OSError: as the file system has it, with `path` as its file name; see `refusals`.
    """
    path = Path(path)
    beside = path.with_name(f"unfinished-{path.name}")
    with refusals(path, beside):
        remove(beside)
        try:
            yield beside
            if beside.is_dir():
                remove(path)
            os.replace(beside, path)
        except BaseException:  # Ctrl-C too
            with suppress(OSError):
                remove(beside)
            raise


@contextmanager
def refusals(path: Path, beside: Path | None = None) -> Iterator[None]:
    """What torch and safetensors raise where a file cannot be written becomes an OSError, as of Python's own files.

    Each OSError that names no file, or one in `beside`, names `path`.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not _REFUSED.search(str(error)):
            raise
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        # torch keeps the system's reason to itself
        raise OSError(errno.EIO, "not all of it could be written; is the disk full?", str(path)) from error
    except OSError as error:
        named = error.filename
        if named is None or beside is not None and str(named).startswith(str(beside)):
            error.filename = str(path)
        raise


def write_whole(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8, or leaves the old file as it was.

    A name's bytes that are no text, which Python holds as U+DC80 to U+DCFF, are written in ASCII: a backslash, "udc80".

    Raises:
        OSError: as the file system has it.
    """
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there; at no moment half of a folder lies under its own name.

    A folder's files are emptied first: some disks, such as Google Drive, keep for weeks what was removed, at its size.
    """
    old = path.with_name(f".removed-{path.name}")
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    else:
        path.unlink(missing_ok=True)
        if not old.is_dir():  # of a process that was killed while it removed
            return
    for file in old.rglob("*"):
        with suppress(OSError):  # such as one that is read-only, which may be removed all the same
            if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                os.truncate(file, 0)
    shutil.rmtree(old)
