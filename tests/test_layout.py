"""Pages fit their screens: nothing is wider than its column but what scrolls inside itself, and that may scroll."""

from itertools import product

import as_shown
import build_book
import nbformat
import pytest
from browser import open_page
from test_chapters import CHAPTERS

WIDE, NARROW = 1280, 390
NAMES = [path.stem for path in CHAPTERS]
PAGES = [*NAMES, "intro", "ledger", "glossary", "try_it", "scaling_up"]

# Elements whose right edge lies outside of the column, but for those inside of one that scrolls: `tag.class (by px)`.
OUTSIDE = """() => {
    const article = document.querySelector("article.bd-article"), style = getComputedStyle(article);
    const edge = article.getBoundingClientRect().right - parseFloat(style.paddingRight) + 1;
    const scrolls = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
    const inside = e => e.parentElement !== article && (scrolls(e.parentElement) || inside(e.parentElement));
    return [...article.querySelectorAll("*")].filter(e => e.checkVisibility() && !e.closest("mjx-assistive-mml")
            && e.getBoundingClientRect().right > edge && e.getBoundingClientRect().width > 1 && !inside(e))
        .map(e => `${e.tagName}.${e.className} (by ${Math.round(e.getBoundingClientRect().right - edge)})`);
}"""
# What scrolls sideways: [kind, first words]; a kind is "table", "code", "math", "columns" (printed) or the element.
SCROLLING = """() => [...document.querySelectorAll("article.bd-article *")].filter(e => e.checkVisibility()
        && ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1)
    .map(e => [e.closest(".cell_input, div.highlight-sh, div[class*=highlight-py], dl.py, div.highlight-default,"
                         + "div.highlight-none, div[class*=highlight-]:not(.output)") ? "code"
               : e.closest("mjx-container, div.math") || e.matches(":has(> mjx-container)") ? "math"
               : e.querySelector("table") || e.matches("table") ? "table"
               : e.closest(".output.stream:not(.loupe-words)") ? "columns"
               : `${e.tagName}.${e.className}`, e.innerText.slice(0, 60)])"""

NUMBERS = "selector => [...document.querySelectorAll(selector)].map(e => e.textContent)"


@pytest.fixture(scope="module", params=product(PAGES, (WIDE, NARROW), (False, True)),
                ids=lambda case: f"{case[0]}-{case[1]}-{'dark' if case[2] else 'light'}")
def opened(request, browser, site):
    name, width, dark = request.param
    page = open_page(browser, f"{site}{name}.html", width, dark)
    yield name, width, page
    page.context.close()


def test_nothing_is_wider_than_its_column_but_what_scrolls_inside_itself(opened):
    name, width, page = opened
    page.evaluate("document.querySelectorAll('article details').forEach(d => d.open = true)")
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    kinds = {"table", "code", "math", "columns"}
    if name in NAMES and width == WIDE:
        kinds = {"table", "code"}  # formulas are broken, prints are words or short
    assert [found for found in page.evaluate(SCROLLING) if found[0] not in kinds] == []


def test_the_text_uses_the_width_of_the_screen(opened):
    name, width, page = opened
    column = page.evaluate("document.querySelector('article.bd-article h1').getBoundingClientRect().width")
    assert column >= (800 if width == WIDE else 350)


def test_figures_and_tables_are_numbered_by_chapter(opened):
    name, width, page = opened
    if name not in NAMES:
        return
    cells = nbformat.read(build_book.BOOK / f"{name}.ipynb", as_version=4).cells
    wanted = [caption for cell in cells for caption in as_shown.captions(cell)]
    shown = page.evaluate(NUMBERS, "main figure figcaption .caption-number")
    assert [number.strip() for number in shown] == [f"Figure {int(name[:2])}.{k}." for k in range(1, len(wanted) + 1)]
    assert page.locator("main .cell_output").get_by_text("Figure.", exact=True).count() == 0  # the notebook's own
    tables = page.evaluate(NUMBERS, "main .loupe-table .caption-number")
    assert [number.strip() for number in tables] == [f"Table {int(name[:2])}.{k}." for k in range(1, len(tables) + 1)]
    assert tables


def test_the_ledger_is_short_on_a_telephone_and_filters_without_a_kernel(browser, site):
    page = open_page(browser, f"{site}ledger.html", NARROW)
    assert page.evaluate("document.documentElement.scrollHeight") < 12_000
    verdict, ground = (page.get_by_role("combobox", name=name) for name in ("Verdict", "on"))
    rows, said = page.locator("details.claim:visible"), page.locator(".ledger-filter output")
    everything = rows.count()
    verdict.select_option("holds")
    ground.select_option("drawn")
    count = rows.count()
    assert 0 < count < everything and said.inner_text() == f"{count} of {everything} claims"
    assert rows.locator(".verdicts").filter(has_text="drawn holds").count() == count
    in_table = page.locator(".ledger-overview tr", has_text="drawn birds").locator("td").first.inner_text()
    assert int(in_table) == count
    headings = page.locator("article h2:visible").count()
    ground.select_option("")
    verdict.select_option("")
    assert rows.count() == everything and page.locator("article h2:visible").count() > headings
    rows.first.locator("summary").click()
    assert rows.first.get_by_text("Source:").is_visible()
    assert page.problems == []
    page.context.close()
