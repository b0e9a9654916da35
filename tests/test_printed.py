"""Numbers in prose are bound to what cells have printed, and a number that differs is found."""

import re
from pathlib import Path

import ledger
import nbformat
import printed
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

BOOK = Path(printed.__file__).resolve().parents[2] / "book"
TABLE = """\
norm  lambda  accuracy         peaks
l1       0.5   -2.4 ± 2.5   1,234
l1         5  -14.3 ± 7.2     -21
all 400"""


@pytest.fixture
def book(tmp_path):
    cells = [new_code_cell(id="table", outputs=[new_output("display_data", {"text/plain": TABLE, "text/html": "-"})]),
             new_code_cell(id="said", outputs=[new_output("stream", text="the same, 3 times\nthe same, 4 times\n"),
                                               new_output("stream", text="share: 22% of 7,056 px\n")])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "01_a.ipynb")
    return tmp_path


@pytest.mark.parametrize("prose", [
    "The cost is -14.3<!-- table: l1 5 --> points.",
    "It costs 14.3<!-- -table: l1 5 --> points, **-2.4<!--table:l1  0.5-->** of them",
    "It costs \N{MINUS SIGN}14.3<!-- table: l1\n5 -->.",
    "1,234<!-- table: l1 0.5 --> or 1234<!-- 01_a#table: l1 0.5 --> or +1234<!-- table: l1 0.5 -->",
    "| row | 2.5<!-- table: l1 0.5 --> |",
    "22<!-- said: share --> % of the pixels, 4<!-- said: same, 4 --> times",
    "<!-- bench: gate -->\nno mark of ours",
])
def test_a_number_that_its_line_has_is_bound(prose, book):
    assert printed.unbound(prose, "01_a", book) == []


@pytest.mark.parametrize("prose, why", [
    ("It costs 14.3<!-- table: l1 5 --> points.", r"says 14.3, and the line is: l1 5 -14.3 ± 7.2 -21"),
    ("-14<!-- table: l1 5 -->", "says -14, and"),
    ("-2.4<!-- table: l1 5 -->", "says -2.4, and"),
    ("2<!-- table: l1 0.5 -->", "says 2, and"),
    ("7<!-- table: l2 5 -->", "no line of the output has it"),
    ("7<!-- table: l1 -->", "2 lines have it"),
    ("3<!-- said: the same -->", "2 lines have it"),
    ("400<!-- nowhere: all -->", "no such code cell"),
    ("400<!-- 02_b#table: all -->", "there is no book/02_b.ipynb"),
    ("many <!-- table: all -->", "no number directly before it"),
    ("400 <!-- table: all -->", "no number directly before it"),
])
def test_a_number_that_is_not_there_is_named_with_its_line(prose, why, book):
    problem, = printed.unbound(prose, "01_a", book)
    assert why in str(problem) and "\n" not in str(problem) and str(problem).startswith("01_a: ")


def test_a_page_names_the_chapter_of_its_numbers(book):
    assert printed.unbound("400<!-- 01_a#table: all -->", "", book) == []
    problem, = printed.unbound("400<!-- table: all -->", "", book)
    assert "names no chapter" in problem.why
    (book / "intro.md").write_text("401<!-- 01_a#table: all -->")
    problem, = printed.unbound_in(book)
    assert problem.where == "intro.md"


def test_what_is_bound_is_not_typed_and_a_mark_is_not_shown():
    prose = "It costs 14.3<!-- table: l1 5 --> of 99.5 points."
    assert printed.without_bound(prose) == "It costs  of 99.5 points."
    assert re.sub("<span[^>]*>|</span>", "", printed.shown(prose)) == "It costs 14.3 of 99.5 points."
    assert printed.shown('-1<!-- a: "x" <y> -->') == \
        '<span class="bound-number" title="this chapter, cell a: &quot;x&quot; &lt;y&gt;">-1</span>'


def test_the_ledger_reads_a_table_as_it_reads_a_print(book, monkeypatch):
    monkeypatch.setattr(ledger, "output", lambda chapter, id: printed.output(chapter, id, book))
    assert ledger.cell("01_a", "table", r"l1 +5 +(.+?) {2,}")[1:4] == pytest.approx((-14.3, -21.5, -7.1))
    assert ledger.cell("01_a", "said", r"share: (\d+)").mean == 22
    with pytest.raises(ledger.LedgerError, match="no such code cell"):
        ledger.cell("01_a", "nowhere", "x")


def test_every_bound_number_of_the_book_is_what_its_cell_has_printed():
    assert [str(problem) for problem in printed.unbound_in(BOOK)] == []


def test_a_comment_that_is_no_mark_has_another_form():
    """A mark with a slip in it would be a comment that nobody reads."""
    for path in sorted(BOOK.glob("*.ipynb")):
        prose = printed.prose_of(nbformat.read(path, as_version=4))
        comments = re.findall(r"<!--.*?-->", prose, flags=re.DOTALL)
        assert comments == [mark[0] for mark in printed.marks(prose)], path.stem
