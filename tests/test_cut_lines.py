"""What a notebook shows as text and a page reads as a command: a line that begins with % is a comment there, and gone.

The pages' own parser says what it has read.
"""

import re
from pathlib import Path

import nbformat
import pytest
import yaml
from myst_parser.config.main import MdParserConfig
from myst_parser.mdit_to_docutils.base import DocutilsRenderer
from myst_parser.parsers.mdit import create_md_parser

BOOK = Path(__file__).resolve().parents[1] / "book"
FILES = sorted([*BOOK.glob("*.md"), *BOOK.glob("*.ipynb")])
EXTENSIONS = yaml.safe_load((BOOK.parent / "_config.yml").read_text())["parse"]["myst_enable_extensions"]
PARSER = create_md_parser(MdParserConfig(enable_extensions=EXTENSIONS), DocutilsRenderer)
# kinds of token, and what the reader of the page gets in place of the line
CHANGED = {
    "myst_line_comment": "a line that begins with % is dropped",
    "myst_target": "a line such as (label)= is dropped",
    "myst_block_break": "+++ is dropped",
    "colon_fence": "::: begins a block",
    "dl_open": "a line that begins with : makes a list of definitions",
    "substitution_inline": "{{...}} is replaced", "substitution_block": "{{...}} is replaced",
    "footnote_ref": "[^...] is a footnote", "footnote_reference_open": "[^...] is a footnote",
    "math_block_label": "a label behind $$ is dropped", "hr": "--- or *** draws a line",
    "front_matter": "--- at the beginning hides what follows",
}
PAGE = {"myst_target", "dl_open"}  # what a page of Markdown, which no notebook shows, may have


def changed(text: str, allowed: frozenset | set = frozenset(), inside: bool = False) -> list[str]:
    """The lines of a text that a page drops or changes, each with the reason; also those inside of directives."""
    lines, found = text.splitlines(), []
    for token in PARSER.parse(text):
        where = lines[token.map[0]] if token.map else ""
        for each in [token, *(token.children or [])]:
            if each.type in CHANGED and each.type not in allowed:
                found.append(f"{where!r}: {CHANGED[each.type]}")
        if token.type == "heading_open" and (token.markup in "-=" or inside):
            found.append(f"{where!r}: --- or === below it makes it a heading")
        if token.type == "fence" and re.match(r"{(?!code|eval-rst|glossary|math)", token.info):
            content = re.sub(r"^(:[\w-]+:.*\n)+", "", token.content)
            found += changed(content, allowed, inside=True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_page_shows_all_that_is_written(path):
    if path.suffix == ".md":
        assert changed(path.read_text(encoding="utf-8"), PAGE) == []
        return
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            assert changed(cell.source) == [], cell.id


@pytest.mark.parametrize("text", [
    "It is 1\n% of all.", "(here)=\n\n# A",
    "one\n+++\ntwo", "A line\n---\nof two", "A line\n===\n", ":::{note}\nA\n:::",
    "word\n: what it is",
    "use {{ this }} now", "see [^1]\n\n[^1]: there", "$$\nx\n$$ (formula)", "one\n\n---\n\ntwo",
    "---\na: b\n---\n# A", "```{exercise}\n:label: a\nIt is 1\n% of all.\n```", "- a point\n  % dropped",
])
def test_each_of_these_is_found(text):
    assert changed(text)


@pytest.mark.parametrize("text", [
    "It is 1 % of all, a - b, (here) = there, {term}`mask`", "# A\n\ntext\n\n## B", "```python\n% x\n```", "`% x`",
    "| a | b |\n|---|---|\n| 1 | 2 |", "$$\nx = 1\n$$", "0.6<!-- table: l1 -->", "    % code",
    "<details>\n<summary>Peek</summary>\n\n14<!-- a: b --> points\n\n</details>", "```{code-block} sh\n% x\n```",
])
def test_and_none_of_these(text):
    assert changed(text) == []
