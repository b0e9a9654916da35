"""What a page shows otherwise than its notebook: numbered captions, no marks."""

import re
from types import SimpleNamespace

import as_shown
import build_book
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from loupe_lab.pages.tables import table


def picture():
    return new_output("display_data", {"image/png": "-", "text/plain": "<figure>"})


def caption(text="A line that falls."):
    return new_output("display_data", {"text/markdown": f"**Figure.** {text}", "text/plain": text},
                      metadata={"caption": text})


def tabled(text="Ways down."):
    return new_output("display_data", dict(table([dict(way="sigmoid", zeros=0)], caption=text)._repr_mimebundle_()))


def test_captions_belong_to_figures_tables_are_counted_and_marks_are_gone(tmp_path):
    cells = [new_markdown_cell("It has 14<!-- table: sigmoid --> zeros."),
             new_code_cell(id="falls", outputs=[picture(), caption()]),
             new_code_cell(id="table", outputs=[tabled(), new_output("stream", text="said\n"), tabled("Ways up.")]),
             new_code_cell(id="plain", outputs=[tabled("")])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "03_a.ipynb")
    (tmp_path / "page.md").write_text("14<!-- 03_a#table: sigmoid --> zeros\n\n<!-- ledger -->\n<!-- bench: gate -->\n")
    as_shown.prepare(tmp_path)
    prose, falls, found, plain = nbformat.read(tmp_path / "03_a.ipynb", as_version=4).cells
    bound = '<span class="bound-number" title="this chapter, cell table: sigmoid">14</span>'
    assert prose.source == f"It has {bound} zeros."
    assert len(falls.outputs) == 1 and "image/png" in falls.outputs[0].data
    assert falls.metadata.mystnb.figure == {"caption": "A line that falls.", "name": "figure-03-falls"}
    pages = [output.data["text/html"] for output in (found.outputs[0], found.outputs[2], plain.outputs[0])]
    assert "Table 3.1 </span>Ways down." in pages[0] and "Table 3.2 </span>Ways up." in pages[1]
    assert "caption-number" not in pages[2] and "mystnb" not in found.metadata
    page = (tmp_path / "page.md").read_text()
    assert re.sub("<span[^>]*>|</span>", "", page) == "14 zeros\n\n<!-- ledger -->\n<!-- bench: gate -->\n"
    assert 'title="03_a, cell table: sigmoid"' in page


@pytest.mark.parametrize("outputs", [[caption()], [picture(), tabled(), caption()]])
def test_a_caption_belongs_to_one_thing(outputs):
    cell = new_code_cell(id="falls", metadata={"mystnb": {"image": {"alt": "a line"}}}, outputs=outputs)
    with pytest.raises(build_book.BuildError, match="puts a caption below [02] things"):
        build_book.check_outputs("03_a", new_notebook(cells=[cell]))


def test_a_number_that_differs_ends_the_build(tmp_path):
    source = tmp_path / "_build" / "source"
    source.mkdir(parents=True)
    cells = [new_markdown_cell("15<!-- table: sigmoid --> zeros"), new_code_cell(id="table", outputs=[tabled()])]
    nbformat.write(new_notebook(cells=cells), source / "03_a.ipynb")
    with pytest.raises(build_book.BuildError, match="^03_a: 15<!-- table: sigmoid --> says 15, and the line"):
        build_book.build_pages(source)


def test_on_a_readers_machine_a_number_that_differs_is_told_and_the_pages_are_built(tmp_path, monkeypatch, capsys):
    source, built = tmp_path / "_build" / "source", []
    source.mkdir(parents=True)
    cells = [new_markdown_cell("15<!-- table: sigmoid --> zeros"), new_code_cell(id="table", outputs=[tabled()])]
    nbformat.write(new_notebook(cells=cells), source / "03_a.ipynb")
    (source / "status.md").write_text("<!-- status -->\n<!-- /status -->\n")
    monkeypatch.setattr(build_book, "configuration", lambda source: {})
    monkeypatch.setattr(build_book, "mend", built.append)
    monkeypatch.setattr(build_book.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    assert build_book.build_pages(source, [("03_a", "1", "1")], kept=False) == source.with_name("html") == built[0]
    assert "other on this machine than in the text: 03_a: 15<!-- table: sigmoid --> says 15" in capsys.readouterr().out
