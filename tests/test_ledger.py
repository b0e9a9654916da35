"""Every claim of the ledger has evidence that is there and bears its verdict; nothing in it is typed twice."""

import re

import ledger
import ledger_page
import pytest
import readme
import record_results

CLAIMS = ledger.ledger()["claims"]


RULED = [(claim, ground) for claim in CLAIMS for ground in ledger.GROUNDS if ground in claim]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["id"])
def test_a_claim_is_judged_on_its_own_ground_by_numbers(claim):
    assert claim["ground"] in ledger.GROUNDS and claim["ground"] != "drawn", "the paper does not speak of drawn birds"
    verdicts = {ground: ledger.judged(claim, ground).verdict for ground in ledger.GROUNDS}  # raises on a missing number
    assert ledger.overall(claim) == verdicts[claim["ground"]] in ledger.VERDICTS
    assert claim["ground"] != "cub" or verdicts["cub"] == "not run" and "gpu" in claim or ledger.table.recorded()
    for name in ledger.chapters(claim):
        assert (ledger.ROOT / "book" / f"{name}.ipynb").is_file()
    assert "gpu" not in claim or claim["gpu"] in ledger.ledger()["commands"]
    assert not {"verdict", "if", "says"} & claim.keys(), "nobody writes a verdict"
    reads = re.sub(r"stage \d|2 x 2|L[12]|lambda [\d.]+|M = \d|1 and 0.2", "", claim.get("reads", ""))
    assert not re.search(r"\d", reads), "its numbers come from results"


@pytest.mark.parametrize("claim, ground", RULED, ids=lambda value: value if isinstance(value, str) else value["id"])
def test_a_verdict_on_samples_needs_an_end_of_an_interval(claim, ground):
    conditions = [text for item in claim[ground] for side in ("holds", "fails") for text in item.get(side, [])]
    assert conditions or ground != claim["ground"], "the claim's own ground has no rule"
    names = {text.split()[0] for text in conditions}
    assert names <= ({"mean", "printed"} if ground == "arithmetic" else {"low", "high", "p"})
    if ground == "arithmetic":
        return
    for item in claim[ground]:
        assert ("fails" in item) <= ("holds" in item)
        measures = ledger.ON_CUB if ground == "cub" else ledger.MEASURES
        (kind, options), = ((k, v) for k, v in item.items() if k in measures)
        number = None if ground == "cub" else measures[kind](**options)
        if number and "holds" in item:
            assert number.low <= number.mean <= number.high, "a condition on a number that has no interval"


@pytest.mark.parametrize("claim, ground", [(c, g) for c, g in RULED if g != "arithmetic"],
                         ids=lambda value: value if isinstance(value, str) else value["id"])
def test_no_interval_meets_both_conditions_of_a_rule(claim, ground):
    """Or a page could not be built on the day that the runs are there."""
    for item in claim[ground]:
        sides = item.get("holds", []), item.get("fails", [])
        bounds = {float(text.split()[2]) for side in sides for text in side if not text.startswith("p")} or {0.0}
        ends = sorted({bound + step for bound in bounds for step in (-5, -0.01, 0, 0.01, 5)})
        for low in ends:
            for high in ends[ends.index(low):]:
                for p in (0.01, 0.5):
                    number = ledger.Number("", (low + high) / 2, low, high, p)
                    held, failed = (bool(side) and all(ledger.meets(number, text) for text in side) for side in sides)
                    assert not (held and failed), (low, high, p)


def test_no_two_claims_take_one_number_for_opposite_verdicts():
    """A number by which one claim holds may not be the one by which another does not, other than by another bound."""
    seen = {}
    for claim, ground in RULED:
        for item in claim[ground]:
            for side in ("holds", "fails"):
                measure = repr({k: v for k, v in item.items() if k not in ("of", "holds", "fails")})
                for text in item.get(side, []):
                    other = seen.setdefault((ground, measure, text), (side, claim["id"]))
                    assert other[0] == side, (claim["id"], other[1], text)


def test_claims_are_many_and_each_stands_once():
    assert len({claim["id"] for claim in CLAIMS}) == len(CLAIMS) >= 40
    assert len({claim["claim"] for claim in CLAIMS}) == len(CLAIMS)


def test_the_paper_both_versions_the_code_and_the_summary_are_heard():
    sources = " ".join(claim["source"] for claim in CLAIMS)
    assert all(name in sources for name in ("v1", "v2", "code", "summary"))


def rows(**arms):
    return [dict(seed=s, arm=arm, accuracy=number) for arm, numbers in arms.items() for s, number in enumerate(numbers)]


DIFFERENCE = dict(difference=dict(grid="g", a={"arm": "a"}, b={"arm": "b"}, column="accuracy"))


@pytest.mark.parametrize("a, verdict", [((0.9, 0.91, 0.92), "holds"), ((0.1, 0.11, 0.12), "does not hold"),
                                        ((0.1, 0.5, 0.9), "not decided"), ((0.9,), "not run"), ((), "not run")])
def test_the_verdict_follows_from_the_interval_and_the_number_of_runs(a, verdict, monkeypatch):
    claim = dict(id="x", ground="drawn", drawn=[DIFFERENCE | dict(holds=["low > 0"], fails=["high <= 0"])])
    monkeypatch.setattr(ledger, "read_results", lambda name: rows(a=a, b=(0.5, 0.51, 0.49)))
    assert ledger.overall(claim) == verdict
    claim["drawn"][0]["difference"] = DIFFERENCE["difference"] | dict(seeds=4)
    assert ledger.overall(claim) == "not run"


def test_all_numbers_must_hold_and_one_that_fails_is_enough(monkeypatch):
    monkeypatch.setattr(ledger, "read_results", lambda name: rows(a=(0.9, 0.91), b=(0.5, 0.51)))
    good, bad = (DIFFERENCE | conditions for conditions in (
        dict(holds=["low > 0"], fails=["high <= 0"]), dict(holds=["high < 0"], fails=["low > 0"])))
    undecided = DIFFERENCE | dict(holds=["low > 99"])
    verdict = lambda *items: ledger.overall(dict(id="x", ground="drawn", drawn=items))  # noqa: E731
    assert verdict(good, good) == "holds" and verdict(good, undecided) == "not decided"
    assert verdict(good, bad) == "does not hold" and verdict(good, DIFFERENCE) == "holds"
    assert verdict(DIFFERENCE) == "not run", "a number without conditions gives no verdict"
    with pytest.raises(ledger.LedgerError, match="x: on the ground 'drawn' both verdicts would stand"):
        verdict(DIFFERENCE | dict(holds=["low > 0"], fails=["low > 0"]))


def test_one_of_several_comparisons_has_a_wider_interval(monkeypatch):
    monkeypatch.setattr(ledger, "read_results", lambda name: rows(a=(0.9, 0.92, 0.91), b=(0.5, 0.51, 0.55)))
    alone, of_three = (ledger.difference(**DIFFERENCE["difference"], compared=n) for n in (1, 3))
    assert of_three.low < alone.low < alone.mean == of_three.mean and "; one of 3)" in of_three.text


def test_a_column_minus_another():
    assert ledger.value(dict(a="0.9", b="0.25"), "a - b") == pytest.approx(0.65)


@pytest.mark.parametrize("words, expected", [
    ("0.91 ± 0.09 of all", (0.91, 0.82, 1.0)),
    ("0.91 +- 0.09", (0.91, 0.82, 1.0)),
    ("undecided: +0.3 points (-0.8 to +1.4)", (0.3, -0.8, 1.4)),
    ("-0.6 points, 95 % interval -3.4 to +2.2, n = 5", (-0.6, -3.4, 2.2)),
    ("1.76 (1.68-1.84)", (1.76, 1.68, 1.84)),
    ("+0.05 to +0.38, higher", (0.215, 0.05, 0.38)),
])
def test_the_interval_of_a_printed_number_is_read(words, expected):
    assert ledger.interval_in(words)[1:4] == pytest.approx(expected)


def test_a_range_of_other_things_is_no_interval():
    found = ledger.interval_in("C/16: under 0.1 %, operations 4.4 to 4.8 times")
    assert found.mean == 16 and found.low != found.low


def test_evidence_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(ledger, "read_results", lambda name: [dict(seed=0, arm="a")] * 2)
    with pytest.raises(ledger.LedgerError, match="g: 2 rows have {'arm': 'a'}"):
        ledger.select("g", dict(arm="a"))
    with pytest.raises(ledger.LedgerError, match="cell 'cost': 'no such words' is not in its output"):
        ledger.cell("04_the_loupe", "cost", "no such words")


def test_the_page_has_every_claim_once_and_counts_them_by_ground():
    page = ledger_page.page()
    assert re.findall(r'<details class="claim" id="claim-([^"]+)"', page) == sorted(
        (claim["id"] for claim in CLAIMS), key=[c["id"] for t in dict.fromkeys(c["topic"] for c in CLAIMS)
                                                for c in CLAIMS if c["topic"] == t].index)
    assert f"{len(CLAIMS)} claims:" in page
    counted = dict(re.findall(r'<tr><th scope="row">([^<]+)</th>(.*?)</tr>', page))
    for ground, name in ledger.GROUNDS.items():
        *numbers, total = (int(n or 0) for n in re.findall(r"<td>(\d*)</td>", counted[name]))
        verdicts = re.findall(rf'<details class="claim"[^>]* data-{ground}="([^"]+)"', page)
        assert sum(numbers) == total == len(verdicts), name
        assert numbers == [verdicts.count(verdict) for verdict in ledger.VERDICTS]
        assert total == sum((claim["ground"] == "arithmetic") == (ground == "arithmetic") for claim in CLAIMS)


def test_a_row_names_its_verdicts_in_words_and_marks_the_claims_own():
    for claim in CLAIMS:
        row = ledger_page.row(claim, [])
        summary = row.split("</summary>")[0]
        chips = re.findall(r'<span class="verdict ([\w-]+)( own)?"><small>(\w+)</small> ([\w ]+)</span>', summary)
        assert len(chips) == (1 if claim["ground"] == "arithmetic" else 3), claim["id"]
        assert all(kind == verdict.replace(" ", "-") for kind, _, _, verdict in chips)
        assert [ledger_page.SHORT[claim["ground"]]] == [ground for _, own, ground, _ in chips if own]
        assert (ledger.overall(claim),) == tuple(verdict for _, own, _, verdict in chips if own)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["id"])
def test_no_number_of_the_ledger_is_glued_to_another(claim):
    """Two columns of a print, or a sentence and its semicolon, without what stood between them."""
    for ground in ledger.GROUNDS:
        for text in ledger.labelled(ledger.judged(claim, ground).numbers):
            assert not re.search(r"[;,:.]{2}|[(\[] | [,;:.)]|^[ ,;:.]|[ ,;:]$|: :", text), text
            assert not re.search(r"[\d)%] +[+-]?\d", text), f"two columns side by side: {text}"


def test_a_printed_number_loses_the_blanks_and_stops_of_its_column(monkeypatch):
    monkeypatch.setattr(ledger, "output", lambda chapter, id: "gate   +0.5 ( -3.9 to  +4.9);  next 7\n")
    assert ledger.cell("a", "b", r"gate +(.*?) +next").text == "+0.5 (-3.9 to +4.9)"


def test_the_readmes_table_is_the_ledgers():
    text = readme.README.read_text()
    assert readme.filled(text) == text, "python scripts/publish/readme.py"
    assert len(readme.table().splitlines()) == 2 + len(readme.CLAIMS)


def test_arms_of_a_number_are_choices_of_its_grid():
    """A name that no grid has would be "not run" for ever, without a word."""
    for claim in ledger.ledger()["claims"]:
        for item in (item for ground in ("arithmetic", "drawn", "photographs") for item in claim.get(ground, [])):
            options = item.get("difference") or item.get("mean") or {}
            grids = [options["grid"]] if isinstance(options.get("grid"), str) else options.get("grid", [])
            choices = [choice for grid in grids for choice in record_results.GRIDS[grid][1]]
            for where in (options[side] for side in ("a", "b", "where") if side in options):
                assert any(all(str(choice.get(k)) == str(v) for k, v in where.items()) for choice in choices), (
                    claim["id"], where)
