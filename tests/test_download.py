"""Downloads from a server on this machine: the address and the published figures are replaced, nothing else."""

import errno
import gzip
import hashlib
import http.server
import io
import tarfile
import threading

import pytest
import torch.hub
from PIL import Image

from loupe_core.datasets import CUB200
from loupe_core.errors import LoupeError
from loupe_core.files import download
from loupe_core.files.download import Archive, download_cub


@pytest.fixture
def serve(monkeypatch):
    """serve(cub=bytes, segmentations=bytes) -> list of the paths that are asked for. md5 and size agree."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in files:
                return self.send_error(404)
            body = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    here = f"http://127.0.0.1:{server.server_port}"

    def publish(**archives):
        for name, body in archives.items():
            constant, folder = {
                "cub": ("CUB_ARCHIVE", "CUB_200_2011"),
                "segmentations": ("SEGMENTATIONS_ARCHIVE", "segmentations"),
            }[name]
            files[f"/{name}.tgz"] = body
            md5 = hashlib.md5(body).hexdigest()
            monkeypatch.setattr(download, constant, Archive(folder, f"{here}/{name}.tgz", md5, len(body)))
        return asked

    yield publish
    server.shutdown()
    thread.join()
    server.server_close()


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


def refused(root):
    """Download into `root`, which must fail: the one line, once nothing is left."""
    with pytest.raises(LoupeError) as caught:
        download_cub(root)
    message = str(caught.value)
    assert "\n" not in message
    assert list(root.iterdir()) == []
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


@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.99])
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
def test_a_full_disk_is_told_and_nothing_is_left(serve, archive, root, monkeypatch, moment):
    serve(cub=archive)

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "download":
        monkeypatch.setattr(torch.hub, "open", lambda *args: FullDisk(*args), raising=False)
    else:
        monkeypatch.setattr(tarfile, "copyfileobj", no_space)
    message = refused(root)
    assert "disk full" in message and "GB free; nothing was kept" in message


class FullDisk(io.FileIO):
    """A file on a disk with room for a thousand bytes."""

    def write(self, data):
        super().write(data[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_interrupted_download_leaves_nothing(serve, archive, root, monkeypatch):
    serve(cub=archive)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "check_integrity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download_cub(root)
    assert list(root.iterdir()) == []


def test_a_file_that_is_gone_and_a_server_that_is_away_are_told(serve, root, monkeypatch):
    serve(cub=b"")
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
