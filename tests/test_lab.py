"""The page "Try it" computes in the browser what the package computes in Python; its controls do what they say."""

import base64
import io
import itertools
import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from browser import axe
from build_lab import SIZE, draw_group, place
from PIL import Image

from loupe_core import LoupeModel, transforms_for
from loupe_core.files.images import open_image
from loupe_core.look.boxes import FLAT, Rule, boxes_of
from loupe_core.look.boxes import shown as shown_part
from loupe_core.look.magnifier import Magnifier
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import PART_OF, SPECIES

LAB = "#lab[data-state=idle]"


@pytest.fixture(scope="module")
def model() -> LoupeModel:
    return LoupeModel.from_pretrained(FIELDGUIDE)


@pytest.fixture
def lab(new_page):
    """The page, with its network loaded and the first picture answered."""
    page = new_page("try_it.html")
    page.wait_for_selector(LAB, timeout=60_000)
    return page


def answer(page) -> dict:
    """The last result: logits (48,), mask (14, 14), input (112, 112, 3)."""
    page.wait_for_selector(LAB)
    result = page.evaluate("""() => {
        const {logits, mask, input} = document.querySelector("#lab").result;
        return {logits, mask: mask.values, side: mask.side, input: Array.from(input)};
    }""")
    return dict(logits=np.array(result["logits"]), mask=np.reshape(result["mask"], 2 * [result["side"]]),
                input=np.reshape(result["input"], (112, 112, 3)).astype(np.uint8))


def published(page, name: str) -> bytes:
    """A file of the lab, as the site serves it."""
    return page.request.get(page.url.rsplit("/", 1)[0] + f"/_static/lab/{name}").body()


def pixels_seen(model, image: Image.Image) -> tuple[np.ndarray, torch.Tensor]:
    """What Python makes of an image: the model's picture (112, 112, 3) uint8, and the normalised input."""
    x, _ = transforms_for(model.data_config, train=False)(image)
    shown = x.permute(1, 2, 0) * torch.tensor(model.std) + torch.tensor(model.mean)
    return np.rint(255 * shown.numpy()).astype(np.uint8), x[None]


def agree(found: dict, model, image: Image.Image) -> None:
    """The page's answer is torch's to the same picture."""
    bytes_, x = pixels_seen(model, image)
    np.testing.assert_array_equal(found["input"], bytes_)
    with torch.no_grad():
        logits, mask = model(x, return_mask=True)
    assert np.argsort(-found["logits"])[:5].tolist() == logits[0].topk(5).indices.tolist()
    np.testing.assert_allclose(found["logits"], logits[0], rtol=0, atol=1e-3)
    np.testing.assert_allclose(found["mask"], mask[0, 0], rtol=0, atol=1e-3)


def choose(page, name: str, value) -> None:
    page.locator(f"#lab [data-id={name}]").select_option(value)
    page.wait_for_selector(LAB)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("group, member", [("Marrel", 1), ("Saffet", 3), ("Dunnel", 0)])
def test_the_page_answers_as_torch_does_and_shows_what_it_answers(lab, model, group, member):
    choose(lab, "group", group)
    choose(lab, "member", str(member))
    data = json.loads(published(lab, "lab.json"))
    row = [s for s in data["species"] if s["group"] == group][member]
    found = answer(lab)
    agree(found, model, Image.open(io.BytesIO(published(lab, row["picture"]))).convert("RGB"))
    probabilities = torch.tensor(found["logits"]).softmax(0)
    rows = lab.locator("#lab tbody tr").all_inner_texts()
    expected = [f"{data['species'][i]['name']} {probabilities[i]:.3f} {probabilities[i]:.3f}"
                for i in probabilities.topk(5).indices]
    assert [" ".join(text.split()) for text in rows] == expected
    assert lab.problems == []


@pytest.mark.parametrize("size", [(336, 336), (112, 112), (125, 124), (90, 131), (640, 411), (50, 639), (13, 17)])
def test_the_models_picture_has_the_bytes_that_pillow_makes(lab, model, size):
    photograph = noise(*size)
    photograph[: size[0] // 2] = np.where(photograph[: size[0] // 2] > 128, 255, 0)  # overshoot that must be cut off
    found = lab.evaluate("""async ([text, width, height, settings]) => {
        const {modelInput} = await import(new URL("_static/lab_input.js", document.baseURI));
        const data = Uint8ClampedArray.from(atob(text), c => c.charCodeAt(0));
        const {bytes, values} = modelInput({data, width, height}, settings);
        return [Array.from(bytes), Array.from(values)];
    }""", [base64.b64encode(np.dstack([photograph, np.full(size, 255, np.uint8)]).tobytes()).decode(), size[1], size[0],
           json.loads(published(lab, "lab.json"))["model"]])
    bytes_, x = pixels_seen(model, Image.fromarray(photograph))
    np.testing.assert_array_equal(np.reshape(found[0], bytes_.shape), bytes_)
    np.testing.assert_array_equal(np.reshape(found[1], x.shape).astype(np.float32), x.numpy())


def test_a_stroke_of_the_brush_changes_answer_and_mask_and_undo_restores_them(lab):
    before, said = answer(lab), lab.locator("[data-id=change]").inner_text()
    lab.locator("#lab [name=lab-colour][aria-label=blue]").check(force=True)
    lab.locator("#lab [data-id=picture]").scroll_into_view_if_needed()
    box = lab.locator("#lab [data-id=picture]").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in ((0.3, 0.6), (0.6, 0.7))]
    lab.mouse.move(*at[0])
    lab.mouse.down()
    lab.mouse.move(*at[1], steps=5)
    lab.mouse.up()
    after = answer(lab)
    assert np.abs(after["logits"] - before["logits"]).max() > 0.1
    assert np.abs(after["mask"] - before["mask"]).max() > 0.01
    changed = np.argwhere((after["input"] != before["input"]).any(-1))
    paint = after["input"][tuple(changed[len(changed) // 2])].astype(int)
    assert paint[2] > paint[0] + 80  # blue
    assert lab.locator("[data-id=change]").inner_text().startswith("Was ")
    assert "1 brush stroke" in lab.locator("#lab [data-id=picture]").get_attribute("aria-label")
    lab.locator("[data-id=undo]").click()
    again = answer(lab)
    np.testing.assert_array_equal(again["input"], before["input"])
    np.testing.assert_array_equal(again["logits"], before["logits"])
    assert lab.locator("[data-id=change]").inner_text() == said


def test_the_patch_moves_by_keyboard_alone(lab):
    before = answer(lab)
    for _ in range(60):
        lab.keyboard.press("Tab")
        if lab.evaluate("document.activeElement.matches('#lab [data-id=picture]')"):
            break
    lab.keyboard.press("ArrowDown")
    one = answer(lab)
    lab.keyboard.press("ArrowLeft")
    two = answer(lab)
    lab.keyboard.press("Shift+ArrowLeft")
    assert "centre 159 across and 176 down" in lab.locator("#lab [data-id=picture]").get_attribute("aria-label")
    for a, b in itertools.combinations((before, one, two, answer(lab)), 2):
        assert np.abs(a["logits"] - b["logits"]).max() > 1e-3 and np.abs(a["mask"] - b["mask"]).max() > 1e-5
    grey = (one["input"] == 128).all(-1)  # 60 px are 60 * 124 / 336 = 22.1 of the model's, whose kernel reaches over 2
    assert 18**2 <= grey.sum() <= 23**2
    for _ in range(3):
        lab.keyboard.press("Control+z")
    np.testing.assert_array_equal(answer(lab)["logits"], before["logits"])


def test_clear_takes_everything_away_and_can_be_undone(lab):
    before = answer(lab)
    lab.locator("#lab [data-id=picture]").click()
    covered = answer(lab)
    lab.locator("[data-id=clear]").click()
    np.testing.assert_array_equal(answer(lab)["logits"], before["logits"])
    lab.locator("[data-id=undo]").click()
    np.testing.assert_array_equal(answer(lab)["logits"], covered["logits"])
    assert (covered["logits"] != before["logits"]).any()


def test_many_changes_at_once_end_with_the_answer_to_the_last(lab, model):
    """Predictions run one at a time; those that come meanwhile are taken together."""
    lab.evaluate("""() => {
        const canvas = document.querySelector("#lab [data-id=picture]");
        for (let i = 0; i < 100; i++)
            canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp", shiftKey: true}));
    }""")
    found = answer(lab)
    assert "168 across and 68 down" in lab.locator("#lab [data-id=picture]").get_attribute("aria-label")
    pixels = np.array(Image.open(io.BytesIO(published(lab, "crimson_crowned_marrel.webp"))).convert("RGB"))
    pixels[68 - 30 : 68 + 30, 168 - 30 : 168 + 30] = 128
    agree(found, model, Image.fromarray(pixels))


@pytest.mark.parametrize("size", [(300, 400), (130, 90)])
def test_an_own_photograph_is_answered_as_torch_does_and_leaves_no_trace_on_the_network(lab, model, size):
    image = Image.fromarray(noise(size[0] // 8, size[1] // 8)).resize(size[::-1], Image.BILINEAR)
    lab.locator("#lab [value=photo]").check()
    assert "nothing is sent" in lab.locator("#lab").inner_text()
    lab.wait_for_load_state("networkidle")
    asked = len(lab.requests)
    file = dict(name="cup.png", mimeType="image/png", buffer=png(np.asarray(image)))
    lab.locator("#lab [data-id=file]").set_input_files(file)
    lab.wait_for_function("document.querySelector('#lab [data-id=picture]').ariaLabel.includes('cup.png')")
    agree(answer(lab), model, image)
    assert [r.url for r in lab.requests[asked:] if r.url.startswith("http")] == [] and lab.problems == []


def test_a_transparent_photograph_lies_on_white_and_a_large_one_is_made_smaller(lab, model, tmp_path):
    path = tmp_path / "half.png"
    Image.fromarray(np.dstack([noise(1200, 900), np.zeros((1200, 900), np.uint8)])).save(path)
    lab.locator("#lab [value=photo]").check()
    lab.locator("#lab [data-id=file]").set_input_files(path)
    lab.wait_for_function("document.querySelector('#lab [data-id=picture]').ariaLabel.includes('480 by 640')")
    assert (answer(lab)["input"] == 255).all() and np.asarray(open_image(path)).min() == 255


def looked_twice(page) -> dict:
    """The second look's box, logits of its own and of both, and input."""
    page.wait_for_selector(LAB)
    second = page.evaluate("""() => {
        const {box, found, logits} = document.querySelector("#lab").second;
        return {box, second: found.logits, both: logits, input: Array.from(found.input)};
    }""")
    return second | dict(input=np.reshape(second["input"], (112, 112, 3)).astype(np.uint8))


def test_the_second_look_is_the_magnifiers_and_is_shown(lab, model):
    box = lab.locator("#lab [data-id=twice]")
    assert not lab.locator("#lab [data-id=closer]").is_visible()
    assert lab.evaluate("document.querySelector('#lab').second") is None
    plain = shown(lab)
    box.check()
    image = Image.open(io.BytesIO(published(lab, "crimson_crowned_marrel.webp"))).convert("RGB")
    found, looks = looked_twice(lab), Magnifier(model).look([image])
    part, = looks.boxes[0]
    assert found["box"] == list(part)
    cut = image.crop((part.x, part.y, part.x + part.width, part.y + part.height))
    np.testing.assert_array_equal(found["input"], pixels_seen(model, cut)[0])
    for name, logits in (("second", looks.second), ("both", looks.logits)):
        np.testing.assert_allclose(found[name], logits[0], rtol=0, atol=1e-3)
    both = looks.logits[0].softmax(0)
    names = [species["name"] for species in json.loads(published(lab, "lab.json"))["species"]]
    rows = lab.locator("#lab [data-id=looks] tr").all_inner_texts()
    each = [logits[0].softmax(0) for logits in (looks.first, looks.second, looks.logits)]
    for row, i in zip(rows, both.topk(5).indices, strict=True):
        assert row.split("\t")[0] == names[i]
        np.testing.assert_allclose([float(text) for text in row.split("\t")[1:]], [p[i] for p in each], atol=2e-3)
    assert f"both together {names[both.argmax()]} {both.max():.2f}." in lab.locator("[data-id=both]").inner_text()
    said = f"{part.width} by {part.height} pixels of 336 by 336, from {part.x} across and {part.y} down."
    assert said in lab.locator("[data-id=cut]").inner_text()
    assert said in lab.locator("[data-id=closer]").get_attribute("aria-label")
    ys, xs = np.nonzero((shown(lab) != plain).any(-1))  # its outline
    edges = (part.x, part.x + part.width, part.y, part.y + part.height)
    for edge, seen in zip(edges, (xs.min(), xs.max(), ys.min(), ys.max())):
        assert abs(edge - seen) <= 3
    box.uncheck()
    lab.wait_for_selector(LAB)
    np.testing.assert_array_equal(shown(lab), plain)
    assert not lab.locator("#lab [data-id=closer]").is_visible()


def test_what_is_painted_is_seen_by_the_second_look_too(lab):
    lab.locator("#lab [data-id=twice]").check()
    before = looked_twice(lab)
    x, y, width, height = before["box"]
    canvas = lab.locator("#lab [data-id=picture]")
    canvas.scroll_into_view_if_needed()
    at = canvas.bounding_box()
    lab.mouse.click(at["x"] + (x + width / 2) * at["width"] / 336, at["y"] + (y + height / 2) * at["height"] / 336)
    after = looked_twice(lab)
    assert (after["input"] == 128).all(-1).sum() > (before["input"] == 128).all(-1).sum() + 100
    assert np.abs(np.subtract(after["second"], before["second"])).max() > 1e-2


@pytest.mark.parametrize("size", [(900, 1200), (130, 90), (5000, 400)])
def test_the_second_look_cuts_from_the_photograph_itself(lab, model, size):
    """Its noise of single pixels would be gone from what the page shows, at most 640 px."""
    height, width = size
    image = Image.fromarray(noise(height, width) // 2 + np.linspace(0, 120, width).astype(np.uint8)[None, :, None])
    lab.locator("#lab [value=photo]").check()
    lab.locator("#lab [data-id=twice]").check()
    lab.locator("#lab [data-id=file]").set_input_files(dict(name="n.png", mimeType="image/png",
                                                            buffer=png(np.asarray(image))))
    lab.wait_for_function("document.querySelector('#lab [data-id=picture]').ariaLabel.includes('n.png')")
    found = looked_twice(lab)
    x, y, w, h = found["box"]
    if max(size) > 4096:  # kept at 4,096 px, made smaller by the browser
        assert w >= 0.29 * 328 and x + w <= 328 and y + h <= 4096 and f"of 328 by 4096, from {x} across" in \
            lab.locator("[data-id=cut]").inner_text()
        return
    assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    geometry = transforms_for(model.data_config, train=False)(image)[1]
    box, = boxes_of(answer(lab)["mask"], geometry, Rule())
    assert found["box"] == list(shown_part(box, geometry, Rule()))
    np.testing.assert_array_equal(found["input"], pixels_seen(model, image.crop((x, y, x + w, y + h)))[0])
    assert lab.problems == []


def test_the_box_of_a_mask_is_pythons(lab, model):
    """On random masks of all kinds and pictures of all sizes."""
    rng, rule, cases = np.random.default_rng(0), Rule(), []
    for k in range(400):
        side = int(rng.choice([1, 2, 4, 7, 14]))
        mask = rng.random((side, side)).astype(np.float32)
        if k % 4 == 1:  # smooth, as a mask is
            mask = np.asarray(Image.fromarray(rng.random((3, 3)).astype(np.float32)).resize((side, side)))
        elif k % 4 == 2:  # many cells alike
            mask = np.round(3 * mask) / np.float32(3)
        elif k % 20 == 3:  # flat, exactly or by rounding
            mask = np.full((side, side), 0.3, np.float32) + (k % 40 == 3) * np.float32(3e-8) * (mask > 0.5)
        chosen = (float(rng.choice(values)) for values in ([0.1, 0.2, 0.5, 1], [0, 0.1, 0.4], [0, 0.3, 1]))
        cases.append((mask, *(int(length) for length in rng.integers(20, 700, 2)), *chosen))
    settings, transform = json.loads(published(lab, "lab.json")), transforms_for(model.data_config, train=False)
    found = lab.evaluate("""async ([cases, settings]) => {
        const {partOf} = await import(new URL("_static/lab_look.js", document.baseURI));
        return cases.map(([mask, side, width, height, share, margin, smallest]) => partOf(
            {values: mask, side}, width, height, settings.model, {...settings.look, share, margin, smallest}));
    }""", [[(m.ravel().tolist(), len(m), *rest) for m, *rest in cases], settings])
    for (mask, width, height, share, margin, smallest), box in zip(cases, found, strict=True):
        own = replace(rule, share=share, margin=margin, smallest=smallest)
        geometry = transform(Image.new("RGB", (width, height)))[1]
        expected, = boxes_of(mask, geometry, own)
        assert box == list(shown_part(expected, geometry, own)), (mask, width, height, own)
    assert settings["look"] == dict(share=rule.share, margin=rule.margin, smallest=rule.smallest, weight=rule.weight,
                                    flat=FLAT)


def test_a_file_that_is_no_picture_is_named(lab):
    lab.locator("#lab [value=photo]").check()
    file = dict(name="notes.txt", mimeType="text/plain", buffer=b"no picture")
    lab.locator("#lab [data-id=file]").set_input_files(file)
    lab.wait_for_function("document.querySelector('.lab-status').textContent")
    assert lab.locator(".lab-status").inner_text().startswith("notes.txt: found no picture")


@pytest.mark.slow
def test_nine_tenths_of_the_species_are_right_as_the_page_draws_them(lab):
    """In each pose, before the first background."""
    lab.locator("#lab [value=draw]").check()
    right = lab.evaluate("""async () => {
        const root = document.querySelector("#lab"), find = name => root.querySelector(name), counts = [];
        const set = async (name, value) => {
            find(name).value = value;
            find(name).dispatchEvent(new Event("change"));
            do await new Promise(resolve => setTimeout(resolve, 1)); while (root.dataset.state !== "idle");
        };
        for (const pose of [0, 1, 2]) {
            await set("[data-attribute=pose]", pose);
            let right = 0;
            for (let i = 0; i < 48; i++) {
                if (i % 4 === 0) await set("[data-id=group]", i / 4);
                await set("[data-id=member]", i % 4);
                const {logits} = root.result;
                right += logits.indexOf(Math.max(...logits)) === i;
            }
            counts.push(right);
        }
        return counts;
    }""")
    print(f"right as drawn in the page: {right} of 48 in each pose")
    assert sum(right) >= 0.9 * 3 * 48 and len(right) == 3
    assert lab.locator("[data-id=drawn]").inner_text() == "These are the marks of a Grey bellied Dunnel."


def test_a_drawn_bird_changes_with_each_attribute_and_is_compared_with_the_guide(lab):
    lab.locator("#lab [value=draw]").check()
    seen = [answer(lab)["input"]]
    assert lab.locator("[data-id=drawn]").inner_text() == "These are the marks of a Crimson crowned Marrel."
    for name in [*SPECIES[0].attributes, "pose", "scene"]:
        menu = lab.locator(f"[data-attribute={name}]")
        menu.select_option(index=0 if menu.input_value() != "0" else 1)
        seen.append(answer(lab)["input"])
        assert (seen[-1] != seen[-2]).any(), name
    assert lab.locator("[data-id=drawn]").inner_text().startswith("No species of the guide looks like this. A ")


def test_the_card_names_the_recorded_part_after_a_guess_and_marks_its_place(lab):
    data = json.loads(published(lab, "lab.json"))
    for group, wrong, told in (("Corvane", "tail", False), ("Vaneta", "tail", True)):
        choose(lab, "group", group)
        rows = [s for s in data["species"] if s["group"] == group]
        part = rows[0]["differs_in"]
        assert part == next(s.differs_in for s in SPECIES if s.group == group)
        assert lab.locator("[data-id=verdict]").inner_text() == "" and not lab.locator("[data-id=mark]").is_visible()
        lab.locator("[data-id=part]").select_option(label=wrong)
        lab.locator("[data-id=guess] button").click()
        verdict = lab.locator("[data-id=verdict]").inner_text()
        assert verdict.startswith("Right. " if told else "Not this one. ")
        assert f"The {part} tells these four apart: {', '.join(s['attributes'][part] for s in rows)};" in verdict
        lab.locator("[data-id=show]").uncheck()
        before = shown(lab)
        lab.locator("[data-id=mark]").check()
        ys, xs = np.nonzero((shown(lab) != before).any(-1))
        x, y = rows[0]["place"]
        assert abs((xs.min() + xs.max()) / 2 - x) < 1 and abs((ys.min() + ys.max()) / 2 - y) < 1
        m, side = answer(lab)["mask"], 336 * 112 / 124 / 14
        value = m[int((y - 336 * 6 / 124) / side), int((x - 336 * 6 / 124) / side)]
        lower = f"{np.floor(100 * (m < value).mean() + 0.5):.0f}"
        says = f"M in its cell is {value:.3f}; {lower} % of the cells are lower."
        assert lab.locator("[data-id=there]").inner_text() == says


def shown(page) -> np.ndarray:
    """The canvas as it is shown, (336, 336, 3)."""
    page.wait_for_selector(LAB)
    url = page.evaluate("document.querySelector('#lab [data-id=picture]').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


def test_a_neighbour_on_the_card_is_chosen_by_its_picture(lab):
    lab.locator("#lab .lab-group button").nth(3).click()
    lab.wait_for_selector(LAB)
    label = lab.locator("#lab [data-id=picture]").get_attribute("aria-label")
    assert label.startswith("Drawing of a Blue crowned Marrel")
    assert lab.locator("#lab .lab-group [aria-pressed=true]").all_inner_texts() == ["Blue crowned Marrel"]


def test_a_finger_paints_and_does_not_scroll_the_page(lab):
    before = answer(lab)
    assert lab.evaluate("getComputedStyle(document.querySelector('#lab [data-id=picture]')).touchAction") == "none"
    lab.evaluate("""() => {
        const canvas = document.querySelector("#lab [data-id=picture]"), box = canvas.getBoundingClientRect();
        const send = (kind, x) => canvas.dispatchEvent(new PointerEvent(kind, {pointerId: 1, pointerType: "touch",
            clientX: box.left + x * box.width, clientY: box.top + box.height / 2, bubbles: true}));
        canvas.setPointerCapture = () => {};  // there is no finger to capture
        canvas.hasPointerCapture = () => true;
        send("pointerdown", 0.3), send("pointermove", 0.6), send("pointerup", 0.6);
    }""")
    assert (answer(lab)["input"] != before["input"]).any()
    assert "202 across and 168 down" in lab.locator("#lab [data-id=picture]").get_attribute("aria-label")


@pytest.mark.parametrize("missing, says", [
    ("lab/model.onnx", "lab/model.onnx: not loaded (404"), ("lab/lab.json", "lab/lab.json: not loaded (404"),
    ("npm/onnxruntime-web/ort-wasm-simd-threaded.wasm", "ONNX Runtime cannot be started from"),
])
def test_a_missing_file_is_named_in_one_line(new_page, missing, says):
    page = new_page("intro.html")
    page.route(f"**/_static/{missing}", lambda route: route.fulfill(status=404))
    page.goto(page.url.replace("intro", "try_it"))
    page.wait_for_function(f"document.querySelector('.lab-status').textContent.includes({json.dumps(says)})")
    assert "\n" not in page.locator(".lab-status").inner_text()


def test_without_webassembly_the_page_says_so(new_page):
    page = new_page("intro.html")
    page.add_init_script("delete window.WebAssembly")
    page.goto(page.url.replace("intro", "try_it"))
    page.wait_for_function("document.querySelector('.lab-status').textContent.includes('no WebAssembly')")


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
@pytest.mark.parametrize("mode", ["species", "draw", "photo"])
def test_every_mode_is_accessible_and_fits(new_page, width, dark, mode):
    page = new_page("try_it.html", width, dark)
    page.wait_for_selector(LAB, timeout=60_000)
    page.locator(f"#lab [value={mode}]").check()
    page.wait_for_selector(LAB)
    if mode == "draw":
        page.locator("#lab [data-id=twice]").check()
        page.wait_for_selector(LAB)
        assert page.locator("#lab [data-id=closer]").is_visible()
    assert axe(page, "#lab") == [] and page.problems == []
    names = page.evaluate("[...document.querySelectorAll('#lab [data-id]')].map(element => element.dataset.id)")
    assert len(set(names)) == len(names)  # the script finds each by its name
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# -- what the page is made of, without a browser ----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What build_lab writes."""
    from build_lab import build_lab

    folder = tmp_path_factory.mktemp("lab")
    build_lab(folder)
    return folder


def test_the_exported_network_gives_torchs_answers_on_all_species_and_is_small(folder, model):
    assert (folder / "model.onnx").stat().st_size < 4e6
    session, rows = onnxruntime.InferenceSession(folder / "model.onnx"), json.loads((folder / "lab.json").read_text())
    right = 0
    for i, row in enumerate(rows["species"]):
        _, x = pixels_seen(model, Image.open(folder / row["picture"]).convert("RGB"))
        with torch.no_grad():
            logits, mask = model(x, return_mask=True)
        found = session.run(None, {"image": x.numpy()})
        assert found[0].argmax() == logits.argmax()
        np.testing.assert_allclose(found[1], mask, rtol=0, atol=1e-4)
        right += int(logits.argmax() == i)
    assert rows["right"] == right / 48 and right >= 0.9 * 48
    pictures = [Image.open(folder / row["picture"]).convert("RGB") for row in rows["species"]]
    twice = Magnifier(model)(pictures).argmax(1)
    assert rows["right_twice"] == int((twice == torch.arange(48)).sum()) / 48
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6


def test_members_of_a_group_share_pose_and_scene_and_differ_at_the_recorded_place():
    for number, (_, members) in enumerate(itertools.groupby(SPECIES, key=lambda s: s.group)):
        members = list(members)
        if members[0].differs_in == "breast":  # its patterns take numbers from the generator that poses the bird
            continue
        (a, at), (b, _) = draw_group(number, members)[:2]
        assert place(members[0], a) == at
        ys, xs = np.nonzero((a.image != b.image).any(-1))
        x, y = at
        assert np.abs(xs - x).min() < 12 and np.abs(ys - y).min() < 12, members[0].name
        assert len(xs) < 0.5 * SIZE**2
        assert members[0].differs_in in PART_OF
