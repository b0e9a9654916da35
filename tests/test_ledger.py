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


def test_not_decided_needs_both_ends_of_the_interval(monkeypatch):
    claim = dict(id="x", verdict="not decided", evidence=[{"difference": dict(grid="g", a={"arm": "a"}, b={"arm": "b"},
                                                                             column="accuracy")}])
    claim["if"] = ["low <= 0", "high >= 0"]
    rows = [dict(seed=s, arm=arm, accuracy=value) for arm, values in (("a", (0.5, 0.7)), ("b", (0.6, 0.6)))
            for s, value in enumerate(values)]
    monkeypatch.setattr(ledger, "read_results", lambda name: rows)
    ledger.evidence(claim)
    for row in rows[:2]:
        row["accuracy"] = 0.9 + 0.001 * row["seed"]
    with pytest.raises(ledger.LedgerError, match="'not decided' stands if low <= 0, but the number is"):
        ledger.evidence(claim)


@pytest.mark.parametrize("words, expected", [
    ("0.91 ± 0.09 of all", (0.91, 0.82, 1.0)),
    ("0.91 +- 0.09", (0.91, 0.82, 1.0)),
    ("undecided: +0.3 points (-0.8 to +1.4)", (0.3, -0.8, 1.4)),
    ("-0.6 points, 95 % interval -3.4 to +2.2, n = 5", (-0.6, -3.4, 2.2)),
    ("1.76 (1.68-1.84)", (1.76, 1.68, 1.84)),
])
def test_the_interval_of_a_printed_number_is_read(words, expected):
    assert ledger.interval_in(words)[1:] == pytest.approx(expected)


def test_a_range_of_other_things_is_no_interval():
    found = ledger.interval_in("C/16: under 0.1 %, operations 4.4 to 4.8 times")
    assert found.mean == 16 and found.low != found.low


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
