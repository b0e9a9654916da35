"""CUB-200-2011 from CaltechDATA: fetched by one process, gone on with where it broke, compared, unpacked, and only
then there."""

import errno
import gzip
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from torchvision.datasets.utils import check_integrity

from loupe_core.errors import LoupeError, one_line
from loupe_core.files.atomic import remove
from loupe_core.files.folders import size_of
from loupe_core.files.progress import progress

_SILENCE = 60  # seconds without a byte, until a server counts as gone
_BLOCK = 1 << 18  # bytes that are read at once, at most
_NOTHING_KEPT = "nothing was kept, mend this and try again"


def find_cub(root: str | Path) -> Path | None:
    """The folder of CUB's lists: `root`, its CUB_200_2011, or else the only one up to two folders down; or None."""
    root = Path(root)
    for folder in (root, root / "CUB_200_2011"):
        if (folder / "images.txt").is_file():
            return folder
    lists = [path for depth in ("*", "*/*") for path in root.glob(f"{depth}/images.txt")]
    below = [path.parent for path in lists if path.with_name("classes.txt").is_file()]
    return below[0] if len(below) == 1 else None


class Archive(NamedTuple):
    """A .tgz that is published with its md5; `folder` is what is kept of it."""

    folder: str
    url: str
    md5: str
    size: int  # bytes


CUB_ARCHIVE = Archive(
    "CUB_200_2011",
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
    "97eceeb196236b17998738112f37df78",
    1_150_585_339,
)
SEGMENTATIONS_ARCHIVE = Archive(
    "segmentations",
    "https://data.caltech.edu/records/w9d68-gec53/files/segmentations.tgz?download=1",
    "4d47ba1228eae64f2fa547c47bc65255",
    39_272_883,
)


def download_cub(root: str | Path, segmentations: bool = False) -> Path:
    """Fetch CUB-200-2011 from CaltechDATA into `root` unless it is there; return the folder of images.txt.

    The photographs are for non-commercial research. About 2.4 GB must be free while it runs, half of it afterwards. The
    md5 is compared before anything is unpacked, and the folder appears only when it is complete.

    Several processes may ask at once, those of torchrun or of an array job on a shared disk: one fetches, the others
    wait for a lock beside the folder. What had arrived when a connection broke, or when the process was stopped or
    killed, stays in CUB_200_2011.tgz.part, and the next call goes on from there.

    Args:
        root: The folder that holds images.txt, or its parent, or where to put CUB_200_2011.
        segmentations: Fetch the bird outlines as well (39 MB), into CUB_200_2011/segmentations.

    Raises:
        LoupeError: No connection, another file than the published one, something in the way, too little room on the
            disk. The line says what was kept of the archive, and where; of the set itself nothing half-made is left.
    """
    base = _once(CUB_ARCHIVE, Path(root), lambda: find_cub(root))
    if segmentations:
        outlines = base / SEGMENTATIONS_ARCHIVE.folder
        _once(SEGMENTATIONS_ARCHIVE, base, lambda: outlines if outlines.is_dir() else None)
    return base


def _once(archive: Archive, root: Path, find: Callable[[], Path | None]) -> Path:
    """What `find` gives; while that is None, one process fetches the archive, and others that ask wait for it."""
    if (found := find()) is not None:
        return found
    part = root / f"{archive.folder}.tgz.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # The system lets go of it when its process ends, also by kill -9. It needs no torch.distributed, which is not
        # begun yet, and it also holds between the jobs of an array.
        lock = FileLock(root / f".{archive.folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting: another process fetches {archive.folder} into {root}", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            found = find() or _fetch(archive, root, part)  # whoever waited finds it
            with suppress(OSError):  # nobody needs it any more, whoever has it open
                os.unlink(lock.lock_file)
            return found
        finally:
            lock.release()
    except LoupeError:
        raise
    except (OSError, HTTPException, tarfile.TarError, EOFError, zlib.error, ValueError, NotImplementedError) as error:
        kept = f"{part} keeps {_gigabytes(part)} of {archive.size / 1e9:.2f} GB, try again and it goes on from there" \
            if part.exists() else _NOTHING_KEPT
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise LoupeError(f"{root}: disk full, expected {_room(archive, part) / 1e9:.1f} GB free; {kept}") from None
        raise LoupeError(f"{archive.url}: not fetched into {root}: {one_line(error)}; {kept}") from None


def _fetch(archive: Archive, root: Path, part: Path) -> Path:
    """Download and unpack beside the target, then rename: the target is complete or absent."""
    target = root / archive.folder
    if target.exists():
        raise LoupeError(f"{target}: found another folder or file in the way; move it away and try again")
    if (free := shutil.disk_usage(root).free) < (need := _room(archive, part)):
        raise LoupeError(f"{root}: found {free / 1e9:.1f} GB free, expected {need / 1e9:.1f} GB, for the archive and "
                         "what comes out of it; make room, or choose another folder")
    begun = part.exists()
    _download(archive, part)
    if begun and not check_integrity(part, archive.md5):  # what was there was of another file, or damaged since
        part.unlink()
        _download(archive, part)
    if not check_integrity(part, archive.md5):
        part.unlink(missing_ok=True)
        raise LoupeError(f"{archive.url}: found a file with another md5 than {archive.md5}; {_NOTHING_KEPT}")
    unpacked = root / f".unfinished-{archive.folder}"
    try:
        remove(unpacked)  # of a process that was killed
        with tarfile.open(part, "r:gz") as tar:
            # no links or paths that lead out, no set-uid bits; Python 3.11.3 lacks it
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda entry, path: entry)
            tar.extractall(unpacked)
        if not (unpacked / archive.folder).is_dir():
            raise LoupeError(f"{archive.url}: found no folder {archive.folder} in the archive; {_NOTHING_KEPT}")
        (unpacked / archive.folder).rename(target)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError):
        part.unlink()  # it is what was published, and no use
        raise
    finally:
        with suppress(OSError):
            remove(unpacked)
    part.unlink()
    return target


def _download(archive: Archive, part: Path) -> None:
    """Fetches what `part` lacks, or all of it where the server cannot begin in the middle; the md5 decides later.

    (huggingface_hub's `http_get` goes on as well, but it is not public, knows no file:// and refuses to work where
    HF_HUB_OFFLINE is set; torch's, torchvision's and pooch's downloads begin anew.)
    """
    have = max(size_of(str(part)), 0)
    if have >= archive.size:
        return
    request = Request(archive.url, headers={"User-Agent": "loupe"} | ({"Range": f"bytes={have}-"} if have else {}))
    with urlopen(request, timeout=_SILENCE) as answer:
        start = have if getattr(answer, "status", None) == 206 else 0  # 206: a part, from there
        length = answer.headers.get("Content-Length")
        size = start + int(length) if length else archive.size
        if size != archive.size:  # a page that asks for a login, say: it must not take the place of what is there
            raise LoupeError(f"{archive.url}: found a file of {size:,} bytes, expected {archive.size:,}; "
                             + (f"{part} is as it was" if have else _NOTHING_KEPT))
        with open(part, "ab") as file, progress(archive.folder, archive.size, start) as told:
            file.truncate(start)
            while block := answer.read1(_BLOCK):  # what has arrived, and no waiting for more
                file.write(block)
                told(len(block))
    if size_of(str(part)) < archive.size:
        raise ConnectionError("the connection ended too early")


def _room(archive: Archive, part: Path) -> float:
    """Bytes that must be free: for the rest of the archive, and for what comes out of it, which is a little more."""
    return 2.1 * archive.size - max(size_of(str(part)), 0)


def _gigabytes(path: Path) -> str:
    return f"{max(size_of(str(path)), 0) / 1e9:.2f}"
