"""What a chapter's cells have printed, and numbers in prose that are bound to it.

In prose, an HTML comment directly after a number says where the number comes from. A reader of the notebook or of the
page does not see it; `unbound` finds where prose and output differ.

    The gate loses 14.3<!-- -verdict: l1 5 --> points.

`verdict` is the id of a cell, `l1 5` words of one line of what the cell has printed (the beginning of a row of a table,
say), and the number stands in that line. Another chapter's cell is `03_l1_vs_l2#verdict`. A minus before the id turns
the sign around: the line has -14.3.
"""

from __future__ import annotations

import re
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parents[2]
_NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?"
NUMBER = re.compile(rf"(?<![\w.,]){_NUMBER}(?![\w]|[.,]\d)")
MARK = re.compile(r"<!--\s*(?P<turned>-?)(?:(?P<chapter>\d\d_\w+)#)?(?P<cell>[a-z0-9-]+):\s*(?P<label>.*?)\s*-->",
                  re.DOTALL)
BOUND = re.compile(rf"(?<![\w.,])(?P<number>{_NUMBER}){MARK.pattern}", re.DOTALL)


class Missing(Exception):
    """A cell that is not there, or has not printed what was looked for; the message is one line."""


class Unbound(NamedTuple):
    """A mark in prose that does not hold, and why."""

    where: str
    mark: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.mark} {self.why}"


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell's outputs say in words: what it printed, and the plain text of its tables."""
    parts = []
    for output in cell.get("outputs", []):
        parts.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
    return "".join(part if part.endswith("\n") or not part else f"{part}\n" for part in parts)


@cache
def _texts(notebook: Path, changed: int) -> dict[str, str]:
    return {cell.id: text_of(cell) for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"}


def output(chapter: str, id: str, book: Path = ROOT / "book") -> str:
    """The text of a cell's outputs.

    Raises:
        Missing: there is no such chapter or cell.
    """
    notebook = book / f"{chapter}.ipynb"
    if not notebook.is_file():
        raise Missing(f"names the chapter {chapter}, and there is no book/{notebook.name}")
    texts = _texts(notebook, notebook.stat().st_mtime_ns)
    if id not in texts:
        raise Missing(f"names the cell '{id}', and book/{notebook.name} has no such code cell")
    return texts[id]


def value(number: str) -> str:
    """A number without what two ways of writing it may differ in: "+1,234" -> "1234"."""
    return number.replace(",", "").replace("\N{MINUS SIGN}", "-").lstrip("+")


def turned(number: str) -> str:
    return number[1:] if number.startswith("-") else f"-{number}"


def line_of(text: str, label: str) -> str:
    """The only line of a text that begins with a label, or else has it in it; runs of blanks count as one.

    Raises:
        Missing: no line has it, or several.
    """
    label = " ".join(label.split())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    begins = [line for line in lines if re.match(rf"{re.escape(label)}(?!\w|\.\d)", line)]
    found = begins or [line for line in lines if label in line]
    if not label or not found:
        raise Missing(f"names the row {label!r}, and no line of the output has it; expected one of {lines[:12]}")
    if len(found) > 1:
        raise Missing(f"names the row {label!r}, and {len(found)} lines have it: {found}; expected words of one")
    return found[0]


def marks(prose: str) -> list[re.Match]:
    """Comments of that form, whether or not a number stands before them; one alone on its line is another program's."""
    alone = {found.start() for found in re.finditer(r"^<!--[^\n]*-->$", prose, flags=re.MULTILINE)}
    return [mark for mark in MARK.finditer(prose) if mark.start() not in alone]


def unbound(prose: str, chapter: str = "", book: Path = ROOT / "book") -> list[Unbound]:
    """The marks of a text that do not hold.

    Args:
        prose: Markdown.
        chapter: the chapter of cells that are named without one; "": the text is no chapter's.
        book: the folder of the notebooks.
    """
    found = []
    at_end = {bound.end(): bound["number"] for bound in BOUND.finditer(prose.replace("\N{MINUS SIGN}", "-"))}
    for mark in marks(prose):
        text, number = " ".join(mark[0].split()), at_end.get(mark.end())
        try:
            if number is None:
                raise Missing("has no number directly before it")
            if not (name := mark["chapter"] or chapter):
                raise Missing("names no chapter; expected one, as in 03_l1_vs_l2#table")
            line = line_of(output(name, mark["cell"], book), mark["label"])
            wanted = turned(value(number)) if mark["turned"] else value(number)
            there = [value(each) for each in NUMBER.findall(line.replace("\N{MINUS SIGN}", "-"))]
            if wanted not in there:
                raise Missing(f"says {wanted}, and the line is: {line}")
        except Missing as problem:
            found.append(Unbound(chapter or "a page", f"{number or ''}{text}", str(problem)))
    return found


def without_bound(prose: str) -> str:
    """The text without its bound numbers: what is left is typed."""
    return BOUND.sub("", prose)


def shown(prose: str) -> str:
    """The text as a page shows it: a bound number in one piece, which says where it comes from to who points at it."""
    def in_one_piece(bound: re.Match) -> str:
        of = escape(f'{bound["chapter"] or "this chapter"}, cell {bound["cell"]}: {" ".join(bound["label"].split())}')
        return f'<span class="bound-number" title="{of}">{bound["number"]}</span>'

    return BOUND.sub(in_one_piece, prose)


def prose_of(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def unbound_in(book: Path) -> list[Unbound]:
    """The marks that do not hold, of all chapters and pages of a folder."""
    found = []
    for path in sorted(book.glob("*.ipynb")):
        found += unbound(prose_of(nbformat.read(path, as_version=4)), path.stem, book)
    for path in sorted(book.glob("*.md")):
        found += [problem._replace(where=path.name) for problem in unbound(path.read_text(encoding="utf-8"), "", book)]
    return found
