"""Tables of answers and the page of a test: `loupe predict`, `loupe evaluate --report`, and whole photographs."""

import csv
import re
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from loupe_core import LoupeError, LoupeModel, open_image, transforms_for
from loupe_core.cli import main
from loupe_core.geometry import CROP_MODES, EvalTransform
from loupe_core.heatmap import peak
from loupe_lab.evidence.answers import mask_columns
from loupe_lab.evidence.explain import explain
from loupe_lab.pages import report

NAMES = ["Rotkehlchen süß", "снегирь", "コマドリ", "أبو الحناء <b>"]  # four scripts, blanks, and a tag of HTML


def write(file, colour, k, size=(60, 40)):
    rng = np.random.default_rng(k)
    picture = rng.integers(0, 90, (size[1], size[0], 3)).astype(np.uint8)
    picture[10:30, 10:40] = colour
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Photographs with names in four scripts, the leavings of a system beside them, and a model trained on them."""
    root = tmp_path_factory.mktemp("walk")
    for c, name in enumerate(NAMES):
        for k in range(12):
            write(root / "my photos" / name / f"ä {k}.png", np.eye(3)[c % 3] * (250 - 60 * c), 100 * c + k)
        (root / "my photos" / name / ".DS_Store").write_bytes(b"\0\1")
    assert main(["train", str(root / "my photos"), "--out", str(root / "my run"), "--recipe", "finetune", "--backbone",
                 "swin_micro", "--epochs", "1", "--site", "stage2"]) == 0
    return root


def rows_of(file):
    with open(file, encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


class Texts(HTMLParser):
    """The texts of a page, and what it refers to; an error where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.texts, self.references, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read_page(file) -> Texts:
    page = Texts()
    page.feed(file.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_walk_ends_in_a_page_and_two_tables(walk, capsys):
    out, photos = walk / "my report", walk / "my photos"
    assert main(["evaluate", str(photos), "--checkpoint", str(walk / "my run"), "--report", str(out)]) == 0
    told = capsys.readouterr().out
    n, of = map(int, re.search(r"\((\d+) of (\d+) images", told).groups())
    page = read_page(out / "index.html")
    text = " ".join(page.texts)
    assert f"my photos: {n} of {of} right" in text and told.splitlines()[0] in text and "chance 0.2500" in text
    names = LoupeModel.from_pretrained(walk / "my run" / "best").class_names
    assert names == sorted(unicodedata.normalize("NFC", name) for name in NAMES)
    assert all(name in text for name in names) and f"{of - n} of {of} answers are wrong" in text
    assert all(ref.startswith("data:image/jpeg;base64,") or ref == "predictions.csv" for ref in page.references)
    assert len(page.references) == 1 + 2 * min(of - n, report.MISTAKES)
    rows = rows_of(out / "predictions.csv")
    assert len(rows) == of and sum(int(row["right"]) for row in rows) == n
    assert {row["label"] for row in rows} == set(names)


def test_a_table_of_photographs_without_labels(walk, tmp_path, capsys):
    (walk / "new" / "deep").mkdir(parents=True, exist_ok=True)
    write(walk / "new" / "a b.png", (200, 0, 0), 1)
    write(walk / "new" / "deep" / "ü.png", (0, 200, 0), 2)
    (walk / "new" / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "p.csv"
    words = ["predict", str(walk / "new"), "--checkpoint", str(walk / "my run"), "--out", str(out), "--top", "2"]
    assert main(words) == 2
    told = capsys.readouterr()
    assert f"2 photographs: {out}" in told.out and "broken.jpg: found no image format" in told.err
    assert told.err.strip().endswith("1 of 3 photographs could not be read, the lines above say why; all others are in "
                                     "the table")
    rows = rows_of(out)
    assert [row["file"] for row in rows] == ["a b.png", "deep/ü.png"]
    model = LoupeModel.from_pretrained(walk / "my run" / "best")
    for row in rows:
        x, geometry = transforms_for(model.data_config, train=False)(open_image(walk / "new" / row["file"]))
        with torch.no_grad():
            top = model(x[None])[0].softmax(0).topk(2)
        assert [row["class_1"], row["class_2"]] == [model.class_names[k] for k in top.indices]
        assert float(row["probability_1"]) == pytest.approx(top.values[0].item(), abs=1e-4)
        mask = explain(model, x[None], "mask")[0]
        assert float(row["mask_mean"]) == pytest.approx(mask.mean().item(), abs=1e-4)
        if row["peak_x"]:
            assert (float(row["peak_x"]), float(row["peak_y"])) == pytest.approx(peak(mask, geometry), abs=0.06)


@pytest.mark.parametrize("words, says", [
    (["--top", "0"], "--top 0: expected 1 or more"),
    (["--out", "."], "--out .: expected a file to write"),
    (["--out", "none/p.csv"], "expected a file to write in a folder that is there"),
    (["--site", "stage9"], "no gate for site='stage9'"),
])
def test_wrong_words_of_predict(walk, capsys, words, says):
    assert main(["predict", str(walk / "my photos"), "--checkpoint", str(walk / "my run"), *words]) == 2
    assert says in capsys.readouterr().err


def test_no_table_is_written_where_no_photograph_can_be_read(walk, tmp_path, capsys):
    (tmp_path / "a b.jpg").write_bytes(b"no image")
    assert main(["predict", str(tmp_path), "--checkpoint", str(walk / "my run"), "--out", str(tmp_path / "p.csv")]) == 2
    assert "1 of 1 photographs could not be read, the lines above say why; no table was written" in \
        capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_a_report_takes_the_place_of_a_report_and_of_nothing_else(walk, tmp_path, capsys):
    words = ["evaluate", str(walk / "my photos"), "--checkpoint", str(walk / "my run"), "--report"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "index.html").write_text("my thesis")
    assert main([*words, str(tmp_path / "thesis")]) == 2
    assert "found something else there; expected a new or empty folder, or an earlier report" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "index.html").read_text() == "my thesis"
    for _ in range(2):
        assert main([*words, str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["index.html", "predictions.csv"]


def test_a_bare_backbones_mistakes_stand_beside_grad_cam(walk, tmp_path, capsys):
    torch.manual_seed(0)
    LoupeModel("swin_micro", num_classes=4, site=(), class_names=sorted(NAMES)).save_pretrained(tmp_path / "bare")
    assert main(["evaluate", str(walk / "my photos"), "--split", "all", "--checkpoint", str(tmp_path / "bare"),
                 "--report", str(tmp_path / "report")]) == 0
    page = read_page(tmp_path / "report" / "index.html")
    assert len(page.references) == 1 + 2 * report.MISTAKES and "beside its Grad-CAM:" in " ".join(page.texts)
    assert rows_of(tmp_path / "report" / "predictions.csv")[0]["mask_mean"] == ""
    said = capsys.readouterr().out
    assert "   no mask\n" in said and "nan" not in said
    assert main(["audit", str(walk / "my photos"), "--split", "all", "--checkpoint", str(tmp_path / "bare")]) == 2
    assert "holds a bare backbone, which has no mask; expected a model with a gate" in capsys.readouterr().err


def test_many_classes_are_listed_by_what_is_taken_for_what():
    counts = np.diag(np.full(report.MATRIX + 1, 5))
    counts[3, 7], counts[2, 1] = 4, 2
    text = report._confusion(counts, [f"c{k}" for k in range(len(counts))])
    assert re.findall(r'name">(c\d+)</th><th class="name">(c\d+)</th><td>(\d)', text) == [
        ("c3", "c7", "4"), ("c2", "c1", "2")]
    few = report._confusion(counts[:9, :9], [f"c{k}" for k in range(9)])
    assert few.count("<td") == 81


def test_recall_and_precision_of_each_class():
    counts = np.array([[3, 1], [2, 0]])
    cells = re.findall(r"<td>([^<]*)</td>", report._classes(counts, ["a", "b"]))
    assert cells == ["4", "0.75", "5", "0.60", "2", "0.00", "1", "0.00"]


def test_a_mask_in_numbers():
    geometry = EvalTransform(64, (0.5,) * 3, (0.5,) * 3)(Image.new("RGB", (64, 64)))[1]
    flat = mask_columns(np.full((7, 7), 0.3), geometry)
    assert (flat["mask_top_tenth"], flat["mask_mean"], flat["peak_x"]) == (0.1, 0.3, "")
    mask = np.zeros((10, 10))
    mask[2, 5] = 0.8
    numbers = mask_columns(mask, geometry)
    assert (numbers["mask_min"], numbers["mask_max"], numbers["mask_top_tenth"]) == (0.0, 0.8, 1.0)
    assert (numbers["peak_x"], numbers["peak_y"]) == pytest.approx(peak(mask, geometry), abs=0.06)


# --- whole photographs --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(90, 70), (71, 93), (33, 150), (200, 201), (64, 64)])
@pytest.mark.parametrize("mode", CROP_MODES)
def test_each_way_to_crop_knows_the_way_back(mode, size):
    w, h = size
    picture = np.zeros((h, w, 3), np.uint8)
    picture[h // 2 - 4 : h // 2 + 5, w // 2 - 4 : w // 2 + 5] = 255
    x, geometry = EvalTransform(64, (0.0,) * 3, (1.0,) * 3, 1.0, "bilinear", mode)(Image.fromarray(picture))
    light, middle = x[0].double().numpy(), np.arange(64) + 0.5
    there = geometry.to_original([(light.sum(0) @ middle / light.sum(), light.sum(1) @ middle / light.sum())])[0]
    assert abs(there - (w // 2 + 0.5, h // 2 + 0.5)).max() < 0.3
    seen = np.array(geometry.visible_box())
    assert mode == "center" and w != h or np.abs(seen - (0, 0, w, h)).max() < 1e-6


def test_a_wrong_crop_mode_is_named():
    with pytest.raises(LoupeError, match="crop_mode: found 'all', expected one of center, squash, border"):
        EvalTransform(64, (0.5,) * 3, (0.5,) * 3, crop_mode="all")


def test_evaluate_says_how_much_it_sees_and_can_show_the_whole(walk, capsys):
    words = ["evaluate", str(walk / "my photos"), "--checkpoint", str(walk / "my run")]
    assert main(words) == 0
    crop = capsys.readouterr().out
    assert main([*words, "--whole"]) == 0
    whole = capsys.readouterr().out
    share = int(re.search(r"it sees (\d+)% of a photograph", crop)[1])
    assert share == pytest.approx(100 * 0.9**2 * 40 / 60, abs=2) and "it sees 100% of a photograph" in whole


def test_a_training_prints_a_line_for_each_epoch(walk, tmp_path, capsys):
    assert main(["train", str(walk / "my photos"), "--out", str(tmp_path / "r"), "--recipe", "small", "--backbone",
                 "swin_micro", "--epochs", "2", "--batch-size", "3"]) == 0
    told = capsys.readouterr().out
    lines = re.findall(r"^epoch +(\d)   loss \d\.\d{4}   validation loss \d\.\d{4}, accuracy \d\.\d{4} .* \d+ s$", told,
                       re.M)
    assert lines == ["1", "2"]
    # 36 photographs in batches of 3 are 12 steps an epoch
    assert re.search(r"^about \d\.\d minutes more for 2 epochs, fewer where it stops early$", told, re.M)


def test_the_next_command_works_as_it_stands(walk, tmp_path, capsys):
    import shlex

    out = tmp_path / "it's a run"
    assert main(["train", str(walk / "my photos"), "--out", str(out), "--recipe", "probe", "--backbone",
                 "swin_micro"]) == 0
    told = capsys.readouterr().out
    words = shlex.split(re.search(r"next: (.*)$", told, re.M)[1])
    assert words[0] == "loupe" and main(words[1:]) == 0
