"""Sets that others publish, each as a stand-in in its own layout: the published names of files, folders and columns,
with tiny photographs. torchvision's own classes read the same folders, and must find the same."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from loupe_core import LoupeError, LoupeModel, PhotoFolder, Recipe, Trainer, open_set, transforms_for
from loupe_core.cli import main
from loupe_core.files.known_sets import KNOWN_SETS, known_set, published
from loupe_core.files.run_folder import trained_on
from loupe_core.samples import labels_of

ROOT = Path(__file__).resolve().parents[1]
COLOURS = np.random.default_rng(0).integers(0, 256, (200, 3))


def photograph(path: Path, label: int) -> None:
    """12 x 10 pixels in the colour of a class, as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), tuple(int(v) for v in COLOURS[label])).save(path, "JPEG")


def write(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_cars(root: Path) -> None:
    """16 training and 8 test photographs of 4 models; one has a slash in its name."""
    base = root / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012", "smart fortwo 2012"]
    for split, count, file in (("train", 16, "devkit/cars_train_annos.mat"),
                               ("test", 8, "cars_test_annos_withlabels.mat")):
        notes = []
        for k in range(count):
            photograph(base / f"cars_{split}" / f"{k + 1:05d}.jpg", k % 4)
            notes.append((1, 1, 12, 10, k % 4 + 1, f"{k + 1:05d}.jpg"))
        columns = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        savemat(base / file, dict(annotations=np.array(notes, dtype=columns)))
    savemat(base / "devkit" / "cars_meta.mat", dict(class_names=np.array(names, dtype=object)))


def write_aircraft(root: Path) -> None:
    """12 photographs to train, 6 to validate and 6 to test of 3 variants, of which one has a blank in its name."""
    base, names = root / "fgvc-aircraft-2013b" / "data", ["707-320", "DHC-8-100", "Model B200"]
    write(base / "variants.txt", names)
    lists = dict(train=range(0, 12), val=range(12, 18), test=range(18, 24), trainval=range(0, 18))
    for name, numbers in lists.items():
        write(base / f"images_variant_{name}.txt", (f"{1_000_000 + k} {names[k % 3]}" for k in numbers))
    for k in range(24):
        photograph(base / "images" / f"{1_000_000 + k}.jpg", k % 3)


def write_dogs(root: Path) -> None:
    """8 training and 4 test photographs of 2 breeds."""
    names = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel"]
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        files = [f"{names[k % 2]}/{names[k % 2].split('-')[0]}_{k}.jpg" for k in numbers]
        for k, file in zip(numbers, files):
            photograph(root / "Images" / file, k % 2)
        (root / "lists").mkdir(exist_ok=True)
        savemat(root / "lists" / f"{split}_list.mat", dict(
            file_list=np.array(files, dtype=object)[:, None], labels=np.array([[k % 2 + 1.0] for k in numbers]),
            annotation_list=np.array([file.removesuffix(".jpg") for file in files], dtype=object)[:, None]))


def write_nabirds(root: Path) -> None:
    """16 photographs of 3 categories with gaps in their ids, two of one name; 3 more names are of groups."""
    base = root / "nabirds"
    names = {0: "Birds", 1: "Ducks, Geese, and Swans", 295: "Ducks, Geese, and Swans", 817: "Oak Titmouse",
             1008: "House Sparrow (Female/Juvenile)", 1010: "Oak Titmouse"}
    write(base / "classes.txt", (f"{k} {name}" for k, name in names.items()))
    write(base / "hierarchy.txt", ["1 0", "295 1", "817 1", "1008 1", "1010 1"])
    rows = []
    for k in range(16):
        label = (817, 1008, 1010, 817)[k % 4]
        plain = f"{k:08x}21dc4d0cbfe14cae3c85c829"
        uuid = f"{plain[:8]}-{plain[8:12]}-{plain[12:16]}-{plain[16:20]}-{plain[20:]}"
        rows.append((uuid, label, f"{label:04d}/{plain}.jpg", int(k < 8)))
        photograph(base / "images" / rows[-1][2], label % 200)
    write(base / "images.txt", (f"{uuid} {file}" for uuid, _, file, _ in rows))
    write(base / "image_class_labels.txt", (f"{uuid} {label}" for uuid, label, _, _ in rows))
    write(base / "train_test_split.txt", (f"{uuid} {train}" for uuid, _, _, train in rows))
    write(base / "bounding_boxes.txt", (f"{uuid} 1 1 8 8" for uuid, *_ in rows))
    write(base / "parts" / "parts.txt", ["0 bill", "1 crown"])


def write_pets(root: Path) -> None:
    """8 training and 4 test photographs of 2 breeds, numbered as the set does: cats begin with a capital."""
    base, names = root / "oxford-iiit-pet", ["Egyptian_Mau", "american_pit_bull_terrier"]
    for split, numbers in (("trainval", range(8)), ("test", range(8, 12))):
        write(base / "annotations" / f"{split}.txt",
              (f"{names[k % 2]}_{k} {k % 2 + 1} {k % 2 + 1} 1" for k in numbers))
        for k in numbers:
            photograph(base / "images" / f"{names[k % 2]}_{k}.jpg", k % 2)
    write(base / "annotations" / "list.txt", ["#Image CLASS-ID SPECIES BREED ID"])


def write_flowers(root: Path) -> None:
    """One photograph to train, to validate and to test of each of the 102 categories, two to train of the first."""
    base = root / "flowers-102"
    labels = np.array([*range(1, 103), *range(1, 103), *range(1, 103), 1], dtype=np.uint8)
    for k, label in enumerate(labels, 1):
        photograph(base / "jpg" / f"image_{k:05d}.jpg", label)
    savemat(base / "imagelabels.mat", dict(labels=labels[None]))
    ids = np.arange(1, len(labels) + 1, dtype=np.uint16)
    savemat(base / "setid.mat", dict(trnid=ids[None, [*range(102), 306]], valid=ids[None, 102:204],
                                     tstid=ids[None, 204:306]))


def write_inaturalist_2021(root: Path) -> None:
    """8 training and 4 validation photographs of 2 species, in the folders that torchvision makes."""
    for folder, numbers in (("2021_train_mini", range(8)), ("2021_valid", range(8, 12))):
        for k in numbers:
            name = ("00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
                    "00001_Animalia_Chordata_Aves_Passeriformes_Turdidae_Turdus_merula")[k % 2]
            photograph(root / folder / name / f"{k:08d}-21dc.jpg", k % 2)


def write_inaturalist_2018(root: Path) -> None:
    """8 training and 4 validation photographs of 3 numbered classes, which count across two groups."""
    folders = ["Plantae/2", "Aves/0", "Plantae/10", "Aves/1"]
    for n in (3, 4, 5, 6, 7, 8, 9):  # torchvision counts on: all numbers are there
        folders.append(f"Aves/{n}")
    for split, times in (("train", 2), ("val", 1)):
        files = [f"{folder}/{split}{k}.jpg" for k in range(times) for folder in folders]
        for file in files:
            photograph(root / "2018" / file, int(file.split("/")[1]))
        images = [dict(id=k, file_name=f"train_val2018/{file}") for k, file in enumerate(files)]
        (root / f"{split}2018.json").write_text(json.dumps(dict(images=images, categories=[], annotations=[])))


STAND_INS = {
    "Stanford Cars": write_cars, "FGVC-Aircraft": write_aircraft, "Stanford Dogs": write_dogs, "NABirds": write_nabirds,
    "Oxford-IIIT Pet": write_pets, "Flowers-102": write_flowers, "iNaturalist 2018": write_inaturalist_2018,
    "iNaturalist 2021 mini": write_inaturalist_2021,
}


@pytest.fixture(params=STAND_INS)
def stand_in(request, tmp_path):
    """The name of a set, and the folder that torchvision would be given for it."""
    STAND_INS[request.param](tmp_path)
    return request.param, tmp_path


SIZES = {  # training with validation, test, classes
    "Stanford Cars": (16, 8, 4), "FGVC-Aircraft": (18, 6, 3), "Stanford Dogs": (8, 4, 2), "NABirds": (8, 8, 3),
    "Oxford-IIIT Pet": (8, 4, 2), "Flowers-102": (205, 102, 102), "iNaturalist 2018": (22, 11, 11),
    "iNaturalist 2021 mini": (8, 4, 2),
}


def test_a_set_is_known_by_its_own_files_and_cut_by_its_own_lists(stand_in):
    name, root = stand_in
    first = open_set(root)
    parts = {split: first.with_split(split) for split in ("train", "val", "test")}
    train, val, test = (len(part) for part in parts.values())
    assert (train + val, test, len(parts["train"].class_names)) == SIZES[name]
    assert 0 < val <= train
    paths = [set(part.paths) for part in parts.values()]
    assert not (paths[0] & paths[1] or paths[0] & paths[2] or paths[1] & paths[2])
    assert all(Path(path).is_file() for path in parts["train"].all_paths)
    told = parts["train"].describe()
    assert f": {name} by its own lists" in told and "\n" not in told
    assert ("published with" in told) == (name != "iNaturalist 2019")  # a stand-in is smaller
    assert parts["test"].image(0).size == (12, 10)


def test_the_sets_own_folder_may_be_named_as_well(stand_in):
    name, root = stand_in
    known, base = known_set(root)
    assert known.name == name and known_set(base) == (known, base)
    assert published(base).names == published(root).names


def test_a_photograph_of_every_class_has_the_colour_of_its_label(stand_in):
    """Labels follow the lists: a photograph was drawn in the colour of the class that its list names."""
    _, root = stand_in
    data = open_set(root, "all")
    colours = {}
    for i, label in enumerate(data.labels):
        colours.setdefault(int(label), set()).add(tuple(c // 16 for c in data.image(i).getpixel((0, 0))))
    assert set(colours) == set(range(len(data.class_names)))
    assert all(len(found) == 1 for found in colours.values())


def theirs(name: str, root: Path, monkeypatch) -> dict[str, list]:
    """torchvision's own sets in the same folder, by our splits."""
    if name == "Flowers-102":  # it compares the checksums of the published lists
        monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: Path(path).is_file())
    made = {
        "Stanford Cars": lambda: (datasets.StanfordCars, ("train",), ("test",)),
        "FGVC-Aircraft": lambda: (datasets.FGVCAircraft, ("trainval",), ("test",)),
        "Oxford-IIIT Pet": lambda: (datasets.OxfordIIITPet, ("trainval",), ("test",)),
        "Flowers-102": lambda: (datasets.Flowers102, ("train", "val"), ("test",)),
        "iNaturalist 2021 mini": lambda: (datasets.INaturalist, ("2021_train_mini",), ("2021_valid",)),
        "iNaturalist 2018": lambda: (datasets.INaturalist, ("2018",), ()),
    }
    kind, train, test = made[name]()
    return dict(train=[kind(root, split) for split in train], test=[kind(root, split) for split in test])


TORCHVISIONS = [name for name in STAND_INS if name not in ("Stanford Dogs", "NABirds")]


def files_of(dataset) -> list[str]:
    if hasattr(dataset, "index"):
        return [str(Path(dataset.root, dataset.all_categories[k], file)) for k, file in dataset.index]
    if hasattr(dataset, "_samples"):
        return [path for path, _ in dataset._samples]
    return [str(path) for path in getattr(dataset, "_image_files", None) or dataset._images]


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_torchvisions_own_class_finds_the_same_photographs_labels_and_names(name, tmp_path, monkeypatch):
    STAND_INS[name](tmp_path)
    own = theirs(name, tmp_path, monkeypatch)
    found = published(tmp_path)
    for split, parts in own.items():
        want = {path: int(label) for part in parts for path, label in zip(files_of(part), labels_of(part))}
        if split == "train" and name == "iNaturalist 2018":
            assert {str(path): label for path, label in zip(found.paths, found.labels)} == want
        elif parts:
            assert {str(path): label for path, label, part in zip(found.paths, found.labels, found.splits)
                    if part == split} == want
    first = own["train"][0]
    assert found.class_names == list(getattr(first, "classes", None) or first.all_categories)


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_the_trainer_takes_torchvisions_own_sets(name, tmp_path, monkeypatch):
    """Their labels are neither in `labels` nor in `targets`, and each is the one that an item has."""
    STAND_INS[name](tmp_path)
    train = theirs(name, tmp_path, monkeypatch)["train"][0]
    labels = labels_of(train)
    assert labels.dtype == np.int64 and [int(train[i][1]) for i in range(len(train))] == labels.tolist()
    torch.manual_seed(0)
    model = LoupeModel("swin_micro", num_classes=int(labels.max()) + 1, pretrained=False)
    train.transform = transforms_for(model.data_config, train=False)
    if name == "Oxford-IIIT Pet":  # it has two places for it
        train.transforms = datasets.vision.StandardTransform(train.transform)
    rows = Trainer(model, Recipe(epochs=1, batch_size=8, workers=0, precision="no"), progress=False).fit(train, train)
    assert len(rows) == 1 and np.isfinite(rows[0]["val_loss"])


@pytest.mark.parametrize("make, labels", [
    (lambda root: datasets.OxfordIIITPet(root, target_types="binary-category"), [0, 1] * 4),
    (lambda root: datasets.OxfordIIITPet(root, target_types="segmentation"), None),
    (lambda root: datasets.OxfordIIITPet(root, target_types=["category", "segmentation"]), None),
    (lambda root: datasets.OxfordIIITPet(root, target_transform=lambda label: 5 - label), [5, 4] * 4),
])
def test_labels_of_pets_are_those_that_were_asked_for(tmp_path, make, labels):
    write_pets(tmp_path)
    if labels is None:
        with pytest.raises(LoupeError, match="OxfordIIITPet: found no labels"):
            labels_of(make(tmp_path))
    else:
        assert labels_of(make(tmp_path)).tolist() == labels


@pytest.mark.parametrize("kind, labels", [
    ("genus", [0] * 4 + [1] * 4), ("kingdom", [0] * 8), (["full", "genus"], None),
])
def test_labels_of_inaturalist_are_those_that_were_asked_for(tmp_path, kind, labels):
    write_inaturalist_2021(tmp_path)
    data = datasets.INaturalist(tmp_path, "2021_train_mini", target_type=kind)
    if labels is None:
        with pytest.raises(LoupeError, match="INaturalist: found no labels"):
            labels_of(data)
    else:
        assert labels_of(data).tolist() == labels == [data[i][1] for i in range(8)]


@pytest.mark.slow
@pytest.mark.parametrize("name", STAND_INS)
def test_the_command_trains_and_evaluates_without_an_option(name, tmp_path, capsys):
    STAND_INS[name](tmp_path / "data")
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    assert main(["train", data, "--backbone", "swin_micro", "--recipe", "probe", "--workers", "0", "--out", out]) == 0
    told = capsys.readouterr().out
    train, test, classes = SIZES[name]
    assert f"{name} by its own lists" in told and f"{test} test photographs of {classes} classes" in told
    assert main(["evaluate", data, "--checkpoint", out]) == 0
    assert f" of {test}" in capsys.readouterr().out
    seen = trained_on(tmp_path / "out" / "best", "train", "val")  # by the training, and by the choice of its epoch
    assert len(seen) > 0 and not seen & set(open_set(data, "test").identities())


NEEDED = {  # each of these is a file or folder without which the set cannot be read
    "Stanford Cars": ["devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat",
                      "cars_train/", "cars_test/"],
    "FGVC-Aircraft": ["variants.txt", "images_variant_trainval.txt", "images_variant_test.txt", "images/"],
    "Stanford Dogs": ["lists/train_list.mat", "lists/test_list.mat", "Images/"],
    "NABirds": ["classes.txt", "image_class_labels.txt", "train_test_split.txt", "images/"],
    "Oxford-IIIT Pet": ["annotations/trainval.txt", "annotations/test.txt", "images/"],
    "Flowers-102": ["imagelabels.mat", "setid.mat", "jpg/"],
    "iNaturalist 2018": ["train2018.json", "val2018.json", "2018/"],
    "iNaturalist 2021 mini": ["2021_valid/"],
}


@pytest.mark.parametrize("name, gone", [(name, gone) for name, names in NEEDED.items() for gone in names])
def test_a_set_that_is_half_there_is_refused_with_the_name_of_what_is_missing(name, gone, tmp_path):
    STAND_INS[name](tmp_path)
    known, base = known_set(tmp_path)
    shutil.move(base / gone.rstrip("/"), tmp_path / "elsewhere")
    with pytest.raises(LoupeError) as caught:
        open_set(base)
    said = str(caught.value)
    expected = gone if gone != "2018/" else "train_val2018/"
    assert f"{base}: found {name} without {expected}, expected it there" in said and known.page in said
    assert "\n" not in said and "delete" not in said and "remove" not in said


def test_inaturalist_without_training_photographs_is_told(tmp_path):
    write_inaturalist_2021(tmp_path)
    shutil.rmtree(tmp_path / "2021_train_mini")
    with pytest.raises(LoupeError, match="found iNaturalist 2021 without 2021_train/"):
        open_set(tmp_path)


def test_the_folders_of_inaturalists_archives_are_understood(tmp_path):
    """Validation is then the test, and not what chooses an epoch, as in a folder of one's own."""
    write_inaturalist_2021(tmp_path)
    (tmp_path / "2021_train_mini").rename(tmp_path / "train_mini")
    (tmp_path / "2021_valid").rename(tmp_path / "val")
    assert len(open_set(tmp_path, "test")) == 4 and len(open_set(tmp_path, "val")) == 2


def test_both_training_sets_of_inaturalist_are_one_too_many(tmp_path):
    write_inaturalist_2021(tmp_path)
    shutil.copytree(tmp_path / "2021_train_mini", tmp_path / "2021_train")
    with pytest.raises(LoupeError, match="of which one holds photographs of the other; expected one"):
        open_set(tmp_path)


def test_several_sets_below_a_folder_are_named(tmp_path, make_cub):
    write_pets(tmp_path)
    make_cub()
    with pytest.raises(LoupeError, match="several sets .Oxford-IIIT Pet in .*, CUB-200-2011 in .*name its own folder"):
        open_set(tmp_path)
    assert len(open_set(tmp_path / "CUB_200_2011", "test")) == 15
    assert len(open_set(tmp_path / "oxford-iiit-pet", "test")) == 4


def test_a_list_of_labels_goes_before_the_sets_own(tmp_path):
    write_pets(tmp_path)
    images = tmp_path / "oxford-iiit-pet" / "images"
    write(tmp_path / "own.csv", ["file,label", *(f"{path.name},{path.name[0]}" for path in images.iterdir())])
    assert open_set(images, labels=tmp_path / "own.csv").class_names == ["E", "a"]


@pytest.mark.parametrize("file, line, says", [
    ("images.txt", "nonsense", "expected an id and a value"),
    ("images.txt", "00000000-21dc-4d0c-bfe1-4cae3c85c829 ../../etc/passwd", "expected a path inside of the folder"),
    ("image_class_labels.txt", "00000000-21dc-4d0c-bfe1-4cae3c85c829 9999", "an image id of images.txt and a class id"),
    ("image_class_labels.txt", "no-such-image 817", "an image id of images.txt and a class id"),
    ("train_test_split.txt", "00000000-21dc-4d0c-bfe1-4cae3c85c829 2", "0 .test. or 1 .train."),
])
def test_a_wrong_line_of_nabirds_is_named(tmp_path, file, line, says):
    write_nabirds(tmp_path)
    path = tmp_path / "nabirds" / file
    write(path, [*path.read_text().splitlines(), line])
    with pytest.raises(LoupeError, match=says) as caught:
        open_set(tmp_path)
    assert "\n" not in str(caught.value)


def test_nabirds_keeps_its_names_and_says_which_are_groups(tmp_path):
    write_nabirds(tmp_path)
    data = open_set(tmp_path)
    assert data.class_names == ["Oak Titmouse (817)", "House Sparrow (Female/Juvenile)", "Oak Titmouse (1010)"]
    assert "passed over: 3 names in classes.txt without photographs" in data.describe()


@pytest.mark.parametrize("name, list_name, change", [
    ("FGVC-Aircraft", "images_variant_test.txt", lambda lines: [line for line in lines if "Model" not in line]),
    ("Oxford-IIIT Pet", "annotations/test.txt", lambda lines: lines[::2]),
    ("Oxford-IIIT Pet", "annotations/trainval.txt", lambda lines: lines[1::2]),
])
def test_a_class_without_photographs_is_refused(name, list_name, change, tmp_path):
    STAND_INS[name](tmp_path)
    path = known_set(tmp_path)[1] / list_name
    write(path, change(path.read_text().splitlines()))
    with pytest.raises(LoupeError, match="found no (training|test) photographs of '.*' in the lists of"):
        open_set(tmp_path)


@pytest.mark.parametrize("list_name, line, says", [
    ("variants.txt", None, "variants.txt: found an empty file"),
    ("images_variant_test.txt", "1000018 No Such Plane", "line 7: found '1000018 No Such Plane', expected a photo"),
    ("images_variant_test.txt", "1000018 707-320", "found 'images/1000018.jpg' twice"),
])
def test_a_wrong_line_of_aircraft_is_named(tmp_path, list_name, line, says):
    write_aircraft(tmp_path)
    path = tmp_path / "fgvc-aircraft-2013b" / "data" / list_name
    write(path, [] if line is None else [*path.read_text().splitlines(), line])
    with pytest.raises(LoupeError, match=says):
        open_set(tmp_path)


@pytest.mark.parametrize("name, file, content", [
    ("Stanford Cars", "devkit/cars_train_annos.mat", dict(annotations=np.arange(4))),
    ("Stanford Cars", "devkit/cars_train_annos.mat", dict(other=1)),
    ("Stanford Cars", "devkit/cars_meta.mat", dict(class_names=np.array(["one"], dtype=object))),
    ("Stanford Dogs", "lists/train_list.mat", dict(file_list=np.array(["a/b.jpg"], dtype=object), labels=[1, 2])),
    ("Stanford Dogs", "lists/train_list.mat", dict(file_list=np.array(["a/b.jpg"], dtype=object), labels=[0])),
    ("Flowers-102", "imagelabels.mat", dict(labels=np.full((1, 307), 103))),
    ("Flowers-102", "setid.mat", dict(trnid=[400], valid=[1], tstid=[2])),
])
def test_a_matlab_file_of_other_content_is_told_in_one_line(name, file, content, tmp_path):
    STAND_INS[name](tmp_path)
    savemat(known_set(tmp_path)[1] / file, content)
    with pytest.raises(LoupeError, match="expected") as caught:
        open_set(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, file", [
    ("Stanford Cars", "devkit/cars_train_annos.mat"), ("Flowers-102", "setid.mat"),
    ("iNaturalist 2018", "val2018.json"),
])
def test_a_damaged_list_ends_in_a_result_or_in_one_line(name, file, tmp_path):
    STAND_INS[name](tmp_path)
    path = known_set(tmp_path)[1] / file
    sound, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for k in range(8):
        damaged = bytearray(sound)
        if k < 4:
            damaged = damaged[: k * len(sound) // 4]
        else:  # SciPy's reader is killed by some of these, in a process of its own
            for at in rng.integers(0, len(sound), 8):
                damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            published(tmp_path)
        except LoupeError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 4


def test_a_folder_of_ones_own_is_none_of_them(tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        for k in range(3):
            photograph(tmp_path / name / f"{k}.jpg", k)
    assert known_set(tmp_path) is None and published(tmp_path) is None
    assert "train/ is train" in PhotoFolder(tmp_path).describe()


def test_missing_photographs_are_counted_before_a_training(tmp_path, capsys):
    write_pets(tmp_path)
    (tmp_path / "oxford-iiit-pet" / "images" / "Egyptian_Mau_2.jpg").unlink()
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "1 of 12 listed photographs are missing (oxford-iiit-pet/images/Egyptian_Mau_2.jpg)" in told


def test_the_table_of_the_page_is_that_of_the_program():
    page = (ROOT / "book" / "your_photographs.md").read_text()
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    listed = [known for known in KNOWN_SETS if known.sizes]
    assert set(table) == {"set", *(known.name for known in listed)}
    for known in listed:
        assert table[known.name][:3] == [f"{size:,}" for size in known.sizes]
        assert known.page in table[known.name][3] or known.name.endswith("mini")


def test_every_known_set_has_a_stand_in_or_says_why_not():
    without = {known.name for known in KNOWN_SETS} - set(STAND_INS)
    assert without == {"iNaturalist 2017", "iNaturalist 2019", "iNaturalist 2021"}  # read as 2018, 2018 and 2021 mini
