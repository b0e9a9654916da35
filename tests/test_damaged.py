"""Whatever is wrong with a file, it ends in a result or in one line: quickly, in bounded memory, inside its folder."""

import hashlib
import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
from damaged import CASES, CONFIG, RECIPE, contents, encoded, resumed, sound_checkpoint, sound_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loupe_core.cli import main
from loupe_core.datasets import CUB200, PhotoFolder
from loupe_core.errors import LoupeError
from loupe_core.files import download, lists
from loupe_core.files.checkpoint import check_config
from loupe_core.files.download import Archive, download_cub
from loupe_core.files.images import open_image
from loupe_core.geometry import transforms_for
from loupe_core.model import LoupeModel

ROOT = Path(__file__).resolve().parents[1]
SECONDS, GIGABYTES = 10, 2
TRANSFORM = transforms_for(CONFIG, train=False)
# Accelerate reads this one of a training's files without torch's weights_only


def test_the_corpus_is_large():
    kinds = [kind for kind, _, _ in CASES.values()]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    print(f"\n{len(CASES)} damaged cases: {counts}")
    assert len(CASES) >= 200 and min(counts.values()) >= 15


# ---- how each kind is read


def read_image(path, monkeypatch):
    """Alone, and as a photograph of a set: both come to the same."""
    results = []
    for read in (_alone, _as_sample):
        try:
            results.append(read(path))
        except LoupeError as error:
            results.append(error)
    errors = [result for result in results if isinstance(result, LoupeError)]
    assert len(errors) in (0, 2)
    if errors:
        raise errors[0]


def _alone(path):
    assert open_image(path).mode == "RGB"


def _as_sample(path):
    root = path.parent.parent / "photographs"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b.jpg").symlink_to(path)
    pixels = PhotoFolder(root, val_fraction=0, test_fraction=0, transform=TRANSFORM)[0].image
    assert pixels.shape == (3, 96, 96) and pixels.isfinite().all()


def read_table(root, monkeypatch):
    for split in ("train", "test"):
        data = CUB200(root, split)
        assert len(data) and np.isfinite(data.boxes).all() and np.isfinite(data.parts).all()
        assert all(Path(path).resolve().is_relative_to(root.resolve()) for path in data.paths)


def read_checkpoint(folder, monkeypatch):
    model = LoupeModel.from_pretrained(folder)
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


def read_archive(file, monkeypatch):
    """From a file:// address; the address and the published figures are replaced, nothing else."""
    data = file.read_bytes()
    md5 = CASES_NOW.md5 or hashlib.md5(data).hexdigest()
    monkeypatch.setattr(download, "CUB_ARCHIVE", Archive("CUB_200_2011", file.as_uri(), md5, len(data)))
    target = file.parent.parent / "target"
    target.mkdir()
    try:
        download_cub(target)
    except LoupeError:
        # the lock is empty, and the archive is kept where the system refused to write what it holds
        assert {path.name for path in target.iterdir()} <= {".CUB_200_2011.lock", "CUB_200_2011.tgz.part"}
        raise
    assert [path.name for path in target.iterdir()] == ["CUB_200_2011"]


def read_state(out, monkeypatch):
    rows = resumed(out, sound_run()[0])
    assert [row["epoch"] for row in rows] == list(range(1, RECIPE.epochs + 1))


READ = dict(image=read_image, table=read_table, archive=read_archive, checkpoint=read_checkpoint, state=read_state)
CASES_NOW = None


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What is built once is not counted against the first case."""
    timm.list_models()
    LoupeModel.from_pretrained(sound_checkpoint())
    _, run = sound_run()
    yield
    for folder in (sound_checkpoint().parent, run.parent):
        shutil.rmtree(folder)


def _memory(field: str) -> float:
    """GB of this process, "VmRSS" now or "VmHWM" at most since the last reset; 0 where the system does not tell."""
    try:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6
    except OSError:
        return 0.0


def _begin_again() -> float:
    """Forgets the peak; returns what is held now, GB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _memory("VmRSS")


def _too_long(*_):
    raise TimeoutError(f"more than {SECONDS} s")


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_input_ends_in_a_result_or_in_one_line(name, tmp_path, monkeypatch):
    global CASES_NOW
    kind, write, outcome = CASES[name]
    CASES_NOW = write
    (tmp_path / "in").mkdir()
    given_ = write(tmp_path / "in")
    before = contents(tmp_path / "in")
    held = _begin_again()
    handler, began = signal.signal(signal.SIGALRM, _too_long), time.monotonic()
    signal.alarm(SECONDS)
    try:
        READ[kind](given_, monkeypatch)
        ended = "read"
    except LoupeError as error:
        ended = "refused"
        message = str(error)
        plain = message.replace("\x1b", "")  # torch prints its advice in bold
        assert message and plain.isprintable() and len(message) < 1000, message
        # a reader that ran out of time or memory must not pass for one that noticed
        assert not re.search("TimeoutError|MemoryError|more than 10 s", message), message
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert outcome in (ended, "either"), f"{ended}, expected {outcome}"
    assert time.monotonic() - began < SECONDS
    assert _memory("VmHWM") - held < GIGABYTES
    left = contents(tmp_path / "in")
    if kind == "state":  # a training that goes on writes into its own folder
        left, before = ({k for k in c if "EXECUTED" in k} for c in (left, before))
    assert left == before
    others = {path.name for path in tmp_path.iterdir()} - {"in"}
    assert others <= {dict(image="photographs", archive="target").get(kind)}


# ---- the command line


COMMANDS = {
    "image: JPEG cut at 5/10": "explain",
    "image: PNG bomb of 30,000 x 30,000": "explain",
    "image: a pipe that nobody writes to": "explain",
    "image: a name with a terminal's escape": "explain",
    "table: images.txt with '../../etc/passwd'": "evaluate",
    "table: parts/part_locs.txt binary": "evaluate",
    "table: train_test_split.txt binary": "train",
    "checkpoint: a pickle called model.safetensors": "export",
    "checkpoint: weights with NaN": "evaluate",
    "checkpoint: config nested 100,000 deep": "export",
    "checkpoint: config.json is a pipe": "export",
    "checkpoint: config backbone 'local-dir:/etc'": "audit",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_ends_with_2_and_one_line_and_tells_no_secret(name, tmp_path, capfd, monkeypatch):
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PASSWORD"):
        monkeypatch.setenv(variable, f"hf_secret{variable}")
    kind, write, _ = CASES[name]
    (tmp_path / "in").mkdir()
    damaged = write(tmp_path / "in")
    checkpoint = damaged if kind == "checkpoint" else sound_checkpoint()
    data = damaged if kind == "table" else sound_run()[0]
    argv = {
        "explain": ["explain", damaged, "--checkpoint", checkpoint, "--output", tmp_path / "o.png"],
        "evaluate": ["evaluate", data, "--checkpoint", checkpoint],
        "audit": ["audit", checkpoint, "--data", data],
        "train": ["train", data, "--out", tmp_path / "out"],
        "export": ["export", "--checkpoint", checkpoint, "--output", tmp_path / "o.onnx"],
    }[COMMANDS[name]]
    capfd.readouterr()
    assert main([str(a) for a in argv]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("loupe: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0] and "Traceback" not in out + err
    assert "hf_secret" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- the parsers, on whatever hypothesis thinks of

QUICK = settings(max_examples=60, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
NUMBERS = st.one_of(st.integers(), st.floats(), st.text(max_size=6))
ROWS = st.lists(st.lists(NUMBERS, max_size=4).map(lambda row: " ".join(map(str, row))), max_size=6).map("\n".join)


def refused_or(call, *errors):
    """The result, or None where the call refuses in one line."""
    try:
        return call()
    except LoupeError as error:
        assert "\n" not in str(error)


@QUICK
@given(content=st.one_of(ROWS.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=200)))
def test_any_bytes_as_a_list_are_a_table_or_one_line(content, tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    table = refused_or(lambda: lists.read_table(file, 2, np.arange(1, 4)))
    assert table is None or table.shape == (3, 2) and np.isfinite(table.astype(np.float32)).all()
    names = refused_or(lambda: lists.read_names(file))
    if names is not None:
        assert names[0].dtype == np.int64 and len(names[0]) == len(set(names[1])) > 0


@QUICK
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(-1e6, 1e6)), min_size=1, max_size=9, unique_by=lambda r: r[0]))
def test_a_sound_table_is_read_as_it_is(tmp_path_factory, rows):
    file = tmp_path_factory.getbasetemp() / "sound.txt"
    file.write_text("".join(f"{k} {value!r}\n" for k, value in rows))
    assert np.array_equal(lists.read_table(file, 2, np.array([k for k, _ in rows])), rows)


SIGNATURES = [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM", b"P6 ",
              b"RIFF\0\0\0\0WEBPVP8 "]


@QUICK
@given(start=st.sampled_from(SIGNATURES), content=st.binary(max_size=300))
def test_any_bytes_as_an_image_are_pixels_or_one_line(start, content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(start + content)
    image = refused_or(lambda: open_image(tmp_path / "x.jpg"))
    assert image is None or image.mode == "RGB"


@QUICK
@given(fmt=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), data=st.data())
def test_an_image_with_any_byte_changed_is_pixels_or_one_line(fmt, data, tmp_path):
    content = bytearray(encoded(fmt))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.jpg").write_bytes(content)
    image = refused_or(lambda: open_image(tmp_path / "x.jpg"))
    assert image is None or image.mode == "RGB"


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)
FIELDS = "num_classes site form reduction class_names img_size data_config backbone_kwargs".split()


@QUICK
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_in_config_json_is_taken_or_refused_in_one_line(field, value, tmp_path):
    refused_or(lambda: check_config("config.json", {"backbone": "test_vit", field: value}))
    folder = tmp_path / "best"
    shutil.copytree(sound_checkpoint(), folder, dirs_exist_ok=True)
    config = json.loads((sound_checkpoint() / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    refused_or(lambda: LoupeModel.from_pretrained(folder))


# ---- nothing is executed, nothing travels in the open


def test_no_file_of_the_project_reads_a_pickle():
    """torch.load only with weights_only=True; no pickle, marshal or numpy object arrays."""
    folders = ("loupe_core", "loupe_lab", "scripts", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 30
    for path in files:
        text = path.read_text()
        assert not re.search(r"allow_pickle=True|^\s*(import|from) (pickle|marshal|shelve|joblib|dill)\b"
                             r"|weights_only=False|\bexec\(|\byaml\.(load|unsafe_load)\(", text, re.M), path
        for call in re.finditer(r"torch\.load\((.*)", text):
            assert "weights_only=True" in call[1], f"{path}: {call[0]}"


def test_downloads_use_https_and_a_checksum():
    """An address without https is in none of the archives, and only the file that compares checksums fetches any."""
    for archive in (download.CUB_ARCHIVE, download.SEGMENTATIONS_ARCHIVE):
        assert archive.url.startswith("https://") and re.fullmatch("[0-9a-f]{32}", archive.md5)
    opens = [path.name for path in (ROOT / "loupe_core").rglob("*.py")
             if re.search(r"urlopen|urlretrieve|download_url|requests\.|httpx\.|http\.client\.HTTP", path.read_text())]
    assert opens == ["download.py"]


def test_committed_notebooks_print_no_path_of_a_machine():
    notebooks = sorted((ROOT / "book").glob("*.ipynb"))
    assert len(notebooks) > 10
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                text = "".join(output.get("text", [])) + json.dumps(
                    {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")})
                found = re.search(r"(?<![\w./-])/(home|root|tmp|work|Users|mnt|opt|var|usr)/\w|[A-Z]:\\\\Users", text)
                assert not found, f"{path.name}: {found[0]}"
