"""The explorer computes in the browser what the package computes in Python, and every control does what it says."""

import base64
import io
import json
import zlib

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from loupe_core import Geometry, LoupeError, LoupeModel, transforms_for
from loupe_core.heatmap import contour_level, mask_to_original, overlay, peak
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import SPECIES
from loupe_lab.pages.explorer import Answer, HeatmapExplorer, Picture, ask, field_birds, likeliest


def photograph(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


# crop, odd sizes, two scales, a mirror; one picture of which all is seen
GEOMETRIES = [
    Geometry((60, 81), (56, 56), (64 / 60, 86 / 81), (4.0, 15.0)),
    Geometry((97, 50), (56, 56), (0.7, 0.7), (3.0, -4.0), flipped=True),
    Geometry((56, 56), (56, 56), (1.0, 1.0), (0.0, 0.0)),
]
SHAPES = [(7, 7), (14, 9), (56, 56)]


@pytest.fixture
def explorer():
    pictures = [Picture(f"picture {i}", photograph(*g.original_size, i), g,
                        {"crown": (20.5, 30.0), "tail": (40.0, 12.0)}, truth=f"species {i}", telling="crown")
                for i, g in enumerate(GEOMETRIES)]
    rng = np.random.default_rng(1)
    sources = {f"source {k}": ([Answer(rng.normal(size=shape), [(f"species {k}", 0.75), ("another", 0.25)])
                                for _ in pictures], f"note {k}") for k, shape in enumerate(SHAPES)}
    return HeatmapExplorer(pictures, sources)


def decoded(answer: dict) -> np.ndarray:
    """The map that the bytes of an answer stand for."""
    steps = np.frombuffer(zlib.decompress(base64.b64decode(answer["bytes"])), np.uint8).astype(float)
    return (answer["low"] + (answer["high"] - answer["low"]) * steps / 255).reshape(answer["h"], answer["w"])


@pytest.fixture
def opened(explorer, open_html):
    """The explorer in a browser: (explorer, page)."""
    page = open_html(explorer.html())
    page.wait_for_selector(".loupe-explorer canvas")
    return explorer, page


def pixels(page, n=0) -> np.ndarray:
    """The RGB bytes of the n-th canvas."""
    size, values = page.evaluate("""n => {
        const c = document.querySelectorAll(".loupe-explorer canvas")[n];
        return [[c.height, c.width, 4], [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]];
    }""", n)
    return np.array(values, np.uint8).reshape(size)[..., :3]


def choose(page, label, value):
    with redrawn(page):
        page.get_by_role("combobox", name=label, exact=True).select_option(value)


class redrawn:
    """Waits until what was done in it has been drawn."""

    def __init__(self, page):
        self.page = page

    def __enter__(self):
        self.before = self.page.evaluate("document.querySelector('[data-drawn]').dataset.drawn")

    def __exit__(self, *error):
        if not error[0]:
            self.page.wait_for_function(
                "b => document.querySelector('[data-drawn]').dataset.drawn !== b", arg=self.before)


def slide(page, label, value):
    with redrawn(page):
        page.get_by_label(label).evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", str(value))


@pytest.mark.parametrize("index", range(len(GEOMETRIES)))
def test_every_pixel_in_the_browser_is_pythons(opened, index):
    explorer, page = opened
    geometry = GEOMETRIES[index]
    if index:
        choose(page, "Picture", str(index))
    slide(page, "Opacity of the heatmap", 0)
    seen = ~np.isnan(mask_to_original(np.zeros((2, 2)), geometry))
    with redrawn(page):
        page.get_by_role("combobox", name="View").select_option("beside")
    image = pixels(page)  # the picture alone, as this browser decodes it
    assert np.abs(image.astype(int) - np.asarray(explorer_image(explorer, index)).astype(int)).max() <= 2
    assert np.array_equal(pixels(page, 1)[seen], image[seen])  # opacity 0
    choose(page, "View", "over")
    for k in range(len(SHAPES)):
        if k:
            choose(page, "Heatmap", str(k))
        for alpha in (0.55, 1):
            slide(page, "Opacity of the heatmap", alpha)
            heatmap = mask_to_original(decoded(explorer.data["answers"][k][index]), geometry)
            answer = explorer.data["answers"][k][index]
            expected = overlay(image, heatmap, alpha, limits=(answer["low"], answer["high"]))
            assert np.array_equal(pixels(page), expected), f"source {k}, opacity {alpha}"


def explorer_image(explorer, index) -> Image.Image:
    source = explorer.data["pictures"][index]["src"]
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")


def test_bytes_keep_a_map_to_a_255th_of_its_range_and_the_peak_as_it_was(explorer):
    maps = np.random.default_rng(1)
    for k, shape in enumerate(SHAPES):
        for i, geometry in enumerate(GEOMETRIES):
            map_ = maps.normal(size=shape)
            answer = explorer.data["answers"][k][i]
            assert np.abs(decoded(answer) - map_).max() <= np.ptp(map_) / 255 / 2 + 1e-12
            np.testing.assert_allclose(answer["peak"], peak(map_, geometry), atol=0.006)


def test_peak_and_percentile_in_the_browser_are_pythons(explorer, open_html):
    module = explorer.html().split('<script type="module">')[1].split("\nmount(")[0]
    page = open_html(f'<script type="module">{module}\nwindow.loupe = {{peak, percentile, upsample}};</script>')
    page.wait_for_function("window.loupe")
    rng = np.random.default_rng(3)
    for geometry in GEOMETRIES:
        map_ = rng.integers(0, 5, (6, 8)).astype(float)  # with ties
        settings = dict(original=geometry.original_size, input=geometry.input_size, scale=geometry.scale,
                        offset=geometry.offset, flipped=geometry.flipped)
        found = page.evaluate("""([values, g]) => {
            const map = {h: 6, w: 8, values: Float64Array.from(values)}, heatmap = loupe.upsample(map, g);
            return [loupe.peak(map, g), [50, 62.5, 90, 100].map(p => loupe.percentile(heatmap, p))];
        }""", [map_.ravel().tolist(), settings])
        np.testing.assert_allclose(found[0], peak(map_, geometry), rtol=1e-12)
        heatmap = mask_to_original(map_, geometry)
        np.testing.assert_allclose(found[1], [contour_level(heatmap, p) for p in (50, 62.5, 90, 100)], rtol=1e-12)


def test_the_contour_separates_what_is_above_from_what_is_below(opened):
    explorer, page = opened
    slide(page, "Contour at percentile", 80)
    path = page.locator("path.contour").first.get_attribute("d")
    points = np.array([[float(v) for v in pair.split()] for pair in path.replace("L", "M").split("M") if pair])
    heatmap = mask_to_original(decoded(explorer.data["answers"][0][0]), GEOMETRIES[0])
    level = contour_level(heatmap, 80)
    rows, columns = np.floor(points[:, 1] - 0.5).astype(int), np.floor(points[:, 0] - 0.5).astype(int)
    corners = [(np.minimum(rows + r, 59), np.minimum(columns + c, 80)) for r in (0, 1) for c in (0, 1)]
    around = np.stack([heatmap[corner] for corner in corners])
    assert len(points) > 20
    assert (np.nanmin(around, 0) <= level).all() and (np.nanmax(around, 0) >= level).all()
    # every border between a pixel above and its right neighbour below is cut
    crossed = (heatmap[:, :-1] > level) != (heatmap[:, 1:] > level)
    crossed &= ~np.isnan(heatmap[:, :-1]) & ~np.isnan(heatmap[:, 1:])
    cut = {(int(y), int(x)) for (x, y) in np.floor(points - 0.5 + 1e-6)}
    missing = [(y, x) for y, x in np.argwhere(crossed) if (y, x) not in cut]
    assert not missing


def test_controls_change_what_is_shown_and_said(opened):
    explorer, page = opened
    first = pixels(page)
    says = page.locator(".says")
    assert "species 0, 0.75. This is right." in says.inner_text()
    assert "note 0" in says.inner_text()
    choose(page, "Heatmap", "1")
    assert not np.array_equal(pixels(page), first)
    assert "species 1, 0.75. This is wrong: it is a species 0." in says.inner_text()
    with redrawn(page):
        page.get_by_label("next picture").click()
    assert pixels(page).shape == (97, 50, 3)
    assert "This is right." in says.inner_text()
    for _ in range(2):
        with redrawn(page):
            page.get_by_label("previous picture").click()
    assert page.get_by_role("combobox", name="Picture").input_value() == "2"  # round from the first to the last
    assert page.locator("circle").count() == 0
    with redrawn(page):
        page.get_by_label("parts of the bird").check()
    assert page.locator("g title").all_text_contents() == ["crown", "tail"]
    assert page.locator("path.contour").count() == 2  # a black line below a white one
    with redrawn(page):
        page.get_by_label("contour", exact=True).uncheck()
    assert page.locator("path.contour").count() == 0
    choose(page, "View", "all")
    assert page.locator("figcaption").all_inner_texts() == ["source 0", "source 1", "source 2"]


def test_a_peak_near_a_part_is_a_hit(open_html):
    geometry = GEOMETRIES[2]
    map_ = np.zeros((7, 7))
    map_[2, 3] = 1  # its centre is (28, 20)
    for x, words in ((35.9, "It hits a part: the crown."), (36.1, "It hits no part; the nearest is the crown.")):
        parts = {"crown": (x, 20.0), "tail": (2.0, 50.0)}
        picture = Picture("bird", photograph(56, 56), geometry, parts, telling="crown")
        page = open_html(HeatmapExplorer([picture], {"mask": [Answer(map_)]}).html())
        page.wait_for_selector("canvas")
        assert words in page.locator(".peak-says").inner_text()


def test_the_keyboard_alone_reaches_and_moves_every_control(opened):
    explorer, page = opened
    first = pixels(page)
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('label')?.innerText.split('\\n')[0].trim() "
                                     "|| document.activeElement.getAttribute('aria-label')"))
    expected = ["Picture", "previous picture", "next picture", "Heatmap", "View", "Opacity of the heatmap 0.5",
                "Contour at percentile 90", "contour", "parts of the bird"]
    assert [r.split(" ")[0] for r in reached] == [e.split(" ")[0] for e in expected]
    with redrawn(page):
        page.keyboard.press("Space")
    assert page.locator("g title").count() == 2
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    with redrawn(page):
        page.keyboard.press("ArrowRight")
    assert "0.55" in page.locator("label", has_text="Opacity").inner_text()
    assert not np.array_equal(pixels(page), first)


def test_it_fits_a_telephone_and_the_controls_stay_large_enough_to_touch(explorer, open_html):
    page = open_html(explorer.html(), width=390)
    page.wait_for_selector("canvas")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for control in page.locator("select, button").all():
        assert control.bounding_box()["height"] >= 30


# ---- with a kernel


@pytest.fixture(scope="module")
def model():
    return LoupeModel.from_pretrained(FIELDGUIDE).eval()


@pytest.fixture
def live(model):
    transform = transforms_for(model.data_config, train=False)
    pictures = field_birds(transform, count=1, size=112)

    def recompute(picture):
        return {"mask": ask(model, [picture])[0]}

    sources = {"recorded": [Answer(np.eye(14))], "mask": ask(model, pictures)}
    return HeatmapExplorer(pictures, sources, recompute, transform)


def test_a_photograph_of_the_readers_is_computed_where_python_runs(live, model, tmp_path):
    photograph(1500, 900).save(tmp_path / "own.jpg")
    live.add(tmp_path / "own.jpg")
    added = live.data["pictures"][1]
    assert (added["name"], added["width"], added["height"]) == ("own.jpg", 384, 640)
    assert live.picture == 1 and live.source == 1  # the recorded source has not seen it
    assert live.data["answers"][0][1] is None
    transform = transforms_for(model.data_config, train=False)
    x = transform(explorer_image(live, 1))[0][None]
    with torch.no_grad():
        logits, mask = model(x, return_mask=True)
    off = decoded(live.data["answers"][1][1]) - mask[0, 0].numpy()
    assert np.abs(off).max() <= float(mask.max() - mask.min()) / 255
    name, share = live.data["answers"][1][1]["top"][0]
    assert name.replace(" ", "_") == SPECIES[int(logits.argmax())].name
    assert abs(share - float(logits.softmax(1).max())) < 1e-3


def test_the_upload_button_sends_what_python_takes(live):
    file = io.BytesIO()
    photograph(40, 60).save(file, "png")
    live._handle_custom_msg({"photograph": "../../up.png"}, [memoryview(file.getvalue())])
    assert [p["name"] for p in live.data["pictures"]][1:] == ["up.png"]
    live._handle_custom_msg({"photograph": "text.txt"}, [b"no picture"])
    assert len(live.data["pictures"]) == 2
    assert live.message.startswith("text.txt cannot be used: found no image format") and "\n" not in live.message


def test_the_output_of_a_cell_has_the_widget_and_the_page_without_a_kernel(live):
    data, _ = live._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    assert '"live":false' in data["text/html"] and data["text/html"] == live.html()
    assert live.live
    state = json.loads(data["text/html"].split('-state">')[1].split("</script>")[0])
    assert state["data"]["sources"] == [dict(name="recorded", note=""), dict(name="mask", note="")]


def test_the_lookup_table_is_matplotlibs(explorer):
    expected = matplotlib.colormaps["viridis"](np.arange(256))[:, :3].ravel()
    assert explorer.data["lut"] == expected.tolist()


def test_likeliest_are_the_largest_probabilities_in_order(model):
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shares = model(images).softmax(1)
    for row, found in zip(shares, likeliest(model, images, k=3)):
        assert [round(p, 6) for _, p in found] == [round(float(p), 6) for p in row.sort(descending=True).values[:3]]
        assert found[0][0] == SPECIES[int(row.argmax())].name.replace("_", " ")


@pytest.mark.parametrize("change, words", [
    (dict(pictures=[]), "found 0 pictures and 1 sources, expected one or more of each"),
    (dict(sources={}), "found 1 pictures and 0 sources"),
    (dict(sources={"mask": []}), "source 'mask': found 0 answers for 1 pictures, expected one for each"),
    (dict(sources={"mask": [Answer(np.zeros(5))]}), "source 'mask': found a map of shape .5,., 0 values not finite"),
    (dict(sources={"mask": [Answer(np.full((2, 2), np.nan))]}), "4 values not finite; expected .h, w., all finite"),
    (dict(recompute=print), "found recompute without transform"),
])
def test_what_cannot_be_shown_is_refused_in_one_line(change, words):
    picture = Picture("p", photograph(56, 56), GEOMETRIES[2])
    settings = dict(pictures=[picture], sources={"mask": [Answer(np.zeros((2, 2)))]}) | change
    with pytest.raises(LoupeError, match=words) as caught:
        HeatmapExplorer(**settings)
    assert "\n" not in str(caught.value)


def test_an_explorer_without_recompute_takes_no_photograph(explorer, tmp_path):
    with pytest.raises(LoupeError, match="made without recompute"):
        explorer.add(tmp_path / "x.jpg")
    assert "Your own photograph" not in explorer.html().split("-state")[0]
