"""Downloads from a server on this machine: the address and the published figures are replaced, nothing else."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import FORKS
from PIL import Image
from tqdm import tqdm

from loupe_core.datasets import CUB200
from loupe_core.errors import LoupeError
from loupe_core.files import download
from loupe_core.files.download import Archive, download_cub
from loupe_core.files.progress import progress


class Source:
    """A server on this machine, and how it behaves; `asked` is the path and the range of every request."""

    ranges = True  # whether it can begin in the middle
    cut: int | None = None  # bytes after which it closes the connection
    pause = 0.0  # seconds before each kilobyte
    silent = False  # whether it says no length

    def __init__(self):
        self.files, self.asked = {}, []


@pytest.fixture
def source():
    """Serves what is in `source.files`."""
    here = Source()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            here.asked.append(self.path if wanted is None else f"{self.path} {wanted}")
            if self.path not in here.files:
                return self.send_error(404)
            body = here.files[self.path]
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and here.ranges else 0
            self.send_response(206 if wanted and here.ranges else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if not here.silent:
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            sent = body[start:] if here.cut is None else body[start: start + here.cut]
            try:
                for k in range(0, len(sent), 1000) if here.pause else (0,):
                    time.sleep(here.pause)
                    self.wfile.write(sent[k: k + 1000] if here.pause else sent)
            except OSError:  # whoever asked was killed
                pass

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    here.address = f"http://127.0.0.1:{server.server_port}"
    yield here
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def serve(monkeypatch, source):
    """serve(cub=bytes, segmentations=bytes) -> list of what is asked for. md5 and size agree."""

    def publish(**archives):
        for name, body in archives.items():
            constant, folder = {
                "cub": ("CUB_ARCHIVE", "CUB_200_2011"),
                "segmentations": ("SEGMENTATIONS_ARCHIVE", "segmentations"),
            }[name]
            source.files[f"/{name}.tgz"] = body
            md5 = hashlib.md5(body).hexdigest()
            monkeypatch.setattr(download, constant, Archive(folder, f"{source.address}/{name}.tgz", md5, len(body)))
        return source.asked

    return publish


def pack(*entries):
    """(name, bytes or TarInfo settings) -> a .tgz, as bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for key, value in content.items():
                    setattr(info, key, value)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def pack_folder(folder, extra=()):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return pack(*((str(path.relative_to(folder.parent)), path.read_bytes()) for path in files), *extra)


@pytest.fixture
def archive(make_cub):
    """A whole set as the .tgz that is published: the set's folder, and a file beside it."""
    return pack_folder(make_cub(segmentations=False), extra=[("attributes.txt", b"1 has_bill_shape")])


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


PART, LOCK = "CUB_200_2011.tgz.part", ".CUB_200_2011.lock"


def refused(root, part=None):
    """Download into `root`, which must fail: the one line. Only the empty lock and `part` of the archive are left."""
    with pytest.raises(LoupeError) as caught:
        download_cub(root)
    message = str(caught.value)
    assert "\n" not in message
    assert {path.name for path in root.iterdir()} <= {LOCK, *([PART] if part is not None else [])}
    assert part is None or (root / PART).read_bytes() == part
    assert ("nothing was kept" in message) == (part is None)
    return message


def test_a_download_is_unpacked_whole_and_leaves_nothing_else(serve, archive, make_cub, tmp_path):
    serve(cub=archive)
    root = tmp_path / "data" / "birds"
    assert download_cub(root) == root / "CUB_200_2011"
    assert [path.name for path in root.iterdir()] == ["CUB_200_2011"]
    original = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in (tmp_path / "CUB_200_2011").rglob("*")
        if path.is_file()
    }
    unpacked = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert unpacked == original


def test_a_set_that_is_there_is_not_fetched_again(serve, archive, tmp_path):
    asked = serve(cub=archive)
    roots = [download_cub(tmp_path / "data") for _ in range(2)]
    sets = [CUB200(roots[0], split) for split in ("train", "val", "test")]
    assert sum(len(part) for part in sets) == 30 and sets[0].image(0).size == (48, 36)
    assert {*roots, download_cub(roots[0])} == {roots[0]}  # the folder itself, not its parent
    assert asked == ["/cub.tgz"]


def test_segmentations_are_fetched_when_asked_for(serve, archive, make_cub, tmp_path):
    white = io.BytesIO()
    Image.new("L", (48, 36), 255).save(white, "PNG")
    masks = pack(("segmentations/001.Bird_1/Bird_1_0001.png", white.getvalue()))
    asked = serve(cub=archive, segmentations=masks)
    root = tmp_path / "data"
    download_cub(root)
    assert CUB200(root, "test").segmentation(0) is None
    download_cub(root, segmentations=True)
    download_cub(root, segmentations=True)
    assert asked == ["/cub.tgz", "/segmentations.tgz"]
    assert CUB200(root, "test").segmentation(0).all()  # image 2 is Bird_1_0001


def test_an_archive_with_one_changed_byte_is_refused_by_its_md5(serve, archive, root, monkeypatch):
    changed = bytearray(archive)
    changed[len(archive) // 2] ^= 1
    serve(cub=bytes(changed))
    expected = hashlib.md5(archive).hexdigest()
    monkeypatch.setattr(download, "CUB_ARCHIVE", download.CUB_ARCHIVE._replace(md5=expected))
    assert f"found a file with another md5 than {expected}; nothing was kept" in refused(root)


@pytest.mark.parametrize("name, content", [
    ("CUB_200_2011/../../escaped.txt", b"out"),
    ("CUB_200_2011/link", {"type": tarfile.SYMTYPE, "linkname": "/etc"}),
    ("CUB_200_2011/null", {"type": tarfile.CHRTYPE}),
])
def test_an_archive_that_climbs_out_is_refused_although_its_md5_is_right(serve, tmp_path, name, content, root):
    serve(cub=pack(("CUB_200_2011/images.txt", b"1 a.jpg\n"), (name, content)))
    assert name.split("/")[-1] in refused(root)
    assert [left.name for left in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.99])
def test_a_truncated_archive_is_refused(serve, archive, root, keep):
    """Its md5 is that of the truncated file here, so that only the unpacking can notice."""
    serve(cub=archive[: int(keep * len(archive))])
    assert "not fetched into" in refused(root)


def test_a_file_that_is_no_archive_is_refused(serve, root):
    serve(cub=gzip.compress(b"<html>Sign in</html>" * 100))
    assert "not fetched into" in refused(root)


def test_an_archive_of_another_set_is_refused(serve, root):
    serve(cub=pack(("CARS/images.txt", b"1 a.jpg\n")))
    assert "found no folder CUB_200_2011 in the archive" in refused(root)


@pytest.mark.parametrize("moment", ["download", "unpack"])
def test_a_full_disk_is_told_and_what_has_arrived_is_kept(serve, archive, root, monkeypatch, moment):
    serve(cub=archive)

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "download":
        monkeypatch.setattr(download, "open", lambda *args: FullDisk(*args), raising=False)
    else:
        monkeypatch.setattr(tarfile, "copyfileobj", no_space)
    message = refused(root, archive[:1000] if moment == "download" else archive)
    assert "disk full" in message and "GB free; " in message
    monkeypatch.undo()
    serve(cub=archive)
    assert len(CUB200(download_cub(root), "all")) == 30 and [path.name for path in root.iterdir()] == ["CUB_200_2011"]


class FullDisk(io.FileIO):
    """A file on a disk with room for a thousand bytes."""

    def write(self, data):
        super().write(data[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_too_little_room_is_told_before_anything_is_fetched(serve, archive, root, monkeypatch):
    asked = serve(cub=archive)
    little = shutil.disk_usage(root)._replace(free=2 * len(archive))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(LoupeError, match="GB free, expected .* make room"):
        download_cub(root)
    assert asked == []
    (root / PART).write_bytes(archive[: len(archive) // 2])  # the half that is there needs no room any more
    assert download_cub(root).is_dir()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_gone_on_with(source, serve, archive, root, capsys, ranges):
    asked = serve(cub=archive)
    source.cut, source.ranges = 2000, ranges
    message = refused(root, archive[:2000])
    assert f"{root / PART} keeps 0.00 of 0.00 GB, try again and it goes on from there" in message
    if ranges:
        refused(root, archive[:4000])
    source.cut = None
    assert len(CUB200(download_cub(root), "all")) == 30
    assert [path.name for path in root.iterdir()] == ["CUB_200_2011"]
    assert asked == ["/cub.tgz", *(f"/cub.tgz bytes={k}-" for k in ([2000, 4000] if ranges else [2000]))]


def test_the_message_counts_what_is_kept_in_gigabytes(tmp_path):
    with open(tmp_path / "part", "wb") as file:
        file.truncate(620_000_000)  # sparse: it takes no room
    assert download._gigabytes(tmp_path / "part") == "0.62"


@pytest.mark.parametrize("kind", ["of another file", "longer than the archive", "whole"])
def test_the_md5_decides_about_what_was_there(source, serve, archive, root, kind):
    asked = serve(cub=archive)
    there = dict(zip(("of another file", "longer than the archive", "whole"), (b"x" * 3000, archive + b"x", archive)))
    (root / PART).write_bytes(there[kind])
    assert download_cub(root).is_dir() and [path.name for path in root.iterdir()] == ["CUB_200_2011"]
    assert asked == dict(zip(there, (["/cub.tgz bytes=3000-", "/cub.tgz"], ["/cub.tgz"], [])))[kind]


def test_a_page_that_is_served_instead_does_not_take_the_place_of_what_has_arrived(source, serve, archive, root):
    serve(cub=archive)
    source.cut = 2000
    refused(root, archive[:2000])
    source.cut, source.ranges, source.files["/cub.tgz"] = None, False, b"<html>Sign in</html>"
    with pytest.raises(LoupeError, match="found a file of 20 bytes, expected .* is as it was"):
        download_cub(root)
    assert (root / PART).read_bytes() == archive[:2000]


def test_a_server_that_tells_no_length_is_followed_to_its_end(source, serve, archive, root):
    serve(cub=archive)
    source.silent = True
    assert download_cub(root).is_dir()


def test_an_interrupted_download_keeps_what_has_arrived(serve, archive, root, monkeypatch):
    asked = serve(cub=archive)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(download, "check_integrity", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download_cub(root)
    assert {path.name for path in root.iterdir()} == {PART, LOCK}
    assert download_cub(root).is_dir() and asked == ["/cub.tgz"]


def fetch(archive, root):
    """What each of several processes does; what it tells is in a file beside the root."""
    sys.stderr = open(f"{root}.log", "a")
    download.CUB_ARCHIVE = Archive(*archive)
    assert download_cub(root) == Path(root, "CUB_200_2011") and len(CUB200(root, "all")) == 30


def begun(count, root):
    """`count` processes that fetch into `root` at once."""
    processes = [FORKS.Process(target=fetch, args=(tuple(download.CUB_ARCHIVE), root)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def ended(processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("count", [2, 4])
def test_of_several_processes_one_fetches_and_the_others_wait(source, serve, archive, tmp_path, count):
    asked = serve(cub=archive)
    source.pause = 0.02
    root = tmp_path / "birds"  # not there either
    assert ended(begun(count, root)) == [0] * count
    assert asked == ["/cub.tgz"] and [path.name for path in root.iterdir()] == ["CUB_200_2011"]
    told = Path(f"{root}.log").read_text()
    assert told.count("waiting: another process fetches CUB_200_2011 into ") == count - 1
    assert told.count("CUB_200_2011: 100 % (") == 1, told


def test_when_the_process_that_fetches_is_killed_another_goes_on(source, serve, archive, root):
    asked = serve(cub=archive)
    source.pause = 0.05
    processes = begun(1, root)
    while not (root / PART).exists() or (root / PART).stat().st_size < 3000:
        time.sleep(0.01)
    processes += begun(2, root)
    time.sleep(0.3)
    os.kill(processes[0].pid, signal.SIGKILL)
    source.pause = 0
    assert ended(processes) == [-signal.SIGKILL, 0, 0]
    assert len(asked) == 2 and asked[1].startswith("/cub.tgz bytes=") and int(asked[1][15:-1]) >= 3000
    assert [path.name for path in root.iterdir()] == ["CUB_200_2011"]


def test_a_process_that_is_killed_while_it_unpacks_costs_no_second_download(serve, archive, root, monkeypatch):
    asked = serve(cub=archive)
    (root / ".unfinished-CUB_200_2011" / "CUB_200_2011" / "images").mkdir(parents=True)  # what it leaves
    (root / PART).write_bytes(archive)
    assert len(CUB200(download_cub(root), "all")) == 30 and asked == []
    assert [path.name for path in root.iterdir()] == ["CUB_200_2011"]


@pytest.mark.slow
def test_under_torchrun_both_ranks_train_on_what_one_of_them_fetched(source, serve, archive, tmp_path):
    asked = serve(cub=archive)
    (tmp_path / "run.py").write_text(
        "import sys\nfrom loupe_core.cli import main\nfrom loupe_core.files import download\n"
        f"download.CUB_ARCHIVE = download.Archive{tuple(download.CUB_ARCHIVE)!r}\n"
        "words = 'train data --download --backbone swin_micro --recipe small --epochs 1 --workers 0 --out out'\n"
        "sys.exit(main(words.split()))\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
                           "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert asked == ["/cub.tgz"] and (tmp_path / "out" / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize("stream, shows", [("log", "lines"), ("notebook", "bar"), ("terminal", "bar")])
def test_progress_is_a_bar_where_one_can_be_drawn_and_else_ten_lines(monkeypatch, stream, shows):
    class Notebooks(io.StringIO):
        pass

    Notebooks.__module__ = "ipykernel.iostream" if stream == "notebook" else "io"
    Notebooks.isatty = lambda self: stream == "terminal"
    monkeypatch.setattr(sys, "stderr", Notebooks())
    # chapters are tested without bars (book/conftest.py), perhaps in this process: tqdm has read that for good
    monkeypatch.setattr("loupe_core.files.progress.tqdm", partial(tqdm, disable=False))
    with progress("birds", 2_000_000, 500_000) as told:
        for _ in range(150):
            told(10_000)
    lines = sys.stderr.getvalue().replace("\r", "\n").splitlines()
    if shows == "bar":
        assert "100%" in lines[-1] and "2.00M/2.00M" in lines[-1] and "|" in lines[-1]
    else:
        assert lines == [f"birds: {k}0 % ({k / 5:,.0f} of 2 MB)" for k in range(3, 11)]


def test_a_file_that_is_gone_and_a_server_that_is_away_are_told(serve, root, monkeypatch):
    serve(cub=b"x")
    away = download.CUB_ARCHIVE._replace(url=download.CUB_ARCHIVE.url + "x")
    monkeypatch.setattr(download, "CUB_ARCHIVE", away)
    assert "HTTP Error 404" in refused(root)
    monkeypatch.setattr(download, "CUB_ARCHIVE", away._replace(url="http://127.0.0.1:9/cub.tgz"))
    assert "not fetched into" in refused(root)


def test_what_is_in_the_way_is_named_before_anything_is_fetched(serve, archive, root):
    asked = serve(cub=archive)
    (root / "CUB_200_2011").mkdir()
    (root / "CUB_200_2011" / "mine.txt").write_text("keep me")
    with pytest.raises(LoupeError, match="found another folder or file in the way"):
        download_cub(root)
    assert asked == [] and (root / "CUB_200_2011" / "mine.txt").read_text() == "keep me"


def test_the_published_addresses_use_https_and_the_known_figures():
    cub, masks = download.CUB_ARCHIVE, download.SEGMENTATIONS_ARCHIVE
    assert cub.url.startswith("https://data.caltech.edu/") and masks.url.startswith(
        "https://data.caltech.edu/"
    )
    assert (cub.size, cub.md5) == (1150585339, "97eceeb196236b17998738112f37df78")
    assert (masks.size, masks.md5) == (39272883, "4d47ba1228eae64f2fa547c47bc65255")
