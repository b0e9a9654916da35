"""Start a chapter that meets every requirement of the others:

    python scripts/publish/new_chapter.py 20_shadows "Birds and their shadows"

It writes book/20_shadows.ipynb, with every part that tests/test_chapters.py requires, runs it, and adds it to _toc.yml
after the last chapter with a lower number. Parts to write are marked. To write new outputs while you work:
`python scripts/publish/build_book.py --in-place 20_shadows`.
"""

import re
import sys

import address
import build_book
import nbformat
from build_book import BOOK, ROOT, SOURCE
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from loupe_core.errors import LoupeError
from loupe_core.files.atomic import replaced, write_whole


def markdown(id: str, text: str) -> nbformat.NotebookNode:
    return new_markdown_cell(text, id=id)


def code(id: str, text: str, **metadata: list[str]) -> nbformat.NotebookNode:
    return new_code_cell(text, id=id, metadata=metadata)


def first_cell() -> str:
    """The first code cell of the other chapters."""
    other = nbformat.read(min(BOOK.glob("[0-9]*.ipynb")), as_version=4)
    return next(cell.source for cell in other.cells if cell.cell_type == "code")


def quiz(number: int) -> nbformat.NotebookNode:
    return code(f"quiz-{number}", f'''\
quiz("To be written: question {number}, whose answer a cell above has computed.", {{
    "{number}": "Why it is right.",
    "{number + 1}": "What whoever chose it may have had in mind.",
}}, right=str(answer + {number - 1}))''', tags=["remove-input"])


def exercise(label: str, number: int) -> list[nbformat.NotebookNode]:
    heading = "## Exercises\n\n" if number == 1 else ""
    return [
        markdown(f"ex{number}", f"""\
{heading}```{{exercise}}
:label: {label}-ex{number}
*To be written: what a reader can change, and what to look for.*
```

```{{solution-start}} {label}-ex{number}
:class: dropdown
```"""),
        code(f"ex{number}-solution", f'print("exercise {number}:", answer + {number})',
             jupyter={"source_hidden": True}),
        markdown(f"ex{number}-end", "*To be written: what it shows.*\n\n```{solution-end}\n```"),
    ]


def chapter(number: int, title: str) -> nbformat.NotebookNode:
    """The cells of a new chapter, without outputs."""
    return new_notebook(cells=[
        markdown("title", f"""\
# {title}

*To be written: what it is about, in a paragraph.*

**You will be able to**

- *to be written.*

**The question.** *To be written: one that a cell further down answers. Let the reader guess first.*

<details>
<summary>Peek at the answer</summary>

*To be written in one sentence, with the number that a cell prints:* it is 1<!-- first: the answer -->.

</details>"""),
        code("setup", first_cell(), tags=["hide-input"]),
        code("parameters", """\
# "small": drawn birds, two cores, at most two minutes.
# "full": the paper's own setting, for one GPU.
PROFILE = "small"
SEED = 0""", tags=["parameters"]),
        code("imports", "from loupe_lab.pages.widgets import quiz\nfrom loupe_lab.pages.plots import figure, show"),
        markdown("first-md", "## A first measurement\n\n*To be written: what is measured, and why.*"),
        code("first", 'answer = SEED + 1\nprint("the answer:", answer)'),
        code("first-shown", """\
fig, axes = figure(1, 1)
axes.bar(["answer"], [answer])
show(fig, f"One bar, {answer} high. To be written: what a reader who cannot see it should know.",
     caption="To be written: what the figure shows, and what to see in it.")"""),
        markdown("recap", "## Recap\n\n- *To be written.*"),
        markdown("quick-checks", "## Quick checks"),
        *(quiz(k) for k in (1, 2, 3)),
        *(cell for k in (1, 2, 3) for cell in exercise(f"ch{number}", k)),
        markdown("settled", """\
## What this chapter has settled

| sentence of the paper or of its summary | what came out here |
|---|---|
| *to be written* | *to be written* |
| *to be written* | *to be written* |"""),
    ])


def listed(toc: str, name: str) -> str:
    """The text of _toc.yml with the chapter added after the last one with a lower number.

    Raises:
        LoupeError: there is none.
    """
    lines = toc.splitlines(keepends=True)
    before = [k for k, line in enumerate(lines) if (m := re.match(r" *- file: (\d\d_\w+)", line)) and m[1] < name]
    if not before:
        raise LoupeError(f"_toc.yml lists no chapter before {name}; expected one to put it after")
    entry = re.sub(r"\d\d_\w+", name, lines[before[-1]])
    return "".join([*lines[: before[-1] + 1], entry, *lines[before[-1] + 1:]])


def start(name: str, title: str) -> None:
    """Writes, runs and lists the chapter.

    Raises:
        LoupeError: the name has another form, its number is taken, or the title is empty.
        BuildError: a cell fails.
    """
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", name):
        raise LoupeError(f"{name!r} is no name of a chapter; expected one such as 20_shadows")
    if taken := sorted(BOOK.glob(f"{name[:2]}_*.ipynb")):
        raise LoupeError(f"number {name[:2]} is taken by {taken[0].name}; choose another")
    if not title.strip():
        raise LoupeError(f"no title for {name}; expected one, such as 'Birds and their shadows'")
    toc = ROOT / "_toc.yml"
    entries = listed(toc.read_text(encoding="utf-8"), name)
    SOURCE.mkdir(parents=True, exist_ok=True)
    nbformat.write(chapter(int(name[:2]), title), SOURCE / f"{name}.ipynb")
    notebook, *_ = build_book.run(name)
    with replaced(BOOK / f"{name}.ipynb") as unfinished:
        nbformat.write(notebook, unfinished)
    write_whole(toc, entries)
    address.write(address.read(ROOT), ROOT)  # one more chapter to open on Colab
    print(f"book/{name}.ipynb is written and listed in _toc.yml. Write its text; add its row to book/intro.md and "
          f"README.md; renew its outputs: python scripts/publish/build_book.py --in-place {name}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("new_chapter: expected a name and a title: 20_shadows 'Birds and their shadows'")
    try:
        start(*sys.argv[1:])
    except (LoupeError, build_book.BuildError) as error:
        sys.exit(f"new_chapter: {error}")
