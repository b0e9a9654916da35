"""What Sphinx, its theme and its extensions write into a page that a reader is better off without."""

import re
from pathlib import Path

from PIL import Image

MENDS = [
    # The icons come with the theme's style sheet; this script (1.5 MB) would draw them again.
    (r'<script [^>]*src="[^"]*/fontawesome\.js[^>]*></script>\s*', ""),
    # Thebe runs cells on a foreign host, which no page wants, and declares its constants twice.
    (r"<script>const THEBE_JS_URL.*?</script>\s*", ""),
    (r'<script [^>]*src="[^"]*/sphinx-thebe\.js[^>]*></script>\s*', ""),
    (r'<link [^>]*href="[^"]*/sphinx-thebe\.css[^>]*/>\s*', ""),
    (r'<script type="text/x-thebe-config">.*?</script>\s*', ""),
    # The header repeats the search; and its own buttons, which nobody sees, are those that the theme's script lets open
    # the sidebars, so that a telephone had no navigation. The scripts still ask how high the header is.
    (r'<header id="pst-header".*?</header>', '<header id="pst-header" class="bd-header" hidden></header>'),
    # The theme lets the keyboard scroll what is too wide, but looks for that only when a window's size changes.
    (r"</body>", "<script>addEventListener('click', e => e.target.closest('summary, .toggle-button, .admonition-title')"
                 " && dispatchEvent(new Event('resize')))</script>\n</body>"),
    # A control has the name that is written on it, so that a reader can say it.
    (r'(<button class="[^"]*\bsearch-button-field\b[^"]*")[^>]*? aria-label="[^"]*"', r"\1"),
    (r'<summary aria-label="Toggle hidden content">', "<summary>"),
    # A list has list items; the role of its entries is no longer in the standard (DPUB-ARIA 1.1).
    (r'role="doc-biblioentry"', 'role="listitem"'),
    # See `mend`.
    (r'(="_images/\w+)\.png"', r'\1.webp"'),
]


def mend(html: Path) -> None:
    """Mends every page of a folder, in place. Pictures become WebP, some ten times as small as PNG."""
    for picture in (html / "_images").glob("*.png"):
        Image.open(picture).convert("RGB").save(picture.with_suffix(".webp"), quality=90)
        picture.unlink()
    for page in html.glob("*.html"):
        text = page.read_text()
        for pattern, replacement in MENDS:
            text = re.sub(pattern, replacement, text, flags=re.DOTALL)
        page.write_text(text)
