"""Every chapter keeps the promises of the book: one plan, one first cell, exercises that were run, checks that mark."""

import os
import re
from copy import deepcopy
from pathlib import Path

import as_shown
import author_year
import nbformat
import printed
import pytest
from nbclient import NotebookClient
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def cells(request):
    return nbformat.read(request.param, as_version=4).cells


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def prose(cells):
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_the_first_cell_is_the_same_everywhere_and_prints_nothing():
    first = {path: code(nbformat.read(path, as_version=4).cells)[0] for path in CHAPTERS}
    assert len({cell.source for cell in first.values()}) == 1
    assert all(not cell.outputs and cell.metadata.tags == ["hide-input"] for cell in first.values())


def test_a_chapter_has_one_parameters_cell_that_says_small(cells):
    tagged = [cell for cell in code(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in tagged[0].source.splitlines() if not line.startswith("#")]
    assert lines[:2] == ['PROFILE = "small"', "SEED = 0"]


def test_a_chapter_follows_the_plan(cells):
    text = prose(cells)
    assert len(re.findall(r"^# ", text, flags=re.M)) == 1 and text.startswith("# ")
    assert "**You will be able to**" in text and "**The question.**" in text
    heads = re.findall(r"^## (.+)$", text, flags=re.M)
    assert heads[-4:] == ["Recap", "Quick checks", "Exercises", "What this chapter has settled"]
    settled = text.split("## What this chapter has settled")[1]
    assert len(re.findall(r"^\| ", settled, flags=re.M)) >= 3


def test_a_chapter_has_three_quick_checks_or_more(cells):
    checks = [cell for cell in code(cells) if re.search(r"^quiz\(", cell.source, flags=re.M)]
    assert len(checks) >= 3
    for cell in checks:
        assert "remove-input" in cell.metadata.tags
        assert all("text/html" in output.data for output in cell.outputs) and cell.outputs


def test_every_exercise_has_a_hidden_solution_that_was_run(cells):
    labels = re.findall(r"```{exercise}\n:label: (\S+)", prose(cells))
    assert 3 <= len(labels) <= 5
    for label in labels:
        opening = f"{{solution-start}} {label}\n:class: dropdown"
        start = next(i for i, cell in enumerate(cells) if opening in cell.source)
        end = next(i for i, cell in enumerate(cells) if i > start and "```{solution-end}" in cell.source)
        between = code(cells[start:end])
        assert between, label
        for cell in between:
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), label
            assert cell.execution_count, label
    assert len(re.findall(r"```{solution-end}", prose(cells))) == len(labels)


def test_a_chapter_was_run_in_order_without_errors_or_warnings(cells):
    counts = [cell.execution_count for cell in code(cells) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code(cells):
        assert not [out for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"]
    ids = [cell.id for cell in cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z0-9-]+", name) for name in ids)


def test_a_changed_number_may_contradict_the_text_and_breaks_nothing(cells):
    """`claim` prints a line where an `assert` would end a reader's run."""
    assert not [cell.id for cell in code(cells) if re.search(r"^\s*assert\b", cell.source, flags=re.M)]


def test_outputs_that_are_not_compared_are_marked_by_a_tag_which_no_reader_sees(cells):
    assert not [cell.id for cell in code(cells) if "NBVAL_" in cell.source]
    assert any("nbval-ignore-output" not in cell.metadata.get("tags", []) for cell in code(cells) if cell.outputs)


def test_code_fits_the_page(cells):
    for cell in code(cells):
        for line in cell.source.splitlines():
            assert len(line) <= 120, line


def test_links_out_are_sound_and_links_inside_lead_somewhere(cells):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(cells)):
        if target.startswith("http"):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./~%#?=&+-]*)?", target), target
        else:
            name = target.split("#")[0]
            assert any((ROOT / "book" / f"{name}{suffix}").exists() for suffix in (".ipynb", ".md")), target


def test_every_work_that_is_cited_is_in_the_bibliography_and_every_work_there_is_cited():
    text = "\n".join(prose(nbformat.read(path, as_version=4).cells) for path in CHAPTERS)
    text += "\n".join(page.read_text() for page in PAGES)
    cited = {key.strip() for keys in re.findall(r"{cite:\w}`([^`]+)`", text) for key in keys.split(",")}
    there = set(re.findall(r"^@\w+{(\w+),", (ROOT / "book" / "references.bib").read_text(), flags=re.M))
    assert cited == there


def test_a_work_has_one_label_which_is_that_of_the_text():
    entries = parse_file(ROOT / "book" / "references.bib").entries.values()
    labels = [author_year.label(entry) for entry in entries]
    assert len(set(labels)) == len(labels)
    assert {"Sengodan, 2025", "Liu et al., 2021", "Abnar and Zuidema, 2020"} <= set(labels)


def test_every_term_of_the_glossary_is_used_somewhere():
    text = "\n".join(prose(nbformat.read(path, as_version=4).cells) for path in CHAPTERS)
    text += "\n".join(page.read_text() for page in PAGES)
    terms = [" ".join(term.split()) for term in re.findall(r"{term}`([^`]+)`", text)]
    used = {re.sub(r".*<(.+)>", r"\1", term).lower() for term in terms}
    glossary = (ROOT / "book" / "glossary.md").read_text().split("```{glossary}\n")[1].split("```")[0]
    assert {line.lower() for line in glossary.splitlines() if line and not line.startswith(" ")} == used


def test_no_number_of_a_run_is_typed_into_the_introduction():
    text = printed.without_bound((ROOT / "book" / "intro.md").read_text())  # tests/test_printed.py compares bound ones
    assert not re.search(r"\d+\.\d+ ?(%|points?\b)|0\.\d{3}", text.replace("2.66 points on CUB", ""))  # the paper's own


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_figure_has_a_caption(path):
    cells = code(nbformat.read(path, as_version=4).cells)
    figures = [cell for cell in cells if any(map(as_shown.is_figure, as_shown.displayed(cell)))]
    bare = [cell.id for cell in figures if not as_shown.captions(cell)]
    assert figures
    assert bare == []
    for cell in figures:
        for caption in as_shown.captions(cell):
            assert len(as_shown.captions(cell)) == 1 and caption[-1] in ".?)" and len(caption.split()) >= 5, cell.id


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_opens_with_its_result_under_a_fold(path):
    opening = nbformat.read(path, as_version=4).cells[0].source
    fold = re.search(r"^<details>\n<summary>Peek at the answer</summary>\n\n(.+?)\n\n</details>$", opening, re.M | re.S)
    assert fold and opening.index("**The question.**") < fold.start()
    assert printed.BOUND.search(fold[1]) and len(printed.BOUND.sub(r"\1", fold[1]).split()) <= 60


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_read_in_25_minutes(path):
    text = re.sub(r"<!--.*?-->", "", prose(nbformat.read(path, as_version=4).cells), flags=re.DOTALL)
    assert len(text.split()) <= 3000


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LOUPE_SLOW"), reason="set LOUPE_SLOW=1: each chapter twice, ten minutes in all")
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_cell_of_a_chapter_can_be_run_again(path):
    notebook = nbformat.read(path, as_version=4)
    again = deepcopy(notebook.cells)
    for cell in again:
        cell.id += "-again"
    notebook.cells = [cell for pair in zip(notebook.cells, again) for cell in pair]
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": path.parent}}).execute()
    outputs = [output for cell in code(notebook.cells) for output in cell.outputs]
    assert len(outputs) > 10 and not [output for output in outputs if output.output_type == "error"]
