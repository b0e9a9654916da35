"""The published pages in a browser: they are whole, reach nobody else, and serve every reader.

Each page is opened wide and light, and narrow and dark; then it is looked at in the other width too.
"""

import json
import re
from itertools import product
from typing import NamedTuple

import build_book
import nbformat
import pytest
import web_assets
from browser import AXE, axe, open_page, settle, transferred
from playwright.sync_api import Page, expect
from sphinx_external_toc.parsing import parse_toc_yaml

PAGES = [*parse_toc_yaml(build_book.ROOT / "_toc.yml"), "genindex", "py-modindex", "search"]
CHAPTERS = [name for name in PAGES if (build_book.BOOK / f"{name}.ipynb").is_file()]
WIDE, NARROW = 1280, 390  # px; the second is a telephone's
HEAVIEST = 4e6  # bytes, of a page with all that it loads
NETWORK = ("_static/lab/", "_static/npm/onnxruntime-web/")  # what a page fetches to run a network in it


class Opened(NamedTuple):
    name: str
    page: Page
    dark: bool


@pytest.fixture(scope="module", params=product(PAGES, (False, True)),
                ids=lambda case: f"{case[0]}-{'dark' if case[1] else 'light'}")
def opened(request, browser, site):
    name, dark = request.param
    page = open_page(browser, f"{site}{name}.html", NARROW if dark else WIDE, dark)
    page.wait_for_function("() => { const lab = document.querySelector('#lab'); return !lab || lab.result }")
    yield Opened(name, page, dark)
    page.context.close()


def test_every_page_of_the_site_is_looked_at(site, site_folder):
    assert {page.stem for page in site_folder.glob("*.html")} == {*PAGES, "index"}  # the last leads to the first


def test_a_page_has_the_readers_colours(opened):
    theme, red, green, blue = opened.page.evaluate("""() => [document.documentElement.dataset.theme,
        ...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)]""")
    assert theme == ("dark" if opened.dark else "light")
    assert (max(red, green, blue) < 64) if opened.dark else (min(red, green, blue) > 192)


def test_mathematics_is_set(opened):
    unset, raw, count = opened.page.evaluate("""() => {
        const formulas = [...document.querySelectorAll("main .math")];
        const words = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT, n =>
            n.parentElement.closest("pre, code, script, style, mjx-container")
            ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
        let text = "";
        while (words.nextNode()) text += words.currentNode.data + " ";
        return [formulas.filter(f => !f.querySelector("mjx-container")).length,
                text.match(/\\$\\$|\\\\[(\\[]|\\\\[a-z]{2,}/g) ?? [], formulas.length];
    }""")
    assert unset == 0 and raw == []
    written = build_book.BOOK / f"{opened.name}.ipynb"
    cells = nbformat.read(written, as_version=4).cells if written.is_file() else []
    assert count > 0 or not any("$" in cell.source for cell in cells if cell.cell_type == "markdown")


def test_axe_finds_no_serious_violation(opened):
    """Also of what is folded or comes as the answer to a question."""
    opened.page.evaluate("""() => {
        document.querySelectorAll(".loupe-ask div:last-child > input").forEach(e => e.click());
        document.querySelectorAll("main summary, main .toggle-button-hidden").forEach(e => e.click());
    }""")
    # The theme looks for what scrolls, and lets the keyboard scroll it, some 300 ms later.
    opened.page.wait_for_function("""() => [...document.querySelectorAll("main pre")].every(
        pre => pre.tabIndex === 0 || pre.scrollWidth <= pre.clientWidth)""")
    assert axe(opened.page) == []


def test_no_page_scrolls_sideways(opened):
    for width in (WIDE, NARROW):
        opened.page.set_viewport_size({"width": width, "height": 900})
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_page_shows_no_error_and_asks_no_other_host(opened):
    assert opened.page.problems == []


def test_a_page_is_light_enough(opened, capsys):
    sizes = transferred(opened.page)
    network = sum(size for address, size in sizes.items() if any(part in address for part in NETWORK))
    page = sum(sizes.values()) - network
    if not opened.dark:
        with capsys.disabled():
            print(f"\n{opened.name}: {page / 1e6:.2f} MB" + (f", network {network / 1e6:.2f} MB" if network else ""))
    assert 0.1e6 < page <= HEAVIEST


def test_a_quick_check_marks_the_chosen_answer_and_no_other(opened):
    """With each answer clicked in turn: which marks are seen, and whether the first word says right or wrong."""
    questions = opened.page.evaluate("""() => [...document.querySelectorAll(".loupe-ask:has(p)")].map(question => {
        const marks = [...question.querySelectorAll("p")];
        return [...question.querySelectorAll("label")].map(label => {
            label.click();
            return marks.map(m => m.checkVisibility() ? m.innerText.split(".")[0] : "");
        });
    })""")
    for seen in questions:
        words = [row[chosen] for chosen, row in enumerate(seen)]
        assert sorted(words) == ["Not this one"] * (len(seen) - 1) + ["Right"]
        assert all(sum(map(bool, row)) == 1 for row in seen)
    assert len(questions) >= (2 if opened.name in CHAPTERS else 0)


def tab_to(page: Page, selector: str, most: int = 80) -> None:
    """Presses the tabulator until an element that the selector matches has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    raise AssertionError(f"{most} times Tab, and {selector} has not had the focus")


def test_a_quick_check_is_answered_by_mouse_and_by_keyboard(new_page):
    page = new_page(f"{CHAPTERS[0]}.html")
    question = page.locator("fieldset.loupe-ask:has(p.right)").first
    marks = question.locator("p.right, p.wrong")

    def seen() -> list[int]:
        return [i for i, mark in enumerate(marks.all()) if mark.is_visible()]

    assert seen() == []
    question.locator("label").nth(1).click()
    assert seen() == [1]
    first = question.locator("input").first
    # from the question's heading on: a page has many stops before it
    first.evaluate("input => { const h = input.closest('section').querySelector('h2'); h.tabIndex = -1; h.focus(); }")
    tab_to(page, "fieldset.loupe-ask input", most=10)  # of a group, the chosen one has the focus
    for chosen in (0, 1, 2):
        page.keyboard.press("ArrowUp" if chosen == 0 else "ArrowDown")
        assert seen() == [chosen]


def test_frames_switch_pictures_by_mouse_and_by_keyboard(new_page, site):
    names = [name for name in CHAPTERS if 'name=\\"frames-' in (build_book.BOOK / f"{name}.ipynb").read_text()]
    assert names
    page = new_page(f"{names[0]}.html")
    group = page.locator("fieldset.loupe-ask:has(input[name^=frames-])").first
    pictures, labels = group.locator("img"), group.locator("label")

    def shown() -> list[int]:
        return [i for i, picture in enumerate(pictures.all()) if picture.is_visible()]

    assert len(shown()) == 1 < pictures.count() == labels.count()
    for i in range(labels.count()):
        labels.nth(i).click()
        assert shown() == [i]
        assert pictures.nth(i).evaluate("image => image.naturalWidth") > 100
    page.keyboard.press("ArrowUp")
    assert shown() == [labels.count() - 2]


@pytest.mark.parametrize("width, dark", [(WIDE, True), (NARROW, False)])
def test_the_explorer_is_alive_in_the_published_page(width, dark, new_page):
    page = new_page("06_heatmaps.html", width, dark)
    page.wait_for_selector(".loupe-explorer canvas")
    explorer = page.locator(".loupe-explorer")
    menus = {name: explorer.get_by_role("combobox", name=name) for name in ("Picture", "Heatmap")}
    assert menus["Picture"].locator("option").count() >= 12
    assert menus["Heatmap"].locator("option").count() >= 8
    seen = []
    for change in (lambda: menus["Heatmap"].select_option("3"), lambda: menus["Picture"].select_option("5"),
                   lambda: explorer.get_by_label("Opacity").press("ArrowRight")):
        drawn = page.evaluate("document.querySelector('[data-drawn]').dataset.drawn")
        change()
        page.wait_for_function("n => document.querySelector('[data-drawn]').dataset.drawn !== n", arg=drawn)
        seen.append(explorer.evaluate("e => e.querySelector('canvas').toDataURL()"))
    assert len(set(seen)) == 3
    assert "The peak is at" in explorer.inner_text()
    explorer.get_by_text("Your own photograph").click()
    assert "Run this notebook" in explorer.inner_text()
    assert page.problems == []


def test_the_keyboard_skips_to_the_text(new_page):
    page = new_page("intro.html")
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to main content")
    page.keyboard.press("Enter")
    assert page.url.endswith("#main-content")


def test_the_keyboard_reaches_the_search_and_what_it_finds(new_page):
    page = new_page("intro.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("sigmoid")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=sigmoid*")
    expect(page.locator("#search-results li a").first).to_be_visible()
    tab_to(page, "#search-results li a")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/some-project/(?!search)\w+\.html"))
    assert page.problems == []


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_keyboard_reaches_a_chapter(width, new_page):
    page = new_page("intro.html", width)
    if width == NARROW:
        tab_to(page, "button.primary-toggle")
        page.keyboard.press("Enter")
        settle(page)  # the drawer slides in
    tab_to(page, f"nav a[href='{CHAPTERS[0]}.html']")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{CHAPTERS[0]}.html")


def test_the_menu_of_a_formula_finds_all_that_it_loads(new_page):
    page = new_page(f"{CHAPTERS[0]}.html")
    page.locator("mjx-container").first.click(button="right")
    expect(page.get_by_role("menuitem", name="Math Settings")).to_be_visible()
    page.evaluate("MathJax.startup.document.menu.menu.pool.lookup('renderer').setValue('SVG')")
    page.wait_for_function("document.querySelector('mjx-container[jax=SVG] svg')")
    page.evaluate("MathJax.startup.document.menu.menu.pool.lookup('explorer').setValue(true)")
    page.wait_for_function("performance.getEntriesByType('resource').some(r => r.name.endsWith('a11y/explorer.js'))")
    assert page.problems == []


def test_the_status_page_says_that_no_chapter_was_run(new_page):
    rows = new_page("status.html").locator("table tr", has_text="not run in this build")
    assert rows.count() == len(CHAPTERS)


def test_packages_are_pinned_and_come_from_the_registry_alone():
    package = json.loads((web_assets.ROOT / "package.json").read_text())
    lock = json.loads((web_assets.ROOT / "package-lock.json").read_text())["packages"]
    wanted = {**package["dependencies"], **package["devDependencies"]}
    assert {name: lock[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    for name, entry in lock.items():
        if name:
            assert entry["resolved"].startswith("https://registry.npmjs.org/")
            assert entry["integrity"].startswith("sha512-")


def test_without_npm_the_pages_take_their_scripts_from_a_cdn_and_the_build_says_so(tmp_path, monkeypatch, capsys):
    for name in ("package.json", "package-lock.json"):
        (tmp_path / name).write_text((web_assets.ROOT / name).read_text())
    versions = json.loads((tmp_path / "package.json").read_text())["dependencies"]
    source = tmp_path / "_build" / "source"
    source.mkdir(parents=True)
    (source / "intro.md").write_text("# A page\n\nwith $x$\n")
    (source / "status.md").write_text("# Status\n\n<!-- status -->\n<!-- /status -->\n")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: intro\nchapters:\n  - file: status\n")
    (tmp_path / "_config.yml").write_text("title: A book\nsphinx: {config: {}}\n")
    (source / "_static").mkdir()
    monkeypatch.setattr(web_assets, "ROOT", tmp_path)
    monkeypatch.setattr(build_book, "ROOT", tmp_path)
    monkeypatch.setattr(build_book, "BOOK", source)
    monkeypatch.setenv("PATH", str(tmp_path))
    pages = build_book.build_pages(source)
    said = capsys.readouterr().out
    assert said == ("npm is not installed: the pages will load mathjax and onnxruntime-web from cdn.jsdelivr.net\n")
    cdn = "https://cdn.jsdelivr.net/npm"
    assert f'src="{cdn}/mathjax@{versions["mathjax"]}/es5/tex-mml-chtml.js"' in (pages / "intro.html").read_text()
    where = json.loads((pages / "_static" / "npm" / "where.json").read_text())
    assert where == {"onnxruntime": f"{cdn}/onnxruntime-web@{versions['onnxruntime-web']}/dist/"}


def test_an_install_that_fails_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "package-lock.json").write_text("{}")
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setattr(web_assets, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert web_assets.install() == "npm ci failed (npm error code E404)"


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: apt-get install npm")
def test_axe_is_the_one_that_package_json_names():
    wanted = json.loads((web_assets.ROOT / "package.json").read_text())["devDependencies"]["axe-core"]
    assert f"axe v{wanted}" in AXE.read_text()[:200]


def test_the_lens_of_the_first_page_follows_pointer_and_keys(browser, site):
    page = open_page(browser, f"{site}intro.html", WIDE)
    plate, through = page.locator(".lens-plate"), page.locator(".lens-through")

    def clip() -> str:
        return through.evaluate("e => getComputedStyle(e).clipPath")

    box = plate.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
    assert clip().endswith("at 50% 25%)")
    plate.focus()
    page.keyboard.press("ArrowRight")
    assert clip().endswith("at 53% 25%)")
    page.get_by_label("everywhere").check()
    assert clip() == "none"
    page.context.close()
