"""Tables for a chapter: HTML where a page or a notebook shows them, aligned text where a program reads them.

pandas' Styler writes the HTML. The text has a line for each row, so that the ledger and the checks of numbers in prose
can name a row by its words.
"""

from __future__ import annotations

import html
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from loupe_core.errors import LoupeError

Format = str | Callable[[Any], str]  # a format specification such as ".1%", a template such as "{:.0f} px", a function

_NUMBER = re.compile(r"[<>~]?\s*[+\-\N{MINUS SIGN}]?\d.*|nan|never|none|")  # what stands in a column of numbers
# Jupyter, Colab and the pages have styles of their own for a table: these are said against all of them.
_TABLE = [
    ("", "border-collapse: collapse; margin: .4em 0 1em; font-variant-numeric: tabular-nums"),
    ("caption", "caption-side: top; text-align: left; padding: .2em 0 .5em; color: inherit; font-style: normal"),
    ("th, td", "text-align: left; vertical-align: top; padding: .25em .8em .25em .3em"),
    ("thead th", "border-bottom: 1px solid currentColor; vertical-align: bottom"),
    ("tbody th", "font-weight: normal"),
]


class Table:
    """A table that a notebook shows; its first column names the rows.

    frame: the values, unrounded, as a DataFrame. lines: the table as text, the caption first, then the headings.
    """

    def __init__(self, frame: pd.DataFrame, texts: pd.DataFrame, caption: str, fold: str = "") -> None:
        self.frame, self.caption, self.fold = frame, caption, fold
        self._texts = texts
        self._right = [all(_NUMBER.fullmatch(text) for text in texts[name]) for name in texts]
        self._right[0] = False

    @property
    def lines(self) -> list[str]:
        rows = [list(self._texts), *self._texts.to_numpy().tolist()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        aligned = ("  ".join(text.rjust(width) if right else text.ljust(width)
                             for text, width, right in zip(row, widths, self._right)).rstrip() for row in rows)
        return [self.caption, *aligned] if self.caption else list(aligned)

    @property
    def html(self) -> str:
        first, *others = self._texts
        body = self._texts.map(html.escape).set_index(first)
        body.columns = [html.escape(name) for name in others]
        # The heading of the rows' names: Styler would give the name of the index a line of its own.
        body.index.name, body.columns.name = None, html.escape(first)
        right = [i for i, numbers in enumerate(self._right[1:]) if numbers]
        styles = list(_TABLE)
        if right:
            # On a telephone the table scrolls: a number and its interval stay on one line.
            styles += [(", ".join(f".col{i}" for i in right), "text-align: right"),
                       (", ".join(f"td.col{i}" for i in right), "white-space: nowrap")]
        styler = Styler(body, uuid=f"{zlib.crc32(chr(10).join(self.lines).encode()):08x}", cell_ids=False)
        styler.set_table_attributes('class="dataframe loupe-table"').set_table_styles(
            [{"selector": selector, "props": props} for selector, props in styles])
        page = styler.set_caption(html.escape(self.caption)).to_html() if self.caption else styler.to_html()
        page = re.sub(r'<th class="(\w+)[^"]*"', lambda found: found[0].replace(
            "<th", f'<th scope="{"row" if found[1] == "row_heading" else "col"}"'), page)
        page = re.sub(r"\n\s*", "\n", page)
        return f"<details><summary>{html.escape(self.fold)}</summary>\n{page}</details>" if self.fold else page

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": "\n".join(self.lines)}


def table(rows: Iterable[Mapping[str, Any]] | pd.DataFrame, formats: Mapping[str, Format] | None = None,
          caption: str = "", fold: str = "") -> Table:
    """A table to be the last line of a cell, or to be given to `display`.

    Args:
        rows: one mapping for each row, column's heading -> value; or a DataFrame, whose index is not shown.
        formats: column's heading -> how to write its values; others are written by `str`, and None or nan not at all.
            A column whose texts are all numbers is set to the right.
        caption: what the table shows, a sentence; it stands above the table.
        fold: words on a fold under which the table begins closed, for rows that few readers need.

    Raises:
        LoupeError: there are no rows, two columns have one name, or `formats` names a column that is not there.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    frame = frame.rename(columns=str)
    if frame.empty or not frame.columns.is_unique:
        raise LoupeError(f"table: found {len(frame)} rows with the columns {list(frame)}; expected one row or more, "
                         "and a name of its own for each column")
    formats = dict(formats or {})
    if unknown := formats.keys() - set(frame):
        raise LoupeError(f"table: formats has {sorted(unknown)}; expected names among {list(frame)}")
    texts = pd.DataFrame({name: [_text(value, formats.get(name, str)) for value in frame[name].tolist()]
                          for name in frame}, dtype=object)
    return Table(frame, texts, caption, fold)


def _text(value: Any, how: Format) -> str:
    if value is None or value != value:
        return ""
    text = how(value) if callable(how) else how.format(value) if "{" in how else format(value, how)
    return " ".join(text.split())
