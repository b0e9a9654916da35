"""CUB-200-2011 from CaltechDATA: fetched, compared, unpacked, and only then there."""

import errno
import socket
import tarfile
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from torch.hub import download_url_to_file
from torchvision.datasets.utils import check_integrity

from loupe_core.errors import LoupeError, one_line


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


_NOTHING_KEPT = "nothing was kept, mend this and try again"
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

    Args:
        root: The folder that holds images.txt, or its parent, or where to put CUB_200_2011.
        segmentations: Fetch the bird outlines as well (39 MB), into CUB_200_2011/segmentations.

    Raises:
        LoupeError: No connection, another file than the published one, something in the way, or a full disk. Nothing
            half-made is left.
    """
    base = find_cub(root) or _fetch(CUB_ARCHIVE, Path(root))
    if segmentations and not (base / "segmentations").is_dir():
        _fetch(SEGMENTATIONS_ARCHIVE, base)
    return base


def _fetch(archive: Archive, root: Path) -> Path:
    """Download and unpack beside the target, then rename: the target is complete or absent."""
    target = root / archive.folder
    if target.exists():
        raise LoupeError(f"{target}: found another folder or file in the way; move it away and try again")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".unfinished-") as scratch:
            file, unpacked = f"{scratch}/archive.tgz", Path(scratch, "unpacked")
            waits = socket.getdefaulttimeout()
            socket.setdefaulttimeout(60)  # seconds without a byte
            try:
                # (not torchvision's download_url, which asks twice and falls back from https to http)
                download_url_to_file(archive.url, file)
            finally:
                socket.setdefaulttimeout(waits)
            if not check_integrity(file, archive.md5):
                raise LoupeError(f"{archive.url}: found a file with another md5 than {archive.md5}; {_NOTHING_KEPT}")
            with tarfile.open(file, "r:gz") as tar:
                # no links or paths that lead out, no set-uid bits; Python 3.11.3 lacks it
                tar.extraction_filter = getattr(tarfile, "data_filter", lambda entry, path: entry)
                tar.extractall(unpacked)
            if not (unpacked / archive.folder).is_dir():
                raise LoupeError(f"{archive.url}: found no folder {archive.folder} in the archive; {_NOTHING_KEPT}")
            (unpacked / archive.folder).rename(target)
    except LoupeError:
        raise
    except (OSError, HTTPException, tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            need = 2.1 * archive.size / 1e9  # the archive and what comes out of it
            raise LoupeError(f"{root}: disk full, expected {need:.1f} GB free; {_NOTHING_KEPT}") from None
        raise LoupeError(f"{archive.url}: not fetched into {root}: {one_line(error)}; {_NOTHING_KEPT}") from None
    return target
