"""A table is HTML for a reader, and for a program text in which a row is a line."""

import math

import pandas as pd
import pytest
from browser import AXE, axe

from loupe_core import LoupeError
from loupe_lab.pages.tables import table

ROWS = [dict(way="proximal & co", objective=0.29304, zeros=14, interval="0.2 ± 0.1", note="yes"),
        dict(way="sigmoid", objective=math.nan, zeros=0, interval="-12.0 ± 3.1", note="<no>")]


def test_the_text_has_a_line_for_each_row_and_numbers_to_the_right():
    found = table(ROWS, dict(objective=".4f", zeros="{} cells"), caption="Ways down.")
    assert found.lines == ["Ways down.",
                           "way            objective     zeros     interval  note",
                           "proximal & co     0.2930  14 cells    0.2 ± 0.1  yes",
                           "sigmoid                    0 cells  -12.0 ± 3.1  <no>"]
    assert found._repr_mimebundle_()["text/plain"] == "\n".join(found.lines)


def test_values_stay_what_they_are_and_a_frame_does_as_well_as_rows():
    found = table(ROWS, dict(objective=lambda value: f"{value:.1f}"))
    assert found.frame["objective"][0] == 0.29304 and "0.3" in found.lines[1]
    assert table(pd.DataFrame(ROWS)).lines == table(ROWS).lines and table(ROWS).lines[0].startswith("way")


def test_the_html_has_a_caption_and_headings_with_a_scope_and_escapes_what_it_is_given():
    page = table(ROWS, dict(objective=".4f"), caption="Ways <down>.").html
    assert page.count('scope="col"') == len(ROWS[0]) and page.count('scope="row"') == len(ROWS)
    assert "<caption>Ways &lt;down&gt;.</caption>" in page and "&lt;no&gt;" in page and "<no>" not in page
    assert "proximal &amp; co</th>" in page and "nan" not in page
    assert page == table(ROWS, dict(objective=".4f"), caption="Ways <down>.").html, "the same in every run"


def test_a_folded_table_begins_closed_and_has_the_same_text(open_html):
    found = table(ROWS, caption="Ways down.", fold="The <other> arms")
    assert found.lines == table(ROWS, caption="Ways down.").lines
    page = open_html(f"<main>{found.html}</main>")
    assert not page.locator("table").is_visible()
    page.get_by_text("The <other> arms").click()
    assert page.locator("table").is_visible()


@pytest.mark.parametrize("rows, formats, says", [
    ([], None, "found 0 rows"),
    (ROWS, {"zeroes": "d"}, r"formats has \['zeroes'\]"),
    (pd.DataFrame([[1, 2]], columns=["a", "a"]), None, "a name of its own"),
])
def test_what_is_no_table_is_refused_in_one_line(rows, formats, says):
    with pytest.raises(LoupeError, match=says) as caught:
        table(rows, formats)
    assert "\n" not in str(caught.value)


def test_numbers_stand_right_and_words_left_in_the_browser(open_html):
    page = open_html(f"<main>{table(ROWS, dict(objective='.4f'), caption='Ways down.').html}</main>")
    sides = page.evaluate("[...document.querySelector('tbody tr').children].map(e => getComputedStyle(e).textAlign)")
    assert sides == ["left", "right", "right", "right", "left"]
    if AXE.is_file():  # it comes with npm
        assert axe(page, "table") == []
