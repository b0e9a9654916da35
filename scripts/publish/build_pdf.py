"""The book as one PDF, printed from its pages by Chromium: `make pdf`.

Reads book/_build/html, which `make book` writes, and writes book/_build/the-loupe.pdf with one bookmark per page of the
book. Folded parts are opened; an explorer is printed in its initial state.
"""

import io
import sys
from pathlib import Path

from chromium import opened
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from pypdf import PdfReader, PdfWriter
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[2]
HTML, OUT = ROOT / "book" / "_build" / "html", ROOT / "book" / "_build" / "the-loupe.pdf"
# Navigation is not printed; wide tables, long lines of code and pictures are not cut off at the edge of the paper.
PRINT = """
.bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .header-article, .prev-next-area, .bd-footer,
.bd-header, .toggle-button, .copybtn, #pst-back-to-top, .search-button__wrapper, .topbar, #jb-print-docs-body,
.ledger-filter
{ display: none !important; }
.bd-main .bd-content .bd-article h1:first-of-type { display: block !important; }
.bd-main, .bd-content, .bd-article-container, .bd-article { max-width: none !important; display: block !important; }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; font-size: 7.5pt !important; }
table { font-size: 8.5pt; max-width: 100%; } td { overflow-wrap: anywhere; } td, th { white-space: normal !important; }
.pst-scrollable-table-container { overflow: visible !important; }
img, svg, canvas { max-width: 100% !important; break-inside: avoid; }
h1, h2, h3 { break-after: avoid; }
.math { font-size: 90%; }
"""
OPEN = """async () => {
  document.documentElement.dataset.theme = "light";
  document.querySelectorAll("details").forEach(d => d.open = true);
  document.querySelectorAll(".toggle-hidden").forEach(d => d.classList.remove("toggle-hidden"));
  if (window.MathJax?.startup) await MathJax.startup.promise;
  await Promise.all([...document.images].map(i => { i.loading = "eager"; return i.decode().catch(() => 0); }));
}"""

# "Try it" has computed its first answer; other pages have no #lab.
READY = """() => !document.querySelector("#lab") || /Computed in/.test(document.querySelector("#lab").innerText)"""


def print_pages(html: Path, names: list[str], out: Path) -> int:
    """Prints html/<name>.html for every name into one file; returns its number of printed pages."""
    writer = PdfWriter()
    with opened(html) as (browser, address):
        for name in names:
            page = browser.new_page(color_scheme="light", viewport=dict(width=900, height=1200))
            page.goto(f"{address}{name}.html", wait_until="load")
            page.evaluate(OPEN)
            page.wait_for_timeout(1000)  # for explorers, which a script draws
            try:
                page.wait_for_function(READY, timeout=60_000)
            except PlaywrightTimeout:
                print(f"pdf: the laboratory of {name}.html gave no answer in a minute; it is printed without one")
            page.add_style_tag(content=PRINT)
            margin = dict(top="15mm", bottom="15mm", left="15mm", right="15mm")
            sheets = PdfReader(io.BytesIO(page.pdf(format="A4", scale=0.8, print_background=True, margin=margin)))
            title = page.title().partition(" — ")[0]
            first = len(writer.pages)
            for sheet in sheets.pages:
                writer.add_page(sheet)
            writer.add_outline_item(title=title, page_number=first)
            page.close()
    writer.compress_identical_objects()
    with out.open("wb") as file:
        writer.write(file)
    return len(writer.pages)


def main() -> None:
    if not (HTML / "intro.html").is_file():
        sys.exit(f"pdf: found no pages in {HTML.relative_to(ROOT)}, expected those of `make book`")
    sheets = print_pages(HTML, list(parse_toc_yaml(ROOT / "_toc.yml")), OUT)
    print(f"{OUT.relative_to(ROOT)}: {sheets} sheets, {OUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
