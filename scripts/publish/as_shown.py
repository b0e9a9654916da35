"""The chapters as the pages show them: captions numbered, bound numbers without their marks.

In a notebook a caption is an output of its own below its figure (`loupe_lab.pages.plots.put_caption`); on the page it
belongs to the figure, and Sphinx numbers it by chapter. Tables have their captions, which are numbered here.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from printed import shown


def captions(cell: nbformat.NotebookNode) -> list[str]:
    """The captions that a cell has put below what it shows."""
    return [output.metadata["caption"] for output in cell.get("outputs", []) if "caption" in output.get("metadata", {})]


def displayed(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """What a cell shows beside printed text and captions."""
    return [output for output in cell.get("outputs", []) if "data" in output and "caption" not in output.metadata]


def is_figure(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a picture, a series of them or an explorer, and so needs a caption."""
    page = str(output.get("data", {}).get("text/html", ""))
    return "image/png" in output.get("data", {}) or "<img" in page or "loupe-explorer" in page


def as_shown(notebook: nbformat.NotebookNode, name: str) -> None:
    """Turns a chapter into what its page shows, in place."""
    tables = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = shown(cell.source)
            continue
        if found := captions(cell):
            cell.outputs = [output for output in cell.outputs if "caption" not in output.get("metadata", {})]
            figure = {"caption": found[0], "name": f"figure-{name[:2]}-{cell.id}"}
            cell.metadata["mystnb"] = {**cell.metadata.get("mystnb", {}), "figure": figure}
        for output in displayed(cell):
            page = output.data.get("text/html", "")
            if "loupe-table" in page and "<caption>" in page:
                tables += 1
                number = f'<caption><span class="caption-number">Table {int(name[:2])}.{tables} </span>'
                output.data["text/html"] = page.replace("<caption>", number, 1)


def prepare(source: Path) -> None:
    """Turns every notebook and page of a folder, a copy of book/, into what is shown."""
    for path in source.glob("[0-9]*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        as_shown(notebook, path.stem)
        nbformat.write(notebook, path)
    for path in source.glob("*.md"):
        path.write_text(shown(path.read_text(encoding="utf-8")), encoding="utf-8")
