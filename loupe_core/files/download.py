"""CUB-200-2011 from CaltechDATA: fetched, compared, unpacked, and only then there."""

import errno
import hashlib
import tarfile
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.request import Request, urlopen

from tqdm import tqdm

from loupe_core.errors import LoupeError


def find_cub(root: str | Path) -> Path | None:
    """The folder that holds images.txt: `root` or its CUB_200_2011; None where neither does."""
    folders = (Path(root), Path(root) / "CUB_200_2011")
    return next((folder for folder in folders if (folder / "images.txt").is_file()), None)


class Archive(NamedTuple):
    """A .tgz that is published with its md5; `folder` is what is kept of it."""

    folder: str
    url: str
    md5: str
    size: int  # bytes


SCHEME = "https://"
_GROWTH = 20  # a .tgz of photographs or outlines unpacks to little more than its own size
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

    The photographs are for non-commercial research. About 2.4 GB must be free while it runs, half of it
    afterwards. Size and md5 are compared before anything is unpacked, and the folder appears only when it is
    complete.

    Args:
        root: the folder that holds images.txt, or its parent, or where to put CUB_200_2011.
        segmentations: fetch the bird outlines as well (39 MB), into CUB_200_2011/segmentations.

    Raises:
        LoupeError: no connection, another file than the published one, an entry of the archive that is a link
            or leads out of its folder, or a full disk. Nothing half-made is left.
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
            file = Path(scratch) / "archive.tgz"
            _download(archive, file)
            _unpack(file, Path(scratch) / "unpacked", archive)
            if not (Path(scratch) / "unpacked" / archive.folder).is_dir():
                raise LoupeError(f"{archive.url}: found no folder {archive.folder} in the archive")
            (Path(scratch) / "unpacked" / archive.folder).rename(target)
    except (OSError, HTTPException) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            need = 2.1 * archive.size / 1e9  # the archive and what comes out of it
            raise LoupeError(f"{root}: disk full, expected {need:.1f} GB free; {_NOTHING_KEPT}") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LoupeError(f"{archive.url}: not fetched into {root}: {reason}; {_NOTHING_KEPT}") from None
    return target


def _download(archive: Archive, file: Path) -> None:
    digest, received = hashlib.md5(usedforsecurity=False), 0
    request = Request(archive.url, headers={"User-Agent": "loupe-core"})
    with urlopen(request, timeout=60) as response, open(file, "wb") as out:
        if not response.url.startswith(SCHEME):
            raise LoupeError(f"{archive.url}: was sent on to {response.url}, expected {SCHEME}")
        # disable=None: no bar where the output is not a terminal
        with tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.folder, disable=None) as bar:
            while received <= archive.size and (chunk := response.read(1 << 20)):
                out.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if received != archive.size:
        found = "more" if received > archive.size else f"{received:,}"
        expected = f"{archive.size:,}"
        raise LoupeError(f"{archive.url}: found {found} bytes, expected {expected}; {_NOTHING_KEPT}")
    if digest.hexdigest() != archive.md5:
        found = digest.hexdigest()
        raise LoupeError(f"{archive.url}: found md5 {found}, expected {archive.md5}; {_NOTHING_KEPT}")


def _unpack(file: Path, folder: Path, archive: Archive) -> None:
    url, room = archive.url, _GROWTH * archive.size + 2**20
    try:
        with tarfile.open(file, "r:gz") as tar:
            # also keeps set-uid bits and the like out; early 3.11 lacks it
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            for entry in tar:
                name = PurePosixPath(entry.name)
                if name.is_absolute() or ".." in name.parts or not (entry.isfile() or entry.isdir()):
                    found = f"the entry {entry.name[:200]!r}, a link or a path that leads out of the archive"
                    raise LoupeError(f"{url}: found {found}, expected plain files; {_NOTHING_KEPT}")
                room -= entry.size
                if room < 0:
                    found = f"{entry.name[:200]!r}, which fills more than {_GROWTH} times the archive's own size"
                    raise LoupeError(f"{url}: found {found}, expected photographs; {_NOTHING_KEPT}")
                tar.extract(entry, folder)
    except LoupeError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:  # ValueError: a name that no file can have
        reason = " ".join(str(error).split())[:200]
        raise LoupeError(f"{url}: found a broken archive ({reason}); {_NOTHING_KEPT}") from None
