"""Every claim of the ledger has evidence that is there and bears its verdict; nothing in it is typed twice."""

import re

import ledger
import pytest
import readme

CLAIMS = ledger.ledger()["claims"]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["id"])
def test_a_claim_has_evidence_that_bears_its_verdict(claim):
    assert claim["verdict"] in ledger.VERDICTS
    numbers = ledger.evidence(claim)  # raises where a number is missing or says otherwise
    assert numbers or claim["verdict"] == "not run here", "a verdict without a number"
    assert claim["verdict"] != "not run here" or "gpu" in claim, "what was not run here needs its command"
    assert (ledger.ROOT / "book" / f"{claim['chapter']}.ipynb").is_file()
    assert "gpu" not in claim or claim["gpu"] in ledger.ledger()["commands"]
    says = re.sub(r"stage \d|2 x 2|L[12]|lambda [\d.]+", "", claim["says"])
    assert not re.search(r"\d", says), "its numbers come from results"


def test_claims_are_many_and_each_stands_once():
    assert len({claim["id"] for claim in CLAIMS}) == len(CLAIMS) >= 40
    assert len({claim["claim"] for claim in CLAIMS}) == len(CLAIMS)


def test_the_paper_both_versions_the_code_and_the_summary_are_heard():
    sources = " ".join(claim["source"] for claim in CLAIMS)
    assert all(name in sources for name in ("v1", "v2", "code", "summary"))


def test_a_number_that_does_not_bear_the_verdict_is_refused(monkeypatch):
    claim = dict(id="x", verdict="holds", evidence=[{"of": "a", "mean": dict(grid="g", where={}, column="accuracy")}])
    rows = [dict(seed=s, accuracy=value) for s, value in enumerate((0.1, 0.2, 0.3))]
    monkeypatch.setattr(ledger, "read_results", lambda name: rows)
    claim["if"] = "mean > 0.19"
    assert ledger.evidence(claim)[0][1].mean == pytest.approx(0.2)
    claim["if"] = "low > 0.19"
    with pytest.raises(ledger.LedgerError, match="'holds' stands if low > 0.19, but the number is 0.20"):
        ledger.evidence(claim)


def test_evidence_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(ledger, "read_results", lambda name: [dict(seed=0, arm="a")] * 2)
    with pytest.raises(ledger.LedgerError, match="g: 0 rows have {'arm': 'b'}"):
        ledger.select("g", dict(arm="b"))
    with pytest.raises(ledger.LedgerError, match="g: 2 rows have {'arm': 'a'}"):
        ledger.select("g", dict(arm="a"))
    with pytest.raises(ledger.LedgerError, match="cell 'cost': 'no such words' is not in its output"):
        ledger.cell("04_the_loupe", "cost", "no such words")


def test_the_page_has_every_claim_once_and_counts_them():
    page = ledger.page()
    total = re.search(r"\*\*(\d+) claims:\*\* (.+)\.", page)
    assert int(total[1]) == len(CLAIMS) == sum(int(n) for n in re.findall(r"\d+", total[2]))
    assert len(re.findall(r"^\| (?!claim|---)", page, flags=re.M)) == len(CLAIMS)


def test_the_readmes_table_is_the_ledgers():
    text = readme.README.read_text()
    assert readme.filled(text) == text, "python scripts/publish/readme.py"
    assert len(readme.table().splitlines()) == 2 + len(readme.CLAIMS)
