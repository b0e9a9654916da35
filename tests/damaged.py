"""The damaged corpus: each case writes one thing that a reader may meet into a folder of its own.

CASES maps a name to (kind, write, outcome). `write(folder)` returns what is to be read: a file for "image", a folder
for "table" (CUB's layout), "checkpoint" and "state" (a training's), a .tgz for "archive". The outcome is "read",
"refused", or "either" where chance decides; whatever it is, it comes quickly, in bounded memory, and in one line.
"""

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from helpers import write_cub
from PIL import Image
from safetensors.torch import load_file, save_file

from loupe_core.datasets import PhotoFolder
from loupe_core.files.run_folder import CHECKSUMS
from loupe_core.geometry import transforms_for
from loupe_core.model import LoupeModel
from loupe_core.trainer import Recipe, Trainer

CASES = {}
TENTHS = range(1, 10)
RECIPE = Recipe.small(epochs=1, batch_size=2, precision="no")
SETTINGS = dict(backbone="test_vit", num_classes=2, pretrained=False, img_size=96, class_names=["a", "b"])
CONFIG = {"input_size": (3, 96, 96), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def add(name, kind, outcome, write):
    assert name not in CASES
    CASES[name] = (kind, write, outcome)


def cut(data: bytes, tenth: int) -> bytes:
    return data[: len(data) * tenth // 10]


def flip(data: bytes, seed: int, count: int = 12) -> bytes:
    """`count` bytes replaced, at places that `seed` draws."""
    random, out = np.random.default_rng(seed), bytearray(data)
    for place in random.integers(0, len(out), count):
        out[place] = random.integers(256)
    return bytes(out)


class Runs:
    """Pickled, it writes a file into `folder` when it is read: the harmless stand-in for any command."""

    def __init__(self, folder: Path):
        self.file = folder / "EXECUTED"

    def __reduce__(self):
        return Path.touch, (self.file,)


# ---- images


def photograph(mode="RGB", size=(60, 40), seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@functools.cache
def encoded(fmt, mode="RGB", size=(60, 40), **options) -> bytes:
    out = io.BytesIO()
    photograph(mode, size).save(out, fmt, **options)
    return out.getvalue()


def image(name, data, outcome, file="x.jpg"):
    def write(folder):
        (folder / file).write_bytes(data() if callable(data) else data)
        return folder / file

    add(f"image: {name}", "image", outcome, write)


def png(width, height, bits=8, colour=2, rows=b"", extra=b"") -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def patched(fmt, find: bytes, skip: int, replacement: bytes) -> bytes:
    data = encoded(fmt)
    at = data.index(find) + skip
    return data[:at] + replacement + data[at + len(replacement):]


def animated(fmt, **options) -> bytes:
    out = io.BytesIO()
    frames = [photograph(seed=s) for s in range(3)]
    frames[0].save(out, fmt, save_all=True, append_images=frames[1:], **options)
    return out.getvalue()


for fmt in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
    if fmt in ("JPEG", "PNG"):
        for tenth in TENTHS:
            image(f"{fmt} cut at {tenth}/10", cut(encoded(fmt), tenth), "refused")
        for seed in range(10):
            image(f"{fmt} with random bytes, seed {seed}", flip(encoded(fmt), seed), "either")
    else:
        image(f"{fmt} cut at half", cut(encoded(fmt), 5), "either" if fmt == "GIF" else "refused")
        for seed in range(4):
            image(f"{fmt} with random bytes, seed {seed}", flip(encoded(fmt), seed, 4), "either")
    image(f"{fmt} called .jpg", encoded(fmt), "read")
    image(f"{fmt} of 1 x 1", encoded(fmt, size=(1, 1)), "read")
for fmt in ("JPEG", "PNG", "TIFF"):
    image(f"{fmt} of 20,000 x 1", encoded(fmt, size=(20_000, 1)), "refused")
    image(f"{fmt} of 1 x 20,000", encoded(fmt, size=(1, 20_000)), "refused")
    image(f"{fmt} of 1,000 x 5", encoded(fmt, size=(1_000, 5)), "read")
for fmt, modes in {"JPEG": "L CMYK YCbCr", "PNG": "1 L LA P RGBA", "TIFF": "1 L LA CMYK RGBA LAB", "WEBP": "RGBA",
                   "BMP": "1 L P RGB", "PPM": "RGB", "TGA": "RGBA"}.items():
    for mode in modes.split():
        if mode == "LAB":
            image("TIFF LAB", lambda: _lab(), "read")
        else:
            image(f"{fmt} {mode}", encoded(fmt, mode), "read")


def _lab() -> bytes:
    out = io.BytesIO()
    Image.new("LAB", (60, 40), (128, 120, 140)).save(out, "TIFF")
    return out.getvalue()


def _sixteen(fmt="PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(out, fmt)
    return out.getvalue()


def _palette(transparency) -> bytes:
    out = io.BytesIO()
    photograph("P").save(out, "PNG", transparency=transparency)
    return out.getvalue()


def _floats(value) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.float32)).save(out, "TIFF")
    return out.getvalue()


def _exif(orientation=None, raw=None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    photograph().save(out, "JPEG", exif=exif if raw is None else raw)
    return out.getvalue()


image("16 bit grey PNG", _sixteen, "read", "x.png")
image("16 bit grey TIFF", lambda: _sixteen("TIFF"), "read", "x.tif")
image("16 bit colour PNG", lambda: png(5, 4, 16, 2, (b"\0" + bytes(range(30))) * 4), "read", "x.png")
image("palette with one transparent colour", lambda: _palette(3), "read")
image("palette with alpha for each colour", lambda: _palette(bytes(range(256))), "read")
image("palette PNG without its palette", png(4, 4, 8, 3, b"\0\1\2\3\4" * 4), "either")
image("floating point TIFF", lambda: _floats(0.5), "refused")
image("NaN TIFF", lambda: _floats(np.nan), "refused")
image("animated GIF", lambda: animated("GIF"), "read")
image("animated WebP", lambda: animated("WEBP"), "read")
image("animated PNG", lambda: animated("PNG"), "read")
image("TIFF of three pages", lambda: animated("TIFF"), "read")
image("animated GIF cut in frame 2", lambda: cut(animated("GIF"), 6), "read")
for orientation in range(1, 9):
    image(f"EXIF rotation {orientation}", functools.partial(_exif, orientation), "read")
for orientation in (0, 9, 65535):
    image(f"EXIF rotation {orientation}, which there is not", functools.partial(_exif, orientation), "read")
image("EXIF that is cut", lambda: _exif(raw=b"Exif\0\0II*\0"), "read")
image("EXIF that points far outside", lambda: _exif(raw=b"Exif\0\0II*\0\xff\xff\xff\x7f"), "read")
image("EXIF of random bytes", lambda: _exif(raw=b"Exif\0\0" + flip(b"MM\0*" + bytes(400), 1, 300)), "read")
image("EXIF that points to itself", lambda: _exif(raw=b"Exif\0\0II*\0\x08\0\0\0\x01\0i\x87\x04\0\x01\0\0\0\x08\0\0\0"),
      "read")
# bombs: a header that promises far more than the file holds
for name, (width, height) in {"30,000 x 30,000": (30_000, 30_000), "2 billion wide": (2**31 - 1, 1),
                              "2 billion square": (2**31 - 1, 2**31 - 1)}.items():
    image(f"PNG bomb of {name}", png(width, height), "refused")
image("PNG of 9,400 x 9,400 without pixels", png(9_400, 9_400), "refused")
image("PNG of 9,400 x 9,400, all of it, transparent", lambda: png(9_400, 9_400, 8, 4, bytes(9_400 * 18_801)), "read")
image("PNG 0 x 0", png(0, 0), "refused")
image("PNG text that inflates to 200 MB", lambda: png(4, 4, rows=bytes(52), extra=_ztxt()), "either")
image("GIF bomb", lambda: patched("GIF", b"GIF8", 6, struct.pack("<HH", 65535, 65535)), "refused")
image("GIF frame larger than its screen", lambda: patched("GIF", b"\x2c\0\0\0\0", 5, b"\xff\xff\xff\xff"), "refused")
image("WebP bomb", lambda: patched("WEBP", b"\x9d\x01\x2a", 3, struct.pack("<HH", 16383, 16383)), "refused")
image("TIFF bomb", lambda: _tiff_bomb(), "refused")
image("JPEG bomb", lambda: patched("JPEG", b"\xff\xc0", 5, b"\xff\xff\xff\xff"), "refused")
image("BMP bomb", b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
      "refused")
image("PPM bomb", b"P6 99999 99999 255\n", "refused")
image("PPM with an endless number", b"P6 " + b"9" * 100_000 + b" 1 255\n", "refused")
image("0 bytes", b"", "refused")
image("1 byte", b"\xff", "refused")
image("zeros", bytes(10_000), "refused")
image("text", b"<html>404</html>", "refused")
image("random bytes", flip(bytes(10_000), 5, 9_000), "refused")
image("PostScript, which Pillow would hand to Ghostscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
      b"%%EndComments\n(EXECUTED) (w) file closefile showpage\n%%EOF\n", "refused")
image("SVG", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "refused")
image("JPEG after 100 bytes of junk", b"junk" * 25 + encoded("JPEG"), "refused")
image("JPEG with junk behind it", encoded("JPEG") + b"junk" * 1000, "read")
image("a name that is not ASCII", encoded("JPEG"), "read", "Großer Ō'ō 🐦.jpg")
image("a name with a line break", b"", "refused", "two\nlines.jpg")
image("a name with a terminal's escape", b"", "refused", "red\x1b[31m.jpg")


def _ztxt() -> bytes:
    data = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 1)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


def _tiff_bomb() -> bytes:
    data = bytearray(encoded("TIFF"))
    start, = struct.unpack_from("<I", data, 4)
    for k in range(struct.unpack_from("<H", data, start)[0]):
        if struct.unpack_from("<H", data, start + 2 + 12 * k)[0] in (256, 257):  # width, height
            struct.pack_into("<HII", data, start + 4 + 12 * k, 4, 1, 60_000)
    return bytes(data)


def special(name, make):
    def write(folder):
        make(folder / "x.jpg")
        return folder / "x.jpg"

    add(f"image: {name}", "image", "refused", write)


special("a folder called x.jpg", lambda path: path.mkdir())
special("a link that leads nowhere", lambda path: path.symlink_to("nowhere.jpg"))
special("a link to itself", lambda path: path.symlink_to(path.name))
special("a pipe that nobody writes to", lambda path: os.mkfifo(path))
special("a link to an endless device", lambda path: path.symlink_to("/dev/zero"))
special("no such file", lambda path: None)

# ---- lists in CUB's layout


def table(name, file, change, outcome="refused"):
    """`change`: bytes -> bytes of `file`, or None to remove it."""

    def write(folder):
        root = write_cub(folder / "set", classes=2, per_class=4)
        content = change((root / file).read_bytes())
        (root / file).unlink() if content is None else (root / file).write_bytes(content)
        return root

    add(f"table: {name}", "table", outcome, write)


def line(number, text):
    text = text if isinstance(text, bytes) else text.encode()
    return lambda data: b"\n".join(text if k == number else old for k, old in enumerate(data.splitlines(), 1)) + b"\n"


LISTS = ["classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt",
         "parts/part_locs.txt"]
for file in LISTS:
    table(f"{file} missing", file, lambda data: None)
    table(f"{file} empty", file, lambda data: b"")
    table(f"{file} of blank lines", file, lambda data: b"\n\n \n")
    table(f"{file} without its last row", file, lambda data: data[: data[:-1].rindex(b"\n") + 1],
          "refused")
    table(f"{file} with a row twice", file, lambda data: data.split(b"\n")[0] + b"\n" + data)
    table(f"{file} with CRLF", file, lambda data: data.replace(b"\n", b"\r\n"), "read")
    table(f"{file} with a BOM", file, lambda data: b"\xef\xbb\xbf" + data, "read")
    table(f"{file} in UTF-16", file, lambda data: data.decode().encode("utf-16"))
    table(f"{file} binary", file, lambda data: flip(data, 3, 200))
    table(f"{file} backwards", file, lambda data: b"\n".join(reversed(data.splitlines())),
          "either" if file == "classes.txt" else "refused")
    table(f"{file} with a number of 5,000 digits", file, line(2, "9" * 5000 + " x"))
    table(f"{file} with a line of 10 MB", file, line(2, "2 " + "x" * 10_000_000),
          "read" if file in ("classes.txt",) else "either" if file == "images.txt" else "refused")
for file, columns in zip(LISTS[2:], (2, 2, 5, 5)):
    for value in ("nan", "inf", "-1e400", "1e300", "1e31", "0x10", "1_0", "\0", "½", ""):
        row = " ".join(["2", *["1"] * (columns - 2), value])
        table(f"{file} with {value!r}", file, line(2, row))
for path in ("../../etc/passwd", "/etc/passwd", "a/../../b.png", "..", "C:/birds/x.png", "..\\..\\x.png", "\\\\host\\x",
             "a/\0.png"):
    table(f"images.txt with {path!r}", "images.txt", line(2, f"2 {path}"))
table("images.txt with a name that is not ASCII", "images.txt", line(2, "2 001.Bird_1/Großer Ō'ō 🐦.png"), "either")
table("images.txt with spaces in a name", "images.txt", line(2, "2 001.Bird_1/two words.png"), "either")
table("classes.txt in Latin-1", "classes.txt", line(2, "2 Großer Vogel".encode("latin-1")))
table("classes.txt not ASCII", "classes.txt", line(2, "2 Großer Ō'ō"), "read")
table("classes.txt with Arabic digits", "classes.txt", line(2, "٢ 002.Bird_2"), "read")


# ---- archives


def archive(name, data, outcome="refused", md5=None):
    def write(folder):
        (folder / "birds.tgz").write_bytes(data(folder) if callable(data) else data)
        return folder / "birds.tgz"

    write.md5 = md5
    add(f"archive: {name}", "archive", outcome, write)


def packed(*entries, sound=True) -> bytes:
    """(name, bytes or TarInfo settings), after one sound entry -> a .tgz."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name, content in [("CUB_200_2011/images.txt", b"1 a.jpg\n")] * sound + list(entries):
            info = tarfile.TarInfo(name)
            settings = content if isinstance(content, dict) else dict(size=len(content))
            for key, value in settings.items():
                setattr(info, key, value)
            tar.addfile(info, None if isinstance(content, dict) else io.BytesIO(content))
    return out.getvalue()


IN = "CUB_200_2011/"
NOISE = np.random.default_rng(0).bytes(3000)
WHOLE = packed((IN + "a.jpg", NOISE))
archive("sound", WHOLE, "read")
for tenth in TENTHS:
    archive(f"cut at {tenth}/10", cut(WHOLE, tenth))
for seed in range(6):
    archive(f"with random bytes, seed {seed}", flip(WHOLE, seed), "either")
for name, path in {"up": "../up.txt", "up from inside": IN + "../../up.txt", "absolute": "{}/up.txt",
                   "up twice": "../../up.txt", "up in the middle": "x/../../up.txt"}.items():
    archive(f"climbs: {name}", lambda folder, path=path: packed((path.format(folder), b"out")),
            "read" if name == "absolute" else "refused")  # tarfile takes the leading slash away
for kind, number in {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE}.items():
    for target, outcome in {"../../up.txt": "refused", "/etc/passwd": "refused", IN + "images.txt": "read"}.items():
        archive(f"{kind} to {target}", packed((IN + "link", dict(type=number, linkname=target))), outcome)
archive("writes through a link",
        packed((IN + "d", dict(type=tarfile.SYMTYPE, linkname="../..")), (IN + "d/up.txt", b"")))
for kind, number in {"device": tarfile.CHRTYPE, "block device": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE}.items():
    archive(f"holds a {kind}", packed((IN + "special", dict(type=number))))
archive("a file that grows to 1 TB", lambda folder: gzip.compress(
    tarfile.TarInfo.tobuf(_sized(IN + "huge", 2**40)) + bytes(1024)))
archive("negative size", gzip.compress(tarfile.TarInfo(IN + "x").tobuf()[:124] + b"\xff" * 12
                                       + tarfile.TarInfo(IN + "x").tobuf()[136:]), "refused")
archive("one file twice", packed((IN + "a.txt", b"one"), (IN + "a.txt", b"two")), "read")
archive("a folder in place of a file", packed((IN + "a", b"one"), (IN + "a/b", b"two")))
archive("names that are not ASCII", packed((IN + "Großer Ō'ō 🐦.jpg", b"x")), "read")
archive("names that are not UTF-8", packed((IN + "\udcff\udcfe.jpg", b"x")), "read")
archive("a name of 5,000 letters", packed((IN + "x" * 5000, b"x")))
archive("a name with NUL", packed((IN + "ü\0.jpg", b"x")), "either")
archive("a name with a line break", packed((IN + "a\nb.jpg", b"x")), "read")
archive("readable for nobody, with set-uid", packed((IN + "a.jpg", dict(mode=0o6000))), "read")
archive("another folder", packed(("CARS/images.txt", b""), sound=False))
archive("empty", packed(sound=False))
archive("0 bytes", b"")
archive("no archive", gzip.compress(b"<html>Sign in</html>" * 100))
archive("not compressed", gzip.decompress(WHOLE))
archive("wrong md5", WHOLE, md5="0" * 32)


def _sized(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info


# ---- checkpoints


@functools.cache
def sound_checkpoint() -> Path:
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="sound-")) / "best"
    LoupeModel(**SETTINGS).save_pretrained(folder)
    return folder


def checkpoint(name, change, outcome="refused"):
    def write(folder):
        shutil.copytree(sound_checkpoint(), folder / "best")
        change(folder / "best")
        return folder / "best"

    add(f"checkpoint: {name}", "checkpoint", outcome, write)


def weights(name, change, outcome="refused"):
    """`change`: bytes of model.safetensors -> bytes."""

    def apply(folder):
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    checkpoint(f"weights {name}", apply, outcome)


def tensors(name, change, outcome="refused"):
    def apply(folder):
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors")

    checkpoint(f"weights {name}", apply, outcome)


def header(change):
    def apply(data):
        size, = struct.unpack("<Q", data[:8])
        text = json.loads(data[8 : 8 + size])
        change(text)
        new = json.dumps(text).encode()
        return struct.pack("<Q", len(new)) + new + data[8 + size :]

    return apply


def config(name, outcome="refused", **changes):
    def apply(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    checkpoint(f"config {name}", apply, outcome)


for tenth in TENTHS:
    weights(f"cut at {tenth}/10", lambda data, tenth=tenth: cut(data, tenth))
for number in (0, 1, 2**20, 2**40, 2**64 - 1):
    weights(f"whose header claims {number} bytes", lambda data, n=number: struct.pack("<Q", n) + data[8:])
for seed in range(4):
    weights(f"with random bytes, seed {seed}", lambda data, seed=seed: flip(data, seed, 40), "either")
weights("of 0 bytes", lambda data: b"")
weights("with a broken header", lambda data: data[:8] + b"{" * 200 + data[208:])
HEAD = "backbone.head.weight"
weights("of a huge declared shape", header(lambda h: h[HEAD].update(shape=[10**6, 10**6])))
weights("of a shape that overflows", header(lambda h: h[HEAD].update(shape=[2**62, 2**62])))
weights("with offsets outside of the file", header(lambda h: h[HEAD].update(data_offsets=[0, 2**50])))
weights("of an unknown type", header(lambda h: h[HEAD].update(dtype="F1")))
weights("with one tensor renamed", header(lambda h: h.update(other=h.pop(HEAD))))
weights("with climbing metadata", header(lambda h: h.update(__metadata__={"../x": "../../y"})), "read")
tensors("with NaN", lambda v: v[HEAD].fill_(float("nan")))
tensors("with infinity", lambda v: v[HEAD][0].fill_(float("inf")))
tensors("without the head", lambda v: v.pop(HEAD))
tensors("with a tensor too many", lambda v: v.update(extra=torch.zeros(3)))
tensors("with a head of other classes", lambda v: v.update({HEAD: torch.zeros(7, 64)}))
tensors("without any tensor", lambda v: v.clear())
tensors("in half precision", lambda v: v.update({k: t.half() for k, t in v.items()}), "read")


def _pickled(folder, name):
    (folder / "model.safetensors").unlink()
    torch.save({HEAD: Runs(folder)}, folder / name)


for name in ("model.safetensors", "pytorch_model.bin", "model.pt", "model.ckpt"):
    checkpoint(f"a pickle called {name}", functools.partial(_pickled, name=name))
checkpoint("a bare pickle called model.safetensors",
           lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps(Runs(folder))))
checkpoint("a pickle beside sound weights",
           lambda folder: (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(folder))), "read")
checkpoint("without config.json", lambda folder: (folder / "config.json").unlink())
checkpoint("without weights", lambda folder: (folder / "model.safetensors").unlink())
checkpoint("an empty folder", lambda folder: [file.unlink() for file in folder.iterdir()])
for name in ("config.json", "model.safetensors"):
    for kind, make in {"a folder": Path.mkdir, "a pipe": os.mkfifo,
                       "a link to an endless device": lambda p: p.symlink_to("/dev/zero")}.items():
        checkpoint(f"{name} is {kind}", lambda folder, n=name, make=make: ((folder / n).unlink(), make(folder / n)))
for name, content in {"empty": b"", "cut": b'{"backbone": ', "a list": b"[]", "a number": b"7", "null": b"null",
                      "binary": bytes(range(256)), "nested 100,000 deep": b"[" * 100_000,
                      "an empty object": b"{}"}.items():
    checkpoint(f"config {name}", lambda folder, content=content: (folder / "config.json").write_bytes(content))
checkpoint("config nested deep inside of a key", lambda folder: (folder / "config.json").write_text(
    '{"backbone": ' + "[" * 900 + "]" * 900 + "}"))
for value in (7, None, [], {}, "", "no_such_model", "resnet18", "x" * 100_000, "two\nlines", "local-dir:/etc", "../etc",
              "test_vit.local-dir:/etc", "hf-hub:someone/model", "file:///etc/passwd", "vit_giant_patch14_224"):
    config(f"backbone {str(value)[:30]!r}", backbone=value)
for value in (0, -1, "2", 1.5, None, [2], 3, 10**8, 10**30):
    config(f"num_classes {value!r}", num_classes=value, class_names=None)
for value in (0, -4, "16", 1.5, 10**30):
    config(f"reduction {value!r}", reduction=value)
for value in ("stage9", 7, {}, [1], ["stage2", "stage2"], "../x", []):
    config(f"site {value!r}", site=value)
for value in ("open", 7, [], {}):
    config(f"form {value!r}", form=value)
for value in ("ab", 7, [1, 2], ["a"], {"a": 1}):
    config(f"class_names {value!r}", class_names=value)
for value in (0, -96, 10**9, [96], [96, "x"], "96", [96, 96, 96], {}):
    config(f"img_size {value!r}", img_size=value)
for value in ([], "x", dict(mean="x"), dict(mean=[1]), dict(std=[0, 0, 0]), dict(std=[float("nan")] * 3),
              dict(crop_pct="x"), dict(crop_pct=0), dict(interpolation=7), dict(unknown=1), dict(input_size=9)):
    config(f"data_config {value!r}", data_config=value)
for value in ([], "x", dict(no_such_option=1), dict(in_chans=0), dict(in_chans="x"),
              dict(in_chans=5_000), dict(in_chans=90_000), dict(embed_dim=90_000), dict(depth=2_000), dict(depth=10**9),
              dict(depth="x"),
              dict(checkpoint_path="weights.pth"), dict(pretrained=True), dict(pretrained_cfg=dict(file="x.pth")),
              dict(pretrained_cfg_overlay=dict(file="x.pth")), dict(cache_dir="/tmp"), dict(features_only=True)):
    config(f"backbone_kwargs {value!r}", backbone_kwargs=value)
config("with an unknown key", "read", unknown=[1, 2, 3])

# ---- the states of a training


@functools.cache
def sound_run() -> tuple[Path, Path]:
    """(photographs, a training of one epoch on them)."""
    root = Path(tempfile.mkdtemp(prefix="sound-"))
    for label in "ab":
        (root / "set" / label).mkdir(parents=True)
        for k in range(3):
            photograph(seed=k).save(root / "set" / label / f"{k}.png")
    resumed(root / "run", root / "set", resume=False)
    return root / "set", root / "run"


def resumed(out: Path, photographs: Path, resume=True) -> list[dict]:
    torch.manual_seed(0)
    data = PhotoFolder(photographs, test_fraction=0, val_fraction=0, transform=transforms_for(CONFIG, train=False))
    return Trainer(LoupeModel(**SETTINGS), RECIPE, out, progress=False).fit(data, resume=resume)


def state(name, change, outcome="refused"):
    def write(folder):
        shutil.copytree(sound_run()[1], folder / "run")
        change(folder / "run" / "states" / "epoch-0001")
        return folder / "run"

    add(f"state: {name}", "state", outcome, write)


STATES = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "trainer.pt"]


def _without_checksums(change):
    """A state of before November 2026."""
    def apply(folder):
        (folder / CHECKSUMS).unlink()
        change(folder)

    return apply


def _flip(folder, file, count=64):
    path = folder / file
    data = path.read_bytes()
    path.write_bytes(flip(data, 0, count))


for file in STATES:
    old = "read" if file.startswith("random") else "refused"  # every epoch draws from a seed of its own
    for name, change in {
        "missing": lambda folder, f=file: (folder / f).unlink(),
        "cut at half": lambda folder, f=file: (folder / f).write_bytes(cut((folder / f).read_bytes(), 5)),
        "of 0 bytes": lambda folder, f=file: (folder / f).write_bytes(b""),
        "that would run a command": lambda folder, f=file: torch.save(Runs(folder), folder / f),
    }.items():
        state(f"{file} {name}", change)
        state(f"{file} {name}, without checksums", _without_checksums(change), old)
    state(f"{file} with 64 bytes changed", functools.partial(_flip, file=file))
state("without checksums", _without_checksums(lambda folder: None), "read")
for name, content in {"cut": b"{", "of a list": b"[]", "of numbers": b'{"trainer.pt": 7}', "binary": bytes(range(256)),
                      "of files elsewhere": b'{"../../recipe.json": "0"}'}.items():
    state(f"checksums {name}", lambda folder, content=content: (folder / CHECKSUMS).write_bytes(content))
state("checksums that are a pipe",
      lambda folder: ((folder / CHECKSUMS).unlink(), os.mkfifo(folder / CHECKSUMS)), "read")
state("recipe.json broken", lambda folder: (folder.parents[1] / "recipe.json").write_text("{"))
state("recipe.json of another recipe", lambda folder: (folder.parents[1] / "recipe.json").write_text('{"lr": 1}'))
state("an empty folder", lambda folder: [file.unlink() for file in folder.iterdir()])
state("sound", lambda folder: None, "read")


def contents(folder: Path) -> dict[str, str]:
    """Everything below a folder: path -> digest, link or kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = f"-> {os.readlink(path)}" if path.is_symlink() else "special"
        if not path.is_symlink() and path.is_file():
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = kind
    return found
