"""Corrects the pages that Sphinx, its theme and its extensions write: weight, accessibility, navigation."""

import html
import re
from pathlib import Path

from PIL import Image

MENDS = [
    # The theme's style sheet already has the icons that this script (1.5 MB) draws.
    (r'<script [^>]*src="[^"]*/fontawesome\.js[^>]*></script>\s*', ""),
    # Thebe runs cells on another host, which no page uses, and declares its constants twice.
    (r"<script>const THEBE_JS_URL.*?</script>\s*", ""),
    (r'<script [^>]*src="[^"]*/sphinx-thebe\.js[^>]*></script>\s*', ""),
    (r'<link [^>]*href="[^"]*/sphinx-thebe\.css[^>]*/>\s*', ""),
    (r'<script type="text/x-thebe-config">.*?</script>\s*', ""),
    # The header repeats the search, and the theme's script binds the sidebars to its invisible buttons, so that a phone
    # has no navigation. An empty header stays, since scripts read its height.
    (r'<header id="pst-header".*?</header>', '<header id="pst-header" class="bd-header" hidden></header>'),
    # The theme lets the keyboard scroll wide elements, but looks for them only when the window's size changes.
    (r"</body>", "<script>addEventListener('click', e => e.target.closest('summary, .toggle-button, .admonition-title')"
                 " && dispatchEvent(new Event('resize')))</script>\n</body>"),
    # The accessible name of a control is its visible label (WCAG 2.5.3), so that a user can speak it.
    (r'(<button class="[^"]*\bsearch-button-field\b[^"]*")[^>]*? aria-label="[^"]*"', r"\1"),
    (r'<summary aria-label="Toggle hidden content">', "<summary>"),
    # Entries of a list are list items; DPUB-ARIA 1.1 deprecates the role that Sphinx writes.
    (r'role="doc-biblioentry"', 'role="listitem"'),
    # "Figure 3.2 What it shows" reads as one sentence.
    (r'(<span class="caption-number">[^<]*?) ?</span>', r"\1. </span>"),
    # See `mend`.
    (r'(="_images/\w+)\.png"', r'\1.webp"'),
]


PRINTED = re.compile(r'<div class="output stream ([^"]*)">(<div class="highlight"><pre>)(.*?)</pre>', flags=re.DOTALL)


def in_words(found: re.Match) -> str:
    """A cell's printed text, with a class for what is words and not set in columns, so that its lines may break."""
    if re.search(r"\S {2,}\S", html.unescape(re.sub(r"<[^>]+>", "", found[3]))):
        return found[0]
    return found[0].replace("output stream ", "output stream loupe-words ", 1)


def mend(folder: Path) -> None:
    """Corrects every page of a folder in place. Pictures become WebP, about a tenth of the size of PNG."""
    for picture in (folder / "_images").glob("*.png"):
        Image.open(picture).convert("RGB").save(picture.with_suffix(".webp"), quality=90)
        picture.unlink()
    for page in folder.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for pattern, replacement in MENDS:
            text = re.sub(pattern, replacement, text, flags=re.DOTALL)
        page.write_text(PRINTED.sub(in_words, text), encoding="utf-8")
