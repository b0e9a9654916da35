"""What stands in quotation marks as the words of the paper or of its summary stands in data/quotations.yml."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
PASSAGES = yaml.safe_load((ROOT / "data" / "quotations.yml").read_text(encoding="utf-8"))


def bare(text: str) -> str:
    """The words alone: no line breaks, no marks at the ends, lower case, the letter in place of LaTeX's lambda."""
    return " ".join(text.replace(r"$\lambda$", "λ").split()).strip(" .,;:?").lower()


def unknown(text: str) -> list[str]:
    """Quotations in a text that no passage holds; "..." leaves something out."""
    known = [bare(passage) for passages in PASSAGES.values() for passage in passages]
    return [quotation for quotation in re.findall(r'"([^"]+)"', text)
            if not all(any(bare(part) in passage for passage in known) for part in quotation.split("..."))]


def attributed(markdown: str) -> list[str]:
    """The first column of the table of what a chapter has settled, and each sentence that names paper or summary."""
    prose, _, table = markdown.partition("## What this chapter has settled")
    prose = re.sub(r"`[^`]*`", "", re.sub(r"```\w*\n.*?```", "", prose, flags=re.S))
    sentences = [sentence for paragraph in re.split(r"\n\s*\n|\n(?=- )", prose)
                 for sentence in re.split(r'(?<=[.!?])\s+(?=[A-Z*"\[{])', " ".join(paragraph.split()))]
    named = [sentence for sentence in sentences if re.search(r"\b(paper|summary)\b", sentence, flags=re.I)]
    return named + re.findall(r"^\| (.+?) \|", table, flags=re.M)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_quotes_what_its_source_says(chapter):
    cells = nbformat.read(chapter, as_version=4).cells
    texts = [text for cell in cells if cell.cell_type == "markdown" for text in attributed(cell.source)]
    assert len(texts) > 3
    assert [quotation for text in texts for quotation in unknown(text)] == []


def test_the_ledger_quotes_what_its_source_says():
    claims = [claim["claim"] for claim in yaml.safe_load((ROOT / "data" / "ledger.yml").read_text("utf-8"))["claims"]]
    assert sum('"' in claim for claim in claims) > 20
    assert [quotation for claim in claims for quotation in unknown(claim)] == []


@pytest.mark.parametrize("text, wrong", [
    ('"The mask is the explanation", says the paper.', ["The mask is the explanation"]),
    ('The summary promises\n"minimal (<0.1%)\nparameter overhead".', []),
    ('"A word of ours" stands here. The paper says nothing.', []),
    ('Two `names["of code"]` of the paper.', []),
    ('## What this chapter has settled\n\n| "only slightly worse" | yes, "so to say" |', ["only slightly worse"]),
    ('The paper: "weight updates ... are scaled by attention values".', []),
    ('The paper: "weight updates ... vanish".', ["weight updates ... vanish"]),
])
def test_a_quotation_is_found_and_looked_up(text, wrong):
    assert [quotation for part in attributed(text) for quotation in unknown(part)] == wrong
